"""The scattering transform: fixed wavelet features on which a linear discriminator learns from few, noisy gradients.

Bruna and Mallat 2013, "Invariant scattering convolution networks": moduli of wavelet responses, averaged, to the second
order. Under differential privacy a linear layer on them does better than any network of comparable cost that learns
its features from the noisy gradients too (Tramer and Boneh 2021, "Differentially private learning needs better
features"). Nothing here is learned or drawn, and no image is mixed with another.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

_ORIENTATIONS = 8
# A Morlet wavelet as usual for 8 orientations: width and centre frequency in pixels of its scale (radians a pixel).
_WIDTH, _FREQUENCY, _SLANT = 0.8, 3 * math.pi / 4, 0.5
_RADIUS = 3
# Pixels of a channel that are worked on at once: no fewer images than clipping takes at a time.
_PIXELS = 128 * 32 * 32
# image size -> octaves, and maps that are brought to mean 0 and variance 1 together (they must divide the maps)
_SHAPES = {28: (2, 3), 32: (2, 3), 64: (3, 7), 128: (4, 3)}


class Scattering(nn.Module):
    """Scattering of an image to the second order over J octaves, normalised: no parameters.

    An image of side S (28, 32, 64 or 128) gives maps of side S / 2^J (7 or 8), 1 + 8 J + 64 J (J - 1) / 2 of them for
    each channel: the means, and the moduli of one wavelet, and of two of growing scale, in 8 directions. The wavelets of
    larger scales are the smallest one on the image at half the side, and half again. Small groups of maps are brought to
    mean 0 and variance 1 (Wu and He 2018, "Group normalization"), and the whole to norm 1 or less.
    """

    def __init__(self, image_size: int, channels: int) -> None:
        """Raises KeyError for another image size; the discriminator's builder has looked."""
        super().__init__()
        self.scales, self._group = _SHAPES[image_size]
        pairs = self.scales * (self.scales - 1) // 2
        self.maps = channels * (1 + _ORIENTATIONS * self.scales + _ORIENTATIONS**2 * pairs)
        self.num_features = self.maps * (image_size // 2**self.scales) ** 2

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) float32 of L2 norm at most 1, of images (B, C, S, S) in [-1, 1].

        A part of the images at a time: what is between them and their features takes some 120 times the images' memory.
        """
        parts = images.split(max(1, _PIXELS // images.shape[-1] ** 2))
        return torch.cat([self._features(part) for part in parts])

    def _features(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            # Each channel by itself, (B C, 1, side, side), and what is known of it at the scale reached.
            level = (images.float().flatten(0, 1)[:, None] + 1) / 2
            first = second = level[:, :0]
            for _ in range(self.scales):
                moduli, of_first = _moduli(level), _moduli(first)
                level = _halved(level)
                second = _halved(torch.cat([second, of_first], dim=1))
                first = _halved(torch.cat([first, moduli], dim=1))
            maps = torch.cat([level, first, second], dim=1)
            maps = maps.unflatten(0, images.shape[:2]).flatten(1, 2)
            normal = functional.group_norm(maps, self.maps // self._group)
        return normal.flatten(1) / math.sqrt(self.num_features)


def _moduli(maps: Tensor) -> Tensor:
    """(N, M, s, s) to (N, 8 M, s, s): of each map the moduli of its responses to the 8 wavelets."""
    side = maps.shape[-1]
    padded = functional.pad(maps.flatten(0, 1)[:, None], (_RADIUS,) * 4, mode="reflect")
    real, imaginary = functional.conv2d(padded, _morlets(maps.device)).chunk(2, dim=1)
    # Without the constant the gradient at 0, the background of a digit, would not be finite.
    modulus = (real.square() + imaginary.square() + 1e-8).sqrt()
    return modulus.reshape(len(maps), _ORIENTATIONS * maps.shape[1], side, side)


def _halved(maps: Tensor) -> Tensor:
    """(N, M, s, s) to (N, M, s / 2, s / 2), blurred."""
    number, side = maps.shape[:2], maps.shape[-1]
    padded = functional.pad(maps.flatten(0, 1)[:, None], (2,) * 4, mode="reflect")
    return functional.conv2d(padded, _blur(maps.device), stride=2).reshape(*number, side // 2, side // 2)


@lru_cache
def _blur(device: torch.device) -> Tensor:
    binomial = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    return torch.outer(binomial, binomial)[None, None].to(device)


@lru_cache
def _morlets(device: torch.device) -> Tensor:
    """Real, then imaginary parts of the 8 wavelets: (16, 1, 7, 7). Each sums to 0: a flat image has no response."""
    places = torch.arange(-_RADIUS, _RADIUS + 1, dtype=torch.float64)
    down, right = torch.meshgrid(places, places, indexing="ij")
    wavelets = []
    for index in range(_ORIENTATIONS):
        angle = index * math.pi / _ORIENTATIONS
        along = right * math.cos(angle) + down * math.sin(angle)
        across = down * math.cos(angle) - right * math.sin(angle)
        window = torch.exp(-(along.square() + (_SLANT * across).square()) / (2 * _WIDTH**2))
        wave = torch.polar(window, _FREQUENCY * along)
        wave -= window * (wave.sum() / window.sum())
        wavelets.append(wave * _SLANT / (2 * math.pi * _WIDTH**2))
    bank = torch.stack(wavelets)
    return torch.cat([bank.real, bank.imag])[:, None].float().to(device)
