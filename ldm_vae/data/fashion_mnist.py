"""Fashion-MNIST as arrays, and labelled images as a zip of class folders, which every command reads."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ldm_vae.data.images import Pixels
from ldm_vae.errors import DataError
from ldm_vae.files import atomic

FASHION = "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
"""Fashion-MNIST's classes (Xiao et al. 2017, table 2)."""
PADDING = 2


def read_fashion_mnist(folder: Path, part: str) -> tuple[Pixels, np.ndarray]:
    """Images (N, 32, 32, 1) of uint8, 28 x 28 padded with black, and labels (N,), of `train` or `t10k`.

    Raises:
        DataError: the gzipped IDX files are not there, or damaged.
    """
    try:
        images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{folder} does not hold Fashion-MNIST's idx.gz files: {error}") from None
    edge = (PADDING, PADDING)
    return np.pad(pixels, ((0, 0), edge, edge, (0, 0))), np.frombuffer(labels, np.uint8, offset=8)


def write_class_zip(target: Path, images: Iterable[tuple[Pixels, str]]) -> None:
    """Grey images (H, W, 1) and the names of their classes -> a zip of PNG in class folders, unless it is there."""
    if target.exists():
        return
    with atomic(target) as out, zipfile.ZipFile(out, "w") as archive:
        for i, (pixels, name) in enumerate(images):
            png = io.BytesIO()
            Image.fromarray(pixels[:, :, 0]).save(png, "PNG")
            archive.writestr(f"{name}/{i:05d}.png", png.getvalue())
