"""Noise and sampling: the right distributions, and no way to make them repeat."""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

import client.app
from common.config import flat_fields
from common.messages import DiscriminatorUpdate
from common.models.flat import get_flat
from common.privacy.randomness import LATTICE_BITS, SecureRandom, add_gaussian_noise
from server.checkpoint import CoordinatorState
from simulations.engine import InProcessGrid
from tests.support import RUN_ID, ask, gradient_instructions, keyed, node_configs, random_faces, tiny_config

# The keys below are fixed, so these tests pass or fail for good; the level says how odd a stream may look.
LEVEL = 1e-3


def test_words_are_the_cipher_s_stream() -> None:
    key = bytes(range(32))
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(80))
    random = SecureRandom(key)
    got = np.concatenate([random.words(3), random.words(7)])
    assert got.tobytes() == stream


def test_uniform_is_uniform_and_never_0_or_1() -> None:
    drawn = keyed("uniform").uniform(200_000)
    assert stats.kstest(drawn, "uniform").pvalue > LEVEL
    assert 0 < drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    extremes = SecureRandom()
    extremes.words = lambda count: np.array([0, 2**64 - 1] * count, dtype=np.uint64)[:count]  # type: ignore[method-assign]
    low, high = extremes.uniform(2)
    assert 0 < low < high < 1
    assert bool(torch.isfinite(extremes.gaussian(1000)).all())


@pytest.mark.parametrize("count", [1, 2, 99_999, 400_000])
def test_gaussian_is_standard_normal(count: int) -> None:
    drawn = keyed("gaussian", count).gaussian(count).numpy()
    assert drawn.shape == (count,)
    assert drawn.dtype == np.float64
    if count < 1000:
        return
    assert stats.kstest(drawn, "norm").pvalue > LEVEL
    assert stats.kstest(np.abs(drawn), "halfnorm").pvalue > LEVEL
    # Variance: (n - 1) s^2 is chi-square.
    low, high = stats.chi2(count - 1).ppf([LEVEL / 2, 1 - LEVEL / 2]) / (count - 1)
    assert low < drawn.var(ddof=1) < high
    assert abs(stats.skew(drawn)) < 4 * math.sqrt(6 / count)
    assert abs(stats.kurtosis(drawn)) < 4 * math.sqrt(24 / count)


def test_gaussian_has_its_tails() -> None:
    """Counts beyond 3 and 4 standard deviations in two million draws, and values well beyond what float32 can reach."""
    count = 2_000_000
    drawn = keyed("tails").gaussian(count).abs()
    for bound in (3.0, 4.0):
        expected = count * 2 * stats.norm.sf(bound)
        assert abs(int((drawn > bound).sum()) - expected) < 4 * math.sqrt(expected)
    assert drawn.max() > 4.9


def test_gaussian_is_independent_within_and_between_calls() -> None:
    """The two of a Box-Muller pair, neighbours, and two calls have no correlation, nor have their squares."""
    random = keyed("pairs")
    first, second = random.gaussian(200_000).numpy(), random.gaussian(200_000).numpy()
    half = len(first) // 2
    for left, right in ((first[:half], first[half:]), (first[:-1], first[1:]), (first, second)):
        for a, b in ((left, right), (left**2, right**2)):
            assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.5, 0.97])
def test_poisson_sampling_draws_each_unit_at_the_rate(rate: float) -> None:
    random, rounds, units = keyed("poisson", rate), 2000, 300
    counts, sizes = np.zeros(units), []
    for _ in range(rounds):
        drawn = random.poisson_sample(units, rate)
        assert np.all(np.diff(drawn) > 0)
        counts[drawn] += 1
        sizes.append(len(drawn))
    variance = rounds * rate * (1 - rate)
    assert abs(counts.sum() - units * rounds * rate) < 4 * math.sqrt(units * variance)
    # Each unit's count is binomial: their spread is that of a chi-square, so no unit is favoured.
    assert stats.chi2(units).sf(((counts - rounds * rate) ** 2).sum() / variance) > LEVEL
    # The batch size is binomial too, and not fixed.
    assert np.var(sizes) == pytest.approx(units * rate * (1 - rate), rel=0.2)


def test_poisson_sampling_at_its_ends() -> None:
    random = SecureRandom()
    assert random.poisson_sample(1000, 1.0).tolist() == list(range(1000))
    assert len(random.poisson_sample(0, 0.5)) == 0
    assert random.poisson_sample(1000, 1e-300).tolist() == []


def test_choose_takes_every_subset_equally_often() -> None:
    random, items = keyed("choose"), np.array([10, 20, 30, 40, 50])
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(5000):
        chosen = tuple(random.choose(items, 2).tolist())
        assert len(set(chosen)) == 2
        seen[chosen] = seen.get(chosen, 0) + 1
    assert len(seen) == 20  # ordered pairs
    assert stats.chisquare(list(seen.values())).pvalue > LEVEL
    assert random.choose(items, 5).tolist() == items.tolist()
    assert random.choose(items, 9).tolist() == items.tolist()


def test_two_streams_differ_and_so_do_two_calls() -> None:
    one, other = SecureRandom(), SecureRandom()
    first = one.gaussian(1000)
    assert not bool((first == other.gaussian(1000)).any())
    assert not bool((first == one.gaussian(1000)).any())


@pytest.mark.parametrize("deviation", [1e-3, 0.7, 1.0, 3.3, 4096.0])
def test_noise_has_its_deviation_and_lies_on_a_lattice(deviation: float) -> None:
    count = 100_000
    total = torch.linspace(-3, 3, count) * deviation
    released = add_gaussian_noise(total, deviation, keyed("noise", deviation))
    assert released.dtype == torch.float32
    noise = (released.double() - total.double()).numpy() / deviation
    assert stats.kstest(noise, "norm").pvalue > LEVEL
    low, high = stats.chi2(count).ppf([LEVEL / 2, 1 - LEVEL / 2]) / count
    assert low < (noise**2).mean() < high
    step = 2.0 ** (math.floor(math.log2(deviation)) - LATTICE_BITS)
    assert deviation / 2 ** (LATTICE_BITS + 1) < step <= deviation / 2**LATTICE_BITS
    steps = released.double() / step
    assert torch.equal(steps, steps.round())
    # Low bits are the lattice's: all residues come up, whatever the sum was.
    assert len(torch.unique(steps.to(torch.int64) % 8)) == 8


def test_the_low_bits_of_the_sum_do_not_come_through() -> None:
    """The same noise on two sums that differ below the lattice gives the same release nearly everywhere."""
    total = torch.zeros(10_000, dtype=torch.float64)
    first = add_gaussian_noise(total, 1.0, keyed("bits"))
    second = add_gaussian_noise(total + 2.0**-40, 1.0, keyed("bits"))
    assert int((first != second).sum()) <= 2
    assert int((first != add_gaussian_noise(total + 2.0**-10, 1.0, keyed("bits"))).sum()) > 9_000


@pytest.mark.parametrize("deviation", [0.0, -1.0, float("nan")])
def test_no_noise_is_an_error(deviation: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        add_gaussian_noise(torch.zeros(3), deviation, SecureRandom())


def test_only_a_test_can_hand_in_a_key() -> None:
    """No option names a key, and no module of ours but this one's tests passes one."""
    assert not [key for key in flat_fields() if "key" in key]
    helps = {key: text for key, (_, _, text) in flat_fields().items() if "seed" in key}
    assert set(helps) == {"seed", "feature-seed"}
    root = Path(inspect.getfile(client.app)).parents[1]
    for package in ("client", "common", "server", "simulations"):
        for path in (root / package).rglob("*.py"):
            for line in path.read_text().splitlines():
                if "SecureRandom(" in line:
                    assert "SecureRandom()" in line or "class SecureRandom" in line, f"{path}: {line}"


def test_the_shipped_client_never_repeats_its_noise(tmp_path: Path) -> None:
    """Two clients with the same faces, and two runs of the same instructions, give different noise each time."""
    config = tiny_config(privacy_model="local", sample_rate=1.0, noise_multiplier=20.0, epsilon=1e3)
    weights = get_flat(CoordinatorState.fresh(config, RUN_ID).discriminator)
    shares = [random_faces(3, 2)] * 2
    vectors = []
    for repeat in range(2):
        grid = InProcessGrid(client.app.app, node_configs(tmp_path / str(repeat), config, shares))
        instructions = gradient_instructions(config, weights)
        for reply in ask(grid, instructions):
            vectors.append(DiscriminatorUpdate.from_record(reply.content, instructions, len(weights)).vector)
    assert len(vectors) == 4
    for i, left in enumerate(vectors):
        for right in vectors[:i]:
            assert np.mean(left == right) < 0.01
            difference = (left - right) / (20.0 * math.sqrt(2))
            assert stats.kstest(difference, "norm").pvalue > 1e-9
