"""GCRL: Generative-Contrastive Representation Learning (2106.06162), an axial transformer trained on two losses.

An image is D = H W tokens of a colour palette, in raster order. x1 is a weakly, x2 a strongly augmented view of each
of N images, z1 and z2 their normalised projections:

    L   = alpha L_g + beta L_c
    L_g = -1/N  sum_i sum_{k=2..D} log p(x1[i,k] | x1[i,<k])
    L_c = -1/2N sum_i ( log e^(z1_i.z2_i/tau) / (sum_{j!=i} e^(z1_i.z1_j/tau) + sum_j e^(z1_i.z2_j/tau))
                      + log e^(z2_i.z1_i/tau) / (sum_{j!=i} e^(z2_i.z2_j/tau) + sum_j e^(z2_i.z1_j/tau)) )

The encoder's output, averaged over the positions, is the feature; the same output, one row further up, is what the
decoder predicts the tokens from. --alpha weighs L_g per predicted token, L_g / (D - 1), so that both losses are a few
nats: --alpha D-1 is the equation to the letter. Widths, depths, temperature and schedule are our choices, too.

    python gcrl.py                                          # embedded data, two minutes on two cores
    python gcrl.py --dataset cifar10 --alpha 1 --beta 1     # hybrid; --beta 0: generative; --alpha 0: contrastive
    python gcrl.py --sample RUN --temperature 0.9           # draws from a saved run
"""
import argparse
import io
import itertools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import augment, cli, distributed, encoders, frechet, linear_probe, pictures
from common.data import NAMES, Decoder, Images, ToPixels, epoch_order, load, steps_per_epoch
from common.run import Progress, Run, cosine, parse, set_rate, spread, write_file
from common.transformer import Block, init_weights

# ---- palette: pixels as tokens (iGPT, Chen et al. 2020)


def nearest(pixels, palette):
    """(M, 3) colours to the (M,) indices of the nearest of the palette's (V, 3), by Euclidean distance."""
    half = palette.square().sum(dim=1) / 2                                    # |x - p|^2 / 2 = half - x.p + ...
    with torch.autocast(pixels.device.type, enabled=False):                   # bf16 would take other colours
        return torch.cat([torch.addmm(half, x, palette.T, alpha=-1).argmin(dim=1) for x in pixels.split(2**16)])


def fit_palette(images, num_colours, seed=0, pixels=2**16, iterations=30):
    """k-means (Lloyd's, k-means++ start) of the images' RGB values: (V, 3) floats in [0, 1].

    images: (N, 3, H, W) uint8, or floats in [0, 1]; `pixels` of theirs are drawn. V is less where those have less.
    """
    generator = torch.Generator().manual_seed(seed)
    x = (images / 255 if images.dtype == torch.uint8 else images).permute(0, 2, 3, 1).reshape(-1, 3)
    x = x[torch.randperm(len(x), generator=generator)[:pixels]]
    num_colours = min(num_colours, len(x.unique(dim=0)))
    palette = x[:1]
    distance = torch.full((len(x),), math.inf)
    while len(palette) < num_colours:                                         # far colours are likelier to be drawn
        distance = torch.minimum(distance, (x - palette[-1]).square().sum(dim=1))
        palette = torch.cat([palette, x[torch.multinomial(distance, 1, generator=generator)]])
    for _ in range(iterations):
        token = nearest(x, palette)
        count = torch.bincount(token, minlength=num_colours)[:, None]
        mean = torch.zeros_like(palette).index_add_(0, token, x) / count
        palette = torch.where(count > 0, mean, palette)                       # an empty cluster stays
    return palette


def quantise(x, palette):
    """Images (N, 3, H, W), uint8 or floats in [0, 1], to tokens (N, H, W), indices into the palette (V, 3)."""
    pixels = (x / 255 if x.dtype == torch.uint8 else x).permute(0, 2, 3, 1)   # (N, H, W, 3)
    return nearest(pixels.reshape(-1, 3), palette).view(pixels.shape[:3])


def dequantise(tokens, palette):
    """Tokens (N, H, W) to floats (N, 3, H, W) in [0, 1]."""
    return palette[tokens].permute(0, 3, 1, 2)


# ---- augmentation


def weak_view(x, rng):
    """A flip and a shift of up to an eighth of the side: x uint8 (N, 3, S, S) to floats in [0, 1]."""
    n, most = len(x), x.shape[-1] // 8
    x = augment.horizontal_flip(x.float() / 255, rng.uniform(n) < 0.5)
    down, right = rng.uniform(n, 2, low=-most, high=most + 1).floor().unbind(1)
    return augment.shift(x, down, right)


def strong_view(x, rng, crop_min, jitter):
    """SimCLR's view (appendix A): crop, flip, colour distortion of strength `jitter`, greyscale."""
    n, size, s = len(x), x.shape[-1], jitter
    x = augment.resized_crop(x.float() / 255, *augment.crop_boxes(rng, n, size, size, scale=(crop_min, 1.0)), size)
    x = augment.horizontal_flip(x, rng.uniform(n) < 0.5)
    factors, order = augment.jitter_parameters(rng, n, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    x = augment.apply_where(rng.uniform(n) < 0.8, augment.color_jitter, x, factors, order)
    return augment.apply_where(rng.uniform(n) < 0.2, augment.grayscale, x)


# ---- model


class GCRL(nn.Module):
    """Axial-transformer encoder and autoregressive decoder over token grids (N, H, W) int64, H = W = image_size.

    Encoder layer: a block of row attention, then one of column attention that sees the rows above and its own. So its
    output at row r depends on all of the rows up to r and on no later one; shifted down one row it is a context for the
    decoder, whose blocks of masked row attention add the tokens to the left, shifted right one place.
    """

    def __init__(self, num_colours, image_size, width=256, encoder_layers=4, decoder_layers=4, heads=8, z_dim=128):
        super().__init__()
        self.embedding = nn.Embedding(num_colours, width)
        self.row_position = nn.Parameter(0.02 * torch.randn(image_size, 1, width))
        self.column_position = nn.Parameter(0.02 * torch.randn(1, image_size, width))
        self.encoder = nn.ModuleList(Block(width, heads, axis, causal=axis == "column")
                                     for _ in range(encoder_layers) for axis in ("row", "column"))
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(Block(width, heads, "row", causal=True) for _ in range(decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, num_colours)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, z_dim))
        self.register_buffer("palette", torch.zeros(num_colours, 3))          # what the tokens stand for
        self.register_buffer("first_pixel", torch.ones(num_colours))          # weights of x_1, which L_g leaves out
        init_weights(self, depth=2 * encoder_layers + decoder_layers)

    def encode_grid(self, tokens):
        x = self.embedding(tokens) + self.row_position + self.column_position                # (N, H, W, C)
        for block in self.encoder:
            x = block(x)
        return self.encoder_norm(x)

    def encode(self, tokens):
        """The feature of each image: (N, H, W) tokens to (N, width), the mean over all positions."""
        return self.encode_grid(tokens).mean(dim=(1, 2))

    def decode(self, grid, tokens):
        """The encoder's output (N, H, W, C) and the tokens to logits (N, H, W, V)."""
        above = F.pad(grid, (0, 0, 0, 0, 1, 0))[:, :-1]                       # row r holds the encoder's row r - 1
        left = F.pad(self.embedding(tokens), (0, 0, 1, 0))[:, :, :-1]         # place w holds the token at w - 1
        x = above + left + self.row_position + self.column_position
        for block in self.decoder:
            x = block(x)
        return self.to_logits(self.decoder_norm(x))

    def logits(self, tokens):
        """(N, H, W, V): the logits at k predict x_k from x_<k."""
        return self.decode(self.encode_grid(tokens), tokens)

    def log_prob(self, tokens):
        """sum_{k=2..D} log p(x_k | x_<k) of each image, in nats: (N,)."""
        return log_likelihood(self.logits(tokens), tokens)

    def forward(self, x1, x2, generate, contrast):
        """What a training step needs, the encoder run once: log p(x1) (N,) or None, z1 and z2 or None, features."""
        grid = self.encode_grid(torch.cat([x1, x2]) if contrast else x1)
        log_p = log_likelihood(self.decode(grid[: len(x1)], x1), x1) if generate else None
        h = grid.mean(dim=(1, 2))                                             # (2N, C), or (N, C) without contrast
        z1, z2 = self.head(h).float().chunk(2) if contrast else (None, None)  # (N, z_dim)
        return log_p, z1, z2, h

    @torch.no_grad()
    def sample(self, n, temperature=1.0, top_k=None, given=None, rows=0, generator=None):
        """Draws n token grids (n, H, W), pixel by pixel.

        temperature > 0 divides the logits; top_k keeps the likeliest so many colours. given: (n, H, W) tokens of which
        the first `rows` rows are kept and the rest drawn. generator: on the model's device.
        A pixel costs the decoder at one position, a row the encoder on one row: keys and values before are cached.
        """
        height, width = self.row_position.shape[0], self.column_position.shape[1]
        position, device = self.row_position + self.column_position, self.first_pixel.device   # (H, W, C)
        tokens = torch.zeros(n, height, width, dtype=torch.int64, device=device)
        columns = [block.new_cache(n * width, height) if block.axis == "column" else None for block in self.encoder]
        rowwise = [block.new_cache(n, width) for block in self.decoder]
        above = torch.zeros(n, width, position.shape[-1], device=device)      # the encoder's output on the row before
        for r in range(height):
            if r < rows:
                tokens[:, r] = given[:, r]
            else:
                context = above + position[r]                                 # (n, W, C)
                for w in range(width):
                    x = context[:, w] + (self.embedding(tokens[:, r, w - 1]) if w > 0 else 0)
                    for block, cache in zip(self.decoder, rowwise):
                        x = block.step(x, cache, w)
                    logits = self.to_logits(self.decoder_norm(x)).float() / temperature                 # (n, V)
                    if r == 0 and w == 0:
                        logits = self.first_pixel.log().expand(n, -1)
                    elif top_k is not None and top_k < logits.shape[1]:
                        least = logits.topk(top_k, dim=1).values[:, -1:]
                        logits = logits.masked_fill(logits < least, -math.inf)
                    tokens[:, r, w] = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
            x = self.embedding(tokens[:, r]) + position[r]                    # (n, W, C)
            for block, cache in zip(self.encoder, columns):
                if cache is None:
                    x = block(x[:, None])[:, 0]
                else:
                    x = block.step(x.flatten(0, 1), cache, r).unflatten(0, (n, width))
            above = self.encoder_norm(x)
        return tokens


class Encoder(GCRL):
    """A GCRL without decoder and head: (N, 3, S, S) RGB in [0, 1] to features (N, width)."""

    def __init__(self, *args):
        super().__init__(*args)
        del self.decoder, self.decoder_norm, self.to_logits, self.head

    def forward(self, x):
        return self.encode(quantise(x, self.palette))

    def stages(self):
        blocks = [list(pair) for pair in zip(self.encoder[::2], self.encoder[1::2])]
        blocks[-1].append(self.encoder_norm)
        return [[self.embedding, self.row_position, self.column_position], *blocks]


def encoder(args):
    """What is kept and probed, untrained: (N, 3, S, S) RGB in [0, 1] to (N, D). args: the settings of a run."""
    return Encoder(args.colours, args.image_size, args.width, args.encoder_layers, args.decoder_layers, args.heads)


def log_likelihood(logits, tokens):
    """logits (N, H, W, V), tokens (N, H, W) to sum_{k=2..D} log p(x_k | x_<k), (N,), in float32 nats."""
    nats = F.cross_entropy(logits.float().flatten(0, 2), tokens.flatten(), reduction="none").view(len(tokens), -1)
    return -nats[:, 1:].sum(dim=1)


# ---- loss


def nt_xent(z1, z2, tau):
    """L_c: z1, z2 (N, D) projections of the two views, normalised here, to a scalar. Chance level: log(2N - 1)."""
    n, z = len(z1), F.normalize(torch.cat([z1, z2]).float(), dim=1)           # (2N, D)
    logits = z @ z.T / tau
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -math.inf)         # j != i
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


# ---- arguments

DEFAULTS = {  # of a data set, where they differ from those below
    "shapes": dict(image_size=12, colours=2, width=64, encoder_layers=1, decoder_layers=1, heads=4, crop_min=0.4,
                   jitter=0.3, epochs=9, batch_size=32, lr=2.5e-3),
}
DRAWING = dict(temperature=1.0, top_k=None, samples=None, complete=[], frechet=None)           # with --sample
FREE_TO_DRAW = {"seed", "device", "workers", "data_dir", "cache_gb"}          # of the run's settings, with --sample


def arguments(argv):
    parser = cli.Parser(prog="gcrl.py", description="GCRL. Defaults are those of --dataset shapes; with another "
                        "--dataset beside --help, that one's.")
    add = parser.add_argument
    add("--dataset", choices=NAMES, default="shapes", help="what to train on; shapes and folder need no download")
    add("--image-size", type=cli.number(int, 8, True), default=32, help="side of the images, pixels")
    add("--alpha", type=cli.nonnegative, default=1.0, help="weight of the generative loss, nats per predicted token")
    add("--beta", type=cli.nonnegative, default=1.0, help="weight of the contrastive loss, nats")
    add("--colours", type=cli.number(int, 2, True, 4096), default=512, help="colours of the palette")
    add("--width", type=cli.count, default=256, help="channels of the transformer")
    add("--encoder-layers", type=cli.count, default=4, help="pairs of row and column attention")
    add("--decoder-layers", type=cli.count, default=4, help="blocks of masked row attention")
    add("--heads", type=cli.count, default=8, help="attention heads, a divisor of the width")
    add("--crop-min", type=cli.number(float, 0, high=1), default=0.08, help="strong view: least share of the area kept")
    add("--jitter", type=cli.nonnegative, default=0.5, help="strong view: strength s of the colour distortion")
    add("--epochs", type=cli.count, default=100, help="passes over the training images")
    add("--warmup", type=cli.number(float, 0, True, 1), default=0.05, help="share of the epochs with a rising rate")
    add("--batch-size", type=cli.number(int, 2, True), default=256, help="images a step, over all processes")
    add("--lr", type=cli.positive, default=1e-3, help="peak learning rate of AdamW")
    add("--weight-decay", type=cli.nonnegative, default=0.01, help="AdamW's decay of all weights but biases and norms")
    add("--tau", type=cli.positive, default=0.2, help="temperature of the contrastive loss")
    cli.add_run_flags(parser)
    add = parser.add_argument_group("drawing", "from a saved run, with --sample",
                                    argument_default=argparse.SUPPRESS).add_argument
    add("--sample", metavar="RUN", help="trains nothing: draws from the run in this folder, with its settings and "
        "into this folder; --seed is then that of the draws")
    add("--temperature", type=cli.number(float, 1e-3, True), help="divides the logits (default: 1.0)")
    add("--top-k", type=cli.count, help="draws among the likeliest so many colours (default: all)")
    add("--samples", type=cli.count, help="images to draw; a picture has 500 at most (default: 64, with --frechet 500)")
    add("--complete", nargs="+", metavar="IMAGE", help="your images, the lower half of each drawn anew, six times")
    add("--frechet", metavar="RUN", help="Frechet distance of samples and test images in the features of this run, of "
        "any script, beside that of two halves of the test images: of equally many, at most half of the test images")
    args = parse(parser, argv, DEFAULTS)
    if "sample" in args:
        return drawing_arguments(parser, argv, args.sample)
    alone = [name for name in DRAWING if name in args]
    if alone:
        raise cli.Refusal(f"--{alone[0].replace('_', '-')} only goes with --sample RUN, the run to draw from")
    if args.alpha == args.beta == 0:
        raise cli.Refusal("--alpha 0 --beta 0 leaves nothing to learn: give one of them a weight")
    if args.width % args.heads:
        raise cli.Refusal(f"--heads {args.heads} does not divide --width {args.width}")
    return args


def drawing_arguments(parser, argv, folder):
    """The arguments of --sample: the settings of the run in `folder`, and what the flags say of drawing."""
    stored = vars(encoders.settings(folder, "gcrl")[1])
    parser.set_defaults(**stored, **DRAWING)
    args = parser.parse_args(None if argv is None else [str(a) for a in argv])
    changed = [k for k in stored if k not in FREE_TO_DRAW and getattr(args, k) != stored[k]]
    if changed:
        raise cli.Refusal(f"--{changed[0].replace('_', '-')} cannot change with --sample (the run has "
                          f"{stored[changed[0]]}): leave it out")
    if args.alpha == 0:
        raise cli.Refusal(f"--sample {folder}: that run has --alpha 0, so its decoder was not trained to draw")
    args.data_seed = stored["seed"]
    return args


# ---- training


def main(argv=None):
    """Trains, evaluates and writes the run's folder. Returns the final metrics (result.json)."""
    args = arguments(argv)
    if "sample" in args:
        return draw(args)
    generate, contrast, device = args.alpha > 0, args.beta > 0, cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    rank, world = distributed.start(device)
    data = distributed.first_alone(load, args.dataset, args.data_dir, args.image_size, device, args.workers,
                                   args.cache_gb, args.seed)
    steps = steps_per_epoch(len(data.train), args.batch_size, world)
    some = data.train.at(data.train.some(2000))                               # (2000, 3, S, S) uint8, for the palette
    palette = fit_palette(some, args.colours, args.seed)
    tokens, args.colours = quantise(some, palette), len(palette)              # fewer where the images have fewer

    def new_model():
        torch.manual_seed(args.seed)
        model = GCRL(len(palette), args.image_size, args.width, args.encoder_layers, args.decoder_layers, args.heads)
        model.palette.copy_(palette)
        model.first_pixel.copy_(torch.bincount(tokens[:, 0, 0], minlength=len(palette)))
        return model.to(device)

    model = new_model()
    net = distributed.wrap(model, all_used=generate and contrast)
    net = torch.compile(net) if args.compile else net
    vectors, matrices = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (False, True))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    rng = augment.Random(args.seed, rank, world)

    run = Run("gcrl", vars(args), device, rank)
    predicted = args.image_size**2 - 1                                        # tokens that L_g scores
    metrics = {"nats": ("nats/token", f"uniform {math.log(len(palette)):.3f}")} if generate else {}
    metrics |= {"contrastive": ("L_c", f"chance {math.log(2 * args.batch_size - 1):.3f}")} if contrast else {}
    metrics |= {"spread": ("spread", "")}
    progress = Progress(run, args.epochs, steps, args.batch_size, metrics)
    run.track(model=model, optimizer=optimizer, scaler=scaler, rng=rng, progress=progress)
    epoch, step = run.restore()
    run.describe(vars(args), precision=amp or torch.float32, images=len(data.train), steps=steps, processes=world)
    net.train()
    with run:
        while epoch < args.epochs:
            order = epoch_order(len(data.train), args.batch_size, args.seed, epoch, rank, world)[step:]
            for step, x in enumerate(data.train.batches(order), step):
                x1 = quantise(weak_view(x, rng), model.palette)               # (N, H, W) tokens
                x2 = quantise(strong_view(x, rng, args.crop_min, args.jitter), model.palette) if contrast else None
                set_rate(optimizer, args.lr * cosine(epoch * steps + step, args.epochs * steps, args.warmup))
                with autocast:
                    log_p, z1, z2, h = net(x1, x2, generate, contrast)
                l_g = [-log_p.mean() / predicted] if generate else []         # a list: of one loss, or none
                l_c = [nt_xent(distributed.gather(z1), distributed.gather(z2), args.tau)] if contrast else []
                loss = args.alpha * sum(l_g) + args.beta * sum(l_c)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                progress.update(epoch, step, [*l_g, *l_c, spread(h)])
                if run.stop_requested():
                    run.stop(epoch, step + 1)
            progress.end_epoch(epoch, lr=optimizer.param_groups[0]["lr"])
            epoch, step = epoch + 1, 0
            run.save(epoch, step)
    if rank > 0:
        return {}

    def of_pixels(function):
        def call(x):                                                          # uint8 (N, 3, S, S)
            with autocast:
                return function(quantise(x, model.palette))
        return call

    def picture(name, *tokens):
        run.write(name, lambda path: pictures.rows(path, *(dequantise(t, model.palette) for t in tokens)))

    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder", "to_logits", "head"))}
    run.write("encoder.pt", lambda path: torch.save(state, path))
    rng, x, held = augment.Random(args.seed), some[:32].to(device), data.test or data.train
    views = weak_view(x, rng), strong_view(x, rng, args.crop_min, args.jitter)
    picture("views.png", *(quantise(v, model.palette) for v in views))
    more = {"palette_error": (dequantise(tokens, palette) - some / 255).square().mean().sqrt().item() * 255}
    if generate:
        more["nats"] = -linear_probe.features(of_pixels(model.log_prob), held, model, 128).mean().item() / predicted
        more["bits"] = more["nats"] / math.log(2)
        run.say(f"\n{'test' if data.test else 'training'} images: {more['nats']:.3f} nats, {more['bits']:.3f} bits per "
                f"predicted token (uniform {math.log(len(palette)):.3f} nats); not bits per dimension: the palette is "
                f"off by {more['palette_error']:.1f} of 255 (RMS)")
        generator = torch.Generator(device).manual_seed(args.seed)
        picture("samples.png", model.eval().sample(64, generator=generator))
        given = quantise(held.at(held.some(32)).to(device), model.palette)
        completed = model.sample(len(given), given=given, rows=args.image_size // 2, generator=generator)
        picture("completions.png", given, completed)
    judged = {row: (of_pixels(m.encode), m) for row, m in (("untrained", new_model()), ("trained", model))}
    return run.finish(data, judged, device, **more)


# ---- drawing


def trained(folder, device):
    """The model of the run in `folder`, as last saved, in eval mode. Raises Refusal where there is none."""
    args, state = encoders.settings(folder, "gcrl")[1], encoders.weights(folder, "checkpoint.pt")
    model = GCRL(args.colours, args.image_size, args.width, args.encoder_layers, args.decoder_layers, args.heads)
    try:
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise cli.Refusal(f"{folder}/checkpoint.pt is not of that run's model ({str(error).splitlines()[0]}): it was "
                          f"made by another run or another version of gcrl.py") from None
    return model.to(device).eval()


@torch.no_grad()
def draw(args):
    """--sample: draws, writes the pictures beside what the run's folder holds, prints and returns the distances."""
    device, size = cli.pick_device(args.device), args.image_size
    model, judge = trained(args.sample, device), args.frechet and encoders.load(args.frechet, device)
    given = args.complete and Images(Decoder(args.complete, ToPixels(size)), None, device, 0, True).pixels

    def sample(tokens, rows=0):
        """Images (N, 3, S, S): the first rows those of the tokens (N, S, S), the rest drawn; 64 at once, for memory."""
        generator = torch.Generator(device).manual_seed(args.seed)
        return dequantise(torch.cat([model.sample(len(part), args.temperature, args.top_k, part, rows, generator)
                                     for part in tokens.split(64)]), model.palette)

    def seen(x):                                                              # uint8 in the palette's colours
        return dequantise(quantise(x.to(device), model.palette), model.palette)

    def keep(name, suffix, content):
        """A file of bytes, of a free name: same settings, same bytes, same file; but nothing else is overwritten."""
        name += f"-T{args.temperature}-k{args.top_k or 'all'}-seed{args.seed}"
        for number in itertools.count(1):
            path = Path(args.sample) / f"{name}{f'-{number}' if number > 1 else ''}{suffix}"
            if not path.exists():
                write_file(path, lambda part: part.write_bytes(content))
            if path.read_bytes() == content:
                return print(path, flush=True)

    def picture(name, images, columns):
        pictures.tiles(file := io.BytesIO(), images, columns)
        keep(name, ".png", file.getvalue())

    n = args.samples or (500 if args.frechet else 64)
    samples = sample(torch.zeros(n, size, size, dtype=torch.int64, device=device))
    picture("samples", samples[:500], max(8, math.isqrt(min(n, 500))))
    if args.complete:                                                         # a row: image, upper half, 6 completions
        upper, tokens = seen(given), quantise(given, model.palette)
        upper[:, :, size // 2 :] = 0.5
        drawn = sample(tokens.repeat_interleave(6, dim=0), size // 2).unflatten(0, (-1, 6))
        picture("completions", torch.cat([torch.stack([given / 255, upper], dim=1), drawn], dim=1).flatten(0, 1), 8)
    data = load(args.dataset, args.data_dir, size, device, args.workers, args.cache_gb, args.data_seed)
    gaps, beside = frechet.neighbours(samples[:64], data, seen)               # (16, 1 + k, 3, S, S)
    picture("neighbours", beside.flatten(0, 1), beside.shape[1])
    result = {"nearest": gaps}
    if args.frechet:
        result["frechet"] = {"run": args.frechet, **frechet.beside_floor(judge, samples, data.test, seen, device)}
    print("\n" + frechet.table(result) + "\n", flush=True)
    keep("distances", ".json", (json.dumps(result, indent=1) + "\n").encode())
    return result


if __name__ == "__main__":
    cli.program(main)
