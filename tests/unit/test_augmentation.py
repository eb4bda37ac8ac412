"""Augmentation: what each transform does, image by image; views; randomness that a seed decides."""

import hashlib
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.augmentation import _TRANSFORMS, Augmentation, step_randomness
from common.models.stochastic import seeded_masks
from common.sections import AUGMENTATIONS, AugmentationConfig

EVERYTHING = ", ".join(AUGMENTATIONS)


def augmented(names: str, images: Tensor, seed: int = 1) -> Tensor:
    augmentation = Augmentation(AugmentationConfig(names), images.shape[-1], images.shape[1])
    with seeded_masks(seed.to_bytes(8, "little")):
        return augmentation(images)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_every_name_has_its_transform() -> None:
    assert tuple(_TRANSFORMS) == AUGMENTATIONS


def test_half_of_the_images_are_flipped() -> None:
    images = noise(400, 1, 28, 28)
    views = augmented("flip", images)
    mirrored = (views == images.flip(-1)).flatten(1).all(1)
    assert ((views == images).flatten(1).all(1) ^ mirrored).all()
    assert 150 < int(mirrored.sum()) < 250


@pytest.mark.parametrize(("size", "margin"), [(28, 3), (32, 4)])
def test_a_crop_is_a_shift_with_reflected_borders(size: int, margin: int) -> None:
    image = noise(1, 3, size, size)
    wide = np.pad(image[0].numpy(), ((0, 0), (margin, margin), (margin, margin)), mode="reflect")
    windows = {
        (y, x): wide[:, y : y + size, x : x + size] for y in range(2 * margin + 1) for x in range(2 * margin + 1)
    }
    shifts = []
    for view in augmented("crop", image.expand(600, -1, -1, -1)).numpy():
        (shift,) = [shift for shift, window in windows.items() if np.array_equal(window, view)]
        shifts.append(shift)
    counts = np.bincount([y * (2 * margin + 1) + x for y, x in shifts], minlength=len(windows))
    expected = len(shifts) / len(windows)
    assert ((counts - expected) ** 2 / expected).sum() < 1.6 * len(windows)  # chi-square, 48 or 80 degrees of freedom
    # Neighbours in the batch draw apart.
    assert np.abs(np.corrcoef(np.array(shifts[:-1]).T, np.array(shifts[1:]).T)[:2, 2:]).max() < 0.15


def test_rotations_are_of_up_to_ten_degrees_either_way() -> None:
    place = torch.arange(64, dtype=torch.float32) - 31.5
    y, x = torch.meshgrid(place, place, indexing="ij")
    spot = torch.exp(-((x - 20) ** 2 + y**2) / 8)[None, None]
    views = augmented("rotation", spot.expand(300, 1, -1, -1) * 2 - 1).add(1).div(2)
    mass = views.sum((1, 2, 3))
    angles = torch.rad2deg(torch.atan2((views * y).sum((1, 2, 3)) / mass, (views * x).sum((1, 2, 3)) / mass))
    assert 9.0 < float(angles.max()) < 10.1
    assert -10.1 < float(angles.min()) < -9.0
    assert 5.0 < float(angles.std()) < 6.5  # uniform: 5.8
    assert abs(float(torch.corrcoef(torch.stack([angles[:-1], angles[1:]]))[0, 1])) < 0.2
    # Nothing comes in from outside: a plain image stays plain.
    torch.testing.assert_close(augmented("rotation", torch.full((8, 1, 28, 28), 0.5)), torch.full((8, 1, 28, 28), 0.5))


def test_colour_changes_brightness_and_contrast_of_each_image_apart() -> None:
    image = torch.full((1, 1, 28, 28), 0.4)
    image[..., :14] = 0.6  # in [0, 1]; no factor drives these out of range
    views = augmented("colour", (image * 2 - 1).expand(300, -1, -1, -1)).add(1).div(2)
    light, dark = views[:, 0, 0, 0], views[:, 0, 0, 20]
    brightness = (light + dark) / (0.6 + 0.4)
    contrast = (light - dark) / (0.6 - 0.4) / brightness
    for factor in (brightness, contrast):
        assert 0.799 < float(factor.min()) < 0.82
        assert 1.18 < float(factor.max()) < 1.201
        assert 0.10 < float(factor.std()) < 0.13  # uniform: 0.115
    assert abs(float(torch.corrcoef(torch.stack([brightness, contrast]))[0, 1])) < 0.2


def test_colour_changes_the_saturation_of_colours_and_leaves_grey_grey() -> None:
    colour = torch.tensor([0.5, 0.4, 0.45])[:, None, None].expand(300, 3, 28, 28)
    views = augmented("colour", colour * 2 - 1).add(1).div(2)[:, :, 0, 0]
    weights = torch.tensor([0.299, 0.587, 0.114])
    grey = (views * weights).sum(1)
    brightness = grey / float((colour[0, :, 0, 0] * weights).sum())
    assert 0.79 < float(brightness.min()) < float(brightness.max()) < 1.21
    factors = (
        (views - grey[:, None]) / (colour[0, :, 0, 0] - (colour[0, :, 0, 0] * weights).sum()) / brightness[:, None]
    )
    assert float((factors - factors.mean(1, keepdim=True)).abs().max()) < 0.02  # the hue stays
    assert float(factors.min()) < 0.75  # contrast times saturation
    assert float(factors.max()) > 1.25
    plain = augmented("colour", noise(20, 1, 28, 28).expand(-1, 3, -1, -1))
    assert float((plain - plain[:, :1]).abs().max()) < 1e-5


@pytest.mark.parametrize(("size", "reach"), [(28, 1), (32, 1), (64, 3)])
def test_half_of_the_images_are_blurred_within_the_kernel(size: int, reach: int) -> None:
    image = torch.full((1, 1, size, size), -1.0)
    middle = size // 2
    image[0, 0, middle, middle] = 1.0
    views = augmented("blur", image.expand(200, -1, -1, -1))
    blurred = (views != image).flatten(1).any(1)
    assert 70 < int(blurred.sum()) < 130
    mass = (views + 1) / 2
    torch.testing.assert_close(mass.sum((1, 2, 3)), torch.ones(200), atol=2e-3, rtol=0)
    around = mass[:, 0, middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]
    torch.testing.assert_close(around.sum((1, 2)), torch.ones(200), atol=2e-3, rtol=0)
    torch.testing.assert_close(around, around.flip(-1).transpose(1, 2), atol=1e-6, rtol=0)
    assert float(around[blurred][:, reach, reach].std()) > 0.05  # each its own width


@pytest.mark.parametrize("shape", [(28, 1), (32, 3)])
def test_a_seed_decides_everything_and_pixels_of_other_images_nothing(shape: tuple[int, int]) -> None:
    size, channels = shape
    images = noise(33, channels, size, size)
    views = augmented(EVERYTHING, images)
    assert views.shape == images.shape
    assert views.dtype == torch.float32
    assert float(views.abs().max()) <= 1.0
    assert torch.equal(augmented(EVERYTHING, images), views)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augmented(EVERYTHING, images), views)
    plain = torch.ones(200, channels, size, size)
    for image in (plain, -plain):
        assert float(augmented("rotation, blur", image).abs().max()) <= 1.0
    assert not (augmented(EVERYTHING, images, seed=2) == views).flatten(1).all(1).any()
    others = noise(33, channels, size, size, seed=9)
    for i in (0, 7, 32):
        others[i] = images[i]
    changed = augmented(EVERYTHING, others)
    for i in range(33):
        assert torch.equal(changed[i], views[i]) == (i in (0, 7, 32))


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(28, 1), (32, 3), (64, 3)])
def test_an_image_is_rounded_alike_alone_and_in_any_batch(name: str, shape: tuple[int, int]) -> None:
    """What the claim of `common.augmentation` rests on: given its parameters, bit for bit."""
    size, channels = shape
    transform = _TRANSFORMS[name](size, channels)
    module: Any = inspect.getclosurevars(transform).nonlocals["jitter"] if name == "colour" else transform
    for count in (37, 64):
        images = noise(count, channels, size, size) * 0.5 + 0.5
        with seeded_masks(count.to_bytes(8, "little")):
            together = module(images)
        drawn = dict(module._params)
        fixed = ("forward_input_shape", "order")
        for some in ([0], [5, 36], [36, 3, 5]):
            few = {key: value if key in fixed or len(value) != count else value[some] for key, value in drawn.items()}
            few["forward_input_shape"] = torch.tensor([len(some), *drawn["forward_input_shape"][1:].tolist()])
            assert torch.equal(module(images[some], params=few), together[some])


def test_views_follow_the_images_through_gradients() -> None:
    """The generator is trained through the augmentation: its derivative is the finite difference's limit."""
    images = noise(6, 3, 32, 32).double() * 0.5
    weights, direction = noise(6, 3, 32, 32, seed=1).double(), noise(6, 3, 32, 32, seed=2).double()
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((augmented(EVERYTHING, leaf) * weights).sum(), leaf)
    step = 1e-6
    ahead, back = (augmented(EVERYTHING, images + s * step * direction) for s in (1, -1))
    expected = ((ahead - back) * weights).sum((1, 2, 3)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), expected, rtol=1e-3, atol=1e-3)


def test_nothing_is_drawn_or_changed_without_augmentation_or_dropout() -> None:
    def never() -> bytes:
        raise AssertionError("no seed was due")

    plain = Augmentation(AugmentationConfig(), 28, 1)
    images, units = noise(3, 1, 28, 28), torch.arange(3)
    with step_randomness(nn.Linear(2, 1), plain, never):
        assert plain(images) is images
        assert plain.views_of(images, None, units) == (images, None, units)
    calls = []

    def seed() -> bytes:
        calls.append(1)
        return bytes(32)

    linear, dropout = nn.Linear(2, 1), nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))
    flip = Augmentation(AugmentationConfig("flip"), 28, 1)
    before = torch.random.get_rng_state()
    for discriminator, augmentation in ((linear, flip), (dropout, plain)):
        with step_randomness(discriminator, augmentation, seed):
            augmentation(images)
            torch.rand(3)
    assert len(calls) == 2
    assert torch.equal(torch.random.get_rng_state(), before)
    empty = images[:0]
    views = Augmentation(AugmentationConfig(EVERYTHING, 3), 28, 1).views_of(empty, units[:0], units[:0])
    assert [len(part) for part in views if part is not None] == [0, 0, 0]


def test_every_bit_of_a_seed_counts_and_fills_the_whole_twister() -> None:
    """torch's numbers are those of NumPy's twister in the state that SHAKE-256 gives, word for word."""
    dropout, plain = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5)), Augmentation(AugmentationConfig(), 28, 1)

    def drawn(seed: bytes) -> list[int]:
        with step_randomness(dropout, plain, lambda: seed):
            return torch.randint(2**20, (2000,)).tolist()

    seed = bytes(range(32))
    twister = np.random.MT19937()
    key = np.frombuffer(hashlib.shake_256(seed).digest(2496), "<u4")
    twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": 624}}
    assert drawn(seed) == [int(word) % 2**20 for word in twister.random_raw(2000)]
    others = [drawn(bytes([*seed[:i], seed[i] ^ 128, *seed[i + 1 :]])) for i in range(32)]
    assert len({tuple(numbers) for numbers in [drawn(seed), *others]}) == 33


def test_views_stand_beside_each_other_whatever_is_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, units = (
        noise(7, 1, 28, 28),
        torch.tensor([0, 1, 0, 1, 0, 1, 1]),
        torch.tensor([0, 0, 1, 1, 1, 2, 3]),
    )
    augmentation = Augmentation(AugmentationConfig("flip", 3), 28, 1)
    for chunk in (1, 6, 256):
        monkeypatch.setattr("common.augmentation._CHUNK", chunk)
        views, view_labels, view_units = augmentation.views_of(images, labels, units)
        assert view_labels is not None
        assert view_labels.tolist() == np.repeat(labels.numpy(), 3).tolist()
        assert view_units.tolist() == np.repeat(units.numpy(), 3).tolist()
        for view, image in zip(views, np.repeat(images.numpy(), 3, axis=0), strict=True):
            assert np.array_equal(view, image) or np.array_equal(view, image[..., ::-1])
