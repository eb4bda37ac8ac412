"""The one-run bound on whole runs: honest ones stay under their claim, broken ones do not."""

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from client.app import create_app
from common.config import RunConfig
from common.errors import ConfigError
from common.faces import FaceDataset
from common.privacy.accounting import epsilon_of
from common.privacy.planner import run_releases
from common.privacy.randomness import SecureRandom, add_gaussian_noise
from common.privacy.units import PrivacyUnit
from simulations.audit.canary_persons import draw_canaries, with_canaries
from simulations.audit.one_run import OneRunAudit, audit_one_run
from tests.support import random_faces, tiny_config

SMALL = {"discriminator": "dcgan", "discriminator_width": 4, "num_clients": 2, "sample_rate": 0.25, "num_rounds": 12}


class QuietRandom(SecureRandom):
    """Noise of a twentieth of what is asked."""

    def gaussian(self, count: int) -> Tensor:
        return super().gaussian(count) / 20


def small(**options: object) -> RunConfig:
    return tiny_config(**(SMALL | options))  # type: ignore[arg-type]


def audited(folder: Path, config: RunConfig, num_canaries: int = 80, **options: object) -> OneRunAudit:
    faces = random_faces(12, 2, num_classes=config.model.num_classes)
    return audit_one_run(config, faces, folder / "audit", num_canaries, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("privacy_model", ["local", "central", "distributed"])
def test_an_honest_run_stays_under_its_claim(tmp_path: Path, privacy_model: str) -> None:
    config = small(privacy_model=privacy_model, epsilon=1.0, moment_noise_multiplier=8.0)
    found = audited(tmp_path, config)
    assert 0 <= found.bound < found.claimed_epsilon
    assert found.claimed_epsilon == pytest.approx(epsilon_of(run_releases(config), 1e-5), rel=1e-6)
    assert (found.canaries, found.guesses, found.rounds, found.recalibrated) == (80, 16, 12, False)
    assert 20 <= found.members <= 60
    assert 0 <= found.correct <= found.guesses
    assert (found.privacy_model, found.unit, found.delta, found.confidence) == (privacy_model, "person", 1e-5, 0.95)
    # Copies of faces are gone, and so are clear sums; the rest is in the folder that was given.
    assert not list(tmp_path.rglob("*.npz"))
    assert not list(tmp_path.rglob("released.bin"))
    assert [path.name for path in tmp_path.iterdir()] == ["audit"]


@pytest.mark.parametrize("privacy_model", ["local", "central"])
def test_noise_of_a_twentieth_is_seen(tmp_path: Path, privacy_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(privacy_model=privacy_model, epsilon=1.0, moment_noise_multiplier=8.0)
    client_app = create_app()
    if privacy_model == "local":
        client_app = create_app(lambda _instructions, _context: QuietRandom())
    else:
        monkeypatch.setattr(
            "server.aggregation.add_gaussian_noise",
            lambda total, deviation, _random: add_gaussian_noise(total, deviation, QuietRandom()),
        )
    found = audited(tmp_path, config, 150, client_app=client_app)
    assert found.claimed_epsilon <= 1.0 < found.bound


def test_under_central_nothing_clear_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The clients' sums are as clear as ever; only the coordinator's noise drowns them.
    monkeypatch.setattr(
        "server.aggregation.add_gaussian_noise",
        lambda total, deviation, random: add_gaussian_noise(total, 1e4 * deviation, random),
    )
    found = audited(tmp_path, small(privacy_model="central", epsilon=1e4, num_rounds=6), 200)
    assert found.correct < 0.9 * found.guesses  # 5 standard deviations above half


@pytest.mark.parametrize(
    "options",
    [
        {"privacy_model": "local", "local_steps": 2, "discriminator": "conv-dropout"},
        {"privacy_model": "central", "unit": "image", "partitioner": "iid", "num_classes": 3, "moment_batch": 6},
        {"privacy_model": "local", "num_classes": 2, "loss": "wasserstein", "augment": "colour", "augment_views": 2},
        {"privacy_model": "central", "moment_rounds": 0, "loss": "hinge", "adaptive": True},
        {"privacy_model": "local", "local_steps": 2, "num_classes": 3, "loss": "cross-entropy", "moment_batch": 6},
    ],
    ids=["local-steps", "images-of-classes", "augmented-persons-of-classes", "no-moments", "classifier"],
)
def test_signal_is_heard_in_every_kind_of_run(tmp_path: Path, options: dict[str, object]) -> None:
    # Hardly any noise: whoever hears anything guesses nearly all.
    config = small(**{"epsilon": 1e6, "generator_batch": 6, "num_rounds": 8, "sample_rate": 0.5, **options})
    found = audited(tmp_path, config, 100)
    assert found.correct >= 0.85 * found.guesses
    assert found.unit == str(config.privacy.unit)


def test_fewer_rounds_get_their_own_noise(tmp_path: Path) -> None:
    config = small(epsilon=8.0, num_rounds=500)
    found = audited(tmp_path, config, 20, num_rounds=3)
    assert (found.rounds, found.recalibrated) == (3, True)
    assert found.noise_multiplier < config.privacy.noise_multiplier
    assert 7.9 < found.claimed_epsilon <= 8.0
    again = audited(tmp_path / "again", small(epsilon=8.0, num_rounds=3), 20, num_rounds=5)
    assert (again.rounds, again.recalibrated) == (3, False)


def test_a_run_without_privacy_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_canaries = 0"):
        audited(tmp_path, small(), 0)
    with pytest.raises(ConfigError, match="no epsilon to audit"):
        audited(tmp_path, small(privacy_model="none"))
    audited(tmp_path, small(num_rounds=1), 4)
    with pytest.raises(ConfigError, match="holds a run already"):
        audited(tmp_path, small(num_rounds=1), 4)


def test_canaries_are_one_unit_each_and_nearly_orthogonal() -> None:
    for unit, labels in ((PrivacyUnit.PERSON, 3), (PrivacyUnit.IMAGE, 0)):
        config = small(unit=str(unit), num_classes=labels, moment_batch=6, generator_batch=6)
        canaries = draw_canaries(config, 9, np.random.default_rng(0))
        sizes = [len(images) for images in canaries.units(PrivacyUnit.PERSON)]
        assert sizes == ([1, 2] * 5)[:9] if unit is PrivacyUnit.PERSON else [1] * 9
        assert (canaries.labels is not None) == (labels > 0)
        pixels = canaries.tensor(np.arange(len(canaries))).flatten(1).numpy()
        cosines = pixels @ pixels.T / pixels.shape[1]
        assert np.abs(cosines - np.eye(len(pixels))).max() < 5 / np.sqrt(pixels.shape[1])


def test_a_client_holds_the_chosen_canaries_beside_its_own() -> None:
    canaries = draw_canaries(small(num_classes=2, moment_batch=6), 6, np.random.default_rng(0))
    own = random_faces(3, 2, num_classes=2)
    held = with_canaries(own, canaries, np.array([1, 4]))
    assert [len(images) for images in held.units(PrivacyUnit.PERSON)] == [2, 2, 2, 2, 1]
    assert held.labels is not None
    assert np.array_equal(held.images[:6], own.images)
    assert np.array_equal(held.images[6:], canaries.images[[1, 2, 6]])
    photographed = FaceDataset(own.images, own.persons, photographs=np.array([0, 0, 1, 2, 3, 4]))
    held = with_canaries(photographed, canaries, np.array([1, 4]))
    assert [len(images) for images in held.units(PrivacyUnit.IMAGE)] == [2, 1, 1, 1, 1, 1, 1, 1]
    nobody = with_canaries(own, canaries, np.array([], dtype=np.int64))
    assert np.array_equal(nobody.images, own.images)


@pytest.mark.slow
@pytest.mark.parametrize("privacy_model", ["local", "central"])
def test_honest_runs_stay_under_their_claims_and_the_bound_rises_with_epsilon(
    tmp_path: Path, privacy_model: str
) -> None:
    bounds = {}
    for epsilon in (1.0, 8.0):
        config = small(privacy_model=privacy_model, epsilon=epsilon, moment_noise_multiplier=8.0, num_rounds=100)
        runs = [audited(tmp_path / f"{epsilon}-{seed}", config, 300, seed=seed) for seed in range(3)]
        assert all(run.bound < run.claimed_epsilon for run in runs)
        bounds[epsilon] = np.mean([run.bound for run in runs])
    assert bounds[1.0] < 0.5 < bounds[8.0]
