"""SimCLR's loss and optimiser against their equations."""
import math

import pytest
import torch

import gcrl
import simclr
from common import resnet


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
    from common import augment
    x = torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8)
    rng = augment.Random(0)
    for blur in (0.0, 0.5):
        a, b = (simclr.view(x, rng, 40, 0.08, 1.0, blur) for _ in range(2))
        assert a.shape == (16, 3, 40, 40) and a.dtype == torch.float32
        assert 0 <= a.min() and a.max() <= 1 and (a - b).abs().mean() > 0.01
