"""What a finished run's faces are worth beside photographs: how near they come, what they are good for, who is among them, and
whether they repeat what was learned.

Every figure is computed from the reference photographs, and none is private: see NOTE.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.applications.generate import TrainedGenerator
from common.device import pick_device
from common.errors import DataError
from common.evaluation.fairness import RatesByGroup, accuracy_by_group
from common.evaluation.fidelity import FEWEST, Fidelity, measure_fidelity
from common.evaluation.groups import halves, hard_to_tell, tell_groups, too_small
from common.evaluation.membership import Estimate, auc, clopper_pearson, gan_leaks_scores, tpr_at_fpr
from common.evaluation.networks import FeatureNetwork
from common.evaluation.representation import Distances, Shares, distance_by_group, shares
from common.evaluation.utility import CLASSIFIERS, equal_steps, synthetic_accuracy
from common.faces import FaceDataset
from common.faces.gallery import nearest

NOTE = (
    "These figures are computed from the reference photographs and carry no privacy promise themselves: "
    "do not publish them where the reference is private."
)
FPR = 0.001
# Faces of either side that are looked up for the nearest.
MAX_LOOKED_UP = 5000
# Of the reference and of a holdout: the AUC of 20 and 20 is known to some 0.2 either way, that of fewer says nothing.
MIN_TOLD_APART = 20


@dataclass(frozen=True)
class Utility:
    """A classifier's accuracy, and its interval over the test images. taught_on: 'synthetic', 'reference' or both; tested_on:
    'reference' or 'holdout'; taught, tested: images. steps: of the training, as many for all. commonest: the accuracy of always
    saying the test images' commonest label.
    """

    classifier: str
    taught_on: str
    tested_on: str
    taught: int
    steps: int
    tested: int
    accuracy: Estimate
    commonest: float


@dataclass(frozen=True)
class Fairness:
    """One attribute.

    left_out: groups of fewer than two persons, by which no classifier can be judged, and the images of each; they count as
    unknown below. taught, judged: reference faces from which the group classifier learned, and others by which it was judged.
    classifier: its own errors by true group. shares: of generated faces, whose groups it says, beside what it says of the faces
    it was judged by, and the whole reference's, whose groups are given. distances: of those it says
    are of a group to those given as of it.
    """

    attribute: str
    left_out: dict[str, int]
    taught: int
    judged: int
    classifier: RatesByGroup
    shares: Shares
    distances: Distances


@dataclass(frozen=True)
class Memorisation:
    """Whether generated faces lie nearer the reference than a holdout, by distance between pixels.

    gan_leaks: AUC of telling the `reference` faces from the `holdout` faces by their nearest `generated` one; 0.5 where they
    cannot be told. tpr: its true positive rate at a false positive rate of FPR, None where the holdout is too small.
    """

    reference: int
    holdout: int
    generated: int
    gan_leaks: Estimate
    tpr: Estimate | None


@dataclass(frozen=True)
class Evaluation:
    """All figures of one run. skipped: what was not done, and why."""

    run: str
    promise: str
    seed: int
    generated: int
    reference: int
    holdout: int
    fidelity: Fidelity
    utility: tuple[Utility, ...] = ()
    fairness: tuple[Fairness, ...] = ()
    memorisation: Memorisation | None = None
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Faces:
    """Images uint8 (N, C, S, S) on the device, and labels int64 (N,) or None."""

    images: Tensor
    labels: Tensor | None


def evaluate_run(
    run: Path,
    promise: str,
    generator: TrainedGenerator,
    reference: FaceDataset,
    holdout: FaceDataset | None,
    *,
    synthetic: int,
    by: Sequence[str],
    network: FeatureNetwork,
    seed: int,
    tell: Callable[[str], None],
) -> Evaluation:
    """Draw `synthetic` faces and judge them. tell: called with each step before it begins.

    reference, holdout: of the generator's size and channels. by: attributes of the reference. What can be refused is refused
    before anything is computed: raises DataError for sizes, labels or attributes that do not fit, too few faces, or a
    holdout with images of the reference.
    """
    columns = check(generator, reference, holdout, by)
    splits = [halves(column, reference.persons, seed=seed) for column in columns]
    tell(f"drawing {synthetic} faces")
    drawn, labels = generator.draw(synthetic, seed)
    made, real = _faces(drawn, labels), _faces(reference.images, reference.labels)
    tell(f"fidelity on {network.name}")
    fidelity = measure_fidelity(made.images, real.images, network, seed=seed)
    skipped: dict[str, str] = {}
    utility: list[Utility] = []
    if made.labels is None:
        skipped["utility"] = "the generator is unconditional: its faces have no labels to learn from"
    elif real.labels is None:
        skipped["utility"] = "the reference has no labels: name --label-column and --label-values"
    else:
        other = None if holdout is None else _faces(holdout.images, holdout.labels)
        utility = _utility(made, real, other, seed, tell)
    fairness = []
    if not by:
        skipped["fairness"] = (
            f"no attribute: give --by, of {', '.join(reference.attributes) or 'which the reference has none'}"
        )
    for name, groups, split in zip(by, columns, splits, strict=True):
        tell(f"fairness by {name}")
        left_out = too_small(reference.attributes[name], reference.persons)
        fairness.append(_fairness(name, left_out, made.images, real.images, groups, split, network, seed))
    memorisation = None
    if holdout is None:
        skipped["memorisation"] = "no faces that were not learned from: give --holdout"
    else:
        tell("nearest neighbours")
        memorisation = _memorisation(drawn, reference.images, holdout.images, seed)
    return Evaluation(
        run.name,
        promise,
        seed,
        len(drawn),
        len(reference),
        0 if holdout is None else len(holdout),
        fidelity,
        tuple(utility),
        tuple(fairness),
        memorisation,
        skipped,
    )


def check(
    generator: TrainedGenerator, reference: FaceDataset, holdout: FaceDataset | None, by: Sequence[str]
) -> list[np.ndarray]:
    """The groups (N,) of the reference by each attribute, '' in those that are too small. Raises DataError as `evaluate_run` does."""
    model = generator.model
    shape = (model.channels, model.image_size, model.image_size)
    for side, faces in (("reference", reference), ("holdout", holdout)):
        if faces is None:
            continue
        least = FEWEST if holdout is None else MIN_TOLD_APART
        if len(faces) < least:
            what = "5 nearest neighbours take" if holdout is None else "to tell reference and holdout apart takes"
            raise DataError(f"{len(faces)} {side} images: {what} {least} or more of each")
        if faces.images.shape[1:] != shape:
            raise DataError(f"{side} images are {faces.images.shape[1:]}, the run's {shape}: cut them alike")
        if model.num_classes and faces.labels is not None and int(faces.labels.max()) >= model.num_classes:
            raise DataError(
                f"the {side}'s labels go up to {int(faces.labels.max())}, the run's to {model.num_classes - 1}: label them alike"
            )
    if holdout is not None:
        seen = {image.tobytes() for image in reference.images}
        both = sum(image.tobytes() in seen for image in holdout.images)
        if both:
            raise DataError(
                f"{both} of the holdout's {len(holdout)} images are in the reference: give faces that were not learned from"
            )
        if model.num_classes and reference.labels is not None and holdout.labels is None:
            raise DataError("the reference has labels and the holdout has none: label them alike")
    found = []
    for name in by:
        known = list(reference.attributes)
        if name not in known:
            raise DataError(
                f"the reference has no attribute {name!r}: it has {', '.join(known) or 'none; name a CSV in --attributes'}"
                f"{nearest(name, known)}"
            )
        column = reference.attributes[name]
        found.append(np.where(np.isin(column, list(too_small(column, reference.persons))), "", column))
    return found


def _faces(images: np.ndarray, labels: np.ndarray | None) -> Faces:
    device = pick_device()
    return Faces(torch.from_numpy(images).to(device), None if labels is None else torch.from_numpy(labels).to(device))


def _utility(made: Faces, real: Faces, holdout: Faces | None, seed: int, tell: Callable[[str], None]) -> list[Utility]:
    taught = {"synthetic": made}
    if holdout is not None:
        taught |= {"reference": real, "reference + synthetic": _joined(real, made)}
    tested_on, test = ("reference", real) if holdout is None else ("holdout", holdout)
    steps = equal_steps(max(len(faces.images) for faces in taught.values()))
    found = []
    for classifier in CLASSIFIERS:
        for taught_on, faces in taught.items():
            if faces.labels is None or test.labels is None:
                raise ValueError("faces without labels")
            tell(f"utility: {classifier} taught on {taught_on}")
            share = synthetic_accuracy(
                faces.images, faces.labels, test.images, test.labels, seed=seed, steps=steps, classifier=classifier
            )
            tests = len(test.images)
            accuracy = clopper_pearson(round(share * tests), tests)
            commonest = int(test.labels.bincount().max()) / tests
            found.append(
                Utility(classifier, taught_on, tested_on, len(faces.images), steps, tests, accuracy, commonest)
            )
    return found


def _joined(one: Faces, other: Faces) -> Faces:
    if one.labels is None or other.labels is None:
        raise ValueError("faces without labels")
    return Faces(torch.cat([one.images, other.images]), torch.cat([one.labels, other.labels]))


def _fairness(
    name: str,
    left_out: dict[str, int],
    made: Tensor,
    real: Tensor,
    groups: np.ndarray,
    split: tuple[np.ndarray, np.ndarray],
    network: FeatureNetwork,
    seed: int,
) -> Fairness:
    learned, judged = split
    learn, judge = (real[torch.from_numpy(indices).to(real.device)] for indices in split)
    of_judged, of_made = tell_groups(learn, groups[learned], [judge, made], seed=seed)
    return Fairness(
        name,
        left_out,
        len(learned),
        len(judged),
        accuracy_by_group(of_judged, groups[judged], groups[judged], seed=seed),
        shares(of_made, groups, of_judged, hard_to_tell=hard_to_tell(of_judged, groups[judged]), seed=seed),
        distance_by_group(made, of_made, real, groups, network, seed=seed),
    )


def _memorisation(made: np.ndarray, reference: np.ndarray, holdout: np.ndarray, seed: int) -> Memorisation:
    rng, device = np.random.default_rng(seed), pick_device()
    drawn, members, others = (x[rng.permutation(len(x))[:MAX_LOOKED_UP]] for x in (made, reference, holdout))
    inside, outside = (gan_leaks_scores(images, drawn, device) for images in (members, others))
    reached = tpr_at_fpr(inside, outside, FPR)
    return Memorisation(len(members), len(others), len(drawn), auc(inside, outside), reached)
