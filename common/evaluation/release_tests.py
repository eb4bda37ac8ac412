"""Is what was released what the mechanism claims? Tests of noise, of drawn units, and of what one unit adds.

A release of the claimed mechanism is sum_i b_i c_i + Z: unit i is drawn (b_i = 1) with probability q, independently of
all else; c_i is its clipped contribution, at most C long; Z is N(0, (sigma C)^2) in every coordinate, fresh for every
release. Each test below has the exact or asymptotic law of its figure under that claim, and returns a p-value, already
corrected for the many places that it looked at (Bonferroni). `alarms` corrects once more for the number of tests, so that
all of them together raise a false alarm with probability FALSE_ALARMS at most, up to the error of the asymptotic laws.

What they can see. With n noise values in all, the standard error of the measured standard deviation is 1 / sqrt(2 n) of
it; an alarm needs about 6.5 standard errors at 100 tests. n = 2,000,000, 32 releases of a network of 65,000 parameters,
sees noise that is 0.33 % off, and misses noise that is 2 % off with a probability below 1e-100. A parameter tensor of m
values whose noise has less than a tenth of its standard deviation in v releases is seen from m v = 20 on. Noise that is
used twice, or a fraction rho of it, is a correlation of rho: seen from rho = 8 / sqrt(d), d up to 65,536. A contribution measured with
standard error s C is seen to differ by 6.5 s C. Of N draws, a rate that is off by 6.5 sqrt((1 - q) / (q N)) of itself is
seen, and so is a variance of the drawn number that is 0 instead of K q (1 - q) from some 20 releases on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import fft, signal, stats

FALSE_ALARMS = 1e-6
# Coordinates of each release that are compared with other releases; enough for correlations of 3 %.
_COMPARED = 65536


@dataclass(frozen=True)
class ReleaseTest:
    """One test. observed and expected: its figure, and that figure under the claim. p_value: corrected within the test."""

    name: str
    p_value: float
    observed: float
    expected: float


def alarms(tests: Sequence[ReleaseTest]) -> list[ReleaseTest]:
    """The tests that the claim fails, the surest first."""
    return sorted((t for t in tests if not t.p_value >= FALSE_ALARMS / len(tests)), key=lambda t: t.p_value)


def exact_test(name: str, observed: float, expected: float) -> ReleaseTest:
    """Of a figure that chance does not move."""
    return ReleaseTest(name, 1.0 if observed == expected else 0.0, observed, expected)


def noise_tests(name: str, noise: np.ndarray, layers: Sequence[int]) -> list[ReleaseTest]:
    """Whether `noise` (R, d) is standard normal and independent: across releases, layers, coordinates.

    noise: what is left of R releases without their signal, over sigma C. layers: the sizes of the parameter tensors, in
    order, which add up to d.
    """
    releases, dimension = noise.shape
    squares = np.square(noise, dtype=np.float64)
    of_release = squares.sum(1)
    bounds = np.concatenate([[0], np.cumsum(layers)])
    of_layer = np.add.reduceat(squares.sum(0), bounds[:-1])
    means = np.add.reduceat(noise.astype(np.float64), bounds[:-1], axis=1) / np.sqrt(layers)
    sums = means.sum(0) / math.sqrt(releases)
    totals = noise.sum(1, dtype=np.float64) / math.sqrt(dimension)
    of_coordinate = squares.sum(0)
    total = float(of_release.sum())
    return [
        ReleaseTest(f"{name}: scale", float(_chi_square(total, noise.size)), math.sqrt(total / noise.size), 1.0),
        _worst(
            f"{name}: scale of each release",
            of_release / dimension,
            _chi_square(of_release, np.full(releases, dimension)),
        ),
        _worst(
            f"{name}: scale of each layer",
            of_layer / (releases * np.asarray(layers)),
            _chi_square(of_layer, releases * np.asarray(layers)),
        ),
        _worst(f"{name}: scale of each coordinate", of_coordinate / releases, _chi_square(of_coordinate, releases)),
        _worst(f"{name}: mean of each layer", sums, _two_sided(sums), 0.0),
        # Also too little: noise without a mean releases the mean.
        _worst(
            f"{name}: spread of the means of layers",
            np.square(means).sum(0) / releases,
            _chi_square(np.square(means).sum(0), np.full(len(layers), releases)),
        ),
        direction_test(f"{name}: along the sum of coordinates", totals),
        *_shape_tests(name, noise),
        _lag_test(f"{name}: coordinates of one release", noise, noise),
        *independence_tests(name, noise),
    ]


def independence_tests(name: str, noise: np.ndarray) -> list[ReleaseTest]:
    """Whether releases share noise: in the same coordinates (every pair), or shifted (each with the next)."""
    releases, dimension = noise.shape
    if releases < 2:
        return []
    compared = np.random.default_rng(0).choice(dimension, min(dimension, _COMPARED), replace=False)
    some = noise[:, np.sort(compared)].astype(np.float32)
    pairs = (some @ some.T)[np.triu_indices(releases, 1)] / math.sqrt(some.shape[1])
    return [
        _worst(f"{name}: pairs of releases", pairs, _two_sided(pairs), 0.0),
        _lag_test(f"{name}: each release and the next, shifted", noise[:-1], noise[1:]),
    ]


def contribution_tests(name: str, coefficients: np.ndarray, drawn: np.ndarray, errors: np.ndarray) -> list[ReleaseTest]:
    """Whether every unit added its clipped contribution: once where it was drawn, and nothing where not.

    coefficients (R, K): of each unit's contribution in each release. drawn: the same as bool. errors (K,): the standard
    errors of the coefficients, from the noise alone. The `most of one unit` is one-sided: what the privacy rests on.
    """
    z = (coefficients - drawn) / errors
    worst = _worst(f"{name}: of each unit in each release", z, _two_sided(z), 0.0)
    counts = drawn.sum(0)
    seen = counts > 0
    if not seen.any():
        return [worst]
    means = (coefficients * drawn).sum(0)[seen] / counts[seen]
    weights = counts[seen] / errors[seen] ** 2
    pooled = float(np.average(means, weights=weights))
    z = (means - 1) * np.sqrt(counts[seen]) / errors[seen]
    p = stats.norm.sf(z)
    most = int(means.argmax())
    return [
        worst,
        ReleaseTest(f"{name}: of all units", float(_two_sided((pooled - 1) * math.sqrt(weights.sum()))), pooled, 1.0),
        _worst(f"{name}: of each unit on average", means, _two_sided(z)),
        ReleaseTest(f"{name}: most of one unit", min(1.0, float(p.min()) * len(p)), float(means[most]), 1.0),
    ]


def direction_test(name: str, along: np.ndarray) -> ReleaseTest:
    """Of noise along one known direction in each release, (R,): neither more nor less than elsewhere."""
    total = float(np.square(along, dtype=np.float64).sum())
    return ReleaseTest(name, float(_chi_square(total, len(along))), math.sqrt(total / max(len(along), 1)), 1.0)


def norm_test(name: str, norms: Sequence[float], noise: float, dimension: int) -> ReleaseTest:
    """Whether releases of one unit alone can hold a contribution of at most 1 (one-sided). norms: of releases of this
    `noise` in each of `dimension` coordinates. What is told is the contribution's norm."""
    total = float(np.square(norms).sum())
    count = len(norms)
    p = float(stats.ncx2.sf(total / noise**2, count * dimension, count / noise**2)) if count else 0.0
    told = math.sqrt(max(total / max(count, 1) - dimension * noise**2, 0.0))
    return ReleaseTest(name, p, told, 1.0)


def deviation_test(name: str, z: np.ndarray) -> ReleaseTest:
    """Whether figures are as known: `z`, any shape, is then standard normal. Each alone, and their mean."""
    worst = _worst(name, z, _two_sided(z), 0.0)
    mean = float(_two_sided(z.mean() * math.sqrt(z.size)))
    return ReleaseTest(name, min(1.0, 2 * min(worst.p_value, mean)), worst.observed, 0.0)


def rate_test(name: str, successes: int, trials: int, chance: float) -> ReleaseTest:
    """Whether so many of independent trials succeed with this chance: exact, two-sided."""
    p = float(_binomial(min(max(successes, 0), trials), trials, chance))
    return ReleaseTest(name, p, successes / max(trials, 1), chance)


def signal_test(name: str, whitened: np.ndarray) -> ReleaseTest:
    """Whether the mean of all releases is the known one along the units' directions; `whitened` (K,) is then normal."""
    total = float(np.square(whitened).sum())
    p = np.minimum(_chi_square(total, len(whitened)), len(whitened) * _two_sided(np.abs(whitened).max()))
    return ReleaseTest(name, min(1.0, 2 * float(p)), math.sqrt(total / len(whitened)), 1.0)


def sampler_tests(name: str, drawn: np.ndarray, sample_rate: float) -> list[ReleaseTest]:
    """Whether `drawn` (R, K) bool are independent draws of probability `sample_rate`: Poisson sampling."""
    releases, units = drawn.shape
    total, per_unit, per_release = int(drawn.sum()), drawn.sum(0), drawn.sum(1)
    empty, none_drawn = int((per_release == 0).sum()), (1 - sample_rate) ** units
    # Neighbouring releases in disjoint pairs: of one that was drawn it must not be known whether it is drawn next.
    pairs = releases // 2
    again = int((drawn[0 : 2 * pairs : 2] & drawn[1 : 2 * pairs : 2]).sum())
    return [
        rate_test(f"{name}: rate", total, drawn.size, sample_rate),
        _worst(
            f"{name}: rate of each unit", per_unit / releases, _binomial(per_unit, releases, sample_rate), sample_rate
        ),
        _spread_test(f"{name}: spread of the number drawn", per_release, units, sample_rate),
        rate_test(f"{name}: releases in which nobody is drawn", empty, releases, none_drawn),
        rate_test(f"{name}: drawn twice in a row", again, pairs * units, sample_rate**2),
    ]


def same_draws_test(name: str, drawn: np.ndarray, others: np.ndarray, sample_rate: float) -> ReleaseTest:
    """Whether two sets of draws (R, K) agree more, or less, than independent ones."""
    agree = int((drawn == others).sum())
    chance = sample_rate**2 + (1 - sample_rate) ** 2
    return rate_test(name, agree, drawn.size, chance)


def _shape_tests(name: str, noise: np.ndarray) -> list[ReleaseTest]:
    flat = noise.reshape(-1)
    some = flat[:: max(1, len(flat) // 2**18)].astype(np.float64)
    distance = stats.kstest(some, "norm", method="asymp")
    largest = float(np.abs(flat).max())
    fourth = float(np.mean(np.square(np.square(flat, dtype=np.float64)))) - 3.0
    third = float(np.mean(flat.astype(np.float64) ** 3))
    return [
        ReleaseTest(f"{name}: normal distribution", float(distance.pvalue), float(distance.statistic), 0.0),
        # The variances of z^3 and z^4 are 15 and 96.
        ReleaseTest(f"{name}: skewness", float(_two_sided(third / math.sqrt(15 / len(flat)))), third, 0.0),
        ReleaseTest(f"{name}: fourth moment", float(_two_sided(fourth / math.sqrt(96 / len(flat)))), fourth + 3, 3.0),
        ReleaseTest(
            f"{name}: largest value", _extreme(largest, len(flat)), largest, float(stats.norm.isf(0.5 / len(flat)))
        ),
    ]


def _extreme(largest: float, count: int) -> float:
    """Of the largest of |z| of so many: too large, or too small, as where tails are cut."""
    tail = float(_two_sided(largest))
    return min(1.0, 2 * min(-math.expm1(count * math.log1p(-tail)), math.exp(count * math.log1p(-tail))))


def _lag_test(name: str, first: np.ndarray, second: np.ndarray) -> ReleaseTest:
    """Of the correlations of two rows at every circular lag but 0, over all rows."""
    dimension, worst, count = first.shape[1], 0.0, 0
    for a, b in zip(first, second, strict=True):
        spectrum = fft.rfft(a.astype(np.float64)) * np.conj(fft.rfft(b.astype(np.float64)))
        lags = fft.irfft(spectrum, dimension)[1:] / math.sqrt(dimension)
        worst, count = max(worst, float(np.abs(lags).max(initial=0.0))), count + len(lags)
    return ReleaseTest(name, min(1.0, count * float(_two_sided(worst))), worst, 0.0)


def _spread_test(name: str, numbers: np.ndarray, units: int, sample_rate: float) -> ReleaseTest:
    """Of sum (n - c)^2 over the releases, c the whole number next to the mean, against its exact law."""
    middle = round(units * sample_rate)
    values = np.arange(units + 1)
    law_of_one = np.bincount((values - middle) ** 2, weights=stats.binom.pmf(values, units, sample_rate))
    law, power, left = np.ones(1), law_of_one, len(numbers)
    while left:
        if left & 1:
            law = np.clip(signal.fftconvolve(law, power), 0, None)
        left >>= 1
        if left:
            power = np.clip(signal.fftconvolve(power, power), 0, None)
    observed = int(((numbers - middle) ** 2).sum())
    p = 2 * min(law[: observed + 1].sum(), law[observed:].sum()) + 1e-13  # the transform's own error
    return ReleaseTest(
        name, min(1.0, float(p)), observed / len(numbers), float(law_of_one @ np.arange(len(law_of_one)))
    )


def _worst(name: str, figures: np.ndarray, p_values: np.ndarray, expected: float = 1.0) -> ReleaseTest:
    figures, p_values = np.asarray(figures).reshape(-1), np.asarray(p_values).reshape(-1)
    worst = int(p_values.argmin())
    return ReleaseTest(name, min(1.0, float(p_values[worst]) * len(p_values)), float(figures[worst]), expected)


def _chi_square(sums: float | np.ndarray, degrees: float | np.ndarray) -> np.ndarray:
    return np.asarray(2 * np.minimum(stats.chi2.sf(sums, degrees), stats.chi2.cdf(sums, degrees)))


def _two_sided(z: float | np.ndarray) -> np.ndarray:
    return np.asarray(2 * stats.norm.sf(np.abs(z)))


def _binomial(successes: int | np.ndarray, trials: int, chance: float) -> np.ndarray:
    law = stats.binom(trials, chance)
    return np.asarray(np.minimum(1.0, 2 * np.minimum(law.cdf(successes), law.sf(np.asarray(successes) - 1))))
