"""FaceDataset: its columns fit each other, its units partition the images, and what is saved comes back."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from common.faces import FaceDataset, FaceOptions
from common.privacy.units import PrivacyUnit


def faces(persons=(0, 0, 2, 1, 2), channels=3, size=28):
    images = np.random.default_rng(0).integers(0, 256, (len(persons), channels, size, size)).astype(np.uint8)
    return FaceDataset(images, np.array(persons, dtype=np.int64), np.arange(len(persons), dtype=np.int64))


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 30},
        {"channels": 2},
        {"crop": 0.0},
        {"crop": 1.2},
        {"crop": float("nan")},
    ],
)
def test_options_refuse_what_no_model_takes(wrong):
    with pytest.raises(DataError):
        FaceOptions(**wrong)


@pytest.mark.parametrize(
    ("images", "persons"),
    [
        (np.zeros((2, 3, 8, 8), np.float32), None),
        (np.zeros((2, 3, 8, 9), np.uint8), None),
        (np.zeros((2, 2, 8, 8), np.uint8), None),
        (np.zeros((8, 8), np.uint8), None),
        (np.zeros((2, 3, 8, 8), np.uint8), np.zeros(3, np.int64)),
        (np.zeros((2, 3, 8, 8), np.uint8), np.zeros(2, np.int32)),
        (np.zeros((2, 3, 8, 8), np.uint8), np.array([0, 2])),
        (np.zeros((2, 3, 8, 8), np.uint8), np.array([0, -1])),
    ],
)
def test_columns_that_do_not_fit_are_refused(images, persons):
    with pytest.raises(DataError):
        FaceDataset(images, persons)


def test_tensor_maps_bytes_to_minus_one_to_one():
    images = np.array([0, 255, 51], np.uint8).reshape(3, 1, 1, 1)
    batch = FaceDataset(images).tensor(np.array([2, 0, 1]))
    assert batch.shape == (3, 1, 1, 1)
    assert batch.flatten().tolist() == pytest.approx([-0.6, -1.0, 1.0])


def test_person_units_are_the_images_of_each_person():
    units = faces().units(PrivacyUnit.PERSON)
    assert [unit.tolist() for unit in units] == [[0, 1], [3], [2, 4]]
    assert all(unit.dtype == np.int64 for unit in units)


def test_image_units_are_single_images():
    assert [unit.tolist() for unit in faces().units(PrivacyUnit.IMAGE)] == [[0], [1], [2], [3], [4]]


def test_person_units_without_persons_are_refused_not_guessed():
    with pytest.raises(DataError, match="persons"):
        FaceDataset(np.zeros((2, 1, 8, 8), np.uint8)).units(PrivacyUnit.PERSON)


def test_subset_renumbers_persons_and_keeps_the_rest():
    whole = faces()
    part = whole.subset(np.array([4, 0, 2]))
    assert part.persons.tolist() == [1, 0, 1]
    assert part.num_persons == 2
    assert part.labels.tolist() == [4, 0, 2]
    assert np.array_equal(part.images, whole.images[[4, 0, 2]])
    part.images[:] = 0
    assert whole.images.any()


@pytest.mark.parametrize("indices", [[5], [-1], [0.5], [[0]], [True]])
def test_wrong_indices_are_refused(indices):
    with pytest.raises(DataError):
        faces().subset(np.array(indices))


def test_an_empty_subset_has_no_units():
    empty = faces().subset(np.array([]))
    assert (len(empty), empty.num_persons) == (0, 0)
    assert empty.units(PrivacyUnit.PERSON) == empty.units(PrivacyUnit.IMAGE) == []


@pytest.mark.parametrize("columns", [("persons", "labels"), ("persons",), ("labels",), ()])
def test_saved_faces_come_back(tmp_path, columns):
    whole = faces()
    kept = {name: getattr(whole, name) for name in columns}
    FaceDataset(whole.images, **kept).save(tmp_path / "faces.npz")
    back = FaceDataset.load(tmp_path / "faces.npz")
    assert np.array_equal(back.images, whole.images)
    for name in ("persons", "labels"):
        assert np.array_equal(getattr(back, name), kept[name]) if name in kept else getattr(back, name) is None
    assert [path.name for path in tmp_path.iterdir()] == ["faces.npz"]


def test_damaged_and_foreign_files_are_data_errors(tmp_path):
    path = tmp_path / "faces.npz"
    faces().save(path)
    content = path.read_bytes()
    for damaged in (b"", b"PK", content[: len(content) // 2], content[:-30], content[:3000] + b"xyz" + content[3003:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            FaceDataset.load(path)
    images = faces().images
    np.savez(path, images=images)
    with pytest.raises(DataError, match="mark"):
        FaceDataset.load(path)
    mark = np.array("visard-faces-1")
    for wrong in (
        {"images": images.astype(np.int16)},
        {"images": images, "persons": np.zeros(5)},
        {"persons": np.zeros(5)},
    ):
        np.savez(path, format=mark, **wrong)
        with pytest.raises(DataError):
            FaceDataset.load(path)
    with path.open("wb") as file:
        np.save(file, images)
    with pytest.raises(DataError, match="single array"):
        FaceDataset.load(path)
    with pytest.raises(DataError):
        FaceDataset.load(tmp_path / "nowhere.npz")


def test_pickled_arrays_are_never_opened(tmp_path):
    path = tmp_path / "faces.npz"
    np.savez(path, format=np.array("visard-faces-1"), images=np.array([{}], dtype=object))
    with pytest.raises(DataError):
        FaceDataset.load(path)


def test_attributes_of_any_name_come_back_and_follow_their_images(tmp_path):
    names = ["age", "age.npy", "a/b", "images", "attribute0", "é\n"]
    columns = {name: np.array([f"{name}{i}" for i in range(5)]) for name in names}
    whole = FaceDataset(faces().images, attributes=columns)
    whole.subset(np.array([3, 1])).save(tmp_path / "faces.npz")
    back = FaceDataset.load(tmp_path / "faces.npz")
    assert {name: column.tolist() for name, column in back.attributes.items()} == {
        name: [f"{name}3", f"{name}1"] for name in names
    }


@pytest.mark.parametrize("column", [np.array(["a", "b"]), np.arange(5), np.array([["a"]] * 5)])
def test_attributes_that_do_not_fit_are_refused(column):
    with pytest.raises(DataError, match="attribute 'kind'"):
        FaceDataset(faces().images, attributes={"kind": column})


def test_all_faces_of_one_photograph_are_one_unit(tmp_path: Path) -> None:
    photographs = np.array([0, 0, 1, 2, 2, 2])
    faces = FaceDataset(np.zeros((6, 1, 28, 28), np.uint8), photographs=photographs)
    assert [unit.tolist() for unit in faces.units(PrivacyUnit.IMAGE)] == [[0, 1], [2], [3, 4, 5]]
    faces.save(tmp_path / "faces.npz")
    again = FaceDataset.load(tmp_path / "faces.npz").subset(np.array([5, 1, 3]))
    assert again.photographs is not None
    assert again.photographs.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="gaps"):
        FaceDataset(faces.images, photographs=photographs * 2)
