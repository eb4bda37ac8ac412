"""Was this face in the run? Three attacks on what a finished run leaves behind, against what its promise allows.

The attacker holds the discriminator of the last round, as the coordinator and every client do, or draws from the
released generator. The members are the faces that the run was dealt; the non-members come from the auditor, and should
be of the same source: faces that merely look different are told apart without any leak (MNIST's test digits have other
writers than its training digits). A figure says what these attacks found, never that there is nothing to find.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.applications.generate import TrainedGenerator
from common.config import RunConfig
from common.device import pick_device
from common.errors import DataError
from common.evaluation.membership import (
    auc,
    dp_ceiling,
    gan_leaks_scores,
    gdp_ceiling,
    gdp_mu,
    logan_scores,
    median_radius,
    monte_carlo_scores,
    tpr_at_fpr,
    unit_means,
)
from common.faces import FaceDataset, load_faces
from common.privacy.accounting import epsilon_of
from common.privacy.planner import run_releases
from common.privacy.units import PrivacyModel
from server.checkpoint import CheckpointStore, CoordinatorState
from simulations.simulate import load_simulated_faces

FPR = 0.001
# Units of either kind that are judged, drawn evenly where there are more; and generated images to compare to.
MAX_UNITS, GENERATED = 10_000, 10_000
# The deltas at which the epsilon of the whole schedule is looked up for the ceiling of its privacy curve.
_DELTAS = 10.0 ** np.arange(-12, 0, 0.25)
# Where a loss pulls the logits of real images to, other than up.
_REAL_LOGIT = {"least-squares": 1.0}


@dataclass(frozen=True)
class AttackFigures:
    """What one attack reaches: AUC and TPR at the audit's FPR, each with its 95 % interval over the units judged.

    attack: logan, monte-carlo or gan-leaks. tpr and its bounds are None where the non-members are too few for the FPR.
    """

    attack: str
    auc: float
    auc_low: float
    auc_high: float
    tpr: float | None
    tpr_low: float | None
    tpr_high: float | None


@dataclass(frozen=True)
class PromisedCeiling:
    """The greatest AUC and TPR that no attack can pass under `guarantee`.

    guarantee: approximate-dp (the promised epsilon and delta), dp-curve (the epsilon of the run's schedule at every
    delta), or gaussian-dp (the mu-GDP of the promised epsilon and delta, which the run does not promise: the usual
    yardstick, and the only one that is not rigorous).
    """

    guarantee: str
    rigorous: bool
    auc: float
    tpr: float


@dataclass(frozen=True)
class MembershipAudit:
    """Membership inference on one run, all fields JSON-plain.

    unit: what is told in or out, that of the run's promise. members, non_members: units judged; dealt: units of the
    run. left_out: why an attack is missing, by its name. ceilings: empty for a run without privacy. kept: whether
    every lower bound lies under every rigorous ceiling; None without privacy.
    """

    unit: str
    members: int
    non_members: int
    dealt: int
    generated: int
    fpr: float
    epsilon: float | None
    delta: float | None
    attacks: tuple[AttackFigures, ...]
    left_out: dict[str, str]
    ceilings: tuple[PromisedCeiling, ...]
    kept: bool | None


def audit_membership(
    run: Path, holdout: FaceDataset, *, seed: int = 0, max_units: int = MAX_UNITS, generated: int = GENERATED
) -> MembershipAudit:
    """Attack the finished run in `run` (`runs/NAME` of `visard simulate`), whose faces must still be where they were.

    holdout: faces that were not in the run, preprocessed as its own were (`load_holdout`). seed: of the draw of units
    and of the generated images. Raises CheckpointError where the run is not finished, DataError where the holdout is
    empty, does not fit the run or has an image of the run in it.
    """
    generator = TrainedGenerator.load(run)
    state = CheckpointStore(run).load()
    config = state.config
    dealt = load_simulated_faces(config)
    _check(config, dealt, holdout)
    rng = np.random.default_rng(seed)
    (members, inside), (others, outside) = (_drawn(faces, config, max_units, rng) for faces in (dealt, holdout))
    images = np.concatenate([members.images, others.images])
    labels = None
    if config.model.num_classes and members.labels is not None and others.labels is not None:
        labels = np.concatenate([members.labels, others.labels])
    fakes, _ = generator.draw(generated, seed)
    scores, left_out = _scores(state, images, labels, len(members), fakes)
    attacks = tuple(
        _figures(name, unit_means(score[: len(members)], inside), unit_means(score[len(members) :], outside))
        for name, score in scores.items()
    )
    private = config.privacy.privacy_model is not PrivacyModel.NONE
    ceilings = promised_ceilings(config) if private else ()
    return MembershipAudit(
        unit=str(config.privacy.unit),
        members=len(inside),
        non_members=len(outside),
        dealt=len(dealt.units(config.privacy.unit)),
        generated=generated,
        fpr=FPR,
        epsilon=config.privacy.epsilon if private else None,
        delta=config.privacy.delta if private else None,
        attacks=attacks,
        left_out=left_out,
        ceilings=ceilings,
        kept=_kept(attacks, ceilings) if private else None,
    )


def load_holdout(config: RunConfig, data: str | None = None) -> FaceDataset:
    """Faces of another source, `data`, read and cut as the run's own; by default the run's own source, split 'test'.

    Raises DataError where they cannot be read, or the source has no such split.
    """
    source, split = config.simulation, "test"
    if data is not None:
        source, split = replace(source, data=data), "train"
    return load_faces(source, config.model.image_size, config.model.channels, split=split)


def promised_ceilings(config: RunConfig) -> tuple[PromisedCeiling, ...]:
    """What the promise of a private run allows an attack on its unit, rigorous ones first."""
    privacy = config.privacy
    releases = run_releases(config)
    promised = (privacy.epsilon, privacy.delta)
    curve = [promised, *((epsilon_of(releases, float(delta)), float(delta)) for delta in _DELTAS)]
    found = {
        "approximate-dp": dp_ceiling([promised], FPR),
        "dp-curve": dp_ceiling(curve, FPR),
        "gaussian-dp": gdp_ceiling(gdp_mu(*promised), FPR),
    }
    return tuple(
        PromisedCeiling(name, name != "gaussian-dp", ceiling.auc, ceiling.tpr) for name, ceiling in found.items()
    )


def _check(config: RunConfig, dealt: FaceDataset, holdout: FaceDataset) -> None:
    if len(holdout) == 0:
        raise DataError("the holdout is empty: give faces that were not in the run")
    if holdout.images.shape[1:] != dealt.images.shape[1:]:
        raise DataError(
            f"the holdout's images are {holdout.images.shape[1:]} and the run's {dealt.images.shape[1:]}: preprocess them alike"
        )
    classes = config.model.num_classes
    if classes and (holdout.labels is None or int(holdout.labels.max()) >= classes):
        raise DataError(f"the run has {classes} labels and the holdout has none, or others: give faces labelled alike")
    seen = {image.tobytes() for image in dealt.images}
    both = sum(image.tobytes() in seen for image in holdout.images)
    if both:
        raise DataError(
            f"{both} of the holdout's {len(holdout)} images are images of the run: non-members must not have been in it"
        )


def _drawn(
    faces: FaceDataset, config: RunConfig, limit: int, rng: np.random.Generator
) -> tuple[FaceDataset, list[np.ndarray]]:
    """At most `limit` units, drawn evenly: their images, and the indices of each unit among these."""
    units = faces.units(config.privacy.unit)
    chosen = np.sort(rng.choice(len(units), min(limit, len(units)), replace=False))
    kept = [units[unit] for unit in chosen]
    places = np.split(np.arange(sum(map(len, kept))), np.cumsum([len(unit) for unit in kept])[:-1])
    return faces.subset(np.concatenate(kept)), places


def _scores(
    state: CoordinatorState, images: np.ndarray, labels: np.ndarray | None, members: int, fakes: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The score of each image (N,), those of members first, under each attack; and why an attack was left out."""
    found, left_out = {}, {}
    if state.next_round - 1 > state.config.moments.moment_rounds:
        target = _REAL_LOGIT.get(state.config.model.loss, math.inf)
        found["logan"] = logan_scores(state.discriminator, images, labels, target)
    else:
        left_out["logan"] = "the run had no adversarial round: its discriminator was never trained"
    nearness = gan_leaks_scores(images, fakes, pick_device())
    radius = median_radius(-nearness[:members], -nearness[members:])
    found["monte-carlo"] = monte_carlo_scores(images, fakes, radius, pick_device())
    found["gan-leaks"] = nearness
    return found, left_out


def _figures(attack: str, members: np.ndarray, non_members: np.ndarray) -> AttackFigures:
    area, rate = auc(members, non_members), tpr_at_fpr(members, non_members, FPR)
    reached = (None, None, None) if rate is None else (rate.value, rate.low, rate.high)
    return AttackFigures(attack, area.value, area.low, area.high, *reached)


def _kept(attacks: tuple[AttackFigures, ...], ceilings: tuple[PromisedCeiling, ...]) -> bool:
    return all(
        attack.auc_low <= ceiling.auc and (attack.tpr_low or 0.0) <= ceiling.tpr
        for attack in attacks
        for ceiling in ceilings
        if ceiling.rigorous
    )
