# SPDX-License-Identifier: MIT
"""DIM: Learning Deep Representations by Mutual Information Estimation and Maximization (Hjelm et al. 2018, 1808.06670),
and AMDIM: Learning Representations by Maximizing Mutual Information Across Views (Bachman et al. 2019, 1906.00910).

DIM's encoder turns an image into an M x M map of local vectors c and one global vector Y. It maximises (equation 8)

    alpha I(all c; Y)  +  beta mean over the M x M places I(c; Y)  -  gamma divergence(Y, uniform)

The mutual information is estimated with a network T that scores pairs (c, Y). P denotes pairs from the same image, Q
pairs from two different images (equations 2, 4, 5):

    dv         E_P[T] - log E_Q[exp T]
    jsd        E_P[-softplus(-T)] - E_Q[softplus(T)]
    infonce    E_P[T - log (exp T + sum over the Q of this Y of exp T)]

The divergence is measured by an adversary that tells sigmoid(Y) from uniform draws. AMDIM (--objective multiscale) has
two views of each image and no Y: with infonce, the global vector of one view predicts the 5 x 5 and 7 x 7 maps of the
other, and a vector of one 5 x 5 map predicts the 5 x 5 map of the other. The representation is DIM's last hidden layer,
fc (conv, the last map, and Y are evaluated as well), or AMDIM's global vector.

    python dim.py                                           # generated shapes, a minute or two on two cores
    python dim.py --dataset cifar10 --estimator infonce     # the paper's encoder
    python dim.py --dataset cifar10 --objective multiscale  # AMDIM

Differences from the papers: the learning rate warms up and follows a cosine (DIM: constant, AMDIM: steps); inputs are
in [0, 1], not normalised; DIM's scores are divided by sqrt(D); the global T scores a convolutional summary of the map
(DIM's code: a copy of the encoder's layers); DIM takes 200 epochs (1,000) and whole images of STL-10 (flipped crops).

Measured, linear / kNN: `shapes`, three seeds, 52.3 / 30.0 (untrained 27.7 / 18.2; --views 1, one seed, 20.3 linear),
AMDIM 68.0 / 46.4 (33.7 / 16.9); CIFAR-10 (JPEG), --small, 59.0 / 53.9 (41.9 / 31.2), AMDIM 63.9 / 62.1 (31.2 / 28.3).
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import MLP, Conv2dNormActivation

from common import Refusal, augment, cli, distributed, resnet
from common.run import Run, cosine

# ---- mutual information


def mutual_information(scores, positives, estimator):
    """An estimate of mutual information, to be maximised: a scalar.

    scores: (N, K), T of N vectors with K candidates each. positives: (N, K) bool, true for pairs from one image (P), at
    least one in each row, and false for pairs from two images (Q), equally many in each row.
    estimator: "infonce" is a lower bound in nats if the pairs of Q are independent (the places of one image are not);
    log(1 + negatives in a row) is added to it, its upper limit. "dv" may exceed the truth, as the log of a batch's mean
    is too small on average. "jsd" is at most 2 JS(P, Q) - log 4, within [-log 4, 0]. T = 0 gives 0, with "jsd" -log 4.
    """
    scores = scores.float()
    def mean(x, mask):                                                        # x[mask] would synchronise the GPU
        return torch.where(mask, x, 0.0).sum() / mask.sum()
    if estimator == "jsd":
        return -mean(F.softplus(-scores), positives) - mean(F.softplus(scores), ~positives)
    others = scores.masked_fill(positives, -math.inf).logsumexp(dim=1, keepdim=True)          # (N, 1)
    if estimator == "infonce":
        log_softmax = scores - torch.logaddexp(scores, others)                # (N, K), positive among negatives
        return mean(log_softmax, positives) + (~positives[0]).sum().log1p()
    return mean(scores, positives) - (others.logsumexp(dim=(0, 1)) - (~positives).sum().log())          # dv


def inner_products(a, b):
    """Scores (N, N L) of a (N, D) with all vectors of b (N, L, D), divided by sqrt(D) to start small; and positives."""
    with torch.autocast(a.device.type, enabled=False):
        scores = a.float() @ b.float().flatten(0, 1).T / math.sqrt(a.shape[1])
    return scores, torch.eye(len(a), dtype=torch.bool, device=a.device).repeat_interleave(b.shape[1], dim=1)


# ---- DIM


class Encoder(nn.Module):
    """(N, 3, S, S) to fc (N, 16 width); `layers` also gives the local map (N, C, M, M), conv (N, conv_dim), Y (N, dim).

    arch "conv" is the paper's encoder for 32 pixels (width 64), with a layer more at 64 so that M = 8; conv is the map
    of the next layer, flattened. In ResNets (stem "imagenet" above 64 pixels) the map is layer3's, conv layer4's mean.
    """

    def __init__(self, arch, width, image_size, dim=64):
        super().__init__()
        if arch == "conv":
            depth = max(2, int(math.log2(image_size // 8)))                   # of the local map
            sizes = [3, *(width * 2**i for i in range(depth + 1))]
            stages = [Conv2dNormActivation(*pair, 4, 2, padding=1) for pair in zip(sizes, sizes[1:])]
            self.lower, self.upper = nn.Sequential(*stages[:-1]), stages[-1]
        else:
            net = getattr(resnet, arch)("cifar" if image_size <= 64 else "imagenet", width)
            self.lower = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3)
            self.upper = nn.Sequential(net.layer4, nn.AdaptiveAvgPool2d(1))
        with torch.no_grad():                                                 # the sizes, from a blank image
            local = self.eval().lower(torch.zeros(1, 3, image_size, image_size))
            self.local_dim, self.positions, self.conv_dim = *local.flatten(2).shape[1:], self.upper(local).numel()
        self.fc = nn.Sequential(nn.Linear(self.conv_dim, 16 * width), nn.BatchNorm1d(16 * width), nn.ReLU())
        self.y = nn.Linear(16 * width, dim)
        self.train()

    def forward(self, x):
        return self.layers(x)["fc"]

    def stages(self):
        return [[self.lower], [self.upper], [self.fc]]

    def layers(self, x):
        local = self.lower(x.contiguous(memory_format=torch.channels_last))   # (N, C, M, M)
        conv = self.upper(local).flatten(1)                                   # (N, conv_dim)
        fc = self.fc(conv)                                                    # (N, 16 width)
        return {"local": local, "conv": conv, "fc": fc, "Y": self.y(fc)}


class Embedding(nn.Module):
    """Vectors (..., dim) to (..., units), compared by inner products: a hidden layer with a shortcut that starts as the
    identity (cropped to that shape) plus noise, then a norm. AMDIM uses other norms than DIM's T."""

    def __init__(self, dim, units, hidden_norm=nn.BatchNorm1d, norm=nn.LayerNorm):
        super().__init__()
        self.shortcut, self.hidden_norm, self.norm = nn.Linear(dim, units, bias=False), hidden_norm(units), norm(units)
        nn.init.uniform_(self.shortcut.weight, -0.01, 0.01).detach().fill_diagonal_(1.0)
        self.hidden, self.out = nn.Linear(dim, units, bias=False), nn.Linear(units, units)

    def forward(self, x):
        flat = x.flatten(0, -2)                                               # (rows, dim)
        y = self.out(F.relu(self.hidden_norm(self.hidden(flat)))) + self.shortcut(flat)
        return self.norm(y).view(*x.shape[:-1], -1)


class Dot(nn.Module):
    """Encode-and-dot T, every Y with every c: Y (N, y_dim), c (N, L, channels) to scores and positives (N, N L)."""

    def __init__(self, y_dim, channels, units):
        super().__init__()
        self.y, self.c = Embedding(y_dim, units), Embedding(channels, units)

    def forward(self, y, c):
        return inner_products(self.y(y), self.c(c))


class Concat(nn.Module):
    """Concat-and-convolve T, an MLP on Y and c; each Y with every c of its own and of one other image: (N, 2 L)."""

    def __init__(self, y_dim, channels, units):
        super().__init__()
        self.net = MLP(y_dim + channels, [units, units, 1])

    def forward(self, y, c):
        both = torch.cat([c, c.roll(1, dims=0)], dim=1)                       # (N, 2 L, channels)
        scores = self.net(torch.cat([y[:, None].expand(-1, both.shape[1], -1), both], dim=2))[:, :, 0]
        return scores, (torch.arange(both.shape[1], device=y.device) < c.shape[1]).expand_as(scores)


class DIM(nn.Module):
    """The encoder, T for the global and for the local objective, and the adversary on Y."""

    def __init__(self, encoder, views, alpha, beta, gamma, estimator, critic, units, dim=64):
        super().__init__()
        self.encoder, self.views, self.estimator = encoder, views, estimator
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        kind = {"dot": Dot, "concat": Concat}[critic]
        if alpha > 0:
            self.summary = nn.Sequential(nn.Conv2d(encoder.local_dim, 64, 3, padding=1), nn.ReLU(inplace=True),
                                         nn.Conv2d(64, 32, 3, padding=1), nn.Flatten())
            self.global_critic = kind(dim, 32 * encoder.positions, units)
        if beta > 0:
            self.local_critic = kind(dim, encoder.local_dim, units)
        if gamma > 0:
            self.prior = MLP(dim, [1000, 200, 1])                                 # the adversary D

    def forward(self, x, uniform):
        """x (V N, 3, S, S): V views of each image, N rows apart. uniform (V N, dim): draws from [0, 1]. If V is 2, Y of
        one view meets c of the other. Returns fc (V N, 16 width) and the losses in use: global, local, prior."""
        out, terms = self.encoder.layers(x), []
        ys = [distributed.gather(y) for y in out["Y"].float().chunk(self.views)]
        maps = [distributed.gather(local) for local in out["local"].float().chunk(self.views)][::-1]

        def information(critic, cs):
            return sum(mutual_information(*critic(y, c), self.estimator) for y, c in zip(ys, cs)) / self.views
        if self.alpha > 0:                                                    # one c for the whole map, (N, 1, 32 M M)
            terms.append(-self.alpha * information(self.global_critic, [self.summary(c)[:, None] for c in maps]))
        if self.beta > 0:                                                     # one c for each place, (N, M M, C)
            terms.append(-self.beta * information(self.local_critic, [c.flatten(2).transpose(1, 2) for c in maps]))
        if self.gamma > 0:
            terms.append(self.prior_matching(distributed.gather(uniform), torch.cat(ys).sigmoid()))
        return out["fc"], terms

    def prior_matching(self, real, fake):
        """real: (V N, dim) uniform draws, fake: sigmoid(Y). The adversary D minimises its cross-entropy (chance log 4)
        plus half its squared gradient; the encoder minimises -gamma log D(fake) (chance gamma log 2)."""
        loss = 0.0
        for x, sign in ((real.requires_grad_(), -1.0), (fake.detach().requires_grad_(), 1.0)):
            score = self.prior(x).float()
            slope, = torch.autograd.grad(score.sum(), x, create_graph=True)
            loss = loss + F.softplus(sign * score).mean() + 0.5 * slope.square().sum(dim=1).mean()
        fixed = {name: p.detach() for name, p in self.prior.named_parameters()}                # D does not learn here
        return loss + self.gamma * F.softplus(-torch.func.functional_call(self.prior, fixed, fake).float()).mean()


# ---- AMDIM

TASKS = ("1-5", "1-7", "5-5")  # the first: the global vector of one view predicts the 5 x 5 map of the other


class Residual(nn.Module):
    """A convolution without padding and a 1 x 1 convolution that starts at 0, added to the mean over the same window,
    which is padded with zero channels or cropped."""

    def __init__(self, channels, out, size, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, size, stride, bias=False)
        self.conv2 = nn.Conv2d(out, out, 1, bias=False)
        self.shortcut = nn.Sequential(nn.AvgPool2d(size, stride) if size > 1 else nn.Identity(),
                                      nn.ZeroPad3d((0, 0, 0, 0, 0, out - channels)))
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        return self.shortcut(x) + self.conv2(F.relu(self.conv1(x)))


class MultiscaleEncoder(nn.Module):
    """(N, 3, S, S), S = 32, 64, 128 ..., to (N, dim). `layers` also gives the maps: {7: (N, C, 7, 7), 5: (N, C, 5, 5),
    1: (N, dim)}, C = `channels`, 4 width at 32 pixels, else 8 width.

    There is hardly any padding and most layers are 1 x 1, so that the receptive field is about S / 4 in the 7 x 7 map
    and S / 2 in the 5 x 5 map: predicting a vector that has seen the whole image would teach nothing.
    """

    def __init__(self, image_size, width, dim, depth):
        super().__init__()
        def block(channels, out, size, stride):
            return [Residual(channels, out, size, stride), *(Residual(out, out, 1, 1) for _ in range(depth - 1))]
        stem, channels = [], 3
        for _ in range(int(math.log2(image_size / 64))):                      # down to 64 pixels
            stem += [nn.Conv2d(channels, width, 5, 2, padding=2, padding_mode="reflect"), nn.ReLU(inplace=True)]
            channels = width
        stem += [nn.Conv2d(channels, width, 3), nn.ReLU(inplace=True)]
        c = width if image_size == 32 else 2 * width
        stem += [Residual(width, c, 1, 1)] if image_size == 32 else block(width, c, 4, 2)
        self.channels, self.feature_dim = 4 * c, dim
        self.to_7 = nn.Sequential(*stem, *block(c, 2 * c, 4, 2), *block(2 * c, 4 * c, 2, 2))
        self.to_5 = nn.Sequential(*block(4 * c, 4 * c, 3, 1))
        self.to_1 = nn.Sequential(*block(4 * c, 4 * c, 3, 1), Residual(4 * c, dim, 3, 1), nn.BatchNorm2d(dim),
                                  nn.Flatten())

    def forward(self, x):
        return self.layers(x)[1]

    def layers(self, x):
        map_7 = self.to_7(x.contiguous(memory_format=torch.channels_last))
        map_5 = self.to_5(map_7)
        return {7: map_7, 5: map_5, 1: self.to_1(map_5)}


class AMDIM(nn.Module):
    """The encoder, and embeddings that make its maps comparable across scales. tanh bounds scores (section 3.3)."""

    def __init__(self, encoder, tasks=TASKS, clip=20.0, penalty=0.05):
        super().__init__()
        self.encoder, self.tasks, self.clip, self.penalty = encoder, tasks, clip, penalty
        self.embeddings = nn.ModuleDict({
            scale: Embedding(encoder.channels, encoder.feature_dim, hidden_norm=nn.Identity, norm=nn.BatchNorm1d)
            for scale in ("5", "7") if scale in "".join(tasks)})
        for embedding in self.embeddings.values():
            nn.init.zeros_(embedding.out.weight)                              # as in `Residual`
            embedding.out.bias = None                                         # batch norm follows

    def forward(self, views, position):
        """views (2 N, 3, S, S): two of each image, N rows apart. position (2 N,) in 0..24: which vector of a 5 x 5 map
        predicts. Returns the global vectors (2 N, dim), and the loss and a penalty on large scores."""
        maps = self.encoder.layers(views)
        embedded = {scale: embedding(maps[int(scale)].flatten(2).transpose(1, 2)).float()
                    for scale, embedding in self.embeddings.items()}          # (2 N, scale^2, dim)
        loss, penalty, image = 0.0, 0.0, torch.arange(len(views), device=views.device)
        for source, target in (task.split("-") for task in self.tasks):
            all_a = maps[1].float() if source == "1" else embedded[source][image, position]
            for a, b in zip(all_a.chunk(2), embedded[target].chunk(2)[::-1]):                 # one view, the other
                scores, positives = inner_products(distributed.gather(a), distributed.gather(b))
                loss = loss - mutual_information(self.clip * torch.tanh(scores / self.clip), positives, "infonce") / 2
                penalty = penalty + self.penalty * scores.square().mean() / 2
        return maps[1], [loss, penalty]


def random_views(x, rng, size, count, aspect=None):
    """x uint8 (N, 3, H, W) to (count N, 3, size, size) in [0, 1], H = W = size unless cropped. A single view is the
    image itself. Two share their flip and follow AMDIM's CIFAR recipe (appendix), but with crops instead of shifts from
    64 pixels up, less hue from 128 up. aspect: (N,), width / height of photographs that were resized to squares."""
    if count == 1:
        return x.float() / 255
    n, views, flip = len(x), [], augment.random_horizontal_flip(rng, len(x))
    for _ in range(2):
        if size >= 64:
            steps = augment.random_resized_crop(rng, x.shape, size, (0.3, 1.0), aspect, ratio=(0.7, 1.4))
        else:
            steps = augment.random_shift(rng, n, reach=size // 8, p=0.8)
        steps += augment.random_color_jitter(rng, n, 0.4, 0.4, 0.4, 0.2 if size < 128 else 0.1, p=0.8)
        views.append(augment.apply(x, flip + steps + augment.random_grayscale(rng, n, p=0.25)))
    return torch.cat(views)


def build_encoder(args):
    """The untrained encoder: RGB (N, 3, S, S) in [0, 1] to features (N, D). args: the settings of a run."""
    if args.objective == "multiscale":
        return MultiscaleEncoder(args.image_size, args.width, args.units, args.depth)
    return Encoder(args.arch, args.width, args.image_size)


# ---- arguments

DEFAULTS = [  # of runs with these settings, where they differ from the flags' defaults below
    (dict(dataset="shapes"), dict(views=2, estimator="infonce", width=16, units=128, epochs=25, lr=1e-3)),
    (dict(dataset="stl10"), dict(image_size=64)),
    (dict(dataset="folder"), dict(image_size=128, arch="resnet18")),
    (dict(objective="global"), dict(alpha=1.0, beta=0.0, gamma=1.0)),
    (dict(objective="both"), dict(alpha=0.5, beta=1.0)),
    (dict(critic="concat"), dict(units=512)),
    (dict(small=True), dict(image_size=32, arch="conv", width=32, units=512, estimator="infonce", epochs=20, lr=5e-4)),
    (dict(objective="multiscale"), dict(views=2, estimator="infonce", arch="conv", width=128, units=1024,
                                        batch_size=200, lr=2e-4, weight_decay=1e-5, epochs=300)),
    (dict(dataset="shapes", objective="multiscale"), dict(width=16, units=128, epochs=20, batch_size=64, lr=1e-3)),
    (dict(small=True, objective="multiscale"), dict(width=16, units=256, depth=1, epochs=5, batch_size=128, lr=1e-3)),
]


def arguments(argv):
    parser = cli.RunParser(__file__, "DIM and AMDIM", epochs=200, batch_size=64)
    add, number = parser.add_argument, parser.number
    add("--objective", choices=("local", "global", "both", "multiscale"), default="local",
        help="DIM: mutual information of Y with each place, with the whole map, or both; multiscale: AMDIM")
    add("--estimator", choices=("jsd", "infonce", "dv"), default="jsd", help="of DIM; AMDIM always uses infonce")
    add("--critic", choices=("dot", "concat"), default="dot", help="T of DIM: encode-and-dot or concat-and-convolve")
    add("--views", type=int, choices=(1, 2), default=1, help="1: the image itself; 2: Y of one view, c of the other")
    number("--alpha", 0.0, "[0, inf)", "weight of the global objective")
    number("--beta", 1.0, "[0, inf)", "weight of the local objective")
    number("--gamma", 0.1, "[0, inf)", "weight of the adversary that makes Y uniform")
    add("--arch", choices=("conv", "resnet18", "resnet34", "resnet50"), default="conv", help="DIM's encoder")
    number("--width", 64, "[1, inf)", "channels of the encoder's first layer (AMDIM: 128)")
    number("--depth", 3, "[1, 1000]", "residual layers in each block of AMDIM (ImageNet: 10)")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="of AMDIM: which scale predicts which")
    number("--units", 2048, "[1, inf)", "width of T's hidden layers (concat: 512) or of AMDIM's vectors (1024)")
    number("--warmup", 0.05, "[0, 1]", "share of the epochs in which the learning rate rises")
    number("--lr", 1e-4, "(0, inf)", "peak learning rate of Adam")
    number("--weight-decay", 0.0, "[0, inf)", "on all weights")
    args = parser.parse(argv, DEFAULTS)
    unused = {"multiscale": ("views", "estimator", "critic", "alpha", "beta", "gamma", "arch"),
              "local": ("depth", "tasks", "alpha"), "global": ("depth", "tasks", "beta"), "both": ("depth", "tasks")}
    parser.refuse_unused(args, unused[args.objective], f"with --objective {args.objective}")
    if args.objective == "multiscale":
        if args.image_size < 32 or args.image_size.bit_count() > 1:
            raise Refusal(f"--objective multiscale takes an --image-size of 32, 64, 128 ..., not {args.image_size}")
        if set(args.tasks) == {"5-5"}:
            raise Refusal("--tasks 5-5 leaves the global vector, which is kept, untrained: add 1-5 or 1-7")
    elif args.alpha == args.beta == 0:
        raise Refusal("--alpha 0 with --beta 0 leaves no objective: give one of them a weight")
    return args


# ---- training


def main(argv=None):
    """Trains, evaluates and writes the run's folder. Returns the final metrics (result.json)."""
    args = arguments(argv)
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    rank, world = distributed.start(device)
    run = Run(__file__, vars(args), device, rank, precision=amp or torch.float32, processes=world)
    images, batches = run.data(store_size=2 * args.image_size if args.views == 2 and args.image_size >= 64 else None)

    torch.manual_seed(args.seed)
    encoder, rng = build_encoder(args), augment.Random(args.seed, rank, world)
    encoders = {"trained": encoder}                                           # fc, or AMDIM's global vector
    if args.objective == "multiscale":
        model, betas, notes = AMDIM(encoder, args.tasks), (0.8, 0.999), {"loss": "chance 0.000", "penalty": ""}
        draw = lambda n: (25 * rng.uniform(n)).long()                         # which place of the 5 x 5 predicts
    else:
        model = DIM(encoder, args.views, args.alpha, args.beta, args.gamma, args.estimator, args.critic, args.units)
        betas = (0.9, 0.999)
        draw = lambda n: rng.uniform(n, 64)                                   # the adversary's real examples
        level = math.log(4) if args.estimator == "jsd" else 0.0
        losses = [("global", args.alpha, args.alpha * level), ("local", args.beta, args.beta * level),
                  ("prior", args.gamma, math.log(4) + args.gamma * math.log(2))]
        notes = {name: f"chance {chance:.3f}" for name, weight, chance in losses if weight > 0}
        encoders["trained conv"] = nn.Sequential(encoder.lower, encoder.upper, nn.Flatten())
        encoders["trained Y"] = nn.Sequential(encoder, encoder.y)
    model = model.to(device, memory_format=torch.channels_last)
    net = run.wrap(model)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, betas, weight_decay=args.weight_decay)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)  # else small gradients are 0 in fp16
    progress = run.progress(args.epochs, len(batches), args.batch_size, notes)
    run.track(model=model, optimizer=optimizer, scaler=scaler, rng=rng)
    run.watch(autocast, encoders)
    first_epoch, first_step = run.restore()                                   # (0, 0) unless --resume
    net.train()
    with run:
        for epoch in range(first_epoch, args.epochs):
            for step, index, x in batches.epoch(epoch, first_step):
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * cosine(epoch * len(batches) + step, args.epochs * len(batches), args.warmup)
                views = random_views(x, rng, args.image_size, args.views, images.train.aspect[index])  # (V N, 3, S, S)
                draws = torch.cat([draw(len(x)) for _ in range(args.views)])
                with autocast:
                    h, terms = net(views, augment.send(draws, device))
                optimizer.zero_grad()
                scaler.scale(sum(terms)).backward()
                scaler.step(optimizer)                                        # skipped where a gradient overflowed
                scaler.update()
                progress.update(epoch, step, h, **dict(zip(notes, terms)))    # saves and ends here after Ctrl-C
            progress.end_epoch(epoch, lr=optimizer.param_groups[0]["lr"])
            first_step = 0

    index, rng = images.train.random_indices(32), augment.Random(args.seed)
    views = random_views(images.train.at(index), rng, args.image_size, args.views, images.train.aspect[index])
    run.picture("views.png", *views.chunk(args.views))
    return run.finish(("linear", "knn", "mlp"))


if __name__ == "__main__":
    cli.program(main)
