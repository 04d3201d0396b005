"""Pixels as tokens of a palette of colours (iGPT, Chen et al. 2020)."""
import math

import torch


def nearest(pixels, palette):
    """(M, 3) colours to the (M,) indices of the nearest of the palette's (V, 3), by Euclidean distance."""
    half = palette.square().sum(dim=1) / 2                                    # |x - p|^2 / 2 = half - x.p + ...
    part = 2**12 if pixels.device.type == "cpu" else 2**18                    # distances that fit the processor's cache
    with torch.autocast(pixels.device.type, enabled=False):                   # bf16 would take other colours
        return torch.cat([torch.addmm(half, x, palette.T, alpha=-1).argmin(dim=1) for x in pixels.split(part)])


def fit_palette(images, num_colours, seed=0, pixels=2**16, iterations=40):
    """k-means (Lloyd's, k-means++ start) of the images' RGB values: (V, 3) floats in [0, 1].

    images: (N, 3, H, W) uint8, or floats in [0, 1]; `pixels` of theirs are drawn. V is less where those have less.
    """
    generator = torch.Generator().manual_seed(seed)
    x = (images / 255 if images.dtype == torch.uint8 else images).permute(0, 2, 3, 1).reshape(-1, 3)
    x = x[torch.randperm(len(x), generator=generator)[:pixels]]
    num_colours = min(num_colours, len(x.unique(dim=0)))
    palette, distance = x[:1].repeat(num_colours, 1), torch.full((len(x),), math.inf)
    for i in range(1, num_colours):                                           # far colours are likelier to be drawn
        distance = torch.minimum(distance, (x - palette[i - 1]).square().sum(dim=1))
        total = distance.cumsum(dim=0)
        drawn = torch.searchsorted(total, total[-1] * torch.rand(1, generator=generator))
        palette[i] = x[drawn.clamp(max=len(x) - 1)]
    for _ in range(iterations):
        token = nearest(x, palette)
        count = torch.bincount(token, minlength=num_colours)[:, None]
        mean = torch.zeros_like(palette).index_add_(0, token, x) / count
        palette = torch.where(count > 0, mean, palette)                       # an empty cluster stays
    return palette


def quantise(x, palette):
    """Images (N, 3, H, W), uint8 or floats in [0, 1], to tokens (N, H, W), indices into the palette (V, 3)."""
    pixels = (x / 255 if x.dtype == torch.uint8 else x).permute(0, 2, 3, 1)   # (N, H, W, 3)
    return nearest(pixels.reshape(-1, 3), palette).view(pixels.shape[:3])


def dequantise(tokens, palette):
    """Tokens (N, H, W) to floats (N, 3, H, W) in [0, 1]."""
    return palette[tokens].permute(0, 3, 1, 2)
