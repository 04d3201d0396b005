# SPDX-License-Identifier: MIT
"""What is seen while a script trains: kNN beside its floors, the curve, and an encoder that is there before the end."""
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import simclr
from common import data, linear_probe, pictures
from common.evaluation import __main__ as evaluate
from common.progress import Monitor
from programs import Program

ROOT = Path(__file__).parent.parent


def read_log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def test_weights_with_and_without(script, tiny, finished, here, same):
    """Judged after each epoch or after the last alone: the same weights, optimiser, random numbers and log, bit for
    bit."""
    script.main(tiny(script, "--knn-every", 1000, "--out", "run"))
    often, rare = (torch.load(folder / "checkpoint.pt", weights_only=True)
                   for folder in (finished(script).folder, here / "run"))
    assert all(same(often[name], rare[name]) for name in ("model", "optimizer", "scaler", "rng"))
    log, rare_log = read_log(finished(script).folder), read_log("run")
    assert ["knn" in entry for entry in log] == [True, True] and ["knn" in entry for entry in rare_log] == [False, True]
    for entry, other in zip(log, rare_log):
        assert all(other[key] == entry[key] for key in other if key != "seconds")


def test_knn_and_floors_are_those_of_the_table(script, finished):
    """Where it looks at all images, as here, the last epoch's line has the kNN of the table."""
    run = finished(script)
    knn = run.metrics["knn"]
    assert read_log(run.folder)[-1]["knn"] == knn["trained"]
    assert (f"kNN {100 * knn['trained']:.1f} % (pixels {100 * knn['pixels']:.1f}, untrained "
            f"{100 * knn['untrained']:.1f})  ") in [line for line in run.stdout.splitlines() if "epoch 2/2" in line][0]


def test_every_third_epoch_and_the_last(tiny, here):
    simclr.main(tiny(simclr, "--epochs", 7, "--knn-every", 3, "--out", "run"))
    assert [entry["epoch"] for entry in read_log("run") if "knn" in entry] == [3, 6, 7]


@pytest.mark.parametrize("cost, epoch", [(0.1, 1.0), (1.0, 5.0), (0.01, 60.0), (30.0, 7.0)])
def test_it_takes_a_twentieth_of_the_time(cost, epoch, monkeypatch):
    """After the first look, which tells how long one takes, training has taken 19 times as long or more whenever it
    looks again; and it looks as often as that allows."""
    images = data.Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4), torch.device("cpu"), 0, True)
    monitor, looks, clock = Monitor(data.Data(images, images, images, images, ()), {}, None), [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr("common.progress.WhitenedPixels", lambda *_: None)
    monitor.encoders.update(untrained=None, trained=None)

    def features(encoder, *_, index):
        clock[0] += cost / 2                                                  # labelled images, test images
        return torch.eye(4)
    monkeypatch.setattr("common.progress.features", features)
    for i in range(1, 1001):
        if monitor.due(i, i * epoch):
            monitor.judge()
            looks.append(i)
            assert len(looks) == 1 or monitor.seconds <= 0.05 * i * epoch + 1e-6
    assert looks[0] == 1 and monitor.seconds == pytest.approx(cost * (len(looks) + 2))        # two floors
    assert monitor.seconds > 0.05 * 1000 * epoch - 2 * cost - 0.05 * epoch or looks[-1] == 1000


def test_images_without_labels(tiny, images, here):
    """No kNN in the log, and the curve has the loss alone."""
    simclr.main(tiny(simclr, "--data-dir", images / "train" / "red", "--out", "run"))
    assert all(entry.keys() == {"epoch", "loss", "feature_std", "lr", "seconds"} for entry in read_log("run"))
    with Image.open("run/curve.png") as image:
        assert image.size == (640, 240)
    assert json.loads(Path("run/result.json").read_text())["rankme"].keys() == {"untrained", "trained", "projection"}


# ---- curves


BLUE, RED = (65, 105, 225), (178, 34, 34)


def where(image, colour):
    return np.argwhere((np.asarray(image) == colour).all(axis=-1))            # (N, 2), row and column


def test_plot(here):
    """A level is drawn at the height of the point of its value, over the whole width; panels stand below each other."""
    pictures.plot("a.png", ("loss", [(0, 3.0), (4, 5.0)], {"chance": 4.0}))
    pictures.plot("b.png", *[("loss", [(0, 3.0), (4, 5.0)], {"chance": 4.0})] * 3)
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert b.size == (a.width, 3 * a.height)
        rows, columns = np.unique(where(a, RED)[:, 0], return_counts=True)
        level = rows[columns.argmax()]
        line = where(a, BLUE)
        line = line[line[:, 1] < a.width - 180]                               # without its label
        middle = line[abs(line[:, 1] - (line[:, 1].min() + line[:, 1].max()) / 2) < 1, 0].mean()
        assert abs(level - middle) <= 1.5 and columns.max() > 150
        assert line[line[:, 1].argmin(), 0] > level > line[line[:, 1].argmax(), 0]            # up is more
        assert len(where(b, RED)) == 3 * len(where(a, RED))


@pytest.mark.parametrize("points", [[(1, 2.0)], [(1, 0.0), (2, 0.0)], [(1, -3.0), (2, -3.0)], [(1, 1e-9), (200, 1e9)]])
def test_plot_of_little(points, here):
    """One epoch, a loss that does not move, one of any size: still a picture."""
    pictures.plot("a.png", ("loss", points, {}))
    with Image.open("a.png") as image:
        assert len(where(image, BLUE)) > 5


@pytest.mark.parametrize("low, high", [(0, 1), (3.5, 5.54), (-1.3, -0.2), (0.0, 42.9), (2, 2), (0, 0), (1e-7, 3e-7)])
def test_ticks(low, high):
    """Equal steps of 1, 2 or 5 times a power of ten, not too many, from below the values to above them."""
    found = pictures.ticks(low, high)
    steps = np.diff(found)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(found) <= 8
    assert np.allclose(steps, steps[0]) and round(10 ** (math.log10(steps[0]) % 1), 6) in (1, 2, 5, 10)


# ---- an encoder before the end


def test_killed_and_judged(tiny, here, images):
    """A run that is killed with -9 in its training is judged as it was at its last checkpoint."""
    argv = tiny(simclr, "--epochs", 10000, "--out", "run")
    process = Program([ROOT / "simclr.py", *argv], here, os.devnull)
    try:
        deadline = time.monotonic() + 60
        while not Path("run/encoder.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert not Path("run/result.json").exists()
    result = evaluate.main(["run", "--device", "cpu", "--amp", "off", "--workers", 0])
    assert result["knn"].keys() == {"pixels", "untrained", "trained"}
    encoder = simclr.build_encoder(simclr.arguments(argv))
    encoder.load_state_dict(torch.load("run/encoder.pt", weights_only=True))


def test_every_checkpoint_has_its_encoder(script, tiny, here, monkeypatch):
    """After each save encoder.pt holds those weights that checkpoint.pt has."""
    save, seen = script.Run.save, []

    def checked(self, *args):
        save(self, *args)
        state = torch.load(self.folder / "encoder.pt", weights_only=True)
        model = torch.load(self.folder / "checkpoint.pt", weights_only=True)["model"]
        prefix = {"moco": "query.encoder.", "gcrl": ""}.get(script.__name__, "encoder.")
        seen.append(all(torch.equal(value, model[prefix + key]) for key, value in state.items()))
    monkeypatch.setattr(script.Run, "save", checked)
    script.main(tiny(script, "--out", "run"))
    assert seen == [True, True]


def test_resumed_at_its_end(either, finished, here):
    """A finished run that lost its encoder.pt gets it back, and the same results, from --resume."""
    shutil.copytree(finished(either).folder, "run")
    before = Path("run/encoder.pt").read_bytes()
    Path("run/encoder.pt").unlink()
    metrics = either.main(["--resume", "run"])
    assert len(Path("run/encoder.pt").read_bytes()) == len(before)
    assert metrics["knn"] == finished(either).metrics["knn"] and metrics["rankme"] == finished(either).metrics["rankme"]


# ---- measures without labels


def unit(x):
    return [row / np.linalg.norm(row) for row in x.double().numpy()]


def test_alignment_is_the_loops():
    """The mean of |f(x) - f(y)|^2 over the pairs of views."""
    a, b = torch.randn(2, 30, 7, generator=torch.Generator().manual_seed(0))
    expected = sum(sum((p - q) ** 2 for p, q in zip(u, v)) for u, v in zip(unit(a), unit(3 * b))) / 30
    assert linear_probe.alignment(5 * a, b).item() == pytest.approx(expected, rel=1e-5)
    assert linear_probe.alignment(a, 2 * a).item() == pytest.approx(0, abs=1e-6)
    assert linear_probe.alignment(a, -a).item() == pytest.approx(4)


def test_uniformity_is_the_loops():
    """log of the mean of e^(-2 |f(x) - f(y)|^2) over the pairs of different images."""
    h = torch.randn(25, 6, generator=torch.Generator().manual_seed(0)) + 1
    u, total = unit(h), 0.0
    for i in range(25):
        for j in range(25):
            if i != j:
                total += math.exp(-2 * sum((p - q) ** 2 for p, q in zip(u[i], u[j])))
    assert linear_probe.uniformity(7 * h).item() == pytest.approx(math.log(total / (25 * 24)), rel=1e-4)
    assert linear_probe.uniformity(torch.ones(9, 4)).item() == pytest.approx(0, abs=1e-5)
    assert linear_probe.uniformity(torch.ones(1, 4)).item() == 0              # one image is one point
    assert linear_probe.uniformity(torch.zeros(9, 4)).item() == 0
    sphere = torch.randn(3000, 400, generator=torch.Generator().manual_seed(0))
    assert linear_probe.uniformity(sphere).item() == pytest.approx(-4, abs=0.05)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)])
def test_rankme_is_the_entropy_of_the_singular_values(shape):
    """exp(-sum p log p), p the singular values over their sum, here as roots of the eigenvalues of Z Z^T."""
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, shape[1]) + 0.3
    matrix = z.double().numpy()
    gram = matrix.T @ matrix if shape[0] > shape[1] else matrix @ matrix.T
    sigma = np.sqrt(np.linalg.eigvalsh(gram).clip(0))
    p = [s / sigma.sum() for s in sigma]
    expected = math.exp(-sum(q * math.log(q) for q in p if q > 0))
    assert linear_probe.rankme(z).item() == pytest.approx(expected, rel=1e-3)
    assert linear_probe.rankme(torch.eye(8)).item() == pytest.approx(8, rel=1e-4)
    for collapsed in (torch.ones(9, 4), torch.zeros(9, 4)):
        assert linear_probe.rankme(collapsed).item() == pytest.approx(1, abs=1e-3)
    assert math.isnan(linear_probe.rankme(torch.tensor([[math.inf, 0.0], [0.0, 1.0]])))


def test_the_views_are_two_corners():
    """Of 8 x 8 images the first and the last 6 x 6 pixels, enlarged; measured for all rows but the pixels."""
    pixels = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = data.Images(pixels, None, torch.device("cpu"), 0, True)
    found = linear_probe.on_the_sphere(images, {"pixels": None, "trained": torch.nn.Flatten()},
                                       torch.autocast("cpu", enabled=False))
    views = [torch.nn.functional.interpolate(pixels[:, :, rows, rows] / 255, size=8, mode="bilinear").flatten(1)
             for rows in (slice(0, 6), slice(2, 8))]
    flat = (pixels / 255).flatten(1)
    for name, value in (("alignment", linear_probe.alignment(*views)), ("uniformity", linear_probe.uniformity(flat)),
                        ("rankme", linear_probe.rankme(flat)), ("feature_std", linear_probe.feature_std(flat))):
        assert found[name] == {"trained": pytest.approx(value.item(), rel=1e-4)}, name
