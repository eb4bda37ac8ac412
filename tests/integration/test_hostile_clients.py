"""The main loop with one client of six that sends whatever it likes: the run goes on, and it gets no further than it may."""

import logging
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.secret_store import PEER_KEY, load_peer_key
from common.cohort import AGGREGATORS
from common.config import RunConfig
from common.errors import CohortTooSmall, MalformedUpdate
from common.faces import FaceDataset
from common.messages import Stage
from common.models.flat import get_flat
from common.secure_messages import KeyAnswer
from server.aggregation import update_bound
from server.checkpoint import CheckpointStore, CoordinatorState
from server.coordinator import coordinate
from server.exchange import Exchange
from server.quality import Judge
from simulations.engine import InProcessGrid
from tests.faulty_wire import Federation
from tests.support import RUN_ID, keyed_client_app, keyed_coordinator, node_configs, random_faces, tiny_config, train

HONEST, LIAR = 5, 7  # node ids begin with 2
Lie = Callable[[Message, Message, RecordDict | None], Message]


def shares(count: int) -> list[FaceDataset]:
    return [random_faces(4, 2, seed=client) for client in range(count)]


class Lying:
    """The real apps, one of which is in a liar's hands. vectors: what the honest ones sent, by round.

    lie: makes the liar's answer of the message, what an honest client would have answered, and what it would have the round before.
    """

    def __init__(self, lie: Lie) -> None:
        self._lie, self._inner = lie, keyed_client_app()
        self._before: RecordDict | None = None
        self.vectors: dict[int, list[np.ndarray]] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self._inner(message, context)
        if context.node_id == LIAR:
            before, self._before = self._before, reply.content
            return self._lie(message, reply, before)
        self.vectors.setdefault(int(message.metadata.group_id), []).append(vector_of(reply.content))
        return reply


def vector_of(content: RecordDict) -> np.ndarray:
    return np.frombuffer(content["arrays"]["vector"].data, np.float32)  # type: ignore[index,union-attr]


def array(vector: np.ndarray, **declared: Any) -> Array:
    honest = {"dtype": str(vector.dtype), "shape": vector.shape, "stype": "visard.raw", "data": vector.tobytes()}
    return Array(**{**honest, **declared})


def telling(
    change: Callable[[np.ndarray], Array | np.ndarray] | None = None,
    beside: dict[str, Any] | None = None,
    **scalars: Any,
) -> Lie:
    """A lie in the vector, in the scalars, or in records `beside` them."""

    def lie(message: Message, reply: Message, _before: RecordDict | None) -> Message:
        made = vector_of(reply.content) if change is None else change(vector_of(reply.content))
        record = RecordDict({"update": ConfigRecord({**reply.content["update"], **scalars}), **(beside or {})})  # type: ignore[dict-item]
        record["arrays"] = ArrayRecord({"vector": made if isinstance(made, Array) else array(made)})
        return Message(record, reply_to=message)

    return lie


def garbage(message: Message, _reply: Message, _before: RecordDict | None) -> Message:
    junk = {"update": MetricRecord({"x": 1.0}), "arrays": ConfigRecord({"vector": b"\0" * 99})}
    return Message(RecordDict({**junk, "\x1b[2J": ConfigRecord({"\n": ["\r"] * 1000})}), reply_to=message)  # type: ignore[dict-item]


def replaying(message: Message, _reply: Message, before: RecordDict | None) -> Message:
    return Message(before, reply_to=message) if before is not None else Message(RecordDict(), reply_to=message)


def raising(_message: Message, _reply: Message, _before: RecordDict | None) -> Message:
    raise RuntimeError("whatever")


def claiming(reason: str) -> Lie:
    return lambda message, _reply, _before: Message(Error(100, reason), reply_to=message)


REFUSED: dict[str, Lie] = {
    "not a number": telling(lambda v: np.where(v == v.max(), np.nan, v)),
    "infinite": telling(lambda v: np.where(v == v.min(), -np.inf, v)),
    "all not a number": telling(lambda v: np.full_like(v, np.nan)),
    "two-dimensional": telling(lambda v: v.reshape(1, -1)),
    "too short": telling(lambda v: v[:-1]),
    "doubles": telling(lambda v: v.astype(np.float64)),
    "whole numbers": telling(lambda v: v.astype(np.int64)),
    "bytes of another type": telling(lambda v: array(v, dtype="uint32")),
    "more declared than sent": telling(lambda v: array(v, data=v.tobytes()[:-4])),
    "pickled": telling(lambda v: array(v, stype="numpy.ndarray")),
    "a weight of its own": telling(**{"num-examples": 10**9}),
    "metrics beside": telling(beside={"metrics": MetricRecord({"num-examples": 1e9})}),
    "a head that nobody signed": telling(ledger_head=b"\0" * 136),
    "a head that is a number": telling(ledger_head=5),
    "a place that is true": telling(place=True),
    "another run's": telling(run_id="f" * 32),
    "a round to come": telling(server_round=10**6),
    "garbage": garbage,
    "an earlier answer": replaying,
    "an exception": raising,
    "an error": claiming("InternalError"),
    "an error that is long and rings": claiming("\x07\x1b[31m" + "x" * 10**5),
    "a budget that is spent": claiming("BudgetExhausted"),
}


def configured(aggregator: str) -> RunConfig:
    return tiny_config(privacy_model="local", num_rounds=2, min_clients=5, aggregator=aggregator, num_clients=HONEST)


@cache
def without_the_liar(folder: Path, aggregator: str) -> CoordinatorState:
    (folder / aggregator).mkdir()
    return train(folder / aggregator, CoordinatorState.fresh(configured(aggregator), RUN_ID), shares(HONEST))


class Released:
    """An observer that keeps what came of each round, and its figures."""

    def __init__(self) -> None:
        self.means: list[Any] = []
        self.figures: list[dict[str, Any]] = []

    def fit_stepped(self, state: CoordinatorState) -> None:
        pass

    def round_ended(self, state: CoordinatorState) -> None:
        self.means.append(state.released)
        self.figures.append(dict(state.last))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CoordinatorState]:
    return partial(without_the_liar, tmp_path_factory.mktemp("clean"))


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("name", list(REFUSED))
def test_an_answer_that_is_refused_leaves_the_run_as_it_is_without_that_client(
    tmp_path: Path, name: str, aggregator: str, clean: Callable[[str], CoordinatorState]
) -> None:
    app, kept = Lying(REFUSED[name]), Released()
    state = CoordinatorState.fresh(configured(aggregator), RUN_ID)
    train(tmp_path, state, shares(HONEST + 1), [kept], app)  # type: ignore[arg-type]
    assert state.next_round == 4
    for network in ("generator", "ema", "discriminator"):
        left, right = getattr(state, network), getattr(clean(aggregator), network)
        np.testing.assert_array_equal(get_flat(left), get_flat(right))
    told = [figures["refusals"] for figures in kept.figures]
    assert told == ([{"BudgetExhausted": 1}, {}, {}] if "budget" in name else [told[0]] * 3)
    ((kind, count),) = told[0].items()
    assert count == 1
    assert len(kind) <= 40
    assert kind.isprintable()


WILD: dict[str, Lie] = {
    "a billion": telling(lambda v: np.full_like(v, 1e9)),
    "the largest": telling(lambda v: np.full_like(v, np.finfo(np.float32).max) * np.sign(v)),
    "itself a billion times over": telling(lambda v: v * np.float32(-1e9)),
    "one coordinate": telling(lambda v: np.where(np.arange(len(v)) == 3, np.float32(1e9), v)),
}


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("name", list(WILD))
def test_an_answer_that_is_finite_moves_the_model_no_further_than_the_bound(
    tmp_path: Path, name: str, aggregator: str
) -> None:
    app, kept, config = Lying(WILD[name]), Released(), configured(aggregator)
    state = train(tmp_path, CoordinatorState.fresh(config, RUN_ID), shares(HONEST + 1), [kept], app)  # type: ignore[arg-type]
    assert state.next_round == 4
    assert [figures["refusals"] for figures in kept.figures] == [{}] * 3
    for network in ("generator", "ema", "discriminator"):
        assert np.isfinite(get_flat(getattr(state, network))).all()
    for server_round, (instructions, mean) in enumerate(kept.means, 1):
        moments = instructions.stage is Stage.MOMENTS
        privacy = config.privacy
        made = mean.double().numpy() * (privacy.declared_units if moments else privacy.expected_batch)
        honest = np.stack(app.vectors[server_round]).astype(np.float64)
        assert len(honest) == HONEST
        slack = 1e-5 * np.abs(honest).max()
        if aggregator == "mean":
            lie = made * (HONEST + 1) - honest.sum(axis=0)
            assert np.linalg.norm(lie) <= 1.001 * update_bound(instructions, len(made), config.training)
        elif aggregator == "krum":
            assert min(np.abs(made - vector).max() for vector in honest) <= slack
        elif aggregator == "multi-krum":
            np.testing.assert_allclose(made, honest.mean(axis=0), atol=slack)
        else:
            assert (made >= honest.min(axis=0) - slack).all()
            assert (made <= honest.max(axis=0) + slack).all()


def test_under_none_too(tmp_path: Path) -> None:
    config = tiny_config(privacy_model="none", num_rounds=2, min_clients=5, aggregator="median")
    app = Lying(WILD["the largest"])
    state = train(tmp_path, CoordinatorState.fresh(config, RUN_ID), shares(HONEST + 1), client_app=app)  # type: ignore[arg-type]
    assert state.next_round == 4
    assert np.isfinite(get_flat(state.generator)).all()


def test_what_a_client_writes_is_logged_in_short(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lie = telling(**{"k" * 10**5 + "\x1b[31m": "x"})
    state = CoordinatorState.fresh(configured("mean"), RUN_ID)
    with caplog.at_level(logging.WARNING, "visard.server"):
        train(tmp_path, state, shares(HONEST + 1), client_app=Lying(lie))  # type: ignore[arg-type]
    lines = [record.getMessage() for record in caplog.records if record.name == "visard.server"]
    assert len(lines) == 3
    assert all("node 7 is refused" in line and len(line) < 300 and line.isprintable() for line in lines)


def test_an_answer_that_breaks_what_reads_it_is_refused_and_our_own_errors_are_told(tmp_path: Path) -> None:
    config = configured("mean")
    exchange = Exchange(InProcessGrid(keyed_client_app(), node_configs(tmp_path, config, shares(1))), config.training)
    with exchange.refusing(LIAR):
        raise IndexError("nobody thought of this")
    assert exchange.refusals == {"MalformedUpdate": 1}
    with pytest.raises(CohortTooSmall), exchange.refusing(LIAR):
        raise CohortTooSmall("this ends the run")


# A registry of peer keys, and clients that tell another.


def registered_keys(folder: Path, clients: int) -> dict[int, str]:
    keys = [load_peer_key(folder / "clients" / f"{number:04d}" / PEER_KEY) for number in range(clients)]
    return {number: key.public_key().public_bytes_raw().hex() for number, key in enumerate(keys, 2)}


def distributed(folder: Path, app: ClientApp, least: int = 2) -> CoordinatorState:
    """A run over a grid that knows its nodes' registered peer keys."""
    config = tiny_config(privacy_model="distributed", num_rounds=1, discriminator_width=1, min_clients=least)
    configs = node_configs(folder, config, shares(3))
    keys, state = registered_keys(folder, 3), CoordinatorState.fresh(config, RUN_ID)
    exchange = Exchange(InProcessGrid(app, configs), config.training, lambda node: keys.get(node, ""))
    coordinate(state, Judge(state), exchange, CheckpointStore(folder), [], keyed_coordinator)
    return state


def test_clients_that_tell_their_registered_peer_keys_are_heard(tmp_path: Path) -> None:
    assert distributed(tmp_path, keyed_client_app()).next_round == 3


def test_a_client_that_tells_another_s_peer_key_is_not(tmp_path: Path) -> None:
    inner = keyed_client_app()

    def app(message: Message, context: Context) -> Message:
        reply = inner(message, context)
        if "secure_key_request" in message.content and context.node_id == 4:
            key = bytes.fromhex(registered_keys(tmp_path, 3)[3])
            return Message(KeyAnswer(key).to_record(), reply_to=message)
        return reply

    told = r"2 clients told a peer key \(node 2, node 3, and not node 4 \(1 x MalformedUpdate\)\)"
    with pytest.raises(CohortTooSmall, match=told):
        distributed(tmp_path, app)  # type: ignore[arg-type]


def test_a_node_that_is_no_peer_of_the_run_is_named(tmp_path: Path) -> None:
    config = tiny_config(
        privacy_model="distributed", num_rounds=1, discriminator_width=1, min_clients=2, num_clients=2, survivors=2
    )
    grid = InProcessGrid(keyed_client_app(), node_configs(tmp_path, config, shares(3)))
    named = {2: "north", 3: "south", 4: "guest"}
    exchange = Exchange(grid, config.training, names=lambda: named)
    state = CoordinatorState.fresh(config, RUN_ID)
    told = r"3 clients told a peer key \(node north, node south, node guest\), and the run says peers = 2: .* stop or revoke"
    with pytest.raises(CohortTooSmall, match=told):
        coordinate(state, Judge(state), exchange, CheckpointStore(tmp_path), [], keyed_coordinator)


def test_a_node_that_has_left_keeps_its_name_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, named = configured("mean"), {2: "north", LIAR: "guest"}
    app = InProcessGrid(keyed_client_app(), node_configs(tmp_path, config, shares(1)))
    exchange = Exchange(app, config.training, names=lambda: named)
    assert exchange.named(2, LIAR, 9) == "node north, node guest, node 9"
    del named[LIAR]
    with caplog.at_level(logging.WARNING, "visard.server"), exchange.refusing(LIAR):
        raise MalformedUpdate("a lie")
    assert caplog.messages == ["an answer of node guest is refused: a lie"]


@pytest.mark.parametrize("registered", [True, False])
def test_a_node_takes_a_place_with_the_key_that_it_is_registered_with(tmp_path: Path, registered: bool) -> None:
    """The last client leaves, and another node comes that has its key, and says that it is that peer."""
    federation = Federation(tmp_path, again=[3], min_clients=2, num_clients=4, survivors=3)
    grid = federation.grid()
    grid.offline = {6}
    keys = registered_keys(tmp_path, 4)
    keys[6] = keys[5] if registered else "0" * 64

    class Leaving(Released):
        def round_ended(self, state: CoordinatorState) -> None:
            super().round_ended(state)
            grid.offline = {5}

    state, kept = CoordinatorState.fresh(federation.config, RUN_ID), Leaving()
    exchange = Exchange(grid, federation.config.training, lambda node: keys.get(node, ""))
    coordinate(state, Judge(state), exchange, CheckpointStore(tmp_path), [kept], keyed_coordinator)
    assert state.next_round == 5
    assert (6 in state.sums["nodes"].values()) == registered
    assert [figures["survivors"] for figures in kept.figures] == [4] + [4 if registered else 3] * 3
