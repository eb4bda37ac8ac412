"""What every kind of source comes to before it is a data set: its pictures, and what is known of each."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Self

import numpy as np

from common.errors import DataError
from common.faces.dataset import FaceDataset, FaceOptions
from common.faces.preprocessing import UnreadableImageError

MAX_EXAMPLES = 5

Notes = tuple[tuple[str, str], ...]
Track = Callable[[Sequence[Any]], Iterable[Any]]


def untracked(pictures: Sequence[Any]) -> Iterable[Any]:
    """Without a progress bar."""
    return pictures


class SkippedImages(UserWarning):
    """Some files of a source were not used; the message says how many, and why."""


@dataclass(frozen=True)
class Reading:
    """Faces, and the account of how they were read.

    names: the file of each face, relative to the source, '' where it comes from no file. skipped: the name of each thing
    that was left out, and why. remarks: the same of what was used although something was wrong with it.
    """

    faces: FaceDataset
    names: tuple[str, ...]
    skipped: Notes
    remarks: Notes = ()

    def warn(self, place: str) -> None:
        """One SkippedImages warning that counts `skipped` and `remarks`; none where both are empty."""
        told = [summary(self.skipped, "skipped")] if self.skipped else []
        told += [summary(self.remarks, "kept with a remark")] if self.remarks else []
        if told:
            message = f"{place}: {len(self.faces)} images read, {'; '.join(told)}"
            warnings.warn(message, SkippedImages, stacklevel=2)


@dataclass(frozen=True)
class Gallery:
    """The pictures of a source, not yet cut.

    place: the source, for messages. pictures: N of whatever `decode` takes; it gives the faces of one, each uint8
    (C, H, H), or raises UnreadableImageError. names: (N,), as in `Reading`. persons: who is on each, any int64 (N,), None where the
    source knows no persons. labels: int64 (N,) or None. attributes: name -> text (N,). photographs: any int64 (N,), what each
    picture was cut from before; None where each is a photograph of its own.
    """

    place: str
    pictures: Sequence[Any]
    decode: Callable[[Any, FaceOptions], list[np.ndarray]]
    names: Sequence[str]
    persons: np.ndarray | None = None
    labels: np.ndarray | None = None
    attributes: Mapping[str, np.ndarray] = field(default_factory=dict)
    skipped: Notes = ()
    remarks: Notes = ()
    photographs: np.ndarray | None = None

    def without(self, left_out: Mapping[int, str]) -> Self:
        """All pictures but those, which are skipped for the reasons given."""
        kept = [i for i in range(len(self.pictures)) if i not in left_out]
        noted = [(self.names[i] or f"picture {i}", reason) for i, reason in sorted(left_out.items())]
        return replace(
            self,
            pictures=[self.pictures[i] for i in kept],
            names=[self.names[i] for i in kept],
            persons=None if self.persons is None else self.persons[kept],
            labels=None if self.labels is None else self.labels[kept],
            photographs=None if self.photographs is None else self.photographs[kept],
            attributes={name: column[kept] for name, column in self.attributes.items()},
            skipped=(*self.skipped, *noted),
        )

    def labelled(self, column: str, values: Sequence[str]) -> Self:
        """Labelled by the place of attribute `column` in `values`; pictures with another value are left out.

        Raises DataError where there is no such attribute, or no picture with any of the values.
        """
        if column not in self.attributes:
            raise DataError(f"{self.place} has no attribute {column!r} to label by: {_advice(column, self.attributes)}")
        place = {value: label for label, value in enumerate(values)}
        column_values = [str(value).strip() for value in self.attributes[column]]
        left_out = {i: f"has another {column} than asked for" for i, v in enumerate(column_values) if v not in place}
        if len(left_out) == len(self.pictures):
            found = ", ".join(sorted(set(column_values))[:MAX_EXAMPLES])
            raise DataError(
                f"{self.place}: no image has {column} among {', '.join(values)}; its values are such as {found}"
            )
        labels = np.array([place.get(value, 0) for value in column_values], dtype=np.int64)
        return replace(self, labels=labels).without(left_out)

    def cut(self, options: FaceOptions, track: Track = untracked) -> Reading:
        """Decode every picture. What cannot be used is skipped, and a person with it of whom no picture is left.

        track: wraps the pictures as they are gone through, for a progress bar.

        Raises DataError where not a single picture can be used, or where `options.detect` is 'all' and persons are known.
        """
        if options.detect == "all" and self.persons is not None:
            raise DataError(
                f"detect = all and {self.place} says who is on each photograph: others on it would be taken for that person; "
                "use detect largest"
            )
        images: list[np.ndarray] = []
        whose: list[int] = []
        unreadable: dict[int, str] = {}
        for i, picture in enumerate(track(self.pictures)):
            try:
                found = self.decode(picture, options)
            except UnreadableImageError as error:
                unreadable[i] = str(error)
                continue
            images += found
            whose += [i] * len(found)
        skipped = self.without(unreadable).skipped
        if not images:
            raise DataError(
                f"{self.place} holds no image that can be read ({summary(skipped, 'skipped')}): check the path and the files"
            )
        # All faces of one photograph are one unit, however they came to be pictures of their own.
        photographs = np.array(whose) if self.photographs is None else self.photographs[whose]
        faces = FaceDataset(
            np.stack(images),
            None if self.persons is None else np.unique(self.persons[whose], return_inverse=True)[1].astype(np.int64),
            None if self.labels is None else self.labels[whose],
            {name: column[whose] for name, column in self.attributes.items()},
            _parted(photographs),
        )
        return Reading(faces, tuple(self.names[i] for i in whose), skipped, self.remarks)


def _parted(photographs: np.ndarray) -> np.ndarray | None:
    """Numbered without gaps; None where no two are alike."""
    distinct, places = np.unique(photographs, return_inverse=True)
    return None if len(distinct) == len(photographs) else places.astype(np.int64)


def numbered(names: Sequence[str]) -> np.ndarray:
    """int64 (N,): equal texts get equal numbers, counted from 0 in the order in which they first come."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean ...?`, or nothing where no known name is near."""
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def summary(notes: Sequence[tuple[str, str]], what: str) -> str:
    """How many notes of which kinds, with a few names."""
    reasons = Counter(reason for _, reason in notes)
    counts = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(MAX_EXAMPLES))
    names = ", ".join(name for name, _ in notes[:MAX_EXAMPLES])
    return f"{len(notes)} {what}: {counts} (such as {names})" if notes else f"0 {what}"


def _advice(column: str, attributes: Mapping[str, np.ndarray]) -> str:
    if not attributes:
        return "it has no attributes; give some with attributes = a CSV or 'utkface'"
    return f"it has {', '.join(attributes)}{nearest(column, list(attributes))}"
