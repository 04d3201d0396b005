# SPDX-License-Identifier: MIT
"""`shapes`: coloured images generated from a seed, so that every script can train without a download, and `patterns`,
generated in the same way from other figures, as out-of-distribution images.

Ten classes of light shapes on a dark ground, with random colour, size, position, rotation, lighting and noise, all
independent of the class, so that neither the colour nor any single pixel gives it away. All operations are defined
exactly by IEEE 754 (no sines, no normal deviates), so the images are bitwise the same on every machine.
"""
import numpy as np


def box(u, v, half_u, half_v, centre_u=0.0, centre_v=0.0):
    return np.maximum(np.abs(u - centre_u) - half_u, np.abs(v - centre_v) - half_v)


def disc(u, v, radius, centre_u=0.0):
    return np.sqrt((u - centre_u) ** 2 + v**2) - radius


def triangle(u, v):
    side = np.sqrt(0.75)
    return np.maximum(np.maximum(v, side * u - 0.5 * v), -side * u - 0.5 * v) - 0.48


# Signed distance (negative inside, nearly exact at the edge) of points (u, v) from a shape with a radius of about 1.
DISTANCE = {
    "bar": lambda u, v: box(u, v, 1.0, 0.25),
    "corner": lambda u, v: np.minimum(box(u, v, 0.27, 0.85, -0.5, 0.0), box(u, v, 0.78, 0.27, 0.0, 0.58)),
    "crescent": lambda u, v: np.maximum(disc(u, v, 0.95), -disc(u, v, 0.75, centre_u=0.5)),
    "cross": lambda u, v: np.minimum(box(u, v, 1.0, 0.27), box(u, v, 0.27, 1.0)),
    "disc": lambda u, v: disc(u, v, 0.85),
    "frame": lambda u, v: np.abs(box(u, v, 0.6, 0.6)) - 0.16,
    "ring": lambda u, v: np.abs(disc(u, v, 0.7)) - 0.18,
    "square": lambda u, v: box(u, v, 0.72, 0.72),
    "star": lambda u, v: np.minimum(triangle(u, v), triangle(u, -v)),         # two triangles
    "triangle": triangle,
    "checks": lambda u, v: 4 * (np.abs(u % 1 - 0.5) - 0.25) * (np.abs(v % 1 - 0.5) - 0.25),
    "dots": lambda u, v: disc(u % 1 - 0.5, v % 1 - 0.5, 0.3),
    "ripples": lambda u, v: np.abs(disc(u, v, 0.0) % 0.8 - 0.4) - 0.2,
    "stripes": lambda u, v: np.abs(u % 1 - 0.5) - 0.25}
CLASSES, PATTERNS = tuple(DISTANCE)[:10], tuple(DISTANCE)[10:]


def draw(n, image_size, seed, classes=CLASSES):
    """Draws n images in random order, with equally many of each class, give or take one.

    image_size: side in pixels, at least 8. classes: CLASSES, or PATTERNS, which fill the image.
    Returns (n, 3, image_size, image_size) uint8 and (n,) int64 labels, indices into classes.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    labels = np.arange(n)[np.argsort(rng.random(n), kind="stable")] % len(classes)
    images = np.empty((n, 3, image_size, image_size), np.uint8)
    noise = 0.3 * min(1, image_size / 32)                                     # as of a 32 x 32 image shrunk to this
    pixel = (np.arange(image_size) + 0.5) / image_size * 2 - 1                # centres, in [-1, 1]
    for i, label in enumerate(labels):
        ground = 0.1 + 0.25 * rng.random() + 0.2 * (rng.random(3) - 0.5)      # a dark colour
        figure = 0.65 + 0.25 * rng.random() + 0.4 * (rng.random(3) - 0.5)     # a light one
        radius = 0.5 + 0.2 * rng.random()
        x0, y0 = 0.4 * (2 * rng.random(2) - 1)                                # the shape's centre
        tilt = 0.5 * (2 * rng.random() - 1)                                   # the tangent of its rotation
        cos = 1 / np.sqrt(1 + tilt**2)
        sin = tilt * cos
        x, y = (pixel[None, :] - x0) / radius, (pixel[:, None] - y0) / radius
        d = DISTANCE[classes[label]](cos * x + sin * y, cos * y - sin * x)    # (H, W)
        cover = np.clip(0.5 - d * radius * image_size / 2, 0, 1)              # antialiased over one pixel
        image = ground[:, None, None] + cover * (figure - ground)[:, None, None]              # (3, H, W)
        slope = 0.3 * (rng.random(2) - 0.5)
        image += slope[0] * pixel[None, :] + slope[1] * pixel[:, None]        # lit from one side
        image += noise * (rng.random((3, image_size, image_size)) - 0.5)
        images[i] = np.clip(np.rint(image * 255), 0, 255)
    return images, labels.astype(np.int64)
