# SPDX-License-Identifier: MIT
"""Evaluation of frozen features: linear probe, MLP and kNN next to two baselines, and measures without labels."""
import contextlib
import itertools
import time

import torch
import torch.nn.functional as F

L2 = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # candidates, compared on a held-out tenth of the training features


def linear_probe(train_x, train_y, test_x, test_y):
    """Test accuracy in [0, 1] of multinomial logistic regression on frozen features.

    train_x (N, D), test_x (M, D) floats; train_y (N,), test_y (M,) int64, all on one device. Features are standardised
    by the mean and deviation of the training features. The weight of the L2 penalty is the one of `L2` that is best on
    a random tenth of the training set; the final fit uses the whole set, and the test set is used once. Full-batch
    L-BFGS in float32, as in SimCLR's transfer experiments (appendix B.8); other papers use SGD on augmented images
    (MoCo: rate 30, 100 epochs). The features of all images have to fit on the device.
    """
    train_x, test_x = standardised(train_x, test_x)
    return score(test_x, test_y, chosen_fit(train_x, train_y, int(torch.cat([train_y, test_y]).max()) + 1))


def chosen_fit(train_x, train_y, classes):
    """`fit` of standardised features with the L2 penalty that is best on a held-out tenth of them."""
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0)).to(train_x.device)
    held, kept = order.tensor_split([max(1, len(order) // 10)])
    best, weights = (-1.0, None), None
    for l2 in counted(sorted(L2, reverse=True), len(L2) + 1, "fits of the linear probe"):     # each starts the next
        weights = fit(train_x[kept], train_y[kept], classes, l2, weights)
        best = max(best, (score(train_x[held], train_y[held], weights), l2))
    return fit(train_x, train_y, classes, best[1], weights)


def standardised(train_x, test_x):
    mean, deviation = train_x.float().mean(dim=0), train_x.float().std(dim=0, correction=min(1, len(train_x) - 1))
    alive = deviation > 1e-6 * train_x.float().abs().amax(dim=0)              # not constant in training
    deviation = torch.where(alive, deviation, 1.0)
    return (train_x.float() - mean) / deviation, (test_x.float() - mean) / deviation


def fit(x, y, classes, l2, start=None):
    """Weights (D + 1, classes), the bias last, that minimise cross-entropy + l2 / 2 |W|^2, with the bias not in W."""
    weights = torch.zeros(x.shape[1] + 1, classes, device=x.device) if start is None else start.clone()
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=100, tolerance_grad=1e-5, line_search_fn="strong_wolfe")
    steps = counted(itertools.count(), 150, "evaluations of the loss in one fit, at most")    # 1.25 max_iter + 25

    def closure():
        next(steps)
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(x, weights), y) + l2 / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss
    with torch.enable_grad():
        optimizer.step(closure)
    return weights.detach()


def logits(x, weights):
    return x @ weights[:-1] + weights[-1]                                     # (N, classes)


def score(x, y, weights):
    return (logits(x, weights).argmax(dim=1) == y).float().mean().item()


def mlp(train_x, train_y, test_x, test_y, hidden=200, dropout=0.1, batch_size=256, lr=3e-3, steps=200):
    """Test accuracy in [0, 1] of a classifier with one hidden layer, the evaluation in Hjelm et al. (1808.06670).

    Shapes and standardisation are as in `linear_probe`. Adam with a cosine schedule; 20 epochs, but at least `steps`.
    """
    train_x, test_x = standardised(train_x, test_x)
    classes, steps = int(torch.cat([train_y, test_y]).max()) + 1, max(steps, 20 * len(train_x) // batch_size)
    with torch.enable_grad(), torch.random.fork_rng(devices=[train_x.device] if train_x.is_cuda else []):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(train_x.shape[1], hidden), torch.nn.ReLU(),
                                  torch.nn.Dropout(dropout), torch.nn.Linear(hidden, classes)).to(train_x.device)
        optimizer = torch.optim.Adam(net.parameters(), lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in counted(range(steps), steps, "steps of the MLP"):
            index = torch.randint(len(train_x), (batch_size,)).to(train_x.device)
            loss = F.cross_entropy(net(train_x[index]), train_y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return (net.eval()(test_x).argmax(dim=1) == test_y).float().mean().item()


@torch.no_grad()
def knn(train_x, train_y, test_x, test_y, k=200, tau=0.1):
    """Test accuracy in [0, 1] of a vote of the k nearest training features, weighted by e^(cosine / tau).

    Shapes as in `linear_probe`. Wu et al. 2018 (1805.01978), section 3.4; k is at most the size of the training set.
    """
    train_x, test_x = F.normalize(train_x.float(), dim=1), F.normalize(test_x.float(), dim=1)
    classes = int(torch.cat([train_y, test_y]).max()) + 1
    right = 0
    parts = list(zip(test_x.split(1000), test_y.split(1000)))
    for x, y in counted(parts, len(parts), "batches of 1000 test images in kNN"):
        similarity, index = (x @ train_x.T).topk(min(k, len(train_x)), dim=1)  # (B, k)
        votes = similarity.new_zeros(len(x), classes).scatter_add_(1, train_y[index], (similarity / tau).exp())
        right += (votes.argmax(dim=1) == y).sum().item()
    return right / len(test_x)


@torch.no_grad()
def encoded(encoder, images, autocast=contextlib.nullcontext(), batch_size=512, index=None, view=lambda x: x):
    """Yields the encoder's features of the images, in order, batch by batch: (B, D) floats on the device.

    encoder: a Module, RGB (B, 3, S, S) in [0, 1] to (B, D). It is in eval mode meanwhile; afterwards all its modules
    are back in the modes they had. images: `data.Images`. autocast: a context. index: (N,) on the CPU, which images to
    use (default: all). view: a function to apply to the images first.
    """
    modes = {part: part.training for part in encoder.modules()}
    encoder.eval()
    try:
        parts = (torch.arange(len(images)) if index is None else index).split(batch_size)
        for x in counted(images.batches(parts), len(parts), f"batches of {batch_size} images encoded"):
            with autocast:
                h = encoder(view(x.float() / 255).contiguous(memory_format=torch.channels_last)).float()
            yield h
    finally:
        for part, training in modes.items():
            part.training = training


def features(encoder, images, autocast=contextlib.nullcontext(), **more):
    """All that `encoded` yields for the same arguments, in one tensor: (N, D)."""
    return torch.cat(list(encoded(encoder, images, autocast, **more)))


class WhitenedPixels(torch.nn.Module):
    """The baseline without learning: pixels, of at most size x size, projected on their principal components, whitened.

    Fitted to at most 10,000 of `images`. Maps images to (N, components).
    """

    def __init__(self, images, components=256, size=32):
        super().__init__()
        self.size = size
        parts = images.random_indices(10_000).split(512)
        batches = counted(images.batches(parts), len(parts), "batches of 512 images for the whitened pixels")
        x = torch.cat([self.flat(part.float() / 255) for part in batches])
        self.mean = x.mean(dim=0)
        covariance = (x - self.mean).T @ (x - self.mean) / len(x)
        variance, axes = (part.to(x.device) for part in torch.linalg.eigh(covariance.cpu()))  # ascending; not on MPS
        components = min(components, int((variance > 1e-6 * variance[-1]).sum()))             # few images span fewer
        self.axes = axes[:, -components:] / variance[-components:].clamp(min=1e-8).sqrt()

    def flat(self, x):
        if x.shape[-1] > self.size:
            x = F.interpolate(x, size=self.size, mode="bilinear", antialias=True)
        return x.flatten(1)                                                   # (B, 3 S S)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return (self.flat(x) - self.mean) @ self.axes


# ---- measures without labels: how the features are distributed on the unit sphere


def feature_std(h):
    """The standard deviation of normalised features: the root mean square distance of h / |h|, h (N, D), from its mean,
    a scalar tensor from 0 (collapse: one direction, or all h are 0) to 1 (spread over the sphere). SimSiam (Chen & He
    2020, 2011.10566) plots the mean deviation of a dimension, 1 / sqrt(D) of this if all vary equally."""
    h = F.normalize(h.detach().float(), dim=1)
    return (h.square().sum(dim=1).mean() - h.mean(dim=0).square().sum()).clamp(min=0).sqrt()


def alignment(a, b):
    """Mean squared distance between the normalised features a and b (N, D) of two views of the same images: a scalar
    tensor in [0, 4], 0 if the features do not depend on the view (Wang & Isola 2020, 2005.10242, alpha 2)."""
    return (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(dim=1).mean()


def uniformity(h):
    """Log of the mean of e^(-2 d^2) over pairs of different images, d the distance between their normalised features h
    (N, D): a scalar tensor from 0 (one point) down to about -4 (spread over the sphere) (Wang & Isola, t = 2)."""
    h = F.normalize(h.float(), dim=1)
    pairs = (-2 * torch.cdist(h, h).square()).exp().fill_diagonal_(0)
    return (pairs.sum() / (len(h) * (len(h) - 1))).log() if len(h) > 1 else torch.zeros(())


def rankme(h):
    """The effective rank of features h (N, D), e to the entropy of their normalised singular values: a scalar tensor in
    [1, min(N, D)] (RankMe, Garrido et al. 2022, 2210.02885); NaN if a feature is not finite."""
    if not h.isfinite().all():                                                # svdvals would raise an error
        return torch.tensor(torch.nan)
    values = torch.linalg.svdvals(h.float().cpu())
    p = values / values.sum().clamp(min=1e-12) + 1e-7
    return (-p * p.log()).sum().exp()


def on_the_sphere(images, encoders, autocast, most=2000):
    """{measure: {row: value}}: the four measures above for each encoder except "pixels", on at most `most` images. The
    two views are opposite corners of an image, of three quarters of its side: fixed, and the same for all methods."""
    index, size, result = images.random_indices(most), images.shape[-1], {}

    def corner(first, last):
        return lambda x: F.interpolate(x[..., first:last, first:last], size=size, mode="bilinear")
    views = (lambda x: x), corner(0, 3 * size // 4), corner(size - 3 * size // 4, size)
    for row in [row for row in encoders if row != "pixels"]:
        h, a, b = (features(encoders[row], images, autocast, index=index, view=view) for view in views)
        values = dict(feature_std=feature_std(h), alignment=alignment(a, b), uniformity=uniformity(h), rankme=rankme(h))
        for name, value in values.items():
            result.setdefault(name, {})[row] = value.item()
    return result


MEASURES = {"linear": linear_probe, "knn": knn, "mlp": mlp}


def evaluate(images, encoders, autocast=contextlib.nullcontext(), measures=("linear", "knn")):
    """Evaluates each encoder and whitened pixels on `data.Data` with labels, by measures from `MEASURES`.

    encoders: {row: Module}, see `features`. Returns {measure: {row: accuracy}} with the row "pixels" and a row for each
    encoder, and {row: (labelled features, test features)}.
    """
    encoders = {"pixels": encoders.get("pixels") or WhitenedPixels(images.labelled)} | encoders
    x = {row: [features(encoder, part, autocast) for part in (images.labelled, images.test)]
         for row, encoder in encoders.items()}
    return {name: {row: MEASURES[name](train_x, images.labelled.labels, test_x, images.test.labels)
                   for row, (train_x, test_x) in x.items()} for name in measures}, x


def table(results, method):
    """The results as a table to print, accuracies in percent. results: {measure: {row: value}}."""
    titles = {"knn": "kNN", "mlp": "MLP", "feature_std": "std", "alignment": "align", "uniformity": "uniform", "rankme":
              "RankMe", "pixels": "whitened pixels (PCA)", "untrained": "untrained encoder", "trained": method}
    lines = [f"{'':26}" + "".join(f"{titles.get(name, name):>8}" for name in results)]
    for row in next(iter(results.values())):                                  # "trained" or "trained LAYER"
        kind, *layer = row.split(" ", 1)
        cells = (f"{100 * x[row]:8.1f}" if name in MEASURES else f"{x[row]:8.2f}" if row in x else ""
                 for name, x in results.items())
        lines.append(f"{', '.join([titles.get(kind, kind), *layer]):26}" + "".join(cells))
    return "\n".join(lines)


def counted(things, n, what):
    """Yields the n things. If that takes longer than ten seconds, the first process prints the progress, then and every
    minute."""
    start, first = time.perf_counter(), not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    line_at = start + 10
    for i, thing in enumerate(things):
        now = time.perf_counter()
        if first and i and now > line_at:
            print(f"{what}: {i:,} of {n:,}, {(now - start) / i * (n - i):,.0f} s left", flush=True)
            line_at = now + 60
        yield thing
