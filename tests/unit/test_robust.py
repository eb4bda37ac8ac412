"""The robust aggregators against naive ones, and what no lie may do to them; the bound against honest releases."""

import dataclasses
import itertools
import math
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import server.robust
from client.discriminator import gradient_update
from client.moments import moment_update
from common.cohort import AGGREGATORS, least_clients, liars
from common.config import RunConfig
from common.errors import CohortTooSmall, ConfigError
from common.faces import FaceDataset
from common.fields import Scalar
from common.messages import DiscriminatorUpdate, RoundInstructions, Stage
from common.privacy.randomness import add_gaussian_noise
from common.sections import TrainingConfig
from server.aggregation import average, declared_mean, update_bound
from server.checkpoint import CoordinatorState
from server.coordinator import instructions_for
from server.generator import GeneratorTrainer
from server.robust import ROBUST, bounded, expected_norm
from tests.support import RUN_ID, gradient_instructions, keyed, random_faces, tiny_config

DIMENSION = 7


def naive_median(vectors: list[list[float]], lying: int) -> list[float]:
    """By hand."""
    found = []
    for column in zip(*vectors, strict=True):
        values, half = sorted(column), len(column) // 2
        found.append(values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2)
    return found


def naive_trimmed_mean(vectors: list[list[float]], lying: int) -> list[float]:
    """By hand."""
    found = []
    for column in zip(*vectors, strict=True):
        values = sorted(column)
        for _ in range(lying):
            values.remove(max(values))
            values.remove(min(values))
        found.append(sum(values) / len(values))
    return found


def naive_scores(vectors: list[list[float]], lying: int) -> list[float]:
    """Krum's score as the paper writes it: over the n - f - 2 closest others."""
    scores = []
    for i, one in enumerate(vectors):
        others = [sum((a - b) ** 2 for a, b in zip(one, v, strict=True)) for j, v in enumerate(vectors) if j != i]
        scores.append(sum(sorted(others)[: len(vectors) - lying - 2]))
    return scores


def naive_krum(vectors: list[list[float]], lying: int) -> list[float]:
    """By hand."""
    scores = naive_scores(vectors, lying)
    return vectors[scores.index(min(scores))]


def naive_multi_krum(vectors: list[list[float]], lying: int) -> list[float]:
    """By hand."""
    ranked = sorted(zip(naive_scores(vectors, lying), vectors, strict=True))[: len(vectors) - lying]
    return [sum(column) / len(ranked) for column in zip(*(vector for _, vector in ranked), strict=True)]


ORACLES = {
    "median": naive_median,
    "trimmed-mean": naive_trimmed_mean,
    "krum": naive_krum,
    "multi-krum": naive_multi_krum,
}


def tensors(vectors: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(vector.copy()) for vector in vectors]


def drawn(clients: int, seed: int, dimension: int = DIMENSION) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(clients, dimension)).astype(np.float32)


def test_every_aggregator_of_the_configuration_is_there_and_no_other() -> None:
    assert {"mean", *ROBUST} == set(AGGREGATORS)
    assert ORACLES.keys() == ROBUST.keys()


@pytest.mark.parametrize("name", list(ROBUST))
@pytest.mark.parametrize(("clients", "lying"), [(5, 1), (6, 1), (7, 2), (10, 2), (10, 0), (11, 4)])
@pytest.mark.parametrize("chunk", [3, 1 << 16])
def test_the_naive_one_says_the_same(
    name: str, clients: int, lying: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.robust, "_CHUNK", chunk)
    for seed in range(10):
        vectors = drawn(clients, seed)
        got = ROBUST[name](tensors(vectors), lying)
        assert got.dtype == torch.float64
        expected = ORACLES[name]([[float(value) for value in vector] for vector in vectors], lying)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)


# Few values, so that there are ties, and vectors that are the same.
COARSE = st.integers(-2, 2).map(float)
WILD = st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False)


def rows(values: st.SearchStrategy[float], least: int, most: int) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(values, min_size=3, max_size=3), min_size=least, max_size=most)


@settings(max_examples=60, deadline=None)
@given(vectors=st.one_of(rows(COARSE, 5, 8), rows(WILD, 5, 8)), data=st.data())
@pytest.mark.parametrize("name", list(ROBUST))
def test_the_order_of_arrival_does_not_matter(name: str, vectors: list[list[float]], data: st.DataObject) -> None:
    array = np.array(vectors, dtype=np.float32)
    order = data.draw(st.permutations(range(len(array))))
    one = ROBUST[name](tensors(array), 1)
    other = ROBUST[name](tensors(array[order]), 1)
    np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert one.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    honest=rows(st.floats(-10, 10, width=32), 4, 9), lies=st.lists(st.lists(WILD, min_size=3, max_size=3), max_size=3)
)
@pytest.mark.parametrize("name", ["median", "trimmed-mean"])
def test_liars_do_not_move_a_coordinate_out_of_the_honest_range(
    name: str, honest: list[list[float]], lies: list[list[float]]
) -> None:
    array = np.array(honest + lies, dtype=np.float32)
    got = ROBUST[name](tensors(array), len(lies)).numpy()
    assert (got >= np.min(honest, axis=0) - 1e-12).all()
    assert (got <= np.max(honest, axis=0) + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    clients=st.integers(7, 12),
    factors=st.lists(st.floats(50, 1e30) | st.floats(-1e30, -50), min_size=2, max_size=2),
)
@pytest.mark.parametrize("name", ["krum", "multi-krum"])
def test_krum_chooses_none_that_is_far_from_all_others(
    name: str, seed: int, clients: int, factors: list[float]
) -> None:
    honest = drawn(clients - 2, seed)
    lies = np.stack([np.full(DIMENSION, factor, np.float32) * (1 + i) for i, factor in enumerate(factors)])
    got = ROBUST[name](tensors(np.concatenate([lies, honest])), 2).numpy()
    if name == "krum":
        assert any((got == vector).all() for vector in honest)
    else:
        np.testing.assert_allclose(got, honest.mean(axis=0, dtype=np.float64), rtol=1e-9, atol=1e-9)


def test_krum_may_choose_a_liar_that_sends_no_noise() -> None:
    """What `server.robust` says of it: noise is what sets honest vectors apart."""
    vectors = np.concatenate([drawn(8, 0, 1000), np.zeros((1, 1000), np.float32)])
    np.testing.assert_array_equal(ROBUST["krum"](tensors(vectors), 1), np.zeros(1000))


@pytest.mark.parametrize(
    ("name", "clients", "lying"), [("krum", 6, 2), ("multi-krum", 4, 1), ("krum", 2, 0), ("trimmed-mean", 4, 2)]
)
def test_too_few_updates_are_refused(name: str, clients: int, lying: int) -> None:
    with pytest.raises(CohortTooSmall, match=f"{clients} updates.* start more clients"):
        ROBUST[name](tensors(drawn(clients, 0)), lying)


def test_liars_are_a_share_rounded_down() -> None:
    assert [liars(0.2, n) for n in (1, 4, 5, 9, 10, 100)] == [0, 0, 1, 1, 2, 20]
    assert liars(0.29, 100) == 29
    assert liars(0.0, 100) == 0


@pytest.mark.parametrize("poisoners", [0.0, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.45, 0.49])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_least_number_of_clients_is_the_least(name: str, poisoners: float) -> None:
    def fit(clients: int) -> bool:
        lying = liars(poisoners, clients)
        guards = name == "mean" or poisoners == 0 or (clients >= 3 if name == "median" else lying >= 1)
        return guards and (not name.endswith("krum") or clients > 2 * lying + 2) and (name != "median" or clients > 2)

    least = least_clients(name, poisoners)
    assert all(fit(clients) for clients in range(least, 400))
    assert least == 1 or not fit(least - 1)


@pytest.mark.parametrize("name", list(ROBUST))
def test_a_configuration_with_too_few_clients_is_refused_and_told_how_many(name: str) -> None:
    least = least_clients(name, 0.2)
    flat: dict[str, Scalar] = {"privacy-model": "local", "aggregator": name}
    with pytest.raises(ConfigError, match=f"use --min-clients {least} or more"):
        RunConfig.from_flat({**flat, "min-clients": least - 1})
    assert RunConfig.from_flat({**flat, "min-clients": least}).training.aggregator == name


@pytest.mark.parametrize(
    ("flat", "told"),
    [
        ({"privacy-model": "central", "aggregator": "median", "min-clients": 5}, "aggregator = median.*central"),
        ({"privacy-model": "distributed", "aggregator": "krum", "min-clients": 5}, "aggregator = krum.*distributed"),
        ({"privacy-model": "distributed", "cohort-size": 5}, "cohort-size = 5.*secure sum"),
        ({"cohort-size": 2, "min-clients": 3}, "cohort-size = 2 is less than min-clients = 3"),
        ({"aggregator": "average"}, "aggregator = 'average': choose one of mean, median"),
        ({"poisoners": 0.5}, "poisoners = 0.5 is outside"),
        ({"update-bound": 0.5}, "update-bound = 0.5 would shorten"),
        ({"update-bound": float("inf")}, "update-bound"),
        ({"straggler-wait-s": -1.0}, "straggler-wait-s"),
        ({"cohort-size": -1}, "cohort-size"),
    ],
)
def test_what_does_not_fit_is_refused(flat: dict[str, Scalar], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        RunConfig.from_flat(flat)


@settings(max_examples=100, deadline=None)
@given(vector=st.lists(WILD, min_size=1, max_size=5), bound=st.floats(1e-3, 1e6))
def test_a_bounded_vector_keeps_its_direction_and_is_no_longer_than_the_bound(
    vector: list[float], bound: float
) -> None:
    given_ = torch.tensor(vector, dtype=torch.float32)
    got = bounded(given_, bound)
    norm = math.sqrt(math.fsum(float(value) ** 2 for value in given_))
    if norm <= bound:
        assert torch.equal(got, given_)
    else:
        expected = [float(value) / norm * bound for value in given_]
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-37)


# What honest clients send, and how long it is.

CONFIGS: dict[str, dict[str, Scalar]] = {
    "local": {"privacy_model": "local"},
    "little noise": {"privacy_model": "local", "epsilon": 1e8, "noise_multiplier": 0.01},
    "all drawn": {
        "privacy_model": "local",
        "epsilon": 1e8,
        "noise_multiplier": 0.01,
        "sample_rate": 1.0,
        "expected_batch": 4.0,
    },
    "several steps": {"privacy_model": "local", "local_steps": 5},
    "several steps, projected": {"privacy_model": "local", "local_steps": 5, "loss": "wasserstein"},
    "classes": {"privacy_model": "local", "num_classes": 3, "moment_batch": 6, "generator_batch": 6},
}


def asked_of(config: RunConfig, stage: Stage) -> RoundInstructions:
    state = CoordinatorState.fresh(config, RUN_ID)
    return instructions_for(state, 1 if stage is Stage.MOMENTS else 2, GeneratorTrainer(state))


def answer(asked: RoundInstructions, faces: FaceDataset, *key: object) -> np.ndarray:
    update = moment_update if asked.stage is Stage.MOMENTS else gradient_update
    return update(asked, faces, keyed(*key))


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_default_bound_touches_no_honest_update(name: str, stage: Stage) -> None:
    config = tiny_config(**CONFIGS[name])
    asked = asked_of(config, stage)
    units = round(config.privacy.declared_units)
    norms = []
    for client in range(40):
        faces = random_faces(units, 2, seed=client, num_classes=config.model.num_classes)
        vector = answer(asked, faces, name, client)
        bound = update_bound(asked, len(vector), config.training)
        assert bounded(torch.from_numpy(vector.copy()), bound).equal(torch.from_numpy(vector.copy()))
        norms.append(float(np.linalg.norm(vector.astype(np.float64))))
    # It is not so far away that anything would pass either: noise, where there is any, is counted with as it is.
    expected = expected_norm(asked, len(vector))
    assert max(norms) < 1.1 * expected
    if name == "local":
        assert max(norms) > 0.7 * expected


@pytest.mark.parametrize("stage", list(Stage))
def test_a_client_that_holds_more_than_twice_what_is_declared_is_not_touched_though_nothing_hides_it(
    stage: Stage,
) -> None:
    """The same face everywhere: all gradients point one way, and there is next to no noise."""
    config = tiny_config(**CONFIGS["all drawn"], max_grad_norm=1e-3)
    units = 3 * round(config.privacy.declared_units)
    picture = np.random.default_rng(0).integers(0, 256, (1, 1, 28, 28), dtype=np.uint8)
    faces = FaceDataset(np.repeat(picture, units, axis=0), np.arange(units, dtype=np.int64))
    asked = dataclasses.replace(asked_of(config, stage), moment_noise_multiplier=1e-3)
    vector = answer(asked, faces, "alike")
    norm, expected = float(np.linalg.norm(vector)), expected_norm(asked, len(vector))
    assert 2.5 * expected < norm < 0.8 * update_bound(asked, len(vector), config.training)


def test_the_expected_norm_by_hand() -> None:
    config = tiny_config(privacy_model="local", epsilon=1e4, noise_multiplier=0.5, max_grad_norm=3.0)
    privacy = config.privacy
    one = gradient_instructions(config, np.zeros(100, np.float32))
    assert expected_norm(one, 100) == pytest.approx(math.sqrt((0.5 * 3) ** 2 * 100 + (3 * 2) ** 2))
    several = dataclasses.replace(one, local_steps=4)
    noise = 0.5 * 3 / privacy.expected_batch
    assert expected_norm(several, 100) == pytest.approx(math.sqrt(noise**2 * 100 / 4 + (3 + 3) ** 2))
    moments = dataclasses.replace(one, stage=Stage.MOMENTS, discriminator=None, moment_noise_multiplier=2.0)
    assert expected_norm(moments, 100) == pytest.approx(math.sqrt(4 * 100 + 4**2))
    clear = dataclasses.replace(privacy, privacy_model=tiny_config(privacy_model="none").privacy.privacy_model)
    assert expected_norm(dataclasses.replace(one, privacy=clear), 100) == math.inf
    assert expected_norm(dataclasses.replace(moments, privacy=clear), 100) == 4.0


def averaged(vectors: Sequence[np.ndarray], asked: RoundInstructions, **training: Scalar) -> Tensor:
    updates = [DiscriminatorUpdate(RUN_ID, 1, vector) for vector in vectors]
    return average(updates, asked, len(vectors[0]), keyed("unused"), TrainingConfig(min_clients=5, **training))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_average_is_the_aggregator_s_over_what_is_declared(name: str) -> None:
    config = tiny_config(privacy_model="local")
    asked = gradient_instructions(config, np.zeros(DIMENSION, np.float32))
    vectors = drawn(6, 3)
    lists = [[float(value) for value in vector] for vector in vectors]
    middle = np.mean(lists, axis=0) if name == "mean" else np.array(ORACLES[name](lists, 1))
    got = averaged(vectors, asked, aggregator=name)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), middle / config.privacy.expected_batch, rtol=1e-6)
    moments = dataclasses.replace(asked, stage=Stage.MOMENTS, discriminator=None)
    got = averaged(vectors, moments, aggregator=name)
    np.testing.assert_allclose(got.numpy(), middle / config.privacy.declared_units, rtol=1e-6)


def test_a_mean_of_noised_vectors_is_the_same_in_any_order() -> None:
    config = tiny_config(privacy_model="local")
    asked = gradient_instructions(config, np.zeros(50, np.float32))
    clear = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 50)) * 10.0 ** np.arange(-3, 2)[:, None])
    noised = [add_gaussian_noise(total, 0.7, keyed(i)).numpy() for i, total in enumerate(clear)]
    found = [averaged(order, asked, update_bound=0.0) for order in itertools.permutations(noised)]
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("bound", [0.0, 4.0])
def test_whatever_is_finite_gives_something_finite(name: str, bound: float) -> None:
    config = tiny_config(privacy_model="local", expected_batch=0.5)
    asked = gradient_instructions(config, np.zeros(DIMENSION, np.float32))
    largest = np.full((6, DIMENSION), np.finfo(np.float32).max, np.float32)
    assert averaged(largest, asked, aggregator=name, update_bound=bound).isfinite().all()


def test_one_liar_moves_a_mean_by_the_bound_at_most() -> None:
    config = tiny_config(privacy_model="local")
    asked = gradient_instructions(config, np.zeros(DIMENSION, np.float32))
    honest = drawn(4, 1)
    bound = update_bound(asked, DIMENSION, config.training)
    lie = np.full(DIMENSION, 1e9, np.float32)
    with_it = averaged([*honest, lie], asked).double() * config.privacy.expected_batch * 5
    moved = with_it - torch.from_numpy(honest.sum(axis=0, dtype=np.float64))
    assert float(moved.norm()) == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("model", ["central", "none"])
def test_where_nothing_is_known_of_an_update_it_is_not_bounded(model: str) -> None:
    config = tiny_config(privacy_model=model, epsilon=1e6, noise_multiplier=0.1)
    asked = gradient_instructions(config, np.zeros(DIMENSION, np.float32))
    assert update_bound(asked, DIMENSION, config.training) == math.inf


def test_a_mean_is_formed_without_keeping_the_vectors() -> None:
    config = tiny_config(privacy_model="local")
    asked = gradient_instructions(config, np.zeros(DIMENSION, np.float32))
    sent: list[weakref.ref[DiscriminatorUpdate]] = []

    def arriving() -> Iterator[DiscriminatorUpdate]:
        for vector in drawn(50, 0):
            assert sum(update() is not None for update in sent) <= 1
            update = DiscriminatorUpdate(RUN_ID, 1, vector)
            sent.append(weakref.ref(update))
            yield update

    got = average(arriving(), asked, DIMENSION, keyed("unused"), TrainingConfig(update_bound=0.0))
    np.testing.assert_allclose(got, declared_mean(torch.from_numpy(drawn(50, 0)).double().sum(0), 50, asked), rtol=1e-6)
