# SPDX-License-Identifier: MIT
"""What others bring: odd images and folders, damaged runs, full disks and kills. tests/fuzz.py has the long sweeps."""
import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import warnings
import zipfile
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
from PIL import Image

import gcrl
import simclr
from common import Refusal, cli, linear_probe, shown
from common.data import image_files, load
from common.evaluation import __main__ as evaluate
from common.evaluation import runs
from common.run import Run, read_tensors

CPU, ROOT = torch.device("cpu"), Path(__file__).parent.parent


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def fill(folder, n=6, side=16, **more):
    """n images in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(pixels(side, side, 3, seed=i)).save(folder / f"{i}.png")
    return folder


def open_folder(root, cache_gb=1.0, size=16, store_size=None, workers=0):
    return load("folder", root, size, CPU, workers, cache_gb, store_size=store_size)


def refusal(call, *args, **kwargs):
    with pytest.raises(Refusal) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- folders


def test_a_link_to_the_parent_is_no_loop(tmp_path):
    """20 images are 20, with links to the folder, its parent and grandparent, with and without classes."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            fill(tmp_path / part / name, 5)
            (tmp_path / part / name / "up").symlink_to("..")
        (tmp_path / part / "itself").symlink_to(".")
        (tmp_path / part / "root").symlink_to(tmp_path)
    assert len(image_files(tmp_path)) == 20 and len(image_files(tmp_path / "train")) == 10
    data = open_folder(tmp_path)
    assert data.classes == ("cat", "dog") and data.train.labels.tolist() == [0] * 5 + [1] * 5 and len(data.test) == 10
    assert len(open_folder(tmp_path / "train").train) == 10


def test_links_of_links_are_walked_once(tmp_path):
    """Each of 40 folders links twice to the next: 2^40 paths to one image."""
    for i in range(40):
        (tmp_path / str(i)).mkdir()
        for name in "ab":
            (tmp_path / str(i) / name).symlink_to(tmp_path / str(i + 1))
    fill(tmp_path / "40", 1)
    assert image_files(tmp_path / "0") == [str(tmp_path / "0" / "/".join("a" * 40) / "0.png")] or \
        len(image_files(tmp_path / "0")) == 1


def test_a_file_counts_once_and_its_own_name_goes_first(tmp_path):
    fill(tmp_path / "b", 2)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link.png").symlink_to(tmp_path / "b" / "0.png")
    (tmp_path / "a" / "folder").symlink_to(tmp_path / "b")
    (tmp_path / "elsewhere.png").symlink_to(fill(tmp_path.parent / f"{tmp_path.name}-other", 1) / "0.png")
    assert image_files(tmp_path) == [str(tmp_path / name) for name in ("b/0.png", "b/1.png", "elsewhere.png")]


def test_pipes_and_devices_are_no_images(tmp_path):
    fill(tmp_path, 2)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    assert len(open_folder(tmp_path).train) == 2


def test_a_broken_link_is_refused(tmp_path):
    """It is an image that somebody lacks (git-annex), or one that is a link to itself."""
    fill(tmp_path, 2)
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "self.png").symlink_to("self.png")
    text = refusal(open_folder, tmp_path)
    assert text.startswith(f"{tmp_path}/gone.png cannot be read") and "nor can 1 more" in text


@pytest.mark.parametrize("store_size, cache_gb, workers", [(None, 1.0, 0), (32, 1.0, 2), (32, 0.0, 0)])
def test_a_thousand_broken_ones_are_one_sentence(tmp_path, store_size, cache_gb, workers):
    fill(tmp_path / "good", 300)
    for i in range(1000):
        (tmp_path / f"{i:04}.jpg").write_bytes(b"\xff\xd8 none" if i % 2 else b"")
    text = refusal(open_folder, tmp_path, cache_gb, store_size=store_size, workers=workers)
    assert text.startswith(f"{tmp_path}/0000.jpg cannot be read as an image") and "nor can 999 more" in text


def test_vanished_while_training(tmp_path):
    """Streamed images are read again in each epoch. Training ends at the first batch in which some are gone."""
    images = open_folder(fill(tmp_path, 20), cache_gb=0.0).train
    batches = images.batches(torch.arange(20).split(5))
    next(batches)
    for i in (18, 19, 7):                                                     # in the order of names: places 10, 11, 17
        (tmp_path / f"{i}.png").unlink()
    text = refusal(list, batches)
    assert text.startswith(f"{tmp_path}/18.png cannot be read") and "No such file" in text and "nor can 1 more" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another")
def test_unreadable_by_permission(tmp_path):
    """A file, and a folder, of another user: named, not left out in silence."""
    for place in (fill(tmp_path, 3), *(parent for parent in tmp_path.parents if "pytest" in str(parent))):
        os.chmod(place, 0o755)
    os.chmod(tmp_path / "1.png", 0)
    os.chmod(fill(tmp_path / "closed", 1), 0)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match="closed"):
            open_folder(tmp_path)
        os.seteuid(0)
        os.chmod(tmp_path / "closed", 0o755)
        os.seteuid(65534)
        assert "1.png cannot be read as an image ([Errno 13] Permission denied" in refusal(open_folder, tmp_path)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", [b"new\nline.png", b"odd\xff\xfe.png", b"\x1b[2Jclear.png", "日本.png".encode()])
def test_odd_names(tmp_path, name):
    """They are read, and in a sentence nothing of them breaks the line or commands the terminal."""
    fill(tmp_path, 1)
    path = os.path.join(os.fsencode(tmp_path), name)
    os.rename(tmp_path / "0.png", path)
    assert len(open_folder(tmp_path, cache_gb=0.0, store_size=32).train) == 1
    with open(path, "wb"):
        pass
    text = refusal(open_folder, tmp_path)
    assert text.isprintable() and text.encode() and text.isprintable()
    assert shown(os.fsdecode(name)) in text


# ---- images


def odd_images():
    """{name: (image, options of save)}."""
    noise, exif = Image.fromarray(pixels(40, 60, 3)), Image.Exif()
    exif[0x0112] = 6
    palette, deep = noise.quantize(8), Image.fromarray(pixels(40, 60).astype(np.uint16) * 257)
    first, *rest = (Image.fromarray(pixels(20, 20, 3, seed=i)) for i in range(3))
    frames = dict(save_all=True, append_images=rest)
    row, column = (Image.fromarray(pixels(*shape)) for shape in ((1, 4000, 3), (4000, 1, 3)))
    return {"row.png": (row, {}), "column.png": (column, {}),
            "16bit.png": (deep, {}), "16bit.tif": (deep, {}), "one.png": (Image.fromarray(pixels(1, 1, 3)), {}),
            "cmyk.jpg": (noise.convert("CMYK"), {}), "cmyk.tif": (noise.convert("CMYK"), {}),
            "palette.png": (palette, dict(transparency=3)), "bits.png": (noise.convert("1"), {}),
            "palettes.png": (palette, dict(transparency=bytes(range(0, 80, 10)))),
            "alpha.webp": (noise.convert("RGBA"), {}), "animated.png": (first, frames), "pages.tif": (first, frames),
            "animated.webp": (first, dict(lossless=True, **frames)), "turned.jpg": (noise, dict(exif=exif)),
            "turned.png": (noise, dict(exif=exif)),
            "damaged-exif.jpg": (noise, dict(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff"))}


@pytest.mark.parametrize("name", odd_images())
def test_odd_images_are_read(tmp_path, name):
    """Without a warning: pixels (3, 16, 16) that are not all alike; of several images in a file, the first."""
    image, options = odd_images()[name]
    image.save(tmp_path / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = open_folder(tmp_path, store_size=32)
    x = data.centred.at(torch.tensor([0]))
    assert x.shape == (1, 3, 16, 16) and (x.float().std() > 0 or name == "one.png")
    if image.size == (20, 20):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        image.save(tmp_path / "first.png")
        assert torch.equal(open_folder(tmp_path).centred.at(torch.tensor([0])), x)


def test_a_strip_takes_no_memory(tmp_path):
    """1 x 60,000 pixels, resized to 224 and then cropped, would take 9 GB."""
    Image.fromarray(pixels(1, 60000, 3)).save(tmp_path / "strip.png")
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert open_folder(tmp_path, size=224).train.shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200e3 and time.perf_counter() - begin < 5


@pytest.mark.parametrize("damage", ["truncated", "empty", "bomb", "text"])
def test_broken_images_are_refused(tmp_path, damage):
    path = fill(tmp_path, 3) / "1.png"
    if damage == "bomb":                                                      # 100,000 x 100,000 pixels in 100 kB
        header = path.read_bytes()
        import struct
        import zlib
        chunk = b"IHDR" + struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0)
        path.write_bytes(header[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + header[33:])
    else:
        path.write_bytes({"truncated": path.read_bytes()[:300], "empty": b"", "text": b"<html>"}[damage])
    for store_size in (None, 32):
        assert refusal(open_folder, tmp_path, store_size=store_size).startswith(f"{path} cannot be read as an image (")


# ---- a run's folder


@pytest.fixture
def run(either, finished, here):
    return Path(shutil.copytree(finished(either).folder, here / "run"))


def test_flipped_bits_are_noticed(run, either):
    """torch.load looks at no checksum: weights with a flipped bit would be taken."""
    for name, call in (("checkpoint.pt", lambda: either.main(["--resume", run])),
                       ("encoder.pt", lambda: evaluate.main([run, "--device", "cpu"]))):
        data = bytearray((run / name).read_bytes())
        part = max(zipfile.ZipFile(run / name).infolist(), key=lambda part: part.file_size)
        data[part.header_offset + part.file_size // 2] ^= 1
        (run / name).write_bytes(data)
        assert f"{part.filename} in it is damaged" in refusal(call)


def test_a_file_that_unpacks_to_more_is_refused(tmp_path):
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, \
            zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for part in good.infolist():
            bomb.writestr(part.filename, good.read(part))
    assert read_tensors(tmp_path / "good.pt")["x"].shape == (10**6,)
    with pytest.raises(ValueError, match="unpack to more"):
        read_tensors(tmp_path / "bomb.pt")


@pytest.mark.parametrize("width", [3000, 10**9])
def test_an_enormous_model_is_refused_before_it_takes_memory(run, either, width):
    """Settings that no weights of the folder fit."""
    told = json.loads((run / "args.json").read_text())
    told["settings"]["width"] = 2 * width                                     # GCRL's heads divide it
    (run / "args.json").write_text(json.dumps(told))
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert "encoder.pt is not of that run's model" in refusal(runs.load_encoder, run, CPU)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200e3 and time.perf_counter() - begin < 5


@pytest.mark.parametrize("name, value", [
    ("width", "4"), ("width", True), ("width", None), ("width", [4]), ("width", 4.5), ("width", -4), ("width", 10**30),
    ("lr", "nan"), ("lr", float("nan")), ("lr", float("inf")), ("dataset", "mnist"), ("dataset", 3), ("seed", {}),
    ("data_dir", "a\0b"), ("data_dir", "\ud800"), ("data_dir", "a" * 10**5), ("data_dir", ["a", "--seed=1"]),
    ("out", 3), ("unknown", 1), ("x=1 --seed", 2), ("small", 1), ("workers", 10**6)])
def test_settings_that_no_command_line_gives(run, either, name, value):
    told = json.loads((run / "args.json").read_text())
    told["settings"][name] = value
    (run / "args.json").write_text(json.dumps(told))
    calls = [lambda: either.main(["--resume", run]), lambda: evaluate.main([run])]
    for call in calls + [lambda: gcrl.main(["--sample", run])] * (either is gcrl):
        text = refusal(call)
        assert "run/args.json is damaged or of another version" in text and len(text) < 600


def test_settings_of_an_older_version(run, either):
    """A flag that is newer than the run is at its default."""
    told = json.loads((run / "args.json").read_text())
    before, _ = runs.load_encoder(run, CPU)
    del told["settings"]["compile"]
    (run / "args.json").write_text(json.dumps(told))
    assert vars(runs.load_encoder(run, CPU)[0]) == vars(before)


def test_ten_gigabytes(run, either):
    """Of holes, as any file in the folder: refused, and no memory taken."""
    for name, call in (("args.json", lambda: either.main(["--resume", run])),
                       ("evaluation.json", lambda: evaluate.main([run, "--device", "cpu"])),
                       ("checkpoint.pt", lambda: either.main(["--resume", run])),
                       ("encoder.pt", lambda: evaluate.main([run, "--device", "cpu"]))):
        kept = (run / name).read_bytes() if (run / name).exists() else b"{}"
        (run / name).write_bytes(kept)
        os.truncate(run / name, 10**10)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert name in refusal(call) and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100e3
        (run / name).write_bytes(kept)


def test_checkpoints_that_training_would_stumble_on(run, either):
    """Values of other types and shapes where only a later step would meet them."""
    good = torch.load(run / "checkpoint.pt", weights_only=True)

    def moments(state):
        return next(iter(state["optimizer"]["state"].values()))

    for damage in (
            lambda s: s.update(epoch="1"), lambda s: s.update(epoch=-1), lambda s: s.update(step=True),
            lambda s: s.update(history=[{}]), lambda s: s.update(history=[{"seconds": float("nan")}]),
            lambda s: s["history"][0].update(loss=torch.zeros(2)), lambda s: s["progress"].update(sums=["a"]),
            lambda s: s["progress"].update(seconds=float("inf")), lambda s: moments(s).clear(),
            lambda s: moments(s).update({key: torch.zeros(7) for key in moments(s)}),
            lambda s: s["optimizer"]["param_groups"][0].update(weight_decay="x"),
            lambda s: s["rng"].update(generator=torch.zeros(3)), lambda s: s.pop("scaler", s.pop("rng"))):
        state = torch.load(run / "checkpoint.pt", weights_only=True)
        damage(state)
        torch.save(state, run / "checkpoint.pt")
        before = (run / "checkpoint.pt").read_bytes()
        assert "checkpoint.pt is not a valid checkpoint" in refusal(either.main, ["--resume", run])
        assert (run / "checkpoint.pt").read_bytes() == before
        torch.save(good, run / "checkpoint.pt")


@pytest.mark.parametrize("text", [
    "[]", '{"folder": 3}', '{"folder": {"linear": 3}}', "[" * 10**5, '{"folder": []}', "\xff"], ids=range(6))
def test_evaluation_json_of_other_types(finished, here, text):
    run = Path(shutil.copytree(finished(simclr).folder, here / "run"))
    (run / "evaluation.json").write_text(text, encoding="latin-1")
    assert "evaluation.json is damaged" in refusal(evaluate.main, [run, "--device", "cpu"])
    assert (run / "evaluation.json").read_text(encoding="latin-1") == text


def test_fuzz(tmp_path):
    """A share of tests/fuzz.py."""
    assert fuzz.fuzz(16, tmp_path) == []


# ---- disks, signals, kills


def a_run(out=None):
    return Run("simclr.py", {"resume": None, "out": out, "dataset": "shapes", "seed": 0}, CPU)


@pytest.fixture
def as_program(monkeypatch, capsys):
    """as_program(main): (exit status, what is on stderr) of main as a program, in this process."""
    def end(main):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(cli, "limit_memory", lambda: 0.0)
            cli.program(main)
        err = capsys.readouterr().err
        assert err.count("\n") == 1, err
        return stop.value.code, err

    before = signal.getsignal(signal.SIGTERM)
    yield end
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def full_disk(size):
    """A limit on the size of a file stands for a disk that is full. It holds for pytest's own output, too, so that no
    test may end in it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size, named", [(50_000, "a checkpoint could not be written"), (900, "args.json: File too")])
def test_a_disk_that_is_full(tiny, here, size, named, as_program):
    """One sentence, and no half of a file."""
    with full_disk(size):
        status, err = as_program(lambda: simclr.main(tiny(simclr, "--out", "run")))
    assert status == 2 and named in err and {p.name for p in Path("run").iterdir()} <= {"args.json", "log.jsonl",
                                                                                          "curve.png"}


def test_a_full_disk_later_leaves_what_there_is(run, either, as_program):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with full_disk(3000):
        status, err = as_program(lambda: either.main(["--resume", run]))
    assert status == 2 and {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another")
def test_an_out_that_is_read_only(here, as_program):
    for place in (here, *here.parents[:3]):
        os.chmod(place, 0o755)
    os.seteuid(65534)
    try:
        status, err = as_program(a_run("run").make_folder)
    finally:
        os.seteuid(0)
    assert status == 2 and err.endswith(": run: Permission denied\n")


def test_sigterm_during_evaluation(run, either, as_program, monkeypatch):
    """What training saved is kept: a sentence, status 143, and --resume evaluates."""
    (run / "result.json").unlink()
    before = (run / "checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(linear_probe, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        status, err = as_program(lambda: either.main(["--resume", run]))
    assert status == 143 and "interrupted" in err and "--resume" in err
    assert (run / "checkpoint.pt").read_bytes() == before
    assert either.main(["--resume", run])["linear"] and (run / "result.json").exists()


def test_runs_that_start_at_once_have_folders_of_their_own(here):
    from concurrent.futures import ThreadPoolExecutor

    def start(_):
        (run := a_run()).make_folder()
        return run.folder

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(start, range(24)))) == 24
    assert all((folder / "args.json").exists() for folder in (here / "runs").iterdir())


def test_a_clock_that_is_set_takes_no_time():
    """Durations are of a clock that nobody sets."""
    assert not [path for path in [*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py")] if "time.time(" in path.read_text()]


def test_kills(tmp_path):
    """A share of tests/fuzz.py --kill."""
    assert fuzz.kill("simclr", 2, tmp_path) == []
