# SPDX-License-Identifier: MIT
"""Speed of the scripts on this machine:   python tests/bench.py [--device cuda] [--batch-size 128] [--repeats 5]

Medians; alternatives are timed in turn, so that a noisy machine disturbs both. --only gcrl --beside DIR also times the
gcrl.py of another checkout, in DIR, in turn with this one.
"""
import argparse
import contextlib
import importlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))
import cmc  # noqa: E402
import cpc  # noqa: E402
import dim  # noqa: E402
import gcrl  # noqa: E402
import moco  # noqa: E402
import simclr  # noqa: E402
from common import augment, cli, resnet, transformer  # noqa: E402
from common.run import Run, peak_memory  # noqa: E402


PARTS = ("simclr", "moco", "cmc", "cpc", "dim", "monitor", "augmentation", "gcrl", "attention")
GCRL = {"cpu": (32, 128, 2), "cuda": (32, 256, 4), "mps": (32, 128, 2)}  # image size, width and layers of its step
SMALL = (64, 16, 96, 2, 2, 6), 128, 32  # the network, batch and, on the CPU, --micro-batch of gcrl.py --small
MEMORY_OF = ["--dataset", "cifar10"]  # the flags of the run whose need of memory is counted
LIKELIHOODS = (((512, 32, 256, 4, 4, 8), 8), ((64, 16, 64, 1, 1, 4), 128))  # of gcrl.GCRL, and images


def medians(device, repeats, *functions):
    """Median seconds of each function, called in turn after a warm-up."""
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()
        elif device.type == "mps":
            torch.mps.synchronize()
    seconds = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for function, taken in zip(functions, seconds):
            wait()
            start = time.perf_counter()
            function()
            wait()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def show(text, value, goal=""):
    print(f"{text:68}{value:>14}  {goal}", flush=True)


def bench_simclr(device, autocast, n, repeats, width):
    x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, device=device)
    model = simclr.SimCLR(resnet.resnet18("cifar", width)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    rng = augment.Random(0)
    both = torch.rand(2 * n, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)

    def views():
        return torch.cat([simclr.view(x, rng, 32, 0.08, 0.5, 0.0) for _ in range(2)])

    def step():
        with autocast:
            z = model(views().contiguous(memory_format=torch.channels_last))[1]
        loss = simclr.nt_xent(*z.float().chunk(2), 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def bare():
        with autocast:
            h = model.encoder(both)
        h.float().square().mean().backward()
        model.zero_grad()

    full, encoder = medians(device, repeats, step, bare)
    show(f"simclr, ResNet-18 width {width}: full step, images/s", f"{n / full:.0f}")
    show("  bare encoder, forward and backward, images/s", f"{n / encoder:.0f}")
    show("  step / bare encoder", f"{full / encoder:.2f}", "goal 1.15")
    show("  peak memory, GB", f"{peak_memory(device) / 1e9:.2f}")


def bench_moco(device, autocast, n, repeats, width):
    x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, device=device)
    encoder = moco.EncoderWithHead("resnet18", "cifar", width, "linear", 8)
    model = moco.MoCo(encoder, "queue", 4096, 0.99).to(device, memory_format=torch.channels_last)
    plain = resnet.resnet18("cifar", width).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.query.parameters(), 0.01, momentum=0.9)
    rng = augment.Random(0)
    one = torch.rand(n, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)

    def step():
        x1, x2 = (moco.view(x, rng, 32, 0.08, "v2", 0.0) for _ in range(2))
        with autocast:
            loss, _, q, k = model(x1.contiguous(memory_format=torch.channels_last), x2, 0.1,
                                  order=torch.randperm(n).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.remember(q, k)

    def bare():
        with autocast:
            h = plain(one)
            with torch.no_grad():
                plain(one)
        h.float().square().mean().backward()
        plain.zero_grad()

    full, bare_encoder = medians(device, repeats, step, bare)
    show(f"moco, queue, ResNet-18 width {width}: full step, images/s", f"{n / full:.0f}")
    show("  bare encoder: a view forward and backward, one forward, images/s", f"{n / bare_encoder:.0f}")
    show("  step / bare encoder (the step normalises in 8 groups)", f"{full / bare_encoder:.2f}")


def bench_cmc(device, autocast, n, repeats, width):
    x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, device=device)
    model = cmc.CMC(cmc.Encoder("lab", "resnet18", "cifar", width), 50_000)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    rng, index, pairs = augment.Random(0), torch.arange(n, device=device), cmc.pairs_of("full", 2)
    parts = cmc.split(torch.rand(n, 3, 32, 32, device=device), "lab")

    def step():
        drawn = torch.randint(50_000, (4096,)).to(device)
        with autocast:
            z = model(cmc.view(x, rng, 32, 0.2, 0.0))[1]
        loss = model.loss(z, index, drawn, pairs, "nce", 0.07)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.remember(z, index, 0.5)

    def bare():
        with autocast:
            h = [net(v.contiguous(memory_format=torch.channels_last)) for net, v in zip(model.encoder.nets, parts)]
        torch.cat(h).float().square().mean().backward()
        model.zero_grad()

    full, encoders = medians(device, repeats, step, bare)
    show(f"cmc, L and ab, two ResNet-18 of width {width}: full step, images/s", f"{n / full:.0f}")
    show("  bare encoders, forward and backward, images/s", f"{n / encoders:.0f}")
    show("  step / bare encoders", f"{full / encoders:.2f}")


def bench_cpc(device, autocast, n, repeats, width):
    x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, device=device)
    model = cpc.CPC(cpc.Encoder("resnet18", "cifar", width, "layer", 8, 4), 4, cpc.steps_ahead(8, 4, 5))
    model = model.to(device, memory_format=torch.channels_last)
    optimizer, rng = torch.optim.AdamW(model.parameters(), 1e-4), augment.Random(0)
    patches = cpc.view(x, rng, 32, 0.5, "v2", 0.2, 8, 4)

    def step():
        with autocast:
            grids = model(cpc.view(x, rng, 32, 0.5, "v2", 0.2, 8, 4))[1:]
        terms = [cpc.info_nce(*pair) for pair in cpc.pairs(*grids, model.ahead)]
        loss = sum(terms) / len(terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def bare():
        with autocast:
            z = model.encoder.grid(patches)
        z.float().square().mean().backward()
        model.zero_grad()

    full, encoder = medians(device, repeats, step, bare)
    show(f"cpc, 7 x 7 patches, ResNet-18 of width {width}: full step, images/s", f"{n / full:.0f}")
    show("  bare encoder, forward and backward, images/s", f"{n / encoder:.0f}")
    show("  step / bare encoder (the step has four context networks)", f"{full / encoder:.2f}")


def bench_dim(device, autocast, n, repeats, width):
    x = torch.rand(n, 3, 32, 32, device=device)
    model = dim.DIM(dim.Encoder("conv", width, 32), 1, 0.0, 1.0, 0.1, "jsd", "dot", 2048)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def step():
        with autocast:
            terms = model(x, torch.rand(n, 64, device=device))[1]
        optimizer.zero_grad()
        sum(terms).backward()
        optimizer.step()

    def bare():
        with autocast:
            y = model.encoder.layers(x)["Y"]
        y.float().square().mean().backward()
        model.zero_grad()

    full, encoder = medians(device, repeats, step, bare)
    show(f"dim, local, the paper's encoder of width {width}: full step, images/s", f"{n / full:.0f}")
    show("  bare encoder, forward and backward, images/s", f"{n / encoder:.0f}")
    show("  step / bare encoder (the step scores with 2048 units at 64 places)", f"{full / encoder:.2f}")


def bench_monitor(device):
    """What kNN takes of the time of `python simclr.py`, with its floors."""
    with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()),
          mock.patch.object(Run, "finish", autospec=True) as finish):
        simclr.main(["--device", device, "--out", f"{folder}/run"])
    progress = finish.call_args.args[0].tracked["progress"]
    share = progress.monitor.seconds / (progress.trained + progress.monitor.seconds)
    show("simclr on shapes: kNN while it trains, share of the time", f"{share:.3f}", "goal 0.05")


def bench_augmentation(device, n, repeats):
    x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, device=device)
    rng = augment.Random(0)
    pil = [to_pil_image(image) for image in x[:256].cpu()]
    pipeline = transforms.Compose([
        transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        transforms.RandomGrayscale(0.2), transforms.ToTensor()])
    ours, theirs = medians(device, repeats, lambda: simclr.view(x, rng, 32, 0.08, 0.5, 0.0),
                           lambda: [pipeline(image) for image in pil])
    show("augmentation: views/s", f"{n / ours:.0f}")
    show("  torchvision on PIL images, one process, views/s", f"{len(pil) / theirs:.0f}")
    show("  ratio", f"{theirs / len(pil) * n / ours:.1f}", "goal 6")


class Causal(nn.Module):
    """The same number of blocks with full causal attention over the D tokens: iGPT's network."""

    def __init__(self, like, width, heads, blocks):
        super().__init__()
        self.like = like
        self.blocks = nn.ModuleList(transformer.Block(width, heads, "row", causal=True) for _ in range(blocks))

    def forward(self, tokens):
        x = self.like.embedding(tokens) + self.like.row_position + self.like.column_position
        x = x.flatten(1, 2)[:, None]                                          # (N, 1, D, C), one row of all tokens
        for block in self.blocks:
            x = block(x)
        return self.like.to_logits(self.like.decoder_norm(x))


def bench_gcrl(device, autocast, n, repeats, size, width, layers):
    heads, colours = width // 32, 512
    model = gcrl.GCRL(colours, size, width, layers, layers, heads).to(device)
    full_attention = Causal(model, width, heads, 3 * layers).to(device)
    tokens = torch.randint(0, colours, (n, size, size), device=device)

    def step():
        with autocast:
            log_p, z1, z2, _ = model(tokens, tokens, True, True)
        (-log_p.mean() / (size**2 - 1) + gcrl.nt_xent(z1, z2, 0.2)).backward()
        model.zero_grad()

    def axial():
        with autocast:
            logits = model.logits(tokens)
        F.cross_entropy(logits.float().flatten(0, 2), tokens.flatten()).backward()
        model.zero_grad()

    def causal():
        with autocast:
            logits = full_attention(tokens)
        F.cross_entropy(logits.float().flatten(0, 2), tokens.flatten()).backward()
        full_attention.zero_grad()

    def encoder():
        with autocast:
            h = torch.cat([model.encode(tokens), model.encode(tokens)])
        h.float().square().mean().backward()
        model.zero_grad()

    hybrid, bare, ours, theirs = medians(device, repeats, step, encoder, axial, causal)
    name = f"gcrl, width {width}, {layers} encoder and {layers} decoder layers, {size} x {size}"
    show(f"{name}: step, images/s", f"{n / hybrid:.1f}")
    show("  bare encoder on both views, forward and backward, images/s", f"{n / bare:.1f}")
    show("  step / bare encoder (the step also decodes)", f"{hybrid / bare:.2f}")
    show("  full causal attention / axial, seconds of a likelihood step", f"{theirs / ours:.1f}", "goal 2")

    model.eval()
    batch = tokens[:16]

    @torch.no_grad()
    def forward():
        model.logits(batch)
    sampling, once = medians(device, max(1, repeats // 2), lambda: model.sample(16), forward)
    show("  sampling 16 images / a forward of 16 without gradient", f"{sampling / once:.1f}", "goal 8")
    show("  peak memory, GB", f"{peak_memory(device) / 1e9:.2f}")


def saved_bytes(forward):
    """Bytes that forward() keeps for the backward pass, weights aside: its activations."""
    storages = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor            # kept alive: no address comes twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def bench_gcrl_memory(device, amp):
    """The need of `python gcrl.py --dataset cifar10`, by arithmetic: activations grow with the images that go through
    the network at once, and each weight has a gradient and two means of Adam's."""
    args, n = gcrl.arguments(MEMORY_OF), 2
    size = args.image_size
    model = gcrl.GCRL(args.colours, size, args.width, args.encoder_layers, args.decoder_layers, args.heads).to(device)
    tokens = torch.randint(0, args.colours, (n, size, size), device=device)
    weights = 4 * 4 * sum(p.numel() for p in model.parameters())
    show("gcrl at the defaults of cifar10: weights, gradients and Adam's means, GB", f"{weights / 1e9:.2f}")
    for dtype in dict.fromkeys((amp, torch.bfloat16, None)):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            both, one = (saved_bytes(lambda: model(x, x, True, True)) for x in (tokens, tokens[:1]))
        image = both - one                                                    # without the weights in bf16
        name = str(dtype or torch.float32).removeprefix("torch.")
        show(f"  activations of one image, {name}, GB", f"{image / 1e9:.3f}")
        for micro_batch in (8, 16, args.batch_size):
            show(f"    {micro_batch} at once, with the weights, GB", f"{(micro_batch * image + weights) / 1e9:.1f}",
                 "goal 8" if micro_batch < args.batch_size else "")


def bench_gcrl_parts(device, autocast, repeats):
    """A training step of --small, without its views: of each loss alone, and with images that go through the network
    in parts, or in parts that are computed again in the backward pass."""
    sizes, n, micro_batch = SMALL
    model = gcrl.GCRL(*sizes).to(device)
    tokens = torch.randint(0, sizes[0], (n, sizes[1], sizes[1]), device=device)

    def step(generate, contrast, *parts):
        with autocast:
            log_p, z1, z2, _ = model(tokens, tokens, generate, contrast, *parts)
        loss = -log_p.mean() / (sizes[1]**2 - 1) if generate else 0.0
        (loss + gcrl.nt_xent(z1, z2, 0.2) if contrast else loss).backward()
        model.zero_grad()
    whole, kept, again, generative, contrastive = medians(
        device, repeats, lambda: step(True, True), lambda: step(True, True, micro_batch),
        lambda: step(True, True, micro_batch, True), lambda: step(True, False, micro_batch),
        lambda: step(False, True, micro_batch))
    show(f"gcrl --small: {n} images at once, images/s", f"{n / whole:.1f}")
    show(f"  {micro_batch} at once, images/s", f"{n / kept:.1f}")
    show(f"  {micro_batch} at once, with activations computed again, images/s", f"{n / again:.1f}")
    show(f"  {micro_batch} at once: hybrid / generative, seconds of a step", f"{kept / generative:.2f}")
    show(f"  {micro_batch} at once: hybrid / contrastive, seconds of a step", f"{kept / contrastive:.2f}")


def of_checkout(folder):
    """The gcrl module of another checkout, with its own common/."""
    if not (Path(folder) / "gcrl.py").is_file():
        sys.exit(f"bench.py: --beside {folder} has no gcrl.py")
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ("gcrl", "common")}
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("gcrl")
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in ("gcrl", "common")]:
            del sys.modules[name]
        sys.modules.update(ours)


def matrix_products(model, tokens, dtype):
    """A function that takes the matrix products of a likelihood step, forward and backward, and nothing else."""
    n, height, width = tokens.shape
    layers = [(m.in_features, m.out_features) for name, m in model.named_modules()
              if isinstance(m, nn.Linear) and not name.startswith("head")]
    make = lambda *shape: torch.randn(shape, dtype=dtype, device=tokens.device)
    linear = {(i, o): (make(n * height * width, i), make(o, i), make(n * height * width, o)) for i, o in layers}
    blocks, heads = [*model.encoder, *model.decoder], model.decoder[0].attention.heads
    q = make(n * height * heads, width, model.embedding.embedding_dim // heads)
    scores = make(n * height * heads, width, width)

    def products():
        for layer in layers:
            x, weight, gradient = linear[layer]
            x @ weight.T, gradient @ weight, gradient.T @ x
        for _ in blocks:
            q @ q.transpose(1, 2), scores @ q, scores.transpose(1, 2) @ q                     # scores, values, d values
            q @ q.transpose(1, 2), scores @ q, scores.transpose(1, 2) @ q                     # d scores, d q, d k
    return products


def bench_gcrl_likelihood(device, autocast, dtype, repeats, beside):
    for sizes, n in LIKELIHOODS:
        tokens = torch.randint(0, sizes[0], (n, sizes[1], sizes[1]), device=device)

        def likelihood_step(module):
            torch.manual_seed(0)
            model = module.GCRL(*sizes).to(device)

            def step():
                with autocast:
                    log_p = model.log_prob(tokens)
                (-log_p.mean() / tokens[0].numel()).backward()
                model.zero_grad()
            return step, model
        step, model = likelihood_step(gcrl)
        others = [likelihood_step(of_checkout(beside))[0]] if beside else []
        ours, products, *theirs = medians(device, repeats, step, matrix_products(model, tokens, dtype), *others)
        show(f"gcrl, {sizes[1]} x {sizes[1]}, width {sizes[2]}: likelihood step, images/s", f"{n / ours:.1f}")
        show("  its bare matrix products / step, share of the time", f"{products / ours:.2f}")
        for other in theirs:
            show(f"  {beside} / this checkout, time", f"{other / ours:.2f}", "goal 1.5")


def bench_attention(device, repeats):
    """Why attention on the CPU is written out."""
    q, k, v = (torch.randn(1024, 4, 32, 32, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3))

    def sdpa(dtype):
        F.scaled_dot_product_attention(*(t.to(dtype) for t in (q, k, v)), is_causal=True).float().sum().backward()
    written, bf16, f32 = medians(
        device, repeats, lambda: transformer.explicit_attention(q, k, v, True).float().sum().backward(),
        lambda: sdpa(torch.bfloat16), lambda: sdpa(torch.float32))
    show("attention, rows of 32, bf16: SDPA / written out, seconds", f"{bf16 / written:.2f}")
    show("  SDPA in float32 / written out in bf16, seconds", f"{f32 / written:.2f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=64, help="of ResNet-18")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    parser.add_argument("--beside", default=None, metavar="DIR", help="another checkout: its gcrl.py is timed in turn")
    args = parser.parse_args(argv)
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    print(f"{device}, {amp or torch.float32}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"batch {args.batch_size}")
    benches = {
        "simclr": lambda: bench_simclr(device, autocast, args.batch_size, args.repeats, args.width),
        "moco": lambda: bench_moco(device, autocast, args.batch_size, args.repeats, args.width),
        "cmc": lambda: bench_cmc(device, autocast, args.batch_size, args.repeats, args.width // 2),
        "cpc": lambda: bench_cpc(device, autocast, args.batch_size // 2, args.repeats, args.width // 4),
        "dim": lambda: bench_dim(device, autocast, args.batch_size, args.repeats, args.width),
        "monitor": lambda: bench_monitor(device),
        "augmentation": lambda: bench_augmentation(device, 512, args.repeats),
        "gcrl": lambda: (
            bench_gcrl_memory(device, amp),
            bench_gcrl_parts(device, autocast, args.repeats),
            bench_gcrl_likelihood(device, autocast, amp or torch.float32, args.repeats, args.beside),
            bench_gcrl(device, autocast, max(16, args.batch_size // 4), args.repeats, *GCRL[device.type])),
        "attention": lambda: bench_attention(device, args.repeats)}
    for name in args.only:
        benches[name]()


if __name__ == "__main__":
    main()
