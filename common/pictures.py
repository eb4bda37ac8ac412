"""Grids of images as PNG files."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import write_atomically


def save_png(path: Path, image: np.ndarray) -> None:
    """Write one image (C, H, W) uint8, C 1 or 3."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if image.shape[0] == 1 else np.moveaxis(image, 0, -1)).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def save_grid(path: Path, images: np.ndarray, columns: int | None = None, scale: int = 2) -> None:
    """Write images (N, C, H, W) uint8 as one picture, row by row, each enlarged `scale` times, one pixel apart."""
    images = images.repeat(scale, axis=2).repeat(scale, axis=3)
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[:, top : top + height, left : left + width] = image
    save_png(path, sheet)
