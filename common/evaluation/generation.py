# SPDX-License-Identifier: MIT
"""--sample RUN, of a script with a generator: samples, completions, nearest training images, Frechet distance."""
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import Refusal, cli, linear_probe, pictures
from ..data import Decoder, Images, load
from . import runs


def arguments(argv, script):
    parser = cli.Parser(prog=Path(script).name, description="Samples images from a trained run, with its settings, "
                        "and saves them in its folder.")
    add, number = parser.add_argument, parser.number
    add("--sample", type=cli.path, metavar="RUN", required=True, help="folder of the run to sample from")
    number("--temperature", 1.0, "[0.001, inf)", "divides the logits")
    number("--top-k", None, "[1, inf)", "sample from the K most likely tokens only; the first pixel follows its "
        "frequency in the training images (default: all tokens)", metavar="K", kind=int)
    number("--samples", None, "[1, inf)", "number of images; the picture shows 500 at most (default: 64, with "
        "--frechet 500)", kind=int)
    add("--complete", nargs="+", type=cli.file, metavar="IMAGE", default=[],
        help="complete your images: keep the upper half and sample the lower half, six times each")
    add("--frechet", type=cli.path, metavar="RUN",
        help="Frechet distance between samples and as many test images, in the features of this run (of any script), "
        "compared with that between two such sets of test images")
    number("--seed", None, "[0, 4294967295]", "random seed (default: that of the run)", kind=int)
    add("--device", help="auto, cpu, mps, cuda or cuda:N (default: that of the run)")
    add("--data-dir", type=cli.path, metavar="DIR", help="folder of the run's data set (default: where it was)")
    number("--workers", None, "[0, inf)", "processes that decode images (default: that of the run)", kind=int)
    number("--cache-gb", None, "[0, inf)", "GB of decoded images kept on the device (default: the run's)", kind=float)
    args = parser.parse_args(argv)
    settings = vars(runs.load_script(args.sample, Path(script).stem)[1])
    for name in ("seed", "device", "workers", "data_dir", "cache_gb"):
        if getattr(args, name) is None:
            setattr(args, name, settings[name])
    return args, settings


@torch.no_grad()
def main(argv, script):
    """Writes pictures and distances into the folder of the run, prints and returns the distances. Nothing is
    overwritten; the same settings give the same files. script: the path of the script that made the run."""
    args, settings = arguments(argv, script)
    device, size = cli.pick_device(args.device), settings["image_size"]
    model = runs.load_generator(args.sample, device, Path(script).stem)
    judge = args.frechet and runs.load_encoder(args.frechet, device)
    if judge and getattr(judge[0], "views_dir", None):
        raise Refusal(f"--frechet {args.frechet}: that run has views of its own (--views-dir), which samples lack")
    given = args.complete and Images(Decoder(args.complete, size), None, device, 0, True).pixels

    def drawn(tokens, rows=0):
        """Images (N, 3, S, S) that continue the first rows of the tokens (N, S, S); 64 at once, to save memory."""
        generator, parts = torch.Generator(device).manual_seed(args.seed), tokens.split(64)
        return model.images(torch.cat([model.sample(len(part), args.temperature, args.top_k, part, rows, generator)
                                       for part in linear_probe.counted(parts, len(parts), "batches of images drawn")]))

    def seen(x):                                                              # images as the model sees them
        return model.images(model.tokens(x.to(device)))

    def keep(name, suffix, write):
        name += f"-T{args.temperature}-k{args.top_k or 'all'}-seed{args.seed}{suffix}"
        runs.keep(Path(args.sample) / name, write)

    def picture(name, images, columns):
        keep(name, ".png", lambda file: pictures.tiles(file, images, columns))

    n = args.samples or (500 if judge else 64)
    x = drawn(torch.zeros(n, size, size, dtype=torch.int64, device=device))
    picture("samples", x[:500], max(8, math.isqrt(min(n, 500))))
    if args.complete:                                                         # rows: image, upper half, 6 completions
        upper, tokens = seen(given), model.tokens(given)
        upper[:, :, size // 2 :] = 0.5
        rows = drawn(tokens.repeat_interleave(6, dim=0), size // 2).unflatten(0, (-1, 6))
        picture("completions", torch.cat([torch.stack([given / 255, upper], dim=1), rows], dim=1).flatten(0, 1), 8)
    images, result = load(settings["dataset"], args.data_dir, size, device, args.workers, args.cache_gb,
                          settings["seed"]), {}
    if judge:
        result["frechet"] = {"run": args.frechet, **frechet_distances(judge, x, images.test, seen, device)}
    result["nearest"], beside = neighbours(x[:64], images, seen)              # (16, 1 + k, 3, S, S)
    picture("neighbours", beside.flatten(0, 1), beside.shape[1])
    print("\n" + table(result) + "\n", flush=True)
    keep("distances", ".json", lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))
    return result


# ---- the Frechet distance in an encoder's feature space (Heusel et al. 2017, 1706.08500)


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians: means (D,), covariances (D, D), to a float >= 0.

    In float64. tr (C1 C2)^(1/2) is computed as the sum of the singular values of C1^(1/2) C2^(1/2), which avoids the
    root of a non-symmetric matrix and, if C1 or C2 is singular, roots of rounding errors.
    """
    mean1, cov1, mean2, cov2 = (x.cpu().double() for x in (mean1, cov1, mean2, cov2))
    (v1, axes1), (v2, axes2) = map(torch.linalg.eigh, (cov1, cov2))
    root1, root2 = (axes * v.clamp(min=0).sqrt() @ axes.T for v, axes in ((v1, axes1), (v2, axes2)))
    both = torch.linalg.svdvals(root1 @ root2).sum()
    return max(0.0, ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * both).item())


def distance(x, y):
    """frechet_distance of Gaussians fitted to features x (N, D) and y (M, D), N and M at least 2. It is biased upwards,
    more so with fewer images, so that only distances for the same number of images can be compared."""
    x, y = x.cpu().double(), y.cpu().double()
    return frechet_distance(x.mean(dim=0), torch.atleast_2d(x.T.cov()), y.mean(dim=0), torch.atleast_2d(y.T.cov()))


@torch.no_grad()
def features(encoder, image_size, images, device, batch_size=256):
    """The features (N, D) of images (N, 3, S, S), uint8 or floats in [0, 1], resized to the encoder's side image_size.
    The encoder is on the device."""
    found, parts = [], images.split(batch_size)
    for x in linear_probe.counted(parts, len(parts), "batches encoded"):
        x = x.to(device).float() / (255 if x.dtype == torch.uint8 else 1)
        if x.shape[-1] != image_size:
            x = F.interpolate(x, image_size, mode="bilinear", antialias=True).clamp(0, 1)
        found.append(encoder(x).float())
    return torch.cat(found)


def frechet_distances(judge, samples, test, seen, device):
    """Frechet distances to n random test images: {"images", "samples", "test", "seen"}.

    judge: (settings, encoder) of `runs.load_encoder`. samples: (N, 3, S, S). test: Images or None. seen(uint8 images):
    these as the samples' model sees them. "test" is the distance of n other test images, a lower limit;
    "seen" is that of these as seen. "images": the size of each set, the same for all so that the bias is, too.
    """
    n = min(len(samples), len(test or ()) // 2)
    if n < 2:
        raise Refusal("--frechet needs at least two samples and four test images, for a covariance")
    half, other = test.at(test.random_indices(2 * n)).split(n)
    x, *rest = (features(judge[1], judge[0].image_size, images, device)       # (n, D)
                for images in (half, samples[:n], other, seen(other)))
    return {"images": n, **{name: distance(x, y) for name, y in zip(("samples", "test", "seen"), rest)}}


# ---- the nearest training images, which would show samples that are memorised


def nearest(x, images, seen, k=7):
    """The k training images nearest to each of x (N, 3, S, S) in [0, 1]: root mean square differences, out of 255, and
    indices, both (k, N), nearest first. images: Images, which are compared as seen(uint8 (B, 3, S, S)) in [0, 1]."""
    parts = torch.arange(len(images)).split(512)
    batches = linear_probe.counted(images.batches(parts), len(parts), "batches compared")
    gap = torch.cat([torch.cdist(seen(batch).flatten(1), x.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
                     for batch in batches]) * 255 / x[0].numel() ** 0.5       # (images, N); mm would not give exact 0
    return gap.topk(min(k, len(gap)), dim=0, largest=False)


def neighbours(samples, images, seen, shown=16):
    """({"samples", "test": {"mean", "least"}}, rows): the differences (`nearest`) of samples (N, 3, S, S), and of as
    many test images, from the nearest training image; and the first samples, each followed by its nearest training
    images, (shown, 1 + k, 3, S, S). images: `data.Data`."""
    gap, index = nearest(samples, images.centred, seen)                       # (k, N)
    gaps = {"samples": gap[0]}
    if images.test:
        test = seen(images.test.at(images.test.random_indices(len(samples))))
        gaps["test"] = nearest(test, images.centred, seen)[0][0]
    beside = seen(images.centred.at(index[:, :shown].T.flatten())).unflatten(0, (-1, len(index)))
    return ({name: {"mean": x.mean().item(), "least": x.min().item()} for name, x in gaps.items()},
            torch.cat([samples[:shown, None], beside], dim=1))


def table(result):
    """The results as a table to print: {"nearest": of `neighbours`}, and "frechet": of `frechet_distances`."""
    titles = {"samples": "samples", "test": "test images", "seen": "test images, as the model can show them"}
    lines = [f"{'nearest training image, RMS of 255':40}{'mean':>8}{'least':>8}"]
    lines += [f"{titles[name]:40}{x['mean']:8.1f}{x['least']:8.1f}" for name, x in result["nearest"].items()]
    if frechet := result.get("frechet"):
        lines += ["", f"Frechet distance to {frechet['images']} test images, of as many"]
        lines += [f"{titles[name]:40}{frechet[name]:16.4g}" for name in titles]
    return "\n".join(lines)
