"""One door to every source of faces, and a private cache of what came through it.

The cache holds photographs, small ones: its folder is for the owner alone (0700). When a source is loaded that has
changed, all copies of how it was are deleted, at whatever size they were made, so that a photograph taken out of the
source does not live on there.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from common.errors import DataError
from common.faces.dataset import FaceDataset, FaceOptions
from common.faces.folders import list_faces, load_folder
from common.faces.idx import find_idx, load_idx
from common.faces.preprocessing import PREPROCESSING_VERSION
from common.faces.procedural import PROCEDURAL_VERSION, parse_source, procedural_faces

SPLITS = ("train", "test")
SCHEME = "procedural:"


def load_faces(
    source: str, options: FaceOptions, *, split: str = "train", cache_dir: Path | None = None
) -> FaceDataset:
    """Read faces, each cut to `options`.

    source is one of
      a folder of person folders        persons known, no labels
      a folder of images                persons unknown, no labels
      a folder of IDX files (.gz)       labels, persons unknown; the one kind with a split 'test'
      a file .npz of FaceDataset.save   as saved; `options` must fit, crop is not applied again
      procedural:persons=40,images=10,seed=0,first=0    drawn by us; every part may be left out

    split: 'train', or 'test' of an IDX folder. cache_dir: where to keep the outcome for next time, None for nowhere.
    Files that cannot be used are skipped and counted in one SkippedImages warning (not again from the cache).
    Raises DataError where the source is missing, empty, mixed, damaged or without that split; OSError where the cache
    cannot be written.
    """
    if split not in SPLITS:
        raise DataError(f"split is {split!r}: use one of {SPLITS}")
    if source.startswith(SCHEME):
        _only_train(source, split)
        persons, images, seed = parse_source(source.removeprefix(SCHEME))
        identity = [SCHEME, persons.start, persons.stop, images, seed]
        return _cached(
            cache_dir, options, identity, [PROCEDURAL_VERSION], lambda: procedural_faces(persons, images, options, seed)
        )
    path = Path(source).expanduser().absolute()
    if path.suffix == ".npz":
        _only_train(source, split)
        return _load_npz(path, options)
    identity = [str(path), split]
    try:
        if not path.is_dir():
            raise DataError(f"{path} is no folder, no .npz file and does not begin with {SCHEME!r}: check the path")
        pair = find_idx(path, split)
        if pair is not None:
            state = [PREPROCESSING_VERSION, *_states(pair)]
            return _cached(cache_dir, options, identity, state, lambda: load_idx(*pair, options))
        _only_train(source, split)
        listing = list_faces(path)
    except DataError:
        _forget(cache_dir, _hash(identity))  # nothing is left there that can be used
        raise
    state = [PREPROCESSING_VERSION, *(_states(files) for files in listing.groups)]
    return _cached(cache_dir, options, identity, state, lambda: load_folder(listing, options))


def _only_train(source: str, split: str) -> None:
    if split != "train":
        raise DataError(
            f"{source} has no split {split!r}: only IDX folders have; keep test faces in a folder of their own"
        )


def _load_npz(path: Path, options: FaceOptions) -> FaceDataset:
    faces = FaceDataset.load(path)
    if not len(faces):
        raise DataError(f"{path} holds no images: save some")
    if (faces.image_size, faces.channels) != (options.image_size, options.channels):
        raise DataError(
            f"{path} holds images of {faces.image_size} pixels in {faces.channels} channels, the run needs "
            f"{options.image_size} in {options.channels}: save it anew from the photographs"
        )
    return faces


def _states(files: Sequence[Path]) -> list[list[object]]:
    states: list[list[object]] = []
    for file in files:
        found = file.stat()
        states.append([str(file), found.st_size, found.st_mtime_ns])
    return states


def _cached(
    cache_dir: Path | None,
    options: FaceOptions,
    identity: Sequence[object],
    state: Sequence[object],
    read: Callable[[], FaceDataset],
) -> FaceDataset:
    """What `read` gives, from the cache where that has it. The file's name is hash(identity)-hash(state)-hash(options)."""
    if cache_dir is None:
        return read()
    source, present = _hash(identity), _hash(state)
    _forget(cache_dir, source, f"{source}-{present}-")
    path = cache_dir / f"{source}-{present}-{_hash([asdict(options)])}.npz"
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


def _forget(cache_dir: Path | None, source: str, but: str | None = None) -> None:
    """Delete the copies of a source, half-written ones too, except those with `but` in their name."""
    for old in cache_dir.glob(f"*{source}-*") if cache_dir is not None else ():
        if but is None or but not in old.name:
            old.unlink(missing_ok=True)


def _hash(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
