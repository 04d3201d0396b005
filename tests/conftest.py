# SPDX-License-Identifier: MIT
"""One thread everywhere, and what the tests of whole runs share: tiny images, tiny settings, a finished run."""
import contextlib
import functools
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from parallel import pytest_runtestloop                                       # a hook
from programs import Program

ROOT = Path(__file__).parent.parent
TINY = {"simclr": "--image-size 8 --width 4 --blur 0.5 --stem cifar",
        "moco": "--image-size 8 --width 4 --blur 0.5 --stem cifar --negatives 10 --bn-groups 2",
        "cmc": "--image-size 8 --width 4 --stem cifar --negatives 12",
        "cpc": "--image-size 8 --patch 4 --stride 2 --steps 2 --width 4 --context-width 8 --stem cifar --arch resnet18",
        "dim": "--image-size 8 --width 4 --units 8 --arch conv",
        "gcrl": "--image-size 8 --width 8 --heads 2 --encoder-layers 1 --decoder-layers 1 --colours 4"}
os.environ["OMP_NUM_THREADS"] = "1"                                           # of the processes that tests start
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    """Warnings are errors, but for those that we cannot help."""
    for line in ("error",
                 "ignore:Python 3.14 will, by default, filter extracted tar:DeprecationWarning",         # torchvision
                 "ignore:You are using `torch.load`:FutureWarning:torch.storage"):                       # torch 2.4
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def short_probes():
    """In whole runs the baselines and probes would take most of the time; tests/test_linear_probe.py has them as they
    are."""
    from common import linear_probe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_probe, "L2", (1e-2,))
        patch.setattr(linear_probe.WhitenedPixels.__init__, "__defaults__", (256, 8))
        patch.setitem(linear_probe.MEASURES, "mlp", functools.partial(linear_probe.mlp, steps=3))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_power_cuts():
    """Waiting for the disk takes long on some machines, and what a kill leaves does not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """40 training and 10 test images in two classes, one redder than the other: a folder for --data-dir."""
    return make_images(tmp_path_factory.mktemp("images"))


def make_images(root):
    rng = np.random.default_rng(0)
    for part, n in (("train", 20), ("test", 5)):
        for label, name in enumerate(("blue", "red")):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 128, (8, 8, 3), dtype=np.uint8)
                pixels[..., 0] += np.uint8(100 * label)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(params=["simclr", "moco", "cmc", "cpc", "dim", "gcrl"], scope="session")
def script(request):
    """The module of each script in turn."""
    return importlib.import_module(request.param)


@pytest.fixture(params=["simclr", "gcrl"], scope="session")
def either(request):
    """Two scripts in turn, where what is tested is common/ and two are enough."""
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def tiny(images):
    """tiny(script or its name, *more flags): the arguments of a run of two epochs of five steps."""
    def argv(script, *more):
        name = getattr(script, "__name__", script)
        flags = re.sub("--negatives 1[02]", "", TINY[name]) if "end-to-end" in more else TINY[name]
        return [*f"--dataset folder --data-dir {images} --batch-size 8 --epochs 2 --workers 0 --device cpu --amp off "
                f"--knn-every 1 {flags}".split(), *map(str, more)]
    return argv


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """finished(script or its name): an uninterrupted run of the tiny settings, made once and only to be read.

    folder, metrics, stdout, and model: the trained model's state after the evaluation.
    """
    @functools.cache
    def run(name):
        script, folder, stdout, found = importlib.import_module(name), tmp_path_factory.mktemp(name), io.StringIO(), {}
        finish = script.Run.finish

        def wrapped(self, *args, **kwargs):
            found["model"] = self.tracked["model"]
            return finish(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
            patch.setattr(script.Run, "finish", wrapped)
            metrics = script.main(tiny(script, "--out", folder))
        found["model"] = found["model"].state_dict()                          # after the evaluation
        return SimpleNamespace(folder=folder, metrics=metrics, stdout=stdout.getvalue(), **found)
    return lambda script: run(getattr(script, "__name__", script))


@pytest.fixture(autouse=True, scope="module")
def background(request, tmp_path_factory, tiny):
    """(folder, process): the program that tests of a module wait for runs from the module's first test on. The module
    starts it by start(folder, tiny)."""
    if not any("ended" in item.fixturenames for item in request.session.items if item.path == request.path):
        yield None
        return
    folder = tmp_path_factory.mktemp("background")
    process = request.module.start(folder, tiny)
    yield folder, process
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def ended():
    """ended(folder, process): the folder, when the process with its output there has come to a good end."""
    def wait(folder, process):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=300)
        if process.poll() != 0:
            words = "\n".join((folder / "output").read_text().splitlines()[-50:])
            pytest.fail(f"the program ended with {process.poll()}:\n{words}", pytrace=False)
        return folder
    return wait


@pytest.fixture
def good(tmp_path):
    """good(words, folder): what `python WORDS` prints in the folder, which has to come to a good end."""
    output = tmp_path / "stdout", tmp_path / "stderr"

    def run(words, folder):
        program = Program(words, folder, *output)
        try:
            assert program.wait(120) == 0, output[1].read_text()
        finally:
            program.kill()
        return output[0].read_text()
    return run


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, where a run without --out makes runs/."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture(scope="session")
def same():
    """same(a, b): whether nested dicts and lists of tensors and values are equal, tensors bit for bit."""
    def equal(a, b):
        if torch.is_tensor(a):
            return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b
    return equal


@pytest.fixture(scope="session")
def content():
    """content(folder): what a run's folder says, without the times: checkpoint, log and result."""
    times = {"seconds", "peak_memory"}

    def read(folder):
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        checkpoint["progress"].pop("seconds")
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        result = json.loads((folder / "result.json").read_text()) if (folder / "result.json").exists() else None
        for entry in (*checkpoint["history"], *log, result or {}):
            for time in times & entry.keys():
                del entry[time]
        return {"checkpoint": checkpoint, "log": log, "result": result}
    return read
