"""Photographs in folders: one folder a person, or whose they are in a CSV, or persons unknown.

With a column of persons the CSV says who is who, wherever the files lie: all images of one person are one person's, in
however many folders. The folders are still asked: where some hold one person each and others several, then somebody's
images are probably written two ways, which would halve their protection, and the source is refused.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.faces.attributes import Table, read_table, text_column, utkface
from common.faces.cache import file_states
from common.faces.dataset import FaceOptions
from common.faces.gallery import Gallery, Notes, numbered
from common.faces.idx import find_idx, gather_idx, idx_files
from common.faces.preprocessing import decode, is_image
from common.faces.source import Source, only_train
from common.sections import FaceSource

# Folders within the folder of images, where a CSV or the names say what each image is.
MAX_DEPTH = 2
BY_NAME = "utkface"


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    files: to be decoded. persons: int64, the number of the folder that each lies in, or None. skipped: the name of each
    thing that was not even tried, and why.
    """

    folder: Path
    files: list[Path]
    persons: np.ndarray | None
    skipped: Notes

    @property
    def names(self) -> list[str]:
        """The files relative to the folder, with slashes."""
        return [path.relative_to(self.folder).as_posix() for path in self.files]


def open_folder(where: str, source: FaceSource, options: FaceOptions, split: str) -> Source:
    """IDX files, or photographs with what `source.attributes` says of them. Raises DataError."""
    folder = Path(where)
    pair = find_idx(folder, split)
    if pair is not None:
        if source.attributes:
            raise DataError(f"attributes = {source.attributes!r} with the IDX files of {folder}: they name no images")
        return Source(file_states(idx_files(folder)), lambda: gather_idx(*pair))
    only_train(where, split)
    if source.attributes == BY_NAME:
        if source.person_column:
            raise DataError(
                f"person-column = {source.person_column!r} with attributes {BY_NAME}: file names say no persons"
            )
        listing = list_tree(folder)
        return Source(_state(listing), lambda: _described_by_names(_gallery(listing)))
    if source.attributes:
        path = Path(source.attributes).expanduser().absolute()
        said = file_states([path] if path.is_file() else [])  # before it is read: it may change meanwhile
        table = read_table(path, source.file_column)
        listing = list_tree(folder, path) if source.person_column else list_faces(folder, path)
        return Source([_state(listing), said], lambda: _described_by_table(listing, table, source))
    listing = list_faces(folder)
    return Source(_state(listing), lambda: _gallery(listing))


def list_faces(folder: Path, but: Path | None = None) -> Listing:
    """Look through the folder and, one step down, its folders. Names that begin with '.' are ignored, and so is `but`; order is by
    name.

    Raises DataError where it cannot be read, is empty, or has both images and folders of images.
    """
    loose, folders, odd = _scan(folder)
    loose = [path for path in loose if path != but]
    skipped = list(odd)
    seen: set[str] = set()
    files: list[Path] = []
    persons: list[int] = []
    nested = 0
    for number, person in enumerate(folders):
        real = os.path.realpath(person)
        if real in seen:  # two names for one person would be two persons with half the protection
            skipped.append((person.name, "another name of a folder already read"))
            continue
        seen.add(real)
        inside, inner, odd = _scan(person)
        nested += len(inner)
        skipped += [(f"{person.name}/{name}", reason) for name, reason in odd]
        skipped += [(f"{person.name}/{path.name}", "a folder inside a person's folder") for path in inner]
        files += inside
        persons += [number] * len(inside)
    by_person = any(is_image(path) for path in files)
    images = [path for path in loose if is_image(path)] if by_person else loose
    if by_person and images:
        raise DataError(
            f"{folder} holds both loose images ({len(images)}, such as {images[0].name}) and person folders "
            f"({len(set(persons))}): whose are the loose ones? Move each into its person's folder, or all images into one "
            "folder without persons, or name a CSV and its person-column"
        )
    if by_person:
        skipped += [(path.name, "not an image") for path in loose]
        return Listing(folder, files, np.array(persons, dtype=np.int64), tuple(skipped))
    if not any(is_image(path) for path in loose):
        advice = "its folders hold only folders: name the one above the persons" if nested else "check the path"
        raise DataError(f"{folder} holds no image that can be read, nor do the {len(folders)} folders in it: {advice}")
    return Listing(folder, loose, None, tuple(skipped))


def list_tree(folder: Path, but: Path | None = None) -> Listing:
    """All files in the folder and in the folders up to MAX_DEPTH steps down, without `but`; no persons. Raises DataError."""
    files: list[Path] = []
    skipped: list[tuple[str, str]] = []
    seen: set[str] = set()
    waiting = [(folder, 0)]
    while waiting:
        place, depth = waiting.pop(0)
        name = place.relative_to(folder).as_posix()
        real = os.path.realpath(place)
        if real in seen:
            skipped.append((name, "another name of a folder already read"))
            continue
        seen.add(real)
        if depth > MAX_DEPTH:
            skipped.append((name, f"a folder more than {MAX_DEPTH} folders down"))
            continue
        inside, inner, odd = _scan(place)
        files += [path for path in inside if path != but]
        skipped += [((Path(name) / odd_name).as_posix(), reason) for odd_name, reason in odd]
        waiting += [(path, depth + 1) for path in inner]
    if not files:
        raise DataError(f"{folder} holds no image, nor do the folders in it: check the path")
    return Listing(folder, sorted(files), None, tuple(skipped))


def _gallery(listing: Listing) -> Gallery:
    return Gallery(str(listing.folder), listing.files, decode, listing.names, listing.persons, skipped=listing.skipped)


def _described_by_names(gallery: Gallery) -> Gallery:
    """With the attributes that UTKFace's file names say; files with other names are skipped. Raises DataError."""
    said = [utkface(Path(name).name) for name in gallery.names]
    told = [found for found in said if found is not None]
    if not told:
        raise DataError(
            f"{gallery.place}: no file is named as in UTKFace, age_gender_race_datetime.jpg.chip.jpg; the names are such as "
            f"{gallery.names[0]}"
        )
    odd = {i: "a name that says no age, gender and race" for i, found in enumerate(said) if found is None}
    return replace(
        gallery.without(odd), attributes={key: text_column([found[key] for found in told]) for key in told[0]}
    )


def _described_by_table(listing: Listing, table: Table, source: FaceSource) -> Gallery:
    """With the CSV's columns as attributes and, where one is named, as persons. Raises DataError.

    A file without a row is left out where a person or label is asked for, else kept with empty attributes. A file whose
    person is not given is left out.
    """
    gallery, names, column = _gallery(listing), listing.names, source.person_column
    present = set(names)
    unmatched = [(file, f"a row of {table.path.name} without a file") for file in table.rows if file not in present]
    if len(unmatched) == len(table.rows):
        raise DataError(
            f"{table.path} names none of the files in {listing.folder}: it names such as {unmatched[0][0]}, the files are such "
            f"as {names[0]}; names are relative to that folder"
        )
    said = table.column(column, names) if column else []
    attributes = {name: text_column(table.column(name, names)) for name in table.columns if name != column}
    gallery = replace(gallery, attributes=attributes, skipped=gallery.skipped + tuple(sorted(unmatched)))
    rowless = {i: f"no row in {table.path.name}" for i, name in enumerate(names) if name not in table.rows}
    if column:
        gallery = replace(gallery, persons=numbered(said))
        nobody = {i: f"no {column} in {table.path.name}" for i, person in enumerate(said) if not person}
        rowless = nobody | rowless
        _check_folders(names, said, column, table)
    if column or source.label_column:
        return gallery.without(rowless)
    return replace(gallery, remarks=tuple((names[i], reason) for i, reason in rowless.items()))


def _check_folders(names: Sequence[str], persons: Sequence[str], column: str, table: Table) -> None:
    """Refuse a column of persons that divides some folders and agrees with others. Raises DataError."""
    folders: dict[str, list[str]] = {}
    for name, person in zip(names, persons, strict=True):
        place, slash, _ = name.rpartition("/")
        if slash and person:
            folders.setdefault(place, []).append(person)
    several = {place: said for place, said in folders.items() if len(said) > 1}
    divided = {place: sorted(set(said)) for place, said in several.items() if len(set(said)) > 1}
    if divided and len(divided) < len(several):
        place, said = next(iter(divided.items()))
        raise DataError(
            f"folder {place} holds images of {said[0]!r} and {said[1]!r} by column {column!r} of {table.path}, and other folders "
            "hold one person each: were one person written two ways, they would be protected as two. Correct the column, move "
            "the image, or put all images into one folder"
        )


def _state(listing: Listing) -> list[object]:
    return [file_states(listing.files), None if listing.persons is None else listing.persons.tolist()]


def _scan(folder: Path) -> tuple[list[Path], list[Path], list[tuple[str, str]]]:
    """Regular files, folders, and names that are neither (broken links, pipes); none hidden. Raises DataError."""
    files, folders, odd = [], [], []
    try:
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not _passed_over(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror}): check the path and who may read it") from error
    for entry in visible:
        try:
            if entry.is_dir():
                folders.append(Path(entry.path))
            elif entry.is_file():
                files.append(Path(entry.path))
            else:
                odd.append((entry.name, "neither a file nor a folder"))
        except OSError as error:  # a link to itself
            odd.append((entry.name, f"cannot be followed ({error.strerror})"))
    return files, folders, odd


def _passed_over(name: str) -> bool:
    """Hidden things, and what Visard itself keeps beside a folder of faces: its pictures are no new faces."""
    return name.startswith(".") or name.endswith(".visard")
