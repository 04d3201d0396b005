"""Training in two processes against one."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("script, flags", [
    ("simclr.py", ["--width", "4", "--lr", "0.001"]),  # at a high rate batch norm amplifies rounding within ten steps
    ("moco.py", ["--width", "4", "--lr", "0.001", "--bn-groups", "2", "--negatives", "300"]),
    ("moco.py", ["--width", "4", "--lr", "0.001", "--bn-groups", "2", "--dictionary", "memory-bank"]),
    ("moco.py", ["--width", "4", "--lr", "0.001", "--bn-groups", "2", "--dictionary", "end-to-end", "--symmetric"]),
    ("cmc.py", ["--width", "4", "--lr", "0.001", "--warmup", "0"]),
    ("gcrl.py", ["--width", "8", "--heads", "2", "--encoder-layers", "1", "--decoder-layers", "1", "--colours", "4"]),
])
def test_two_processes_train_as_one(tmp_path, script, flags):
    """The same losses and weights from two processes of half a batch each as from one with all of it."""
    flags = [*flags, "--image-size", "8", "--epochs", "1", "--batch-size", "200", "--amp", "off", "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = [sys.executable, str(ROOT / script), *flags, "--out", str(tmp_path / "one")]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / script),
           *flags, "--out", str(tmp_path / "two")]
    for command in (one, two):
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    log, log2 = (json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("one", "two"))
    for key in ("loss", "nats", "contrastive"):
        if key in log:
            assert log2[key] == pytest.approx(log[key], rel=1e-4)
    model, model2 = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
                     for name in ("one", "two"))
    for key in model:
        alone = script == "moco.py" and "running" in key                      # each process has its groups' statistics
        if model[key].is_floating_point() and not alone:
            assert torch.allclose(model[key], model2[key], rtol=1e-2, atol=2e-3), key
