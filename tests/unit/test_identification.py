"""Ranks and clusterings are measured as their definitions say."""

import dataclasses
import sys
from collections import Counter

import numpy as np
import pytest

from common.errors import ConfigError, DataError
from common.evaluation import identification
from common.evaluation.identification import cluster, clustering_figures, identification_accuracy


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


# --- ranks ---


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_are_their_loop(ties: bool) -> None:
    random = np.random.default_rng(0)
    logits, truth = random.standard_normal((60, 7)), random.integers(0, 7, 60)
    if ties:
        logits = np.round(logits)
    expected = dict.fromkeys((1, 2, 5, 7, 9), 0.0)
    for row, right in zip(logits, truth, strict=True):
        before = sum(row[k] >= row[right] for k in range(7) if k != right)
        for rank in expected:
            expected[rank] += (before < rank) / 60
    found = identification_accuracy(logits, truth, tuple(expected))
    assert found == pytest.approx(expected)
    assert list(found.values()) == sorted(found.values())
    assert found[7] == found[9] == 1.0
    order = random.permutation(60)
    assert identification_accuracy(logits[order], truth[order], tuple(expected)) == found
    assert identification_accuracy(np.exp(logits), truth, tuple(expected)) == found


def test_a_recogniser_that_knows_all_some_or_nothing() -> None:
    random = np.random.default_rng(1)
    truth = random.integers(0, 20, 4000)
    assert identification_accuracy(np.eye(20)[truth], truth) == {1: 1.0, 5: 1.0}
    assert identification_accuracy(-np.eye(20)[truth], truth, (1, 19, 20)) == {1: 0.0, 19: 0.0, 20: 1.0}
    assert identification_accuracy(random.random((4000, 20)), truth) == pytest.approx({1: 0.05, 5: 0.25}, abs=0.03)
    # Who gives all persons the same logit knows nothing.
    assert identification_accuracy(np.zeros((4000, 20), np.float32), truth) == {1: 0.0, 5: 0.0}


def test_logits_that_cannot_be_ranked_are_refused() -> None:
    logits, truth = np.zeros((3, 2)), np.array([0, 1, 0])
    for bad in (truth[:2], truth.astype(float), truth[:, None]):
        with pytest.raises(DataError, match=r"give \(N, K\) and \(N,\) whole numbers"):
            identification_accuracy(logits, bad)
    with pytest.raises(DataError, match=r"logits are \(3,\)"):
        identification_accuracy(logits[:, 0], truth)
    with pytest.raises(DataError, match="0 photographs of 2 persons"):
        identification_accuracy(logits[:0], truth[:0])
    with pytest.raises(DataError, match="truths run from 0 to 2, logits from 0 to 1: leave out"):
        identification_accuracy(logits, truth + np.array([0, 0, 2]))
    with pytest.raises(DataError, match="truths run from -1"):
        identification_accuracy(logits, truth - 1)
    with pytest.raises(DataError, match="1 of 3 logits are not finite"):
        identification_accuracy(np.array([[0, 1], [np.nan, 0], [1, 1]]), truth)
    with pytest.raises(ConfigError, match="rank 0: the first is 1"):
        identification_accuracy(logits, truth, (1, 0))


# --- figures of a clustering ---


def pairwise_of(assigned: np.ndarray, persons: np.ndarray) -> tuple[float, float, float]:
    right = joined = alike = 0
    for i in range(len(assigned)):
        for j in range(i):
            joined += assigned[i] == assigned[j]
            alike += persons[i] == persons[j]
            right += assigned[i] == assigned[j] and persons[i] == persons[j]
    precision, recall = right / joined, right / alike
    return precision, recall, 2 * precision * recall / (precision + recall)


def bcubed_of(assigned: np.ndarray, persons: np.ndarray) -> tuple[float, float, float]:
    """Amigo et al. 2009, section 4.4: means over items of the correctness of the items in its cluster, or of its class."""
    precisions, recalls = [], []
    for i in range(len(assigned)):
        in_cluster = [j for j in range(len(assigned)) if assigned[j] == assigned[i]]
        in_class = [j for j in range(len(assigned)) if persons[j] == persons[i]]
        precisions.append(sum(persons[j] == persons[i] for j in in_cluster) / len(in_cluster))
        recalls.append(sum(assigned[j] == assigned[i] for j in in_class) / len(in_class))
    precision, recall = float(np.mean(precisions)), float(np.mean(recalls))
    return precision, recall, 2 * precision * recall / (precision + recall)


def adjusted_rand_of(assigned: np.ndarray, persons: np.ndarray) -> float:
    """Hubert and Arabie 1985, equation 5."""

    def pairs(sizes: Counter[object]) -> float:
        return sum(size * (size - 1) / 2 for size in sizes.values())

    both = pairs(Counter(zip(assigned.tolist(), persons.tolist(), strict=True)))
    one, other = pairs(Counter(assigned.tolist())), pairs(Counter(persons.tolist()))
    expected = one * other / (len(assigned) * (len(assigned) - 1) / 2)
    return (both - expected) / ((one + other) / 2 - expected)


def mutual_information_of(assigned: np.ndarray, persons: np.ndarray) -> float:
    def entropy(values: list[object]) -> float:
        shares = np.array(list(Counter(values).values())) / len(values)
        return float(-(shares * np.log(shares)).sum())

    one, other = entropy(assigned.tolist()), entropy(persons.tolist())
    both = entropy(list(zip(assigned.tolist(), persons.tolist(), strict=True)))
    return (one + other - both) / ((one + other) / 2)


@pytest.mark.parametrize("seed", range(6))
def test_figures_are_their_loops(seed: int) -> None:
    random = np.random.default_rng(seed)
    persons = random.integers(0, 8, 50)
    assigned = np.where(random.random(50) < seed / 6, persons, random.integers(0, 3 + 2 * seed, 50))
    found = clustering_figures(assigned, persons)
    assert (found.count, found.persons, found.clusters) == (50, len(set(persons)), len(set(assigned)))
    assert (found.pairwise_precision, found.pairwise_recall, found.pairwise_f) == pytest.approx(
        pairwise_of(assigned, persons)
    )
    assert (found.bcubed_precision, found.bcubed_recall, found.bcubed_f) == pytest.approx(bcubed_of(assigned, persons))
    assert found.adjusted_rand == pytest.approx(adjusted_rand_of(assigned, persons))
    assert found.mutual_information == pytest.approx(mutual_information_of(assigned, persons))
    # Neither names nor the order matter.
    order = random.permutation(50)
    renamed = clustering_figures((1000 - 7 * assigned)[order], (persons.astype(np.uint8) + 100)[order])
    assert dataclasses.asdict(renamed) == pytest.approx(dataclasses.asdict(found))
    # Precision and recall change places with clusters and persons.
    turned = clustering_figures(persons, assigned)
    assert turned.pairwise_precision == found.pairwise_recall
    assert turned.bcubed_recall == pytest.approx(found.bcubed_precision)


def test_known_clusterings() -> None:
    persons = np.repeat(np.arange(5), 4)
    right = clustering_figures(persons[::-1], persons)
    assert dataclasses.astuple(right) == pytest.approx((20, 5, 5, *[1.0] * 8))
    together = clustering_figures(np.zeros(20, int), persons)
    assert (together.pairwise_precision, together.pairwise_recall) == (30 / 190, 1.0)
    assert (together.bcubed_precision, together.bcubed_recall, together.bcubed_f) == pytest.approx((0.2, 1.0, 1 / 3))
    assert (together.adjusted_rand, together.mutual_information) == pytest.approx((0.0, 0.0))
    alone = clustering_figures(np.arange(20), persons)
    assert (alone.pairwise_precision, alone.pairwise_recall, alone.pairwise_f) == (None, 0.0, 0.0)
    assert (alone.bcubed_precision, alone.bcubed_recall, alone.adjusted_rand) == pytest.approx((1.0, 0.25, 0.0))
    one = clustering_figures(np.array([3]), np.array([9]))
    assert (one.pairwise_precision, one.pairwise_recall, one.pairwise_f, one.bcubed_f) == (None, None, None, 1.0)
    random = np.random.default_rng(0)
    chance = clustering_figures(random.integers(0, 10, 5000), random.integers(0, 10, 5000))
    assert (chance.adjusted_rand, chance.pairwise_precision) == pytest.approx((0.0, 0.1), abs=0.01)


def test_clusterings_that_cannot_be_measured_are_refused() -> None:
    numbers = np.arange(3)
    with pytest.raises(DataError, match="2 clusters and 3 persons"):
        clustering_figures(numbers[:2], numbers)
    with pytest.raises(DataError, match="0 photographs"):
        clustering_figures(numbers[:0], numbers[:0])
    with pytest.raises(DataError, match=r"clusters are float64 \(3,\): give \(N,\) whole numbers"):
        clustering_figures(numbers.astype(float), numbers)
    with pytest.raises(DataError, match=r"persons are int64 \(3, 1\)"):
        clustering_figures(numbers, numbers[:, None])


# --- clustering ---


def cluster_of(embeddings: np.ndarray, threshold: float) -> list[list[int]]:
    """Joined one by one, by the mean similarity over pairs; as sorted lists of members."""
    clusters, similar = [[i] for i in range(len(embeddings))], embeddings @ embeddings.T
    while len(clusters) > 1:
        best, later, earlier = max(
            (float(np.mean([similar[i, j] for i in clusters[a] for j in clusters[b]])), a, b)
            for a in range(len(clusters))
            for b in range(a)
        )
        if best <= threshold:
            break
        clusters[earlier] += clusters.pop(later)
    return sorted(sorted(members) for members in clusters)


def members_of(assigned: np.ndarray) -> list[list[int]]:
    return sorted(np.flatnonzero(assigned == number).tolist() for number in set(assigned.tolist()))


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.3, 0.6, 0.9])
def test_clusters_are_those_of_the_loop(threshold: float) -> None:
    random = np.random.default_rng(2)
    embeddings = unit(np.eye(6)[random.integers(0, 6, 25)] + 0.3 * random.standard_normal((25, 6)))
    found = cluster(embeddings, threshold)
    assert found.dtype == np.int64
    assert members_of(found) == cluster_of(embeddings, threshold)
    # In order of falling size, and those of one size by their first members.
    sizes = [(-int((found == n).sum()), int(np.flatnonzero(found == n)[0])) for n in range(found.max() + 1)]
    assert sizes == sorted(sizes)
    order = random.permutation(25)
    again = cluster(embeddings[order], threshold)
    assert sorted(sorted(order[members].tolist()) for members in members_of(again)) == members_of(found)
    turned = embeddings @ np.linalg.qr(random.standard_normal((6, 6)))[0]
    assert np.array_equal(cluster(turned, threshold), found)


def test_persons_that_lie_apart_are_found() -> None:
    random = np.random.default_rng(3)
    persons = random.permutation(np.repeat(np.arange(8), np.arange(3, 11)))
    near = unit(np.eye(16)[persons] + 0.05 * random.standard_normal((len(persons), 16))).astype(np.float32)
    # Person 7 has most photographs, and so becomes cluster 0.
    assert np.array_equal(cluster(near, 0.5), 7 - persons)
    assert clustering_figures(cluster(near, 0.5), persons).pairwise_f == 1.0
    assert cluster(near, -1.0).max() == 0
    assert np.array_equal(np.sort(cluster(near, 0.99999)), np.arange(len(persons)))
    assert cluster(near[:1], 0.5).tolist() == [0]
    assert cluster(near[[0, 0, 0]], 0.9).tolist() == [0, 0, 0]
    assert cluster(unit(np.eye(4, 8)).astype(np.float16), 0.5).tolist() == [0, 1, 2, 3]


def test_embeddings_that_cannot_be_clustered_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = np.eye(4)
    for bad in (embeddings[:0], embeddings[0], embeddings.astype(int)):
        with pytest.raises(DataError, match=r"give \(N, D\) float"):
            cluster(bad, 0.5)
    with pytest.raises(DataError, match="1 of 4 embeddings are not finite"):
        cluster(np.where(embeddings[:, :1] == 1, np.nan, embeddings), 0.5)
    for length in (2.0, 0.5, 0.0):
        with pytest.raises(DataError, match=f"an embedding is {length:.3g} long: divide each by its length"):
            cluster(embeddings * np.array([[1.0], [1.0], [length], [1.0]]), 0.5)
    for threshold in (1.0, -1.1, float("nan")):
        with pytest.raises(ConfigError, match="from -1 to below 1"):
            cluster(embeddings, threshold)
    monkeypatch.setattr(identification, "MAX_CLUSTERED", 3)
    with pytest.raises(DataError, match=r"4 embeddings: .* give at most 3"):
        cluster(embeddings, 0.5)


def test_what_scikit_learn_is_needed_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(DataError, match="clustering needs scikit-learn"):
        cluster(np.eye(3), 0.5)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(DataError, match="the adjusted Rand index needs scikit-learn"):
        clustering_figures(np.arange(3), np.arange(3))
