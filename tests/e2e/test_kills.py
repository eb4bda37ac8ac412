"""Killed at any moment, with no warning: the same commands go on, and the run ends as if nothing had been, bit for bit.

Processes of one deployment (`tests.e2e.keyed`: the shipped commands with noise that can be drawn again). Each run has a twin
that nobody disturbed, by the same nodes. What a power cut does to the ledger alone is in `test_ledger_kills`, what it does
between any two steps of a round in `tests.integration.test_distributed`.
"""

import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.privacy.ledger_report import verify_ledger
from tests.e2e.deployed import SMALL, Made, Running, deployment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROUNDS = 7
RUN = {"num-rounds": str(ROUNDS - 1), "deal-rounds": "3", "peers": "3", "survivors": "3", "round-timeout-s": "200"}
BUDGET = 1000.0


class Cluster:
    """A deployment whose processes are started, held, killed and started again."""

    def __init__(self, made: Made, holds: Path) -> None:
        self.made, self._holds = made, holds
        self.nodes = made.start_nodes()
        self.coordinator: Running | None = None
        self._twins: dict[tuple[str, int], bytes] = {}

    def twin(self, model: str, rounds: int = ROUNDS) -> bytes:
        """The generator of an undisturbed run under this privacy model."""
        if (model, rounds) not in self._twins:
            name = f"twin-{model}-{rounds}"
            self.begin(name, model, rounds)
            self._twins[model, rounds] = self.end(name, rounds)
        return self._twins[model, rounds]

    def clear(self) -> None:
        """Whatever a test that failed has left."""
        for file in self._holds.iterdir():
            file.unlink()
        if self.coordinator is not None:
            self.coordinator.kill()
            self.made.wait_until_free()

    def begin(self, name: str, model: str, rounds: int = ROUNDS) -> None:
        """Start another run."""
        self.made.another_run(name, privacy_model=model, num_rounds=rounds - 1)
        self.coordinator = self.made.start_coordinator()

    def end(self, name: str, rounds: int = ROUNDS) -> bytes:
        """Wait for the run's end, which must be a good one. Returns its generator."""
        assert self.coordinator is not None
        assert self.coordinator.wait(400) == 0, self.coordinator.log.read_text() + self.logs()
        assert [line["round"] for line in self.made.rounds(name)] == list(range(1, rounds + 1))
        assert not [line for line in self.made.rounds(name) if "void" in line]
        run_id = self.made.run_id(name)
        for owner in self.made.owners:
            found = Counter(number for run, number in self.made.charged(owner).elements() if run == run_id)
            assert found == Counter(range(1, rounds + 1)), f"{owner}: {found}"
            report = verify_ledger(self.made.state_dir(owner))
            assert report.answered == report.rounds
            assert 0 < report.epsilon <= BUDGET
        return (self.made.run_folder(name) / "generator.safetensors").read_bytes()

    def logs(self) -> str:
        return "\n".join(running.log.read_text()[-1000:] for running in self.nodes.values())

    def hold(self, place: str) -> None:
        """Let a process wait there, once."""
        (self._holds / place).touch()

    def reached(self, place: str) -> None:
        """Until a process waits there."""
        assert self.coordinator is not None
        there = self._holds / f"{place}.reached"
        self.coordinator.wait_until(there.exists, f"{place}{self.logs()}")

    def let_go(self, place: str) -> None:
        (self._holds / place).unlink()
        (self._holds / f"{place}.reached").unlink(missing_ok=True)

    def kill(self, victim: str) -> None:
        """A node by its owner's name, `worker`, `supervisor` or `everything`; and start it again, as an operator or systemd would."""
        assert self.coordinator is not None
        if victim == "worker":
            # There is none for as long as it is being started.
            with contextlib.suppress(KeyError, ProcessLookupError):
                self.made.kill_worker()
            return
        if victim in ("supervisor", "everything"):
            self.coordinator.kill()
        for owner, node in self.nodes.items():
            if victim in (owner, "everything"):
                node.kill()
        for owner in self.made.owners:
            if victim in (owner, "everything"):
                self.nodes[owner] = self.made.start_node(owner)
        if victim in ("supervisor", "everything"):
            self.coordinator = self.made.start_coordinator()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder, holds = tmp_path_factory.mktemp("kills"), tmp_path_factory.mktemp("holds")
    run = {**SMALL, **RUN, "privacy-model": "local"}
    keyed = ("-m", "tests.e2e.keyed")
    environment = {"VISARD_TEST_HOLDS": str(holds)}
    with deployment(folder, 3, run, program=keyed, environment=environment, max_epsilon=BUDGET) as made:
        yield Cluster(made, holds)


def disturbed(cluster: Cluster, name: str, model: str, kills: list[tuple[str, str]]) -> None:
    """A run in which, whenever somebody has come to a place, a victim is killed; it must end as its twin did."""
    cluster.clear()
    twin = cluster.twin(model)
    for place, _victim in kills:
        cluster.hold(place)
    cluster.begin(name, model)
    for place, victim in kills:
        cluster.reached(place)
        cluster.kill(victim)
        cluster.let_go(place)
    assert cluster.end(name) == twin


def test_a_distributed_run_ends_as_its_twin_whoever_is_killed(cluster: Cluster) -> None:
    disturbed(
        cluster,
        "killed",
        "distributed",
        [
            ("owner-0-deal-1-answered", "owner-0"),
            ("owner-1-charged-2", "owner-1"),
            ("coordinator-round-4-asked", "worker"),
            ("owner-2-unmask-5-answered", "everything"),
        ],
    )


@pytest.mark.slow
def test_a_local_run_ends_as_its_twin_whoever_is_killed(cluster: Cluster) -> None:
    disturbed(cluster, "killed-local", "local", [("owner-0-charged-2", "everything"), ("coordinator-ended", "worker")])


NODE_PLACES = {
    "distributed": [
        *("key-1-asked", "key-1-answered", "deal-1-asked", "deal-4-answered", "confirm-4-asked", "confirm-4-answered"),
        *("round-1-answered", "charged-3", "round-4-asked", "round-6-answered", "unmask-2-asked", "unmask-5-answered"),
    ],
    "local": ["round-1-asked", "charged-1", "round-1-answered", "charged-4", "round-7-answered"],
}
COORDINATOR_PLACES = {
    "distributed": [
        *("saving-1", "saved-1", "key-1-asked", "deal-1-asked", "confirm-4-asked", "round-3-asked", "unmask-1-asked"),
        *("unmask-6-asked", "saving-5", "saved-7", "saved-8", "ended"),
    ],
    "local": ["saved-1", "round-1-asked", "saving-2", "saved-2", "round-5-asked", "saving-8", "ended"],
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["distributed", "local"])
@pytest.mark.parametrize("victim", ["owner-1", "everything"])
def test_nodes_are_killed_at_every_place(cluster: Cluster, model: str, victim: str) -> None:
    for number, place in enumerate(NODE_PLACES[model]):
        disturbed(cluster, f"{model}-{victim}-{number}", model, [(f"owner-1-{place}", victim)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["distributed", "local"])
@pytest.mark.parametrize("victim", ["worker", "supervisor"])
def test_the_coordinator_is_killed_at_every_place(cluster: Cluster, model: str, victim: str) -> None:
    for number, place in enumerate(COORDINATOR_PLACES[model]):
        disturbed(cluster, f"{model}-{victim}-{number}", model, [(f"coordinator-{place}", victim)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["distributed", "local"])
def test_anybody_is_killed_at_any_time(cluster: Cluster, model: str) -> None:
    rounds, chance = 120, random.Random(f"kills {model}")
    cluster.clear()
    twin = cluster.twin(model, rounds)
    name = f"{model}-random"
    cluster.begin(name, model, rounds)
    victims = [*cluster.made.owners, "worker", "worker", "supervisor", "everything"]
    for _ in range(20):
        assert cluster.coordinator is not None
        time.sleep(chance.choice([chance.uniform(0.0, 1.0), chance.uniform(3.0, 12.0)]))
        assert cluster.coordinator.process.poll() in (None, 0), cluster.coordinator.log.read_text() + cluster.logs()
        cluster.kill(chance.choice(victims))
    assert cluster.end(name, rounds) == twin
