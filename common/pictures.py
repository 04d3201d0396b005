"""Pictures to look at: tiles of images, small ones enlarged so that their pixels can be seen."""
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid, save_image


def tiles(path, images, columns):
    """Saves images (N, 3, S, S), uint8 or floats in [0, 1], as a PNG with `columns` to a row."""
    images = images[:, :3]                                                    # of stacked images the first
    images = images.cpu().float() / 255 if images.dtype == torch.uint8 else images.detach().cpu().float()
    if images.shape[-1] < 64:
        images = F.interpolate(images, scale_factor=-(-64 // images.shape[-1]), mode="nearest")
    save_image(make_grid(images, nrow=columns, padding=2, pad_value=1.0), path, format="png")


def rows(path, *images, columns=8):
    """A row of each of the tensors (N, 3, S, S) in turn: views of the same images stand above one another."""
    tiles(path, torch.cat([row for rows in zip(*(x.split(columns) for x in images)) for row in rows]), columns)


def neighbours(path, queries, query_features, images, features, n=10, k=9):
    """A row for each of n queries: the query, then the k nearest images by the cosine of their features.

    queries, images: `Images`, which may be the same, in which case an image is not its own neighbour.
    """
    which, k = queries.random_indices(n).to(features.device), min(k, len(images) - 1)
    similarity = F.normalize(query_features[which], dim=1) @ F.normalize(features, dim=1).T
    if queries is images:
        similarity.scatter_(1, which[:, None], -1.0)
    nearest = similarity.topk(k, dim=1).indices                               # (n, k)
    columns = [queries.at(which)[:, None], images.at(nearest.flatten()).unflatten(0, nearest.shape)]
    tiles(path, torch.cat(columns, dim=1).flatten(0, 1), k + 1)
