"""The features of procedural faces, each a layer over the canvas. Levels and widths are those of the face seen straight on."""

import numpy as np

from common.faces.canvas import Canvas, ellipse, falling, smooth_max
from common.faces.persons import Person, Pictures


def draw_mouth(canvas: Canvas, person: Person, pictures: Pictures) -> None:
    """Lips, and teeth where it is open; a smile lifts the corners."""
    smile, opened = pictures.smile, pictures.mouth_open
    width = person.mouth_width * (1 + 0.22 * np.maximum(smile, 0) - 0.08 * opened)
    e = np.clip(np.abs(canvas.u) / width, 0, 1.4)
    level = person.mouth_level + 0.02 * opened - smile * 0.12 * (e * e - 0.3)
    down = canvas.v - level
    arc = 1 - e * e
    gap = 0.11 * opened * arc
    bow = 1 - 0.3 * np.exp(-((canvas.u / 0.035) ** 2))
    top = -0.3 * gap - person.upper_lip * arc * bow
    bottom = 0.7 * gap + person.lower_lip * arc
    ends = np.abs(canvas.u) - width
    lips = np.maximum(np.maximum(top - down, down - bottom), ends)
    red = person.skin * np.array([0.86, 0.56, 0.56]) * person.lip_red + person.skin * np.array([0.86, 0.74, 0.72]) * (
        1 - person.lip_red
    )
    canvas.paint(canvas.mask(lips), red, canvas.lit * (0.92 + 0.12 * (down > 0)))
    inner = np.maximum(np.maximum(-0.3 * gap - down, down - 0.7 * gap), ends)
    canvas.paint(canvas.mask(inner) * np.minimum(opened * 6, 1), np.array([0.22, 0.08, 0.08]))
    teeth = np.maximum(inner, down + 0.3 * gap - 0.055)
    canvas.paint(
        canvas.mask(teeth) * np.minimum(opened * 5, 1) * 0.95, np.array([0.93, 0.91, 0.87]), 0.35 + 0.6 * canvas.lit
    )
    seam = np.maximum(np.abs(down) - 0.009, ends)
    canvas.shade(0.55 * canvas.mask(seam, 1.3) * np.maximum(1 - opened * 5, 0), (0.8, 1, 1))
    below = ellipse(canvas.u, canvas.v, 0, person.mouth_level + person.lower_lip + 0.05 + 0.08 * opened, 0.1, 0.018)
    canvas.shade(0.16 * canvas.mask(below, 4))


def draw_nose(canvas: Canvas, person: Person, pictures: Pictures) -> None:
    """Nostrils, wings and the shadow beneath; its shape comes from the bumps."""
    u, v = nose_u(canvas, person, pictures), canvas.v
    m, tip = np.abs(u), person.eye_level + person.nose_length
    nostrils = ellipse(m, v, 0.5 * person.nose_width, tip + 0.02, 0.3 * person.nose_width, 0.018)
    canvas.shade(0.55 * canvas.mask(nostrils, 1.5), (0.85, 1, 1))
    wings = np.abs(ellipse(m, v, 0.62 * person.nose_width, tip - 0.005, 0.42 * person.nose_width, 0.05)) - 0.004
    canvas.shade(0.3 * canvas.mask(wings, 2) * (m > 0.8 * person.nose_width))
    under = ellipse(u, v, 0, tip + 0.045, 0.9 * person.nose_width, 0.022)
    canvas.shade(0.2 * canvas.mask(under, 4))
    bridge = np.exp(-(((m - 0.06) / 0.03) ** 2)) * (v > person.eye_level - 0.12) * falling(v, tip - 0.06, 0.1)
    canvas.shade(0.13 * bridge * np.clip((v - person.eye_level + 0.12) / 0.1, 0, 1))
    shine = np.exp(-(((u + 0.012) / 0.022) ** 2) - ((v - tip + 0.045) / 0.03) ** 2)
    canvas.paint(0.22 * shine, np.ones(3))


def nose_u(canvas: Canvas, person: Person, pictures: Pictures) -> np.ndarray:
    """The nose stands out, so it moves further than the face when the head turns."""
    out = np.clip((canvas.v - person.eye_level) / person.nose_length, 0, 1.1)
    moved: np.ndarray = canvas.u - 0.16 * out * np.sin(pictures.yaw)
    return moved


def draw_beard(canvas: Canvas, person: Person, pictures: Pictures, head: np.ndarray) -> None:
    """Hair around the mouth and along the jaw."""
    if person.beard == "none":
        return
    m, v, lip = np.abs(canvas.u), canvas.v, person.mouth_level
    above = np.maximum(np.abs(v - lip + 0.085) - 0.032 - 0.01 * (m < 0.1), m - person.mouth_width * 1.1)
    chin = np.maximum(lip + 0.1 + 0.05 * pictures.mouth_open - v, m - 0.15)
    ring = np.maximum(np.maximum(np.abs(m - person.mouth_width * 1.12) - 0.035, lip - 0.1 - v), v - lip - 0.14)
    # Along the jaw, from the ears down; free of the mouth and of the cheeks above.
    jaw = lip + 0.09 - 0.55 * np.clip(m - 0.16, 0, 1) ** 0.8 - v
    parts = {
        "moustache": [above],
        "goatee": [above, chin, ring],
        "stubble": [above, jaw, ring],
        "full": [above, jaw, ring],
    }[person.beard]
    area = np.minimum.reduce(parts)
    opacity = 0.28 if person.beard == "stubble" else 0.85
    keep = ellipse(canvas.u, v, 0, lip + 0.01 + 0.04 * pictures.mouth_open, person.mouth_width * 1.05, 0.075)
    alpha = canvas.mask(area, 5) * (1 - canvas.mask(keep, 3)) * canvas.mask(head - 0.012) * opacity
    canvas.paint(alpha, person.hair * 0.9, strands(canvas, person) * (0.45 + 0.5 * canvas.lit))


def draw_eyes(canvas: Canvas, person: Person, pictures: Pictures) -> None:
    """Lids, whites, irises, lashes. Both at once: the face is symmetric but for the gaze."""
    m, side = np.abs(canvas.u), np.sign(canvas.u)
    across = m - person.eye_distance
    down = canvas.v - person.eye_level + person.eye_tilt * across
    e = across / person.eye_width
    arc = np.maximum(1 - e * e, -0.6)
    squint = pictures.lids * (1 - 0.22 * np.maximum(pictures.smile, 0))
    upper, lower = -person.eye_height * squint * arc, 0.72 * person.eye_height * (0.6 + 0.4 * squint) * arc
    crease = np.abs(down - 1.75 * upper - 0.012 * (arc < 0)) - 0.004
    canvas.shade(0.3 * canvas.mask(crease, 2) * (np.abs(e) < 1.05))
    lid = np.maximum(1.7 * upper - down, down)
    canvas.shade(0.1 * canvas.mask(lid, 2))
    opening = np.maximum(np.maximum(upper - down, down - lower), np.abs(across) - person.eye_width)
    white = canvas.mask(opening)
    canvas.paint(white, np.array([0.95, 0.94, 0.93]), 0.3 + 0.62 * canvas.lit)
    radius = 0.47 * person.eye_width + 0.012
    du = across - side * (0.35 * person.eye_width * pictures.gaze)
    dv = down + 0.004
    distance = np.sqrt(du * du + dv * dv)
    canvas.paint(white * canvas.mask(distance - radius), person.iris * 0.9, 0.6 + 0.4 * canvas.lit)
    canvas.paint(white * canvas.mask(distance - 0.52 * radius), np.full(3, 0.03))
    glint_u, glint_v = du - side * 0.3 * radius * np.sign(pictures.light_x), dv + 0.4 * radius
    canvas.paint(white * canvas.mask(np.hypot(glint_u, glint_v) - 0.2 * radius) * 0.85, np.ones(3))
    canvas.shade(0.3 * white * np.clip(1 - (down - upper) / 0.035, 0, 1))
    lash = np.maximum(np.abs(down - upper) - (0.007 + 0.008 * person.lashes), np.abs(across) - 1.06 * person.eye_width)
    canvas.shade((0.5 + 0.4 * person.lashes) * canvas.mask(lash), (0.9, 1, 1))
    rim = np.maximum(np.abs(down - lower) - 0.003, np.abs(across) - person.eye_width)
    canvas.shade(0.3 * canvas.mask(rim, 1.4))


def draw_brows(canvas: Canvas, person: Person, pictures: Pictures) -> None:
    """Tapering arcs, darker than the hair."""
    across = np.abs(canvas.u) - person.eye_distance - 0.012
    e = across / (1.3 * person.eye_width)
    level = person.eye_level - person.brow_gap - pictures.brow_raise - person.brow_arch * (1 - e * e)
    thickness = person.brow_thickness * (1 - 0.3 * e)
    brow = np.maximum(
        np.abs(canvas.v - level - person.brow_slope * across) - thickness, np.abs(across) - 1.3 * person.eye_width
    )
    canvas.paint(canvas.mask(brow, 1.6) * 0.85, 0.75 * person.hair + 0.1 * person.skin, 0.5 + 0.5 * canvas.lit)


def draw_hair(canvas: Canvas, person: Person) -> None:
    """The hair in front: the head's outline made larger, above the hairline."""
    if person.style == "bald":
        return
    u, v, x, y, style = canvas.u, canvas.v, canvas.x, canvas.y, person.style
    m = np.abs(u) / person.width
    line: np.ndarray | float = person.hairline
    grow: np.ndarray | float = 0.05 * person.volume
    side = 0.42
    if style == "parted":
        way = np.clip(person.parting * u / person.width, -1, 1)
        line = line - 0.12 * way + 0.12 * falling(way, 0.1, 0.35)
        grow = 0.07 * person.volume
    elif style == "fringe":
        line, side, grow = line + 0.2 + 0.02 * np.sin(28 * u + person.strands), 0.9, 0.09 * person.volume
    elif style == "long":
        line, side, grow = (
            line - 0.12 + 0.3 * np.abs(u - 0.1 * person.parting) / person.width,
            1.1,
            0.07 * person.volume,
        )
    elif style == "curls":
        wave = curl(canvas, person)
        line, side, grow = line + wave, 0.5, 0.06 + wave
    elif style == "receding":
        line, side, grow = line - 0.1 - 0.1 * np.exp(-(((m - 0.5) / 0.2) ** 2)), 0.6, 0.02
    elif style == "bun":
        line, side, grow = line - 0.06, 0.5, 0.02
    line = line + side * m**4
    upper = np.sqrt((x / (person.width + grow)) ** 2 + ((np.minimum(y, 0.06) - 0.06) / (0.76 + 1.2 * grow)) ** 2)
    cap = np.maximum((upper - 1) * person.width, v - line)
    low = 0.8 if style == "long" else 0.52 if style == "fringe" else 0.1
    cap = smooth_max(cap, y - low, 0.14) if style == "fringe" else np.maximum(cap, y - low)
    shadow = canvas.mask(cap - 0.05, 6) * (y < 0.5)
    canvas.shade(0.22 * shadow * (upper < 0.97))
    sheen = 0.55 + 0.5 * canvas.lit + 0.25 * np.exp(-(((y + 0.52) / 0.12) ** 2))
    canvas.paint(canvas.mask(cap, 1.6), person.hair, sheen * strands(canvas, person))


def strands(canvas: Canvas, person: Person) -> np.ndarray:
    """Light and dark along the hair, (B, S, S) about 1."""
    u, v, phase = canvas.x, canvas.y, person.strands
    if person.style == "curls":
        curls: np.ndarray = 1 + 0.16 * np.sin(24 * u + 5 * np.sin(14 * v + phase)) * np.sin(26 * v + 4 * np.sin(13 * u))
        return curls
    way = np.arctan2(u - 0.12 * person.parting, 0.3 - np.minimum(v, 0)) * 9 + 0.6 * np.sin(5 * v + phase)
    waves = (
        np.sin(2.3 * way + phase) + 0.8 * np.sin(5.3 * way + 2 * phase) + 0.7 * np.sin(3.7 * way - 3 * phase + 4 * v)
    )
    lines: np.ndarray = 1 + 0.06 * waves
    return lines


def curl(canvas: Canvas, person: Person) -> np.ndarray:
    """How far curls stand out, around the head."""
    angle = np.arctan2(canvas.x, -canvas.y)
    reach: np.ndarray = 0.02 * np.sin(17 * angle + person.strands) + 0.014 * np.sin(29 * angle)
    return reach


def draw_glasses(canvas: Canvas, person: Person, pictures: Pictures, head: np.ndarray) -> None:
    """Rims, bridge and temples, on the pictures that have them."""
    m, v = np.abs(canvas.u - 0.05 * np.sin(pictures.yaw)), canvas.v
    ru, rv = person.eye_width + 0.045, person.eye_width + 0.015
    du, dv = np.abs(m - person.eye_distance) / ru, np.abs(v - person.eye_level - 0.015) / rv
    lens = ((du**3 + dv**3) ** (1 / 3) - 1) * rv
    rim = np.abs(lens) - 0.013
    bridge = np.maximum(np.abs(v - person.eye_level + 0.02) - 0.011, m - person.eye_distance + ru)
    temple = np.maximum(np.abs(v - person.eye_level + 0.02) - 0.012, person.eye_distance + ru - m)
    temple = np.maximum(temple, np.abs(canvas.x) - person.width)
    frame = np.maximum(np.minimum(np.minimum(rim, bridge), temple), head - 0.03)
    lens = np.maximum(lens, head)
    canvas.paint(canvas.mask(lens) * 0.1 * pictures.glasses, np.ones(3))
    canvas.paint(canvas.mask(frame) * 0.92 * pictures.glasses, person.frame)
