# SPDX-License-Identifier: MIT
"""DIM's estimators against loops and known mutual information, its losses, and AMDIM's, pair by pair."""
import math

import pytest
import torch
import torch.nn.functional as F

import dim
from common import augment
from common.cli import Refusal

ESTIMATORS = ["dv", "jsd", "infonce"]


# ---- mutual information


def oracle(scores, positives, estimator):
    """The equations in loops, in float64."""
    rows, columns = scores.shape
    real = [scores[i, j] for i in range(rows) for j in range(columns) if positives[i, j]]
    fake = [scores[i, j] for i in range(rows) for j in range(columns) if not positives[i, j]]
    if estimator == "dv":
        return sum(real) / len(real) - torch.log(sum(torch.exp(t) for t in fake) / len(fake))
    if estimator == "jsd":
        return (sum(-torch.log(1 + torch.exp(-t)) for t in real) / len(real)
                - sum(torch.log(1 + torch.exp(t)) for t in fake) / len(fake))
    total, count = 0.0, 0
    for i in range(rows):
        negatives = [torch.exp(scores[i, j]) for j in range(columns) if not positives[i, j]]
        for j in range(columns):
            if positives[i, j]:
                e = torch.exp(scores[i, j])
                total, count = total + torch.log((1 + len(negatives)) * e / (e + sum(negatives))), count + 1
    return total / count


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rows, places", [(2, 1), (4, 3), (3, 5)])
def test_estimators_are_the_equations_with_their_gradients(estimator, rows, places):
    torch.manual_seed(rows)
    given = 3 * torch.randn(rows, rows * places)
    positives = torch.eye(rows, dtype=torch.bool).repeat_interleave(places, dim=1)
    ours, true = (given.clone().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    value, truth = dim.mutual_information(ours, positives, estimator), oracle(true, positives, estimator)
    value.backward()
    truth.backward()
    assert value.item() == pytest.approx(truth.item(), rel=1e-5)
    assert (ours.grad - true.grad).norm() <= 1e-5 * true.grad.norm()


@pytest.mark.parametrize("estimator, level, best", [("dv", 0.0, math.inf), ("jsd", -math.log(4), 0.0),
                                                    ("infonce", 0.0, math.log(13))])
def test_chance_and_bounds(estimator, level, best):
    """T = 0 is at chance; whatever T, infonce is at most log(1 + negatives) and jsd at most 0; both come near."""
    positives = torch.eye(4, dtype=torch.bool).repeat_interleave(4, dim=1)
    assert dim.mutual_information(torch.zeros(4, 16), positives, estimator).item() == pytest.approx(level, abs=1e-5)
    for strength in (1, 10, 1000):
        value = dim.mutual_information(strength * (2.0 * positives - 1), positives, estimator).item()
        assert value <= best
    assert value > 100 if estimator == "dv" else value == pytest.approx(best, abs=1e-5)


def truth_of_gaussians(rho, estimator):
    """For x, y normal with correlation rho: their mutual information in nats, or for jsd 2 JS(P, Q) - log 4."""
    if estimator != "jsd":
        return -0.5 * math.log(1 - rho**2)
    grid = torch.linspace(-7, 7, 1401, dtype=torch.float64)
    x, y = torch.meshgrid(grid, grid, indexing="ij")
    q = torch.exp(-(x**2 + y**2) / 2) / (2 * math.pi)
    t = -0.5 * math.log(1 - rho**2) + (rho * x * y - rho**2 * (x**2 + y**2) / 2) / (1 - rho**2)
    step = (grid[1] - grid[0]) ** 2
    return ((-F.softplus(-t) * q * t.exp() - F.softplus(t) * q).sum() * step).item()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gaussians_of_known_mutual_information(estimator):
    """T, a quadratic of the pair, trained by each estimator on Gaussians: its estimate on new ones is near the truth,
    and in its order."""
    estimates, rhos = [], (0.2, 0.6, 0.9)
    for rho in rhos:
        generator, weights = torch.Generator().manual_seed(0), torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.Adam([weights], 0.05)

        def estimate(n):
            x, noise = torch.randn(2, n, generator=generator)
            y = rho * x + math.sqrt(1 - rho**2) * noise
            a, b = x[:, None].expand(n, n), y[None].expand(n, n)
            scores = torch.stack([torch.ones(n, n), a * b, a**2, b**2], dim=2) @ weights
            return dim.mutual_information(scores, torch.eye(n, dtype=torch.bool), estimator)

        for step in range(300):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
            optimizer.zero_grad()
            (-estimate(128)).backward()
            optimizer.step()
        with torch.no_grad():
            estimates.append(sum(estimate(1000).item() for _ in range(4)) / 4)
    for rho, value in zip(rhos, estimates):
        assert value == pytest.approx(truth_of_gaussians(rho, estimator), abs=0.05)
    assert estimates == sorted(estimates)


# ---- DIM


def test_dot_scores_every_pair():
    torch.manual_seed(0)
    critic, y, c = dim.Dot(3, 5, 8), torch.randn(4, 3), torch.randn(4, 6, 5)
    scores, positives = critic(y, c)
    assert scores.shape == positives.shape == (4, 24)
    for i in range(4):
        for j in range(4):
            for place in range(6):
                a, b = critic.y(y)[i], critic.c(c)[j, place]
                assert scores[i, 6 * j + place].item() == pytest.approx((a @ b / math.sqrt(8)).item(), abs=1e-4)
                assert positives[i, 6 * j + place] == (i == j)


def test_embedding_of_the_dot_critic_is_the_authors():
    """Batch norm in the hidden layer, a shortcut that begins near the identity, layer norm of the sum."""
    torch.manual_seed(0)
    module, x = dim.Embedding(3, 5), torch.randn(4, 6, 3)
    flat = x.reshape(24, 3)
    hidden = flat @ module.hidden.weight.T
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + module.hidden_norm.eps).sqrt()
    total = hidden.relu() @ module.out.weight.T + module.out.bias + flat @ module.shortcut.weight.T
    true = (total - total.mean(1, keepdim=True)) / (total.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(module(x), true.view(4, 6, 5), atol=1e-4)
    assert (module.shortcut.weight - torch.eye(5, 3)).abs().max() <= 0.01


def test_concat_scores_its_own_and_another_image():
    torch.manual_seed(0)
    critic, y, c = dim.Concat(3, 5, 8), torch.randn(4, 3), torch.randn(4, 6, 5)
    scores, positives = critic(y, c)
    assert scores.shape == positives.shape == (4, 12)
    for i in range(4):
        for place in range(12):
            j = i if place < 6 else i - 1
            true = critic.net(torch.cat([y[i], c[j, place % 6]])).item()
            assert scores[i, place].item() == pytest.approx(true, abs=1e-5)
            assert positives[i, place] == (i == j)


def new_dim(views=1, alpha=0.5, beta=2.0, gamma=0.3, estimator="jsd", critic="dot", size=16, arch="conv"):
    torch.manual_seed(0)
    encoder = dim.Encoder(arch, 4, size, dim=6)
    return dim.DIM(encoder, views, alpha, beta, gamma, estimator, critic, 8, dim=6)


def prior_oracle(model, real, fake):
    """D's cross-entropy, half the mean squared length of its gradient at real and fake each, and gamma times the
    encoder's -log D(fake), image by image."""
    total = 0.0
    for sets, sign in ((real, 1), (fake.detach(), -1)):
        for row in sets:
            row = row.clone().requires_grad_()
            slope, = torch.autograd.grad(model.prior(row).sum(), row, create_graph=True)
            total = total - torch.log(torch.sigmoid(sign * model.prior(row))).sum() / len(sets)
            total = total + 0.5 * (slope**2).sum() / len(sets)
    return total - model.gamma * torch.log(torch.sigmoid(model.prior(fake))).mean()


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("critic", ["dot", "concat"])
def test_loss_is_the_weighted_sum(views, estimator, critic):
    """Of two views Y of one meets the map of the other; each image's own second view is never a Fake."""
    model = new_dim(views, estimator=estimator, critic=critic)
    x, uniform = torch.rand(views * 4, 3, 16, 16), torch.rand(views * 4, 6)
    h, terms = model(x, uniform)
    out = model.encoder.layers(x)                                             # the same batch statistics
    assert torch.allclose(h, out["fc"])
    y, local = out["Y"].chunk(views), out["local"].chunk(views)
    wide, narrow = [], []
    for view in range(views):
        other = local[views - 1 - view]
        narrow.append(dim.mutual_information(*model.local_critic(y[view], other.flatten(2).mT), estimator))
        wide.append(dim.mutual_information(*model.global_critic(y[view], model.summary(other)[:, None]), estimator))
    adversary = prior_oracle(model, uniform, out["Y"].sigmoid())
    expected = [-0.5 * sum(wide) / views, -2.0 * sum(narrow) / views, adversary]
    assert [t.item() for t in terms] == pytest.approx([t.item() for t in expected], rel=1e-4)


def test_chance_of_the_adversary(tiny, here, capsys):
    """A D of 0 is at the level that is printed as chance."""
    dim.main(tiny("dim", "--objective", "global", "--gamma", 1, "--epochs", 1))
    model = new_dim(gamma=1.0)
    for p in (p for layer in list(model.prior)[3:] for p in layer.parameters()):
        torch.nn.init.zeros_(p)
    level = model.prior_matching(torch.rand(5, 6), torch.rand(5, 6, requires_grad=True)).item()
    assert f"(chance {level:.3f})" in capsys.readouterr().out.split("prior", 1)[1].split("  ")[0]


def test_adversary_and_encoder_descend_their_own_losses():
    """The adversary its cross-entropy and gradient penalty, the encoder gamma times the loss that is not saturating."""
    model = new_dim(alpha=0, beta=0)
    x, uniform = torch.rand(4, 3, 16, 16), torch.rand(4, 6)
    term, = model(x, uniform)[1]
    ours = torch.autograd.grad(term, [model.encoder.y.weight, model.prior[0].weight])
    fake = model.encoder.layers(x)["Y"].sigmoid()
    encoders = 0.3 * -torch.log(torch.sigmoid(model.prior(fake))).mean()
    true = torch.autograd.grad(encoders, model.encoder.y.weight, retain_graph=True)[0]
    assert torch.allclose(ours[0], true, rtol=1e-4, atol=1e-8) and true.abs().max() > 1e-6
    model.gamma = 0.0                                                         # leaves the adversary's alone
    true = torch.autograd.grad(prior_oracle(model, uniform, fake), model.prior[0].weight)[0]
    assert torch.allclose(ours[1], true, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("arch, size", [("conv", 8), ("conv", 20), ("conv", 32), ("resnet18", 20), ("resnet18", 32),
                                        ("resnet18", 96)])
def test_encoder_has_the_sizes_it_says(arch, size):
    encoder = dim.Encoder(arch, 4, size)
    out = encoder.layers(torch.rand(2, 3, size, size))
    assert out["local"].flatten(2).shape == (2, encoder.local_dim, encoder.positions)
    assert out["conv"].shape == (2, encoder.conv_dim) and out["fc"].shape == (2, 64) and out["Y"].shape == (2, 64)


def test_the_papers_encoder_at_32_pixels():
    """Local 128 x 8 x 8, conv 256 x 4 x 4, fc 1024, Y 64."""
    out = dim.Encoder("conv", 64, 32).layers(torch.rand(2, 3, 32, 32))
    assert out["local"].shape[1:] == (128, 8, 8)
    assert [out[name].shape[1] for name in ("conv", "fc", "Y")] == [256 * 4 * 4, 1024, 64]


# ---- AMDIM


def test_amdims_blocks_begin_as_means():
    """The second convolution is 0 at first: a block is the mean over its window, with zeros for new channels."""
    torch.manual_seed(0)
    x, block = torch.rand(2, 3, 8, 8), dim.Residual(3, 5, 4, 2)
    assert torch.equal(block(x)[:, :3], F.avg_pool2d(x, 4, 2)) and not block(x)[:, 3:].any()
    with torch.no_grad():
        block.conv2.weight.normal_()
    true = F.conv2d(F.relu(F.conv2d(x, block.conv1.weight, stride=2)), block.conv2.weight)
    assert torch.allclose(block(x)[:, 3:], true[:, 3:], atol=1e-6)
    assert torch.equal(dim.Residual(5, 3, 3, 1)(torch.ones(2, 5, 5, 5)), torch.ones(2, 3, 3, 3))               # fewer


def test_amdims_embeddings_are_the_authors():
    """A hidden layer without norm, whose second half is 0 at first, a shortcut near the identity, batch norm at the
    end, over all places of all images."""
    torch.manual_seed(0)
    model, x = dim.AMDIM(dim.MultiscaleEncoder(32, 2, 8, 1)), torch.rand(2, 8, 5, 5)
    assert (model.clip, model.penalty) == (20, 0.05)                          # the authors'
    embedding = model.embeddings["5"]
    assert not embedding.out.weight.any() and embedding.out.bias is None
    assert (embedding.shortcut.weight - torch.eye(8)).abs().max() <= 0.01
    with torch.no_grad():
        embedding.out.weight.normal_()
    maps = [F.conv2d(x, layer.weight[:, :, None, None]) for layer in (embedding.hidden, embedding.shortcut)]
    total = F.conv2d(maps[0].relu(), embedding.out.weight[:, :, None, None]) + maps[1]
    mean, variance = total.mean((0, 2, 3), keepdim=True), total.var((0, 2, 3), correction=0, keepdim=True)
    true = (total - mean) / (variance + 1e-5).sqrt()
    assert torch.allclose(embedding(x.flatten(2).mT).mT.unflatten(2, (5, 5)), true, atol=1e-4)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_maps_and_what_their_places_see(size):
    """Maps of 7 and 5 at every size; by gradient, a place has seen a square of about S / 4 and S / 2 pixels."""
    torch.manual_seed(0)
    encoder = dim.MultiscaleEncoder(size, 4, 40, 2).eval()
    x = torch.rand(1, 3, size, size, requires_grad=True)
    maps = encoder.layers(x)
    channels = 16 if size == 32 else 32
    assert encoder.channels == channels and {s: tuple(m.shape[1:]) for s, m in maps.items()} == {
        7: (channels, 7, 7), 5: (channels, 5, 5), 1: (40,)}
    for scale, share in ((7, 4), (5, 2)):
        seen = torch.autograd.grad(maps[scale][0, :, 2, 2].sum(), x, retain_graph=True)[0][0].abs().sum(0) > 0
        for side in (seen.any(0).sum().item(), seen.any(1).sum().item()):
            assert size // share - 1 <= side <= size // share + (3 if size == 128 else 1)      # a 5 x 5 stem


@pytest.mark.parametrize("tasks", [("1-5", "1-7", "5-5"), ("1-5",), ("1-7", "5-5")])
def test_multiscale_loss_is_its_tasks(tasks):
    """1 to 5, 1 to 7, and one place of 5 to 5, from each view to the other, in loops."""
    torch.manual_seed(0)
    model = dim.AMDIM(dim.MultiscaleEncoder(32, 4, 8, 1), tasks, clip=2.0, penalty=0.05)
    x, place, n = 3 * torch.rand(6, 3, 32, 32), torch.tensor([3, 24, 0, 7, 1, 24]), 3
    h, (loss, penalty) = model(x, place)
    maps = model.encoder.layers(x)                                            # the same batch statistics
    assert torch.allclose(h, maps[1])
    vectors = {int(s): embed(maps[int(s)].flatten(2).mT).double() for s, embed in model.embeddings.items()}
    assert set(vectors) == {int(scale) for scale in "".join(tasks) if scale in "57"}
    total, squares = 0.0, 0.0
    for scale, other in (map(int, task.split("-")) for task in tasks):
        for view in (0, 1):
            scores, positives = torch.empty(n, n * other**2, dtype=torch.float64), torch.empty(n, n * other**2).bool()
            for i in range(n):
                row = view * n + i
                anchor = maps[1][row].double() if scale == 1 else vectors[5][row, place[row]]
                for j in range(n):
                    for p in range(other**2):
                        score = anchor @ vectors[other][(1 - view) * n + j, p] / math.sqrt(8)
                        squares = squares + score**2 / (n * n * other**2)
                        scores[i, j * other**2 + p] = 2 * torch.tanh(score / 2)
                        positives[i, j * other**2 + p] = i == j
            total = total - oracle(scores, positives, "infonce") / 2
    assert loss.item() == pytest.approx(total.item(), rel=1e-3, abs=1e-4)
    assert penalty.item() == pytest.approx(0.05 * squares.item() / 2, rel=1e-3)


# ---- views and flags


def test_views():
    """One view is the image; two differ but in their flip."""
    x = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(dim.random_views(x, augment.Random(0), 16, 1), x / 255)
    ramp = torch.arange(0, 256, 16, dtype=torch.uint8).expand(64, 3, 16, 16)
    one, other = dim.random_views(ramp, augment.Random(0), 16, 2).chunk(2)
    rising = [(v.mean(dim=(1, 2)).diff(dim=1).sum(dim=1) > 0) for v in (one, other)]
    assert torch.equal(*rising) and 10 < rising[0].sum() < 54 and not torch.equal(one, other)
    assert dim.random_views(torch.zeros(2, 3, 100, 80, dtype=torch.uint8), augment.Random(0), 128, 2).shape == (
        4, 3, 128, 128)


@pytest.mark.parametrize("size, hue", [(32, 0.2), (64, 0.2), (128, 0.1)])
def test_hue_is_turned_less_in_large_images(size, hue, monkeypatch):
    """AMDIM's own views: of CIFAR-10 at 32 and of STL-10 at 64 pixels by 0.2, of ImageNet at 128 by 0.1."""
    turns, jitter = [], augment.random_color_jitter
    monkeypatch.setattr(augment, "random_color_jitter", lambda rng, n, *strengths, p: (
        turns.append((*strengths, p)), jitter(rng, n, *strengths, p=p))[1])
    dim.random_views(torch.zeros(2, 3, size, size, dtype=torch.uint8), augment.Random(0), size, 2)
    assert turns == [(0.4, 0.4, 0.4, hue, 0.8)] * 2


@pytest.mark.parametrize("flags, named", [
    ("--objective multiscale --image-size 48", "--image-size"), ("--objective multiscale --views 1", "--views"),
    ("--objective multiscale --image-size 96", "--image-size"),
    ("--objective multiscale --critic concat", "--critic"), ("--objective multiscale --arch resnet18", "--arch"),
    ("--objective multiscale --tasks 5-5", "--tasks"), ("--tasks 1-5", "--tasks"),
    ("--alpha 1", "--alpha"), ("--objective global --beta 1", "--beta"),
    ("--depth 4", "--depth"), ("--alpha 0 --beta 0", "--alpha")])
def test_flags_that_cannot_be(flags, named):
    with pytest.raises(Refusal, match=named):
        dim.arguments(flags.split())


def test_weights_of_the_objectives():
    """As in the paper's tables: DIM(L) 0, 1, .1 and DIM(G) 1, 0, 1; a flag goes before them."""
    weights = lambda text: [getattr(dim.arguments(text.split()), name) for name in ("alpha", "beta", "gamma")]
    assert weights("--dataset cifar10") == [0, 1, 0.1] and weights("--objective global") == [1, 0, 1]
    assert weights("--objective both --gamma 0") == [0.5, 1, 0]
