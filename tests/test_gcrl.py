# SPDX-License-Identifier: MIT
"""GCRL's likelihood: normalised, causal, with a full receptive field; its sampling and its palette."""
import itertools
import math

import pytest
import torch
from PIL import Image

import gcrl
from common import augment
from common.cli import Refusal
from common.transformer import Recompute
from gcrl import GCRL


def small(num_colours=3, size=4, seed=0, **kwargs):
    """A model with weights large enough that every dependence shows in the output."""
    torch.manual_seed(seed)
    model = GCRL(num_colours, size, width=8, encoder_layers=1, decoder_layers=1, heads=2, **kwargs).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def test_likelihood_is_normalised_exactly():
    """For each first pixel the probabilities of all completions of a 3 x 3 image of 2 colours sum to 1."""
    model = small(num_colours=2, size=3)
    images = torch.tensor(list(itertools.product(range(2), repeat=9))).view(-1, 3, 3)
    with torch.no_grad():
        p = model.log_prob(images).double().exp()
    for first in range(2):
        assert p[images[:, 0, 0] == first].sum().item() == pytest.approx(1, abs=1e-5)


def test_log_prob_is_the_sum_over_all_tokens_but_the_first():
    """L_g's inner sum, k = 2..D, in loops."""
    model, tokens = small(), torch.randint(0, 3, (2, 4, 4))
    with torch.no_grad():
        logits, log_prob = model.logits(tokens), model.log_prob(tokens)
    assert logits.shape == (2, 4, 4, 3) and log_prob.shape == (2,)
    for i in range(2):
        total = 0.0
        for k in range(1, 16):
            row = logits[i, k // 4, k % 4].double()
            total += (row[tokens[i, k // 4, k % 4]] - row.exp().sum().log()).item()
        assert log_prob[i].item() == pytest.approx(total, rel=1e-5)


def test_each_logit_sees_every_earlier_pixel_and_no_later_one():
    """By the gradient with respect to each pixel's embedding, position by position."""
    model, tokens = small(), torch.randint(0, 3, (1, 4, 4))
    embedded = []
    model.embedding.register_forward_hook(lambda module, given, out: embedded.append(out.requires_grad_()) or out)
    logits = model.logits(tokens)
    for k in range(16):
        model.zero_grad()
        target = logits[0, k // 4, k % 4].square().sum()
        parts = torch.autograd.grad(target, embedded, retain_graph=True, allow_unused=True)
        seen = sum(g.abs().sum(dim=-1).flatten() for g in parts if g is not None)              # (16,)
        assert (seen[k:] == 0).all(), f"position {k} sees itself or later"
        assert (seen[:k] > 0).all(), f"position {k} misses an earlier one"


def test_changing_a_pixel_changes_only_later_logits():
    model, tokens = small(), torch.randint(0, 3, (1, 4, 4))
    with torch.no_grad():
        before = model.logits(tokens).flatten(1, 2)
        for k in range(16):
            changed = tokens.clone()
            changed[0, k // 4, k % 4] = (tokens[0, k // 4, k % 4] + 1) % 3
            after = model.logits(changed).flatten(1, 2)
            moved = (after - before).abs().amax(dim=(0, 2)) > 0
            assert not moved[: k + 1].any() and moved[k + 1 :].all()


def test_the_feature_is_the_mean_of_the_encoder_and_reads_every_pixel():
    model, tokens = small(), torch.randint(0, 3, (1, 4, 4))
    with torch.no_grad():
        h = model.encode(tokens)
        assert h.shape == (1, 8)
        for k in range(16):
            changed = tokens.clone()
            changed[0, k // 4, k % 4] = (tokens[0, k // 4, k % 4] + 1) % 3
            assert (model.encode(changed) - h).abs().max() > 1e-4


@torch.no_grad()
def stepwise_logits(model, tokens, monkeypatch):
    """The logits that sampling computes while it is made to draw the given tokens."""
    seen, order = [], iter([(r, w) for r in range(tokens.shape[1]) for w in range(tokens.shape[2])])

    def forced(p, n, generator=None):
        r, w = next(order)
        return tokens[:, r, w][:, None]
    model.to_logits.register_forward_hook(lambda module, given, out: seen.append(out))
    monkeypatch.setattr(torch, "multinomial", forced)
    drawn = model.sample(len(tokens))
    monkeypatch.undo()
    assert torch.equal(drawn, tokens)
    return torch.stack(seen, dim=1).unflatten(1, tokens.shape[1:])


def test_cached_sampling_computes_the_full_forwards_logits(monkeypatch):
    model = GCRL(5, 6, width=16, encoder_layers=2, decoder_layers=2, heads=4).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = torch.randint(0, 5, (3, 6, 6))
    full = model.logits(tokens).detach()
    assert torch.allclose(stepwise_logits(model, tokens, monkeypatch), full, atol=1e-4)


def test_sampling_draws_from_the_model():
    """Frequencies of all 2 x 2 images of 2 colours against their exact probabilities."""
    model = small(num_colours=2, size=2)
    images = torch.tensor(list(itertools.product(range(2), repeat=4))).view(-1, 2, 2)
    model.first_pixel.copy_(torch.tensor([1.0, 3.0]))
    with torch.no_grad():
        p = model.log_prob(images).exp() * torch.tensor([0.25, 0.75])[images[:, 0, 0]]
    n = 20_000
    drawn = model.sample(n, generator=torch.Generator().manual_seed(0)).flatten(1)
    counts = torch.bincount((drawn * torch.tensor([8, 4, 2, 1])).sum(dim=1), minlength=16)
    assert ((counts - n * p).abs() < 5 * (n * p * (1 - p)).sqrt() + 1).all()


def test_sampling_keeps_what_is_given_and_honours_top_k_and_temperature():
    model = small(num_colours=5, size=4)
    given = torch.randint(0, 5, (6, 4, 4))
    completed = model.sample(6, given=given, rows=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(completed[:, :2], given[:, :2]) and not torch.equal(completed[:, 2:], given[:, 2:])
    greedy, cold = (model.sample(6, given=given, rows=1, generator=torch.Generator().manual_seed(1), **kwargs)
                    for kwargs in (dict(top_k=1), dict(temperature=1e-4)))
    with torch.no_grad():
        best = model.logits(greedy).argmax(dim=-1)
    assert torch.equal(greedy[:, 1:], best[:, 1:]) and torch.equal(cold, greedy)
    again = [model.sample(4, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*again)


def test_images_of_one_colour_are_refused(tiny, here, tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / part / name / f"{i}.png")
    with pytest.raises(Refusal, match="one colour"):
        gcrl.main(tiny("gcrl", "--data-dir", tmp_path))


def test_palette_finds_the_colours_and_round_trips():
    """Images of three colours and no others are represented exactly, whatever more is asked for."""
    colours = torch.tensor([[255, 0, 0], [10, 200, 30], [0, 0, 90]], dtype=torch.uint8)
    images = colours[torch.randint(0, 3, (5, 8, 8), generator=torch.Generator().manual_seed(0))].permute(0, 3, 1, 2)
    palette = gcrl.fit_palette(images, 16)
    assert palette.shape == (3, 3)
    tokens = gcrl.quantise(images, palette)
    assert tokens.shape == (5, 8, 8) and tokens.dtype == torch.int64
    assert torch.allclose(gcrl.dequantise(tokens, palette), images / 255, atol=1e-6)


def test_quantise_takes_the_nearest_colour_and_kmeans_is_at_a_fixed_point():
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    palette = gcrl.fit_palette(x, 7, iterations=200)
    tokens = gcrl.quantise(x, palette)
    pixels = x.permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.equal(tokens.flatten(), torch.cdist(pixels, palette).argmin(dim=1))
    means = torch.stack([pixels[tokens.flatten() == v].mean(dim=0) for v in range(7)])
    assert torch.allclose(means, palette, atol=1e-5)
    assert torch.equal(palette, gcrl.fit_palette(x, 7, iterations=200))


def test_one_forward_gives_what_the_parts_give():
    """The training step's outputs equal log_prob and encode; without contrast x2 is not needed."""
    model, x1, x2 = small(), torch.randint(0, 3, (4, 4, 4)), torch.randint(0, 3, (4, 4, 4))
    log_p, z1, z2, h = model(x1, x2, True, True)
    assert torch.allclose(log_p, model.log_prob(x1), atol=1e-4)
    assert torch.allclose(h, torch.cat([model.encode(x1), model.encode(x2)]), atol=1e-5)
    assert torch.allclose(torch.cat([z1, z2]), model.head(h), atol=1e-5)
    log_p, z1, z2, h = model(x1, None, True, False)
    assert z1 is None and h.shape == (4, 8) and torch.allclose(log_p, model.log_prob(x1), atol=1e-4)
    assert model(x1, x2, False, True)[0] is None


@pytest.mark.parametrize("flags, device, world, micro_batch, recompute", [
    ("--dataset cifar10", "cpu", 1, 3, True), ("--dataset cifar10", "cuda", 1, 16, True),
    ("--dataset cifar10", "mps", 1, 8, True), ("--dataset cifar10 --batch-size 20", "cuda", 1, 10, True),
    ("--dataset cifar10 --batch-size 40", "cuda", 2, 10, True),
    ("--dataset cifar10", "cuda", 16, 16, False), ("--dataset cifar10 --width 8192", "cpu", 1, 1, True),
    ("--dataset cifar10 --small", "cpu", 1, 32, False), ("--dataset cifar10 --small", "cuda", 1, 128, False),
    ("--dataset cifar10 --small", "cuda", 4, 32, False),
    ("--dataset cifar10 --small --batch-size 300", "cpu", 3, 34, False),
    ("--dataset cifar10 --small --colours 4096", "cpu", 1, 7, False), ("", "cpu", 1, 32, False),
    ("--dataset cifar10 --micro-batch 100", "cpu", 1, 100, True),
    ("--dataset cifar10 --small --micro-batch 64", "cpu", 1, 64, True),
    ("--dataset cifar10 --small --width 6 --batch-size 4096", "cuda", 1, 1024, False)])
def test_default_micro_batch(flags, device, world, micro_batch, recompute, monkeypatch):
    """As many images as take about 2 GB, or half of a GPU's free memory, here of 8 GiB, in even parts of a process's
    share; all where all do, one at least; never more rows of both views than CUDA's attention takes, 2^16 - 1; and on
    the CPU so few that no tensor, the largest being an MLP's or the logits in float32, has 32 MiB, from which on glibc
    returns it to the system. It is no setting of the run, which may be resumed on another device, but what was typed is
    one. Activations are computed again where the share would take more than that memory, or where a number was typed.
    """
    class Seen(Exception):
        pass

    def run(script, settings, *_, micro_batch, recompute, **__):
        raise Seen(micro_batch, settings["micro_batch"], recompute)
    monkeypatch.setattr(gcrl, "Run", run)
    monkeypatch.setattr(gcrl.cli, "pick_device", lambda name: torch.device(device))
    monkeypatch.setattr(gcrl.cli, "pick_amp", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**36))
    monkeypatch.setattr(gcrl.distributed, "start", lambda device: (0, world))
    with pytest.raises(Seen) as seen:
        gcrl.main(flags.split())
    assert seen.value.args == (micro_batch, micro_batch if "--micro-batch" in flags else None, recompute)


@pytest.mark.parametrize("flags, expected", [([], (8, False)), (["--micro-batch", 3], (3, True))])
def test_training_takes_the_parts_it_says(flags, expected, tiny, tmp_path, monkeypatch, capsys):
    """The batch of a tiny run is one part, unless another number is typed."""
    seen, forward = set(), GCRL.forward
    monkeypatch.setattr(GCRL, "forward", lambda self, *args: seen.add(args[4:]) or forward(self, *args))
    gcrl.main([*tiny("gcrl", "--out", tmp_path / "run"), "--batch-size", 8, *flags])
    assert seen == {expected}
    printed = " ".join(capsys.readouterr().out.split())
    assert f", micro-batch {expected[0]}, " in printed and f", recompute {expected[1]} " in printed


def test_initial_weights_have_the_wanted_deviation():
    """Of all matrices; the last ones of a residual branch are smaller, by the root of twice the number of blocks."""
    for std in (0.02, 0.07):
        model = GCRL(64, 4, width=64, encoder_layers=1, decoder_layers=1, heads=2, init_std=std)
        for name, p in model.named_parameters():
            if p.dim() == 2:
                wanted = std / math.sqrt(2 * 3) if name.endswith(("out.weight", "mlp.2.weight")) else std
                assert p.std().item() == pytest.approx(wanted, rel=0.05), name


def test_weak_view_flips_and_shifts_by_whole_pixels():
    """--shift 0 leaves the image or its mirror image; the inside of others is one of these, moved both ways."""
    x = torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8)
    for shift, reach in ((0.0, 0), (0.125, 1), (0.25, 2)):
        views, found = gcrl.weak_view(x, augment.Random(0), shift), set()
        for view, image in zip(views, x / 255):
            ways = [(flip, down, right) for flip in (False, True) for down in range(-reach, reach + 1)
                    for right in range(-reach, reach + 1)
                    if torch.allclose(view[:, 2:6, 2:6], (image.flip(2) if flip else image)
                                      [:, 2 - down : 6 - down, 2 - right : 6 - right], atol=1e-5)]
            assert len(ways) == 1
            found.add(ways[0])
        assert len(found) == 2 * (2 * reach + 1) ** 2


def test_near_colours_begin_with_near_embeddings():
    """set_palette adds a linear map of the colours, which a model of one seed repeats; one colour alone is no harm."""
    palette = torch.tensor([[0.1, 0.1, 0.1], [0.12, 0.1, 0.1], [0.9, 0.2, 0.8], [0.2, 0.9, 0.3]])

    def embeddings(palette):
        torch.manual_seed(0)
        model = GCRL(len(palette), 4, width=64, encoder_layers=1, decoder_layers=1, heads=2)
        before = model.embedding.weight.detach().clone()
        model.set_palette(palette, torch.ones(len(palette)))
        assert torch.equal(model.palette, palette)
        return model.embedding.weight.detach(), before
    weight, before = embeddings(palette)
    added, colour = weight - before, palette - palette.mean(dim=0)
    fitted = colour @ torch.linalg.lstsq(colour, added).solution
    assert torch.allclose(fitted, added, atol=1e-5)
    assert (weight[0] - weight[1]).norm() < (weight[0] - weight[2]).norm() / 3
    assert torch.equal(weight, embeddings(palette)[0])
    assert torch.isfinite(embeddings(palette[:1])[0]).all()


def test_palette_is_as_good_as_more_iterations_make_it():
    """The root mean square error of 64 colours on smooth images, beside five times the iterations and other draws."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(12, 3, 4, 4, generator=generator), size=32, mode="bilinear")

    def error(**kwargs):
        palette = gcrl.fit_palette(x, 64, **kwargs)
        return (gcrl.dequantise(gcrl.quantise(x, palette), palette) - x).square().mean().sqrt().item()
    best = min(error(seed=seed, iterations=200) for seed in range(3))
    assert error() < 1.02 * best < 1.02 * error(iterations=1)


def gradients(model, outputs, alpha=1.0, beta=1.0, tau=0.2):
    log_p, z1, z2, _ = outputs
    loss = (-alpha * log_p.mean() if alpha else 0) + (beta * gcrl.nt_xent(z1, z2, tau) if beta else 0)
    model.zero_grad()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("alpha, beta", [(1, 1), (1, 0), (0, 1)])
@pytest.mark.parametrize("amp", [False, True])
def test_micro_batches_change_neither_loss_nor_gradients(alpha, beta, amp):
    """Bit for bit where one holds all images; to the rounding of other sums where they are parts, even uneven ones."""
    torch.manual_seed(0)
    model = GCRL(5, 6, width=16, encoder_layers=2, decoder_layers=1, heads=2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x1, x2 = torch.randint(0, 5, (2, 7, 6, 6))

    def at(*parts):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            outputs = model(x1, x2 if beta else None, alpha > 0, beta > 0, *parts)
        return gradients(model, outputs, alpha, beta)
    loss, whole = at()
    for recompute in (False, True):
        assert at(7, recompute)[0] == loss and torch.equal(at(7, recompute)[1], whole)
        for micro_batch in (1, 3, 4):
            loss_in_parts, parts = at(micro_batch, recompute)
            assert loss_in_parts == pytest.approx(loss, rel=1e-2 if amp else 1e-5)
            assert (parts - whole).norm() <= (0.1 if amp else 1e-4) * whole.norm()


def graph(*outputs):
    """How many operations autograd has recorded for the outputs."""
    seen, nodes = set(), [y.grad_fn for y in outputs]
    while nodes:
        if (node := nodes.pop()) is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return len(seen)


def test_memory_is_that_of_one_micro_batch():
    """The forward pass keeps neither the activations of a part nor its graph, whose pieces would lie between the freed
    activations; the backward pass has those of one part at a time."""
    model, x = GCRL(5, 8, width=16, encoder_layers=1, decoder_layers=1, heads=2), torch.randint(0, 5, (16, 8, 8))

    def kept(*parts):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.setdefault(t.untyped_storage().data_ptr(), (t, t.untyped_storage().nbytes()))[0],
                lambda t: t):
            outputs = model(x, x, True, True, *parts)
        return sum(size for _, size in sizes.values()), graph(*outputs)
    weights = len(list(model.parameters()))
    (bytes_kept, operations), (all_bytes, all_operations) = kept(2, True), kept()
    assert bytes_kept < all_bytes / 50
    assert operations <= weights + 8 + 4 and all_operations > weights + 50    # a part is one; four concatenations

    alive, most, computed = 0, 0, model.outputs

    def outputs(*args):
        nonlocal alive, most
        if torch._C._current_graph_task_id() != -1:                           # again, within the backward pass
            alive, most = alive + 1, max(most, len(args[0]))
        return computed(*args)
    model.outputs = outputs
    gradients(model, model(x, x, True, True, 2, True))
    assert alive == 8 and most == 2


def test_recompute_is_the_function_under_autocast_or_not():
    """Values and gradients, of the parameters alone; outputs that are None or do not reach the loss are no harm."""
    torch.manual_seed(0)
    weight, other, x = torch.randn(4, 4, requires_grad=True), torch.randn(4, requires_grad=True), torch.randn(3, 4)

    def function(x, power):
        y = x @ weight
        return y**power, None, y + other, y.sum() * 2
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            again, plain = Recompute.apply(function, (x, 3), weight, other), function(x, 3)
            assert again[1] is None and again[0].dtype == (torch.bfloat16 if amp else torch.float32)
            for outputs in ((0, 2), (2,)):                                    # within autocast, too
                wanted, found = (torch.autograd.grad(sum(y[i].float().square().sum() for i in outputs), (weight, other),
                                                     retain_graph=True) for y in (plain, again))
                assert all(torch.equal(a, b) for a, b in zip(wanted, found))
        wanted, found = (torch.autograd.grad(y[0].float().sum(), weight)[0] for y in (plain, again))
        assert torch.equal(wanted, found)                                     # outside, as a training loop does


def test_an_untrained_model_is_near_uniform():
    torch.manual_seed(0)
    model, tokens = GCRL(32, 8, width=16, encoder_layers=1, decoder_layers=1, heads=2), torch.randint(0, 32, (8, 8, 8))
    assert -model.log_prob(tokens).mean().item() / 63 == pytest.approx(math.log(32), rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_the_cpu():
    model, tokens = small(), torch.randint(0, 3, (2, 4, 4))
    on_cpu = model.logits(tokens).detach()
    assert torch.allclose(model.cuda().logits(tokens.cuda()).cpu(), on_cpu, atol=1e-3)
