"""Published face sets, where they are at hand: set VISARD_TEST_DATA to the folder that holds orl_faces, lfw, ..."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from common.faces import SkippedImages, load_faces, read_faces
from common.faces.attributes import read_table, utkface
from common.sections import FaceSource

DATA = Path(os.environ.get("VISARD_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def at_hand(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"{name} is not there; set VISARD_TEST_DATA to the folder that holds it")
    return DATA / name


@pytest.mark.parametrize(
    ("name", "size_channels_crop", "split", "images", "persons", "skipped"),
    [
        ("orl_faces", (32, 1, 1.0), "train", 400, 40, 1),
        ("london_faces_256/images", (64, 3, 1.0), "train", 204, 102, 0),
        ("mnist", (28, 1, 1.0), "test", 10_000, 0, 0),
        pytest.param("utkface_subset/images", (32, 3, 1.0), "train", 5_560, 0, 0, marks=pytest.mark.slow),
        pytest.param("lfw", (32, 3, 0.55), "train", 6_897, 1_680, 8, marks=pytest.mark.slow),
    ],
)
def test_published_sets_are_read_whole(name, size_channels_crop, split, images, persons, skipped):
    folder = at_hand(name)
    size, channels, crop = size_channels_crop
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        faces = load_faces(FaceSource(data=str(folder), crop=crop), size, channels, split=split)
    assert (len(faces), faces.num_persons) == (images, persons)
    assert (faces.persons is None) == (persons == 0)
    assert [warning.category for warning in caught] == [SkippedImages] * (skipped > 0)
    assert all(f"{skipped} skipped" in str(warning.message) for warning in caught)


def test_london_by_its_csv_has_102_persons_of_two_images():
    folder = at_hand("london_faces_256")
    source = FaceSource(
        data=str(folder / "images"),
        attributes=str(folder / "attributes.csv"),
        person_column="face_id",
        label_column="expression",
        label_values="neutral,smiling",
    )
    faces = load_faces(source, 32, 3)
    assert np.bincount(faces.persons).tolist() == [2] * 102
    assert faces.labels.tolist() == [0, 1] * 102
    assert set(faces.attributes["gender"]) == {"female", "male"}
    by_folder = load_faces(FaceSource(data=str(folder / "images")), 32, 3)
    assert np.array_equal(by_folder.persons, faces.persons)
    assert np.array_equal(by_folder.images, faces.images)


def test_utkface_by_its_names_is_utkface_by_its_csv():
    """All names against the CSV; only the images of one small group are decoded."""
    folder = at_hand("utkface_subset")
    table = read_table(folder / "attributes.csv", "file")
    for name in table.rows:
        said = utkface(name)
        (age,), (gender,), (race,) = (table.column(column, [name]) for column in ("age", "gender_name", "race_name"))
        assert (said["age"], said["gender"], said["race"]) == (age, gender, race)
    assert {path.name for path in (folder / "images").iterdir()} == set(table.rows)
    asked = {"data": str(folder / "images"), "label_column": "age", "label_values": "59,60,61"}
    by_name, by_csv = (
        read_faces(FaceSource(attributes=said, **asked), 32, 3).faces
        for said in ("utkface", str(folder / "attributes.csv"))
    )
    assert len(by_name) == sum(table.column("age", [name])[0] in ("59", "60", "61") for name in table.rows) > 0
    assert np.array_equal(by_name.images, by_csv.images)
    assert np.array_equal(by_name.labels, by_csv.labels)
    assert by_name.attributes["race"].tolist() == by_csv.attributes["race_name"].tolist()
    assert by_name.persons is by_csv.persons is None
