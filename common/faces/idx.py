"""IDX, the format of MNIST and its kin: a magic number, big-endian sizes, raw bytes; gzip or not.

Specified at http://yann.lecun.com/exdb/mnist.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.faces.arrays import fit_pixels
from common.faces.gallery import Gallery

PREFIXES = {"train": ("train",), "test": ("t10k", "test")}
# Far above any real file of this kind; a damaged header must not ask for all of the memory.
MAX_BYTES = 4 * 2**30


def find_idx(folder: Path, split: str) -> tuple[Path, Path] | None:
    """The files of the images and of the labels of one split; None where the folder has no IDX files at all.

    Raises DataError where the folder has some, but not both of this split.
    """
    if not any(_matches(folder, "*images?idx3-ubyte*")):
        return None
    pair: list[Path] = []
    for kind, rank in (("images", 3), ("labels", 1)):
        found = [
            path
            for prefix in PREFIXES[split]
            for suffix in ("", ".gz")
            for path in _matches(folder, f"{prefix}-{kind}?idx{rank}-ubyte{suffix}")
        ]
        if not found:
            raise DataError(
                f"{folder} has IDX files and no {PREFIXES[split][0]}-{kind}-idx{rank}-ubyte[.gz] among "
                "them: add it, or ask for the other split"
            )
        pair.append(found[0])
    return pair[0], pair[1]


def idx_files(folder: Path) -> list[Path]:
    """All IDX files of a folder, those of both splits."""
    return _matches(folder, "*idx?-ubyte*")


def gather_idx(images_path: Path, labels_path: Path) -> Gallery:
    """One split: labels, no persons. Raises DataError where a file is damaged or the two do not fit each other."""
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if not len(images) or len(images) != len(labels):
        raise DataError(
            f"{images_path.name} has {len(images)} images and {labels_path.name} {len(labels)} labels: get both anew"
        )
    names = [""] * len(images)
    return Gallery(str(images_path.parent), list(images), fit_pixels, names, labels=labels.astype(np.int64))


def read_idx(path: Path, rank: int) -> np.ndarray:
    """The array in an IDX file of unsigned bytes, uint8 of `rank` dimensions. Raises DataError for anything else."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            header = file.read(4 + 4 * rank)
            if len(header) != 4 + 4 * rank or header[:4] != bytes([0, 0, 8, rank]):
                raise DataError(
                    f"{path} begins with {header[:4].hex()}, IDX of bytes in {rank} dimensions with 000008{rank:02x}"
                )
            shape = [int.from_bytes(header[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
            expected = math.prod(shape)
            if expected > MAX_BYTES:
                raise DataError(
                    f"{path} claims {shape}, {expected} bytes: more than the {MAX_BYTES} that are read at most"
                )
            content = file.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): get it anew") from error
    if len(content) != expected:
        amount = "more" if len(content) > expected else f"only {len(content)}"
        raise DataError(f"{path} claims {shape}, {expected} bytes, and holds {amount}: get it anew")
    if rank > 1 and 0 in shape[1:]:
        raise DataError(f"{path} claims {shape}: images without pixels")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _matches(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))
