"""Faces that come with or through scikit-image and scikit-learn."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.faces.arrays import fit_pixels
from common.faces.dataset import FaceOptions
from common.faces.folders import open_folder
from common.faces.gallery import Gallery
from common.faces.source import Source, library, only_train, parts_of
from common.sections import FaceSource

log = logging.getLogger("visard.faces")

# skimage.data.lfw_subset: "100 first images are faces and subsequent 100 are non-faces".
LFW_SUBSET_FACES = 100


def open_skimage(where: str, source: FaceSource, options: FaceOptions, split: str) -> Source:
    """`lfw_subset`: the 100 faces, grey, 25 x 25, that lie in the package itself; nothing is downloaded. Raises DataError."""
    only_train(source.data, split)
    if where != "lfw_subset":
        raise DataError(f"{source.data}: of scikit-image's pictures only skimage:lfw_subset are faces")

    def gather() -> Gallery:
        pixels = library("skimage.data", source.data).lfw_subset()[
            :LFW_SUBSET_FACES
        ]  # in [0, 1], whatever its docstring says
        images = np.rint(pixels * 255).astype(np.uint8)
        return Gallery(source.data, list(images), fit_pixels, [""] * len(images))

    return Source(None, gather)


def open_sklearn(where: str, source: FaceSource, options: FaceOptions, split: str) -> Source:
    """`lfw` or `olivetti`, perhaps with `,data_home=DIR`; persons known.

    What is not there yet is downloaded by scikit-learn into data_home, which is ~/scikit_learn_data unless named.

    lfw: the 250 x 250 photographs of `fetch_lfw_people`, read from the folder into which it unpacks them, one a person:
    its own arrays are 10 GB at that size, and the cache it keeps of them would hide that a photograph was taken away.
    olivetti: the 400 images of `fetch_olivetti_faces`, grey, 64 x 64. scikit-learn unpickles its own file of them. Raises DataError.
    """
    only_train(source.data, split)
    name, found = parts_of(where, source.data, ["data_home"])
    if name not in ("lfw", "olivetti"):
        raise DataError(f"{source.data}: of scikit-learn's data sets sklearn:lfw and sklearn:olivetti are faces")
    datasets = library("sklearn.datasets", source.data)
    home = Path(datasets.get_data_home(found.get("data_home"))).absolute()
    if name == "lfw":
        folder = home / "lfw_home" / "lfw_funneled"
        if not folder.is_dir():
            log.warning("%s is not in %s: scikit-learn downloads it, about 200 MB", source.data, home)
            with _explained(source.data):
                # Downloads and unpacks; what it returns, a corner of each photograph, is not wanted.
                datasets.fetch_lfw_people(data_home=home, slice_=(slice(0, 1), slice(0, 1)), resize=None)
        return open_folder(str(folder), source, options, split)

    def gather() -> Gallery:
        log.info("%s, if not in %s, is downloaded by scikit-learn, about 1 MB", source.data, home)
        with _explained(source.data):
            faces = datasets.fetch_olivetti_faces(data_home=home)
        images = np.rint(faces.images * 255).astype(np.uint8)
        return Gallery(source.data, list(images), fit_pixels, [""] * len(images), faces.target.astype(np.int64))

    return Source(None, gather)


@contextlib.contextmanager
def _explained(place: str) -> Iterator[None]:
    """A download that fails, or a file that is not what it should be, as a DataError."""
    try:
        yield
    except Exception as error:  # network, disk and unpickling raise almost anything
        raise DataError(
            f"{place} cannot be fetched or read ({type(error).__name__}: {error}): scikit-learn downloads it once; put it into "
            "data_home by hand where there is no network"
        ) from error
