"""Disturbances do what their table says, alike for the same seed, and the more the severer."""

import io
import itertools
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from common.errors import ConfigError, DataError
from common.evaluation.disturbances import DISTURBANCES, MIN_SIDE, disturb, robustness
from common.faces import FaceOptions, procedural_faces

CASES = [(name, severity) for name in DISTURBANCES for severity in (1, 2, 3)]


def faces(side: int, channels: int, count: int = 8) -> np.ndarray:
    drawn = procedural_faces(range(count), 1, FaceOptions(side, channels, 0.8), 0).tensor(np.arange(count))
    return np.asarray(((drawn.clamp(-1, 1) + 1) * 127.5).round().numpy().astype(np.uint8))


def error(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


@pytest.fixture(scope="module", params=[(32, 3), (32, 1), (128, 3)], ids=str)
def images(request: pytest.FixtureRequest) -> np.ndarray:
    return faces(*request.param)


@pytest.mark.parametrize("name", DISTURBANCES)
def test_the_severer_the_farther(images: np.ndarray, name: str) -> None:
    before = images.copy()
    disturbed = [disturb(images, name, severity, 0) for severity in (1, 2, 3)]
    assert np.array_equal(images, before)
    for each in disturbed:
        assert (each.shape, each.dtype) == (images.shape, np.uint8)
        assert each.flags.c_contiguous
        assert each.flags.owndata
    errors = [0.0, *(error(each, images) for each in disturbed)]
    assert errors == sorted(set(errors))
    # Of every image, not only on average.
    assert all(error(disturbed[2][i], images[i]) > error(disturbed[0][i], images[i]) > 0 for i in range(len(images)))


@pytest.mark.parametrize(("name", "severity"), CASES)
def test_an_image_is_disturbed_alike_in_any_company(name: str, severity: int) -> None:
    images = faces(32, 3)
    whole = disturb(images, name, severity, 5)
    assert np.array_equal(disturb(images, name, severity, 5), whole)
    assert np.array_equal(disturb(images[:3], name, severity, 5), whole[:3])
    others = np.zeros_like(images)
    others[6] = images[6]
    assert np.array_equal(disturb(others, name, severity, 5)[6], whole[6])
    read_only = np.moveaxis(np.ascontiguousarray(np.moveaxis(images, 1, -1)), -1, 1)
    read_only.flags.writeable = False
    again = disturb(read_only, name, severity, 5)
    assert np.array_equal(again, whole)
    assert again.flags.c_contiguous
    # Seed and place matter where there is chance, and nowhere else.
    chance = name in ("noise", "occlusion")
    assert np.array_equal(disturb(images, name, severity, 6), whole) != chance
    twins = disturb(images[[0] * 8], name, severity, 5)
    assert all(np.array_equal(twin, twins[0]) for twin in twins) != chance


def test_a_table_tells_the_parameters() -> None:
    for name, disturbance in DISTURBANCES.items():
        assert len(disturbance.severities) == 3, name
        for label, parameter in disturbance.severities.items():
            number = Fraction(next(word for word in label.split() if word[0].isdigit()))
            assert float(number) * (255 if name == "noise" else 1) == pytest.approx(parameter), label


def test_noise_has_the_deviation_that_it_says() -> None:
    grey = np.full((4, 3, 64, 64), 128, np.uint8)
    for severity, deviation in ((1, 10), (2, 25), (3, 50)):
        added = disturb(grey, "noise", severity, 0).astype(float) - 128
        # Little is cut off at 50, but for the rest: 128 is 2.56 deviations.
        assert added.std() == pytest.approx(deviation, rel=0.03)
        assert abs(added.mean()) < 0.02 * deviation
        apart = np.corrcoef(added.reshape(12, -1))[np.triu_indices(12, 1)]
        assert np.abs(apart).max() < 0.1
    mild, severe = (disturb(grey, "noise", severity, 0).astype(float) - 128 for severity in (1, 2))
    assert np.abs(severe - 2.5 * mild).max() <= 0.5 + 2.5 * 0.5
    assert disturb(np.full_like(grey, 255), "noise", 3, 0).max() == 255


def test_blur_is_a_gaussian_of_a_share_of_the_side() -> None:
    point = np.zeros((1, 1, 64, 64), np.uint8)
    point[..., 32, 32] = 255
    # Deviations of 1, 2 and 4 pixels; the weight of the middle is 1 / (2 pi deviation^2).
    for severity, deviation in ((1, 1), (2, 2), (3, 4)):
        middle = disturb(point, "blur", severity, 0)[0, 0, 32, 32]
        assert middle == pytest.approx(255 / (2 * np.pi * deviation**2), abs=1)
    flat = np.stack([np.full((32, 32), level, np.uint8) for level in (0, 90, 255)])[None]
    assert np.array_equal(disturb(flat, "blur", 3, 0), flat)


def test_jpeg_is_pillow_s() -> None:
    image = faces(32, 3, 1)[0]
    for severity, quality in ((1, 50), (2, 20), (3, 5)):
        buffer = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0).copy()).save(buffer, "JPEG", quality=quality)
        expected = np.asarray(Image.open(buffer)).transpose(2, 0, 1)
        assert np.array_equal(disturb(image[None], "jpeg", severity, 0)[0], expected)


@pytest.mark.parametrize("side", [32, 128])
def test_occlusion_covers_a_square_and_nothing_else(side: int) -> None:
    white = np.full((60, 3, side, side), 255, np.uint8)
    covered = [disturb(white, "occlusion", severity, 0) == 128 for severity in (1, 2, 3)]
    for share, each in zip((1 / 4, 3 / 8, 1 / 2), covered, strict=True):
        for image in each:
            assert (image == image[0]).all()
            rows, columns = np.flatnonzero(image[0].any(1)), np.flatnonzero(image[0].any(0))
            assert len(rows) == len(columns) == share * side
            assert image[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert image[0].sum() == len(rows) ** 2
        tops = {int(image[0].any(1).argmax()) for image in each}
        # Anywhere from edge to edge.
        assert min(tops) < 0.1 * side
        assert max(tops) > 0.9 * (side - share * side)
    assert all(
        (small <= large).all()
        for mild, severe in itertools.pairwise(covered)
        for small, large in zip(mild, severe, strict=True)
    )
    many = disturb(np.full((400, 1, 32, 32), 255, np.uint8), "occlusion", 1, 0)[:, 0] == 128
    assert set(many.any(2).argmax(1)) == set(many.any(1).argmax(1)) == set(range(25))
    untouched = disturb(white, "occlusion", 3, 0)[~covered[2]]
    assert (untouched == 255).all()


def test_a_lower_resolution_keeps_means_and_loses_detail() -> None:
    # Of 32 pixels, stripes of one vanish at 16 across, and those of eight still stand at 8 across.
    fine = np.tile(np.array([0, 255], np.uint8), 16)[None, None, None].repeat(32, axis=2)
    assert np.abs(disturb(fine, "resolution", 2, 0).astype(int) - 128).max() <= 1
    coarse = np.repeat(np.array([0, 255] * 2, np.uint8), 8)[None, None, None].repeat(32, axis=2)
    assert np.ptp(disturb(coarse, "resolution", 3, 0)) > 200
    images = faces(32, 3)
    for severity in (1, 2, 3):
        lower = disturb(images, "resolution", severity, 0)
        assert np.abs(lower.mean((2, 3)) - images.mean((2, 3))).max() < 2


@pytest.mark.parametrize(("name", "severity"), [case for case in CASES if case[0] != "jpeg"])
def test_a_severity_means_the_same_at_every_size(name: str, severity: int) -> None:
    """The same smooth pictures, at 128 and at 32 pixels: as much is lost."""
    random = np.random.default_rng(0)
    waves = ndimage.gaussian_filter(random.standard_normal((40, 1, 128, 128)), (0, 0, 10, 10), mode="wrap")
    large = np.clip(128 + 45 * waves / waves.std(), 0, 255)
    small = large.reshape(40, 1, 32, 4, 32, 4).mean((3, 5))
    lost = []
    for pictures in (large, small):
        images = np.rint(pictures).astype(np.uint8)
        changed = disturb(images, name, severity, 0)
        lost.append(error(changed, images))
    assert lost[0] == pytest.approx(lost[1], rel=0.15, abs=0.3)


def test_a_table_of_a_measure() -> None:
    images = faces(32, 1, 4)
    seen: list[np.ndarray] = []

    def measure(given: np.ndarray) -> float:
        seen.append(given)
        return error(given, images)

    table = robustness(measure, images, 3)
    assert list(table) == ["none", *DISTURBANCES]
    assert table["none"] == [0.0]
    assert len(seen) == 1 + len(CASES)
    for (name, severity), given in zip(CASES, seen[1:], strict=True):
        assert np.array_equal(given, disturb(images, name, severity, 3))
        assert table[name][severity - 1] == error(given, images)
        assert type(table[name][severity - 1]) is float
    assert robustness(measure, images, 3) == table


def test_what_cannot_be_disturbed_is_refused() -> None:
    images = np.zeros((2, 3, 32, 32), np.uint8)
    with pytest.raises(ConfigError, match=f"'snow': choose one of {', '.join(DISTURBANCES)}"):
        disturb(images, "snow", 1, 0)
    for severity in (0, 4, -1):
        with pytest.raises(ConfigError, match=f"severity {severity}: choose one from 1 to 3"):
            disturb(images, "blur", severity, 0)
    with pytest.raises(ConfigError, match="seed -1: give 0 or more"):
        disturb(images, "noise", 1, -1)
    for bad in (
        images.astype(np.float32),
        images[0],
        images[:0],
        images[:, :2],
        images[:, :, :31],
        images.transpose(0, 2, 3, 1),
    ):
        with pytest.raises(DataError, match=r"give uint8 \(N, 1 or 3, S, S\)"):
            disturb(bad, "blur", 1, 0)
        with pytest.raises(DataError, match=r"give uint8 \(N, 1 or 3, S, S\)"):
            robustness(lambda _: 0.0, bad, 0)
    with pytest.raises(DataError, match="images of 24 x 24 pixels: give at least 25 x 25"):
        disturb(images[:, :, :24, :24], "blur", 1, 0)
    least = images[:, :, :MIN_SIDE, :MIN_SIDE]
    assert all(disturb(least, name, severity, 0).shape == least.shape for name, severity in CASES)
