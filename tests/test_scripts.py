# SPDX-License-Identifier: MIT
"""The scripts from the command line: what a run leaves behind, and that it can be repeated and resumed."""
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

import cmc
import cpc
import dim
import gcrl
import moco
import simclr
from common import cli, resnet
from common.cli import Refusal
from programs import Program

ROOT = Path(__file__).parent.parent


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


# ---- what a run leaves


def test_run_folder(script, finished):
    """main returns what result.json holds; the folder holds settings, log, weights and pictures, and no leftovers."""
    run = finished(script)
    names = {"args.json", "log.jsonl", "checkpoint.pt", "encoder.pt", "result.json", "views.png", "neighbours.png",
             "curve.png"}
    names |= {"samples.png", "completions.png"} if script is gcrl else set()
    assert {p.name for p in run.folder.iterdir()} == names
    assert json.loads((run.folder / "result.json").read_text()) == run.metrics
    rows = {"pixels", "untrained", "trained"} | {"cpc": {"context"}, "simclr": {"projection"}, "dim": {
        "untrained conv", "trained conv", "untrained Y", "trained Y"}}.get(script.__name__, set())
    for measure in ("linear", "knn", "mlp") if script is dim else ("linear", "knn"):
        assert run.metrics[measure].keys() == rows
        assert all(0 <= accuracy <= 1 for accuracy in run.metrics[measure].values())
    for measure in ("feature_std", "alignment", "uniformity", "rankme"):
        assert run.metrics[measure].keys() == rows - {"pixels"}
    assert run.metrics["seconds"] > 0 and run.metrics["peak_memory"] > 0
    for name in names:
        if name.endswith(".png"):
            with Image.open(run.folder / name) as image:
                image.load()
                assert image.mode == "RGB" and min(image.size) >= 64
    told = json.loads((run.folder / "args.json").read_text())
    assert told["method"] == script.__name__ and told["settings"]["epochs"] == 2
    assert str(run.folder) in run.stdout and "whitened pixels" in run.stdout


def test_log(script, finished):
    """One line an epoch with every metric and the rate, finite; the same epochs on the terminal."""
    run = finished(script)
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    metrics = {"feature_std", "knn", "uniformity", "rankme"} | {
        "gcrl": {"nats", "contrastive"}, "dim": {"local", "prior"}}.get(script.__name__, {"loss"})
    assert [entry["epoch"] for entry in log] == [1, 2]
    for entry in log:
        assert entry.keys() == metrics | {"epoch", "lr", "seconds"}
        assert all(map(math.isfinite, entry.values()))
    assert re.findall(r"^epoch (\d+)/2 ", run.stdout, re.M) == ["1", "2"]


def test_gcrl_results(finished):
    """nats per predicted token and its bits stand in the result; the palette's error too."""
    metrics = finished("gcrl").metrics
    assert 0 < metrics["nats"] < 2 * math.log(4)
    assert metrics["bits"] == pytest.approx(metrics["nats"] / math.log(2))
    assert 0 < metrics["palette_error"] < 128


def test_encoder_is_the_checkpoints(script, finished):
    """encoder.pt holds the encoder's part of the trained weights and nothing of heads or decoder."""
    folder = finished(script).folder
    encoder = torch.load(folder / "encoder.pt", weights_only=True)
    model = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    if script is not gcrl:
        prefix = {"moco": "query.encoder."}.get(script.__name__, "encoder.")
        model = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
        assert encoder.keys() == model.keys()
    else:
        assert {k.split(".")[0] for k in encoder} == {
            "embedding", "row_position", "column_position", "encoder", "encoder_norm", "palette", "first_pixel"}
    assert all(torch.equal(v, model[k]) for k, v in encoder.items())


@pytest.mark.parametrize("script", [simclr, moco])
def test_encoder_loads_into_torchvision(script, tiny, here):
    """With --stem imagenet --width 64 torchvision's resnet18 takes the encoder; only its classifier is missing."""
    script.main(tiny(script, "--stem", "imagenet", "--width", 64, "--epochs", 1, "--out", "run"))
    state = torch.load("run/encoder.pt", weights_only=True)
    missing = torchvision.models.resnet18().load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) == {"fc.weight", "fc.bias"}


def test_evaluation_leaves_the_model(script, finished, same):
    """The model's state, batch norm's statistics too, is bitwise what it was before the evaluation."""
    run = finished(script)
    assert same(dict(run.model), dict(torch.load(run.folder / "checkpoint.pt", weights_only=True)["model"]))


def test_training_moves_every_weight(script, finished):
    """The trained model differs from the untrained one of the same seed in every parameter."""
    run = finished(script)
    torch.manual_seed(0)
    model = {"simclr": lambda: simclr.SimCLR(resnet.resnet18("cifar", 4)), "gcrl": lambda: gcrl.GCRL(4, 8, 8, 1, 1, 2),
             "moco": lambda: moco.MoCo(moco.EncoderWithHead("resnet18", "cifar", 4, "mlp", 2), "queue", 10),
             "cmc": lambda: cmc.CMC(cmc.Encoder("lab", "resnet18", "cifar", 4), 40),
             "cpc": lambda: cpc.CPC(cpc.Encoder("resnet18", "cifar", 4, "layer", 4, 2), 4, [2], 8),
             "dim": lambda: dim.DIM(dim.Encoder("conv", 4, 8), 1, 0, 1, 0.1, "jsd", "dot", 8),
             }[script.__name__]()
    still = [name for name, p in model.named_parameters() if torch.equal(p, run.model[name])]
    assert not still


def test_unlabelled_folder(script, tiny, images, here):
    """Images without classes train; the terminal says why there is no probe, and linear and knn are None."""
    (here / "plain").mkdir()
    for i, file in enumerate((images / "train").rglob("*.png")):
        shutil.copy(file, here / "plain" / f"{i}.png")
    assert script.main(tiny(script, "--data-dir", "plain", "--epochs", 1, "--out", "run"))["linear"] is None
    result = json.loads(Path("run/result.json").read_text())
    assert result["linear"] is None and result["knn"] is None
    assert Path("run/neighbours.png").exists()


def test_supervised_without_labels(tiny, images, here):
    with pytest.raises(Refusal, match="--loss supervised needs labels"):
        simclr.main(tiny(simclr, "--loss", "supervised", "--data-dir", images / "train" / "red"))
    assert not list(here.iterdir())


def test_unlabelled_is_said(either, tiny, images, here, capsys):
    either.main(tiny(either, "--data-dir", images / "train" / "red", "--epochs", 1))
    assert "no linear probe and no kNN" in (out := capsys.readouterr().out) and "no train/CLASS folders" in out


# ---- repeating and resuming


def test_same_seed(script, tiny, finished, here, same, content):
    """The same seed gives the same weights, log and results bit for bit; another seed gives other weights."""
    script.main(tiny(script, "--out", "again"))
    script.main(tiny(script, "--out", "other", "--seed", 1))
    assert same(content(here / "again"), content(finished(script).folder))
    again, other = (torch.load(here / name / "checkpoint.pt", weights_only=True)["model"]
                    for name in ("again", "other"))
    assert not any(torch.equal(again[name], other[name]) for name in again if again[name].dim() > 1 and
                   name.endswith("weight"))


@pytest.mark.parametrize("k", [3, 10])
def test_stopped_and_resumed(script, tiny, finished, here, same, content, monkeypatch, capsys, k):
    """Stopped after step k of 10 (10: the epoch's last, before its line is logged) a resumed run ends bit for bit."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "stop_requested", lambda self: seen.append(0) or len(seen) == k)
        with pytest.raises(SystemExit) as stop:
            script.main(tiny(script, "--out", "run"))
    assert stop.value.code == 143 and "--resume run" in capsys.readouterr().out
    assert Path("run/encoder.pt").exists()
    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == ((k - 1) // 5, (k - 1) % 5 + 1)
    metrics = script.main(["--resume", "run"])
    assert same(content(here / "run"), content(finished(script).folder))
    assert metrics["linear"] == finished(script).metrics["linear"]


def test_stopped_twice(either, tiny, finished, here, same, content, monkeypatch):
    """Stopped in each epoch and resumed from elsewhere with other workers: still the same bits."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(either.Run, "stop_requested", lambda self: seen.append(0) or len(seen) in (2, 6))
        for argv in (tiny(either, "--out", "run"), ["--resume", here / "run"]):
            with pytest.raises(SystemExit):
                either.main(argv)
    either.main(["--workers", "0", "--cache-gb", "0", "--resume", here / "run"])
    assert same(content(here / "run"), content(finished(either).folder))


@pytest.mark.parametrize("saves", [0, 1, 2])
def test_killed_and_resumed(either, tiny, finished, here, same, content, monkeypatch, saves):
    """Killed where the next checkpoint is due (its epoch already in log.jsonl): resumed, each epoch is there once."""
    save, seen = either.Run.save, []

    def mortal(self, *args):
        if len(seen) == saves:
            raise Killed
        seen.append(save(self, *args))
        if len(seen) == 2:
            raise Killed                                    # after the last: only the evaluation is left

    with monkeypatch.context() as patch:
        patch.setattr(either.Run, "save", mortal)
        with pytest.raises(Killed):
            either.main(tiny(either, "--out", "run"))
    assert Path("run/checkpoint.pt").exists() == (saves > 0)
    either.main(["--resume", "run"])
    assert [e["epoch"] for e in content(here / "run")["log"]] == [1, 2]
    assert same(content(here / "run"), content(finished(either).folder))


@pytest.mark.parametrize("script, stopped", [
    *((script, False) for script in (simclr, moco, cmc, cpc, dim, gcrl)), (simclr, True), (gcrl, True)],
    ids=lambda value: getattr(value, "__name__", "asked to stop" if value else "runs on"))
def test_loss_not_finite(script, tiny, finished, here, same, content, monkeypatch, stopped):
    """A nan at step 3 of epoch 2 is refused by step and epoch; the checkpoint of epoch 1 stays and is good."""
    name, calls = {"moco": ("info_nce", 1), "cmc": ("softmax_contrast", 2), "cpc": ("info_nce", 4),
                   "dim": ("mutual_information", 1)}.get(script.__name__, ("nt_xent", 1))
    loss, seen = getattr(script, name), []

    def broken(*args):
        seen.append(0)
        return loss(*args) * (math.nan if len(seen) == 8 * calls else 1)

    with monkeypatch.context() as patch:
        patch.setattr(script, name, broken)
        patch.setattr(script.Run, "stop_requested", lambda self: stopped and len(seen) == 8 * calls)
        with pytest.raises(Refusal, match="step 3 of epoch 2.*--lr"):
            script.main(tiny(script, "--out", "run"))
    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 0)
    script.main(["--resume", "run"])
    assert same(content(here / "run"), content(finished(script).folder))


# ---- the command line


BAD = {
    "all": ["--epochs 0", "--epochs two", "--batch-size 1", "--batch-size 41", "--tau 0", "--tau -1", "--tau nan",
             "--tau inf", "--lr -1", "--lr 0", "--weight-decay -1", "--image-size 4", "--crop-min 0", "--crop-min 2",
             "--width 0", "--device nonsense", "--dataset mnist", "--seed -1",
             "--workers -1", "--cache-gb nan", "--amp fp8", "--data-dir nowhere", "--learning-rate 1", "--resume",
             "--data-dir x --dataset shapes"],
    "simclr": ["--store-size 64 --dataset cifar10", "--margin 0.5", "--semi-hard", "--tau 0.3 --loss margin",
               "--projection-dim 3 --head none", "--head linear --loss supervised", "--blur 1.1", "--arch resnet9",
               "--stem big", "--optimizer adam", "--warmup 2", "--jitter -1", "--jitter 0.3 --augmentations crop",
               "--crop-min 0.5 --augmentations flip", "--store-size 8 --image-size 16"],
    "moco": ["--contrast nce", "--dictionary book", "--negatives -1", "--m 2", "--bank-m -1",
             "--head none", "--blur 2",
             "--bn-groups 3", "--bn-groups 8", "--bn-groups 0", "--symmetric --dictionary memory-bank",
             "--schedule none",
             "--dictionary memory-bank --no-shuffle", "--no-shuffle --bn-groups 1"],
    "cmc": ["--views hsv", "--views-dir x", "--graph star", "--contrast l2", "--negatives -1", "--bank-m 1.5",
            "--jitter -1", "--dictionary queue", "--dataset fashionmnist", "--graph core --views lab"],
    "cpc": ["--patch 0", "--patch 9", "--stride 0", "--stride 3", "--steps 1", "--steps 3", "--directions 2",
            "--norm group", "--augmentation v3", "--colour-drop 0.5 --augmentation v1",
            "--context-width 0", "--warmup 2"],
    "dim": ["--objective all", "--estimator nwj", "--critic sum", "--alpha -1", "--beta -1", "--gamma nan", "--units 0",
            "--depth 0", "--views 3", "--arch resnet9", "--beta 0", "--objective multiscale"],
    "gcrl": ["--warmup 2", "--jitter -1", "--alpha 0 --beta 0", "--alpha -1", "--heads 3", "--heads 0",
             "--colours 1", "--encoder-layers 0", "--tau 0.5 --beta 0", "--jitter 0.1 --beta 0"],
}


@pytest.mark.parametrize("script, flags", [(script, flags) for script in (simclr, moco, cmc, cpc, dim, gcrl)
                                           for flags in BAD["all"] + BAD[script.__name__]],
                         ids=lambda value: getattr(value, "__name__", value), scope="function")
def test_bad_value(script, flags, tiny, here, monkeypatch, capsys):
    """Exit status 2 and one line on stderr that names the flag; nothing is written."""
    monkeypatch.setattr(sys, "argv", [f"/x/{script.__name__}.py", *tiny(script), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        cli.program(script.main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n")
    assert err.startswith(f"{script.__name__}.py: ") and flags.split()[0] in err
    assert not list(here.iterdir())


@pytest.mark.parametrize("dataset", ["cifar10", "folder", "stl10"])
def test_small(script, dataset):
    """--small makes whatever costs time smaller, alike for every real data set, and a flag goes before it."""
    usual, small, mixed = (vars(script.arguments(["--dataset", dataset, *flags])) for flags in (
        [], ["--small"], ["--small", "--epochs", "3"]))
    costs = ["image_size", "width", "epochs", "batch_size"]
    assert all(small[name] <= usual[name] for name in costs) and small["width"] < usual["width"]
    assert small["small"] and not usual["small"] and small["epochs"] < usual["epochs"]
    assert mixed == {**small, "epochs": 3}
    assert {**small, "dataset": ""} == {**vars(script.arguments(["--small", "--dataset", "cifar10"])), "dataset": ""}


def test_small_is_for_real_images(script):
    with pytest.raises(Refusal, match="--small is for real images"):
        script.arguments(["--small"])


def test_program_refuses(here, tiny, tmp_path):
    """As a program: exit status 2, one line on stderr, no traceback, nothing on stdout, nothing written."""
    out, err = tmp_path / "out", tmp_path / "err"
    program = Program([ROOT / "gcrl.py", *tiny(gcrl, "--tau", "0")], here, out, err)
    assert program.wait(60) == 2 and out.read_text() == ""
    assert re.fullmatch(r"gcrl\.py: .*--tau.*\n", err.read_text())
    assert not list(here.iterdir())


def test_help(script, here, monkeypatch, capsys):
    """Every flag has words of help, and its default where it has one."""
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    parsers = []
    monkeypatch.setattr(cli.Parser, "print_help", lambda self: parsers.append(self))
    with pytest.raises(SystemExit):
        script.main(["--help"])
    rest = text[text.index("options:"):]
    shared = parsers[0]._action_groups[-1]._group_actions                     # shown after the script's own
    for action in reversed([*(a for a in parsers[0]._actions if a not in shared), *shared]):  # cut off the last entry
        assert action.help and len(action.help) > 8
        rest, found, entry = rest.rpartition(f" {action.option_strings[0]}")
        assert found
        if action.default is not None and action.default is not False:
            words = " ".join(action.default) if isinstance(action.default, list) else action.default
            assert f"(default: {words})" in entry, action.dest


@pytest.mark.parametrize("argv", [["--dataset", "folder"], ["--dataset=folder"]])
def test_help_of_another_data_set(here, capsys, argv):
    """The defaults in the help are those of the data set beside --help."""
    with pytest.raises(SystemExit):
        simclr.main(["--help", *argv])
    assert "(default: 224)" in capsys.readouterr().out


def test_defaults_of_a_data_set(tmp_path):
    """A data set's own settings hold unless a flag says otherwise."""
    shapes, folder = simclr.arguments([]), simclr.arguments(["--dataset", "folder", "--blur", "0.25"])
    assert (shapes.dataset, shapes.image_size, shapes.epochs, shapes.tau) == ("shapes", 16, 25, 0.2)
    assert (folder.image_size, folder.stem, folder.blur, folder.epochs) == (224, "imagenet", 0.25, 200)
    assert simclr.arguments(["--dataset", "cifar10"]).image_size == 32


ALONE = """
import json, os, runpy, sys, torch, torchvision
for folder, *argv in json.loads(sys.argv[1]):
    if os.fork() == 0:                                                        # torch is imported once for all
        os.chdir(folder)
        os.dup2(os.open("stdout", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT), 2)
        sys.path[0], sys.argv = folder, argv
        runpy.run_path(argv[0], run_name="__main__")
        sys.exit()
    os.wait()
"""


PARTS = """
rng = augment.Random(0)
x = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
model = SimCLR(resnet.resnet18("cifar", 4))
optimizer = LARS(parameter_groups(model, 1e-4), 0.1)
h, z = model(torch.cat([view(x, rng, 16, 0.2, 0.5, 0.5) for _ in range(2)]))
nt_xent(*z.chunk(2), 0.5).backward()
optimizer.step()
print(h.shape)
"""


def start(root, tiny):
    """Makes a folder for each script, with it and common/ alone, without common/evaluation/, and runs it there; and
    another for view, encoder, loss and optimiser of SimCLR, with the two files that these need."""
    jobs = []
    for name in ("simclr", "moco", "cmc", "cpc", "dim", "gcrl"):
        (root / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", root / name)
        shutil.copytree(ROOT / "common", root / name / "common",
                        ignore=shutil.ignore_patterns("__pycache__", "evaluation"))
        jobs.append([str(root / name), f"{name}.py", *tiny(name, "--epochs", 1)])
    (root / "parts" / "common").mkdir(parents=True)
    for name in ("augment.py", "resnet.py"):
        shutil.copy(ROOT / "common" / name, root / "parts" / "common" / name)
    text = (ROOT / "simclr.py").read_text()
    text = text[: text.index("# ---- arguments")]
    text = re.sub(r"^from common import .*\nfrom common.run .*", "from common import augment, resnet", text, flags=re.M)
    (root / "parts" / "mine.py").write_text(text + PARTS)
    jobs.append([str(root / "parts"), "mine.py"])
    return Program(["-c", ALONE, json.dumps(jobs)], root, root / "output")


@pytest.fixture(scope="module")
def alone(background, ended):
    """The folder of the scripts' folders."""
    return ended(*background)


def test_script_and_common_alone(script, alone):
    """A script and common/ are all that it takes, even without common/evaluation/."""
    folder, run = alone / script.__name__, f"runs/{script.__name__}-folder-0"
    assert (folder / "stderr").read_text() == ""
    assert (folder / run / "result.json").exists() and run in (folder / "stdout").read_text()


def test_simclrs_parts_need_two_files(alone):
    assert "[16, 32]" in (alone / "parts" / "stdout").read_text() and (alone / "parts" / "stderr").read_text() == ""


# ---- copies


@pytest.fixture
def copy_of(here):
    """copy_of(script, name, place): the script as name.py beside a copy of common/ in the folder `place`."""
    def make(script, name, place="project"):
        shutil.copytree(ROOT / "common", here / place / "common", ignore=shutil.ignore_patterns("__pycache__"),
                        dirs_exist_ok=True)
        return shutil.copy(ROOT / f"{script.__name__}.py", here / place / f"{name}.py")
    return make


def test_a_changed_copy_is_trained_resumed_and_judged_as_itself(copy_of, either, tiny, here, good):
    """cp simclr.py mine.py, a width of one's own in the encoder: runs, settings, and judgement are mine's."""
    path = Path(copy_of(either, "mine"))
    text = path.read_text()
    for old, new in (("args.width)", "2 * args.width)"), ("args.width, args.encoder_layers, args.decoder_layers, "
                                                         "args.heads)", "2 * args.width, 1, 1, args.heads)")):
        text = text.replace(old, new)
    path.write_text(text)
    assert "mine: dataset folder" in good(["mine.py", *tiny(either, "--epochs", 1)], here / "project")
    run = here / "project" / "runs" / "mine-folder-0"
    assert json.loads((run / "args.json").read_text())["method"] == "mine"
    both = ("import sys, mine; from common.evaluation import __main__ as evaluation; "
            "mine.main(['--resume', sys.argv[1]]); evaluation.main([sys.argv[1], '--device', 'cpu', '--amp', 'off'])")
    out = good(["-c", both, run], here / "project")
    stored, told = (json.loads((run / name).read_text()) for name in ("result.json", "evaluation.json"))
    for row, accuracy in told["folder"]["linear"].items():
        assert accuracy == stored["linear"][row]
    assert told["folder"]["linear"].keys() == {"pixels", "untrained", "trained"} and re.search(r"^mine  ", out, re.M)
    with pytest.raises(Refusal, match="is a run of mine.py"):
        either.main(["--resume", run])


def test_in_somebodys_package(copy_of, tiny, here, good):
    """`common` is another thing there: two lines of the script name the package's own, and it trains and is judged."""
    path = Path(copy_of(simclr, "pretrain", "project/pkg"))
    (here / "project" / "pkg" / "__init__.py").touch()
    (here / "project" / "common.py").write_text("raise ImportError('another thing')")
    text = path.read_text()
    text, edits = re.subn(r"^from common", "from .common", text, flags=re.M)
    assert edits == 2
    path.write_text(text)
    good(["-m", "pkg.pretrain", *tiny(simclr, "--epochs", 1, "--out", "run")], here / "project")
    good(["-m", "pkg.common.evaluation", "run", "--device", "cpu", "--amp", "off"], here / "project")
    assert json.loads((here / "project" / "run" / "evaluation.json").read_text())["folder"]["linear"]


# ---- gcrl's two losses


def test_alpha_zero(tiny, here, monkeypatch):
    """--alpha 0 is contrastive alone: the decoder is not run, and neither likelihood nor samples are given."""
    def no_decoder(*_, **__):
        raise AssertionError("the decoder ran")

    for method in ("decode", "sample", "log_prob"):
        monkeypatch.setattr(gcrl.GCRL, method, no_decoder)
    metrics = gcrl.main(tiny(gcrl, "--alpha", 0, "--out", "run"))
    assert "nats" not in metrics and not Path("run/samples.png").exists()
    assert json.loads(Path("run/log.jsonl").read_text().splitlines()[0]).keys() == {
        "epoch", "contrastive", "feature_std", "knn", "uniformity", "rankme", "lr", "seconds"}


def test_beta_zero(tiny, here, monkeypatch):
    """--beta 0 is generative alone: no strong view for training, no contrastive loss."""
    monkeypatch.setattr(gcrl, "nt_xent", lambda *_: pytest.fail("the contrastive loss was computed"))
    metrics = gcrl.main(tiny(gcrl, "--beta", 0, "--out", "run"))
    assert math.isfinite(metrics["nats"]) and Path("run/samples.png").exists()
    assert json.loads(Path("run/log.jsonl").read_text().splitlines()[0]).keys() == {
        "epoch", "nats", "feature_std", "knn", "uniformity", "rankme", "lr", "seconds"}


# ---- variants


@pytest.mark.parametrize("script, flags", [
    (simclr, "--optimizer lars"), (simclr, "--loss supervised"),
    (simclr, "--head mlp-bn"),
    (moco, "--dictionary memory-bank --contrast nce"), (simclr, "--loss logistic --semi-hard --head linear"),
    (simclr, "--loss margin --head none --augmentations cutout rotation noise sobel --one-branch"),
    (simclr, "--arch resnet50"), (simclr, "--amp bf16"),
    (moco, "--dictionary memory-bank"), (moco, "--dictionary memory-bank --negatives 0"), (moco, "--symmetric"),
    (moco, "--dictionary end-to-end --symmetric"), (moco, "--head mlp --augmentation v1 --schedule steps"),
    (moco, "--negatives 7 --no-shuffle"), (moco, "--negatives 5 --symmetric"),
    (cmc, "--views rgb --graph core --jitter 0.5"),
    (cmc, "--contrast nce"), (cmc, "--views ycbcr --contrast nce --negatives 0"), (moco, "--amp bf16"),
    (cmc, "--amp bf16"), (cmc, "--dictionary end-to-end"), (cmc, "--dictionary end-to-end --contrast nce"),
    (cpc, "--directions 1 --norm batch --augmentation v1"), (cpc, "--norm none --amp bf16 --first 1"),
    (dim, "--objective global"), (dim, "--objective both --critic concat --estimator dv --views 2"),
    (dim, "--estimator infonce --gamma 0"),
    (dim, "--arch resnet18 --amp bf16"),
    (dim, "--objective multiscale --tasks 1-7 --image-size 32 --width 2 --units 8 --depth 1 --batch-size 8"),
    (dim, "--objective multiscale --image-size 32 --width 2 --units 8 --depth 2 --batch-size 8")],
    ids=lambda value: getattr(value, "__name__", value))
def test_variants_train_and_resume(script, flags, tiny, here, same, content, monkeypatch):
    """Stopped after step 3 of 5 and resumed they end as without the stop, bit for bit: queues and banks too."""
    seen, flags = [], [*flags.split(), "--epochs", 1]
    metrics = script.main(tiny(script, "--out", "whole", *flags))
    assert 0 <= metrics["linear"]["trained"] <= 1
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "stop_requested", lambda self: seen.append(0) or len(seen) == 3)
        with pytest.raises(SystemExit):
            script.main(tiny(script, "--out", "run", *flags))
    script.main(["--resume", "run"])
    assert same(content(here / "run"), content(here / "whole"))
