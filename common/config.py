"""What a run is: small frozen dataclasses, each parsed once from flat keys.

Every field of the dataclasses below is one option. Its name with dashes is the key in a recipe (TOML), in Flower's run
config and on the command line: `num_rounds` is `num-rounds` and `--num-rounds`. A key that no field has is refused with
the nearest name.

Everything here is **public**: it travels in clear and must not be derived from what any client holds.
"""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self, get_type_hints

from common.errors import ConfigError
from common.privacy.units import PrivacyModel, PrivacyUnit

Scalar = bool | int | float | str


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _between(config: object, names: Iterable[str], low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse a field outside [low, high] (or (low, high]), and anything that is not finite."""
    for name in names:
        value = getattr(config, name)
        inside = math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
        bracket = "(" if open_low else "["
        _require(inside, f"{name.replace('_', '-')} = {value} is outside {bracket}{low:g}, {high:g}]")


def _one_of(config: object, name: str, choices: Iterable[Any]) -> None:
    value, listed = getattr(config, name), list(choices)
    _require(value in listed, f"{name.replace('_', '-')} = {value!r}: choose one of {', '.join(map(str, listed))}")


@dataclass(frozen=True)
class ModelConfig:
    """The networks. The client builds its discriminator from these by name; no code travels."""

    image_size: int = _option(32, "side of the square images in pixels: 28, 32 or 64")
    channels: int = _option(3, "1 for grey, 3 for colour")
    num_classes: int = _option(0, "number of labels to condition on; 0: unconditional")
    generator: str = _option("dcgan", "generator architecture")
    generator_width: int = _option(32, "channels of the generator's last hidden layer")
    latent_dim: int = _option(64, "dimension of the generator's latent vector")
    discriminator: str = _option("dcgan", "discriminator architecture: dcgan or mlp")
    discriminator_width: int = _option(32, "channels of the discriminator's first layer")
    loss: str = _option("bce", "adversarial loss: bce or hinge")

    def __post_init__(self) -> None:
        _one_of(self, "image_size", (28, 32, 64))
        _one_of(self, "channels", (1, 3))
        _one_of(self, "generator", ("dcgan",))
        _one_of(self, "discriminator", ("dcgan", "mlp"))
        _one_of(self, "loss", ("bce", "hinge"))
        _between(self, ["num_classes"], 0, 1000)
        _require(self.num_classes != 1, "num-classes = 1: one class is no condition; use 0, or 2 and more")
        _between(self, ["generator_width", "discriminator_width", "latent_dim"], 1, 1024)


@dataclass(frozen=True)
class PrivacyConfig:
    """What is promised, to whom, and the declared constants it rests on.

    `sample_rate`, `expected_batch` and `images_per_person` are declared, never measured: whoever knows a client's true
    counts must not be able to read them off these.
    """

    privacy_model: PrivacyModel = _option(
        PrivacyModel.CENTRAL, "who adds the noise: local (each client), central (the coordinator), none (NO PRIVACY)"
    )
    unit: PrivacyUnit = _option(PrivacyUnit.PERSON, "who is protected: person (all photographs of one) or image")
    epsilon: float = _option(10.0, "privacy budget of the whole run; the noise is calibrated to it")
    delta: float = _option(1e-5, "delta of the (epsilon, delta) guarantee")
    noise_multiplier: float = _option(0.0, "noise of a discriminator step over max-grad-norm; 0: from epsilon")
    max_grad_norm: float = _option(1.0, "clipping norm C of one unit's gradient")
    sample_rate: float = _option(0.1, "probability q with which each unit enters a step (Poisson sampling)")
    expected_batch: float = _option(8.0, "declared units in a client's step, the normaliser: about q times its units")
    images_per_person: int = _option(4, "photographs drawn of each sampled person")

    def __post_init__(self) -> None:
        _one_of(self, "privacy_model", PrivacyModel)
        _one_of(self, "unit", PrivacyUnit)
        _between(self, ["epsilon"], 0, 1e9, open_low=True)
        _between(self, ["delta"], 0, 0.5, open_low=True)
        _between(self, ["noise_multiplier"], 0, 1e3)
        # Below, the squares of gradients would vanish in float32, and with them the clipping.
        _between(self, ["max_grad_norm"], 1e-3, 1e6)
        _between(self, ["sample_rate"], 0, 1, open_low=True)
        _between(self, ["expected_batch"], 0, 1e9, open_low=True)
        _between(self, ["images_per_person"], 1, 1000)

    @property
    def declared_units(self) -> float:
        """Units that one client is declared to hold: expected_batch / sample_rate."""
        return self.expected_batch / self.sample_rate


@dataclass(frozen=True)
class MomentConfig:
    """The moment stage: one noised release of mean random features, to which the generator is fitted first."""

    moment_rounds: int = _option(1, "1: begin with the moment stage; 0: leave it out")
    moment_noise_multiplier: float = _option(3.73, "noise of the moment release over the norm bound 1 of one unit")
    moment_steps: int = _option(400, "generator steps of the moment stage")
    moment_batch: int = _option(500, "fakes in a generator step of the moment stage")
    moment_lr: float = _option(2e-3, "Adam learning rate of the moment stage")
    moment_weight: float = _option(1.0, "gradient norm of the kept moment term over the adversarial one")
    feature_seed: int = _option(0, "public seed of the random features")

    def __post_init__(self) -> None:
        _one_of(self, "moment_rounds", (0, 1))
        _between(self, ["moment_noise_multiplier"], 0, 1e3, open_low=True)
        _between(self, ["moment_steps"], 0, 10**7)
        _between(self, ["moment_batch"], 2, 10**5)
        _between(self, ["moment_lr"], 0, 1, open_low=True)
        _between(self, ["moment_weight"], 0, 1e6)
        _between(self, ["feature_seed"], 0, 2**31)


@dataclass(frozen=True)
class TrainingConfig:
    """The adversarial rounds and the coordinator."""

    num_rounds: int = _option(300, "adversarial rounds; 0: the moment stage alone")
    local_steps: int = _option(1, "discriminator steps of a client in a round (more than 1: local model only)")
    local_lr: float = _option(0.05, "SGD learning rate of the steps within a round")
    discriminator_steps: int = _option(1, "rounds for one generator step; where adaptive, to begin with")
    adaptive: bool = _option(False, "raise discriminator-steps while the discriminator is poor on fakes")
    discriminator_lr: float = _option(5e-4, "Adam learning rate of the discriminator")
    generator_lr: float = _option(2e-4, "Adam learning rate of the generator in the adversarial rounds")
    adam_beta1: float = _option(0.0, "Adam's beta1 of both networks in the adversarial rounds")
    generator_batch: int = _option(64, "fakes in a generator step")
    fake_batch: int = _option(64, "fakes in a discriminator step")
    ema_decay: float = _option(0.999, "decay of the generator's moving average")
    seed: int = _option(0, "seed of the coordinator's initial weights and latents; never of privacy noise")
    min_clients: int = _option(2, "clients a round needs")
    round_timeout_s: float = _option(600.0, "seconds the coordinator waits for a round's updates")
    sample_every: int = _option(50, "rounds between two pictures")
    checkpoint_every: int = _option(1, "rounds between checkpoints (more than 1: non-private runs only)")

    def __post_init__(self) -> None:
        _between(self, ["num_rounds"], 0, 10**7)
        _between(self, ["local_steps", "discriminator_steps", "min_clients", "checkpoint_every"], 1, 10**4)
        _between(self, ["sample_every"], 1, 10**7)
        _between(self, ["generator_batch"], 2, 10**5)
        _between(self, ["fake_batch"], 1, 10**5)
        _between(self, ["local_lr", "discriminator_lr", "generator_lr"], 0, 10, open_low=True)
        _between(self, ["round_timeout_s"], 0, 10**6, open_low=True)
        _between(self, ["adam_beta1", "ema_decay"], 0, 0.99999)
        _between(self, ["seed"], 0, 2**31)


@dataclass(frozen=True)
class SimulationConfig:
    """Where simulated clients get their faces. Real clients ignore all of it: their owners name data and budget."""

    data: str = _option("procedural:persons=200,images=5", "folder, .npz file or procedural:persons=N,images=M")
    num_clients: int = _option(10, "simulated clients")
    partitioner: str = _option("person", "how faces are dealt out: person (none is split) or iid (by image)")
    crop: float = _option(1.0, "share of the shorter side that the centre crop keeps")

    def __post_init__(self) -> None:
        _one_of(self, "partitioner", ("iid", "person"))
        _between(self, ["num_clients"], 1, 10**5)
        _between(self, ["crop"], 0.05, 1.0)


@dataclass(frozen=True)
class RunConfig:
    """The whole of a run. Build it with `from_flat`; read it as `config.training.num_rounds`."""

    model: ModelConfig = ModelConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    moments: MomentConfig = MomentConfig()
    training: TrainingConfig = TrainingConfig()
    simulation: SimulationConfig = SimulationConfig()

    def __post_init__(self) -> None:
        private = self.privacy.privacy_model is not PrivacyModel.NONE
        _require(
            not private or self.privacy.unit is not PrivacyUnit.PERSON or self.simulation.partitioner != "iid",
            "partitioner = iid with unit person: a person would be at several clients, and each would spend the whole epsilon on "
            "them; use partitioner person, or unit image",
        )
        _require(
            self.training.local_steps == 1 or self.privacy.privacy_model is not PrivacyModel.CENTRAL,
            f"local-steps = {self.training.local_steps} under privacy-model central: a client's weights after several steps "
            "hide more than one clipped gradient a unit; use local-steps 1, or privacy-model local",
        )
        _require(
            not private or self.training.checkpoint_every == 1,
            f"checkpoint-every = {self.training.checkpoint_every} in a private run: a coordinator that repeats a round would "
            "draw its noise twice; use 1",
        )
        _require(
            self.moments.moment_rounds + self.training.num_rounds > 0,
            "moment-rounds = 0 and num-rounds = 0: nothing would be trained; set one of them",
        )
        # Labels go round in turn from 0: a smaller batch would leave classes out, and a moment takes two fakes a class.
        batches = {"moment-batch": self.moments.moment_batch} if self.moments.moment_rounds else {}
        if self.training.num_rounds:
            batches["generator-batch"] = self.training.generator_batch
        for key, batch in batches.items():
            _require(
                batch >= 2 * self.model.num_classes,
                f"{key} = {batch} is too few for num-classes = {self.model.num_classes}: use {2 * self.model.num_classes} or more",
            )

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar]) -> Self:
        """Parse flat keys (`num-rounds`).

        Raises ConfigError on an unknown key, a wrong type or a value out of range.
        """
        for key in flat:
            if key not in flat_fields():
                near = difflib.get_close_matches(key, flat_fields(), n=1)
                raise ConfigError(f"unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        sections = {}
        for section, section_type in get_type_hints(cls).items():
            hints = get_type_hints(section_type)
            sections[section] = section_type(
                **{name: convert(key, flat[key], hints[name]) for name, key in _keys(section_type) if key in flat}
            )
        return cls(**sections)

    def to_flat(self) -> dict[str, Scalar]:
        """The inverse of `from_flat`, with every key."""
        flat: dict[str, Scalar] = {}
        for section, section_type in get_type_hints(type(self)).items():
            values = getattr(self, section)
            flat |= {key: _plain(getattr(values, name)) for name, key in _keys(section_type)}
        return flat


@cache
def flat_fields() -> dict[str, tuple[type, Scalar, str]]:
    """Every option: flat key -> (type, default, help text), in the order of the sections above."""
    fields: dict[str, tuple[type, Scalar, str]] = {}
    for section_type in get_type_hints(RunConfig).values():
        hints = get_type_hints(section_type)
        for f in dataclasses.fields(section_type):
            fields[f.name.replace("_", "-")] = (hints[f.name], _plain(f.default), f.metadata["help"])
    return fields


def load_toml(path: Path) -> dict[str, Scalar]:
    """Read a flat TOML file. Raises ConfigError where it is missing, damaged or nested."""
    try:
        flat = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    for key, value in flat.items():
        _require(isinstance(value, bool | int | float | str), f"{path}: {key!r} must be a single value, not {value!r}")
    return flat


def _keys(section_type: type) -> list[tuple[str, str]]:
    return [(f.name, f.name.replace("_", "-")) for f in dataclasses.fields(section_type)]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, PrivacyModel | PrivacyUnit) else value


def convert(key: str, value: Scalar, target: type) -> Any:
    """Convert without guessing: an int may stand for a float; nothing else changes its type. Raises ConfigError."""
    if target is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if issubclass(target, PrivacyModel | PrivacyUnit):
        try:
            return target(str(value))
        except ValueError:
            raise ConfigError(f"{key} = {value!r}: choose one of {', '.join(target)}") from None
    _require(type(value) is target, f"{key} = {value!r} must be a {target.__name__}")
    return value
