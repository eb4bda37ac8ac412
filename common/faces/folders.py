"""Photographs in folders: one folder a person, or all in one folder with persons unknown."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.faces.dataset import FaceDataset, FaceOptions
from common.faces.preprocessing import UnreadableImageError, decode, is_image

MAX_EXAMPLES = 5


class SkippedImages(UserWarning):
    """Some files of a source were not used; the message says how many, and why."""


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    groups: the files of each person, or of one nameless group where `by_person` is false. skipped: the name of each
    thing that was not even tried, and why.
    """

    folder: Path
    groups: list[list[Path]]
    by_person: bool
    skipped: list[tuple[str, str]]


def list_faces(folder: Path) -> Listing:
    """Look through the folder and, one step down, its folders. Names that begin with '.' are ignored; order is by name.

    Raises DataError where it cannot be read, is empty, or has both images and folders of images.
    """
    loose, folders, skipped = _scan(folder)
    seen: set[str] = set()
    groups: list[list[Path]] = []
    nested = 0
    for person in folders:
        real = os.path.realpath(person)
        if real in seen:  # two names for one person would be two persons with half the protection
            skipped.append((person.name, "another name of a folder already read"))
            continue
        seen.add(real)
        files, inner, odd = _scan(person)
        nested += len(inner)
        skipped += [(f"{person.name}/{name}", reason) for name, reason in odd]
        skipped += [(f"{person.name}/{path.name}", "a folder inside a person's folder") for path in inner]
        if files:
            groups.append(files)
    by_person = any(is_image(path) for files in groups for path in files)
    images = [path for path in loose if is_image(path)] if by_person else loose
    if by_person and images:
        raise DataError(
            f"{folder} holds both loose images ({len(images)}, such as {images[0].name}) and person folders "
            f"({len(groups)}): whose are the loose ones? Move each into its person's folder, or all images into one "
            "folder without persons"
        )
    if by_person:
        skipped += [(path.name, "not an image") for path in loose]
        return Listing(folder, groups, True, skipped)
    if not any(is_image(path) for path in loose):
        advice = "its folders hold only folders: name the one above the persons" if nested else "check the path"
        raise DataError(f"{folder} holds no image that can be read, nor do the {len(folders)} folders in it: {advice}")
    return Listing(folder, [loose], False, skipped)


def load_folder(listing: Listing, options: FaceOptions) -> FaceDataset:
    """Decode every file of the listing. What cannot be used is left out, and counted in one SkippedImages warning.

    A person none of whose images can be used is left out. Raises DataError where not a single image can be used.
    """
    images: list[np.ndarray] = []
    persons: list[int] = []
    skipped = list(listing.skipped)
    num_persons = 0
    for files in listing.groups:
        before = len(images)
        for path in files:
            try:
                images.append(decode(path, options))
            except UnreadableImageError as error:
                skipped.append((str(path.relative_to(listing.folder)), str(error)))
        persons += [num_persons] * (len(images) - before)
        num_persons += len(images) > before
    if not images:
        raise DataError(
            f"{listing.folder} holds no image that can be read ({_summary(skipped)}): check the path and the files"
        )
    if skipped:
        warnings.warn(f"{listing.folder}: {len(images)} images read, {_summary(skipped)}", SkippedImages, stacklevel=5)
    return FaceDataset(np.stack(images), np.array(persons, dtype=np.int64) if listing.by_person else None)


def _scan(folder: Path) -> tuple[list[Path], list[Path], list[tuple[str, str]]]:
    """Regular files, folders, and names that are neither (broken links, pipes); none hidden. Raises DataError."""
    files, folders, odd = [], [], []
    try:
        with os.scandir(folder) as entries:
            visible = sorted(
                (entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name
            )
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


def _summary(skipped: Iterable[tuple[str, str]]) -> str:
    skipped = list(skipped)
    reasons = Counter(reason for _, reason in skipped)
    counts = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(MAX_EXAMPLES))
    names = ", ".join(name for name, _ in skipped[:MAX_EXAMPLES])
    return f"{len(skipped)} skipped: {counts} (such as {names})" if skipped else "0 skipped"
