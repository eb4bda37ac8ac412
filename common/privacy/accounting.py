"""What a sequence of releases costs: Renyi differential privacy, on Opacus's analysis.

Neighbours: add or remove one unit. Every mechanism is a Gaussian one on a sum in which a unit counts for at most one
clipping norm, after Poisson sampling at rate q (q = 1: no sampling). RDP adds up over rounds order by order (Mironov
2017), also when later rounds are chosen after seeing earlier ones, as long as the order is fixed beforehand (Feldman,
Zrnic 2021). PRV (Gopi, Lee, Wutschitz 2021) is tighter and shown beside it, for schedules fixed beforehand only.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.rdp import compute_rdp

from common.errors import ConfigError
from common.privacy.sampled_gaussian import rdp_at_order

ORDERS: tuple[float, ...] = (
    *(1 + x / 20 for x in range(1, 180)),
    *range(10, 64),
    *(64.0, 80.0, 96.0, 128.0, 192.0, 256.0, 512.0, 1024.0),
)
# Float error of the analysis, paid for by reporting this much more than was computed.
_ROUND_UP = 1 + 1e-9
_LEAST = 1e-12
# Where a search for the best order begins (order 3.05), and its strides.
_START, _STRIDES = 40, (16, 4, 1)
_LEAST_NOISE = 0.01


@dataclass(frozen=True, order=True)
class Release:
    """One round's worth of releases at one client.

    mechanism: `gradients` (the noised sum of clipped gradients) or `moments` (the noised sum of clipped feature
    vectors); with `secure-` before it, a share of the noise under a secure sum, whose price is the same but for less than
    what is rounded up here (`common.privacy.distributed_accounting`), and holds for the sum. The meaning of a name never
    changes; a new mechanism gets a new name.
    """

    mechanism: str
    noise_multiplier: float
    sample_rate: float
    steps: int = 1


MECHANISMS = ("gradients", "moments", "secure-gradients", "secure-moments")


@lru_cache(maxsize=4096)
def _step_rdp(noise_multiplier: float, sample_rate: float) -> np.ndarray:
    if not noise_multiplier >= _LEAST_NOISE:  # the series overflows: count it as no noise at all
        return np.full(len(ORDERS), np.inf)
    rdp = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=list(ORDERS))
    # Where the true value is near the float error of its logarithm, what comes back may even be negative.
    found = np.asarray(rdp, dtype=np.float64)
    return np.where(np.isnan(found), np.inf, np.maximum(found, 0.0) * _ROUND_UP + _LEAST)


def rdp_of(releases: Iterable[Release]) -> np.ndarray:
    """RDP of all the releases together, at each of ORDERS: (len(ORDERS),)."""
    total = np.zeros(len(ORDERS))
    for (noise_multiplier, sample_rate), steps in _merged(releases).items():
        total += steps * _step_rdp(noise_multiplier, sample_rate)
    return total


def rdp_at(releases: Sequence[Release], order: float) -> np.ndarray:
    """RDP of each of the releases at one order: (len(releases),). Ten thousand different ones take well under a second.

    Rounded up as in `rdp_of`; infinity for noise or a rate without bound.
    """
    pairs = list({(release.noise_multiplier, release.sample_rate) for release in releases})
    if len(pairs) == 1:
        prices = [_price(*pairs[0], order)]
    else:
        sigmas, rates = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        prices = rdp_at_order(sigmas, rates, order).tolist()
    priced = dict(zip(pairs, prices, strict=True))
    return np.array([r.steps * priced[r.noise_multiplier, r.sample_rate] for r in releases], dtype=np.float64)


@lru_cache(maxsize=4096)
def _price(noise_multiplier: float, sample_rate: float, order: float) -> float:
    return float(rdp_at_order(np.array([noise_multiplier]), np.array([sample_rate]), order)[0])


def epsilon_at_order(rdp: float, order: float, delta: float) -> float:
    """Epsilon that RDP at one order proves."""
    return float(_epsilon(np.asarray(rdp), np.asarray(order), delta))


def epsilon_at_orders(rdp: np.ndarray, delta: float) -> np.ndarray:
    """Epsilon that each order proves (Balle et al. 2020, theorem 21): (len(ORDERS),). Zero RDP is epsilon 0."""
    return _epsilon(rdp, np.asarray(ORDERS), delta)


def _epsilon(rdp: np.ndarray, orders: np.ndarray, delta: float) -> np.ndarray:
    epsilon = rdp + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    return np.where(rdp > 0, np.maximum(epsilon * _ROUND_UP, 0.0), 0.0)


def epsilon_of(releases: Iterable[Release], delta: float) -> float:
    """The epsilon of a schedule that was fixed beforehand: the best order's."""
    return float(epsilon_at_orders(rdp_of(releases), delta).min())


def quick_epsilon_of(releases: Sequence[Release], delta: float) -> float:
    """No less than `epsilon_of`, and the same but for 1e-8 where the epsilon of an order falls and then rises, as it does.

    A fifth of the time and less, for searches: few orders are looked at, and each is remembered for the next search.
    """
    if not releases:
        return 0.0

    @cache
    def proven(place: int) -> float:
        return epsilon_at_order(float(rdp_at(releases, ORDERS[place]).sum()), ORDERS[place], delta)

    place = _START
    for stride in _STRIDES:
        while True:
            best = min((p for p in (place - stride, place + stride) if 0 <= p < len(ORDERS)), key=proven)
            if proven(best) >= proven(place):
                break
            place = best
    return proven(place) * (1 + 1e-8)


def filter_order(releases: Iterable[Release], max_epsilon: float, delta: float) -> int:
    """Index into ORDERS of the order at which these releases could be repeated most often within `max_epsilon`.

    For a schedule that uses up the budget it is the order that proves the smallest epsilon; a small first run does not
    tie its ledger to an order at which larger ones cost too much. A budget above 10 counts as four times the
    schedule's own epsilon at most: at the order for a huge budget, a small one could never be kept again.
    """
    releases = list(releases)
    rdp = rdp_of(releases)
    max_epsilon = min(max_epsilon, max(10.0, 4 * float(epsilon_at_orders(rdp, delta).min())))
    fixed_cost = epsilon_at_orders(np.full(len(ORDERS), 1e-300), delta)
    return int(((max_epsilon - fixed_cost) / np.maximum(rdp, 1e-300)).argmax())


def tight_epsilon_of(releases: Iterable[Release], delta: float) -> float:
    """Epsilon by PRV, an upper bound within its error of 0.01; schedules fixed beforehand only.

    Takes up to a second.
    """
    merged = _merged(releases)
    if not merged:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = [(sigma, q, steps) for (sigma, q), steps in sorted(merged.items())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta=delta))


def calibrate_noise_multiplier(
    epsilon: float, delta: float, sample_rate: float, steps: int, fixed: Iterable[Release] = ()
) -> float:
    """The least noise multiplier (to 0.1 %, rounded up) with which `steps` gradient steps and the `fixed` releases cost
    `epsilon`.

    Raises ConfigError where the fixed releases alone pass epsilon, or no noise up to 10,000 suffices.
    """
    fixed = list(fixed)
    spent = epsilon_of(fixed, delta)
    if spent > epsilon:
        raise ConfigError(
            f"the moment release alone costs epsilon {spent:.3g}, over the budget {epsilon:g}: raise moment-noise-multiplier "
            "or epsilon, or set moment-rounds 0"
        )
    if steps == 0:
        return 0.0

    def cost(noise_multiplier: float) -> float:
        return quick_epsilon_of([*fixed, Release("gradients", noise_multiplier, sample_rate, steps)], delta)

    low, high = 0.01, 1.0
    while cost(high) > epsilon:
        low, high = high, 2 * high
        if high > 1e4:
            raise ConfigError(
                f"{steps} steps at sample rate {sample_rate:g} cannot be done within epsilon {epsilon:g}, delta {delta:g}: fewer "
                "steps, a smaller sample rate, or a larger moment-noise-multiplier"
            )
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cost(middle) > epsilon else (low, middle)
    return high


def _merged(releases: Iterable[Release]) -> Counter[tuple[float, float]]:
    merged: Counter[tuple[float, float]] = Counter()
    for release in releases:
        merged[release.noise_multiplier, release.sample_rate] += release.steps
    return merged
