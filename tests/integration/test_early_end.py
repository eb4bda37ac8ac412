"""A run ends early: at a figure of its fakes, or where the clients' budgets are spent. Both keep what there is."""

import json
from pathlib import Path

import pytest

from common.config import RunConfig
from common.errors import ConfigError, DataError
from common.faces import FaceDataset
from common.fields import Scalar
from common.messages import planned_releases
from common.privacy.accounting import epsilon_of
from common.privacy.ledger import Ledger
from server.app import open_run
from server.checkpoint import CheckpointStore, CoordinatorState
from server.exchange import Exchange
from server.records import RunRecorder, epsilon_so_far
from simulations.engine import InProcessGrid
from tests.support import RUN_ID, keyed_client_app, node_configs, random_faces, tiny_config, train


def shares(count: int) -> list[FaceDataset]:
    return [random_faces(4, 2, seed=client) for client in range(count)]


def run(folder: Path, config: RunConfig, **given: object) -> CoordinatorState:
    state = CoordinatorState.fresh(config, RUN_ID)
    recorder = RunRecorder(folder, state)
    state = train(folder, state, shares(config.simulation.num_clients), [recorder], **given)  # type: ignore[arg-type]
    recorder.finish(state)
    return state


def test_a_condition_that_is_met_ends_the_rounds_and_the_card_says_why(tmp_path: Path) -> None:
    public = tmp_path / "public.npz"
    random_faces(5, 2, seed=9).save(public)
    config = tiny_config(stop_when="frechet<1e9", reference=str(public), sample_every=2, moment_rounds=0)
    state = run(tmp_path / "run", config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [("frechet" in line, line["round"]) for line in lines] == [(False, 1), (True, 2)]
    card = json.loads((tmp_path / "run" / "generator.json").read_text())
    assert card["stopped"] == state.stopped
    assert state.stopped.startswith("frechet<1e9 at ")
    assert card["rounds"] == state.last_round == 2
    # Gone on with, it stays ended; another condition takes it to its last round.
    assert CheckpointStore(tmp_path / "run").load().last_round == 2
    again = open_run(tmp_path / "run", None, {"stop-when": ""})
    assert train(tmp_path / "run", again, shares(3)).next_round == config.training.num_rounds + 1


def test_the_fit_to_the_moments_ends_too(tmp_path: Path) -> None:
    state = run(tmp_path, tiny_config(stop_when="moment-loss<1e9"))
    assert (state.generator_steps, state.next_round) == (1, 2)
    assert not state.fitting


def test_a_condition_that_is_never_met_changes_nothing(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", tiny_config())
    watched = run(tmp_path / "watched", tiny_config(stop_when="moment-loss<-1e9"))
    assert not watched.stopped
    for one, other in zip(plain.generator.parameters(), watched.generator.parameters(), strict=True):
        assert one.equal(other)


def test_a_reference_that_is_not_there_is_told_before_anybody_is_asked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        run(tmp_path, tiny_config(stop_when="frechet<1", reference=str(tmp_path / "nowhere")))
    assert not (tmp_path / "clients").exists()


def budgets(config: RunConfig, releases: list[int]) -> dict[int, float]:
    """Per client, the budget that pays for the moment round and as many gradient rounds as said."""
    cost = [
        epsilon_of(
            planned_releases(config.privacy, 1, config.moments.moment_noise_multiplier, rounds), config.privacy.delta
        )
        for rounds in releases
    ]
    return {client: 1.0001 * epsilon for client, epsilon in enumerate(cost)}


def test_spent_clients_leave_and_too_few_end_the_run(tmp_path: Path) -> None:
    config = tiny_config(num_rounds=8, privacy_model="local", moment_noise_multiplier=3.73)
    allowed = budgets(config, [1, 3, 8])

    def poorer(client: int, node: dict[str, Scalar]) -> dict[str, Scalar]:
        return node | {"max-epsilon": allowed[client]}

    state = run(tmp_path, config, policy=poorer)
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    # The first client leaves in the third round (the second of gradients); it is asked no more.
    refusing = [line["round"] for line in lines if line["refusals"]]
    assert refusing == [3]
    assert lines[2]["refusals"] == {"BudgetExhausted": 1}
    assert "2 clients have spent their budgets, 1 are left and 2 are needed" in state.stopped
    # The last round was answered by one, and is void: its charge is in the coordinator's figures all the same.
    assert state.asked_round == state.next_round == len(lines) + 1
    spent = epsilon_so_far(state)
    for client in range(3):
        ledger = Ledger(tmp_path / "clients" / f"{client:04d}", max_epsilon=allowed[client], delta=config.privacy.delta)
        assert 0 < ledger.epsilon <= allowed[client]
        assert spent is not None
        assert epsilon_of(ledger.releases, config.privacy.delta) <= spent
    assert json.loads((tmp_path / "generator.json").read_text())["stopped"] == state.stopped
    # Asked again, the last one sends what it sent; one client is enough now, and no round is lost.
    again = open_run(tmp_path, None, {"min-clients": 1})
    assert not again.stopped
    train(tmp_path, again, shares(3), policy=poorer)
    last = Ledger(tmp_path / "clients" / "0002", max_epsilon=allowed[2], delta=config.privacy.delta)
    assert len(last.releases) == again.next_round - 1 == 9


def test_a_moment_round_that_budgets_end_is_asked_for_again(tmp_path: Path) -> None:
    config = tiny_config(num_rounds=2, min_clients=3)
    state = run(tmp_path, config, policy=lambda client, node: node | ({"max-epsilon": 1e-3} if client == 0 else {}))
    assert (state.next_round, state.ended_by) == (1, "budgets")
    again = open_run(tmp_path, None, {"min-clients": 2})
    train(tmp_path, again, shares(3), policy=lambda client, node: node | ({"max-epsilon": 1e-3} if client == 0 else {}))
    assert again.moment_target is not None
    for client in (1, 2):
        folder = tmp_path / "clients" / f"{client:04d}"
        ledger = Ledger(folder, max_epsilon=config.privacy.epsilon, delta=config.privacy.delta)
        assert [release.mechanism for release in ledger.releases] == ["moments", "gradients", "gradients"]


def test_nodes_that_are_spent_are_not_waited_for(tmp_path: Path) -> None:
    config = tiny_config(round_timeout_s=60.0)
    grid = InProcessGrid(keyed_client_app(), node_configs(tmp_path, config, shares(3)))
    exchange = Exchange(grid, config.training)
    first, *others = exchange.wait_for_clients()
    exchange.spent.add(first)
    assert exchange.wait_for_clients() == others


def test_a_round_of_several_steps_that_budgets_end_is_asked_for_again_as_it_was(tmp_path: Path) -> None:
    """The fakes that go along are drawn before it is known: drawn anew, those who answered would refuse."""
    config = tiny_config(num_rounds=4, local_steps=2, privacy_model="local")
    cost = planned_releases(config.privacy, 1, config.moments.moment_noise_multiplier, 4)
    poor = 1.0001 * epsilon_of(cost, config.privacy.delta)

    def poorer(client: int, node: dict[str, Scalar]) -> dict[str, Scalar]:
        return node | ({"max-epsilon": poor} if client < 2 else {})

    state = run(tmp_path, config, policy=poorer)
    assert state.ended_by == "budgets"
    again = open_run(tmp_path, None, {"min-clients": 1})
    train(tmp_path, again, shares(3), policy=poorer)
    assert (again.ended_by, again.next_round) == ("", 6)
    ledger = Ledger(tmp_path / "clients" / "0002", max_epsilon=config.privacy.epsilon, delta=config.privacy.delta)
    assert len(ledger.releases) == 5


def test_a_condition_that_is_still_met_keeps_a_run_ended(tmp_path: Path) -> None:
    run(tmp_path, tiny_config(stop_when="moment-loss<1e9"))
    assert open_run(tmp_path, None, {"min-clients": 1}).ended_by == "figure"
    assert not open_run(tmp_path, None, {"stop-when": "moment-loss<-1e9"}).ended_by


@pytest.mark.parametrize("name", ["faces", "faces/one", ".", "hf:faces"])
def test_the_clients_faces_are_no_reference(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faces" / "one").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "faces")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="among what the clients hold"):
        open_run(tmp_path / "run", tiny_config(data="link", reference=name))
    open_run(tmp_path / "run", tiny_config(data="link", reference=name, privacy_model="none"))
    run(tmp_path / "old", tiny_config(num_rounds=1, data="link"))
    with pytest.raises(ConfigError, match="among what the clients hold"):
        open_run(tmp_path / "old", None, {"reference": name})


def test_only_some_options_may_be_given_anew(tmp_path: Path) -> None:
    run(tmp_path, tiny_config(num_rounds=1))
    with pytest.raises(ConfigError, match="keeps its configuration"):
        open_run(tmp_path, None, {"num-rounds": 5})
