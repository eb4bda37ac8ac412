"""A coordinator that asks for more than it may: it gets an error and nothing else, before a face is looked at."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

import client.app
from client.app import create_app
from common.config import RunConfig
from common.fields import Scalar
from common.messages import RoundInstructions
from common.models.discriminators import discriminator_of
from common.models.flat import get_flat, num_parameters
from common.privacy.ledger import Ledger
from simulations.engine import InProcessGrid
from tests.support import gradient_instructions, tiny_config

CONFIG = tiny_config(privacy_model="local", num_rounds=4, moment_rounds=0)
FACES = "procedural:persons=12,images=2"


def honest(config: RunConfig = CONFIG, server_round: int = 1) -> RoundInstructions:
    return gradient_instructions(config, get_flat(discriminator_of(config.model)), server_round)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were opened: the real door, and a note of who went through."""
    opened: list[str] = []
    real = client.app.load_faces

    def noting(source: Any, *given: Any, **named: Any) -> Any:
        opened.append(source.data)
        return real(source, *given, **named)

    monkeypatch.setattr(client.app, "load_faces", noting)
    client.app.open_faces.cache_clear()
    return opened


Ask = Callable[[RecordDict], Message]


def node(state: Path, **policy: Scalar) -> Ask:
    """The real ClientApp of an owner with the default policy, but for `policy`."""
    keys: dict[str, Scalar] = {"data": FACES, "state-dir": str(state), "max-epsilon": 10.0, **policy}
    grid = InProcessGrid(create_app(), [keys])

    def ask(content: RecordDict) -> Message:
        (reply,) = grid.send_and_receive([Message(content, grid.get_node_ids()[0], "train", ttl=60.0, group_id="1")])
        return reply

    return ask


def changed(**scalars: Any) -> RecordDict:
    """Honest instructions but for these; `privacy__unit` is the field `unit` of the section `privacy`."""
    record = honest().to_record()
    fields = {**record["instructions"], **{key.replace("__", "."): value for key, value in scalars.items()}}  # type: ignore[dict-item]
    record["instructions"] = ConfigRecord(fields)
    return record


HOSTILE: dict[str, RecordDict] = {
    "no noise": changed(privacy__noise_multiplier=0.0),
    "noise that is no number": changed(privacy__noise_multiplier=float("nan")),
    "negative noise": changed(privacy__noise_multiplier=-2.0),
    "infinite noise": changed(privacy__noise_multiplier=float("inf")),
    "too little noise": changed(privacy__noise_multiplier=0.2),
    "rate over 1": changed(privacy__sample_rate=2.0),
    "rate that is no number": changed(privacy__sample_rate=float("nan")),
    "rate over the ceiling": changed(privacy__sample_rate=0.75),
    "negative steps": changed(local_steps=-1),
    "no steps": changed(local_steps=0),
    "1e9 steps": changed(local_steps=10**9),
    "1e9 planned steps": changed(planned_steps=10**9),
    "more planned steps than can be": changed(planned_steps=10**15),
    "negative planned steps": changed(planned_steps=-1),
    "negative round": changed(server_round=-1),
    "another unit": changed(privacy__unit="image"),
    "a unit that is none": changed(privacy__unit="pixel"),
    "another model": changed(privacy__privacy_model="central"),
    "no privacy": changed(privacy__privacy_model="none"),
    "no privacy and no noise": changed(privacy__privacy_model="none", privacy__noise_multiplier=0.0),
    "a cohort of 1": changed(min_clients=1),
    "a cohort of 0": changed(min_clients=0),
    "a cohort that is no number": changed(min_clients="many"),
    "a million views": changed(augmentation__augment="flip", augmentation__augment_views=10**6),
    "more views than the owner's memory": changed(augmentation__augment="flip", augmentation__augment_views=64),
    "a million photographs of a person": changed(privacy__images_per_person=10**6),
    "500 photographs of a person": changed(privacy__images_per_person=500),
    "a batch of nobody": changed(privacy__expected_batch=1e-6),
    "a model of a billion parameters": changed(model__discriminator_width=1024, model__image_size=128),
    "a model that is not known": changed(model__discriminator="transformer"),
    "other weights than the model's": changed(model__discriminator_width=5),
    "a field of its own": changed(allowed_privacy_models="none"),
    "nothing": RecordDict(),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_nothing_comes_back_but_an_error(name: str, tmp_path: Path, reads: list[str]) -> None:
    reply = node(tmp_path / "state")(HOSTILE[name])
    assert reply.has_error()
    assert not reply.has_content()
    assert reply.error.reason in ("PrivacyError", "ProtocolError", "ConfigError")
    assert reads == []
    assert not (tmp_path / "state").exists(), "nothing was opened or charged"


@pytest.mark.parametrize("name", ["too little noise", "1e9 steps", "nothing"])
def test_an_owner_may_keep_the_reason(name: str, tmp_path: Path) -> None:
    reply = node(tmp_path / "state", **{"disclose-reason": False})(HOSTILE[name])
    assert (reply.error.reason, reply.has_content()) == ("Refused", False)


def test_a_policy_that_cannot_be_read_tells_nothing(tmp_path: Path, reads: list[str]) -> None:
    reply = node(tmp_path / "state", **{"max-epsilom": 3.0})(honest().to_record())
    assert (reply.error.reason, reads) == ("Refused", [])


def test_a_discriminator_that_the_owner_left_out(tmp_path: Path, reads: list[str]) -> None:
    reply = node(tmp_path / "state", **{"allowed-discriminators": "dcgan,resnet"})(honest().to_record())
    assert (reply.error.reason, reads) == ("PrivacyError", [])
    assert not (tmp_path / "state").exists()


def test_a_replay_with_other_instructions(tmp_path: Path, reads: list[str]) -> None:
    """The honest round is answered, the same again with the same bytes, and anything else under its number is not."""
    ask = node(tmp_path / "state")
    first = ask(honest().to_record())
    assert first.has_content()
    before = (tmp_path / "state" / "ledger.jsonl").read_bytes()
    # A run that is resumed with another --min-clients asks for the same round again.
    again = [ask(honest().to_record()), ask(changed(min_clients=3))]
    data = {reply.content.array_records["arrays"]["vector"].data for reply in (first, *again)}
    assert len(data) == 1
    reads.clear()
    client.app.open_faces.cache_clear()
    for scalars in ({"feature_seed": 5}, {"privacy__max_grad_norm": 2.0}, {"planned_steps": 5}):
        reply = ask(changed(**scalars))
        assert reply.error.reason == "PrivacyError"
    other = gradient_instructions(CONFIG, np.zeros_like(honest().discriminator))
    assert ask(other.to_record()).error.reason == "PrivacyError"
    assert (reads, (tmp_path / "state" / "ledger.jsonl").read_bytes()) == ([], before)


def test_a_second_run_when_the_budget_is_spent(tmp_path: Path, reads: list[str]) -> None:
    state = tmp_path / "state"
    ask = node(state)
    answered = 0
    while ask(honest(server_round=answered + 1).to_record()).has_content():
        answered += 1
        assert answered < 50
    assert answered >= CONFIG.training.num_rounds
    before = (state / "ledger.jsonl").read_bytes()
    reads.clear()
    client.app.open_faces.cache_clear()
    reply = ask(changed(run_id="f" * 32))
    assert reply.error.reason == "BudgetExhausted"
    # Nor from a new process, under another coordinator.
    client.app.open_ledger.cache_clear()
    assert node(state)(changed(run_id="e" * 32)).error.reason == "BudgetExhausted"
    assert (reads, (state / "ledger.jsonl").read_bytes()) == ([], before)
    assert Ledger(state, max_epsilon=10.0, delta=1e-5).epsilon <= 10.0


def test_an_older_round_of_a_run_is_not_answered(tmp_path: Path, reads: list[str]) -> None:
    ask = node(tmp_path / "state")
    assert ask(honest(server_round=3).to_record()).has_content()
    before = (tmp_path / "state" / "ledger.jsonl").read_bytes()
    reads.clear()
    client.app.open_faces.cache_clear()
    assert ask(honest(server_round=2).to_record()).error.reason == "PrivacyError"
    assert (reads, (tmp_path / "state" / "ledger.jsonl").read_bytes()) == ([], before)


def test_classes_that_the_owner_s_labels_are_not(tmp_path: Path, reads: list[str]) -> None:
    labelled = {"label-column": "hair", "label-values": "long,bald,bun"}
    reply = node(tmp_path / "state", **labelled)(changed(model__num_classes=2))
    assert (reply.error.reason, reads) == ("PrivacyError", [])
    assert not (tmp_path / "state").exists()


def test_a_run_that_the_faces_do_not_fit_is_charged_once(tmp_path: Path) -> None:
    """Classes are asked of faces without labels: what was told once costs nothing more."""
    ask = node(tmp_path / "state")
    model = dataclasses.replace(CONFIG.model, num_classes=2)
    size = num_parameters(discriminator_of(model))
    sizes = []
    for server_round in (1, 2, 3):
        asked = dataclasses.replace(
            honest(server_round=server_round), model=model, discriminator=np.zeros(size, np.float32)
        )
        assert ask(asked.to_record()).error.reason == "RoundFailed"
        sizes.append((tmp_path / "state" / "ledger.jsonl").stat().st_size)
    assert sizes[0] == sizes[1] == sizes[2]
    assert ask(changed(run_id="f" * 32)).has_content(), "another run counts for itself"
