"""Data sets as batches of uint8 pixels: in memory on the training device where they fit, else streamed from disk.

Either way an `Images` is iterated alike, so the scripts don't care.
"""
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets

from common import shapes
from common.cli import Refusal

NAMES = ("shapes", "patterns", "cifar10", "cifar100", "svhn", "stl10", "fashionmnist", "folder")
HOMES = {
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "svhn": "http://ufldl.stanford.edu/housenumbers/",
    "stl10": "https://cs.stanford.edu/~acoates/stl10/",
    "fashionmnist": "https://github.com/zalandoresearch/fashion-mnist",
}


class Images:
    """N square RGB images (or stacks of them, `Stack`), and their labels where they have some.

    labels: (N,) int64 on the device, or None.
    """

    def __init__(self, source, labels, device, workers, in_memory):
        """source: uint8 (N, 3, S, S), or a Dataset that gives such images one by one (`Decoder`, `Stack`)."""
        self.device, self.workers = device, workers
        self.source, self.pixels, self.shape = source, None, tuple(source.shape[-3:])
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64, device=device)
        if torch.is_tensor(source):
            self.pixels = source.to(device)
        elif in_memory:
            first, pixels = 0, torch.empty(len(source), *source.shape, dtype=torch.uint8)
            for batch in self.stream(torch.arange(len(source)).split(256)):
                pixels[first : first + len(batch)] = batch
                first += len(batch)
            self.pixels = pixels.to(device)

    def __len__(self):
        return len(self.source)

    def stream(self, index_batches):
        """Decodes in worker processes, at most two batches ahead each."""
        loader = DataLoader(
            self.source, batch_sampler=[batch.tolist() for batch in index_batches], num_workers=self.workers,
            collate_fn=collate, pin_memory=self.device.type == "cuda",
            generator=torch.Generator())                                      # else it draws from torch's own
        for batch in loader:
            if isinstance(batch, str):
                raise Refusal(batch)
            yield batch

    def batches(self, index_batches):
        """Yields uint8 (B, 3, S, S) on the device for each (B,) of the index tensors."""
        if self.pixels is not None:
            for index in index_batches:
                yield self.pixels[index.to(self.device, non_blocking=True)]
        else:
            for batch in self.stream(index_batches):
                yield batch.to(self.device, non_blocking=True)

    def at(self, index):
        """uint8 (B, 3, S, S) on the CPU for a (B,) tensor of indices."""
        return next(self.batches([index.cpu()])).cpu()

    def some(self, n):
        """The indices of n images, or of all where there are fewer, drawn at random but always the same."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:n]


class Data(NamedTuple):
    """train: what the method sees. labelled, test: what the probe trains and is scored on; None where there are no
    labels, and `unlabelled` then says why. classes: their names."""
    train: Images
    labelled: Images | None
    test: Images | None
    classes: tuple
    unlabelled: str = ""

    def describe(self):
        """How many images there are, of what size, and where they are kept: a line."""
        side, parts = self.train.shape[-1], [f"{len(self.train):,} training images"]
        if self.labelled and self.labelled is not self.train:
            parts.append(f"{len(self.labelled):,} labelled ones")
        if self.test:
            parts.append(f"{len(self.test):,} test images of {len(self.classes)} classes")
        kept = (f"in the memory of {self.train.device}" if self.train.pixels is not None else
                f"decoded as they are needed by {self.train.workers} processes")
        return f"{', '.join(parts)}, {side} x {side}, {kept}"


def epoch_order(n, batch_size, seed, epoch, rank=0, world=1):
    """The epoch's batches of this process, (steps, batch_size // world) indices below n, from (seed, epoch) alone.

    The images that do not fill a last batch are left out: another epoch's order has them.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    order = order[: n // batch_size * batch_size].view(-1, world, batch_size // world)
    return order[:, rank]


def steps_per_epoch(n, batch_size, world=1):
    """Whole batches in n images. Raises Refusal where there is none, or where one cannot be shared out evenly."""
    if batch_size % world:
        raise Refusal(f"--batch-size {batch_size} is not a multiple of the {world} processes")
    if n < batch_size:
        raise Refusal(f"--batch-size {batch_size} is larger than the data set, {n} images")
    return n // batch_size


def load(name, data_dir, image_size, device, workers, cache_gb, seed=0):
    """The data set `name` (one of NAMES) as a Data of image_size x image_size images.

    `shapes` (and `patterns`) trains on 2,000 images and probes with the labels of 500 of them, tested on 1,000: with
    more, neighbours in pixels would tell the classes.

    data_dir: where downloads are kept, or the user's folder, or a list of aligned ones (`counterparts`), whose images
    come as 3 channels each. cache_gb: 10^9 bytes that may be kept on the device; a larger data set is streamed by
    `workers` processes. seed: of `shapes` and `patterns`. Raises Refusal where images are missing or cannot be read.
    """
    if name in ("shapes", "patterns"):
        classes = shapes.CLASSES if name == "shapes" else shapes.PATTERNS
        (x, y), test = (shapes.draw(n, image_size, 2 * seed + i, classes) for i, n in enumerate((2000, 1000)))
        parts, roots, why = [(x, None), (x[:500], y[:500]), test], [], ""
        parts = [(torch.from_numpy(pixels), labels) for pixels, labels in parts]
    else:
        to_pixels, roots = ToPixels(image_size), []
        if name == "folder":
            roots = [Path(root) for root in (data_dir if isinstance(data_dir, (list, tuple)) else [data_dir])]
            parts, classes, why = folder(roots[0])
        else:
            parts, classes, why = download(name, data_dir)
        parts = [part and (Decoder(part[0], to_pixels), part[1]) for part in parts]
        if len(roots) > 1:
            others = [counterparts(roots[0], root) for root in roots[1:]]
            parts = [part and (Stack([part[0], *(Decoder([other[file] for file in part[0].source], to_pixels)
                                                 for other in others)]), part[1]) for part in parts]
    size = sum(len(part[0]) * 3 * max(1, len(roots)) * image_size**2 for part in parts if part)
    train, labelled, test = (part and Images(*part, device, workers, size <= cache_gb * 1e9) for part in parts)
    return Data(train or labelled, labelled, test, tuple(classes), why)


# ---- decoding


class ToPixels:
    """Any PIL image to uint8 (3, S, S): RGB, shorter side to S, centre crop. Transparency is laid over white."""

    def __init__(self, image_size):
        self.image_size = image_size

    def __call__(self, image):
        if image.format == "JPEG":
            image.draft("RGB", (self.image_size, self.image_size))            # decodes at 1/2, 1/4 or 1/8 if enough
        image = ImageOps.exif_transpose(image)
        if image.mode == "I" or image.mode.startswith("I;16"):                # 16 bit: convert() would clip, not scale
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if image.size != (self.image_size, self.image_size):
            image = TF.center_crop(TF.resize(image, self.image_size), self.image_size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Decoder(Dataset):
    """Items of a source of PIL images or paths as pixels, or, where one cannot be read, the sentence that says so.

    A sentence instead of an exception, because a DataLoader wraps what its workers raise in their traceback.
    """

    def __init__(self, source, to_pixels):
        self.source, self.to_pixels = source, to_pixels
        self.shape = 3, to_pixels.image_size, to_pixels.image_size

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        item = self.source[i]
        try:
            if isinstance(item, (str, Path)):
                with Image.open(item) as image:
                    return self.to_pixels(image)
            return self.to_pixels(item[0])                                    # (image, label) of torchvision
        except Exception as error:                                            # Pillow's decoders raise all sorts
            what = item if isinstance(item, (str, Path)) else f"image {i}"
            return f"{what} cannot be read as an image ({error}): mend it or leave it out"


class Stack(Dataset):
    """The images of several Decoders of as many items as one, of 3 channels each."""

    def __init__(self, decoders):
        self.decoders = decoders
        self.shape = 3 * len(decoders), *decoders[0].shape[1:]

    def __len__(self):
        return len(self.decoders[0])

    def __getitem__(self, i):
        return joined([decoder[i] for decoder in self.decoders], torch.cat)


def joined(items, join):
    """join(items), or the sentence in place of an image where there is one."""
    return next((item for item in items if isinstance(item, str)), None) or join(items)


def collate(items):
    return joined(items, torch.stack)


# ---- sources: ((items, labels) or None to train on without labels, to probe on, to test on), classes, why unlabelled


def image_files(folder):
    """The images in and below a folder. Links are followed, hidden ones (.ipynb_checkpoints, ._1.jpg) left out."""
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(place, name) for name in names
                  if name.lower().endswith(datasets.folder.IMG_EXTENSIONS) and not name.startswith(".")]
    return sorted(files)


def class_folders(folder):
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def folder(root):
    """A user's own images: DIR/train/CLASS/* with DIR/test/CLASS/* (or val), or images without classes."""
    if not root.is_dir():
        raise Refusal(f"--data-dir {root} is not a folder: --dataset folder reads {root}/train/CLASS/* and "
                      f"{root}/test/CLASS/*, or images without classes below {root}")
    train = root / "train" if (root / "train").is_dir() else root
    test = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
    files = image_files(train)
    if not files:
        raise Refusal(f"--data-dir {root}: no images in {train} ({', '.join(datasets.folder.IMG_EXTENSIONS)})")
    classes = class_folders(train)
    if train == root or not classes:
        return [(files, None), None, None], (), f"{root} has no train/CLASS folders"
    if test is None:
        return [(files, None), None, None], (), f"{root} has no test or val folder"
    if not class_folders(test):
        return [(files, None), None, None], (), f"{test} has no class folders"
    odd = sorted(set(classes) ^ set(class_folders(test)))
    if odd:
        raise Refusal(f"class {odd[0]!r} is not in both {train} and {test}: the two need the same class folders")
    parts = []
    for part in (train, test):
        found = [image_files(part / name) for name in classes]
        if [] in found:
            raise Refusal(f"{part / classes[found.index([])]} holds no images: fill it or take the class out of "
                          f"{train} and {test}")
        items = [(file, label) for label, files in enumerate(found) for file in files]
        parts.append(tuple(map(list, zip(*items))))
    return [None, *parts], classes, ""


def counterparts(root, other):
    """{image of root: the image of the same place and name, but for the suffix, below `other`}."""
    def places(folder):
        return {os.path.splitext(os.path.relpath(file, folder))[0]: file for file in image_files(folder)}
    if not other.is_dir():
        raise Refusal(f"{other} is not a folder")
    ours, theirs = places(root), places(other)
    odd = sorted(ours.keys() ^ theirs.keys())
    if odd:
        has, lacks = (root, other) if odd[0] in ours else (other, root)
        raise Refusal(f"{has} has an image {odd[0]!r} and {lacks} has none: the folders need images of the same names")
    return {file: theirs[place] for place, file in ours.items()}


def download(name, data_dir):
    """A data set of torchvision's, fetched to data_dir on first use."""
    def part(split, download):
        if name == "svhn":
            return svhn(split, data_dir, download)
        if name == "stl10":
            source = datasets.STL10(data_dir, split, download=download)
            return source, None if split == "unlabeled" else source.labels
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashionmnist": datasets.FashionMNIST}[name]
        source = kind(data_dir, train=split == "train", download=download)
        return source, source.targets

    splits = (["unlabeled"] if name == "stl10" else []) + ["train", "test"]
    try:
        parts = [part(split, False) for split in splits]
    except Exception:                                                         # torchvision: "not found or corrupted"
        try:
            parts = [part(split, True) for split in splits]
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[-1]  # of a list of mirrors, the last one's
            raise Refusal(
                f"--dataset {name} is not in {Path(data_dir).resolve()} and could not be downloaded ({reason}): get it "
                f"from {HOMES[name]} and put it there, or use --dataset shapes or --dataset folder, which need no "
                f"download") from None
    classes = getattr(parts[-1][0], "classes", None) or [str(c) for c in range(10)]
    return [None] * (3 - len(parts)) + parts, classes, ""


def svhn(split, data_dir, download):
    """Street View House Numbers, cropped digits. torchvision's class needs SciPy to read its files; this does not."""
    url, filename, md5 = datasets.SVHN.split_list[split]
    path = Path(data_dir) / filename
    if download:
        datasets.utils.download_url(url, data_dir, filename, md5)
    elif not datasets.utils.check_integrity(path, md5):
        raise RuntimeError("SVHN not found or corrupted")
    arrays = read_mat(path)
    images = arrays["X"].transpose(3, 0, 1, 2)                                # (N, 32, 32, 3)
    return [(Image.fromarray(image), None) for image in images], arrays["y"].reshape(-1) % 10     # 10 means 0


def read_mat(path):
    """The numeric arrays of a MATLAB 5 file, little-endian, by name: {name: array}.

    https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf
    """
    types = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}

    def elements(data):
        at = 0
        while at < len(data):
            kind, size = struct.unpack_from("<II", data, at)
            if kind >> 16:                                                    # small element: type and size in a word
                yield kind & 0xFFFF, data[at + 4 : at + 4 + (kind >> 16)]
                at += 8
            else:
                yield kind, data[at + 8 : at + 8 + size]
                at += 8 + (size if kind == 15 else -(-size // 8) * 8)         # compressed ones are not padded

    arrays = {}
    for kind, data in elements(memoryview(Path(path).read_bytes())[128:]):
        if kind == 15:
            kind, data = next(elements(memoryview(zlib.decompress(data))))
        if kind == 14:                                                        # a matrix: flags, shape, name, values
            _, (_, shape), (_, name), (value_kind, values), *_ = elements(data)
            values = np.frombuffer(values, types[value_kind]).reshape(np.frombuffer(shape, "<i4"), order="F")
            arrays[bytes(name).decode()] = values
    return arrays
