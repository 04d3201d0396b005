# SPDX-License-Identifier: MIT
"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning (He et al. 2019, 1911.05722; v2: 2003.04297).

Contrastive learning as dictionary look-up: one view of an image gives the query q = f_q(x_q), another view its key
k+ = f_k(x_k), and other images give the keys k_1 .. k_K, all normalised to length 1 (equation 1, InfoNCE):

    L_q = -log  exp(q.k+ / tau) / (exp(q.k+ / tau) + sum_{i=1..K} exp(q.k_i / tau))

--dictionary chooses where the keys come from (figure 2):

    queue        f_k of the last K images; f_k follows f_q slowly, theta_k = m theta_k + (1 - m) theta_q (equation 2)
    memory-bank  a stored vector for each training image, the running mean of its q (Wu et al. 2018, 1805.01978), with
                 InfoNCE or, --contrast nce, with Wu et al.'s noise-contrastive estimation
    end-to-end   f_k = f_q of the other images in the batch, with gradients through both queries and keys

The representation that is kept and evaluated is f_q without its head.

    python moco.py                                          # generated shapes, a minute or two on two cores
    python moco.py --dataset cifar10                        # ResNet-18, 200 epochs

Differences from the papers: --bn-groups and shuffling also work on one device; --symmetric averages both directions
(MoCo's CIFAR demo: their sum); folders take a ResNet-18 (ResNet-50); inputs are in [0, 1]. With the memory bank, and in
brackets Wu et al.: a query's vector is no negative; negatives are drawn once a batch (for each query); views are
flipped (on ImageNet only); it is filled by the untrained encoder (random vectors); the rate follows a cosine (steps);
nce estimates Z on each batch (on the first, which diverges on `shapes`); no proximal term (in their paper, not code).

Measured, linear / kNN: `shapes` over three seeds queue 64.7 / 50.0, memory bank 67.6 / 56.7 (untrained 30.9 / 15.9),
end-to-end 73.9 / 59.4 (30.8 / 15.8, on another machine); CIFAR-10 (JPEG), `--small`, 60.9 / 59.2 (37.7 / 32.8), 62 min.
"""
import copy
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import Refusal, augment, cli, distributed, resnet
from common.linear_probe import counted
from common.run import Run, cosine

# ---- augmentation (v1: section 3.3, after Wu et al.; v2: section 3, after SimCLR)


def view(x, rng, size, crop_min, augmentation, blur, aspect=None):
    """One random view of each image: x uint8 (N, 3, H, W) to float (N, 3, size, size) in [0, 1].

    crop_min: smallest share of the area that a crop keeps. augmentation: "v1" jitters the colours of every view, with
    large changes of hue, "v2" those of 0.8 of the views, with smaller ones; grey comes after it (MoCo v1's code:
    before). blur: probability of blurring. aspect: (N,), width / height of photographs resized to these squares.
    """
    n, (share, hue) = len(x), {"v1": (1.0, 0.4), "v2": (0.8, 0.1)}[augmentation]
    steps = augment.random_resized_crop(rng, x.shape, size, (crop_min, 1.0), aspect)
    steps += augment.random_color_jitter(rng, n, 0.4, 0.4, 0.4, hue, p=share)
    steps += augment.random_grayscale(rng, n, p=0.2)
    if blur > 0:
        steps += augment.random_gaussian_blur(rng, n, kernel_size=max(3, size // 20 * 2 + 1), p=blur)
    return augment.apply(x, steps + augment.random_horizontal_flip(rng, n))


# ---- model


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm that normalises `groups` equal parts of the batch separately, as on that many GPUs."""

    def __init__(self, channels, groups):
        super().__init__(channels, momentum=1 - 0.9 ** (1 / groups))          # `groups` updates equal one by 0.1
        self.groups = groups

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return torch.cat([super(SplitBatchNorm, self).forward(part) for part in x.chunk(self.groups)])


def build_encoder(args):
    """The untrained encoder: RGB (N, 3, S, S) in [0, 1] to features (N, D). args: the settings of a run."""
    return getattr(resnet, args.arch)(args.stem, args.width)


class EncoderWithHead(nn.Module):
    """f_q or f_k: the encoder, which is kept, and a head (v1: linear, v2: MLP), whose output is scaled to length 1."""

    def __init__(self, arch, stem, width, head, bn_groups, dim=128):
        super().__init__()
        norm_layer = functools.partial(SplitBatchNorm, groups=bn_groups)
        self.encoder = getattr(resnet, arch)(stem, width, norm_layer=norm_layer)
        hidden = self.encoder.feature_dim
        self.head = nn.Linear(hidden, dim)
        if head == "mlp":
            self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(inplace=True), self.head)

    def forward(self, x):
        h = self.encoder(x)                                                   # (N, feature_dim)
        return h, F.normalize(self.head(h).float(), dim=1)                    # (N, C)


class MoCo(nn.Module):
    """Query encoder, key encoder (of the queue) and dictionary, which is a buffer, so that checkpoints include it."""

    def __init__(self, encoder, dictionary, entries, m=0.999, bank_m=0.5, dim=128, contrast="infonce"):
        """entries: K, the length of the queue, or the number of training images for the memory bank.
        m, bank_m in [0, 1]: momentum of the key encoder's weights, of the bank's vectors. contrast: the bank's loss."""
        super().__init__()
        self.query, self.dictionary, self.m, self.bank_m, self.contrast = encoder, dictionary, m, bank_m, contrast
        if dictionary == "queue":
            self.key = copy.deepcopy(encoder).requires_grad_(False)
            self.register_buffer("queue", F.normalize(torch.randn(entries, dim), dim=1))      # (K, C)
            self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))               # to the oldest key
        elif dictionary == "memory-bank":
            self.register_buffer("bank", F.normalize(torch.randn(entries, dim), dim=1))       # (images, C)

    def forward(self, x1, x2, tau, symmetric=False, **draws):
        """The loss of a batch, the features h of x1, and q and k (None with a bank) for `remember`.

        x1, x2: (N, 3, S, S) views. x1 is the query; if symmetric, each view is the query once and the loss is the mean.
        draws: the order for `shuffled`; with a bank, which takes no x2, the index (N,) of these images in the training
        set and drawn (K,), the indices of the negatives.
        """
        loss, h, q, k = self.look_up(x1, x2, tau, **draws)
        if symmetric:
            loss_2, _, _, k_2 = self.look_up(x2, x1, tau, **draws)            # before either k enters the queue
            loss, k = (loss + loss_2) / 2, torch.cat([k, k_2])
        return loss, h, q, k

    def look_up(self, x_q, x_k, tau, order=None, index=None, drawn=None):
        h, q = self.query(x_q)                                                # (N, feature_dim), (N, C)
        q = distributed.gather(q)
        if self.dictionary == "memory-bank":
            contrast = nce if self.contrast == "nce" else info_nce
            own = index[:, None] == drawn                                     # (N, K): true for its own vector
            return contrast(q, self.bank[index], self.bank[drawn], tau, own=own), h, q, None
        if self.dictionary == "end-to-end":
            k = shuffled(self.query, x_k, order)
            return info_nce(q, k, k, tau, own=torch.eye(len(q), dtype=torch.bool, device=q.device)), h, q, k
        with torch.no_grad():
            k = shuffled(self.key, x_k, order)
        return info_nce(q, k, self.queue, tau), h, q, k

    @torch.no_grad()
    def remember(self, q, k, index=None):
        """Updates the dictionary after a step. q: (N, C). k: (N, C), or symmetric (2N, C). index: as in `forward`."""
        if self.dictionary == "queue":
            for theta_k, theta_q in zip(self.key.parameters(), self.query.parameters()):
                theta_k.lerp_(theta_q, 1 - self.m)                            # m theta_k + (1 - m) theta_q
            self.enqueue(k)
        elif self.dictionary == "memory-bank":
            self.bank[index] = F.normalize(torch.lerp(q, self.bank[index], self.bank_m), dim=1)

    @torch.no_grad()
    def enqueue(self, keys):
        """Replaces the oldest keys of the queue by keys (N, C), or by the last K of them if N > K."""
        size = len(self.queue)
        keys = keys[-size:]
        self.queue[(self.pointer + torch.arange(len(keys), device=keys.device)) % size] = keys
        self.pointer.copy_((self.pointer + len(keys)) % size)


def shuffled(encoder, x, order):
    """The keys (N, C) of all processes' x, encoded in another order than the queries (shuffling BN, section 3.3).

    Batch norm leaks: a query and a key that are normalised with the same images can be matched by the statistics that
    they share. order: a permutation of 0..N-1, the same in every process. The keys are returned in the order of x.
    """
    rank, world = distributed.rank_and_world()
    x = distributed.gather(x)[order.chunk(world)[rank]].contiguous(memory_format=torch.channels_last)
    return distributed.gather(encoder(x)[1])[order.argsort()]


# ---- loss and schedule


def info_nce(q, k, negatives, tau, own=None):
    """InfoNCE (equation 1), mean over the queries: a scalar.

    q, k: (N, C) queries and their keys. negatives: (K, C). All are normalised here. tau > 0, the temperature.
    own: (N, K) bool, true where a negative comes from the query's own image; these are left out.
    Equal keys give log(1 + K), the chance level.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k, negatives = (F.normalize(x.float(), dim=1) for x in (q, k, negatives))
        positive = (q * k).sum(dim=1, keepdim=True)                           # (N, 1)
        others = q @ negatives.T                                              # (N, K)
        if own is not None:
            others = others.masked_fill(own, -math.inf)
        logits = torch.cat([positive, others], dim=1) / tau                   # (N, 1 + K)
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def nce(q, k, negatives, tau, own):
    """Noise-contrastive estimation (Wu et al. 2018, equations 5 to 8), mean over the queries: a scalar.

    A logistic regression on log p - log(K / n) tells the key from K draws out of n images. p = exp(q.k / tau) / Z, and
    Z is n times the mean of exp(q.k_i / tau) over all queries and negatives, without gradient, so that n cancels.
    Arguments as in `info_nce`, all of length 1. Equal keys give log(1 + K) + K log(1 + 1 / K), the chance level.
    """
    with torch.autocast(q.device.type, enabled=False):
        others, drawn = (q @ negatives.T / tau).masked_fill(own, -math.inf), (~own).sum(dim=1)          # (N, K), (N,)
        log_mean = others.detach().logsumexp(dim=(0, 1)) - drawn.sum().log()  # log(Z / n)
        threshold = log_mean + drawn.clamp(min=1).log()                       # log(Z K / n), (N,)
        positive = (q * k).sum(dim=1) / tau - threshold                       # (N,)
        return (F.softplus(-positive) + F.softplus(others - threshold[:, None]).sum(dim=1)).mean()


def step_decay(step, steps):
    """The schedule of v1, a factor of the rate: 1, then 0.1 after 0.6 of the steps and 0.01 after 0.8 of them."""
    return 0.1 ** ((step >= 0.6 * steps) + (step >= 0.8 * steps))


# ---- arguments

DEFAULTS = [  # of runs with these settings, where they differ from the flags' defaults below
    # Wu et al.'s for CIFAR-10, below for ImageNet. The keys come from earlier batches, so batch norm leaks nothing.
    (dict(dictionary="memory-bank"), dict(bn_groups=1, negatives=0, batch_size=128, lr=0.06, augmentation="v1",
                                          crop_min=0.2)),
    (dict(contrast="nce"), dict(negatives=4096)),
    (dict(dataset="shapes"), dict(image_size=16, width=16, epochs=45, batch_size=128, crop_min=0.4, augmentation="v1",
                                  lr=0.2, tau=0.2, negatives=256, bn_groups=4)),
    (dict(dataset="stl10"), dict(image_size=96)),
    (dict(dataset="fashionmnist"), dict(image_size=28)),
    (dict(dataset="folder"), dict(image_size=224, blur=0.5, stem="imagenet", m=0.999, tau=0.2, head="mlp",
                                  weight_decay=1e-4, batch_size=256, crop_min=0.2)),
    (dict(dataset="folder", dictionary="memory-bank"), dict(lr=0.03, tau=0.07, head="linear", blur=0, negatives=4096)),
    (dict(small=True), dict(image_size=32, blur=0.0, stem="cifar", width=16, epochs=25, batch_size=256, m=0.99, tau=0.1,
                            head="linear", crop_min=0.2, lr=0.12, weight_decay=1e-4)),
    (dict(dataset="shapes", dictionary="memory-bank"), dict(negatives=0, bank_m=0.9, epochs=60, bn_groups=1)),
    (dict(dataset="shapes", dictionary="end-to-end"), dict(epochs=25)),
]


def arguments(argv):
    parser = cli.RunParser(__file__, "MoCo", epochs=200, batch_size=512, photographs=True)
    add, number = parser.add_argument, parser.number
    add("--dictionary", choices=("queue", "memory-bank", "end-to-end"), default="queue", help="source of the keys")
    add("--contrast", choices=("infonce", "nce"), default="infonce", help="the loss; nce needs the memory bank")
    number("--negatives", None, "[0, inf)", "K: length of the queue (if not given, a twelfth of the images, at most "
        "65536), or number of draws from the memory bank (0: all of it)", kind=int)
    # A key encoder that changes fast makes the queue inconsistent: m = 0 fails, 0.9 loses 4 points (section 4.1).
    number("--m", 0.99, "[0, 1]", "momentum of the key encoder (paper: 0.999)")
    number("--bank-m", 0.5, "[0, 1]", "momentum of the memory bank's vectors")
    add("--head", choices=("linear", "mlp"), default="linear", help="v1: linear, v2: MLP with one hidden layer")
    add("--augmentation", choices=("v1", "v2"), default="v2", help="v1 jitters the colours of all views, v2 of 80 %%")
    number("--blur", 0.0, "[0, 1]", "probability of blurring a view (v1: 0, v2: 0.5)")
    number("--crop-min", 0.08, "(0, 1]", "smallest share of the image's area that a crop keeps (v1 and v2: 0.2)")
    add("--symmetric", action="store_true", help="use each of the two views as the query once")
    number("--bn-groups", 8, "[1, inf)", "parts of the batch that batch norm normalises separately, like GPUs")
    add("--no-shuffle", action="store_true", help="keep the order of the keys, so that batch norm leaks")
    add("--arch", choices=("resnet18", "resnet34", "resnet50"), default="resnet18", help="depth of the encoder")
    number("--width", 64, "[1, inf)", "channels of the encoder's first stage")
    add("--stem", choices=("cifar", "imagenet"), default="cifar", help="first layers: cifar keeps the resolution")
    number("--lr", 0.03, "(0, inf)", "peak learning rate for 256 images; scaled by batch size / 256")
    add("--schedule", choices=("steps", "cosine"), default="cosine", help="v1: steps at 0.6 and 0.8 of the epochs")
    number("--weight-decay", 5e-4, "[0, inf)", "on all weights (paper: 0.0001)")
    number("--tau", 0.1, "(0, inf)", "temperature of the loss (v1: 0.07, v2: 0.2)")
    args = parser.parse(argv, DEFAULTS)
    unused = {"queue": ("bank_m", "contrast"), "memory-bank": ("m", "symmetric", "no_shuffle"),
              "end-to-end": ("m", "bank_m", "contrast", "negatives")}[args.dictionary]
    parser.refuse_unused(args, unused, f"with --dictionary {args.dictionary}")
    parser.refuse_unused(args, ("no_shuffle",) if args.bn_groups == 1 else (), "with --bn-groups 1")
    if args.batch_size % args.bn_groups or args.batch_size == args.bn_groups:
        raise Refusal(f"--batch-size {args.batch_size} is not {args.bn_groups} equal parts of 2 or more (--bn-groups)")
    return args


# ---- training


def main(argv=None):
    """Trains, evaluates and writes the run's folder. Returns the final metrics (result.json)."""
    args = arguments(argv)
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    rank, world = distributed.start(device)
    if args.bn_groups > 1 and args.bn_groups % world:
        raise Refusal(f"--bn-groups {args.bn_groups} is not a multiple of the {world} processes")
    run = Run(__file__, vars(args), device, rank, precision=amp or torch.float32, processes=world)
    images, batches = run.data(store_size=args.store_size or 2 * args.image_size)

    n, has_bank = len(images.train), args.dictionary == "memory-bank"
    if args.dictionary == "queue" and args.negatives is None:                 # 4,096 for CIFAR-10, as in MoCo's demo
        args.negatives = max(1, min(65536, n // 12 // 256 * 256 or n // 12))
    if args.dictionary == "queue" and not 0 < args.negatives <= n / 4:        # or a query often meets its image
        raise Refusal(f"--negatives {args.negatives} is not between 1 and a quarter of the {n} images, {n // 4}: "
                      f"change it, or use --dictionary end-to-end")

    torch.manual_seed(args.seed)
    query = EncoderWithHead(args.arch, args.stem, args.width, args.head, max(1, args.bn_groups // world))
    model = MoCo(query, args.dictionary, n if has_bank else args.negatives, args.m, args.bank_m, contrast=args.contrast)
    model = model.to(device, memory_format=torch.channels_last)
    net = run.wrap(model, sync_batch_norm=args.bn_groups == 1)
    peak_lr = args.lr * args.batch_size / 256
    optimizer = torch.optim.SGD(model.query.parameters(), peak_lr, momentum=0.9, weight_decay=args.weight_decay)
    schedule = {"cosine": cosine, "steps": step_decay}[args.schedule]
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)  # else small gradients are 0 in fp16
    rng = augment.Random(args.seed, rank, world)
    random_view = functools.partial(view, size=args.image_size, crop_min=args.crop_min,
                                    augmentation=args.augmentation, blur=args.blur)
    negatives = args.batch_size - 1 if args.dictionary == "end-to-end" else args.negatives or n - 1
    chance = math.log(1 + negatives) + (negatives * math.log1p(1 / negatives) if args.contrast == "nce" else 0)
    progress = run.progress(args.epochs, len(batches), args.batch_size, {"loss": f"chance {chance:.3f}"})
    run.track(model=model, optimizer=optimizer, scaler=scaler, rng=rng)
    run.watch(autocast, {"trained": model.query.encoder})
    first_epoch, first_step = run.restore()                                   # (0, 0) unless --resume
    net.train()
    if has_bank and first_epoch == first_step == 0:
        # From random vectors, training first learns to avoid all images seen so far, which takes long to unlearn.
        for _, index, x in counted(batches.epoch(0, every=True), -(-n // args.batch_size), "batches for the bank"):
            x = random_view(x, rng, aspect=images.train.aspect[index])
            with torch.no_grad(), autocast:
                q = model.query(x)[1]
            model.bank[distributed.gather(augment.send(index, device))] = distributed.gather(q)
        run.ready("memory bank", "filled by the untrained encoder")
    with run:
        for epoch in range(first_epoch, args.epochs):
            for step, index, x in batches.epoch(epoch, first_step):
                for group in optimizer.param_groups:
                    group["lr"] = peak_lr * schedule(epoch * len(batches) + step, args.epochs * len(batches))
                aspect = images.train.aspect[index]
                x1 = random_view(x, rng, aspect=aspect).contiguous(memory_format=torch.channels_last)
                x2 = None if has_bank else random_view(x, rng, aspect=aspect)
                if has_bank:
                    index = distributed.gather(augment.send(index, device))   # of the whole batch of all processes
                    drawn = augment.send(torch.randint(n, (args.negatives,), generator=rng.generator), device) \
                        if args.negatives else torch.arange(n, device=device)  # all vectors of the bank
                    draws = dict(index=index, drawn=drawn)
                else:
                    order = torch.randperm(args.batch_size, generator=rng.generator)
                    order = torch.arange(args.batch_size) if args.no_shuffle else order       # drawn: same views
                    draws = dict(order=augment.send(order, device))
                with autocast:
                    loss, h, q, k = net(x1, x2, args.tau, args.symmetric, **draws)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)                                        # skipped where a gradient overflowed
                scaler.update()
                model.remember(q, k, index)
                progress.update(epoch, step, h, loss=loss)                    # saves and ends here after Ctrl-C
            progress.end_epoch(epoch, lr=optimizer.param_groups[0]["lr"])
            first_step = 0

    index, rng = images.train.random_indices(32), augment.Random(args.seed)
    x, aspect = images.train.at(index), images.train.aspect[index]
    run.picture("views.png", *(random_view(x, rng, aspect=aspect) for _ in range(2)))
    return run.finish()


if __name__ == "__main__":
    cli.program(main)
