"""What an owner allows, and that nothing in a run's configuration can allow more."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from client.policy import OwnerPolicy
from client.run_check import rounds_of
from client.simulated import simulated_owner
from common.config import RunConfig
from common.errors import ConfigError, PrivacyError, VisardError
from common.faces import load_faces
from common.fields import Scalar, key_of
from common.messages import RoundInstructions
from common.models.discriminators import DISCRIMINATORS, discriminator_of, discriminator_size
from common.models.flat import num_parameters
from common.privacy.planner import with_noise
from common.privacy.units import PrivacyModel, PrivacyUnit
from common.sections import FaceSource, ModelConfig
from simulations.recipe import load_recipe, recipe_names
from tests.support import gradient_instructions, tiny_config

OWNER: dict[str, Scalar] = {"data": "/faces", "state-dir": "/state", "max-epsilon": 3.0}


def policy_of(node: dict[str, Any], run: dict[str, Any] | None = None) -> OwnerPolicy:
    return OwnerPolicy.from_context(Context(1, 2, dict(node), RecordDict(), dict(run or {})))


def asked(model: str, unit: str = "person") -> RoundInstructions:
    config = tiny_config(privacy_model=model, unit=unit)
    return gradient_instructions(config, np.zeros(3, np.float32))


def test_the_least_that_an_owner_says_is_strict() -> None:
    policy = policy_of(OWNER)
    assert policy == OwnerPolicy(data="/faces", state_dir=Path("/state"), max_epsilon=3.0)
    assert (policy.unit, policy.allowed_privacy_models) == (PrivacyUnit.PERSON, (PrivacyModel.LOCAL,))
    policy.check(asked("local"))
    for model in ("central", "none"):
        with pytest.raises(
            PrivacyError, match=f"privacy-model {model} is asked and this owner's allowed-privacy-models"
        ):
            policy.check(asked(model))
    with pytest.raises(PrivacyError, match=r"unit image is asked and this owner's unit is person"):
        policy.check(asked("local", "image"))


@pytest.mark.parametrize("allowed", ["local", "central", "none", "local,central", "central, none"])
@pytest.mark.parametrize("unit", ["person", "image"])
@pytest.mark.parametrize("model", [str(model) for model in PrivacyModel])
@pytest.mark.parametrize("protected", ["person", "image"])
def test_each_permission_allows_what_it_names(allowed: str, unit: str, model: str, protected: str) -> None:
    node = OWNER | {"allowed-privacy-models": allowed, "unit": unit}
    fits = model in allowed.replace(" ", "").split(",") and (
        model == "none" or unit == "image" or protected == "person"
    )
    if fits:
        policy_of(node).check(asked(model, protected))
    else:
        with pytest.raises(PrivacyError):
            policy_of(node).check(asked(model, protected))


# A key of the policy, what a run asks, and values of the key of which the run passes the first and not the second.
LIMITS: list[tuple[str, dict[str, Scalar], Any, Any]] = [
    ("min-noise-multiplier", {"noise_multiplier": 2.0, "moment_noise_multiplier": 3.73, "epsilon": 1e3}, 2.0, 2.0001),
    ("min-moment-noise-multiplier", {"moment_noise_multiplier": 2.0}, 2.0, 2.0001),
    ("min-cohort", {"min_clients": 5}, 5, 6),
    ("min-expected-batch", {"expected_batch": 3.0}, 3.0, 3.0001),
    ("max-sample-rate", {"sample_rate": 0.25}, 0.25, 0.2499),
    ("max-images-per-person", {"images_per_person": 7}, 7, 6),
    ("max-parameters", {"discriminator": "mlp"}, 52_865, 52_864),
    ("max-local-steps", {"local_steps": 3}, 3, 2),
    ("max-planned-steps", {"num_rounds": 9}, 9, 8),
    ("allowed-discriminators", {"discriminator": "mlp"}, "dcgan,mlp", "dcgan,resnet"),
]


@pytest.mark.parametrize(("key", "run", "passes", "fails"), LIMITS, ids=[limit[0] for limit in LIMITS])
def test_each_limit_refuses_just_beyond_it(key: str, run: dict[str, Scalar], passes: Any, fails: Any) -> None:
    rounds = rounds_of(tiny_config(privacy_model="local", **run))
    strict, loose = policy_of(OWNER | {key: fails}), policy_of(OWNER | {key: passes})
    assert not [refusal for asked in rounds for refusal in loose.refusals(asked)]
    found = {refusal.key for asked in rounds for refusal in strict.refusals(asked)}
    assert found == {key}
    with pytest.raises(PrivacyError, match=f"this owner's {key} is"):
        strict.check(next(asked for asked in rounds if strict.refusals(asked)))


@pytest.mark.parametrize("name", recipe_names())
def test_a_default_policy_allows_every_recipe_under_local(name: str) -> None:
    config = with_noise(load_recipe(name, {"privacy-model": "local", "checkpoint-every": 1}))
    policy = policy_of(OWNER | {"unit": str(config.privacy.unit)})
    assert [policy.refusals(asked) for asked in rounds_of(config)] == [[]] * len(rounds_of(config))


def test_a_discriminator_is_counted_without_being_built() -> None:
    for name in DISCRIMINATORS:
        model = ModelConfig(discriminator=name, discriminator_width=4, num_classes=3)
        assert discriminator_size(model) == num_parameters(discriminator_of(model))
    assert discriminator_size(ModelConfig(discriminator="mlp", discriminator_width=1024, image_size=128)) > 9e8


def test_a_policy_as_flower_s_flat_configuration_is_the_same_policy() -> None:
    policy = policy_of(OWNER | {"allowed-privacy-models": "local,none", "disclose-reason": False, "crop": 0.5})
    flat = policy.to_flat()
    assert OwnerPolicy.from_config(flat) == policy
    assert {type(value) for value in flat.values()} <= {bool, int, float, str}
    assert set(flat) == {key_of(field.name) for field in dataclasses.fields(OwnerPolicy)}


def test_an_unknown_key_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'max-sample-rat' in this node's policy: did you mean 'max-sample-rate'"):
        policy_of(OWNER | {"max-sample-rat": 0.1})


def test_a_partition_id_at_a_real_node_lets_the_run_name_neither_data_nor_budget() -> None:
    run = RunConfig().to_flat() | {"data": "/home/owner/photographs", "privacy-model": "none"}
    with pytest.raises(ConfigError, match="lacks data"):
        policy_of({"partition-id": 0, "num-partitions": 2}, run)


def test_the_run_s_configuration_allows_nothing() -> None:
    """A coordinator that puts the owner's own keys into the run's configuration gets no further."""
    run = RunConfig().to_flat() | {"allowed-privacy-models": "none", "disclose-reason": True, "max-epsilon": 1e9}
    assert policy_of(OWNER, run) == policy_of(OWNER)
    assert policy_of(OWNER | {"partition-id": 0, "num-partitions": 2}, run) == policy_of(OWNER)


@pytest.mark.parametrize("key", list(OWNER))
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"lacks {key}:"):
        policy_of({k: v for k, v in OWNER.items() if k != key})


@pytest.mark.parametrize(
    "changes",
    [
        {"max-epsilom": 3.0},
        {"allow-central": True},
        {"max_sample_rate": 0.1},
        {"max-epsilon": -1.0},
        {"max-epsilon": float("inf")},
        {"max-epsilon": float("nan")},
        {"max-epsilon": "3"},
        {"delta": 0.0},
        {"delta": 0.5},
        {"delta": float("nan")},
        {"crop": 0.0},
        {"crop": 1.5},
        {"detect": "some"},
        {"person-column": "name"},
        {"label-column": "age"},
        {"label-column": "age", "label-values": "1,2,1"},
        {"unit": "album"},
        {"unit": 1},
        {"data": 7},
        {"allowed-privacy-models": ""},
        {"allowed-privacy-models": "local,all"},
        {"allowed-privacy-models": 1},
        {"allowed-privacy-models": True},
        {"allowed-discriminators": "dcgan,transformer"},
        {"min-noise-multiplier": -0.1},
        {"min-noise-multiplier": float("nan")},
        {"min-moment-noise-multiplier": 1e9},
        {"min-cohort": 0},
        {"min-cohort": 2.0},
        {"min-expected-batch": -1.0},
        {"max-sample-rate": 0.0},
        {"max-sample-rate": 1.1},
        {"max-images-per-person": 0},
        {"max-parameters": 0},
        {"max-local-steps": 0},
        {"max-planned-steps": 0},
        {"disclose-reason": "no"},
        {"disclose-reason": 1},
        {"state-dir": ""},
        {"state-dir": 3},
    ],
    ids=str,
)
def test_an_unknown_key_or_a_wrong_value_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        policy_of(OWNER | changes)


def simulated(client: int, clients: int, **run: Scalar) -> OwnerPolicy:
    flat = RunConfig().to_flat() | {"runs-dir": "/runs"} | {key.replace("_", "-"): v for key, v in run.items()}
    node: dict[str, Scalar] = {"partition-id": client, "num-partitions": clients}
    return OwnerPolicy.from_config(simulated_owner(node, flat, 1))


@pytest.mark.parametrize("clients", [1, 3, 7])
def test_simulated_clients_draw_disjoint_persons_and_together_all(clients: int) -> None:
    whole = load_faces(FaceSource(data="procedural:persons=7,images=2,seed=5"), 28, 1)
    shares = []
    for client in range(clients):
        policy = simulated(client, clients, data="procedural:persons=7,images=2,seed=5")
        shares.append(load_faces(policy.source, 28, 1))
    np.testing.assert_array_equal(np.concatenate([share.images for share in shares]), whole.images)
    assert sum(share.num_persons for share in shares) == 7


def test_a_simulated_owner_s_budget_is_the_run_s() -> None:
    policy = simulated(2, 4, epsilon=4.0, delta=1e-6, privacy_model="central", unit="image", crop=0.5)
    assert (policy.max_epsilon, policy.delta, policy.crop) == (4.0, 1e-6, 0.5)
    assert (policy.unit, policy.allowed_privacy_models) == (PrivacyUnit.IMAGE, (PrivacyModel.CENTRAL,))
    assert policy.state_dir == Path("/runs/flwr-1/clients/2")
    assert simulated(1, 4, epsilon=4.0).state_dir != policy.state_dir
    local = simulated(0, 1, privacy_model="local")
    assert local.allowed_privacy_models == (PrivacyModel.LOCAL,)
    open_run = simulated(0, 1, privacy_model="none")
    assert (open_run.max_epsilon, open_run.allowed_privacy_models) == (0.0, (PrivacyModel.NONE,))


def test_a_simulated_folder_needs_the_placeholder() -> None:
    assert simulated(3, 5, data="/faces/{client}/all").data == "/faces/3/all"
    part = simulated(3, 5, data="flwr-datasets:/faces,partitions=5,partition={client}")
    assert part.data == "flwr-datasets:/faces,partitions=5,partition=3"
    with pytest.raises(ConfigError, match="own faces"):
        simulated(3, 5, data="/faces")
    with pytest.raises(VisardError):
        simulated(0, 2, data="procedural:persons=many")


def test_a_simulated_owner_reads_its_faces_as_the_run_says() -> None:
    said: dict[str, Scalar] = {
        "data": "/faces/{client}",
        "crop": 0.7,
        "detect": "largest",
        "attributes": "/faces/{client}.csv",
        "file_column": "image",
        "person_column": "who",
        "label_column": "smile",
        "label_values": "no,yes",
    }
    assert set(said) == {field.name for field in dataclasses.fields(FaceSource)}
    filled = {"data": "/faces/2", "attributes": "/faces/2.csv"}
    assert simulated(2, 4, **said, num_classes=2).source == FaceSource(**(said | filled))  # type: ignore[arg-type]


def test_every_way_of_reading_is_the_owner_s_to_choose() -> None:
    keys: dict[str, Any] = {
        "attributes": "utkface",
        "label-column": "gender",
        "label-values": "male,female",
        "crop": 0.6,
    }
    policy = policy_of(OWNER | keys, RunConfig().to_flat())
    assert policy.source == FaceSource(
        data="/faces", attributes="utkface", label_column="gender", label_values="male,female", crop=0.6
    )


def test_a_policy_cannot_be_loosened_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy_of(OWNER).max_epsilon = 4.0  # type: ignore[misc]


def test_flower_s_own_node_does_not_answer_for_a_policy_that_names_its_coordinator(tmp_path: Path) -> None:
    """It could not check who asks: the message's seal is gone, or never was, when the app gets it."""
    keys = f'data = "faces"\nstate-dir = "state"\nmax-epsilon = 3.0\nledger = "{"0" * 64}"\n'
    path = tmp_path / "owner.toml"
    path.write_text(keys)
    assert policy_of({"policy": str(path)}).max_epsilon == 3.0
    path.write_text(keys + 'coordinator = "clinic.kit.toml"\n')
    with pytest.raises(ConfigError, match="flower-supernode cannot check who asks: start `visard client start`"):
        policy_of({"policy": str(path)})
