"""The accountant against Google's, and against what must hold of any."""

import itertools

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy import special, stats

from common.errors import ConfigError
from common.privacy.accounting import (
    ORDERS,
    Release,
    calibrate_noise_multiplier,
    epsilon_at_order,
    epsilon_at_orders,
    epsilon_of,
    filter_order,
    rdp_at,
    rdp_of,
    tight_epsilon_of,
)

MOMENTS = Release("moments", 3.73, 1.0)
SCHEDULES = [
    [Release("gradients", 1.1, 0.01, 1000)],
    [Release("gradients", 0.6, 0.1, 60)],
    [Release("gradients", 4.0, 0.5, 300)],
    [MOMENTS],
    [MOMENTS, Release("gradients", 1.0, 0.05, 300)],
    [Release("gradients", 30.0, 1.0, 5000)],
]


def _events(releases: list[Release]) -> list[SelfComposedDpEvent]:
    return [
        SelfComposedDpEvent(PoissonSampledDpEvent(r.sample_rate, GaussianDpEvent(r.noise_multiplier)), r.steps)
        for r in releases
    ]


def _rdp_epsilon(releases: list[Release], delta: float) -> float:
    accountant = RdpAccountant(list(ORDERS))
    for event in _events(releases):
        accountant.compose(event)
    return float(accountant.get_epsilon(delta))


def _pld_epsilon(releases: list[Release], delta: float) -> float:
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for event in _events(releases):
        accountant.compose(event)
    return float(accountant.get_epsilon(delta))


def _gaussian_delta(sigma: float, epsilon: float) -> float:
    """Exact delta of one Gaussian mechanism (Balle and Wang 2018, theorem 8)."""
    return float(
        stats.norm.cdf(0.5 / sigma - epsilon * sigma) - np.exp(epsilon) * stats.norm.cdf(-0.5 / sigma - epsilon * sigma)
    )


def _integrated_rdp(sigma: float, rate: float, order: float) -> float:
    """log E_z [((1 - q) + q exp((2 z - 1) / (2 sigma^2)))^order] / (order - 1), z ~ N(0, sigma^2), by summing slices."""
    z = np.linspace(-60 * sigma, 60 * sigma + order, 2_000_001)
    mixture = np.logaddexp(np.log1p(-rate), np.log(rate) + (2 * z - 1) / (2 * sigma**2))
    logs = stats.norm.logpdf(z, scale=sigma) + order * mixture + np.log(z[1] - z[0])
    return float(special.logsumexp(logs) / (order - 1))


@pytest.mark.parametrize(("sigma", "rate"), [(0.6, 0.1), (1.1, 0.01), (4.0, 0.5), (1.0, 0.05)])
@pytest.mark.parametrize("order", [1.05, 1.6, 2.0, 3.3, 5.75, 20.0])
def test_rdp_agrees_with_the_integral(sigma: float, rate: float, order: float) -> None:
    got = rdp_of([Release("gradients", sigma, rate)])[ORDERS.index(order)]
    assert got == pytest.approx(_integrated_rdp(sigma, rate, order), rel=1e-4, abs=1e-11)


@pytest.mark.parametrize("releases", SCHEDULES, ids=str)
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_rdp_agrees_with_google_s(releases: list[Release], delta: float) -> None:
    """Google's leaves out the low orders at which its series is slow, so it may lie higher."""
    ours, theirs = epsilon_of(releases, delta), _rdp_epsilon(releases, delta)
    assert ours <= theirs * (1 + 1e-4)
    assert ours >= theirs * 0.98


@pytest.mark.parametrize("releases", SCHEDULES[:5], ids=str)
def test_prv_lies_near_google_s_pld_and_below_rdp(releases: list[Release]) -> None:
    tight, pld = tight_epsilon_of(releases, 1e-5), _pld_epsilon(releases, 1e-5)
    assert pld - 0.01 <= tight <= pld + 0.03
    assert tight <= epsilon_of(releases, 1e-5) + 0.01


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.73, 20.0])
def test_rdp_is_above_the_exact_gaussian(sigma: float) -> None:
    """At the epsilon that we claim the exact delta is no more than the one we claim."""
    claimed = epsilon_of([Release("moments", sigma, 1.0)], 1e-5)
    assert _gaussian_delta(sigma, claimed) <= 1e-5
    assert _gaussian_delta(sigma, 0.5 * claimed) > 1e-5


GRID = [
    [Release("gradients", 20.0, 1.0, 300)],
    [Release("gradients", 8.0, 1.0, 40), Release("gradients", 30.0, 1.0, 100)],
    [Release("gradients", 0.8, 0.02, 500)],
    [Release("gradients", 2.0, 0.2, 200)],
    [Release("gradients", 6.0, 0.5, 400)],
    # The rate changes from round to round.
    [Release("gradients", 1.5, 0.02 * k, 30) for k in range(1, 6)],
    [Release("moments", 6.0, 1.0), *(Release("gradients", 1.0 + k, 0.05 * k, 50) for k in range(1, 5))],
]


@pytest.mark.parametrize("releases", GRID, ids=range(len(GRID)))
@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_prv_and_google_s_pld_agree_within_two_percent_and_rdp_is_never_below(
    releases: list[Release], delta: float
) -> None:
    tight, pld, rdp = tight_epsilon_of(releases, delta), _pld_epsilon(releases, delta), epsilon_of(releases, delta)
    assert tight == pytest.approx(pld, rel=0.02)
    assert rdp >= pld
    order = ORDERS[filter_order(releases, rdp, delta)]
    assert epsilon_at_order(float(rdp_at(releases, order).sum()), order, delta) >= pld


def test_rdp_at_one_order_is_opacus_s_and_never_below() -> None:
    pairs = list(itertools.product([0.05, 0.3, 0.7, 1.0, 5.0, 300.0], [1e-6, 1e-3, 0.1, 0.5, 0.99, 1.0]))
    releases = [Release("gradients", sigma, rate) for sigma, rate in pairs]
    everywhere = np.array([rdp_of([release]) for release in releases])
    for order in (1.05, 1.1, 1.5, 2.0, 2.45, 3.2, 5.75, 9.95, 10, 20, 63, 64.0, 128.0, 1024.0):
        expected, got = everywhere[:, ORDERS.index(order)], rdp_at(releases, order)
        assert (got >= expected / (1 + 1e-9)).all()  # both are rounded up by 1e-9
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=3e-12 / (order - 1))
        one_by_one = [rdp_at([release], order)[0] for release in releases]
        np.testing.assert_allclose(one_by_one, got, rtol=1e-9, atol=1e-13 / (order - 1))
    for sigma, rate in (
        (0.0, 0.1),
        (-1.0, 0.1),
        (1e-3, 0.1),
        (1.0, 0.0),
        (1.0, -0.1),
        (1.0, 1.1),
        (np.nan, 0.1),
        (1.0, np.nan),
    ):
        assert np.isinf(rdp_at([Release("gradients", sigma, rate), MOMENTS], 3.2)).tolist() == [True, False]
    assert rdp_at([], 3.2).shape == (0,)
    assert rdp_at([Release("gradients", 1.0, 0.1, 7)], 3.2)[0] == 7 * rdp_at([Release("gradients", 1.0, 0.1)], 3.2)[0]


@pytest.mark.parametrize("order", [1.05, 1.5, 3.2, 9.95, 24])
def test_many_different_rounds_are_priced_as_one_by_one(order: float) -> None:
    rng = np.random.default_rng(0)
    drawn = zip(rng.uniform(0.3, 50, 3000), rng.uniform(1e-4, 0.9, 3000), strict=True)
    releases = [Release("gradients", float(sigma), float(rate)) for sigma, rate in drawn]
    priced = rdp_at(releases, order)
    for place in range(0, 3000, 100):
        assert priced[place] == pytest.approx(rdp_at([releases[place]], order)[0], rel=1e-9, abs=1e-13 / (order - 1))


def test_nothing_costs_nothing() -> None:
    assert epsilon_of([], 1e-5) == 0.0
    assert tight_epsilon_of([], 1e-5) == 0.0
    assert not rdp_of([]).any()
    assert not rdp_of([Release("gradients", 1.0, 0.1, 0)]).any()


def test_more_steps_less_noise_and_more_sampling_cost_more() -> None:
    def cost(sigma: float = 1.0, rate: float = 0.1, steps: int = 100, delta: float = 1e-5) -> float:
        return epsilon_of([Release("gradients", sigma, rate, steps)], delta)

    for costs in (
        [cost(steps=steps) for steps in (1, 2, 10, 100, 1000)],
        [cost(sigma=sigma) for sigma in (8.0, 4.0, 2.0, 1.0, 0.5)],
        [cost(rate=rate) for rate in (0.001, 0.01, 0.1, 0.5, 1.0)],
        [cost(delta=delta) for delta in (1e-2, 1e-5, 1e-9)],
    ):
        assert all(a < b for a, b in itertools.pairwise(costs))


def test_a_release_costs_at_every_order() -> None:
    """Also where float error hides the cost: a charge never lowers the total, so a budget cannot be won back."""
    for sigma, rate in itertools.product([1e-300, 1e-160, 1e-5, 0.01, 0.3, 1.0, 100.0, 1e6], [1e-300, 1e-9, 1e-3, 1.0]):
        rdp = rdp_of([Release("gradients", sigma, rate)])
        assert not np.isnan(rdp).any()
        assert (rdp > 0).all()


def test_endless_cost_is_over_every_budget() -> None:
    assert epsilon_of([Release("gradients", 1e-200, 0.1)], 1e-5) == float("inf")


def test_merged_equals_unmerged() -> None:
    merged = [Release("gradients", 1.0, 0.1, 7), Release("gradients", 2.0, 0.1, 3)]
    unmerged = [Release("gradients", 1.0, 0.1)] * 4 + [Release("gradients", 2.0, 0.1)] * 3
    unmerged += [Release("gradients", 1.0, 0.1, 3)]
    np.testing.assert_allclose(rdp_of(unmerged), rdp_of(merged), rtol=1e-12)
    one_by_one = sum((rdp_of([release]) for release in unmerged), np.zeros(len(ORDERS)))
    np.testing.assert_allclose(one_by_one, rdp_of(merged), rtol=1e-12)
    assert tight_epsilon_of(unmerged, 1e-5) == tight_epsilon_of(merged, 1e-5)


def test_the_filter_order_is_the_best_one_of_a_schedule_that_uses_up_the_budget() -> None:
    releases = [MOMENTS, Release("gradients", 1.0, 0.05, 300)]
    at_orders = epsilon_at_orders(rdp_of(releases), 1e-5)
    order = filter_order(releases, float(at_orders.min()), 1e-5)
    assert at_orders[order] == epsilon_of(releases, 1e-5) == at_orders.min()
    assert 1.05 < ORDERS[order] < 1024


def test_a_small_first_run_leaves_room_for_as_many_more_as_any_order_allows() -> None:
    small = [Release("gradients", 2.0, 0.05, 20)]
    order = filter_order(small, 10.0, 1e-5)

    def runs_within_budget(at: int) -> int:
        count = 0
        while epsilon_at_orders((count + 1) * rdp_of(small), 1e-5)[at] <= 10.0:
            count += 1
        return count

    most = max(runs_within_budget(at) for at in range(0, len(ORDERS), 7))
    assert runs_within_budget(order) >= most > 10


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 10.0])
@pytest.mark.parametrize(("rate", "steps"), [(0.01, 1000), (0.1, 60), (1.0, 10)])
@pytest.mark.parametrize("moments", [0, 1])
def test_calibration_comes_near_the_budget_from_below(epsilon: float, rate: float, steps: int, moments: int) -> None:
    fixed = [Release("moments", 20.0, 1.0)] * moments
    sigma = calibrate_noise_multiplier(epsilon, 1e-5, rate, steps, fixed)
    cost = epsilon_of([*fixed, Release("gradients", sigma, rate, steps)], 1e-5)
    assert 0.995 * epsilon <= cost <= epsilon
    assert epsilon_of([*fixed, Release("gradients", sigma / 1.0011, rate, steps)], 1e-5) > epsilon


def test_fixed_releases_force_more_noise() -> None:
    with_moments = calibrate_noise_multiplier(10.0, 1e-5, 0.1, 60, [MOMENTS])
    assert with_moments > calibrate_noise_multiplier(10.0, 1e-5, 0.1, 60)


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"alone costs epsilon .* over the budget 1:"):
        calibrate_noise_multiplier(1.0, 1e-5, 0.1, 60, [MOMENTS])
    spent = epsilon_of([MOMENTS], 1e-5)
    with pytest.raises(ConfigError, match="cannot be done within"):
        calibrate_noise_multiplier(spent, 1e-5, 0.1, 60, [MOMENTS])
    assert calibrate_noise_multiplier(spent, 1e-5, 0.1, 0, [MOMENTS]) == 0.0
