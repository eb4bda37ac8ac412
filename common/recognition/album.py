"""Photographs with names: who is on each, what else is known of it, and which pairs a list asks about."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from common.errors import DataError
from common.faces import FaceDataset, load_faces
from common.faces.attributes import read_table
from common.faces.cache import cache_folder
from common.faces.gallery import Track, nearest, untracked
from common.faces.loading import FILE
from common.faces.places import name_of
from common.recognition.settings import RecognitionConfig
from common.sections import FaceSource


@dataclass(frozen=True)
class Album:
    """Faces of one size with the names that photographs and persons have.

    faces: N images with persons. files: (N,), the path of each, `PERSON/FILE` for folders of persons, '' where there is none.
    names: (P,), the name of each person.
    """

    faces: FaceDataset
    files: Sequence[str]
    names: Sequence[str]

    def subset(self, indices: np.ndarray) -> "Album":
        """The photographs at `indices`, in that order, and the persons on them."""
        faces = self.faces.subset(indices)
        kept = [] if self.faces.persons is None else np.unique(self.faces.persons[indices]).tolist()
        return Album(faces, [self.files[i] for i in indices], [self.names[person] for person in kept])

    @property
    def persons(self) -> np.ndarray:
        """Who is on each photograph, (N,) int64. Raises DataError where that is not known."""
        if self.faces.persons is None:
            raise DataError(
                "it is not known who is on the photographs: put each person's into a folder of their own, or name a CSV and "
                "its --person-column"
            )
        return self.faces.persons


def read_album(sources: Sequence[FaceSource], config: RecognitionConfig, track: Track = untracked) -> Album:
    """The faces of one source or several as the recogniser wants them; equal names of persons are one person.

    A person is named by the table's column or by the folder; where there is neither, by the source and a number, which mean the
    same person in that source alone. What cannot be used is warned of. Raises DataError.
    """
    parts = []
    for source in sources:
        asked = dataclasses.replace(source, crop=config.crop, detect=config.detect)
        faces = load_faces(
            asked, config.image_size, config.channels, cache_dir=cache_folder() / "faces", named=True, track=track
        )
        attributes = dict(faces.attributes)
        files = attributes.pop(FILE).tolist()
        parts.append(
            (dataclasses.replace(faces, attributes=attributes), files, _person_names(faces.persons, files, source))
        )
    known = {faces.persons is not None for faces, _, _ in parts}
    if len(known) > 1:
        raise DataError("some of the folders say who is on each photograph and others do not: name one kind")
    columns = set.intersection(*(set(faces.attributes) for faces, _, _ in parts))
    names: dict[str, int] = {}
    persons = [names.setdefault(name, len(names)) for _, _, whose in parts for name in whose]
    faces = FaceDataset(
        np.concatenate([faces.images for faces, _, _ in parts]),
        np.array(persons, dtype=np.int64) if persons else None,
        None,
        {name: np.concatenate([faces.attributes[name] for faces, _, _ in parts]) for name in sorted(columns)},
    )
    return Album(faces, [file for _, files, _ in parts for file in files], list(names))


def _person_names(persons: np.ndarray | None, files: Sequence[str], source: FaceSource) -> list[str]:
    """The name of the person on each photograph; none where persons are not known."""
    if persons is None:
        return []
    if source.person_column:
        table = read_table(Path(source.attributes).expanduser().absolute(), source.file_column)
        return table.column(source.person_column, files)
    folders: dict[int, set[str]] = {}
    for person, file in zip(persons.tolist(), files, strict=True):
        folders.setdefault(person, set()).add(PurePosixPath(file).parent.as_posix())
    single = {person: next(iter(found)) for person, found in folders.items() if len(found) == 1}
    by_folder = len(set(single.values())) == len(folders) and not {".", ""} & set(single.values())
    return [single[person] if by_folder else f"{name_of(source.data)}, person {person}" for person in persons.tolist()]


@dataclass(frozen=True)
class Pairs:
    """Pairs of photographs of an album. first, second: (M,) int64 places. same: (M,) bool. folds: (M,) int64, from 1."""

    first: np.ndarray
    second: np.ndarray
    same: np.ndarray
    folds: np.ndarray

    def of_folds(self, folds: Sequence[int]) -> "Pairs":
        """Those of some folds. Raises DataError where there are none."""
        chosen = np.isin(self.folds, folds)
        if not chosen.any():
            raise DataError(
                f"there is no pair in the folds {', '.join(map(str, folds))}: there are {np.unique(self.folds)}"
            )
        return Pairs(self.first[chosen], self.second[chosen], self.same[chosen], self.folds[chosen])

    @property
    def photographs(self) -> np.ndarray:
        """The places of all photographs in them, each once."""
        return np.unique(np.concatenate([self.first, self.second]))


def read_pairs(path: Path, files: Sequence[str]) -> tuple[Pairs, list[int]]:
    """A list in the manner of LFW's pairs.txt (Huang et al. 2007), and the fold of each pair that names a file that is not there.

    First line: how many folds and how many pairs of each kind in each, `10 300`, or only the latter, `300` (one fold). Then, fold by
    fold, `NAME n m` (the n-th and m-th photograph of one person) and `NAME n OTHER m`. A photograph is NAME/NAME_000n with
    any ending. files: those of an album. Raises DataError where the list is missing or damaged, or none of its pairs is there.
    """
    try:
        text = path.read_text(encoding="utf-8").rstrip()
        lines = [line.split() for line in text.splitlines()]
        numbers = [int(word) for word in lines[0]]
        folds, each = (1, numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])
        if min(folds, each) < 1 or len(numbers) > 2:
            raise ValueError(f"its first line is {' '.join(lines[0])}")
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{path} is no list of pairs ({error}): see http://vis-www.cs.umass.edu/lfw") from error
    if len(lines) - 1 != 2 * folds * each:
        raise DataError(
            f"{path} says {folds} folds of 2 x {each} pairs and has {len(lines) - 1} lines of pairs: is it whole?"
        )
    places = {PurePosixPath(file).with_suffix("").as_posix(): place for place, file in enumerate(files) if file}
    found: list[tuple[int, int, bool, int]] = []
    missing: list[int] = []
    for number, words in enumerate(lines[1:]):
        try:
            one, other = (words[0], words[1]), (words[0], words[2]) if len(words) == 3 else (words[2], words[3])
            pair = [places.get(f"{name}/{name}_{int(which):04d}") for name, which in (one, other)]
        except (IndexError, ValueError):
            raise DataError(
                f"{path}, line {number + 2}: {' '.join(words)!r} is no pair; write NAME n m or NAME n OTHER m"
            ) from None
        if pair[0] is not None and pair[1] is not None:
            found.append((pair[0], pair[1], len(words) == 3, number // (2 * each) + 1))
        else:
            missing.append(number // (2 * each) + 1)
    if not found:
        near = nearest(f"{lines[1][0]}/{lines[1][0]}_{int(lines[1][1]):04d}", list(places))
        raise DataError(f"none of the {len(lines) - 1} pairs of {path} has both its photographs in the data{near}")
    first, second, same, fold = (np.array(column) for column in zip(*found, strict=True))
    return Pairs(first, second, same, fold), missing


def draw_pairs(persons: np.ndarray, rng: np.random.Generator, per_person: int = 10) -> Pairs:
    """As many pairs of one person as of two: up to `per_person` of each person's, and as many strangers'.

    persons: (N,) int64. Raises DataError where nobody has two photographs, or there is one person only.
    """
    members = [np.flatnonzero(persons == person) for person in np.unique(persons)]
    several = [places for places in members if len(places) > 1]
    if not several or len(members) < 2:
        raise DataError(
            f"{len(members)} persons, {len(several)} of them with two photographs or more: pairs need two persons, and one "
            "with two photographs"
        )
    first, second = [], []
    for places in several:
        i, j = np.triu_indices(len(places), 1)
        some = rng.permutation(len(i))[:per_person]
        first += places[i[some]].tolist()
        second += places[j[some]].tolist()
    genuine = len(first)
    for _ in range(genuine):
        a, b = rng.choice(len(members), 2, replace=False)
        first.append(int(rng.choice(members[a])))
        second.append(int(rng.choice(members[b])))
    same = np.arange(2 * genuine) < genuine
    return Pairs(np.array(first), np.array(second), same, np.ones(2 * genuine, dtype=np.int64))


def split_photographs(persons: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`count` photographs of each person, and all others. Raises DataError where somebody has not more than `count`."""
    chosen, rest = [], []
    for person in np.unique(persons):
        places = rng.permutation(np.flatnonzero(persons == person))
        if len(places) <= count:
            raise DataError(
                f"person {person} has {len(places)} photographs: {count} to learn from leave none to test with; ask fewer, or leave "
                "the person out"
            )
        chosen += places[:count].tolist()
        rest += places[count:].tolist()
    return np.sort(chosen), np.sort(rest)
