"""Pictures of glyphs and of scenes that nobody photographed, in classes: what the feature network learns beside drawn faces.

A glyph class is one to three strokes, each a quadratic Bezier curve, as a letter of an alphabet of its own; a scene class is
a few shapes over a gradient. Every picture of a class draws them anew, shifted, turned, scaled and coloured. All follows from
a seed. Images are float32 (N, 3, 32, 32) in [-1, 1].
"""

import math

import torch
from torch import Tensor

SIDE = 32
_CHUNK = 500
_STROKES, _POINTS = 3, 28
_SHAPES = 5


def glyphs(classes: int, pictures: int, generator: torch.Generator) -> Tensor:
    """(classes * pictures, 3, 32, 32), class after class."""
    strokes = torch.rand(classes, _STROKES, 3, 2, generator=generator) * 1.5 - 0.75
    present = torch.arange(_STROKES) < torch.randint(1, _STROKES + 1, (classes, 1), generator=generator)
    strokes, present = (each.repeat_interleave(pictures, 0) for each in (strokes, present))
    count = len(strokes)
    strokes = strokes + 0.06 * torch.randn(strokes.shape, generator=generator)
    strokes = strokes @ _affine(count, generator)[:, None] + _uniform(count, -0.12, 0.12, generator, 2)[:, None, None]
    t = torch.linspace(0, 1, _POINTS)[:, None]
    weights = torch.cat([(1 - t) ** 2, 2 * t * (1 - t), t**2], 1)
    points = torch.einsum("pk,nskd->nspd", weights, strokes)
    points = torch.where(present[:, :, None, None], points, torch.tensor(9.0)).flatten(1, 2)
    width = _uniform(count, 0.05, 0.13, generator)
    ink = torch.cat([_ink(p, w) for p, w in zip(points.split(_CHUNK), width.split(_CHUNK), strict=True)])
    # Half are white on black, as scanned digits are; the others have colours.
    plain = (torch.rand(count, generator=generator) < 0.5)[:, None, None, None]
    paper = torch.where(plain, torch.zeros(1), _gradient(count, generator))
    colour = torch.where(plain, torch.ones(1), _uniform(count, 0, 1, generator, 3)[:, :, None, None])
    return (paper + ink[:, None] * (colour - paper)) * 2 - 1


def scenes(classes: int, pictures: int, generator: torch.Generator) -> Tensor:
    """(classes * pictures, 3, 32, 32), class after class."""
    centre = torch.rand(classes, _SHAPES, 2, generator=generator) * 1.4 - 0.7
    radius = 0.12 + 0.5 * torch.rand(classes, _SHAPES, 2, generator=generator) ** 2
    angle = math.pi * torch.rand(classes, _SHAPES, generator=generator)
    power = 1.2 + 6 * torch.rand(classes, _SHAPES, generator=generator) ** 2
    wave = 25 * torch.rand(classes, _SHAPES, generator=generator) ** 2
    colour = torch.rand(classes, _SHAPES, 3, generator=generator)
    centre, radius, angle, power, wave, colour = (
        each.repeat_interleave(pictures, 0) for each in (centre, radius, angle, power, wave, colour)
    )
    count = len(centre)
    centre = centre + 0.06 * torch.randn(centre.shape, generator=generator)
    centre = centre @ _affine(count, generator) + _uniform(count, -0.12, 0.12, generator, 2)[:, None]
    angle = angle + 0.15 * torch.randn(angle.shape, generator=generator)
    radius = radius * _uniform(count, 0.85, 1.15, generator, 2)[:, None]
    colour = (colour + 0.05 * torch.randn(colour.shape, generator=generator)).clamp(0, 1)
    pixels = _gradient(count, generator)
    grid = _grid()
    for shape in range(_SHAPES):
        away = grid - centre[:, shape, None, None]
        cos, sin = (f(angle[:, shape])[:, None, None] for f in (torch.cos, torch.sin))
        u = (cos * away[..., 0] + sin * away[..., 1]) / radius[:, shape, 0, None, None]
        v = (cos * away[..., 1] - sin * away[..., 0]) / radius[:, shape, 1, None, None]
        p = power[:, shape, None, None]
        distance = (u.abs() ** p + v.abs() ** p + 1e-6) ** (1 / p)
        mask = torch.sigmoid((1 - distance) * 12)[:, None]
        light = 1 + 0.3 * torch.sin(wave[:, shape, None, None] * u)[:, None] - 0.3 * v.clamp(-1, 1)[:, None]
        pixels = pixels + mask * ((colour[:, shape, :, None, None] * light).clamp(0, 1) - pixels)
    return pixels * 2 - 1


def _grid() -> Tensor:
    """Coordinates (32, 32, 2) of the pixels, x and y in [-1, 1]."""
    line = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)


def _ink(points: Tensor, width: Tensor) -> Tensor:
    """How much ink each pixel has, (B, 32, 32) in [0, 1], of strokes through points (B, P, 2)."""
    distance = torch.cdist(_grid().reshape(1, -1, 2), points).amin(-1).unflatten(1, (SIDE, SIDE))
    return torch.sigmoid((width[:, None, None] - distance) * 35)


def _gradient(count: int, generator: torch.Generator) -> Tensor:
    """Backgrounds (count, 3, 32, 32) in [0, 1]."""
    first, last = (_uniform(count, 0, 1, generator, 3)[:, :, None, None] for _ in range(2))
    angle = _uniform(count, 0, 2 * math.pi, generator)[:, None, None]
    x, y = _grid().unbind(-1)
    way = (0.5 + 0.5 * (torch.cos(angle) * x + torch.sin(angle) * y)).clamp(0, 1)[:, None]
    return first + (last - first) * way


def _affine(count: int, generator: torch.Generator) -> Tensor:
    """Small turns, stretches and shears (count, 2, 2)."""
    angle, shear = (_uniform(count, -0.25, 0.25, generator) for _ in range(2))
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    slant = torch.eye(2).repeat(count, 1, 1)
    slant[:, 1, 0] = shear
    return (turn @ slant) * _uniform(count, 0.75, 1.05, generator, 2)[:, None]


def _uniform(count: int, low: float, high: float, generator: torch.Generator, width: int = 0) -> Tensor:
    """(count,), or (count, width) where a width is given."""
    shape = (count, width) if width else (count,)
    return low + (high - low) * torch.rand(shape, generator=generator)
