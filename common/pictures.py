# SPDX-License-Identifier: MIT
"""Pictures: tiles of images, enlarged if they are small, and curves."""
import math

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid, save_image


def tiles(path, images, columns):
    """Saves images (N, 3, S, S), uint8 or floats in [0, 1], as a PNG with `columns` images per row."""
    images = images[:, :3]                                                    # the first of stacked images
    images = images.cpu().float() / 255 if images.dtype == torch.uint8 else images.detach().cpu().float()
    if images.shape[-1] < 64:
        images = F.interpolate(images, scale_factor=-(-64 // images.shape[-1]), mode="nearest")
    save_image(make_grid(images, nrow=columns, padding=2, pad_value=1.0), path, format="png")


def neighbours(path, queries, query_features, images, features, n=10, k=9):
    """A row for each of n queries: the query, then the k images with the highest cosine similarity of features.

    queries, images: `Images`. They may be the same object, in which case an image is not its own neighbour.
    """
    which, k = queries.random_indices(n).to(features.device), min(k, len(images) - 1)
    similarity = F.normalize(query_features[which], dim=1) @ F.normalize(features, dim=1).T
    if queries is images:
        similarity.scatter_(1, which[:, None], -1.0)
    nearest = similarity.topk(k, dim=1).indices                               # (n, k)
    columns = [queries.at(which)[:, None], images.at(nearest.flatten()).unflatten(0, nearest.shape)]
    tiles(path, torch.cat(columns, dim=1).flatten(0, 1), k + 1)


def plot(path, *panels, width=640, height=240, names=None):
    """Saves curves as a PNG, one panel below the other with the same x axis.

    panels: (title, points, levels): points [(x, y)], x >= 0, joined by a line; levels {name: y}, dashed horizontal
    lines. The y axis covers both. names: {x: text}, labels of the x axis in place of numbers.
    """
    image, font = Image.new("RGB", (width, height * len(panels)), "white"), ImageFont.load_default(13)
    draw, last = ImageDraw.Draw(image), max(1, *(x for _, points, _ in panels for x, _ in points))
    left, right = 55, width - (45 if names else 185)
    for i, (title, points, levels) in enumerate(panels):
        top, bottom = i * height + 35, (i + 1) * height - (65 if names else 30)
        ys = [*levels.values(), *(y for _, y in points)]
        scale = ticks(min(ys) if 2 * min(ys) > max(ys) else min(0, *ys), max(ys))             # from 0 if it is close

        def down(y):
            return bottom - (bottom - top) * (y - scale[0]) / (scale[-1] - scale[0])

        def at(x, y):
            return left + (right - left) * x / last, down(y)
        draw.text((10, top - 27), title, "black", font)
        for y in scale:
            draw.line((left, down(y), right, down(y)), "lightgrey")
            draw.text((left - 8, down(y)), f"{y:g}", "black", font, "rm")
        for x, text in (names or {x: f"{x:g}" for x in ticks(0, last, 1) if x <= last}).items():
            draw.text((at(x, 0)[0], bottom + 6), text, "black", font, "ma", align="center")
        labels = [(points[-1][1], f"{points[-1][1]:.4g}", "royalblue")] * (not names)
        for (name, y), colour in zip(levels.items(), ("firebrick", "darkgreen")):
            for x in range(left, right, 10):
                draw.line((x, down(y), x + 5, down(y)), colour)
            labels.append((y, f"{name} {y:.4g}", colour))
        draw.line([at(*point) for point in points], "royalblue", 2)
        for x, y in (at(*point) for point in points):
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), "royalblue")
        free = top - 24                                                       # next to the lines, no overlap
        for y, text, colour in sorted(labels, reverse=True):
            free = max(down(y), free + 16)
            draw.text((right + 10, free), text, colour, font, "lm")
    image.save(path, "PNG")


def ticks(low, high, least=0.0):
    """About five round numbers, at least `least` apart, from below `low` to above `high`."""
    span = high - low or abs(low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 5))
    step = max(least, next(k * step for k in (1, 2, 5, 10) if span <= 5.001 * k * step))
    first = math.floor(low / step)
    return [step * i for i in range(first, max(first + 1, math.ceil(high / step)) + 1)]
