"""The scattering transform against loops over pixels, and what a discriminator's fixed features must keep."""

import itertools
import math

import numpy as np
import pytest
import torch

from common.models.scattering import Scattering

SHAPES = list(itertools.product([28, 32, 64, 128], [1, 3]))


def noise(count: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def wavelets() -> list[np.ndarray]:
    """Eight Morlet wavelets (7, 7), complex, each value by its formula."""
    found = []
    for turn in range(8):
        angle = turn * math.pi / 8
        window, wave = np.zeros((7, 7)), np.zeros((7, 7), complex)
        for down, right in itertools.product(range(-3, 4), repeat=2):
            along = right * math.cos(angle) + down * math.sin(angle)
            across = -right * math.sin(angle) + down * math.cos(angle)
            place = down + 3, right + 3
            window[place] = math.exp(-(along**2 + across**2 / 4) / (2 * 0.64))
            wave[place] = window[place] * np.exp(0.75j * math.pi * along)
        found.append((wave - wave.sum() / window.sum() * window) / (2 * math.pi * 0.64 / 0.5))
    return found


def modulus(image: np.ndarray, wavelet: np.ndarray) -> np.ndarray:
    padded = np.pad(image, 3, mode="reflect")
    found = np.zeros_like(image)
    for row, column in np.ndindex(*image.shape):
        response = (padded[row : row + 7, column : column + 7] * wavelet).sum()
        found[row, column] = math.sqrt(abs(response) ** 2 + 1e-8)
    return found


def halved(image: np.ndarray) -> np.ndarray:
    weights = np.array([1, 4, 6, 4, 1]) / 16
    padded = np.pad(image, 2, mode="reflect")
    found = np.zeros((len(image) // 2, len(image) // 2))
    for row, column in np.ndindex(*found.shape):
        found[row, column] = weights @ padded[2 * row : 2 * row + 5, 2 * column : 2 * column + 5] @ weights
    return found


def by_hand(image: np.ndarray, scales: int, group: int) -> np.ndarray:
    """Features of one image (C, S, S) in [-1, 1]: every path of wavelets by itself."""
    maps = []
    for channel in (image + 1) / 2:
        means = [channel]
        for _ in range(scales):
            means.append(halved(means[-1]))

        def blurred(map_: np.ndarray, times: int) -> np.ndarray:
            for _ in range(times):
                map_ = halved(map_)
            return map_

        maps.append(means[-1])
        for scale in range(scales):
            maps += [blurred(modulus(means[scale], w), scales - scale) for w in wavelets()]
        for coarse in range(1, scales):
            for fine in range(coarse):
                for first in wavelets():
                    inner = blurred(modulus(means[fine], first), coarse - fine)
                    maps += [blurred(modulus(inner, second), scales - coarse) for second in wavelets()]
    for low in range(0, len(maps), group):
        some = np.stack(maps[low : low + group])
        maps[low : low + group] = list((some - some.mean()) / math.sqrt(some.var() + 1e-5))
    features = np.stack(maps).ravel()
    return features / math.sqrt(len(features))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_features_are_those_of_loops_over_pixels(channels: int) -> None:
    images = noise(2, channels, 28)
    images[1] = images[1] * 0.1 + 0.5
    found = Scattering(28, channels)(images)
    for one, image in zip(found, images, strict=True):
        expected = by_hand(image.double().numpy(), scales=2, group=3)
        np.testing.assert_allclose(one.numpy(), expected, atol=2e-6)


@pytest.mark.slow
def test_three_octaves_are_those_of_loops_over_pixels() -> None:
    image = noise(1, 1, 64)
    expected = by_hand(image[0].double().numpy(), scales=3, group=7)
    np.testing.assert_allclose(Scattering(64, 1)(image)[0].numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(("size", "channels"), SHAPES)
def test_shapes_and_norm(size: int, channels: int) -> None:
    network = Scattering(size, channels)
    octaves, side = {28: (2, 7), 32: (2, 8), 64: (3, 8), 128: (4, 8)}[size]
    maps = channels * (1 + 8 * octaves + 64 * math.comb(octaves, 2))
    assert (network.maps, network.num_features) == (maps, maps * side * side)
    assert list(network.parameters()) == list(network.buffers()) == []
    flat = torch.linspace(-1, 1, 3)[:, None, None, None].expand(3, channels, size, size)
    stripes = torch.ones(1, channels, size, size)
    stripes[..., ::2] = -1
    features = network(torch.cat([noise(2, channels, size), flat, stripes]))
    assert features.shape == (6, network.num_features)
    assert features.dtype == torch.float32
    norms = features.double().norm(dim=1)
    assert norms.max() <= 1 + 1e-6
    assert norms[:2].min() > 0.15  # not all is lost in the normalisation's constant, though the finest maps are small


def test_a_flat_image_has_no_response() -> None:
    """Each wavelet sums to 0, so of a flat image only the mean is left, and that the normalisation takes away."""
    for wavelet in wavelets():
        assert abs(wavelet.sum()) < 1e-12
    impulse = torch.full((1, 1, 28, 28), -1.0)
    impulse[..., 14, 14] = 1.0
    network = Scattering(28, 1)
    brighter, flat = network(torch.cat([impulse, torch.full((1, 1, 28, 28), 0.3)]))
    maps = flat.view(network.maps, 7, 7)
    # In the group of the mean the moduli are small beside it; all others are constants.
    assert maps[3:].abs().max() < 1e-4
    assert brighter.view(network.maps, 7, 7)[3:].abs().max() > 1e-2


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (64, 3)])
def test_the_gradient_at_a_black_image_is_finite(size: int, channels: int) -> None:
    network = Scattering(size, channels)
    images = torch.full((1, channels, size, size), -1.0, requires_grad=True)
    weights = torch.randn(network.num_features, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(network(images)[0] @ weights, images)
    assert torch.isfinite(gradient).all()
    assert gradient.any()


def test_a_move_by_one_pixel_changes_features_less_than_pixels() -> None:
    """Of pictures with fine structure; of smooth ones a pixel's move is little to either."""
    fine = noise(40, 3, 32)
    blurred = torch.nn.functional.avg_pool2d(noise(40, 3, 34), 3, 1)
    for images, factor in ((fine, 0.5), (blurred, 0.7)):
        for move in ((0, 1), (1, 0)):
            moved = torch.roll(images, move, dims=(2, 3))
            share = []
            for embed in (torch.nn.Flatten(), Scattering(32, 3)):
                here, there = embed(images), embed(moved)
                apart = (here - here.roll(1, dims=0)).norm(dim=1)  # how far another image is
                share.append(float(((here - there).norm(dim=1) / apart).mean()))
            assert share[1] < factor * share[0]


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 1)])
def test_no_image_is_mixed_with_another(size: int, channels: int) -> None:
    network, images = Scattering(size, channels), noise(4, channels, size)
    together = network(images)
    for i in range(4):
        torch.testing.assert_close(network(images[i : i + 1])[0], together[i], atol=1e-6, rtol=0)
    others = images.clone()
    others[1] = float("nan")
    assert torch.equal(network(others)[[0, 2, 3]], together[[0, 2, 3]])
    assert network(images[:0]).shape == (0, network.num_features)


def test_half_precision_around_it_changes_nothing() -> None:
    network, images = Scattering(28, 1), noise(3, 1, 28)
    expected = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(images)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert network(images.bfloat16()).dtype == torch.float32


def test_nothing_is_drawn() -> None:
    before = torch.get_rng_state()
    one, other = (Scattering(28, 1)(noise(2, 1, 28)) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())
