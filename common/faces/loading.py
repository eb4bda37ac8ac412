"""One door to every source of faces.

Each kind of source is opened by one function: `open_*(where, source, options, split)` says what its content depends on
(for the cache) and how to gather its pictures, and does not decode any. What comes after is the same for all.
"""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import PIL

from common.errors import DataError
from common.faces.arrays import open_npz, open_procedural, saved_shape
from common.faces.cache import cached, forget
from common.faces.dataset import FaceDataset, FaceOptions
from common.faces.folders import open_folder
from common.faces.gallery import Gallery, Reading, Track, untracked
from common.faces.huggingface import open_federated, open_huggingface
from common.faces.libraries import open_skimage, open_sklearn
from common.faces.preprocessing import preprocessing_state
from common.faces.source import SPLITS, Source
from common.fields import listed
from common.sections import FaceSource

# The attribute that a named data set has each face's file in: no column of a table is called so.
FILE = ""


def load_faces(
    source: FaceSource,
    image_size: int,
    channels: int,
    *,
    split: str = "train",
    cache_dir: Path | None = None,
    named: bool = False,
    track: Track = untracked,
) -> FaceDataset:
    """Read faces, each cut to uint8 (channels, image_size, image_size).

    source.data is one of
      a folder of person folders       persons known
      a folder of images               persons unknown, unless attributes and person_column say who it is
      a folder of IDX files (.gz)      labels; splits 'train' and 'test'
      a file .npz                      FaceDataset.save's own, taken as it is, or plain arrays (`arrays.NAMES`)
      procedural:persons=40,images=10,seed=0,first=0       drawn by us; every part may be left out
      skimage:lfw_subset               100 grey faces of 25 pixels, shipped with scikit-image
      sklearn:lfw, sklearn:olivetti    persons known; with `,data_home=DIR`; may download, as scikit-learn does
      hf:PATH_OR_NAME                  Hugging Face datasets, with `,split=`, `,config=`, `,image=`, `,person=`
      flwr-datasets:PATH_OR_NAME,partitions=10,partition=3 one part of such a data set, with `,by=COLUMN`

    split: 'train', or 'test' where the source has it. cache_dir: where to keep the outcome for next time, None for
    nowhere. named: with the attribute FILE, as `Reading.names`. track: wraps the pictures as they are gone through, for a progress
    bar. What cannot be used is counted in one SkippedImages warning (not again from the cache). Raises DataError where the
    source is missing, empty, mixed, damaged or without that split, or needs a package that is not installed; OSError where the
    cache cannot be written.
    """
    options = FaceOptions(image_size, channels, source.crop, source.detect)

    identity = [_place(source.data)]
    try:
        opened = _open(source, options, split)
        state = None if opened.state is None else [opened.state, preprocessing_state(options), PIL.__version__]
    except DataError:
        if cache_dir is not None:
            forget(cache_dir, identity)  # nothing is left there that can be used
        raise

    def read() -> FaceDataset:
        reading = _read(opened, source, options, track)
        reading.warn(source.data)
        if not named:
            return reading.faces
        return replace(
            reading.faces, attributes={**reading.faces.attributes, FILE: np.array(reading.names, dtype=np.str_)}
        )

    if cache_dir is None:
        return read()
    if state is None:
        forget(cache_dir, identity)  # the place may have held what was kept
        return read()
    asked = [getattr(source, f.name) for f in fields(FaceSource)]
    return cached(cache_dir, identity, state, [image_size, channels, split, asked, named], read)


def read_faces(
    source: FaceSource, image_size: int, channels: int, *, split: str = "train", track: Track = untracked
) -> Reading:
    """As `load_faces`, with the account of what was skipped in place of the warning; always read anew.

    track: wraps the pictures as they are gone through, for a progress bar.
    """
    options = FaceOptions(image_size, channels, source.crop, source.detect)
    return _read(_open(source, options, split), source, options, track)


def check_source(source: FaceSource) -> None:
    """Find out what can go wrong before any run asks: cuts no picture, and knows no run's size.

    Raises DataError where the source is missing, empty or damaged, or has not the columns, persons or labels that it is
    asked for.
    """
    path = Path(source.data).expanduser()
    shape = saved_shape(path) if path.suffix == ".npz" else None
    opened = _open(source, FaceOptions(*(shape or (32, 3)), source.crop, source.detect), "train")
    _labelled(opened, source)


def _read(opened: Source, source: FaceSource, options: FaceOptions, track: Track = untracked) -> Reading:
    return _labelled(opened, source).cut(options, track)


def _labelled(opened: Source, source: FaceSource) -> Gallery:
    gallery = opened.gather()
    if source.label_column:
        gallery = gallery.labelled(source.label_column, listed(source.label_values))
    return gallery


def _open(source: FaceSource, options: FaceOptions, split: str) -> Source:
    if split not in SPLITS:
        raise DataError(f"split is {split!r}: use one of {SPLITS}")
    scheme, colon, where = source.data.partition(":")
    if colon and scheme in SCHEMES:
        if source.attributes:
            raise DataError(
                f"attributes = {source.attributes!r} with {source.data}: they are for folders of images only"
            )
        return SCHEMES[scheme](where, source, options, split)
    path = Path(source.data).expanduser().absolute()
    if path.suffix == ".npz":
        return open_npz(str(path), source, options, split)
    if not path.is_dir():
        known = ", ".join(f"{scheme}:" for scheme in SCHEMES)
        raise DataError(f"{path} is no folder, no .npz file and begins with none of {known}; check the path")
    return open_folder(str(path), source, options, split)


def _place(data: str) -> str:
    """The same text for the same photographs, whichever of them are taken: when they change, all copies must go."""
    scheme, _, where = data.partition(":")
    if scheme == "procedural":
        return data  # nobody's photographs: what was drawn before may stay
    if scheme not in SCHEMES:
        return str(Path(data).expanduser().absolute())
    name = where.partition(",")[0]
    return str(Path(name).expanduser().absolute()) if scheme in ("hf", "flwr-datasets") else f"{scheme}:{name}"


SCHEMES = {
    "procedural": open_procedural,
    "skimage": open_skimage,
    "sklearn": open_sklearn,
    "hf": open_huggingface,
    "flwr-datasets": open_federated,
}
