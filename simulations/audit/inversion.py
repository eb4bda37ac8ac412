"""Inversion by a malicious coordinator: it sends weights of its own making to shipped clients, and looks for faces in
what comes back (`common.evaluation.inversion`).

The coordinator names the network, its size and its classes, so the attacks do not depend on what the run trains: the
imprint asks for `mlp`, gradient inversion for `dcgan`, without classes, as an owner's policy allows unless told
otherwise. Every person has one photograph and is drawn for certain, which is the worst case. The faces are drawn ones;
the attacker knows others of the same kind.

Three noises: none (the clipped, clear sums of `central`, which is what a coordinator gets there), the run's own, added
by the client as under `local`, and the least with which the run's whole budget allows one round of everybody. Several such
rounds within that budget, each with more noise, tell no more of a photograph together than that one.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.config import RunConfig
from common.errors import ProtocolError
from common.evaluation.inversion import (
    BACK_DB,
    FacePrior,
    brightness_thresholds,
    count_back,
    crafted_start,
    imprint_scale,
    imprint_weights,
    invert_gradients,
    psnr_table,
    read_imprint,
    without_one,
)
from common.faces import FaceDataset, load_faces
from common.models.discriminators import MLPDiscriminator, build_discriminator
from common.models.flat import set_flat
from common.privacy.accounting import calibrate_noise_multiplier
from common.privacy.units import PrivacyModel
from common.sections import FaceSource, ModelConfig
from simulations.audit.wire import Wire, gradient_round

# An imprint takes one row for each share of the faces; an owner's default policy allows 10 million parameters.
_MOST_WIDTH, _MOST_FIRST_WEIGHTS = 64, 9_000_000
# Narrower networks give back less, wider ones take longer.
_INVERTED_WIDTH = 32
# Above, gradient inversion takes minutes an image; the coordinator asks for small grey ones.
_LARGEST_INVERTED, _SMALL = 32, (28, 1)
_PUBLIC_FACES, _FIRST_PUBLIC, _FIRST_VICTIM = 512, 2_000_000, 1_000_000
# Shares of the claimed noise that an attacker supposes in turn, besides none: a client may add less than it says.
_SUSPECTED = (1.0, 0.1, 0.01)
# A secure sum holds at least as much noise as one client adds under local, and the vectors of others besides.
_NOISED = (PrivacyModel.LOCAL, PrivacyModel.DISTRIBUTED)
# Declared where the coordinator is to add the noise: the client does not.
_UNUSED_NOISE = 1.0


@dataclass(frozen=True)
class AttackOutcome:
    """One attack. back_*: how many of the images came back, without noise, with the run's, and with the least that the whole
    budget allows for one round; None where the run has no such noise.

    network: what the coordinator asked for. median_clear_db: over the images, the PSNR in decibels of what is nearest without
    noise.
    """

    attack: str
    network: str
    images: int
    back_clear: int
    back_noised: int | None
    back_budget: int | None
    median_clear_db: float


@dataclass(frozen=True)
class InversionAudit:
    """All attacks. average_back: how many images the average of other faces reaches threshold_db of, and nearest_back
    how many the most alike of other faces do: both must be 0, or the threshold means nothing.

    coordinator_sees: `noised` under local and, of sums, distributed, else `clear`. noise_multiplier: the run's, None without
    gradient rounds;
    budget_noise_multiplier: see the module; both None in a run without privacy. controls_hold: every attack brings back half
    the images or more without noise. passed: the controls hold, the threshold means something, and with noise nothing came back.
    """

    privacy_model: str
    coordinator_sees: str
    max_grad_norm: float
    noise_multiplier: float | None
    budget_noise_multiplier: float | None
    threshold_db: float
    average_back: int
    nearest_back: int
    attacks: tuple[AttackOutcome, ...]
    controls_hold: bool
    passed: bool
    seconds: float


@dataclass(frozen=True)
class Attack:
    """What a coordinator asks, of whom, and how it reads the answers.

    config: of the round; its network. shares: each client's faces. victims: all of them, (N, C, H, W) in [-1, 1]. read: from
    the clients' vectors and the noise multiplier on them to images (M, C, H, W); where each client has one person, these begin with
    one for each.
    """

    name: str
    config: RunConfig
    weights: np.ndarray
    shares: Sequence[FaceDataset]
    victims: Tensor
    read: Callable[[Sequence[np.ndarray], float], Tensor]

    def answers(self, folder: Path, noise_multiplier: float | None) -> list[np.ndarray]:
        """What clients send under `local` with this noise, or under `central`, in clear, with None. Raises ProtocolError."""
        privacy = dataclasses.replace(
            self.config.privacy,
            privacy_model=PrivacyModel.CENTRAL if noise_multiplier is None else PrivacyModel.LOCAL,
            noise_multiplier=_UNUSED_NOISE if noise_multiplier is None else noise_multiplier,
        )
        config = dataclasses.replace(self.config, privacy=privacy)
        answers = Wire(folder, config, self.shares).ask(gradient_round(config, self.weights, 1))
        vectors = [answer for answer in answers if isinstance(answer, np.ndarray)]
        if len(vectors) < len(answers):
            kinds = sorted({answer for answer in answers if isinstance(answer, str)})
            raise ProtocolError(f"{len(answers) - len(vectors)} of {len(answers)} clients refused: {', '.join(kinds)}")
        return vectors


def audit_inversion(config: RunConfig, *, images: int = 64, inverted: int = 16) -> InversionAudit:
    """Every attack, without noise, with the run's, and with the whole budget's in one round.

    config: of a run, its noise calibrated. images: persons under the imprints; inverted: under gradient inversion, which
    takes most of the time. A minute at most on two cores. Raises ProtocolError where a client refuses.
    """
    began, privacy = time.monotonic(), config.privacy
    own = budget = None
    if privacy.privacy_model is not PrivacyModel.NONE:
        own = privacy.noise_multiplier or None
        budget = calibrate_noise_multiplier(privacy.epsilon, privacy.delta, 1.0, 1)
    public = public_faces(config.model)
    attacks = attacks_on(config, images, inverted, public)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = tuple(_outcome(attack, Path(folder) / attack.name, own, budget) for attack in attacks)
    victims = attacks[0].victims
    average = count_back(psnr_table(victims, public.mean(0, keepdim=True).expand(len(victims), -1, -1, -1)))
    controls = all(2 * outcome.back_clear >= outcome.images for outcome in outcomes)
    nearest = count_back(psnr_table(victims, public))
    noised = [back for outcome in outcomes for back in (outcome.back_noised, outcome.back_budget) if back is not None]
    return InversionAudit(
        privacy_model=str(privacy.privacy_model),
        coordinator_sees="noised" if privacy.privacy_model in _NOISED else "clear",
        max_grad_norm=privacy.max_grad_norm,
        noise_multiplier=own,
        budget_noise_multiplier=budget,
        threshold_db=BACK_DB,
        average_back=average,
        nearest_back=nearest,
        attacks=outcomes,
        controls_hold=controls,
        passed=controls and average == nearest == 0 and bool(noised) and not any(noised),
        seconds=round(time.monotonic() - began, 1),
    )


def attacks_on(config: RunConfig, images: int, inverted: int, public: Tensor) -> list[Attack]:
    """The imprint on all persons at once, on each alone, and gradient inversion of each alone. public: of `public_faces`."""
    size, channels = config.model.image_size, config.model.channels
    if size > _LARGEST_INVERTED:
        size, channels = _SMALL
    small = dataclasses.replace(config.model, image_size=size, channels=channels)
    return [
        imprint(config, images, public),
        imprint_alone(config, images, public),
        gradient_inversion(config, small, inverted),
    ]


def imprint(config: RunConfig, images: int, public: Tensor) -> Attack:
    """One client of many persons: all in one update."""
    inputs = config.model.channels * config.model.image_size**2
    width = min(_MOST_WIDTH, _MOST_FIRST_WEIGHTS // (16 * inputs))
    return _imprint("imprint", config, victim_faces(config.model, images), public, width)


def imprint_alone(config: RunConfig, images: int, public: Tensor) -> Attack:
    """Clients of one person each: the whole of an update is one photograph."""
    return _imprint("imprint-alone", config, victim_faces(config.model, images), public, 1, rows=1)


def gradient_inversion(config: RunConfig, shape_of: ModelConfig, images: int) -> Attack:
    """Clients of one person each, of images in the size of `shape_of`, and convolutions instead of a dense layer."""
    asked = _asked(config, shape_of, "dcgan", _INVERTED_WIDTH)
    network, faces = _network(asked.model), victim_faces(asked.model, images)
    weights = crafted_start(network, seed=0)
    shape = (asked.model.channels, asked.model.image_size, asked.model.image_size)

    def read(vectors: Sequence[np.ndarray], _noise_multiplier: float) -> Tensor:
        set_flat(network, weights)
        return invert_gradients(network, torch.from_numpy(np.stack(vectors)), shape, seed=0)

    return Attack("gradient-inversion", asked, weights, _one_each(faces), faces.tensor(np.arange(images)), read)


def public_faces(model: ModelConfig) -> Tensor:
    """Faces of other persons, which the attacker has: (P, C, H, W) in [-1, 1]."""
    return _drawn(model, _FIRST_PUBLIC, _PUBLIC_FACES).tensor(np.arange(_PUBLIC_FACES))


def victim_faces(model: ModelConfig, images: int) -> FaceDataset:
    """One photograph of each of so many persons."""
    return _drawn(model, _FIRST_VICTIM, images)


def _imprint(
    name: str, config: RunConfig, faces: FaceDataset, public: Tensor, width: int, rows: int | None = None
) -> Attack:
    asked, rows = _asked(config, config.model, "mlp", width), rows or 16 * width
    network = _network(asked.model)
    if not isinstance(network, MLPDiscriminator):
        raise TypeError("the imprint is for mlp")
    weights = imprint_weights(network, brightness_thresholds(public, rows))
    prior, shape = FacePrior(public), tuple(public.shape[1:])
    length, noise = (scale * asked.privacy.max_grad_norm for scale in imprint_scale(rows))

    def read(vectors: Sequence[np.ndarray], noise_multiplier: float) -> Tensor:
        seen = torch.cat([read_imprint(network, vector, rows) / length[:, None] for vector in vectors])
        spread = noise_multiplier * (noise / length).repeat(len(vectors))
        likely = [prior.estimate(seen, share * spread) for share in _SUSPECTED] if noise_multiplier else []
        return torch.cat([without_one(each, shape) for each in [*likely, seen]])

    shares = [faces] if rows > 1 else _one_each(faces)
    return Attack(name, asked, weights, shares, faces.tensor(np.arange(len(faces))), read)


def _outcome(attack: Attack, folder: Path, own: float | None, budget: float | None) -> AttackOutcome:
    def back(noise_multiplier: float) -> int:
        answers = attack.answers(folder / f"{noise_multiplier:g}", noise_multiplier)
        return count_back(psnr_table(attack.victims, attack.read(answers, noise_multiplier)))

    clear = psnr_table(attack.victims, attack.read(attack.answers(folder / "clear", None), 0.0))
    best = clear.max(1).values
    model = attack.config.model
    return AttackOutcome(
        attack=attack.name,
        network=f"{model.discriminator}, width {model.discriminator_width}, {model.channels} x {model.image_size} x "
        f"{model.image_size}",
        images=len(attack.victims),
        back_clear=count_back(clear),
        back_noised=None if own is None else back(own),
        back_budget=None if budget is None else back(budget),
        median_clear_db=round(float(best.median()), 1),
    )


def _asked(config: RunConfig, shape_of: ModelConfig, discriminator: str, width: int) -> RunConfig:
    """What the attacker asks for: its own network, no classes, everybody drawn; the run's clipping norm."""
    model = ModelConfig(
        image_size=shape_of.image_size,
        channels=shape_of.channels,
        discriminator=discriminator,
        discriminator_width=width,
    )
    moments = dataclasses.replace(config.moments, moment_rounds=0)
    return RunConfig(model=model, privacy=dataclasses.replace(config.privacy, sample_rate=1.0), moments=moments)


def _network(model: ModelConfig) -> torch.nn.Module:
    return build_discriminator(
        model.discriminator,
        image_size=model.image_size,
        channels=model.channels,
        num_classes=0,
        width=model.discriminator_width,
    )


def _one_each(faces: FaceDataset) -> list[FaceDataset]:
    return [faces.subset(np.array([place])) for place in range(len(faces))]


def _drawn(model: ModelConfig, first: int, persons: int) -> FaceDataset:
    source = FaceSource(data=f"procedural:persons={persons},images=1,first={first}")
    return load_faces(source, model.image_size, model.channels)
