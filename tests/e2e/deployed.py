"""A deployment as its people make it, by `visard` commands alone: a coordinator's machine and the owners', all in one folder.

    with deployment(tmp_path, 3, SMALL) as made:            # init, client init, invite, join, approve, pin
        nodes = made.start_nodes()
        coordinator = made.start_coordinator()
        assert coordinator.wait() == 0, coordinator.told()

Commands that are over at once run in this process; what keeps running is a process of its own with a log file, and is
killed when the block ends.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from client.node_status import read_status as read_node_status
from client.policy_file import set_key
from common.errors import ConfigError
from common.kit import NodeRequest
from common.privacy.ledger_report import charges, verify_ledger
from server.checkpoint import CheckpointStore
from server.status import read_status
from server.supervisor import holder
from tests.coordinator_machine import free_address, wait_for
from visard import build

ROOT = Path(__file__).parents[2]

# Networks and rounds that take milliseconds.
SMALL: dict[str, str] = {
    "image-size": "28",
    "channels": "1",
    "discriminator": "mlp",
    "discriminator-width": "2",
    "generator-width": "4",
    "moment-steps": "3",
    "moment-noise-multiplier": "4",
    "expected-batch": "2",
    "sample-rate": "0.1",
    "sample-every": "1000",
}


def visard(*arguments: object, folder: Path, code: int = 0) -> str:
    """Run a command in this process, in `folder`. Returns what it printed."""
    with contextlib.chdir(folder):
        done = CliRunner().invoke(build(), [str(word) for word in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


@dataclass(frozen=True)
class Running:
    """A process that keeps running, and what it has said."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def told(self) -> str:
        """Everything it has printed, without the places where lines were broken."""
        return " ".join(self.log.read_text(encoding="utf-8", errors="replace").split())

    def wait(self, seconds: float = 240.0) -> int:
        """Its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs after {seconds:g} s:\n{self.log.read_text()}") from None

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 180.0) -> None:
        """Until it holds, as long as the process runs."""
        with contextlib.suppress(AssertionError):
            wait_for(lambda: condition() or self.process.poll() is not None, what, seconds)
        assert condition(), f"{what} did not come (status {self.process.poll()}):\n{self.log.read_text()}"

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """As a power cut would."""
        self.process.kill()
        self.process.wait()


Start = Callable[..., Running]


@contextlib.contextmanager
def processes(folder: Path, environment: Mapping[str, str]) -> Iterator[Start]:
    """Start python with these arguments in `folder`, after `prefix`; what is left at the end is killed.

    Coordinators' workers have sessions of their own; they end with those that started them.
    """
    started: list[Running] = []
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1", **environment}

    def start(*arguments: object, prefix: Sequence[str] = (), name: str = "process") -> Running:
        log = folder / f"{len(started):02d}-{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*prefix, sys.executable, *map(str, arguments)],
                cwd=folder,
                env={**os.environ, **own},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        started.append(Running(process, log))
        return started[-1]

    try:
        yield start
    finally:
        for running in started:
            running.process.kill()
        for running in started:
            running.process.wait()


@dataclass
class Made:
    """A coordinator's folder, and policies of owners who were let in.

    start: see `processes`. program: what is started for `visard`, after python. prefixes: what is put before the command of an
    owner's node, or before the coordinator's ("").
    """

    folder: Path
    address: str
    owners: list[str]
    start: Start
    program: Sequence[str]
    prefixes: dict[str, Sequence[str]] = field(default_factory=dict)

    @property
    def coordinator(self) -> Path:
        """The coordinator's folder."""
        return self.folder / "coordinator"

    def policy(self, owner: str) -> Path:
        """The owner's policy file."""
        return self.folder / f"{owner}.toml"

    def state_dir(self, owner: str) -> Path:
        """The folder of the owner's ledger and keys."""
        return self.folder / f"{owner}.visard"

    def visard(self, *arguments: object, code: int = 0) -> str:
        """A command in this process."""
        return visard(*arguments, folder=self.folder, code=code)

    def ask_to_be_let_in(self, owner: str, data: str) -> Path:
        """What an owner does: a policy for `data`, and with the coordinator's kit a request, which is returned."""
        self.visard("client", "init", "--data", data, "--out", self.policy(owner))
        # The owner's word: this is what an editor is for.
        text = self.policy(owner).read_text()
        both = text.replace('allowed-privacy-models = ["local"]', 'allowed-privacy-models = ["local", "distributed"]')
        assert both != text
        self.policy(owner).write_text(both)
        kit, request = self.folder / f"{owner}.kit.toml", self.folder / f"{owner}.request.toml"
        self.visard("coordinator", "invite", owner, self.coordinator, "--out", kit)
        self.visard("client", "join", kit, "--policy", self.policy(owner), "--out", request)
        return request

    def approve(self, *requests: Path) -> str:
        """Let these in."""
        told = [(request, NodeRequest.from_file(request).fingerprint) for request in requests]
        words = [word for request, read in told for word in ("--approve", request, "--fingerprint", read)]
        return self.visard("coordinator", "nodes", self.coordinator, *words)

    def pin_peers(self) -> None:
        """Every owner pins the keys of all."""
        peers = self.folder / "peers.txt"
        self.visard("coordinator", "nodes", self.coordinator, "--peers", peers)
        for owner in self.owners:
            self.visard("client", "peers", peers, "--policy", self.policy(owner), "--pin")

    def another_run(self, name: str, **changes: str | int) -> None:
        """Edit coordinator.toml: another run, with these options changed."""
        path = self.coordinator / "coordinator.toml"
        set_key(path, "name", name)
        for key, value in changes.items():
            set_key(path, key.replace("_", "-"), value)

    def start_node(self, owner: str) -> Running:
        """The owner's node process."""
        command = [*self.program, "client", "start", "--policy", self.policy(owner)]
        return self.start(*command, prefix=self.prefixes.get(owner, ()), name=f"node-{owner}")

    def start_nodes(self) -> dict[str, Running]:
        """All owners' nodes."""
        return {owner: self.start_node(owner) for owner in self.owners}

    def start_coordinator(self) -> Running:
        """The coordinator, or on with what was interrupted."""
        command = [*self.program, "coordinator", "start", self.coordinator]
        return self.start(*command, prefix=self.prefixes.get("", ()), name="coordinator")

    def status(self) -> dict[str, Any]:
        """What the coordinator's status file says."""
        return read_status(self.coordinator / "status.json")

    def node_status(self, owner: str) -> dict[str, Any]:
        """What the owner's node tells of itself; nothing where it has not started."""
        with contextlib.suppress(ConfigError):
            return read_node_status(self.state_dir(owner)) or {}
        return {}

    def run_folder(self, name: str) -> Path:
        """Where the run `name` is kept."""
        return self.coordinator / "runs" / name

    def rounds(self, name: str) -> list[dict[str, Any]]:
        """The records of the run's rounds."""
        try:
            lines = (self.run_folder(name) / "rounds.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def run_id(self, name: str) -> str:
        """The run's id, as ledgers have it."""
        return CheckpointStore(self.run_folder(name)).load().run_id

    def kill_worker(self) -> None:
        """Kill the process that trains."""
        os.kill(self.status()["pids"]["worker"], signal.SIGKILL)

    def wait_until_free(self) -> None:
        """Until nothing of the coordinator runs any more."""
        wait_for(lambda: holder(self.coordinator / "lock") is None, "the end of the coordinator's processes")

    def charged(self, owner: str) -> Counter[tuple[str, int]]:
        """How often each (run id, round) was charged to this owner, whose ledger must verify."""
        report = verify_ledger(self.state_dir(owner))
        assert report.problem is None, report
        return Counter((charge.run, charge.server_round) for charge in charges(self.state_dir(owner)))


def options(given: Mapping[str, str]) -> list[str]:
    """As they stand on a command line."""
    return [word for key, value in given.items() for word in (f"--{key}", value)]


def drawn(number: int) -> str:
    """The source of drawn faces of 20 persons that no other number has."""
    return f"procedural:persons=20,images=2,first={20 * number}"


@contextlib.contextmanager
def deployment(
    folder: Path,
    owners: int,
    run: Mapping[str, str],
    *,
    name: str = "small",
    recipe: str = "demo",
    data: Callable[[int], str] = drawn,
    address: str = "",
    program: Sequence[str] = ("-m", "visard"),
    environment: Mapping[str, str] | None = None,
    max_epsilon: float = 10.0,
) -> Iterator[Made]:
    """A coordinator for `run` (of `recipe`), called `name`, and owners that it has let in and that pin one another.

    data: the source of each owner's faces; a folder must be called owner-N, N its number. max_epsilon: in their policies.
    """
    with processes(folder, {"XDG_CACHE_HOME": str(folder / "cache"), **(environment or {})}) as start:
        made = Made(folder, address or free_address(), [f"owner-{i}" for i in range(owners)], start, program)
        command = ["coordinator", "init", made.coordinator, "--address", made.address, "--recipe", recipe]
        made.visard(*command, "--name", name, *options({"min-clients": str(owners), **run}))
        made.approve(*(made.ask_to_be_let_in(owner, data(i)) for i, owner in enumerate(made.owners)))
        made.pin_peers()
        for owner in made.owners:
            set_key(made.policy(owner), "max-epsilon", max_epsilon)
        yield made
