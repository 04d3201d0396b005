"""--sample RUN of a generative script: samples, completions, nearest training images and Frechet distance of a run."""
import argparse
import io
import itertools
import json
import math
from pathlib import Path

import torch

from common import cli, encoders, frechet, pictures
from common.data import Decoder, Images, ToPixels, load
from common.palette import dequantise, quantise
from common.run import stored_arguments, write_file

DEFAULTS = dict(temperature=1.0, top_k=None, samples=None, complete=[], frechet=None)
FREE = {"seed", "device", "workers", "data_dir", "cache_gb"}                  # of the run's settings


def add_flags(parser):
    """The flags of drawing; a training run has none of them among its settings."""
    add = parser.add_argument_group("drawing", "from a saved run, with --sample",
                                    argument_default=argparse.SUPPRESS).add_argument
    add("--sample", metavar="RUN", help="trains nothing: draws from the run in this folder, with its settings and "
        "into this folder; --seed is then that of the draws")
    add("--temperature", type=cli.number(float, 1e-3, True), help="divides the logits (default: 1.0)")
    add("--top-k", type=cli.count, help="draws among the likeliest so many colours, but for the "
        "first pixel, whose colour is drawn as often as the images have it (default: all)")
    add("--samples", type=cli.count, help="images to draw; a picture has 500 at most (default: 64, with --frechet 500)")
    add("--complete", nargs="+", metavar="IMAGE", help="your images, the lower half of each drawn anew, six times")
    add("--frechet", metavar="RUN", help="Frechet distance of samples and test images in the features of this run, of "
        "any script, beside that of two halves of the test images: of equally many, at most half of the test images")


def arguments(parser, argv, args):
    """args, what `run.parse` made of argv; or with --sample the settings of that run, and what the flags say of
    drawing, and its seed as data_seed. Raises Refusal where flags of the two do not go together."""
    if "sample" not in args:
        alone = [name for name in DEFAULTS if name in args]
        if alone:
            raise cli.Refusal(f"--{alone[0].replace('_', '-')} only goes with --sample RUN, the run to draw from")
        return args
    stored = vars(encoders.settings(args.sample, Path(parser.prog).stem)[1])
    parser.set_defaults(**DEFAULTS)
    args = stored_arguments(parser, argv, stored, FREE, "with --sample")
    args.data_seed = stored["seed"]
    return args


@torch.no_grad()
def draw(folder, model, size, source, device, seed, temperature, top_k, samples, complete, judge):
    """Draws, writes pictures and distances into `folder`, prints them, and returns the distances.

    model: with a palette (V, 3) and sample(n, temperature, top_k, given, rows, generator), which draws n token grids
    (n, S, S), the first `rows` rows those of given. size: S. source: the arguments of `data.load`. samples: how many,
    or None. complete: paths of images. judge: the folder of a run whose features give the Frechet distance, or None.
    Nothing is overwritten; the same settings give the same files.
    """
    judging = judge and encoders.load(judge, device)
    if judge and getattr(judging[0], "views_dir", None):
        raise cli.Refusal(f"--frechet {judge}: that run has views of its own (--views-dir), which samples have not")
    given = complete and Images(Decoder(complete, ToPixels(size)), None, device, 0, True).pixels

    def drawn(tokens, rows=0):
        """Images (N, 3, S, S): the first rows those of the tokens (N, S, S), the rest drawn; 64 at once, for memory."""
        generator = torch.Generator(device).manual_seed(seed)
        return dequantise(torch.cat([model.sample(len(part), temperature, top_k, part, rows, generator)
                                     for part in tokens.split(64)]), model.palette)

    def seen(x):                                                              # uint8 in the palette's colours
        return dequantise(quantise(x.to(device), model.palette), model.palette)

    def keep(name, suffix, content):
        """A file of bytes, of a free name: same settings, same bytes, same file; but nothing else is overwritten."""
        name += f"-T{temperature}-k{top_k or 'all'}-seed{seed}"
        for number in itertools.count(1):
            path = Path(folder) / f"{name}{f'-{number}' if number > 1 else ''}{suffix}"
            if not path.exists():
                write_file(path, lambda part: part.write_bytes(content))
            if path.read_bytes() == content:
                return print(path, flush=True)

    def picture(name, images, columns):
        pictures.tiles(file := io.BytesIO(), images, columns)
        keep(name, ".png", file.getvalue())

    n = samples or (500 if judge else 64)
    x = drawn(torch.zeros(n, size, size, dtype=torch.int64, device=device))
    picture("samples", x[:500], max(8, math.isqrt(min(n, 500))))
    if complete:                                                              # a row: image, upper half, 6 completions
        upper, tokens = seen(given), quantise(given, model.palette)
        upper[:, :, size // 2 :] = 0.5
        rows = drawn(tokens.repeat_interleave(6, dim=0), size // 2).unflatten(0, (-1, 6))
        picture("completions", torch.cat([torch.stack([given / 255, upper], dim=1), rows], dim=1).flatten(0, 1), 8)
    data, result = load(*source), {}
    if judge:
        result["frechet"] = {"run": str(judge), **frechet.beside_floor(judging, x, data.test, seen, device)}
    result["nearest"], beside = frechet.neighbours(x[:64], data, seen)        # (16, 1 + k, 3, S, S)
    picture("neighbours", beside.flatten(0, 1), beside.shape[1])
    print("\n" + frechet.table(result) + "\n", flush=True)
    keep("distances", ".json", (json.dumps(result, indent=1) + "\n").encode())
    return result
