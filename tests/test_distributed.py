# SPDX-License-Identifier: MIT
"""Training in two processes against one, and what becomes of a process whose partner fails."""
import contextlib
import datetime
import importlib
import json
import os
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:                                                 # in the processes that are started here
    sys.path.insert(0, str(ROOT))

from common import Refusal, cli, distributed, linear_probe, progress, shapes  # noqa: E402
from common.run import Run  # noqa: E402
from programs import Program  # noqa: E402

ALL = "--image-size 8 --epochs 1 --batch-size 80 --amp off --device cpu --workers 0"
CASES = {  # at a high rate batch norm amplifies rounding, and Adam takes whole steps where the gradient is nothing else
    "simclr": "--width 4 --lr 0.0001",
    "moco": "--width 4 --lr 0.001 --bn-groups 2 --negatives 100",
    "moco memory-bank": "--width 4 --lr 0.001 --dictionary memory-bank --negatives 300",
    "moco end-to-end": "--width 4 --lr 0.001 --bn-groups 2 --dictionary end-to-end --symmetric",
    "cmc": "--width 4 --lr 0.001 --warmup 0 --batch-size 200 --dictionary memory-bank --negatives 300",
    "cmc end-to-end": "--width 4 --lr 0.001 --warmup 0 --batch-size 200 --dictionary end-to-end",
    "cpc": "--width 4 --context-width 8 --lr 0.0002 --image-size 10 --patch 4 --stride 2",
    "cpc float64": "--width 4 --context-width 8 --lr 0.0002 --image-size 10 --patch 4 --stride 2 --norm batch",
    "dim": "--width 4 --units 8 --lr 0.0002 --objective both",
    "dim multiscale": "--width 2 --units 8 --lr 0.0002 --objective multiscale --depth 1 --image-size 32",
    "gcrl": "--width 8 --heads 2 --encoder-layers 1 --decoder-layers 1 --colours 4 --lr 0.0002 --micro-batch 16",
    "gcrl alpha 0": "--width 8 --heads 2 --encoder-layers 1 --decoder-layers 1 --colours 4 --lr 0.0002 --alpha 0",
}
# Without --local-addr the processes look for each other by the machine's name, which does not resolve everywhere.
TORCHRUN = ["-m", "torch.distributed.run", "--local-addr", "127.0.0.1"]
LOOPBACK = {"OMP_NUM_THREADS": "1", **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})}
PATIENCE = datetime.timedelta(seconds=50)                                     # what hangs is an error within a minute


def train(case, folder):
    """Runs a case. float64 shows that nothing but rounding tells two processes from one."""
    with pytest.MonkeyPatch.context() as patch:
        if "float64" in case:
            wrap = distributed.wrap
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            patch.setattr(Run, "finish", lambda *args, **kwargs: None)
            patch.setattr(distributed, "wrap", lambda module, *args, **kwargs: wrap(module.double(), *args, **kwargs))
        importlib.import_module(case.split()[0]).main([*ALL.split(), *CASES[case].split(), "--out", folder / case])


@contextlib.contextmanager
def few_images():
    """400 images of shapes are enough here, of which 8 x 8 pixels."""
    draw = shapes.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "draw", lambda n, *rest: draw(n // 5, *rest))
        patch.setattr(linear_probe.WhitenedPixels.__init__, "__defaults__", (256, 8))
        for name in linear_probe.MEASURES:                                    # what is trained is tested, not its worth
            patch.setitem(linear_probe.MEASURES, name, lambda *_: 0.0)
        yield


def all_cases():
    """The program of two processes: all cases, one after the other, and a gradient. Warnings are errors."""
    os.environ |= dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    os.environ["RANK"] = str(int((other := os.fork()) == 0))
    warnings.simplefilter("error")
    init, end, distributed.end = dist.init_process_group, distributed.end, lambda: None
    dist.init_process_group = lambda *args: init(*args, timeout=PATIENCE)
    with few_images():
        for case in CASES:
            train(case, Path())
    rank, _ = distributed.rank_and_world()
    x = torch.arange(12.0).view(2, 3, 2) + 12 * rank
    x.requires_grad_()
    weights = torch.arange(24.0).view(4, 2, 3) ** 2
    (distributed.gather(x).transpose(1, 2) * weights).sum().backward()
    torch.save(x.grad, f"gradient{rank}")
    end()
    if rank == 0:
        assert os.waitpid(other, 0)[1] == 0


def start(folder, tiny):
    """Runs `all_cases`."""
    return program("all_cases()", folder, folder / "output")


def program(call, folder, *output, **environment):
    """A call of this module as a program."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import test_distributed as t; t.{call}"
    return Program(["-c", code], folder, *output, **LOOPBACK, **environment)


@pytest.fixture(scope="module")
def two(background, ended):
    """The folder of the runs in two processes."""
    return ended(*background)


@pytest.mark.parametrize("rank", [0, 1])
def test_gradient_of_gather(two, rank):
    """What both processes' losses ask of a process's part, also where it arrives transposed."""
    weights = torch.arange(24.0).view(4, 2, 3) ** 2
    gradient = torch.load(two / f"gradient{rank}", weights_only=True)
    assert torch.equal(gradient, 2 * weights.transpose(1, 2)[2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, two, tmp_path):
    """The same losses, gradients and weights from two processes of half a batch each as from one with all of it."""
    with few_images():
        train(case, tmp_path)
    exact = "float64" in case
    log, log2 = (json.loads((folder / case / "log.jsonl").read_text()) for folder in (tmp_path, two))
    for key in log.keys() & {"loss", "nats", "contrastive", "global", "local", "prior", "penalty"}:
        assert log2[key] == pytest.approx(log[key], rel=1e-12 if exact else 1e-4)
    one, other = (torch.load(folder / case / "checkpoint.pt", weights_only=True) for folder in (tmp_path, two))
    means, means2 = ([state[key] for state in run["optimizer"]["state"].values()
                      for key in ("exp_avg", "momentum_buffer") if key in state] for run in (one, other))
    whole = torch.stack([mean.norm() for mean in means]).norm()               # running means of the gradients
    for mean, mean2 in zip(means, means2, strict=True):                       # 4 % at most: torch's batch norm rounds
        assert (mean - mean2).norm() <= (1e-10 if exact else 0.1) * mean.norm() + 1e-5 * whole * (not exact)
    model, model2 = one["model"], other["model"]                              # more in channels_last than ours
    for key in model:
        alone = case.startswith("moco") and "running" in key                  # each process has its groups' statistics
        if model[key].is_floating_point() and not alone:
            rtol, atol = (1e-8, 1e-10) if exact else (1e-2, 2e-3)
            assert torch.allclose(model[key], model2[key], rtol, atol), key


# ---- several machines, and processes that fail


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def test_two_machines(tiny, finished, tmp_path):
    """A torchrun for each, as README has it, on loopback: one run, no word on stderr, the loss of one process."""
    port, output = free_port(), [(tmp_path / f"stdout{rank}", tmp_path / f"stderr{rank}") for rank in (0, 1)]
    agents = [Program([*TORCHRUN, "--nnodes", "2", "--node-rank", rank, "--master-addr", "127.0.0.1", "--master-port",
                       port, "--nproc-per-node", "1", ROOT / "gcrl.py", *tiny("gcrl", "--out", tmp_path / "run")],
                      tmp_path, *output[rank], **LOOPBACK) for rank in (0, 1)]
    ended = [agent.wait(100) for agent in agents]
    (said, errors), (silence, errors2) = ([path.read_text() for path in paths] for paths in output)
    assert ended == [0, 0], errors + errors2
    assert "Warning" not in errors + errors2 and "processes 2" in " ".join(said.split()) and silence == ""
    ends = [json.loads((folder / "log.jsonl").read_text().splitlines()[-1]) for folder in
            (tmp_path / "run", finished("gcrl").folder)]
    for key in "nats", "contrastive":
        assert ends[0][key] == pytest.approx(ends[1][key], rel=1e-3)


def fails(rank, how, argv):
    """A program of two processes. "killed": the second dies in its third step. "download": what the first downloads
    takes longer than the group's time-out, and the next thing is not to be had. "stopped": Ctrl-C for the first in its
    third step, and it takes two seconds to save."""
    def refuse():
        raise Refusal("no such file")

    def main():
        if how == "download":
            distributed.start(torch.device("cpu"))
            getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)(datetime.timedelta(seconds=2))
            print(distributed.first_process_first(lambda: time.sleep(4 * (rank == 0)) or "downloaded"), flush=True)
            distributed.first_process_first(refuse)
        update, save = progress.Progress.update, Run.save

        def die_at_the_third(self, epoch, step, *args, **kwargs):
            if how == "stopped" and (rank, step) == (0, 2):
                os.kill(os.getpid(), signal.SIGINT)
            elif how == "killed" and (rank, step) == (1, 2):
                os._exit(9)
            return update(self, epoch, step, *args, **kwargs)
        progress.Progress.update = die_at_the_third
        if how == "stopped":
            Run.save = lambda *args: time.sleep(2 * (rank == 0)) or save(*args)
        importlib.import_module("gcrl").main(argv)
    sys.argv = ["gcrl.py"]
    cli.program(main)


@pytest.fixture
def both(tiny, tmp_path):
    """both(how): the two processes of `fails` with the run's folder RUN, without torchrun, which would end one when the
    other fails; and what they have written: a function of (rank, "stdout" or "stderr")."""
    started = []

    def start(how):
        port, argv = free_port(), list(map(str, tiny("gcrl", "--out", tmp_path / "run")))
        for rank in "01":
            files = [tmp_path / f"{name}{rank}" for name in ("stdout", "stderr")]
            started.append(program(f"fails({rank}, {how!r}, {argv})", tmp_path, *files, RANK=rank, WORLD_SIZE="2",
                                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
        return *started, lambda rank, name: (tmp_path / f"{name}{rank}").read_text()
    yield start
    for process in started:
        process.kill()


def test_all_processes_wait_for_the_save(both, tmp_path):
    """torchrun kills the first process, which saves, as soon as another has ended with a status other than 0."""
    first, second, written = both("stopped")
    assert second.wait(60) == 143 and (tmp_path / "run" / "checkpoint.pt").exists()
    assert first.wait(20) == 130 and "stopped and saved at step 3" in written(0, "stdout")
    assert "Traceback" not in written(0, "stderr") + written(1, "stderr")


@pytest.mark.parametrize("how, failing, status", [("killed", 1, 9), ("download", 0, 2)])
def test_a_failing_process_ends_the_other(how, failing, status, both, tmp_path):
    """At once, with a sentence, and no run is left that has nothing."""
    *processes, written = both(how)
    assert processes[failing].wait(60) == status and processes[1 - failing].wait(20) == 2
    errors, errors2 = written(failing, "stderr"), written(1 - failing, "stderr")
    assert "gcrl.py: another process has ended or does not answer: " in errors2 and "Traceback" not in errors2
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())
    if how == "download":
        assert written(0, "stdout") == written(1, "stdout") == "downloaded\n"
        assert errors.endswith("gcrl.py: no such file\n") and "Traceback" not in errors


def test_a_failing_set_up_shows_what_the_processes_wrote(ended, tmp_path):
    (tmp_path / "program.py").write_text("for i in range(60): print('line', i)\nraise SystemExit('the reason')\n")
    with pytest.raises(pytest.fail.Exception) as failure:
        ended(tmp_path, Program(["program.py"], tmp_path, tmp_path / "output"))
    assert "line 11\n" in (text := str(failure.value)) and "line 10\n" not in text and text.endswith("the reason")


def test_a_rank_alone_starts_nothing(monkeypatch):
    """Some clusters and notebooks set it without the rest of what torchrun sets."""
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    assert distributed.start(torch.device("cpu")) == (0, 1)


@pytest.mark.parametrize("rank, local, turns", [(0, 0, "f..."), (1, 1, "..f."), (2, 0, ".f.."), (3, 1, "..f.")])
def test_one_process_of_each_machine_goes_first(rank, local, turns, monkeypatch):
    """Two machines of two processes: which of the three turns a process takes; all wait after each."""
    seen = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "barrier", lambda _: seen.append("."))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    assert distributed.first_process_first(lambda x: seen.append("f") or x, 7) == 7
    assert "".join(seen) == turns


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_devices_that_processes_cannot_share(device, monkeypatch):
    """Every process on one GPU, and MPS; a GPU each is right."""
    joined = []
    monkeypatch.setattr(dist, "init_process_group", joined.append)
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(Refusal, match=f"--device {device}: "):
        distributed.start(torch.device(device))
    assert not joined
    distributed.start(torch.device("cuda:1"))
    assert joined == [torch.device("cuda:1"), "cpu:gloo,cuda:nccl"]
