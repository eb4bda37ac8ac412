"""What is known of photographs beside their pixels: a CSV with a row an image, or file names in the manner of UTKFace."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from common.errors import DataError
from common.faces.gallery import nearest

DELIMITERS = (",", ";", "\t")
# Text columns are fixed-width arrays: one long cell would cost as much for every image.
MAX_CELL = 1000

# https://susanqq.github.io/UTKFace: age_gender_race_datetime.jpg, with .chip.jpg in the aligned and cropped set.
UTKFACE = re.compile(r"(\d{1,3})_([01])_([0-4])_\d+\.jpg(\.chip(\.jpg)?)?", re.IGNORECASE)
GENDERS = ("male", "female")
RACES = ("White", "Black", "Asian", "Indian", "Others")
# The last age of each group.
AGE_GROUPS = {"0-12": 12, "13-19": 19, "20-39": 39, "40-59": 59, "60+": 999}


@dataclass(frozen=True)
class Table:
    """A CSV of attributes. columns: all but the one of file names. rows: file name -> its cells, in that order."""

    path: Path
    columns: list[str]
    rows: dict[str, list[str]]

    def column(self, name: str, files: Sequence[str]) -> list[str]:
        """The cells of one column for these files; '' for a file without a row. Raises DataError for no such column."""
        if name not in self.columns:
            raise DataError(
                f"{self.path} has no column {name!r}: it has {', '.join(self.columns)}{nearest(name, self.columns)}"
            )
        place = self.columns.index(name)
        return [self.rows[file][place] if file in self.rows else "" for file in files]


def read_table(path: Path, file_column: str) -> Table:
    """Read a CSV: UTF-8 with or without a byte order mark; comma, semicolon or tab, whichever divides its first line.

    Cells and column names are stripped of the space around them and then taken exactly: 'Ann ' is 'Ann' and 'ann' is
    somebody else. File names are paths relative to the folder of images; a backslash in them is a slash. Columns without a name are
    left out. The order of rows and columns does not matter.

    Raises DataError where it cannot be read, a column is missing or there twice, a row has too few or too many cells,
    names no file, or names a file that another row names.
    """
    rows = _parse(path, file_column)
    header = rows[0][1]
    named = [name for name in header if name]
    if file_column not in header:
        raise DataError(
            f"{path} has no column {file_column!r} of file names: it has {', '.join(named)}{nearest(file_column, named)}; "
            "name it in file-column"
        )
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise DataError(f"{path} has the column {twice[0]!r} twice: which one counts? Rename one")
    place = header.index(file_column)
    kept = [i for i, name in enumerate(header) if name and i != place]
    found: dict[str, list[str]] = {}
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise DataError(f"{path}, line {line}: {len(row)} cells under {len(header)} columns; correct the row")
        if not row[place]:
            raise DataError(
                f"{path}, line {line}: no file name in column {file_column!r}; name the file, or remove the row"
            )
        too_long = next((header[i] for i in kept if len(row[i]) > MAX_CELL), None)
        if too_long:
            raise DataError(
                f"{path}, line {line}: over {MAX_CELL} characters in column {too_long!r}; remove that column"
            )
        file = str(PurePosixPath(row[place].replace("\\", "/")))
        if file in found:
            raise DataError(f"{path}, line {line}: a second row for {file}; remove one")
        found[file] = [row[i] for i in kept]
    if not found:
        raise DataError(f"{path} has no rows: add one for each image")
    return Table(path, [header[i] for i in kept], found)


def utkface(name: str) -> dict[str, str] | None:
    """age, gender, race and age_group from a file's name, `age_gender_race_datetime.jpg.chip.jpg`; None from another."""
    found = UTKFACE.fullmatch(name)
    if not found:
        return None
    age = int(found[1])
    group = next(group for group, last in AGE_GROUPS.items() if age <= last)
    return {"age": str(age), "gender": GENDERS[int(found[2])], "race": RACES[int(found[3])], "age_group": group}


def text_column(cells: Sequence[str]) -> np.ndarray:
    """Text (N,), as a FaceDataset's attributes are."""
    return np.array(cells, dtype=np.str_).reshape(len(cells))


def _parse(path: Path, file_column: str) -> list[tuple[int, list[str]]]:
    """(line number, stripped cells) of each row that is not blank, the header first."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise DataError(f"{path} holds a null character: save it as CSV in UTF-8")
        # Not csv.Sniffer: it guesses by how often each character comes, and a free text misleads it.
        headers = {mark: next(_rows(text, mark, strict=False), (0, []))[1] for mark in DELIMITERS}
        delimiter = max(DELIMITERS, key=lambda mark: (file_column in headers[mark], len(headers[mark])))
        rows = list(_rows(text, delimiter, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a CSV in UTF-8 ({error}): check the path and the file") from error
    if not rows:
        raise DataError(f"{path} is empty: give it a first line of column names and a row for each image")
    return rows


def _rows(text: str, delimiter: str, *, strict: bool) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)
    for row in reader:
        cells = [cell.strip() for cell in row]
        if any(cells):
            yield reader.line_num, cells
