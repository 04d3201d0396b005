"""tests/results.py: its rows are commands that the scripts take, and its tables say what was measured."""
import contextlib
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import gcrl
import results

FOLDER = ["--dataset", "folder", "--data-dir", "DIR"]


@pytest.mark.parametrize("budget", results.BUDGETS)
@pytest.mark.parametrize("row", results.ROWS)
@pytest.mark.parametrize("data", [FOLDER, ["--dataset", "cifar10"]], ids=["folder", "cifar10"])
def test_rows_are_commands(row, budget, data):
    """Each is accepted by its script, with the budget's size, epochs and batch."""
    script, *flags = results.command(row, results.BUDGETS[budget], data, Path("x"), 3)
    args = importlib.import_module(script.removesuffix(".py")).arguments(flags)
    if "recipe" in results.BUDGETS[budget]:
        usual = importlib.import_module(script.removesuffix(".py")).arguments(
            [*results.RECIPES[row].split()[1:], "--dataset", data[1], *(["--small"] if budget == "small" else [])])
        epochs = {"gpu": 100, "gpu-200": 200}.get(budget, usual.epochs)
        assert vars(args) == vars(usual) | dict(seed=3, out="x", data_dir=args.data_dir, epochs=epochs)
        return
    size, epochs, batch = results.BUDGETS[budget]["gcrl" if row.startswith("GCRL") else "ours"]
    assert (args.epochs, args.batch_size, args.seed, args.out) == (epochs, batch, 3, "x")
    assert args.image_size == (32 if row == "AMDIM" else size)


@pytest.fixture
def in_process(monkeypatch):
    """What results.py would start as a program runs here; a list of the commands."""
    done = []

    def run(words, log):
        done.append(words)
        module = "common.evaluation.__main__" if words[0] == "-m" else words[0].removesuffix(".py")
        importlib.import_module(module).main(words[2:] if words[0] == "-m" else words[1:])
    monkeypatch.setattr(results, "run", run)
    monkeypatch.setattr(results, "ThreadPoolExecutor", lambda jobs: contextlib.nullcontext(SimpleNamespace(map=map)))
    return done


def test_measures_once_and_goes_on(in_process, images, tmp_path, capsys):
    """Each row is trained, judged and drawn from once; what was killed before its first epoch goes on; another budget's
    runs are refused; the table has all of the scores."""
    flags = ["--budget", "tiny", "--data-dir", images, "--labels", 0.5, "--out", tmp_path, "--rows", "SimCLR",
             "GCRL, hybrid"]
    results.main(list(map(str, flags)))
    assert [words[0] for words in in_process] == ["simclr.py", "-m", "gcrl.py", "-m", "gcrl.py"]
    told = json.loads((tmp_path / "gcrl-hybrid-0" / "evaluation.json").read_text())["folder"]["ood"]["patterns"]
    assert told.keys() == set(results.SCORES)
    table = (tmp_path / "table.md").read_text()
    assert all(f"AUROC, patterns: {score}" in table for score in results.SCORES) and "--budget tiny" in table
    claim = [line.split(" | ") for line in table.splitlines() if line.startswith(("| nats", "| Frechet", "| AUROC"))]
    assert len(claim) == 9 and all(float(line[2].removesuffix(" |")) >= 0 for line in claim)

    for name in ("checkpoint.pt", "encoder.pt", "result.json", "evaluation.json"):
        (tmp_path / "simclr-0" / name).unlink()
    gcrl.main(["--sample", tmp_path / "gcrl-hybrid-0", "--samples", 2])       # its distances are not the table's
    results.main(list(map(str, flags)))
    assert [words[:2] for words in in_process[5:]] == [
        ["simclr.py", "--resume"], ["-m", "common.evaluation"]]
    again = (tmp_path / "table.md").read_text()
    assert [line for line in again.splitlines() if "GCRL" in line or "AUROC" in line] == [
        line for line in table.splitlines() if "GCRL" in line or "AUROC" in line]
    with pytest.raises(SystemExit, match="simclr-0 has --width 2, not 8"):
        results.main(["--budget", "cpu", *map(str, flags[2:])])


def measured(row, value):
    judged = {"linear": {"trained": value, "untrained": 0.1, "pixels": 0.15}, "knn": {"trained": 0.3, "pixels": 0.25},
              "labels": {share: {"trained": {"mean": 0.2}, "pixels": {"mean": 0.05}} for share in ("0.01", "0.1")},
              "ood": {"patterns": {}}}
    judged["ood"]["patterns"]["Mahalanobis, no labels"] = {"auroc": 0.75}
    result = {"seconds": 61.4, "peak_memory": 2e9, **({"nats": 1.5} if row == "GCRL, hybrid" else {})}
    result |= {"mlp": {"trained": 0.35}} if row.startswith("DIM") else {}
    frechet = {"samples": 0.5, "test": 0.25} if row == "GCRL, hybrid" else None
    return dict(judged=judged, result=result, frechet=frechet, command="x.py --seed 0")


def test_tables(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text(json.dumps({"device": "machine", "torch": "2", "threads": 1}))
    args = SimpleNamespace(out=tmp_path, labels=[0.01, 0.1], ood=["patterns"], seeds=2, budget="cpu", data_dir=None)
    rows = ("SimCLR", "DIM, local", "GCRL, hybrid")
    text = results.tables({row: [measured(row, 0.5), measured(row, 0.6)] for row in rows}, args)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[:6]}) == len({line.count("|") for line in lines[6:]}) == 1
    assert "; here 35.0 +- 0.0 by an MLP |" in lines[4]
    alone = results.tables({"DIM, both": [measured("DIM, both", 0.5)]}, args)
    assert "| here 35.0 by an MLP |" in alone and "AUROC" not in alone
    assert "| whitened pixels | 15.0 +- 0.0 | 25.0 +- 0.0 | 5.0 +- 0.0 | 5.0 +- 0.0 |  |  |  |  |" in lines
    assert ("| SimCLR | 55.0 +- 7.1 | 30.0 +- 0.0 | 20.0 +- 0.0 | 20.0 +- 0.0 | 10.0 +- 0.0 | 61 +- 0 | 2.0 +- 0.0 |"
            in text)
    assert "|  | SimCLR | GCRL, hybrid |" in lines and "| nats per token |  | 1.500 +- 0.000 |" in lines
    assert "| Frechet distance of samples |  | 0.500 +- 0.000 |" in lines
    assert "| AUROC, patterns: Mahalanobis, no labels | 75.0 +- 0.0 | 75.0 +- 0.0 |" in lines
    assert "machine, torch 2, 1 threads" in text and "python x.py --seed 0" in text
