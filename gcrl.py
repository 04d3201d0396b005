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
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import augment, cli, distributed, drawing, encoders, linear_probe, pictures
from common.data import NAMES, epoch_order, load, steps_per_epoch
from common.palette import dequantise, fit_palette, quantise
from common.run import Progress, Run, cosine, parse, set_rate, spread
from common.transformer import Block, init_weights

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

    @torch.no_grad()
    def set_palette(self, palette, first_pixel):
        """What the tokens stand for: palette (V, 3), first_pixel (V,), how often each colour is an image's first.

        To the embeddings' random start it adds a random linear map of the colours, so that near colours begin with near
        embeddings: which tokens are alike need not be learnt.
        """
        self.palette.copy_(palette)
        self.first_pixel.copy_(first_pixel)
        colour = (palette - palette.mean(dim=0)) / palette.std(dim=0, correction=0).clamp(min=1e-6)
        self.embedding.weight += 0.1 * colour @ torch.randn(3, self.embedding.embedding_dim)

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

    def forward(self, x1, x2, generate, contrast, micro_batch=None):
        """What a training step needs: log p(x1) (N,) or None, z1 and z2 (N, z_dim) or None, and the features.

        micro_batch: how many of the N images go through the network at once, None: all. If these are fewer than N, no
        activations are kept, they are computed again in the backward pass: memory is that of one micro-batch, while
        NT-Xent still compares all N (gradient caching, Gao et al. 2021, 2101.06983, by torch.utils.checkpoint).
        """
        if micro_batch is None or micro_batch >= len(x1):
            return self.outputs(x1, x2, generate, contrast)
        parts = zip(x1.split(micro_batch), (x2 if contrast else x1).split(micro_batch))
        outputs = [checkpoint(self.outputs, *part, generate, contrast, use_reentrant=False, preserve_rng_state=False)
                   for part in parts]
        return tuple(None if values[0] is None else torch.cat(values) for values in zip(*outputs))

    def outputs(self, x1, x2, generate, contrast):
        """`forward` of all images at once, the encoder run once for both views."""
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
                x = (block(x[:, None])[:, 0] if cache is None else            # a row sees itself alone
                     block.step(x.flatten(0, 1), cache, r).unflatten(0, (n, width)))
            above = self.encoder_norm(x)
        return tokens


class Encoder(GCRL):
    """A GCRL without decoder and head: (N, 3, S, S) RGB in [0, 1] to features (N, width)."""

    def __init__(self, *args):
        super().__init__(*args)
        del self.decoder, self.decoder_norm, self.to_logits, self.head

    def forward(self, x):
        return torch.cat([self.encode(quantise(part, self.palette)) for part in x.split(64)])           # for memory

    def stages(self):
        blocks = [list(pair) for pair in zip(self.encoder[::2], self.encoder[1::2])]
        blocks[-1].append(self.encoder_norm)
        return [[self.embedding, self.row_position, self.column_position], *blocks]


def encoder(args):
    """What is kept and probed, untrained: (N, 3, S, S) RGB in [0, 1] to (N, D). args: the settings of a run."""
    return Encoder(args.colours, args.image_size, args.width, args.encoder_layers, args.decoder_layers, args.heads)


def trained(folder, device):
    """The model of the run in `folder`, as last saved, in eval mode. Raises Refusal where there is none."""
    args, state = encoders.settings(folder, "gcrl")[1], encoders.weights(folder, "checkpoint.pt")
    model = GCRL(args.colours, args.image_size, args.width, args.encoder_layers, args.decoder_layers, args.heads)
    return encoders.fill(model, state, f"{folder}/checkpoint.pt").to(device).eval()


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
    "shapes": dict(image_size=12, colours=8, width=64, encoder_layers=1, decoder_layers=1, heads=4, crop_min=0.6,
                   jitter=0.3, epochs=16, batch_size=32, lr=2.5e-3),
    "small": dict(image_size=16, colours=64, width=96, encoder_layers=2, decoder_layers=2, heads=6, crop_min=0.3,
                  epochs=5, batch_size=128, lr=2e-3),
}


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
    add("--micro-batch", type=cli.count, default=None, help="images that go through the network at once (default: what "
        "takes about 2 GB, on a GPU 4 GB); loss and gradients are those of the batch all the same, and a step takes a "
        "fifth less time where all of the batch goes at once")
    add("--lr", type=cli.positive, default=1e-3, help="peak learning rate of AdamW")
    add("--weight-decay", type=cli.nonnegative, default=0.01, help="AdamW's decay of all weights but biases and norms")
    add("--tau", type=cli.positive, default=0.2, help="temperature of the contrastive loss")
    cli.add_run_flags(parser)
    drawing.add_flags(parser)
    args = drawing.arguments(parser, argv, parse(parser, argv, DEFAULTS))
    if args.alpha == args.beta == 0:
        raise cli.Refusal("--alpha 0 --beta 0 leaves nothing to learn: give one of them a weight")
    if args.width % args.heads:
        raise cli.Refusal(f"--heads {args.heads} does not divide --width {args.width}")
    if "sample" in args and args.alpha == 0:
        raise cli.Refusal(f"--sample {args.sample}: that run has --alpha 0, so its decoder was not trained to draw")
    return args


# ---- training


def main(argv=None):
    """Trains, evaluates and writes the run's folder. Returns the final metrics (result.json)."""
    args = arguments(argv)
    if "sample" in args:
        return draw(args)
    generate, contrast, device = args.alpha > 0, args.beta > 0, cli.pick_device(args.device)
    if args.micro_batch is None:
        image = 50 * args.width * args.image_size**2 * (4 * args.encoder_layers + args.decoder_layers)        # bytes
        args.micro_batch = min(args.batch_size, max(1, (2**31 if device.type == "cpu" else 2**32) // image))
    amp = cli.pick_amp(args.amp, device)
    rank, world = distributed.start(device)
    run = Run("gcrl", vars(args), device, rank)
    data = distributed.first_alone(load, args.dataset, args.data_dir, args.image_size, device, args.workers,
                                   args.cache_gb, args.seed)
    steps = steps_per_epoch(len(data.train), args.batch_size, world)
    run.describe(precision=amp or torch.float32, processes=world)
    run.ready("data", data.describe())
    some = data.train.at(data.train.some(2000))                               # (2000, 3, S, S) uint8, for the palette
    palette = fit_palette(some, args.colours, args.seed)
    args.colours = len(palette)                                               # fewer where the images have fewer
    first_pixels = quantise(some[:, :, :1, :1], palette).flatten()
    error = dequantise(quantise(some[:200], palette), palette) - some[:200] / 255
    palette_error = 255 * error.square().mean().sqrt().item()
    run.ready("palette", f"{len(palette)} colours, off by {palette_error:.1f} of 255 (RMS)")

    def new_model():
        torch.manual_seed(args.seed)
        model = GCRL(len(palette), args.image_size, args.width, args.encoder_layers, args.decoder_layers, args.heads)
        model.set_palette(palette, torch.bincount(first_pixels, minlength=len(palette)))
        return model.to(device)

    model = new_model()
    run.ready("model", f"{sum(p.numel() for p in model.parameters()):,} weights")
    net = distributed.wrap(model, all_used=generate and contrast)
    net = torch.compile(net) if args.compile else net
    vectors, matrices = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (False, True))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    rng = augment.Random(args.seed, rank, world)

    predicted = args.image_size**2 - 1                                        # tokens that L_g scores
    metrics = {"nats": ("nats/token", f"uniform {math.log(len(palette)):.3f}")} if generate else {}
    metrics |= {"contrastive": ("L_c", f"chance {math.log(2 * args.batch_size - 1):.3f}")} if contrast else {}
    metrics |= {"spread": ("spread", "")}
    progress = Progress(run, args.epochs, steps, args.batch_size, metrics)
    run.track(model=model, optimizer=optimizer, scaler=scaler, rng=rng, progress=progress)
    epoch, step = run.restore()
    net.train()
    with run:
        while epoch < args.epochs:
            order = epoch_order(len(data.train), args.batch_size, args.seed, epoch, rank, world)[step:]
            for step, x in enumerate(data.train.batches(order), step):
                x1 = quantise(weak_view(x, rng), model.palette)               # (N, H, W) tokens
                x2 = quantise(strong_view(x, rng, args.crop_min, args.jitter), model.palette) if contrast else None
                set_rate(optimizer, args.lr * cosine(epoch * steps + step, args.epochs * steps, args.warmup))
                with autocast:
                    log_p, z1, z2, h = net(x1, x2, generate, contrast, args.micro_batch)
                l_g = [-distributed.gather(log_p).mean() / predicted] if generate else []          # one loss, or none
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
            with autocast:                                                    # few at once, for memory
                return torch.cat([function(quantise(part, model.palette)) for part in x.split(64)])
        return call

    def picture(name, *tokens):
        run.write(name, lambda path: pictures.rows(path, *(dequantise(t, model.palette) for t in tokens)))

    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder", "to_logits", "head"))}
    run.write("encoder.pt", lambda path: torch.save(state, path))
    rng, x, held = augment.Random(args.seed), some[:32].to(device), data.test or data.train
    views = weak_view(x, rng), strong_view(x, rng, args.crop_min, args.jitter)
    picture("views.png", *(quantise(v, model.palette) for v in views))
    more = {"palette_error": palette_error}
    if generate:
        more["nats"] = -linear_probe.features(of_pixels(model.log_prob), held, model).mean().item() / predicted
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


def draw(args):
    """--sample: writes what the run in args.sample draws into its folder, and returns the distances."""
    device, size = cli.pick_device(args.device), args.image_size
    model = trained(args.sample, device)
    data = args.dataset, args.data_dir, size, device, args.workers, args.cache_gb, args.data_seed
    return drawing.draw(args.sample, model, size, data, device, args.seed, args.temperature, args.top_k, args.samples,
                        args.complete, args.frechet)


if __name__ == "__main__":
    cli.program(main, memory="--micro-batch, --width, --image-size or --cache-gb")
