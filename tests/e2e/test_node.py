"""The node as a process of its own, against a real server, and against machines that are not what they should be."""

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesResponse
from flwr.proto.message_pb2 import Message as ProtoMessage

import server.fleet
from client.join import node_key_path
from client.node_status import read_status
from common.seal import CLOCK_TOLERANCE_S, pack, seal
from server.fleet import Fleet
from server.superlink import SuperLinkGrid, superlink_grid
from tests.coordinator_machine import InvitedNode, Machine, make_machine, wait_for

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]

# A node with an app of few lines: no torch, so it is up in a second; and its waits are short.
NODE = """
import logging, sys, time
from pathlib import Path
import client.node
from client.join import load_node_key, node_key_path
from client.node_status import NodeStatus
from common.errors import VisardError
from common.kit import Kit
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

client.node._LONGEST_WAIT_S, client.node._HEARTBEAT_S, client.node._TELL_AFTER_S = 0.3, 0.2, 0.2
state_dir, limit = Path(sys.argv[2]), int(sys.argv[3])
app = ClientApp()

def count(kind):
    with (state_dir / "calls").open("a") as calls:
        print(kind, file=calls)

@app.train("double")
def double(message, context):
    count("double")
    calls = context.state["calls"]["n"] + 1 if "calls" in context.state else 1
    context.state["calls"] = ConfigRecord({"n": calls})
    config = dict(message.content["config"])
    time.sleep(config["sleep"])
    reply = {"calls": calls, "number": 2 * config["number"], "owner": context.node_config["owner"],
             "run-config": len(context.run_config)}
    padding = Array(dtype="uint8", shape=(config["size"],), stype="raw", data=bytes(config["size"]))
    content = {"config": ConfigRecord(reply), "size": ArrayRecord({"v": padding})}
    return Message(RecordDict(content), reply_to=message)

@app.train("fail")
def fail(message, context):
    count("fail")
    raise LookupError("/home/owner/photographs")

logging.basicConfig(level=logging.INFO)
try:
    status = NodeStatus(state_dir, Kit.from_file(Path(sys.argv[1])).address)
    logging.getLogger("visard.client").addHandler(status)
    client.node.run_node(Kit.from_file(Path(sys.argv[1])), load_node_key(node_key_path(state_dir)), app,
                         {"owner": state_dir.name}, status, limit)
except VisardError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print("ended", flush=True)
"""


@dataclass
class NodeProcess:
    """A node's process and what it leaves."""

    process: "subprocess.Popen[bytes]"
    state_dir: Path
    log: Path

    @property
    def connection(self) -> str:
        return str((read_status(self.state_dir) or {}).get("connection", ""))

    @property
    def calls(self) -> int:
        """How often its app was called."""
        path = self.state_dir / "calls"
        return len(path.read_text().splitlines()) if path.exists() else 0

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, connection: str) -> None:
        try:
            wait_for(lambda: connection in self.connection, f"{connection!r}")
        except AssertionError as error:
            raise AssertionError(f"{error}, not {self.connection!r}; {self.output}") from None

    def stop(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Seconds until it has ended, in order."""
        started = time.monotonic()
        self.process.send_signal(number)
        assert self.process.wait(30) == 0, self.output
        assert self.output.endswith("ended\n")
        assert "Traceback" not in self.output.replace("the ClientApp failed\nTraceback", "")
        assert self.connection == "stopped"
        return time.monotonic() - started


Start = Callable[..., NodeProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a node; what is still running at the end is killed, and no secret was told."""
    started: list[NodeProcess] = []

    def run(node: InvitedNode, limit: int = 1 << 26, kit: Path | None = None) -> NodeProcess:
        log = tmp_path / f"{node.name}-{len(started)}.log"
        command = [sys.executable, "-c", NODE, str(kit or node.kit_path), str(node.state_dir), str(limit)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
        with log.open("wb") as file:
            process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.STDOUT)
        started.append(NodeProcess(process, node.state_dir, log))
        return started[-1]

    yield run
    for node in started:
        node.process.kill()
        node.process.wait()
        told = node.output + str(read_status(node.state_dir))
        secret = node_key_path(node.state_dir).read_text().splitlines()
        assert "PRIVATE" not in told
        assert not any(line in told for line in secret)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return make_machine(tmp_path, nodes=1)


def question(number: int = 1, sleep: float = 0.0, size: int = 0) -> RecordDict:
    vector = np.full(1000, number, np.float32)
    array = Array(dtype="float32", shape=vector.shape, stype="raw", data=vector.tobytes())
    config = ConfigRecord({"number": number, "sleep": sleep, "size": size})
    return RecordDict({"arrays": ArrayRecord({"v": array}), "config": config})


def ask(grid: SuperLinkGrid, action: str = "double", **about: Any) -> list[Message]:
    """Ask every connected node and wait for all replies."""
    nodes = grid.get_node_ids()
    messages = [Message(question(**about), node, f"train.{action}", ttl=60.0) for node in nodes]
    replies = grid.send_and_receive(messages, timeout=60)
    assert len(replies) == len(nodes) > 0
    return sorted(replies, key=lambda reply: reply.metadata.src_node_id)


def sent(grid: SuperLinkGrid, **about: Any) -> str:
    """Ask every connected node, and wait for nothing."""
    return next(
        iter(grid.push_messages([Message(question(**about), n, "train.double", ttl=60.0) for n in grid.get_node_ids()]))
    )


def online(grid: SuperLinkGrid, count: int = 1) -> None:
    wait_for(lambda: len(grid.get_node_ids()) == count, f"{count} nodes")


def test_nodes_answer_survive_the_server_and_end(
    start: Start, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, call = set(), Fleet.__call__

    async def told(self: Fleet, scope: Any, receive: Any, send: Any) -> None:
        paths.add(scope["path"])
        await call(self, scope, receive, send)

    monkeypatch.setattr(Fleet, "__call__", told)
    machine.nodes.append(machine.invite("node-1"))
    nodes = [start(node) for node in machine.nodes]
    owners = {node.node_id: node.name for node in machine.nodes}
    for run in (1, 2):  # the nodes are there first, and outlive the first server
        with machine.serve() as grid:
            online(grid, 2)
            assert grid.names() == owners
            for calls in (1, 2):
                replies = ask(grid, number=10 * run + calls)
                found = {reply.metadata.src_node_id: dict(reply.content.config_records["config"]) for reply in replies}
                # State lasts as long as a run; nothing of the coordinator's configuration comes with it.
                assert found == {
                    n: {"calls": calls, "number": 2 * (10 * run + calls), "owner": owners[n], "run-config": 0}
                    for n in owners
                }
            failed = ask(grid, "fail") + ask(grid, "unknown")
            # The kind of an error is all that leaves.
            assert [reply.error.reason for reply in failed] == ["LookupError"] * 2 + ["ValueError"] * 2
            assert all(node.connection == "connected" for node in nodes)
            if run == 1:
                sent(grid, sleep=1.0)
                wait_for(lambda: all(node.calls == 4 for node in nodes), "work that the server will not see the end of")
        if run == 1:
            for node in nodes:
                node.wait_for("no connection")
    # All that nodes ever ask for: no app, no run.
    calls = "activate-node", "pull-messages", "push-messages", "send-node-heartbeat", "deactivate-node"
    assert paths <= {f"/v1/fleet/{name}" for name in calls}
    nodes[0].stop(signal.SIGTERM)
    nodes[1].stop(signal.SIGINT)
    assert "/home/owner/photographs" in nodes[0].output


def test_a_node_that_computes_for_long_stays_connected(
    start: Start, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.fleet, "PATIENCE_S", 1.5)
    with machine.serve() as grid:
        node = start(machine.nodes[0])
        online(grid)
        identifier = sent(grid, sleep=3.0)
        wait_for(lambda: node.calls == 1, "the app")
        replies: list[Message] = []
        while not replies:
            assert grid.get_node_ids() == [machine.nodes[0].node_id]
            grid.wait_for_reply(0.1)
            replies = list(grid.pull_messages([identifier]))
        assert replies[0].has_content()


def test_the_wrong_machine(start: Start, machine: Machine, tmp_path: Path) -> None:
    own, node = machine.deployment, machine.nodes[0]
    (tmp_path / "other").mkdir()
    other = make_machine(tmp_path / "other", nodes=0).deployment

    def impostor() -> Any:
        return superlink_grid(own.listen, other.certificate, other.key, machine.registry, own.signing_key(), 1 << 20)

    # At the first connection: the owner is told, and the node ends.
    with impostor():
        process = start(node)
        assert process.process.wait(60) == 1
        assert "ConfigError: the machine at" in process.output
        assert "invitation" in process.output
        assert "Traceback" not in process.output
    # The right authority, and a name that its certificate has not.
    elsewhere = replace(node.kit, address=f"127.0.0.2:{machine.port}")
    elsewhere.write(tmp_path / "elsewhere.kit.toml")
    with superlink_grid(elsewhere.address, own.certificate, own.key, machine.registry, own.signing_key(), 1 << 20):
        process = start(node, kit=tmp_path / "elsewhere.kit.toml")
        assert process.process.wait(60) == 1
        assert "ConfigError: the machine at 127.0.0.2" in process.output
    # Later: it waits, and goes on when the right one is back.
    with machine.serve() as grid:
        process = start(node)
        online(grid)
    with impostor() as grid:
        process.wait_for("refused: the machine at")
        assert grid.get_node_ids() == []
    with machine.serve() as grid:
        online(grid)
        assert ask(grid)[0].has_content()
        assert process.connection == "connected"
    assert process.calls == 1
    process.stop()


def test_only_what_the_coordinator_signed(start: Start, machine: Machine) -> None:
    own, invited = machine.deployment, machine.nodes[0]
    node = start(invited)
    # A machine with the right certificate and another signing key.
    with superlink_grid(
        own.listen, own.certificate, own.key, machine.registry, Ed25519PrivateKey.generate(), 1 << 20
    ) as grid:
        online(grid)
        sent(grid)
        node.wait_for("refused: a message that is not signed with the coordinator's signing key")
    with machine.serve() as grid:
        online(grid)
        key, now = own.signing_key(), time.time()
        good = seal(pack(question()), key, now + 60, invited.node_id)
        body = good.config_records["sealed"]["body"]
        assert isinstance(body, bytes)
        tampered = ConfigRecord({**good.config_records["sealed"], "body": body.replace(b"number", b"nomber")})
        assert tampered["body"] != body
        wrong = {
            "is not sealed": question(),
            "is not signed": RecordDict({"sealed": tampered}),
            "out of date": seal(pack(question()), key, now - CLOCK_TOLERANCE_S - 60, invited.node_id),
            "for this node": seal(pack(question()), key, now + 60, invited.node_id ^ 1),
            "records ['fab', 'sealed']": RecordDict(
                {"sealed": good["sealed"], "fab": ConfigRecord({"content": b"import os"})}
            ),
        }
        for told, content in wrong.items():
            proto = message_to_proto(Message(content, invited.node_id, "train.double", ttl=60.0))
            proto.metadata.message_id = told
            grid._fleet.ask([proto])
            wait_for(lambda told=told: told in node.connection, f"{told!r}, not {node.connection!r}")  # type: ignore[misc]
            assert node.connection.startswith("refused")
        grid._fleet.ask([ProtoMessage(metadata=proto.metadata)])  # neither content nor error
        node.wait_for("refused: a message that cannot be read")
        assert node.calls == 0
        # Signed code is data as any other: there is nobody to run it.
        config = {"number": 1, "sleep": 0.0, "size": 0, "fab": b"raise SystemExit", "code": "import os; os._exit(3)"}
        content = RecordDict({"config": ConfigRecord(config)})  # type: ignore[arg-type]
        [reply] = grid.send_and_receive([Message(content, invited.node_id, "train.double", ttl=60.0)], timeout=30)
        assert reply.content.config_records["config"]["number"] == 2
        assert node.connection == "connected"
        # What instructions say of themselves is shown to the owner, whatever it is.
        odd = ConfigRecord({"run_id": "\x1b[2J" + "x" * 100_000, "server_round": 2**62})
        content = RecordDict({"config": ConfigRecord(config), "instructions": odd})  # type: ignore[arg-type]
        [reply] = grid.send_and_receive([Message(content, invited.node_id, "train.double", ttl=60.0)], timeout=30)
        assert reply.has_content()
    node.stop()


def test_approved_later_and_revoked(start: Start, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.fleet, "HOLD_S", 1.0)
    invited = machine.invite("latecomer", approve=False)
    with machine.serve() as grid:
        node = start(invited)
        node.wait_for("refused: this node's key is not approved here (status 401)")
        assert grid.get_node_ids() == []
        machine.registry.approve(invited.request)
        online(grid)
        assert ask(grid)[0].has_content()
        machine.registry.revoke("latecomer")
        node.wait_for("refused: this node's key is not approved here")
        assert grid.get_node_ids() == []
        assert node.stop() < 2


def test_an_answer_that_is_too_large(start: Start, machine: Machine) -> None:
    """It is answered by an error, for small and for large transgressions; the next round finds the node well."""
    with machine.serve(max_message_bytes=1 << 20) as grid:
        node = start(machine.nodes[0])
        online(grid)
        for size in (1_200_000, 40_000_000):
            [reply] = ask(grid, size=size)
            assert reply.has_error()
            assert reply.error.reason == "MalformedUpdate"
        assert ask(grid, size=1_000_000)[0].has_content()
        assert node.calls == 3
        node.stop()


def test_two_nodes_for_one_ledger(start: Start, machine: Machine) -> None:
    with machine.serve() as grid:
        first = start(machine.nodes[0])
        online(grid)
        second = start(machine.nodes[0])
        assert second.process.wait(60) == 1
        assert "ConfigError: a node runs with" in second.output
        assert ask(grid)[0].has_content()
        # Killed without a word, and started at once: no minute's wait.
        first.process.kill()
        first.process.wait()
        wait_for(lambda: grid.get_node_ids() == [], "the server to notice", 5)
        third = start(machine.nodes[0])
        online(grid)
        assert ask(grid)[0].has_content()
        third.stop()


class Impostor:
    """A machine with the coordinator's certificate and manners of its own: `reply(path)` gives the bytes of an answer.

    None is no answer at all, while the connection stays open.
    """

    def __init__(self, machine: Machine, reply: Callable[[str], bytes | None], *, tls: bool = True) -> None:
        self.paths: list[str] = []
        self._reply, self._tls, self._over = reply, tls, False
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(machine.deployment.certificate, machine.deployment.key)
        self._listener = socket.create_server(("127.0.0.1", machine.port))
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)

    def __enter__(self) -> "Impostor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.getsockname(), 1).close()
        self._thread.join()
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.close()

    def _accept(self) -> None:
        workers = []
        while not self._over:
            connection, _ = self._listener.accept()
            connection.settimeout(1.0)
            if self._over or not self._tls:
                self._open.append(connection)
            else:
                workers.append(threading.Thread(target=self._serve, args=(connection,)))
                workers[-1].start()
        for worker in workers:
            worker.join()

    def _serve(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError), self._context.wrap_socket(plain, server_side=True) as tls:
            while not self._over:
                try:
                    request = self._request(tls)
                except TimeoutError:
                    continue
                self.paths.append(request)
                answer = self._reply(request)
                while answer is None and not self._over:
                    time.sleep(0.02)
                tls.sendall(answer or b"")
                if answer is None or b"onnection: close" in answer:
                    return

    def _request(self, tls: ssl.SSLSocket) -> str:
        found = b""
        while b"\r\n\r\n" not in found:
            part = tls.recv(65536)
            if not part:
                raise ConnectionError
            found += part
        head, _, body = found.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        left = int(lengths[0].split(b":")[1]) - len(body) if lengths else 0
        while left > 0:
            left -= len(tls.recv(65536))
        return head.split()[1].decode()


def http(body: bytes = b"", *lines: str, status: str = "200 OK") -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", *(lines or [f"Content-Length: {len(body)}"])])
    return head.encode() + b"\r\n\r\n" + body


def test_hostile_responses_are_not_read(start: Start, machine: Machine) -> None:
    """Whatever it is answered, a node goes on asking, tells its owner, and is well when the right machine is back."""
    activated = http(ActivateNodeResponse(node_id=machine.nodes[0].node_id).SerializeToString())
    empty = PullMessagesResponse().SerializeToString()
    large = 3 << 20
    close = "Connection: close"
    hostile = {
        "gzip": http(b"\x1f\x8b" + bytes(100), "Content-Length: 102", "Content-Encoding: gzip"),
        "a response of ? bytes": http(empty, close),
        f"a response of {large} bytes": http(bytes(large), f"Content-Length: {large}", close),
        "chunked": http(b"5\r\nabcde\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
        "5 bytes chunked": http(
            b"300000\r\n" + bytes(large) + b"\r\n0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked", close
        ),
        "Invalid protobuf": http(b"\xff\xff\xff"),
        "status 302": http(b"", "Content-Length: 0", "Location: /v1/fleet/elsewhere", status="302 Found"),
        "boo boo (status 403)": http(b"boo\x1b\x07\r\nboo", status="403 Forbidden"),
        "status 500": http(b"x" * 100_000, status="500 Oh"),
        "status 503": http(b"", "Content-Length: 0", status="503 Busy"),
        "no connection (RemoteProtocolError)": b"nonsense\r\n\r\nConnection: close",
        "no connection": http(b"abc", "Content-Length: 5000", close),
    }
    now: list[bytes] = []

    everywhere = True

    def reply(path: str) -> bytes | None:
        return activated if path.endswith("activate-node") and not everywhere else now[0]

    node = None
    for everywhere in (True, False):  # noqa: B007  # to the first request too, and to all but that
        now[:] = [next(iter(hostile.values()))]
        with Impostor(machine, reply) as impostor:
            node = node or start(machine.nodes[0], limit=1 << 20)
            for told, answer in hostile.items():
                now[:] = [answer]
                node.wait_for(told)
                assert node.connection.isprintable()
            assert not any("elsewhere" in path for path in impostor.paths)
            # Not as fast as it can.
            before = len(impostor.paths)
            time.sleep(0.5)
            assert len(impostor.paths) - before < 60
    assert node is not None
    assert node.calls == 0
    with machine.serve() as grid:
        online(grid)
        assert ask(grid)[0].has_content()
    node.stop()


def test_a_message_that_is_too_long_is_not_read(start: Start, machine: Machine) -> None:
    with machine.serve() as grid:
        node = start(machine.nodes[0], limit=1 << 16)
        online(grid)
        long = RecordDict({"config": ConfigRecord({"x": bytes(1 << 17)})})
        list(grid.push_messages([Message(long, machine.nodes[0].node_id, "train.double", ttl=60.0)]))
        node.wait_for("is not read; the limit is 65536")
        assert node.calls == 0
        assert ask(grid)[0].has_content()
        node.stop()


@pytest.mark.slow
def test_a_node_ends_at_once_whatever_it_does(start: Start, machine: Machine) -> None:
    node_id = machine.nodes[0].node_id
    took: dict[str, float] = {}

    node = start(machine.nodes[0])
    node.wait_for("no connection")
    took["nobody there"] = node.stop()

    with Impostor(machine, lambda _path: None, tls=False) as silent:  # accepts, and not even TLS
        node = start(machine.nodes[0])
        wait_for(lambda: silent._open, "its connection")
        took["a silent machine"] = node.stop()

    with Impostor(machine, lambda _path: None) as silent:
        node = start(machine.nodes[0])
        wait_for(lambda: silent.paths, "its request")
        took["a silent coordinator"] = node.stop()

    activated = http(ActivateNodeResponse(node_id=node_id).SerializeToString())
    with Impostor(machine, lambda path: activated if path.endswith("activate-node") else None) as silent:
        node = start(machine.nodes[0])
        wait_for(lambda: any(path.endswith("pull-messages") for path in silent.paths), "its request")
        took["silent after a good begin"] = node.stop()

    with machine.serve() as grid:
        node = start(machine.nodes[0])
        online(grid)
        wait_for(lambda: node.connection == "connected", "the node to know it")
        took["waiting for messages"] = node.stop()
        wait_for(lambda: grid.get_node_ids() == [], "its farewell", 5)
        for number in (signal.SIGTERM, signal.SIGINT):
            node = start(machine.nodes[0])
            online(grid)
            calls = node.calls
            sent(grid, sleep=30.0)
            wait_for(lambda node=node, calls=calls: node.calls > calls, "the app")  # type: ignore[misc]
            took[f"computing, {number}"] = node.stop(number)
        node = start(machine.nodes[0])
        online(grid)
        calls = node.calls
        sent(grid, sleep=1.0)
        wait_for(lambda: node.calls > calls, "the app")
    node.wait_for("no connection")  # with an answer that nobody takes
    took["an answer that nobody takes"] = node.stop()
    # A second is promised; a test machine may be busy.
    assert all(seconds < 2.0 for seconds in took.values()), took
