"""Who is among generated faces, and how well each group is drawn: shares and distances beside a reference set.

Intervals are percentiles of bootstraps that take faces for independent: several photographs of a person are not, and
theirs should be wider. The group '' means unknown; its faces are left out, and counted.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import DataError
from common.evaluation.fairness import proportion, two_or_more
from common.evaluation.fidelity import FrechetDistance
from common.evaluation.membership import Estimate
from common.evaluation.networks import FeatureNetwork, drawn_network

_BATCH = 100


@dataclass(frozen=True)
class GroupShare:
    """A group's share of the generated faces, as a classifier says, and of the reference, as given and as the classifier says.

    told: 'rarer' or 'more frequent' among the generated, where what the classifier says of the two has intervals that do not
    meet, else ''. hard_to_tell: the classifier is wrong of the group too often to tell either.
    """

    group: str
    generated: Estimate
    reference: Estimate
    reference_as_told: Estimate
    told: str
    hard_to_tell: bool


@dataclass(frozen=True)
class Shares:
    """The share of every group, by name. Counts are of faces whose group is known; unknown: of those left out of each side."""

    groups: tuple[GroupShare, ...]
    generated: int
    reference: int
    unknown_generated: int
    unknown_reference: int


@dataclass(frozen=True)
class GroupDistance:
    """One group's images, and the Frechet distance between them; None where one side has too few."""

    group: str
    generated: int
    reference: int
    frechet: float | None
    too_few: bool


@dataclass(frozen=True)
class Distances:
    """The distance of every group, by name, all on compared_generated and compared_reference images, which the distance
    depends on; least: a group's images on either side under which it has none.
    """

    network: str
    least: int
    compared_generated: int
    compared_reference: int
    groups: tuple[GroupDistance, ...]


def shares(
    generated_groups: np.ndarray,
    reference_groups: np.ndarray,
    told_groups: np.ndarray,
    *,
    hard_to_tell: Collection[str] = (),
    seed: int,
) -> Shares:
    """Who is among the generated faces, beside who is among the reference: text (N,) and (M,).

    told_groups: text (K,), what the classifier that told generated_groups says of reference faces that it did not learn from.
    The generated faces are compared with these: beside the given groups a lean of the classifier would be told as one of the
    generator. That it errs alike on generated and on reference faces is taken for granted. hard_to_tell: groups of which it is
    wrong too often (`groups.hard_to_tell`), which get no verdict. Raises DataError for fewer than two groups in all, or a side
    of which no group is known.
    """
    known = []
    for name, column in (
        ("generated", generated_groups),
        ("reference", reference_groups),
        ("told", told_groups),
    ):
        if column.dtype.kind != "U" or column.ndim != 1 or not (column != "").any():
            raise DataError(f"{name} groups are {column.dtype} {column.shape}, none of them known: give text (N,)")
        known.append(column[column != ""])
    rng, found = np.random.default_rng(seed), []
    for group in two_or_more(np.concatenate(known)):
        made, real, said = (proportion(int((side == group).sum()), len(side), rng) for side in known)
        told = "rarer" if made.high < said.low else "more frequent" if made.low > said.high else ""
        hard = group in hard_to_tell
        found.append(GroupShare(group, made, real, said, "" if hard else told, hard))
    left_out = (int((column == "").sum()) for column in (generated_groups, reference_groups))
    return Shares(tuple(found), len(known[0]), len(known[1]), *left_out)


def distance_by_group(
    generated: Tensor,
    generated_groups: np.ndarray,
    reference: Tensor,
    reference_groups: np.ndarray,
    network: FeatureNetwork | None = None,
    *,
    seed: int = 0,
) -> Distances:
    """`measure_fidelity`'s Frechet distance within each group: generated (N, C, S, S) beside reference (M, C, S, S), uint8.

    On `visard-drawn-1` unless another network is given. A group needs one image more than the network has features (193
    there) on either side: with fewer a covariance has directions of no variance whatever the group is like, and the distance
    tells how few images there are. As it depends on their number even above, all groups are measured on as many as the
    smallest that has enough, drawn with `seed`. Raises DataError for images of another kind, unlike lengths or fewer than
    two groups.
    """
    for name, images, column in (
        ("generated", generated, generated_groups),
        ("reference", reference, reference_groups),
    ):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise DataError(f"{name} images are {images.dtype} {tuple(images.shape)}: give uint8 (N, 1 or 3, S, S)")
        if column.dtype.kind != "U" or column.shape != (len(images),):
            raise DataError(
                f"{name} groups are {column.dtype} {column.shape}: give text, one for each of {len(images)}"
            )
    network = network or drawn_network()
    least = network.num_features + 1
    names = two_or_more(np.concatenate([generated_groups, reference_groups]))
    places = [[np.flatnonzero(column == name) for name in names] for column in (generated_groups, reference_groups)]
    enough = [len(made) >= least and len(real) >= least for made, real in zip(*places, strict=True)]
    compared = [min((len(own) for own, ok in zip(side, enough, strict=True) if ok), default=0) for side in places]
    rng, found = np.random.default_rng(seed), []
    for name, made, real, ok in zip(names, *places, enough, strict=True):
        value = None
        if ok:
            some = [
                np.sort(rng.choice(own, size, replace=False)) for own, size in zip((made, real), compared, strict=True)
            ]
            value = FrechetDistance(_batches(reference, some[1]), network)(_batches(generated, some[0]))
        found.append(GroupDistance(name, len(made), len(real), value, not ok))
    return Distances(network.name, least, compared[0], compared[1], tuple(found))


def _batches(images: Tensor, indices: np.ndarray) -> Iterator[Tensor]:
    for some in np.array_split(indices, -(-len(indices) // _BATCH)):
        yield images[torch.from_numpy(some).to(images.device)].float() / 127.5 - 1
