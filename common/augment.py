"""Augmentation of a whole batch at once, with parameters of each image's own.

Images x are (N, 3, H, W) floats in [0, 1] on any device. Parameters are (N,) tensors on the CPU, drawn by `Random`, so
a seed gives the same views on every device. Given the same parameters each operation agrees with the function of its
name in `torchvision.transforms.functional`, and the `random_` ones draw them as torchvision's transforms do. The
recipes (which operation, how strong, how often) stand in the scripts.
"""
import functools

import torch
import torch.nn.functional as F


class Random:
    """Uniform random numbers for the images of a batch, from one seeded generator.

    In a multi-process run every process draws for the whole batch and keeps its own images' part: the numbers, and so
    the views, are those of one process with the whole batch, and the generator's state is the same everywhere.
    """

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


def per_image(parameter, x):
    """(N,) on the CPU to (N, 1, 1, 1) on x's device, of x's type."""
    return parameter.to(x.device, x.dtype, non_blocking=True)[:, None, None, None]


def apply_where(mask, operation, x, *parameters, inplace=False):
    """x with operation(x, *parameters) in place of the images where mask (N,) is true; the others cost nothing.

    inplace: write into x itself, for a caller that owns it.
    """
    x = x if inplace else x.clone()
    index = mask.nonzero()[:, 0]                                              # on the CPU: no wait for the device
    if len(index):
        on_device = index.to(x.device, non_blocking=True)
        x.index_copy_(0, on_device, operation(x[on_device], *(p[index] for p in parameters)))
    return x


# ---- geometry: resampling along rows and columns is linear, hence one matrix for each image and axis


def resample(x, rows, columns):
    """x (N, C, H, W), rows (N, H', H), columns (N, W', W) to (N, C, H', W')."""
    x = x.flatten(1, 2) @ columns.transpose(1, 2)                             # (N, C H, W')
    return rows[:, None] @ x.unflatten(1, (-1, rows.shape[2]))


def crop_matrix(start, length, size, out):
    """Bilinear, antialiased resizing of positions start..start + length of an axis to `out` positions.

    start, length: (N,) in pixels. size: the axis's length. Returns (N, out, size), rows summing to 1:
    torchvision's antialias filter, a triangle as wide as one output pixel where it shrinks, else as one input pixel.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / out                                                      # (N, 1, 1) input pixels per output pixel
    position = torch.arange(size, device=start.device) + 0.5 - start          # (N, 1, size) from the crop's edge
    centre = scale * (torch.arange(out, device=start.device)[:, None] + 0.5)  # (N, out, 1)
    weight = (position - centre).abs_().div_(-scale.clamp(min=1)).add_(1).clamp_(min=0)
    weight.mul_((position > 0) & (position < length))                         # nothing from outside the crop
    return weight.div_(weight.sum(dim=2, keepdim=True))


def resized_crop(x, top, left, height, width, size):
    """Each image's own box, in pixels, resized to size x size with antialiasing."""
    top, left, height, width = (p.to(x.device, x.dtype, non_blocking=True) for p in (top, left, height, width))
    return resample(x, crop_matrix(top, height, x.shape[2], size), crop_matrix(left, width, x.shape[3], size))


def crop_boxes(rng, n, height, width, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """n random boxes as torchvision's RandomResizedCrop draws them: top, left, height, width, each (n,) floats.

    height, width: of all images, or (n,) of each. Share of the image's area uniform in `scale`, aspect ratio
    log-uniform in `ratio`; of ten tries the first that fits, else the whole image (cut to the ratio's bounds).
    """
    height, width = (torch.as_tensor(side, dtype=torch.float32).expand(n) for side in (height, width))
    area = (height * width)[:, None] * rng.uniform(n, 10, low=scale[0], high=scale[1])        # (n, 10)
    low, high = torch.tensor(ratio).log().tolist()
    aspect = rng.uniform(n, 10, low=low, high=high).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first, any_fits = fits.int().argmax(dim=1, keepdim=True), fits.any(dim=1)  # (n, 1), 0 where none fits; (n,)
    w = torch.where(any_fits, w.gather(1, first)[:, 0], torch.minimum(width, (height * ratio[1]).round()))
    h = torch.where(any_fits, h.gather(1, first)[:, 0], torch.minimum(height, (width / ratio[0]).round()))
    top, left = (rng.uniform(n) * (height - h + 1)).floor(), (rng.uniform(n) * (width - w + 1)).floor()
    top = torch.where(any_fits, top, ((height - h) / 2).floor())              # the whole image's box is centred
    return top, torch.where(any_fits, left, ((width - w) / 2).floor()), h, w


def random_resized_crop(x, rng, size, scale, aspect=None, ratio=(3 / 4, 4 / 3)):
    """A box of each image's own, of a share of its area in `scale` and a shape in `ratio`, resized to size x size.

    aspect: (N,) on the CPU, width / height of the photographs that were squashed to the squares x, None: 1. The box has
    its shape and its share in the photograph.
    """
    height, width = x.shape[2:]
    if aspect is None:
        return resized_crop(x, *crop_boxes(rng, len(x), height, width, scale, ratio), size)
    tall, wide = (height / aspect.clamp(max=1)).round(), (width * aspect.clamp(min=1)).round()
    top, left, h, w = crop_boxes(rng, len(x), tall, wide, scale, ratio)
    return resized_crop(x, top * height / tall, left * width / wide, h * height / tall, w * width / wide, size)


def horizontal_flip(x, mask):
    """Mirrors the images where mask (N,) is true."""
    return torch.where(mask.to(x.device, non_blocking=True)[:, None, None, None], x.flip(3), x)


def random_horizontal_flip(x, rng):
    """Mirrors one image in two."""
    return horizontal_flip(x, rng.uniform(len(x)) < 0.5)


def shift(x, down, right):
    """Moves each image by its own whole number of pixels (N,), negative for up and left; the border is mirrored."""
    def moved(size, by):                                                      # (N, size) source positions
        source = (torch.arange(size) - by[:, None].long()).abs()              # -1 is 1: the edge pixel is not repeated
        return (size - 1 - (size - 1 - source).abs()).to(x.device, non_blocking=True)
    n, _, height, width = x.shape
    image = torch.arange(n, device=x.device)[:, None, None]
    x = x.permute(0, 2, 3, 1)[image, moved(height, down)[:, :, None], moved(width, right)[:, None, :]]
    return x.permute(0, 3, 1, 2)


def random_shift(x, rng, reach):
    """Moves each image by up to `reach` whole pixels down or up and right or left."""
    return shift(x, *rng.uniform(len(x), 2, low=-reach, high=reach + 1).floor().unbind(1))


def gaussian_blur(x, sigma, kernel_size):
    """Blurs each image with its own sigma (N,) in pixels; kernel_size odd, borders mirrored."""
    half = kernel_size // 2
    tap = torch.arange(-half, half + 1)
    kernel = torch.exp(-0.5 * (tap / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).to(x.device, x.dtype, non_blocking=True)     # (N, K)

    def matrix(size):                                                         # (N, size, size), mirrored taps folded in
        taps = F.pad(torch.eye(size)[None], (half, half), mode="reflect")[0]  # (size, size + 2 half), a column a source
        taps = taps.unfold(1, kernel_size, 1).permute(2, 1, 0)                # (K, to, from)
        return torch.einsum("nk,kij->nij", kernel, taps.to(x.device, x.dtype))
    return resample(x, matrix(x.shape[2]), matrix(x.shape[3]))


def random_gaussian_blur(x, rng, kernel_size, p):
    """Blurs a share p of the images by a sigma within 0.1 and 2.0 pixels."""
    blur = functools.partial(gaussian_blur, kernel_size=kernel_size)
    return apply_where(rng.uniform(len(x)) < p, blur, x, rng.uniform(len(x), low=0.1, high=2.0))


# ---- colour


def luma(x):
    """(N, 3, H, W) to (N, 1, H, W), ITU-R 601-2 as torchvision's rgb_to_grayscale."""
    return (0.2989 * x[:, 0:1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def grayscale(x):
    return luma(x).expand_as(x)


def random_grayscale(x, rng, p):
    """Makes a share p of the images grey."""
    return apply_where(rng.uniform(len(x)) < p, grayscale, x)


def adjust_brightness(x, factor):
    return (per_image(factor, x) * x).clamp_(0, 1)


def adjust_contrast(x, factor):
    return torch.lerp(luma(x).mean(dim=(2, 3), keepdim=True), x, per_image(factor, x)).clamp_(0, 1)


def adjust_saturation(x, factor):
    return torch.lerp(luma(x), x, per_image(factor, x)).clamp_(0, 1)


def adjust_hue(x, turns):
    """Turns the hue by `turns` (N,) in [-0.5, 0.5] of the colour circle: RGB to HSV and back."""
    r, g, b = x.unbind(1)                                                     # (N, H, W) each
    value = torch.maximum(torch.maximum(r, g), b)
    least = torch.minimum(torch.minimum(r, g), b)
    chroma = value - least
    hue = torch.where(value == r, g - b, torch.where(value == g, b - r, r - g))
    hue.div_(chroma.clamp(min=1e-9))                                          # a grey pixel has hue and chroma 0
    hue.add_(torch.where(value == r, 0.0, torch.where(value == g, 2.0, 4.0)))
    hue.add_(per_image(6 * turns, x)[:, 0]).remainder_(6)                     # in sixths of the circle
    share = torch.stack([(hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], dim=1).clamp_(0, 1)
    return share.mul_(chroma[:, None]).add_(least[:, None])


ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def color_jitter(x, factors, order):
    """The four adjustments, in each image's own order.

    factors: (N, 4) brightness, contrast, saturation (factors around 1) and hue (turns). order: (N, 4), each row a
    permutation of 0..3, the adjustments in the order of application.
    """
    x = x.clone()
    for turn in range(4):
        for which, adjust in enumerate(ADJUST):
            apply_where(order[:, turn] == which, adjust, x, factors[:, which], inplace=True)
    return x


def jitter_parameters(rng, n, brightness, contrast, saturation, hue):
    """Factors uniform in [max(0, 1 - a), 1 + a], hue in [-hue, hue], as torchvision's ColorJitter: (n, 4), (n, 4)."""
    strength = torch.tensor([brightness, contrast, saturation, hue])
    centre = torch.tensor([1.0, 1.0, 1.0, 0.0])
    low, high = centre - strength, centre + strength
    low[:3].clamp_(min=0)
    factors = low + (high - low) * rng.uniform(n, 4)
    return factors, rng.uniform(n, 4).argsort(dim=1)


def random_color_jitter(x, rng, brightness, contrast, saturation, hue, p):
    """Jitters the colours of a share p of the images, by factors of these strengths (`jitter_parameters`)."""
    factors, order = jitter_parameters(rng, len(x), brightness, contrast, saturation, hue)
    return apply_where(rng.uniform(len(x)) < p, color_jitter, x, factors, order)
