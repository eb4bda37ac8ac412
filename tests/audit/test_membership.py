"""Membership inference against the attacks' own controls, and against real runs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from common.config import RunConfig
from common.errors import CheckpointError, DataError
from common.evaluation.membership import auc, gan_leaks_scores, median_radius, monte_carlo_scores
from common.faces import FaceDataset, load_faces
from common.fields import Scalar
from common.privacy.planner import with_noise
from common.sections import FaceSource
from server.checkpoint import FILE_NAME
from simulations.audit.membership import audit_membership, load_holdout, promised_ceilings
from simulations.recipe import load_recipe
from simulations.simulate import prepare, simulate
from tests.support import TINY, random_faces
from tests.unit.test_faces_real_data import at_hand


def _photographs(count: int, seed: int) -> np.ndarray:
    """Of one distribution: thirty coarse patterns, mixed, and noise, (count, 1, 28, 28)."""
    patterns = np.kron(np.random.default_rng(99).normal(size=(30, 7, 7)), np.ones((4, 4)))
    rng = np.random.default_rng(seed)
    mixed = np.tensordot(rng.normal(size=(count, 30)), patterns, 1) * 12 + rng.normal(size=(count, 28, 28)) * 10
    return np.clip(mixed + 128, 0, 255).astype(np.uint8)[:, None]


@pytest.mark.parametrize("memorised", [True, False])
def test_a_memoriser_is_told_and_a_generator_that_learned_the_distribution_is_not(memorised: bool) -> None:
    members, others = _photographs(200, 0), _photographs(1000, 1)
    rng = np.random.default_rng(2)
    copies = members[rng.integers(0, 200, 2000)] + rng.normal(size=(2000, 1, 28, 28)) * 5
    generated = np.clip(copies, 0, 255).astype(np.uint8) if memorised else _photographs(2000, 3)
    images = np.concatenate([members, others])
    nearness = gan_leaks_scores(images, generated)
    radius = median_radius(-nearness[:200], -nearness[200:])
    for scores in (nearness, monte_carlo_scores(images, generated, radius)):
        found = auc(scores[:200], scores[200:])
        if memorised:
            assert found.low > 0.98
        else:
            assert found.low <= 0.5 <= found.high


def _run(folder: Path, faces: FaceDataset, **options: Scalar) -> Path:
    """A tiny federation, trained to its end on `faces` as they lie in a file."""
    data = folder / "faces.npz"
    faces.save(data)
    flat = TINY | {"data": str(data), "num-clients": 2} | {key.replace("_", "-"): v for key, v in options.items()}
    state, dealt = prepare(folder / "run", RunConfig.from_flat(flat))
    simulate(folder / "run", state, dealt)
    return folder / "run"


def test_a_discriminator_that_knows_its_faces_by_heart_is_told(tmp_path: Path) -> None:
    options: dict[str, Scalar] = {
        "privacy_model": "none",
        "unit": "image",
        "num_rounds": 60,
        "moment_rounds": 0,
        "sample_rate": 1.0,
        "expected_batch": 20.0,
        "checkpoint_every": 60,
    }
    run = _run(tmp_path, random_faces(20, 2), **options)
    found = audit_membership(run, random_faces(400, 1, seed=1), generated=50)
    assert (found.unit, found.members, found.non_members, found.dealt) == ("image", 40, 400, 40)
    logan, *others = found.attacks
    assert logan.attack == "logan"
    assert logan.auc_low > 0.9
    assert [attack.attack for attack in others] == ["monte-carlo", "gan-leaks"]
    assert logan.tpr is None  # 400 cannot show one in a thousand
    assert (found.ceilings, found.kept, found.epsilon) == ((), None, None)


def test_a_classifier_that_knows_its_faces_by_heart_is_told(tmp_path: Path) -> None:
    """Labels without a rule can only be learned by heart: the margin of a face is its score."""
    options: dict[str, Scalar] = {
        "privacy_model": "none",
        "unit": "image",
        "num_classes": 2,
        "loss": "cross-entropy",
        "num_rounds": 60,
        "moment_rounds": 0,
        "sample_rate": 1.0,
        "expected_batch": 20.0,
        "checkpoint_every": 60,
    }
    run = _run(tmp_path, random_faces(20, 2, num_classes=2), **options)
    found = audit_membership(run, random_faces(400, 1, seed=1, num_classes=2), generated=50)
    logan, *others = found.attacks
    assert logan.attack == "logan"
    assert logan.auc_low > 0.9
    assert [attack.attack for attack in others] == ["monte-carlo", "gan-leaks"]


def test_persons_are_judged_whole_and_the_promise_is_reported(tmp_path: Path) -> None:
    run = _run(tmp_path, random_faces(12, 3))
    holdout = random_faces(1100, 2, seed=1)
    found = audit_membership(run, holdout, generated=50)
    assert (found.unit, found.members, found.non_members) == ("person", 12, 1100)
    assert all(attack.tpr is not None and attack.tpr_low is not None for attack in found.attacks)
    assert [(c.guarantee, c.rigorous) for c in found.ceilings] == [
        ("approximate-dp", True),
        ("dp-curve", True),
        ("gaussian-dp", False),
    ]
    assert (found.epsilon, found.delta, found.kept) == (10.0, 1e-5, True)
    plain = json.loads(json.dumps(dataclasses.asdict(found)))
    assert plain["attacks"][0]["auc"] == found.attacks[0].auc
    assert audit_membership(run, holdout, generated=50) == found


def test_too_many_units_are_thinned_out_whole(tmp_path: Path) -> None:
    run = _run(tmp_path, random_faces(12, 3))
    found = audit_membership(run, random_faces(30, 2, seed=1), max_units=10, generated=50)
    assert (found.members, found.non_members, found.dealt) == (10, 10, 12)


def test_a_run_of_moments_alone_has_no_discriminator_to_attack(tmp_path: Path) -> None:
    run = _run(tmp_path, random_faces(12, 3), num_rounds=0)
    found = audit_membership(run, random_faces(30, 1, seed=1), generated=50)
    assert [attack.attack for attack in found.attacks] == ["monte-carlo", "gan-leaks"]
    assert "no adversarial round" in found.left_out["logan"]


def test_a_holdout_that_is_none_is_refused(tmp_path: Path) -> None:
    faces = random_faces(12, 3, num_classes=3)
    run = _run(tmp_path, faces, num_classes=3, moment_batch=6, generator_batch=6)
    others = random_faces(30, 2, seed=1, num_classes=3)
    with pytest.raises(DataError, match="holdout is empty"):
        audit_membership(run, others.subset(np.zeros(0, np.int64)))
    images = others.images.copy()
    images[7] = faces.images[30]
    with pytest.raises(DataError, match="1 of the holdout's 60 images"):
        audit_membership(run, dataclasses.replace(others, images=images))
    with pytest.raises(DataError, match="preprocess them alike"):
        audit_membership(run, dataclasses.replace(others, images=others.images.repeat(3, axis=1)))
    with pytest.raises(DataError, match="without persons"):
        audit_membership(run, dataclasses.replace(others, persons=None))
    with pytest.raises(DataError, match="labelled alike"):
        audit_membership(run, dataclasses.replace(others, labels=None))
    with pytest.raises(DataError, match="labelled alike"):
        audit_membership(run, dataclasses.replace(others, labels=others.labels + 1))


def test_a_run_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    run = _run(tmp_path, random_faces(12, 3))
    (run / FILE_NAME).unlink()
    with pytest.raises(CheckpointError, match="resume"):
        audit_membership(run, random_faces(30, 2, seed=1))
    (run / "generator.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no finished generator"):
        audit_membership(run, random_faces(30, 2, seed=1))


def test_the_holdout_is_the_test_split_unless_another_source_is_named(tmp_path: Path) -> None:
    images = random_faces(5, 1).images[:, 0]
    path = tmp_path / "both.npz"
    np.savez(path, x_train=images, x_test=images[:2])
    config = RunConfig.from_flat(TINY | {"data": str(path)})
    assert len(load_holdout(config)) == 2
    other = tmp_path / "other.npz"
    np.savez(other, images=images[:3])
    assert len(load_holdout(config, str(other))) == 3


def test_the_promised_ceilings_fall_with_epsilon_and_the_curve_is_the_tighter() -> None:
    previous = 1.0
    for epsilon in (10.0, 4.0, 1.0):
        config = with_noise(load_recipe("mnist", {"epsilon": epsilon, "moment-rounds": 0}))
        point, curve, gaussian = promised_ceilings(config)
        assert max(curve.auc, gaussian.auc) < point.auc
        assert curve.auc < previous
        assert max(curve.tpr, gaussian.tpr) <= point.tpr
        previous = curve.auc


# Least squares never saturates, and the discriminator has five steps for one of the generator: it learns by heart.
MEMORISE: dict[str, Scalar] = {
    "num-clients": 5,
    "sample-rate": 1.0,
    "expected-batch": 100.0,
    "discriminator": "mlp",
    "discriminator-width": 16,
    "max-grad-norm": 1.0,
    "refine-steps": 0,
    "generator-width": 16,
    "generator-batch": 64,
    "loss": "least-squares",
    "discriminator-steps": 5,
    "discriminator-lr": 3e-4,
    "generator-lr": 1e-3,
    "adam-beta1": 0.5,
    "moment-rounds": 0,
    "moment-weight": 0.0,
    "sample-every": 1500,
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "options",
    [
        {"privacy-model": "none", "checkpoint-every": 1500, "num-rounds": 1500},
        {"privacy-model": "central", "num-rounds": 200},
    ],
    ids=["no privacy", "epsilon 10"],
)
def test_500_digits_are_found_out_without_privacy_and_not_with_it(tmp_path: Path, options: dict[str, Scalar]) -> None:
    """One code, one set of digits, 10,000 test digits as non-members: the control must fail for a pass to mean much."""
    mnist = str(at_hand("mnist"))
    train, test = (load_faces(FaceSource(data=mnist), 28, 1, split=split) for split in ("train", "test"))
    digits = train.subset(np.random.default_rng(0).choice(len(train), 500, replace=False))
    digits.save(tmp_path / "digits.npz")
    config = load_recipe("mnist", {**MEMORISE, **options, "data": str(tmp_path / "digits.npz")})
    state, dealt = prepare(tmp_path / "run", config)
    simulate(tmp_path / "run", state, dealt)
    found = audit_membership(tmp_path / "run", test)
    assert (found.members, found.non_members) == (500, 10_000)
    logan = found.attacks[0]
    if options["privacy-model"] == "none":
        assert logan.auc_low >= 0.8
    else:
        assert found.kept
        assert all(attack.auc_high < min(ceiling.auc for ceiling in found.ceilings) for attack in found.attacks)
        assert logan.auc < 0.6
