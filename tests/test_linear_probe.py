# SPDX-License-Identifier: MIT
"""common/linear_probe.py against oracles in float64 and by loops, and what it must not depend on."""
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from torch import nn

from common import linear_probe
from common.data import Data, Images

CPU = torch.device("cpu")


def gaussians(n, dim, classes, distance, seed, centre_seed=0):
    """n points (n, dim) of `classes` unit Gaussians, centres about `distance` from the origin, and their labels."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(centre_seed))
    centres *= distance / math.sqrt(dim)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    y[:classes] = torch.arange(classes)
    return centres[y] + torch.randn(n, dim, generator=generator), y


def random_images(n, size, seed=0, labels=None):
    pixels = torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Images(pixels, labels, CPU, workers=0, in_memory=True)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors as small as these are slower on several threads, ten times where other work is on the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def all_penalties(monkeypatch):
    """Those of the source, which tests of whole runs cut short."""
    monkeypatch.setattr(linear_probe, "L2", (1e-5, 1e-4, 1e-3, 1e-2, 1e-1))


class Spy:
    """Calls a function and keeps what went in and came out."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *args):
        result = self.function(*args)
        self.calls.append((args, result))
        return result


@pytest.fixture
def fits(monkeypatch):
    """The calls of linear_probe.fit, of which the last is the fit that is scored."""
    spy = Spy(linear_probe.fit)
    monkeypatch.setattr(linear_probe, "fit", spy)
    return spy.calls


# ---- linear probe and MLP


@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1e7])
def test_the_scale_of_features_does_not_matter(scale):
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    x = torch.cat([x, torch.full((400, 1), 3.3)], dim=1)                      # and a constant
    accuracy = [linear_probe.linear_probe(s * x[:300], y[:300], s * x[300:], y[300:]) for s in (1.0, scale)]
    assert accuracy[0] == accuracy[1] > 0.9


def test_mlp_solves_what_is_not_linear():
    """The exclusive or of two signs: at chance for the linear probe, above 0.9 for the MLP; the same each time, and the
    global random numbers go on as if nothing had been drawn."""
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    split = x[:2000], (x[:2000, 0] * x[:2000, 1] > 0).long(), x[2000:], (x[2000:, 0] * x[2000:, 1] > 0).long()
    torch.manual_seed(7)
    expected, _ = torch.rand(3), torch.manual_seed(7)
    assert linear_probe.linear_probe(*split) < 0.56 and linear_probe.mlp(*split) > 0.9
    assert torch.equal(torch.rand(3), expected)
    assert linear_probe.mlp(*split) == linear_probe.mlp(*split)


def test_probe_of_separable_gaussians_is_near_one():
    """Classes far apart are told apart, in training and in unseen points."""
    train, test = gaussians(400, 16, 5, 12.0, seed=1), gaussians(1000, 16, 5, 12.0, seed=2)
    assert linear_probe.linear_probe(*train, *test) > 0.99


def test_probe_of_random_labels_is_at_chance():
    """Labels that have nothing to do with the features are not predicted."""
    generator = torch.Generator().manual_seed(0)
    train_x, test_x = torch.randn(400, 16, generator=generator), torch.randn(4000, 16, generator=generator)
    train_y, test_y = torch.randint(4, (400,), generator=generator), torch.randint(4, (4000,), generator=generator)
    assert abs(linear_probe.linear_probe(train_x, train_y, test_x, test_y) - 0.25) < 0.025


def test_probe_is_near_the_best_a_classifier_can_do():
    """On overlapping Gaussians the accuracy is that of the nearest true centre, which no classifier beats."""
    train, (test_x, test_y) = gaussians(4000, 8, 3, 1.5, seed=1), gaussians(4000, 8, 3, 1.5, seed=2)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 1.5 / math.sqrt(8)
    best = (torch.cdist(test_x, centres).argmin(dim=1) == test_y).float().mean().item()
    assert 0.5 < best < 0.9
    assert abs(linear_probe.linear_probe(*train, test_x, test_y) - best) < 0.015


def test_probe_does_not_depend_on_units(fits):
    """Each feature may be scaled and shifted: the standardised features, and so the fit, stay the same."""
    (train_x, train_y), (test_x, test_y) = gaussians(300, 12, 4, 2.0, seed=1), gaussians(500, 12, 4, 2.0, seed=2)
    scale = torch.logspace(-3, 3, 12)
    offset = scale * torch.linspace(-5, 5, 12)
    plain = linear_probe.linear_probe(train_x, train_y, test_x, test_y)
    weights = fits[-1][1]
    moved = linear_probe.linear_probe(train_x * scale + offset, train_y, test_x * scale + offset, test_y)
    assert 0.5 < plain < 0.95
    assert abs(moved - plain) <= 0.004                                        # two points on the border, by rounding
    torch.testing.assert_close(fits[-1][1], weights, rtol=0, atol=0.02)


def test_probe_of_half_precision_features():
    """bfloat16 features are fitted in float32."""
    (train_x, train_y), (test_x, test_y) = gaussians(300, 8, 3, 12.0, seed=1), gaussians(300, 8, 3, 12.0, seed=2)
    assert linear_probe.linear_probe(train_x.bfloat16(), train_y, test_x.bfloat16(), test_y) > 0.99


def test_probe_ignores_a_feature_that_is_dead_in_training():
    """A feature without variance in training gets no weight, whatever it does in the test set."""
    (train_x, train_y), (test_x, test_y) = gaussians(300, 8, 3, 12.0, seed=1), gaussians(300, 8, 3, 12.0, seed=2)
    noise = 100 * torch.randn(300, 1, generator=torch.Generator().manual_seed(3))
    accuracy = linear_probe.linear_probe(
        torch.cat([train_x, torch.zeros(300, 1)], dim=1), train_y, torch.cat([test_x, noise], dim=1), test_y)
    assert accuracy > 0.99


def test_probe_predicts_one_point_at_a_time(monkeypatch):
    """No prediction depends on other test points or on test labels: one at a time they score the same.

    Few points in many dimensions, where the strength of the penalty matters: choosing it by the test score would make
    a single point right with either label.
    """
    monkeypatch.setattr(linear_probe, "L2", (10.0, 0.01))
    (train_x, train_y), (test_x, test_y) = gaussians(30, 20, 2, 1.5, seed=1), gaussians(15, 20, 2, 1.5, seed=2)
    train_x[:, 10:] *= 5
    together = linear_probe.linear_probe(train_x, train_y, test_x, test_y)
    right = [linear_probe.linear_probe(train_x, train_y, x[None], y[None]) for x, y in zip(test_x, test_y)]
    wrong = [linear_probe.linear_probe(train_x, train_y, x[None], 1 - y[None]) for x, y in zip(test_x, test_y)]
    assert together == pytest.approx(np.mean(right), abs=1e-6)
    assert [a + b for a, b in zip(right, wrong)] == [1.0] * len(test_y)


def test_probe_fits_without_the_test_set(fits):
    """Permuted test labels and other test features leave every fit bitwise the same."""
    train, (test_x, test_y) = gaussians(60, 20, 3, 1.5, seed=1), gaussians(200, 20, 3, 1.5, seed=2)
    linear_probe.linear_probe(*train, test_x, test_y)
    first = list(fits)
    for other_x, other_y in ((test_x, test_y.roll(1)), (10 * test_x + 3, test_y), (test_x[:5], test_y[:5])):
        fits.clear()
        linear_probe.linear_probe(*train, other_x, other_y)
        assert len(fits) == len(first)
        for ((x, y, _, l2, *_), weights), ((old_x, old_y, _, old_l2, *_), old) in zip(fits, first):
            assert torch.equal(x, old_x) and torch.equal(y, old_y) and l2 == old_l2 and torch.equal(weights, old)


def test_probe_takes_the_penalty_that_is_best_on_held_out_features(fits, monkeypatch):
    """Nine tenths are fitted with each penalty and a tenth scored; the last fit has the best one and all the points."""
    scores = Spy(linear_probe.score)
    monkeypatch.setattr(linear_probe, "score", scores)
    train_x, train_y = gaussians(200, 40, 3, 1.5, seed=1)
    linear_probe.linear_probe(train_x, train_y, *gaussians(50, 40, 3, 1.5, seed=2))
    *tries, ((x, _, _, chosen, *_), _) = fits
    *held, (last, _) = scores.calls
    assert sorted(args[3] for args, _ in tries) == sorted(linear_probe.L2)
    assert len(x) == 200 and all(len(args[0]) == 180 for args, _ in tries)
    assert all(len(args[0]) == 20 for args, _ in held) and len(last[0]) == 50
    for kept, ((held_x, *_), _) in zip((args[0] for args, _ in tries), held):
        assert torch.cdist(kept, held_x).min() > 0.1                          # no point is in both
    accuracy = {args[3]: score for (args, _), (_, score) in zip(tries, held)}
    assert len(set(accuracy.values())) > 1                                    # else there was nothing to choose
    assert accuracy[chosen] == max(accuracy.values())


@pytest.mark.parametrize("l2, steepest", [(1e-1, 3e-5), (1e-3, 1e-4)])
def test_fit_minimises_the_stated_objective(l2, steepest, fits, monkeypatch):
    """The gradient of cross-entropy + l2 / 2 |W|^2, by hand in float64 from raw features, vanishes at the solution."""
    monkeypatch.setattr(linear_probe, "L2", (l2,))
    train_x, train_y = gaussians(300, 10, 4, 2.0, seed=1)
    train_x = 3 * train_x + 7
    test_x, test_y = gaussians(500, 10, 4, 2.0, seed=2)
    test_x = 3 * test_x + 7
    accuracy = linear_probe.linear_probe(train_x, train_y, test_x, test_y)
    weights = fits[-1][1].double().numpy()
    mean, deviation = train_x.double().numpy().mean(axis=0), train_x.double().numpy().std(axis=0, ddof=1)

    def with_one(x):
        x = (x.double().numpy() - mean) / deviation
        return np.concatenate([x, np.ones((len(x), 1))], axis=1)

    def gradient(weights):
        x = with_one(train_x)
        p = np.exp(x @ weights)
        p /= p.sum(axis=1, keepdims=True)
        penalised = np.concatenate([weights[:-1], np.zeros((1, 4))])
        return x.T @ (p - np.eye(4)[train_y]) / len(x) + l2 * penalised

    assert abs(gradient(np.zeros_like(weights))).max() > 0.1
    assert abs(gradient(weights)).max() < steepest
    predicted = (with_one(test_x) @ weights).argmax(axis=1)
    assert accuracy == pytest.approx((predicted == test_y.numpy()).mean(), abs=1e-6)


# ---- kNN


def knn_oracle(train_x, train_y, test_x, test_y, k, tau):
    """Wu et al. 2018, section 3.4, by loops in float64."""
    train_x, test_x = train_x.double().numpy(), test_x.double().numpy()
    right = 0
    for x, y in zip(test_x, test_y.tolist()):
        neighbours = []
        for other, label in zip(train_x, train_y.tolist()):
            neighbours.append((x @ other / math.sqrt((x @ x) * (other @ other)), label))
        votes = {}
        for similarity, label in sorted(neighbours, reverse=True)[:k]:
            votes[label] = votes.get(label, 0) + math.exp(similarity / tau)
        right += max(votes, key=votes.get) == y
    return right / len(test_y)


@pytest.mark.parametrize("k, tau", [(1, 0.1), (5, 0.1), (5, 5.0), (20, 0.07), (39, 0.5), (40, 0.5), (200, 0.1)])
def test_knn_is_the_loops(k, tau):
    """Accuracies are those of nested loops, also for a k larger than the training set and lengths that vary."""
    (train_x, train_y), (test_x, test_y) = gaussians(40, 3, 4, 1.5, seed=1), gaussians(150, 3, 4, 1.5, seed=2)
    train_x, test_x = train_x * torch.linspace(0.1, 9, 40)[:, None], test_x * torch.linspace(9, 0.1, 150)[:, None]
    accuracy = linear_probe.knn(train_x, train_y, test_x, test_y, k, tau)
    assert 0.2 < accuracy < 0.9
    assert accuracy == knn_oracle(train_x, train_y, test_x, test_y, k, tau)


def test_knn_counts_every_neighbour():
    """With k beyond the training set all of it votes: two far points outvote a near one when tau is large."""
    train_x, train_y = torch.tensor([[1.0, 0.1], [0.0, 1.0], [0.0, -1.0]]), torch.tensor([0, 1, 1])
    test_x, test_y = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    assert linear_probe.knn(train_x, train_y, test_x, test_y, k=200, tau=100.0) == 1
    assert linear_probe.knn(train_x, train_y, test_x, test_y, k=200, tau=0.1) == 0


def test_knn_of_more_than_one_batch():
    """The test set is scored in parts; none of it is left out or counted twice."""
    train, test = gaussians(15, 3, 3, 1.0, seed=1), gaussians(2100, 3, 3, 1.0, seed=2)
    assert linear_probe.knn(*train, *test, k=5) == knn_oracle(*train, *test, k=5, tau=0.1)


# ---- features


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Encoder(nn.Module):
    """Uses what differs between the modes: batch norm and dropout. Keeps the modes it was called in."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.dropout = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.modes = []

    def forward(self, x):
        self.modes.append([module.training for module in self.modules()])
        return self.dropout(self.bn(self.conv(x))).flatten(1)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    module = Encoder()
    module(torch.rand(8, 3, 6, 6))                                            # so that the running statistics moved
    module.modes.clear()
    return module


@pytest.mark.parametrize("training", [True, False])
def test_features(encoder, training):
    """The features of eval mode, in order, without a graph; the module comes back in its mode and bitwise unchanged."""
    images = random_images(25, 6)
    encoder.eval()
    expected = encoder(images.pixels / 255).detach()
    encoder.train(training).modes.clear()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    x = linear_probe.features(encoder, images, batch_size=10)
    assert encoder.modes == [[False] * 4] * 3
    assert [module.training for module in encoder.modules()] == [training] * 4
    assert encoder.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())
    assert x.dtype == torch.float32 and not x.requires_grad
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def test_features_puts_the_mode_back_when_encoding_fails(encoder):
    """An error on the way does not leave a training module in eval mode."""
    encoder.train()
    encoder.bn.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        linear_probe.features(encoder, random_images(5, 6))
    assert [module.training for module in encoder.modules()] == [True] * 4


def test_features_puts_the_mode_of_every_part_back(encoder):
    """A part that is kept in eval mode while the rest trains, such as a frozen batch norm, is still in eval after."""
    encoder.train()
    encoder.bn.eval()
    linear_probe.features(encoder, random_images(5, 6))
    assert encoder.dropout.training and not encoder.bn.training


def test_features_in_half_precision():
    """They come back as float32."""
    images = random_images(7, 4)
    x = linear_probe.features(Function(lambda x: x.flatten(1).bfloat16()), images, batch_size=3)
    assert x.dtype == torch.float32 and torch.equal(x, (images.pixels / 255).flatten(1).bfloat16().float())
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    half = linear_probe.features(linear, images, torch.autocast("cpu", torch.bfloat16))
    assert torch.equal(half, half.bfloat16().float()) and not torch.equal(half, linear_probe.features(linear, images))


# ---- whitened pixels


def correlated_images(n, size, seed):
    """Random images whose pixels share variance, so that their principal axes differ in it."""
    rng = np.random.default_rng(seed)
    mixture = np.random.default_rng(99).normal(size=(3 * size**2, 3 * size**2)) * np.linspace(0.2, 2, 3 * size**2)
    x = 128 + 60 * rng.normal(size=(n, 3 * size**2)) @ mixture.T / np.linalg.norm(mixture, axis=1)
    pixels = torch.from_numpy(x.clip(0, 255).round().astype(np.uint8)).view(n, 3, size, size)
    return Images(pixels, None, CPU, workers=0, in_memory=True)


DEFAULTS = dict(zip(("components", "size"), linear_probe.WhitenedPixels.__init__.__defaults__))  # not short_probes'


def whitened_pixels(train, test, **kwargs):
    module = linear_probe.WhitenedPixels(train, **DEFAULTS | kwargs)
    return linear_probe.features(module, train), linear_probe.features(module, test)


@pytest.mark.parametrize("size", [4, 10])
def test_whitened_pixels_are_white(size):
    """On the training images the features have mean 0 and covariance 1, as many as there are pixels or were asked."""
    train, test = correlated_images(700, size, seed=0), correlated_images(60, size, seed=1)
    x, z = whitened_pixels(train, test)
    dim = min(256, 3 * size**2)
    assert x.shape == (700, dim) and z.shape == (60, dim)
    assert x.mean(dim=0).abs().max() < 1e-3
    assert (x.T @ x / 700 - torch.eye(dim)).abs().max() < 5e-3


def test_whitened_pixels_are_the_first_principal_components():
    """Up to signs they are what an SVD in float64 gives; the test images get the training images' mean and axes."""
    train, test = correlated_images(400, 4, seed=0), correlated_images(30, 4, seed=1)
    x, z = whitened_pixels(train, test, components=5)
    pixels, others = (images.pixels.flatten(1).double().numpy() / 255 for images in (train, test))
    _, s, axes = np.linalg.svd(pixels - pixels.mean(axis=0), full_matrices=False)
    assert s[4] / s[5] > 1.001                                                # else the five are not determined
    for ours, raw in ((x, pixels), (z, others)):
        theirs = (raw - pixels.mean(axis=0)) @ axes[:5].T / (s[:5] / np.sqrt(400))
        ours = ours.double().numpy()[:, ::-1]                                 # eigh's order is ascending
        np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=0.02)


def test_whitened_pixels_of_large_images(monkeypatch):
    """Images over 32 px are first resized to 32, with antialiasing; those of 32 are left alone."""
    def without_axes(covariance):                                             # of 3072 x 3072, which takes seconds
        return torch.ones(len(covariance)), torch.eye(len(covariance))
    monkeypatch.setattr(torch.linalg, "eigh", without_axes)
    for size in (32, 45, 64):
        images = random_images(20, size)
        x, _ = whitened_pixels(images, images, components=3 * 32**2)
        pixels = TF.resize(images.pixels / 255, [32, 32], antialias=True).flatten(1)
        torch.testing.assert_close(x, pixels - pixels.mean(dim=0), rtol=0, atol=1e-5)


def test_whitened_pixels_of_fewer_images_than_components():
    """Test images are on the training images' scale even where these are too few to vary along every axis."""
    x, z = whitened_pixels(random_images(60, 16), random_images(60, 16, seed=1))
    assert z.std(dim=0).max() < 10 * x.std(dim=0).max()


# ---- both, for the table


def test_evaluate():
    """Every encoder and the pixels get both measures: labels given away are found, noise is at chance."""
    labels = [torch.arange(n) % 4 for n in (200, 400)]
    train, test = (random_images(len(y), 4, seed, y) for seed, y in enumerate(labels))
    for images in (train, test):
        images.pixels[:, 0, 0, 0] = 60 * images.labels.byte()

    def leak(x):
        return torch.eye(4)[(255 * x[:, 0, 0, 0] / 60).round().long()]
    results, x = linear_probe.evaluate(Data(train, train, train, test, tuple("abcd")), {
        "untrained": Function(lambda x: x[:, 1].flatten(1)), "trained": Function(leak)})
    assert results["linear"]["trained"] == results["knn"]["trained"] == 1
    assert abs(results["linear"]["untrained"] - 0.25) < 0.08 and abs(results["knn"]["untrained"] - 0.25) < 0.08
    noise = (x["untrained"][0], labels[0], x["untrained"][1], labels[1])
    assert results["linear"]["untrained"] == linear_probe.linear_probe(*noise)
    assert results["knn"]["untrained"] == linear_probe.knn(*noise)
    assert results["linear"].keys() == results["knn"].keys() == x.keys() == {"pixels", "untrained", "trained"}
    assert torch.equal(x["trained"][1], torch.eye(4)[labels[1]])
    text = linear_probe.table(results, "Method").splitlines()
    assert len(text) == 4 and text[3].split() == ["Method", "100.0", "100.0"]


def test_table_has_the_rows_and_measures_there_are():
    rows = {"pixels": 0.1, "untrained": 0.2, "trained": 0.3, "untrained conv": 0.4, "trained conv": 0.5, "context": 0.6}
    text = linear_probe.table({"linear": rows, "mlp": rows}, "dim").splitlines()
    assert text[0].split() == ["linear", "MLP"] and len({len(line) for line in text}) == 1
    assert [line[:26].strip() for line in text[1:]] == [
        "whitened pixels (PCA)", "untrained encoder", "dim", "untrained encoder, conv", "dim, conv", "context"]
