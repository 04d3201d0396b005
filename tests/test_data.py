# SPDX-License-Identifier: MIT
"""common/data.py and common/shapes.py: what comes out of files, in which order, and what is refused. No network."""
import gzip
import hashlib
import io
import multiprocessing
import os
import pickle
import struct
import tarfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision import datasets

from common import augment, shapes
from common.cli import Refusal
from common.data import HOMES, NAMES, Batches, epoch_order, load, to_pixels
from programs import Program

ROOT, CPU = Path(__file__).parent.parent, torch.device("cpu")
WORKERS = pytest.mark.parametrize("workers", [0, 2])
STREAMED = pytest.mark.parametrize("cache_gb", [1, 0], ids=["memory", "streamed"])


@pytest.fixture(autouse=True)
def web(monkeypatch):
    """All there is of the internet: {url: bytes}, at first nothing."""
    pages = {}

    def urlopen(request, *_, **__):
        url = request.full_url if isinstance(request, urllib.request.Request) else request
        if url not in pages:
            raise urllib.error.URLError("no network here")
        response = io.BytesIO(pages[url])
        response.url, response.length = url, len(pages[url])
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return pages


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    """Writes an image: a PIL one, or an (H, W) or (H, W, 3) array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def plain(size=(20, 20), colour=(10, 120, 230), mode="RGB"):
    return Image.new(mode, size, colour)


def labelled_folder(root, parts=("train", "test"), classes=("cat", "dog"), n=2, side=16):
    """n random images of each class in each part; their pixels by part, in the order of the classes."""
    pixels = {}
    for seed, part in enumerate(parts):
        pixels[part] = random_pixels(len(classes) * n, side, side, 3, seed=seed)
        for i, image in enumerate(pixels[part]):
            save(root / part / classes[i // n] / f"{i % n}.png", image)
    return pixels


def mixed_folder(root, n=23):
    """Images of all sorts of sizes and modes, without classes."""
    for i in range(n):
        height, width = 17 + 5 * i % 31, 17 + 7 * i % 29
        image = Image.fromarray(random_pixels(height, width, 3, seed=i)).convert(("RGB", "L", "RGBA")[i % 3])
        save(root / f"{i:02d}.png", image)
    return root


def truncated_jpeg(path):
    save(path, random_pixels(64, 64, 3), quality=95)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def load_folder(root, image_size=16, workers=0, cache_gb=1):
    return load("folder", root, image_size, CPU, workers, cache_gb)


def everything(images, batch_size=8):
    return torch.cat(list(images.batches(torch.arange(len(images)).split(batch_size))))


def only(tmp_path, image_size=16):
    """The pixels of the one image in a folder."""
    pixels = everything(load_folder(tmp_path, image_size).train)
    assert pixels.dtype == torch.uint8 and pixels.shape == (1, 3, image_size, image_size)
    return pixels[0]


def to_nchw(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def refusal(call, *args, **kwargs):
    """The sentence that a call refuses with."""
    with pytest.raises(Refusal) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert text and "\n" not in text and "Traceback" not in text and not text.endswith("."), text
    return text


def sentence_without(tmp_path, text):
    """The words only: pytest's folders are named after their tests."""
    return text.replace(str(tmp_path), "").lower()


# ---- shapes


@pytest.mark.parametrize("image_size", [8, 24, 33])
def test_shapes_have_the_size_asked_for(image_size):
    pixels, labels = shapes.draw(20, image_size, 0)
    assert pixels.dtype == np.uint8 and pixels.shape == (20, 3, image_size, image_size)
    assert labels.dtype == np.int64 and labels.shape == (20,)
    assert (pixels.reshape(20, -1).std(1) > 5).all()                          # there is something to see on each


def test_shapes_depend_on_the_seed_alone():
    first = shapes.draw(40, 16, 3)
    np.random.seed(1)
    torch.manual_seed(1)
    again, other = shapes.draw(40, 16, 3), shapes.draw(40, 16, 4)
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[1] != other[1]).any()
    assert not (first[0][:, None] == other[0][None]).all((2, 3, 4)).any()     # no image in common
    assert len(np.unique(first[0], axis=0)) == 40                             # nor twice


@pytest.mark.parametrize("n", [100, 103, 7])
def test_shapes_are_balanced_and_in_random_order(n):
    labels = shapes.draw(n, 8, 0)[1]
    counts = np.bincount(labels, minlength=len(shapes.CLASSES))
    assert len(counts) == len(shapes.CLASSES) == 10
    assert set(counts) <= {n // 10, n // 10 + 1}
    assert (labels != np.sort(labels)).any() and (labels != np.arange(n) % 10).any()


def test_shapes_are_drawn_as_their_label_says(monkeypatch):
    drawn = []
    monkeypatch.setattr(shapes, "DISTANCE", {
        shape: lambda u, v, shape=shape, distance=distance: drawn.append(shape) or distance(u, v)
        for shape, distance in shapes.DISTANCE.items()})
    labels = shapes.draw(30, 8, 0)[1]
    a_figure = len(drawn) // 30
    assert drawn == [shapes.CLASSES[label] for label in labels for _ in range(a_figure)] and a_figure > 0


def test_the_ten_shapes_differ_and_have_a_radius_of_about_one():
    u, v = np.meshgrid(*[np.linspace(-2, 2, 81)] * 2)
    inside = {shape: shapes.DISTANCE[shape](u, v) < 0 for shape in shapes.CLASSES}
    for shape, mask in inside.items():
        radius = np.sqrt(u**2 + v**2)[mask].max()
        assert 0.8 < radius < 1.3, shape
        for other in shapes.CLASSES[: shapes.CLASSES.index(shape)]:
            assert (mask & inside[other]).sum() < 0.9 * (mask | inside[other]).sum(), (shape, other)


@pytest.mark.parametrize("name, classes", [("shapes", shapes.CLASSES), ("patterns", shapes.PATTERNS)])
def test_load_shapes(monkeypatch, tmp_path, name, classes):
    draw, seeds = shapes.draw, []
    monkeypatch.setattr(shapes, "draw", lambda n, size, seed, *of: seeds.append(seed) or draw(n // 2, size, seed, *of))
    data, again, other = (load(name, tmp_path / "none", 12, CPU, 0, 0, seed) for seed in (0, 0, 1))
    assert data.classes == classes and data.unlabelled == "" and len(data.train.labels) == len(data.train)
    assert len(data.train) > len(data.labelled) > 0
    assert set(data.labelled.labels.tolist()) == set(range(len(classes)))
    assert everything(data.train)[: len(data.labelled)].equal(everything(data.labelled))
    for images in (data.labelled, data.test):
        assert everything(images).shape == (len(images), 3, 12, 12) and everything(images).dtype == torch.uint8
        assert images.labels.dtype == torch.int64 and images.labels.shape == (len(images),)
    assert everything(data.train).equal(everything(again.train)) and data.test.labels.equal(again.test.labels)
    sets = [{x.numpy().tobytes() for x in everything(images)}
            for images in (data.train, data.test, other.train, other.test)]
    assert sum(map(len, sets)) == len(set.union(*sets))                       # no image in two of them
    assert len(set(seeds)) == 4 and not (tmp_path / "none").exists()


# ---- from a file to pixels


@pytest.mark.parametrize("image, want", [
    (plain(), (10, 120, 230)),
    (plain((16, 16)), (10, 120, 230)),
    (plain((7, 5)), (10, 120, 230)),
    (plain((90, 40)), (10, 120, 230)),
    (plain((16, 200)), (10, 120, 230)),
    (plain(colour=77, mode="L"), (77, 77, 77)),
    (plain(colour=1, mode="1"), (255, 255, 255)),
    (plain().quantize(4), (10, 120, 230)),
    (plain(colour=(100, 0, 200, 255), mode="RGBA"), (100, 0, 200)),
    (plain(colour=(100, 0, 200, 0), mode="RGBA"), (255, 255, 255)),           # transparency shows white,
    (plain(colour=(100, 0, 200, 51), mode="RGBA"), (224, 204, 244)),          # 0.2 colour + 0.8 white
    (plain(colour=(100, 51), mode="LA"), (224, 224, 224)),
    (plain(colour=(100, 255), mode="LA"), (100, 100, 100)),
], ids=lambda value: f"{value.mode}{value.size}" if isinstance(value, Image.Image) else "")
def test_plain_images_keep_their_colour(tmp_path, image, want):
    save(tmp_path / "a.png", image)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == image.mode
    assert (only(tmp_path) == torch.tensor(want)[:, None, None]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_without_a_range_are_refused(tmp_path, dtype):
    """Depths in metres, say, would be black."""
    save(tmp_path / "depth.tif", Image.fromarray(np.full((20, 20), 7, dtype)))
    with pytest.raises(Refusal, match="depth.tif cannot be read as an image .*no fixed range"):
        load("folder", tmp_path, 16, CPU, 0, 1.0)


@pytest.mark.parametrize("suffix, tolerance", [
    (".jpg", 3), (".JPEG", 3), (".webp", 4), (".bmp", 0), (".ppm", 0), (".tif", 0), (".PNG", 0)])
def test_file_types(tmp_path, suffix, tolerance):
    save(tmp_path / f"a{suffix}", plain((50, 40)))
    assert (only(tmp_path).int() - torch.tensor([10, 120, 230])[:, None, None]).abs().max() <= tolerance


def test_transparent_palette(tmp_path):
    image = Image.fromarray(np.repeat([[0, 1]], 16, 0).repeat(8, 1).astype(np.uint8), "L").convert("P")
    image.putpalette([200, 0, 0, 0, 0, 200])
    save(tmp_path / "a.png", image, transparency=1)
    pixels = only(tmp_path)
    assert (pixels[:, :, :8] == torch.tensor([200, 0, 0])[:, None, None]).all() and (pixels[:, :, 8:] == 255).all()


def test_cmyk_jpeg(tmp_path):
    save(tmp_path / "a.jpg", plain(colour=(255, 0, 0, 0), mode="CMYK"), quality=95)
    assert (only(tmp_path).int() - torch.tensor([0, 255, 255])[:, None, None]).abs().max() <= 4


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled(tmp_path, suffix):
    grey = np.array([0, 255, 256, 32767, 65535, 25600, 40000, 51200], np.uint16)
    if suffix == "pgm":
        (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + np.tile(grey, (8, 1)).astype(">u2").tobytes())
    else:
        save(tmp_path / f"a.{suffix}", np.tile(grey, (8, 1)))
    want = torch.tensor([0, 0, 1, 127, 255, 100, 156, 200])
    assert (only(tmp_path, 8).int() - want).abs().max() <= 1


@pytest.mark.parametrize("height, width", [(40, 40), (40, 61), (77, 30), (9, 12), (16, 25), (16, 16)])
def test_shorter_side_is_resized_and_the_centre_cropped(tmp_path, height, width):
    image = Image.fromarray(random_pixels(height, width, 3))
    save(tmp_path / "a.png", image)
    want = TF.pil_to_tensor(TF.center_crop(TF.resize(image, 16), 16))
    assert only(tmp_path).equal(want)
    if min(height, width) == 16:                                              # nothing to resize
        left = round((width - 16) / 2)
        assert np.array_equal(want.permute(1, 2, 0), np.asarray(image)[:, left : left + 16])


@pytest.mark.parametrize("wide", [True, False])
def test_the_proportions_are_kept(tmp_path, wide):
    bands = np.zeros((40, 120, 3), np.uint8)                                  # red, green, blue, 40 x 40 each
    for channel in range(3):
        bands[:, 40 * channel : 40 * channel + 40, channel] = 255
    save(tmp_path / "a.png", bands if wide else bands.transpose(1, 0, 2).copy())
    inner = only(tmp_path)[:, 2:-2, 2:-2]
    assert (inner == torch.tensor([0, 255, 0])[:, None, None]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    stored = random_pixels(20, 33, 3)
    upright = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: stored.transpose(1, 0, 2), 6: np.rot90(stored, -1), 7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "a.png", stored, exif=exif)
    want = TF.center_crop(TF.resize(Image.fromarray(np.ascontiguousarray(upright)), 16), 16)
    assert only(tmp_path).equal(TF.pil_to_tensor(want))


def test_exif_rotated_jpeg(tmp_path):
    stored = np.zeros((300, 400, 3), np.uint8)
    stored[:, :200, 0] = stored[:, 200:, 2] = 255                             # red on the left, blue on the right
    exif = Image.Exif()
    exif[0x0112] = 6                                                          # to be turned clockwise: red goes up
    save(tmp_path / "a.jpg", stored, exif=exif)
    pixels = only(tmp_path).int()
    assert (pixels[:, :6] - torch.tensor([255, 0, 0])[:, None, None]).abs().max() < 9
    assert (pixels[:, -6:] - torch.tensor([0, 0, 255])[:, None, None]).abs().max() < 9


def test_a_jpeg_decoded_at_reduced_size_looks_the_same(tmp_path):
    """Large ones are decoded at 1/2, 1/4 or 1/8, never below the image size."""
    x, y = np.meshgrid(np.linspace(0, 1, 600), np.linspace(0, 1, 400))
    image = np.stack([255 * x, 255 * y, 127 + 60 * np.sin(100 * x)], 2).astype(np.uint8)      # a period is 38 pixels
    path = save(tmp_path / "a.jpg", image, quality=95)
    for image_size in (16, 45, 51, 101):
        with Image.open(path) as full:
            want = TF.pil_to_tensor(TF.center_crop(TF.resize(full.convert("RGB"), image_size), image_size))
        assert (only(tmp_path, image_size).int() - want.int()).abs().max() <= 6


def test_to_pixels_takes_images_that_have_no_file():
    pixels = random_pixels(16, 16, 3)
    assert to_pixels(Image.fromarray(pixels), 16).equal(to_nchw(pixels[None])[0])


# ---- folders


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folder_with_classes(tmp_path, held_out):
    pixels = labelled_folder(tmp_path, ("train", held_out), ("cat", "Dog", "emu"))
    save(tmp_path / "train" / "cat" / "deeper" / "9.png", plain((16, 16)))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    data = load_folder(tmp_path)
    assert data.train is data.labelled and data.classes == ("Dog", "cat", "emu") and data.unlabelled == ""
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1, 2, 2] and data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.train.labels.dtype == torch.int64
    want = to_nchw(pixels[held_out])[[2, 3, 0, 1, 4, 5]]
    assert everything(data.test).equal(want)
    want = to_nchw(pixels["train"])[[2, 3, 0, 1, 4, 5]]
    assert everything(data.train)[[0, 1, 2, 3, 5, 6]].equal(want)
    assert (everything(data.train)[4] == torch.tensor([10, 120, 230])[:, None, None]).all()


def test_test_goes_before_val(tmp_path):
    pixels = labelled_folder(tmp_path, ("train", "test", "val"))
    assert everything(load_folder(str(tmp_path)).test).equal(to_nchw(pixels["test"]))


@pytest.mark.parametrize("part", ["", "train"])
def test_folder_without_classes(tmp_path, part):
    pixels = random_pixels(5, 16, 16, 3)
    for i, image in enumerate(pixels):
        save(tmp_path / part / f"{i}.png", image)
    data = load_folder(tmp_path)
    assert data.train.labels is None and data.labelled is None and data.test is None and data.classes == ()
    assert str(tmp_path) in data.unlabelled and "class" in sentence_without(tmp_path, data.unlabelled)
    assert everything(data.train).equal(to_nchw(pixels))


def test_folder_with_classes_but_nothing_to_test_on(tmp_path):
    pixels = labelled_folder(tmp_path, ["train"])
    data = load_folder(tmp_path)
    assert data.train.labels is None and data.labelled is None and data.test is None and data.classes == ()
    assert str(tmp_path) in data.unlabelled
    assert all(part in sentence_without(tmp_path, data.unlabelled) for part in ("test", "val"))
    assert everything(data.train).equal(to_nchw(pixels["train"]))


def test_folder_with_classes_but_no_train(tmp_path):
    labelled_folder(tmp_path, [""])
    data = load_folder(tmp_path)
    assert len(data.train) == 4 and data.train.labels is None and data.labelled is None and data.test is None
    assert "train" in sentence_without(tmp_path, data.unlabelled)             # "no class folders" would not be true


@pytest.mark.parametrize("part", ["test", "val"])
def test_folder_with_a_test_part_alone(tmp_path, part):
    """Its images are not to be trained on because of a mistyped name."""
    labelled_folder(tmp_path, ["trian", part])
    text = refusal(load_folder, tmp_path)
    assert f"{tmp_path / 'train'} is not a folder, but {tmp_path / part} is: add it, or" in text


def test_folder_with_a_test_part_without_classes(tmp_path):
    labelled_folder(tmp_path, ["train"])
    save(tmp_path / "test" / "1.png", plain())
    data = load_folder(tmp_path)
    assert len(data.train) == 4 and data.train.labels is None and data.labelled is None and data.test is None
    assert str(tmp_path / "test") in data.unlabelled


def test_hidden_files_and_folders_are_ignored(tmp_path):
    labelled_folder(tmp_path)
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"left behind by a Mac")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    data = load_folder(tmp_path)
    assert data.classes == ("cat", "dog") and data.train.labels.tolist() == [0, 0, 1, 1]


def test_the_pictures_of_a_run_are_no_images(tmp_path):
    """Of one below the folder that it was trained on, say."""
    mixed_folder(tmp_path, 2)
    n = len(load_folder(tmp_path).train)
    (tmp_path / "runs" / "simclr-folder-0").mkdir(parents=True)
    for name in ("args.json", "log.jsonl", "curve.png"):
        (tmp_path / "runs" / "simclr-folder-0" / name).write_bytes(b"")
    assert len(load_folder(tmp_path).train) == n


def test_links_to_folders_are_followed(tmp_path):
    pixels = labelled_folder(tmp_path / "elsewhere")
    for part in ("train", "test"):
        (tmp_path / "here" / part).mkdir(parents=True)
        for name in ("cat", "dog"):
            (tmp_path / "here" / part / name).symlink_to(tmp_path / "elsewhere" / part / name)
    data = load_folder(tmp_path / "here")
    assert everything(data.train).equal(to_nchw(pixels["train"])) and data.test.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("batch_size, world, steps", [(2, 1, 2), (3, 1, 1), (4, 2, 1), (5, 1, None), (3, 2, None)])
def test_steps_per_epoch(batch_size, world, steps):
    if steps is None:
        assert f"--batch-size {batch_size} " in refusal(Batches, range(4), batch_size, 0, 0, world)
    else:
        assert len(Batches(range(4), batch_size, 0, 0, world)) == steps


# ---- in memory and streamed


@WORKERS
def test_memory_and_disk_give_the_same_batches(tmp_path, workers):
    mixed_folder(tmp_path)
    memory, disk = (load_folder(tmp_path, 16, workers, gb).train for gb in (1, 0))
    assert memory.pixels is not None and disk.pixels is None
    order = epoch_order(23, 4, seed=5, epoch=1)
    a, b = list(memory.batches(order)), list(disk.batches(order))
    assert len(a) == len(b) == 5
    in_file_order = everything(load_folder(tmp_path).train)
    for x, y, want in zip(a, b, in_file_order[order]):
        assert x.dtype == y.dtype == torch.uint8 and x.shape == y.shape == (4, 3, 16, 16)
        assert x.equal(y) and x.equal(want)
    assert len({x.numpy().tobytes() for batch in a for x in batch}) == 20


@STREAMED
def test_many_images(tmp_path, cache_gb):
    """More than are decoded at a time."""
    pixels = random_pixels(600, 8, 8, 3)
    for i, image in enumerate(pixels):
        save(tmp_path / f"{i:03d}.bmp", image)
    assert everything(load_folder(tmp_path, 8, cache_gb=cache_gb).train, 128).equal(to_nchw(pixels))


@STREAMED
def test_at(tmp_path, cache_gb):
    mixed_folder(tmp_path, 6)
    images = load_folder(tmp_path, cache_gb=cache_gb).train
    index = torch.tensor([4, 0, 4])
    assert images.at(index).equal(everything(images)[index]) and images.at(index).device == CPU
    assert len(images) == 6 and not images.at(torch.tensor([0])).equal(images.at(torch.tensor([1])))


def test_cache_gb_is_the_limit_for_all_parts_together(tmp_path):
    labelled_folder(tmp_path)                                                 # 4 + 4 images of 3 x 16 x 16 bytes
    for cache_gb, kept in ((8 * 768e-9 + 1e-12, True), (8 * 768e-9 - 1e-9, False)):
        data = load_folder(tmp_path, cache_gb=cache_gb)
        assert (data.train.pixels is not None) == (data.test.pixels is not None) == kept


def test_only_the_streamed_need_their_files_later(tmp_path):
    mixed_folder(tmp_path, 3)
    memory, disk = (load_folder(tmp_path, cache_gb=gb).train for gb in (1, 0))
    before = everything(disk)
    (tmp_path / "01.png").unlink()
    assert everything(memory).equal(before)
    assert str(tmp_path / "01.png") in refusal(everything, disk)


@STREAMED
def test_random_state_is_left_alone(tmp_path, cache_gb):
    """Else weights and augmentation would depend on where the images are kept."""
    mixed_folder(tmp_path, 3)
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    everything(load_folder(tmp_path, cache_gb=cache_gb).train)
    epoch_order(10, 2, 0, 0)
    assert torch.rand(3).equal(want)


INTERRUPTED = """
import multiprocessing, os, signal, torch
from common.data import Decoder, stream
os.setsid()                                                                   # the signal is for this group alone
multiprocessing.set_start_method("fork")
signal.signal(signal.{signal}, lambda *_: print("asked to stop"))
batches = stream(Decoder({files!r}), 2, torch.arange(20).split(1))
first = [next(batches), next(batches)]                                        # one of each worker
os.killpg(0, signal.{signal})
print(len(first + list(batches)))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_workers_leave_signals_to_the_main_process(tmp_path, name):
    """A terminal's Ctrl-C goes to every process of the group, and so may SIGTERM. The images of the step that is
    finished and saved still arrive, and no worker runs the main process's handler. (With a fork server, Linux's way
    from Python 3.14 on, SIGTERM ends the server, and torch's workers end with it.)"""
    pixels = [np.full((8, 8, 3), i, np.uint8) for i in range(20)]
    files = [str(tmp_path / f"{i}.png") for i in range(20)]
    for path, x in zip(files, pixels):
        Image.fromarray(x).save(path)
    program = Program(["-c", INTERRUPTED.format(files=files, signal=name)], ROOT, tmp_path / "out", tmp_path / "err")
    assert program.wait(60) == 0
    assert ((tmp_path / "out").read_text(), (tmp_path / "err").read_text()) == ("asked to stop\n20\n", "")


def test_a_worker_that_cannot_send_its_images(tmp_path):
    """Here because its socket's path is too long, elsewhere because /dev/shm is full: a sentence, and no waiting."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "0.png")
    far = tmp_path / ("x" * 100)
    far.mkdir()
    code = (f"import multiprocessing\nfrom common import cli\nfrom common.data import Decoder, stream\n"
            f"multiprocessing.current_process()._config['tempdir'] = {str(far)!r}\n"         # of sockets
            f"cli.program(lambda: list(stream(Decoder([{str(tmp_path / '0.png')!r}]), 1)))")
    program = Program(["-c", code], ROOT, tmp_path / "out", tmp_path / "err")
    assert program.wait(60) == 2 and "Traceback" not in (tmp_path / "err").read_text()
    assert "a worker process could not send its images or was killed: lower --workers" in \
        (tmp_path / "err").read_text()


def test_source_can_be_sent_to_workers(tmp_path):
    """Worker processes that are not forked get a pickled copy."""
    mixed_folder(tmp_path, 2)
    source = load_folder(tmp_path, cache_gb=0).train.source
    assert pickle.loads(pickle.dumps(source))[1].equal(source[1])


# ---- the order of an epoch


@pytest.mark.parametrize("n, batch_size, steps", [(100, 10, 10), (103, 10, 10), (109, 10, 10), (10, 10, 1), (9, 10, 0)])
def test_epoch_order_has_no_duplicates_and_no_partial_batch(n, batch_size, steps):
    order = epoch_order(n, batch_size, seed=0, epoch=0)
    assert order.shape == (steps, batch_size) and order.dtype == torch.int64
    flat = order.flatten().tolist()
    assert len(set(flat)) == len(flat) and set(flat) <= set(range(n))
    assert steps < 2 or flat != sorted(flat)


@pytest.mark.parametrize("n", [20, 21, 39, 40])
def test_every_image_is_in_a_whole_batch(n):
    """In the order of the first epoch, then those that it leaves out, filled up with others; shared by processes."""
    order = epoch_order(n, 20, seed=3, epoch=0, every=True)
    assert order.shape == (-(-n // 20), 20) and set(order.flatten().tolist()) == set(range(n))
    assert order[: n // 20].equal(epoch_order(n, 20, 3, 0)) and all(len(set(row.tolist())) == 20 for row in order)
    parts = [epoch_order(n, 20, 3, 0, rank, 2, every=True) for rank in range(2)]
    assert torch.cat(parts, dim=1).equal(order)


def test_epochs_leave_out_different_images():
    left_out = [set(range(103)) - set(epoch_order(103, 10, 0, epoch).flatten().tolist()) for epoch in range(20)]
    assert all(len(out) == 3 for out in left_out) and len(set.union(*left_out)) > 20


def test_epoch_order_depends_on_seed_and_epoch_alone():
    torch.manual_seed(1)
    first = epoch_order(100, 10, seed=2, epoch=3)
    torch.manual_seed(2)
    assert epoch_order(100, 10, seed=2, epoch=3).equal(first)
    orders = {tuple(epoch_order(100, 10, seed, epoch).flatten().tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_partition_the_batch(world):
    whole = epoch_order(103, 8, seed=1, epoch=2)
    parts = [epoch_order(103, 8, 1, 2, rank, world) for rank in range(world)]
    assert all(part.shape == (12, 8 // world) for part in parts)
    assert torch.cat(parts, 1).sort(1).values.equal(whole.sort(1).values)


# ---- refusals


def test_missing_folder(tmp_path):
    text = refusal(load_folder, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in text and "--data-dir" in text and "train/CLASS" in text


def test_a_file_instead_of_a_folder(tmp_path):
    path = save(tmp_path / "a.png", plain())
    assert str(path) in refusal(load_folder, path)


@pytest.mark.parametrize("part", ["", "train", "train/cat"])
def test_no_images(tmp_path, part):
    (tmp_path / part).mkdir(parents=True, exist_ok=True)
    (tmp_path / part / "notes.txt").write_text("not an image")
    text = refusal(load_folder, tmp_path)
    assert str(tmp_path) in text and "no images" in text and ".jpg" in text


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_class(tmp_path, part):
    labelled_folder(tmp_path)
    for empty in ("train", "test"):
        (tmp_path / empty / "bird").mkdir()
    save(tmp_path / ("test" if part == "train" else "train") / "bird" / "1.png", plain())
    text = refusal(load_folder, tmp_path)
    assert str(tmp_path / part / "bird") in text and "no images" in text


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_in_one_part_alone(tmp_path, part):
    labelled_folder(tmp_path)
    save(tmp_path / part / "bird" / "1.png", plain())
    text = refusal(load_folder, tmp_path)
    assert "bird" in text and str(tmp_path / "train") in text and str(tmp_path / "test") in text
    assert "not in both" in text


def refused_file(root, path, workers, cache_gb):
    """The sentence about a broken file; streamed, it comes with the batch that has the file, not before. The workers
    have ended then."""
    others = set(multiprocessing.active_children())
    if cache_gb:
        text = refusal(load_folder, root, 16, workers, cache_gb)
    else:
        images = load_folder(root, 16, workers, cache_gb).train
        files = sorted(str(p) for p in root.rglob("*.*"))
        good = [i for i, file in enumerate(files) if file != str(path)]
        assert len(list(images.batches([torch.tensor(good)] * 2))) == 2
        text = refusal(everything, images)
    assert text.startswith(str(path)) and "cannot be read" in text and set(multiprocessing.active_children()) <= others
    return sentence_without(root, text)


@WORKERS
@STREAMED
def test_a_truncated_jpeg(tmp_path, workers, cache_gb):
    mixed_folder(tmp_path, 20)
    assert "truncated" in refused_file(tmp_path, truncated_jpeg(tmp_path / "11.jpg"), workers, cache_gb)


@STREAMED
def test_a_text_file_named_jpg(tmp_path, cache_gb):
    mixed_folder(tmp_path, 3)
    path = tmp_path / "01.jpg"
    path.write_text("<html>404 Not Found</html>\n")
    refused_file(tmp_path, path, 0, cache_gb)


@STREAMED
def test_an_empty_file(tmp_path, cache_gb):
    mixed_folder(tmp_path, 3)
    path = tmp_path / "01.jpg"
    path.touch()
    refused_file(tmp_path, path, 0, cache_gb)


@STREAMED
def test_an_unreadable_file(tmp_path, cache_gb):
    mixed_folder(tmp_path, 3)
    path = save(tmp_path / "01.jpg", plain())
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root may read every file")
    assert "ermission" in refused_file(tmp_path, path, 0, cache_gb)


def test_a_broken_test_image_is_refused_too(tmp_path):
    labelled_folder(tmp_path)
    path = truncated_jpeg(tmp_path / "test" / "dog" / "7.jpg")
    assert str(path) in refusal(load_folder, tmp_path)


# ---- data sets of torchvision, small, in their own formats, from the `web` fixture


def md5(data):
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def tar_gz(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def serve_archive(web, patch, kind, files):
    """Puts kind's archive onto the web and the checksums of its `files`, {name: bytes}, into the class."""
    archive = tar_gz({f"{kind.base_folder}/{name}": data for name, data in files.items()})
    web[kind.url] = archive
    patch(kind, "tgz_md5", md5(archive))
    for attribute in ("train_list", "test_list"):
        patch(kind, attribute, [[name, md5(files[name])] for name, _ in getattr(kind, attribute)])
    if hasattr(kind, "meta"):
        patch(kind, "meta", kind.meta | {"md5": md5(files[kind.meta["filename"]])})


def cifar(web, patch, kind, n_classes, key):
    pixels, labels = random_pixels(23, 3, 32, 32), [(7 * i + 3) % n_classes for i in range(23)]
    train = [name for name, _ in kind.train_list]
    bounds = np.linspace(0, 15, len(train) + 1).astype(int)
    slices = dict(zip(train, map(slice, bounds[:-1], bounds[1:]))) | {kind.test_list[0][0]: slice(15, None)}
    files = {name: pickle.dumps({"data": pixels[part].reshape(-1, 3072), key: labels[part]})
             for name, part in slices.items()}
    names = [f"class {i}" for i in range(n_classes)]
    serve_archive(web, patch, kind, files | {kind.meta["filename"]: pickle.dumps({kind.meta["key"]: names})})
    return 32, names, {"labelled": (pixels[:15], labels[:15]), "test": (pixels[15:], labels[15:])}


def cifar10(web, patch):
    return cifar(web, patch, datasets.CIFAR10, 10, "labels")


def cifar100(web, patch):
    return cifar(web, patch, datasets.CIFAR100, 100, "fine_labels")


def fashionmnist(web, patch):
    kind, parts, resources = datasets.FashionMNIST, {}, []
    for seed, (part, prefix, n) in enumerate([("labelled", "train", 11), ("test", "t10k", 5)]):
        pixels, labels = random_pixels(n, 28, 28, seed=seed), np.arange(n) * 3 % 10
        for name, data in ((f"{prefix}-images-idx3-ubyte.gz", struct.pack(">4i", 0x803, n, 28, 28) + pixels.tobytes()),
                           (f"{prefix}-labels-idx1-ubyte.gz", struct.pack(">2i", 0x801, n) + bytes(labels.tolist()))):
            web[kind.mirrors[0] + name] = gzip.compress(data)
            resources.append((name, md5(web[kind.mirrors[0] + name])))
        parts[part] = pixels[:, None].repeat(3, 1), labels
    patch(kind, "resources", resources)
    return 28, kind.classes, parts


def stl10(web, patch):
    names, files, parts = [f"class {i}" for i in range(10)], {}, {}
    kinds = [("train", "unlabeled", 7), ("labelled", "train", 5), ("test", "test", 4)]
    for seed, (part, prefix, n) in enumerate(kinds):
        pixels, labels = random_pixels(n, 3, 96, 96, seed=seed), np.arange(n) * 3 % 10
        files[f"{prefix}_X.bin"] = pixels.transpose(0, 1, 3, 2).tobytes()     # column by column
        if part == "train":
            labels = None
        else:
            files[f"{prefix}_y.bin"] = bytes((labels + 1).tolist())
        parts[part] = pixels, labels
    serve_archive(web, patch, datasets.STL10, files | {"class_names.txt": "\n".join(names).encode()})
    return 96, names, parts


def mat_element(kind, data):
    """Type, size and data; of at most 4 bytes in the small format."""
    if len(data) <= 4:
        return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def mat_file(arrays):
    """A file of MATLAB 5 as SVHN has it: compressed matrices of bytes or floats."""
    matrices = []
    for name, array in arrays:
        kind, of_array = {"u1": (2, 9), "f8": (9, 6)}[array.dtype.str[1:]]
        matrices.append(mat_element(14, b"".join([
            mat_element(6, struct.pack("<II", of_array, 0)),
            mat_element(5, struct.pack(f"<{array.ndim}i", *array.shape)),
            mat_element(1, name.encode()), mat_element(kind, array.tobytes(order="F"))])))
    header = b"MATLAB 5.0 MAT-file, by hand".ljust(116) + bytes(8) + struct.pack("<H", 0x0100) + b"IM"
    return header + b"".join(struct.pack("<II", 15, len(z)) + z for z in map(zlib.compress, matrices))


def svhn(web, patch):
    parts, split_list = {}, dict(datasets.SVHN.split_list)
    for seed, (part, split, n) in enumerate([("labelled", "train", 12), ("test", "test", 5)]):
        pixels, digits = random_pixels(n, 3, 32, 32, seed=seed), np.arange(n) % 10
        labels = np.where(digits == 0, 10, digits).astype(np.uint8 if split == "train" else float)
        url, filename, _ = split_list[split]
        web[url] = mat_file([("X", pixels.transpose(2, 3, 1, 0)), ("y", labels[:, None])])
        split_list[split] = [url, filename, md5(web[url])]
        parts[part] = pixels, digits
    patch(datasets.SVHN, "split_list", split_list)
    return 32, [str(digit) for digit in range(10)], parts


SETS = pytest.mark.parametrize("publish", [cifar10, cifar100, fashionmnist, stl10, svhn], ids=lambda f: f.__name__)


@SETS
def test_a_data_set_is_downloaded_once(tmp_path, monkeypatch, web, publish):
    image_size, names, parts = publish(web, monkeypatch.setattr)
    for _ in range(2):
        data = load(publish.__name__, tmp_path / "new", image_size, CPU, 0, 1)
        assert data.classes == tuple(names) and data.unlabelled == ""
        assert (data.train is data.labelled) == ("train" not in parts)        # STL-10 has more to train on
        for part, (pixels, labels) in parts.items():
            images = getattr(data, part)
            assert everything(images).equal(torch.from_numpy(pixels.copy()))
            assert images.labels is None if labels is None else images.labels.tolist() == list(labels)
            assert labels is None or images.labels.dtype == torch.int64
        web.clear()


def test_views_are_cut_from_all_of_stl10s_pixels(tmp_path, monkeypatch, web):
    """And not from images that were resized to the views' size before; they are evaluated at that size."""
    stl10(web, monkeypatch.setattr)
    data = load("stl10", tmp_path, 64, CPU, 0, 1, store_size=128)
    assert data.train.shape == (3, 96, 96) and (data.train.aspect == 1).all() and data.train.labels is None
    assert len(data.train) == len(data.centred) == 7 and data.centred.shape == data.test.shape == (3, 64, 64)
    assert load("stl10", tmp_path, 96, CPU, 0, 1, store_size=192).train.shape == (3, 96, 96)


@SETS
@WORKERS
def test_a_data_set_can_be_streamed_and_resized(tmp_path, monkeypatch, web, publish, workers):
    publish(web, monkeypatch.setattr)
    memory, disk = (load(publish.__name__, tmp_path, 20, CPU, workers, gb) for gb in (1, 0))
    assert memory.test.pixels is not None and disk.test.pixels is None
    assert everything(disk.test, 2).equal(everything(memory.test, 2)) and disk.test.labels.equal(memory.test.labels)
    assert pickle.loads(pickle.dumps(disk.test.source))[0].equal(disk.test.source[0])


@SETS
def test_a_damaged_data_set_is_refused(tmp_path, monkeypatch, web, publish):
    image_size, _, _ = publish(web, monkeypatch.setattr)
    load(publish.__name__, tmp_path, image_size, CPU, 0, 1)
    web.clear()
    for archive in tmp_path.glob("*.tar.gz"):
        archive.unlink()                                                      # torchvision would unpack it again
    for path in tmp_path.rglob("t*"):                                         # each data set has its test part in one
        if path.is_file():
            path.write_bytes(b"")
    assert str(tmp_path) in refusal(load, publish.__name__, tmp_path, image_size, CPU, 0, 1)


def test_svhn_is_checked_like_the_others(tmp_path, monkeypatch, web):
    """Its files are not read by torchvision."""
    svhn(web, monkeypatch.setattr)
    (train_url, train_file, _), (test_url, test_file, _) = (datasets.SVHN.split_list[s] for s in ("train", "test"))
    good, web[test_url] = web[test_url], web[train_url]
    assert "corrupted" in refusal(load, "svhn", tmp_path, 32, CPU, 0, 1)      # not what should be there
    web[test_url] = good
    assert len(load("svhn", tmp_path, 32, CPU, 0, 1).test) == 5
    (tmp_path / test_file).write_bytes((tmp_path / train_file).read_bytes())
    web.clear()
    assert "no network" in refusal(load, "svhn", tmp_path, 32, CPU, 0, 1)


@pytest.mark.parametrize("name", HOMES)
def test_no_files_and_no_network(tmp_path, name, capsys):
    text = refusal(load, name, tmp_path / "data", 32, CPU, 0, 1)
    text += capsys.readouterr().out * ("Error downloading" in text)           # older torchvision prints the reason
    for needed in (f"--dataset {name} ", str(tmp_path / "data"), HOMES[name], "--dataset shapes", "--dataset folder",
                   "no network here"):
        assert needed in text


def test_every_data_set_that_is_downloaded_has_a_home():
    assert set(HOMES) == set(NAMES) - {"shapes", "patterns", "folder"}


@pytest.mark.parametrize("size, start", [(12, "bce146f09035108e"), (32, "1765f27eeeba15e4")])
def test_shapes_are_the_same_bytes_on_every_machine(size, start):
    pixels, labels = shapes.draw(200, size, 0)
    assert hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest().startswith(start)


def test_batches_go_on_at_any_step(tmp_path):
    """From a step on an epoch is what it would have been: which images, and their pixels."""
    mixed_folder(tmp_path)
    batches = Batches(load_folder(tmp_path).train, 4, seed=3)
    whole, rest = list(batches.epoch(2)), list(batches.epoch(2, 3))
    assert [step for step, _, _ in whole] == [0, 1, 2, 3, 4] and [step for step, _, _ in rest] == [3, 4]
    for (_, index, x), (_, index_2, x_2) in zip(whole[3:], rest):
        assert index.equal(index_2) and x.equal(x_2) and x.equal(everything(batches.images)[index])


def test_views_are_cut_from_the_whole_photograph(tmp_path):
    """For training a folder's images are kept whole, squashed to a square; the probe sees them centre-cropped."""
    pixels = random_pixels(30, 60, 3)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            save(tmp_path / part / name / "a.png", pixels)
            save(tmp_path / part / name / "tall.png", pixels.transpose(1, 0, 2))
    data, plain = (load("folder", tmp_path, 16, CPU, 0, 1.0, store_size=size) for size in (32, None))
    assert data.train.shape == (3, 32, 32) and data.train.aspect.tolist() == [2.0, 0.5, 2.0, 0.5]
    whole = TF.resize(Image.fromarray(pixels), [32, 32])
    assert data.train.at(torch.tensor([0]))[0].equal(TF.pil_to_tensor(whole))
    for images in (data.centred, data.labelled, data.test, plain.train):
        assert everything(images).equal(everything(plain.train)) and images.aspect.tolist() == [1.0] * 4
    assert load("folder", tmp_path, 16, CPU, 0, 1.0, store_size=500).train.shape == (3, 60, 60)   # all there is
    unlabelled = load("folder", tmp_path / "train", 16, CPU, 0, 1.0, store_size=32)
    assert unlabelled.train.shape == (3, 32, 32) and everything(unlabelled.centred).equal(everything(plain.train))


def test_square_images_of_the_size_are_kept_once(tmp_path):
    labelled_folder(tmp_path)
    data = load("folder", tmp_path, 16, CPU, 0, 1.0, store_size=32)
    assert data.train is data.labelled is data.centred


def test_a_strip_is_cropped_to_what_it_has(tmp_path):
    """Of a photograph of 1 by 100 a crop could lie between two rows of the pixels that are kept, and be of none."""
    save(tmp_path / "strip.png", random_pixels(4, 400, 3))
    images = load("folder", tmp_path, 16, CPU, 0, 1.0, store_size=64).train
    assert images.aspect.tolist() == [8.0]
    x = images.at(torch.zeros(64, dtype=torch.int64))
    crops = augment.random_resized_crop(augment.Random(0), x.shape, 16, (0.08, 1.0), images.aspect.expand(64))
    assert augment.apply(x, crops).isfinite().all()


def test_a_turned_photograph_has_its_turned_aspect(tmp_path):
    image = Image.fromarray(random_pixels(30, 60, 3))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load("folder", tmp_path, 16, CPU, 0, 1.0, store_size=32).train.aspect.tolist() == [0.5]
