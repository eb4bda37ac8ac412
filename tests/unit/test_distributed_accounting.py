"""What a sum of noise shares costs, against the discrete distributions themselves, written out."""

import itertools
import math

import numpy as np
import pytest
from scipy import special, stats

from common.errors import ConfigError
from common.privacy.accounting import ORDERS, Release, epsilon_of, rdp_at
from common.privacy.distributed_accounting import (
    LEAST_SHARE_DEVIATION,
    _log_ratio,
    effective_noise_multiplier,
    hockey_stick_slack,
    rdp_slack,
    share_deviation,
)

# Float error of the oracles: sums of a few thousand positive terms.
ERROR = 1e-10


def discrete(deviation: float, reach: int, middle: int = 0) -> np.ndarray:
    """The discrete Gaussian around `middle`, from -reach to reach, to 1."""
    weights = np.exp(-((np.arange(-reach, reach + 1) - middle) ** 2) / (2 * deviation**2))
    return np.asarray(weights / weights.sum())


def sum_of(shares: int, deviation: float, reach: int) -> np.ndarray:
    """The law of a sum of so many shares, from -reach to reach."""
    one = law = discrete(deviation, reach)
    for _ in range(shares - 1):
        law = np.convolve(law, one)[reach:-reach]
    return law


def renyi(p: np.ndarray, q: np.ndarray, order: float) -> float:
    """D_order(p || q)."""
    both = (p > 0) & (q > 0)
    assert p[~both].sum() < 1e-250
    return float(special.logsumexp(order * np.log(p[both]) + (1 - order) * np.log(q[both])) / (order - 1))


def hockey_stick(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


def claimed(deviation: float, shares: int, sensitivity: float, rate: float, order: float) -> float:
    multiplier = effective_noise_multiplier(deviation, shares, sensitivity)
    return float(rdp_at([Release("gradients", multiplier, rate)], order)[0]) + rdp_slack(order, 1, shares)


@pytest.mark.parametrize("variance", [0.1, 0.15, 0.25, 0.5])
def test_the_sum_over_integers_is_within_theta_of_the_integral(variance: float) -> None:
    """And reaches it, so that the ratio, tau, is not larger than it must be."""
    theta = math.tanh(_log_ratio(variance) / 2)
    centres = np.linspace(0, 1, 101)
    sums = np.exp(-((np.arange(-40, 41)[:, None] - centres) ** 2) / (2 * variance)).sum(0)
    away = np.abs(sums / math.sqrt(2 * math.pi * variance) - 1).max()
    # At the middle between two integers the terms of theta alternate: the next one is theta^4 / 8.
    assert theta * (1 - theta**3) - ERROR <= away <= theta + ERROR


@pytest.mark.parametrize("deviation", [0.5, 0.6, 0.7, 0.8])
@pytest.mark.parametrize("shares", [2, 3, 8])
def test_a_sum_of_shares_is_as_close_to_one_share_as_claimed(deviation: float, shares: int) -> None:
    reach = 14
    total, one = sum_of(shares, deviation, 60), discrete(deviation * math.sqrt(shares), 60)
    near = slice(60 - reach, 60 + reach + 1)
    away = np.abs(np.log(total[near] / one[near])).max()
    bound = sum(_log_ratio(deviation**2 * k / (k + 1)) for k in range(1, shares))
    assert 0.02 * bound <= away <= bound + ERROR


@pytest.mark.parametrize("smoothing", [0.1, 0.15, 0.25])
@pytest.mark.parametrize("middle", [0, 3])
def test_continuous_noise_made_discrete_is_as_close_as_claimed(smoothing: float, middle: int) -> None:
    """Step 2 of the proof, by slices."""
    whole = 2.0
    x = np.linspace(middle - 14, middle + 14, 28_001)
    density = np.exp(-((x - middle) ** 2) / (2 * (whole - smoothing)))
    z = np.arange(-30, 31)
    kernel = np.exp(-((z[:, None] - x) ** 2) / (2 * smoothing))
    law = (kernel / kernel.sum(0) * density / density.sum()).sum(1)
    near = slice(30 + middle - 6, 30 + middle + 7)
    away = np.abs(np.log(law[near] / discrete(math.sqrt(whole), 30, middle)[near])).max()
    assert 0.005 * _log_ratio(smoothing) <= away <= _log_ratio(smoothing) + ERROR


CASES = list(itertools.product([3.0, 4.3, 9.0], [1, 2, 5], [0.1, 0.5, 1.0]))


@pytest.mark.parametrize(("deviation", "shares", "push"), CASES)
@pytest.mark.parametrize("rate", [0.01, 0.2, 1.0])
def test_no_order_of_the_sampled_sum_costs_more_than_claimed(
    deviation: float, shares: int, push: float, rate: float
) -> None:
    spread = deviation * math.sqrt(shares)
    moved = max(1, round(push * spread))
    reach = math.ceil(37 * spread)
    without = sum_of(shares, deviation, reach)
    with_person = (1 - rate) * without + rate * np.concatenate([np.zeros(moved), without[:-moved]])
    # The variance given up, 4 of spread^2, and nothing else.
    loosest = (1 + 1e-5) * spread**2 / (spread**2 - 4)
    for order in (1.05, 1.5, 2.0, 2.45, 3.3, 6.0, 9.95, 16):
        bound = claimed(deviation, shares, moved, rate, order)
        added, removed = renyi(with_person, without, order), renyi(without, with_person, order)
        assert max(added, removed) <= bound + ERROR / (order - 1)
        assert removed <= added + ERROR / (order - 1)
        if rate == 1.0:
            assert bound <= loosest * added


@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
def test_at_whole_orders_one_discrete_gaussian_costs_what_a_continuous_one_does(rate: float) -> None:
    """To all digits: not used by the claim, but it tells that the oracle above is one."""
    deviation, moved, reach = 2.5, 2, 90
    without = discrete(deviation, reach)
    with_person = (1 - rate) * without + rate * discrete(deviation, reach, moved)
    for order in (2, 3, 5, 12):
        continuous = float(rdp_at([Release("gradients", deviation / moved, rate)], order)[0])
        assert renyi(with_person, without, order) == pytest.approx(continuous, rel=1e-7)


@pytest.mark.parametrize(("deviation", "shares", "push"), CASES)
@pytest.mark.parametrize("rate", [0.01, 0.2, 1.0])
def test_no_event_tells_more_than_the_continuous_mechanism_s(
    deviation: float, shares: int, push: float, rate: float
) -> None:
    """Delta at each epsilon is at most that of the sampled Gaussian mechanism, in closed form."""
    spread = deviation * math.sqrt(shares)
    moved, reach = max(1, round(push * spread)), math.ceil(37 * spread)
    without = sum_of(shares, deviation, reach)
    with_person = (1 - rate) * without + rate * np.concatenate([np.zeros(moved), without[:-moved]])
    sigma = effective_noise_multiplier(deviation, shares, moved)
    extra, factor = hockey_stick_slack(1, shares, 1)

    def mass(cut: float, epsilon: float) -> float:
        """P - e^epsilon Q of all beyond the cut, for P with the person."""
        with_, none = stats.norm.sf(cut - 1 / sigma), stats.norm.sf(cut)
        return float((1 - rate) * none + rate * with_ - math.exp(epsilon) * none)

    for epsilon in (0.0, 0.01, 0.1, 0.5, 1.0, 2.0):
        # Where the likelihood ratio (1 - q) + q exp(x / sigma - 1 / (2 sigma^2)) is e^epsilon, and e^-epsilon.
        above = sigma * math.log((math.exp(epsilon) - 1 + rate) / rate) + 1 / (2 * sigma)
        added = mass(above, epsilon)
        assert hockey_stick(with_person, without, epsilon + extra) <= added * (1 + factor) + ERROR
        if math.exp(-epsilon) > 1 - rate:
            below = sigma * math.log((math.exp(-epsilon) - 1 + rate) / rate) + 1 / (2 * sigma)
            none, with_ = stats.norm.cdf(below), stats.norm.cdf(below - 1 / sigma)
            removed = none - math.exp(epsilon) * ((1 - rate) * none + rate * with_)
        else:
            removed = 0.0
        assert hockey_stick(without, with_person, epsilon + extra) <= removed * (1 + factor) + ERROR


def test_two_coordinates_cost_what_their_norm_does() -> None:
    deviation, reach, rate = 3.0, 75, 0.3
    one = sum_of(2, deviation, reach)
    without = np.outer(one, one)
    moved = np.outer(np.roll(one, 3), np.roll(one, -4))  # what goes round is below 1e-200
    with_person = (1 - rate) * without + rate * moved
    for order in (1.5, 2.0, 4.5):
        bound = claimed(deviation, 2, 5.0, rate, order)
        assert renyi(with_person, without, order) <= bound + ERROR
        # The larger coordinate alone would be too little.
        assert renyi(with_person, without, order) > claimed(deviation, 2, 4.0, rate, order)


def mechanism(clients: list[list[float]], rate: float, law: np.ndarray) -> np.ndarray:
    """The law of the released integer: every subset of persons, each client's sum rounded, the shares of all added."""
    found = np.zeros_like(law)
    persons = [(client, value) for client, values in enumerate(clients) for value in values]
    for drawn in itertools.product([False, True], repeat=len(persons)):
        sums = [sum(v for (c, v), d in zip(persons, drawn, strict=True) if d and c == client) for client in (0, 1)]
        chance = math.prod(rate if d else 1 - rate for d in drawn)
        found += chance * np.roll(law, sum(round(value) for value in sums))
    return found


@pytest.mark.parametrize("person", [6.2, -6.2, 0.2, 2.3])
@pytest.mark.parametrize("rate", [0.1, 0.6, 1.0])
def test_the_whole_release_with_rounding_and_sampling_costs_no_more_than_claimed(person: float, rate: float) -> None:
    deviation, shares = 3.0, 2
    law = sum_of(shares, deviation, 150)
    others = [[2.4, -1.7, 0.35], [4.4, -4.9]]
    without = mechanism(others, rate, law)
    with_person = mechanism([others[0], [*others[1], person]], rate, law)
    for order in (1.05, 2.0, 3.3, 8.0):
        cost = max(renyi(with_person, without, order), renyi(without, with_person, order))
        assert cost <= claimed(deviation, shares, abs(person) + 1, rate, order) + ERROR / (order - 1)


def test_without_the_share_of_rounding_the_claim_would_be_false() -> None:
    """One who moves the sum by 0.2 may move the rounded sum by a whole step."""
    law = sum_of(2, 3.0, 150)
    cost = renyi(mechanism([[0.4], [0.4, 0.2]], 1.0, law), mechanism([[0.4], [0.4]], 1.0, law), 2.0)
    assert claimed(3.0, 2, 0.2, 1.0, 2.0) < 0.1 * cost < cost < claimed(3.0, 2, 1.2, 1.0, 2.0)


@pytest.mark.parametrize("sigma", [0.5, 0.8, 1.5, 5.0, 30.0])
@pytest.mark.parametrize("rate", [0.005, 0.1, 1.0])
@pytest.mark.parametrize(("dimension", "shares"), [(1, 1), (1, 200), (167_649, 7), (7_000_000, 60)])
def test_epsilon_is_within_one_percent_of_the_continuous_gaussian_s(
    sigma: float, rate: float, dimension: int, shares: int
) -> None:
    """Of shares of variance (sigma C)^2 / H to the letter, on the coarsest lattice: gamma sqrt(d) = 1e-3 C."""
    steps = 1e3 * math.sqrt(dimension)
    deviation = sigma * steps / math.sqrt(shares)
    multiplier = effective_noise_multiplier(deviation, shares, steps + math.sqrt(dimension))
    assert sigma * (1 - 1.1e-3) < multiplier < sigma
    for rounds in (1, 300):
        continuous = epsilon_of([Release("gradients", sigma, rate, rounds)], 1e-5)
        assert continuous < epsilon_of([Release("gradients", multiplier, rate, rounds)], 1e-5) <= 1.01 * continuous
    same = share_deviation(sigma, shares, steps + math.sqrt(dimension))
    assert deviation < same < 1.0011 * deviation
    assert sigma <= effective_noise_multiplier(same, shares, steps + math.sqrt(dimension)) < sigma * (1 + 1e-11)


def test_the_slack_is_far_below_the_accountant_s_own_rounding() -> None:
    rounding = float(rdp_at([Release("gradients", 1e6, 1e-9)], ORDERS[0])[0])
    for order in ORDERS:
        assert 0 < rdp_slack(order, 10**9, 10**5) < min(1e-18, 1e-5 * rounding)
    extra, factor = hockey_stick_slack(10**9, 1000, 10**5)
    assert 0 < factor < extra < 1e-15
    assert rdp_slack(2.0, 2, 3) == pytest.approx(3 * 6 * _log_ratio(4.0), rel=1e-9, abs=0)
    assert hockey_stick_slack(2, 3, 5) == pytest.approx((60 * _log_ratio(4.0), 30 * _log_ratio(4.0)), rel=1e-9, abs=0)


@pytest.mark.parametrize("seed", range(20))
def test_the_slack_is_enough_for_the_worst_that_is_so_close(seed: int) -> None:
    """Step 3 of the proof, in a dimension in which eta is 0.2: laws whose every probability may be off by exp(+-eta)."""
    eta, rng = 0.2, np.random.default_rng(seed)
    dimension = math.floor(eta / _log_ratio(4.0))
    continuous = rng.dirichlet(np.ones(6), 2)
    off = rng.choice([-eta, eta], (2, 6)) if seed else np.array([[eta] * 6, [-eta] * 6])
    p, q = continuous * np.exp(off)  # sums other than 1 can only be worse
    added = []
    for order in (1.05, 1.5, 2.0, 8.0):
        added.append(renyi(p, q, order) - renyi(*continuous, order))
        assert added[-1] <= rdp_slack(order, dimension, 1) * (1 + 1e-9)
    assert seed or added[-1] == pytest.approx(rdp_slack(8.0, dimension, 1))
    extra, factor = hockey_stick_slack(dimension, 1, 1)
    for epsilon in (0.0, 0.3, 1.0):
        delta = hockey_stick(*continuous, epsilon)
        assert hockey_stick(p, q, epsilon + extra) <= delta * (1 + factor) + 1e-9


def test_shares_too_small_for_the_proof_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"of 4 noise shares has a deviation of 2\.9 .* at least 3: raise"):
        effective_noise_multiplier(2.9, 4, 1000.0)
    for wrong in (math.nan, 0.0):
        with pytest.raises(ConfigError, match="lattice steps"):
            effective_noise_multiplier(wrong, 4, 1000.0)
    with pytest.raises(ConfigError, match="lattice steps"):
        share_deviation(1e-3, 4, 1000.0)
    assert share_deviation(LEAST_SHARE_DEVIATION, 1, 1.0) > LEAST_SHARE_DEVIATION
