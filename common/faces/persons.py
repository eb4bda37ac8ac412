"""Who is drawn, and how: the measures of procedural persons and of their pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SKIN = np.array([[242, 210, 188], [232, 190, 160], [218, 166, 128], [180, 124, 86], [134, 86, 58], [88, 56, 40]]) / 255
HAIR = {
    "black": (26, 22, 24),
    "dark brown": (54, 36, 28),
    "brown": (100, 66, 42),
    "auburn": (136, 62, 30),
    "blond": (206, 168, 104),
    "grey": (168, 166, 166),
}
EYES = np.array([[60, 36, 22], [92, 60, 30], [78, 104, 62], [62, 104, 148], [104, 118, 128]]) / 255
STYLES = ("bald", "crop", "parted", "fringe", "long", "curls", "receding", "bun")
BEARDS = ("none", "stubble", "moustache", "goatee", "full")


@dataclass(frozen=True)
class Person:
    """What stays the same on all pictures of one person. Lengths: half the image's side is 1; colours: RGB (3,) in [0, 1]."""

    width: float
    chin: float
    jaw: float
    squareness: float
    skin: np.ndarray
    eye_distance: float
    eye_width: float
    eye_height: float
    eye_level: float
    eye_tilt: float
    iris: np.ndarray
    brow_gap: float
    brow_thickness: float
    brow_arch: float
    brow_slope: float
    nose_width: float
    nose_length: float
    mouth_level: float
    mouth_width: float
    upper_lip: float
    lower_lip: float
    lip_red: float
    ear: float
    cheek: float
    age: float
    lashes: float
    hair: np.ndarray
    style: str
    hairline: float
    volume: float
    parting: float
    strands: float
    beard: str
    glasses: bool
    frame: np.ndarray


@dataclass(frozen=True)
class Pictures:
    """What changes from picture to picture. Each field has one row a picture: (B, 1, 1), colours (B, 3). Angles in radians."""

    yaw: np.ndarray
    pitch: np.ndarray
    roll: np.ndarray
    scale: np.ndarray
    shift_x: np.ndarray
    shift_y: np.ndarray
    smile: np.ndarray
    mouth_open: np.ndarray
    brow_raise: np.ndarray
    lids: np.ndarray
    gaze: np.ndarray
    light_x: np.ndarray
    light_y: np.ndarray
    ambient: np.ndarray
    exposure: np.ndarray
    glasses: np.ndarray
    clothes: np.ndarray
    backdrop: np.ndarray
    backdrop_end: np.ndarray
    backdrop_angle: np.ndarray


def make_person(rng: np.random.Generator) -> Person:
    """Somebody. A few latent traits keep the measures plausible together; nobody is meant by them."""
    bony, age, tone = rng.random(), rng.beta(1.2, 2.0), rng.random()
    skin = np.array([np.interp(tone * 5, range(6), SKIN[:, channel]) for channel in range(3)])
    skin = np.clip(skin * (1 + rng.normal(0, 0.025, 3)), 0, 1)
    dark = tone > 0.52
    weights = np.array([0.6, 0.3, 0.04, 0.0, 0.01, 0.05]) if dark else np.array([0.2, 0.22, 0.22, 0.12, 0.2, 0.04])
    weights[-1] += max(0.0, age - 0.5) * 1.6
    colour = list(HAIR)[rng.choice(6, p=weights / weights.sum())]
    styles = np.array([0.06, 0.2, 0.2, 0.12, 0.12, 0.12, 0.1, 0.06])
    styles *= (
        np.array([2.0, 1.7, 1.4, 0.5, 0.3, 1.0, 2.0, 0.2])
        if bony > 0.5
        else np.array([0.1, 0.6, 0.7, 1.8, 2.4, 1.2, 0.0, 2.0])
    )
    beards = np.array([0.45, 0.17, 0.11, 0.1, 0.17]) if bony > 0.5 else np.array([1.0, 0, 0, 0, 0])
    return Person(
        width=rng.uniform(0.475, 0.59),
        chin=rng.uniform(0.7, 0.82),
        jaw=rng.uniform(0.06, 0.3) - 0.08 * bony,
        squareness=rng.uniform(2.0, 2.5) + 0.35 * bony,
        skin=skin,
        eye_distance=rng.uniform(0.195, 0.265),
        eye_width=rng.uniform(0.096, 0.136),
        eye_height=rng.uniform(0.038, 0.068) - 0.008 * bony,
        eye_level=rng.uniform(-0.04, 0.04),
        eye_tilt=rng.uniform(-0.14, 0.3),
        iris=EYES[0 if dark else rng.integers(5)] * rng.uniform(0.8, 1.2),
        brow_gap=rng.uniform(0.115, 0.175) - 0.03 * bony,
        brow_thickness=rng.uniform(0.014, 0.026) + 0.018 * bony,
        brow_arch=rng.uniform(0.0, 0.05),
        brow_slope=rng.uniform(-0.15, 0.1),
        nose_width=rng.uniform(0.075, 0.15),
        nose_length=rng.uniform(0.25, 0.35),
        mouth_level=rng.uniform(0.43, 0.51),
        mouth_width=rng.uniform(0.15, 0.245),
        upper_lip=rng.uniform(0.018, 0.055),
        lower_lip=rng.uniform(0.03, 0.07),
        lip_red=rng.uniform(0.15, 0.45) + 0.4 * (bony < 0.5) * rng.random(),
        ear=rng.uniform(0.8, 1.3),
        cheek=rng.uniform(0.0, 1.0),
        age=age,
        lashes=rng.uniform(0.4, 1.0) * (1.0 if bony < 0.5 else 0.6),
        hair=np.clip(np.array(HAIR[colour]) / 255 * rng.uniform(0.8, 1.2), 0, 1),
        style=STYLES[rng.choice(len(STYLES), p=styles / styles.sum())],
        hairline=rng.uniform(-0.52, -0.38),
        volume=rng.uniform(0.8, 1.3),
        parting=float(rng.choice([-1.0, 1.0])) * rng.uniform(0.4, 1.0),
        strands=rng.uniform(0, 2 * np.pi),
        beard=BEARDS[rng.choice(len(BEARDS), p=beards)],
        glasses=bool(rng.random() < 0.22),
        frame=np.array([[0.08, 0.08, 0.09], [0.35, 0.2, 0.1], [0.45, 0.45, 0.48], [0.5, 0.1, 0.12]])[rng.integers(4)],
    )


def make_pictures(person: Person, rngs: Sequence[np.random.Generator]) -> Pictures:
    """One picture from each generator."""

    def each(draw_one: str, *limits: float) -> np.ndarray:
        return np.array([getattr(rng, draw_one)(*limits) for rng in rngs], dtype=np.float32).reshape(-1, 1, 1)

    smile = each("beta", 1.2, 1.6) * 1.2 - 0.15
    backdrops = np.stack(
        [
            rng.uniform(0.12, 0.92)
            + rng.normal(0, 0.05, (1, 3))
            + rng.normal(0, 0.03, (2, 3))
            + rng.normal(0, 0.08, (2, 1))
            for rng in rngs
        ]
    )
    return Pictures(
        yaw=np.clip(each("normal", 0.0, 0.26), -0.6, 0.6),
        pitch=np.clip(each("normal", 0.0, 0.1), -0.25, 0.25),
        roll=np.clip(each("normal", 0.0, 0.06), -0.18, 0.18),
        scale=each("uniform", 1.0, 1.13),
        shift_x=np.clip(each("normal", 0.0, 0.03), -0.08, 0.08),
        shift_y=np.clip(each("normal", 0.0, 0.025), -0.07, 0.07),
        smile=smile,
        mouth_open=np.maximum(each("normal", -0.15, 0.35) + 0.35 * np.maximum(smile - 0.35, 0), 0),
        brow_raise=each("normal", 0.0, 0.013),
        lids=np.clip(each("normal", 1.0, 0.13), 0.6, 1.25),
        gaze=np.clip(each("normal", 0.0, 0.3), -0.7, 0.7),
        light_x=each("uniform", -0.85, 0.85),
        light_y=each("uniform", -0.75, 0.1),
        ambient=each("uniform", 0.4, 0.62),
        exposure=each("uniform", 0.86, 1.12),
        glasses=each("uniform", 0.0, 1.0) < (0.93 if person.glasses else 0.03),
        clothes=np.clip(np.stack([rng.uniform(0.1, 0.8) + rng.normal(0, 0.13, 3) for rng in rngs]), 0.05, 0.9),
        backdrop=np.clip(backdrops[:, 0], 0.03, 0.97),
        backdrop_end=np.clip(backdrops[:, 1], 0.03, 0.97),
        backdrop_angle=each("uniform", 0.0, 2 * np.pi),
    )
