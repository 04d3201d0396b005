"""DIM: Learning Deep Representations by Mutual Information Estimation and Maximization (Hjelm et al. 2018, 1808.06670),
and AMDIM: Learning Representations by Maximizing Mutual Information Across Views (Bachman et al. 2019, 1906.00910).

DIM's encoder gives an M x M map of local vectors c and one vector Y of the image. A network T scores pairs of them,
Real of one image, Fake of two, and so estimates mutual information, which encoder and T maximise (equation 8):

    alpha I(all c; Y)  +  beta mean over the M x M places I(c; Y)  -  gamma D(Y, uniform)

T estimates it in one of three ways, P the pairs of one image, Q those of two (equations 2, 4, 5):

    dv         E_P[T] - log E_Q[exp T]
    jsd        E_P[-softplus(-T)] - E_Q[softplus(T)]
    infonce    E_P[T - log (exp T + sum over the Q of this Y of exp T)]

D is an adversary that tells sigmoid(Y) from draws of the uniform distribution. AMDIM (--objective multiscale) has two
views of each image, and no Y: by infonce, the vector of all of one view shall tell the other view's maps of 5 x 5 and
7 x 7 vectors, and a place of 5 x 5 those of the other's 5 x 5. What is kept, and probed, is DIM's fc, beside conv (the
last map) and Y, and AMDIM's vector.

    python dim.py                                           # embedded data, two minutes on two cores
    python dim.py --dataset cifar10 --estimator infonce     # the paper's encoder
    python dim.py --dataset cifar10 --objective multiscale  # AMDIM
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import augment, cli, distributed, pictures, resnet
from common.cli import Refusal
from common.data import NAMES, epoch_order, load, steps_per_epoch
from common.run import Progress, Run, cosine, parse, set_rate, spread

# ---- mutual information


def mutual_information(scores, positives, estimator):
    """An estimate of mutual information, to be maximised: a scalar.

    scores: (N, K), T of N vectors with K candidates each. positives: (N, K) bool, true where the pair is of one image
    (P), at least once in each row, false where it is of two (Q), equally often in each row.
    estimator: "dv" and "infonce" bound it from below, in nats, where the pairs of Q are independent draws (the places
    of one image are not); infonce adds log(1 + negatives of a row), which it cannot exceed, to the equation. "jsd" at
    its best is 2 JS(P, Q) - log 4, so within [-log 4, 0]. Where T is constant dv and infonce are 0 and, of T = 0, jsd
    is -log 4: the chance levels.
    """
    scores = scores.float()
    if estimator == "infonce":
        others = scores.masked_fill(positives, -math.inf).logsumexp(dim=1, keepdim=True)      # (N, 1)
        log_softmax = scores - torch.logaddexp(scores, others)                # (N, K), of a positive and the negatives
        return log_softmax[positives].mean() + math.log(1 + int((~positives[0]).sum()))
    real, fake = scores[positives], scores[~positives]
    if estimator == "dv":
        return real.mean() - (fake.logsumexp(dim=0) - math.log(len(fake)))
    return -F.softplus(-real).mean() - F.softplus(fake).mean()


def inner_products(a, b):
    """a (N, D) with all vectors of b (N, L, D): scores (N, N L), / sqrt(D) so that they begin small, and positives."""
    with torch.autocast(a.device.type, enabled=False):
        scores = a.float() @ b.float().flatten(0, 1).T / math.sqrt(a.shape[1])
    return scores, torch.eye(len(a), dtype=torch.bool, device=a.device).repeat_interleave(b.shape[1], dim=1)


# ---- DIM


class Encoder(nn.Module):
    """(N, 3, S, S) to fc (N, 16 width); `layers` also gives the local map (N, C, M, M), conv (N, ...) and Y (N, dim).

    arch "conv" is the paper's for 32 pixels (width 64): M = S / 4, conv is the next layer's map, flattened. "resnet18":
    the local map is layer3's, conv the mean of layer4's.
    """

    def __init__(self, arch, stem, width, image_size, dim=64):
        super().__init__()
        if arch == "conv":
            def stage(channels, out):
                return nn.Sequential(nn.Conv2d(channels, out, 4, 2, padding=1, bias=False), nn.BatchNorm2d(out),
                                     nn.ReLU(inplace=True))
            self.lower = nn.Sequential(stage(3, width), stage(width, 2 * width))
            self.upper = stage(2 * width, 4 * width)
            self.local_dim, self.places = 2 * width, (image_size // 4) ** 2
            self.conv_dim = 4 * width * (image_size // 8) ** 2
        else:
            net = getattr(resnet, arch)(stem, width)
            self.lower = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3)
            self.upper = nn.Sequential(net.layer4, nn.AdaptiveAvgPool2d(1))
            self.local_dim = net.feature_dim // 2
            self.places = math.ceil(image_size / (4 if stem == "cifar" else 16)) ** 2
            self.conv_dim = net.feature_dim
        self.fc = nn.Sequential(nn.Linear(self.conv_dim, 16 * width), nn.BatchNorm1d(16 * width), nn.ReLU())
        self.y = nn.Linear(16 * width, dim)

    def forward(self, x):
        return self.layers(x)["fc"]

    def stages(self):
        return [[self.lower], [self.upper], [self.fc]]

    def layers(self, x):
        local = self.lower(x.contiguous(memory_format=torch.channels_last))   # (N, C, M, M)
        conv = self.upper(local).flatten(1)                                   # (N, conv_dim)
        fc = self.fc(conv)                                                    # (N, 16 width)
        return {"local": local, "conv": conv, "fc": fc, "Y": self.y(fc)}


class Dot(nn.Module):
    """T(c, Y), encode-and-dot: each through a hidden layer beside a linear shortcut; every Y with every c."""

    def __init__(self, y_dim, channels, units):
        super().__init__()
        def embedding(dim):
            return nn.ModuleList([nn.Sequential(nn.Linear(dim, units), nn.ReLU(), nn.Linear(units, units)),
                                  nn.Linear(dim, units)])
        self.y, self.c, self.norm = embedding(y_dim), embedding(channels), nn.LayerNorm(units)

    def forward(self, y, c):
        """y (N, y_dim), c (N, L, channels) to scores and positives (N, N L)."""
        return inner_products(sum(f(y) for f in self.y), self.norm(sum(f(c) for f in self.c)))


class Concat(nn.Module):
    """T(c, Y), concat-and-convolve: an MLP of both at each place; each Y with the c of its own and one other image."""

    def __init__(self, y_dim, channels, units):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(y_dim + channels, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(),
                                 nn.Linear(units, 1))

    def forward(self, y, c):
        """y (N, y_dim), c (N, L, channels) to scores and positives (N, 2 L)."""
        both = torch.cat([c, c.roll(1, dims=0)], dim=1)                       # (N, 2 L, channels)
        scores = self.net(torch.cat([y[:, None].expand(-1, both.shape[1], -1), both], dim=2))[:, :, 0]
        return scores, (torch.arange(both.shape[1], device=y.device) < c.shape[1]).expand_as(scores)


class DIM(nn.Module):
    """The encoder and what estimates: T of the local and of the global objective, and the adversary on Y."""

    def __init__(self, encoder, views, alpha, beta, gamma, estimator, critic, units, dim=64):
        super().__init__()
        self.views = views
        self.encoder, self.alpha, self.beta, self.gamma, self.estimator = encoder, alpha, beta, gamma, estimator
        kind = {"dot": Dot, "concat": Concat}[critic]
        if alpha > 0:
            self.summary = nn.Sequential(nn.Conv2d(encoder.local_dim, 64, 3, padding=1), nn.ReLU(inplace=True),
                                         nn.Conv2d(64, 32, 3, padding=1), nn.Flatten())
            self.global_critic = kind(dim, 32 * encoder.places, units)
        if beta > 0:
            self.local_critic = kind(dim, encoder.local_dim, units)
        if gamma > 0:
            self.prior = nn.Sequential(nn.Linear(dim, 1000), nn.ReLU(), nn.Linear(1000, 200), nn.ReLU(),
                                       nn.Linear(200, 1))

    def forward(self, x, uniform):
        """x (V N, 3, S, S), the V views of each image N rows apart; uniform (V N, dim) draws from [0, 1]. Returns fc
        (V N, 16 width) and the losses whose weights are not 0: global, local, and the adversary's, log 4 at chance."""
        out = self.encoder.layers(x)
        ys, locals_ = ([distributed.gather(part) for part in out[name].float().chunk(self.views)]
                       for name in ("Y", "local"))
        pairs, terms = list(zip(ys, reversed(locals_))), []                   # of two views Y of one, c of the other
        if self.alpha > 0:
            wide = [(y, self.summary(local)[:, None]) for y, local in pairs]  # c: (N, 1, 32 M M), one place
            terms.append(-self.alpha * self.information(self.global_critic, wide))
        if self.beta > 0:
            narrow = [(y, local.flatten(2).transpose(1, 2)) for y, local in pairs]            # c: (N, M M, C)
            terms.append(-self.beta * self.information(self.local_critic, narrow))
        if self.gamma > 0:
            real = self.prior(distributed.gather(uniform)).float()
            fake = self.prior(reversed_gradient(torch.cat(ys).sigmoid(), self.gamma)).float()
            terms.append(F.softplus(-real).mean() + F.softplus(fake).mean())
        return out["fc"], terms

    def information(self, critic, pairs):
        return sum(mutual_information(*critic(y, c), self.estimator) for y, c in pairs) / len(pairs)


def reversed_gradient(x, gamma):
    """x itself, whose gradient is -gamma times what arrives: the encoder ascends where the adversary descends."""
    return (1 + gamma) * x.detach() - gamma * x


# ---- AMDIM


class Convolution(nn.Module):
    """A convolution without padding and a 1 x 1 convolution, beside a mean of the same window."""

    def __init__(self, channels, out, size, stride):
        super().__init__()
        self.size, self.stride, self.extra = size, stride, out - channels
        self.first = nn.Sequential(nn.Conv2d(channels, out, size, stride, bias=False), nn.BatchNorm2d(out),
                                   nn.ReLU(inplace=True))
        self.second = nn.Conv2d(out, out, 1, bias=False)

    def forward(self, x):
        shortcut = F.avg_pool2d(x, self.size, self.stride) if self.size > 1 else x
        return self.second(self.first(x)) + F.pad(shortcut, (0, 0, 0, 0, 0, self.extra))


class MultiscaleEncoder(nn.Module):
    """(N, 3, S, S) to (N, dim), S = 32, 64, 128 ... `layers` gives this as 1 of {7: (N, 4 width, 7, 7), 5: (N, 4 width,
    5, 5), 1: (N, dim)}.

    Nothing is padded and most layers are 1 x 1, so that a vector of the 7 x 7 map has seen S / 4 pixels, of the 5 x 5
    map S / 2: a task between places would be idle if each had seen all of the image.
    """

    def __init__(self, image_size, width, dim, depth):
        super().__init__()
        def block(channels, out, size, stride):
            return nn.Sequential(Convolution(channels, out, size, stride),
                                 *(Convolution(out, out, 1, 1) for _ in range(depth - 1)))
        halvings = int(math.log2(image_size // 32))
        stem = (5, 2) if halvings > 1 else (3, 1)                             # size, stride
        self.to_7 = nn.Sequential(
            nn.Conv2d(3, width, *stem, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            *(block(width, width, 4, 2) for _ in range(halvings - (stem[1] == 2))),
            block(width, 2 * width, 4, 2), block(2 * width, 4 * width, 2, 2), nn.BatchNorm2d(4 * width))
        self.to_5 = block(4 * width, 4 * width, 3, 1)
        self.to_1 = nn.Sequential(block(4 * width, 4 * width, 3, 1), Convolution(4 * width, dim, 3, 1),
                                  nn.BatchNorm2d(dim), nn.Flatten())
        self.feature_dim = dim

    def forward(self, x):
        return self.layers(x)[1]

    def stages(self):
        return [[self.to_7], [self.to_5], [self.to_1]]

    def layers(self, x):
        map_7 = self.to_7(x.contiguous(memory_format=torch.channels_last))
        map_5 = self.to_5(map_7)
        return {7: map_7, 5: map_5, 1: self.to_1(map_5)}


class AMDIM(nn.Module):
    """Encoder and the embeddings of its maps, in which vectors of all scales are compared."""

    def __init__(self, encoder, width, clip=20.0, penalty=0.05):
        super().__init__()
        self.encoder, self.clip, self.penalty = encoder, clip, penalty
        self.embeddings = nn.ModuleDict({scale: nn.Sequential(
            nn.Conv2d(4 * width, encoder.feature_dim, 1, bias=False), nn.BatchNorm2d(encoder.feature_dim),
            nn.ReLU(inplace=True), nn.Conv2d(encoder.feature_dim, encoder.feature_dim, 1)) for scale in ("5", "7")})

    def forward(self, views, place):
        """views (2 N, 3, S, S), the two of each image N rows apart; place (N,) in 0..24, which vector of the 5 x 5 map
        is to tell the other view's: the vectors (2 N, dim), the loss, and the penalty of large scores."""
        maps = self.encoder.layers(views)
        embedded = {int(s): f(maps[int(s)]).flatten(2).transpose(1, 2).float() for s, f in self.embeddings.items()}
        tell = {1: maps[1].float(), 5: embedded[5][torch.arange(len(views)), place.repeat(2)]}    # (2 N, dim) each
        tell, told = ([{s: distributed.gather(x.chunk(2)[view]) for s, x in vectors.items()} for view in (0, 1)]
                      for vectors in (tell, embedded))
        loss = penalty = 0.0
        for scale, other in ((1, 5), (1, 7), (5, 5)):
            for view in (0, 1):
                scores, positives = inner_products(tell[view][scale], told[1 - view][other])
                loss = loss - mutual_information(bounded(scores, self.clip), positives, "infonce") / 2
                penalty = penalty + self.penalty * scores.square().mean() / 2
        return maps[1], [loss, penalty]


def bounded(scores, clip):
    """Scores within (-clip, clip), by tanh (section 3.3)."""
    return clip * torch.tanh(scores / clip)


def view(x, rng, size):
    """One random view of each image but for the flip, which both views share (appendix, CIFAR; where images are larger
    than 64 pixels a crop in place of the shift): x float (N, 3, H, W) to (N, 3, size, size) in [0, 1]."""
    n = len(x)
    if size > 64:
        x = augment.resized_crop(x, *augment.crop_boxes(rng, n, *x.shape[2:], scale=(0.3, 1.0)), size)
    else:
        reach = size // 8
        x = augment.apply_where(rng.uniform(n) < 0.8, augment.shift, x,
                                *rng.uniform(n, 2, low=-reach, high=reach + 1).floor().unbind(1))
    x = augment.apply_where(rng.uniform(n) < 0.8, augment.color_jitter, x,
                            *augment.jitter_parameters(rng, n, 0.4, 0.4, 0.4, 0.2))
    return augment.apply_where(rng.uniform(n) < 0.25, augment.grayscale, x)


def augmented(x, rng, size, views):
    """x uint8 (N, 3, S, S) to (views N, 3, S, S) in [0, 1]; one view is the image itself."""
    if views == 1:
        return x.float() / 255
    x = augment.horizontal_flip(x.float() / 255, rng.uniform(len(x)) < 0.5)
    return torch.cat([view(x, rng, size) for _ in range(2)])


def encoder(args):
    """What is kept and probed, untrained: (N, 3, S, S) RGB in [0, 1] to (N, D). args: the settings of a run."""
    if args.objective == "multiscale":
        return MultiscaleEncoder(args.image_size, args.width, args.units, args.depth)
    return Encoder(args.arch, args.stem, args.width, args.image_size)


# ---- arguments

DEFAULTS = {  # of a data set or an objective, where they differ from those below
    "shapes": dict(views=2, estimator="infonce", width=16, units=128, epochs=25, lr=1e-3),
    "stl10": dict(image_size=64),
    "fashionmnist": dict(image_size=32),
    "folder": dict(image_size=128, arch="resnet18", stem="imagenet"),
    "global": dict(alpha=1.0, beta=0.0, gamma=1.0),
    "both": dict(alpha=0.5, beta=1.0),
    "small": dict(image_size=32, arch="conv", stem="cifar", width=32, units=512, estimator="infonce", epochs=20,
                  lr=5e-4),
    "multiscale": dict(views=2, estimator="infonce", arch="conv", stem="cifar", width=128, units=1024, batch_size=256,
                       lr=2e-4, weight_decay=1e-5, epochs=300),
    "shapes multiscale": dict(width=16, units=128, epochs=20, batch_size=64, lr=1e-3),
    "small multiscale": dict(image_size=32, width=16, units=256, depth=1, epochs=5, batch_size=128, lr=1e-3),
}


def arguments(argv):
    parser = cli.Parser(prog="dim.py", description="DIM and AMDIM. Defaults are those of --dataset shapes --objective "
                        "local; with another one beside --help, those.")
    add = parser.add_argument
    add("--dataset", choices=NAMES, default="shapes", help="what to train on; shapes and folder need no download")
    add("--image-size", type=cli.number(int, 8, True), default=32, help="side of the images, pixels")
    add("--objective", choices=("local", "global", "both", "multiscale"), default="local",
        help="DIM's mutual information of Y with each place, with all of the map, with both; or AMDIM")
    add("--estimator", choices=("jsd", "infonce", "dv"), default="jsd", help="DIM's; AMDIM has infonce")
    add("--critic", choices=("dot", "concat"), default="dot", help="DIM's T: encode-and-dot, concat-and-convolve")
    add("--views", type=int, choices=(1, 2), default=1,
        help="DIM of each image itself, or of two augmented views, Y of one and the places of the other (AMDIM: 2)")
    add("--alpha", type=cli.nonnegative, default=0.0, help="weight of the global objective")
    add("--beta", type=cli.nonnegative, default=1.0, help="weight of the local objective")
    add("--gamma", type=cli.nonnegative, default=0.1, help="weight of the adversary that makes Y uniform")
    add("--arch", choices=("conv", "resnet18", "resnet34", "resnet50"), default="conv", help="DIM's encoder")
    add("--stem", choices=("cifar", "imagenet"), default="cifar", help="first layers of a ResNet")
    add("--width", type=cli.count, default=64, help="channels of the encoder's first layer (AMDIM: 256)")
    add("--depth", type=cli.count, default=3, help="convolutions of each of AMDIM's blocks (AMDIM: 10)")
    add("--units", type=cli.count, default=2048,
        help="of T's hidden layers (dot: 2048, concat: 512); dimensions of AMDIM's vectors (2048)")
    add("--epochs", type=cli.count, default=200, help="passes over the training images")
    add("--warmup", type=cli.number(float, 0, True, 1), default=0.05, help="share of the epochs with a rising rate")
    add("--batch-size", type=cli.number(int, 2, True), default=64,
        help="images a step, over all processes (AMDIM: 480)")
    add("--lr", type=cli.positive, default=1e-4, help="peak learning rate of Adam")
    add("--weight-decay", type=cli.nonnegative, default=0.0, help="of all weights, decoupled (AdamW)")
    cli.add_run_flags(parser)
    args = parse(parser, argv, DEFAULTS, by=("dataset", "objective"))
    multiscale = args.objective == "multiscale"
    unused = ("estimator", "critic", "alpha", "beta", "gamma", "arch", "stem") if multiscale else ("depth",)
    cli.refuse_unused(parser, args, unused, f"--objective {args.objective}")
    if multiscale:
        if args.views == 1:
            raise Refusal("--views 1 leaves --objective multiscale nothing to predict: leave one of them out")
        if args.image_size % 32 or (args.image_size // 32).bit_count() > 1:
            raise Refusal(f"--image-size {args.image_size} does not end in maps of 7 and 5: --objective multiscale "
                          f"takes 32, 64, 128 ...")
        if args.units < 4 * args.width:
            raise Refusal(f"--units {args.units} is less than the encoder's channels, 4 times --width {args.width}")
    elif args.alpha == args.beta == 0:
        raise Refusal("--alpha 0 with --beta 0 leaves no objective: give one of them a weight")
    elif args.arch == "conv" and args.image_size % 8:
        raise Refusal(f"--image-size {args.image_size} is not a multiple of 8, which --arch conv needs")
    return args


# ---- training


def main(argv=None):
    """Trains, evaluates and writes the run's folder. Returns the final metrics (result.json)."""
    args = arguments(argv)
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    rank, world = distributed.start(device)
    run = Run("dim", vars(args), device, rank)
    data = distributed.first_alone(load, args.dataset, args.data_dir, args.image_size, device, args.workers,
                                   args.cache_gb, args.seed)
    steps, multiscale = steps_per_epoch(len(data.train), args.batch_size, world), args.objective == "multiscale"
    run.describe(precision=amp or torch.float32, processes=world)
    run.ready("data", data.describe())

    def new_model():
        torch.manual_seed(args.seed)
        if multiscale:
            model = AMDIM(encoder(args), args.width)
        else:
            model = DIM(encoder(args), args.views, args.alpha, args.beta, args.gamma, args.estimator, args.critic,
                        args.units)
        return distributed.sync_batch_norm(model, device).to(device, memory_format=torch.channels_last)

    model = new_model()
    run.ready("model", f"{sum(p.numel() for p in model.parameters()):,} weights")
    net = distributed.wrap(model)
    net = torch.compile(net) if args.compile else net
    betas = (0.8, 0.999) if multiscale else (0.9, 0.999)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas, weight_decay=args.weight_decay)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    rng = augment.Random(args.seed, rank, world)

    names = ["loss", "penalty"] if multiscale else \
        [name for name, weight in (("global", args.alpha), ("local", args.beta), ("prior", args.gamma)) if weight > 0]
    level = math.log(4) if args.estimator == "jsd" and not multiscale else 0.0
    chance = {"loss": 0.0, "global": args.alpha * level, "local": args.beta * level, "prior": math.log(4)}
    metrics = {name: (name, f"chance {chance[name]:.3f}" if name in chance else "") for name in [*names, "spread"]}
    progress = Progress(run, args.epochs, steps, args.batch_size, metrics)
    run.track(model=model, optimizer=optimizer, scaler=scaler, rng=rng, progress=progress)
    epoch, step = run.restore()
    net.train()
    with run:
        while epoch < args.epochs:
            order = epoch_order(len(data.train), args.batch_size, args.seed, epoch, rank, world)[step:]
            for step, x in enumerate(data.train.batches(order), step):
                views = augmented(x, rng, args.image_size, args.views)        # (V N, 3, S, S)
                if multiscale:
                    draws = (25 * rng.uniform(len(x))).long().to(device)      # (N,), places of the 5 x 5 map
                else:
                    draws = torch.cat([rng.uniform(len(x), 64) for _ in range(args.views)]).to(device)
                set_rate(optimizer, args.lr * cosine(epoch * steps + step, args.epochs * steps, args.warmup))
                with autocast:
                    h, terms = net(views, draws)
                optimizer.zero_grad()
                scaler.scale(sum(terms)).backward()
                scaler.step(optimizer)
                scaler.update()
                progress.update(epoch, step, [*terms, spread(h)])
                if run.stop_requested():
                    run.stop(epoch, step + 1)
            progress.end_epoch(epoch, lr=optimizer.param_groups[0]["lr"])
            epoch, step = epoch + 1, 0
            run.save(epoch, step)

    if rank > 0:
        return {}

    def judged(model, layer):
        def encode(x):                                                        # uint8 (N, 3, S, S) to (N, D)
            with autocast:
                return model.encoder.layers(x.float() / 255)[layer]
        return encode, model

    run.write("encoder.pt", lambda path: torch.save(model.encoder.state_dict(), path))
    x, rng = data.train.at(data.train.some(32)), augment.Random(args.seed)
    views = augmented(x, rng, args.image_size, args.views).chunk(args.views)
    run.write("views.png", lambda path: pictures.rows(path, *views))
    rows, untrained = {"": 1} if multiscale else {"": "fc", " conv": "conv", " Y": "Y"}, new_model()
    encoders = {f"{kind}{row}": judged(m, layer) for row, layer in rows.items()
                for kind, m in (("untrained", untrained), ("trained", model))}
    return run.finish(data, encoders, device, ("linear", "knn", "mlp"))


if __name__ == "__main__":
    cli.program(main)
