"""Faces in data sets of Hugging Face's library, whole or one part of them as Flower's own data sets deal them out.

A name that is no path is looked up at the Hub and downloaded, as that library does; with HF_HUB_OFFLINE=1 it is not. Local
data never leaves a trace: the library would convert it and keep the copy, so it works in a folder that is gone afterwards.
No code of a data set is ever run: the library can no longer do so.
"""

import io
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError
from common.faces.attributes import MAX_CELL, text_column
from common.faces.cache import file_states
from common.faces.dataset import FaceOptions
from common.faces.gallery import Gallery, nearest, numbered
from common.faces.preprocessing import UnreadableImageError, decode
from common.faces.source import Source, library, parts_of
from common.sections import FaceSource

log = logging.getLogger("visard.faces")

KEYS = ("split", "config", "image", "person")
# Flower's FederatedDataset shuffles with this seed unless told otherwise: the parts here are the same as there.
FLOWER_SEED = 42


@dataclass(frozen=True)
class _Asked:
    """`where` of a source, parsed. local: the folder, None for a name at the Hub."""

    place: str
    name: str
    local: Path | None
    split: str
    keys: dict[str, str]


def open_huggingface(where: str, source: FaceSource, options: FaceOptions, split: str) -> Source:
    """`PATH_OR_NAME,split=train,config=...,image=COLUMN,person=COLUMN`.

    A path is a folder of `save_to_disk`, or one that `load_dataset` reads (images, Parquet, ...). Every column of text or
    numbers becomes an attribute, classes by their names, but for `person` and what is longer than MAX_CELL characters. Rows
    without an image or a person are skipped. Raises DataError.
    """
    asked = _parse(where, source.data, split, KEYS)
    return Source(_state(asked), lambda: _whole(asked))


def open_federated(where: str, source: FaceSource, options: FaceOptions, split: str) -> Source:
    """The same with `partitions=10,partition=3`: that part of ten alike, or with `by=COLUMN,partition=3` all rows with the fourth of
    that column's values in order; `partitions`, where given beside it, must be their number.

    Raises DataError, also where `person` is named and one of this part has images in another part.
    """
    asked = _parse(where, source.data, split, (*KEYS, "partitions", "partition", "by"))
    numbers: dict[str, int] = {key: _number(asked, key) for key in ("partitions", "partition") if key in asked.keys}
    if "partition" not in numbers or not {"partitions", "by"} & asked.keys.keys():
        raise DataError(
            f"{source.data}: say partition=3, and of how many, partitions=10, or by which column, by=COLUMN"
        )
    library("flwr_datasets.partitioner", source.data)
    return Source(_state(asked), lambda: _part(asked, numbers))


def _whole(asked: _Asked) -> Gallery:
    with _explained(asked), tempfile.TemporaryDirectory() as scratch:
        return _gallery(asked, _load(asked, scratch), Path(scratch))


def _part(asked: _Asked, numbers: dict[str, int]) -> Gallery:
    partitioners = library("flwr_datasets.partitioner", asked.place)
    by = asked.keys.get("by")
    with _explained(asked), tempfile.TemporaryDirectory() as scratch:
        rows = _load(asked, scratch).shuffle(seed=FLOWER_SEED, keep_in_memory=True)
        if by:
            _check_column(asked, by, rows.column_names)
        partitioner = (
            partitioners.NaturalIdPartitioner(by) if by else partitioners.IidPartitioner(numbers["partitions"])
        )
        partitioner.dataset = rows
        parts, part = partitioner.num_partitions, numbers["partition"]
        if numbers.get("partitions", parts) != parts:
            raise DataError(f"{asked.place}: column {by} has {parts} values: write partitions={parts}, or leave it out")
        if part >= parts or parts > len(rows):
            raise DataError(f"{asked.place}: partition {part} of {parts} in {len(rows)} rows: partitions count from 0")
        mine = partitioner.load_partition(part)
        if "person" in asked.keys:
            _check_apart(asked, _persons(asked, rows), _persons(asked, mine))
        return _gallery(asked, mine, Path(scratch))


def _check_apart(asked: _Asked, everywhere: list[str], here: list[str]) -> None:
    counts = Counter(everywhere)
    shared = sum(counts[person] != count for person, count in Counter(here).items() if person)
    if shared:
        raise DataError(
            f"{asked.place}: {shared} persons of this part have images in other parts, and each part would spend the whole epsilon on "
            "them; divide by=COLUMN of persons, or leave person= out and protect images"
        )


def _load(asked: _Asked, scratch: str) -> Any:
    """The rows of the split, a `datasets.Dataset`."""
    datasets = library("datasets", asked.place)
    if asked.local is None:
        log.info("%s, if not cached, is downloaded from the Hub", asked.place)
        return datasets.load_dataset(asked.name, asked.keys.get("config"), split=asked.split)
    if (asked.local / "dataset_dict.json").exists():
        splits = datasets.load_from_disk(str(asked.local))
    elif (asked.local / "state.json").exists():
        splits = {"train": datasets.load_from_disk(str(asked.local))}
    else:
        return datasets.load_dataset(
            str(asked.local), asked.keys.get("config"), split=asked.split, cache_dir=scratch, keep_in_memory=True
        )
    if asked.split not in splits:
        raise DataError(f"{asked.place} has no split {asked.split!r}: it has {', '.join(splits)}")
    return splits[asked.split]


def _gallery(asked: _Asked, rows: Any, scratch: Path) -> Gallery:
    datasets = library("datasets", asked.place)
    image = asked.keys.get("image")
    pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if (image or len(pictures) != 1) and image not in pictures:
        raise DataError(
            f"{asked.place}: name the column of images, image=COLUMN, one of {', '.join(pictures) or 'none'}"
        )
    image = image or pictures[0]
    stored = list(rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))[image])
    files = [_picture(found, scratch) for found in stored]
    names = [_name(found, asked.local) for found in stored]
    person = asked.keys.get("person")
    columns = {name: _texts(rows, name, datasets) for name in rows.column_names if name not in (image, person)}
    attributes = {name: text_column(cells) for name, cells in columns.items() if cells is not None}
    gallery = Gallery(asked.place, files, _decode, names, attributes=attributes)
    if person is None:
        return gallery
    persons = _persons(asked, rows)
    nobody = {i: f"no {person}" for i, name in enumerate(persons) if not name}
    return replace(gallery, persons=numbered(persons)).without(nobody)


def _persons(asked: _Asked, rows: Any) -> list[str]:
    column = asked.keys["person"]
    _check_column(asked, column, rows.column_names)
    cells = _texts(rows, column, library("datasets", asked.place))
    if cells is None:
        raise DataError(
            f"{asked.place}: column {column!r} is {rows.features[column]}: persons are text or whole numbers"
        )
    return cells


def _texts(rows: Any, column: str, datasets: Any) -> list[str] | None:
    """A column's cells as stripped text, classes by name, '' for nothing; None where it is no column of short text."""
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return ["" if cell is None or cell < 0 else str(feature.int2str(cell)).strip() for cell in rows[column]]
    plain = ("bool", "int", "uint", "float", "string", "large_string")
    if not isinstance(feature, datasets.Value) or not feature.dtype.startswith(plain):
        return None
    cells = ["" if cell is None else str(cell).replace("\0", "").strip() for cell in rows[column]]
    return cells if all(len(cell) <= MAX_CELL for cell in cells) else None


def _picture(stored: dict[str, Any] | None, scratch: Path) -> bytes | Path | None:
    """The bytes of an image file, or where it is; what lies in the scratch folder is read before that is gone."""
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        return None
    if stored["bytes"] is not None:
        return bytes(stored["bytes"])
    path = Path(stored["path"])
    return path.read_bytes() if path.is_relative_to(scratch) else path


def _decode(picture: bytes | Path | None, options: FaceOptions) -> list[np.ndarray]:
    if picture is None:
        raise UnreadableImageError("a row without an image")
    if isinstance(picture, Path):
        return decode(picture, options)
    return decode(io.BytesIO(picture), options)  # type: ignore[arg-type]  # Pillow opens either


def _name(stored: dict[str, Any] | None, root: Path | None) -> str:
    path = Path((stored or {}).get("path") or "")
    return path.relative_to(root).as_posix() if root and path.is_relative_to(root) else path.name


def _parse(where: str, place: str, split: str, known: tuple[str, ...]) -> _Asked:
    name, keys = parts_of(where, place, known)
    path = Path(name).expanduser().absolute()
    if not path.is_dir() and name.startswith(("/", ".", "~")):
        raise DataError(f"{place}: there is no folder {path}: check the path")
    return _Asked(
        place, name, path if path.is_dir() else None, keys.get("split", split) if split == "train" else split, keys
    )


def _state(asked: _Asked) -> list[object] | None:
    datasets = library("datasets", asked.place)
    if asked.local is None:
        return None
    return [datasets.__version__, file_states(sorted(path for path in asked.local.rglob("*") if path.is_file()))]


def _number(asked: _Asked, key: str) -> int:
    text = asked.keys[key]
    if not text.isdecimal() or len(text) > 9 or (key == "partitions" and int(text) < 1):
        raise DataError(f"{asked.place}: {key}={text} is no number that can be used: write {key}=3")
    return int(text)


def _check_column(asked: _Asked, column: str, known: list[str]) -> None:
    if column not in known:
        raise DataError(f"{asked.place} has no column {column!r}: it has {', '.join(known)}{nearest(column, known)}")


@contextmanager
def _explained(asked: _Asked) -> Iterator[None]:
    """What the library raises (no such data set, no network, a damaged file, another format) as a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{asked.place} cannot be loaded ({type(error).__name__}: {error}): check the path or the name, and for a name the network"
        ) from error
