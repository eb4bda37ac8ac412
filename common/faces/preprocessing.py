"""From a photograph as it lies on the owner's disk to a small square of uint8.

Upright (EXIF), centre crop to a square, Lanczos to the size, grey or colour. Nothing else: no face detector that would
have to be trusted, no random step. The face is expected near the middle; `FaceOptions.crop` says how close to go.
"""

import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.faces.dataset import FaceOptions

# Part of the cache's key: raise it whenever the same photograph would come out different.
PREPROCESSING_VERSION = 1
# Only plain raster formats: Pillow would otherwise hand some files to other programs (EPS to Ghostscript).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
Image.init()  # an explicit list of formats finds only those already registered


class UnreadableImageError(Exception):
    """This file is no image that can be used; the message is a reason without a path."""


def decode(path: Path, options: FaceOptions) -> np.ndarray:
    """The image in `path` as uint8 (C, H, H). Raises UnreadableImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a photograph's odd metadata is not the reader's business
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                # JPEG can decode at 1/2, 1/4 or 1/8: keep at least twice the pixels that are needed.
                needed = math.ceil(2 * options.image_size / options.crop)
                image.draft(None, (needed, needed))
                return fit(ImageOps.exif_transpose(image), options)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImageError(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise UnreadableImageError(f"damaged ({type(error).__name__})") from error


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
    image = image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + side, top + side), reducing_gap=4.0)
    if options.channels == 3:
        image = image.convert("RGB")
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


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
