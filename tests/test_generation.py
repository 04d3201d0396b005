# SPDX-License-Identifier: MIT
"""gcrl.py --sample: what it draws from a saved run, what it leaves alone, and what it refuses."""
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import gcrl
from common import cli, resnet
from common.cli import Refusal
from common.data import to_pixels
from common.evaluation import generation

NAME = "-T1.0-kall-seed0"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the tiny finished run: 8 x 8 images of 4 colours, 10 of them to test on."""
    return shutil.copytree(finished("gcrl").folder, tmp_path / "run")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tiles(path, scale=8, size=8):
    """A saved picture as (rows, columns, size, size, 3) uint8, each pixel once."""
    pixels, cell = np.asarray(Image.open(path)), scale * size + 2             # 2 pixels between the tiles
    rows, columns = (pixels.shape[0] - 2) // cell, (pixels.shape[1] - 2) // cell
    return np.stack([np.stack([pixels[2 + r * cell :, 2 + c * cell :][: cell - 2 : scale, : cell - 2 : scale]
                               for c in range(columns)]) for r in range(rows)])


@pytest.fixture
def photographs(tmp_path):
    """A larger colour image, and a grey one with transparency."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    Image.fromarray(rng.integers(0, 256, (8, 8, 2), dtype=np.uint8), "LA").save(tmp_path / "grey.png")
    return [str(tmp_path / "photo.jpg"), str(tmp_path / "grey.png")]


def test_what_it_writes_and_what_it_leaves(run, capsys):
    """The pictures and distances, printed; of the training run's files not a byte; the defaults are samples.png's."""
    before = contents(run)
    result = gcrl.main(["--sample", run])
    after = contents(run)
    assert {name: after[name] for name in before} == before
    new = {f"samples{NAME}.png", f"neighbours{NAME}.png", f"distances{NAME}.json"}
    assert after.keys() - before.keys() == new
    assert after[f"samples{NAME}.png"] == before["samples.png"]
    assert json.loads(after[f"distances{NAME}.json"]) == result
    assert result["nearest"]["samples"]["mean"] >= result["nearest"]["samples"]["least"] >= 0
    assert result["nearest"].keys() == {"samples", "test"} and "frechet" not in result
    printed = capsys.readouterr().out
    assert all(str(run / name) in printed for name in new) and "nearest training image" in printed


def test_same_settings_same_bytes_and_nothing_is_overwritten(run):
    gcrl.main(["--sample", run, "--samples", 4])
    first = contents(run)
    gcrl.main(["--sample", run, "--samples", 4])
    assert contents(run) == first
    gcrl.main(["--sample", run, "--samples", 2])
    assert first.items() <= contents(run).items()
    new = {f"samples{NAME}-2.png", f"neighbours{NAME}-2.png", f"distances{NAME}-2.json"}
    assert contents(run).keys() - first.keys() == new
    gcrl.main(["--sample", run, "--samples", 2])
    assert contents(run).keys() == first.keys() | new


def test_temperature_top_k_and_seed(run):
    """Each gives other samples, in files that say so; at top-k 1 only the first pixel is drawn."""
    flags = ["--seed 1", "--temperature 0.5", "--top-k 2", "--top-k 1 --temperature 7", "--top-k 1 --seed 5"]
    for flag in flags:
        gcrl.main(["--sample", run, "--samples", 16, *flag.split()])
    names = ["T1.0-kall-seed1", "T0.5-kall-seed0", "T1.0-k2-seed0", "T7.0-k1-seed0", "T1.0-k1-seed5"]
    pictures = [tiles(run / f"samples-{name}.png").reshape(16, 8, 8, 3) for name in names]
    for i, other in enumerate(pictures):
        assert not any(np.array_equal(other, picture) for picture in pictures[:i])
    greedy = [{image[0, 0].tobytes(): image.tobytes() for image in picture} for picture in pictures[3:]]
    assert all(len({image.tobytes() for image in picture}) == len(by_first)
               for picture, by_first in zip(pictures[3:], greedy))
    common = greedy[0].keys() & greedy[1].keys()
    assert common and all(greedy[0][first] == greedy[1][first] for first in common)


def test_completions(run, photographs):
    """A row an image: itself as the data set's would be, its upper half in the palette's colours, six completions."""
    gcrl.main(["--sample", run, "--complete", *photographs])
    rows = tiles(run / f"completions{NAME}.png")
    assert rows.shape == (2, 8, 8, 8, 3)
    palette = torch.load(run / "checkpoint.pt", weights_only=True)["model"]["palette"]
    for path, row in zip(photographs, rows):
        with Image.open(path) as image:
            given = to_pixels(image, 8)
        assert np.array_equal(row[0], given.permute(1, 2, 0))
        seen = gcrl.dequantise(gcrl.quantise(given[None], palette), palette)[0].permute(1, 2, 0)
        assert np.abs(row[1:, :4] / 255 - seen[:4].numpy()).max() <= 0.5 / 255 + 1e-6
        assert (row[1, 4:] == 128).all() and len({image.tobytes() for image in row[2:]}) > 1
    other = contents(run)
    gcrl.main(["--sample", run, "--complete", photographs[1]])
    assert other.items() <= contents(run).items() and (run / f"completions{NAME}-2.png").exists()


def test_neighbours(run, images):
    """Each sample, then seven training images in the palette's colours, nearest first."""
    gcrl.main(["--sample", run, "--samples", 5])
    rows = tiles(run / f"neighbours{NAME}.png").astype(float)
    assert rows.shape == (5, 8, 8, 8, 3)
    assert np.array_equal(rows[:, 0], tiles(run / f"samples{NAME}.png")[0, :5])
    gaps = ((rows[:, 1:] - rows[:, :1]) ** 2).mean(axis=(2, 3, 4)) ** 0.5
    assert (np.diff(gaps, axis=1) >= -0.5).all()
    told = json.loads((run / f"distances{NAME}.json").read_text())["nearest"]["samples"]
    assert gaps[:, 0].mean() == pytest.approx(told["mean"], abs=1)


@pytest.mark.parametrize("judge", ["gcrl", "simclr"])
def test_frechet(run, finished, judge, capsys):
    """By the encoder of any script: of five images each, half of the ten test images."""
    result = gcrl.main(["--sample", run, "--frechet", finished(judge).folder, "--samples", 8])
    frechet = result["frechet"]
    assert frechet["images"] == 5 and frechet.keys() == {"run", "images", "samples", "test", "seen"}
    assert min(frechet["samples"], frechet["test"]) > 0
    if judge == "gcrl":                                                       # it sees the palette's colours anyway
        assert frechet["seen"] == pytest.approx(frechet["test"], rel=1e-4)
    assert "Frechet distance to 5 test images" in capsys.readouterr().out


def test_frechet_of_another_size(run, tiny, here):
    gcrl.main(tiny(gcrl, "--image-size", 12, "--epochs", 1, "--out", "other"))
    assert gcrl.main(["--sample", run, "--frechet", "other", "--samples", 8])["frechet"]["samples"] > 0


def test_samples_need_no_data(run, photographs):
    """With the data set gone there are samples and completions still, then one sentence."""
    with pytest.raises(Refusal, match="nowhere is not a folder: --data-dir names one"):
        gcrl.main(["--sample", run, "--data-dir", "nowhere", "--complete", *photographs])
    assert {f"samples{NAME}.png", f"completions{NAME}.png"} <= contents(run).keys()


def test_the_seed_is_not_the_data_sets(run, monkeypatch):
    """--seed draws other samples, beside the training images of the run's own seed."""
    seeds, load = [], generation.load
    monkeypatch.setattr(generation, "load", lambda *args: seeds.append(args[-1]) or load(*args))
    gcrl.main(["--sample", run, "--samples", 2, "--seed", 9])
    assert seeds == [0]


def test_nothing_of_it_in_a_training_run(finished):
    settings = cli.read_settings(finished("gcrl").folder)[1]
    assert not {"sample", "temperature", "top_k", "samples", "complete", "frechet"} & settings.keys()


# ---- refusals


def refused(argv, monkeypatch, capsys):
    """The one line that ends the program, with exit status 2."""
    monkeypatch.setattr(sys, "argv", ["/x/gcrl.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        cli.program(gcrl.main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("gcrl.py: ")
    return err


@pytest.mark.parametrize("flags", ["--temperature 2", "--top-k 3", "--samples 9", "--complete a.png b.png",
                                   "--frechet run"])
def test_drawing_needs_a_run(flags, here, monkeypatch, capsys):
    said = refused(flags.split(), monkeypatch, capsys)
    assert flags.split()[0] in said and "--help" in said and not list(here.iterdir())


@pytest.mark.parametrize("flags", ["--temperature 0", "--temperature -1", "--temperature nan", "--top-k 0",
                                   "--samples 0", "--complete", "--frechet", "--lr 7", "--out x", "--resume {run}",
                                   "--dataset shapes", "--compile", "--frechet nowhere", "--complete nowhere.png",
                                   "--complete {run}/args.json", "--complete {run}"])
def test_bad_value(flags, run, here, monkeypatch, capsys):
    """Refused before anything is drawn, in a sentence that names the flag or the file."""
    before, flags = contents(run), flags.format(run=run).split()
    assert flags[-1 if {"--complete", "--frechet"} & {flags[0]} else 0] in refused(
        ["--sample", run, *flags], monkeypatch, capsys)
    assert contents(run) == before and not list(here.iterdir())


def test_no_run(finished, here, run, tiny, monkeypatch, capsys):
    """Where there is no run, one of another script, none that was saved, or one without a trained decoder."""
    assert "nowhere: no run there" in refused(["--sample", "nowhere"], monkeypatch, capsys)
    simclr = finished("simclr").folder
    assert "is a run of simclr.py" in refused(["--sample", simclr], monkeypatch, capsys)
    gcrl.main(tiny(gcrl, "--alpha", 0, "--epochs", 1, "--out", "contrastive"))
    capsys.readouterr()
    assert "--alpha 0" in refused(["--sample", "contrastive"], monkeypatch, capsys)
    shutil.copy(simclr / "checkpoint.pt", run)
    assert "checkpoint.pt is not of that run" in refused(["--sample", run], monkeypatch, capsys)
    for damaged in (torch.zeros(3), {"model": torch.zeros(3)}, {"model": {}}):
        torch.save(damaged, run / "checkpoint.pt")
        assert "checkpoint.pt" in refused(["--sample", run], monkeypatch, capsys)
    (run / "checkpoint.pt").write_bytes(b"PK")
    assert "checkpoint.pt" in refused(["--sample", run], monkeypatch, capsys)
    (run / "checkpoint.pt").unlink()
    assert "checkpoint.pt is missing" in refused(["--sample", run], monkeypatch, capsys)


def test_frechet_by_views_of_ones_own(run, finished, here):
    """A CMC of aligned folders has nothing to say of a single image."""
    shutil.copytree(finished("cmc").folder, here / "cmc")
    told = json.loads((here / "cmc" / "args.json").read_text())
    told["settings"]["views_dir"] = ["a", "b"]
    (here / "cmc" / "args.json").write_text(json.dumps(told))
    state = torch.load(here / "cmc" / "encoder.pt", weights_only=True)
    nets = [k.removeprefix("nets.0.") for k in state if k.startswith("nets.0.")]
    state = resnet.resnet18("cifar", 4).state_dict()
    assert set(nets) == state.keys()
    torch.save({f"nets.{i}.{k}": v for i in (0, 1) for k, v in state.items()}, here / "cmc" / "encoder.pt")
    with pytest.raises(Refusal, match="--views-dir"):
        gcrl.main(["--sample", run, "--frechet", here / "cmc"])


def test_frechet_without_test_images(run, images):
    """A run on images without classes has no test images: said, after the pictures."""
    with pytest.raises(Refusal, match="--frechet needs"):
        gcrl.main(["--sample", run, "--frechet", run, "--data-dir", images / "train" / "red", "--samples", 4])
    assert (run / f"samples{NAME}.png").exists()
