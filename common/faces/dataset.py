"""The data set that everything else sees: square uint8 images, and who is on them where that is known."""

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from common.errors import DataError
from common.files import write_atomically
from common.privacy.units import PrivacyUnit
from common.sections import CHANNELS, DETECT, IMAGE_SIZES

FORMAT = "visard-faces-1"
_ATTRIBUTE = "attribute"  # before an attribute's number in the file: its name may be any text


@dataclass(frozen=True)
class FaceOptions:
    """What a face is cut to.

    image_size: side of the square in pixels, 28, 32, 64 or 128. channels: 1 grey, 3 colour (RGB). crop: share of the shorter
    side that the centre crop keeps, in (0, 1]. detect: 'none', or which faces to find and level: 'largest' or 'all'.
    Raises DataError for anything else.
    """

    image_size: int = 32
    channels: int = 3
    crop: float = 1.0
    detect: str = "none"

    def __post_init__(self) -> None:
        if self.image_size not in IMAGE_SIZES:
            raise DataError(f"image_size is {self.image_size!r}: use one of {IMAGE_SIZES}")
        if self.channels not in CHANNELS:
            raise DataError(f"channels is {self.channels!r}: use 1 (grey) or 3 (colour)")
        if not 0 < self.crop <= 1:
            raise DataError(f"crop is {self.crop!r}, the share of the shorter side to keep: use a number in (0, 1]")
        if self.detect not in DETECT:
            raise DataError(f"detect is {self.detect!r}: use one of {DETECT}")


@dataclass(frozen=True)
class FaceDataset:
    """Images of faces, decoded and of one size.

    images: uint8 (N, C, H, H), C 1 or 3. persons: int64 (N,), the number of the person on each image, 0..num_persons-1
    with none left out; None where the source knows no persons. labels: int64 (N,), classes >= 0; None where it has none.
    attributes: what else the source says of each image, name -> text (N,), '' where it says nothing of one. photographs:
    int64 (N,), the number of the photograph that each image was cut from, without gaps; None where each is one of its own.
    Raises DataError where these do not fit each other.
    """

    images: np.ndarray
    persons: np.ndarray | None = None
    labels: np.ndarray | None = None
    attributes: Mapping[str, np.ndarray] = field(default_factory=dict)
    photographs: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = self.images.shape
        square = len(shape) == 4 and shape[1] in CHANNELS and shape[2] == shape[3] > 0
        if not square or self.images.dtype != np.uint8:
            raise DataError(f"images are {self.images.dtype} {shape}: they must be uint8 (N, 1 or 3, H, H)")
        columns = {"persons": self.persons, "labels": self.labels, "photographs": self.photographs}
        for name, column in columns.items():
            if column is None:
                continue
            if column.dtype != np.int64 or column.shape != shape[:1]:
                raise DataError(
                    f"{name} are {column.dtype} {column.shape}: they must be int64 ({shape[0]},), one an image"
                )
            if column.size and column.min() < 0:
                raise DataError(f"{name} go down to {column.min()}: count from 0")
        for name, column in self.attributes.items():
            if column.dtype.kind != "U" or column.shape != shape[:1]:
                raise DataError(
                    f"attribute {name!r} is {column.dtype} {column.shape}: it must be text ({shape[0]},), one an image"
                )
        for name in ("persons", "photographs"):
            column = columns[name]
            if column is not None and np.unique(column).size != int(column.max(initial=-1)) + 1:
                raise DataError(f"{name} go up to {column.max()} with gaps: number them from 0 without gaps")

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
        """The images at `indices` (B,), copied, in that order; the persons and photographs left are numbered anew from 0."""
        indices = self._checked(indices)
        persons, photographs = (
            None if column is None else np.unique(column[indices], return_inverse=True)[1].astype(np.int64)
            for column in (self.persons, self.photographs)
        )
        labels = None if self.labels is None else self.labels[indices]
        attributes = {name: column[indices] for name, column in self.attributes.items()}
        return type(self)(self.images[indices], persons, labels, attributes, photographs)

    def units(self, unit: PrivacyUnit) -> list[np.ndarray]:
        """The image indices, int64, of every privacy unit: to add or remove one of these is what noise hides.

        IMAGE: one photograph, which is one image, or all faces cut from it. PERSON: entry p holds all images of person p.
        Raises DataError where the source knows no persons: taking each image for a person would promise more than is
        kept.
        """
        if unit is PrivacyUnit.IMAGE:
            return list(np.arange(len(self)).reshape(-1, 1)) if self.photographs is None else _members(self.photographs)
        if self.persons is None:
            raise DataError(
                "unit 'person' on faces without persons: put each person's images in a folder of their own, or set "
                "unit = 'image', which protects one photograph and not one person"
            )
        return _members(self.persons)

    def save(self, path: Path) -> None:
        """Write an .npz file, whole or not at all. Raises OSError."""
        columns = {"persons": self.persons, "labels": self.labels, "photographs": self.photographs}
        arrays: dict[str, Any] = {name: column for name, column in columns.items() if column is not None}
        if self.attributes:
            arrays["attributes"] = np.array(list(self.attributes), dtype=np.str_)
            arrays |= {f"{_ATTRIBUTE}{i}": column for i, column in enumerate(self.attributes.values())}
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
        names = [str(name) for name in found.pop("attributes", np.zeros(0, dtype=np.str_)).ravel()]
        columns = [found.pop(f"{_ATTRIBUTE}{i}", None) for i in range(len(names))]
        attributes = {name: column for name, column in zip(names, columns, strict=True) if column is not None}
        known = "images" in found and not set(found) - {"images", "persons", "labels", "photographs", "format"}
        if not known or len(attributes) != len(names) or str(found.pop("format", None)) != FORMAT:
            raise DataError(f"{path} holds {sorted(found)} and no mark {FORMAT!r}: write it with FaceDataset.save")
        return cls(**found, attributes=attributes)

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


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """The indices of each group, of int64 (N,) numbered without gaps."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.cumsum(np.bincount(groups))[:-1]) if len(groups) else []
