"""Training in two processes against one."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import linear_probe, shapes

ROOT = Path(__file__).parent.parent
ALL = "--image-size 8 --epochs 1 --batch-size 80 --amp off --device cpu --workers 0"
CASES = {  # at a high rate batch norm amplifies rounding, and Adam takes whole steps where the gradient is nothing else
    "simclr": "--width 4 --lr 0.0001",
    "moco": "--width 4 --lr 0.001 --bn-groups 2 --negatives 100",
    "moco memory-bank": "--width 4 --lr 0.001 --dictionary memory-bank --negatives 300",
    "moco end-to-end": "--width 4 --lr 0.001 --bn-groups 2 --dictionary end-to-end --symmetric",
    "cmc": "--width 4 --lr 0.001 --warmup 0 --batch-size 200 --dictionary memory-bank --negatives 300",
    "cmc end-to-end": "--width 4 --lr 0.001 --warmup 0 --batch-size 200 --dictionary end-to-end",
    "cpc": "--width 4 --context-width 8 --lr 0.0002 --image-size 20",
    "dim": "--width 4 --units 8 --lr 0.0002 --objective both",
    "dim multiscale": "--width 2 --units 8 --lr 0.0002 --objective multiscale --depth 1 --image-size 32",
    "gcrl": "--width 8 --heads 2 --encoder-layers 1 --decoder-layers 1 --colours 4 --lr 0.0002",
}
PROGRAM = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
from common import linear_probe, shapes
draw = shapes.draw
shapes.draw = lambda n, *rest: draw(n // 5, *rest)
linear_probe.MEASURES = dict.fromkeys(linear_probe.MEASURES, lambda *_: 0.0)
for script, argv in json.loads(sys.argv[2]):
    importlib.import_module(script).main(argv)

import torch
from common import distributed
rank, world = distributed.rank_and_world()
x = torch.arange(12.0).view(2, 3, 2) + 12 * rank
x.requires_grad_()
weights = torch.arange(24.0).view(4, 2, 3) ** 2
(distributed.gather(x).transpose(1, 2) * weights).sum().backward()
torch.save(x.grad, f"gradient{rank}")
"""


def command(case, folder):
    return [case.split()[0], [*ALL.split(), *CASES[case].split(), "--out", str(folder / case)]]


@pytest.fixture(scope="module", autouse=True)
def few_images():
    """400 images of shapes are enough here."""
    draw = shapes.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "draw", lambda n, *rest: draw(n // 5, *rest))
        for name in linear_probe.MEASURES:                                    # what is trained is tested, not its worth
            patch.setitem(linear_probe.MEASURES, name, lambda *_: 0.0)
        yield


def start(folder, tiny):
    """Runs all cases, one after the other, in two processes."""
    (folder / "program.py").write_text(PROGRAM)
    with open(folder / "output", "w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             str(folder / "program.py"), str(ROOT), json.dumps([command(case, folder) for case in CASES])],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=folder, stdout=output, stderr=output)


@pytest.fixture(scope="module")
def two(ended):
    """The folder of the runs in two processes."""
    return ended("two")


@pytest.mark.parametrize("rank", [0, 1])
def test_gradient_of_gather(two, rank):
    """What both processes' losses ask of a process's part, also where it arrives transposed."""
    weights = torch.arange(24.0).view(4, 2, 3) ** 2
    assert torch.equal(torch.load(two / f"gradient{rank}"), 2 * weights.transpose(1, 2)[2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, two, tmp_path):
    """The same losses, gradients and weights from two processes of half a batch each as from one with all of it."""
    script, argv = command(case, tmp_path)
    importlib.import_module(script).main(argv)
    log, log2 = (json.loads((folder / case / "log.jsonl").read_text()) for folder in (tmp_path, two))
    for key in log.keys() & {"loss", "nats", "contrastive", "global", "local", "prior", "penalty"}:
        assert log2[key] == pytest.approx(log[key], rel=1e-4)
    one, other = (torch.load(folder / case / "checkpoint.pt", weights_only=True) for folder in (tmp_path, two))
    means, means2 = ([state[key] for state in run["optimizer"]["state"].values()
                      for key in ("exp_avg", "momentum_buffer") if key in state] for run in (one, other))
    whole = torch.stack([mean.norm() for mean in means]).norm()               # running means of the gradients
    for mean, mean2 in zip(means, means2, strict=True):                       # 4 % at most: torch's batch norm rounds
        assert (mean - mean2).norm() <= 0.1 * mean.norm() + 1e-5 * whole      # more in channels_last than ours
    model, model2 = one["model"], other["model"]
    for key in model:
        alone = script == "moco" and "running" in key                         # each process has its groups' statistics
        if model[key].is_floating_point() and not alone:
            assert torch.allclose(model[key], model2[key], rtol=1e-2, atol=2e-3), key
