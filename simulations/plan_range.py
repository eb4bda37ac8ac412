"""Whether the 32 bits of a secure sum hold what a plan adds up: the very lattices of its run."""

import dataclasses

from common.errors import ConfigError
from common.messages import Stage
from common.models.discriminators import discriminator_size
from common.privacy.units import PrivacyModel
from common.secure_messages import lattice_for
from simulations.plan_question import Question
from simulations.plan_sizes import feature_dimension, feature_rows


def check_range(question: Question, noise: float, rounds: int) -> None:
    """Raise ConfigError where these clients have no distributed run, or a sum would pass its range.

    noise: the noise multiplier of so many adversarial rounds.
    """
    config, cohort = question.config, question.cohort
    if cohort is None:
        raise ConfigError(question.no_cohort)
    privacy = dataclasses.replace(
        config.privacy, privacy_model=PrivacyModel.DISTRIBUTED, peers=cohort.peers, survivors=cohort.survivors
    )
    if config.moments.moment_rounds:
        features = feature_rows(config.model) * feature_dimension(config.model)
        lattice_for(privacy, Stage.MOMENTS, config.moments.moment_noise_multiplier, features)
    if rounds:
        lattice_for(privacy, Stage.GRADIENTS, noise, discriminator_size(config.model))
