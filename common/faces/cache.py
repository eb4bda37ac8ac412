"""A private cache of faces that were read and cut.

It holds photographs, small ones: its folder is for the owner alone (0700). When a source is loaded that has changed, all
copies of how it was are deleted, at whatever size they were made, so that a photograph taken out of the source does not
live on there. A file's name is hash(identity)-hash(state)-hash(options): which source, how it was, and how it was read.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from common.errors import DataError
from common.faces.dataset import FaceDataset


def cache_folder() -> Path:
    """Where preprocessed faces are kept, readable by this user alone: $XDG_CACHE_HOME/visard."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visard"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise DataError(
            f"cannot keep preprocessed faces in {folder}: {error}; set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return folder


def cached(
    cache_dir: Path,
    identity: Sequence[object],
    state: Sequence[object],
    options: Sequence[object],
    read: Callable[[], FaceDataset],
) -> FaceDataset:
    """What `read` gives, from the cache where that has it. Raises OSError where the cache cannot be written."""
    source, present = _hash(identity), _hash(state)
    _forget(cache_dir, source, f"{source}-{present}-")
    path = cache_dir / f"{source}-{present}-{_hash(options)}.npz"
    if path.exists():
        try:
            return FaceDataset.load(path)
        except DataError:  # damaged: read the source anew and overwrite it
            pass
    faces = read()
    cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    cache_dir.chmod(0o700)
    faces.save(path)
    path.chmod(0o600)
    return faces


def forget(cache_dir: Path, identity: Sequence[object]) -> None:
    """Delete every copy of a source."""
    _forget(cache_dir, _hash(identity))


def file_states(files: Iterable[Path]) -> list[list[object]]:
    """What tells that a file has changed: its path, size and time of change."""
    states: list[list[object]] = []
    for file in files:
        found = file.stat()
        states.append([str(file), found.st_size, found.st_mtime_ns])
    return states


def _forget(cache_dir: Path, source: str, but: str | None = None) -> None:
    """Delete the copies of a source, half-written ones too, except those with `but` in their name."""
    for old in cache_dir.glob(f"*{source}-*"):
        if but is None or but not in old.name:
            old.unlink(missing_ok=True)


def _hash(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
