"""How a procedural face is drawn: layers from back to front, each a smooth mask, over a shaded ellipsoid.

The head is an ellipsoid with a narrowing jaw. Each pixel on it is turned back by the pose to the place it has on the face seen
straight on; there the features lie, symmetric but for hair and gaze. So eyes and mouth move and shrink as on a head that turns. Small
bumps (nose, sockets, cheeks, lips, chin) tilt the surface, and one lamp shades it (Lambert). Numpy only; twice the resolution,
then the mean of each 2 x 2. Coordinates: x right, y down, the image is [-1, 1] x [-1, 1].
"""

import numpy as np

from common.faces.canvas import Canvas, ellipse, falling, smooth_max
from common.faces.features import (
    curl,
    draw_beard,
    draw_brows,
    draw_eyes,
    draw_glasses,
    draw_hair,
    draw_mouth,
    draw_nose,
    nose_u,
    strands,
)
from common.faces.persons import Person, Pictures

SUPERSAMPLING = 2
TOP = -0.7


def draw(person: Person, pictures: Pictures, image_size: int, crop: float) -> np.ndarray:
    """The pictures as float32 (B, 3, H, H) in [0, 1]."""
    canvas, head = _set_up(person, pictures, image_size, crop)
    _backdrop(canvas, pictures)
    _behind(canvas, person, pictures, head)
    background = canvas.rgb.copy()
    _skin(canvas, person, pictures, head)
    draw_mouth(canvas, person, pictures)
    draw_nose(canvas, person, pictures)
    draw_beard(canvas, person, pictures, head)
    draw_eyes(canvas, person, pictures)
    draw_brows(canvas, person, pictures)
    # On a turned head features near the rim must not hang over it.
    canvas.rgb = background + canvas.mask(head) * (canvas.rgb - background)
    draw_hair(canvas, person)
    _near_ear(canvas, person, pictures)
    if pictures.glasses.any():
        draw_glasses(canvas, person, pictures, head)
    rgb = np.clip(canvas.rgb * pictures.exposure, 0, 1)
    rgb = rgb.reshape(3, len(pictures.yaw), image_size, SUPERSAMPLING, image_size, SUPERSAMPLING).mean((3, 5))
    return np.ascontiguousarray(rgb.transpose(1, 0, 2, 3))


def _set_up(person: Person, pictures: Pictures, image_size: int, crop: float) -> tuple[Canvas, np.ndarray]:
    """The canvas, and the distance of each pixel from the head's outline (negative inside)."""
    side = image_size * SUPERSAMPLING
    line = ((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1) * np.float32(crop)
    across, down = line[None, None, :] - pictures.shift_x, line[None, :, None] - pictures.shift_y
    cos, sin = np.cos(pictures.roll) / pictures.scale, np.sin(pictures.roll) / pictures.scale
    x, y = cos * across + sin * down, cos * down - sin * across

    # The jaw: below the eyes the half-width shrinks towards the chin.
    low = np.clip((y - 0.05) / (person.chin - 0.05), 0, 1)
    half_width = person.width * (1 - person.jaw * low * low * (3 - 2 * low))
    middle = 0.5 * (person.chin + TOP)
    half_height = 0.5 * (person.chin - TOP)
    s, t = x / half_width, (y - middle) / half_height
    power = np.float32(person.squareness)
    radius = (np.abs(s) ** power + np.abs(t) ** power) ** (1 / power)
    head = (radius - 1) * person.width

    z = np.sqrt(np.maximum(1 - s * s - t * t, 0.0))
    # Hair stands beyond the rim of the head; it takes the place on the face of the rim next to it.
    rim = 1 / np.maximum(1, np.sqrt(s * s + t * t))
    s, t = s * rim, t * rim
    across = s * np.cos(pictures.yaw) - z * np.sin(pictures.yaw)
    behind = s * np.sin(pictures.yaw) + z * np.cos(pictures.yaw) < 0
    # Past the ears |u| goes on growing, so that the nape is not taken for the temple.
    u = np.where(behind, np.sign(across) * (2 - np.abs(across)), across) * half_width
    v = (t * np.cos(pictures.pitch) - z * np.sin(pictures.pitch)) * half_height + middle
    canvas = Canvas(np.empty((3, *x.shape), np.float32), x, y, s, t, u, v, 3.0 * crop / side, z)
    bumps = _bumps(canvas, person, pictures)
    step = 2 * crop / side
    tilt_y, tilt_x = np.gradient(bumps, step, axis=(1, 2))
    nx, ny = 0.8 * s - tilt_x, 0.7 * t - tilt_y
    facing = (nx * pictures.light_x + ny * pictures.light_y + z + 0.25) / np.sqrt(nx * nx + ny * ny + (z + 0.25) ** 2)
    strength = np.sqrt(1 + pictures.light_x**2 + pictures.light_y**2)
    canvas.lit = pictures.ambient + (1.12 - pictures.ambient) * np.maximum(facing, 0) / strength * 1.15
    return canvas, head


def _bumps(canvas: Canvas, person: Person, pictures: Pictures) -> np.ndarray:
    """Height of the features above the ellipsoid (B, S, S)."""
    u, v, m = nose_u(canvas, person, pictures), canvas.v, np.abs(canvas.u)
    tip = person.eye_level + person.nose_length
    along = np.clip((v - person.eye_level + 0.08) / (person.nose_length + 0.08), 0, 1)
    ridge = np.exp(-((u / (0.035 + 0.03 * along)) ** 2)) * along * falling(v, tip + 0.02, 0.05)
    wings = np.exp(-(((m - 0.75 * person.nose_width) / 0.04) ** 2) - ((v - tip + 0.01) / 0.04) ** 2)
    sockets = np.exp(-(((m - person.eye_distance) / 0.13) ** 2) - ((v - person.eye_level + 0.04) / 0.085) ** 2)
    cheeks = np.exp(-(((m - 0.3) / 0.14) ** 2) - ((v - 0.22) / 0.15) ** 2)
    chin = np.exp(-((canvas.u / 0.13) ** 2) - ((v - person.chin + 0.12) / 0.09) ** 2)
    smile = np.maximum(pictures.smile, 0)
    height: np.ndarray = 0.115 * ridge + 0.03 * wings - 0.035 * sockets + (0.025 + 0.02 * smile) * cheeks + 0.025 * chin
    return height


def _backdrop(canvas: Canvas, pictures: Pictures) -> None:
    way = np.cos(pictures.backdrop_angle) * canvas.x + np.sin(pictures.backdrop_angle) * canvas.y
    way = np.clip(0.5 + 0.5 * way, 0, 1)
    for channel in range(3):
        first, last = (c[:, channel, None, None] for c in (pictures.backdrop, pictures.backdrop_end))
        canvas.rgb[channel] = first + (last - first) * way


def _behind(canvas: Canvas, person: Person, pictures: Pictures, head: np.ndarray) -> None:
    """What the head hides: long hair, neck, clothes, ears."""
    x, y, m = canvas.x, canvas.y, np.abs(canvas.x)
    side_light = 0.55 + 0.45 * np.clip(canvas.lit, 0, 1.2)
    if person.style in ("long", "fringe"):
        length = 1.3 if person.style == "long" else 0.52
        width = person.width * (1.13 + 0.1 * person.volume) + 0.05 * np.clip(y, 0, 1)
        fall = (np.sqrt((m / width) ** 2 + (np.minimum(y, 0) / 0.78) ** 2) - 1) * width
        fall = smooth_max(fall, y - length + 0.5 * (m - 0.4) ** 2, 0.12)
        canvas.paint(canvas.mask(fall, 2), person.hair * 0.75, strands(canvas, person))
    if person.style == "curls":
        radius = np.sqrt((x / (person.width + 0.15 * person.volume)) ** 2 + ((y + 0.16) / 0.74) ** 2)
        ring = (radius - 1) * person.width + curl(canvas, person)
        canvas.paint(canvas.mask(ring, 1.6), person.hair * 0.85, strands(canvas, person))
    if person.style == "bun":
        canvas.paint(canvas.mask(ellipse(x, y, 0, -0.8, 0.2, 0.15)), person.hair * 0.85, strands(canvas, person))
    neck = np.maximum(m - 0.58 * person.width - 0.8 * np.clip(y - person.chin, 0, 1) ** 2, 0.3 - y)
    under = 0.5 + 0.32 * np.clip((y - person.chin) / 0.3, 0, 1)
    canvas.paint(canvas.mask(neck), person.skin, under * side_light)
    shoulders = person.chin + 0.07 + 0.35 * np.clip(m - 0.25, 0, 1) ** 1.6 + 0.12 * np.exp(-((m / 0.2) ** 2))
    cloth = pictures.clothes.T[:, :, None, None]
    canvas.paint(canvas.mask(shoulders - y), cloth, 0.75 + 0.25 * np.clip(canvas.lit, 0, 1.2))
    _ear(canvas, person, m - person.width, 1.0)
    canvas.shade(0.35 * np.exp(-((np.maximum(head, 0) / 0.06) ** 2)) * (y > 0.2))


def _ear(canvas: Canvas, person: Person, across: np.ndarray, opacity: np.ndarray | float) -> None:
    ear = ellipse(across, canvas.y, 0, person.eye_level + 0.1, 0.07 * person.ear, 0.135 * person.ear)
    light = 0.5 + 0.45 * np.clip(canvas.lit, 0, 1.2)
    canvas.paint(canvas.mask(ear) * opacity, person.skin * np.array([0.94, 0.84, 0.82]), light)
    canvas.shade(0.3 * canvas.mask(ear + 0.035, 1.5) * opacity)


def _near_ear(canvas: Canvas, person: Person, pictures: Pictures) -> None:
    """On a turned head the nearer ear lies over head and hair."""
    if person.style in ("long", "fringe"):
        return
    turn = np.sin(pictures.yaw)
    place = -np.sign(turn) * person.width * (np.cos(pictures.yaw) + 0.02)
    _ear(canvas, person, canvas.x - place, np.clip(6 * np.abs(turn) - 0.5, 0, 1))


def _skin(canvas: Canvas, person: Person, pictures: Pictures, head: np.ndarray) -> None:
    canvas.paint(canvas.mask(head - 2 * canvas.edge), person.skin, canvas.lit)
    m, v = np.abs(canvas.u), canvas.v
    inside = canvas.mask(head)
    blush = np.exp(-(((m - 0.29) / 0.12) ** 2) - ((v - 0.22) / 0.11) ** 2) * person.cheek
    canvas.shade(0.16 * blush * inside, (0.1, 1, 0.8))
    canvas.shade(0.25 * np.exp(-((head / 0.05) ** 2)) * inside)
    # Folds from nose to mouth, and shadows under the eyes: deeper with age and with a smile.
    fold = np.abs(m - 0.13 - 0.28 * (v - 0.27)) - 0.006
    depth = (0.28 * person.age + 0.14 * np.maximum(pictures.smile, 0)) * ((v > 0.24) & (v < person.mouth_level))
    canvas.shade(depth * canvas.mask(fold, 3))
    bags = ellipse(m, v, person.eye_distance, person.eye_level + 0.085, 0.1, 0.02)
    canvas.shade((0.06 + 0.16 * person.age) * canvas.mask(bags, 4))
    if person.age > 0.5:
        lines = np.abs((v + 0.36 + 0.1 * m * m) % 0.075 - 0.035) - 0.004
        canvas.shade(0.35 * (person.age - 0.4) * canvas.mask(lines, 2) * ((v > -0.4) & (v < -0.24) & (m < 0.26)))
