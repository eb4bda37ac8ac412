"""Epsilon, noise and rounds: any two of them give the third. The accounting is `common.privacy.accounting`'s."""

import math
from dataclasses import dataclass

from common.errors import ConfigError
from common.privacy.accounting import (
    Release,
    calibrate_noise_multiplier,
    epsilon_at_orders,
    epsilon_of,
    quick_epsilon_of,
    rdp_of,
)

MAX_ROUNDS = 10**7
_LEAST_NOISE, _MOST_NOISE = 0.01, 1e4
# Bisection ends where the two ends are this near: the noise is the least one to 0.1 %, as in a run.
_NEAR = 1.001


@dataclass(frozen=True)
class Schedule:
    """What a client releases in a run: moments first (moment_noise None: not at all), then rounds of `local_steps` steps."""

    delta: float
    sample_rate: float
    local_steps: int
    moment_noise: float | None

    def releases(self, noise: float, rounds: int) -> list[Release]:
        """All releases of a run of that many rounds."""
        moments = [] if self.moment_noise is None else [Release("moments", self.moment_noise, 1.0)]
        steps = Release("gradients", noise, self.sample_rate, rounds * self.local_steps)
        return [*moments, steps] if rounds else moments

    def epsilon(self, noise: float, rounds: int) -> float:
        """The epsilon that a ledger would count; infinite for a noise multiplier under 0.01."""
        return epsilon_of(self.releases(noise, rounds), self.delta)

    def quick_epsilon(self, noise: float, rounds: int) -> float:
        """`epsilon`, or a hair more, in a fraction of the time."""
        return quick_epsilon_of(self.releases(noise, rounds), self.delta)

    def least_noise(self, epsilon: float, rounds: int) -> float:
        """The least noise multiplier (to 0.1 %, rounded up) of a run within epsilon; 0 for no rounds. Raises ConfigError."""
        self._check_moments(epsilon)
        steps = rounds * self.local_steps
        return calibrate_noise_multiplier(epsilon, self.delta, self.sample_rate, steps, self.releases(0.0, 0))

    def most_rounds(self, epsilon: float, noise: float) -> int:
        """The largest number of rounds within epsilon, at most MAX_ROUNDS; perhaps 0.

        Raises ConfigError where the moment release alone passes epsilon.
        """
        self._check_moments(epsilon)
        spent, step = rdp_of(self.releases(noise, 0)), rdp_of([Release("gradients", noise, self.sample_rate)])

        def fits(rounds: int) -> bool:
            cost = spent + rounds * self.local_steps * step if rounds else spent
            return bool(epsilon_at_orders(cost, self.delta).min() <= epsilon)

        low, high = 0, 1
        while fits(high):
            if high == MAX_ROUNDS:
                return MAX_ROUNDS
            low, high = high, min(2 * high, MAX_ROUNDS)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _check_moments(self, epsilon: float) -> None:
        alone = self.epsilon(0.0, 0)
        if alone > epsilon:
            raise ConfigError(
                f"the moment release alone costs epsilon {alone:.3g}, over the budget {epsilon:g}: raise moment-noise-multiplier "
                f"(without rounds {least_moment_noise(epsilon, self.delta):.3g} would do) or epsilon, or set moment-rounds 0"
            )


def least_moment_noise(epsilon: float, delta: float) -> float:
    """The moment release's least noise multiplier (to 0.1 %, rounded up) that alone costs at most epsilon.

    Raises ConfigError where none up to 10,000 does.
    """
    low, high = _LEAST_NOISE, _MOST_NOISE
    if epsilon_of([Release("moments", high, 1.0)], delta) > epsilon:
        raise ConfigError(f"epsilon = {epsilon:g} is too small for any release: raise it")
    while high / low > _NEAR:
        middle = math.sqrt(low * high)
        fits = epsilon_of([Release("moments", middle, 1.0)], delta) <= epsilon
        low, high = (low, middle) if fits else (middle, high)
    return high
