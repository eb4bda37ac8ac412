"""Runs whose discriminator tells classes: what it learns is naive arithmetic without fakes; and the steps after the last round."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn import functional

import server.records
from client.discriminator import cached_discriminator, gradient_update
from common.config import RunConfig
from common.errors import ConfigError
from common.faces import FaceDataset
from common.gradients import fake_mean, from_uint8
from common.messages import RoundInstructions
from common.models.discriminators import ClassDiscriminator
from common.models.flat import get_flat, set_flat
from common.models.losses import LOSSES
from common.privacy.accounting import epsilon_of
from common.privacy.clipping import FLOAT_SLACK
from common.privacy.ledger import Ledger
from common.privacy.randomness import add_gaussian_noise
from server.app import open_run
from server.checkpoint import CoordinatorState
from server.coordinator import instructions_for
from server.generator import GeneratorTrainer, draw_latents, moment_rate
from server.records import RunRecorder, epsilon_so_far
from tests.support import RUN_ID, TINY, keyed, random_faces, tiny_config, train

CLASSES: dict[str, object] = {"loss": "cross-entropy", "num_classes": 3, "generator_batch": 6}
MODELS: dict[str, dict[str, object]] = {
    "central": {"privacy_model": "central"},
    "local": {"privacy_model": "local"},
    "local, several steps": {"privacy_model": "local", "local_steps": 3},
    "distributed": {"privacy_model": "distributed", "num_clients": 4, "survivors": 3},
    "none": {"privacy_model": "none"},
    "scattering": {"privacy_model": "central", "discriminator": "scattering"},
}


class Watch:
    """An observer that keeps what was asked and answered, the weights after each round, and all figures."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, object]] = []
        self.fits: list[tuple[tuple[str, int, int], dict[str, object]]] = []
        self.gradients: list[tuple[np.ndarray, Tensor, np.ndarray]] = []

    def fit_stepped(self, state: CoordinatorState) -> None:
        self.fits.append((state.fit, dict(state.last)))

    def round_ended(self, state: CoordinatorState) -> None:
        self.rounds.append(dict(state.last))
        assert state.released is not None
        instructions, gradient = state.released
        if instructions.discriminator is not None:
            self.gradients.append((instructions.discriminator, gradient, get_flat(state.discriminator)))


def configured(**options: object) -> RunConfig:
    return tiny_config(**(CLASSES | options))  # type: ignore[arg-type]


def shares(count: int) -> list[FaceDataset]:
    return [random_faces(4, 2, seed=client, num_classes=3) for client in range(count)]


def trained(folder: Path, config: RunConfig, *observers: object) -> CoordinatorState:
    state = CoordinatorState.fresh(config, RUN_ID)
    recorder = RunRecorder(folder, state)
    count = config.simulation.num_clients
    train(folder, state, shares(count), [recorder, *observers])  # type: ignore[list-item]
    recorder.finish(state)
    return state


@pytest.mark.parametrize("name", MODELS)
def test_the_discriminator_follows_the_photographs_alone(tmp_path: Path, name: str) -> None:
    """Each round's step is Adam's on what the clients' mean was, and on nothing else."""
    config, watch = configured(discriminator_lr=0.01, **MODELS[name]), Watch()
    state = trained(tmp_path, config, watch)
    assert isinstance(state.discriminator, ClassDiscriminator)
    weights = torch.nn.Parameter(torch.from_numpy(watch.gradients[0][0].copy()))
    adam = torch.optim.Adam([weights], lr=0.01, betas=(config.training.adam_beta1, 0.999))
    assert len(watch.gradients) == 4
    for before, gradient, after in watch.gradients:
        np.testing.assert_allclose(weights.detach().numpy(), before, atol=1e-6)
        weights.grad = gradient.clone()
        adam.step()
        np.testing.assert_allclose(weights.detach().numpy(), after, atol=1e-6)
        assert np.abs(after - before).max() > 1e-3
    for figures in watch.rounds[1:]:
        assert "fake_accuracy" not in figures
        assert 0.0 <= figures["label_accuracy"] <= 1.0  # type: ignore[operator]
        assert figures["refusals"] == {}
    assert "label_accuracy" not in watch.rounds[0]
    for line in (tmp_path / "rounds.jsonl").read_text().splitlines()[1:]:
        assert "label_accuracy" in json.loads(line)


def by_hand(instructions: RoundInstructions, faces: FaceDataset, key: tuple[object, ...]) -> np.ndarray:
    """The local steps written out on torch's own cross-entropy, a person at a time: no fakes anywhere."""
    privacy, model = instructions.privacy, copy.deepcopy(cached_discriminator(instructions.model))
    assert isinstance(model, ClassDiscriminator)
    assert faces.labels is not None
    assert instructions.discriminator is not None
    random, weights = keyed(*key), torch.from_numpy(instructions.discriminator.copy())
    gradients = []
    for _ in range(instructions.local_steps):
        set_flat(model, weights)
        members = faces.units(privacy.unit)
        drawn = [members[i] for i in random.poisson_sample(len(members), privacy.sample_rate)]
        total = torch.zeros_like(weights)
        for unit in [random.choose(unit, privacy.images_per_person) for unit in drawn]:
            loss = functional.cross_entropy(model.classify(faces.tensor(unit)), torch.from_numpy(faces.labels[unit]))
            parts = torch.autograd.grad(loss, list(model.parameters()))
            gradient = torch.cat([part.flatten() for part in parts])
            bound = privacy.max_grad_norm * (1 - FLOAT_SLACK)
            total += gradient * min(1.0, bound / float(gradient.norm()))
        noised = add_gaussian_noise(total, privacy.noise_multiplier * privacy.max_grad_norm, random)
        gradients.append(noised / privacy.expected_batch)
        weights = weights - instructions.local_lr * gradients[-1]
    return torch.stack(gradients).mean(dim=0).numpy()


@pytest.mark.parametrize("body", ["mlp", "dcgan", "scattering"])
@pytest.mark.parametrize("steps", [1, 3])
def test_what_a_client_sends_is_the_naive_gradient_without_fakes(body: str, steps: int) -> None:
    config = configured(
        privacy_model="local",
        local_steps=steps,
        noise_multiplier=0.01,
        epsilon=1e8,
        moment_rounds=0,
        local_lr=0.1,
        discriminator=body,
        max_grad_norm=0.1,
    )
    state, faces = CoordinatorState.fresh(config, RUN_ID), random_faces(6, 2, num_classes=3)
    instructions = instructions_for(state, 1, GeneratorTrainer(state))
    sent = gradient_update(instructions, faces, keyed("a"))
    expected = by_hand(instructions, faces, ("a",))
    if steps == 1:  # the sum, which the coordinator divides
        expected = expected * config.privacy.expected_batch
    # Far nearer than what the fakes' half of another loss would have added.
    images, labels = GeneratorTrainer(state).fakes(6)
    added = fake_mean(state.discriminator, LOSSES["bce"], images, labels, config.privacy)
    assert np.linalg.norm(sent - expected) < 0.05 * float(added.norm())
    assert np.linalg.norm(sent) > 0.01


def test_fakes_that_come_along_change_nothing() -> None:
    config = configured(privacy_model="local", local_steps=2)
    state, faces = CoordinatorState.fresh(config, RUN_ID), random_faces(6, 2, num_classes=3)
    instructions = instructions_for(state, 2, GeneratorTrainer(state))
    assert instructions.fakes is not None
    assert from_uint8(instructions.fakes).std() > 0
    sent = gradient_update(instructions, faces, keyed("a"))
    instructions.fakes[:] = 0
    np.testing.assert_array_equal(sent, gradient_update(instructions, faces, keyed("a")))


def test_the_figure_is_the_share_of_fakes_that_look_like_their_class() -> None:
    state = CoordinatorState.fresh(configured(privacy_model="none"), RUN_ID)
    trainer, discriminator = GeneratorTrainer(state), state.discriminator
    assert isinstance(discriminator, ClassDiscriminator)
    fakes, labels = trainer.fakes(12)
    assert labels is not None
    seen = torch.stack([discriminator.eval().classify(fake[None])[0].argmax() for fake in fakes])
    assert trainer.accuracy(fakes, labels) == {"label_accuracy": pytest.approx(float((seen == labels).float().mean()))}
    assert trainer.accuracy(fakes, seen) == {"label_accuracy": 1.0}
    assert trainer.accuracy(fakes, (seen + 1) % 3) == {"label_accuracy": 0.0}
    assert discriminator.training


def test_refinement_comes_after_the_last_round_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.records, "_FIT_RECORD_STEPS", 1)
    plain = trained(tmp_path / "plain", configured())
    watch = Watch()
    state = trained(tmp_path / "refined", configured(refine_steps=5), watch)
    assert [fit for fit, _ in watch.fits] == [("moments", i, 4) for i in (1, 2, 3, 4)] + [
        ("refine", i, 5) for i in (1, 2, 3, 4, 5)
    ]
    assert (state.refined, state.generator_steps) == (5, plain.generator_steps + 5)
    assert state.complete
    assert not state.refining
    # The discriminator, the promise and what was spent are as without; the generator is another.
    np.testing.assert_array_equal(get_flat(state.discriminator), get_flat(plain.discriminator))
    assert np.abs(get_flat(state.generator) - get_flat(plain.generator)).max() > 1e-5
    assert state.charged == plain.charged
    assert epsilon_so_far(state) == epsilon_so_far(plain)
    for client in ("0000", "0001", "0002"):
        spent = [
            epsilon_of(Ledger(tmp_path / run / "clients" / client, max_epsilon=10, delta=1e-5).releases, 1e-5)
            for run in ("plain", "refined")
        ]
        assert spent[0] == spent[1]
    board = EventAccumulator(str(tmp_path / "refined" / "tensorboard" / "refine")).Reload()
    assert [event.step for event in board.Scalars("refine/generator_loss")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "refined" / "samples" / "refine-000005.png").exists()
    lines = [json.loads(line)["round"] for line in (tmp_path / "refined" / "rounds.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5]


def test_a_refining_step_is_the_naive_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a moment term: Adam on the cross-entropy of what the last discriminator sees, at a rate that begins anew."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # whole precision
    config = configured(privacy_model="none", moment_rounds=0, refine_steps=3, generator_lr=0.01, ema_decay=0.999)
    state, twin = (CoordinatorState.fresh(config, RUN_ID) for _ in range(2))
    trainer = GeneratorTrainer(state)
    classifier = twin.discriminator
    assert isinstance(classifier, ClassDiscriminator)
    adam = torch.optim.Adam(twin.generator.parameters(), betas=(config.training.adam_beta1, 0.999))
    start, average = get_flat(twin.generator), get_flat(twin.ema)
    for step in range(3):
        trainer.refining_step()
        latents, labels = draw_latents(config, 6, twin.rng)
        assert labels is not None
        loss = functional.cross_entropy(classifier.classify(twin.generator(latents, labels)), labels)
        adam.param_groups[0]["lr"] = moment_rate(step, 3, 0.01)
        adam.zero_grad()
        loss.backward()
        adam.step()
        np.testing.assert_allclose(get_flat(state.generator), get_flat(twin.generator), atol=1e-5)
        decay = min(0.999, (2 + step) / (11 + step))
        average = decay * average + (1 - decay) * get_flat(twin.generator)
        np.testing.assert_allclose(get_flat(state.ema), average, atol=1e-5)
    assert state.refined == 3
    assert np.abs(get_flat(state.generator) - start).max() > 1e-4
    np.testing.assert_array_equal(get_flat(state.discriminator), get_flat(twin.discriminator))


def test_refinement_helps_the_generator_draw_what_the_classifier_sees(tmp_path: Path) -> None:
    options = {"privacy_model": "none", "generator_lr": 0.01, "moment_weight": 0.0, "generator_width": 8}
    before = trained(tmp_path / "before", configured(**options))
    after = trained(tmp_path / "after", configured(refine_steps=60, **options))

    def loss(state: CoordinatorState) -> float:
        latents, labels = draw_latents(state.config, 60, torch.Generator().manual_seed(9))
        with torch.no_grad():
            return float(
                functional.softplus(-state.discriminator(state.generator.eval()(latents, labels), labels)).mean()
            )

    assert loss(after) < 0.7 * loss(before)


@pytest.mark.parametrize(("condition", "rounds"), [("moment-loss<1e9", 1), ("generator-loss<1e9", 2)])
def test_a_run_that_is_good_enough_is_not_refined(tmp_path: Path, condition: str, rounds: int) -> None:
    state = trained(tmp_path, configured(stop_when=condition, refine_steps=5))
    assert state.ended_by == "figure"
    assert (state.next_round - 1, state.refined, state.complete) == (rounds, 0, True)


def test_a_figure_may_end_the_refinement(tmp_path: Path) -> None:
    """No generator step falls into the rounds, so that its loss is first known after them."""
    config = configured(stop_when="generator-loss<1e9", refine_steps=5, discriminator_steps=5)
    state = trained(tmp_path, config)
    assert (state.ended_by, state.next_round - 1, state.refined, state.complete) == ("figure", 5, 1, True)
    assert (tmp_path / "samples" / "refine-000001.png").exists()


def test_spent_budgets_end_the_rounds_and_what_was_learned_is_refined(tmp_path: Path) -> None:
    config = configured(privacy_model="local", refine_steps=5)
    state = CoordinatorState.fresh(config, RUN_ID)
    train(tmp_path, state, shares(2), policy=lambda _client, node: node | {"max-epsilon": 7.0})
    taught = state.discriminator_updates > 0
    assert (state.ended_by, state.refined, state.complete) == ("budgets", 5 if taught else 0, True)
    assert taught
    # Gone on with, rounds come again, and the refinement after them.
    again = open_run(tmp_path, None)
    assert (again.ended_by, again.refined, again.refining) == ("", 0, False)


def test_without_rounds_there_is_nothing_to_refine_against(tmp_path: Path) -> None:
    watch = Watch()
    state = trained(tmp_path, configured(num_rounds=0, refine_steps=5), watch)
    assert {fit[0] for fit, _ in watch.fits} == {"moments"}
    assert (state.refined, state.generator_steps, state.complete) == (0, 4, True)


def test_refinement_of_other_losses(tmp_path: Path) -> None:
    watch = Watch()
    state = CoordinatorState.fresh(tiny_config(refine_steps=2, moment_rounds=0), RUN_ID)
    train(tmp_path, state, [random_faces(4, 2, seed=client) for client in range(3)], [watch])
    assert [fit for fit, _ in watch.fits] == [("refine", 1, 2), ("refine", 2, 2)]
    assert all("generator_loss" in figures for _, figures in watch.fits)


def test_what_makes_no_sense_is_refused_before_a_run_begins() -> None:
    for flat, told in (
        ({"loss": "cross-entropy"}, "there are no classes to tell"),
        ({"loss": "cross-entropy", "num-classes": 2, "adaptive": True}, "sees no fakes"),
    ):
        with pytest.raises(ConfigError, match=told):
            RunConfig.from_flat(TINY | flat)
