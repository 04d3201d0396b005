# SPDX-License-Identifier: MIT
"""common/augment.py against torchvision's functional operations, one image at a time."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torchvision import transforms

from common import augment

SIZES = [(32, 32), (20, 37), (33, 18)]                                        # height, width
N = 12


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors as small as these are slower on several threads, ten times where other work is on the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(n, height, width, seed=0):
    """(n, 3, H, W) random images; the first ones are hard for HSV: black, white, grey, primaries, 8-bit values."""
    x = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))
    x[0], x[1], x[2] = 0, 1, x[2, :1].clone()
    x[3] = x[3].round()
    x[4:] = (255 * x[4:]).round() / 255
    return x


def spread(low, high, n=N, seed=1):
    """(n,) parameters over [low, high], both ends among them, in random order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return torch.linspace(low, high, n)[order]


def one_by_one(operation, x, *parameters):
    """operation(image, *its own parameters as Python numbers) of each image."""
    return torch.stack([operation(image, *p) for image, *p in zip(x, *(p.tolist() for p in parameters))])


def check(ours, theirs, x, *parameters, atol=2e-6):
    """ours on the batch equals theirs one image at a time, and leaves its input as it was."""
    before = x.clone()
    result = ours(x, *parameters)
    assert torch.equal(x, before)
    torch.testing.assert_close(result, one_by_one(theirs, x, *parameters), rtol=0, atol=atol)


def random_boxes(height, width, n=N, seed=2):
    """n boxes of whole pixels inside the image, the whole image and single pixels in two corners among them."""
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, height + 1, n), rng.integers(1, width + 1, n)
    h[:3], w[:3] = (height, 1, 1), (width, 1, 1)
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    top[1:3], left[1:3] = (0, height - 1), (0, width - 1)
    return tuple(torch.from_numpy(p).float() for p in (top, left, h, w))


# ---- geometry


@pytest.mark.parametrize("size", [1, 8, 32, 65])
@pytest.mark.parametrize("height, width", SIZES)
def test_resized_crop(height, width, size):
    """Each image's own box, resized as torchvision's with antialiasing, whether an axis shrinks or grows."""
    boxes = random_boxes(height, width)
    if size == 8:
        assert all((p > size).any() and (p < size).any() for p in boxes[2:])
    check(lambda x, *boxes: augment.resized_crop(x, *boxes, size),
          lambda image, *box: TF.resized_crop(image, *map(int, box), [size, size], antialias=True),
          pictures(N, height, width), *boxes, atol=5e-6)


@pytest.mark.parametrize("height, width", [(256, 341), (96, 64)])
def test_resized_crop_to_224(height, width):
    """The same at ImageNet's output size, from larger and from smaller images."""
    check(lambda x, *boxes: augment.resized_crop(x, *boxes, 224),
          lambda image, *box: TF.resized_crop(image, *map(int, box), [224, 224], antialias=True),
          pictures(6, height, width), *random_boxes(height, width, 6), atol=2e-5)


def test_resized_crop_of_the_same_size_is_the_image():
    """The whole image at its own size comes back bitwise."""
    x, zero, side = pictures(N, 32, 32), torch.zeros(N), torch.full((N,), 32.0)
    assert torch.equal(augment.resized_crop(x, zero, zero, side, side, 32), x)


@pytest.mark.parametrize("height, width", SIZES)
def test_horizontal_flip(height, width):
    """Images in the mask are mirrored left to right, the others are as they were."""
    mask = torch.arange(N) % 3 == 0
    mirrored = lambda x, mask: augment.apply(x, augment.where(mask, lambda part: part.flip(3)))
    check(mirrored, lambda image, flip: TF.hflip(image) if flip else image, pictures(N, height, width), mask, atol=0)


@pytest.mark.parametrize("height, width", SIZES)
def test_shift(height, width):
    """Positive is down and right; what comes in is numpy's 'reflect' padding, as far as the whole image."""
    down, right = spread(1 - height, height - 1).round(), spread(1 - width, width - 1, seed=2).round()
    down[:2], right[:2] = torch.tensor([0, 3]), torch.tensor([0, -2])

    def theirs(image, down, right):
        down, right = int(down), int(right)
        padded = np.pad(image.numpy(), [(0, 0), (height - 1,) * 2, (width - 1,) * 2], mode="reflect")
        top, left = height - 1 - down, width - 1 - right
        return torch.from_numpy(padded[:, top : top + height, left : left + width])
    check(augment.shift, theirs, pictures(N, height, width), down, right, atol=0)


@pytest.mark.parametrize("kernel_size", [1, 3, 9, 23])
@pytest.mark.parametrize("height, width", SIZES)
def test_gaussian_blur(height, width, kernel_size):
    """Each image's own sigma, borders mirrored as torchvision's."""
    check(lambda x, sigma: augment.gaussian_blur(x, sigma, kernel_size),
          lambda image, sigma: TF.gaussian_blur(image, kernel_size, sigma),
          pictures(N, height, width), spread(0.1, 5.0))


# ---- colour


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation"])
def test_adjust(name, height, width):
    """Factors from 0 (black, flat, grey) past 1 (the image itself) to far beyond, where values clamp."""
    factor = spread(0.0, 3.0)
    factor[3] = 1.0
    check(getattr(augment, name), getattr(TF, name), pictures(N, height, width), factor)


@pytest.mark.parametrize("height, width", SIZES)
def test_adjust_hue(height, width):
    """Turns from one end of the circle to the other, on greys and on ties between channels too."""
    x = pictures(N, height, width)
    for seed in range(3):                                                     # the hard images get several turns
        check(augment.adjust_hue, TF.adjust_hue, x, spread(-0.5, 0.5, seed=seed))
    check(augment.adjust_hue, TF.adjust_hue, x, torch.zeros(N))
    turns = spread(-0.5, 0.5)
    for whole in (-1, 1, 3):                                                  # whole turns, as of --jitter 20
        assert torch.allclose(augment.adjust_hue(x, turns + whole), augment.adjust_hue(x, turns), atol=1e-5)


@pytest.mark.parametrize("height, width", SIZES)
def test_grayscale(height, width):
    """torchvision's luma, in all three channels."""
    check(augment.grayscale, lambda image: TF.rgb_to_grayscale(image, 3), pictures(N, height, width))


@pytest.mark.parametrize("height, width", SIZES)
def test_color_jitter(height, width):
    """Each image's own factors in its own order; the 24 images of the batch have the 24 orders."""
    order = torch.tensor(list(itertools.permutations(range(4))))
    n = len(order)
    factors = torch.stack([spread(*bounds, n, seed) for seed, bounds in
                           enumerate([(0.2, 1.8), (0.2, 1.8), (0.2, 1.8), (-0.2, 0.2)])], dim=1)
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)

    def theirs(image, factors, order):
        for which in order:
            image = operations[which](image, factors[which])
        return image
    def ours(x, factors, order):
        return augment.apply(x, augment.color_jitter(factors, order, torch.ones(n, dtype=torch.bool)))
    check(ours, theirs, pictures(n, height, width), factors, order, atol=1e-5)


# ---- random parameters


def largest_gap(a, b):
    """Largest difference of two samples' distribution functions (Kolmogorov and Smirnov's)."""
    a, b = a.double().sort().values, b.double().sort().values
    values = torch.cat([a, b])
    share = [torch.searchsorted(sample, values, right=True) / len(sample) for sample in (a, b)]
    return float((share[0] - share[1]).abs().max())


@pytest.mark.parametrize("height, width, scale, ratio", [
    (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
    (96, 96, (0.2, 1.0), (3 / 4, 4 / 3)),
    (40, 64, (0.08, 1.0), (0.5, 3.0)),
    (6, 60, (0.1, 1.0), (3 / 4, 4 / 3)),                                      # about half the images fit in no try
])
def test_crop_boxes_have_torchvisions_distribution(height, width, scale, ratio):
    """Share of the area, log aspect ratio and place are distributed as RandomResizedCrop's, by all their quantiles."""
    ours = augment.crop_boxes(augment.Random(0), 60_000, height, width, scale, ratio)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.empty(3, height, width)
        draws = [transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(6000)]
    theirs = torch.tensor(draws, dtype=torch.float32).unbind(1)
    for measure in (lambda top, left, h, w: h * w, lambda top, left, h, w: (w / h).log(),
                    lambda top, left, h, w: top, lambda top, left, h, w: left):
        assert largest_gap(measure(*ours), measure(*theirs)) < 0.0265         # chance exceeds it once in 1000


@pytest.mark.parametrize("height, width, scale, ratio, box", [
    (4, 200, (0.08, 1.0), (3 / 4, 4 / 3), (0, 97, 4, 5)),
    (200, 4, (0.08, 1.0), (3 / 4, 4 / 3), (97, 0, 5, 4)),
    (20, 22, (1.5, 2.0), (3 / 4, 4 / 3), (0, 0, 20, 22)),                     # a whole image within the bounds
    (1, 9, (0.5, 1.0), (0.5, 2.0), (0, 3, 1, 2)),
])
def test_crop_boxes_fall_back_to_the_centre(height, width, scale, ratio, box):
    """Where no try fits, the box is the centre cut to the ratio's bounds, torchvision's to the pixel."""
    assert transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), scale, ratio) == box
    boxes = torch.stack(augment.crop_boxes(augment.Random(0), 50, height, width, scale, ratio), dim=1)
    assert boxes.tolist() == [list(box)] * 50


@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (4, 200), (32, 32), (33, 7), (224, 300)])
def test_crop_boxes_lie_inside(height, width):
    """Whole pixels, at least one of them, nothing outside; on small images every edge is reached."""
    top, left, h, w = augment.crop_boxes(augment.Random(3), 5000, height, width)
    for low, length, size in ((top, h, height), (left, w, width)):
        assert torch.equal(low, low.round()) and torch.equal(length, length.round())
        assert low.min() >= 0 and length.min() >= 1 and (low + length).max() <= size
    if max(height, width) <= 32:
        assert top.min() == 0 and left.min() == 0 and (top + h).max() == height and (left + w).max() == width


@pytest.mark.parametrize("strength", [(0.4, 0.3, 0.2, 0.1), (0.8, 1.0, 1.5, 0.5)])
def test_jitter_parameters(strength):
    """Factors uniform over ColorJitter's own bounds and independent, the 24 orders equally likely."""
    n = 24_000
    theirs = transforms.ColorJitter(*strength)
    bounds = [theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue]
    factors, order = augment.jitter_parameters(augment.Random(0), n, *strength)
    assert factors.shape == order.shape == (n, 4)
    for column, (low, high) in zip(factors.unbind(1), bounds):
        assert low - 1e-6 <= column.min() and column.max() <= high + 1e-6
        assert largest_gap(column, torch.linspace(low, high, n)) < 0.013      # chance exceeds it once in 1000
    correlation = torch.corrcoef(torch.cat([factors, order.float()], dim=1).T)
    assert correlation[:4].fill_diagonal_(0).abs().max() < 0.03
    kinds, counts = order.unique(dim=0, return_counts=True)
    assert torch.equal(kinds, torch.tensor(list(itertools.permutations(range(4)))))
    assert ((counts - n / 24) ** 2 / (n / 24)).sum() < 49.7                   # chi square, 23 degrees: once in 1000


def test_random_is_uniform_and_seeded():
    """Bounds are kept and filled, a seed repeats, another differs, later draws differ, n images come first."""
    u = augment.Random(0).uniform(10_000, 2, low=-3.0, high=5.0)
    assert u.shape == (10_000, 2) and u.min() >= -3 and u.max() <= 5
    assert largest_gap(u.flatten(), torch.linspace(-3, 5, 20_000)) < 0.014
    a, b, c = augment.Random(1), augment.Random(1), augment.Random(2)
    first = a.uniform(8)
    assert torch.equal(first, b.uniform(8)) and not torch.equal(first, c.uniform(8))
    assert not torch.equal(first, a.uniform(8))


def test_random_leaves_the_global_generator_alone():
    """Drawing views neither reads nor moves torch's own generator."""
    before = torch.get_rng_state()
    augment.crop_boxes(augment.Random(0), 4, 8, 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_state_round_trip():
    """A state taken now and loaded later, into a generator of another seed, repeats what followed it."""
    rng = augment.Random(0)
    rng.uniform(5)
    state = rng.state_dict()
    expected = rng.uniform(7, 3)
    other = augment.Random(99)
    other.uniform(2)
    other.load_state_dict(state)
    assert torch.equal(other.uniform(7, 3), expected)
    assert torch.equal(other.uniform(2), rng.uniform(2))


def recipe(rng, n, x):
    """Views by every operation with drawn parameters, as a script would."""
    steps = augment.random_resized_crop(rng, x.shape, 24, (0.08, 1.0))
    steps += augment.random_horizontal_flip(rng, n)
    steps += augment.random_shift(rng, n, 4)
    steps += augment.random_color_jitter(rng, n, 0.8, 0.8, 0.8, 0.2, p=0.8)
    steps += augment.random_grayscale(rng, n, p=0.2)
    return augment.apply(x, steps + augment.random_gaussian_blur(rng, n, 5, p=0.5))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_draw_what_one_process_draws(world):
    """Concatenated over ranks, numbers and views are those of world 1, draw after draw, and so is the state."""
    n, x = 16, pictures(16, 32, 32)
    one, ranks = augment.Random(5), [augment.Random(5, rank, world) for rank in range(world)]
    for _ in range(2):
        assert torch.equal(torch.cat([rng.uniform(n // world, 3) for rng in ranks]), one.uniform(n, 3))
        views = [recipe(rng, n // world, part) for rng, part in zip(ranks, x.chunk(world))]
        torch.testing.assert_close(torch.cat(views), recipe(one, n, x), rtol=0, atol=1e-6)
    for rng in ranks:
        assert torch.equal(rng.state_dict()["generator"], one.state_dict()["generator"])


# ---- apply, where


def test_where():
    """Masked images get the operation with their own parameters; the others and the input stay bitwise the same."""
    x, factor = pictures(N, 9, 7), spread(0.1, 0.9)
    mask, before = torch.arange(N) % 3 != 1, x.clone()
    result = augment.apply(x, augment.where(mask, augment.adjust_brightness, factor))
    assert torch.equal(x, before)
    assert torch.equal(result[~mask], x[~mask])
    assert torch.equal(result[mask], augment.adjust_brightness(x, factor)[mask])
    assert not torch.equal(result[mask], x[mask])


def test_where_spends_nothing_on_the_others():
    """The operation sees just the masked images, and is not called for none."""
    seen = []
    x = pictures(N, 9, 7)
    augment.apply(x, augment.where(torch.arange(N) < 4, lambda part: seen.append(part) or part))
    result = augment.apply(x, augment.where(torch.zeros(N, dtype=torch.bool), lambda part: seen.append(part) or part))
    assert len(seen) == 1 and torch.equal(seen[0], x[:4])
    assert torch.equal(result, x) and result.data_ptr() != x.data_ptr()


def test_apply_gives_each_step_its_own_parameters():
    """In order and of any shape, whole numbers exactly; bytes come out as shares of 255."""
    x, seen = torch.randint(0, 256, (N, 3, 4, 4), dtype=torch.uint8), []
    parameters = torch.rand(N), torch.arange(2**24 - N, 2**24), torch.rand(2, 3, 1)
    result = augment.apply(x, [(lambda x, a, b: seen.extend([a, b]) or 2 * x, *parameters[:2]), (lambda x: x + 1,),
                               (lambda x, a: seen.append(a) or x, parameters[2])])
    assert torch.equal(result, 2 * (x / 255) + 1)
    assert all(torch.equal(ours.to(true.dtype), true) for ours, true in zip(seen, parameters, strict=True))


# ---- device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_cpu():
    """The same seed gives the same views on a GPU, for every operation and for all of them in a row."""
    x, precision = pictures(N, 40, 33), torch.get_float32_matmul_precision()
    on_gpu = x.cuda()
    try:
        torch.set_float32_matmul_precision("highest")                         # else TF32 may round resampling to 1e-3
        for name, *parameters in (
                ("resized_crop", *random_boxes(40, 33), 24),
                ("shift", spread(-9, 9).round(), spread(-5, 5, seed=2).round()), ("grayscale",),
                ("gaussian_blur", spread(0.1, 3.0), 7), ("adjust_brightness", spread(0, 2)),
                ("adjust_contrast", spread(0, 2)), ("adjust_saturation", spread(0, 2)),
                ("adjust_hue", spread(-0.5, 0.5))):
            result = getattr(augment, name)(on_gpu, *(p.cuda() if torch.is_tensor(p) else p for p in parameters))
            assert result.is_cuda, name
            torch.testing.assert_close(result.cpu(), getattr(augment, name)(x, *parameters), rtol=0, atol=1e-5)
        views = recipe(augment.Random(7), N, on_gpu)
        torch.testing.assert_close(views.cpu(), recipe(augment.Random(7), N, x), rtol=0, atol=5e-5)
    finally:
        torch.set_float32_matmul_precision(precision)


# ---- views cut from the whole photograph, which is kept squashed to a square


def photograph(width, height, seed):
    """A smooth image with edges and some grain, as a camera gives it: uint8 (3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(1, 3, 12, 16, generator=generator), (height, width), mode="bicubic")[0]
    x[:, height // 3 :, width // 4 : width // 2] += 0.3 * (torch.arange(width // 2 - width // 4) // 9 % 2)
    x += 0.02 * torch.randn(3, height, width, generator=generator)
    return (255 * x.clamp(0, 1)).byte()


@pytest.mark.parametrize("width, height, bound", [(500, 375, 2.0), (375, 500, 2.0), (640, 240, 3.0), (448, 448, 1e-4)])
def test_crops_of_a_squashed_photograph_are_torchvisions_of_the_original(width, height, bound):
    """With the same box, to half a pixel: on average within 2 of 255 (a panorama: 3, a square of the stored size: the
    same), for boxes of 8 % to all of the area, at 224 from 448 pixels."""
    original = photograph(width, height, 0)
    stored = TF.resize(TF.to_pil_image(original), [448, 448])
    stored = TF.pil_to_tensor(stored)[None].expand(12, -1, -1, -1).float() / 255
    aspect = torch.full((12,), width / height)
    ours = augment.apply(stored, augment.random_resized_crop(augment.Random(3), stored.shape, 224, (0.08, 1.0), aspect))
    tall, wide = (round(448 / min(1, width / height)), round(448 * max(1, width / height)))
    boxes = augment.crop_boxes(augment.Random(3), 12, tall, wide, (0.08, 1.0))
    gaps = []
    for view, top, left, h, w in zip(ours, *boxes):
        box = [round(float(v) * scale) for v, scale in ((top, height / tall), (left, width / wide), (h, height / tall),
                                                        (w, width / wide))]
        theirs = TF.resized_crop(original.float() / 255, *box, [224, 224], antialias=True)
        gaps.append(255 * (view - theirs).abs().mean().item())
    assert sum(gaps) / len(gaps) < bound and max(gaps) < 2 * bound


def test_squares_are_cropped_as_before():
    x = torch.rand(16, 3, 20, 20)
    ours, before = (augment.apply(x, augment.random_resized_crop(augment.Random(0), x.shape, 16, (0.1, 1.0), aspect))
                    for aspect in (torch.ones(16), None))
    assert torch.equal(ours, before)


@pytest.mark.parametrize("aspect", [4 / 3, 0.5, 1.0])
def test_every_pixel_of_the_photograph_can_be_seen_and_proportions_are_kept(aspect):
    """By gradient, over many views; and a box is as wide as high in the photograph, on average."""
    x = torch.zeros(2000, 1, 24, 24, requires_grad=True)
    aspects = torch.full((2000,), aspect)
    views = augment.apply(x, augment.random_resized_crop(augment.Random(0), x.shape, 8, (0.08, 1.0), aspects))
    seen = torch.autograd.grad(views.sum(), x)[0].abs().sum(dim=(0, 1)) > 0
    assert seen.float().mean() == 1
    ramps = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij"))[None] / 64
    ramps = ramps.expand(2000, -1, -1, -1)
    views = augment.apply(ramps, augment.random_resized_crop(augment.Random(1), ramps.shape, 8, (0.05, 0.1), aspects))
    tall = (views[:, 0, -1] - views[:, 0, 0]).mean(1)
    wide = (views[:, 1, :, -1] - views[:, 1, :, 0]).mean(1)
    assert (aspect * wide / tall).log().mean().abs() < 0.05


@pytest.mark.parametrize("side, aspect, least", [(8, 8.0, 0.08), (16, 1 / 8, 0.01), (64, 8.0, 0.001)])
def test_the_thinnest_crop_has_a_pixel(side, aspect, least):
    x = torch.rand(500, 3, side, side)
    steps = augment.random_resized_crop(augment.Random(0), x.shape, 8, (least, 1.0), torch.full((500,), aspect))
    assert augment.apply(x, steps).isfinite().all()
    start = torch.tensor([0.5, 0.0, 3.0])
    assert augment.crop_matrix(start, torch.ones(3), 4, 2).sum(dim=2).allclose(torch.ones(3, 2))
