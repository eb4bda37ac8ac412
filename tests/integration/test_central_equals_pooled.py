"""`central`: whatever the division of persons among clients, the sum is pooled DP-SGD's, and so is its noise."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from client.app import create_app
from client.discriminator import cached_discriminator
from common.faces import FaceDataset
from common.messages import DiscriminatorUpdate, RoundInstructions, Stage
from common.models.flat import get_flat, set_flat
from common.models.losses import LOSSES
from common.privacy.units import PrivacyUnit
from common.sections import TrainingConfig
from server.aggregation import average
from server.checkpoint import CoordinatorState
from server.coordinator import collect
from server.exchange import Exchange
from simulations.engine import InProcessGrid
from tests.support import RUN_ID, ask, gradient_instructions, keyed, keyed_client_app, node_configs, random_faces
from tests.support import tiny_config as _tiny_config

NORM = 0.8


def tiny_config(**overrides: object):  # type: ignore[no-untyped-def]
    """Loose budget and given noise, so that many rounds may be asked."""
    loose = {
        "privacy_model": "central",
        "epsilon": 1e6,
        "noise_multiplier": 0.7,
        "max_grad_norm": NORM,
        "min_clients": 1,
    }
    return _tiny_config(**(loose | overrides))


def shares_of(faces: FaceDataset, division: list[int]) -> list[FaceDataset]:
    """Persons of `faces` dealt out: division[p] is the client of person p."""
    owner = np.array(division)[faces.persons]
    return [faces.subset(np.flatnonzero(owner == client)) for client in range(max(division) + 1)]


def vectors(grid: InProcessGrid, instructions: RoundInstructions, dimension: int) -> list[np.ndarray]:
    found = []
    for reply in ask(grid, instructions):
        assert reply.has_content(), reply.error
        found.append(DiscriminatorUpdate.from_record(reply.content, instructions, dimension).vector)
    return found


def pooled_oracle(config, weights: np.ndarray, faces: FaceDataset) -> np.ndarray:  # type: ignore[no-untyped-def]
    """One unit after the other: gradient of the unit's mean loss, clipped, added up in float64."""
    model = cached_discriminator(config.model)
    set_flat(model, weights.copy())
    total = np.zeros(len(weights))
    for unit in faces.units(config.privacy.unit):
        labels = None if faces.labels is None or not config.model.num_classes else torch.from_numpy(faces.labels[unit])
        loss = LOSSES[config.model.loss].real(model(faces.tensor(unit), labels)).mean()
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
        vector = gradient.double().numpy()
        total += vector * min(1.0, NORM / np.linalg.norm(vector))
    return total


@pytest.mark.parametrize("unit", ["person", "image"])
@pytest.mark.parametrize("discriminator", ["mlp", "dcgan"])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_every_division_gives_the_pooled_clipped_sum(
    tmp_path: Path, unit: str, discriminator: str, num_classes: int
) -> None:
    config = tiny_config(
        unit=unit,
        sample_rate=1.0,
        discriminator=discriminator,
        num_classes=num_classes,
        moment_batch=6,
        generator_batch=6,
    )
    faces = random_faces(9, 2, num_classes=num_classes)
    # Weights that make some units clip and others not.
    weights = get_flat(CoordinatorState.fresh(config, RUN_ID).discriminator) * np.float32(0.7)
    expected = pooled_oracle(config, weights, faces)
    alone = [
        np.linalg.norm(pooled_oracle(config, weights, faces.subset(indices)))
        for indices in faces.units(PrivacyUnit(unit))
    ]
    assert max(alone) == pytest.approx(NORM, rel=1e-6), "some unit is clipped"
    for number, division in enumerate([[0] * 9, [0, 1, 2] * 3, [0, 0, 0, 0, 0, 0, 0, 0, 1], list(range(9))]):
        grid = InProcessGrid(
            keyed_client_app(), node_configs(tmp_path / str(number), config, shares_of(faces, division))
        )
        found = vectors(grid, gradient_instructions(config, weights), len(weights))
        assert len(found) == max(division) + 1
        np.testing.assert_allclose(np.sum(found, axis=0, dtype=np.float64), expected, rtol=2e-3, atol=2e-4)
        for vector, persons in zip(found, np.bincount(division), strict=True):
            assert np.linalg.norm(vector) <= NORM * persons * (1 if unit == "person" else 2)


def test_the_number_drawn_is_the_pooled_binomial(tmp_path: Path) -> None:
    """All faces alike, so that the sum tells how many were drawn: at each client, and over all of them."""
    rate, persons, rounds = 0.3, 10, 150
    config = tiny_config(sample_rate=rate, images_per_person=1)
    picture = np.random.default_rng(1).integers(0, 256, (1, 1, 28, 28), dtype=np.uint8)
    faces = FaceDataset(np.repeat(picture, persons, axis=0), np.arange(persons, dtype=np.int64))
    weights = get_flat(CoordinatorState.fresh(config, RUN_ID).discriminator)
    one = pooled_oracle(config, weights, faces.subset(np.array([0])))
    division = [0, 0, 0, 0, 0, 0, 1, 1, 1, 2]
    grid = InProcessGrid(keyed_client_app(), node_configs(tmp_path, config, shares_of(faces, division)))
    drawn = np.empty((rounds, 3), dtype=np.int64)
    for i in range(rounds):
        found = vectors(grid, gradient_instructions(config, weights, i + 1), len(weights))
        counts = [float(vector @ one / (one @ one)) for vector in found]
        drawn[i] = np.round(counts)
        np.testing.assert_allclose(counts, drawn[i], atol=0.02)
    for counts, units in ((drawn.sum(axis=1), 10), (drawn[:, 0], 6), (drawn[:, 1], 3), (drawn[:, 2], 1)):
        expected = stats.binom(units, rate).pmf(range(units + 1)) * rounds
        observed = np.bincount(counts, minlength=units + 1)
        statistic = ((observed - expected) ** 2 / expected).sum()
        assert stats.chi2(units).sf(statistic) > 1e-4, (observed, expected)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(drawn[:, a], drawn[:, b])[0, 1]) < 4 / math.sqrt(rounds)


@pytest.mark.parametrize("stage", list(Stage))
def test_the_coordinator_s_noise_has_its_deviation(tmp_path: Path, stage: Stage) -> None:
    """The same answers averaged under two keys and under none: the differences are the noise, once, of sigma C."""
    clients = 3
    config = tiny_config(sample_rate=0.5, expected_batch=2.0, discriminator_width=16)
    state = CoordinatorState.fresh(config, RUN_ID)
    weights = get_flat(state.discriminator)
    instructions = gradient_instructions(config, weights, 2)
    if stage is Stage.MOMENTS:
        instructions = dataclasses.replace(instructions, server_round=1, stage=stage, discriminator=None)
    shares = [random_faces(4, 2, seed=client) for client in range(clients)]
    # The shipped client's randomness: what was sent is sent again, so the noise is the coordinator's alone.
    grid = InProcessGrid(create_app(), node_configs(tmp_path, config, shares))
    exchange = Exchange(grid, config.training)
    averages = [collect(state, exchange, instructions, keyed("coordinator", i)).double().numpy() for i in range(2)]
    dimension = len(averages[0])
    clear = np.sum(vectors(grid, instructions, dimension), axis=0, dtype=np.float64)
    assert np.abs(clear).max() > 0
    units = config.privacy.expected_batch if stage is Stage.GRADIENTS else config.privacy.declared_units
    deviation = 0.7 * NORM if stage is Stage.GRADIENTS else config.moments.moment_noise_multiplier
    noises = [(average * units * clients - clear) / deviation for average in averages]
    noises.append((noises[0] - noises[1]) / math.sqrt(2))
    for noise in noises:
        low, high = stats.chi2(dimension).ppf([1e-4, 1 - 1e-4]) / dimension
        assert low < (noise**2).mean() < high
        assert stats.kstest(noise, "norm").pvalue > 1e-4


@pytest.mark.parametrize("model", ["local", "none"])
def test_only_central_adds_noise_at_the_coordinator(model: str) -> None:
    config = tiny_config(privacy_model=model)
    instructions = gradient_instructions(config, np.zeros(4, np.float32))
    updates = [DiscriminatorUpdate(RUN_ID, 1, np.full(4, value, np.float32)) for value in (1.0, 2.0, 6.0)]
    got = average(iter(updates), instructions, 4, keyed("unused"), TrainingConfig(update_bound=0.0))
    assert got.tolist() == [9.0 / 3 / config.privacy.expected_batch] * 4
