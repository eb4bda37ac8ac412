"""The lattice: what one person moves, what 32 bits hold, and that noise is the sampler's and nothing else's."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from common.errors import ConfigError, PrivacyError
from common.privacy.discrete_gaussian import LARGEST_DEVIATION, discrete_gaussian
from common.privacy.distributed_accounting import effective_noise_multiplier
from common.privacy.lattice import _CERTAINTY, Lattice, _most_units
from common.privacy.randomness import SecureRandom
from tests.support import keyed

USUAL: dict[str, Any] = {
    "dimension": 1000,
    "max_grad_norm": 1.0,
    "noise_multiplier": 1.5,
    "shares": 4,
    "clients": 7,
    "expected_units": 100.0,
}


class Untouchable(SecureRandom):
    """Randomness that nobody may draw."""

    def words(self, count: int) -> np.ndarray:
        raise AssertionError("noise was drawn")


def lattice_of(**changes: Any) -> Lattice:
    return Lattice.of(**USUAL | changes)


def added(vectors: list[np.ndarray]) -> np.ndarray:
    """What the coordinator has in the end."""
    total = np.zeros_like(vectors[0])
    for vector in vectors:
        total += vector
    return total


def wrapped(values: list[int]) -> list[int]:
    return [value % 2**32 for value in values]


@pytest.mark.parametrize("dimension", [1, 3, 1000, 167_649, 7_000_000])
@pytest.mark.parametrize("norm", [1e-6, 0.03, 1.0, 2.0**-10, 1000.0])
def test_it_is_the_coarsest_that_is_allowed(dimension: int, norm: float) -> None:
    lattice = lattice_of(dimension=dimension, max_grad_norm=norm)
    assert math.frexp(lattice.granularity)[0] == 0.5  # a power of two
    assert lattice.granularity * math.sqrt(dimension) <= 1e-3 * norm < 2 * lattice.granularity * math.sqrt(dimension)
    assert lattice.sensitivity * lattice.granularity == pytest.approx(
        norm + lattice.granularity * math.sqrt(dimension), rel=1e-12
    )


@pytest.mark.parametrize("sigma", [0.3, 1.0, 8.0])
@pytest.mark.parametrize(("shares", "clients"), [(1, 2), (4, 7), (60, 100)])
def test_its_noise_is_priced_at_the_noise_multiplier_and_hardly_larger(sigma: float, shares: int, clients: int) -> None:
    lattice = lattice_of(noise_multiplier=sigma, shares=shares, clients=clients, max_grad_norm=0.7)
    priced = effective_noise_multiplier(lattice.share_deviation, lattice.shares, lattice.sensitivity)
    assert sigma <= priced <= sigma * (1 + 1e-11)
    assert sigma * 0.7 <= lattice.noise_deviation(shares) <= sigma * 0.7 * 1.0011
    assert lattice.noise_deviation(4 * shares) == pytest.approx(2 * lattice.noise_deviation(shares))


def test_one_person_moves_the_rounded_sum_by_at_most_the_sensitivity() -> None:
    rng = np.random.default_rng(0)
    for dimension in (1, 4, 50, 2000):
        lattice = lattice_of(dimension=dimension)
        for _ in range(50):
            others = rng.normal(0, 1, dimension) * rng.choice([1e-4, 1.0, 30.0])
            person = rng.normal(0, 1, dimension)
            person /= np.linalg.norm(person) * rng.choice([1.0, 3.0, 1e4])
            moved = lattice.round(others + person) - lattice.round(others)
            assert np.linalg.norm(moved) <= lattice.sensitivity


def test_rounding_can_add_nearly_all_that_the_sensitivity_grants_it() -> None:
    """Others just below the middle between two steps: an equal push of hardly more than n steps moves all by n + 1."""
    lattice = lattice_of()
    push = math.floor(1 / lattice.granularity / math.sqrt(1000))
    others = np.full(1000, 0.49 * lattice.granularity)
    person = np.full(1000, (push + 0.02) * lattice.granularity)
    moved = float(np.linalg.norm(lattice.round(others + person) - lattice.round(others)))
    beyond = moved - float(np.linalg.norm(person)) / lattice.granularity
    assert 0.97 * math.sqrt(1000) < beyond < math.sqrt(1000)


def test_rounding_is_to_the_nearest_of_the_exact_value() -> None:
    lattice = lattice_of(max_grad_norm=0.3)
    rng = np.random.default_rng(0)
    for kind in (np.float32, np.float64):
        values = (rng.normal(0, 1, 1000) * 10.0 ** rng.integers(-12, 3, 1000)).astype(kind)
        values[:4] = np.array([0.5, 1.5, -0.5, -2.5]) * lattice.granularity
        expected = [round(Fraction(float(v)) / Fraction(lattice.granularity)) for v in values]
        assert lattice.round(values).tolist() == expected


def test_what_a_client_gives_is_its_rounded_sum_and_its_share_modulo_two_to_the_32() -> None:
    lattice = lattice_of()
    total = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 20
    total[:3] = torch.tensor([1e9, -1e9, 0.0])
    given = lattice.add_noise_share(total, keyed("share"))
    assert given.dtype == np.uint32
    noise = discrete_gaussian(1000, lattice.share_deviation, keyed("share"))
    steps = [round(Fraction(v) / Fraction(lattice.granularity)) for v in total.double().tolist()]
    assert given.tolist() == wrapped([a + b for a, b in zip(steps, noise.tolist(), strict=True)])
    assert lattice.add_noise_share(total.double(), keyed("share")).tolist() == given.tolist()


def test_the_decoded_sum_is_the_sum_and_noise_of_the_deviation_told() -> None:
    dimension = 100_000
    lattice = lattice_of(dimension=dimension, shares=5, noise_multiplier=0.8, max_grad_norm=0.25)
    generator = torch.Generator().manual_seed(0)
    clipped = [torch.randn(dimension, generator=generator) for _ in range(7)]
    given = [lattice.add_noise_share(total, keyed("sum", client)) for client, total in enumerate(clipped)]
    released = lattice.decode(added(given))
    noise = (released - torch.stack(clipped).double().sum(0).numpy()) / lattice.noise_deviation(7)
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    low, high = stats.chi2(dimension).ppf([5e-4, 1 - 5e-4]) / dimension
    assert low < (noise**2).mean() < high
    assert lattice.noise_deviation(5) == pytest.approx(0.8 * 0.25, rel=1.1e-3)
    steps = released / lattice.granularity
    assert (steps == np.rint(steps)).all()


def test_sums_are_right_as_long_as_they_fit_and_wrap_beyond() -> None:
    lattice = lattice_of(dimension=3)
    parts = [np.array([2**30, -(2**30), 5]), np.array([2**30 - 1, -(2**30), -9])]
    given = added([part.astype(np.uint32) for part in parts])
    decoded = lattice.decode(given)
    assert (decoded / lattice.granularity).tolist() == [2**31 - 1, -(2**31), -4]
    assert lattice.fill(decoded) == 1.0
    beyond = lattice.decode(given + np.array([1, 0, 0], dtype=np.uint32))
    assert beyond[0] / lattice.granularity == -(2**31)
    assert lattice.fill(lattice.decode(np.array([1, 2, 2**29], dtype=np.uint32))) == 0.25


@pytest.mark.parametrize("worst_mean", [1.0, 0.25])
def test_at_the_limit_all_units_in_one_coordinate_still_fit(worst_mean: float) -> None:
    """The largest expected_units that is allowed, half as many again drawn, all clients' noise: no wrap."""
    low, high = 1.0, 1e9
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        try:
            lattice_of(expected_units=middle, worst_mean=worst_mean)
            low = middle
        except ConfigError:
            high = middle
    assert low > 1000
    lattice = lattice_of(expected_units=low, worst_mean=worst_mean)
    drawn = low + 9 * math.sqrt(low)
    given = []
    for client in range(7):
        total = torch.zeros(1000, dtype=torch.float64)
        total[0], total[1] = drawn / 7 * worst_mean, -drawn / 7 * worst_mean
        given.append(lattice.add_noise_share(total, keyed("limit", client)))
    released = lattice.decode(added(given))
    assert released[:2] == pytest.approx([drawn * worst_mean, -drawn * worst_mean], abs=12.0)
    assert 0.9 < lattice.fill(released) < 1


@pytest.mark.parametrize("expected", [0.5, 5.0, 60.0, 3000.0])
def test_hardly_ever_are_more_units_drawn_than_counted_on(expected: float) -> None:
    for units in (math.ceil(expected), 10 * math.ceil(expected), 10**6):
        assert stats.binom(units, expected / units).logsf(_most_units(expected) - 1e-9) <= -_CERTAINTY
    assert _most_units(expected) < 1.5 * expected + 100


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dimension": 0}, "dimension = 0"),
        ({"max_grad_norm": math.inf}, "max-grad-norm = inf"),
        ({"max_grad_norm": math.nan}, "max-grad-norm = nan"),
        ({"noise_multiplier": 0.0}, "noise-multiplier = 0"),
        ({"noise_multiplier": 1e-5}, "raise noise-multiplier"),
        ({"shares": 0}, "noise shares = 0"),
        ({"shares": 8}, "8 noise shares of 7 clients"),
        ({"expected_units": 0.0}, "expected units = 0"),
        ({"worst_mean": 1.5}, "worst mean 1.5"),
        ({"expected_units": 1e5}, "lower sample-rate"),
        ({"noise_multiplier": 1e4}, "lower sample-rate"),
        ({"dimension": 10**13}, "lower sample-rate"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_with_a_remedy(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        lattice_of(**changes)


def test_noise_that_fits_the_range_fits_the_sampler() -> None:
    high = 1.0
    while True:
        try:
            lattice = lattice_of(noise_multiplier=high, shares=1, clients=1)
        except ConfigError:
            break
        assert 1 <= lattice.share_deviation <= LARGEST_DEVIATION
        high *= 1.1
    assert lattice.share_deviation > LARGEST_DEVIATION / 10


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e30])
def test_values_that_cannot_be_rounded_are_refused_before_any_noise(wrong: float) -> None:
    total = torch.zeros(1000)
    total[500] = wrong
    with pytest.raises(PrivacyError, match="not finite"):
        lattice_of().add_noise_share(total, Untouchable())
    with pytest.raises(PrivacyError, match="shape"):
        lattice_of().add_noise_share(torch.zeros(999), Untouchable())


def test_only_a_sum_is_decoded() -> None:
    for wrong in (np.zeros(999, dtype=np.uint32), np.zeros(1000, dtype=np.int64)):
        with pytest.raises(ValueError, match="a sum is uint32"):
            lattice_of().decode(wrong)
