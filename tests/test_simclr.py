# SPDX-License-Identifier: MIT
"""SimCLR's loss and optimiser against their equations."""
import math

import pytest
import torch
import torchvision.transforms.functional as TF

import gcrl
import simclr
from common import augment, resnet


def oracle(z1, z2, tau):
    """Equation 1 of 2002.05709 in loops, in float64."""
    z = [v / v.norm() for v in torch.cat([z1, z2])]
    n = len(z1)
    total = 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        denominator = sum(torch.exp(z[i] @ z[k] / tau) for k in range(2 * n) if k != i)
        total = total - torch.log(torch.exp(z[i] @ z[j] / tau) / denominator)
    return total / (2 * n)


@pytest.mark.parametrize("nt_xent", [simclr.nt_xent, gcrl.nt_xent])
@pytest.mark.parametrize("n, tau", [(2, 0.5), (7, 0.1), (5, 2.0)])
def test_nt_xent_is_the_equation_with_its_gradient(nt_xent, n, tau):
    torch.manual_seed(n)
    z1, z2 = (3 * torch.randn(n, 6)).requires_grad_(), torch.randn(n, 6).requires_grad_()
    w1, w2 = z1.detach().double().requires_grad_(), z2.detach().double().requires_grad_()
    ours, truth = nt_xent(z1, z2, tau), oracle(w1, w2, tau)
    ours.backward()
    truth.backward()
    assert ours.item() == pytest.approx(truth.item(), rel=1e-5)
    for grad, true in ((z1.grad, w1.grad), (z2.grad, w2.grad)):
        assert (grad - true).norm() / true.norm() < 1e-4


@pytest.mark.parametrize("nt_xent", [simclr.nt_xent, gcrl.nt_xent])
def test_nt_xent_closed_forms(nt_xent):
    """Equal projections are at chance; swapped views and scaled projections change nothing; it is float32 in bf16."""
    torch.manual_seed(0)
    z1, z2 = torch.randn(9, 4), torch.randn(9, 4)
    assert nt_xent(torch.ones(9, 4), torch.ones(9, 4), 0.3).item() == pytest.approx(math.log(17), rel=1e-6)
    assert nt_xent(z2, z1, 0.3).item() == pytest.approx(nt_xent(z1, z2, 0.3).item(), rel=1e-6)
    assert nt_xent(7 * z1, 0.1 * z2, 0.3).item() == pytest.approx(nt_xent(z1, z2, 0.3).item(), rel=1e-5)
    assert nt_xent(z1.bfloat16(), z2.bfloat16(), 0.3).dtype == torch.float32
    # Orthogonal pairs: a positive of similarity 1 among 2N - 2 of similarity 0.
    assert nt_xent(torch.eye(9), torch.eye(9), 0.5).item() == pytest.approx(math.log(math.exp(2) + 16) - 2, rel=1e-6)


def others_oracle(loss, z1, z2, value, hard):
    """NT-Logistic and the margin triplet of table 2 in loops, in float64, with all negatives or the semi-hard one."""
    z = [v / v.norm() for v in torch.cat([z1, z2])]
    n, total = len(z1), 0.0
    for i in range(2 * n):
        positive = z[i] @ z[(i + n) % (2 * n)]
        negatives = [z[i] @ z[k] for k in range(2 * n) if k % n != i % n]
        if hard:
            margin = value if loss == "margin" else math.inf
            negatives = sorted((s for s in negatives if 0 < positive - s < margin), key=lambda s: s.item())[-1:]
        if loss == "logistic":
            total = total - torch.log(torch.sigmoid(positive / value))
            terms = [-torch.log(torch.sigmoid(-s / value)) for s in negatives]
        else:
            terms = [torch.clamp(s - positive + value, min=0) for s in negatives]
        total = total + (sum(terms) / len(terms) if terms else 0.0)
    return total / (2 * n)


@pytest.mark.parametrize("loss, value", [("logistic", 0.5), ("logistic", 0.1), ("margin", 0.4), ("margin", 1.5)])
@pytest.mark.parametrize("hard", [False, True], ids=["all", "semi-hard"])
@pytest.mark.parametrize("n", [2, 6])
def test_logistic_and_margin_are_the_equations_with_their_gradients(loss, value, hard, n):
    torch.manual_seed(n)
    z1, z2 = (3 * torch.randn(n, 6)).requires_grad_(), torch.randn(n, 6).requires_grad_()
    w1, w2 = z1.detach().double().requires_grad_(), z2.detach().double().requires_grad_()
    function = {"logistic": simclr.logistic, "margin": simclr.margin_triplet}[loss]
    ours, truth = function(z1, z2, value, hard), others_oracle(loss, w1, w2, value, hard)
    ours.backward()
    truth.backward()
    assert ours.item() == pytest.approx(truth.item(), rel=1e-5)
    for grad, true in ((z1.grad, w1.grad), (z2.grad, w2.grad)):
        assert (grad - true).norm() <= 1e-4 * true.norm() + 1e-7


def test_chance_of_logistic_and_margin():
    same = torch.ones(5, 3)
    assert simclr.logistic(same, same, 0.5).item() == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.exp(2)))
    assert simclr.margin_triplet(same, same, 0.4).item() == pytest.approx(0.4)
    assert simclr.logistic(same, same, 0.5, True).item() == pytest.approx(math.log1p(math.exp(-2)))      # none is
    assert simclr.margin_triplet(same, same, 0.4, True).item() == 0                                      # semi-hard
    z1, z2 = torch.randn(2, 64, 4096, generator=torch.Generator().manual_seed(0)).unbind()    # at chance: cosines of 0
    for semi_hard in (False, True):
        assert simclr.logistic(z1, z2, 0.5, semi_hard).item() == pytest.approx(2 * math.log(2), rel=0.01)
        assert simclr.margin_triplet(z1, z2, 0.4, semi_hard).item() == pytest.approx(0.4, rel=0.02)


@pytest.mark.parametrize("flags, chance", [
    ("--loss logistic --tau 0.5", 2 * math.log(2)), ("--loss logistic --tau 0.5 --semi-hard", 2 * math.log(2)),
    ("--loss margin --margin 0.4", 0.4), ("--loss margin --margin 0.4 --semi-hard", 0.4), ("", math.log(15))])
def test_the_chance_that_is_printed(flags, chance, tiny, here, capsys):
    simclr.main(tiny("simclr", *flags.split(), "--epochs", 1))
    assert f"(chance {chance:.3f})" in capsys.readouterr().out


def test_lars_is_its_formula():
    """Three steps of g, v and w by hand, for adapted and excluded parameters, and a zero weight."""
    torch.manual_seed(0)
    start = {"weight": torch.randn(4, 3), "bias": torch.randn(3), "zero": torch.zeros(2, 2)}
    params = {k: v.clone().requires_grad_() for k, v in start.items()}
    lr, momentum, decay, eta = 0.3, 0.9, 0.01, 0.02
    optimizer = simclr.LARS([{"params": [params["weight"], params["zero"]], "weight_decay": decay, "adapt": True},
                             {"params": [params["bias"]], "weight_decay": 0.0, "adapt": False}], lr, momentum, eta=eta)
    w, v = {k: x.double() for k, x in start.items()}, {k: torch.zeros_like(x).double() for k, x in start.items()}
    for _ in range(3):
        gradients = {k: torch.randn_like(x) for k, x in start.items()}
        for k, x in params.items():
            x.grad = gradients[k].clone()
        optimizer.step()
        for k in w:
            g = gradients[k].double() + (decay if k != "bias" else 0) * w[k]
            trust = eta * w[k].norm() / g.norm() if k != "bias" and w[k].norm() > 0 else 1.0
            v[k] = momentum * v[k] + lr * trust * g
            w[k] = w[k] - v[k]
            assert torch.allclose(params[k].double(), w[k], rtol=1e-5, atol=1e-7), k


def test_biases_and_batch_norm_are_excluded():
    model = simclr.SimCLR(resnet.resnet18("cifar", 4))
    decayed, excluded = simclr.parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("bn" not in names[id(p)] and "bias" not in names[id(p)] for p in decayed["params"])
    assert all("bn" in names[id(p)] or "downsample.1" in names[id(p)] or "bias" in names[id(p)]
               for p in excluded["params"])
    assert len(decayed["params"]) + len(excluded["params"]) == len(names)
    assert (decayed["weight_decay"], decayed["adapt"]) == (0.1, True)
    assert (excluded["weight_decay"], excluded["adapt"]) == (0, False)


def test_views_are_the_papers_in_range_and_differ():
    x = torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8)
    rng = augment.Random(0)
    for blur in (0.0, 0.5):
        a, b = (simclr.view(x, rng, 40, 0.08, 1.0, blur) for _ in range(2))
        assert a.shape == (16, 3, 40, 40) and a.dtype == torch.float32
        assert 0 <= a.min() and a.max() <= 1 and (a - b).abs().mean() > 0.01


@pytest.mark.parametrize("flags, other", [("--augmentations flip", "flip"), ("--augmentations crop grey", "crop")])
def test_one_branch_shares_a_crop(flags, other, tiny, here, monkeypatch):
    """Figure 5: the operations are on one of two copies of the same crop."""
    pairs = []
    monkeypatch.setattr(simclr.Run, "picture", lambda run, name, *views: pairs.append(views))
    simclr.main(tiny("simclr", "--one-branch", *flags.split(), "--blur", 0, "--epochs", 1))
    (x1, x2), = pairs
    same, flipped = ((x1 - x).abs().flatten(1).amax(dim=1) < 1e-6 for x in (x2, x2.flip(3)))
    if other == "flip":
        assert (same | flipped).all() and same.any() and flipped.any()
    else:                                                                     # a crop of the crop
        assert same.float().mean() < 0.5


def test_without_crop_the_whole_photograph_is_seen():
    """Of squares that photographs were squashed to, too."""
    x = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    views = simclr.view(x, augment.Random(0), 16, 1.0, 0.0, 0.0, torch.full((8,), 2.0), names=[])
    assert views.allclose(x / 255, atol=1e-6)


@pytest.mark.parametrize("size", [8, 16, 24, 40])
def test_blur_blurs_at_any_size(size):
    x = torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8)
    sharp, blurred = (simclr.view(x, augment.Random(0), size, 1.0, 0.0, blur, names=[]) for blur in (0.0, 1.0))
    assert ((sharp - blurred).abs().flatten(1).max(dim=1).values > 0.001).float().mean() > 0.8          # sigma from 0.1
    assert blurred.var() < 0.9 * sharp.var()


# ---- the augmentations that the paper studies


def random_views(name, n=64, size=12):
    x = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    return x, augment.apply(x, getattr(simclr, name)(augment.Random(0), n, size))


def test_cutout_greys_one_square():
    x, y = random_views("cutout")
    changed = (x != y).any(dim=1)
    assert (y[:, 0][changed] == 0.5).all() and (changed.sum(dim=(1, 2)) == 36).all()
    assert (changed.any(dim=1).sum(dim=1) == 6).all() and (changed.any(dim=2).sum(dim=1) == 6).all()
    assert len({tuple(c.flatten().tolist()) for c in changed}) > 20 and changed.any(dim=0).all()


def test_rotation_is_torchvisions():
    x, y = random_views("rotation")
    turned = [[TF.rotate(image, angle) for angle in (0, 90, 180, 270)] for image in x]
    which = [[torch.equal(image, other) for other in others] for image, others in zip(y, turned)]
    assert all(sum(row) == 1 for row in which) and all(map(any, zip(*which)))


def test_noise_has_its_deviation():
    x = torch.full((64, 3, 12, 12), 0.5)
    y = augment.apply(x, simclr.noise(augment.Random(0), 64, 12)) - x
    assert y.mean().abs() < 0.005 and y.std().item() == pytest.approx(0.1, rel=0.02)


def test_sobel_by_hand():
    """Of a ramp the slope times two (per pixel), of a flat image nothing, inside the borders."""
    ramp = (0.05 * torch.arange(10.0)).expand(1, 3, 10, 10)
    for x in (ramp, ramp.mT):
        edges = augment.apply(x, simclr.sobel(None, 1, 10))
        assert torch.allclose(edges[:, :, 1:-1, 1:-1], torch.tensor(0.1), atol=1e-4)
    assert augment.apply(torch.full((1, 3, 6, 6), 0.3), simclr.sobel(None, 1, 6)).abs().max() < 1e-6


def test_names_choose_the_operations():
    """Without any, the whole image, resized; each name changes it; the recipe is the default."""
    x = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8)
    view = lambda names, **more: simclr.view(x, augment.Random(0), 16, 0.2, 1.0, 0.0, names=names)
    assert torch.allclose(view(()), x / 255, atol=1e-6)
    for name in simclr.RECIPE + simclr.STUDIED:
        assert not torch.allclose(view((name,)), x / 255, atol=1e-3), name
    assert torch.equal(view(simclr.RECIPE), simclr.view(x, augment.Random(0), 16, 0.2, 1.0, 0.0))
