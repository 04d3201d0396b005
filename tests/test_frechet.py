# SPDX-License-Identifier: MIT
"""The Frechet distance against closed forms, with singular covariances, and beside its floor; the nearest images."""
import numpy as np
import pytest
import torch

from common.cli import Refusal
from common.data import Data, Images
from common.evaluation import generation as frechet

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def covariance(d, rank, seed):
    x = torch.randn(d, rank, generator=generator(seed), dtype=torch.float64)
    return x @ x.T


def images(n, size=8, seed=0):
    x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator(seed))
    return Images(x, None, CPU, 0, True)


def test_diagonal_gaussians():
    """Of covariances that commute: sum (m1 - m2)^2 + (sqrt c1 - sqrt c2)^2."""
    m1, m2, c1, c2 = torch.rand(4, 6, generator=generator(), dtype=torch.float64)
    expected = (m1 - m2).square().sum() + (c1.sqrt() - c2.sqrt()).square().sum()
    assert frechet.frechet_distance(m1, c1.diag(), m2, c2.diag()) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet.frechet_distance(m1[:1], c1[:1, None], m2[:1], c2[:1, None]) == pytest.approx(
        ((m1[0] - m2[0]) ** 2 + (c1[0].sqrt() - c2[0].sqrt()) ** 2).item(), rel=1e-9)


@pytest.mark.parametrize("rank", [12, 5])
def test_covariances_that_do_not_commute(rank):
    """tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of C1 C2."""
    c1, c2, zero = covariance(10, 12, 0), covariance(10, rank, 1), torch.zeros(10)
    roots = np.sqrt(np.clip(np.linalg.eigvals((c1 @ c2).numpy()).real, 0, None)).sum()
    expected = (c1.trace() + c2.trace()).item() - 2 * roots
    assert frechet.frechet_distance(zero, c1, zero, c2) == pytest.approx(expected, rel=1e-6)
    assert frechet.frechet_distance(zero, c2, zero, c1) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n, d", [(200, 8), (20, 64), (2, 16)], ids=["more images", "more dimensions", "two images"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_zero_for_equal_and_symmetric_and_finite(n, d, scale):
    """Of features, float32; with fewer images than dimensions the covariances are singular."""
    x, y = (scale * torch.randn(n, d, generator=generator(seed)) for seed in (0, 1))
    apart = frechet.distance(x, y)
    assert 0 < apart < 10 * scale**2 * d
    assert frechet.distance(y, x) == pytest.approx(apart, rel=1e-9)
    assert 0 <= frechet.distance(x, x) < 1e-9 * scale**2
    assert frechet.distance(x, x + scale) == pytest.approx(d * scale**2, rel=1e-3)
    assert frechet.distance(torch.ones(n, d), torch.ones(n, d)) == 0


def test_features_of_a_distance_are_moments():
    """Mean and covariance are those of numpy (N - 1)."""
    x, y = torch.randn(50, 3, generator=generator(0)), 2 * torch.rand(40, 3, generator=generator(1))
    moments = [torch.from_numpy(np.asarray(f(z.double().numpy()))) for z in (x, y)
               for f in (lambda z: z.mean(axis=0), lambda z: np.cov(z.T))]
    assert frechet.distance(x, y) == pytest.approx(frechet.frechet_distance(*moments), rel=1e-9)


def test_fewer_images_are_farther():
    """The bias that a floor of as many images has, too."""
    x = torch.randn(4000, 16, generator=generator())
    few, many = frechet.distance(x[:50], x[50:100]), frechet.distance(x[:2000], x[2000:])
    assert few > 10 * many > 0


def test_features_scales_and_resizes():
    """uint8 and floats in [0, 1] are the same to the encoder; images of another size are resized, within [0, 1]."""
    seen = []

    def encoder(x):
        seen.append(x)
        return x.flatten(1)
    x = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=generator())
    same, floats = (frechet.features(encoder, 8, images, CPU, batch_size=2) for images in (x, x / 255))
    assert torch.equal(same, (x / 255).flatten(1)) and torch.equal(floats, same) and len(seen) == 6
    larger = frechet.features(encoder, 12, x, CPU)
    assert larger.shape == (5, 3 * 12 * 12) and 0 <= larger.min() and larger.max() <= 1
    assert torch.allclose(frechet.features(encoder, 4, torch.full((2, 3, 8, 8), 0.3), CPU), torch.tensor(0.3))


class Judge:
    image_size = 8


def judge(x):
    return x.mean(dim=(2, 3))


def test_beside_floor():
    """Of as many images each: others of the same kind are at the floor, darker ones and a coarse palette far above."""
    test, samples = images(400), images(100, seed=1).pixels / 255
    alike = frechet.frechet_distances((Judge, judge), samples, test, lambda x: x / 255, CPU)
    assert alike["images"] == 100 and alike["seen"] == alike["test"] > 0
    assert alike["samples"] < 5 * alike["test"]
    bad = frechet.frechet_distances((Judge, judge), samples / 2, test, lambda x: (x / 255).round() / 2, CPU)
    assert bad["samples"] > 100 * bad["test"] and bad["seen"] > 100 * bad["test"] == 100 * alike["test"]
    assert frechet.frechet_distances((Judge, judge), samples, images(50), lambda x: x / 255, CPU)["images"] == 25


@pytest.mark.parametrize("n, test", [(1, images(8)), (8, images(3)), (8, None)], ids=["samples", "test", "no test"])
def test_too_few(n, test):
    with pytest.raises(Refusal, match="--frechet needs"):
        frechet.frechet_distances((Judge, judge), torch.rand(n, 3, 8, 8), test, lambda x: x / 255, CPU)


def test_nearest():
    """By definition, in loops; an equal image is at 0 exactly."""
    train, x = images(20), images(4, seed=1).pixels / 255
    x[0] = train.pixels[7] / 255
    gap, index = frechet.nearest(x, train, lambda x: x / 255, k=3)
    assert gap.shape == index.shape == (3, 4) and gap[0, 0] == 0 and index[0, 0] == 7
    for i in range(4):
        all_gaps = (train.pixels / 255 - x[i]).square().mean(dim=(1, 2, 3)).sqrt() * 255
        expected = all_gaps.sort()
        assert torch.allclose(gap[:, i], expected.values[:3], atol=1e-3)
        assert torch.equal(index[:, i], expected.indices[:3])
    assert frechet.nearest(x, images(2), lambda x: x / 255)[0].shape == (2, 4)


def test_neighbours():
    """A memorised sample stands before its original, at 0; without test images there is nothing said of them."""
    train, test = images(20), images(10, seed=1)
    samples = train.pixels[[3, 5, 8]] / 255
    gaps, rows = frechet.neighbours(samples, Data(train, train, None, test, ()), lambda x: x / 255, shown=2)
    assert rows.shape == (2, 8, 3, 8, 8) and torch.equal(rows[:, 0], samples[:2])
    assert torch.equal(rows[:, 1], samples[:2]) and not torch.equal(rows[:, 2], samples[:2])
    assert gaps["samples"] == {"mean": 0, "least": 0} and 0 < gaps["test"]["least"] <= gaps["test"]["mean"]
    gaps, _ = frechet.neighbours(samples, Data(train, train, None, None, ()), lambda x: x / 255)
    assert gaps.keys() == {"samples"}
    text = frechet.table({"nearest": gaps, "frechet": {"images": 3, "samples": 2.5, "test": 0.125, "seen": 1.0}})
    assert "to 3 test images" in text and [line.split()[-1] for line in text.splitlines()[-3:]] == ["2.5", "0.125", "1"]
