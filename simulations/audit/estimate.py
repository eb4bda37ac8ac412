"""Epsilon of a run at what was measured, beside epsilon at what its ledgers charged."""

import dataclasses
import math
from dataclasses import dataclass

from scipy import stats

from common.config import RunConfig
from common.privacy.accounting import epsilon_of
from common.privacy.planner import run_releases


@dataclass(frozen=True)
class Measured:
    """noise, moment_noise: measured standard deviation over the charged one, None where there is no such release, with
    their standard errors. contribution: the most that one unit added, over C. sample_rate: with its 95 % interval.
    epsilon: of the whole run at these, with the interval that the errors give; claimed: at what was charged. All by RDP.
    """

    noise: float | None
    noise_error: float | None
    moment_noise: float | None
    moment_noise_error: float | None
    contribution: float | None
    sample_rate: float | None
    sample_rate_low: float | None
    sample_rate_high: float | None
    epsilon: float
    epsilon_low: float
    epsilon_high: float
    claimed: float


def measured_epsilon(
    config: RunConfig,
    noise: tuple[float, int],
    contribution: float,
    drawn: tuple[int, int],
    moment_noise: tuple[float, int],
) -> Measured:
    """noise, moment_noise: (measured over charged, values measured). contribution: over C. drawn: (units drawn, chances).

    The interval takes the rate's exact 95 % interval (Clopper, Pearson 1934) and the noise's at five standard errors,
    each at its worse end: it holds epsilon at the true parameters in 95 % of audits at least.
    """
    claimed = run_releases(config)
    has = {release.mechanism.removeprefix("secure-") for release in claimed}
    low, high = _interval(*drawn)
    rate = drawn[0] / drawn[1] if drawn[1] else config.privacy.sample_rate
    errors = [_error(measured) for measured in (noise, moment_noise)]

    def epsilon(sample_rate: float, errors_off: float) -> float:
        at = []
        for release in claimed:
            moments = release.mechanism.endswith("moments")
            ratio, _ = moment_noise if moments else noise
            ratio = (ratio + errors_off * errors[moments]) / (1.0 if moments else contribution)
            sigma = release.noise_multiplier * max(ratio, 1e-3)
            q = 1.0 if moments else min(max(sample_rate, 1e-9), 1.0)
            at.append(dataclasses.replace(release, noise_multiplier=sigma, sample_rate=q))
        return epsilon_of(at, config.privacy.delta)

    gradients = "gradients" in has
    return Measured(
        noise=noise[0] if gradients else None,
        noise_error=errors[0] if gradients else None,
        moment_noise=moment_noise[0] if "moments" in has else None,
        moment_noise_error=errors[1] if "moments" in has else None,
        contribution=contribution if gradients else None,
        sample_rate=rate if gradients else None,
        sample_rate_low=low if gradients else None,
        sample_rate_high=high if gradients else None,
        epsilon=epsilon(rate, 0.0),
        epsilon_low=epsilon(low, 5.0),
        epsilon_high=epsilon(high, -5.0),
        claimed=epsilon_of(claimed, config.privacy.delta),
    )


def _error(measured: tuple[float, int]) -> float:
    ratio, values = measured
    return ratio / math.sqrt(2 * values) if values else 0.0


def _interval(successes: int, trials: int) -> tuple[float, float]:
    low = stats.beta.ppf(0.025, successes, trials - successes + 1) if successes else 0.0
    high = stats.beta.ppf(0.975, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)
