"""A malicious coordinator against the shipped ClientApp: it gets faces back where there is no noise, and none where there is."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import client.discriminator
from common.config import RunConfig
from common.errors import ProtocolError
from common.evaluation.inversion import count_back, psnr_table
from common.fields import Scalar
from common.privacy.accounting import calibrate_noise_multiplier
from common.privacy.planner import with_noise
from simulations.audit.inversion import (
    Attack,
    attacks_on,
    audit_inversion,
    gradient_inversion,
    imprint,
    imprint_alone,
    public_faces,
    victim_faces,
)
from simulations.recipe import load_recipe


def shipped(recipe: str = "demo", **changes: Scalar) -> RunConfig:
    """A recipe that ships, noise at the clients, on small grey faces unless changed."""
    small: dict[str, Scalar] = {"privacy-model": "local", "image-size": 28, "channels": 1, "num-classes": 0}
    return with_noise(load_recipe(recipe, small | {key.replace("_", "-"): value for key, value in changes.items()}))


@pytest.fixture(scope="module")
def public() -> Tensor:
    """Small grey faces of others."""
    return public_faces(shipped().model)


def back(attack: Attack, folder: Path, noise_multiplier: float | None) -> int:
    """How many of an attack's victims come back."""
    found = attack.read(attack.answers(folder / f"{noise_multiplier}", noise_multiplier), noise_multiplier or 0.0)
    return count_back(psnr_table(attack.victims, found))


def whole_budget(config: RunConfig) -> float:
    """The least noise multiplier with which the run's budget allows one round of everybody."""
    return calibrate_noise_multiplier(config.privacy.epsilon, config.privacy.delta, 1.0, 1)


def test_the_imprint_takes_most_of_64_from_one_clear_update_and_none_from_a_noised_one(
    tmp_path: Path, public: Tensor
) -> None:
    config = shipped()
    attack = imprint(config, 64, public)
    assert back(attack, tmp_path, None) >= 32
    assert back(attack, tmp_path, config.privacy.noise_multiplier) == 0
    assert back(attack, tmp_path, 0.01) == 0


def test_clipping_harder_protects_nobody(tmp_path: Path, public: Tensor) -> None:
    config = shipped(max_grad_norm=0.001)
    assert back(imprint(config, 64, public), tmp_path, None) >= 32


def test_one_person_in_an_update_comes_back_from_a_clear_one_and_not_for_a_whole_budget(
    tmp_path: Path, public: Tensor
) -> None:
    config = shipped()
    attack = imprint_alone(config, 16, public)
    assert back(attack, tmp_path, None) == 16
    assert back(attack, tmp_path, config.privacy.noise_multiplier) == 0
    assert back(attack, tmp_path, whole_budget(config)) == 0


def test_gradient_inversion_takes_faces_from_clear_updates_and_none_from_noised_ones(tmp_path: Path) -> None:
    config = shipped()
    attack = gradient_inversion(config, config.model, 2)
    assert back(attack, tmp_path, None) == 2
    assert back(attack, tmp_path, config.privacy.noise_multiplier) == 0


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3)])
def test_neither_an_average_nor_a_face_of_somebody_else_counts_as_back(size: int, channels: int) -> None:
    model = shipped(image_size=size, channels=channels).model
    victims, public = victim_faces(model, 64).tensor(np.arange(64)), public_faces(model)
    for average in (victims.mean(0), public.mean(0)):
        assert count_back(psnr_table(victims, average.expand(64, -1, -1, -1))) == 0
    assert count_back(psnr_table(victims, public)) == 0
    others = psnr_table(victims, victims)
    assert float(others.masked_fill(torch.eye(64, dtype=torch.bool), 0.0).max()) < 30


def test_the_audit_tells_what_it_did() -> None:
    audit = audit_inversion(shipped(), images=8, inverted=1)
    told = json.loads(json.dumps(dataclasses.asdict(audit)))
    assert told["coordinator_sees"] == "noised"
    assert told["controls_hold"]
    assert told["passed"]
    assert told["average_back"] == told["nearest_back"] == 0
    assert [attack["attack"] for attack in told["attacks"]] == ["imprint", "imprint-alone", "gradient-inversion"]
    assert [attack["images"] for attack in told["attacks"]] == [8, 8, 1]
    assert all(attack["back_noised"] == attack["back_budget"] == 0 for attack in told["attacks"])


def test_a_run_that_tells_classes_is_attacked_all_the_same() -> None:
    """The coordinator asks for a network and a loss of its own, whatever the run's are."""
    told = {"loss": "cross-entropy", "num_classes": 3, "discriminator": "scattering", "adaptive": False}
    audit = audit_inversion(shipped(**told), images=4, inverted=1)  # type: ignore[arg-type]
    assert audit.controls_hold
    assert audit.passed


def test_a_client_that_forgets_its_noise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.discriminator, "add_gaussian_noise", lambda total, *_: total)
    audit = audit_inversion(shipped(), images=8, inverted=1)
    assert audit.controls_hold
    assert not audit.passed
    for attack in audit.attacks:
        assert attack.back_noised == attack.back_clear > 0


def test_a_run_without_noise_passes_nothing() -> None:
    audit = audit_inversion(shipped(privacy_model="none"), images=4, inverted=1)
    assert audit.noise_multiplier is None
    assert audit.coordinator_sees == "clear"
    assert not audit.passed
    assert audit.attacks[0].back_noised is audit.attacks[0].back_budget is None


@pytest.mark.slow
def test_a_run_of_moments_alone_is_judged_by_its_budget() -> None:
    audit = audit_inversion(shipped(num_rounds=0), images=4, inverted=1)
    assert audit.noise_multiplier is None
    assert audit.passed
    assert [attack.back_noised for attack in audit.attacks] == [None, None, None]
    assert [attack.back_budget for attack in audit.attacks] == [0, 0, 0]


def test_a_refusal_is_an_error_and_not_an_empty_answer(tmp_path: Path, public: Tensor) -> None:
    config = shipped()
    attack = imprint_alone(config, 2, public)
    short = dataclasses.replace(attack, weights=attack.weights[:-1])
    with pytest.raises(ProtocolError, match="2 of 2 clients refused: ProtocolError"):
        short.answers(tmp_path, None)


@pytest.mark.slow
def test_a_run_of_large_images_is_attacked_in_its_size_by_the_imprint_and_in_a_small_one_by_inversion() -> None:
    audit = audit_inversion(shipped(image_size=128, channels=3), images=16, inverted=2)
    assert [attack.network for attack in audit.attacks] == [
        "mlp, width 11, 3 x 128 x 128",
        "mlp, width 1, 3 x 128 x 128",
        "dcgan, width 32, 1 x 28 x 28",
    ]
    assert audit.passed


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", ["demo", "lfw", "mnist"])
def test_none_of_64_come_back_at_the_noise_of_a_shipped_recipe(recipe: str, tmp_path: Path) -> None:
    shape: dict[str, Scalar] = {} if recipe == "mnist" else {"image_size": 32, "channels": 3}
    config = shipped(recipe, **shape)
    for attack in attacks_on(config, 64, 64, public_faces(config.model)):
        assert back(attack, tmp_path / attack.name, None) >= 32
        assert back(attack, tmp_path / attack.name, config.privacy.noise_multiplier) == 0
        assert back(attack, tmp_path / attack.name, whole_budget(config)) == 0
