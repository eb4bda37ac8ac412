"""What a run is: its sections in one, parsed from flat keys.

Every field of `common.sections` is one option. Its name with dashes is the key in a recipe (TOML), in Flower's run
config and on the command line: `num_rounds` is `num-rounds` and `--num-rounds`. A key that no field has is refused with
the nearest name.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Self, get_type_hints

from common.errors import ConfigError
from common.fields import Scalar, convert, key_of, keys_of, listed, plain, require
from common.privacy.units import PrivacyModel, PrivacyUnit
from common.sections import (
    AugmentationConfig,
    ModelConfig,
    MomentConfig,
    PrivacyConfig,
    SimulationConfig,
    TrainingConfig,
)

# Adam as the GAN literature sets it: Radford et al. 2016 ("DCGAN"), and half as fast.
PRESETS: dict[str, dict[str, Scalar]] = {
    "classic-adam": {"discriminator-lr": 2e-4, "generator-lr": 2e-4, "adam-beta1": 0.5},
    "slow-adam": {"discriminator-lr": 1e-4, "generator-lr": 1e-4, "adam-beta1": 0.5},
}


@dataclass(frozen=True)
class RunConfig:
    """The whole of a run. Build it with `from_flat`; read it as `config.training.num_rounds`."""

    model: ModelConfig = ModelConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    moments: MomentConfig = MomentConfig()
    training: TrainingConfig = TrainingConfig()
    simulation: SimulationConfig = SimulationConfig()

    def __post_init__(self) -> None:
        private = self.privacy.privacy_model is not PrivacyModel.NONE
        require(
            not private or self.privacy.unit is not PrivacyUnit.PERSON or self.simulation.partitioner != "iid",
            "partitioner = iid with unit person: a person would be at several clients, and each would spend the whole epsilon on "
            "them; use partitioner person, or unit image",
        )
        require(
            self.training.local_steps == 1 or self.privacy.privacy_model in (PrivacyModel.LOCAL, PrivacyModel.NONE),
            f"local-steps = {self.training.local_steps} under privacy-model {self.privacy.privacy_model}: a client's weights after "
            "several steps hide more than one clipped gradient a unit; use local-steps 1, or privacy-model local",
        )
        self._check_aggregation()
        require(
            not private or self.training.checkpoint_every == 1,
            f"checkpoint-every = {self.training.checkpoint_every} in a private run: a coordinator that repeats a round would "
            "draw its noise twice; use 1",
        )
        require(
            self.moments.moment_rounds + self.training.num_rounds + self.training.public_steps > 0,
            "moment-rounds = 0 and num-rounds = 0: nothing would be trained; set one of them, or public and public-steps",
        )
        require(
            bool(self.training.public) == (self.training.public_steps > 0),
            f"public = {self.training.public!r} and public-steps = {self.training.public_steps}: give faces and how many steps "
            "to take on them, or neither",
        )
        self._check_classifier()
        values = listed(self.simulation.label_values)
        require(
            not values or len(values) == self.model.num_classes,
            f"num-classes = {self.model.num_classes} and {len(values)} label-values: set num-classes to {len(values)}",
        )
        # Labels go round in turn from 0: a smaller batch would leave classes out, and a moment takes two fakes a class.
        fits = self.moments.moment_rounds or self.training.public_steps
        batches = {"moment-batch": self.moments.moment_batch} if fits else {}
        if self.training.num_rounds:
            batches["generator-batch"] = self.training.generator_batch
        for key, batch in batches.items():
            require(
                batch >= 2 * self.model.num_classes,
                f"{key} = {batch} is too few for num-classes = {self.model.num_classes}: use {2 * self.model.num_classes} or more",
            )

    def _check_classifier(self) -> None:
        classifies, condition = self.model.loss == "cross-entropy", self.training.stop_condition
        require(
            not (classifies and self.training.adaptive),
            "adaptive under loss = cross-entropy: the discriminator sees no fakes to be poor on; leave adaptive out",
        )
        require(
            not classifies or condition is None or condition.figure != "fake-accuracy",
            f"stop-when = {self.training.stop_when!r} under loss = cross-entropy: there is no fake-accuracy; name another figure",
        )

    def _check_aggregation(self) -> None:
        model, training = self.privacy.privacy_model, self.training
        why = {
            PrivacyModel.DISTRIBUTED: "under a secure sum nobody sees a single update",
            PrivacyModel.CENTRAL: "the noise is for a sum, which one unit moves by max-grad-norm at most",
        }.get(model)
        require(
            training.aggregator == "mean" or why is None,
            f"aggregator = {training.aggregator} under privacy-model {model}: {why}; use mean, or privacy-model local",
        )
        require(
            training.cohort_size == 0 or model is not PrivacyModel.DISTRIBUTED,
            f"cohort-size = {training.cohort_size} under privacy-model {model}: a secure sum is of all its peers; use 0",
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
                **{name: convert(key, flat[key], hints[name]) for name, key in keys_of(section_type) if key in flat}
            )
        return cls(**sections)

    def to_flat(self) -> dict[str, Scalar]:
        """The inverse of `from_flat`, with every key."""
        flat: dict[str, Scalar] = {}
        for section, section_type in get_type_hints(type(self)).items():
            values = getattr(self, section)
            flat |= {key: plain(getattr(values, name)) for name, key in keys_of(section_type)}
        return flat


@cache
def flat_fields() -> dict[str, tuple[type, Scalar, str]]:
    """Every option: flat key -> (type, default, help text), in the order of the sections above."""
    fields: dict[str, tuple[type, Scalar, str]] = {}
    for section_type in get_type_hints(RunConfig).values():
        hints = get_type_hints(section_type)
        for f in dataclasses.fields(section_type):
            fields[key_of(f.name)] = (hints[f.name], plain(f.default), f.metadata["help"])
    return fields


def expand_preset(flat: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """`flat` with its key `preset` replaced by what that stands for; keys given beside it win. Raises ConfigError."""
    rest = {key: value for key, value in flat.items() if key != "preset"}
    if len(rest) == len(flat):
        return rest
    if flat["preset"] not in PRESETS:
        raise ConfigError(f"preset = {flat['preset']!r}: choose one of {', '.join(PRESETS)}")
    return {**PRESETS[str(flat["preset"])], **rest}
