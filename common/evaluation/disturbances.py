"""Disturbances of photographs, for a table of how a recogniser or another figure bears them.

Five in three severities each, in the manner of Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common
corruptions and perturbations", but not their parameters: sizes are shares of the image's side, and a low resolution is told in
pixels across the image, so that a severity means the same at 32 and at 128 pixels. Noise and JPEG do not scale: noise is as
strong in each pixel, and the blocks are 8 pixels, at every size.

What is disturbed depends on the image, its place in the array and the seed, and on nothing else: the images beside it do not
matter. Severities of one seed share what is random, so that the noise of the second is that of the first made larger, and
the square of the second covers that of the first.
"""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

from common.errors import ConfigError, DataError

SEVERITIES = 3
# The mildest low resolution, 24 pixels across, must be one.
MIN_SIDE = 25
_GREY = 128


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """One kind of disturbance.

    apply: makes of an image (C, S, S) uint8, a parameter and a generator another such image. severities: the parameter of each,
    mildest first, by what a table calls it.
    """

    apply: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    severities: dict[str, float]


def disturb(images: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """The images (N, C, S, S) uint8, disturbed; the given ones stay as they are.

    name: one of DISTURBANCES; severity: 1, 2 or 3; seed: 0 or more. The image at place i draws from a generator of its own, of
    `seed` and i: the first k images come out alike with and without those behind them. On one version of Pillow and SciPy the
    same arguments give the same images. Raises ConfigError for another name, severity or seed, DataError for other images:
    C is 1 or 3, S at least MIN_SIDE.
    """
    if name not in DISTURBANCES:
        raise ConfigError(f"disturbance {name!r}: choose one of {', '.join(DISTURBANCES)}")
    disturbance = DISTURBANCES[name]
    if severity not in range(1, SEVERITIES + 1):
        raise ConfigError(f"severity {severity}: choose one from 1 to {SEVERITIES}")
    if seed < 0:
        raise ConfigError(f"seed {seed}: give 0 or more")
    _check(images)
    parameter = list(disturbance.severities.values())[severity - 1]
    disturbed = np.empty_like(images, order="C")
    for place, image in enumerate(images):
        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(place,)))
        disturbed[place] = disturbance.apply(image, parameter, random)
    return disturbed


def robustness(measure: Callable[[np.ndarray], float], images: np.ndarray, seed: int) -> dict[str, list[float]]:
    """What `measure` gives of images (N, C, S, S) uint8: under "none" as they are, under each of DISTURBANCES at its severities.

    Raises ConfigError and DataError as `disturb`, and whatever `measure` does.
    """
    _check(images)
    figures = {"none": [float(measure(images))]}
    for name, disturbance in DISTURBANCES.items():
        figures[name] = [
            float(measure(disturb(images, name, severity, seed)))
            for severity, _ in enumerate(disturbance.severities, start=1)
        ]
    return figures


def _check(images: np.ndarray) -> None:
    shape = images.shape
    if images.dtype != np.uint8 or images.ndim != 4 or shape[1] not in (1, 3) or shape[2] != shape[3] or not shape[0]:
        raise DataError(f"images are {images.dtype} {shape}: give uint8 (N, 1 or 3, S, S), at least one")
    if shape[2] < MIN_SIDE:
        raise DataError(f"images of {shape[2]} x {shape[2]} pixels: give at least {MIN_SIDE} x {MIN_SIDE}")


def _noise(image: np.ndarray, deviation: float, random: np.random.Generator) -> np.ndarray:
    """Gaussian, of this standard deviation in grey levels, in each pixel and channel on its own."""
    return _rounded(image + deviation * random.standard_normal(image.shape))


def _blur(image: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Gaussian, whose standard deviation is this share of the side; the edge pixels go on outside."""
    deviation = share * image.shape[-1]
    return _rounded(ndimage.gaussian_filter(image.astype(np.float64), (0, deviation, deviation), mode="nearest"))


def _jpeg(image: np.ndarray, quality: float, random: np.random.Generator) -> np.ndarray:
    """Compressed at Pillow's `quality`, colours at half the resolution, and read again."""
    buffer = io.BytesIO()
    _picture(image).save(buffer, "JPEG", quality=int(quality))
    with Image.open(buffer) as picture:
        return _array(picture)


def _occlusion(image: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """A grey square, whose side is this share of the image's, at a random place within it."""
    side = round(share * image.shape[-1])
    top, left = (random.random(2) * (image.shape[-1] - side + 1)).astype(int)
    covered = image.copy()
    covered[:, top : top + side, left : left + side] = _GREY
    return covered


def _resolution(image: np.ndarray, pixels: float, random: np.random.Generator) -> np.ndarray:
    """Made smaller, to this many pixels across, by means over boxes, and larger again, bilinear."""
    side, small = image.shape[-1], int(pixels)
    picture = _picture(image).resize((small, small), Image.Resampling.BOX)
    return _array(picture.resize((side, side), Image.Resampling.BILINEAR))


def _rounded(values: np.ndarray) -> np.ndarray:
    levels: np.ndarray = np.rint(values).clip(0, 255)
    return levels.astype(np.uint8)


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(np.moveaxis(image, 0, -1)))


def _array(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


DISTURBANCES: dict[str, Disturbance] = {
    "noise": Disturbance(_noise, {"sd 10/255": 10, "sd 25/255": 25, "sd 50/255": 50}),
    "blur": Disturbance(
        _blur, {"sd 1/64 of the side": 1 / 64, "sd 1/32 of the side": 1 / 32, "sd 1/16 of the side": 1 / 16}
    ),
    "jpeg": Disturbance(_jpeg, {"quality 50": 50, "quality 20": 20, "quality 5": 5}),
    "occlusion": Disturbance(
        _occlusion, {"1/4 of the side": 1 / 4, "3/8 of the side": 3 / 8, "1/2 of the side": 1 / 2}
    ),
    "resolution": Disturbance(_resolution, {"24 pixels across": 24, "16 pixels across": 16, "8 pixels across": 8}),
}
