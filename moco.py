"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning (He et al. 2019, 1911.05722; v2: 2003.04297).

Contrastive learning as looking up a key in a dictionary. A view of an image gives the query q = f_q(x_q), another view
of it the key k+ = f_k(x_k), other images the keys k_1 .. k_K, all of length 1 (equation 1, InfoNCE):

    L_q = -log  exp(q.k+ / tau) / (exp(q.k+ / tau) + sum_{i=1..K} exp(q.k_i / tau))

--dictionary chooses among the mechanisms of the paper's figure 2, which differ in where the keys come from:

    queue        f_k of the last K images; f_k follows f_q slowly, theta_k = m theta_k + (1 - m) theta_q (equation 2)
    memory-bank  one stored vector for each training image, a running mean of its q (Wu et al. 2018, 1805.01978)
    end-to-end   f_k = f_q of the other images of the batch, with gradients through queries and keys

What is kept, and probed, is f_q without its head.

    python moco.py                                          # embedded data, two minutes on two cores
    python moco.py --dataset cifar10                        # ResNet-18, 200 epochs
    torchrun --nproc-per-node 4 moco.py --dataset cifar10   # the same run on four GPUs
"""
import copy
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import augment, cli, distributed, pictures, resnet
from common.data import NAMES, epoch_order, load, steps_per_epoch
from common.run import Progress, Run, cosine, parse, set_rate, spread

# ---- augmentation (v1: section 3.3, after Wu et al.; v2: section 3, after SimCLR)


def view(x, rng, size, crop_min, augmentation, blur):
    """One random view of each image: x uint8 (N, 3, H, W) to float (N, 3, size, size) in [0, 1].

    crop_min: least share of the area that a crop keeps. augmentation: "v1" jitters the colours of every view and their
    hue strongly, "v2" those of 0.8 of the views, their hue weakly. blur: share of the views that are blurred.
    """
    n = len(x)
    share, hue = {"v1": (1.0, 0.4), "v2": (0.8, 0.1)}[augmentation]
    x = x.float() / 255
    x = augment.resized_crop(x, *augment.crop_boxes(rng, n, *x.shape[2:], scale=(crop_min, 1.0)), size)
    x = augment.apply_where(rng.uniform(n) < share, augment.color_jitter, x,
                            *augment.jitter_parameters(rng, n, 0.4, 0.4, 0.4, hue))
    x = augment.apply_where(rng.uniform(n) < 0.2, augment.grayscale, x)
    if blur > 0:
        gaussian_blur = functools.partial(augment.gaussian_blur, kernel_size=size // 20 * 2 + 1)
        x = augment.apply_where(rng.uniform(n) < blur, gaussian_blur, x, rng.uniform(n, low=0.1, high=2.0))
    return augment.horizontal_flip(x, rng.uniform(n) < 0.5)


# ---- model


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm of `groups` equal parts of the batch, each by its own mean and variance, as on so many GPUs."""

    def __init__(self, channels, groups):
        super().__init__(channels, momentum=1 - 0.9 ** (1 / groups))          # `groups` updates in place of one by 0.1
        self.groups = groups

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return torch.cat([super(SplitBatchNorm, self).forward(part) for part in x.chunk(self.groups)])


def encoder(args):
    """What is kept and probed, untrained: (N, 3, S, S) RGB in [0, 1] to (N, D). args: the settings of a run."""
    return getattr(resnet, args.arch)(args.stem, args.width)


class Encoder(nn.Module):
    """A ResNet and its head: "linear" (v1) or "mlp" (v2, one hidden layer)."""

    def __init__(self, arch, stem, width, head, bn_groups, dim=128):
        super().__init__()
        norm_layer = functools.partial(SplitBatchNorm, groups=bn_groups)
        self.backbone = getattr(resnet, arch)(stem, width, norm_layer=norm_layer)
        hidden = self.backbone.feature_dim
        self.head = nn.Linear(hidden, dim)
        if head == "mlp":
            self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(inplace=True), self.head)

    def forward(self, x):
        h = self.backbone(x)                                                  # (N, feature_dim)
        return h, F.normalize(self.head(h).float(), dim=1)                    # (N, C)


class MoCo(nn.Module):
    """Query encoder, dictionary, and for the queue the key encoder. The dictionary is a buffer: a checkpoint has it."""

    def __init__(self, encoder, dictionary, entries, m=0.999, bank_m=0.5, dim=128):
        """entries: K keys of the queue, or the training images of the memory bank; end-to-end has no memory.
        m, bank_m in [0, 1): momentum of the key encoder's weights and of the bank's vectors."""
        super().__init__()
        self.dictionary, self.m, self.bank_m = dictionary, m, bank_m
        self.query = encoder
        if dictionary == "queue":
            self.key = copy.deepcopy(encoder).requires_grad_(False)
            self.register_buffer("queue", F.normalize(torch.randn(entries, dim), dim=1))      # (K, C)
            self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))               # to the oldest key
        elif dictionary == "memory-bank":
            self.register_buffer("bank", F.normalize(torch.randn(entries, dim), dim=1))       # (images, C)

    def forward(self, x1, x2, tau, symmetric, index, drawn, order):
        """The loss of a batch, the features h of x1, and q and k (or None) for `remember`.

        x1, x2: (N, 3, S, S) views. symmetric: each is the query once, and the loss the mean; else x1 is. index: (N,)
        which training images these are, drawn: (K,) whose vectors are the negatives, both for the memory bank. order:
        see `shuffled`. These three are of the whole batch of all processes. DistributedDataParallel asks that a step
        calls it once.
        """
        loss, h, q, k = self.look_up(x1, x2, tau, index, drawn, order)
        if symmetric:
            loss_2, _, _, k_2 = self.look_up(x2, x1, tau, index, drawn, order)                # the queue has neither k
            loss, k = (loss + loss_2) / 2, torch.cat([k, k_2])
        return loss, h, q, k

    def look_up(self, x_q, x_k, tau, index, drawn, order):
        """The three mechanisms."""
        h, q = self.query(x_q)                                                # (N, feature_dim), (N, C)
        q = distributed.gather(q)
        if self.dictionary == "queue":
            with torch.no_grad():
                k = shuffled(self.key, x_k, order)
            loss = info_nce(q, k, self.queue, tau)
        elif self.dictionary == "memory-bank":
            k = None
            loss = info_nce(q, self.bank[index], self.bank[drawn], tau, own=index[:, None] == drawn)
        else:
            k = shuffled(self.query, x_k, order)
            loss = info_nce(q, k, k, tau, own=torch.eye(len(q), dtype=torch.bool, device=q.device))
        return loss, h, q, k

    @torch.no_grad()
    def remember(self, q, k, index=None):
        """After the optimiser's step: the dictionary takes in the batch. q, k: (N, C); index as in `forward`."""
        if self.dictionary == "queue":
            for theta_k, theta_q in zip(self.key.parameters(), self.query.parameters()):
                theta_k.lerp_(theta_q, 1 - self.m)                            # m theta_k + (1 - m) theta_q
            self.enqueue(k)
        elif self.dictionary == "memory-bank":
            self.bank[index] = F.normalize(torch.lerp(q, self.bank[index], self.bank_m), dim=1)

    @torch.no_grad()
    def enqueue(self, keys):
        """keys (N, C), any N, take the places of the oldest; of more than K the last K stay."""
        size = len(self.queue)
        keys = keys[-size:]
        self.queue[(self.pointer + torch.arange(len(keys), device=keys.device)) % size] = keys
        self.pointer.copy_((self.pointer + len(keys)) % size)


def shuffled(encoder, x, order):
    """The keys (N, C) of all processes' x, encoded in another order than the queries (shuffling BN, section 3.3).

    Batch norm leaks: a query and its key that are normalised among the same images can be told by the statistics that
    they share. order: a permutation of 0..N-1, the same in every process; the keys come back in the order of x.
    """
    rank, world = distributed.place()
    x = distributed.gather(x)[order.chunk(world)[rank]].contiguous(memory_format=torch.channels_last)
    return distributed.gather(encoder(x)[1])[order.argsort()]


# ---- loss and schedule


def info_nce(q, k, negatives, tau, own=None):
    """InfoNCE (equation 1), mean over the queries: a scalar.

    q, k: (N, C) queries and their keys. negatives: (K, C). All are normalised here. tau > 0, the temperature.
    own: (N, K) bool, true where a negative is of the query's own image, and is left out.
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


def tenths(step, steps):
    """v1's schedule: a factor of 1, after 0.6 of the steps 0.1, after 0.8 of them 0.01."""
    return 0.1 ** ((step >= 0.6 * steps) + (step >= 0.8 * steps))


# ---- arguments

DEFAULTS = {  # of a data set or a dictionary, where they differ from those below
    "shapes": dict(image_size=16, width=16, epochs=45, batch_size=128, crop_min=0.4, augmentation="v1", lr=0.2, tau=0.2,
                   negatives=256, bn_groups=4),
    "stl10": dict(image_size=96),
    "fashionmnist": dict(image_size=28),
    "folder": dict(image_size=224, blur=0.5, stem="imagenet", negatives=65536, m=0.999, tau=0.2, head="mlp",
                   weight_decay=1e-4, batch_size=256),
    "small": dict(image_size=32, blur=0.0, stem="cifar", width=16, epochs=25, batch_size=256, negatives=4096, m=0.99,
                  tau=0.1, head="linear", crop_min=0.2, lr=0.12, weight_decay=1e-4),
    "memory-bank": dict(bn_groups=1),                     # keys come from earlier batches: batch norm leaks nothing
    "shapes memory-bank": dict(negatives=0, tau=0.1, epochs=35),
    "shapes end-to-end": dict(epochs=25),
}


def arguments(argv):
    parser = cli.Parser(prog="moco.py", description="MoCo. Defaults are those of --dataset shapes; with another "
                        "--dataset or --dictionary beside --help, that one's.")
    add = parser.add_argument
    add("--dataset", choices=NAMES, default="shapes", help="what to train on; shapes and folder need no download")
    add("--image-size", type=cli.number(int, 8, True), default=32, help="side of the images, pixels")
    add("--dictionary", choices=("queue", "memory-bank", "end-to-end"), default="queue",
        help="where the keys come from")
    add("--negatives", type=cli.count_or_zero, default=4096,
        help="K: length of the queue, or vectors drawn from the memory bank (0: all of them)")
    add("--m", type=cli.number(float, 0, True, 1), default=0.99, help="momentum of the key encoder (paper: 0.999)")
    add("--bank-m", type=cli.number(float, 0, True, 1), default=0.5, help="momentum of the memory bank's vectors")
    add("--head", choices=("linear", "mlp"), default="linear", help="v1: linear, v2: mlp with one hidden layer")
    add("--augmentation", choices=("v1", "v2"), default="v2", help="colours; v1: jitter all, v2: jitter 0.8, less hue")
    add("--blur", type=cli.number(float, 0, True, 1), default=0.0, help="share of the views blurred (v1: 0, v2: 0.5)")
    add("--crop-min", type=cli.number(float, 0, high=1), default=0.08,
        help="least share of the area that a crop keeps (v1 and v2: 0.2)")
    add("--symmetric", action="store_true", help="let either view be the query once")
    add("--bn-groups", type=cli.count, default=8,
        help="parts of the batch that batch norm treats alone, like GPUs (1: the whole batch)")
    add("--arch", choices=("resnet18", "resnet34", "resnet50"), default="resnet18", help="depth of the encoder")
    add("--width", type=cli.count, default=64, help="channels of the encoder's first stage")
    add("--stem", choices=("cifar", "imagenet"), default="cifar", help="first layers: cifar keeps the resolution")
    add("--epochs", type=cli.count, default=200, help="passes over the training images")
    add("--batch-size", type=cli.number(int, 2, True), default=512, help="images a step, over all processes")
    add("--lr", type=cli.positive, default=0.03, help="peak learning rate for 256 images; scaled by batch size / 256")
    add("--schedule", choices=("steps", "cosine"), default="cosine",
        help="v1: steps (a tenth after 0.6 and 0.8 of the epochs), v2: cosine")
    add("--weight-decay", type=cli.nonnegative, default=5e-4, help="of all weights (paper: 0.0001)")
    add("--tau", type=cli.positive, default=0.1, help="temperature of the loss (v1: 0.07, v2: 0.2)")
    cli.add_run_flags(parser)
    args = parse(parser, argv, DEFAULTS, by=("dataset", "dictionary"))
    unused = {"queue": ("bank_m",), "memory-bank": ("m",), "end-to-end": ("m", "bank_m", "negatives")}[args.dictionary]
    cli.refuse_unused(parser, args, unused, f"--dictionary {args.dictionary}")
    if args.dictionary == "queue" and args.negatives == 0:
        raise cli.Refusal("--negatives 0 leaves the queue empty: give its length")
    if args.dictionary == "memory-bank" and args.symmetric:
        raise cli.Refusal("--symmetric has no second view in --dictionary memory-bank: leave one of them out")
    if args.batch_size % args.bn_groups:
        raise cli.Refusal(f"--bn-groups {args.bn_groups} does not divide --batch-size {args.batch_size}")
    return args


# ---- training


def main(argv=None):
    """Trains, evaluates and writes the run's folder. Returns the final metrics (result.json)."""
    args = arguments(argv)
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    rank, world = distributed.start(device)
    run = Run("moco", vars(args), device, rank)
    if args.bn_groups > 1 and args.bn_groups % world:
        raise cli.Refusal(f"--bn-groups {args.bn_groups} is not a multiple of the {world} processes")
    data = distributed.first_alone(load, args.dataset, args.data_dir, args.image_size, device, args.workers,
                                   args.cache_gb, args.seed)
    images, two_views = len(data.train), args.dictionary != "memory-bank"
    steps = steps_per_epoch(images, args.batch_size, world)
    run.describe(precision=amp or torch.float32, processes=world)
    run.ready("data", data.describe())

    def new_model():
        torch.manual_seed(args.seed)
        query = Encoder(args.arch, args.stem, args.width, args.head, max(1, args.bn_groups // world))
        entries = args.negatives if args.dictionary == "queue" else images
        model = MoCo(query, args.dictionary, entries, args.m, args.bank_m)
        model = distributed.sync_batch_norm(model, device) if args.bn_groups == 1 else model
        return model.to(device, memory_format=torch.channels_last)

    model = new_model()
    run.ready("model", f"{sum(p.numel() for p in model.parameters()):,} weights")
    net = distributed.wrap(model)
    net = torch.compile(net) if args.compile else net
    lr = args.lr * args.batch_size / 256
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr, momentum=0.9, weight_decay=args.weight_decay)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    rng, recipe = augment.Random(args.seed, rank, world), (args.image_size, args.crop_min, args.augmentation, args.blur)

    negatives = args.batch_size - 1 if args.dictionary == "end-to-end" else args.negatives or images - 1
    metrics = {"loss": ("loss", f"chance {math.log(1 + negatives):.3f}"), "spread": ("spread", "")}
    progress = Progress(run, args.epochs, steps, args.batch_size, metrics)
    run.track(model=model, optimizer=optimizer, scaler=scaler, rng=rng, progress=progress)
    epoch, step = run.restore()
    factor = functools.partial(cosine, warmup=0) if args.schedule == "cosine" else tenths
    everything = torch.arange(images, device=device)
    net.train()
    with run:
        while epoch < args.epochs:
            order = epoch_order(images, args.batch_size, args.seed, epoch, rank, world)[step:]
            for step, (index, x) in enumerate(zip(order, data.train.batches(order)), step):
                x1 = view(x, rng, *recipe).contiguous(memory_format=torch.channels_last)
                x2 = view(x, rng, *recipe) if two_views else None
                index = distributed.gather(index.to(device))                  # (N,), of the whole batch
                shuffle, drawn = None, everything
                if two_views:
                    shuffle = torch.randperm(args.batch_size, generator=rng.generator).to(device)
                elif args.negatives:
                    drawn = torch.randint(images, (args.negatives,), generator=rng.generator).to(device)
                set_rate(optimizer, lr * factor(epoch * steps + step, args.epochs * steps))
                with autocast:
                    loss, h, q, k = net(x1, x2, args.tau, args.symmetric, index, drawn, shuffle)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                model.remember(q, k, index)
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
                return model.query.backbone((x.float() / 255).contiguous(memory_format=torch.channels_last))
        return encode, model

    run.write("encoder.pt", lambda path: torch.save(model.query.backbone.state_dict(), path))
    x, rng = data.train.at(data.train.some(32)), augment.Random(args.seed)
    views = [view(x, rng, *recipe) for _ in range(2)]
    run.write("views.png", lambda path: pictures.rows(path, *views))
    return run.finish(data, {"untrained": judged(new_model()), "trained": judged(model)}, device)


if __name__ == "__main__":
    cli.program(main)
