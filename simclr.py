"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (Chen et al. 2020, 2002.05709).

Two random views of each of N images go through an encoder h = f(x) and a projection head z = g(h). For view i and its
other view j, among all 2N views (equation 1, NT-Xent):

    l(i, j) = -log  exp(sim(z_i, z_j) / tau) / sum_{k != i} exp(sim(z_i, z_k) / tau)        sim: the cosine

The loss is the mean over the 2N views. What is kept, and probed, is h.

    python simclr.py                                        # embedded data, two minutes on two cores
    python simclr.py --dataset cifar10                      # ResNet-18, 200 epochs
    torchrun --nproc-per-node 4 simclr.py --dataset cifar10 # the same run on four GPUs
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import augment, cli, distributed, pictures, resnet
from common.data import NAMES, epoch_order, load, steps_per_epoch
from common.run import Progress, Run, cosine, parse, set_rate, spread

# ---- augmentation (appendix A; appendix B.9 for CIFAR)


def view(x, rng, size, crop_min, jitter, blur):
    """One random view of each image: x uint8 (N, 3, H, W) to float (N, 3, size, size) in [0, 1].

    crop_min: least share of the area that a crop keeps. jitter: the paper's s, strength of the colour distortion.
    blur: share of the views that are blurred.
    """
    n, s = len(x), jitter
    x = x.float() / 255
    x = augment.resized_crop(x, *augment.crop_boxes(rng, n, *x.shape[2:], scale=(crop_min, 1.0)), size)
    x = augment.horizontal_flip(x, rng.uniform(n) < 0.5)
    factors, order = augment.jitter_parameters(rng, n, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    x = augment.apply_where(rng.uniform(n) < 0.8, augment.color_jitter, x, factors, order)
    x = augment.apply_where(rng.uniform(n) < 0.2, augment.grayscale, x)
    if blur > 0:
        gaussian_blur = lambda x, sigma: augment.gaussian_blur(x, sigma, kernel_size=size // 20 * 2 + 1)
        x = augment.apply_where(rng.uniform(n) < blur, gaussian_blur, x, rng.uniform(n, low=0.1, high=2.0))
    return x


# ---- model


def encoder(args):
    """What is kept and probed, untrained: (N, 3, S, S) RGB in [0, 1] to (N, D). args: the settings of a run."""
    return getattr(resnet, args.arch)(args.stem, args.width)


class SimCLR(nn.Module):
    """Encoder f and projection head g, an MLP with one hidden layer (section 2.1)."""

    def __init__(self, encoder, projection_dim=128):
        super().__init__()
        self.encoder, dim = encoder, encoder.feature_dim
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, projection_dim))

    def forward(self, x):
        h = self.encoder(x)                                                   # (2N, feature_dim)
        return h, self.head(h)                                                # (2N, projection_dim)


# ---- loss and optimiser


def nt_xent(z1, z2, tau):
    """The normalised temperature-scaled cross-entropy (equation 1), mean over all 2N views: a scalar.

    z1, z2: (N, D) projections of the two views, row i of each from image i; normalised here. tau > 0, the temperature.
    Equal projections give log(2N - 1), the chance level.
    """
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)                       # (2N, D)
    logits = z @ z.T / tau                                                    # (2N, 2N)
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), float("-inf"))     # k != i
    positive = torch.arange(2 * n, device=z.device).roll(n)                   # i + N, and back
    return F.cross_entropy(logits, positive)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, 1708.03888) as SimCLR uses it:

        g = gradient + weight_decay w;   v = momentum v + lr (eta |w| / |g|) g;   w = w - v

    Groups with adapt=False (biases and batch norm, by the paper) take lr itself in place of lr eta |w| / |g|.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.001, adapt=True):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, adapt=adapt))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                g = w.grad.add(w, alpha=group["weight_decay"])
                if group["adapt"]:
                    w_norm, g_norm = w.norm(), g.norm()
                    g.mul_(torch.where((w_norm > 0) & (g_norm > 0), group["eta"] * w_norm / g_norm, 1.0))
                v = self.state[w].setdefault("momentum", torch.zeros_like(w))
                v.mul_(group["momentum"]).add_(g, alpha=group["lr"])
                w.sub_(v)
        return loss


def parameter_groups(model, weight_decay):
    """Biases and batch norm (the parameters of one dimension) have neither weight decay nor LARS's adaptation."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": weights, "weight_decay": weight_decay, "adapt": True},
            {"params": others, "weight_decay": 0.0, "adapt": False}]


# ---- arguments

DEFAULTS = {  # of a data set, where they differ from those below
    "shapes": dict(image_size=16, width=16, epochs=25, batch_size=128, crop_min=0.4, lr=0.2, tau=0.2),
    "stl10": dict(image_size=96),
    "fashionmnist": dict(image_size=28),
    "folder": dict(image_size=224, jitter=1.0, blur=0.5, stem="imagenet"),
    "small": dict(image_size=32, jitter=0.5, blur=0.0, stem="cifar", width=16, epochs=20, batch_size=256, crop_min=0.2,
                  lr=0.2, tau=0.2),
}


def arguments(argv):
    parser = cli.Parser(prog="simclr.py", description="SimCLR. Defaults are those of --dataset shapes; with another "
                        "--dataset beside --help, that one's.")
    add = parser.add_argument
    add("--dataset", choices=NAMES, default="shapes", help="what to train on; shapes and folder need no download")
    add("--image-size", type=cli.number(int, 8, True), default=32, help="side of the images, pixels")
    add("--arch", choices=("resnet18", "resnet34", "resnet50"), default="resnet18", help="depth of the encoder")
    add("--width", type=cli.count, default=64, help="channels of the encoder's first stage")
    add("--stem", choices=("cifar", "imagenet"), default="cifar", help="first layers: cifar keeps the resolution")
    add("--crop-min", type=cli.number(float, 0, high=1), default=0.08, help="least share of the area that a crop keeps")
    add("--jitter", type=cli.nonnegative, default=0.5, help="strength s of the colour distortion (ImageNet: 1)")
    add("--blur", type=cli.number(float, 0, True, 1), default=0.0, help="share of the views blurred (ImageNet: 0.5)")
    add("--epochs", type=cli.count, default=200, help="passes over the training images")
    add("--warmup", type=cli.number(float, 0, True, 1), default=0.05, help="share of the epochs with a rising rate")
    add("--batch-size", type=cli.number(int, 2, True), default=512, help="images a step, over all processes")
    add("--optimizer", choices=("sgd", "lars"), default="sgd", help="lars is the paper's")
    add("--lr", type=cli.positive, default=0.1, help="peak learning rate for 256 images; scaled by batch size / 256")
    add("--weight-decay", type=cli.nonnegative, default=1e-4, help="of all weights but biases and batch norm")
    add("--tau", type=cli.positive, default=0.5, help="temperature of the loss")
    cli.add_run_flags(parser)
    return parse(parser, argv, DEFAULTS)


# ---- training


def main(argv=None):
    """Trains, evaluates and writes the run's folder. Returns the final metrics (result.json)."""
    args = arguments(argv)
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    rank, world = distributed.start(device)
    run = Run("simclr", vars(args), device, rank)
    data = distributed.first_alone(load, args.dataset, args.data_dir, args.image_size, device, args.workers,
                                   args.cache_gb, args.seed)
    steps = steps_per_epoch(len(data.train), args.batch_size, world)
    run.describe(precision=amp or torch.float32, processes=world)
    run.ready("data", data.describe())

    def new_model():
        torch.manual_seed(args.seed)
        model = SimCLR(encoder(args))
        return distributed.sync_batch_norm(model, device).to(device, memory_format=torch.channels_last)

    model = new_model()
    run.ready("model", f"{sum(p.numel() for p in model.parameters()):,} weights")
    net = distributed.wrap(model)
    net = torch.compile(net) if args.compile else net
    lr = args.lr * args.batch_size / 256
    groups = parameter_groups(model, args.weight_decay)
    if args.optimizer == "lars":
        optimizer = LARS(groups, lr)
    else:
        optimizer = torch.optim.SGD([{k: v for k, v in g.items() if k != "adapt"} for g in groups], lr, momentum=0.9)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    rng, recipe = augment.Random(args.seed, rank, world), (args.image_size, args.crop_min, args.jitter, args.blur)

    metrics = {"loss": ("loss", f"chance {math.log(2 * args.batch_size - 1):.3f}"), "spread": ("spread", "")}
    progress = Progress(run, args.epochs, steps, args.batch_size, metrics)
    run.track(model=model, optimizer=optimizer, scaler=scaler, rng=rng, progress=progress)
    epoch, step = run.restore()
    net.train()
    with run:
        while epoch < args.epochs:
            order = epoch_order(len(data.train), args.batch_size, args.seed, epoch, rank, world)[step:]
            for step, x in enumerate(data.train.batches(order), step):
                views = torch.cat([view(x, rng, *recipe) for _ in range(2)])       # (2N, 3, S, S)
                set_rate(optimizer, lr * cosine(epoch * steps + step, args.epochs * steps, args.warmup))
                with autocast:
                    h, z = net(views.contiguous(memory_format=torch.channels_last))
                z1, z2 = z.float().chunk(2)                                   # (N, projection_dim) each
                loss = nt_xent(distributed.gather(z1), distributed.gather(z2), args.tau)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                progress.update(epoch, step, [loss, spread(h)])
                if run.stop_requested():
                    run.stop(epoch, step + 1)
            progress.end_epoch(epoch, lr=optimizer.param_groups[0]["lr"])
            epoch, step = epoch + 1, 0
            run.save(epoch, step)

    if rank > 0:
        return {}

    def judged(model):
        def encode(x):                                                        # uint8 (N, 3, S, S) to (N, feature_dim)
            with autocast:
                return model.encoder((x.float() / 255).contiguous(memory_format=torch.channels_last))
        return encode, model

    run.write("encoder.pt", lambda path: torch.save(model.encoder.state_dict(), path))
    x, rng = data.train.at(data.train.some(32)), augment.Random(args.seed)
    x1, x2 = (view(x, rng, *recipe) for _ in range(2))
    run.write("views.png", lambda path: pictures.rows(path, x1, x2))
    return run.finish(data, {"untrained": judged(new_model()), "trained": judged(model)}, device)


if __name__ == "__main__":
    cli.program(main)
