"""A face cut out upright: the eyes level, at the same two places in every square, whatever the photograph's scale.

The frame is that of FFHQ in manner (T. Karras, S. Laine, T. Aila, "A Style-Based Generator Architecture for Generative
Adversarial Networks", CVPR 2019, appendix A): a square about four eye distances wide, edges replicated.
"""

import math

import numpy as np
from PIL import Image

# In distances between the eyes: the side of the square at crop 1, and how far its centre lies below the eyes.
SIDE = 4.0
BELOW_EYES = 0.3
# A face turned aside has its eyes near together. The way from the eyes to the mouth is about 1.1 eye distances on a face
# seen from the front; where it is more than this, the scale and the upright come from it and not from the eyes.
TURNED_ASIDE = 1.35


def eye_places(crop: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where the eyes come to lie, (x, y) each as shares of the square's side from its top left corner.

    x = 1/2 -+ 1/(8 crop), y = 1/2 - 3/(40 crop): (0.375, 0.425) and (0.625, 0.425) at crop 1, with hair and chin;
    (0.25, 0.35) and (0.75, 0.35) at crop 0.5, from the brows to below the mouth.
    """
    x, y = 1 / (2 * SIDE * crop), 0.5 - BELOW_EYES / (SIDE * crop)
    return (0.5 - x, y), (0.5 + x, y)


def frame(points: np.ndarray, crop: float) -> tuple[np.ndarray, np.ndarray]:
    """The square about a face: its centre (2,), and (2, 2) the ways from there to the middle of the right and lower side.

    points: (5, 2) as of `detection.Face`; crop as in `level`. Columns are ways, so centre + axes @ (u, v), u and v in
    [-1, 1], gives every place of the square.
    """
    eyes = points[:2].mean(0)
    across, down = points[1] - points[0], points[3:].mean(0) - eyes
    if math.hypot(*down) > TURNED_ASIDE * math.hypot(*across):
        across = np.array([down[1], -down[0]]) / TURNED_ASIDE
    below = np.array([-across[1], across[0]])  # across, turned by a right angle: downwards
    return eyes + BELOW_EYES * below, SIDE * crop / 2 * np.stack([across, below], axis=1)


def level(image: Image.Image, points: np.ndarray, size: int, crop: float) -> Image.Image:
    """The face with these points, turned and scaled, as an image of size x size in the mode of `image`, L or RGB.

    points: (5, 2) as of `detection.Face`. crop: in (0, 1], the share of the widest frame that is kept; see `eye_places`.
    Beyond the edges of the photograph its outermost pixels are repeated.
    """
    centre, axes = frame(points, crop)
    reach = np.abs(axes).sum(1)  # half of the upright rectangle about the square
    low, high = np.floor(centre - reach), np.ceil(centre + reach)
    # Shrink first, with a filter that averages, to twice the pixels needed; what is enlarged needs no such care.
    fine = 2 * size
    ratio = min(1.0, fine / max(2 * math.hypot(*axes[:, 0]), 1.0))
    patch, origin, ratios = _patch(image, low, high, ratio)
    turn = ratios[:, None] * axes * (2 / fine)
    start = ratios * (centre - axes.sum(1)) - origin
    matrix = (turn[0, 0], turn[0, 1], start[0], turn[1, 0], turn[1, 1], start[1])
    upright = patch.transform((fine, fine), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return upright.resize((size, size), Image.Resampling.LANCZOS)


def _patch(
    image: Image.Image, low: np.ndarray, high: np.ndarray, ratio: float
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """What lies between `low` and `high`, shrunk, with a few pixels to spare.

    Gives also its top left corner (2,) in shrunk pixels, and by how much both sides were truly shrunk (2,).
    """
    spare = math.ceil(4 / ratio)
    extent = np.array(image.size)
    inner_low = np.clip(low - spare, 0, extent - 1).astype(int)
    inner_high = np.clip(high + spare, inner_low + 1, extent).astype(int)
    inside = image.crop((*inner_low.tolist(), *inner_high.tolist()))
    shrunk = (max(1, round(inside.width * ratio)), max(1, round(inside.height * ratio)))
    ratios = np.array(shrunk) / inside.size
    if shrunk != inside.size:
        inside = inside.resize(shrunk, Image.Resampling.LANCZOS, reducing_gap=4.0)
    before = np.maximum(np.ceil((inner_low - (low - spare)) * ratios), 0).astype(int)
    after = np.maximum(np.ceil((high + spare - inner_high) * ratios), 0).astype(int)
    pixels = np.asarray(inside)
    widths = [(int(before[1]), int(after[1])), (int(before[0]), int(after[0]))]
    padded = np.pad(pixels, widths if pixels.ndim == 2 else [*widths, (0, 0)], mode="edge")
    return Image.fromarray(padded), inner_low * ratios - before, ratios
