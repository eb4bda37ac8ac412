"""From a photograph as it lies on the owner's disk to small squares of uint8. No step is random.

First upright by EXIF, then grey or colour. With `FaceOptions.detect`
  none      one centre crop; the face is expected near the middle, `crop` is the share of the shorter side kept
  largest   the largest face that is found, its eyes level and at fixed places; `crop` is the share kept of a square four
            eye distances wide (`alignment.eye_places`)
  all       every face found, cut likewise, the largest first. A bystander is a face too: in a person's folder use 'largest'
"""

import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import DataError
from common.faces.alignment import level
from common.faces.dataset import FaceOptions
from common.faces.detection import LONGER_SIDE, MIN_FACE, detector_state, find_faces, settled

# Part of the cache's key: raise it whenever the same photograph would come out different.
PREPROCESSING_VERSION = 2
# Only plain raster formats: Pillow would otherwise hand some files to other programs (EPS to Ghostscript).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
Image.init()  # an explicit list of formats finds only those already registered


class UnreadableImageError(Exception):
    """This file is no image that can be used; the message is a reason without a path."""


class NoFaceFound(UnreadableImageError):
    """The photograph is in order, and there is no face in it that the detector finds."""


def preprocessing_state(options: FaceOptions) -> list[object]:
    """What the outcome depends on besides the photograph and `options`: part of the key of every cache.

    Raises DataError where faces are to be found and the detector is not installed.
    """
    return [PREPROCESSING_VERSION, *([] if options.detect == "none" else detector_state())]


def decode(path: Path, options: FaceOptions) -> list[np.ndarray]:
    """The faces in `path`, at least one, each uint8 (C, H, H); exactly one unless `options.detect` is 'all'.

    Raises UnreadableImageError; NoFaceFound, which is one, where faces were looked for and there are none; DataError
    where the detector is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a photograph's odd metadata is not the reader's business
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                # JPEG can decode at 1/2, 1/4 or 1/8: keep at least twice the pixels that are needed.
                needed = math.ceil(2 * options.image_size / options.crop)
                if options.detect != "none":  # a face may be a small part of the photograph
                    needed = max(needed, 2 * LONGER_SIDE)
                image.draft(None, (needed, needed))
                return fit_faces(ImageOps.exif_transpose(image), options)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImageError(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except (UnreadableImageError, DataError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise UnreadableImageError(f"damaged ({type(error).__name__})") from error


def fit_faces(image: Image.Image, options: FaceOptions) -> list[np.ndarray]:
    """`decode` for one image in memory, of any mode. Its EXIF orientation is not looked at."""
    if options.detect == "none":
        return [fit(image, options)]
    image = to_grey_or_colour(image)
    if min(image.size) < MIN_FACE:
        raise NoFaceFound(f"under {MIN_FACE} pixels, too small to find a face in")
    faces = find_faces(image)
    if not faces:
        raise NoFaceFound("no face found")
    if options.detect == "largest":
        faces = faces[:1]
    if options.channels == 1:
        image = image.convert("L")
    points = [settled(image, face).points for face in faces]
    return [_pixels(level(image, places, options.image_size, options.crop), options) for places in points]


def is_image(path: Path) -> bool:
    """Whether the file begins like an image that `decode` reads; it may still be damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS):
                return True
    except Image.DecompressionBombError:
        return True
    except Exception:
        return False


def fit(image: Image.Image, options: FaceOptions) -> np.ndarray:
    """Centre crop, resize and convert one image of any mode to uint8 (C, H, H). Raises UnreadableImageError."""
    image = to_grey_or_colour(image)
    if options.channels == 1:
        image = image.convert("L")
    width, height = image.size
    side = max(1.0, min(width, height) * options.crop)
    left, top = (width - side) / 2, (height - side) / 2
    size = (options.image_size, options.image_size)
    # The box may lie between pixels: the filter takes care of the fraction.
    box = (left, top, left + side, top + side)
    return _pixels(image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=4.0), options)


def to_grey_or_colour(image: Image.Image) -> Image.Image:
    """Mode L or RGB from any mode: 16 bits to 8 (not clipped, as Pillow would), what is transparent over white."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.clip(np.rint(wide / 257.0), 0, 255).astype(np.uint8))
    if image.mode == "F":
        raise UnreadableImageError("floating-point pixels of unknown range")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def _pixels(image: Image.Image, options: FaceOptions) -> np.ndarray:
    if options.channels == 3:
        image = image.convert("RGB")
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
