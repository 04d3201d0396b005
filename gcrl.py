# SPDX-License-Identifier: MIT
"""GCRL: Hybrid Generative-Contrastive Representation Learning (Kim et al. 2021, 2106.06162).

One axial transformer learns from two losses. An image is a sequence of D = H W tokens, indices into a colour palette,
in raster order. Its feature is the encoder's output averaged over the positions. For each of N images, x1 is a weakly
and x2 a strongly augmented view, and z1 and z2 are their normalised projections:

    L   = alpha L_g + beta L_c
    L_g = -1/N  sum_i sum_{k=2..D} log p(x1[i,k] | x1[i,<k])
    L_c = -1/2N sum_i ( log e^(z1_i.z2_i/tau) / (sum_{j!=i} e^(z1_i.z1_j/tau) + sum_j e^(z1_i.z2_j/tau))
                      + log e^(z2_i.z1_i/tau) / (sum_{j!=i} e^(z2_i.z2_j/tau) + sum_j e^(z2_i.z1_j/tau)) )

    python gcrl.py                                          # generated shapes, two to four minutes on two cores
    python gcrl.py --dataset cifar10 --alpha 1 --beta 1     # hybrid; --beta 0: generative; --alpha 0: contrastive
    python gcrl.py --sample RUN --temperature 0.9           # samples images from a saved run

Differences from the paper: --alpha weights L_g / (D - 1), the mean over the predicted tokens, so --alpha D-1 gives the
equation above. Network, tau, weak view, optimiser, schedule and 32 x 32 tokens are our choices.

Measured, linear / kNN: `shapes`, three seeds, 48.5 / 24.0 (untrained 31.8 / 12.5); CIFAR-10 (JPEG), --small, 51.9 /
47.3 (36.6 / 31.2), 1.852 nats a token; alpha 8 53.3 / 47.2, 1.820; alpha 0 50.5 / 45.8; beta 0 50.3 / 40.0, 1.797.
"""
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common import Refusal, augment, cli, distributed
from common.linear_probe import counted
from common.run import Run, cosine
from common.transformer import Block, Recompute, init_weights, split_batch

# ---- tokens: pixels as indices of a palette of colours (iGPT, Chen et al. 2020)


def fit_palette(images, num_colours, seed=0, pixels=2**16, iterations=40):
    """The palette (V, 3), floats in [0, 1], by k-means (Lloyd's algorithm from a k-means++ start) on random pixels of
    images (N, 3, H, W), uint8 or floats in [0, 1]. V is num_colours, or as many as the pixels have."""
    generator = torch.Generator().manual_seed(seed)
    x = (images / 255 if images.dtype == torch.uint8 else images).permute(0, 2, 3, 1).reshape(-1, 3)
    x = x[torch.randperm(len(x), generator=generator)[:pixels]]
    num_colours = min(num_colours, len(x.unique(dim=0)))
    palette, distance, channels = x[:1].repeat(num_colours, 1), torch.full((len(x),), math.inf), x.T.contiguous()
    for i in range(1, num_colours):                                           # far colours are more likely
        distance = torch.minimum(distance, (channels - palette[i - 1, :, None]).square().sum(dim=0))
        total = distance.cumsum(dim=0)
        drawn = torch.searchsorted(total, total[-1] * torch.rand(1, generator=generator))
        palette[i] = x[drawn.clamp(max=len(x) - 1)]
    for _ in range(iterations):
        token = quantise(x.T[None, :, :, None], palette).flatten()            # as an image of M pixels
        count = torch.bincount(token, minlength=num_colours)[:, None]
        mean = torch.zeros_like(palette).index_add_(0, token, x) / count
        palette = torch.where(count > 0, mean, palette)                       # empty clusters stay put
    return palette


def quantise(x, palette):
    """Images (N, 3, H, W), uint8 or floats in [0, 1], to tokens (N, H, W), the nearest colours of a palette (V, 3)."""
    pixels = (x / 255 if x.dtype == torch.uint8 else x).permute(0, 2, 3, 1)   # (N, H, W, 3)
    half = palette.square().sum(dim=1) / 2                                    # |x - p|^2 / 2 = half - x.p + ...
    part = 2 ** (21 if x.device.type == "cpu" else 27) // len(palette)        # pixels at once, to save memory
    with torch.autocast(x.device.type, enabled=False):                        # not bf16; argmin is slower than min
        tokens = [torch.addmm(half, p, palette.T, alpha=-1).min(1).indices for p in pixels.reshape(-1, 3).split(part)]
    return torch.cat(tokens).view(pixels.shape[:3])


def dequantise(tokens, palette):
    """Tokens (N, H, W) to floats (N, 3, H, W) in [0, 1]."""
    return palette[tokens].permute(0, 3, 1, 2)


# ---- augmentation


def weak_view(x, rng, shift):
    """Random flip, and shift by up to the share `shift` of the side: x uint8 (N, 3, S, S) to floats in [0, 1]."""
    flip = augment.random_horizontal_flip(rng, len(x))
    return augment.apply(x, flip + augment.random_shift(rng, len(x), reach=int(shift * x.shape[-1])))


def strong_view(x, rng, crop_min, jitter):
    """SimCLR's view (appendix A): crop, flip, colour distortion of strength `jitter`, greyscale."""
    steps = augment.random_resized_crop(rng, x.shape, x.shape[-1], scale=(crop_min, 1.0))
    steps += augment.random_horizontal_flip(rng, len(x))
    steps += augment.random_color_jitter(rng, len(x), 0.8 * jitter, 0.8 * jitter, 0.8 * jitter, 0.2 * jitter, p=0.8)
    return augment.apply(x, steps + augment.random_grayscale(rng, len(x), p=0.2))


# ---- model


class GCRL(nn.Module):
    """Axial-transformer encoder and autoregressive decoder of token grids (N, H, W) int64, H = W = image_size.

    An encoder layer is row attention followed by column attention that sees its own row and those above, so the output
    at row r depends on the rows up to r only. Shifted down by one row, it is the context of the decoder, whose masked
    row attention adds the tokens to the left, shifted right by one place.
    """

    def __init__(self, num_colours, image_size, width=256, encoder_layers=4, decoder_layers=4, heads=8, z_dim=128,
                 init_std=0.02):
        super().__init__()
        self.embedding = nn.Embedding(num_colours, width)
        self.row_position = nn.Parameter(0.02 * torch.randn(image_size, 1, width))
        self.column_position = nn.Parameter(0.02 * torch.randn(1, image_size, width))
        self.encoder = nn.Sequential(*(Block(width, heads, axis, causal=axis == "column")
                                       for _ in range(encoder_layers) for axis in ("row", "column")))
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.Sequential(*(Block(width, heads, "row", causal=True) for _ in range(decoder_layers)))
        self.decoder_norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, num_colours)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, z_dim))
        self.register_buffer("palette", torch.zeros(num_colours, 3))          # what the tokens stand for
        self.register_buffer("first_pixel", torch.ones(num_colours))          # weights of x_1, not in L_g
        init_weights(self, depth=2 * encoder_layers + decoder_layers, std=init_std)

    @torch.no_grad()
    def set_palette(self, palette, first_pixel):
        """Sets the tokens' colours (V, 3), and first_pixel (V,), how often each is the first pixel of an image. Adds a
        random linear map of the colours to the embeddings, so that similar colours start with similar embeddings."""
        self.palette.copy_(palette)
        self.first_pixel.copy_(first_pixel)
        colour = (palette - palette.mean(dim=0)) / palette.std(dim=0, correction=0).clamp(min=1e-6)
        self.embedding.weight += 0.1 * colour @ torch.randn(3, self.embedding.embedding_dim).to(colour)

    def tokens(self, x):
        return quantise(x, self.palette)                                      # (N, 3, H, W) to (N, H, W)

    def images(self, tokens):
        return dequantise(tokens, self.palette)                               # and back, in [0, 1]

    def encode_grid(self, tokens):
        x = self.embedding(tokens) + self.row_position + self.column_position                 # (N, H, W, C)
        return self.encoder_norm(self.encoder(x))

    def encode(self, tokens):
        """The feature of each image: (N, H, W) tokens to (N, width), the mean over all positions."""
        return self.encode_grid(tokens).mean(dim=(1, 2))

    def decode(self, grid, tokens):
        above = F.pad(grid, (0, 0, 0, 0, 1, 0))[:, :-1]                       # row r gets the encoder's row r - 1
        left = F.pad(self.embedding(tokens), (0, 0, 1, 0))[:, :, :-1]         # place w gets the token at w - 1
        x = above + left + self.row_position + self.column_position           # (N, H, W, C)
        return self.to_logits(self.decoder_norm(self.decoder(x)))

    def logits(self, tokens):
        """(N, H, W, V): the logits at k predict x_k from x_<k."""
        return self.decode(self.encode_grid(tokens), tokens)

    def log_prob(self, tokens, grid=None):
        """sum_{k=2..D} log p(x_k | x_<k) of each image, in float32 nats: (N,). grid: of `encode_grid`, if at hand."""
        logits = self.logits(tokens) if grid is None else self.decode(grid, tokens)           # (N, H, W, V)
        nats = F.cross_entropy(logits.float().flatten(0, 2), tokens.flatten(), reduction="none").view(len(tokens), -1)
        return -nats[:, 1:].sum(dim=1)

    def forward(self, x1, x2, generate, contrast, micro_batch=None, recompute=False):
        """What a training step needs: log p(x1) (N,) or None, z1 and z2 (N, z_dim) or None, and the features.

        micro_batch: images at once, a part (None: all). recompute: compute a part's activations again in the backward
        pass, for the memory of one; NT-Xent compares all N (gradient caching, Gao et al. 2021, 2101.06983).
        """
        n, learnt = micro_batch or len(x1), [p for p in self.parameters() if p.requires_grad]
        parts = [(*x, generate, contrast) for x in zip(x1.split(n), (x2 if contrast else x1).split(n))]
        outputs = [Recompute.apply(self.outputs, part, *learnt) if recompute else self.outputs(*part) for part in parts]
        return tuple(None if values[0] is None else torch.cat(values) for values in zip(*outputs))

    def outputs(self, x1, x2, generate, contrast):
        """`forward` for all images at once, with a single pass of the encoder for both views."""
        grid = self.encode_grid(torch.cat([x1, x2]) if contrast else x1)
        log_p = self.log_prob(x1, grid[: len(x1)]) if generate else None
        h = grid.mean(dim=(1, 2))                                             # (2N, C), or (N, C) without contrast
        z1, z2 = self.head(h).float().chunk(2) if contrast else (None, None)  # (N, z_dim)
        return log_p, z1, z2, h

    @torch.no_grad()
    def sample(self, n, temperature=1.0, top_k=None, given=None, rows=0, generator=None):
        """Samples n token grids (n, H, W), pixel by pixel.

        Except for the first pixel, temperature > 0 divides the logits, and only the top_k likeliest colours are drawn.
        given: (n, H, W) tokens, whose first `rows` rows are kept. generator: on the model's device. Keys and values are
        cached, so that a pixel takes one position of the decoder, and a row one row of the encoder.
        """
        position = self.row_position + self.column_position                   # (H, W, C)
        height, width, channels = position.shape
        tokens = torch.zeros(n, height, width, dtype=torch.int64, device=position.device)
        tokens[:, :rows] = given[:, :rows] if rows > 0 else 0
        columns = [block.new_cache(n * width, height) if block.axis == "column" else None for block in self.encoder]
        rowwise = [block.new_cache(n, width) for block in self.decoder]
        above = position.new_zeros(n, width, channels)                        # the encoder's output on the row before
        for r in range(height):
            for w in range(width if r >= rows else 0):
                x = above[:, w] + position[r, w] + (self.embedding(tokens[:, r, w - 1]) if w > 0 else 0)
                for block, cache in zip(self.decoder, rowwise):
                    x = block.step(x, cache, w)
                logits = self.to_logits(self.decoder_norm(x)).float() / temperature           # (n, V)
                if r == 0 and w == 0:
                    logits = self.first_pixel.log().expand(n, -1)
                elif top_k is not None and top_k < logits.shape[1]:
                    logits = logits.masked_fill(logits < logits.topk(top_k, dim=1).values[:, -1:], -math.inf)
                tokens[:, r, w] = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
            x = self.embedding(tokens[:, r]) + position[r]                    # (n, W, C)
            for block, cache in zip(self.encoder, columns):
                x = (block(x[:, None])[:, 0] if cache is None else            # attends within the row
                     block.step(x.flatten(0, 1), cache, r).unflatten(0, (n, width)))
            above = self.encoder_norm(x)
        return tokens


class Encoder(GCRL):
    """GCRL without its decoder and head: RGB (N, 3, S, S) in [0, 1] to features (N, width)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.decoder, self.decoder_norm, self.to_logits, self.head

    def forward(self, x):
        return torch.cat([self.encode(self.tokens(part)) for part in x.split(64)])            # saves memory

    def keep_data(self, state):                                               # what is data, not learnt
        self.set_palette(state["palette"], state["first_pixel"])

    def stages(self):
        blocks = [list(pair) for pair in zip(self.encoder[::2], self.encoder[1::2])]
        blocks[-1].append(self.encoder_norm)
        return [[self.embedding, self.row_position, self.column_position], *blocks]


def build_encoder(args, kind=Encoder):
    """The untrained encoder: RGB (N, 3, S, S) in [0, 1] to features (N, D). args: the settings of a run."""
    return kind(args.colours, args.image_size, args.width, args.encoder_layers, args.decoder_layers, args.heads,
                init_std=args.init_std)


def build_generator(args):
    """The whole untrained model. Raises Refusal if a run with the settings args does not train the decoder."""
    if args.alpha == 0:
        raise Refusal("that run has --alpha 0, so its decoder is not trained")
    return build_encoder(args, GCRL)


# ---- loss


def nt_xent(z1, z2, tau):
    """L_c of the projections z1, z2 (N, z_dim) of two views, normalised here: a scalar. Chance level: log(2N - 1)."""
    n, z = len(z1), F.normalize(torch.cat([z1, z2]).float(), dim=1)           # (2N, z_dim)
    logits = (z @ z.T / tau).masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -math.inf)      # j != i
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


# ---- arguments

DEFAULTS = [  # of runs with these settings, where they differ from the flags' defaults below
    (dict(dataset="shapes"), dict(image_size=12, colours=8, width=48, encoder_layers=1, decoder_layers=3, heads=4,
                                  init_std=0.07, shift=0, crop_min=0.6, jitter=0.3, epochs=14, batch_size=32, lr=3e-3)),
    (dict(dataset="fashionmnist"), dict(image_size=28)),
    (dict(small=True), dict(image_size=16, colours=64, width=96, encoder_layers=2, decoder_layers=2, heads=6,
                            crop_min=0.3, epochs=5, batch_size=128, lr=2e-3)),
]


def arguments(argv):
    parser = cli.RunParser(__file__, "GCRL", epochs=100, batch_size=256)
    add, number = parser.add_argument, parser.number
    number("--alpha", 1.0, "[0, inf)", "weight of the generative loss, nats per predicted token")
    number("--beta", 1.0, "[0, inf)", "weight of the contrastive loss, nats")
    number("--colours", 512, "[2, 4096]", "colours in the palette")
    number("--width", 256, "[1, inf)", "channels of the transformer")
    number("--encoder-layers", 4, "[1, 1000]", "pairs of row and column attention")
    number("--decoder-layers", 4, "[1, 1000]", "blocks of masked row attention")
    number("--heads", 8, "[1, inf)", "attention heads, a divisor of the width")
    number("--init-std", 0.02, "(0, 1]", "standard deviation of the initial weights: narrow networks need more")
    number("--shift", 0.125, "[0, 0.5]", "weak view: largest shift, as a share of the side")
    number("--crop-min", 0.08, "(0, 1]", "strong view: smallest share of the area that a crop keeps")
    number("--jitter", 0.5, "[0, inf)", "strong view: strength s of the colour distortion")
    number("--warmup", 0.05, "[0, 1]", "share of the epochs in which the learning rate rises")
    number("--micro-batch", None, "[1, inf)", "images at once; if fewer than the batch, backward computes their "
        "activations again, for the same gradients in less memory (default: few on a CPU, half of a GPU)", kind=int)
    number("--lr", 1e-3, "(0, inf)", "peak learning rate of AdamW")
    number("--weight-decay", 0.01, "[0, inf)", "on all weights except biases and norms")
    number("--tau", 0.2, "(0, inf)", "temperature of the contrastive loss")
    add("--sample", metavar="RUN", help="sample images from this run instead of training: see --sample RUN --help")
    args = parser.parse(argv, DEFAULTS, free=("micro_batch",))
    del args.sample                                                           # handled by `main`
    if args.alpha == args.beta == 0:
        raise Refusal("--alpha 0 --beta 0 leaves nothing to learn: give one of them a weight")
    parser.refuse_unused(args, ("tau", "crop_min", "jitter") if args.beta == 0 else (), "with --beta 0")
    if args.width % args.heads:
        raise Refusal(f"--heads {args.heads} does not divide --width {args.width}: change one of them")
    return args


# ---- training


def main(argv=None):
    """Trains, evaluates and writes the run's folder. Returns the final metrics (result.json)."""
    argv = sys.argv[1:] if argv is None else [str(a) for a in argv]
    if any(word.split("=")[0] == "--sample" for word in argv):
        from common.evaluation import generation                              # not needed to train
        return generation.main(argv, __file__)
    args = arguments(argv)
    generate, contrast, device = args.alpha > 0, args.beta > 0, cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    rank, world = distributed.start(device)
    pixels, share = args.image_size**2, math.ceil(args.batch_size / world)    # share: the images of this process
    image_bytes = 50 * args.width * pixels * (4 * args.encoder_layers + args.decoder_layers)  # activations, about
    part, recompute = split_batch(args.micro_batch, share, image_bytes, pixels * max(8 * args.width, args.colours),
                                  args.image_size, device)
    run = Run(__file__, vars(args), device, rank, precision=amp or torch.float32, processes=world, micro_batch=part,
              recompute=recompute)
    images, batches = run.data()
    x = images.train.at(images.train.random_indices(2000))                    # (2000, 3, S, S) uint8
    palette = fit_palette(x, args.colours, args.seed)
    if len(palette) == 1:
        raise Refusal("the images have one colour: there is nothing to learn")
    args.colours = len(palette)                                               # fewer if the images have fewer
    first_pixels = torch.bincount(quantise(x[:, :, :1, :1], palette).flatten(), minlength=len(palette))
    palette_error = 255 * F.mse_loss(dequantise(quantise(x[:200], palette), palette), x[:200] / 255).sqrt().item()
    run.ready("palette", f"{len(palette)} colours, off by {palette_error:.1f} of 255 (RMS)")
    torch.manual_seed(args.seed)
    model = build_encoder(args, GCRL)
    model.set_palette(palette, first_pixels)
    model, encoder = model.to(device), build_encoder(args)
    encoder.load_state_dict(model.state_dict(), strict=False, assign=True)    # shares the model's tensors
    for layer in (model.decoder, model.decoder_norm, model.to_logits):
        layer.requires_grad_(generate)                                        # no loss depends on it if not
    model.head.requires_grad_(contrast)
    net = run.wrap(model, method="outputs")                                   # compiling all parts takes minutes
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1]},
              {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)  # else small gradients are 0 in fp16
    rng, predicted = augment.Random(args.seed, rank, world), pixels - 1       # tokens that L_g scores
    notes = {"nats": f"a token; uniform {math.log(len(palette)):.3f}"} if generate else {}
    notes |= {"contrastive": f"chance {math.log(2 * args.batch_size - 1):.3f}"} if contrast else {}
    progress = run.progress(args.epochs, len(batches), args.batch_size, notes)
    run.track(model=model, optimizer=optimizer, scaler=scaler, rng=rng)
    run.watch(autocast, {"trained": encoder})
    first_epoch, first_step = run.restore()                                   # (0, 0) unless --resume
    with run:
        for epoch in range(first_epoch, args.epochs):
            for step, _, x in batches.epoch(epoch, first_step):
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * cosine(epoch * len(batches) + step, args.epochs * len(batches), args.warmup)
                x1 = model.tokens(weak_view(x, rng, args.shift))              # (N, H, W)
                x2 = model.tokens(strong_view(x, rng, args.crop_min, args.jitter)) if contrast else None
                with autocast:
                    log_p, z1, z2, h = net(x1, x2, generate, contrast, part, recompute)
                losses = {}                                                   # over the batch of all processes
                if generate:
                    losses["nats"] = -distributed.gather(log_p).mean() / predicted            # L_g / (D - 1)
                if contrast:
                    losses["contrastive"] = nt_xent(distributed.gather(z1), distributed.gather(z2), args.tau)
                loss = args.alpha * losses.get("nats", 0.0) + args.beta * losses.get("contrastive", 0.0)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)                                        # skipped where a gradient overflowed
                scaler.update()
                progress.update(epoch, step, h, **losses)                     # saves and ends here after Ctrl-C
            progress.end_epoch(epoch, lr=optimizer.param_groups[0]["lr"])
            first_step = 0

    rng, held, result = augment.Random(args.seed), images.test or images.train, {"palette_error": palette_error}
    x = images.train.at(images.train.random_indices(32)).to(device)
    views = weak_view(x, rng, args.shift), strong_view(x, rng, args.crop_min, args.jitter)
    run.picture("views.png", *(model.images(model.tokens(view)) for view in views))
    if generate and rank == 0:
        with torch.no_grad(), autocast:
            parts = torch.arange(len(held)).split(64)
            batches = counted(held.batches(parts), len(parts), "batches of 64 likelihoods")
            log_p = torch.cat([model.log_prob(model.tokens(x)) for x in batches])
        result |= {"nats": (nats := -log_p.mean().item() / predicted), "bits": nats / math.log(2)}
        run.say(f"\n{'test' if images.test else 'training'} images: {nats:.3f} nats, {result['bits']:.3f} bits per "
                f"predicted token, not per dimension of RGB (uniform {math.log(len(palette)):.3f} nats)")
        generator = torch.Generator(device).manual_seed(args.seed)
        run.picture("samples.png", model.images(model.sample(64, generator=generator)))
        given = model.tokens(held.at(held.random_indices(32)).to(device))
        completed = model.sample(len(given), given=given, rows=args.image_size // 2, generator=generator)
        run.picture("completions.png", model.images(given), model.images(completed))
    return run.finish(**result)


if __name__ == "__main__":
    cli.program(main, memory="--micro-batch, --width, --image-size or --cache-gb")
