"""Published face sets, where they are at hand: set VISARD_TEST_DATA to the folder that holds orl_faces, lfw, ..."""

import os
import warnings
from pathlib import Path

import pytest

from common.faces import FaceOptions, SkippedImages, load_faces

DATA = Path(os.environ.get("VISARD_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.mark.parametrize(
    ("name", "options", "split", "images", "persons", "skipped"),
    [
        ("orl_faces", FaceOptions(32, 1), "train", 400, 40, 1),
        ("london_faces_256/images", FaceOptions(64, 3), "train", 204, 102, 0),
        ("mnist", FaceOptions(28, 1), "test", 10_000, 0, 0),
        pytest.param("utkface_subset/images", FaceOptions(32, 3), "train", 5_560, 0, 0, marks=pytest.mark.slow),
        pytest.param("lfw", FaceOptions(32, 3, 0.55), "train", 6_897, 1_680, 8, marks=pytest.mark.slow),
    ],
)
def test_published_sets_are_read_whole(name, options, split, images, persons, skipped):
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not there; set VISARD_TEST_DATA to the folder that holds it")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        faces = load_faces(str(folder), options, split=split)
    assert (len(faces), faces.num_persons) == (images, persons)
    assert (faces.persons is None) == (persons == 0)
    assert [warning.category for warning in caught] == [SkippedImages] * (skipped > 0)
    assert all(f"{skipped} skipped" in str(warning.message) for warning in caught)
