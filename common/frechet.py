"""Samples beside data: the Frechet distance in an encoder's feature space (Heusel et al. 2017, 1706.08500), and the
nearest training images, which would show samples that are memorised."""
import torch
import torch.nn.functional as F

from common import linear_probe
from common.cli import Refusal


def root(covariance):
    """The symmetric square root of a symmetric (D, D) that has no negative eigenvalues but by rounding."""
    variance, axes = torch.linalg.eigh(covariance)
    return axes * variance.clamp(min=0).sqrt() @ axes.T


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians: means (D,), covariances (D, D), to a float >= 0.

    In float64. tr (C1 C2)^(1/2) = tr (C1^(1/2) C2 C1^(1/2))^(1/2) is the sum of the singular values of
    C1^(1/2) C2^(1/2), which takes no root of a matrix that is not symmetric, nor, where C1 or C2 is singular, of
    rounding errors.
    """
    mean1, cov1, mean2, cov2 = (x.cpu().double() for x in (mean1, cov1, mean2, cov2))
    both = torch.linalg.svdvals(root(cov1) @ root(cov2)).sum()
    return max(0.0, ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * both).item())


def distance(x, y):
    """frechet_distance of features x (N, D) and y (M, D) taken as Gaussian, N and M at least 2.

    It is too large on average, the more so the fewer the images: only distances of equally many can be compared.
    """
    def moments(x):
        x = x.cpu().double()
        centred = x - x.mean(dim=0)
        return x.mean(dim=0), centred.T @ centred / (len(x) - 1)              # (D,), (D, D)
    return frechet_distance(*moments(x), *moments(y))


@torch.no_grad()
def features(encoder, image_size, images, device, batch_size=256):
    """What the encoder, on the device, makes of images (N, 3, S, S), uint8 or floats in [0, 1]: (N, D).

    image_size: the side that the encoder takes; images of another are resized.
    """
    def scaled(x):
        x = x.to(device).float() / (255 if x.dtype == torch.uint8 else 1)
        if x.shape[-1] != image_size:
            x = F.interpolate(x, image_size, mode="bilinear", antialias=True).clamp(0, 1)
        return x
    return torch.cat([encoder(scaled(x)).float() for x in images.split(batch_size)])


def beside_floor(judge, samples, test, seen, device):
    """Frechet distances to a random half of the test images: {"images", "samples", "test", "seen"}.

    judge: (settings, encoder) of `encoders.load`. samples: (N, 3, S, S). test: Images or None. seen(uint8 images): all
    that the samples' model can show of them. "test" is the floor, the other half of the test images; "seen" is that
    half as seen, how much of the samples' distance is not their content's. "images": how many each set has, N or, if
    they are fewer, half of the test images: of equally many, the distances are equally biased.
    """
    n = min(len(samples), len(test or ()) // 2)
    if n < 2:
        raise Refusal("--frechet needs two samples and four test images at least, for a covariance")
    half, other = test.at(test.some(2 * n)).split(n)
    x, *rest = (features(judge[1], judge[0].image_size, images, device)       # (n, D)
                for images in (half, samples[:n], other, seen(other)))
    return {"images": n, **{name: distance(x, y) for name, y in zip(("samples", "test", "seen"), rest)}}


def nearest(x, images, seen, k=7):
    """The k training images nearest to each of x (N, 3, S, S) in [0, 1]: root mean square differences, of 255, and
    indices, each (k, N), nearest first. images: Images, which are compared as seen(uint8 (B, 3, S, S)) in [0, 1].
    """
    def gaps(batch):                                                          # by a product an equal one is not at 0
        return torch.cdist(seen(batch).flatten(1), x.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    gap = linear_probe.features(gaps, images) * 255 / x[0].numel() ** 0.5     # (images, N)
    return gap.topk(min(k, len(gap)), dim=0, largest=False)


def neighbours(samples, data, seen, shown=16):
    """({"samples", "test": {"mean", "least"}}, images): the differences (`nearest`) of samples (N, 3, S, S), and of as
    many test images, from the nearest training image; and the first samples, each before the training images nearest
    to it, (shown, 1 + k, 3, S, S).
    """
    gap, index = nearest(samples, data.train, seen)                           # (k, N)
    gaps = {"samples": gap[0]}
    if data.test:
        gaps["test"] = nearest(seen(data.test.at(data.test.some(len(samples)))), data.train, seen)[0][0]
    images = seen(data.train.at(index[:, :shown].T.flatten())).unflatten(0, (-1, len(index)))
    return ({name: {"mean": x.mean().item(), "least": x.min().item()} for name, x in gaps.items()},
            torch.cat([samples[:shown, None], images], dim=1))


def table(result):
    """The text that a person reads: of {"nearest": of `neighbours`}, and "frechet": of `beside_floor`, where it is."""
    titles = {"samples": "samples", "test": "test images", "seen": "test images, in the palette's colours"}
    lines = [f"{'nearest training image, RMS of 255':40}{'mean':>8}{'least':>8}"]
    lines += [f"{titles[name]:40}{x['mean']:8.1f}{x['least']:8.1f}" for name, x in result["nearest"].items()]
    if "frechet" in result:
        frechet = result["frechet"]
        lines += ["", f"Frechet distance to {frechet['images']} test images, of as many"]
        lines += [f"{titles[name]:40}{frechet[name]:16.4g}" for name in titles]
    return "\n".join(lines)
