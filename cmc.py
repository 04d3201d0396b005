# SPDX-License-Identifier: MIT
"""CMC: Contrastive Multiview Coding (Tian et al. 2019, 1906.05849).

The views are channels of an image (L and ab, Y and CbCr, or R, G and B), or aligned folders of images (such as colour
and depth). Each view V_i has its own encoder and projection z_i = g_i(f_i(v_i)), |z_i| = 1. The critic h(v_i, v_j) =
exp(z_i.z_j / tau) should be high for views of one image and low otherwise. With view i as anchor, m negatives v_j^l:

    softmax    -log  h(v_i, v_j) / (h(v_i, v_j) + sum_{l=1..m} h(v_i, v_j^l))
    nce        -log  P(v_j) - sum_{l=1..m} log (1 - P(v_j^l)),     P = p / (p + m / n),  p = h / Z

L(V_i, V_j) is the sum over both choices of the anchor; --graph core adds it up over the pairs with the first view, full
over all pairs. A memory bank for each view keeps a running mean of z_j for each of the n training images. Keys and
negatives come from it, or with --dictionary end-to-end from the batch. Z is n times the mean of h over the negatives.
The representation that is kept and evaluated is the concatenation of all f_i(v_i).

    python cmc.py                                           # generated shapes, L and ab
    python cmc.py --dataset cifar10 --contrast nce          # a ResNet-18 of half width per view, 200 epochs
    python cmc.py --views-dir COLOUR DEPTH                  # two folders of images with the same names

Differences from the paper: softmax is the default (paper: nce); the negatives are drawn once for a whole batch (paper:
for each image); the bank starts from the outputs of the untrained encoders (paper: random vectors) and Z is estimated
on each batch (paper: on the first, where random vectors make it so small that nothing is learnt on `shapes`: 19.0
linear, untrained 18.7, one seed); an image's own vector is not a negative; inputs are only scaled to about [-2, 2].

Measured, linear / kNN: `shapes` 52.0 / 34.8 over three seeds (untrained 22.5 / 11.8), 45 to 50 s on a core of a Xeon;
CIFAR-10 (JPEG), `--small`, 51.3 / 48.0 (40.0 / 33.7), 44 min, with `--contrast nce --schedule steps --epochs 30` 52.2 /
47.1, 43 min.
"""
import functools
import itertools
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common import Refusal, augment, cli, data, distributed, resnet
from common.linear_probe import counted
from common.run import Run, cosine

# ---- views

CHANNELS = {"lab": (1, 2), "ycbcr": (1, 2), "rgb": (1, 1, 1)}


def linear_map(x, matrix):
    """A 3 x 3 matrix times the channels of x (N, 3, H, W), written as sums, since autocast runs products in bf16."""
    return torch.cat([sum(weight * x[:, i : i + 1] for i, weight in enumerate(row)) for row in matrix], dim=1)


def rgb_to_lab(x):
    """sRGB (N, 3, H, W) in [0, 1] to CIE 1976 L*a*b*, white D65: L in [0, 100], a and b within about [-108, 99]. IEC
    61966-2-1 (sRGB), CIE 15 (L*a*b*, 2 degree observer)."""
    linear = torch.where(x <= 0.04045, x / 12.92, ((x.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)
    x, y, z = linear_map(linear, ((0.4124564, 0.3575761, 0.1804375),
                                  (0.2126729, 0.7151522, 0.0721750),
                                  (0.0193339, 0.1191920, 0.9503041))).split(1, dim=1)
    t = torch.cat([x / 0.95047, y, z / 1.08883], dim=1)                       # relative to the white point
    f = torch.where(t > (6 / 29) ** 3, t.clamp(min=1e-6) ** (1 / 3), t * (29 / 6) ** 2 / 3 + 4 / 29)
    fx, fy, fz = f.split(1, dim=1)
    return torch.cat([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], dim=1)


def rgb_to_ycbcr(x):
    """RGB (N, 3, H, W) in [0, 1] to JPEG's YCbCr (ITU-R BT.601, full range): Y in [0, 1], Cb and Cr in [-0.5, 0.5]."""
    return linear_map(x, ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312)))


def split(x, views):
    """RGB (N, 3, H, W) in [0, 1] to its views, each (N, channels, H, W), scaled to about [-2, 2]. views: a key of
    CHANNELS, or "folders", where x holds three channels for each folder."""
    if views == "lab":
        lab = rgb_to_lab(x)
        return [lab[:, :1] / 50 - 1, lab[:, 1:] / 50]                         # a and b of photographs are small
    if views == "ycbcr":
        y, chroma = rgb_to_ycbcr(x).split((1, 2), dim=1)
        return [2 * y - 1, 4 * chroma]
    return (2 * x - 1).split(1 if views == "rgb" else 3, dim=1)


def view(x, rng, size, crop_min, jitter, aspect=None):
    """Augments all channels of an image alike, by crop, flip and, if jitter (SimCLR's strength s) > 0, colour:
    x uint8 (N, C, H, W) to float (N, C, size, size) in [0, 1]. aspect: (N,), width / height of the photographs before
    they were resized to squares."""
    s = jitter
    steps = augment.random_resized_crop(rng, x.shape, size, (crop_min, 1.0), aspect)
    if s > 0:
        steps += augment.random_color_jitter(rng, len(x), 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8)
    return augment.apply(x, steps + augment.random_horizontal_flip(rng, len(x)))


def as_colours(x):
    """A view (N, 1 to 3, H, W) as RGB, to look at, clipped to [-1, 1]: one channel is grey, two are red and green."""
    rgb = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else F.pad(x, (0, 0, 0, 0, 0, 3 - x.shape[1]))
    return (rgb / 2 + 0.5).clamp(0, 1)


# ---- model


class Encoder(nn.Module):
    """A ResNet for each view: RGB (N, 3, S, S) in [0, 1] to the concatenation of their features, (N, feature_dim)."""

    def __init__(self, views, arch, stem, width, folders=0):
        super().__init__()
        self.views = views
        channels = CHANNELS.get(views, folders * (3,))
        self.nets = nn.ModuleList(getattr(resnet, arch)(stem, width, in_channels) for in_channels in channels)
        self.feature_dim = sum(net.feature_dim for net in self.nets)

    def features(self, x):
        return [net(v.contiguous(memory_format=torch.channels_last)) for net, v in zip(self.nets, split(x, self.views))]

    def forward(self, x):
        return torch.cat(self.features(x), dim=1)

    def stages(self):
        return [sum(stage, []) for stage in zip(*(net.stages() for net in self.nets))]


def build_encoder(args):
    """The untrained encoder: RGB (N, 3, S, S) in [0, 1] to features (N, D). args: the settings of a run."""
    if args.views_dir:
        return Encoder("folders", args.arch, args.stem, args.width, len(args.views_dir))
    return Encoder(args.views, args.arch, args.stem, args.width)


class CMC(nn.Module):
    """Encoders, projections and, as a buffer, the memory banks (end-to-end: empty ones)."""

    def __init__(self, encoder, entries, dim=128):
        super().__init__()
        self.encoder, count = encoder, len(encoder.nets)
        self.heads = nn.ModuleList(nn.Linear(net.feature_dim, dim) for net in encoder.nets)
        self.register_buffer("bank", F.normalize(torch.randn(count, entries, dim), dim=2))    # (V, n, C)

    def forward(self, x):
        """The features h (N, feature_dim) and the normalised projections z (N, V, C)."""
        features = self.encoder.features(x)                                   # V times (N, feature_dim / V)
        z = torch.stack([head(f) for head, f in zip(self.heads, features)], dim=1)
        return torch.cat(features, dim=1), F.normalize(z.float(), dim=2)

    def candidates(self, z, j, index, drawn):
        """The keys (N, C) and negatives (m, C) of view j, and own (N, m), true where both are of the same image.

        z: (N, V, C) of the whole batch. index (N,), drawn (m,): the training images of the batch and of the negatives.
        """
        if self.bank.shape[1] > 0:
            return self.bank[j, index], self.bank[j, drawn], index[:, None] == drawn
        return z[:, j], z[:, j], torch.eye(len(z), dtype=torch.bool, device=z.device)         # with gradient

    def loss(self, z, index, drawn, pairs, contrast, tau):
        """The sum over pairs (i, j) of an anchor and a contrasted view. z, index, drawn: as in `candidates`."""
        criterion, total = {"nce": nce, "softmax": softmax_contrast}[contrast], 0.0
        for i, j in pairs:
            keys, negatives, own = self.candidates(z, j, index, drawn)
            total = total + criterion(z[:, i], keys, negatives, tau, own)
        return total

    @torch.no_grad()
    def remember(self, z, index, momentum):
        """Moves the vectors in the banks, if any, towards z (N, V, C): momentum is the share of the old ones."""
        if self.bank.shape[1] > 0:
            old = self.bank[:, index]                                         # (V, N, C)
            self.bank[:, index] = F.normalize(torch.lerp(z.transpose(0, 1), old, momentum), dim=2)


def pairs_of(graph, count):
    """Pairs of an anchor and a contrasted view, in both orders: all ("full"), or those with the first view ("core")."""
    return [(i, j) for i, j in itertools.permutations(range(count), 2) if graph == "full" or 0 in (i, j)]


# ---- losses


def softmax_contrast(q, k, negatives, tau, own=None):
    """-log of the softmax, mean over the anchors: a scalar. Equal keys give log(1 + m), the chance level.

    q, k: (N, C) anchors, and the other view's vectors of the same images. negatives: (m, C). All have length 1.
    tau > 0, the temperature. own: (N, m) bool, true where a negative is of the anchor's own image and is left out.
    """
    others = q @ negatives.T                                                  # (N, m)
    if own is not None:
        others = others.masked_fill(own, -math.inf)
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), others], dim=1) / tau               # (N, 1 + m)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def nce(q, k, negatives, tau, own=None):
    """Noise-contrastive estimation (Gutmann & Hyvarinen 2010, as Wu et al. 2018), mean over the anchors: a scalar.

    A logistic regression on log p - log(m / n) tells the key from m uniform draws out of n images. p = exp(q.k / tau) /
    Z, and Z is n times the mean of exp(q.k' / tau) over all anchors and negatives k', without gradient, so that n
    cancels. The rest is as in `softmax_contrast`; draws that are left out do not count towards m. Equal keys give
    log(1 + m) + m log(1 + 1 / m), the chance level.
    """
    own = torch.zeros(len(q), len(negatives), dtype=torch.bool, device=q.device) if own is None else own
    others, drawn = (q @ negatives.T / tau).masked_fill(own, -math.inf), (~own).sum(dim=1)    # (N, m), (N,)
    log_mean = others.detach().logsumexp(dim=(0, 1)) - drawn.sum().log()      # log(Z / n)
    threshold = log_mean + drawn.clamp(min=1).log()                           # log(Z m / n), (N,)
    positive = (q * k).sum(dim=1) / tau - threshold                           # (N,)
    return (F.softplus(-positive) + F.softplus(others - threshold[:, None]).sum(dim=1)).mean()


def step_decay(step, steps):
    """The paper's schedule, a factor of the rate: 1, divided by 10 after each of 120, 160 and 200 of 240 epochs."""
    return 0.1 ** sum(240 * step >= epoch * steps for epoch in (120, 160, 200))


# ---- arguments

DEFAULTS = [  # of runs with these settings, where they differ from the flags' defaults below
    (dict(dataset="shapes"), dict(image_size=16, width=8, epochs=40, batch_size=128, crop_min=0.4, lr=0.2, tau=0.2,
                                  dictionary="end-to-end", schedule="cosine")),
    (dict(dataset="stl10"), dict(image_size=96)),
    (dict(dataset="folder"), dict(image_size=224, stem="imagenet", negatives=16384, batch_size=256, weight_decay=1e-4,
                                  tau=0.07, crop_min=0.08)),
    (dict(small=True), dict(image_size=32, stem="cifar", width=8, epochs=20, batch_size=128, negatives=4096, lr=0.2,
                            crop_min=0.4, tau=0.1, weight_decay=1e-4, schedule="cosine")),
]


def arguments(argv):
    argv = sys.argv[1:] if argv is None else [str(a) for a in argv]
    if any(word.split("=")[0] == "--views-dir" for word in argv):
        argv = ["--dataset", "folder", *argv]
    parser = cli.RunParser(__file__, "CMC", epochs=200, batch_size=128, photographs=True,
                           datasets=[name for name in data.NAMES if name != "fashionmnist"])            # that is grey
    add, number = parser.add_argument, parser.number
    add("--views", choices=CHANNELS, default="lab", help="the views: L and ab, Y and CbCr, or R, G and B")
    add("--views-dir", nargs="+", type=cli.path, metavar="DIR",
        help="views of your own: folders of images with the same names")
    add("--graph", choices=("full", "core"), default="full", help="pairs of views: all, or those with the first view")
    add("--contrast", choices=("nce", "softmax"), default="softmax", help="the loss: the paper's, or InfoNCE")
    add("--dictionary", choices=("memory-bank", "end-to-end"), default="memory-bank", help="source of the keys")
    number("--negatives", 4096, "[0, inf)", "m: number of draws from the memory bank (0: all of it)")
    number("--bank-m", 0.5, "[0, 1]", "momentum of the memory banks' vectors")
    number("--crop-min", 0.2, "(0, 1]", "smallest share of the image's area that a crop keeps")
    number("--jitter", 0.0, "[0, inf)", "strength of a colour distortion before the split into views")
    add("--arch", choices=("resnet18", "resnet34", "resnet50"), default="resnet18", help="depth of the encoders")
    number("--width", 32, "[1, inf)", "channels of an encoder's first stage (paper: half of 64)")
    add("--stem", choices=("cifar", "imagenet"), default="cifar", help="first layers: cifar keeps the resolution")
    add("--schedule", choices=("steps", "cosine"), default="steps", help="steps: at 1/2, 2/3 and 5/6 of the epochs")
    number("--warmup", 0.05, "[0, 1]", "share of the epochs in which the learning rate rises, with --schedule cosine")
    number("--lr", 0.06, "(0, inf)", "peak learning rate for 256 images; scaled by batch size / 256")
    number("--weight-decay", 5e-4, "[0, inf)", "on all weights (paper: 0.0001)")
    number("--tau", 0.1, "(0, inf)", "temperature of the loss (ImageNet: 0.07)")
    args = parser.parse(argv, DEFAULTS, free=("views_dir",))
    if args.schedule == "steps":
        parser.refuse_unused(args, ("warmup",), "with --schedule steps")
    if args.dictionary == "end-to-end":
        parser.refuse_unused(args, ("negatives", "bank_m"), "with --dictionary end-to-end")
    if len(args.views_dir or CHANNELS[args.views]) == 2:
        parser.refuse_unused(args, ("graph",), "with two views")
    if args.views_dir:
        parser.refuse_unused(args, ("views", "data_dir"), "with --views-dir")
        if args.dataset != "folder":
            raise Refusal(f"--views-dir is a data set of its own: leave out --dataset {args.dataset}")
        if len(args.views_dir) == 1:
            raise Refusal("--views-dir needs at least two folders")
        if args.jitter:
            raise Refusal("--jitter is for colours, which --views-dir may not have: leave one of them out")
    return args


# ---- training


@torch.no_grad()
def fill_banks(model, batches, rng, random_view, autocast):
    """Fills the banks with the untrained encoders' outputs for all images (`data.Batches`). From random vectors, as in
    the paper, training first learns to avoid the images seen so far, which takes many epochs to unlearn."""
    steps = math.ceil(len(batches.images) / batches.batch_size)
    for _, index, x in counted(batches.epoch(0, every=True), steps, "batches for the memory bank"):
        x = random_view(x, rng, aspect=batches.images.aspect[index])
        with autocast:
            z = distributed.gather(model(x)[1])
        model.remember(z, distributed.gather(augment.send(index, z.device)), momentum=0.0)


def main(argv=None):
    """Trains, evaluates and writes the run's folder. Returns the final metrics (result.json)."""
    args = arguments(argv)
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    rank, world = distributed.start(device)
    run = Run(__file__, vars(args), device, rank, precision=amp or torch.float32, processes=world)
    images, batches = run.data(args.views_dir, store_size=args.store_size or 2 * args.image_size)
    entries = len(images.train) if args.dictionary == "memory-bank" else 0    # of each view's bank
    m = (args.negatives or entries - 1) if entries else args.batch_size - 1   # negatives; 0: all but the image's own
    whole_bank = torch.arange(entries, device=device)

    torch.manual_seed(args.seed)
    model = CMC(build_encoder(args), entries).to(device, memory_format=torch.channels_last)
    pairs = pairs_of(args.graph, len(model.encoder.nets))
    net = run.wrap(model)
    peak_lr = args.lr * args.batch_size / 256
    optimizer = torch.optim.SGD(model.parameters(), peak_lr, momentum=0.9, weight_decay=args.weight_decay)
    schedule = step_decay if args.schedule == "steps" else functools.partial(cosine, warmup=args.warmup)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)  # else small gradients are 0 in fp16
    rng = augment.Random(args.seed, rank, world)
    random_view = functools.partial(view, size=args.image_size, crop_min=args.crop_min, jitter=args.jitter)

    chance = math.log(1 + m) + (m * math.log1p(1 / m) if args.contrast == "nce" else 0)
    progress = run.progress(args.epochs, len(batches), args.batch_size, {"loss": f"chance {len(pairs) * chance:.3f}"})
    run.track(model=model, optimizer=optimizer, scaler=scaler, rng=rng)
    run.watch(autocast, {"trained": model.encoder})
    first_epoch, first_step = run.restore()                                   # (0, 0) unless --resume
    net.train()
    if entries and first_epoch == first_step == 0:
        fill_banks(model, batches, rng, random_view, autocast)
        run.ready("memory bank", "filled by the untrained encoders")
    with run:
        for epoch in range(first_epoch, args.epochs):
            for step, index, x in batches.epoch(epoch, first_step):
                for group in optimizer.param_groups:
                    group["lr"] = peak_lr * schedule(epoch * len(batches) + step, args.epochs * len(batches))
                x = random_view(x, rng, aspect=images.train.aspect[index])    # (N, 3 or 3 folders, S, S)
                index, drawn = distributed.gather(augment.send(index, device)), whole_bank
                if entries and args.negatives:
                    drawn = augment.send(torch.randint(entries, (m,), generator=rng.generator), device)
                with autocast:
                    h, z = net(x)
                z = distributed.gather(z)                                     # (N, V, C)
                loss = model.loss(z, index, drawn, pairs, args.contrast, args.tau)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)                                        # skipped where a gradient overflowed
                scaler.update()
                model.remember(z, index, args.bank_m)
                progress.update(epoch, step, h, loss=loss)                    # saves and ends here after Ctrl-C
            progress.end_epoch(epoch, lr=optimizer.param_groups[0]["lr"])
            first_step = 0

    index = images.train.random_indices(32)
    x = random_view(images.train.at(index), augment.Random(args.seed), aspect=images.train.aspect[index])
    run.picture("views.png", *([] if args.views_dir else [x]), *map(as_colours, split(x, model.encoder.views)))
    return run.finish()


if __name__ == "__main__":
    cli.program(main)
