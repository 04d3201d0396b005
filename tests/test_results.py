# SPDX-License-Identifier: MIT
"""tests/results.py: its rows and arms are commands that the scripts take, its tables say what was measured, and the
README's tables are those."""
import contextlib
import importlib
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import results

ROOT = Path(__file__).parent.parent
TINY = "--image-size 16 --width 2 --stem cifar --epochs 1 --batch-size 16 --workers 0"


@pytest.mark.parametrize("budget", results.BUDGETS)
@pytest.mark.parametrize("row", [*results.ROWS, *results.LONGER])
def test_rows_are_commands(row, budget):
    """Each is accepted by its script, and is the script's default but for the choices that make the row."""
    shapes = budget.startswith("shapes")
    data = [] if shapes else ["--dataset", "cifar10"]
    if row in results.LONGER and budget != "small":
        with pytest.raises(SystemExit):
            results.main(["--budget", budget, "--rows", row])
        return
    script, *flags = shlex.split(f"{(results.ROWS | results.LONGER)[row]} {results.BUDGETS[budget]}")
    args = importlib.import_module(script.removesuffix(".py")).arguments([*flags, *data])
    assert args.dataset == ("shapes" if shapes else "cifar10") and args.small == (budget == "small")
    assert args.epochs == {"gpu": 100, "gpu-200": 200}.get(budget, args.epochs)


@pytest.mark.parametrize("claim", results.CLAIMS)
def test_claims_are_commands(claim):
    """Each arm is accepted by its script and has a measure; each comparison is of two arms that measure alike."""
    sentence, arms, comparisons = results.CLAIMS[claim]
    for arm in arms.values():
        script, *flags = shlex.split(arm if isinstance(arm, str) else arm[0])
        importlib.import_module(script.removesuffix(".py")).arguments([*flags, "--dataset", "folder"])
    for a, sign, b in comparisons:
        assert sign in (results.MORE, results.LESS, results.NOT_MORE)
        assert results.measure_of(arms[a])[0] == results.measure_of(arms[b])[0]
    assert len({json.dumps(arm) for arm in arms.values()}) == len(arms) and re.search(r"\(.+\)$", sentence)


def test_verdict():
    """Twice the standard error, of a deviation pooled over the arms, is where a difference counts."""
    arms, more = {"a": "x.py", "b": "y.py", "c": "z.py"}, [("a", results.MORE, "b")]
    deviation = math.sqrt((2 + 2 + 8) / 3)                                    # of variances 2, 2 and 8
    edge = 2 * deviation * math.sqrt(1 / 2 + 1 / 2)

    def told(gap, comparisons=more):
        return results.verdict({"a": [gap + 4.0, gap + 6.0], "b": [4.0, 6.0], "c": [3.0, 7.0]}, arms, comparisons)
    assert [told(edge + 0.01), told(edge - 0.01), told(-edge - 0.01)] == ["holds", "cannot be told",
                                                                           "does not hold here"]
    assert told(-edge - 0.01, [("a", results.LESS, "b")]) == "holds"
    assert told(edge - 0.01, [("a", results.NOT_MORE, "b")]) == "holds"
    assert told(edge + 0.01, [("a", results.NOT_MORE, "b")]) == "does not hold here"
    assert told(edge + 0.01, more + [("b", results.MORE, "c")]) == "cannot be told"
    assert told(edge + 0.01, more + [("b", results.MORE, "a")]) == "does not hold here"
    assert results.verdict({"a": [9.0], "b": [4.0]}, arms, more) == "cannot be told"        # one seed


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """What results.py would start as a program runs here; a list of the commands. Its files go to tmp_path / "kept"."""
    done = []

    def run(words, log, rounds=1):
        done.append(words)
        module = "common.evaluation.__main__" if words[0] == "-m" else words[0].removesuffix(".py")
        importlib.import_module(module).main(words[2:] if words[0] == "-m" else words[1:])
    monkeypatch.setattr(results, "run", run)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "kept")
    monkeypatch.setattr(results, "ROWS", {
        "SimCLR": f"simclr.py {TINY}", "GCRL, hybrid": "gcrl.py --image-size 8 --width 8 --heads 2 --encoder-layers 1 "
        "--decoder-layers 1 --colours 4 --epochs 1 --batch-size 16 --workers 0"})
    monkeypatch.setattr(results, "ThreadPoolExecutor", lambda jobs: contextlib.nullcontext(SimpleNamespace(map=map)))
    return done


def test_measures_once_and_goes_on(in_process, images, tmp_path, monkeypatch):
    """Each row is trained and judged once; what was killed before its first epoch goes on; another recipe's runs are
    refused; the files have what the table shows."""
    monkeypatch.setitem(results.BUDGETS, "small", "--seed 5")
    flags = ["--budget", "small", "--data-dir", str(images), "--labels", "0.5", "--ood", "patterns", "--out",
             str(tmp_path / "runs"), "--rows", "SimCLR", "GCRL, hybrid"]
    results.main(flags)
    assert [words[0] for words in in_process] == ["simclr.py", "-m", "gcrl.py", "-m"]
    row = json.loads((tmp_path / "kept" / "small" / "gcrl-hybrid-0.json").read_text())
    assert row["evaluation"]["ood"]["patterns"].keys() == set(results.SCORES)
    assert (tmp_path / "kept" / "small" / "gcrl-hybrid-0.png").read_bytes() == \
        (tmp_path / "runs" / "gcrl-hybrid-0" / "samples.png").read_bytes()
    assert str(tmp_path) not in json.dumps(row) and row["log"][0]["epoch"] == 1 and row["settings"]["width"] == 8
    table = (tmp_path / "kept" / "small.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| GCRL, hybrid |")).split(" | ")
    linear, knn = (100 * row["result"][measure]["trained"] for measure in ("linear", "knn"))
    assert line[3] == f"{linear:.1f} / {knn:.1f}; {row['result']['nats']:.3f} nats per token"
    auroc = row["evaluation"]["ood"]["patterns"]["likelihood, no labels"]["auroc"]
    assert f"| AUROC, patterns: likelihood, no labels |  | {100 * auroc:.1f} |" in table
    with Image.open(tmp_path / "kept" / "small.png") as curves:
        assert curves.size == (640, 2 * 150)                                  # a panel for each row

    for name in ("checkpoint.pt", "encoder.pt", "result.json", "evaluation.json"):
        (tmp_path / "runs" / "simclr-0" / name).unlink()
    results.main(flags)
    assert [words[:2] for words in in_process[4:]] == [["simclr.py", "--resume"], ["-m", "common.evaluation"]]
    again = (tmp_path / "kept" / "small.md").read_text()
    before, after = ([line.split(" | ")[:5] for line in text.splitlines()[2:4]] for text in (table, again))
    assert before == after                                                    # all but time and memory
    results.main([*flags[:-2], "SimCLR"])                                     # the table has the other rows, too
    assert "GCRL, hybrid" in (tmp_path / "kept" / "small.md").read_text() and len(in_process) == 6
    shutil.move(tmp_path / "runs" / "gcrl-hybrid-0", tmp_path / "lost")       # as on another machine
    results.main(flags)
    assert len(in_process) == 6 and (tmp_path / "kept" / "small.md").read_text().split("Measured")[0] == \
        again.split("Measured")[0]
    monkeypatch.setitem(results.ROWS, "SimCLR", f"simclr.py {TINY.replace('--width 2', '--width 4')}")
    with pytest.raises(SystemExit, match="simclr-0 has --width 2, not 4"):
        results.main(flags)


def test_other_rows_and_other_evaluations_are_not_taken(in_process, images, tmp_path, monkeypatch):
    """A kept row is evaluated again with other flags; a changed command has its own commit; seeds by different commands
    are not averaged; claims of other images have a folder of their own."""
    monkeypatch.setitem(results.BUDGETS, "small", "")
    flags = ["--budget", "small", "--data-dir", str(images), "--out", str(tmp_path / "runs"), "--rows", "SimCLR"]
    results.main([*flags, "--labels", "0.5"])
    kept = tmp_path / "kept" / "small" / "simclr-0.json"
    results.main([*flags, "--labels", "0.5"])
    assert len(in_process) == 2
    results.main([*flags, "--labels", "0.3"])
    row = json.loads(kept.read_text())
    assert len(in_process) == 3 and "0.3" in row["evaluation"]["labels"]
    kept.write_text(json.dumps({**row, "command": "python other.py", "commit": "0000000"}))
    results.main([*flags, "--labels", "0.3"])
    assert json.loads(kept.read_text())["commit"] != "0000000"
    kept.with_name("simclr-1.json").write_text(json.dumps({**row, "command": row["command"] + " --lr 1 --seed 1"}))
    with pytest.raises(SystemExit, match="different commands"):
        results.main([*flags, "--labels", "0.3"])


def test_says_how_long_all_takes(tmp_path, capsys):
    """By the run's own estimate, after a while; a run that fails names its log."""
    program = "import time; print('epoch 1/9  12 images/s  2:59:59 left', flush=True); time.sleep(3)"
    results.run(["-c", program], tmp_path / "simclr-0.log", rounds=5, patience=1)
    assert capsys.readouterr().out == "simclr-0 takes about 3.0 hours; all runs, if they take as long, 15\n"
    results.run(["-c", "print('9:59 left')"], tmp_path / "short.log", rounds=5, patience=10)
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit, match="failed, see .*bad.log"):
        results.run(["-c", "1 / 0"], tmp_path / "bad.log")


def test_claims(in_process, images, tmp_path, monkeypatch):
    """A command that several arms share runs once a seed, on a part of the images; arms show what they measure."""
    simclr = f"simclr.py {TINY}"
    monkeypatch.setattr(results, "CLAIMS", {
        "head": ("h is better than z (table 3)", {"h": simclr, "z": (simclr, "projection")}, [("h", ">", "z")]),
        "rate": ("The loss falls (nowhere)", {"fast": (f"{simclr} --lr 1", "loss"), "slow": (simclr, "loss")},
                 [("fast", "<", "slow")]),
        "far": ("Patterns are far (nowhere)", {"far": (simclr, "AUROC, kNN distance, no labels"),
                                               "near": (simclr, "knn")}, [("far", ">", "far")])})
    monkeypatch.setattr(results, "subset", lambda folder, place, images=4, subset=results.subset: subset(folder, place,
                                                                                                        10))
    results.main(["--claims", "--data-dir", str(images), "--out", str(tmp_path / "runs")])
    assert sorted(words[0] for words in in_process) == ["-m"] * 2 + ["simclr.py"] * 4
    rows = [json.loads(path.read_text()) for path in (tmp_path / "kept" / "claims").iterdir()]
    assert len(rows) == 4 and len(list((tmp_path / "runs").glob("images-*/train/red/*"))) == 10
    table = (tmp_path / "kept" / "claims.md").read_text()
    slow = sorted(row["log"][-1]["loss"] for row in rows if "--lr" not in row["command"])
    assert f"slow {sum(slow) / 2:.3f} ± {(slow[1] - slow[0]) / math.sqrt(2):.3f}" in table
    far = sorted(100 * row["evaluation"]["ood"]["patterns"]["kNN distance, no labels"]["auroc"] for row in rows
                 if "--lr" not in row["command"])
    assert f"| far {sum(far) / 2:.1f} ± {(far[1] - far[0]) / math.sqrt(2):.1f}; near " in table
    assert all(text in table for text in ("[`head`]", "; z ", "Measured on: "))
    results.main(["--claims", "head", "--data-dir", str(images), "--out", str(tmp_path / "runs")])
    assert (tmp_path / "kept" / "claims.md").read_text() == table             # with those that were measured before


def test_curves(tmp_path, monkeypatch):
    """The mean over seeds of kNN, where all have one, over the fastest one's minutes of training until then; without
    rows of another machine."""
    def row(seconds, *knn, device="fast"):
        return {"device": device, "log": [{"seconds": seconds} | ({"knn": x} if x else {}) for x in knn]}
    drawn = []
    monkeypatch.setattr(results.pictures, "plot", lambda path, *panels, height: drawn.extend(panels))
    results.curves({"SimCLR": [row(60, 0.2, None, 0.4), row(120, 0.3, 0.5, 0.6)], "CPC": [row(60, None)],
                    "GCRL": [row(600, 0.2, device="slow")]}, tmp_path)
    (title, points, levels), = drawn
    assert title.startswith("SimCLR") and sum(points, ()) == pytest.approx((1.0, 25.0, 3.0, 50.0)) and levels == {}


def test_pictures(tmp_path, monkeypatch):
    for number, name in enumerate(("views", "neighbours", "curve", "completions")):
        Image.new("RGB", (10 * (number + 1), 10), (50 * number, 0, 0)).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "kept")
    results.main(["--pictures", str(tmp_path), str(tmp_path)])
    sheet = Image.open(tmp_path / "kept" / "overview.png")
    assert sheet.size == (3300 + 36, 330) and sheet.getpixel((sheet.width - 1, 5)) == (150, 0, 0)


def test_a_row_whose_name_begins_with_anothers(tmp_path):
    """Of "GCRL, generative" and "GCRL, generative, 9 epochs" each has its own seeds."""
    for name in ("gcrl-generative-0", "gcrl-generative-10", "gcrl-generative-9-epochs-0"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"command": name.rsplit("-", 1)[0]}))
    found = results.read_rows(tmp_path)
    assert {row: len(rows) for row, rows in found.items()} == {"GCRL, generative": 2, "GCRL, generative, 9 epochs": 1}


def test_readme_figures():
    """Every figure in the README's results, in tables and in prose, stands in the files that tests/results.py wrote,
    except for those that another project reports."""
    readme = (ROOT / "README.md").read_text().split("## Results")[1].split("\n## ")[0]
    written = "\n".join(path.read_text() for path in sorted((ROOT / "tests" / "results").glob("*.md")))
    shown, measured = (set(re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", text)) for text in (readme, written))
    assert len(shown) > 100 and shown - measured <= {"85.6", "83.2"}


def test_differences():
    """Between the hybrid and each of its losses alone, seed by seed; a seed that only one of them has is left out."""
    def rows(*linears, nats=None):
        return [{"settings": {"seed": seed}, "result": {"linear": {"trained": linear}, "knn": {"trained": linear / 2}}
                 | ({"nats": nats + seed} if nats else {})} for seed, linear in enumerate(linears)]
    found = {"GCRL, hybrid": rows(0.5, 0.6, 0.9, nats=2.0), "GCRL, contrastive": rows(0.4, 0.3),
             "GCRL, generative": rows(0.5, nats=1.5), "SimCLR": rows(0.7)}
    assert results.differences_table(found).splitlines()[2:] == [
        "| GCRL, hybrid, less GCRL, contrastive | 20.0 ± 14.1 | 10.0 ± 7.1 |  |",
        "| GCRL, hybrid, less GCRL, generative | 0.0 | 0.0 | 0.500 |"]
    assert results.differences_table({"GCRL, hybrid": rows(0.5)}) is None
