# SPDX-License-Identifier: MIT
"""CMC's colour spaces against published values, its losses against their equations, its banks by value."""
import contextlib
import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cmc
import moco
from common import augment
from common.cli import Refusal
from common.data import Batches, Images, load
from common.evaluation import __main__ as evaluation

CPU = torch.device("cpu")


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def colour(*rgb):
    return torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1)


# ---- views

PUBLISHED = {  # sRGB, D65, 2 degree observer: Bruce Lindbloom's calculator
    (1, 0, 0): (53.2408, 80.0925, 67.2032), (0, 1, 0): (87.7347, -86.1827, 83.1793),
    (0, 0, 1): (32.2970, 79.1875, -107.8602), (1, 1, 0): (97.1393, -21.5537, 94.4780),
    (0, 1, 1): (91.1132, -48.0875, -14.1312), (1, 0, 1): (60.3242, 98.2343, -60.8249),
    (1, 1, 1): (100, 0, 0), (0, 0, 0): (0, 0, 0)}


@pytest.mark.parametrize("rgb, lab", PUBLISHED.items())
def test_lab_is_the_cies(rgb, lab):
    assert cmc.rgb_to_lab(colour(*rgb)).flatten().tolist() == pytest.approx(lab, abs=0.02)


def test_lab_of_greys_and_darks():
    """Greys have no a and b; sRGB 119 of 255 is L 50; the linear foot of both curves joins their powers."""
    grey = cmc.rgb_to_lab(torch.linspace(0, 1, 256).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)).flatten(1)
    assert grey[:, 1:].abs().max() < 0.01 and (grey[1:, 0] > grey[:-1, 0]).all()
    assert grey[119, 0].item() == pytest.approx(50.03, abs=0.05)
    for edge in (0.04045, (216 / 24389) * 12.92):                             # sRGB's and Lab's, both by the value
        grey = torch.tensor([edge - 1e-7, edge + 1e-7], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 3, 1, 1)
        below, above = cmc.rgb_to_lab(grey)[:, 0].flatten()
        assert abs(above - below) < 1e-3


def test_gradients_of_lab_are_finite():
    x = torch.cat([torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1), torch.rand(5, 3, 1, 1)]).requires_grad_()
    cmc.rgb_to_lab(x).sum().backward()
    assert x.grad.isfinite().all()


def test_ycbcr_is_jpegs():
    """Against Pillow, to its rounding."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    theirs = torch.from_numpy(np.array(Image.fromarray(pixels).convert("YCbCr"))).permute(2, 0, 1) / 255
    ours = cmc.rgb_to_ycbcr(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0]
    ours[1:] += 128 / 255
    assert (ours - theirs).abs().max() < 1.1 / 255


@pytest.mark.parametrize("views, channels", cmc.CHANNELS.items())
def test_split_has_the_views_in_full_precision(views, channels):
    x = torch.rand(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        under = cmc.split(x, views)
    parts = cmc.split(x, views)
    assert [part.shape[1] for part in parts] == list(channels)
    assert all(torch.equal(a, b) and a.abs().max() < 2.5 for a, b in zip(under, parts))


def test_split_of_folders():
    x = torch.rand(2, 6, 4, 4)
    a, b = cmc.split(x, "folders")
    assert torch.equal(a, 2 * x[:, :3] - 1) and torch.equal(b, 2 * x[:, 3:] - 1)


def test_views_see_one_crop():
    """All channels of an image are cut and mirrored alike."""
    x = torch.randint(0, 256, (16, 3, 12, 12), dtype=torch.uint8)
    out = cmc.view(torch.cat([x, x], dim=1), augment.Random(0), 8, 0.2, 0.0)
    assert out.shape == (16, 6, 8, 8) and torch.equal(out[:, :3], out[:, 3:])
    assert not torch.equal(out[:, :3], cmc.view(x, augment.Random(1), 8, 0.2, 0.0))


@pytest.mark.parametrize("graph, count, pairs", [
    ("full", 2, {(0, 1), (1, 0)}), ("core", 2, {(0, 1), (1, 0)}), ("core", 3, {(0, 1), (1, 0), (0, 2), (2, 0)}),
    ("full", 3, {(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)})])
def test_pairs(graph, count, pairs):
    assert set(cmc.pairs_of(graph, count)) == pairs and len(cmc.pairs_of(graph, count)) == len(pairs)


# ---- losses


def softmax_oracle(q, k, negatives, tau, own):
    """The softmax over 1 + m candidates, in loops."""
    total = 0.0
    for i in range(len(q)):
        positive = torch.exp(q[i] @ k[i] / tau)
        total = total - torch.log(positive / (positive + sum(
            torch.exp(q[i] @ n / tau) for j, n in enumerate(negatives) if not own[i, j])))
    return total / len(q)


def nce_oracle(q, k, negatives, tau, own, images):
    """Binary classification of the key against the m draws of noise that are not its own, of probability 1 / n each. Z
    is n times the mean over the pairs, and has no gradient."""
    pairs = [(i, j) for i in range(len(q)) for j in range(len(negatives)) if not own[i, j]]
    z, total = images * sum(math.exp(q[i].detach() @ negatives[j].detach() / tau) for i, j in pairs) / len(pairs), 0.0
    for i in range(len(q)):
        m = sum(not own[i, j] for j in range(len(negatives)))
        p = torch.exp(q[i] @ k[i] / tau) / z
        total = total - torch.log(p / (p + m / images))
        for j, negative in enumerate(negatives):
            if not own[i, j]:
                p = torch.exp(q[i] @ negative / tau) / z
                total = total - torch.log(m / images / (p + m / images))
    return total / len(q)


@pytest.mark.parametrize("contrast", ["softmax", "nce"])
@pytest.mark.parametrize("n, m, tau", [(1, 1, 0.5), (5, 7, 0.1), (6, 3, 2.0)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("source", [1, 50])
def test_losses_are_the_equations_with_their_gradients(contrast, n, m, tau, masked, source):
    """Wherever they are drawn from, the number of images cancels in NCE."""
    torch.manual_seed(n)
    given = [unit(n, 4), unit(n, 4), unit(m, 4)]
    own = torch.rand(n, m) < 0.3 if masked else torch.zeros(n, m, dtype=torch.bool)
    ours, true = ([x.clone().to(dtype).requires_grad_() for x in given] for dtype in (torch.float32, torch.float64))
    mask = own if masked else None
    if contrast == "softmax":
        loss, truth = cmc.softmax_contrast(*ours, tau, mask), softmax_oracle(*true, tau, own)
    else:
        loss, truth = cmc.nce(*ours, tau, mask), nce_oracle(*true, tau, own, source)
        assert moco.nce(*given, tau, own).item() == pytest.approx(truth.item(), rel=1e-5)
    loss.backward()
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    for x, y in zip(ours, true):
        assert (x.grad - y.grad).norm() <= 1e-4 * y.grad.norm() + 1e-9


def test_chance_levels():
    """Equal vectors: log(1 + m) for softmax, log(1 + m) + m log(1 + 1/m) for NCE."""
    same, m = F.normalize(torch.ones(4, 8), dim=1), 9
    assert cmc.softmax_contrast(same, same, same[:1].expand(m, 8), 0.07).item() == pytest.approx(math.log(10), rel=1e-5)
    loss = cmc.nce(same, same, same[:1].expand(m, 8), 0.07)
    assert loss.item() == pytest.approx(math.log(10) + 9 * math.log(10 / 9), rel=1e-4)


# ---- model


def new_model(views="lab", images=6, folders=0):
    torch.manual_seed(0)
    return cmc.CMC(cmc.Encoder(views, "resnet18", "cifar", 4, folders), images, dim=5)


@pytest.mark.parametrize("views, folders, channels", [("lab", 0, 3), ("rgb", 0, 3), ("folders", 3, 9)])
def test_encoder_takes_rgb_and_concatenates(views, folders, channels):
    model, x = new_model(views, folders=folders), torch.rand(2, channels, 8, 8)
    h, z = model.eval()(x)
    count = len(model.encoder.nets)
    assert h.shape == (2, 32 * count) == (2, model.encoder.feature_dim) and z.shape == (2, count, 5)
    parts = [net(v.contiguous(memory_format=torch.channels_last))
             for net, v in zip(model.encoder.nets, cmc.split(x, views))]
    assert torch.allclose(model.encoder(x), torch.cat(parts, dim=1)) and torch.allclose(h, model.encoder(x))
    assert torch.allclose(z.norm(dim=2), torch.ones(2, count))


@pytest.mark.parametrize("contrast", ["softmax", "nce"])
@pytest.mark.parametrize("graph", ["full", "core"])
@pytest.mark.parametrize("entries", [6, 0], ids=["memory-bank", "end-to-end"])
def test_model_loss_is_the_sum_over_pairs(contrast, graph, entries):
    """Anchored at view i, the key and the negatives are those of view j's bank, or of the batch's view j."""
    model = new_model("rgb", entries)
    z, index, drawn = unit(2, 3, 5), torch.tensor([4, 1]), torch.tensor([0, 1, 5])
    pairs, own = cmc.pairs_of(graph, 3), torch.tensor([[False, False, False], [False, True, False]])
    own = own if entries else torch.eye(2, dtype=torch.bool)
    total = 0.0
    for i, j in pairs:
        key, negatives = (model.bank[j, index], model.bank[j, drawn]) if entries else (z[:, j], z[:, j])
        parts = z[:, i].double(), key.double(), negatives.double(), 0.3, own
        total += softmax_oracle(*parts) if contrast == "softmax" else nce_oracle(*parts, entries or 2)
    assert model.loss(z, index, drawn, pairs, contrast, 0.3).item() == pytest.approx(total.item(), rel=1e-4)


def test_gradients_reach_the_keys_end_to_end_alone():
    """A core pair anchored at view 0: the bank's keys take no gradient, the batch's do."""
    for images in (6, 0):
        z = unit(2, 2, 5).requires_grad_()
        index = torch.tensor([4, 1])
        new_model("lab", images).loss(z, index, torch.tensor([0, 5]), [(0, 1)], "softmax", 0.3).backward()
        assert z.grad[:, 0].any() and bool(z.grad[:, 1].any()) == (images == 0)


def test_bank_update_by_value_and_in_the_checkpoint():
    model, index, z = new_model(), torch.tensor([4, 1]), unit(2, 2, 5)
    before = model.bank.clone()
    assert torch.allclose(before.norm(dim=2), torch.ones(2, 6))
    model.remember(z, index, 0.5)
    for view in range(2):
        for row in range(6):
            mean = before[view, row]
            if row in (4, 1):
                mean = (mean + z[[4, 1].index(row), view]) / 2
            assert torch.allclose(model.bank[view, row], mean / mean.norm(), atol=1e-6)
    assert "bank" in model.state_dict()


# ---- a user's own views


@pytest.fixture
def aligned(tmp_path):
    """Two folders of the same names, the second as the first's negative."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 8), ("test", 3)):
        for name in ("cat", "dog"):
            for root in ("colour", "depth"):
                (tmp_path / root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "colour" / part / name / f"{i}.png")
                Image.fromarray(255 - pixels).save(tmp_path / "depth" / part / name / f"{i}.bmp")
    return [str(tmp_path / "colour"), str(tmp_path / "depth")]


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_aligned_folders_are_stacked(aligned, cache_gb):
    data = load("folder", aligned, 8, CPU, 0, cache_gb)
    x = data.train.at(torch.arange(16))
    assert x.shape == (16, 6, 8, 8) and torch.equal(x[:, 3:], 255 - x[:, :3])
    assert torch.equal(x[:, :3], load("folder", aligned[0], 8, CPU, 0, 1.0).train.at(torch.arange(16)))
    assert (data.train.pixels is None) == (cache_gb == 0)


def test_a_memory_limit_counts_all_folders(aligned):
    """22 images of two times 192 bytes fit into 8,448 bytes and not into fewer."""
    assert load("folder", aligned, 8, CPU, 0, 8448e-9).train.pixels is not None
    assert load("folder", aligned, 8, CPU, 0, 8447e-9).train.pixels is None


def test_views_dir_trains(aligned, tmp_path):
    flags = "--image-size 8 --width 4 --batch-size 8 --epochs 1 --workers 0 --device cpu --amp off --stem cifar"
    out = tmp_path / "run"
    result = cmc.main([*flags.split(), "--out", str(out), "--views-dir", *aligned])
    assert 0 <= result["linear"]["trained"] <= 1
    encoder = cmc.Encoder("folders", "resnet18", "cifar", 4, 2)
    encoder.load_state_dict(torch.load(out / "encoder.pt", weights_only=True))
    with Image.open(out / "views.png") as picture:
        assert picture.size == (8 * 66 + 2, 4 * 66 + 2)                       # two rows of 8 images, for each view
    evaluation.main([str(out), "--map", "--workers", "0"])
    assert (out / "map.png").exists()                                         # without the suffix of other images
    (tmp_path / "colour").rename(tmp_path / "moved")                          # where they are may change
    again = cmc.main(["--resume", str(out), "--views-dir", str(tmp_path / "moved"), aligned[1]])
    assert again["linear"] == result["linear"]


@pytest.mark.parametrize("root", [0, 1])
@pytest.mark.parametrize("damage", ["gone", "more", "broken", "twice"])
def test_views_dir_refuses(aligned, tmp_path, root, damage):
    """A name in one folder alone, whichever it is, or twice in one, or an unreadable image: the sentence names it."""
    suffix = ("png", "bmp")[root]
    file = tmp_path / ("colour", "depth")[root] / "train" / "dog" / f"5.{suffix}"
    if damage == "gone":
        file.unlink()
    elif damage == "more":
        file.rename(file.with_name(f"extra.{suffix}"))
    elif damage == "twice":
        shutil.copy(file, file.with_suffix(".jpg"))
    else:
        file.write_bytes(b"none")
    with pytest.raises(Refusal, match=r"dog/5" if damage != "more" else r"dog/(5|extra)"):
        load("folder", aligned, 8, CPU, 0, 1.0)


@pytest.mark.parametrize("flags, named", [
    (["--views-dir", "only"], "--views-dir"), (["--views-dir", "a", "b", "--dataset", "shapes"], "--views-dir"),
    (["--views-dir", "a", "b", "--jitter", "1"], "--jitter"), (["--views-dir", "nowhere", "b"], "nowhere"),
    (["--views-dir", "a", "b", "--data-dir", "c"], "--data-dir has no effect with --views-dir"),
    (["--views-dir=a"], "--views-dir needs at least two folders")])
def test_views_dir_flags(tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=named):
        cmc.main(flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("contrast", ["nce", "softmax"])
@pytest.mark.parametrize("entries", [400, 0], ids=["memory-bank", "end-to-end"])
def test_the_first_loss_is_near_chance(contrast, entries):
    """With the banks as training begins, even where untrained vectors are all alike."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (400, 3, 16, 16), dtype=torch.uint8)
    images, tau, m = Images(pixels, None, CPU, 0, True), 0.1, 100 if entries else 63
    model = cmc.CMC(cmc.Encoder("lab", "resnet18", "cifar", 4), entries)
    view = functools.partial(cmc.view, size=16, crop_min=0.5, jitter=0.0)
    if entries:
        before = model.bank.clone()
        cmc.fill_banks(model, Batches(images, 64, 0), augment.Random(0), view, contextlib.nullcontext())
        assert (model.bank != before).any(dim=2).all()                        # those of a last, unfilled batch, too
    z, index = model(view(pixels[:64], augment.Random(1)))[1].detach(), torch.arange(64)
    assert (z[:, 0] @ z[:, 0].T).mean() > 0.7                                 # alike
    loss = model.loss(z, index, torch.arange(300, 300 + m), cmc.pairs_of("full", 2), contrast, tau).item()
    chance = 2 * (math.log(1 + m) + (m * math.log1p(1 / m) if contrast == "nce" else 0))
    assert loss == pytest.approx(chance, rel=0.3)


def test_steps_of_the_rate():
    """A tenth at epochs 120, 160 and 200 of 240, the default but of short recipes; warm-up goes with the cosine."""
    factors = [cmc.step_decay(epoch, 240) for epoch in (0, 119, 120, 159, 160, 199, 200, 239)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    flags = {"steps": ["--dataset", "cifar10"], "cosine": ["--dataset", "cifar10", "--small"]}
    assert all(cmc.arguments(words).schedule == schedule for schedule, words in flags.items())
    with pytest.raises(Refusal, match="--warmup has no effect with --schedule steps"):
        cmc.arguments(["--dataset", "cifar10", "--warmup", "0.1"])


def test_the_rate_falls_in_steps(tiny, here):
    cmc.main(tiny("cmc", "--schedule", "steps", "--epochs", 6, "--knn-every", 6, "--out", "run"))
    rates = [json.loads(line)["lr"] for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [rate / rates[0] for rate in rates] == pytest.approx([1, 1, 1, 0.1, 0.01, 0.001])


@pytest.mark.parametrize("contrast, each", [("softmax", math.log(40)), ("nce", math.log(40) + 39 * math.log(40 / 39))])
def test_chance_level_of_the_whole_bank(contrast, each, tiny, tmp_path, capsys):
    """Of 40 images, all but the anchor's own are negatives; two pairs of views."""
    flags = ["--dictionary", "memory-bank", "--negatives", 0, "--contrast", contrast, "--out", tmp_path / "run"]
    cmc.main(tiny("cmc", *flags))
    assert f"(chance {2 * each:.3f})" in capsys.readouterr().out
