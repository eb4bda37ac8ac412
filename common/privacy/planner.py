"""From a budget to a noise: what a run's schedule costs."""

import dataclasses
import math

from common.config import RunConfig
from common.errors import ConfigError
from common.messages import planned_releases
from common.privacy.accounting import Release, calibrate_noise_multiplier, epsilon_of
from common.privacy.masks import MAX_DEALT
from common.privacy.units import PrivacyModel

# Of epsilon, what the moment release costs by itself: less, and the features drown; more, and the rounds do.
_MOMENT_SHARE = 0.5


def planned_steps(config: RunConfig) -> int:
    """Discriminator steps of a whole run."""
    return config.training.num_rounds * config.training.local_steps


def run_releases(config: RunConfig) -> list[Release]:
    """The releases of a whole run at one client; none without a privacy model."""
    if config.privacy.privacy_model is PrivacyModel.NONE:
        return []
    moments = config.moments
    return planned_releases(
        config.privacy, moments.moment_rounds, moments.moment_noise_multiplier, planned_steps(config)
    )


def with_cohort(config: RunConfig) -> RunConfig:
    """The configuration with the peers and survivors of a distributed run, where they were left open.

    Raises ConfigError where they do not fit.
    """
    privacy = config.privacy
    if privacy.privacy_model is not PrivacyModel.DISTRIBUTED:
        return config
    peers = privacy.peers or config.simulation.num_clients
    survivors = privacy.survivors or max(math.ceil(0.8 * peers), (peers + privacy.colluders) // 2 + 1)
    config = dataclasses.replace(config, privacy=dataclasses.replace(privacy, peers=peers, survivors=survivors))
    if config.training.min_clients > survivors:
        raise ConfigError(
            f"min-clients = {config.training.min_clients} and survivors = {survivors}: a sum is opened with survivors; raise survivors"
        )
    rounds = min(config.training.deal_rounds, config.moments.moment_rounds + config.training.num_rounds)
    if peers**2 * rounds > MAX_DEALT:
        raise ConfigError(f"deal-rounds = {rounds} with {peers} peers: use {MAX_DEALT // peers**2} or fewer")
    return config


def with_moment_noise(config: RunConfig) -> RunConfig:
    """The configuration with a moment noise multiplier, where it was left open: the release by itself costs half of epsilon,
    all of it where there are no rounds.
    """
    privacy, moments = config.privacy, config.moments
    open_noise = moments.moment_rounds > 0 and moments.moment_noise_multiplier == 0
    if not open_noise or privacy.privacy_model is PrivacyModel.NONE:
        return config
    share = _MOMENT_SHARE if planned_steps(config) else 1.0
    sigma = calibrate_noise_multiplier(share * privacy.epsilon, privacy.delta, 1.0, moments.moment_rounds)
    return dataclasses.replace(config, moments=dataclasses.replace(moments, moment_noise_multiplier=sigma))


def with_noise(config: RunConfig) -> RunConfig:
    """The configuration with the noise multipliers that its epsilon, delta and schedule ask for, and with its cohort.

    A noise multiplier that is given is kept, and checked. Raises ConfigError where the budget cannot hold the schedule.
    """
    check_noise_has_rounds(config)
    config = with_moment_noise(with_cohort(config))
    privacy, moments = config.privacy, config.moments
    if privacy.privacy_model is PrivacyModel.NONE:
        return dataclasses.replace(config, privacy=dataclasses.replace(privacy, noise_multiplier=0.0))
    if privacy.noise_multiplier == 0:
        fixed = [Release("moments", moments.moment_noise_multiplier, 1.0)] * moments.moment_rounds
        sigma = calibrate_noise_multiplier(
            privacy.epsilon, privacy.delta, privacy.sample_rate, planned_steps(config), fixed
        )
        config = dataclasses.replace(config, privacy=dataclasses.replace(privacy, noise_multiplier=sigma))
    cost = epsilon_of(run_releases(config), privacy.delta)
    if cost > privacy.epsilon:
        raise ConfigError(
            f"noise-multiplier {privacy.noise_multiplier:g} over {planned_steps(config)} steps costs epsilon {cost:.4g}, over the "
            f"budget {privacy.epsilon:g}: raise it, or epsilon, or give 0 to have it calibrated"
        )
    return config


def check_noise_has_rounds(config: RunConfig) -> None:
    """Raise ConfigError where a noise multiplier is given and there are no rounds: whoever gave it asked for more noise."""
    if config.privacy.noise_multiplier > 0 and not planned_steps(config):
        raise ConfigError(
            f"noise-multiplier {config.privacy.noise_multiplier:g} is of the rounds, and there are none: give --num-rounds, or "
            "--moment-noise-multiplier for the noise of the moments"
        )


def promise(config: RunConfig) -> str:
    """One line for people: what is promised to whom, and against whom."""
    privacy = config.privacy
    if privacy.privacy_model is PrivacyModel.NONE:
        return "NO PRIVACY: gradients of faces are shared as they are. For public data only."
    trust = {
        PrivacyModel.LOCAL: "against the coordinator and everyone else",
        PrivacyModel.DISTRIBUTED: f"against the coordinator and any {privacy.colluders} of {privacy.peers} clients together",
        PrivacyModel.CENTRAL: "against whoever sees what the coordinator releases; the coordinator is trusted",
    }[privacy.privacy_model]
    return f"epsilon {privacy.epsilon:g}, delta {privacy.delta:g} for each {privacy.unit}, {trust}"


def noise_told(config: RunConfig) -> str:
    """The noise multipliers of the run's releases, in words: `noise multiplier 0.9528 of the moments, 0.9728 of a step`."""
    told = []
    if config.moments.moment_rounds:
        told.append(f"{config.moments.moment_noise_multiplier:.4g} of the moments")
    if planned_steps(config):
        told.append(f"{config.privacy.noise_multiplier:.4g} of a step")
    return f"noise multiplier {', '.join(told)}" if told else "nothing is released"
