"""What is done to whom is what naive loops say, a planted bias is found, and groups that are alike are left in peace."""

import sys

import numpy as np
import pytest
import torch

from common.errors import DataError
from common.evaluation.fairness import TOO_FEW, RatesByGroup, accuracy_by_group, gap_added, verification_by_group
from common.evaluation.fidelity import measure_fidelity
from common.evaluation.membership import Estimate
from common.evaluation.networks import FeatureNetwork
from common.evaluation.representation import distance_by_group, shares
from common.faces import FaceOptions, procedural_faces

GROUPS = np.array(["a", "b", "c"])


def loop_rates(errors: np.ndarray, groups: np.ndarray) -> dict[str, tuple[int, int]]:
    """(images, errors) by group."""
    found: dict[str, tuple[int, int]] = {}
    for wrong, group in zip(errors.tolist(), groups.tolist(), strict=True):
        if group:
            count, k = found.get(group, (0, 0))
            found[group] = (count + 1, k + int(wrong))
    return dict(sorted(found.items()))


def check_rates(found: RatesByGroup, errors: np.ndarray, groups: np.ndarray) -> None:
    expected = loop_rates(errors, groups)
    rates = {group: k / count for group, (count, k) in expected.items()}
    assert {each.group: (each.count, each.errors) for each in found.groups} == expected
    assert {each.group: each.rate for each in found.groups} == pytest.approx(rates)
    assert found.gap.value == pytest.approx(max(rates.values()) - min(rates.values()))
    assert rates[found.worst] == max(rates.values())
    assert all(each.too_few == (each.errors < 30) for each in found.groups)
    assert all(each.low <= each.rate <= each.high for each in found.groups)
    assert found.unknown == int((groups == "").sum())
    if any(each.too_few for each in found.groups):
        assert found.max_over_geomean is None
    else:
        product = 1.0
        for rate in rates.values():
            product *= rate
        assert found.max_over_geomean == pytest.approx(max(rates.values()) / product ** (1 / len(rates)))


def pairs(
    rng: np.random.Generator, count: int, false_match: dict[str, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, same and groups: half of the pairs genuine, a tenth of these refused at threshold 0."""
    groups = np.repeat(np.array(list(false_match)), count)
    same = np.tile(np.arange(count) % 2 == 0, len(false_match))
    accepted = np.where(same, 0.9, np.repeat(list(false_match.values()), count))
    return np.where(rng.random(len(groups)) < accepted, 1.0, -1.0), same, groups


def test_verification_is_what_loops_say() -> None:
    rng = np.random.default_rng(0)
    scores, same, groups = rng.normal(size=900), rng.random(900) < 0.5, rng.choice(["a", "b", "nan", ""], 900)
    found = verification_by_group(scores, same, groups, 0.5, seed=0)
    check_rates(found.false_match, (scores >= 0.5)[~same], groups[~same])
    check_rates(found.false_non_match, (scores < 0.5)[same], groups[same])
    assert verification_by_group(scores, same, groups, 0.5, seed=0) == found
    tied = verification_by_group(np.full(900, 0.5), same, groups, 0.5, seed=0)
    assert {each.rate for each in tied.false_match.groups} == {1.0}, "a score at the threshold is accepted"
    assert (tied.false_match.p_value, tied.false_non_match.max_over_geomean) == (1.0, None)


def test_accuracy_is_what_loops_say() -> None:
    rng = np.random.default_rng(1)
    truth, groups = rng.integers(0, 4, 600), rng.choice(["x", "y"], 600)
    predicted = np.where(rng.random(600) < 0.3, (truth + 1) % 4, truth)
    found = accuracy_by_group(predicted, truth, groups, seed=0)
    check_rates(found, predicted != truth, groups)
    words = np.array(["0", "1", "2", "3"])
    assert accuracy_by_group(words[predicted], words[truth], groups, seed=0) == found


def test_intervals_and_p_value_are_what_loops_say() -> None:
    rng = np.random.default_rng(2)
    groups = np.repeat(["a", "b"], [150, 100])
    wrong = rng.random(250) < np.repeat([0.3, 0.5], [150, 100])
    found = accuracy_by_group(wrong, np.zeros(250, bool), groups, seed=0)
    sides = [wrong[groups == "a"], wrong[groups == "b"]]
    drawn = np.array([[rng.choice(side, len(side)).mean() for side in sides] for _ in range(4000)])
    for place, each in enumerate(found.groups):
        assert (each.low, each.high) == pytest.approx(np.quantile(drawn[:, place], [0.025, 0.975]), abs=0.015)
    gaps = np.abs(drawn[:, 0] - drawn[:, 1])
    assert (found.gap.low, found.gap.high) == pytest.approx(np.quantile(gaps, [0.025, 0.975]), abs=0.02)

    def unlike(shuffled: np.ndarray) -> float:
        rate = wrong.mean()
        return float(sum((wrong[shuffled == g].sum() - rate * n) ** 2 / n for g, n in (("a", 150), ("b", 100))))

    permuted = [unlike(rng.permutation(groups)) >= unlike(groups) - 1e-9 for _ in range(4000)]
    assert found.p_value == pytest.approx(np.mean(permuted), abs=0.005)


def test_a_planted_bias_is_found_and_equal_groups_are_not_flagged() -> None:
    flagged, found = 0, 0
    for trial in range(60):
        rng = np.random.default_rng([3, trial])
        equal = verification_by_group(*pairs(rng, 1000, {"a": 0.1, "b": 0.1, "c": 0.1}), 0.0, seed=trial).false_match
        flagged += equal.differ
        biased = verification_by_group(*pairs(rng, 1000, {"a": 0.1, "b": 0.3, "c": 0.1}), 0.0, seed=trial)
        found += biased.false_match.differ and biased.false_match.worst == "b" and biased.false_match.gap.low > 0.1
        assert biased.false_match.max_over_geomean == pytest.approx(3 ** (2 / 3), rel=0.4)
    assert found == 60
    assert flagged <= 6


def test_intervals_hold_the_truth_in_about_95_of_100() -> None:
    inside = np.zeros(5)
    trials, groups = 100, np.repeat(["a", "b"], 300)
    for trial in range(trials):
        rng = np.random.default_rng([4, trial])
        hard = rng.random(600)
        with_privacy, without = hard < np.repeat([0.15, 0.4], 300), hard < np.repeat([0.1, 0.2], 300)
        rates = accuracy_by_group(with_privacy, np.zeros(600, bool), groups, seed=trial)
        added = gap_added(with_privacy, without, groups, seed=trial)
        split = shares(
            *(rng.choice(GROUPS, n, p=p) for n, p in ((300, [0.6, 0.3, 0.1]), (400, [0.2, 0.3, 0.5]), (9, [1, 0, 0]))),
            seed=trial,
        )
        inside += [
            rates.groups[0].low <= 0.15 <= rates.groups[0].high,
            rates.gap.low <= 0.25 <= rates.gap.high,
            added.added.low <= 0.15 <= added.added.high,
            split.groups[2].generated.low <= 0.1 <= split.groups[2].generated.high,
            split.groups[0].reference.low <= 0.2 <= split.groups[0].reference.high,
        ]
    assert (inside / trials > 0.89).all(), inside / trials
    assert inside.mean() / trials < 0.985


def test_a_rate_of_0_has_a_width() -> None:
    groups = np.repeat(["a", "b"], 50)
    found = accuracy_by_group(np.zeros(100), np.repeat([0, 1], 50), groups, seed=0)
    assert [(each.errors, each.too_few) for each in found.groups] == [(0, True), (50, False)]
    assert found.groups[0].high == pytest.approx(1 - 0.025 ** (1 / 50))
    assert found.groups[1].low == pytest.approx(0.025 ** (1 / 50))
    assert found.max_over_geomean is None


def test_too_few_are_29_and_not_30() -> None:
    errors, groups = np.zeros(400, bool), np.repeat(["a", "b"], 200)
    errors[:30] = errors[200:229] = True
    first, second = accuracy_by_group(errors, np.zeros(400, bool), groups, seed=0).groups
    assert (first.too_few, second.too_few, second.errors, TOO_FEW) == (False, True, 29, 30)


def test_the_gap_that_is_added_is_what_loops_say() -> None:
    rng = np.random.default_rng(5)
    groups = rng.choice(["a", "b", "c", ""], 800)
    a, b = rng.random(800) < np.where(groups == "a", 0.5, 0.2), rng.random(800) < 0.2

    def gap(errors: np.ndarray, of: np.ndarray) -> float:
        rates = [k / count for count, k in loop_rates(errors, of).values()]
        return max(rates) - min(rates)

    found = gap_added(a, b, groups, seed=0)
    assert (found.gap_a, found.gap_b) == pytest.approx((gap(a, groups), gap(b, groups)))
    assert found.added.value == pytest.approx(gap(a, groups) - gap(b, groups))
    assert (found.unknown, found.too_few) == (int((groups == "").sum()), False)
    drawn = []
    for _ in range(1000):
        rows = np.concatenate([rng.choice(np.flatnonzero(groups == g), (groups == g).sum()) for g in GROUPS])
        drawn.append(gap(a[rows], groups[rows]) - gap(b[rows], groups[rows]))
    assert (found.added.low, found.added.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)


def test_a_model_adds_nothing_to_itself() -> None:
    errors, groups = np.random.default_rng(6).random(300) < 0.3, np.repeat(["a", "b"], 150)
    assert gap_added(errors, errors, groups, seed=0).added == Estimate(0.0, 0.0, 0.0)


def test_shares_are_counted_and_who_is_rare_is_told() -> None:
    made = np.array(["a"] * 90 + ["b"] * 10 + [""] * 5)
    real = np.array(["a"] * 100 + ["b"] * 90 + ["c"] * 10 + [""] * 3)
    found = shares(made, real, real, seed=0)
    assert [(each.group, each.told) for each in found.groups] == [("a", "more frequent"), ("b", "rarer"), ("c", "")]
    assert [each.generated.value for each in found.groups] == pytest.approx([0.9, 0.1, 0.0])
    assert [each.reference.value for each in found.groups] == pytest.approx([0.5, 0.45, 0.05])
    assert (found.generated, found.reference, found.unknown_generated, found.unknown_reference) == (100, 200, 5, 3)
    told = 0
    for trial in range(60):
        rng = np.random.default_rng([7, trial])
        alike = shares(*(rng.choice(GROUPS, 500, p=[0.5, 0.3, 0.2]) for _ in range(3)), seed=trial)
        told += any(each.told for each in alike.groups)
    assert told <= 6


def test_a_lean_of_the_classifier_is_not_told_as_one_of_the_generator() -> None:
    """Half of b are taken for a, of the generated faces and of the judged ones."""
    rng = np.random.default_rng(8)
    real = rng.choice(["a", "b"], 2000)
    made, judged = (np.where(rng.random(len(of)) < 0.5, "a", of) for of in (rng.choice(["a", "b"], 2000), real[::2]))
    found = shares(made, real, judged, seed=0)
    assert [each.told for each in found.groups] == ["", ""]
    assert [each.reference.value > 0.45 for each in found.groups] == [True, True]
    assert [each.reference_as_told.value for each in found.groups] == pytest.approx([0.75, 0.25], abs=0.05)
    assert [each.told for each in shares(made, real, real, seed=0).groups] == ["more frequent", "rarer"]
    unsure = shares(made, real, real, hard_to_tell={"b"}, seed=0)
    assert [(each.told, each.hard_to_tell) for each in unsure.groups] == [("more frequent", False), ("", True)]
    assert [each.generated.value for each in unsure.groups] == [each.generated.value for each in found.groups]


@pytest.fixture(scope="module")
def faces() -> tuple[torch.Tensor, np.ndarray]:
    """Images uint8 and the group of each: persons in turn."""
    drawn = procedural_faces(range(420), 2, FaceOptions(28, 1, 0.8), 0)
    assert drawn.persons is not None
    order = np.random.default_rng(0).permutation(len(drawn))
    return torch.from_numpy(drawn.images[order]), np.array(["even", "odd"])[drawn.persons[order] % 2]


@pytest.mark.parametrize("harm", ["blur", "noise"])
def test_a_group_that_is_drawn_worse_is_farther(faces: tuple[torch.Tensor, np.ndarray], harm: str) -> None:
    images, groups = faces
    made, of_made, real, of_real = images[:420], groups[:420], images[420:], groups[420:]
    fair = {each.group: each.frechet for each in distance_by_group(made, of_made, real, of_real).groups}
    hit, worse = torch.from_numpy(of_made == "odd"), made.float()
    if harm == "blur":
        worse[hit] = torch.nn.functional.avg_pool2d(worse[hit], 5, 1, 2, count_include_pad=False)
    else:
        worse[hit] += 40 * torch.randn(worse[hit].shape, generator=torch.Generator().manual_seed(0))
    found = distance_by_group(worse.clamp(0, 255).to(torch.uint8), of_made, real, of_real)
    after = {each.group: each.frechet for each in found.groups}
    assert after["even"] == fair["even"]
    assert None not in (after["odd"], fair["odd"], fair["even"])
    assert float(after["odd"] or 0) > 3 * max(float(value or 0) for value in fair.values())


class Means(FeatureNetwork):
    """Three features: the means of three bands."""

    def __init__(self) -> None:
        super().__init__("means", 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.float().mean((1, 3))
        return torch.stack([rows[:, :9].mean(1), rows[:, 9:18].mean(1), rows[:, 18:].mean(1)], 1)


def test_groups_are_measured_on_as_many_images(faces: tuple[torch.Tensor, np.ndarray]) -> None:
    images, network = faces[0], Means()
    of_made, of_real = np.repeat(["a", "b", "c", ""], [60, 30, 3, 7]), np.repeat(["a", "b", "c"], [30, 50, 20])
    made, real = images[:100], images[100:200]
    found = distance_by_group(made, of_made, real, of_real, network)
    assert (found.network, found.least, found.compared_generated, found.compared_reference) == ("means", 4, 30, 30)
    assert [(each.generated, each.reference, each.too_few) for each in found.groups] == [
        (60, 30, False),
        (30, 50, False),
        (3, 20, True),
    ]
    assert found.groups[2].frechet is None
    whole = distance_by_group(made[:60], np.repeat(["b", "c"], [30, 30]), real[:60], np.repeat(["b", "c"], 30), network)
    assert whole.groups[0].frechet == pytest.approx(measure_fidelity(made[:30], real[:30], network).frechet, rel=1e-3)
    few = distance_by_group(made[:6], np.repeat(["b", "c"], 3), real, of_real, network)
    assert [each.frechet for each in few.groups] == [None] * 3
    assert (few.compared_generated, few.compared_reference) == (0, 0)


def of(*names: str) -> np.ndarray:
    return np.array(names)


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        (of("a", "a", "a", "a"), "only 'a' is known: a comparison takes 2 groups or more"),
        (of("", "", "", ""), "none is known"),
        (of("a", "b", "a"), r"give one of each"),
        (np.array([1, 2, 1, 2]), r"give text \(N,\)"),
    ],
)
def test_groups_that_say_nothing_are_refused(groups: np.ndarray, told: str) -> None:
    flags = np.array([True, False, True, False])
    with pytest.raises(DataError, match=told):
        accuracy_by_group(flags, flags, groups, seed=0)
    with pytest.raises(DataError, match=told):
        gap_added(flags, flags, groups, seed=0)
    with pytest.raises(DataError, match=told):
        verification_by_group(flags.astype(float), flags, groups, 0.5, seed=0)


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    same, groups = np.array([True, False, True, True]), of("a", "a", "b", "b")
    with pytest.raises(DataError, match=r"group 'b' has 0 pairs of two persons, a rate takes 1 or more"):
        verification_by_group(np.zeros(4), same, groups, 0.5, seed=0)
    with pytest.raises(DataError, match=r"1 of 4 scores are not finite"):
        verification_by_group(np.array([0, 1, np.nan, 0]), same, groups, 0.5, seed=0)
    with pytest.raises(DataError, match=r"generated groups are .* none of them known"):
        shares(of("", ""), groups, groups, seed=0)
    with pytest.raises(DataError, match=r"only 'a' is known"):
        shares(of("a", "a"), of("a"), of("a"), seed=0)
    with pytest.raises(DataError, match=r"told groups are .* none of them known"):
        shares(groups, groups, of(""), seed=0)
    images = torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"reference groups are .* one for each of 4"):
        distance_by_group(images, groups, images, groups[:3])
    with pytest.raises(DataError, match=r"generated images are torch\.float32"):
        distance_by_group(images.float(), groups, images, groups)
    monkeypatch.setitem(sys.modules, "fairlearn.metrics", None)
    with pytest.raises(DataError, match=r"need fairlearn .* pip install 'visard\[evaluation\]'"):
        accuracy_by_group(same, same, groups, seed=0)
