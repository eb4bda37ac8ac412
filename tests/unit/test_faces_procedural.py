"""Procedural faces: the same for the same seed, each person by itself, and faces that can be told apart."""

import time

import numpy as np
import pytest

from common.errors import DataError
from common.faces import FaceOptions, load_faces, procedural_faces
from common.sections import FaceSource

OPTIONS = FaceOptions(32, 3)


def test_a_client_can_draw_its_own_persons_alone():
    together = procedural_faces(range(6), 3, OPTIONS, seed=4)
    alone = procedural_faces([5, 2], 3, OPTIONS, seed=4)
    assert np.array_equal(alone.images, together.images[[15, 16, 17, 6, 7, 8]])
    assert alone.persons.tolist() == [0, 0, 0, 1, 1, 1]
    assert alone.labels is None


def test_more_pictures_leave_the_first_ones_as_they_are():
    few, many = (procedural_faces([3], count, OPTIONS, seed=1).images for count in (2, 5))
    assert np.array_equal(few, many[:2])


def test_no_two_pictures_are_alike():
    images = procedural_faces(range(10), 10, OPTIONS, seed=0).images.reshape(100, -1)
    other = procedural_faces(range(10), 10, OPTIONS, seed=1).images.reshape(100, -1)
    assert len(np.unique(np.concatenate([images, other]), axis=0)) == 200


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size_has_contrast_and_all_of_the_range(size, channels):
    images = procedural_faces(range(8), 4, FaceOptions(size, channels), seed=2).images
    assert images.shape == (32, channels, size, size)
    assert images.min() < 25
    assert images.max() > 225
    assert (images.std(axis=(1, 2, 3)) > 12).all()


def test_sizes_show_the_same_picture():
    small, large = (procedural_faces(range(5), 2, FaceOptions(size, 3), 0).images.astype(float) for size in (32, 64))
    shrunk = large.reshape(10, 3, 32, 2, 32, 2).mean((3, 5))
    assert np.abs(shrunk - small).mean() < 6


def test_grey_is_the_luma_of_colour():
    colour, grey = (procedural_faces(range(3), 2, FaceOptions(32, channels), 0).images for channels in (3, 1))
    luma = np.tensordot(colour, [0.299, 0.587, 0.114], axes=(1, 0))
    assert np.abs(luma - grey[:, 0]).max() <= 1.5


def test_persons_are_told_apart_by_their_faces():
    # Nearest mean of five pictures, on the middle of the picture alone, so that neither background nor clothes help.
    num_persons, pictures = 40, 10
    images = procedural_faces(range(num_persons), pictures, FaceOptions(32, 1, 0.6), seed=0).images.astype(float)
    flat = images.reshape(num_persons, pictures, -1)
    flat = (flat - flat.mean(-1, keepdims=True)) / flat.std(-1, keepdims=True)
    known, asked = flat[:, :5].mean(1), flat[:, 5:].reshape(-1, flat.shape[-1])
    nearest = ((asked[:, None] - known[None]) ** 2).sum(-1).argmin(1)
    accuracy = (nearest == np.repeat(np.arange(num_persons), 5)).mean()
    assert accuracy > 0.25  # chance is 0.025; 0.4 as drawn now, and 0.8 on the much tamer ORL set
    assert accuracy < 0.999  # pose, light and expression must matter


def test_the_mean_face_is_a_face():
    mean = procedural_faces(range(100), 2, FaceOptions(32, 1), seed=0).images[:, 0].astype(float).mean(0)
    rows = mean[:, 9:23].mean(1)  # across the middle of the face
    hair, forehead, eyes, cheeks, neck = (rows[a:b].mean() for a, b in ((3, 6), (11, 13), (14, 16), (18, 20), (28, 30)))
    assert hair < eyes - 10 < forehead - 12
    assert eyes < cheeks - 8
    assert neck < cheeks - 20
    assert np.abs(mean - mean[:, ::-1]).mean() < 6  # about symmetric


def test_the_source_string():
    faces = load_faces(FaceSource(data="procedural:persons=3,images=2,seed=9"), 32, 3)
    assert faces.persons.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(faces.images, procedural_faces(range(3), 2, OPTIONS, 9).images)
    assert len(load_faces(FaceSource(data="procedural:persons=1"), 32, 3)) == 10
    later = load_faces(FaceSource(data="procedural:persons=1,images=2,seed=9,first=2"), 32, 3)
    assert np.array_equal(later.images, faces.images[4:])


@pytest.mark.parametrize(
    "text",
    [
        "persons=0",
        "images=0",
        "persons",
        "persons=-1",
        "persons=x",
        "people=3",
        "persons=1e3",
        "persons=999999999",
        "seed=9999999999",
    ],
)
def test_wrong_source_strings_are_errors(text):
    with pytest.raises(DataError):
        load_faces(FaceSource(data=f"procedural:{text}"), 32, 3)


@pytest.mark.parametrize(("persons", "seed"), [([1, 1], 0), ([-1], 0), ([0], -1), ([0], 2**32), ([], 0)])
def test_wrong_persons_are_errors(persons, seed):
    with pytest.raises(DataError):
        procedural_faces(persons, 1, OPTIONS, seed)


def test_drawing_is_fast():
    start = time.process_time()
    procedural_faces(range(20), 10, OPTIONS, seed=0)
    assert time.process_time() - start < 5  # about 0.4 s for 200 pictures on one core
