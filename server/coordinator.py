"""THE MAIN LOOP of the coordinator: start reading here.

A run is what public faces teach beforehand (`server.prior`), if there are any, one moment round (unless switched off), the
generator's fit to what it released, and the adversarial rounds. In each of these the clients answer with noised gradients of
their discriminator on real faces; the coordinator adds the fakes' half, takes one Adam step, and every few rounds one
generator step. All of the latter is post-processing. The state is on the disk before instructions leave: a coordinator that
crashes asks the same again, and clients that had answered send the same bytes again.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from common.device import pick_device
from common.errors import BudgetsSpent, CohortTooSmall, RoundVoid
from common.gradients import fake_mean, to_uint8
from common.messages import RoundInstructions, Stage
from common.models.features import RandomFeatures
from common.models.flat import get_flat, num_parameters
from common.models.losses import LOSSES
from common.privacy.planner import planned_steps
from common.privacy.randomness import SecureRandom
from common.privacy.units import PrivacyModel
from server.aggregation import average, declared_mean
from server.checkpoint import CheckpointStore, CoordinatorState
from server.cohort import cohort_of
from server.discriminator import adam_step
from server.exchange import GO_ON, Exchange
from server.generator import GeneratorTrainer
from server.prior import learn_prior
from server.quality import Judge
from server.secure_exchange import SecureExchange

# Seconds between two checkpoints of generator steps without rounds.
_FIT_CHECKPOINT_S = 10.0
# Generator steps of that fit between two looks at the public faces.
_FIT_MEASURE_STEPS = 100
# Secure sums in a row that cannot be opened, before the run stops to be resumed.
_MOST_VOIDS = 5

log = logging.getLogger("visard.server")


class Observer(Protocol):
    """Whoever watches a run: records, pictures, progress. Sees noisy updates, fakes and public data only."""

    def fit_stepped(self, state: CoordinatorState) -> None:
        """A generator step of no round is done: `state.fit` says which."""

    def round_ended(self, state: CoordinatorState) -> None:
        """A round is done and on the disk; its figures are in `state.last`."""


def coordinate(
    state: CoordinatorState,
    judge: Judge,
    exchange: Exchange,
    store: CheckpointStore,
    observers: Sequence[Observer],
    new_random: Callable[[CoordinatorState], SecureRandom] = lambda _state: SecureRandom(),
) -> None:
    """Run `state` to its end, from wherever it is. `new_random` is for tests.

    Raises CohortTooSmall or CheckpointError; the checkpoint then holds all that was achieved.
    """
    trainer = GeneratorTrainer(state)
    config = state.config
    secure = None
    if config.privacy.privacy_model is PrivacyModel.DISTRIBUTED:
        secure = SecureExchange(exchange, state.sums, state.ledger_heads, config.training, partial(store.save, state))
    learn_prior(state, trainer, store, observers)
    store.save(state)
    # Of a run that is gone on with, whoever was asked last: without the first to come back a round would be another's.
    back = {int(node) for node, charged in state.charged.items() if charged[2] >= state.next_round - 1}
    voids = 0
    for server_round in range(state.next_round, state.last_round + 1):
        steps_without_rounds(state, trainer, judge, store, observers)
        if state.stopped:
            break
        exchange.wait_for_return(back)
        back = set()
        began = time.monotonic()
        before = state.rng.get_state()
        instructions = instructions_for(state, server_round, trainer)
        try:
            gradient = collect(state, exchange, instructions, new_random(state), secure)
        except BudgetsSpent as error:
            # Gone on with, it asks for the same round with the same fakes: to answer again costs nobody anything.
            state.rng.set_state(before)
            state.ended_by, state.stopped = "budgets", str(error)
            log.warning("%s", error)
            break
        except RoundVoid as error:
            voids += 1
            if voids == _MOST_VOIDS:
                raise
            # Asked again it could never be opened, as its charges and its survivors stand.
            log.warning("%s", error)
            if instructions.stage is Stage.MOMENTS:
                raise CohortTooSmall(
                    f"{error}. The moment release is lost, and its charges stand: start a new run, with --moment-rounds 0 where the "
                    "clients' budgets do not hold another"
                ) from error
            state.next_round = server_round + 1
            state.last = {"round": server_round, "stage": str(instructions.stage), "void": str(error)}
            store.save(state)
            for observer in observers:
                observer.round_ended(state)
            continue
        voids = 0
        state.released = instructions, gradient
        if instructions.stage is Stage.MOMENTS:
            state.moment_target = gradient.view(max(config.model.num_classes, 1), -1)
            state.last = {}
        else:
            state.last = discriminator_step(state, trainer, instructions, gradient)
            if state.rounds_since_generator_step >= state.discriminator_steps:
                state.rounds_since_generator_step = 0
                state.last |= trainer.adversarial_step()
        state.next_round = server_round + 1
        state.seconds += time.monotonic() - began
        state.last |= {
            "round": server_round,
            "stage": str(instructions.stage),
            "seconds": round(time.monotonic() - began, 4),
            "bytes_down": exchange.bytes_down,
            "bytes_up": exchange.bytes_up,
            **({} if secure is None else secure.figures(config.privacy)),
            "refusals": dict(exchange.refusals),
            "update_norm": gradient.norm().item(),
        }
        last = server_round == state.last_round
        if instructions.stage is Stage.GRADIENTS:
            judge.look(state, measure=server_round % config.training.sample_every == 0 or last)
        if server_round % config.training.checkpoint_every == 0 or last or state.stopped:
            store.save(state)
        for observer in observers:
            observer.round_ended(state)
        if state.stopped:
            break
    if voids:
        raise CohortTooSmall(f"the last {voids} rounds are void: gone on with, the run ends with what it has. {GO_ON}")
    steps_without_rounds(state, trainer, judge, store, observers)
    store.save(state)


def instructions_for(state: CoordinatorState, server_round: int, trainer: GeneratorTrainer) -> RoundInstructions:
    """What this round asks of every client."""
    config = state.config
    moments = server_round <= config.moments.moment_rounds
    instructions = RoundInstructions(
        run_id=state.run_id,
        server_round=server_round,
        stage=Stage.MOMENTS if moments else Stage.GRADIENTS,
        model=config.model,
        privacy=config.privacy,
        augmentation=config.augmentation,
        moment_rounds=config.moments.moment_rounds,
        moment_noise_multiplier=config.moments.moment_noise_multiplier,
        feature_seed=config.moments.feature_seed,
        planned_steps=planned_steps(config),
        min_clients=config.training.min_clients,
        # Of the rounds to come too: a client that would refuse those spends nothing on the moments.
        local_steps=config.training.local_steps,
        local_lr=config.training.local_lr,
    )
    if moments:
        return instructions
    steps, fakes, labels = config.training.local_steps, None, None
    if steps > 1:
        images, classes = trainer.fakes(steps * config.training.fake_batch)
        fakes, labels = to_uint8(images), classes if classes is None else classes.cpu().numpy()
    return dataclasses.replace(
        instructions,
        discriminator=get_flat(state.discriminator),
        fakes=fakes,
        fake_labels=labels,
    )


def collect(
    state: CoordinatorState,
    exchange: Exchange,
    instructions: RoundInstructions,
    random: SecureRandom,
    secure: SecureExchange | None = None,
) -> torch.Tensor:
    """Ask the connected clients, or this round's cohort of them, and average their vectors: (d,) float32.

    secure: for the distributed model. What was asked counts as charged, answered or not.
    """
    model, training = state.config.model, state.config.training
    if instructions.stage is Stage.MOMENTS:
        features = RandomFeatures(model.image_size, model.channels, instructions.feature_seed)
        dimension = features.dim * max(model.num_classes, 1)
    else:
        dimension = num_parameters(state.discriminator)
    while True:
        nodes = exchange.wait_for_clients(0 if secure is None else secure.least(instructions))
        nodes = cohort_of(nodes, training.cohort_size, state.run_id, instructions.server_round)
        state.asked_round = instructions.server_round
        if instructions.privacy.privacy_model is not PrivacyModel.NONE:
            for node in nodes:
                note_charged(state, instructions, node)
        if secure is not None:
            total = secure.collect(instructions, nodes, dimension, state.last_round - instructions.server_round + 1)
            return declared_mean(total, secure.survivors, instructions)
        updates, spent = exchange.collect(instructions, nodes, dimension, state.ledger_heads), len(exchange.spent)
        try:
            return average(updates, instructions, dimension, random, training)
        except CohortTooSmall:
            # Where budgets of a cohort are spent others take their places: who has answered sends the same again.
            others = training.cohort_size and len(exchange.nodes()) >= training.min_clients
            if not others or len(exchange.spent) == spent:
                raise


def note_charged(state: CoordinatorState, instructions: RoundInstructions, node: int) -> None:
    """Count what a node was asked, once a round: asked again, it sends again what it sent."""
    charged = state.charged.setdefault(str(node), [0, 0, 0])
    if charged[2] == instructions.server_round:
        return
    charged[2] = instructions.server_round
    if instructions.stage is Stage.MOMENTS:
        charged[0] += 1
    else:
        charged[1] += instructions.local_steps


def discriminator_step(
    state: CoordinatorState, trainer: GeneratorTrainer, instructions: RoundInstructions, gradient: torch.Tensor
) -> dict[str, float]:
    """One Adam step of the shared discriminator on both halves of its loss. Returns its figures on fakes."""
    config, device, loss = state.config, pick_device(), LOSSES[state.config.model.loss]
    fakes, labels = trainer.fakes(config.training.fake_batch)
    gradient = gradient.to(device)
    if instructions.local_steps == 1:
        with trainer.randomness():
            views = trainer.augmentation(fakes)
            gradient = gradient + fake_mean(state.discriminator, loss, views, labels, config.privacy)
    adam_step(state, gradient)
    state.rounds_since_generator_step += 1
    state.discriminator_updates += 1
    return trainer.accuracy(fakes, labels)


def steps_without_rounds(
    state: CoordinatorState,
    trainer: GeneratorTrainer,
    judge: Judge,
    store: CheckpointStore,
    observers: Sequence[Observer],
) -> None:
    """The generator's steps that are due now: of the moment stage, or, once all rounds are done, against the last
    discriminator. They cost no privacy, and go on from wherever they are; on the disk at the end and every few seconds.
    """
    while state.fitting or state.refining:
        began = time.monotonic()
        state.last = trainer.moment_step() if state.fitting else trainer.refining_step()
        done = not (state.fitting or state.refining)  # but for the judge, who may stop the run
        judge.look(state, measure=state.generator_steps % _FIT_MEASURE_STEPS == 0 or done)
        state.seconds += time.monotonic() - began
        if time.monotonic() - store.saved > _FIT_CHECKPOINT_S or not (state.fitting or state.refining):
            store.save(state)
        for observer in observers:
            observer.fit_stepped(state)
