"""Data sets as batches of uint8 pixels: in memory on the training device where they fit, else streamed from disk.

Either way an `Images` is iterated alike, so the scripts don't care.
"""
import os
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

ORIENTATION = 0x0112  # of EXIF
NAMES = ("shapes", "patterns", "cifar10", "cifar100", "svhn", "stl10", "fashionmnist", "folder")
HOMES = {
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "svhn": "http://ufldl.stanford.edu/housenumbers/",
    "stl10": "https://cs.stanford.edu/~acoates/stl10/",
    "fashionmnist": "https://github.com/zalandoresearch/fashion-mnist",
}


class Images:
    """N square RGB images, (N, 3, S, S) uint8, or stacks of F aligned ones, (N, 3 F, S, S), and their labels.

    labels: (N,) int64 on the device, or None. pixels: on the device, or None where they are streamed. aspect: (N,) on
    the CPU, width / height of the photographs that were squashed to these squares; 1 where they were cropped.
    """

    def __init__(self, source, labels, device, workers, in_memory, aspect=None):
        """source: uint8 (N, 3, S, S), or a `Decoder`, which gives such images one by one."""
        self.device, self.workers = device, workers
        self.source, self.pixels, self.shape = source, None, tuple(source.shape[-3:])
        self.aspect = torch.ones(len(source)) if aspect is None else aspect
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64, device=device)
        if torch.is_tensor(source):
            self.pixels = source.to(device)
        elif in_memory:
            pixels = torch.empty(len(source), *source.shape, dtype=torch.uint8)
            index = torch.arange(len(source)).split(256)
            for part, batch in zip(index, self.stream(index)):
                pixels[part] = batch
            self.pixels = pixels.to(device)

    def __len__(self):
        return len(self.source)

    def stream(self, index_batches):
        """Decodes in worker processes, at most two batches ahead each."""
        loader = DataLoader(
            self.source, batch_sampler=[batch.tolist() for batch in index_batches], num_workers=self.workers,
            collate_fn=stack, pin_memory=self.device.type == "cuda",
            generator=torch.Generator())                                      # else it draws from torch's own
        for batch in loader:
            if isinstance(batch, str):
                raise Refusal(batch)
            yield batch

    def batches(self, index_batches):
        """Yields uint8 (B, 3, S, S) on the device for each (B,) of the index tensors."""
        if self.pixels is not None:
            for index in index_batches:
                yield self.pixels[augment.send(index, self.device)]
        else:
            for batch in self.stream(index_batches):
                yield augment.send(batch, self.device)

    def at(self, index):
        """uint8 (B, 3, S, S) on the CPU for a (B,) tensor of indices."""
        return next(self.batches([index.cpu()])).cpu()

    def random_indices(self, n):
        """The indices of n images, or of all where there are fewer, drawn at random but always the same."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:n]


class Data(NamedTuple):
    """train: what the method sees. centred: the same as an encoder sees them, resized and centre-cropped. labelled,
    test: what the probe trains and is scored on; None where there are no labels, and `unlabelled` then says why.
    classes: their names."""
    train: Images
    centred: Images
    labelled: Images | None
    test: Images | None
    classes: tuple
    unlabelled: str = ""

    def __str__(self):
        """How many images there are, of what size, and where they are kept."""
        side, parts = self.train.shape[-1], [f"{len(self.train):,} training images"]
        if self.labelled and len(self.labelled) != len(self.train):
            parts.append(f"{len(self.labelled):,} labelled ones")
        if self.test:
            parts.append(f"{len(self.test):,} test images of {len(self.classes)} classes")
        kept = "decoded as they are needed" if self.train.pixels is None else f"in the memory of {self.train.device}"
        return f"{', '.join(parts)}, {side} x {side}, {kept}"


class Batches:
    """The batches of one process in every epoch: in random order, whole ones only, each shared out evenly."""

    def __init__(self, images, batch_size, seed, rank=0, world=1):
        """batch_size: images of all processes together. Raises Refusal where images or processes do not fit it."""
        self.images, self.batch_size, self.seed, self.rank, self.world = images, batch_size, seed, rank, world
        if batch_size % world:
            raise Refusal(f"--batch-size {batch_size} is not a multiple of the {world} processes")
        if len(images) < batch_size:
            raise Refusal(f"--batch-size {batch_size} is larger than the data set, {len(images)} images")

    def __len__(self):
        """Steps of an epoch."""
        return len(self.images) // self.batch_size

    def epoch(self, epoch, first=0):
        """Yields, from step `first` on, (step, index, x): which images, (B,) on the CPU, and their pixels uint8
        (B, 3, S, S) on the device, B = batch_size / world."""
        order = epoch_order(len(self.images), self.batch_size, self.seed, epoch, self.rank, self.world)[first:]
        yield from zip(range(first, len(self)), order, self.images.batches(order))


def epoch_order(n, batch_size, seed, epoch, rank=0, world=1):
    """The epoch's batches of this process, (steps, batch_size // world) indices below n, from (seed, epoch) alone.

    The images that do not fill a last batch are left out: another epoch's order has them.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[: n // batch_size * batch_size].view(-1, world, batch_size // world)[:, rank]


def load(name, data_dir, image_size, device, workers, cache_gb, seed=0, store_size=None):
    """The data set `name` (one of NAMES) as a Data of image_size x image_size images.

    `shapes` (and `patterns`) trains on 2,000 images and probes with the labels of 500 of them, tested on 1,000: with
    more, neighbours in pixels would tell the classes.

    data_dir: where downloads are kept, or the user's folder, or a list of aligned ones (`aligned`), whose images
    come as 3 channels each. cache_gb: 10^9 bytes that may be kept on the device; a larger data set is streamed by
    `workers` processes. seed: of `shapes` and `patterns`. store_size: a folder's training images are squashed to
    squares of this side, or of the largest image's, for views that are cut from the whole photograph; None: they are
    cropped like the others.
    Raises Refusal where images are missing or cannot be read.
    """
    channels, why, whole = 3, "", None
    if name in ("shapes", "patterns"):
        classes = shapes.CLASSES if name == "shapes" else shapes.PATTERNS
        (x, y), test = (shapes.draw(n, image_size, 2 * seed + i, classes) for i, n in enumerate((2000, 1000)))
        parts = [(torch.from_numpy(pixels), labels) for pixels, labels in ((x, y), (x[:500], y[:500]), test)]
    else:
        if name == "folder":
            roots = [Path(root) for root in (data_dir if isinstance(data_dir, (list, tuple)) else [data_dir])]
            parts, classes, why = folder(roots[0])
            if len(roots) > 1:
                parts, channels = aligned(parts, roots), 3 * len(roots)
        else:
            parts, classes = distributed.first_process_first(download, name, data_dir)
        plain = parts[0] or parts[1]
        parts = [part and (Decoder(part[0], image_size, channels), part[1]) for part in parts]
        if name == "folder" and store_size:
            sizes = torch.cat(list(DataLoader(Sizes(plain[0]), 256, num_workers=workers, generator=torch.Generator())))
            side, aspect = max(image_size, min(store_size, int(sizes.max()))), (sizes[:, 0] / sizes[:, 1]).float()
            if side > image_size or (aspect != 1).any():
                whole = Decoder(plain[0], side, channels, squash=True)
    sources = [part[0] for part in parts if part] + [whole] * (whole is not None)
    size = sum(len(source) * channels * source.shape[-1] ** 2 for source in sources)
    in_memory = size <= cache_gb * 1e9
    train, labelled, test = (part and Images(*part, device, workers, in_memory) for part in parts)
    centred = train or labelled
    train = centred if whole is None else Images(whole, plain[1], device, workers, in_memory, aspect)
    return Data(train, centred, labelled, test, tuple(classes), why)


# ---- decoding


class Decoder(Dataset):
    """Images of a source of paths, of (image, label) pairs, or of lists of paths, whose images are stacked: uint8
    (channels, S, S). For one that cannot be read it gives the sentence that says so: a DataLoader would wrap an
    exception of its workers in their traceback. squash: to the square, without a crop."""

    def __init__(self, source, image_size, channels=3, squash=False):
        self.source, self.shape, self.squash = source, (channels, image_size, image_size), squash

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        item = what = self.source[i]
        try:
            if isinstance(item, tuple):
                what = f"image {i}"
                return to_pixels(item[0], self.shape[-1], self.squash)
            pixels = []
            for what in item if isinstance(item, list) else [item]:
                with Image.open(what) as image:
                    pixels.append(to_pixels(image, self.shape[-1], self.squash))
            return torch.cat(pixels)
        except Exception as error:                                            # Pillow's decoders raise all sorts
            return f"{what} cannot be read as an image ({error}): mend it or leave it out"


class Sizes(Dataset):
    """Width and height of images of paths, or of lists of paths, whose first counts, by their headers: (2,)."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        item = self.source[i]
        try:
            with Image.open(item[0] if isinstance(item, list) else item) as image:
                size = torch.tensor(image.size)
                return size.flip(0) if image.getexif().get(ORIENTATION, 1) > 4 else size      # turned by 90 degrees
        except Exception:                                                     # `Decoder` says which, and why
            return torch.tensor([1, 1])


def stack(images):
    """The images as a batch, or the sentence in place of one of them where there is one."""
    return next((image for image in images if isinstance(image, str)), None) or torch.stack(images)


def to_pixels(image, size, squash=False):
    """Any PIL image to uint8 (3, S, S): RGB, shorter side to S, centre crop, or all of it squashed to the square.
    Transparency is laid over white."""
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
        image = TF.center_crop(TF.resize(image, size), size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---- sources: [(items, labels) or None to train on without labels, to probe on, to test on]


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
    """A user's own images: DIR/train/CLASS/* with DIR/test/CLASS/* (or val), or images without classes.

    Returns the parts, the classes, and, where there are none, why.
    """
    if not root.is_dir():
        raise Refusal(f"--data-dir {root} is not a folder: --dataset folder reads {root}/train/CLASS/* and "
                      f"{root}/test/CLASS/*, or images without classes below {root}")
    train = root / "train" if (root / "train").is_dir() else root
    test = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
    files = image_files(train)
    if not files:
        raise Refusal(f"--data-dir {root}: no images in {train} ({', '.join(datasets.folder.IMG_EXTENSIONS)})")
    classes, why = class_folders(train), ""
    if train == root or not classes:
        why = f"{root} has no train/CLASS folders"
    elif test is None:
        why = f"{root} has no test or val folder"
    elif not class_folders(test):
        why = f"{test} has no class folders"
    if why:
        return [(files, None), None, None], (), why
    odd = sorted(set(classes) ^ set(class_folders(test)))
    if odd:
        raise Refusal(f"class {odd[0]!r} is not in both {train} and {test}: the two need the same class folders")
    parts = []
    for part in (train, test):
        found = [image_files(part / name) for name in classes]
        if [] in found:
            raise Refusal(f"{part / classes[found.index([])]} holds no images: fill it or take the class out of "
                          f"{train} and {test}")
        parts.append((sum(found, []), [label for label, files in enumerate(found) for _ in files]))
    return [None, *parts], classes, ""


def aligned(parts, roots):
    """The parts of the first root with a list of files for each item: its own, and those of the same place and name,
    but for the suffix, below the other roots."""
    def by_place(root):
        return {os.path.splitext(os.path.relpath(file, root))[0]: file for file in image_files(root)}
    ours, files = by_place(roots[0]), {}
    for root in roots[1:]:
        if not root.is_dir():
            raise Refusal(f"{root} is not a folder")
        theirs = by_place(root)
        odd = sorted(ours.keys() ^ theirs.keys())
        if odd:
            has, lacks = (roots[0], root) if odd[0] in ours else (root, roots[0])
            raise Refusal(f"{has} has an image {odd[0]!r} and {lacks} has none: the folders need images of the same "
                          f"names")
        for place, file in ours.items():
            files.setdefault(file, [file]).append(theirs[place])
    return [part and ([files[file] for file in part[0]], part[1]) for part in parts]


def download(name, data_dir):
    """The parts and classes of a data set of torchvision's, fetched to data_dir on first use."""
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
    return [None] * (3 - len(parts)) + parts, classes


def svhn(split, data_dir, download):
    """Street View House Numbers, cropped digits. torchvision's class needs SciPy for the two arrays of a file of
    MATLAB 5: each compressed, with a header, its flags, shape, name and values, padded to 8 bytes."""
    url, filename, md5 = datasets.SVHN.split_list[split]
    path, arrays = Path(data_dir) / filename, []
    if download:
        datasets.utils.download_url(url, data_dir, filename, md5)
    elif not datasets.utils.check_integrity(path, md5):
        raise RuntimeError("SVHN not found or corrupted")
    rest = path.read_bytes()[128:]
    while rest:
        size = int.from_bytes(rest[4:8], "little")
        matrix, rest = zlib.decompress(rest[8 : 8 + size]), rest[8 + size :]
        shape = np.frombuffer(matrix, "<i4", int.from_bytes(matrix[28:32], "little") // 4, 32)
        start = 48 + -(-shape.nbytes // 8) * 8                                # of the values
        kind = {2: "u1", 9: "<f8"}[int.from_bytes(matrix[start - 8 : start - 4], "little")]
        arrays.append(np.frombuffer(matrix, kind, shape.prod(), start).reshape(shape, order="F"))
    images, labels = arrays[0].transpose(3, 0, 1, 2), arrays[1].reshape(-1) % 10              # (N, 32, 32, 3); 10 is 0
    return [(Image.fromarray(image), None) for image in images], labels
