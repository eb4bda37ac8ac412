"""What an owner's faces are, before any run sees them: counts, sizes, attributes, copies, and what cannot be used.

All of it is exact and therefore **private**: it is for the owner's eyes, and nothing here is sent or declared. `Declared` is a
suggestion in round figures, for people to agree upon; see `common.sections.PrivacyConfig`.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.duplicates import MAX_COMPARED, alike, equal_pairs, fingerprints, joined
from client.originals import Original, inspect
from common.faces import FaceDataset, Reading
from common.fields import listed
from common.privacy.units import PrivacyUnit
from common.sections import FaceSource

# More values than these are told by their number or their range, and are no classes.
MAX_VALUES = 20
# An expected batch much below this is more noise than signal, whatever the privacy.
LEAST_BATCH = 20.0
SAMPLE_RATES = (0.02, 0.05, 0.1, 0.2, 0.5)
# Neighbours are a half, a third or a quarter apart, so that a figure rounded to one of these is within a fifth of exact.
ROUND_FIGURES = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)
# Of fewer, a round figure is the count itself.
LEAST_UNITS = 20
# Images of one person that are averaged in a step.
MOST_A_PERSON = 8
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")

Track = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Spread:
    """Of several figures."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, figures: Sequence[float] | np.ndarray) -> "Spread":
        """Of one figure or more."""
        return cls(float(np.min(figures)), float(np.median(figures)), float(np.max(figures)))


@dataclass(frozen=True)
class Column:
    """An attribute. distinct: how many values. counts: of each, in order; empty above MAX_VALUES. range: where all are numbers.
    missing: images of which the source says nothing.
    """

    distinct: int
    counts: dict[str, int]
    range: Spread | None
    missing: int


@dataclass(frozen=True)
class Copies:
    """One picture that is there more than once. images: their indices. persons: how many hold it, 0 where persons are unknown.
    same_bytes: whether the files are equal. halves: whether the copies are units of their own, so that each has only a part of the
    protection promised.
    """

    images: list[int]
    names: list[str]
    persons: int
    same_bytes: bool
    halves: bool


@dataclass(frozen=True)
class Files:
    """The originals. sizes: the most frequent, as 'WIDTHxHEIGHT'. grey: stored without colour. small: files whose crop has fewer
    pixels than the run's, which are enlarged; where faces are looked for, files that are smaller as a whole.
    """

    count: int
    side: Spread
    sizes: dict[str, int]
    small: int
    grey: int


@dataclass(frozen=True)
class Declared:
    """Round figures for the constants that a run declares. units: what expected_batch / sample_rate comes to."""

    units: float
    sample_rate: float
    expected_batch: float
    images_per_person: int


@dataclass(frozen=True)
class Findings:
    """All that was found.

    photographs: as many as images, unless several faces are cut from one. persons, images_a_person, single: None where
    persons are unknown. grey: images without any colour, None in a grey run. compared: whether copies that differ in a
    pixel were looked for. declared: None where units are not known or too few.
    """

    data: str
    image_size: int
    channels: int
    unit: str
    images: int
    photographs: int
    persons: int | None
    images_a_person: Spread | None
    single: int | None
    files: Files | None
    grey: int | None
    labels: dict[str, int]
    attributes: dict[str, Column]
    copies: list[Copies]
    compared: bool
    skipped: list[tuple[str, str]]
    remarks: list[tuple[str, str]]
    declared: Declared | None

    @property
    def refused(self) -> str | None:
        """Why a run with this unit would refuse these faces; None where it would not."""
        if self.unit == PrivacyUnit.PERSON and self.persons is None:
            return (
                "unit person, and who is on each image is not known: put each person's images in a folder of their own, name a "
                "CSV and its person-column, or protect images with --unit image"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "refused": self.refused}


def check(
    source: FaceSource, reading: Reading, unit: PrivacyUnit, track: Track = lambda items, _what: items
) -> Findings:
    """Look at the faces that were read from `source` as a run would read them, and at their files.

    track: wraps what is gone through, for a progress bar. Raises DataError where a file has changed since.
    """
    faces = reading.faces
    originals = _originals(source, reading, track)
    known = faces.persons is not None
    held = np.bincount(faces.persons) if faces.persons is not None else np.zeros(0, dtype=np.int64)
    units = len(faces.units(unit)) if known or unit is PrivacyUnit.IMAGE else 0
    return Findings(
        data=source.data,
        image_size=faces.image_size,
        channels=faces.channels,
        unit=str(unit),
        images=len(faces),
        photographs=len(faces.units(PrivacyUnit.IMAGE)),
        persons=faces.num_persons if known else None,
        images_a_person=Spread.of(held) if known else None,
        single=int((held == 1).sum()) if known else None,
        files=_files(originals, faces.image_size, source.crop if source.detect == "none" else 1.0)
        if originals
        else None,
        grey=_without_colour(faces.images) if faces.channels == 3 else None,
        labels=_labels(faces, listed(source.label_values)),
        attributes={name: _column(column) for name, column in faces.attributes.items()},
        copies=_copies(reading, originals, unit, track),
        compared=len(faces) <= MAX_COMPARED,
        skipped=list(reading.skipped),
        remarks=list(reading.remarks),
        declared=declared(units, float(np.median(held)) if known else 1.0),
    )


def declared(units: int, images_a_person: float) -> Declared | None:
    """Suggested constants for clients that hold about so many units, in round figures; None for less than LEAST_UNITS.

    They are public. The units that they come to are within a fifth of `units`, and images_per_person is a power of two. One unit
    more or fewer hardly ever shows in them; that is no guarantee, so people should agree on figures without counting.
    """
    if units < LEAST_UNITS:
        return None
    rounded = _round_figure(units)
    rate = next((rate for rate in SAMPLE_RATES if rate * rounded >= LEAST_BATCH), SAMPLE_RATES[-1])
    of_one = min(MOST_A_PERSON, 2 ** int(np.ceil(np.log2(images_a_person))))
    return Declared(rounded, rate, round(rate * rounded, 6), of_one)


def _round_figure(count: float) -> float:
    power = 10.0 ** np.floor(np.log10(count))
    return float(min((figure * power for figure in ROUND_FIGURES), key=lambda figure: abs(figure - count)))


def _originals(source: FaceSource, reading: Reading, track: Track) -> dict[str, Original]:
    """The file of each name; none where the faces come from no folder of files."""
    folder = Path(source.data).expanduser()
    names = sorted(set(reading.names) - {""})
    if not folder.is_dir():
        return {}
    return {name: inspect(folder / name) for name in track(names, "looking at the files")}


def _files(originals: dict[str, Original], image_size: int, crop: float) -> Files:
    found = list(originals.values())
    sizes = Counter(f"{original.width}x{original.height}" for original in found)
    return Files(
        count=len(found),
        side=Spread.of([original.side for original in found]),
        sizes=dict(sizes.most_common(3)),
        small=sum(original.side * crop < image_size for original in found),
        grey=sum(original.grey for original in found),
    )


def _without_colour(images: np.ndarray) -> int:
    """How many of (N, 3, H, H) have equal red, green and blue everywhere."""
    return sum(bool((image[:1] == image[1:]).all()) for image in images)


def _labels(faces: FaceDataset, values: Sequence[str]) -> dict[str, int]:
    if faces.labels is None:
        return {}
    counts = np.bincount(faces.labels, minlength=len(values))
    return {values[i] if values else str(i): int(count) for i, count in enumerate(counts)}


def _column(column: np.ndarray) -> Column:
    counts = Counter(column.tolist())
    missing = counts.pop("", 0)
    numbers = [float(value) for value in counts if NUMBER.fullmatch(value)]
    numeric = bool(counts) and len(numbers) == len(counts)
    values = sorted(counts, key=float) if numeric else sorted(counts)
    spread = np.repeat([float(value) for value in values], [counts[value] for value in values]) if numeric else None
    return Column(
        distinct=len(counts),
        counts={value: counts[value] for value in values} if len(counts) <= MAX_VALUES else {},
        range=None if spread is None else Spread.of(spread),
        missing=missing,
    )


def _copies(reading: Reading, originals: dict[str, Original], unit: PrivacyUnit, track: Track) -> list[Copies]:
    """The worst first: those that halve the protection, then those with most images."""
    faces, names = reading.faces, reading.names
    digests = [originals[name].digest if name in originals else None for name in names]
    pixels = [hashlib.sha256(image).hexdigest() for image in faces.images]
    pairs = [equal_pairs(digests), equal_pairs(pixels)]
    if len(faces) <= MAX_COMPARED:
        # One of each that are equal: a thousand copies of one picture would be half a million pairs.
        one_of_each = np.sort(np.unique(pixels, return_index=True)[1])
        prints = fingerprints([faces.images[i] for i in one_of_each])
        pairs.append(one_of_each[alike(prints, lambda blocks: track(blocks, "comparing the pictures"))])
    photograph = np.arange(len(faces)) if faces.photographs is None else faces.photographs
    found = []
    for images in joined(np.concatenate(pairs)):
        if len(set(photograph[images].tolist())) == 1:  # faces of one photograph that look alike
            continue
        persons = 0 if faces.persons is None else len(set(faces.persons[images].tolist()))
        same = digests[images[0]] is not None and len({digests[i] for i in images}) == 1
        halves = persons != 1 or unit is PrivacyUnit.IMAGE
        found.append(Copies(images, [names[i] or f"image {i}" for i in images], persons, same, halves))
    return sorted(found, key=lambda copies: (not copies.halves, -len(copies.images)))
