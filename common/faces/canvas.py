"""The picture of procedural faces while it is drawn, and the smooth shapes it is drawn with."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Canvas:
    """The picture so far and where its pixels are.

    rgb: (3, B, S, S) in [0, 1]. x, y: on the upright head, before turning. s, t: the same in head radii. u, v: on the face seen
    straight on. edge: width of a soft edge. lit: light on the surface (B, S, S), about 1. All float32.
    """

    rgb: np.ndarray
    x: np.ndarray
    y: np.ndarray
    s: np.ndarray
    t: np.ndarray
    u: np.ndarray
    v: np.ndarray
    edge: float
    lit: np.ndarray

    def mask(self, distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
        """1 where the distance is negative, 0 where it is positive, soft between."""
        return np.clip(0.5 - distance / (self.edge * softness), 0, 1)

    def paint(self, alpha: np.ndarray, colour: np.ndarray, light: np.ndarray | float = 1.0) -> None:
        """Lay a colour (3,) or (3, B, 1, 1), times the light, over the picture."""
        colour = colour.astype(np.float32)  # a float64 here would make all that follows float64
        for channel in range(3):
            layer = self.rgb[channel]
            layer += alpha * (colour[channel] * light - layer)

    def shade(self, amount: np.ndarray, tint: tuple[float, float, float] = (1, 1, 1)) -> None:
        """Darken by amount in [0, 1]; the tint says how much each of red, green and blue take part."""
        for channel in range(3):
            self.rgb[channel] *= 1 - amount * tint[channel]


def ellipse(x: np.ndarray, y: np.ndarray, cx: float, cy: np.ndarray | float, rx: float, ry: float) -> np.ndarray:
    """About the distance from an ellipse's outline, negative inside."""
    dx, dy = (x - cx) / rx, (y - cy) / ry
    distance: np.ndarray = (np.sqrt(dx * dx + dy * dy) - 1) * min(rx, ry)
    return distance


def smooth_max(a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    """The larger, with the corner rounded."""
    blend = np.clip(radius - np.abs(a - b), 0, None)
    result: np.ndarray = np.maximum(a, b) + blend * blend / (4 * radius)
    return result


def falling(value: np.ndarray, end: float, width: float) -> np.ndarray:
    """1 below end - width, 0 above end, smooth between."""
    way = np.clip((end - value) / width, 0, 1)
    smooth: np.ndarray = way * way * (3 - 2 * way)
    return smooth
