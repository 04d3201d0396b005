# SPDX-License-Identifier: MIT
"""Augmentation of a whole batch at once, with separate parameters for each image.

Images x are (N, 3, H, W) floats in [0, 1] on any device. The `random_` functions draw parameters as torchvision's
transforms do, but on the CPU, so that a seed gives the same views on every device. They return lists of steps,
(operation, *parameters); `apply` sends the parameters of all steps to the device at once and runs them. With the same
parameters, operations agree with the functions of the same name (if any) in `torchvision.transforms.functional`. The
recipes are in the scripts.
"""
import functools
import itertools

import torch
import torch.nn.functional as F


class Random:
    """Uniform random numbers for the images of a batch, from one seeded generator. Each of several processes draws for
    the whole batch and keeps the part of its own images, so the views are those of one process with the whole batch."""

    def __init__(self, seed, rank=0, world=1):
        self.generator = torch.Generator().manual_seed(seed)
        self.rank, self.world = rank, world

    def uniform(self, n, *shape, low=0.0, high=1.0):
        """(n, *shape) floats in [low, high) for this process's n images."""
        u = torch.rand(n * self.world, *shape, generator=self.generator)
        return low + (high - low) * u[self.rank * n : (self.rank + 1) * n]

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def send(x, device):
    """x on the device. To CUDA it is sent asynchronously from pinned memory; on other devices torch might then free x
    before it is read (pytorch issue 189690)."""
    copied = device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if copied else x.to(device)


def apply(x, steps):
    """Applies the steps to x (N, C, H, W), uint8 or floats in [0, 1]: floats on x's device. x itself does not change.
    Parameters are sent as float32, in which integers below 2^24 are exact. An operation may write into its x, and may
    return a different number of images."""
    flat = [torch.empty(0), *(p.float().flatten() for _, *parameters in steps for p in parameters)]
    _, *sent = send(torch.cat(flat), x.device).split([len(p) for p in flat])
    x = x.float() / 255 if x.dtype == torch.uint8 else x.clone()
    with torch.autocast(x.device.type, enabled=False):                        # bf16 has too few digits for pixels
        for operation, *parameters in steps:
            x = operation(x, *(sent.pop(0).view(p.shape) for p in parameters))
    return x


def where(mask, operation, *parameters):
    """A list of one step, which applies the operation only to the images where mask (N,) is true, or an empty list if
    there are none: the other images cost nothing."""
    def replace(x, index, *parameters):
        index = index.long()
        return x.index_copy_(0, index, operation(x.index_select(0, index), *parameters))
    index = mask.nonzero()[:, 0]                                              # on the CPU, so no synchronisation
    return [(replace, index, *(p[index] for p in parameters))] if len(index) else []


# ---- geometry: resampling along rows and columns is linear, so it is a matrix for each image and axis


def resample(x, rows, columns):
    """Resamples x (N, C, H, W) by rows (N, H', H) and columns (N, W', W) to (N, C, H', W')."""
    x = x.flatten(1, 2) @ columns.transpose(1, 2)                             # (N, C H, W')
    return rows[:, None] @ x.unflatten(1, (-1, rows.shape[2]))


def crop_matrix(start, length, size, out):
    """The matrix (N, out, size) that crops an axis of `size` pixels to start..start + length, (N,) each, and resizes it
    to `out` pixels; rows sum to 1. Bilinear with torchvision's antialias filter, a triangle whose half width is one
    output pixel when shrinking, otherwise one input pixel."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / out                                                      # (N, 1, 1) input pixels per output pixel
    position = torch.arange(size, device=start.device) + 0.5 - start          # (N, 1, size) from the crop's edge
    centre = scale * (torch.arange(out, device=start.device)[:, None] + 0.5)  # (N, out, 1)
    weight = (position - centre).abs_().div_(-scale.clamp(min=1)).add_(1).clamp_(min=0)
    weight.mul_((position >= 0) & (position <= length))                       # nothing from outside the crop
    return weight.div_(weight.sum(dim=2, keepdim=True))


def resized_crop(x, top, left, height, width, size):
    """Crops each image to its own box, (N,) in pixels, and resizes it to size x size with antialiasing."""
    return resample(x, crop_matrix(top, height, x.shape[2], size), crop_matrix(left, width, x.shape[3], size))


def crop_boxes(rng, n, height, width, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """n random boxes as drawn by torchvision's RandomResizedCrop: top, left, height, width, each (n,) floats.

    height, width: of all images, or (n,) of each. The share of the area is uniform in `scale` and the aspect ratio
    log-uniform in `ratio`; the first of ten tries that fits is taken, else the whole image (cropped to the ratio).
    """
    whole = torch.stack([torch.as_tensor(side, dtype=torch.float32).expand(n) for side in (height, width)])   # (2, n)
    area = whole.prod(dim=0)[:, None] * rng.uniform(n, 10, low=scale[0], high=scale[1])       # (n, 10)
    low, high = torch.tensor(ratio).log().tolist()
    aspect = rng.uniform(n, 10, low=low, high=high).exp()
    size = torch.stack([area / aspect, area * aspect]).sqrt().round()         # (2, n, 10) height and width
    fits = ((size > 0) & (size <= whole[:, :, None])).all(dim=0)              # (n, 10)
    first, any_fits = fits.int().argmax(dim=1), fits.any(dim=1)               # (n,), 0 where none fits; (n,)
    cut = torch.minimum(whole, torch.stack([whole[1] / ratio[0], whole[0] * ratio[1]]).round())
    size = torch.where(any_fits, size[:, torch.arange(n), first], cut)        # (2, n)
    start = torch.stack([rng.uniform(n), rng.uniform(n)]) * (whole - size + 1)
    start = torch.where(any_fits, start, (whole - size) / 2).floor()          # the whole image is centred
    return *start, *size


def random_resized_crop(rng, shape, size, scale, aspect=None, ratio=(3 / 4, 4 / 3)):
    """A random crop of each image, with a share of its area in `scale` and a shape in `ratio`, resized to size x size.

    shape: of x. aspect: (N,), width / height of the photographs that were resized whole to the squares x (None: 1). The
    share and the shape of a crop refer to the photograph.
    """
    n, _, height, width = shape
    aspect = torch.ones(n) if aspect is None else aspect
    tall, wide = (height / aspect.clamp(max=1)).round(), (width * aspect.clamp(min=1)).round()
    top, left, h, w = crop_boxes(rng, n, tall, wide, scale, ratio)
    h, w = (h * height / tall).clamp(min=1), (w * width / wide).clamp(min=1)  # thinner, it might miss all pixels
    top, left = torch.minimum(top * height / tall, height - h), torch.minimum(left * width / wide, width - w)
    return [(functools.partial(resized_crop, size=size), top, left, h, w)]


def random_horizontal_flip(rng, n):
    """Mirrors half of the images."""
    return where(rng.uniform(n) < 0.5, lambda x: x.flip(3))


def shift(x, down, right):
    """Shifts each image by an integer number of pixels (N,), negative for up and left, with mirrored borders."""
    def matrix(size, by):                                                     # (N, to, from)
        place = torch.arange(size, device=x.device)
        source = (place - by[:, None]).abs()                                  # -1 is 1: the edge is not repeated
        return (size - 1 - (size - 1 - source).abs()[:, :, None] == place).to(x.dtype)
    return resample(x, matrix(x.shape[2], down), matrix(x.shape[3], right))


def random_shift(rng, n, reach, p=1.0):
    """Shifts an image, with probability p, by up to `reach` pixels vertically and horizontally."""
    moved = rng.uniform(n, 1) < p if p < 1 else 1.0
    return [(shift, *(moved * rng.uniform(n, 2, low=-reach, high=reach + 1).floor()).unbind(1))]


def gaussian_blur(x, sigma, kernel_size):
    """Blurs each image with its own sigma (N,) in pixels; kernel_size is odd, borders are mirrored."""
    half = kernel_size // 2
    tap = torch.arange(-half, half + 1, device=x.device)
    kernel = (-0.5 * (tap / sigma[:, None]) ** 2).softmax(dim=1)              # (N, K)

    def matrix(size):                                                         # (N, size, size), mirrored taps folded in
        taps = F.pad(torch.eye(size, device=x.device)[None], (half, half), mode="reflect")[0].unfold(1, kernel_size, 1)
        return torch.einsum("nk,kij->nij", kernel, taps.permute(2, 1, 0))     # (K, to, from)
    return resample(x, matrix(x.shape[2]), matrix(x.shape[3])).clamp_(0, 1)    # weights sum to 1, up to rounding


def random_gaussian_blur(rng, n, kernel_size, p):
    """Blurs an image, with probability p, by a sigma between 0.1 and 2.0 pixels."""
    blur = functools.partial(gaussian_blur, kernel_size=kernel_size)
    return where(rng.uniform(n) < p, blur, rng.uniform(n, low=0.1, high=2.0))


# ---- colour


def luma(x):
    """(N, 3, H, W) to (N, 1, H, W), ITU-R 601-2 as torchvision's rgb_to_grayscale."""
    return (0.2989 * x[:, 0:1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def grayscale(x):
    return luma(x).expand_as(x)


def random_grayscale(rng, n, p):
    """Makes an image grey with probability p."""
    return where(rng.uniform(n) < p, grayscale)


def adjust_brightness(x, factor):
    return (factor[:, None, None, None] * x).clamp_(0, 1)


def adjust_contrast(x, factor):
    return torch.lerp(luma(x).mean(dim=(2, 3), keepdim=True), x, factor[:, None, None, None]).clamp_(0, 1)


def adjust_saturation(x, factor):
    return torch.lerp(luma(x), x, factor[:, None, None, None]).clamp_(0, 1)


def adjust_hue(x, turns):
    """Rotates the hue by `turns` (N,) of the colour circle: RGB to HSV and back.

    Hue is the angle from red in sixths of the circle: 2 + (g + b - r - value) / chroma, negative if b > g. This equals
    the usual formula without its three cases, which took five times as long on a CPU.
    """
    r, g, b = x.unbind(1)                                                     # (N, H, W) each
    value = torch.maximum(torch.maximum(r, g), b)
    least = torch.minimum(torch.minimum(r, g), b)
    chroma = value - least
    hue = (g + b).sub_(r).sub_(value).div_(chroma.clamp(min=1e-9))            # grey pixels have chroma 0, any hue
    turns = turns - turns.round()                                             # a hue of more than half a turn
    hue = hue.add_(2).copysign_(g - b).add_(6 * turns[:, None, None])         # in [-6, 6]
    angle = torch.stack([hue, hue - 2, hue + 2], dim=1).abs_()                # from red, green and blue
    angle = angle.sub_(3).abs_().sub_(3).abs_()                               # the shorter way round, in [0, 3]
    return (2 - angle).clamp_(0, 1).mul_(chroma[:, None]).add_(least[:, None])


def color_jitter(factors, order, mask):
    """The steps that apply the four adjustments, each image in its own order, where mask (N,) is true.

    factors: (N, 4) of brightness, contrast, saturation (around 1) and hue (turns). order: (N, 4), each row a
    permutation of 0..3, the order in which the adjustments are applied.
    """
    adjustments = enumerate((adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue))
    return [step for turn, (which, adjust) in itertools.product(range(4), adjustments)
            for step in where(mask & (order[:, turn] == which), adjust, factors[:, which])]


def jitter_parameters(rng, n, brightness, contrast, saturation, hue):
    """As torchvision's ColorJitter: factors in [max(0, 1 - a), 1 + a], hue in [-hue, hue]; and orders: (n, 4) both."""
    strength, centre = torch.tensor([brightness, contrast, saturation, hue]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    low, high = centre - strength, centre + strength
    low[:3].clamp_(min=0)
    return rng.uniform(n, 4, low=low, high=high), rng.uniform(n, 4).argsort(dim=1)


def random_color_jitter(rng, n, brightness, contrast, saturation, hue, p):
    """Jitters the colours of an image with probability p, by factors of these strengths (`jitter_parameters`)."""
    return color_jitter(*jitter_parameters(rng, n, brightness, contrast, saturation, hue), rng.uniform(n) < p)
