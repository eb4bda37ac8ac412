"""The main loop with clients that answer badly, refuse, or cannot pay any more."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

import client.app
from client.discriminator import cached_discriminator, gradient_update
from common.config import RunConfig
from common.errors import CohortTooSmall
from common.faces import FaceDataset
from common.fields import Scalar
from common.gradients import fake_mean, from_uint8, to_uint8
from common.messages import DiscriminatorUpdate, RoundInstructions
from common.models.flat import get_flat, set_flat
from common.models.losses import LOSSES
from common.privacy.accounting import epsilon_of
from common.privacy.clipping import clipped_sum
from common.privacy.ledger import Ledger
from common.privacy.randomness import add_gaussian_noise
from server.checkpoint import CheckpointStore, CoordinatorState
from server.coordinator import collect, instructions_for
from server.exchange import Exchange
from server.generator import GeneratorTrainer
from server.records import RunRecorder
from simulations.engine import InProcessGrid
from tests.support import RUN_ID, keyed, keyed_client_app, node_configs, random_faces, tiny_config, train

Spoil = Callable[[Message, Message], Message]


class Watch:
    """An observer that keeps the figures of each round."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, Any]] = []

    def fit_stepped(self, state: CoordinatorState) -> None:
        pass

    def round_ended(self, state: CoordinatorState) -> None:
        self.rounds.append(dict(state.last))


def spoiling(spoil: Spoil, node: int) -> ClientApp:
    """The real app, but `node`'s replies go through `spoil(message, reply)`."""
    inner = keyed_client_app()

    def app(message: Message, context: Context) -> Message:
        reply = inner(message, context)
        return spoil(message, reply) if context.node_id == node else reply

    return app  # type: ignore[return-value]


def with_vector(message: Message, reply: Message, change: Callable[[np.ndarray], np.ndarray]) -> Message:
    scalars = reply.content["update"]
    vector = np.frombuffer(reply.content["arrays"]["vector"].data, np.float32)  # type: ignore[index,union-attr]
    changed = DiscriminatorUpdate(scalars["run_id"], scalars["server_round"], change(vector))  # type: ignore[index,arg-type]
    return Message(changed.to_record(), reply_to=message)


def with_scalars(message: Message, reply: Message, **scalars: Any) -> Message:
    record = RecordDict({"update": ConfigRecord({**reply.content["update"], **scalars})})  # type: ignore[dict-item]
    record["arrays"] = ArrayRecord(dict(reply.content["arrays"]))  # type: ignore[arg-type]
    return Message(record, reply_to=message)


BAD: dict[str, tuple[Spoil, str]] = {
    "not a number": (lambda m, r: with_vector(m, r, lambda v: np.where(v == v.max(), np.nan, v)), "MalformedUpdate"),
    "endless": (lambda m, r: with_vector(m, r, lambda v: np.full_like(v, np.inf)), "MalformedUpdate"),
    "too long": (lambda m, r: with_vector(m, r, lambda v: np.append(v, v[:1])), "MalformedUpdate"),
    "empty": (lambda m, r: with_vector(m, r, lambda v: v[:0]), "MalformedUpdate"),
    "whole numbers": (lambda m, r: with_vector(m, r, lambda v: v.astype(np.int64)), "MalformedUpdate"),
    "stale": (lambda m, r: with_scalars(m, r, server_round=r.content["update"]["server_round"] - 1), "MalformedUpdate"),  # type: ignore[operator,index]
    "another run's": (lambda m, r: with_scalars(m, r, run_id="f" * 32), "MalformedUpdate"),
    "talkative": (lambda m, r: with_scalars(m, r, num_examples=17), "MalformedUpdate"),
    "no records": (lambda m, r: Message(RecordDict(), reply_to=m), "MalformedUpdate"),
    "an error": (lambda m, r: Message(Error(100, "DataError"), reply_to=m), "DataError"),
    "a long error": (lambda m, r: Message(Error(100, "x" * 1000), reply_to=m), "x" * 40),
}


def shares(count: int, persons: int = 4) -> list[FaceDataset]:
    return [random_faces(persons, 2, seed=client) for client in range(count)]


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_answer_is_left_out_and_counted(tmp_path: Path, name: str) -> None:
    """The run with a client that answers nonsense is the run without that client, but for the count."""
    spoil, kind = BAD[name]
    config = tiny_config(privacy_model="local", num_rounds=2)
    watch = Watch()
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    bad = train(tmp_path / "with", CoordinatorState.fresh(config, RUN_ID), shares(3), [watch], spoiling(spoil, node=4))
    good = train(tmp_path / "without", CoordinatorState.fresh(config, RUN_ID), shares(2))
    assert [figures["refusals"] for figures in watch.rounds] == [{kind: 1}] * 3
    np.testing.assert_array_equal(get_flat(bad.discriminator), get_flat(good.discriminator))
    np.testing.assert_array_equal(get_flat(bad.generator), get_flat(good.generator))
    assert np.isfinite(get_flat(bad.generator)).all()
    # It was asked, so its charge counts, answered or not.
    assert bad.charged == {node: [1, 2, 3] for node in "234"}


def test_too_few_answers_stop_the_run_and_change_nothing(tmp_path: Path) -> None:
    config = tiny_config(privacy_model="local", num_rounds=2, min_clients=2)
    state = CoordinatorState.fresh(config, RUN_ID)
    spoil = BAD["not a number"][0]
    with pytest.raises(CohortTooSmall, match=r"round 1: 1 of 2 clients gave an update \(1 x MalformedUpdate\)"):
        train(tmp_path, state, shares(2), client_app=spoiling(spoil, node=2))
    kept = CheckpointStore(tmp_path).load()
    assert (kept.next_round, kept.moment_target, kept.generator_steps) == (1, None, 0)
    # With its clients back it goes on, and the round was charged once.
    assert train(tmp_path, kept, shares(2)).next_round == 4
    for folder in (tmp_path / "clients").iterdir():
        assert len(Ledger(folder, max_epsilon=100, delta=1e-5).releases) == 3


def test_too_few_connected_clients_stop_the_run(tmp_path: Path) -> None:
    config = tiny_config(privacy_model="local", min_clients=3, round_timeout_s=0.05)
    with pytest.raises(CohortTooSmall, match=r"2 clients are connected after 0.05 s and 3 are needed"):
        train(tmp_path, CoordinatorState.fresh(config, RUN_ID), shares(2))
    assert not list((tmp_path / "clients").glob("*/ledger.jsonl"))


@pytest.mark.parametrize("model", ["none", "central"])
def test_an_owner_who_did_not_allow_it_refuses(tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(privacy_model=model, num_rounds=1, min_clients=1)
    watch = Watch()

    def policy(number: int, owner: dict[str, Scalar]) -> dict[str, Scalar]:
        return owner | {"allowed-privacy-models": model if number == 0 else "local", "max-epsilon": 100.0}

    with caplog.at_level(logging.WARNING, "visard.client"):
        train(tmp_path, CoordinatorState.fresh(config, RUN_ID), shares(2), [watch], policy=policy)
    assert [figures["refusals"] for figures in watch.rounds] == [{"PrivacyError": 1}] * 2
    assert "allowed-privacy-models" in caplog.text
    assert not (tmp_path / "clients" / "0001").exists(), "nothing was opened, charged or read"


def test_a_client_whose_budget_is_spent_computes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ledger stays under its own max-epsilon, whatever the run's is, and its faces are not looked at again."""
    config = tiny_config(privacy_model="local", num_rounds=12, epsilon=20.0, min_clients=1)
    looks: list[Path] = []
    real = client.app._update

    def noting(policy: Any, *given: Any) -> Any:
        looks.append(policy.state_dir)
        return real(policy, *given)

    monkeypatch.setattr(client.app, "_update", noting)
    poor = 12.0

    def policy(number: int, owner: dict[str, Scalar]) -> dict[str, Scalar]:
        return owner | ({"max-epsilon": poor} if number == 0 else {})

    watch = Watch()
    train(tmp_path, CoordinatorState.fresh(config, RUN_ID), shares(2), [watch], policy=policy)
    ledger = Ledger(tmp_path / "clients" / "0000", max_epsilon=poor, delta=config.privacy.delta)
    refused = [figures["refusals"] == {"BudgetExhausted": 1} for figures in watch.rounds]
    assert sum(refused) == 1, "once spent, it is not asked again"
    assert 0 < refused.index(True) == len(ledger.releases) == looks.count(tmp_path / "clients" / "0000") < 12
    assert ledger.epsilon <= poor
    assert epsilon_of(ledger.releases, config.privacy.delta) <= poor
    other = Ledger(tmp_path / "clients" / "0001", max_epsilon=20.0, delta=config.privacy.delta)
    assert len(other.releases) == 13
    assert poor < other.epsilon <= 20.0


def test_the_log_of_a_run_never_passes_its_budget(tmp_path: Path) -> None:
    config = tiny_config(num_rounds=5)
    state = CoordinatorState.fresh(config, RUN_ID)
    train(tmp_path, state, shares(2), [RunRecorder(tmp_path, state)])
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    by_round = [line["epsilon_by_node"] for line in lines]
    assert [line["epsilon"] for line in lines] == [max(epsilons.values()) for epsilons in by_round]
    for node, folder in (("2", "0000"), ("3", "0001")):
        spent = [epsilons[node] for epsilons in by_round]
        assert spent == sorted(spent)
        releases = Ledger(tmp_path / "clients" / folder, max_epsilon=10, delta=1e-5).releases
        assert epsilon_of(releases, 1e-5) <= spent[-1] <= epsilon_of(releases, 1e-5) + 1e-4
        assert 9.0 < spent[-1] <= 10.0


def hand_loop(instructions: RoundInstructions, faces: FaceDataset, key: tuple[object, ...]) -> np.ndarray:
    """Several local steps written out: draw, clip, noise, add the fakes' half, step; the mean gradient."""
    privacy, model = instructions.privacy, cached_discriminator(instructions.model)
    loss, random = LOSSES[instructions.model.loss], keyed(*key)
    weights = torch.from_numpy(instructions.discriminator.copy())  # type: ignore[union-attr]
    gradients = []
    fakes = instructions.fakes.reshape(instructions.local_steps, -1, *instructions.fakes.shape[1:])  # type: ignore[union-attr]
    for step in range(instructions.local_steps):
        set_flat(model, weights)
        members = faces.units(privacy.unit)
        drawn = [members[i] for i in random.poisson_sample(len(members), privacy.sample_rate)]
        chosen = [random.choose(unit, privacy.images_per_person) for unit in drawn]
        total = torch.zeros_like(weights)
        for unit in chosen:
            images = faces.tensor(unit)
            own = torch.zeros(len(images), dtype=torch.int64)
            total += clipped_sum(model, loss.real, images, None, own, 1, privacy.max_grad_norm)
        noised = add_gaussian_noise(total, privacy.noise_multiplier * privacy.max_grad_norm, random)
        gradient = noised / privacy.expected_batch + fake_mean(model, loss, from_uint8(fakes[step]), None, privacy)
        gradients.append(gradient)
        weights = weights - instructions.local_lr * gradient
    return torch.stack(gradients).mean(dim=0).numpy()


def test_several_local_steps_are_the_mean_gradient_along_them(tmp_path: Path) -> None:
    config = tiny_config(privacy_model="local", local_steps=3, noise_multiplier=0.5, epsilon=1e4, local_lr=0.1)
    state = CoordinatorState.fresh(config, RUN_ID)
    twin = CoordinatorState.fresh(config, RUN_ID)
    instructions = instructions_for(state, 2, GeneratorTrainer(state))
    faces = random_faces(6, 2)
    got = gradient_update(instructions, faces, keyed("a"))
    np.testing.assert_allclose(got, hand_loop(instructions, faces, ("a",)), rtol=2e-3, atol=2e-3)
    assert np.abs(got - hand_loop(instructions, faces, ("b",))).max() > 0.1
    # The fakes are the generator's, as bytes, and go forth in order.
    assert instructions.fakes is not None
    expected, _ = GeneratorTrainer(twin).fakes(3 * config.training.fake_batch)
    np.testing.assert_array_equal(instructions.fakes, to_uint8(expected))
    # And the coordinator's average divides by the number of clients alone.
    grid = InProcessGrid(keyed_client_app(), node_configs(tmp_path, config, [faces, random_faces(6, 2, seed=1)]))
    average = collect(state, Exchange(grid, config.training), instructions, keyed("unused"))
    one = gradient_update(instructions, faces, keyed("client", 2, 2))
    other = gradient_update(instructions, random_faces(6, 2, seed=1), keyed("client", 3, 2))
    np.testing.assert_allclose(average.numpy(), (one + other) / 2, atol=1e-6)
    assert state.charged == {"2": [0, 3, 2], "3": [0, 3, 2]}


def test_several_local_steps_train(tmp_path: Path) -> None:
    config = tiny_config(privacy_model="local", local_steps=2, num_rounds=3)
    watch = Watch()
    state = train(tmp_path, CoordinatorState.fresh(config, RUN_ID), shares(2), [watch])
    assert state.next_round == 5
    assert [figures["refusals"] for figures in watch.rounds] == [{}] * 4
    ledger = Ledger(tmp_path / "clients" / "0000", max_epsilon=10, delta=1e-5)
    assert [release.steps for release in ledger.releases] == [1, 2, 2, 2]
    assert 9.0 < ledger.epsilon <= 10.0


def test_adaptive_steps_rise_while_the_discriminator_is_poor() -> None:
    """Poor: one more step each time a generator step would be due, which puts that off. Good: it comes when due."""
    flat = tiny_config(privacy_model="none").to_flat() | {"adaptive": True, "discriminator-steps": 2}
    state = CoordinatorState.fresh(RunConfig.from_flat(flat), RUN_ID)
    trainer = GeneratorTrainer(state)
    fakes = torch.zeros(4, 1, 28, 28)

    def rounds(count: int, accuracy: float) -> list[int]:
        steps = []
        with torch.no_grad():
            for parameter in state.discriminator.parameters():
                parameter.zero_()
            state.discriminator.head.bias.fill_(-1.0 if accuracy else 1.0)  # type: ignore[union-attr]
        for _ in range(count):
            state.rounds_since_generator_step += 1
            assert trainer.accuracy(fakes, None) == {"fake_accuracy": accuracy}
            steps.append(state.discriminator_steps)
            if state.rounds_since_generator_step >= state.discriminator_steps:
                state.rounds_since_generator_step = 0
        return steps

    assert rounds(5, 0.0) == [2, 3, 4, 5, 6]
    state.fake_accuracy = 0.9
    assert rounds(20, 1.0) == [6] * 20
    state.fake_accuracy = 0.0
    assert rounds(100, 0.0)[-1] == 50


def test_steps_that_are_not_adaptive_stay(tmp_path: Path) -> None:
    config = tiny_config(privacy_model="none", discriminator_steps=2, num_rounds=5)
    watch = Watch()
    state = train(tmp_path, CoordinatorState.fresh(config, RUN_ID), shares(2), [watch])
    assert ["generator_loss" in figures for figures in watch.rounds] == [False, False, True, False, True, False]
    assert state.generator_steps == config.moments.moment_steps + 2
    assert state.discriminator_steps == 2
