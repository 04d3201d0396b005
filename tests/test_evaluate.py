# SPDX-License-Identifier: MIT
"""Judging a finished run: labels, fine-tuning, strange images, and torchvision's detectors on its encoder."""
import copy
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import gcrl
from common import cli, resnet
from common.cli import Refusal
from common.data import Images, load
from common.evaluation import __main__ as evaluate
from common.evaluation import out_of_distribution as ood
from common.evaluation import few_labels, runs
from common.evaluation.few_labels import balanced, finetune, freeze

CPU = torch.device("cpu")
OFF = torch.autocast("cpu", enabled=False)


# ---- labels


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_draws_are_balanced_and_reproducible(fraction):
    """The share of each class, at least one image of it; the same seed the same, another seed another draw."""
    labels = torch.tensor([0] * 40 + [1] * 100 + [2] * 7)[torch.randperm(147)]
    index = balanced(labels, fraction, 0)
    assert torch.equal(index, index.unique()) and torch.equal(index, balanced(labels, fraction, 0))
    assert torch.bincount(labels[index]).tolist() == [max(1, round(fraction * n)) for n in (40, 100, 7)]
    assert fraction == 1 or not torch.equal(index, balanced(labels, fraction, 1))


# ---- telling strange images: hand-worked


CASES = [  # inside, outside, AUROC, AUPR, FPR at 0.95 (or the given) TPR
    ([1, 2, 3], [4, 5], 1.0, 1.0, 0.0),
    ([4, 5], [1, 2, 3], 0.0, (1 / 3 + 2 / 4 + 3 / 5) / 3, 1.0),
    ([1, 1, 1], [1, 1], 0.5, 0.4, 1.0),                                       # one threshold: precision 2 / 5
    ([1, 2, 2, 3], [2, 4], 0.75, 0.5 + 0.5 * 2 / 5, 0.75),                    # 2 ties with half of the inside
    ([0, 1, 2, 3], [3, 3, 1, 5], (3.5 + 3.5 + 1.5 + 4) / 16, 0.25 + 0.5 * 3 / 4 + 0.25 * 4 / 7, 0.75)]


@pytest.mark.parametrize("inside, outside, auroc, aupr, fpr", CASES)
def test_detection_by_hand(inside, outside, auroc, aupr, fpr):
    inside, outside = torch.tensor(inside).float(), torch.tensor(outside).float()
    assert ood.auroc(inside, outside) == pytest.approx(auroc)
    assert ood.aupr(inside, outside) == pytest.approx(aupr)
    assert ood.fpr(inside, outside) == pytest.approx(fpr)


def test_detection_by_loops():
    """On random scores with ties, against the definitions in loops."""
    rng = np.random.default_rng(0)
    inside, outside = rng.integers(0, 12, 60).astype(float), rng.integers(3, 15, 40).astype(float)
    pairs = [(o > i) + 0.5 * (o == i) for o in outside for i in inside]
    precision, previous = 0.0, 0.0
    for threshold in sorted({*inside, *outside}, reverse=True):
        caught, wrong = sum(outside >= threshold), sum(inside >= threshold)
        precision += caught / (caught + wrong) * (caught / 40 - previous)
        previous = caught / 40
    rates = [(sum(outside >= t) / 40, sum(inside >= t) / 60) for t in {*inside, *outside}]
    a, b = torch.tensor(inside), torch.tensor(outside)
    assert ood.auroc(a, b) == pytest.approx(np.mean(pairs)) and ood.aupr(a, b) == pytest.approx(precision)
    for tpr in (0.5, 0.8, 0.95, 1.0):
        assert ood.fpr(a, b, tpr) == pytest.approx(min(wrong for caught, wrong in rates if caught >= tpr))


@pytest.mark.parametrize("labelled", [False, True])
def test_mahalanobis_is_numpys(labelled):
    rng = np.random.default_rng(0)
    train, x, y = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(30, 5)), rng.integers(0, 3, 200)
    y = y if labelled else np.zeros(200, int)
    means = np.stack([train[y == c].mean(0) for c in np.unique(y)])
    centred = train - means[y]
    inverse = np.linalg.inv(centred.T @ centred / 200)
    true = [min((v - m) @ inverse @ (v - m) for m in means) for v in x]
    ours = ood.mahalanobis(torch.tensor(train), torch.tensor(x), torch.tensor(y) if labelled else None)
    assert np.allclose(ours.numpy(), true, rtol=1e-8)


def test_mahalanobis_of_fewer_images_than_dimensions():
    """Finite, and what leaves the span of the training features is far."""
    train = torch.zeros(6, 20)
    train[:, :4] = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    near, far = train.mean(0)[None].clone(), train.mean(0)[None].clone()
    far[:, 10] += 1
    assert ood.mahalanobis(train, near).item() < 1e-6 < 1e3 < ood.mahalanobis(train, far).item() < math.inf


def test_knn_distance_is_the_loops():
    torch.manual_seed(0)
    train, x = torch.randn(30, 4), torch.randn(7, 4)
    for k in (1, 5, 50):
        true = [sorted((a / a.norm() - b / b.norm()).norm().item() for b in train)[min(k, 30) - 1] for a in x]
        assert ood.knn_distance(train, x, k).tolist() == pytest.approx(true, abs=1e-3)


def test_uncertainty_and_complexity():
    assert ood.uncertainty(torch.tensor([[0.0, 0.0], [0.0, 100.0]])).tolist() == pytest.approx([0.5, 0.0])
    flat, grey, noise = torch.zeros(16, 16).long(), torch.randint(2, (16, 16)), torch.randint(512, (16, 16))
    bits = ood.complexity(torch.stack([flat, grey, noise]))
    assert bits[0] < 200 and 256 < bits[1] < 800 and 9 * 256 < bits[2] < 12 * 256             # at least the entropy


# ---- fine-tuning


def striped(n, seed):
    """Images of horizontal or vertical stripes: labels a linear classifier on random features hardly finds."""
    generator = torch.Generator().manual_seed(seed)
    labels, phase = torch.arange(n) % 2, torch.randint(4, (n,), generator=generator)
    wave = ((torch.arange(8) + phase[:, None]) // 2 % 2 * 200).float()[:, None, None]         # (n, 1, 1, 8)
    x = torch.where(labels[:, None, None, None] == 1, wave, wave.transpose(2, 3)).expand(n, 3, 8, 8)
    return Images((x + 55 * torch.rand(n, 3, 8, 8, generator=generator)).byte(), labels, CPU, 0, True)


@pytest.mark.parametrize("frozen", [0, 2, 5])
def test_frozen_stages_stay_bitwise(frozen):
    """Parameters and batch statistics of the first stages; all others move, and the global random numbers do not."""
    torch.manual_seed(0)
    module = resnet.resnet18("cifar", 4)
    before, expected = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
    finetune(module, striped(40, 0), torch.arange(40), striped(20, 1), frozen, steps=3, batch_size=8)
    assert torch.equal(expected, torch.random.get_rng_state())
    still = {name for name, value in module.state_dict().items() if torch.equal(value, before[name])}
    names = [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]
    frozen_names = {name for name in before if name.split(".")[0] in sum(names[:frozen], [])}
    assert still == frozen_names


@pytest.mark.parametrize("n, share, epochs, steps", [
    (40, 1.0, None, [200, 400]), (40, 1.0, 8, [5, 10]), (6400, 1.0, None, [3000, 6000]),
    (64_000, 0.01, None, [600, 1200]), (6400, 0.01, None, [200, 400])])
def test_steps_of_finetuning(n, share, epochs, steps, monkeypatch):
    """60 passes with 1 % of the labels, 30 with all, but 200 steps at least, in fewer of which nothing is learnt."""
    seen = []
    monkeypatch.setattr(few_labels, "finetune", lambda *args, seed: seen.append(args[-1]) or 0.5)
    images = SimpleNamespace(labelled=SimpleNamespace(labels=torch.arange(n) % 2), test=None)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    few_labels.compare_finetuning(images, module, module, [share], 1, [0], epochs, None)
    assert seen == steps


def test_finetuning_learns():
    torch.manual_seed(0)
    train, test = striped(100, 0), striped(60, 1)
    assert finetune(resnet.resnet18("cifar", 4), train, torch.arange(100), test, 0, steps=60, batch_size=20) > 0.9


def test_stages_hold_every_weight(finished, script):
    """The stages of each script's encoder are a partition of its weights (DIM's Y, which is not probed, left out)."""
    args, module = runs.load_encoder(finished(script).folder, CPU)
    parts = [p for stage in module.stages() for part in stage
             for p in ([part] if torch.is_tensor(part) else part.parameters())]
    assert len({id(p) for p in parts}) == len(parts)
    left = {name for name, p in module.named_parameters() if id(p) not in {id(q) for q in parts}}
    assert left == ({"y.weight", "y.bias"} if script.__name__ == "dim" else set())
    freeze(module, 1)
    assert not any(p.requires_grad for p in module.parameters() if id(p) in {
        id(p) for part in module.stages()[0] for p in ([part] if torch.is_tensor(part) else part.parameters())})


# ---- the command


@pytest.fixture
def run(script, finished, here):
    """A copy of a finished run of each script."""
    shutil.copytree(finished(script).folder, here / "run")
    return here / "run"


def judge(run, *flags):
    return evaluate.main([run, "--device", "cpu", "--amp", "off", "--workers", 0, *flags])


def test_judges_any_run_as_its_script_did(run, script, finished, capsys):
    """Linear probe and kNN are those of result.json, for the trained and the untrained encoder."""
    result = judge(run)
    for measure in ("linear", "knn"):
        for row in ("pixels", "untrained", "trained"):
            assert result[measure][row] == finished(script).metrics[measure][row], (measure, row)
    assert json.loads((run / "evaluation.json").read_text())["folder"] == result
    assert "whitened pixels" in capsys.readouterr().out


def test_precision_is_the_runs(finished, here):
    """Without --amp, whatever the machine would take; and args.json says what the run was trained in."""
    shutil.copytree(finished("simclr").folder, here / "run")
    result = evaluate.main([here / "run", "--device", "cpu", "--workers", 0])
    for measure in ("linear", "knn"):
        assert result[measure].items() <= finished("simclr").metrics[measure].items()
    assert json.loads((here / "run" / "args.json").read_text())["precision"] == "torch.float32"


def test_judges_labels_finetuning_and_strangers(run, script, images, capsys):
    """All of it at once, added to what was there; the folder's own images are not strange, AUROC one half."""
    judge(run)
    result = judge(run, "--labels", 0.1, 0.5, "--draws", 2, "--finetune", "--epochs", 1, "--frozen-stages", 1,
                   "--ood", "patterns", images / "test")
    assert {"linear", "labels", "finetune", "ood"} <= result.keys()
    few = result["labels"]["0.1"]
    assert [len(d) for d in few["draws"]] == [4, 4] and few["trained"].keys() == {"mean", "deviation"}
    assert result["finetune"]["0.5, 1 frozen"].keys() >= {"finetuned", "scratch", "draws", "frozen_weights"}
    strange = result["ood"]
    scores = 6 if script.__name__ == "gcrl" else 4
    assert all(len(strange[name]) == scores for name in ("patterns", str(images / "test")))
    for measured in strange[str(images / "test")].values():
        assert measured["auroc"] == pytest.approx(0.5)
    assert all(0 <= v <= 1 for score in strange["patterns"].values() for v in score.values())
    out = capsys.readouterr().out
    assert "AUROC" in out and "from scratch" in out and "+-" in out
    chance = 100 * 1000 / (1000 + len(list((images / "test").glob("*/*"))))   # of the 1,000 of patterns
    assert f"{'by guessing':34}{50:8.1f}{chance:8.1f}{95:8.1f}" in out


def test_transfer(finished, here):
    """Another data set than the run's, beside its own in evaluation.json."""
    shutil.copytree(finished("simclr").folder, here / "run")
    judge(here / "run")
    result = judge(here / "run", "--dataset", "patterns")
    found = json.loads((here / "run" / "evaluation.json").read_text())
    assert found.keys() == {"folder", "patterns"} and found["patterns"] == result
    assert result["linear"] != found["folder"]["linear"]


def test_gcrl_by_depth(finished, here):
    """A probe on each block, the encoder's last one all but its norm; and the picture."""
    shutil.copytree(finished("gcrl").folder, here / "run")
    blocks = judge(here / "run", "--blocks")["blocks"]
    assert list(blocks) == ["embedding", "encoder.0, row", "encoder.1, column", "decoder.0, row"]
    assert all(0 <= value <= 1 for value in blocks.values())
    with Image.open(here / "run" / "blocks.png") as image:
        assert image.size == (110 * 4 + 20, 240)
    before = (here / "run" / "blocks.png").read_bytes()
    assert judge(here / "run", "--dataset", "patterns", "--blocks")["blocks"] != blocks
    assert (here / "run" / "blocks.png").read_bytes() == before and (here / "run" / "blocks-patterns.png").exists()


def test_likelihood_is_the_runs(finished):
    """Of test images, its mean is result.json's nats."""
    run = finished("gcrl")
    model, settings = runs.load_generator(run.folder, CPU), cli.read_settings(run.folder)[1]
    images = load("folder", settings["data_dir"], settings["image_size"], CPU, 0, 1.0)
    nats, bits = ood.likelihoods(model, images.test, OFF)
    assert nats.mean().item() / (settings["image_size"]**2 - 1) == pytest.approx(run.metrics["nats"], rel=1e-4)
    assert torch.equal(bits, ood.complexity(model.tokens(images.test.at(torch.arange(10)))))


def test_autocast_leaves_the_tokens():
    """In bf16 many pixels would have another nearest colour."""
    x, palette = torch.rand(4, 3, 16, 16), torch.rand(64, 3)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = gcrl.quantise(x, palette)
    assert torch.equal(tokens, gcrl.quantise(x, palette))


@pytest.mark.parametrize("flags, named", [
    (["--finetune", "--frozen-stages", 0, 9], "--frozen-stages 9"), (["--frozen-stages", 1], "without --finetune"),
    (["--epochs", 5], "without --finetune"), (["--draws", 2], "without --labels"), (["--draws", 0], "--draws"),
    (["--blocks"], "--blocks"), (["--ood", "nowhere"], "--ood nowhere"),
    (["--dataset", "shapes", "--data-dir", "x"], "--data-dir"),
    (["--ood", "cifar11"], "--ood cifar11"), (["--labels", 2], "--labels"), (["--dataset", "mnist"], "--dataset")])
def test_refusals(flags, named, finished, here):
    with pytest.raises(Refusal, match=named):
        judge(finished("simclr").folder, *flags)


def test_refuses_what_is_no_finished_run(here, finished):
    with pytest.raises(Refusal, match="args.json"):
        judge(here)
    shutil.copytree(finished("simclr").folder, here / "run")
    (here / "run" / "encoder.pt").write_bytes(b"none")
    with pytest.raises(Refusal, match="encoder.pt"):
        judge(here / "run")
    (here / "run" / "encoder.pt").unlink()
    with pytest.raises(Refusal, match="--resume"):
        judge(here / "run")


def test_empty_and_unlabelled_folders(here, finished, images):
    """An empty folder of strange images gets one sentence; images without classes will do."""
    shutil.copytree(finished("simclr").folder, here / "run")
    (here / "empty").mkdir()
    with pytest.raises(Refusal, match="--ood empty.*no images"):
        judge(here / "run", "--ood", "empty")
    assert judge(here / "run", "--ood", images / "train" / "red")["ood"]
    plain = images / "train" / "red"
    for flags in ([], ["--labels", 0.5], ["--finetune"]):
        with pytest.raises(Refusal, match="has no train/CLASS folders"):
            judge(here / "run", "--data-dir", plain, *flags)
    strange = judge(here / "run", "--data-dir", plain, "--ood", "patterns")["ood"]["patterns"]
    assert strange.keys() == {"Mahalanobis, no labels", "kNN distance, no labels"}


def test_results_are_added(here, finished):
    """A later judgement leaves what an earlier one found; another folder has an entry of its own."""
    shutil.copytree(finished("simclr").folder, here / "run")
    judge(here / "run", "--ood", "patterns", "--labels", 0.5)
    result = judge(here / "run", "--ood", "shapes", "--labels", 0.2)
    assert result["ood"].keys() == {"patterns", "shapes"} and result["labels"].keys() == {"0.5", "0.2"}
    result = judge(here / "run", "--finetune", "--frozen-stages", 0, 3, "--epochs", 1, "--labels", 0.5, "--draws", 2)
    both = list(result["finetune"].values())                                  # a sweep over what is frozen
    alone = judge(here / "run", "--finetune", "--frozen-stages", 5, 3, "--epochs", 1, "--labels", 0.5, "--draws", 2)
    assert alone["finetune"]["0.5, 3 frozen"] == both[1] and both[0]["scratch"] == both[1]["scratch"]
    assert [swept["frozen_stages"] for swept in alone["finetune"].values()] == [0, 3, 5]
    assert both[0]["frozen_weights"] == 0 < both[1]["frozen_weights"] < 1
    assert alone["finetune"]["0.5, 5 frozen"]["frozen_weights"] == 1
    (here / "run" / "evaluation.json").write_text("{")
    with pytest.raises(Refusal, match="evaluation.json is damaged"):
        judge(here / "run")


def test_views_of_ones_own_are_judged_on_themselves(here, finished):
    shutil.copytree(finished("cmc").folder, here / "run")
    told = json.loads((here / "run" / "args.json").read_text())
    told["settings"]["views_dir"] = ["a", "b"]
    (here / "run" / "args.json").write_text(json.dumps(told))
    state = {f"nets.{i}.{k}": v for i in (0, 1) for k, v in resnet.resnet18("cifar", 4).state_dict().items()}
    torch.save(state, here / "run" / "encoder.pt")
    with pytest.raises(Refusal, match="--views-dir"):
        judge(here / "run", "--ood", "patterns")


# ---- detection and segmentation


def test_encoder_starts_torchvisions_detector_and_segmenter(tmp_path):
    """encoder.pt of a ResNet-50 with the ImageNet stem fits both backbones but for fc, and each takes a step."""
    torch.manual_seed(0)
    ours = resnet.resnet50("imagenet")
    torch.save(ours.state_dict(), tmp_path / "encoder.pt")
    state = torch.load(tmp_path / "encoder.pt", weights_only=True)

    whole = torchvision.models.resnet50()
    missing = whole.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) == {"fc.weight", "fc.bias"}
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64, image_mean=[0, 0, 0],
        image_std=[1, 1, 1])
    segmenter = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3)
    body, backbone = detector.backbone.body, segmenter.backbone
    body.load_state_dict(state)
    backbone.load_state_dict(state)
    assert torch.equal(body.layer4[2].conv3.weight, ours.layer4[2].conv3.weight)

    x = torch.rand(2, 3, 64, 64)
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2
    before = body.layer4[2].conv3.weight.clone()
    optimizer = torch.optim.SGD(detector.parameters(), 0.01)
    sum(detector.train()(list(x), targets).values()).backward()
    optimizer.step()
    assert not torch.equal(before, body.layer4[2].conv3.weight)
    optimizer = torch.optim.SGD(segmenter.parameters(), 0.01)
    torch.nn.functional.cross_entropy(segmenter.train()(x)["out"], torch.randint(3, (2, 64, 64))).backward()
    optimizer.step()
    assert not torch.equal(before, backbone.layer4[2].conv3.weight)
