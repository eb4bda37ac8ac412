"""The one-run bound against the theorem written out, and against mechanisms whose epsilon is known."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import binom, norm
from torch import Tensor, nn

from common.errors import DataError
from common.evaluation.one_run import bound_of_scores, epsilon_bound, log_ratios, p_value, unit_gradients
from common.models.discriminators import build_discriminator
from common.models.losses import LOSSES


def theorem(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Steinke et al. 2023, theorem 5.2, term by term."""
    weight = binom.pmf(np.arange(guesses + 1), guesses, math.exp(epsilon) / (1 + math.exp(epsilon)))
    beta = sum(weight[correct:])
    alpha = max((2 / i * sum(weight[correct - i : correct]) for i in range(1, correct + 1)), default=0.0)
    return min(1.0, beta + alpha * canaries * delta)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3, 0.02])
def test_p_value_is_the_theorem_s(epsilon: float, delta: float) -> None:
    canaries = 25
    for guesses in (0, 1, 7, 25):
        for correct in range(guesses + 1):
            found = p_value(correct, guesses, canaries, epsilon, delta)
            assert found == pytest.approx(theorem(correct, guesses, canaries, epsilon, delta), rel=1e-9, abs=1e-14)


def test_p_value_for_a_large_delta_is_above_the_theorem_s_and_still_rises() -> None:
    canaries, delta = 200, 0.05  # 2 m delta = 20
    grid = np.linspace(0, 6, 20)
    for guesses, correct in ((200, 200), (200, 190), (60, 58), (60, 30)):
        found = [p_value(correct, guesses, canaries, epsilon, delta) for epsilon in grid]
        assert np.all(np.diff(found) >= -1e-15)
        assert all(p >= theorem(correct, guesses, canaries, e, delta) - 1e-12 for p, e in zip(found, grid, strict=True))


def test_bound_is_where_the_p_value_crosses() -> None:
    for correct, guesses, canaries, delta in ((50, 60, 300, 1e-5), (60, 60, 300, 1e-3), (150, 200, 200, 0.0)):
        bound = epsilon_bound(correct, guesses, canaries, delta)
        exact = brentq(lambda e, c=correct, g=guesses, m=canaries, d=delta: theorem(c, g, m, e, d) - 0.05, 0, 20)
        assert exact - 2e-6 < bound <= exact + 1e-9


def test_bound_rises_with_what_was_right_and_falls_with_delta_and_confidence() -> None:
    bounds = [epsilon_bound(correct, 60, 300, 1e-5) for correct in range(61)]
    assert bounds == sorted(bounds)
    assert bounds[30] == 0.0 < bounds[45] < bounds[60]
    by_delta = [epsilon_bound(58, 60, 300, delta) for delta in (0.0, 1e-5, 1e-4, 1e-3, 0.1, 1.0)]
    assert by_delta == sorted(by_delta, reverse=True)
    assert by_delta[0] > by_delta[3]
    assert by_delta[-1] == 0.0
    assert epsilon_bound(58, 60, 300, 1e-5, 0.99) < epsilon_bound(58, 60, 300, 1e-5, 0.9)


def test_edges() -> None:
    assert p_value(0, 0, 10, 1.0, 1e-5) == 1.0
    assert epsilon_bound(0, 0, 10, 1e-5) == 0.0
    assert epsilon_bound(0, 10, 10, 0.0) == 0.0
    assert epsilon_bound(4, 4, 4, 0.0) == 0.0  # a sixteenth by chance alone
    # All right: (1 + exp(-epsilon))^-r = 0.05.
    exact = -math.log(0.05 ** (-1 / 300) - 1)
    assert epsilon_bound(300, 300, 300, 0.0) == pytest.approx(exact, abs=2e-6)
    assert p_value(20_000, 20_000, 100_000, 9.0, 1e-9) == pytest.approx(
        theorem_all_right(20_000, 100_000, 9.0, 1e-9), rel=1e-6
    )


def theorem_all_right(guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    right = 1 / (1 + math.exp(-epsilon))
    i = np.arange(1, guesses + 1)
    below = binom.cdf(guesses - 1, guesses, right) - binom.cdf(guesses - i - 1, guesses, right)
    return float(right**guesses + canaries * delta * (2 / i * below).max())


@pytest.mark.parametrize(
    ("correct", "guesses", "canaries", "epsilon", "delta"),
    [
        *((-1, 5, 10, 1, 0), (6, 5, 10, 1, 0), (5, 11, 10, 1, 0)),
        *((1, 5, 10, -1, 0), (1, 5, 10, math.inf, 0), (1, 5, 10, math.nan, 0)),
        *((1, 5, 10, 1, -0.1), (1, 5, 10, 1, 1.1), (1, 5, 10, 1, math.nan)),
    ],
)
def test_impossible_counts_are_refused(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> None:
    with pytest.raises(DataError):
        p_value(correct, guesses, canaries, epsilon, delta)


def test_scores_that_say_nothing_are_refused() -> None:
    coins = np.array([True, False, True])
    with pytest.raises(DataError, match="finite score"):
        bound_of_scores(np.array([1.0, math.nan, 0.0]), coins, 1e-5)
    with pytest.raises(DataError, match="finite score"):
        bound_of_scores(np.array([1.0, 0.0]), coins, 1e-5)
    with pytest.raises(DataError, match="finite score"):
        bound_of_scores(np.ones(3), np.ones(3), 1e-5)
    with pytest.raises(DataError, match="guessed_share"):
        bound_of_scores(np.ones(3), coins, 1e-5, guessed_share=0.0)
    with pytest.raises(DataError, match="confidence"):
        epsilon_bound(3, 3, 3, 1e-5, 1.0)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(("guesses", "delta"), [(80, 0.0), (200, 0.0), (200, 1e-3), (40, 0.01)])
def test_randomised_response_is_overrated_in_one_run_of_twenty_at_most(
    epsilon: float, guesses: int, delta: float
) -> None:
    # The worst (epsilon, delta)-DP answer to each coin by itself: the truth with probability delta, else randomised
    # response. What is right is binomial, so the share of runs is exact.
    right = delta + (1 - delta) / (1 + math.exp(-epsilon))
    too_high = [k for k in range(guesses + 1) if epsilon_bound(k, guesses, guesses, delta) > epsilon]
    share = sum(binom.pmf(k, guesses, right) for k in too_high)
    assert share <= 0.05
    if delta == 0.0:  # and no slack: one right guess fewer would be too many
        assert share + binom.pmf(min(too_high) - 1, guesses, right) > 0.05


def test_all_told_with_probability_delta_is_not_overrated() -> None:
    # (epsilon, delta)-DP too, and far from independent coin by coin.
    epsilon, delta, guesses = 0.5, 0.01, 100
    too_high = [k for k in range(guesses + 1) if epsilon_bound(k, guesses, guesses, delta) > epsilon]
    right = 1 / (1 + math.exp(-epsilon))
    assert delta + (1 - delta) * sum(binom.pmf(k, guesses, right) for k in too_high) <= 0.05


def gaussian_epsilon(noise: float, delta: float) -> float:
    """Balle and Wang 2018, theorem 8: the epsilon of the Gaussian mechanism of sensitivity 1."""

    def excess(epsilon: float) -> float:
        near, far = 1 / (2 * noise) - epsilon * noise, -1 / (2 * noise) - epsilon * noise
        return float(norm.cdf(near) - math.exp(epsilon) * norm.cdf(far)) - delta

    return float(brentq(excess, 0, 50))


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_a_one_dimensional_gaussian_mechanism_is_not_overrated(share: float) -> None:
    # At a large delta epsilon is small and guesses come near the bound.
    rng, delta, noise, canaries, runs = np.random.default_rng(0), 0.1, 1.0, 100, 400
    epsilon = gaussian_epsilon(noise, delta)
    bounds = []
    for _ in range(runs):
        coins = rng.random(canaries) < 0.5
        bounds.append(bound_of_scores(coins + noise * rng.standard_normal(canaries), coins, delta, share).epsilon)
    assert np.mean(np.array(bounds) > epsilon) <= 0.05
    # One sum of all of them, which says the same of each.
    for run in range(runs):
        coins = rng.random(canaries) < 0.5
        told = coins.sum() - canaries / 2 + noise * rng.standard_normal()
        bounds[run] = epsilon_bound(int(coins.sum() if told > 0 else (~coins).sum()), canaries, canaries, delta)
    assert np.mean(np.array(bounds) > epsilon) <= 0.05


def test_guessing_counts_the_ends_alone() -> None:
    scores = np.array([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 0.0])
    coins = np.zeros(10, dtype=np.bool_)
    coins[[0, 5]] = True  # the highest, and one in the middle
    found = bound_of_scores(scores, coins, 1e-5, guessed_share=0.2)
    assert (found.canaries, found.guesses, found.correct) == (10, 2, 2)
    found = bound_of_scores(scores, coins, 1e-5, guessed_share=0.45)  # 8, 9 in; 0, 1 out: an even number
    assert (found.guesses, found.correct) == (4, 3)


def naive_log_ratio(vectors: np.ndarray, total: np.ndarray, noise: float, rate: float, which: int) -> float:
    """Every set of canaries drawn, added up."""
    likelihood = {True: 0.0, False: 0.0}
    for drawn in np.ndindex(*[2] * len(vectors)):
        density = math.exp(-np.square(total - np.array(drawn) @ vectors).sum() / (2 * noise**2))
        for coin in (True, False):
            chances = [rate if i == which and coin else 0.0 if i == which else rate / 2 for i in range(len(vectors))]
            chance = math.prod(p if x else 1 - p for p, x in zip(chances, drawn, strict=True))
            likelihood[coin] += chance * density
    return math.log(likelihood[True] / likelihood[False])


def test_log_ratios_of_orthogonal_canaries_are_exact() -> None:
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((30, 5)))[0].T
    vectors, others = basis[:4] * np.array([[1.0], [0.7], [0.4], [0.0]]), basis[4:]
    total, noise, rate = rng.standard_normal(30), 0.6, 0.3
    found = ratios_of(vectors, others, total + 50 * others[0], noise, rate)
    exact = [naive_log_ratio(vectors, total - (total @ others[0]) * others[0], noise, rate, i) for i in range(4)]
    assert found == pytest.approx(exact, abs=1e-5)
    assert found[3] == pytest.approx(0.0, abs=1e-9)
    certain = ratios_of(vectors, others, total, noise, 1.0)
    exact = [naive_log_ratio(vectors, total - (total @ others[0]) * others[0], noise, 1.0, i) for i in range(4)]
    assert certain == pytest.approx(exact, abs=1e-5)


def test_log_ratios_of_several_steps_count_how_often_a_canary_was_drawn() -> None:
    vector, total, noise, rate = np.array([[1.0, 0.0]]), np.array([1.7, 0.3]), 0.5, 0.4
    others = np.array([[0.0, 1.0]])
    chances = [0.6**2, 2 * 0.6 * 0.4, 0.4**2]
    densities = [math.exp(-((1.7 - k) ** 2) / (2 * noise**2)) for k in range(3)]
    exact = math.log(sum(c * d for c, d in zip(chances, densities, strict=True)) / densities[0])
    assert ratios_of(vector, others, total, noise, rate, 2) == pytest.approx([exact], abs=1e-6)


def test_log_ratios_see_through_the_other_canaries() -> None:
    # Canaries that share most of their direction: a plain inner product mostly counts how many were drawn.
    rng = np.random.default_rng(2)
    shared = rng.standard_normal(200)
    vectors = 0.9 * shared / np.linalg.norm(shared) + 0.3 * np.linalg.qr(rng.standard_normal((200, 40)))[0].T
    others, noise, told, plain = rng.standard_normal((1, 200)), 0.2, [], []
    for _ in range(30):
        coins = rng.random(40) < 0.5
        total = coins @ vectors + noise * rng.standard_normal(200)
        found = ratios_of(vectors, others, total, noise, 1.0)
        told.append(np.mean((found > 0) == coins))
        plain.append(np.mean((vectors @ total > np.median(vectors @ total)) == coins))
    assert np.mean(told) > 0.7 > np.mean(plain)


def ratios_of(
    vectors: np.ndarray, others: np.ndarray, total: np.ndarray, noise: float, rate: float, steps: int = 1
) -> np.ndarray:
    tensors = [torch.from_numpy(np.asarray(array, dtype=np.float64)) for array in (vectors, others, total)]
    return log_ratios(tensors[0], tensors[1], 1.0, tensors[2], noise, rate, steps)


def test_noise_that_the_model_does_not_know_makes_what_is_told_count_for_less() -> None:
    rng = np.random.default_rng(3)
    vectors = np.linalg.qr(rng.standard_normal((100, 50)))[0].T
    loud = 5.0 * rng.standard_normal(100)  # where noise 1 is said
    known = ratios_of(vectors[:20], vectors[:1], loud, 1.0, 1.0)  # too few to tell
    found = ratios_of(vectors, vectors[:1], loud, 1.0, 1.0)
    assert np.abs(known).max() > 5
    assert np.abs(found).max() < 1.5
    quiet = ratios_of(vectors, vectors[:1], loud / 5, 1.0, 1.0)
    assert np.abs(quiet).max() > 1.5


@pytest.mark.parametrize(("name", "num_classes"), [("mlp", 0), ("dcgan", 3), ("conv-dropout", 0), ("deep-conv", 2)])
def test_unit_gradients_are_those_of_one_unit_at_a_time(name: str, num_classes: int) -> None:
    model = build_discriminator(name, image_size=28, channels=1, num_classes=num_classes, width=2).eval()
    random = torch.Generator().manual_seed(0)
    images = torch.rand(5, 1, 28, 28, generator=random) * 2 - 1
    labels = torch.arange(5) % num_classes if num_classes else None
    units, loss = torch.tensor([0, 0, 1, 2, 2]), LOSSES["bce"].real
    whole = unit_gradients(model, loss, images, labels, units, 1e9)
    limit = float(whole.norm(dim=1).median())
    clipped = unit_gradients(model, loss, images, labels, units, limit)
    for unit in range(3):
        own = units == unit
        exact = plain_gradient(model, loss(model(images[own], None if labels is None else labels[own])).mean())
        assert torch.allclose(whole[unit], exact, atol=1e-5 * float(exact.norm()))
        assert torch.allclose(clipped[unit], exact * min(1.0, limit / float(exact.norm())), atol=1e-5 * limit)
    alone = unit_gradients(model, loss, images, labels, None, 1e9)
    assert torch.allclose(alone[2], whole[1])


def plain_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def test_a_unit_without_a_finite_gradient_is_zero() -> None:
    model = build_discriminator("mlp", image_size=28, channels=1, num_classes=0, width=2)
    images = torch.zeros(2, 1, 28, 28)
    images[0] = math.inf
    found = unit_gradients(model, LOSSES["bce"].real, images, None, None, 1.0)
    assert not found[0].any()
    assert 0 < float(found[1].norm()) <= 1.0 + 1e-6
