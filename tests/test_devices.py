# SPDX-License-Identifier: MIT
"""Devices that are not here, by tests/simulated_device.py, and half precision with its gradient scaler on the CPU."""
import contextlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cmc
import cpc
import dim
import gcrl
import moco
import mutations
import simclr
from common import augment, cli, data, pictures
from common.evaluation import __main__ as evaluation
from common.progress import Progress
from simulated_device import Device, device_of

ROOT, CPU, CPU_GENERATOR = Path(__file__).parent.parent, torch.device("cpu"), torch.Generator()
SHORT = "--batch-size 20 --epochs 1 --amp auto".split()
KINDS = {"bf16": ("cuda", (8, 0)), "fp16": ("cuda", (7, 5)), "mps": ("mps", (0, 0))}
VARIANTS = [
    (simclr, "--blur 0.5"), (simclr, "--loss logistic --semi-hard"), (simclr, "--loss supervised --cache-gb 0"),
    (simclr, "--loss margin --augmentations crop cutout rotation noise sobel --one-branch --optimizer lars"),
    (moco, "--blur 0.5 --head mlp"), (moco, "--dictionary memory-bank --contrast nce"),
    (moco, "--dictionary memory-bank --negatives 0"), (moco, "--dictionary end-to-end --symmetric"),
    (cmc, "--jitter 0.5"), (cmc, "--contrast nce --views ycbcr --negatives 0"),
    (cmc, "--dictionary end-to-end --views rgb"),
    (cpc, ""), (cpc, "--augmentation v1 --norm batch --directions 1"),
    (dim, ""), (dim, "--objective both --critic concat --estimator dv --views 2"),
    (dim, "--estimator infonce --views 2"),
    (dim, "--objective multiscale --image-size 32 --width 2 --units 8 --depth 1"),
    (gcrl, "--micro-batch 4"), (gcrl, "--alpha 0"), (gcrl, "--beta 0")]
# Each script on one kind of device, in turn; SWEEP=1 in the environment: each variant on each.
RUNS = [(kind, *variant) for kind in KINDS for variant in VARIANTS] if os.environ.get("SWEEP") else [
    ("bf16", simclr, "--blur 0.5"), ("bf16", gcrl, "--micro-batch 4"), ("fp16", moco, "--dictionary memory-bank"),
    ("fp16", dim, "--views 2"), ("mps", cmc, "--jitter 0.5"), ("mps", cpc, ""), ("mps", gcrl, "")]
names = lambda value: getattr(value, "__name__", value)


# ---- the simulator


@pytest.fixture
def device():
    with Device("cuda") as device:
        yield device


@pytest.mark.parametrize("wrong", [
    lambda x, y: x + y, lambda x, y: y.add_(x.sum()), lambda x, y: torch.cat([x, y]), lambda x, y: x @ y.T,
    lambda x, y: torch.where(x > 0, x, y), lambda x, y: y[x.long()], lambda x, y: F.embedding(y.long(), x),
    lambda x, y: x.index_copy_(0, torch.arange(2), x[:2]), lambda x, y: F.linear(x, y),
    lambda x, y: x.index_select(0, torch.tensor([0])), lambda x, y: F.mse_loss(x, y),
    lambda x, y: torch.stack([x.sum(), y.sum()]), lambda x, y: torch.rand(2, device="cuda", generator=CPU_GENERATOR),
    lambda x, y: torch.rand(2, generator=torch.Generator("cuda")),
    lambda x, y: x.softmax(1).multinomial(1, generator=CPU_GENERATOR), lambda x, y: x + torch.zeros(3, 2),
    lambda x, y: x.sub_(torch.arange(2.0)),
    lambda x, y: torch.nn.Linear(2, 2)(x), lambda x, y: F.cross_entropy(x, torch.tensor([0, 1, 0]))])
def test_two_devices_raise(device, wrong):
    x, y = torch.ones(3, 2, device="cuda"), torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="device"):
        wrong(x, y)


def test_numpy_of_a_device_raises(device):
    with pytest.raises(TypeError, match="numpy"):
        torch.ones(3, device="cuda").numpy()
    assert torch.ones(3, device="cuda").cpu().numpy().sum() == 3


def test_what_is_right_passes(device):
    """Results are the CPU's and are on the device: also in the backward pass, in optimisers, in copies of modules."""
    x = torch.arange(6.0).view(3, 2).to("cuda")
    for y in (x + torch.tensor(2.0), torch.where(x > 0, x, 0.0), x[torch.tensor([0, 1])], x * 2, x.new_zeros(2),
              torch.zeros_like(x), x.to(torch.float16), x.masked_fill(x > 2, torch.tensor(1.0)), x.clone()[1:],
              torch.rand(2, device="cuda", generator=torch.Generator("cuda")), F.one_hot(x.long(), 6)):
        assert device_of(y) == y.device == torch.device("cuda", 0) and y.is_cuda
    x[0] = 5.0
    x[torch.arange(2)] = torch.tensor(3.0)
    assert x.cpu().tolist() == [[3, 3], [3, 3], [4, 5]] and x.cpu().device == CPU
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4)).to("cuda")
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    net(x).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    values = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())]
    values += [optimizer.state[p]["exp_avg"] for p in net.parameters()]
    assert all(v.device.type == "cuda" for v in values) and optimizer.state[net[0].weight]["step"].device == CPU


@pytest.mark.parametrize("line, waits", [
    (lambda x: x.sum().item(), 1), (lambda x: float(x[0, 0]), 1), (lambda x: bool((x > 0).all()), 1),
    (lambda x: x.cpu(), 1), (lambda x: x[x > 0], 1), (lambda x: x.nonzero(), 1), (lambda x: x.tolist(), 1),
    (lambda x: x.new_tensor([1.0]), 1),
    (lambda x: torch.tensor([1.0], device="cuda"), 1), (lambda x: torch.ones(3).to("cuda", non_blocking=True), 1),
    (lambda x: torch.ones(3).pin_memory().to("cuda"), 1), (lambda x: x[torch.arange(2)], 1), (lambda x: x.unique(), 1),
    (lambda x: x.masked_select(x > 0), 1), (lambda x: x.__setitem__(x > 0, 0.0), 1),
    (lambda x: torch.as_tensor([1, 2], device="cuda"), 1), (lambda x: x.copy_(torch.ones(3, 2)), 1),
    (lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True), 0),
    (lambda x: torch.ones(3, device="cuda"), 0),
    (lambda x: torch.where(x > 0, x, 0.0).sum() / (x > 0).sum(), 0), (lambda x: x[torch.arange(2, device="cuda")], 0),
    (lambda x: torch.arange(3, device=x.device) + x.mean(), 0), (lambda x: x.to("cuda"), 0), (lambda x: len(x), 0)])
def test_waits_are_counted(device, line, waits):
    x = torch.ones(3, 2, device="cuda")
    line(x)
    assert [kind for kind, *_ in device.events].count("wait") == waits


def test_copies_are_counted(device):
    for _ in range(3):
        augment.send(torch.ones(4), torch.device("cuda"))
    assert [kind for kind, *_ in device.events] == 3 * ["copy"]


@pytest.mark.parametrize("wrong, error", [
    (lambda x: x.double(), TypeError), (lambda x: torch.ones(3, dtype=torch.float64).to("mps"), TypeError),
    (lambda x: torch.linalg.eigh(x), NotImplementedError), (lambda x: torch.special.ndtri(x), NotImplementedError),
    (lambda x: torch.zeros(2, dtype=torch.float64, device="mps"), TypeError),
    (lambda x: torch.ones(3).to("mps", non_blocking=True), AssertionError),
    (lambda x: x + torch.ones(2, 2), RuntimeError)])
def test_mps_lacks(wrong, error):
    with Device("mps"):
        x = torch.eye(2, device="mps")
        assert (x @ x + x.cumsum(0)).cpu().double().sum() == 5
        with pytest.raises(error):
            wrong(x)


def test_cmcs_nce_alone(device):
    """What callers may leave out is made on the device."""
    q, k, negatives = torch.nn.functional.normalize(torch.ones(3, 4, 2, device="cuda"), dim=2)
    assert cmc.nce(q, k, negatives, 0.1).device.type == "cuda"


def test_drawn_images_are_kept_on_the_device(device):
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    assert data.Images(pixels, None, torch.device("cuda", 0), 0, True).pixels.is_cuda


# ---- training


@contextlib.contextmanager
def simulated(kind, monkeypatch):
    """A device of KINDS, in which the lines of progress, which are a minute apart, count for nothing. Probes are short:
    they ask for values in each of their steps, which takes long where each operation is looked at."""
    if kind == "mps" and torch.__version__ < cli.MPS_FROM:
        pytest.skip("this torch lacks operations on MPS")
    with Device(*KINDS[kind]) as device, monkeypatch.context() as patch:
        read, lbfgs = Progress.read, torch.optim.LBFGS
        patch.setattr(torch.optim, "LBFGS", lambda weights, **more: lbfgs(weights, **more | {"max_iter": 2}))

        def uncounted(self):
            with device.uncounted():
                read(self)
        patch.setattr(Progress, "read", uncounted)
        yield device


@pytest.mark.parametrize("script, flags", VARIANTS, ids=names)
def test_a_step_does_not_make_a_gpu_wait(script, flags, tiny, here, monkeypatch):
    """At most 4 copies from host to device, all of pinned memory, and no wait; the loss is finite, in bf16."""
    marks, update = [], Progress.update
    with simulated("bf16", monkeypatch) as device:
        monkeypatch.setattr(Progress, "update", lambda *args, **more: (update(*args, **more),
                                                                       marks.append(len(device.events))))
        for owner, after in ((script.Run, "finish"), (Progress, "end_epoch")):
            monkeypatch.setattr(owner, after, lambda *args, **more: {})
        script.main(tiny(script, *SHORT, "--device", "cuda", *flags.split()))
    assert len(marks) == 2
    for first, last in zip(marks, marks[1:]):
        events = device.events[first:last]
        assert not [event for event in events if event[0] == "wait"]
        assert 1 <= len(events) <= 4


@pytest.mark.parametrize("line, what, mutant", list(mutations.mutants((ROOT / "cpc.py").read_text())))
def test_a_wrong_line_is_caught(line, what, mutant, tiny, here, monkeypatch):
    """A share of what tests/mutations.py does with all files."""
    wrong = {"__name__": "wrong", "__file__": str(ROOT / "cpc.py")}
    exec(compile(mutant, "cpc.py", "exec"), wrong)
    with simulated("bf16", monkeypatch), pytest.raises(RuntimeError, match="device"):
        wrong["main"](tiny(cpc, *SHORT, "--device", "cuda"))


def stopped(script, argv, monkeypatch):
    """A run that is stopped after its first step."""
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "stop_requested", lambda self: True)
        with pytest.raises(SystemExit):
            script.main(argv)


@pytest.mark.parametrize("kind, script, flags", RUNS, ids=names)
def test_runs_from_start_to_end(kind, script, flags, tiny, here, monkeypatch):
    """Stopped, resumed, evaluated, with pictures."""
    name, flags = KINDS[kind][0], flags.split()
    with simulated(kind, monkeypatch):
        stopped(script, tiny(script, *SHORT, "--device", name, "--out", "run", *flags), monkeypatch)
        metrics = script.main(["--resume", "run"])
    assert 0 <= metrics["linear"]["trained"] <= 1
    assert all(math.isfinite(value) for value in json.loads(Path("run/log.jsonl").read_text()).values())
    assert bool(torch.load("run/checkpoint.pt", weights_only=True)["scaler"]) == (kind == "fp16")


@pytest.mark.parametrize("first, then", [("cpu", "fp16"), ("bf16", "fp16"), ("fp16", "cpu"), ("fp16", "bf16")])
def test_resume_on_another_device(first, then, tiny, here, monkeypatch):
    """A gradient scaler that was not needed has no state; one that was is left out where it is not needed."""
    monkeypatch.setattr(simclr.Run, "finish", lambda *args, **more: {})
    on = lambda kind: simulated(kind, monkeypatch) if kind != "cpu" else contextlib.nullcontext()
    with on(first):
        stopped(simclr, tiny(simclr, *SHORT, "--device", "auto", "--out", "run"), monkeypatch)
    with on(then):
        simclr.main(["--resume", "run"])
    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert state["epoch"] == 1 and bool(state["scaler"]) == (then == "fp16")


# ---- what comes after training


@pytest.fixture
def copied(finished, here):
    """copied(script): a copy of its finished run, to write into."""
    return lambda script: shutil.copytree(finished(script).folder, here / script.__name__)


@pytest.mark.parametrize("kind", ["bf16", "mps"])
def test_sampling(kind, copied, images, monkeypatch):
    run, judge, mine = copied(gcrl), copied(cmc), next((images / "test").glob("*/*"))
    with simulated(kind, monkeypatch):
        result = gcrl.main(["--sample", run, "--device", KINDS[kind][0], "--samples", 6, "--top-k", 2, "--complete",
                            mine, "--frechet", judge])
    assert math.isfinite(result["frechet"]["samples"]) and list(run.glob("completions-*.png"))


@pytest.mark.parametrize("kind, script", [("fp16", dim), ("mps", gcrl)], ids=names)
def test_evaluation(kind, script, copied, images, monkeypatch):
    run, blocks = copied(script), ["--blocks"] if script is gcrl else []
    with simulated(kind, monkeypatch):
        result = evaluation.main([run, "--device", KINDS[kind][0], "--labels", 0.5, "--draws", 1, "--finetune",
                                  "--epochs", 1, "--workers", 0, "--ood", images / "test", *blocks])
        evaluation.main([run, "--device", KINDS[kind][0], "--workers", 0, "--export", "features.npz", "--map",
                         "--neighbours", next((images / "test").glob("*/*"))])
    assert {"linear", "knn", "labels", "finetune", "ood", *(name[2:] for name in blocks)} <= result.keys()
    assert Path("features.npz").exists() and (run / "map.png").exists() and (run / "nearest.png").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_of_neighbours_among_the_queries_themselves(kind, here, monkeypatch):
    """The picture of a run without labels."""
    with simulated(kind, monkeypatch):
        device = torch.device(KINDS[kind][0])
        images = data.Images(torch.arange(6 * 3 * 8 * 8).view(6, 3, 8, 8).to(torch.uint8), None, device, 0, True)
        features = torch.eye(6, device=device)
        pictures.neighbours("nearest.png", images, features, images, features, n=3, k=2)
    assert Path("nearest.png").exists()


def test_readmes_weights_load_without_the_device_that_trained_them():
    loads = re.findall(r"torch\.load\(.*\)", (ROOT / "README.md").read_text())
    assert loads and all("map_location" in load for load in loads)


# ---- half precision on the CPU


def test_fp16_on_the_cpu(script, tiny, here, same, content, monkeypatch):
    """With the real scaler, of so large a first scale that gradients overflow: that step is skipped, the others are
    not, and a resumed run goes on with the scale. Views are in float32, those that fill a bank too."""
    seen, apply, grad_scaler = [], augment.apply, torch.amp.GradScaler

    class Scaler(grad_scaler):
        def __init__(self, device, enabled):
            super().__init__(device, init_scale=2.0**40, backoff_factor=2.0**-40, enabled=enabled)

        def step(self, optimizer):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            before = [p.clone() for p in weights]
            super().step(optimizer)
            seen.append((self.get_scale(), any(not torch.equal(a, b) for a, b in zip(before, weights))))

    def checked(x, steps):
        assert not torch.is_autocast_enabled("cpu")
        return apply(x, steps)
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    monkeypatch.setattr(augment, "apply", checked)
    monkeypatch.setattr(script.Run, "finish", lambda *args, **more: {})
    flags = ["--batch-size", 10, "--epochs", 1, "--amp", "fp16", *(["--jitter", 0.5] if script is cmc else [])]
    flags += ["--views", 2] if script is dim else []
    script.main(tiny(script, "--out", "whole", *flags))
    assert seen == [(2.0**40, False)] + 3 * [(1.0, True)]
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "stop_requested", lambda self: len(seen) == 6)
        with pytest.raises(SystemExit):
            script.main(tiny(script, "--out", "run", *flags))
    script.main(["--resume", "run"])
    assert seen[4:] == seen[:4] and same(content(here / "run"), content(here / "whole"))


def test_banks_of_memory_are_filled_in_float32(tiny, here, monkeypatch):
    """MoCo's, too."""
    apply = augment.apply
    monkeypatch.setattr(augment, "apply", lambda x, steps: apply(x, steps) if not torch.is_autocast_enabled("cpu") else
                        pytest.fail("a view is made under autocast"))
    monkeypatch.setattr(moco.Run, "finish", lambda *args, **more: {})
    moco.main(tiny(moco, "--dictionary", "memory-bank", "--amp", "bf16", "--epochs", 1))
