# SPDX-License-Identifier: MIT
"""Data sets as batches of uint8 pixels, kept on the training device if they fit, otherwise streamed from disk."""
import functools
import itertools
import multiprocessing.queues
import os
import signal
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets

from . import Refusal, augment, distributed, shapes
from .linear_probe import counted

HOMES = {**dict.fromkeys(("cifar10", "cifar100"), "https://www.cs.toronto.edu/~kriz/cifar.html"),
         "svhn": "http://ufldl.stanford.edu/housenumbers/", "stl10": "https://cs.stanford.edu/~acoates/stl10/",
         "fashionmnist": "https://github.com/zalandoresearch/fashion-mnist"}
NAMES = ("shapes", "patterns", *HOMES, "folder")


class Images:
    """N square RGB images, (N, 3, S, S) uint8, or stacks of F aligned ones, (N, 3 F, S, S), and their labels.

    source: such a tensor, or a `Decoder`. labels: (N,) int64 on the device, or None. pixels: on the device, or None if
    they are streamed. aspect: (N,) on the CPU, width / height of photographs that were resized whole to these squares;
    1 for those that were cropped."""

    def __init__(self, source, labels, device, workers, in_memory, aspect=None):
        self.source, self.device, self.workers, self.shape = source, device, workers, tuple(source.shape[-3:])
        self.aspect = torch.ones(len(source)) if aspect is None else aspect
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64, device=device)
        pixels = source if torch.is_tensor(source) else None
        if in_memory and pixels is None:
            pixels = torch.empty(len(source), *self.shape, dtype=torch.uint8)
            parts = pixels.split(256)
            batches = counted(stream(source, workers), len(parts), "batches of 256 images decoded")
            for part, batch in zip(parts, batches):
                part.copy_(batch)
        self.pixels = None if pixels is None else pixels.to(device)

    def __len__(self):
        return len(self.source)

    def batches(self, index_batches):
        """Yields uint8 (B, 3, S, S) on the device for each index tensor (B,)."""
        if self.pixels is None:
            for x in stream(self.source, self.workers, index_batches, self.device.type == "cuda"):
                yield augment.send(x, self.device)
        else:
            for index in index_batches:
                yield self.pixels[augment.send(index, self.device)]

    def at(self, index):
        """uint8 (B, 3, S, S) on the CPU for a (B,) tensor of indices."""
        return next(self.batches([index.cpu()])).cpu()

    def random_indices(self, n):
        """The indices of n random images, or of all if there are fewer; always the same ones."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:n]


class Data(NamedTuple):
    """train: the images to train on. centred: the same, resized and centre-cropped, as for evaluation. labelled, test:
    for the probe; None if there are no labels, and `unlabelled` then tells why. classes: their names."""
    train: Images
    centred: Images
    labelled: Images | None
    test: Images | None
    classes: tuple
    unlabelled: str = ""

    def __str__(self):
        """The number and size of the images, and where they are kept."""
        parts = ((self.train, "training images"),
                 (None if self.labelled is self.centred else self.labelled, "labelled ones"),
                 (self.test, f"test images of {len(self.classes)} classes"))
        kept = "decoded when needed" if self.train.pixels is None else f"in the memory of {self.train.device}"
        counts = [f"{len(images):,} {what}" for images, what in parts if images]
        return ", ".join([*counts, "{1} x {2}".format(*self.train.shape), kept])


class Batches:
    """The batches of one process: in random order, only full ones, divided evenly among the processes."""

    def __init__(self, images, batch_size, seed, rank=0, world=1):
        """batch_size: of all processes together. Raises Refusal if it does not suit the images or processes."""
        self.images, self.batch_size, self.seed, self.rank, self.world = images, batch_size, seed, rank, world
        if batch_size % world:
            raise Refusal(f"--batch-size {batch_size} is not a multiple of the {world} processes")
        if len(images) < batch_size:
            raise Refusal(f"--batch-size {batch_size} exceeds the number of training images, {len(images)}: lower it, "
                          f"or add images")

    def __len__(self):
        """The number of steps per epoch."""
        return len(self.images) // self.batch_size

    def epoch(self, epoch, first=0, every=False):
        """Yields (step, index, x) from step `first` on: index (B,) of the images, on the CPU, and x, their uint8 pixels
        (B, 3, S, S), on the device. B = batch_size / world. every: as in `epoch_order`."""
        order = epoch_order(len(self.images), self.batch_size, self.seed, epoch, self.rank, self.world, every)[first:]
        yield from zip(itertools.count(first), order, self.images.batches(order))


def epoch_order(n, batch_size, seed, epoch, rank=0, world=1, every=False):
    """The batches of this process in an epoch: (steps, batch_size // world) indices below n, determined by seed and
    epoch. Images that do not fill a last batch are left out, different ones in each epoch; or, if `every`, the first
    images of the order fill it up."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    steps = -(-n // batch_size) if every else n // batch_size
    return order.repeat(2)[: steps * batch_size].view(-1, world, batch_size // world)[:, rank]


def load(name, data_dir, image_size, device, workers, cache_gb, seed=0, store_size=None):
    """The data set `name` (one of NAMES) as a Data of image_size x image_size images.

    `shapes` and `patterns` have 2,000 training images, of which 500 are labelled, and 1,000 test images; with more
    labels, neighbours in pixel space would already suffice. data_dir: the folder of downloads or of the user's
    images, or a list of `aligned` folders, whose images are stacked, 3 channels each. cache_gb: how many 10^9 bytes may
    be kept on the device; else `workers` processes stream all of it. seed: of `shapes` and `patterns`. store_size:
    the side of the squares to which training images of a folder or of stl10 are resized whole (at most the largest
    one's), so that views can be cut from the whole photograph; None: they are cropped. Raises Refusal if images are
    missing or broken.
    """
    roots = list(map(Path, data_dir if isinstance(data_dir, (list, tuple)) else [data_dir]))
    channels, why, whole, aspect = 3 * len(roots), "", None, None
    if name in ("shapes", "patterns"):
        classes = shapes.CLASSES if name == "shapes" else shapes.PATTERNS
        (x, y), test = (shapes.draw(n, image_size, 2 * seed + i, classes) for i, n in enumerate((2000, 1000)))
        parts = [(torch.from_numpy(pixels), labels) for pixels, labels in ((x, y), (x[:500], y[:500]), test)]
    else:
        found, classes, why = aligned(roots) if name == "folder" else \
            distributed.first_process_first(download, name, data_dir)
        parts = [part and (Decoder(part[0], image_size, channels), part[1]) for part in found]
        items, labels = found[0] or found[1]
        if name in ("folder", "stl10") and store_size:
            sizes = stream(Decoder(items, read=upright_size), workers)
            sizes = torch.cat(list(counted(sizes, -(-len(items) // 256), "headers of 256 images read")))
            side, aspect = max(image_size, min(store_size, int(sizes.max()))), (sizes[:, 0] / sizes[:, 1]).float()
            aspect.clamp_(1 / 8, 8)                                           # thinner crops might miss all pixels
            if side > image_size or (aspect != 1).any():
                whole = Decoder(items, side, channels, functools.partial(to_pixels, squash=True))
    sources = [part[0] for part in parts if part] + [whole] * (whole is not None)
    in_memory = sum(len(source) * channels * source.shape[-1] ** 2 for source in sources) <= cache_gb * 1e9
    train, labelled, test = (part and Images(*part, device, workers, in_memory) for part in parts)
    centred = train or labelled
    train = centred if whole is None else Images(whole, labels, device, workers, in_memory, aspect)
    return Data(train, centred, labelled, test, tuple(classes), why)


class Decoder(Dataset):
    """Gives read(image, S) for each image of a source, by default uint8 (channels, S, S). The source contains paths,
    (image, label) pairs, or lists of paths whose images are stacked. For an image that cannot be read it gives an error
    message, because a DataLoader would wrap an exception in the worker's traceback."""

    def __init__(self, source, image_size=1, channels=3, read=None):
        self.source, self.shape, self.read = source, (channels, image_size, image_size), read or to_pixels

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        item, found = self.source[i], []
        try:
            for what in item if isinstance(item, list) else [item[0] if isinstance(item, tuple) else item]:
                with warnings.catch_warnings(action="ignore"):                # of odd metadata
                    with what if isinstance(what, Image.Image) else Image.open(what) as image:
                        found.append(self.read(image, self.shape[-1]))
            return torch.cat(found)
        except Exception as error:                                            # Pillow raises many kinds
            return f"{what} cannot be read as an image ({error or type(error).__name__})"


def stream(source, workers, index_batches=None, pin_memory=False):
    """Yields stacked batches of what a `Decoder` gives, for each index tensor (B,) or for all images in order, using
    worker processes. Raises Refusal, which names the first image that cannot be read and counts the others: of all
    images, or with index_batches, which are read in each epoch, of the same batch."""
    sampler, broken = torch.arange(len(source)).split(256) if index_batches is None else index_batches, []
    with warnings.catch_warnings(action="ignore"):                            # of more workers than cores
        batches = iter(DataLoader(source, batch_sampler=[index.tolist() for index in sampler], num_workers=workers,
                                  collate_fn=stack, pin_memory=pin_memory, worker_init_fn=start_worker,
                                  generator=torch.Generator()))               # not torch's own
    for batch in batches:
        if isinstance(batch, list):
            broken += batch
            if index_batches is not None:                                     # else the others are counted
                break
        elif not broken:
            yield batch
    del batches                                                               # ends the workers, kept by the traceback
    if broken:
        raise Refusal(f"{broken[0]}: repair or remove it" if len(broken) == 1 else
                      f"{broken[0]}, nor can {len(broken) - 1:,} more: repair or remove them")


def start_worker(_):
    """Leaves Ctrl-C, and SIGTERM for a whole process group (by `timeout`, say), to the main process, which still needs
    the worker for the step that it finishes and saves. And ends the worker if it cannot send a batch (/dev/shm is
    full), for which the main process would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):                                                # Windows has none
        os.setpgid(0, 0)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))


def stack(images):
    """The images as a batch, or the error messages for those that cannot be read."""
    return [image for image in images if isinstance(image, str)] or torch.stack(images)


def upright_size(image, _):
    """Width and height of a PIL image, (2,), from its header."""
    size = torch.tensor(image.size)
    return size.flip(0) if image.getexif().get(0x0112, 1) > 4 else size       # rotated by 90 degrees


def to_pixels(image, size, squash=False):
    """Converts any PIL image to RGB uint8 (3, S, S): the shorter side is resized to S and the centre cropped or, with
    `squash`, the whole image is resized to the square. Transparent images are put on white, 16-bit values divided by
    256."""
    if image.mode == "F" or image.mode == "I" and image.format == "TIFF":     # depth maps, say
        raise ValueError(f"mode {image.mode} has no fixed range: save it with 8 or 16 bits a channel, of which all "
                         f"values are used")
    if image.format == "JPEG":
        image.draft("RGB", (size, size))                                      # decodes at 1/2, 1/4 or 1/8 if enough
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):                    # 16 bit: convert() would clip, not scale
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if squash:
        image = TF.resize(image, [size, size])
    elif image.size != (size, size):
        if max(image.size) > 8 * min(image.size):                             # a resized strip would be huge
            image = TF.center_crop(image, [min(side, 8 * min(image.size)) for side in (image.height, image.width)])
        image = TF.center_crop(TF.resize(image, size), size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---- sources: [unlabelled training images, labelled ones, test images], each (items, labels) or None


def image_files(folder):
    """The images in a folder and its subfolders, each once by its real path. Links are followed last, and never to a
    parent folder; hidden files (.ipynb_checkpoints, ._1.jpg), pipes, devices and the pictures of runs are left out.
    Raises OSError."""
    def fail(error):
        raise error
    found, seen, tops = [], set(map(str, Path(folder).resolve().parents)), [folder]
    for place, folders, names in (level for top in tops for level in os.walk(top, onerror=fail)):
        if (real := os.path.realpath(place)) in seen or {"args.json", "log.jsonl"} <= set(names):         # a run
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        tops += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
        for name in (n for n in names if n.lower().endswith(datasets.folder.IMG_EXTENSIONS) and not n.startswith(".")):
            path = os.path.join(place, name)
            linked = os.path.islink(path)
            if os.path.isfile(path) or not os.path.exists(path):              # a broken link is an error
                found.append((linked, path, os.path.realpath(path) if linked else os.path.join(real, name)))
    return sorted({real: path for _, path, real in sorted(found, reverse=True)}.values())


def folder(root):
    """The user's own images, DIR/train/CLASS/* and DIR/test/CLASS/* (or val), or images without classes: the parts, the
    classes and, if there are none, the reason."""
    def by_class(part):                                                       # (class, image) of images in subfolders
        places = ((file[len(str(part)) + 1 :].split(os.sep), file) for file in image_files(part))
        return sorted((place[0], file) for place, file in places if len(place) > 1)

    if not root.is_dir():
        raise Refusal(f"{root} is not a folder: --data-dir names one, where --dataset folder reads train/CLASS/* and "
                      f"test/CLASS/*, or images without classes")
    train, test = root / "train", next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
    if test and not train.is_dir():
        raise Refusal(f"{train} is not a folder, but {test} is: add it, or name {test} itself")
    pairs = [by_class(part) if part and part.is_dir() else [] for part in (train, test)]
    if [] in pairs:
        train = train if train.is_dir() else root
        if not (files := image_files(train)):
            raise Refusal(f"--data-dir {root}: no images in {train} ({', '.join(datasets.folder.IMG_EXTENSIONS)})")
        return [(files, None), None, None], (), (
            f"{root} has no train/CLASS folders" if not pairs[0] else
            f"{test} has no class folders" if test else f"{root} has no test or val folder")
    classes, others = ({name for name, _ in part} for part in pairs)
    for odd in sorted(classes ^ others):
        raise Refusal(f"{(test if odd in classes else train) / odd} holds no images, so class {odd!r} is not in both "
                      f"{train} and {test}: fill it or remove the class")
    parts = [None]                                                            # no unlabelled part
    for part in pairs:
        names, files = zip(*part)
        parts.append((list(files), np.unique(names, return_inverse=True)[1]))
    return parts, sorted(classes), ""


def aligned(roots):
    """`folder` of the first root. With several roots, each item becomes a list of files: its own, and those below the
    other roots with the same path except for the suffix."""
    found, named = [folder(root) for root in roots], [{} for _ in roots]
    if len(roots) == 1:
        return found[0]
    for root, (parts, *_), files in zip(roots, found, named):
        for file in (file for part in parts if part for file in part[0]):
            name = os.path.splitext(os.path.relpath(file, root))[0]
            if file != files.setdefault(name, file):
                raise Refusal(f"{files[name]} and {file} have the same name except for the suffix: remove one of them")
        for odd in sorted(named[0].keys() ^ files.keys()):
            has, lacks = (roots[0], root) if odd in named[0] else (root, roots[0])
            raise Refusal(f"{has} has an image {odd!r} and {lacks} has none: the folders need the same names")
    rows = {file: [files[name] for files in named] for name, file in named[0].items()}
    parts, *more = found[0]
    return [part and ([rows[file] for file in part[0]], part[1]) for part in parts], *more


def download(name, data_dir):
    """The parts and classes of a torchvision data set, downloaded to data_dir on first use, and ""."""
    splits = (["unlabeled"] if name == "stl10" else []) + ["train", "test"]
    kind = {key.lower(): value for key, value in vars(datasets).items()}[name]               # torchvision's class

    def part(split):
        if name == "svhn":
            return svhn(split, data_dir)
        source = kind(data_dir, split if name == "stl10" else split == "train", download=split == splits[0])
        return source, None if split == "unlabeled" else source.labels if name == "stl10" else source.targets

    try:
        parts = [part(split) for split in splits]
    except Exception as error:                                                # torchvision raises many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[-1]      # of a list of mirrors, the last one's
        raise Refusal(f"--dataset {name} is not in {Path(data_dir).resolve()} and could not be downloaded ({reason}): "
                      f"get it from {HOMES[name]} and put it there, or use --dataset shapes or --dataset folder, which "
                      f"need no download") from None
    classes = getattr(parts[-1][0], "classes", None) or [str(c) for c in range(10)]
    return [None] * (3 - len(parts)) + parts, classes, ""


def svhn(split, data_dir):
    """Street View House Numbers, cropped digits, downloaded on first use: [(image, None)], labels. torchvision's class
    needs SciPy; this reads the MATLAB 5 file itself: two compressed arrays, each with a header, flags, shape, name and
    values, padded to 8 bytes."""
    (url, filename, md5), arrays = datasets.SVHN.split_list[split], []
    datasets.utils.download_url(url, data_dir, filename, md5)                 # unless it is there
    rest = (Path(data_dir) / filename).read_bytes()[128:]
    while rest:
        size = int.from_bytes(rest[4:8], "little")
        matrix, rest = zlib.decompress(rest[8 : 8 + size]), rest[8 + size :]
        shape = np.frombuffer(matrix, "<i4", int.from_bytes(matrix[28:32], "little") // 4, 32)
        start = 48 + -(-shape.nbytes // 8) * 8                                # of the values
        kind = {2: "u1", 9: "<f8"}[int.from_bytes(matrix[start - 8 : start - 4], "little")]
        arrays.append(np.frombuffer(matrix, kind, shape.prod(), start).reshape(shape, order="F"))
    images, labels = arrays[0].transpose(3, 0, 1, 2), arrays[1].reshape(-1) % 10              # (N, 32, 32, 3); 10 is 0
    return [(Image.fromarray(image), None) for image in images], labels
