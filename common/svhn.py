# SPDX-License-Identifier: MIT
"""SVHN without SciPy, which torchvision's class needs."""
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets


def load(split, data_dir):
    """Street View House Numbers, cropped digits, fetched on first use: [(image, None)], labels. Two arrays in a file of
    MATLAB 5: each compressed, with a header, its flags, shape, name and values, padded to 8 bytes."""
    (url, filename, md5), arrays = datasets.SVHN.split_list[split], []
    datasets.utils.download_url(url, data_dir, filename, md5)                 # where it is not there
    rest = (Path(data_dir) / filename).read_bytes()[128:]
    while rest:
        size = int.from_bytes(rest[4:8], "little")
        matrix, rest = zlib.decompress(rest[8 : 8 + size]), rest[8 + size :]
        shape = np.frombuffer(matrix, "<i4", int.from_bytes(matrix[28:32], "little") // 4, 32)
        start = 48 + -(-shape.nbytes // 8) * 8                                # of the values
        kind = {2: "u1", 9: "<f8"}[int.from_bytes(matrix[start - 8 : start - 4], "little")]
        arrays.append(np.frombuffer(matrix, kind, shape.prod(), start).reshape(shape, order="F"))
    images, labels = arrays[0].transpose(3, 0, 1, 2), arrays[1].reshape(-1) % 10              # (N, 32, 32, 3); 10 is 0
    return [(Image.fromarray(image), None) for image in images], labels
