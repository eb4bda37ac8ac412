"""Runs under a secure sum to their end: what survives is summed exactly, whoever fails, is killed, goes or comes."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import server.exchange
from client.secret_store import PEER_KEY, load_peer_key
from common.errors import CohortTooSmall, RoundVoid
from common.messages import planned_releases
from common.privacy.accounting import epsilon_of
from common.privacy.ledger import Ledger
from server.app import open_run
from server.checkpoint import FILE_NAME, CoordinatorState
from tests.faulty_wire import EachStepOnce, Faults, Federation, KilledAtAFlush, KilledError, Steps, charges, records
from tests.integration.test_resume import assert_same
from tests.secure_cohort import IN_MEMORY
from tests.support import RUN_ID

ALL = {2, 3, 4, 5, 6}
Undisturbed = Callable[[int, int], tuple[CoordinatorState, list[str]]]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def undisturbed() -> Undisturbed:
    """The end of a run of so many clients and rounds, and the coordinator's steps: noise is keyed by owner and round, so that
    every run that is disturbed and loses nobody ends the same."""
    ends: dict[tuple[int, int], tuple[CoordinatorState, list[str]]] = {}

    def end(clients: int, rounds: int) -> tuple[CoordinatorState, list[str]]:
        if (clients, rounds) not in ends:
            with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
                federation, steps = (
                    Federation(Path(name), num_clients=clients, num_rounds=rounds, deal_rounds=2),
                    Steps(),
                )
                ends[clients, rounds] = federation.run(federation.grid(steps=steps), fresh(federation)), steps.taken
        return ends[clients, rounds]

    return end


def assert_same_end(state: CoordinatorState, other: CoordinatorState) -> None:
    for ended in (state, other):
        ended.last["bytes_dealt"] = 0  # by a process, as its seconds are
    assert_same(state, other)


def fresh(federation: Federation) -> CoordinatorState:
    return CoordinatorState.fresh(federation.config, RUN_ID)


def once(*rounds: int) -> Counter[tuple[str, int]]:
    return Counter({(kind, n): 1 for kind in ("charged", "released") for n in rounds})


def test_every_sum_is_the_clients_sum_and_keys_are_dealt_anew_when_they_are_used_up(folder: Path) -> None:
    federation = Federation(folder, num_clients=5, num_rounds=4, deal_rounds=2)
    state = federation.run(federation.grid(), fresh(federation))
    assert federation.sums.survivors == dict.fromkeys(range(1, 6), ALL)
    assert (state.next_round, state.sums["number"]) == (6, 3)
    assert charges(federation) == [once(1, 2, 3, 4, 5)] * 5
    opened = sum(records(federation, "unmasked"), Counter())
    assert set(opened) == {("unmasked", n) for n in range(1, 6)}
    assert set(opened.values()) <= {4, 5}
    for client in (folder / "clients").glob("*/"):
        ledger = Ledger(client, max_epsilon=10.0, delta=1e-5)
        assert [release.mechanism for release in ledger.releases] == ["secure-moments"] + ["secure-gradients"] * 4
        assert 0 < ledger.epsilon <= 10.0


def test_whoever_fails_is_left_out_and_comes_back(folder: Path) -> None:
    faults: Faults = {
        (2, "mask", 1): "down",
        (4, "deal", 2): "down",
        (2, "mask", 2): "down",
        (3, "mask", 3): "unheard",
        (5, "confirm", 4): "down",
        (6, "mask", 5): "lost",
        (7, "mask", 6): "late",
        (2, "unmask", 6): "lost",
        (7, "unmask", 7): "late",
        (4, "mask", 8): "down",
        (3, "unmask", 8): "down",
        (7, "deal", 9): "unheard",
        (6, "confirm", 9): "unheard",
    }
    federation = Federation(
        folder, num_clients=6, survivors=4, num_rounds=9, deal_rounds=50, round_timeout_s=0.2, moment_steps=1
    )
    state = federation.run(federation.grid(faults), fresh(federation))
    every = {*ALL, 7}
    left_out = {1: {2}, 2: {2, 4}, 3: {3, 4}, 4: {5}, 5: {5, 6}, 6: {7}, 8: {4}, 9: {6, 7}, 10: {6, 7}}
    assert federation.sums.survivors == {n: every - left_out.get(n, set()) for n in range(1, 11)}
    assert state.sums["number"] == 8, "one more after a client's first loss, and two that were begun anew"
    found = charges(federation)
    assert max(max(records.values()) for records in found) == 1
    # What a client computed is charged, though nobody heard of it.
    assert {("charged", 3), ("released", 3)} <= found[1].keys()
    assert ("unmasked", 3) not in records(federation, "unmasked")[1]
    assert ("charged", 1) not in found[0]


@pytest.mark.parametrize(
    ("kind", "server_round", "missing"),
    [("key", 1, 1), ("deal", 3, 2), ("confirm", 3, 2), ("mask", 1, 2), ("mask", 4, 2)],
)
def test_with_too_few_the_run_stops_and_goes_on_as_if_nothing_had_been(
    folder: Path, undisturbed: Undisturbed, kind: str, server_round: int, missing: int
) -> None:
    federation = Federation(folder, num_clients=5, deal_rounds=2)
    faults: Faults = {(node, kind, server_round): "down" for node in range(2, 2 + missing)}
    with pytest.raises(CohortTooSmall, match=r"Down.*--resume|Down.*start them all"):
        federation.run(federation.grid(faults), fresh(federation))
    state = federation.saved()
    assert state.next_round == server_round
    federation.restart_clients()
    assert_same_end(federation.run(federation.grid(), state), undisturbed(5, 3)[0])
    assert charges(federation) == [once(1, 2, 3, 4)] * 5


def test_too_few_connected_is_told_before_anybody_is_asked(folder: Path) -> None:
    federation = Federation(folder, num_clients=5, round_timeout_s=0.1)
    grid = federation.grid()
    grid.offline = {2}
    with pytest.raises(CohortTooSmall, match="4 clients are connected"):
        federation.run(grid, fresh(federation))
    assert charges(federation) == []
    grid.offline = set()
    federation.run(grid, federation.saved())
    assert federation.sums.survivors == dict.fromkeys(range(1, 5), ALL)


def test_a_sum_that_cannot_be_opened_is_void_and_the_run_goes_on(folder: Path) -> None:
    federation = Federation(folder, num_clients=5, deal_rounds=2)
    faults: Faults = {(node, "unmask", 3): "down" for node in (3, 5)}
    state = federation.run(federation.grid(faults), fresh(federation))
    assert federation.sums.survivors == dict.fromkeys((1, 2, 4), ALL)
    assert (federation.sums.void, state.next_round) == ({3}, 5)
    assert charges(federation) == [once(1, 2, 3, 4)] * 5, "its charge stands"


def test_a_moment_release_that_cannot_be_opened_ends_the_run(folder: Path) -> None:
    federation = Federation(folder, num_clients=5, deal_rounds=2)
    faults: Faults = {(node, "unmask", 1): "down" for node in (3, 5)}
    with pytest.raises(CohortTooSmall, match="moment release is lost"):
        federation.run(federation.grid(faults), fresh(federation))
    assert charges(federation) == [once(1)] * 5


def test_survivors_that_are_gone_when_the_coordinator_is_back_make_a_round_void(folder: Path) -> None:
    federation = Federation(folder, num_clients=5, round_timeout_s=0.3)
    steps = Steps()
    grid = federation.grid(steps=steps)

    def stop(step: str) -> None:
        if step == "asked ('unmask', 2)":
            raise KilledError

    grid.steps = stop
    with pytest.raises(KilledError):
        federation.run(grid, fresh(federation))
    second = federation.grid()
    second.offline = {4}
    state = federation.run(second, federation.saved())
    assert federation.sums.survivors == {1: ALL, 3: ALL - {4}, 4: ALL - {4}}
    assert federation.sums.void == {2}
    assert state.next_round == 5


def test_sums_that_can_never_be_opened_end_the_run(folder: Path) -> None:
    federation = Federation(folder, num_clients=5, num_rounds=9)
    faults: Faults = {(node, "unmask", n): "down" for node in (3, 5) for n in range(2, 11)}
    with pytest.raises(RoundVoid, match="void"):
        federation.run(federation.grid(faults), fresh(federation))
    assert set(federation.sums.survivors) == {1}


class Connects:
    """An observer: from the end of a round on, these nodes and no others are offline."""

    def __init__(self, grid: object, offline: dict[int, set[int]]) -> None:
        self._grid, self._offline = grid, offline

    def fit_stepped(self, state: CoordinatorState) -> None:
        pass

    def round_ended(self, state: CoordinatorState) -> None:
        if state.next_round in self._offline:
            self._grid.offline = self._offline[state.next_round]  # type: ignore[attr-defined]


def test_a_client_that_comes_back_as_another_node_is_known_again(folder: Path) -> None:
    federation = Federation(folder, again=[4], num_clients=5, num_rounds=6, deal_rounds=50)
    grid = federation.grid()
    grid.offline = {7}
    comes = Connects(grid, {3: {6, 7}, 5: {6}})
    state = federation.run(grid, fresh(federation), comes)
    here = {1: ALL, 2: ALL, 3: ALL - {6}, 4: ALL - {6}} | dict.fromkeys((5, 6, 7), ALL - {6} | {7})
    assert federation.sums.survivors == here
    assert (state.next_round, state.sums["number"]) == (8, 1)
    assert charges(federation) == [once(*range(1, 8))] * 4 + [once(1, 2, 5, 6, 7)]


def test_a_client_that_was_not_dealt_in_costs_a_deal_when_it_comes(folder: Path) -> None:
    federation = Federation(folder, again=[4], num_clients=5, num_rounds=5, deal_rounds=50)
    grid = federation.grid({(6, "deal", 1): "down"})
    grid.offline = {7}
    state = federation.run(grid, fresh(federation), Connects(grid, {3: {6, 7}, 4: {6}}))
    assert federation.sums.survivors == dict.fromkeys((1, 2, 3), ALL - {6}) | dict.fromkeys((4, 5, 6), ALL - {6} | {7})
    assert state.sums["number"] == 2
    assert charges(federation)[-1] == once(4, 5, 6)


@pytest.mark.parametrize("kind", ["confirm", "mask", "unmask"])
def test_a_coordinator_that_comes_back_finds_all_nodes_under_other_names(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is where all nodes have new keys. What was charged is not lost."""
    monkeypatch.setattr(server.exchange, "_RETURN_S", 0.2)
    federation = Federation(folder, again=[2, 0, 1], num_clients=3, deal_rounds=50)

    def end(step: str) -> None:
        if step == f"answered (4, '{kind}', {1 if kind == 'confirm' else 2})":
            raise KilledError

    grid = federation.grid(steps=end)
    grid.offline = {5, 6, 7}
    with pytest.raises(KilledError):
        federation.run(grid, fresh(federation))
    second = federation.grid()
    second.offline = {2, 3, 4}
    federation.run(second, federation.saved())
    assert federation.sums.survivors == {
        n: {2, 3, 4} if kind != "confirm" and n == 1 else {5, 6, 7} for n in range(1, 5)
    }
    assert charges(federation) == [once(1, 2, 3, 4)] * 3


def test_budgets_that_leave_too_few_end_the_run_with_what_it_has(folder: Path) -> None:
    """One may be spent; with the second, what is left is no sum. With more budget the same round is asked again."""
    federation = Federation(folder, num_clients=5, num_rounds=6, deal_rounds=3)
    moments = federation.config.moments.moment_noise_multiplier
    for client, rounds in ((0, 1), (1, 4)):
        cost = planned_releases(federation.config.privacy, 1, moments, rounds)
        federation.node_configs[client]["max-epsilon"] = 1.0001 * epsilon_of(cost, 1e-5)
    state = federation.run(federation.grid(), fresh(federation))
    sums, last = federation.sums.survivors, state.next_round
    assert (state.ended_by, 3 < last < 8) == ("budgets", True)
    assert "2 clients have spent their budgets, 3 " in state.stopped
    assert sums == {n: ALL if n < min(m for m in sums if sums[m] != ALL) else ALL - {2} for n in range(1, last)}
    assert federation.run(federation.grid(), open_run(folder, None)).ended_by == "budgets"
    federation.node_configs[1]["max-epsilon"] = 1e3
    federation.restart_clients()
    assert federation.run(federation.grid(), open_run(folder, None)).next_round == 8
    assert set(sums) == set(range(1, 8)), "no round is lost"
    assert charges(federation)[2:] == [once(*range(1, 8))] * 3


def test_a_stranger_costs_one_deal_and_no_more(folder: Path) -> None:
    federation = Federation(folder, num_clients=5, num_rounds=5, deal_rounds=50)
    stranger = federation.node_configs[0] | {"state-dir": str(folder / "stranger"), "peers": "ab" * 32}
    federation.node_configs.append(stranger)
    grid = federation.grid()
    grid.offline = {7}
    state = federation.run(grid, fresh(federation), Connects(grid, {3: set()}))
    assert federation.sums.survivors == dict.fromkeys(range(1, 7), ALL)
    assert state.sums["number"] == 2
    assert not (folder / "stranger" / "ledger.jsonl").exists()


def test_a_round_that_was_begun_ends_under_its_own_deal(folder: Path) -> None:
    """Whoever has masked it deals no more for it: a client that came meanwhile is dealt in with the next round."""
    federation = Federation(folder, num_clients=5, deal_rounds=50)
    federation.node_configs.append(federation.node_configs[0] | {"state-dir": str(folder / "new"), "peers": "ab" * 32})

    def end(step: str) -> None:
        if step == "answered (4, 'mask', 2)":
            raise KilledError

    grid = federation.grid(steps=end)
    grid.offline = {7}
    with pytest.raises(KilledError):
        federation.run(grid, fresh(federation))
    state = federation.run(federation.grid(), federation.saved())
    assert federation.sums.survivors == dict.fromkeys(range(1, 5), ALL)
    assert state.sums["number"] == 2
    assert charges(federation)[:5] == [once(1, 2, 3, 4)] * 5


def test_a_coordinator_that_is_killed_at_every_step_gets_to_the_same_end(
    folder: Path, undisturbed: Undisturbed
) -> None:
    """At each step a process ends once: at every save, question and answer, of rounds with a deal and without."""
    federation = Federation(folder, num_clients=3, num_rounds=2, deal_rounds=2)
    state, steps = fresh(federation), EachStepOnce()
    while state.next_round <= 3:
        grid = federation.grid(steps=steps)
        try:
            state = federation.run(grid, state)
        except KilledError:
            if len(steps.taken) % 2:
                grid.drain()
            federation.restart_clients()
            state = federation.saved() if (folder / FILE_NAME).exists() else fresh(federation)
    whole, taken = undisturbed(3, 2)
    assert set(steps.taken) >= set(taken)
    assert len(steps.taken) > 60
    assert_same_end(state, whole)
    assert charges(federation) == [once(1, 2, 3)] * 3


@pytest.mark.slow
def test_a_coordinator_that_is_killed_once_at_any_step(folder: Path, undisturbed: Undisturbed) -> None:
    whole, taken = undisturbed(3, 2)
    for number, step in enumerate(taken, 1):
        federation = Federation(folder / f"{number}", num_clients=3, num_rounds=2, deal_rounds=2)
        with pytest.raises(KilledError):
            federation.run(federation.grid(steps=Steps(number)), fresh(federation))
        federation.restart_clients()
        state = federation.saved() if (federation.folder / FILE_NAME).exists() else fresh(federation)
        assert_same_end(federation.run(federation.grid(), state), whole)
        assert charges(federation) == [once(1, 2, 3)] * 3, step


def test_clients_that_are_restarted_between_all_messages_do_the_same(folder: Path, undisturbed: Undisturbed) -> None:
    federation = Federation(folder, num_clients=3, num_rounds=2, deal_rounds=2)
    grid = federation.grid(steps=lambda _step: federation.restart_clients())
    grid._client_app = lambda message, context: federation.app(message, context)  # type: ignore[assignment, misc]
    assert_same_end(federation.run(grid, fresh(federation)), undisturbed(3, 2)[0])
    assert charges(federation) == [once(1, 2, 3)] * 3


def test_a_client_that_is_killed_at_any_flush_to_its_disk(folder: Path) -> None:
    """Round by round one flush later. It is left out where it had not answered, and is charged once at most."""
    federation = Federation(folder, num_clients=5, num_rounds=20, deal_rounds=1, moment_rounds=0)
    folders = [Path(str(config["state-dir"])) for config in federation.node_configs]
    keys = [load_peer_key(owner / PEER_KEY).public_key().public_bytes_raw() for owner in folders]
    # The one in the first place: who is in the last is not always asked to unmask.
    node = 2 + keys.index(min(keys))
    app = KilledAtAFlush(federation, node, lambda server_round: server_round)
    grid = federation.grid()
    grid._client_app = app  # type: ignore[assignment]
    state = federation.run(grid, fresh(federation))
    assert state.next_round == 21
    assert len(federation.sums.survivors) == 20
    assert {kind for _, kind in app.killed} == {"deal", "confirm", "mask", "unmask"}
    assert all(survivors >= ALL - {node} for survivors in federation.sums.survivors.values())
    killed = {n for n, kind in app.killed if kind != "unmask"}
    assert {n for n, survivors in federation.sums.survivors.items() if node not in survivors} == killed
    assert killed != set(range(1, 21)), "there are fewer flushes in a round"
    found = charges(federation)[node - 2]
    assert max(found.values()) == 1
    assert {n for kind, n in found if kind == "charged"} >= set(range(1, 21)) - killed


def test_a_checkpoint_has_no_client_s_secret(folder: Path) -> None:
    """Keys and seeds as the clients hold them, at every save; and no share."""
    from client.secret_store import SecretStore

    federation = Federation(folder, num_clients=3, num_rounds=2, deal_rounds=3)
    secrets: set[bytes] = set()
    checkpoints: list[bytes] = []

    def look(step: str) -> None:
        for client in sorted((folder / "clients").glob("*/")):
            key = load_peer_key(client / PEER_KEY)
            secrets.add(key.private_bytes_raw())
            if not (client / "secure-sum").exists():
                continue
            with SecretStore(client / "secure-sum", key).opened(RUN_ID) as state:
                held = state.held
                if held is not None:
                    own = [held.own[i : i + 32] for i in range(0, len(held.own), 32)]
                    shares = [blob[i : i + 33] for blob in held.shares.values() for i in range(0, len(blob), 33)]
                    secrets.update(secret for secret in own + shares if any(secret))
        if step.startswith("saved"):
            checkpoints.append((folder / FILE_NAME).read_bytes())

    federation.run(federation.grid(steps=look), fresh(federation))
    assert len(secrets) > 3 + 3 * 2 * 3
    assert len(checkpoints) > 8
    for content in set(checkpoints):
        for secret in secrets:
            assert secret not in content
            assert secret.hex().encode() not in content
