"""Who is asked in a round, and for how long it is waited for whom."""

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from scipy import stats

import server.exchange
from common.config import RunConfig
from common.errors import BudgetsSpent, CohortTooSmall
from common.faces import FaceDataset
from common.fields import Scalar
from common.messages import planned_releases
from common.models.flat import get_flat
from common.privacy.accounting import epsilon_of
from common.privacy.ledger import Ledger
from server.checkpoint import CheckpointStore, CoordinatorState
from server.cohort import cohort_of
from server.coordinator import Observer, coordinate
from server.exchange import Exchange
from server.quality import Judge
from simulations.engine import InProcessGrid
from tests.faulty_wire import Federation
from tests.support import (
    RUN_ID,
    gradient_instructions,
    keyed_client_app,
    keyed_coordinator,
    node_configs,
    random_faces,
    tiny_config,
    train,
)

NODES = list(range(2, 12))


def shares(count: int) -> list[FaceDataset]:
    return [random_faces(4, 2, seed=client) for client in range(count)]


# Whom a round asks.


def test_a_cohort_is_of_the_least_hashes() -> None:
    for size, server_round in itertools.product((1, 3, 9), (1, 2, 77)):
        hashes = {
            hashlib.sha256(f"visard cohort 1\n{RUN_ID} {server_round} {node}".encode()).hexdigest(): node
            for node in NODES
        }
        expected = sorted(hashes[digest] for digest in sorted(hashes)[:size])
        assert cohort_of(reversed(NODES), size, RUN_ID, server_round) == expected
    for size in (0, 10, 11):
        assert cohort_of(reversed(NODES), size, RUN_ID, 1) == NODES


def test_over_the_rounds_all_nodes_and_all_pairs_are_asked_alike_often() -> None:
    rounds, size = 3000, 3
    cohorts = [cohort_of(NODES, size, RUN_ID, number) for number in range(1, rounds + 1)]
    ones = Counter(node for cohort in cohorts for node in cohort)
    pairs = Counter(pair for cohort in cohorts for pair in itertools.combinations(cohort, 2))
    assert len(pairs) == 45
    share = rounds * size / 10
    # Each node: binomial. Within a round the counts are tied, which makes the sum of squares smaller by (1 - size / 10).
    statistic = sum((ones[node] - share) ** 2 for node in NODES) / share / (1 - size / 10) * 9 / 10
    assert 1e-4 < stats.chi2(9).sf(statistic) < 1 - 1e-4
    deviation = np.sqrt(rounds / 15 * 14 / 15)
    assert all(abs(count - rounds / 15) < 4.5 * deviation for count in pairs.values())
    # Not as often in a row as one would be, were the next round's choice tied to this one's.
    again = sum(len({*one} & {*other}) for one, other in itertools.pairwise(cohorts))
    assert abs(again / (rounds - 1) - 0.9) < 0.1


def test_a_node_that_goes_has_its_place_taken_and_the_others_stay() -> None:
    for server_round in range(1, 100):
        cohort = cohort_of(NODES, 4, RUN_ID, server_round)
        for gone in NODES:
            without = cohort_of([node for node in NODES if node != gone], 4, RUN_ID, server_round)
            assert len({*cohort} - {*without}) == (gone in cohort)


def test_another_run_asks_others() -> None:
    runs = {tuple(tuple(cohort_of(NODES, 3, f"{run:032x}", number)) for number in range(1, 9)) for run in range(50)}
    assert len(runs) == 50


class Asked:
    """An observer: the nodes that each round asked."""

    def __init__(self) -> None:
        self.before: dict[str, list[int]] = {}
        self.rounds: list[list[int]] = []

    def fit_stepped(self, state: CoordinatorState) -> None:
        pass

    def round_ended(self, state: CoordinatorState) -> None:
        server_round = state.next_round - 1
        self.rounds.append(sorted(int(node) for node, charged in state.charged.items() if charged[2] == server_round))
        for node, charged in self.before.items():
            assert state.charged[node] == charged or state.charged[node][2] == server_round
        self.before = {node: list(charged) for node, charged in state.charged.items()}


def test_who_is_not_asked_is_not_charged(tmp_path: Path) -> None:
    config = tiny_config(privacy_model="local", cohort_size=3, num_rounds=6)
    asked = Asked()
    state = train(tmp_path, CoordinatorState.fresh(config, RUN_ID), shares(6), [asked])
    nodes = range(2, 8)
    assert asked.rounds == [cohort_of(nodes, 3, RUN_ID, number) for number in range(1, 8)]
    for node in nodes:
        mine = [number for number, cohort in enumerate(asked.rounds, 1) if node in cohort]
        assert mine
        assert len(mine) < 7
        moments, steps, last = state.charged[str(node)]
        assert (moments, steps, last) == (int(1 in mine), len(mine) - (1 in mine), mine[-1])
        ledger = Ledger(tmp_path / "clients" / f"{node - 2:04d}", max_epsilon=10, delta=1e-5)
        assert len(ledger.releases) == len(mine)
        assert ledger.epsilon < config.privacy.epsilon


def test_a_resumed_run_asks_the_same(tmp_path: Path) -> None:
    config = tiny_config(privacy_model="local", cohort_size=2, num_rounds=4)
    (tmp_path / "whole").mkdir()
    whole = train(tmp_path / "whole", CoordinatorState.fresh(config, RUN_ID), shares(5))
    inner, stopped = keyed_client_app(), []

    def breaking(message: Message, context: Any) -> Message:
        """The process ends within each round, once, after one client has answered."""
        reply = inner(message, context)
        if int(message.metadata.group_id) not in stopped:
            stopped.append(int(message.metadata.group_id))
            raise KeyboardInterrupt
        return reply

    (tmp_path / "broken").mkdir()
    state = CoordinatorState.fresh(config, RUN_ID)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken", state, shares(5), client_app=breaking)  # type: ignore[arg-type]
        state = CheckpointStore(tmp_path / "broken").load()
    train(tmp_path / "broken", state, shares(5), client_app=breaking)  # type: ignore[arg-type]
    assert state.charged == whole.charged
    np.testing.assert_array_equal(get_flat(state.generator), get_flat(whole.generator))


def cost(config: RunConfig, rounds: int) -> float:
    releases = planned_releases(config.privacy, 1, config.moments.moment_noise_multiplier, rounds)
    return 1.0001 * epsilon_of(releases, config.privacy.delta)


def test_others_take_the_places_of_those_whose_budgets_are_spent(tmp_path: Path) -> None:
    """Two of four can pay for the moment round alone; the run goes on with the other two, and ends where these are spent."""
    config = tiny_config(privacy_model="local", cohort_size=2, num_rounds=8, epsilon=20.0, moment_noise_multiplier=3.73)

    def policy(client: int, node: dict[str, Scalar]) -> dict[str, Scalar]:
        return node | {"max-epsilon": cost(config, 0) if client < 2 else cost(config, 5)}

    asked = Asked()
    state = train(tmp_path, CoordinatorState.fresh(config, RUN_ID), shares(4), [asked], policy=policy)
    assert state.ended_by == "budgets"
    assert "4 clients have spent their budgets, 0 are left and 2 are needed" in state.stopped
    done = len(asked.rounds)
    assert 5 <= done < 9
    for client in range(4):
        ledger = Ledger(tmp_path / "clients" / f"{client:04d}", max_epsilon=20.0, delta=config.privacy.delta)
        assert ledger.epsilon <= (cost(config, 0) if client < 2 else cost(config, 5))


# How long it is waited for whom.


class SlowGrid(InProcessGrid):
    """Answers of some nodes come late, and nodes come and go.

    late: of a node, the seconds after which it answers. there: whether a node is connected, by its id and the seconds since the
    grid was made. wakes: how often the caller was woken, where the grid tells of answers.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        clients: int,
        late: dict[int, float] | None = None,
        there: Callable[[int, float], bool] = lambda _node, _time: True,
    ) -> None:
        super().__init__(keyed_client_app(), node_configs(folder, config, shares(clients)))
        self.late, self.there = late or {}, there
        self.began = self.pushed = time.monotonic()
        self.looks = 0

    def get_node_ids(self) -> list[int]:
        self.looks += 1
        return [node for node in super().get_node_ids() if self.there(node, time.monotonic() - self.began)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.pushed = time.monotonic()
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        due = time.monotonic() - self.pushed
        for message_id in message_ids:
            message = self._waiting.get(message_id)
            if message is not None and self.late.get(message.metadata.dst_node_id, 0.0) <= due:
                yield from super().pull_messages([message_id])


def collected(grid: InProcessGrid, config: RunConfig) -> tuple[int, dict[str, int], float]:
    """One round of a step: the updates that came, the reasons why others did not, and the seconds it took."""
    state = CoordinatorState.fresh(config, RUN_ID)
    instructions = gradient_instructions(config, get_flat(state.discriminator))
    exchange, began = Exchange(grid, config.training), time.monotonic()
    nodes = exchange.wait_for_clients()
    updates = list(exchange.collect(instructions, nodes, len(get_flat(state.discriminator)), {}))
    return len(updates), dict(exchange.refusals), time.monotonic() - began


def test_stragglers_get_so_long_once_enough_have_answered(tmp_path: Path) -> None:
    config = tiny_config(privacy_model="local", straggler_wait_s=0.5, min_clients=2)
    grid = SlowGrid(tmp_path, config, 4, late={3: 1.0, 4: 1.2, 5: 1000.0})
    updates, refusals, seconds = collected(grid, config)
    assert (updates, refusals) == (3, {"no answer in time": 1})
    assert 1.4 < seconds < 10


def test_until_enough_have_answered_all_get_the_round_s_time(tmp_path: Path) -> None:
    config = tiny_config(privacy_model="local", straggler_wait_s=0.1, min_clients=2, round_timeout_s=1.5)
    grid = SlowGrid(tmp_path, config, 3, late={3: 1000.0, 4: 1000.0})
    with pytest.raises(CohortTooSmall, match=r"1 of 3 clients gave an update \(2 x no answer in time\)"):
        collected(grid, config)
    assert time.monotonic() - grid.pushed >= 1.5


def test_a_straggler_never_gets_longer_than_the_round(tmp_path: Path) -> None:
    config = tiny_config(privacy_model="local", straggler_wait_s=1000.0, min_clients=2, round_timeout_s=1.0)
    updates, refusals, seconds = collected(SlowGrid(tmp_path, config, 3, late={4: 1000.0}), config)
    assert (updates, refusals) == (2, {"no answer in time": 1})
    assert 1.0 <= seconds < 10


def test_without_the_option_it_is_waited_for_all(tmp_path: Path) -> None:
    config = tiny_config(privacy_model="local", min_clients=1)
    assert collected(SlowGrid(tmp_path, config, 3, late={3: 0.7, 4: 1.4}), config)[:2] == (3, {})


def test_an_answer_that_is_refused_does_not_count_as_one(tmp_path: Path) -> None:
    """Else a client that answers nonsense at once would shut out the others."""
    config = tiny_config(privacy_model="local", straggler_wait_s=0.2, min_clients=2)
    grid = SlowGrid(tmp_path, config, 4, late={4: 1.0, 5: 1.0})
    honest = grid._client_app

    def app(message: Message, context: Any) -> Message:
        if context.node_id in (2, 3):
            return Message(message.content, reply_to=message)
        return honest(message, context)

    grid._client_app = app  # type: ignore[assignment]
    updates, refusals, _ = collected(grid, config)
    assert (updates, refusals) == (2, {"MalformedUpdate": 2})


def test_a_node_that_is_gone_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.exchange, "_GONE_S", 1.0)
    monkeypatch.setattr(server.exchange, "_LOOK_S", 0.1)
    config = tiny_config(privacy_model="local", min_clients=2)
    # The last one is away for a shorter time, and answers.
    there = {4: lambda now: now < 0.3, 5: lambda now: not 0.3 < now < 0.9}
    always = lambda _now: True  # noqa: E731
    grid = SlowGrid(tmp_path, config, 4, {4: 1000.0, 5: 1.6}, lambda node, now: there.get(node, always)(now))
    updates, refusals, seconds = collected(grid, config)
    assert (updates, refusals) == (3, {"disconnected": 1})
    assert 1.2 < seconds < 20
    assert grid.looks < 10 * seconds + 5


def test_nodes_that_are_gone_are_waited_for_where_the_round_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the network fails all nodes are gone for a while: to give them up would end the run."""
    monkeypatch.setattr(server.exchange, "_GONE_S", 0.3)
    monkeypatch.setattr(server.exchange, "_LOOK_S", 0.1)
    config = tiny_config(privacy_model="local", min_clients=2)
    grid = SlowGrid(tmp_path, config, 3, {2: 1.5, 3: 1.5, 4: 1000.0}, lambda _node, now: now < 0.2)
    assert collected(grid, config)[:2] == (2, {"disconnected": 1})


def test_a_secure_sum_too_goes_on_without_a_straggler(tmp_path: Path) -> None:
    """Once as many as survivors have masked their vectors; it is in the sums before and after."""
    federation = Federation(tmp_path, num_clients=4, survivors=3, straggler_wait_s=0.3, num_rounds=2)
    grid, began = federation.grid({(5, "mask", 2): "lost"}), time.monotonic()
    figures: list[dict[str, Any]] = []

    class Watch(Asked):
        def round_ended(self, state: CoordinatorState) -> None:
            figures.append(dict(state.last))

    federation.run(grid, CoordinatorState.fresh(federation.config, RUN_ID), Watch())
    assert [line["survivors"] for line in figures] == [4, 3, 4]
    assert [line["refusals"] for line in figures] == [{}, {"no answer in time": 1}, {}]
    assert time.monotonic() - began < 30


def test_a_grid_that_hears_of_answers_is_not_slept_for(tmp_path: Path) -> None:
    config = tiny_config(privacy_model="local")
    asked: list[float] = []

    class Waking(SlowGrid):
        def wait_for_reply(self, seconds: float) -> None:
            asked.append(seconds)
            time.sleep(min(seconds, 0.01))

    assert collected(Waking(tmp_path, config, 2, late={3: 0.5}), config)[0] == 2
    assert len(asked) > 10
    assert all(0 <= seconds <= 0.1 for seconds in asked)


def resumed(grid: InProcessGrid, folder: Path, *observers: Observer) -> CoordinatorState:
    state = CheckpointStore(folder).load()
    exchange = Exchange(grid, state.config.training)
    coordinate(state, Judge(state), exchange, CheckpointStore(folder), observers, keyed_coordinator)
    return state


class Stop:
    """An observer that ends the process after a round."""

    def __init__(self, server_round: int) -> None:
        self._round = server_round

    def fit_stepped(self, state: CoordinatorState) -> None:
        pass

    def round_ended(self, state: CoordinatorState) -> None:
        if state.next_round - 1 == self._round:
            raise KeyboardInterrupt


def interrupted(folder: Path, clients: int, **options: Scalar) -> RunConfig:
    config = tiny_config(privacy_model="local", num_rounds=3, **options)
    with pytest.raises(KeyboardInterrupt):
        train(folder, CoordinatorState.fresh(config, RUN_ID), shares(clients), [Stop(2)])
    return config


def test_the_clients_of_the_last_round_may_come_back_first(tmp_path: Path) -> None:
    """Enough are connected at once; the last comes 1.5 s later, and is asked all the same."""
    config = interrupted(tmp_path, 4)
    grid = SlowGrid(tmp_path, config, 4, there=lambda node, now: node < 5 or now > 1.5)
    asked = Asked()
    state = resumed(grid, tmp_path, asked)
    assert asked.rounds == [[2, 3, 4, 5]] * 2
    assert state.next_round == 5
    assert all(charged == [1, 3, 4] for charged in state.charged.values())


@pytest.mark.parametrize(("patience", "timeout"), [(1.0, 60.0), (60.0, 1.0)])
def test_those_that_do_not_come_back_are_waited_for_so_long_and_once(
    tmp_path: Path, patience: float, timeout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.exchange, "_RETURN_S", patience)
    config = interrupted(tmp_path, 3, round_timeout_s=timeout)
    grid = SlowGrid(tmp_path, config, 3, there=lambda node, _now: node < 4)
    asked = Asked()
    resumed(grid, tmp_path, asked)
    assert asked.rounds == [[2, 3]] * 2
    assert 1.0 <= time.monotonic() - grid.began < 20


def test_clients_that_had_left_before_are_not_waited_for(tmp_path: Path) -> None:
    config = interrupted(tmp_path, 3)
    state = CheckpointStore(tmp_path).load()
    state.charged["4"] = [1, 0, 1]  # asked last in the round before the last
    CheckpointStore(tmp_path).save(state)
    grid = SlowGrid(tmp_path, config, 3, there=lambda node, _now: node < 4)
    began = time.monotonic()
    resumed(grid, tmp_path)
    assert time.monotonic() - began < 15


def test_a_fresh_run_and_a_finished_one_wait_for_nobody(tmp_path: Path) -> None:
    exchange = Exchange(SlowGrid(tmp_path, tiny_config(), 2, there=lambda _n, _t: False), tiny_config().training)
    began = time.monotonic()
    exchange.wait_for_return(set())
    exchange.spent.add(9)
    exchange.wait_for_return({9})
    assert time.monotonic() - began < 1
    config = interrupted(tmp_path, 2)
    resumed(InProcessGrid(keyed_client_app(), node_configs(tmp_path, config, shares(2))), tmp_path)
    nobody = SlowGrid(tmp_path, config, 2, there=lambda _node, _now: False)
    began = time.monotonic()
    assert resumed(nobody, tmp_path).next_round == 5
    assert time.monotonic() - began < 10


def test_budgets_end_a_cohort_s_run_only_where_nobody_is_left_to_ask(tmp_path: Path) -> None:
    config = tiny_config(privacy_model="local", cohort_size=2)
    exchange = Exchange(SlowGrid(tmp_path, config, 4), config.training)
    nodes: Sequence[int] = exchange.wait_for_clients()
    exchange.spent |= {2, 3}
    with pytest.raises(CohortTooSmall) as told:
        exchange.require(0, [2, 3], 1)
    assert not isinstance(told.value, BudgetsSpent)
    exchange.spent.add(4)
    with pytest.raises(BudgetsSpent, match="3 clients have spent their budgets, 1 are left"):
        exchange.require(0, [4, 5], 1)
    assert list(nodes) == [2, 3, 4, 5]
