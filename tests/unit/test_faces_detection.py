"""Faces are found, told from what is none, and cut out with the eyes level and at their places."""

import importlib.metadata
import importlib.util
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from common.faces import FaceOptions, detection
from common.faces.alignment import eye_places
from common.faces.detection import Face, detector_state, find_faces, settled
from common.faces.preprocessing import NoFaceFound, decode, fit_faces, preprocessing_state
from common.faces.procedural import procedural_faces

DATA = Path(os.environ.get("VISARD_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_detector = pytest.mark.skipif(importlib.util.find_spec("mtcnn") is None, reason="needs visard[faces]")
GREY_BACKGROUND = (127, 127, 127)
# Measured by hand: the pupils, the tip of the nose and the corners of the mouth of the astronaut.
ASTRONAUT_POINTS = [(203.1, 100.6), (246.5, 103.4), (223.8, 126.9), (203.1, 139.8), (247.5, 138.8)]


@pytest.fixture(scope="module")
def astronaut():
    return Image.fromarray(pytest.importorskip("skimage.data").astronaut())


@pytest.fixture(scope="module")
def drawn():
    """Faces of twelve drawn persons, 200 pixels wide."""
    images = procedural_faces(range(12), 1, FaceOptions(64, 3), 0).images
    return [Image.fromarray(image.transpose(1, 2, 0)).resize((200, 200), Image.Resampling.BICUBIC) for image in images]


def tilt(image, degrees):
    return image.rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=GREY_BACKGROUND)


def beside(left, right):
    both = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), GREY_BACKGROUND)
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def as_image(pixels):
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def eyes_within(pixels):
    """The eyes (2, 2) in a square image as shares of its side, found anew on four times as many pixels."""
    image = as_image(pixels)
    large = image.resize((4 * image.width, 4 * image.height), Image.Resampling.BICUBIC)
    return find_faces(large)[0].points[:2] / large.size


def assert_level(pixels, crop, tolerance=0.02):
    eyes = eyes_within(pixels)
    assert np.abs(eyes - eye_places(crop)).max() < tolerance
    across = eyes[1] - eyes[0]
    assert abs(np.degrees(np.arctan2(across[1], across[0]))) < 4


# The parts of the detector.


def test_suppression_as_by_brute_force():
    rng = np.random.default_rng(0)
    for of_smaller in (False, True):
        for _ in range(20):
            corner, extent = rng.uniform(0, 60, (40, 2)), rng.uniform(5, 40, (40, 2))
            boxes, scores = np.concatenate([corner, corner + extent], axis=1), rng.uniform(size=40).round(1)
            kept = []
            for i in sorted(range(40), key=lambda i: (-scores[i], i)):
                for j in kept:
                    width = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0])
                    height = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1])
                    both = max(width, 0) * max(height, 0)
                    own, other = extent[i].prod(), extent[j].prod()
                    if both > 0.4 * (min(own, other) if of_smaller else own + other - both):
                        break
                else:
                    kept.append(i)
            assert detection._separate(boxes, scores, 0.4, of_smaller=of_smaller).tolist() == kept


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turning_back_undoes_the_turn(turns):
    pixels = np.zeros((40, 70), np.uint8)
    pixels[11, 52] = 255
    turned = np.asarray(Image.fromarray(pixels).transpose(detection.TURNS[turns - 1]))
    (y,), (x,) = np.nonzero(turned)
    points = np.tile((x + 0.5, y + 0.5), (5, 1))
    face = Face(np.array([x - 2.5, y - 1.5, x + 3.5, y + 2.5]), points, 1.0)
    back = detection._turned_back(face, turns, (70, 40))
    assert back.points.tolist() == [[52.5, 11.5]] * 5
    assert (back.box[:2] < (52.5, 11.5)).all()
    assert (back.box[2:] > (52.5, 11.5)).all()


def test_without_its_package_the_error_names_the_remedy(monkeypatch, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "face.png")
    detection._networks.cache_clear()
    monkeypatch.setattr(detection, "PACKAGE", "a-package-that-nobody-has-installed")
    options = FaceOptions(32, 3, detect="largest")
    for use in (detector_state, lambda: preprocessing_state(options), lambda: decode(tmp_path / "face.png", options)):
        with pytest.raises(DataError, match=r"visard\[faces\]"):
            use()
    assert decode(tmp_path / "face.png", FaceOptions(32, 3))[0].shape == (3, 32, 32)
    detection._networks.cache_clear()


@needs_detector
def test_other_weights_than_the_known_are_never_opened(monkeypatch):
    detection._networks.cache_clear()
    monkeypatch.setitem(detection.WEIGHTS, "onet", "0" * 64)
    with pytest.raises(DataError, match="onet with SHA-256 94f6"):
        find_faces(Image.new("RGB", (64, 64)))
    detection._networks.cache_clear()


@needs_detector
def test_the_cache_key_knows_the_detector():
    none, found = (preprocessing_state(FaceOptions(32, 3, detect=detect)) for detect in ("none", "largest"))
    assert none != found
    assert importlib.metadata.version("mtcnn") in found


# Photographs.


@needs_detector
def test_the_points_are_where_a_person_would_put_them(astronaut):
    (face,) = find_faces(astronaut)
    assert np.abs(face.points - ASTRONAUT_POINTS).max() < 0.08 * 43.5  # of the distance between the eyes
    assert face.score > 0.99
    assert np.abs(settled(astronaut, face).points - ASTRONAUT_POINTS).max() < 0.08 * 43.5


@needs_detector
def test_the_second_look_comes_nearer(astronaut):
    (upright,), middle = find_faces(astronaut), np.array(astronaut.size) / 2
    errors = []
    for degrees in (-40, -25, 25, 40):
        angle = np.radians(degrees)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        expected = (settled(astronaut, upright).points - middle) @ turn
        tilted = tilt(astronaut, degrees)
        (face,) = find_faces(tilted)
        looks = np.array([face.points, settled(tilted, face).points]) - np.array(tilted.size) / 2
        errors.append(np.abs(looks - expected).max((1, 2)))
    first, second = np.mean(errors, axis=0)
    assert second < first / 2
    assert np.max(errors, axis=0)[1] < 0.06 * 43.5  # of the distance between the eyes


@needs_detector
@pytest.mark.parametrize("degrees", [-35, -20, 0, 20, 35])
@pytest.mark.parametrize("crop", [1.0, 0.7])
def test_a_tilted_photograph_comes_out_level(astronaut, degrees, crop):
    (pixels,) = fit_faces(tilt(astronaut, degrees), FaceOptions(128, 3, crop, "largest"))
    assert_level(pixels, crop)


@needs_detector
@pytest.mark.parametrize("turn", detection.TURNS)
def test_a_photograph_on_its_side_or_upside_down_comes_out_upright(astronaut, turn):
    options = FaceOptions(64, 3, 0.8, "largest")
    (pixels,) = fit_faces(astronaut.transpose(turn), options)
    assert_level(pixels, 0.8)
    assert np.abs(pixels.astype(int) - fit_faces(astronaut, options)[0]).mean() < 8


@needs_detector
@pytest.mark.parametrize("scale", [0.4, 0.75, 2.0, 6.0])
def test_the_scale_of_the_photograph_does_not_matter(astronaut, scale):
    options = FaceOptions(32, 3, 0.6, "largest")
    resized = astronaut.resize((round(512 * scale), round(512 * scale)), Image.Resampling.LANCZOS)
    (pixels,) = fit_faces(resized, options)
    assert np.abs(pixels.astype(int) - fit_faces(astronaut, options)[0]).mean() < 8


@needs_detector
def test_two_faces_side_by_side(drawn):
    small, large = drawn[0].resize((140, 140), Image.Resampling.BICUBIC), drawn[1]
    every, one = (FaceOptions(32, 3, 0.6, detect) for detect in ("all", "largest"))
    alone = [fit_faces(image, one)[0].astype(int) for image in (large, small)]
    found = fit_faces(beside(small, large), every)
    assert len(found) == 2
    distances = np.array([[np.abs(pixels - other).mean() for other in alone] for pixels in found])
    assert distances[0, 0] < distances[0, 1] / 2
    assert distances[1, 1] < distances[1, 0] / 2
    assert np.array_equal(fit_faces(beside(small, large), one), found[:1])


@needs_detector
def test_drawn_faces_are_found_and_levelled(drawn):
    for image in drawn:
        (pixels,) = fit_faces(tilt(image, 15), FaceOptions(128, 3, 1.0, "largest"))
        assert_level(pixels, 1.0, tolerance=0.04)


@needs_detector
def test_a_face_cut_by_the_edge_is_found(astronaut):
    (face,) = find_faces(astronaut.crop((195, 40, 512, 300)))
    assert np.abs(face.points[1] + (195, 40) - ASTRONAUT_POINTS[1]).max() < 5


@needs_detector
def test_where_there_is_no_face_none_is_found():
    data = pytest.importorskip("skimage.data")
    pictures = [data.coffee(), data.chelsea(), data.rocket(), data.coins(), data.brick(), data.moon()]
    rng = np.random.default_rng(0)
    pictures += [rng.integers(0, 256, (200, 300, 3)).astype(np.uint8), np.zeros((300, 200), np.uint8)]
    for pixels in pictures:
        with pytest.raises(NoFaceFound, match=r"^no face found$"):
            fit_faces(Image.fromarray(pixels), FaceOptions(32, 3, detect="largest"))


@needs_detector
@pytest.mark.parametrize("size", [(1, 1), (19, 400), (400, 19)])
def test_tiny_images_are_refused(size):
    with pytest.raises(NoFaceFound, match="too small"):
        fit_faces(Image.new("RGB", size), FaceOptions(32, 3, detect="all"))


@needs_detector
def test_every_mode_and_orientation_gives_the_same_face(astronaut, tmp_path):
    options = FaceOptions(32, 1, 0.6, "largest")
    grey = astronaut.convert("L")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    for image, same in ((astronaut, astronaut.convert("RGBA")), (grey, wide), (grey, grey.convert("LA"))):
        expected, found = fit_faces(image, options)[0], fit_faces(same, options)[0]
        assert found.shape == (1, 32, 32)
        assert np.array_equal(found, expected)
    expected = fit_faces(astronaut, options)[0].astype(int)
    exif = Image.Exif()
    exif[0x0112] = 6
    astronaut.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.jpg", exif=exif, quality=95)
    (pixels,) = decode(tmp_path / "phone.jpg", options)
    assert np.abs(pixels - expected).mean() < 4


@needs_detector
def test_a_large_jpeg_is_read_at_a_scale_that_keeps_the_face(astronaut, tmp_path):
    wide = Image.new("RGB", (5000, 4200), GREY_BACKGROUND)
    wide.paste(astronaut, (3000, 2500))
    wide.save(tmp_path / "wide.jpg", quality=90)
    options = FaceOptions(64, 3, 0.8, "largest")
    begun = time.perf_counter()
    (pixels,) = decode(tmp_path / "wide.jpg", options)
    assert time.perf_counter() - begun < 5
    assert_level(pixels, 0.8)


@needs_detector
def test_a_crowd_is_found_in_bounded_time(drawn):
    one = drawn[0].resize((40, 40), Image.Resampling.BICUBIC)
    crowd = Image.new("RGB", (640, 640))
    for i in range(256):
        crowd.paste(one, (i % 16 * 40, i // 16 * 40))
    begun = time.perf_counter()
    assert len(find_faces(crowd)) > 50
    assert time.perf_counter() - begun < 10


@needs_detector
def test_the_same_photograph_gives_the_same_face(astronaut):
    options = FaceOptions(64, 3, 0.9, "all")
    first, second = (fit_faces(tilt(astronaut, 11), options) for _ in range(2))
    assert np.array_equal(first, second)


@needs_detector
def test_photographs_of_the_london_set():
    photographs = sorted((DATA / "london_faces_256" / "images").glob("*/*.jpg"))[:20]
    if not photographs:
        pytest.skip("the London faces are not there")
    for path in photographs:
        (pixels,) = decode(path, FaceOptions(128, 3, 1.0, "all"))
        assert_level(pixels, 1.0, tolerance=0.03)
