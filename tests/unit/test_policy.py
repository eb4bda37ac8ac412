"""What an owner allows, and that nothing in a run's configuration can allow more."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from client.policy import OwnerPolicy, simulated_owner
from common.config import RunConfig
from common.errors import ConfigError, PrivacyError, VisardError
from common.faces import load_faces
from common.fields import Scalar
from common.messages import RoundInstructions
from common.privacy.units import PrivacyModel, PrivacyUnit
from common.sections import FaceSource
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
    assert (policy.unit, policy.allow_central, policy.allow_non_private) == (PrivacyUnit.PERSON, False, False)
    policy.check(asked("local"))
    for model, told in (("central", "allow-central"), ("none", "allow-non-private")):
        with pytest.raises(PrivacyError, match=told):
            policy.check(asked(model))
    with pytest.raises(PrivacyError, match="asks for unit person"):
        policy.check(asked("local", "image"))


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("non_private", [False, True])
@pytest.mark.parametrize("unit", ["person", "image"])
@pytest.mark.parametrize("model", [str(model) for model in PrivacyModel])
@pytest.mark.parametrize("protected", ["person", "image"])
def test_each_permission_allows_what_it_names(
    central: bool, non_private: bool, unit: str, model: str, protected: str
) -> None:
    node = OWNER | {"allow-central": central, "allow-non-private": non_private, "unit": unit}
    allowed = {"local": True, "central": central, "none": non_private}[model]
    allowed = allowed and (model == "none" or unit == "image" or protected == "person")
    if allowed:
        policy_of(node).check(asked(model, protected))
    else:
        with pytest.raises(PrivacyError):
            policy_of(node).check(asked(model, protected))


def test_a_partition_id_at_a_real_node_lets_the_run_name_neither_data_nor_budget() -> None:
    run = RunConfig().to_flat() | {"data": "/home/owner/photographs", "privacy-model": "none"}
    with pytest.raises(ConfigError, match="lacks data"):
        policy_of({"partition-id": 0, "num-partitions": 2}, run)


def test_the_run_s_configuration_allows_nothing() -> None:
    """A coordinator that puts the owner's own keys into the run's configuration gets no further."""
    run = RunConfig().to_flat() | {"allow-central": True, "allow-non-private": True, "max-epsilon": 1e9}
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
        {"allow_central": True},
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
        {"allow-central": 1},
        {"allow-central": "false"},
        {"allow-non-private": "no"},
    ],
    ids=str,
)
def test_an_unknown_key_or_a_wrong_value_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        policy_of(OWNER | changes)


def simulated(client: int, clients: int, **run: Scalar) -> OwnerPolicy:
    flat = RunConfig().to_flat() | {"runs-dir": "/runs"} | {key.replace("_", "-"): v for key, v in run.items()}
    node: dict[str, Scalar] = {"partition-id": client, "num-partitions": clients}
    return OwnerPolicy.from_config(simulated_owner(node, Context(1, 2, dict(node), RecordDict(), dict(flat))))


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
    assert (policy.unit, policy.allow_central, policy.allow_non_private) == (PrivacyUnit.IMAGE, True, False)
    assert policy.state_dir == Path("/runs/flwr-1/clients/2")
    assert simulated(1, 4, epsilon=4.0).state_dir != policy.state_dir
    local = simulated(0, 1, privacy_model="local")
    assert (local.allow_central, local.allow_non_private) == (False, False)
    open_run = simulated(0, 1, privacy_model="none")
    assert (open_run.max_epsilon, open_run.allow_central, open_run.allow_non_private) == (0.0, False, True)


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
        policy_of(OWNER).allow_central = True  # type: ignore[misc]
