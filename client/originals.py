"""The files that an owner's faces come from, as they lie on the disk: how large, grey or colour, and which are the same."""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from common.errors import DataError
from common.faces.preprocessing import FORMATS

GREY_MODES = ("1", "L", "LA", "La", "F")


@dataclass(frozen=True)
class Original:
    """side: the shorter side in pixels. width, height: as stored, before EXIF turns it. grey: stored without colour. digest:
    SHA-256 of the file's bytes.
    """

    width: int
    height: int
    grey: bool
    digest: bytes

    @property
    def side(self) -> int:
        """The shorter side in pixels."""
        return min(self.width, self.height)


def inspect(path: Path) -> Original:
    """Read a file that is known to be an image; its pixels are not decoded. Raises DataError where it is gone or changed."""
    try:
        content = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is not the reader's business
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                grey = image.mode in GREY_MODES or image.mode.startswith("I")
                return Original(image.width, image.height, grey, hashlib.sha256(content).digest())
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} could be read a moment ago and cannot now ({error}): check again") from error
