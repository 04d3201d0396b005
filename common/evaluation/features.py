# SPDX-License-Identifier: MIT
"""Using the features of a run: export to a file, a map, and the nearest neighbours of the user's own images."""
import itertools
import math
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from .. import Refusal, linear_probe, pictures, shown
from ..data import Decoder, Images
from ..run import write_file
from . import runs


def files(images):
    """The paths of `Images` that come from files (if aligned, of the first ones); otherwise an empty list."""
    source = getattr(images.source, "source", ())                             # of a Decoder
    items = [item[0] if isinstance(item, list) else item for item in source] if isinstance(source, list) else []
    return items if all(isinstance(item, str) for item in items) else []


def export(path, images, encoder, autocast):
    """Writes an .npz file with PART_features float32 (N, D), PART_labels int64 (N,) and PART_files (N,), if available,
    for the parts train, test and labelled (STL-10's labelled training images), and the names of the classes.

    Features are written batch by batch, so that N is not limited by memory; the file appears once it is complete.
    """
    parts = {"train": images.centred, "test": images.test}
    if images.centred.labels is None:
        parts["labelled"] = images.labelled
    parts = {name: part for name, part in parts.items() if part}
    arrays = {"classes": np.array(images.classes, str)}
    arrays |= {f"{name}_labels": x.labels.cpu().numpy() for name, x in parts.items() if x.labels is not None}
    arrays |= {f"{name}_files": np.array(paths) for name, x in parts.items() if (paths := files(x))}

    def write(part):
        with open(part, "wb") as file:
            np.savez(file, **arrays)
        with zipfile.ZipFile(part, "a") as archive:
            for name, x in parts.items():
                batches = linear_probe.encoded(encoder, x, autocast)
                first = next(batches)                                         # to know D
                shape = {"descr": "<f4", "fortran_order": False, "shape": (len(x), first.shape[1])}
                with archive.open(f"{name}_features.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, shape)
                    for h in itertools.chain([first], batches):
                        file.write(h.cpu().numpy().astype("<f4").tobytes())
    if path.exists():
        raise Refusal(f"--export {path} exists: name another file")
    write_file(path, write)
    print(shown(str(path)), flush=True)


def tsne(x, perplexity=30.0, steps=500):
    """t-SNE (van der Maaten & Hinton 2008): positions (N, 2) of x (N, D) that keep neighbours together. Uses all pairs,
    so N should be a few thousand at most; starts from the first two principal components, so the result is always the
    same. perplexity: roughly the number of neighbours that count, at most a third of N."""
    n, gap = len(x), torch.cdist(x, x).square().fill_diagonal_(torch.inf)
    low, high, beta = gap.new_zeros(n, 1), gap.new_full((n, 1), torch.inf), gap.new_ones(n, 1)
    for _ in range(64):                                                       # bisection of each row's 1 / 2 sigma^2
        p = (-beta * gap).softmax(dim=1)
        wide = torch.special.entr(p).sum(dim=1, keepdim=True) > math.log(min(perplexity, max(1.0, n / 3)))
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    p = (p + p.T) / (2 * n)                                                   # (N, N), its sum 1
    y = 1e-4 * n**0.5 * torch.linalg.svd(x - x.mean(dim=0), full_matrices=False).U[:, :2]     # (N, 2)
    velocity = torch.zeros_like(y)
    for step in linear_probe.counted(range(steps), steps, "steps of the map"):
        early = step < steps // 2                                             # early exaggeration: clusters form
        q = 1 / (1 + torch.cdist(y, y).square().fill_diagonal_(torch.inf))
        pull = ((12 if early else 1) * p - q / q.sum()) * q
        gradient = 4 * (pull.sum(dim=1, keepdim=True) * y - pull @ y)
        velocity = (0.5 if early else 0.8) * velocity - max(n / 48, 50) * gradient
        y = y + velocity
    return y


def draw_map(path, images, classes, encoder, autocast, n=2000, side=720):
    """Saves a PNG (`runs.keep`): `tsne` of the normalised features of n images, coloured by class, with a legend."""
    if len(images) < 2:
        raise Refusal("--map needs at least two images: add some")
    index = images.random_indices(n)
    y = tsne(F.normalize(linear_probe.features(encoder, images, autocast, index=index).cpu(), dim=1))
    y = (y - y.amin(dim=0)) / (y.amax(dim=0) - y.amin(dim=0)).clamp(min=1e-9) * (side - 40) + 20
    labels = [0] * len(y) if images.labels is None else images.labels.cpu()[index].tolist()
    colours = [f"hsl({360 * i // max(1, len(classes))}, 75%, {(35, 60)[i % 2]}%)" for i in range(max(1, len(classes)))]
    points, rows = Image.new("RGB", (4 * side, 4 * side), "white"), (side - 40) // 16
    for (a, b), label in zip((4 * y).tolist(), labels):
        ImageDraw.Draw(points).ellipse((a - 11, b - 11, a + 11, b + 11), fill=colours[label])
    picture = Image.new("RGB", (side + 160 * -(-len(classes) // rows), side), "white")
    picture.paste(points.resize((side, side), Image.Resampling.LANCZOS))      # for smooth edges
    for i, (name, colour) in enumerate(zip(classes, colours)):
        a, b = side + 160 * (i // rows), 20 + 16 * (i % rows)
        ImageDraw.Draw(picture).ellipse((a, b + 2, a + 8, b + 10), fill=colour)
        ImageDraw.Draw(picture).text((a + 14, b), str(name)[:22], fill="black")
    runs.keep(path, lambda file: picture.save(file, "PNG"))


def show_neighbours(path, own, images, encoder, autocast):
    """Saves a PNG (`runs.keep`) with a row for each of the files `own`: the image, then the training images with the
    closest normalised features, whose names are also printed."""
    train, names = images.centred, files(images.centred)
    given = Images(Decoder(own, train.shape[-1]), None, train.device, 0, True)
    x, h = (F.normalize(linear_probe.features(encoder, part, autocast), dim=1) for part in (given, train))
    index = (x @ h.T).topk(min(7, len(h)), dim=1).indices.cpu()               # (Q, k)
    for name, row in zip(own, index.tolist()):
        found = [name, *(names[i] if names else f"training image {i}" for i in row)]
        print("\n  ".join(map(shown, found)), flush=True)
    beside = train.at(index.flatten()).unflatten(0, index.shape)
    rows = torch.cat([given.pixels[:, None].cpu(), beside], dim=1)            # (Q, 1 + k, 3, S, S)
    runs.keep(path, lambda file: pictures.tiles(file, rows.flatten(0, 1), rows.shape[1]))
