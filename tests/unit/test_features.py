import math

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.models.features import Group, RandomFeatures


@pytest.mark.parametrize("image_size", [28, 32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_norm_never_exceeds_one(image_size: int, channels: int) -> None:
    features = RandomFeatures(image_size, channels, seed=3)
    random = torch.Generator().manual_seed(0)
    shape = (4, channels, image_size, image_size)
    uniform = torch.rand(shape, generator=random) * 2 - 1
    images = torch.cat(
        [uniform, uniform.sign(), torch.ones(shape), -torch.ones(shape), 100 * uniform, torch.zeros(shape)]
    )
    embedded = features(images)
    assert embedded.shape == (len(images), features.dim)
    assert embedded.dtype == torch.float32
    norms = embedded.double().square().sum(dim=1).sqrt()
    assert norms.max() <= 1
    assert norms.min() > 0.999


def test_the_norm_holds_in_bfloat16_too() -> None:
    features = RandomFeatures(28, 1, seed=0)
    images = torch.rand((8, 1, 28, 28), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        embedded = features(images)
    assert embedded.dtype == torch.float32
    assert embedded.double().square().sum(dim=1).max() <= 1


def test_against_a_naive_loop() -> None:
    groups = (
        Group(3, 2, 4, 0.3),
        Group(5, 4, 2, 0.2, "contrast"),
        Group(28, 1, 5, 0.5, "colour"),
        Group(4, 3, 3, 0.2, shrink=2),
    )
    features = RandomFeatures(28, 3, seed=5, groups=groups)
    image = torch.rand((1, 3, 28, 28), generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels = ((image[0] + 1) / 2).double().numpy()
    expected: list[float] = []
    for index, (kernel, stride, filters, _, _, shrink) in enumerate(groups):
        # A filter on means over squares is a filter of the pixels, each cell spread over its square.
        weight = np.kron(getattr(features, f"weight{index}").double().numpy(), np.ones((shrink, shrink))) / shrink**2
        kernel, stride = kernel * shrink, stride * shrink
        places = range(0, 28 - kernel + 1, stride)
        responses = np.array(
            [
                (weight[number] * pixels[:, row : row + kernel, column : column + kernel]).sum()
                for number in range(filters)
                for row in places
                for column in places
            ]
        )
        for wave in (np.cos, np.sin):
            expected += list(wave(responses) / math.sqrt(len(groups) * len(responses)))
    assert features.dim == len(expected)
    np.testing.assert_allclose(features(image)[0].numpy(), expected, rtol=2e-4, atol=2e-6)


def test_the_seed_is_all() -> None:
    images = torch.rand((2, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    before = torch.random.get_rng_state()
    one, same, other = (RandomFeatures(32, 1, seed=seed)(images) for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not list(RandomFeatures(32, 1, seed=7).parameters())


def test_every_pixel_counts() -> None:
    for image_size in (28, 32, 64, 128):
        features = RandomFeatures(image_size, 1, seed=0)
        images = torch.zeros((1, 1, image_size, image_size), requires_grad=True)
        features(images).sum().backward()
        assert images.grad is not None
        assert (images.grad != 0).all()


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="30 pixels"):
        RandomFeatures(30, 1, seed=0)
    with pytest.raises(ConfigError, match="2 channels"):
        RandomFeatures(28, 2, seed=0)
    features = RandomFeatures(28, 1, seed=0)
    with pytest.raises(ConfigError, match="shape"):
        features(torch.zeros((2, 3, 28, 28)))
    with pytest.raises(ConfigError, match="shape"):
        features(torch.zeros((1, 28, 28)))


def test_contrast_ignores_brightness_and_colour_ignores_grey() -> None:
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(2)) - 0.5
    contrast = RandomFeatures(32, 3, seed=0, groups=(Group(8, 4, 4, 0.1, "contrast"),))
    assert torch.allclose(contrast(image), contrast(image + 0.4), atol=1e-5)
    assert not torch.allclose(contrast(image), contrast(image * 0.5), atol=1e-3)
    colour = RandomFeatures(32, 3, seed=0, groups=(Group(8, 4, 4, 0.1, "colour"),))
    assert torch.allclose(colour(image), colour(image + image[:, :1] / 2), atol=1e-5)
    assert not torch.allclose(colour(image), colour(image.flip(1)), atol=1e-3)
    assert len(RandomFeatures(32, 1, seed=0).groups) == len(RandomFeatures(32, 3, seed=0).groups) - 1


def test_length_is_where_the_kernel_falls_to_exp_minus_half() -> None:
    random = torch.Generator().manual_seed(4)
    one = torch.rand((1, 1, 28, 28), generator=random) - 0.5
    step = torch.randn((1, 1, 28, 28), generator=random)
    other = one + 2 * 0.183 * step / step.square().mean().sqrt()  # [-1, 1] is twice as wide as [0, 1]
    features = RandomFeatures(28, 1, seed=0, groups=(Group(28, 1, 4000, 0.183),))
    assert float((features(one) * features(other)).sum()) == pytest.approx(math.exp(-0.5), abs=0.05)


@pytest.mark.parametrize("size", [28, 32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_no_entry_passes_a_sixty_fourth(size: int, channels: int) -> None:
    """The range of a secure sum of features rests on it (`common.secure_messages`)."""
    features = RandomFeatures(size, channels, seed=3)
    images = torch.stack([torch.full((channels, size, size), value) for value in (-1.0, 0.0, 1.0)])
    assert float(features(images).abs().max()) <= 1 / 64
