# SPDX-License-Identifier: MIT
"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (Chen et al. 2020, 2002.05709).

Two random views of each of N images go through an encoder h = f(x) and a projection head z = g(h). For a view i, the
other view j of the same image, and k running over all 2N views (equation 1, NT-Xent):

    l(i, j) = -log  exp(sim(z_i, z_j) / tau) / sum_{k != i} exp(sim(z_i, z_k) / tau),       sim: cosine similarity

The loss is the mean over the 2N views. The representation that is kept and evaluated is h.

    python simclr.py                                        # generated shapes, one to two minutes on two cores
    torchrun --nproc-per-node 4 simclr.py --dataset cifar10 # ResNet-18, 200 epochs; on one GPU without torchrun

Sources of the defaults: cifar10 follows dkobak/simclr-cifar10 (SGD, batches of 512, decay 5e-4, crops of 0.2 or more;
linear 85.6 after 100 epochs, 91.7 after 1,000 at half the rate), which differs in greyscale (0.1 of the views, better
there), the hidden layer (1,024), weight decay of all parameters and batch norm of each view by itself. folder follows
the paper's ImageNet recipe (LARS; tau 0.1, table 5) with a ResNet-18 (paper: ResNet-50, batches of 4,096).

Differences from the paper: weight decay skips biases and batch norm under SGD, too; --loss logistic and margin have
negatives from both views (paper: one). In the authors' code the head has three layers with batch norm (--head mlp-bn;
no gain in 10 epochs of 10,000 images), the last batch norm of a block starts at 0 (a gain of one point there), and the
loss is twice equation 1, which doubles the steps of the parameters that LARS does not adapt.

Measured, linear / kNN, README has more: `shapes`, three seeds, 75.0 / 55.5 (untrained 30.9 / 15.9); --small of CIFAR-10
(JPEG), three seeds, 64.7 / 61.1 (38.0 / 32.8), one with `--width 32 --epochs 26` 70.2 / 65.1 (41.8 / 34.5), in an hour
and in two; `--dataset cifar10 --epochs 100`, 4.4 min on an H100, 79.7 / 74.4 (48.1 / 37.4).
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import Refusal, augment, cli, distributed, resnet
from common.run import Run, cosine

# ---- augmentation (appendix A; appendix B.9 for CIFAR)

RECIPE = ("crop", "flip", "colour", "grey")
STUDIED = ("cutout", "rotation", "noise", "sobel")  # also in figure 5 of the paper, as is blur


def view(x, rng, size, crop_min, jitter, blur, aspect=None, names=RECIPE):
    """One random view of each image: x (N, 3, H, W), uint8 or floats in [0, 1], to floats (N, 3, size, size) in [0, 1].

    crop_min: smallest share of the area that a crop keeps. jitter: the paper's s, strength of the colour distortion.
    blur: probability of blurring. aspect: (N,), width / height of the photographs before they were resized to squares.
    names: the operations, from RECIPE and STUDIED; without "crop" the whole image is resized.
    """
    n, s = len(x), jitter
    crop = dict(scale=(crop_min, 1.0), aspect=aspect) if "crop" in names else dict(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    steps = augment.random_resized_crop(rng, x.shape, size, **crop)
    if "flip" in names:
        steps += augment.random_horizontal_flip(rng, n)
    if "colour" in names:
        steps += augment.random_color_jitter(rng, n, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8)
    if "grey" in names:
        steps += augment.random_grayscale(rng, n, p=0.2)
    if blur > 0:
        steps += augment.random_gaussian_blur(rng, n, kernel_size=max(3, size // 20 * 2 + 1), p=blur)
    for name in STUDIED:
        if name in names:
            steps += {"cutout": cutout, "rotation": rotation, "noise": noise, "sobel": sobel}[name](rng, n, size)
    return augment.apply(x, steps)


def cutout(rng, n, size):
    """Greys out a square of half the side, at a random place in each image (DeVries & Taylor 2017, 1708.04552)."""
    side = size // 2

    def grey(x, corner):                                                      # (N, 2, 1)
        place = torch.arange(size, device=x.device)
        inside = (place >= corner) & (place < corner + side)                  # (N, 2, S)
        return x.masked_fill((inside[:, 0, :, None] & inside[:, 1, None])[:, None], 0.5)
    return [(grey, (rng.uniform(n, 2, 1) * (size - side + 1)).floor())]


def rotation(rng, n, size):
    """Turns each image by 0, 90, 180 or 270 degrees."""
    turns = (4 * rng.uniform(n)).long()
    return [step for k in (1, 2, 3) for step in augment.where(turns == k, lambda x, k=k: x.rot90(k, (2, 3)))]


def noise(rng, n, size, deviation=0.1):
    """Adds Gaussian noise, uniform numbers through the normal quantile function, on the CPU, as MPS has none."""
    z = torch.special.ndtri(rng.uniform(n, 3, size, size).clamp(1e-6, 1 - 1e-6))
    return [(lambda x, z: (x + deviation * z).clamp(0, 1), z)]


def sobel(rng, n, size):
    """Replaces the image by the edges of its grey version: the magnitude of the Sobel gradient."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4

    def edges(x, kernels):
        grey = F.pad(augment.luma(x), (1, 1, 1, 1), mode="replicate")
        return F.conv2d(grey, kernels).square().sum(dim=1, keepdim=True).sqrt().clamp(0, 1).expand_as(x)
    return [(edges, torch.stack([kernel, kernel.T])[:, None])]


# ---- model


def build_encoder(args):
    """The untrained encoder: RGB (N, 3, S, S) in [0, 1] to features (N, feature_dim). args: the settings of a run."""
    return getattr(resnet, args.arch)(args.stem, args.width)


class SimCLR(nn.Module):
    """Encoder f and projection head g: an MLP with one hidden layer (section 2.1), "linear", "none" (figure 8), or
    "mlp-bn", three layers with batch norm after each, as in the authors' code."""

    def __init__(self, encoder, projection_dim=128, head="mlp"):
        super().__init__()
        self.encoder, dim = encoder, encoder.feature_dim
        self.head = nn.Identity()
        if head == "linear":
            self.head = nn.Linear(dim, projection_dim)
        elif head == "mlp":
            self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, projection_dim))
        elif head == "mlp-bn":
            layers = [[nn.Linear(dim, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
                      for out in (dim, dim, projection_dim)]
            self.head = nn.Sequential(*sum(layers, [])[:-1])                  # no ReLU at the end and,
            self.head[-1].bias.requires_grad_(False)                          # as in their code, no shift either

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
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -math.inf)  # k != i
    positive = torch.arange(2 * n, device=z.device).roll(n)                   # i + N, and back
    return F.cross_entropy(logits, positive)


def pair_similarities(z1, z2):
    """Cosine similarity of each of the 2N views to the other view of its image, (2N,), and to the views of all other
    images, (2N, 2N - 2). z1, z2: as in `nt_xent`."""
    n, z = len(z1), F.normalize(torch.cat([z1, z2]).float(), dim=1)           # (2N, D)
    cosines = z @ z.T                                                         # (2N, 2N)
    i = torch.arange(2 * n, device=z.device)
    other = (i[:, None] + i[1:-1] + (i[1:-1] >= n)) % (2 * n)                 # (2N, 2N - 2), all but i and i + N
    return cosines.diagonal(n).repeat(2), cosines.gather(1, other)


def semi_hard(positive, negatives, margin):
    """Mask (2N, 2N - 2) of each view's semi-hard negative (Schroff et al. 2015; appendix B.10): the most similar one of
    those that are less similar than the positive, but by less than the margin. A view may have none."""
    gap = positive[:, None] - negatives
    allowed = (gap > 0) & (gap < margin)
    hardest = negatives.masked_fill(~allowed, -math.inf).argmax(dim=1)
    return allowed & F.one_hot(hardest, negatives.shape[1]).bool()


def logistic(z1, z2, tau, semi_hard_negatives=False):
    """NT-Logistic (table 2), averaged over all views: -log s(u.v+ / tau) - mean over negatives of log s(-u.v- / tau).

    s is the sigmoid. Equal projections give log(1 + e^(-1/tau)) + log(1 + e^(1/tau)).
    """
    positive, negatives = pair_similarities(z1, z2)
    chosen = semi_hard(positive, negatives, math.inf) if semi_hard_negatives else torch.ones_like(negatives).bool()
    repel = (F.softplus(negatives / tau) * chosen).sum(dim=1) / chosen.sum(dim=1).clamp(min=1)
    return (F.softplus(-positive / tau) + repel).mean()


def margin_triplet(z1, z2, margin, semi_hard_negatives=False):
    """Margin triplet loss (table 2): max(u.v- - u.v+ + m, 0), averaged over the negatives and then over all views."""
    positive, negatives = pair_similarities(z1, z2)
    chosen = semi_hard(positive, negatives, margin) if semi_hard_negatives else torch.ones_like(negatives).bool()
    losses = F.relu(negatives - positive[:, None] + margin) * chosen
    return (losses.sum(dim=1) / chosen.sum(dim=1).clamp(min=1)).mean()


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, 1708.03888), as used in SimCLR:

        g = gradient + weight_decay w;   v = momentum v + lr (eta |w| / |g|) g;   w = w - v

    Groups with adapt=False (biases and batch norm, as in the paper) use lr instead of lr eta |w| / |g|.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.001, adapt=True):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, adapt=adapt))

    @torch.no_grad()
    def step(self):
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


def parameter_groups(model, weight_decay):
    """Two groups: biases and batch norm (parameters with one dimension) get no weight decay and no LARS adaptation."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1 and p.requires_grad]
    return [{"params": weights, "weight_decay": weight_decay, "adapt": True},
            {"params": others, "weight_decay": 0.0, "adapt": False}]


# ---- arguments

DEFAULTS = [  # of runs with these settings, where they differ from the flags' defaults below
    (dict(dataset="shapes"), dict(image_size=16, width=16, epochs=25, batch_size=64, crop_min=0.4, lr=0.2, tau=0.2,
                                  weight_decay=1e-4, warmup=0.05)),
    (dict(dataset="stl10"), dict(image_size=96)),
    (dict(dataset="fashionmnist"), dict(image_size=28)),
    (dict(dataset="folder"), dict(image_size=224, jitter=1.0, blur=0.5, stem="imagenet", crop_min=0.08, tau=0.1,
                                  optimizer="lars", warmup=0.05, lr=0.03)),   # this lr is for --optimizer sgd
    (dict(small=True), dict(image_size=32, jitter=0.5, blur=0.0, stem="cifar", width=16, epochs=20, batch_size=256,
                            crop_min=0.2, lr=0.2, tau=0.2, optimizer="sgd", weight_decay=1e-4, warmup=0.05)),
    (dict(optimizer="lars"), dict(lr=1.0, weight_decay=1e-4, warmup=0.05)),   # the authors' for CIFAR-10
    (dict(optimizer="lars", dataset="folder"), dict(lr=0.3, weight_decay=1e-6)),              # and for ImageNet
]


def arguments(argv):
    parser = cli.RunParser(__file__, "SimCLR", epochs=200, batch_size=512, photographs=True)
    add, number = parser.add_argument, parser.number
    add("--arch", choices=("resnet18", "resnet34", "resnet50"), default="resnet18", help="depth of the encoder")
    number("--width", 64, "[1, inf)", "channels of the encoder's first stage")
    add("--stem", choices=("cifar", "imagenet"), default="cifar", help="first layers: cifar keeps the resolution")
    # Table 1, figure 5 of the paper: crop and colour distortion together matter most.
    number("--crop-min", 0.2, "(0, 1]", "smallest share of the image's area that a crop keeps")
    number("--jitter", 0.5, "[0, inf)", "strength s of the colour distortion (ImageNet: 1)")
    add("--augmentations", nargs="+", choices=RECIPE + STUDIED, default=list(RECIPE), metavar="NAME",
        help="operations on the views: " + ", ".join(RECIPE + STUDIED) + "; and --blur")
    add("--one-branch", action="store_true", help="one view is a crop, the other is made from that crop (figure 5)")
    number("--blur", 0.0, "[0, 1]", "probability of blurring a view (ImageNet: 0.5)")
    number("--warmup", 0.0, "[0, 1]", "share of the epochs in which the learning rate rises")
    add("--optimizer", choices=("sgd", "lars"), default="sgd", help="lars is the paper's")
    number("--lr", 0.06, "(0, inf)", "peak learning rate for 256 images; scaled by batch size / 256")
    number("--weight-decay", 5e-4, "[0, inf)", "on all weights except biases and batch norm")
    # A non-linear head gains 3 points over a linear one and 10 over none, and h is better than z (figure 8, table 3).
    add("--head", choices=("mlp", "mlp-bn", "linear", "none"), default="mlp", help="projection head g; mlp-bn: three "
        "layers with batch norm")
    number("--projection-dim", 128, "[1, inf)", "dimensions of z")
    add("--loss", choices=("nt-xent", "logistic", "margin", "supervised"), default="nt-xent", help="a loss of "
        "table 2, or supervised: cross-entropy on all training labels, the reference in figure 7")
    add("--semi-hard", action="store_true", help="for logistic and margin: use only the closest negative that "
        "is farther away than the positive, for margin by less than --margin")
    number("--margin", 0.4, "(0, 2]", "margin of --loss margin")
    number("--tau", 0.5, "(0, inf)", "temperature of the loss")
    args = parser.parse(argv, DEFAULTS)
    unused = {"nt-xent": ("semi_hard", "margin"), "logistic": ("margin",), "margin": ("tau",),
              "supervised": ("semi_hard", "margin", "tau", "head", "projection_dim")}[args.loss]
    parser.refuse_unused(args, unused, f"with --loss {args.loss}")
    parser.refuse_unused(args, ("projection_dim",) if args.head == "none" else (), "with --head none")
    if "colour" not in args.augmentations:
        parser.refuse_unused(args, ("jitter",), "with --augmentations without colour")
    if "crop" not in args.augmentations and not args.one_branch:
        parser.refuse_unused(args, ("crop_min",), "with --augmentations without crop")
    return args


# ---- training


def main(argv=None):
    """Trains, evaluates and writes the run's folder. Returns the final metrics (result.json)."""
    args = arguments(argv)
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    rank, world = distributed.start(device)
    run = Run(__file__, vars(args), device, rank, precision=amp or torch.float32, processes=world)
    images, batches = run.data(store_size=args.store_size or 2 * args.image_size)
    if args.loss == "supervised" and images.train.labels is None:
        raise Refusal(f"--loss supervised needs labels, which the training images of {args.dataset} lack")

    torch.manual_seed(args.seed)
    dim, head = args.projection_dim, args.head
    if args.loss == "supervised":                                             # z is the logits
        dim, head = len(images.classes), "linear"
    model = SimCLR(build_encoder(args), dim, head).to(device, memory_format=torch.channels_last)
    net = run.wrap(model)
    peak_lr = args.lr * args.batch_size / 256
    kind = LARS if args.optimizer == "lars" else torch.optim.SGD
    optimizer = kind(parameter_groups(model, args.weight_decay), peak_lr, momentum=0.9)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)  # else small gradients are 0 in fp16
    rng = augment.Random(args.seed, rank, world)
    random_view = functools.partial(view, size=args.image_size, crop_min=args.crop_min, jitter=args.jitter,
                                    blur=args.blur, names=args.augmentations)

    def two_views(x, rng, aspect):
        if args.one_branch:                                                   # a crop, and --augmentations of it
            crop = random_view(x, rng, aspect=aspect, blur=0.0, names=["crop"])
            return random_view(crop, rng), crop
        return random_view(x, rng, aspect=aspect), random_view(x, rng, aspect=aspect)

    criterion, chance = {                                                     # chance level: all cosines are 0
        "nt-xent": (lambda z1, z2, y: nt_xent(z1, z2, args.tau), math.log(2 * args.batch_size - 1)),
        "logistic": (lambda z1, z2, y: logistic(z1, z2, args.tau, args.semi_hard), 2 * math.log(2)),
        "margin": (lambda z1, z2, y: margin_triplet(z1, z2, args.margin, args.semi_hard), args.margin),
        "supervised": (lambda z1, z2, y: F.cross_entropy(torch.cat([z1, z2]), y.repeat(2)),
                       math.log(max(1, len(images.classes))))}[args.loss]
    progress = run.progress(args.epochs, len(batches), args.batch_size, {"loss": f"chance {chance:.3f}"})
    run.track(model=model, optimizer=optimizer, scaler=scaler, rng=rng)
    run.watch(autocast, {"trained": model.encoder, "projection": nn.Sequential(model.encoder, model.head)})    # h, z
    first_epoch, first_step = run.restore()                                   # (0, 0) unless --resume
    net.train()
    with run:
        for epoch in range(first_epoch, args.epochs):
            for step, index, x in batches.epoch(epoch, first_step):
                for group in optimizer.param_groups:
                    group["lr"] = peak_lr * cosine(epoch * len(batches) + step, args.epochs * len(batches), args.warmup)
                views = torch.cat(two_views(x, rng, images.train.aspect[index]))
                with autocast:
                    h, z = net(views.contiguous(memory_format=torch.channels_last))       # of 2N views
                z1, z2 = z.float().chunk(2)                                   # (N, projection_dim) each
                y = None
                if args.loss == "supervised":
                    y = distributed.gather(images.train.labels[augment.send(index, device)])
                # Every process computes the loss of the whole batch, with the negatives of all.
                loss = criterion(distributed.gather(z1), distributed.gather(z2), y)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)                                        # skipped where a gradient overflowed
                scaler.update()
                progress.update(epoch, step, h, loss=loss)                    # saves and ends here after Ctrl-C
            progress.end_epoch(epoch, lr=optimizer.param_groups[0]["lr"])
            first_step = 0

    index, rng = images.train.random_indices(32), augment.Random(args.seed)
    run.picture("views.png", *two_views(images.train.at(index), rng, images.train.aspect[index]))
    return run.finish()


if __name__ == "__main__":
    cli.program(main)
