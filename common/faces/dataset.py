"""The data set that everything else sees: square uint8 images, and who is on them where that is known."""

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from common.errors import DataError
from common.files import write_atomically
from common.privacy.units import PrivacyUnit

IMAGE_SIZES = (28, 32, 64)
CHANNELS = (1, 3)
FORMAT = "visard-faces-1"


@dataclass(frozen=True)
class FaceOptions:
    """What a face is cut to.

    image_size: side of the square in pixels, 28, 32 or 64. channels: 1 grey, 3 colour (RGB). crop: share of the shorter
    side that the centre crop keeps, in (0, 1]. Raises DataError for anything else.
    """

    image_size: int = 32
    channels: int = 3
    crop: float = 1.0

    def __post_init__(self) -> None:
        if self.image_size not in IMAGE_SIZES:
            raise DataError(f"image_size is {self.image_size!r}: use one of {IMAGE_SIZES}")
        if self.channels not in CHANNELS:
            raise DataError(f"channels is {self.channels!r}: use 1 (grey) or 3 (colour)")
        if not 0 < self.crop <= 1:
            raise DataError(f"crop is {self.crop!r}, the share of the shorter side to keep: use a number in (0, 1]")


@dataclass(frozen=True)
class FaceDataset:
    """Images of faces, decoded and of one size.

    images: uint8 (N, C, H, H), C 1 or 3. persons: int64 (N,), the number of the person on each image, 0..num_persons-1
    with none left out; None where the source knows no persons. labels: int64 (N,), classes >= 0; None where it has none.
    Raises DataError where these do not fit each other.
    """

    images: np.ndarray
    persons: np.ndarray | None = None
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = self.images.shape
        square = len(shape) == 4 and shape[1] in CHANNELS and shape[2] == shape[3] > 0
        if not square or self.images.dtype != np.uint8:
            raise DataError(f"images are {self.images.dtype} {shape}: they must be uint8 (N, 1 or 3, H, H)")
        for name, column in (("persons", self.persons), ("labels", self.labels)):
            if column is None:
                continue
            if column.dtype != np.int64 or column.shape != shape[:1]:
                raise DataError(
                    f"{name} are {column.dtype} {column.shape}: they must be int64 ({shape[0]},), one an image"
                )
            if column.size and column.min() < 0:
                raise DataError(f"{name} go down to {column.min()}: count from 0")
        if self.persons is not None and np.unique(self.persons).size != self.num_persons:
            raise DataError(f"persons go up to {self.num_persons - 1} with gaps: number them from 0 without gaps")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_persons(self) -> int:
        """How many persons; 0 where the source knows none."""
        return 0 if self.persons is None or not self.persons.size else int(self.persons.max()) + 1

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return int(self.images.shape[2])

    @property
    def channels(self) -> int:
        """1 grey, 3 colour."""
        return int(self.images.shape[1])

    def tensor(self, indices: np.ndarray) -> torch.Tensor:
        """The images at `indices` (B,) as float32 (B, C, H, W) in [-1, 1], on the CPU."""
        return torch.from_numpy(self.images[self._checked(indices)]).to(torch.float32).div_(127.5).sub_(1.0)

    def subset(self, indices: np.ndarray) -> Self:
        """The images at `indices` (B,), copied, in that order; the persons left are numbered anew from 0."""
        indices = self._checked(indices)
        persons = None if self.persons is None else np.unique(self.persons[indices], return_inverse=True)[1]
        labels = None if self.labels is None else self.labels[indices]
        return type(self)(self.images[indices], None if persons is None else persons.astype(np.int64), labels)

    def units(self, unit: PrivacyUnit) -> list[np.ndarray]:
        """The image indices, int64, of every privacy unit: to add or remove one of these is what noise hides.

        PERSON: entry p holds all images of person p. Raises DataError where the source knows no persons: taking each
        image for a person would promise more than is kept.
        """
        if unit is PrivacyUnit.IMAGE:
            return list(np.arange(len(self)).reshape(-1, 1))
        if self.persons is None:
            raise DataError(
                "unit 'person' on faces without persons: put each person's images in a folder of their own, or set "
                "unit = 'image', which protects one photograph and not one person"
            )
        order = np.argsort(self.persons, kind="stable")
        ends = np.cumsum(np.bincount(self.persons, minlength=self.num_persons))
        return np.split(order, ends[:-1]) if len(self) else []

    def save(self, path: Path) -> None:
        """Write an .npz file, whole or not at all. Raises OSError."""
        columns = {"persons": self.persons, "labels": self.labels}
        arrays: dict[str, Any] = {name: column for name, column in columns.items() if column is not None}
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, format=np.array(FORMAT), images=self.images, **arrays)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises DataError where the file is missing, damaged or something else."""
        try:
            with path.open("rb") as file:
                arrays = np.load(file, allow_pickle=False)
                if not isinstance(arrays, Mapping):
                    raise DataError(f"{path} is a single array, not an .npz file: write it with FaceDataset.save")
                found = {name: arrays[name] for name in arrays}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(
                f"{path} cannot be read as an .npz file ({error}): write it anew with FaceDataset.save"
            ) from error
        if (
            str(found.pop("format", None)) != FORMAT
            or "images" not in found
            or set(found) - {"images", "persons", "labels"}
        ):
            raise DataError(f"{path} holds {sorted(found)} and no mark {FORMAT!r}: write it with FaceDataset.save")
        return cls(**found)

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices)
        if indices.size == 0:
            return np.zeros(0, dtype=np.int64)
        if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
            raise DataError(f"indices are {indices.dtype} {indices.shape}: give whole numbers (B,)")
        if indices.min() < 0 or indices.max() >= len(self):
            raise DataError(
                f"indices reach from {indices.min()} to {indices.max()}: there are images 0 to {len(self) - 1}"
            )
        return indices
