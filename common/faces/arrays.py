"""Faces that are arrays already: FaceDataset.save's own files, plain .npz files, and those drawn by us."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import DataError
from common.faces.cache import file_states
from common.faces.dataset import FORMAT, FaceDataset, FaceOptions
from common.faces.gallery import Gallery, numbered
from common.faces.preprocessing import fit_faces
from common.faces.procedural import PROCEDURAL_VERSION, parse_source, procedural_faces
from common.faces.source import Source, only_train
from common.sections import CHANNELS, FaceSource

# What a plain .npz file may call its arrays, for each split; the first that is there is taken.
NAMES = {
    "train": {
        "images": ("train_images", "x_train", "images", "x"),
        "labels": ("train_labels", "y_train", "labels", "y"),
        "persons": ("train_persons", "persons", "identity"),
    },
    "test": {
        "images": ("test_images", "x_test"),
        "labels": ("test_labels", "y_test"),
        "persons": ("test_persons",),
    },
}


def open_npz(where: str, source: FaceSource, options: FaceOptions, split: str) -> Source:
    """An .npz file, without pickles.

    One of FaceDataset.save's is taken as it is: its size must be the run's, and neither `crop` nor `detect` is applied
    again. A plain one has images, uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3, any size; perhaps labels, whole
    numbers (N,) or (N, 1); perhaps persons, whole numbers or text (N,); under the names in NAMES. Raises DataError.
    """
    path = Path(where)
    if source.attributes:
        raise DataError(f"attributes = {source.attributes!r} with {path}: they are for folders of images only")
    if _read(path, ["format"]).get("format") == FORMAT:
        only_train(where, split)
        return Source(None, lambda: _saved(path, options))
    return Source(file_states([path]), lambda: _plain(path, split))


def saved_shape(path: Path) -> tuple[int, int] | None:
    """Side and channels of the images in one of FaceDataset.save's files; None for a plain one. Raises DataError."""
    if _read(path, ["format"]).get("format") != FORMAT:
        return None
    faces = FaceDataset.load(path)
    return faces.image_size, faces.channels


def open_procedural(where: str, source: FaceSource, options: FaceOptions, split: str) -> Source:
    """`persons=40,images=10,seed=0,first=0`: faces of nobody. Raises DataError, also where faces are to be looked for."""
    only_train(source.data, split)
    if options.detect != "none":
        raise DataError(f"detect = {options.detect} with {source.data}: these are drawn where they should be; use none")
    persons, images, seed = parse_source(where)

    def gather() -> Gallery:
        return whole(source.data, procedural_faces(persons, images, options, seed))

    return Source([PROCEDURAL_VERSION, persons.start, persons.stop, images, seed], gather)


def whole(place: str, faces: FaceDataset) -> Gallery:
    """The gallery of faces that are cut already."""
    names = [""] * len(faces)
    return Gallery(
        place,
        list(faces.images),
        _as_it_is,
        names,
        faces.persons,
        faces.labels,
        faces.attributes,
        photographs=faces.photographs,
    )


def fit_pixels(pixels: np.ndarray, options: FaceOptions) -> list[np.ndarray]:
    """Cut one image, uint8 (H, W), (H, W, C) or (C, H, W), C 1 or 3. Raises UnreadableImageError."""
    if pixels.ndim == 3:
        pixels = pixels if pixels.shape[-1] in CHANNELS else pixels.transpose(1, 2, 0)
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    if options.crop == 1.0 and options.detect == "none" and pixels.shape == (options.image_size,) * 2:
        return [np.repeat(pixels[None], options.channels, axis=0)]
    return fit_faces(Image.fromarray(np.ascontiguousarray(pixels)), options)


def _as_it_is(pixels: np.ndarray, options: FaceOptions) -> list[np.ndarray]:
    return [pixels]


def _saved(path: Path, options: FaceOptions) -> Gallery:
    faces = FaceDataset.load(path)
    if not len(faces):
        raise DataError(f"{path} holds no images: save some")
    if (faces.image_size, faces.channels) != (options.image_size, options.channels):
        raise DataError(
            f"{path} holds images of {faces.image_size} pixels in {faces.channels} channels, the run needs "
            f"{options.image_size} in {options.channels}: save it anew from the photographs"
        )
    return whole(str(path), faces)


def _plain(path: Path, split: str) -> Gallery:
    arrays = {kind: next(iter(_read(path, names).values()), None) for kind, names in NAMES[split].items()}
    images, labels, persons = arrays["images"], arrays["labels"], arrays["persons"]
    if images is None:
        raise DataError(
            f"{path} has no array called {' or '.join(NAMES[split]['images'])}, the images of split {split!r}"
        )
    channels = images.ndim == 3 or (images.ndim == 4 and {images.shape[1], images.shape[3]} & set(CHANNELS))
    if images.dtype != np.uint8 or not channels or not images.size:
        raise DataError(
            f"{path}: images are {images.dtype} {images.shape}; they must be uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), C 1 or 3"
        )
    count = len(images)
    if labels is not None:
        if labels.shape not in ((count,), (count, 1)) or labels.dtype.kind not in "iub" or int(labels.min()) < 0:
            raise DataError(
                f"{path}: labels are {labels.dtype} {labels.shape}; they must be whole numbers ({count},) from 0"
            )
        labels = labels.reshape(count).astype(np.int64)
    if persons is not None:
        if persons.shape not in ((count,), (count, 1)) or persons.dtype.kind not in "iuU":
            raise DataError(
                f"{path}: persons are {persons.dtype} {persons.shape}; they must be numbers or text ({count},)"
            )
        spelled = [str(person).strip() for person in persons.reshape(count)]
        nobody = {i: "has no person" for i, person in enumerate(spelled) if not person}
        gallery = Gallery(str(path), list(images), fit_pixels, [""] * count, numbered(spelled), labels)
        return gallery.without(nobody)
    return Gallery(str(path), list(images), fit_pixels, [""] * count, None, labels)


def _read(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the arrays called `names` that the file has, in that order. Raises DataError."""
    try:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, Mapping):
                raise DataError(
                    f"{path} is a single array, not an .npz file: save it with numpy.savez(..., images=...)"
                )
            return {name: arrays[name] for name in names if name in arrays}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as an .npz file without pickles ({error}): write it anew") from error
