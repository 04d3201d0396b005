# SPDX-License-Identifier: MIT
"""Mutates the files of tiny real runs and kills such runs at random moments: no traceback, no hang, nothing lost.

    python tests/fuzz.py                        # 400 mutations, through resume, evaluation and sampling
    python tests/fuzz.py --kill                 # 30 times kill -9 or Ctrl-C for each of two scripts, and resume
    python tests/fuzz.py --kill --cases 30 --scripts simclr moco cmc cpc dim gcrl
"""
import argparse
import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import gcrl  # noqa: E402
import simclr  # noqa: E402
from common import Refusal, linear_probe  # noqa: E402
from common.evaluation import __main__ as evaluation  # noqa: E402
from conftest import TINY, make_images  # noqa: E402
from programs import Program  # noqa: E402

VALUES = [None, True, False, 0, -1, 1, 3, 10**9, 10**30, 1e308, 1e-320, float("nan"), float("inf"), "", "x", "7", "\0",
          "\ud800", "\x1b[2J", "../..", "a" * 10**5, [], [1], ["x"] * 1000, {}, {"a": 1}, [[[[]]]]]
TENSORS = [torch.zeros(()), torch.zeros(3), torch.full((2, 2), float("nan")), torch.zeros(1).expand(10**6, 10**6),
           torch.zeros(4, dtype=torch.complex64), torch.eye(3).to_sparse(), torch.empty(5, device="meta")]
FILES = {"args.json": 4, "log.jsonl": 1, "result.json": 1, "evaluation.json": 2, "checkpoint.pt": 5, "encoder.pt": 3}
READ = {"resume": ("args.json", "log.jsonl", "result.json", "checkpoint.pt"), "frechet": ("args.json", "encoder.pt"),
        "evaluation": ("args.json", "evaluation.json", "checkpoint.pt", "encoder.pt"),
        "sample": ("args.json", "checkpoint.pt")}


def argv(name, images, *more):
    return [*f"--dataset folder --data-dir {images} --batch-size 8 --epochs 2 --workers 0 --device cpu --amp off "
            f"{TINY[name]}".split(), *map(str, more)]


# ---- mutations


def places(value, at=()):
    """The paths of keys to all that is in nested dicts and lists."""
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*at, key))


def mutate_value(value, rng, values):
    """A copy with one place replaced, taken out or put under another key, and what was done."""
    value = copy.deepcopy(value)
    *way, last = rng.choice([place for place in places(value) if place])
    inside = value
    for key in way:
        inside = inside[key]
    how = rng.randrange(5)
    if how == 0:
        del inside[last]
    elif how == 1 and isinstance(inside, dict):
        inside[rng.choice(["new", "", "data-dir", "x=1", 3])] = inside.pop(last)
    else:
        inside[last] = rng.choice(values)
    return value, f"{[*way, last]}, {how}"


def mutate_bytes(path, rng):
    data, how = bytearray(path.read_bytes()), rng.randrange(7)
    if how == 0:
        data = data[: rng.randrange(len(data))]
    elif how == 1:
        for _ in range(rng.choice([1, 1, 10, 100])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif how == 2:
        data = rng.randbytes(rng.choice([0, 1, 1000]))
    elif how == 3:
        at = rng.randrange(len(data))
        data[at:at] = rng.randbytes(rng.choice([1, 8, 1000]))
    elif how == 4:
        data = b"[" * 10**6
    path.unlink()
    if how == 5:
        path.mkdir()
    elif how == 6:
        os.mkfifo(path)
    else:
        path.write_bytes(data)
    return f"bytes, {how}"


def mutate(path, rng):
    """Changes the file in one way, and says which."""
    if rng.randrange(8) == 0:                                                 # enormous, where it takes no disk
        os.truncate(path, 10**10)
        return "10 GB"
    if rng.randrange(3) == 0:
        return mutate_bytes(path, rng)
    if path.suffix == ".pt":
        value, what = mutate_value(torch.load(path, weights_only=True), rng, VALUES + TENSORS)
        torch.save(value, path)
    else:
        value, what = mutate_value(json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl" else
                                              path.read_text()), rng, VALUES)
        path.write_text(json.dumps(value))
    return what


def commands(run, method):
    """{name: call} of what reads a run's folder."""
    flags = ["--device", "cpu", "--amp", "off", "--workers", 0]
    found = {"resume": lambda: sys.modules[method].main(["--resume", run, "--workers", "0"]),
             "evaluation": lambda: evaluation.main([run, *flags, "--ood", "patterns"])}
    if method == "gcrl":
        found |= {"sample": lambda: gcrl.main(["--sample", run, "--samples", "2", "--workers", "0"]),
                  "frechet": lambda: gcrl.main(["--sample", run, "--samples", "4", "--frechet", run])}
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.stat().st_size < 10**9}


def fuzz(cases, folder, seed=0, seconds=60):
    """Runs the cases, prints and returns those that failed: [sentence]."""
    images, rng, failures, counts = make_images(folder / "images"), random.Random(seed), [], {}
    for name, module in (("simclr", simclr), ("gcrl", gcrl)):
        with contextlib.redirect_stdout(io.StringIO()):
            module.main(argv(name, images, "--out", folder / name))
            evaluation.main([folder / name, "--device", "cpu", "--amp", "off", "--workers", 0])

    def alarm(*_):
        raise TimeoutError("it hangs")

    signal.signal(signal.SIGALRM, alarm)
    for case in range(cases):
        method, (file,) = rng.choice(["simclr", "gcrl"]), rng.choices(list(FILES), FILES.values())
        shutil.rmtree(run := folder / "run", ignore_errors=True)
        shutil.copytree(folder / method, run)
        what = f"case {case}: {method}, {file}, {mutate(run / file, rng)}"
        readers = {name: call for name, call in commands(str(run), method).items() if file in READ[name]}
        name, call = rng.choice(list(readers.items()))
        before, told = contents(run), io.StringIO()
        signal.alarm(seconds)
        try:
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                call()
            outcome = "done"
        except (Refusal, OSError) as refusal:                                 # cli.program makes a sentence of either
            outcome = "refused"
            if "\n" in str(refusal) or len(str(refusal)) > 5000 or not (
                    isinstance(refusal, Refusal) or refusal.filename):
                failures.append(f"{what}, {name}: {len(str(refusal))} characters, {str(refusal)[:300]}")
            if contents(run) != before and isinstance(refusal, Refusal):
                failures.append(f"{what}, {name}: refused, but the folder has changed ({refusal})")
        except BaseException:
            outcome = "failed"
            failures.append(f"{what}, {name}: {traceback.format_exc()}")
        signal.alarm(0)
        if name != "resume" and {k: v for k, v in contents(run).items() if k in before and k != "evaluation.json"} != \
                {k: v for k, v in before.items() if k != "evaluation.json"}:
            failures.append(f"{what}, {name}: something was overwritten")
        counts[outcome] = counts.get(outcome, 0) + 1
    print(f"{cases} mutations: {counts}; {len(failures)} failures", *failures, sep="\n", flush=True)
    return failures


# ---- kills


def weights_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def kill(name, cases, folder, seed=0):
    """Starts the script, kills or interrupts it after a random time, resumes, kills ... `cases` times: each run that
    comes to its end has to be the uninterrupted one's bit for bit, and Ctrl-C (SIGINT) leaves no traceback, and no new
    run without a checkpoint. Returns the failures."""
    images, rng, failures, killed, ended = make_images(folder / "images"), random.Random(seed), [], 0, 0

    def start(out):
        resumed = (out / "args.json").exists()
        if not resumed:
            shutil.rmtree(out, ignore_errors=True)
        words = ["--resume", str(out)] if resumed else argv(
            name, images, "--out", out, "--epochs", 6, "--knn-every", 2)      # by default it depends on the time
        return Program([ROOT / f"{name}.py", *words], folder, folder / "output", OMP_NUM_THREADS="1")

    whole, begin = folder / "whole", time.perf_counter()
    assert start(whole).wait() == 0, (folder / "output").read_text()
    lasts, want = time.perf_counter() - begin, comparable(whole)
    while killed < cases:
        new, begin, process = not (folder / "run").exists(), time.perf_counter(), start(folder / "run")
        try:
            status = process.wait(rng.uniform(0.1, 1.1) ** 2 * lasts)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, number := rng.choice((signal.SIGKILL, signal.SIGINT)))
            status, output = process.wait(60), (folder / "output").read_text()
            empty = new and (folder / "run").exists() and not (folder / "run" / "checkpoint.pt").exists()
            if number == signal.SIGINT and ("in main" in output or status not in (0, 1, 130) or empty):
                failures.append(f"{name}: after Ctrl-C, status {status}, {'an empty run, ' * empty}{output[-2000:]}")
            killed += 1                                                       # status 1: in the midst of the imports
            continue
        if status or comparable(folder / "run") != want:
            failures.append(f"{name}: after {killed} kills {(folder / 'output').read_text()[-2000:]}")
        ended, lasts = ended + 1, min(lasts, time.perf_counter() - begin)     # on a machine that is less busy now
        shutil.rmtree(folder / "run")
    if (folder / "run").exists() or not ended:
        if start(folder / "run").wait() or comparable(folder / "run") != want:
            failures.append(f"{name}: at the end {(folder / 'output').read_text()[-2000:]}")
        ended += 1
    print(f"{name}: {killed} kills, {ended} runs came to their end, {len(failures)} failures", *failures, sep="\n",
          flush=True)
    return failures


def comparable(folder):
    """What a run's folder holds, but for the times: text that is equal where all is equal bit for bit."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["progress"].pop("seconds")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    for entry in (*state["history"], *log, result):
        for name in ("seconds", "peak_memory"):
            entry.pop(name, None)

    def plain(value):
        if torch.is_tensor(value):
            return [str(value.dtype), value.tolist()]
        if isinstance(value, dict):
            return {str(key): plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
    return repr(plain([state, log, result, torch.load(folder / "encoder.pt", weights_only=True)]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kill", action="store_true", help="kill -9 and Ctrl-C in place of mutations")
    parser.add_argument("--cases", type=int, help="mutations (400), or kills of each script (30)")
    parser.add_argument("--scripts", nargs="+", default=["simclr", "gcrl"], help="that are killed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.kill:
            failures = []
            for name in args.scripts:
                (place := Path(folder) / name).mkdir()
                failures += kill(name, args.cases or 30, place, args.seed)
        else:
            linear_probe.L2 = (1e-2,)                                         # probes are not what is tested
            failures = fuzz(args.cases or 400, Path(folder), args.seed)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
