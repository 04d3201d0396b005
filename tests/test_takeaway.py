# SPDX-License-Identifier: MIT
"""What a user takes away: features in a file, a map, neighbours, the encoder in a line, and a backbone of one's own."""
import itertools
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common.evaluation
from common import Refusal, cli, linear_probe
from common.data import Data, Decoder, Images, to_pixels
from common.evaluation import __main__ as evaluate
from common.evaluation import features, runs

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(finished, here):
    return shutil.copytree(finished("simclr").folder, here / "run")


def take(run, *flags):
    return evaluate.main([run, "--device", "cpu", "--amp", "off", "--workers", 0, *flags])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- --export


def test_export_is_the_features(run, images, here, capsys):
    """Read back by numpy: features, labels and names of the run's images, in the order of the data set."""
    before = contents(run)
    take(run, "--export", here / "out.npz")
    assert str(here / "out.npz") in capsys.readouterr().out and contents(run) == before
    settings, encoder = runs.load_encoder(run, CPU)
    with np.load(here / "out.npz") as told:
        names = {f"{part}_{kind}" for part in ("train", "test") for kind in ("features", "labels", "files")}
        assert set(told) == names | {"classes"}
        assert told["classes"].tolist() == ["blue", "red"]
        for part, n in (("train", 40), ("test", 10)):
            names, x = told[f"{part}_files"], told[f"{part}_features"]
            assert names.tolist() == sorted(map(str, (images / part).glob("*/*.png"))) and len(names) == n
            assert [told["classes"][y] for y in told[f"{part}_labels"]] == [Path(name).parent.name for name in names]
            pixels = torch.stack([to_pixels(Image.open(name), settings.image_size) for name in names])
            with torch.no_grad():
                assert x.dtype == np.float32 and np.allclose(x, encoder(pixels / 255).numpy(), atol=1e-5)


@pytest.mark.parametrize("flags, names", [
    (["--data-dir", "{images}/train/red"], {"train_features", "train_files", "classes"}),     # a folder of no classes
    (["--dataset", "patterns"], {"train_features", "train_labels", "test_features", "test_labels", "classes"})])
def test_export_of_other_images(flags, names, run, images, here):
    take(run, "--export", "out.npz", *(flag.format(images=images) for flag in flags))
    assert set(np.load("out.npz")) == names


def test_a_folder_is_exported_by_a_run_on_something_else(finished, images, here):
    """--data-dir alone is the user's images, also for a run that was trained on shapes."""
    run = shutil.copytree(finished("simclr").folder, here / "run")
    told = (run / "args.json").read_text()
    (run / "args.json").write_text(told.replace('"dataset": "folder"', '"dataset": "shapes"'))
    take(run, "--export", "out.npz", "--data-dir", images)
    assert len(np.load("out.npz")["train_files"]) == 40
    with pytest.raises(Refusal, match="nowhere is not a folder"):
        take(run, "--export", "other.npz", "--data-dir", "nowhere")


def test_export_goes_batch_by_batch(tmp_path, monkeypatch):
    """Of eleven batches no more than the first and two others are in memory at a time; they make one array."""
    encoded, alive, most = linear_probe.encoded, weakref.WeakSet(), []

    def one_by_one(module, images, autocast):
        for h in encoded(module, images, autocast, batch_size=1):
            alive.add(h)
            most.append(len(alive))
            yield h
    monkeypatch.setattr(linear_probe, "encoded", one_by_one)
    x = torch.randint(0, 256, (11, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part = Images(x, None, CPU, 0, True)
    features.export(tmp_path / "x.npz", Data(part, part, None, None, ()), torch.nn.Flatten(),
                    torch.autocast("cpu", enabled=False))
    told = np.load(tmp_path / "x.npz")
    assert np.array_equal(told["train_features"], (x.float() / 255).flatten(1)) and len(most) == 11 and max(most) <= 3
    assert told["classes"].shape == (0,)


def test_nothing_is_overwritten_and_nothing_half(run, here, monkeypatch):
    (here / "mine.npz").write_bytes(b"mine")
    with pytest.raises(Refusal, match="--export .*mine.npz exists"):
        take(run, "--export", here / "mine.npz")
    assert (here / "mine.npz").read_bytes() == b"mine"

    def broken(*args, **kwargs):
        yield torch.zeros(3, 4)
        raise KeyboardInterrupt
    monkeypatch.setattr(linear_probe, "encoded", broken)
    with pytest.raises(KeyboardInterrupt):
        take(run, "--export", here / "half.npz")
    assert {path.name for path in here.iterdir()} == {"run", "mine.npz"}


@pytest.mark.parametrize("flag", ["--labels 0.5", "--finetune", "--ood patterns", "--blocks"])
def test_taking_is_not_judging(flag, run):
    with pytest.raises(Refusal, match=flag.split()[0]):
        take(run, "--export", "out.npz", *flag.split())


# ---- --map and --neighbours


def test_neighbours_in_space_are_neighbours_on_the_map():
    """Five far clusters in 20 dimensions: the nearest point on the map is of the same one, for all but a few."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(150) % 5
    x = 4 * torch.randn(5, 20, generator=generator)[label] + torch.randn(150, 20, generator=generator)
    y = features.tsne(x, perplexity=10)
    assert y.shape == (150, 2) and torch.equal(y, features.tsne(x, perplexity=10))
    near = torch.cdist(y, y).fill_diagonal_(torch.inf).argmin(dim=1)
    assert (label[near] == label).float().mean() > 0.95
    for n in (2, 3, 5):
        assert features.tsne(x[:n], steps=20).isfinite().all()


def test_map(run, images, here):
    """A picture with both classes' colours, never overwritten; and one without labels."""
    take(run, "--map")
    with Image.open(run / "map.png") as picture:
        assert picture.size == (880, 720) and len(picture.getcolors(10**6)) > 3
        seen = {colour for _, colour in picture.getcolors(10**6)}
    assert {(156, 22, 22), (77, 230, 230)} <= seen
    before = contents(run)
    take(run, "--map")
    assert contents(run) == before
    (run / "map.png").write_bytes(b"mine")
    take(run, "--map")
    assert (run / "map.png").read_bytes() == b"mine" and (run / "map-2.png").read_bytes() == before["map.png"]
    take(run, "--map", "--data-dir", images / "train" / "red")
    assert (run / "map-folder.png").exists()


def test_a_map_of_one_image(run, images, here):
    (here / "one").mkdir()
    shutil.copy(next((images / "train" / "red").iterdir()), here / "one")
    with pytest.raises(Refusal, match="--map needs at least two images"):
        take(run, "--map", "--data-dir", here / "one")


def test_neighbours_of_ones_own_images(run, images, capsys):
    """A training image is nearest to itself; the names are printed, nearest first, as the loops have them."""
    own = [str(images / "train" / "red" / "3.png"), str(images / "test" / "blue" / "1.png")]
    take(run, "--neighbours", *own)
    lines = capsys.readouterr().out.splitlines()
    settings, encoder = runs.load_encoder(run, CPU)
    names = sorted(map(str, (images / "train").glob("*/*.png")))
    with torch.no_grad():
        pixels = [torch.stack([to_pixels(Image.open(name), settings.image_size) for name in paths])
                  for paths in (names, own)]
        x, q = (torch.nn.functional.normalize(encoder(part / 255), dim=1) for part in pixels)
    for i, path in enumerate(own):
        assert lines[8 * i] == path
        found = [names.index(line.strip()) for line in lines[8 * i + 1 : 8 * i + 8]]
        cosine = q[i] @ x.T
        assert torch.allclose(cosine[found], cosine.sort(descending=True).values[:7], atol=1e-5)
    assert lines[1].strip() == own[0]
    with Image.open(run / "nearest.png") as picture:
        assert picture.size == (8 * 66 + 2, 2 * 66 + 2)
    before = contents(run)
    take(run, "--neighbours", own[1])
    assert before.items() <= contents(run).items() and (run / "nearest-2.png").exists()
    with pytest.raises(Refusal, match="--neighbours: 'nowhere.png' is not a file"):
        take(run, "--neighbours", "nowhere.png")


# ---- in one's own code


def test_load(script, finished):
    """One line: an encoder in eval mode that knows its images' size, and leaves the caller's random numbers alone."""
    folder, expected = finished(script).folder, torch.random.get_rng_state()
    encoder = common.evaluation.load(folder)
    assert torch.equal(torch.random.get_rng_state(), expected) and not encoder.training and encoder.image_size == 8
    x = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        h = encoder(x)
        assert h.ndim == 2 and len(h) == 5
        assert torch.equal(h, runs.load_encoder(folder, CPU)[1](x))
    with pytest.raises(Refusal, match="nowhere"):
        common.evaluation.load("nowhere")


EDIT = '''    encoder = torchvision.models.mobilenet_v3_small()
    encoder.classifier, encoder.feature_dim = nn.Identity(), 576
    return encoder
'''


def test_a_backbone_of_ones_own(tiny, images, tmp_path, good):
    """README's edit in a copy of simclr.py: torchvision's MobileNet trains, is judged, fine-tuned and loaded."""
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "simclr.py").read_text()
    for old, new in (("    return getattr(resnet, args.arch)(args.stem, args.width)\n", EDIT),
                     ("import torch\n", "import torch\nimport torchvision\n")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "mine.py").write_text(text)
    readme = (ROOT / "README.md").read_text()
    assert all(line.strip() in readme for line in EDIT.splitlines())

    good(["mine.py", *tiny("simclr", "--image-size", 16, "--epochs", 1, "--batch-size", 40, "--out", "run")], tmp_path)
    flags = ["run", "--finetune", "--epochs", 1, "--frozen-stages", 1, "--device", "cpu", "--amp", "off"]
    out = good(["-c", f"import common.evaluation, torch; from common.evaluation.__main__ import main; main({flags}); "
                "print(*common.evaluation.load('run')(torch.rand(2, 3, 16, 16)).shape)"], tmp_path)
    assert "mine  " in out and "1 of 3 stages frozen" in out and out.endswith("2 576\n")


# ---- devices


def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "empty", lambda *size, device: taken.append(device.type))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.0"))   # MPS is for this and newer
    for cuda in (True, False):
        for mps in (True, False):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
            monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
            cli.pick_device("auto")
    assert taken == ["cuda", "cuda", "mps", "cpu"] and cli.pick_amp("auto", torch.device("mps")) is None


def test_too_little_memory_of_an_apple_gpu(monkeypatch, capsys):
    def main():
        raise RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1.2 GB)")
    monkeypatch.setattr(cli, "limit_memory", lambda: 3e9)
    with pytest.raises(SystemExit):
        cli.program(main)
    err = capsys.readouterr().err
    assert "the GPU is out of memory: lower --batch-size" in err and err.count("\n") == 1


# ---- lines of progress


def test_counted(monkeypatch, capsys):
    """The same things; a line after ten seconds, then each minute, and none of what is quicker."""
    clock = [0.0]
    monkeypatch.setattr(linear_probe.time, "perf_counter", lambda: clock[0])

    def things(n, seconds):
        for i in range(n):
            clock[0] += seconds
            yield i
    assert list(linear_probe.counted(things(9, 1), 9, "steps")) == list(range(9)) and capsys.readouterr().out == ""
    assert list(linear_probe.counted(things(100, 3), 100, "steps")) == list(range(100))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].startswith("steps: 3 of 100, ") and all("s left" in line for line in lines)


@pytest.mark.parametrize("said, long", [
    ("evaluations of the loss in one fit", lambda images: linear_probe.fit(
        torch.randn(50, 8), torch.arange(50) % 5, 5, 1e-5)),
    ("images for the whitened pixels", linear_probe.WhitenedPixels),
    ("images decoded", lambda images: Images(Decoder([Image.new("RGB", (4, 4))] * 1000, 4), None, CPU, 0, True)),
])
def test_within_one_long_fit(monkeypatch, capsys, said, long):
    """Where there is only one thing to wait for."""
    ticks = itertools.count()
    monkeypatch.setattr(linear_probe.time, "perf_counter", lambda: 100.0 * next(ticks))
    long(Images(torch.randint(256, (2000, 3, 4, 4), dtype=torch.uint8), None, CPU, workers=0, in_memory=True))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1 and all(said in line and line.endswith(" s left") for line in lines)


def test_every_file_says_its_licence():
    for place in (".", "common", "common/evaluation", "tests"):
        for path in (ROOT / place).glob("*.py"):
            assert path.read_text().startswith("# SPDX-License-Identifier: MIT\n"), path
