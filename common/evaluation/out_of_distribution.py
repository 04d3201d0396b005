# SPDX-License-Identifier: MIT
"""Out-of-distribution detection by features or by likelihood: scores of images, and how well they separate data sets.

Scores are higher for stranger images; out-of-distribution images ("outside") are the positive class, as in Hendrycks et
al. 2018 (1812.04606).
"""
import math
import zlib

import torch
import torch.nn.functional as F

from .. import Refusal, linear_probe

# ---- how well scores (N,) of inside and (M,) of outside images separate them; equal scores are one threshold


def flagged(inside, outside):
    """The fractions of inside and of outside images, each (T + 1,) float64, with a score of at least a threshold that
    decreases from above all scores to the lowest."""
    thresholds = torch.cat([inside, outside]).double().unique().flip(0)
    return [F.pad((len(x) - torch.searchsorted(x.double().sort().values, thresholds)).double() / len(x), (1, 0))
            for x in (inside, outside)]


def auroc(inside, outside):
    """Area under the ROC curve: the fraction of pairs in which the outside image scores higher; ties count half."""
    wrong, caught = flagged(inside, outside)
    return torch.trapezoid(caught, wrong).item()


def aupr(inside, outside):
    """Area under the precision-recall curve, as average precision: the sum of precision x increase in recall."""
    wrong, caught = flagged(inside, outside)
    precision = caught[1:] * len(outside) / (caught[1:] * len(outside) + wrong[1:] * len(inside))
    return (precision * caught.diff()).sum().item()


def fpr(inside, outside, tpr=0.95):
    """The smallest fraction of inside images that is flagged when at least `tpr` of the outside ones are."""
    wrong, caught = flagged(inside, outside)
    return wrong[(caught >= tpr).int().argmax()].item()


# ---- scores: (M,) of features x (M, D), or of images


def uncertainty(logits):
    """1 - the largest class probability, from logits (M, classes). Hendrycks & Gimpel 2016 (1610.02136)."""
    return 1 - logits.cpu().double().softmax(dim=1).amax(dim=1)


def mahalanobis(train_x, x, train_y=None):
    """Squared Mahalanobis distance of x (M, D) to the nearest class mean of train_x (N, D), by the covariance within
    classes train_y (N,); without labels to the overall mean by the overall covariance. Lee et al. 2018 (1807.03888).

    In float64, on the CPU. Variances below 1e-6 of the mean variance are raised to that, as the covariance is singular
    if there are fewer images than dimensions.
    """
    train_x, x = train_x.cpu().double(), x.cpu().double()
    label = torch.zeros(len(train_x), dtype=torch.int64) if train_y is None else train_y.cpu()
    classes, label = label.unique(return_inverse=True)
    means = torch.stack([train_x[label == c].mean(dim=0) for c in range(len(classes))])       # (classes, D)
    centred = train_x - means[label]
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(train_x))
    whiten = axes / variance.clamp(min=1e-6 * variance.mean().clamp(min=1e-12)).sqrt()        # (D, D)
    return torch.cdist(x @ whiten, means @ whiten, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1) ** 2


def knn_distance(train_x, x, k=50):
    """Euclidean distance of x / |x| (M, D) to the k-th nearest of train_x / |train_x| (N, D), k at most N. Sun et al.
    2022 (2204.06507)."""
    train_x, x = F.normalize(train_x.float(), dim=1), F.normalize(x.float(), dim=1)
    k, parts = min(k, len(train_x)), x.split(1000)
    nearest = torch.cat([(batch @ train_x.T).topk(k, dim=1).values[:, -1]
                         for batch in linear_probe.counted(parts, len(parts), "batches of 1000 images in kNN")])
    return (2 - 2 * nearest).clamp(min=0).sqrt()


def complexity(tokens):
    """The bits to which zlib compresses each image's tokens, (M, H, W) below 2^16: (M,) float64. Serra et al. 2019
    (1909.11480) subtract such a measure of complexity from -log2 p(x). It has to compress what p is the probability of:
    RGB images of the tokens' colours take several times as many bits, beside which -log2 p(x) hardly counts."""
    tokens = tokens.cpu().flatten(1)
    planes = torch.cat([tokens % 256, tokens // 256], dim=1).byte()           # low bytes, then high: shorter
    return torch.tensor([8 * len(zlib.compress(image.numpy().tobytes(), 9)) for image in planes], dtype=torch.float64)


@torch.no_grad()
def likelihoods(model, images, autocast):
    """-log p of the images' tokens in nats, and the tokens' complexity in bits: (M,), (M,)."""
    nats, bits, parts = [], [], torch.arange(len(images)).split(128)
    for x in linear_probe.counted(images.batches(parts), len(parts), "batches of likelihoods"):
        tokens = model.tokens(x)
        with autocast:
            nats.append(-model.log_prob(tokens).cpu().double())
        bits.append(complexity(tokens))
    return torch.cat(nats), torch.cat(bits)


# ---- all of it


def detect(images, labelled_x, encoder, outside, generator, autocast):
    """Prints and returns {outside: {score: {"auroc", "aupr", "fpr95"}}} of the test images against each outside data
    set. Without test images, a tenth of the training images takes their place and is not used to fit the scores.

    labelled_x: features of the labelled and of the test images, or None without labels. generator: or None.
    """
    train_x = linear_probe.features(encoder, images.centred, autocast)        # (N, D)
    if not images.test:
        if len(train_x) < 4:
            raise Refusal(f"--ood needs at least 4 images to compare with, not {len(train_x)}: add some")
        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0)).to(train_x.device)
        own_x, train_x = (train_x[index] for index in order.tensor_split([max(1, len(order) // 10)]))
    if labelled_x:
        (probe_x, own_x), y = labelled_x, images.labelled.labels
        weights = linear_probe.chosen_fit(linear_probe.standardised(probe_x, probe_x)[0], y, int(y.max()) + 1)

    def scores(x, part):
        """{name: (N,)}, higher for stranger images, of features x (N, D)."""
        found = {}
        if labelled_x:
            standard = linear_probe.standardised(probe_x, x)[1]
            found["probability, of the probe"] = uncertainty(linear_probe.logits(standard, weights))
            found["Mahalanobis, of class means"] = mahalanobis(probe_x, x, y)
        found["Mahalanobis, no labels"] = mahalanobis(train_x, x)
        found["kNN distance, no labels"] = knn_distance(train_x, x).cpu()
        if generator and images.test:                                         # too high for training images
            nats, bits = likelihoods(generator, part, autocast)
            found["likelihood, no labels"] = nats
            found["likelihood less complexity"] = nats / math.log(2) - bits
        return found

    own, results = scores(own_x, images.test), {}
    for name, part in outside.items():
        theirs, results[name] = scores(linear_probe.features(encoder, part, autocast), part), {}
        print(f"\n{'outside: ' + name:34}{'AUROC':>8}{'AUPR':>8}{'FPR95':>8}\n"
              f"{'by guessing':34}{50:8.1f}{100 * len(part) / (len(part) + len(own_x)):8.1f}{95:8.1f}")
        for score, x in own.items():
            values = auroc(x, theirs[score]), aupr(x, theirs[score]), fpr(x, theirs[score])
            results[name][score] = dict(zip(("auroc", "aupr", "fpr95"), values))
            print(f"{score:34}" + "".join(f"{100 * value:8.1f}" for value in values), flush=True)
    return results
