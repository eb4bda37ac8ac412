"""Face identification: which of the known persons is it, and which photographs belong together?

Share of photographs whose person is among the first k named (rank-k accuracy), and figures of a clustering beside the persons:
pairwise and BCubed precision, recall and F (Amigo et al. 2009, "A comparison of extrinsic clustering evaluation metrics based on
formal constraints"), adjusted Rand index and normalised mutual information, the last two by scikit-learn.

Of real photographs the figures are about private data unless the photographs are public.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from common.errors import ConfigError, DataError
from common.evaluation.verification import scikit_learn

# More are not clustered: the distances of all pairs, held twice, take 8 N^2 bytes, 800 MB here.
MAX_CLUSTERED = 10_000
# How far from 1 the length of an embedding may be: float16 loses less.
_LENGTH_TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Clustering:
    """Figures of a clustering of `count` photographs of `persons` persons into `clusters` clusters. Larger is better.

    pairwise_precision: share of the pairs put together that are of one person, None where no pair was; pairwise_recall: share of
    the pairs of one person that were put together, None where nobody has two photographs; pairwise_f: their harmonic mean,
    None where both are. bcubed_precision, bcubed_recall: for each photograph, itself included, the share of its cluster that is
    of its person, and of its person that is in its cluster; means over photographs; bcubed_f: their harmonic mean. mutual
    information: normalised by the mean of the two entropies. All 0 to 1 but adjusted_rand, which is 0 for chance and may fall
    below it.
    """

    count: int
    persons: int
    clusters: int
    pairwise_precision: float | None
    pairwise_recall: float | None
    pairwise_f: float | None
    bcubed_precision: float
    bcubed_recall: float
    bcubed_f: float
    adjusted_rand: float
    mutual_information: float


def identification_accuracy(logits: np.ndarray, truth: np.ndarray, ranks: Sequence[int] = (1, 5)) -> dict[int, float]:
    """For each rank the share, 0 to 1, of photographs whose person is among that many of the highest logits.

    logits: (N, K), higher where likelier; truth: (N,) whole numbers 0 to K - 1. Others with the same logit come before the right
    one, so that a recogniser that cannot tell persons apart is not credited. A rank of K or more is always 1. Raises DataError
    for no photographs, other shapes, persons outside 0 to K - 1 and logits that are not finite; ConfigError for a rank below 1.
    """
    logits, truth = np.asarray(logits), np.asarray(truth)
    if logits.ndim != 2 or truth.shape != logits.shape[:1] or truth.dtype.kind not in "iu":
        raise DataError(
            f"logits are {logits.shape}, truths {truth.dtype} {truth.shape}: give (N, K) and (N,) whole numbers"
        )
    if not logits.size:
        raise DataError(f"{logits.shape[0]} photographs of {logits.shape[1]} persons: give at least one of each")
    if truth.min() < 0 or truth.max() >= logits.shape[1]:
        raise DataError(
            f"truths run from {truth.min()} to {truth.max()}, logits from 0 to {logits.shape[1] - 1}: leave out "
            "photographs of persons that the recogniser does not know"
        )
    _refuse_not_finite(logits, "logits")
    for rank in ranks:
        if rank < 1:
            raise ConfigError(f"rank {rank}: the first is 1")
    right = np.take_along_axis(logits, truth[:, None].astype(np.int64), axis=1)
    # The right one is not below itself.
    places = (logits >= right).sum(axis=1)
    return {rank: float((places <= rank).mean()) for rank in ranks}


def clustering_figures(assigned: np.ndarray, persons: np.ndarray) -> Clustering:
    """All figures of clusters `assigned` (N,) beside `persons` (N,), whole numbers both, which stand for nothing else.

    Raises DataError for no photographs, unequal lengths, numbers that are not whole, and where scikit-learn is not installed.
    """
    assigned, persons = np.asarray(assigned), np.asarray(persons)
    for name, numbers in (("clusters", assigned), ("persons", persons)):
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise DataError(f"{name} are {numbers.dtype} {numbers.shape}: give (N,) whole numbers")
    if len(assigned) != len(persons):
        raise DataError(f"{len(assigned)} clusters and {len(persons)} persons: give one of each for each photograph")
    if not len(assigned):
        raise DataError("0 photographs: give at least one")
    _, of_cluster, cluster_sizes = np.unique(assigned, return_inverse=True, return_counts=True)
    _, of_person, person_sizes = np.unique(persons, return_inverse=True, return_counts=True)
    # How many are of each cluster and person that occur together.
    together, shared = np.unique(of_cluster * len(person_sizes) + of_person, return_counts=True)
    of_both, in_cluster, in_person = _pairs(shared), _pairs(cluster_sizes), _pairs(person_sizes)
    precision = float((shared**2 / cluster_sizes[together // len(person_sizes)]).sum() / len(persons))
    recall = float((shared**2 / person_sizes[together % len(person_sizes)]).sum() / len(persons))
    metrics = scikit_learn("metrics", "the adjusted Rand index")
    return Clustering(
        len(persons),
        len(person_sizes),
        len(cluster_sizes),
        of_both / in_cluster if in_cluster else None,
        of_both / in_person if in_person else None,
        2 * of_both / (in_cluster + in_person) if in_cluster + in_person else None,
        precision,
        recall,
        2 * precision * recall / (precision + recall),
        float(metrics.adjusted_rand_score(of_person, of_cluster)),
        float(metrics.normalized_mutual_info_score(of_person, of_cluster)),
    )


def cluster(embeddings: np.ndarray, threshold: float) -> np.ndarray:
    """The cluster (N,) int64 of each of the embeddings (N, D), which are of length 1; 0 is the largest, then 1 ...

    Agglomerative, by scikit-learn: the two clusters that are most alike on average over their pairs are joined as long as that
    cosine similarity is above `threshold`. Of clusters of one size the one whose first member comes first has the lower
    number. Memory is N^2. Raises DataError for no embeddings, more than MAX_CLUSTERED, other shapes or lengths, values that
    are not finite, and where scikit-learn is not installed; ConfigError for a threshold outside -1 to 1, 1 itself too.
    """
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or not embeddings.size or embeddings.dtype.kind != "f":
        raise DataError(f"embeddings are {embeddings.dtype} {embeddings.shape}: give (N, D) float, neither of them 0")
    if len(embeddings) > MAX_CLUSTERED:
        raise DataError(
            f"{len(embeddings)} embeddings: the distances of all pairs take 8 N^2 bytes, give at most {MAX_CLUSTERED}"
        )
    if not -1 <= threshold < 1:
        raise ConfigError(f"threshold {threshold}: give a similarity from -1 to below 1")
    _refuse_not_finite(embeddings, "embeddings")
    embeddings = embeddings.astype(np.float64)
    lengths = np.linalg.norm(embeddings, axis=1)
    worst = float(lengths[np.abs(lengths - 1).argmax()])
    if abs(worst - 1) > _LENGTH_TOLERANCE:
        raise DataError(f"an embedding is {worst:.3g} long: divide each by its length")
    if len(embeddings) == 1:
        return np.zeros(1, np.int64)
    agglomerative = scikit_learn("cluster", "clustering").AgglomerativeClustering(
        n_clusters=None, metric="cosine", linkage="average", distance_threshold=1 - threshold
    )
    found = agglomerative.fit_predict(embeddings)
    _, first, place, sizes = np.unique(found, return_index=True, return_inverse=True, return_counts=True)
    numbers = np.empty(len(sizes), np.int64)
    numbers[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return numbers[place]


def _pairs(sizes: np.ndarray) -> int:
    """The pairs within groups of these sizes."""
    return int((sizes * (sizes - 1) // 2).sum())


def _refuse_not_finite(values: np.ndarray, name: str) -> None:
    if bad := int((~np.isfinite(values).all(axis=1)).sum()):
        raise DataError(f"{bad} of {len(values)} {name} are not finite: leave out what could not be computed")
