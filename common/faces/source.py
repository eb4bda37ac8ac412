"""What opening a source gives, and what the openers of all kinds share."""

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import DataError
from common.faces.gallery import Gallery, nearest

SPLITS = ("train", "test")
# These libraries report their use to their makers unless told not to; photographs' owners were not asked.
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
}


@dataclass(frozen=True)
class Source:
    """An opened source.

    state: what its content depends on, JSON, for the cache's key; None where that is not cheap to know, or reading is as
    cheap as the cache. gather: list its pictures. Raises DataError.
    """

    state: Sequence[object] | None
    gather: Callable[[], Gallery]


def only_train(place: str, split: str) -> None:
    """Refuse a split that the source does not have. Raises DataError."""
    if split != "train":
        raise DataError(f"{place} has no split {split!r}: keep test faces in a source of their own")


def library(name: str, place: str) -> Any:
    """Import a module of an optional package. Raises DataError where it is not installed."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{place} needs {name.partition('.')[0]} ({error}): pip install 'visard[data]'") from error


def parts_of(text: str, place: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """`NAME,key=value,...` as (NAME, {key: value}). Raises DataError on an unknown, empty or repeated key."""
    name, *rest = text.split(",")
    found: dict[str, str] = {}
    for part in rest:
        key, _, value = part.partition("=")
        if key not in known or not value or key in found:
            raise DataError(
                f"{part!r} in {place}: write {', '.join(f'{k}=...' for k in known)}, each once{nearest(key, known)}"
            )
        found[key] = value
    if not name:
        raise DataError(f"{place} names nothing: write a name or a path behind the colon")
    return name, found
