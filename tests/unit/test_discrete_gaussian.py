"""The discrete Gaussian: its law, and that floats never decide where they could be wrong."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from scipy import stats

from common.privacy import discrete_gaussian as module
from common.privacy.discrete_gaussian import discrete_gaussian
from common.privacy.randomness import SecureRandom
from tests.support import keyed

# Keys are fixed, so these tests pass or fail for good.
LEVEL = 1e-3


class Scripted(SecureRandom):
    """Gives these words and no others."""

    def __init__(self, words: list[int]) -> None:
        super().__init__()
        self.left = words

    def words(self, count: int) -> np.ndarray:
        assert len(self.left) >= count, "asked for more words than it should need"
        given, self.left = self.left[:count], self.left[count:]
        return np.array(given, dtype=np.uint64)


def proposal(deviation: float, halvings: int, offset: int, *, negative: bool = False) -> int:
    """The last word that proposes v = `halvings`, u = `offset`, and this sign."""
    width = math.ceil(module._WIDTH * deviation)
    low = ((offset + 1) * 2**32 - 1) // width
    assert low * width >> 32 == offset
    return low | negative << 32 | (1 << halvings << 33 if halvings < 31 else 0)


def threshold(deviation: float, halvings: int, size: int, bits: int) -> int:
    """floor(2^bits 2^v exp(-y^2 / (2 s^2))), with 400 digits."""
    with localcontext(prec=400):
        s = Decimal(deviation)
        return int((-(Decimal(size) ** 2) / (2 * s * s)).exp() * 2 ** (halvings + bits))


@pytest.mark.parametrize("deviation", [1.0, 1.0001, 1.7, 2.5, 7.25, 30.0])
def test_it_has_the_law(deviation: float) -> None:
    drawn = discrete_gaussian(400_000, deviation, keyed("law", deviation))
    values = np.arange(-60 * math.ceil(deviation), 60 * math.ceil(deviation) + 1)
    law = np.exp(-(values**2) / (2 * deviation**2))
    expected = law / law.sum() * len(drawn)
    seen = np.bincount(drawn - values[0], minlength=len(values))
    usual = expected > 10
    rest = (seen[~usual].sum(), expected[~usual].sum())
    assert stats.chisquare([*seen[usual], rest[0]], [*expected[usual], rest[1]]).pvalue > LEVEL


@pytest.mark.parametrize("deviation", [900.5, 1e4, 1e7, 2.0**28])
def test_at_large_deviations_it_is_nearly_normal(deviation: float) -> None:
    count = 400_000
    drawn = discrete_gaussian(count, deviation, keyed("large", deviation))
    assert drawn.dtype == np.int64
    assert drawn.shape == (count,)
    jitter = np.random.default_rng(0).uniform(-0.5, 0.5, count)
    assert stats.kstest((drawn + jitter) / deviation, "norm").pvalue > LEVEL
    assert stats.kstest(np.abs(drawn + jitter) / deviation, "halfnorm").pvalue > LEVEL
    low, high = stats.chi2(count).ppf([LEVEL / 2, 1 - LEVEL / 2]) / count
    assert low < ((drawn / deviation) ** 2).mean() < high
    assert abs(stats.skew(drawn)) < 4 * math.sqrt(6 / count)
    assert abs(stats.kurtosis(drawn)) < 4 * math.sqrt(24 / count)
    # The low bits are uniform: all residues come up as often.
    assert stats.chisquare(np.bincount(drawn % 64, minlength=64)).pvalue > LEVEL
    assert stats.chisquare(np.bincount(drawn % 7, minlength=7)).pvalue > LEVEL


def test_it_has_its_tails() -> None:
    count, deviation = 3_000_000, 1e5
    size = np.abs(discrete_gaussian(count, deviation, keyed("tails"))) / deviation
    # At 1.1775 and 2.355 the proposals change.
    for bound in (0.5, 1.1775, 2.0, 2.355, 3.0, 3.5325, 4.0, 4.5):
        expected = count * 2 * stats.norm.sf(bound)
        assert abs(int((size > bound).sum()) - expected) < 4 * math.sqrt(expected)
    assert size.max() > 5.0


def test_draws_are_independent_within_and_between_calls() -> None:
    random = keyed("independent")
    first, second = (discrete_gaussian(200_000, 50.0, random).astype(float) for _ in range(2))
    for left, right in ((first[:-1], first[1:]), (first[:-2], first[2:]), (first, second)):
        for a, b in ((left, right), (left**2, right**2), (np.sign(left), np.abs(right)), (left % 2, right % 2)):
            assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))


@pytest.mark.parametrize("count", [0, 1, 5, module._BLOCK + 1])
def test_it_draws_as_many_as_asked(count: int) -> None:
    assert discrete_gaussian(count, 3.0, SecureRandom()).shape == (count,)


@pytest.mark.parametrize("deviation", [0.0, -1.0, 0.99, 2.0**28 * 1.01, math.inf, math.nan])
def test_deviations_for_which_nothing_is_proven_are_refused(deviation: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        discrete_gaussian(3, deviation, SecureRandom())


@pytest.mark.parametrize("deviation", [1.0, 3.7, 1e4, 1e7 / 3, 2.0**28])
def test_floats_decide_as_exact_arithmetic_does(deviation: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words, every proposal decided exactly: the same draws."""
    quick = discrete_gaussian(1500, deviation, keyed("exact", deviation))
    monkeypatch.setattr(module, "_MARGIN", 2.0)
    np.testing.assert_array_equal(discrete_gaussian(1500, deviation, keyed("exact", deviation)), quick)


def test_the_exponential_is_as_good_as_the_margin_takes_it_to_be() -> None:
    exponents = -np.random.default_rng(0).uniform(0, 40, 5000)
    exponents[:8] = [0.0, -1e-12, -1.0, -math.log(2), -22.18, -1e-300, -(2.0**-40), -39.9]
    with localcontext(prec=40):
        for exponent, found in zip(exponents.tolist(), np.exp(exponents).tolist(), strict=True):
            true = Decimal(exponent).exp()
            assert abs(Decimal(found) - true) < true * Decimal(2) ** -50


@pytest.mark.parametrize("deviation", [1.0, 2.3, 1e5 / 7, 2.0**28])
@pytest.mark.parametrize("halvings", [0, 1, 2, 5])
def test_a_proposal_is_accepted_with_exactly_its_probability(deviation: float, halvings: int) -> None:
    """To the last bit of the word, for which floats are far too coarse, and beyond it."""
    width = math.ceil(module._WIDTH * deviation)
    for offset in {0, 1, width // 2, width - 1}:
        size = halvings * width + offset
        if size == 0:
            continue
        edge = threshold(deviation, halvings, size, 64)
        deep = threshold(deviation, halvings, size, 128) - (edge << 64)
        word = proposal(deviation, halvings, offset)
        for fraction, further, expected in (
            (edge - 1, [], True),
            (edge + 1, [], False),
            (edge, [deep - 1], True),
            (edge, [deep + 1], False),
        ):
            if fraction >= 0:
                random = Scripted([word, fraction, *further])
                assert module._accepted(1, deviation, random).tolist() == [size] * expected
                assert not random.left


def test_a_comparison_that_stays_undecided_takes_more_and_more_bits() -> None:
    """R differs from the probability in its 1024th bit only."""
    deviation, halvings, size = 5.0, 1, 9
    exact = threshold(deviation, halvings, size, 1024)
    for change, expected in ((-1, True), (1, False)):
        words = [(exact + change >> 64 * place) & (2**64 - 1) for place in range(15, -1, -1)]
        random = Scripted(words[1:])
        assert module._exactly_accepted(size, halvings, deviation, words[0], random) is expected
        assert not random.left


def test_the_far_tail_can_be_reached() -> None:
    """v >= 31 takes a second word; R must then begin with thousands of zeros."""
    size = (31 + 3) * 2 + 1
    zeros = math.floor(size**2 / 2 / math.log(2)) - 34
    assert 2048 < zeros < 4096 - 64
    last = proposal(1.0, 31, 1, negative=True)
    random = Scripted([last, 0, 8, *[0] * 63])
    assert module._accepted(1, 1.0, random).tolist() == [-size]
    assert not random.left
    assert module._accepted(1, 1.0, Scripted([last, 0, 8, *[0] * (zeros // 64 - 2), *[2**64 - 1] * 33])).tolist() == []
    assert module._zeros_before_one(Scripted([0, 0, 2**63])) == 191


def test_every_offset_has_as_many_words() -> None:
    """At the largest width 2^32 words do not go round evenly: those in excess are refused."""
    deviation = 2.0**28
    width = math.ceil(module._WIDTH * deviation)
    assert 13 < 2**32 / width < 14
    for offset in (1, 2, 3, 1000, width // 3, width // 2, width - 2, width - 1):
        low = range(-(-offset * 2**32 // width), -(-(offset + 1) * 2**32 // width))
        words = [w | 1 << 33 for w in low]
        got = module._accepted(len(words), deviation, Scripted([*words, *[0] * len(words)])).tolist()
        assert got == [offset] * 13


def test_zero_is_counted_once() -> None:
    zero, minus_zero = proposal(4.0, 0, 0), proposal(4.0, 0, 0, negative=True)
    assert module._accepted(2, 4.0, Scripted([zero, minus_zero, 7, 7])).tolist() == [0]
