# SPDX-License-Identifier: MIT
"""CPC: Representation Learning with Contrastive Predictive Coding (van den Oord et al. 2018, 1807.03748), and its
version 2: Data-Efficient Image Recognition with Contrastive Predictive Coding (Henaff et al. 2019, 1905.09272).

An image is cut into a G x G grid of overlapping patches. An encoder maps each patch to a vector z_{i,j}; a masked
convolutional network summarises rows i - 5 to i in a context c_{i,j}, from which a linear map predicts the patch k rows
below. InfoNCE has to tell that patch from those of other places and other images (v2, equation 2):

    L = - mean over directions, k and places of  log  exp s_k(c_{i,j}, t_{i+k,j}) / sum_l exp s_k(c_{i,j}, t_l)

with s_k(c, t) = (W_k c + b_k).t / sqrt(D) and t = W z of length D. v2 predicts in four directions, each with its own
context network. The representation that is kept and evaluated is the mean of z over the grid.

    python cpc.py                                           # generated shapes, one to two minutes on two cores
    python cpc.py --dataset cifar10                         # ResNet-18 on each patch, 200 epochs

Differences from the papers: prediction starts at the first row that shares no pixel with the context (v1: k = 1); v2's
patches get three of AutoAugment's operations, each with probability 0.1 (v2: two of sixteen), and 0.2 of the patches
lose two channels (v2: all, --colour-drop 1); v1's patches stay in colour (v1: all grey); folders take a ResNet-50 and k
from 3 to 5 (v2: ResNet-161; k = 3 in its code); Adam's rate follows a cosine; inputs are only scaled to [-1, 1].

Measured, linear probe / kNN: `shapes` 57.0 +- 4.7 / 25.3 over three seeds, contexts 64.1 / 27.8 (untrained 22.7 /
14.6), 37 to 48 s on one core of a Xeon; CIFAR-10 (JPEG), `--small`, 51.7 / 46.0, contexts 59.0 / 47.0 (35.9 / 33.3).
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import functional

from common import Refusal, augment, cli, distributed, resnet
from common.run import Run, cosine

# ---- patches and their augmentation


def cut(x, patch, stride):
    """Cuts (N, 3, S, S) into patches (N, G, G, 3, patch, patch), row by row, G = (S - patch) // stride + 1. A margin at
    the right and at the bottom may be left over."""
    return x.unfold(2, patch, stride).unfold(3, patch, stride).permute(0, 2, 3, 1, 4, 5)


TONES = (functional.invert, functools.partial(functional.posterize, bits=3),                  # of AutoAugment
         functools.partial(functional.solarize, threshold=0.5))


def view(x, rng, size, crop_min, augmentation, colour_drop, patch, stride, aspect=None):
    """The augmented patches of each image: x uint8 (N, 3, H, W) to float (N, G, G, 3, patch, patch) in [0, 1].

    crop_min: smallest share of the image's area that its crop keeps. augmentation: "v1" shifts each patch a little
    (paper: crops of 60 in 64 pixels); "v2" flips, shears, bends and recolours each patch on its own, and drops two
    of its channels with probability colour_drop. aspect: (N,), width / height of photographs resized to these squares.
    """
    rows = (size - patch) // stride + 1                                       # G
    n, count = len(x), len(x) * rows * rows                                   # images, patches
    steps = augment.random_resized_crop(rng, x.shape, size, (crop_min, 1.0), aspect)
    steps += augment.random_horizontal_flip(rng, n)
    steps += [(lambda x: cut(x, patch, stride).flatten(0, 2),)]               # (N G G, 3, patch, patch)
    if augmentation == "v1":
        steps += augment.random_shift(rng, count, reach=min(patch - 1, max(1, patch // 32)))
    else:
        steps += augment.random_horizontal_flip(rng, count)
        steps += random_warp(rng, count)
        for change in TONES:
            steps += augment.where(rng.uniform(count) < 0.1, change)
        steps += augment.random_color_jitter(rng, count, 0.4, 0.4, 0.4, 0.1, p=0.8)
        steps += augment.random_grayscale(rng, count, p=0.2)
        steps += augment.where(rng.uniform(count) < colour_drop, drop_colours, (3 * rng.uniform(count)).floor())
    return augment.apply(x, steps).unflatten(0, (n, rows, rows))


def random_warp(rng, n, p=0.2, most=0.3):
    """Shears a patch with probability p, and with probability p bends it by random shifts of a 4 x 4 grid of points:
    v2's shear and elastic deformation. most: the largest shear and shift, as a fraction of half the side."""
    shear = most * rng.uniform(n, 2, low=-1.0) * (rng.uniform(n, 1) < p)
    bend = most * rng.uniform(n, 2, 4, 4, low=-1.0) * (rng.uniform(n, 1, 1, 1) < p)
    return augment.where(shear.any(dim=1) | bend.flatten(1).any(dim=1), warp, shear, bend)


def warp(x, shear, bend):
    """Warps x (N, C, S, S) by shear (N, 2), horizontal and vertical, and by bend (N, 2, K, K), shifts of a K x K grid.
    Pixels from outside the image take the value of the nearest edge pixel."""
    edge, affine = 1 - 1 / x.shape[3], torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
    affine[:, 0, 1], affine[:, 1, 0] = shear[:, 0], shear[:, 1]
    shifts = F.interpolate(bend, x.shape[2:], mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    grid = F.affine_grid(affine, x.shape, align_corners=False) + shifts       # (N, S, S, 2); the patch is [-1, 1]
    return F.grid_sample(x, grid.clamp(-edge, edge), align_corners=False)     # the clamp is for MPS, too


def drop_colours(x, kept):
    """Keeps one channel of each image, kept (N,) in 0..2, and sets the other two to the middle of the range."""
    return torch.where((torch.arange(3, device=x.device) == kept[:, None])[:, :, None, None], x, 0.5)


def mosaic(patches):
    """Patches (N, G, G, 3, p, p) as images (N, 3, G (p + 1), G (p + 1)) with white lines between the patches."""
    tiles = F.pad(patches, (0, 1, 0, 1), value=1.0)                           # (N, G, G, 3, p + 1, p + 1)
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


# ---- model


class Encoder(nn.Module):
    """A ResNet on each patch: RGB (N, 3, S, S) in [0, 1] to the mean of z over the grid, (N, feature_dim).

    norm: "layer" (v2), "none" (v1) or "batch", whose statistics connect the patches, so that the context can see
    what it has to predict.
    """

    def __init__(self, arch, stem, width, norm, patch, stride):
        super().__init__()
        self.patch, self.stride = patch, stride
        norm_layer = {"layer": functools.partial(nn.GroupNorm, 1), "batch": nn.BatchNorm2d, "none": nn.Identity}[norm]
        self.net = getattr(resnet, arch)(stem, width, norm_layer=norm_layer)
        self.feature_dim = self.net.feature_dim

    def grid(self, patches):
        """(N, G, G, 3, patch, patch) to z (N, feature_dim, G, G)."""
        x = 2 * patches.flatten(0, 2) - 1                                     # as 0, black would stay 0 in layer norm
        z = self.net(x.contiguous(memory_format=torch.channels_last))
        return z.unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2)

    def forward(self, x):
        return torch.cat([self.grid(cut(part, self.patch, self.stride)).mean(dim=(2, 3))
                          for part in x.split(64)])                           # 64 images at a time, to save memory

    def stages(self):
        return self.net.stages()


def build_encoder(args):
    """The untrained encoder: RGB (N, 3, S, S) in [0, 1] to features (N, D). args: the settings of a run."""
    return Encoder(args.arch, args.stem, args.width, args.norm, args.patch, args.stride)


class Context(nn.Module):
    """g_ar: z (N, C, G, G) to c of the same shape. c_{i,j} sees row i and the `depth` rows above it, up to `depth`
    columns to either side (v2, appendix: the PixelCNN)."""

    def __init__(self, channels, hidden, depth=5):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1)),
            nn.ZeroPad2d((0, 0, 1, 0)), nn.Conv2d(hidden, hidden, (2, 1)), nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1)) for _ in range(depth))

    def forward(self, z):
        for block in self.blocks:
            z = z + block(z)
        return F.relu(z)


class CPC(nn.Module):
    """Encoder, the context network of each direction, its predictors W_k, and the projection W of the targets."""

    def __init__(self, encoder, directions, ahead, hidden=256, dim=64):
        """directions: 1 (downwards) or 4. ahead: the k to predict. hidden: channels inside the context network. dim:
        length of predictions and targets (v2: 64)."""
        super().__init__()
        channels = encoder.feature_dim
        self.encoder, self.ahead = encoder, ahead
        self.contexts = nn.ModuleList(Context(channels, hidden) for _ in range(directions))
        self.predictors = nn.ModuleList(nn.Conv2d(channels, len(ahead) * dim, 1) for _ in range(directions))
        self.target = nn.Conv2d(channels, dim, 1, bias=False)

    def context(self, z):
        """z (N, C, G, G) to the context of each direction, (N, C, G, G), rotated so that the direction is downwards."""
        return [context(z.rot90(turn, (2, 3))) for turn, context in enumerate(self.contexts)]

    def forward(self, patches):
        """(N, G, G, 3, p, p) to the mean of z (N, C), predictions (N, directions, steps ahead, D, G, G), rotated like
        their contexts, and targets (N, D, G, G)."""
        z = self.encoder.grid(patches)                                        # (N, C, G, G)
        predictions = [predictor(c).unflatten(1, (len(self.ahead), -1))       # (N, steps, D, G, G)
                       for c, predictor in zip(self.context(z), self.predictors)]
        return z.mean(dim=(2, 3)), torch.stack(predictions, dim=1), self.target(z)


class ContextEncoder(nn.Module):
    """RGB (N, 3, S, S) in [0, 1] to the mean of the contexts over the grid, (N, directions feature_dim)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        encoder = self.model.encoder
        grids = [encoder.grid(cut(part, encoder.patch, encoder.stride)) for part in x.split(64)]
        return torch.cat(self.model.context(torch.cat(grids)), dim=1).mean(dim=(2, 3))


def steps_ahead(patch, stride, last, first=None):
    """The k from `first` to `last`. By default the first is the smallest k for which the patch k rows below shares no
    pixel with those that the context has seen.

    When patches overlap, most of the next row has been seen already, and predicting it teaches only pixel matching.
    """
    return range(first or math.ceil(patch / stride), last + 1)


# ---- loss


def info_nce(predictions, targets):
    """InfoNCE (v1, equation 4; v2, equation 2), mean over the predictions: a scalar.

    predictions, targets: (M, D), row i of one belonging to row i of the other. All other targets are negatives, from
    other places (here at least k rows down; v2's code takes all places) and from other images. Scores are
    inner products / sqrt(D), which keeps the softmax from saturating at the start (v2: * 0.1 at D = 64). Equal targets
    give log(M), the chance level. If the negatives were independent, log(M) minus the loss would be a lower bound on
    the mutual information of context and target.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        logits = predictions.float() @ targets.float().T / math.sqrt(targets.shape[1])        # (M, M)
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def pairs(predictions, targets, ahead):
    """Yields the predictions and their targets, (M, D) each, for each direction and each k in `ahead`; M = N (G - k) G.

    predictions: (N, directions, len(ahead), D, G, G), each direction rotated by a further 90 degrees. targets:
    (N, D, G, G).
    """
    for turn in range(predictions.shape[1]):
        for i, k in enumerate(ahead):
            above = predictions[:, turn, i, :, :-k]                           # (N, D, G - k, G)
            below = targets.rot90(turn, (2, 3))[:, :, k:]
            yield flatten_positions(above), flatten_positions(below)


def flatten_positions(x):
    """(N, D, H, W) to (N H W, D)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


# ---- arguments

DEFAULTS = [  # of runs with these settings, where they differ from the flags' defaults below
    (dict(dataset="shapes"), dict(image_size=20, steps=3, width=8, context_width=64, epochs=6, batch_size=32, lr=2e-3)),
    (dict(dataset="stl10"), dict(image_size=64, patch=16, stride=8)),
    (dict(dataset="fashionmnist"), dict(image_size=28)),
    (dict(dataset="folder"), dict(image_size=260, patch=80, stride=36, crop_min=0.75, stem="imagenet",
                                  arch="resnet50")),
    (dict(small=True), dict(image_size=24, patch=8, stride=4, steps=4, crop_min=0.5, stem="cifar", arch="resnet18",
                            width=16, context_width=64, epochs=8, lr=1e-3)),
]


def arguments(argv):
    parser = cli.RunParser(__file__, "CPC", epochs=200, batch_size=64, photographs=True)
    add, number = parser.add_argument, parser.number
    number("--patch", 8, "[1, inf)", "side of a patch in pixels (ImageNet, v1: 64 of 256, v2: 80 of 260)")
    number("--stride", 4, "[1, inf)", "pixels from one patch to the next (v1: 32; v2: 36)")
    number("--steps", 5, "[1, inf)", "largest number of rows to predict ahead (v1: 5)")
    number("--first", None, "[1, inf)", "smallest number of rows to predict ahead (default: the first row that "
        "shares no pixel with the context; v1: 1)", kind=int)
    add("--directions", type=int, choices=(1, 4), default=4, help="v1: 1, downwards; v2: 4")
    number("--context-width", 256, "[1, inf)", "channels inside the context network (v2: 256)")
    # Batch norm connects the patches of an image, so that a context can know what it has to predict (v2).
    add("--norm", choices=("layer", "batch", "none"), default="layer", help="norm in the encoder; v1: none, v2: layer")
    add("--augmentation", choices=("v1", "v2"), default="v2",
        help="of each patch on its own; v1: small shifts; v2: flips, warps, colours, dropped channels")
    number("--colour-drop", 0.2, "[0, 1]", "probability that a patch keeps only one channel, with --augmentation v2 "
        "(CPC v2: 1)")
    number("--crop-min", 0.5, "(0, 1]", "smallest share of the image's area that a crop keeps")
    add("--arch", choices=("resnet18", "resnet34", "resnet50"), default="resnet18", help="depth of the encoder")
    number("--width", 64, "[1, inf)", "channels of the encoder's first stage")
    add("--stem", choices=("cifar", "imagenet"), default="cifar", help="first layers: cifar keeps the resolution")
    number("--warmup", 0.05, "[0, 1]", "share of the epochs in which the learning rate rises")
    number("--lr", 2e-4, "(0, inf)", "peak learning rate of Adam (v1: 0.0002)")
    number("--weight-decay", 1e-5, "[0, inf)", "on all weights")
    args = parser.parse(argv, DEFAULTS)
    if args.augmentation == "v1":
        parser.refuse_unused(args, ("colour_drop",), "with --augmentation v1")
    if args.patch > args.image_size:
        raise Refusal(f"--patch {args.patch} is larger than --image-size {args.image_size}: change one of them")
    rows = (args.image_size - args.patch) // args.stride + 1
    ahead = steps_ahead(args.patch, args.stride, args.steps, args.first)
    if not ahead.start <= args.steps < rows:
        raise Refusal(f"--steps {args.steps} is not between {ahead.start}, the first row that is predicted, and "
                      f"{rows - 1}, the end of a grid of {rows} rows: change it, --first, --patch or --stride")
    return args


# ---- training


def main(argv=None):
    """Trains, evaluates and writes the run's folder. Returns the final metrics (result.json)."""
    args = arguments(argv)
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    rank, world = distributed.start(device)
    rows = (args.image_size - args.patch) // args.stride + 1
    ahead = steps_ahead(args.patch, args.stride, args.steps, args.first)
    run = Run(__file__, vars(args), device, rank, precision=amp or torch.float32, processes=world,
              grid=f"{rows} x {rows}", ahead=f"{ahead.start} to {ahead.stop - 1}")
    images, batches = run.data(store_size=args.store_size or 2 * args.image_size)

    torch.manual_seed(args.seed)
    model = CPC(build_encoder(args), args.directions, ahead, args.context_width)
    model = model.to(device, memory_format=torch.channels_last)
    net = run.wrap(model)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)  # else small gradients are 0 in fp16
    rng = augment.Random(args.seed, rank, world)
    random_view = functools.partial(view, size=args.image_size, crop_min=args.crop_min,
                                    augmentation=args.augmentation, colour_drop=args.colour_drop, patch=args.patch,
                                    stride=args.stride)

    chance = sum(math.log(args.batch_size * (rows - k) * rows) for k in ahead) / len(ahead)
    progress = run.progress(args.epochs, len(batches), args.batch_size, {"loss": f"chance {chance:.3f}"})
    run.track(model=model, optimizer=optimizer, scaler=scaler, rng=rng)
    run.watch(autocast, {"trained": model.encoder, "context": ContextEncoder(model)})
    first_epoch, first_step = run.restore()                                   # (0, 0) unless --resume
    net.train()
    with run:
        for epoch in range(first_epoch, args.epochs):
            for step, index, x in batches.epoch(epoch, first_step):
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * cosine(epoch * len(batches) + step, args.epochs * len(batches), args.warmup)
                patches = random_view(x, rng, aspect=images.train.aspect[index])              # (N, G, G, 3, p, p)
                with autocast:
                    h, predictions, targets = net(patches)
                # Every process computes the loss of the whole batch, with the negatives of all.
                predictions, targets = distributed.gather(predictions), distributed.gather(targets)
                losses = [info_nce(p, t) for p, t in pairs(predictions, targets, ahead)]
                loss = sum(losses) / len(losses)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)                                        # skipped where a gradient overflowed
                scaler.update()
                progress.update(epoch, step, h, loss=loss)                    # saves and ends here after Ctrl-C
            progress.end_epoch(epoch, lr=optimizer.param_groups[0]["lr"])
            first_step = 0

    index = images.train.random_indices(32)
    plain = cut(images.centred.at(index).float() / 255, args.patch, args.stride)
    views = random_view(images.train.at(index), augment.Random(args.seed), aspect=images.train.aspect[index])
    run.picture("views.png", mosaic(plain), mosaic(views))
    return run.finish()


if __name__ == "__main__":
    cli.program(main)
