# SPDX-License-Identifier: MIT
"""common/run.py and common/cli.py: a run's folder and checkpoint under kills, damage and mistakes."""
import argparse
import io
import json
import math
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gcrl
import simclr
from common import cli
from common.cli import Refusal
from common.evaluation import __main__ as evaluate
from common.progress import Monitor, Progress, clock, feature_std
from common.run import Run, cosine, lock
from programs import Program

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def a_run(out="run", method="simclr", seed=0, rank=0):
    return Run(f"{method}.py", {"resume": None, "out": out, "dataset": "shapes", "seed": seed}, CPU, rank)


def new_run(*args, **kwargs):
    """A run whose folder is made, as it is when training begins."""
    run = a_run(*args, **kwargs)
    run.make_folder()
    return run


# ---- files


def test_write_is_all_or_nothing(here, monkeypatch):
    """A failure in the middle of writing leaves the old file whole."""
    run, save = new_run(), torch.save
    run.track(thing=torch.nn.Linear(3, 3))
    run.save(1, 0)
    before = Path("run/checkpoint.pt").read_bytes()

    def half(value, path):
        save(value, path)
        os.truncate(path, os.path.getsize(path) // 2)
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(RuntimeError, match="disk"):
            run.save(2, 0)
    assert Path("run/checkpoint.pt").read_bytes() == before
    run.save(3, 0)
    assert torch.load("run/checkpoint.pt", weights_only=True)["epoch"] == 3
    assert {p.name for p in Path("run").iterdir()} == {"args.json", "checkpoint.pt"}


def test_other_processes_write_nothing(here):
    """Only the first process of several makes and fills the folder."""
    run = new_run(rank=1)
    run.save(1, 0)
    run.log(epoch=1)
    assert not list(here.iterdir())


def test_next_free_folder(here):
    """Without --out each run takes the next free folder."""
    for name in ("simclr-shapes-0", "simclr-shapes-0-2", "simclr-shapes-0-3"):
        run = new_run(None)
        assert run.folder == Path("runs", name) and (run.folder / "args.json").exists()
    other = new_run(None, "gcrl", 7)
    assert other.folder == Path("runs/gcrl-shapes-7")


def test_out_is_taken(either, here, tiny, finished):
    """--out with a run in it, with anything in it, or a file, is refused and left alone; an empty folder is taken."""
    shutil.copytree(finished(either).folder, here / "run")
    before = {p.name: p.read_bytes() for p in (here / "run").iterdir()}
    with pytest.raises(Refusal, match="--out run already holds a run.*--resume run"):
        either.main(tiny(either, "--out", "run"))
    assert {p.name: p.read_bytes() for p in (here / "run").iterdir()} == before
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").write_text("precious")
    (here / "file").write_text("precious")
    for name in ("mine", "file"):
        with pytest.raises(Refusal, match=f"--out {name} exists and is not an empty folder"):
            either.main(tiny(either, "--out", name))
    with pytest.raises(Refusal, match="file/run cannot be made, as .*/file is not a folder that you may write to"):
        either.main(tiny(either, "--out", "file/run"))
    assert (here / "mine" / "thesis.tex").read_text() == (here / "file").read_text() == "precious"
    (here / "empty").mkdir()
    assert new_run("empty").folder == Path("empty")


def test_nothing_is_made_before_training(script, here, tiny, monkeypatch):
    """Ctrl-C while data, palette, model or a memory bank are made, or in the first step, leaves no folder behind."""
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    more = {"cmc": ("--dictionary", "memory-bank", "--schedule", "cosine")}.get(script.__name__, ())
    places = [(script.Run, "data"), (script, "cosine"), (script.Run, "progress")]
    places += [(script, name) for name in ("fit_palette", "fill_banks") if hasattr(script, name)]
    for place, name in places:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, name, interrupted)
            script.main(tiny(script, *more))
        assert not list(here.iterdir()) or not list((here / "runs").iterdir())


def test_a_link_to_a_disk_that_is_not_there(here):
    (here / "runs").symlink_to(here / "nowhere")
    (here / "run").symlink_to(here / "nowhere")
    with pytest.raises(FileExistsError):
        new_run(None)
    with pytest.raises(Refusal, match="--out run exists and is not an empty folder"):
        new_run("run")


def test_a_finished_run_is_not_trained_anew(either, finished, here):
    """If its checkpoint, the largest file, was deleted, --resume has nothing to go on from, and results to lose."""
    shutil.copytree(finished(either).folder, here / "run")
    Path("run/checkpoint.pt").unlink()
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    with pytest.raises(Refusal, match="run/checkpoint.pt is missing, and .* put it back or start a new run"):
        either.main(["--resume", "run"])
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_run_is_resumed_with_its_images(finished, images, here):
    """Other images, of which an epoch has fewer steps, would give means that cannot be."""
    shutil.copytree(finished(simclr).folder, here / "run")
    with pytest.raises(Refusal, match="--data-dir has 10 training images, but 40 when run was saved"):
        simclr.main(["--resume", "run", "--data-dir", images / "test"])


def test_interrupted_in_the_last_evaluation(tiny, here, monkeypatch, capsys):
    """Ctrl-C during the last epoch's kNN ends the program once that epoch is saved; --resume only evaluates."""
    judge = Monitor.judge

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return judge(self)
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "judge", interrupted)
        patch.setattr(Monitor, "due", lambda *_: False)                       # but for the last epoch
        with pytest.raises(SystemExit) as stop:
            simclr.main(tiny(simclr, "--out", "run"))
    assert stop.value.code == 130 and "evaluate with --resume run" in capsys.readouterr().out
    assert not Path("run/result.json").exists()
    assert simclr.main(["--resume", "run"])["linear"]["trained"] > 0


def test_ctrl_c_ends_tee_first(tiny, here):
    """What is printed has nowhere to go; what is saved, has."""
    os.mkfifo("pipe")
    process = Program([ROOT / "simclr.py", *tiny(simclr, "--epochs", 100_000, "--out", "run")], here, "pipe", "errors")
    try:
        with open("pipe") as tee:
            next(line for line in tee if line.startswith("epoch "))
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) == 130 and Path("errors").read_text() == ""
    finally:
        process.kill()
    assert torch.load("run/checkpoint.pt", weights_only=True)["epoch"] >= 1


def test_what_is_saved_stays(here):
    """Of a run that fails after its first checkpoint the folder stays, and so does one that was resumed."""
    with pytest.raises(ZeroDivisionError), (run := a_run()):
        run.save(1, 0)
        1 / 0
    assert {p.name for p in Path("run").iterdir()} == {"args.json", "checkpoint.pt"}
    Path("run/checkpoint.pt").unlink()
    with pytest.raises(ZeroDivisionError), Run("simclr.py", {"resume": "run", "out": None}, CPU):
        1 / 0
    assert Path("run/args.json").exists()


# ---- resuming what cannot be resumed


def truncated(path, other):
    os.truncate(path, path.stat().st_size // 2)


def empty(path, other):
    path.write_bytes(b"")


def garbage(path, other):
    path.write_bytes(bytes(range(256)) * 100)


def others(path, other):
    shutil.copy(other.folder / "checkpoint.pt", path)


def other_width(path, other):
    told = json.loads((path.parent / "args.json").read_text())
    told["settings"]["width"] *= 2
    (path.parent / "args.json").write_text(json.dumps(told))


def lacking(path, other):
    state = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "optimizer"}, path)


def a_tensor(path, other):
    torch.save(torch.zeros(3), path)


@pytest.mark.parametrize("damage", [truncated, empty, garbage, others, other_width, lacking, a_tensor])
def test_damaged_checkpoint(either, here, finished, damage):
    """Refused by its name in one line, and left as it is."""
    shutil.copytree(finished(either).folder, here / "run")
    path = here / "run" / "checkpoint.pt"
    damage(path, finished("gcrl" if either is simclr else "simclr"))
    before = path.read_bytes()
    with pytest.raises(Refusal, match="run/checkpoint.pt is not a valid checkpoint") as refusal:
        either.main(["--resume", "run"])
    assert path.read_bytes() == before and "\n" not in str(refusal.value)


def test_weights_that_are_not_finite_replace_no_good_ones(here):
    """They may follow from a loss that was finite: that of the last step before a checkpoint."""
    run, model = new_run(), torch.nn.Linear(3, 3)
    run.track(model=model)
    bad = {"weight": torch.full((3, 3), math.nan), "bias": torch.zeros(3)}
    model.load_state_dict(bad)
    with pytest.raises(Refusal, match="weights are not finite: lower --lr, .* .nothing was saved yet"):
        run.save(1, 0)
    assert not run.saved()
    model.reset_parameters()
    run.save(1, 0)
    before = Path("run/checkpoint.pt").read_bytes()
    model.load_state_dict(bad)
    with pytest.raises(Refusal, match="the last good checkpoint is kept in run"):
        run.save(2, 0)
    assert Path("run/checkpoint.pt").read_bytes() == before


def test_a_newer_torch_may_have_more_settings(finished, here):
    """A checkpoint from before torch had one of an optimizer's settings resumes with its default, as torch reads it."""
    shutil.copytree(finished(gcrl).folder, here / "run")
    state = torch.load("run/checkpoint.pt", weights_only=True)
    del state["optimizer"]["param_groups"][0]["amsgrad"]
    torch.save(state, "run/checkpoint.pt")
    assert gcrl.main(["--resume", "run"])["linear"] == finished(gcrl).metrics["linear"]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_malicious_checkpoint(here, finished, save):
    """Code in a checkpoint is not run."""
    shutil.copytree(finished(simclr).folder, here / "run")
    save({"method": "simclr", "model": Malicious()}, here / "run" / "checkpoint.pt")
    with pytest.raises(Refusal, match="checkpoint.pt"):
        simclr.main(["--resume", "run"])
    assert not Path("owned").exists()


@pytest.mark.parametrize("method", ["runs.gift.payload", "gift/payload", "../gift", "payload.py", "", "a b", 3, None,
                                    ["simclr"], "payload", "sys", "conftest"])
def test_a_strangers_run_runs_nothing(here, finished, method, monkeypatch):
    """A folder that somebody sends, with code in it and a method that names it, is refused and its code is not run."""
    run = shutil.copytree(finished(simclr).folder, here / "runs" / "gift")
    (here / "runs" / "__init__.py").touch()
    for place in (run / "payload.py", run / "__init__.py", here / "payload.py", here / "gift.py"):
        place.write_text("import os; os.mkdir('owned')")
    told = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps({**told, "method": method}))
    monkeypatch.syspath_prepend(here)
    for read in (lambda: evaluate.main([run, "--device", "cpu"]), lambda: simclr.main(["--resume", run]),
                 lambda: gcrl.main(["--sample", run]), lambda: gcrl.main(["--sample", finished("gcrl").folder,
                                                                         "--frechet", run])):
        with pytest.raises(Refusal, match="gift") as refusal:
            read()
        assert "\n" not in str(refusal.value)
    assert not Path("owned").exists() and "payload" not in sys.modules


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '"run"'])
def test_resume_of_nothing(either, here, text):
    """--resume of a folder that is missing, or without good args.json."""
    if text is not None:
        (here / "run").mkdir()
        (here / "run" / "args.json").write_text(text)
    with pytest.raises(Refusal, match="--resume run: no run there"):
        either.main(["--resume", "run"])
    assert (here / "run").exists() == (text is not None)


def test_resume_of_another_method(either, finished):
    other = "gcrl" if either is simclr else "simclr"
    with pytest.raises(Refusal, match=f"is a run of {other}.py"):
        either.main(["--resume", finished(other).folder])


@pytest.mark.parametrize("flags", ["--lr 7", "--epochs 3", "--seed 1", "--width 16", "--dataset shapes", "--out x"])
@pytest.mark.parametrize("form", ["{} --resume RUN", "--resume RUN {}", "--resume=RUN {}"])
def test_resume_with_a_changed_setting(either, finished, here, flags, form):
    """What decides the result cannot change on --resume, in whichever way it is written."""
    argv = form.format(flags).replace("RUN", str(finished(either).folder)).split()
    with pytest.raises(Refusal, match=f"{flags.split()[0]} cannot change on --resume"):
        either.arguments(argv)


def test_resume_takes_the_settings(either, finished):
    """The run's own settings hold, and how it is run may change."""
    folder = finished(either).folder
    stored = json.loads((folder / "args.json").read_text())["settings"]
    for form in (["--resume", str(folder)], [f"--resume={folder}"]):
        args = vars(either.arguments([*form, "--workers", "3", "--cache-gb", "2", "--device", "cuda"]))
        assert (args["workers"], args["cache_gb"], args["device"]) == (3, 2.0, "cuda")
        for free in ("workers", "cache_gb", "device", "resume", "out"):
            args.pop(free)
        assert args == {k: stored[k] for k in args}


# ---- signals


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_signal(tiny, here, tmp_path, number, status):
    """A signal stops the program at the next step: saved, says how to go on, exit status 128 + signal, no traceback."""
    argv = tiny(simclr, "--epochs", 100_000, "--out", "run")
    process = Program([ROOT / "simclr.py", *argv], here, tmp_path / "stdout", tmp_path / "stderr")
    try:
        process.until("\nepoch 1/100000 ")
        os.kill(process.pid, number)
        assert process.wait(60) == status
    finally:
        process.kill()
    assert (tmp_path / "stderr").read_text() == ""
    assert "--resume run" in (tmp_path / "stdout").read_text().splitlines()[-1]
    state = torch.load("run/checkpoint.pt", weights_only=True)
    log = Path("run/log.jsonl").read_text().splitlines()
    assert len(log) == state["epoch"] >= 1 and 0 <= state["step"] <= 5


def test_one_process_trains_a_run(tiny, here, tmp_path):
    """A second one that would resume it is refused, while the first trains and not after that was killed."""
    argv = tiny(simclr, "--epochs", 100_000, "--out", "run")
    process = Program([ROOT / "simclr.py", *argv], here, tmp_path / "stdout")
    try:
        process.until("\nepoch ")
        with pytest.raises(Refusal, match="run is being trained by another process: stop it"):
            simclr.main(["--resume", "run"])
    finally:
        process.kill()
        process.wait()
    lock(Path("run/args.json")).close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal(here, number):
    """The first signal only asks; then the handlers from before are back, so that a second one ends the program."""
    before = signal.getsignal(number)
    caught = []
    try:
        signal.signal(number, lambda *_: caught.append(1))
        with pytest.raises(SystemExit), (run := a_run()):                     # at its end, as it was asked to stop
            assert not run.stop_requested()
            os.kill(os.getpid(), number)
            assert run.stop_requested() and not caught
            os.kill(os.getpid(), number)
            assert caught
    finally:
        signal.signal(number, before)


def test_signal_while_the_folder_is_made(tiny, here, monkeypatch):
    """It is no failure, which would leave a folder without a result, but stops after the first step."""
    make_folder = Run.make_folder
    monkeypatch.setattr(Run, "make_folder", lambda run: make_folder(run) or os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit, match="130"):
        simclr.main(tiny(simclr, "--out", "run"))
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 1


def test_signal_while_a_line_is_printed(tiny, here, monkeypatch):
    """The same, though Python does not print a line within another."""
    class Terminal(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            if b"epoch 1/2" in bytes(data):
                signal.raise_signal(signal.SIGINT)
            return len(data)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Terminal())))
    with pytest.raises(SystemExit, match="130"):
        simclr.main(tiny(simclr, "--out", "run"))
    assert torch.load("run/checkpoint.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("taken", [False, True])
def test_handlers_are_put_back(here, taken):
    before, run = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], a_run()
    if taken:                                                                 # meanwhile, by another
        new_run()
    with pytest.raises(Refusal if taken else KeyError), run:
        raise KeyError
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


# ---- progress


SOME, ONE = torch.eye(2), torch.ones(2, 2)  # features that differ, and those of a collapse


def progress():
    logged = []
    run = SimpleNamespace(rank=0, folder="run", not_finite=Refusal, log=lambda **entry: logged.append(entry),
                          write=lambda *_: None, since=time.perf_counter(), device=CPU, say=print,
                          stop_requested=lambda: False, save=lambda *_: None,
                          settings={"small": False, "dataset": "cifar10", "compile": False})
    return Progress(run, 3, 4, 10, {"loss": "chance 1.0"}), logged


def ticking(monkeypatch, first, seconds, steps, settings=None, **kwargs):
    """The lines of `steps` steps of so many seconds by the clock, the first of `first` seconds: [(second, line)]."""
    clock, lines, show = [0.0], [], progress()[0]
    show.steps, show.images, show.run.since = 10**6, 10**7, 0.0
    show.run.settings.update(settings or {})
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    show.run.say = lambda text: lines.append((clock[0], text))
    for step in range(steps):
        clock[0] += seconds if step else first
        show.update(0, step, SOME, loss=torch.tensor(1.0))
    return lines


def test_lines_come_after_ten_seconds_and_then_each_minute(monkeypatch):
    """Also where nobody rewrites a line, as in a log file, with the speed and the time of the steps but the first."""
    lines = ticking(monkeypatch, 3, 0.25, 1000, {"small": True})
    assert [round(second) for second, _ in lines] == [10, 70, 131, 191, 251]
    assert "epoch 1/3  step 30/1000000  loss 1.000 (chance 1.0)" in lines[0][1]
    assert all("  40 images/s  " in line for _, line in lines)
    assert lines[0][1].endswith(f"{(3 * 10**6 - 30) * 0.25 // 3600:.0f}:19:52 left")


def test_a_long_first_step_is_said_at_once(monkeypatch):
    (second, line), *_ = ticking(monkeypatch, 100, 100, 1, {"small": True})
    assert second == 100 and "step 1/1000000" in line and "  0 images/s" in line


@pytest.mark.parametrize("seconds, settings, told", [
    (0.25, {}, True), (0.003, {}, False), (0.25, {"small": True}, False), (0.25, {"dataset": "shapes"}, False)])
def test_who_would_wait_for_hours_is_told_of_small(monkeypatch, seconds, settings, told):
    """Once, after the first line, with the hours, where a run at the defaults takes more than three."""
    lines = [line for _, line in ticking(monkeypatch, 1, seconds, 4000, settings)]
    assert [i for i, line in enumerate(lines) if "--small" in line] == ([1] if told else [])
    assert not told or "takes 208 hours" in lines[1]


@pytest.mark.parametrize("small, told", [(False, True), (True, False)])
def test_small_is_recommended_during_a_first_step_of_minutes(tiny, here, monkeypatch, capsys, small, told):
    """Not only after it, and once. A step that ends in time alarms nobody afterwards."""
    view, slept = simclr.view, []
    monkeypatch.setattr("common.progress.FIRST_LINE", 0.2)

    def slow(*args, **kwargs):
        if not slept:
            slept.append(time.sleep(1.0))                                     # goes on after the sentence
            print("still in the first step")
        return view(*args, **kwargs)
    monkeypatch.setattr(simclr, "view", slow)
    monkeypatch.setattr(Run, "stop_requested", lambda run: True)
    flags = ["--epochs", 20_000, *["--small"] * small]
    with pytest.raises(SystemExit):
        simclr.main(tiny(simclr, "--out", "run", *flags))
    lines = capsys.readouterr().out.splitlines()
    found = [i for i, line in enumerate(lines) if line.startswith("The first step has not ended after 0.2 s")]
    assert len(found) == told and sum("with --small" in line for line in lines) == told
    assert not told or found[0] < lines.index("still in the first step") and "more than 6 hours" in lines[found[0]]
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_small_is_not_recommended_to_a_resumed_run():
    """It cannot take the flag any more."""
    for resumed in (True, False):
        show = progress()[0]
        show.run.resumed = resumed
        show.begin()
        assert show.timer.is_alive() != resumed
        show.timer.cancel()


def test_what_is_compiled(script, tiny, here, monkeypatch):
    """With --compile the model, once; of gcrl.py one micro-batch, as a graph of all of them takes minutes."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    script.main(tiny(script, "--compile", "--epochs", 1, "--out", "run"))
    assert len(compiled) == 1 and getattr(compiled[0], "__name__", "module") == \
        ("outputs" if script is gcrl else "module")


def test_a_first_step_that_compiles_alarms_nobody(monkeypatch):
    """Its time is not a step's: the first line comes ten seconds after it."""
    lines = ticking(monkeypatch, 300, 0.003, 4000, {"compile": True})
    assert [round(second) for second, _ in lines] == [310]


def test_means(capsys):
    """An epoch's line and log hold the means over its steps, each epoch's from zero."""
    show, logged = progress()
    for epoch in range(2):
        for step in range(4):
            show.update(epoch, step, SOME, loss=torch.tensor(10.0 * epoch + step))
        show.end_epoch(epoch, lr=0.1)
    assert [(e["epoch"], e["loss"], e["lr"]) for e in logged] == [(1, 1.5, 0.1), (2, 11.5, 0.1)]
    assert [e["feature_std"] for e in logged] == pytest.approx([0.5**0.5] * 2)
    assert [line.split("  ")[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["epoch 1/3", "loss 1.500 (chance 1.0)"], ["epoch 2/3", "loss 11.500 (chance 1.0)"]]


def test_collapse_is_said(capsys):
    show, _ = progress()
    for step in range(4):
        show.update(0, step, ONE, loss=torch.tensor(1.0))
    show.end_epoch(0)
    assert "COLLAPSED" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [0, 1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_names_the_step(bad, value):
    """However many steps were pending, the first bad one is named; state_dict refuses too."""
    show, _ = progress()
    with pytest.raises(Refusal, match=f"step {bad + 1} of epoch 2"):
        for step in range(4):                                                 # read after the first and the last step
            show.update(1, step, SOME, loss=torch.tensor(value if step >= bad else 0.0))
    with pytest.raises(Refusal):
        show.state_dict()


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (123, "2:03"), (3723, "1:02:03")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_cosine():
    """Up in equal steps over the warm-up, then down half a cosine, towards 0."""
    rates = [cosine(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert cosine(0, 10, 0) == 1 and cosine(0, 1, 0.05) > 0 and 0 <= cosine(9, 10, 1.0) <= 1


def test_feature_std():
    """0 for one direction at any length, near 1 for opposite ones, finite at zero."""
    assert feature_std(torch.arange(1, 9)[:, None] * torch.ones(8, 4)).item() == pytest.approx(0, abs=1e-3)
    assert feature_std(torch.zeros(8, 4)).item() == 0                         # a dead encoder is no perfect one
    assert feature_std(torch.cat([torch.eye(4), -torch.eye(4)])).item() == pytest.approx(1)
    assert torch.isfinite(feature_std(torch.zeros(3, 4)))


# ---- cli


@pytest.mark.parametrize("parse, good, bad", [
    (cli.in_interval("[1, inf)", int), "1 200", "0 -1 1.5 x nan"), (cli.in_interval("[0, inf)", int), "0 7", "-1 0.5"),
    (cli.in_interval("(0, inf)", float), "1e-9 3", "0 -0.1 nan inf x"),
    (cli.in_interval("[0, inf)", float), "0 0.0 2", "-1e-9 nan inf"),
    (cli.in_interval("(0, 1]", float), "0.1 1", "0 1.01 nan"), (cli.in_interval("[2, 4]", int), "2 4", "1 5"),
    (cli.in_interval("[0, 1)", float), "0 0.9", "1 -0.1"),
])
def test_intervals(parse, good, bad):
    for text in good.split():
        assert parse(text) == float(text)
    for text in bad.split():
        with pytest.raises(argparse.ArgumentTypeError, match="number in "):
            parse(text)


@pytest.mark.parametrize("error, status, sentence", [
    (Refusal("give up"), 2, "give up"), (FileNotFoundError(2, "No such file", "x.png"), 2, "x.png: No such file"),
    (OSError(28, "No space left on device"), 2, "a file: No space left on device"),
    (KeyboardInterrupt(), 130, "interrupted"), (torch.OutOfMemoryError("CUDA"), 2, "--batch-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 2, "lower --workers (0 uses none)"),
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found in ..."), 2, "--compile needs a C++ compiler"),
])
def test_program(error, status, sentence, monkeypatch, capsys):
    """What ends a program is one sentence on stderr and an exit status."""
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/x/simclr.py"])
    with pytest.raises(SystemExit) as stop:
        cli.program(main)
    err = capsys.readouterr().err
    assert stop.value.code == status and err.startswith("simclr.py: ") and sentence in err and err.count("\n") == 1


def test_a_limit_of_the_users_own_is_kept(monkeypatch):
    """`ulimit -d`, hard or soft, below what is free."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    limits = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    for pair in ((3000, 5000), (resource.RLIM_INFINITY, 5000), (3000, resource.RLIM_INFINITY)):
        monkeypatch.setattr(resource, "getrlimit", lambda _: pair)
        if not math.isnan(cli.limit_memory()):                                # as on macOS
            assert limits.pop() == (min(x for x in pair if x > 0), pair[1])


def test_a_path_is_one():
    assert cli.path("~/x") == os.path.expanduser("~/x") != "~/x" and cli.path("a ~") == "a ~"
    with pytest.raises(Refusal, match="--out: the path is empty"):
        simclr.arguments(["--out="])


@pytest.mark.parametrize("name", ["my-simclr.py", "simclr.v2.py"])
def test_a_script_needs_a_name_that_its_runs_can_have(name):
    with pytest.raises(Refusal, match=f"{name}: .* rename it"):
        cli.RunParser(f"/x/{name}", "SimCLR", 1, 2)


def test_text_that_the_terminal_cannot_show(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(cli, "limit_memory", lambda: 0.0)
    cli.program(lambda: print("a b/\u00e9\u65e5\udcff.png", flush=True))
    assert sys.stdout.buffer.getvalue() == b"a b/\\xe9\\u65e5\\udcff.png\n"


def test_program_hides_no_bug():
    """An unexpected error keeps its traceback, and success its silence."""
    with pytest.raises(ZeroDivisionError):
        cli.program(lambda: 1 / 0)
    with pytest.raises(OSError):
        cli.program(lambda: (_ for _ in ()).throw(OSError("not the system's")).__next__())
    lacking = RuntimeError("could not create a primitive descriptor for the matmul primitive")            # oneDNN's
    assert cli.way_out(lacking, 0.0, "") is None
    cli.program(lambda: None)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory"),
                                   RuntimeError("could not create a primitive")])
def test_too_little_memory_is_one_sentence(error, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(cli, "limit_memory", lambda: 3e9)
    with pytest.raises(SystemExit):
        cli.program(main, memory="--micro-batch")
    assert "more memory than the 3.0 GB that were free: lower --micro-batch" in capsys.readouterr().err
    monkeypatch.setattr(cli, "limit_memory", lambda: math.nan)                # macOS
    with pytest.raises(SystemExit):
        cli.program(main, memory="--micro-batch")
    assert "this needs more memory than there is: lower --micro-batch" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/meminfo").exists() or torch.cuda.is_available(), reason="needs Linux without CUDA")
def test_memory_that_is_not_there_is_refused_before_it_is_used(tmp_path):
    """An allocation of more than is free, which the system grants as long as it is not used, fails in a sentence."""
    code = ("import torch; from common import cli; free = cli.limit_memory(); "
            "cli.program(lambda: print(torch.empty(int(SHARE * free), dtype=torch.uint8).shape))")
    fits, refused = [Program(["-c", code.replace("SHARE", share)], ROOT, tmp_path / f"{share}.out", tmp_path / share)
                     for share in ("0.5", "1.02")]
    assert (fits.wait(60), refused.wait(60)) == (0, 2)
    err = (tmp_path / "1.02").read_text()
    assert "more memory than the" in err and err.count("\n") == 1


@pytest.mark.parametrize("has, dtype", [("amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx2", None)])
def test_auto_takes_bf16_where_the_processor_multiplies_it(has, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, has: True},
                        raising=False)                                        # torch before 2.10 has none
    assert cli.pick_amp("auto", CPU) == dtype


def test_device_and_precision():
    assert cli.pick_device("cpu") == CPU
    assert cli.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert cli.pick_amp("bf16", CPU) == torch.bfloat16 and cli.pick_amp("off", CPU) is None
    assert cli.pick_amp("auto", CPU) in (None, torch.bfloat16)
    for name in ("gpu", "cuda:99", "cpu:x", "meta", "hpu"):
        with pytest.raises(Refusal, match=f"--device {name}"):
            cli.pick_device(name)


@pytest.mark.parametrize("version, device", [("2.7.1", "cpu"), ("2.8.0", "mps"), ("2.14.1+cu130", "mps")])
def test_mps_needs_a_torch_that_has_the_operations(version, device, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert cli.pick_device("auto").type == device
    if device == "cpu":
        with pytest.raises(Refusal, match="--device mps needs torch 2.8, not 2.7.1: update it or use --device cpu"):
            cli.pick_device("mps")


WINDOWS = """
import os, pkgutil, importlib, signal, sys
import torch, torchvision, numpy, PIL.Image                                   # these know Windows
for name in ("resource", "fcntl", "grp", "pwd", "termios", "syslog", "posix"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "fork", "getuid", "geteuid", "getloadavg", "killpg", "nice", "statvfs", "sysconf",
             "uname"):
    delattr(os, name)
for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "alarm", "pause", "setitimer"):
    delattr(signal, name)
sys.path.insert(0, sys.argv.pop(1))
import common
for module in pkgutil.walk_packages(common.__path__, "common."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in "moco", "cmc", "cpc", "dim", "gcrl", "simclr":
    script = importlib.import_module(name)
common.cli.program(script.main)
"""


def test_nothing_that_windows_lacks(tiny, tmp_path):
    """Every script and module is imported without it, and a script runs to its end."""
    flags = tiny("simclr", "--epochs", 1, "--out", tmp_path / "run")
    program = Program(["-c", WINDOWS, ROOT, *flags], tmp_path, tmp_path / "stdout", tmp_path / "stderr")
    assert program.wait(60) == 0 and (tmp_path / "stderr").read_text() == "", (tmp_path / "stderr").read_text()
    stdout = (tmp_path / "stdout").read_text()
    assert json.loads((tmp_path / "run/result.json").read_text())["peak_memory"] is None
    assert "trained in 0:" in stdout and "peak memory" not in stdout
