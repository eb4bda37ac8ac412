"""Real processes on loopback: a coordinator with its SuperLink, and nodes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from client.node import run_node
from common.errors import ConfigError, ProtocolError
from common.flower import loopback_address
from common.privacy.ledger import Ledger
from server.superlink import SuperLinkGrid, superlink_grid

pytestmark = [
    pytest.mark.e2e,
    # flwr's own, when it packs an app.
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}

# A node with an app of few lines: no torch, so it is up in a second.
NODE = """
import sys, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from client.node import run_node

app = ClientApp()

@app.train("double")
def double(message, context):
    calls = context.state["calls"]["n"] + 1 if "calls" in context.state else 1
    context.state["calls"] = ConfigRecord({"n": calls})
    config = dict(message.content["config"])
    time.sleep(config["sleep"])
    reply = {"calls": calls, "number": 2 * config["number"], "owner": context.node_config["owner"],
             "run-config": len(context.run_config)}
    return Message(RecordDict({"arrays": message.content["arrays"], "config": ConfigRecord(reply)}), reply_to=message)

@app.train("fail")
def fail(message, context):
    raise LookupError("/home/owner/photographs")

run_node(sys.argv[1], app, {"owner": sys.argv[2]})
print("ended", flush=True)
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a process; what is still running at the end is killed."""
    with contextlib.ExitStack() as stack:

        def run(*command: str) -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=tmp_path,
                env={**ENVIRONMENT, "TMPDIR": str(tmp_path)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(_kill, process)
            return process

        yield run


def _kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def address() -> str:
    """A free port below those that outgoing connections are given, so that none takes it between two starts."""
    while True:
        port = int(np.random.default_rng().integers(20_000, 32_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return f"127.0.0.1:{port}"


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def answers(address: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(loopback_address(address)) == 0


def ask(grid: SuperLinkGrid, action: str, number: int, sleep: float = 0.0, size: int = 3) -> list[Message]:
    """Ask every connected node and wait for all replies."""
    vector = np.full(size, number, np.float32)
    array = Array(dtype="float32", shape=vector.shape, stype="raw", data=vector.tobytes())
    config = ConfigRecord({"number": number, "sleep": sleep})
    content = RecordDict({"arrays": ArrayRecord({"v": array}), "config": config})
    nodes = grid.get_node_ids()
    pending = set(grid.push_messages(Message(content, node, f"train.{action}", ttl=120.0) for node in nodes))
    assert len(pending) == len(nodes)
    replies = []
    deadline = time.monotonic() + 60
    while pending and time.monotonic() < deadline:
        for reply in grid.pull_messages(list(pending)):
            pending.remove(reply.metadata.reply_to_message_id)
            replies.append(reply)
        time.sleep(0.02)
    assert not pending
    return replies


def test_nodes_answer_survive_the_superlink_and_end(start: Start, address: str, tmp_path: Path) -> None:
    nodes = [start("-c", NODE, address, owner) for owner in ("a", "b")]
    for run in (1, 2):  # the nodes are there first, and outlive the first SuperLink
        with superlink_grid(address, tmp_path / "state") as grid:
            wait_for(lambda grid=grid: len(grid.get_node_ids()) == 2, "two nodes")  # type: ignore[misc]
            for calls in (1, 2):
                replies = ask(grid, "double", 10 * run + calls, size=400_000)
                found = sorted(
                    (str(c["owner"]), c["calls"], c["number"], c["run-config"])
                    for c in (reply.content["config"] for reply in replies)
                    if isinstance(c, ConfigRecord)
                )
                # State lasts as long as a run; nothing of the coordinator's configuration comes with it.
                assert found == [(owner, calls, 2 * (10 * run + calls), 0) for owner in ("a", "b")]
                data = replies[0].content.array_records["arrays"]["v"].data
                np.testing.assert_array_equal(np.frombuffer(data, np.float32), np.full(400_000, 10 * run + calls))
            failed = ask(grid, "fail", 1) + ask(grid, "unknown", 1)
            assert [reply.error.reason for reply in failed] == ["LookupError"] * 2 + ["ValueError"] * 2
            assert {reply.metadata.src_node_id for reply in failed} == set(grid.get_node_ids())
            if run == 1:  # no warning: as a power cut would
                grid._process.kill()
                with pytest.raises(ProtocolError, match=r"ended with status -9.*resume"):
                    ask(grid, "double", 1)
    assert not answers(address)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["superlink.log"]
    nodes[0].send_signal(signal.SIGTERM)
    nodes[1].send_signal(signal.SIGINT)
    for node in nodes:
        output, _ = node.communicate(timeout=60)
        assert node.returncode == 0
        assert output.endswith("ended\n")


def test_a_node_stopped_while_it_cannot_deliver_ends_at_once(start: Start, address: str) -> None:
    node = start("-c", NODE, address, "a")
    with superlink_grid(address) as grid:
        wait_for(lambda: len(grid.get_node_ids()) == 1, "the node")
        content = RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord({"number": 1, "sleep": 1.0})})
        list(grid.push_messages([Message(content, grid.get_node_ids()[0], "train.double", ttl=120.0)]))
        time.sleep(0.7)
        grid._process.kill()
    time.sleep(1.0)
    node.terminate()
    node.communicate(timeout=60)
    assert node.returncode == 0


def test_the_superlink_dies_with_its_coordinator(start: Start, address: str, tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time; from server.superlink import superlink_grid\n"
        "with superlink_grid(sys.argv[1]): pathlib.Path(sys.argv[2]).touch(); time.sleep(60)"
    )
    for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 128 + 15), (signal.SIGINT, -2)):
        up = tmp_path / f"up-{number}"
        coordinator = start("-c", script, address, str(up))
        # The port answers before the coordinator has got to the end of its start.
        wait_for(lambda p=coordinator, up=up: up.exists() or p.poll() is not None, "the SuperLink")  # type: ignore[misc]
        assert coordinator.poll() is None, coordinator.communicate()[0]
        assert answers(address)
        coordinator.send_signal(number)
        assert coordinator.wait(60) == status
        wait_for(lambda: not answers(address), "the end of the SuperLink")


def test_addresses(address: str) -> None:
    host, port = loopback_address(address)
    assert (host, port) == ("127.0.0.1", int(address.rpartition(":")[2]))
    assert loopback_address("[::1]:9092") == ("::1", 9092)
    assert loopback_address("localhost:1") == ("localhost", 1)
    for wrong in ("127.0.0.1", "127.0.0.1:", ":9092", "127.0.0.1:http", "127.0.0.1:70000", ""):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            loopback_address(wrong)
    for outside in ("0.0.0.0:9092", "192.0.2.7:9092", "coordinator.example:9092", "[::]:9092"):
        with pytest.raises(ProtocolError, match="TLS"), superlink_grid(outside):
            pass
        with pytest.raises(ProtocolError, match="TLS"):
            run_node(outside, None, {})  # type: ignore[arg-type]
    with socket.socket() as taken:
        taken.bind((host, port))
        taken.listen()
        with pytest.raises(ConfigError, match="choose another --address"), superlink_grid(address):
            pass


def test_the_commands_train_to_the_end_and_keep_to_the_budget(start: Start, address: str, tmp_path: Path) -> None:
    for i in range(2):
        faces = f"procedural:persons=20,images=2,first={20 * i}"
        written = start("-m", "visard", "client", "init", "--data", faces, "--out", f"owner-{i}.toml")
        output, _ = written.communicate(timeout=60)
        assert written.returncode == 0, output
    clients = [
        start("-m", "visard", "client", "start", "--coordinator", address, "--policy", f"owner-{i}.toml")
        for i in range(2)
    ]
    run = ["--name", "small", "--address", address, "--min-clients", "2", "--privacy-model", "local"]
    small = ["--image-size", "28", "--channels", "1", "--discriminator", "mlp", "--discriminator-width", "8"]
    small += ["--generator-width", "8", "--moment-steps", "3", "--num-rounds", "3", "--expected-batch", "2"]
    small += ["--epsilon", "10", "--moment-noise-multiplier", "4", "--sample-rate", "0.1"]
    coordinator = start("-m", "visard", "coordinator", "start", "demo", *run, *small)
    output, _ = coordinator.communicate(timeout=200)
    assert coordinator.returncode == 0, output
    assert "visard client start" in output
    assert "small: done" in output
    assert "epsilon of all rounds" in output
    assert "Traceback" not in output
    rounds = [json.loads(line) for line in (tmp_path / "runs/small/rounds.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in rounds] == ["moments"] + 3 * ["gradients"]
    assert (tmp_path / "runs/small/generator.safetensors").stat().st_size > 0
    for i, client in enumerate(clients):
        assert client.poll() is None, "a node runs until it is stopped"
        assert 0 < Ledger(tmp_path / f"owner-{i}.visard", max_epsilon=10.0, delta=1e-5).epsilon <= 10
        client.terminate()
        output, _ = client.communicate(timeout=60)
        assert client.returncode == 0
        assert "refused" not in output
        assert output.endswith("stopped\n")
    assert not answers(address)
