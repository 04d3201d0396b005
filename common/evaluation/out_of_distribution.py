"""Out-of-distribution detection: how strange an image is, by its features or its likelihood, and how well that tells.

Scores are higher for stranger images. Detection is judged with the outside as the positive class, as Hendrycks et al.
2018 (1812.04606) do.
"""
import io
import math

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

from .. import Refusal, linear_probe

# ---- how well scores (N,) of inside and (M,) of outside images tell them apart; equal scores are one threshold


def auroc(inside, outside):
    """Area under the ROC curve: the share of pairs in which the outside image scores higher; equal ones count half."""
    ordered = inside.double().sort().values
    below, up_to = (torch.searchsorted(ordered, outside.double(), right=right) for right in (False, True))
    return (below + up_to).double().mean().item() / 2 / len(inside)


def flagged(inside, outside):
    """Of each threshold from the highest score down: outside images at or above it, and all images at or above it."""
    scores = torch.cat([inside, outside]).double()
    thresholds = scores.unique().flip(0)
    caught, every = (len(x) - torch.searchsorted(x.double().sort().values, thresholds) for x in (outside, scores))
    return caught.double(), every.double()


def aupr(inside, outside):
    """Area under the precision-recall curve, as average precision: sum over thresholds of precision x recall gained."""
    caught, every = flagged(inside, outside)
    gained = caught.diff(prepend=caught.new_zeros(1)) / len(outside)
    return (caught / every * gained).sum().item()


def fpr(inside, outside, tpr=0.95):
    """The least share of inside images that is flagged where at least `tpr` of the outside ones are."""
    caught, every = flagged(inside, outside)
    first = (caught >= tpr * len(outside)).int().argmax()
    return ((every - caught)[first] / len(inside)).item()


# ---- scores by features: (M,) of x (M, D)


def uncertainty(logits):
    """1 - the greatest probability, of a classifier's logits (M, classes). Hendrycks & Gimpel 2016 (1610.02136)."""
    return 1 - logits.cpu().double().softmax(dim=1).max(dim=1).values


def mahalanobis(train_x, x, train_y=None):
    """Squared Mahalanobis distance of x (M, D) to the nearest class mean of train_x (N, D), by the covariance within
    the classes train_y (N,); without labels to the mean of all, by the covariance of all. Lee et al. 2018 (1807.03888).

    In float64, on the CPU. Directions in which train_x hardly varies (below 1e-6 of the mean variance) count as if it varied so
    much: fewer images than dimensions have a singular covariance.
    """
    train_x, x = train_x.cpu().double(), x.cpu().double()
    train_y = torch.zeros(len(train_x), dtype=torch.int64) if train_y is None else train_y.cpu()
    classes, label = train_y.unique(return_inverse=True)
    means = torch.stack([train_x[label == c].mean(dim=0) for c in range(len(classes))])       # (classes, D)
    centred = train_x - means[label]
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(train_x))
    whiten = axes / variance.clamp(min=1e-6 * variance.mean().clamp(min=1e-12)).sqrt()        # (D, D)
    return torch.cdist(x @ whiten, means @ whiten, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values ** 2


def knn_distance(train_x, x, k=50):
    """Euclidean distance of x / |x| (M, D) to the k-th nearest of train_x / |train_x| (N, D), k cut to N. Sun et al.
    2022 (2204.06507)."""
    train_x, x = F.normalize(train_x.float(), dim=1), F.normalize(x.float(), dim=1)
    k = min(k, len(train_x))
    nearest = torch.cat([(batch @ train_x.T).topk(k, dim=1).values[:, -1] for batch in x.split(1000)])
    return (2 - 2 * nearest).clamp(min=0).sqrt()


# ---- scores by likelihood


def complexity(images):
    """Bits of each image uint8 (M, 3, H, W) as a PNG: (M,) float64. Serra et al. 2019 (1909.11480) take such a length
    for the image's complexity, and -log2 p(x) less it for how strange the image is. Images as p's model sees them.
    """
    def bits(image):
        file = io.BytesIO()
        to_pil_image(image).save(file, "PNG", optimize=True)
        return 8 * file.tell()
    return torch.tensor([bits(image) for image in images.cpu()], dtype=torch.float64)


@torch.no_grad()
def likelihoods(model, images, autocast):
    """-log p of images (M,) in nats, and the bits of their complexity, as the model's tokens have them: (M,), (M,)."""
    nats, bits = [], []
    for x in images.batches(torch.arange(len(images)).split(128)):
        tokens = model.tokens(x)
        with autocast:
            nats.append(-model.log_prob(tokens).cpu().double())
        bits.append(complexity((255 * model.images(tokens)).round().byte()))
    return torch.cat(nats), torch.cat(bits)


# ---- all of it


def detect(images, labelled_x, encoder, outside, generator, autocast):
    """{outside: {score: {"auroc", "aupr", "fpr95"}}} of the data set's own test images against each outside, printed.
    Without test images the scores are fitted without a tenth of the training images, which stand for them.

    labelled_x: features of the labelled and of the test images, or None without labels. generator: or None.
    """
    def encode(part):
        return linear_probe.features(encoder, part, autocast)                 # (N, D)
    train_x = encode(images.centred)
    if not images.test:
        if len(train_x) < 4:
            raise Refusal(f"--ood needs more images to compare with than {len(train_x)}")
        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0))
        held, kept = order.tensor_split([max(1, len(order) // 10)])
        own_x, train_x = train_x[held.to(train_x.device)], train_x[kept.to(train_x.device)]
    if labelled_x:
        probe_x, y = labelled_x[0], images.labelled.labels
        weights = linear_probe.chosen_fit(linear_probe.standardised(probe_x, probe_x)[0], y, int(y.max()) + 1)

    def scores(x, part):
        """{name: (N,)}, higher for stranger images, of features x (N, D)."""
        found = {}
        if labelled_x:
            standard = linear_probe.standardised(probe_x, x)[1]
            found["probability, of the probe"] = uncertainty(linear_probe.logits(standard, weights))
            found["Mahalanobis, of class means"] = mahalanobis(probe_x, x, y)
        found["Mahalanobis, no labels"] = mahalanobis(train_x, x)
        found["kNN distance, no labels"] = knn_distance(train_x, x)
        if generator and images.test:                                         # of training images it would be too high
            nats, bits = likelihoods(generator, part, autocast)
            found["likelihood, no labels"] = nats
            found["likelihood less complexity"] = nats / math.log(2) - bits
        return {name: score.cpu() for name, score in found.items()}

    own, results = scores(encode(images.test) if images.test else own_x, images.test), {}
    for name, part in outside.items():
        theirs, results[name] = scores(encode(part), part), {}
        print(f"\n{'strange: ' + name:34}{'AUROC':>8}{'AUPR':>8}{'FPR95':>8}")
        for score in own:
            measures = {"auroc": auroc, "aupr": aupr, "fpr95": fpr}
            results[name][score] = {key: measure(own[score], theirs[score]) for key, measure in measures.items()}
            print(f"{score:34}" + "".join(f"{100 * value:8.1f}" for value in results[name][score].values()), flush=True)
    return results
