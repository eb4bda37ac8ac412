"""Who gets in at the coordinator's port, and to what: a real server on loopback, and callers of every sort."""

import base64
import contextlib
import datetime
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Message, RecordDict
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.superlink.main import create_app

import server.fleet
import server.fleet_server
import server.superlink
from server.superlink import SuperLinkGrid
from tests.coordinator_machine import InvitedNode, Machine, make_machine, wait_for

ACTIVATE, DEACTIVATE, HEARTBEAT, PULL, PUSH = OURS = [
    f"/v1/fleet/{name}"
    for name in ("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages")
]
LIMIT = 1 << 20


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """One for all tests; those that change its registry invite nodes of their own."""
    return make_machine(tmp_path_factory.mktemp("fleet"), nodes=2)


@pytest.fixture
def grid(machine: Machine) -> Iterator[SuperLinkGrid]:
    with machine.serve(LIMIT) as served:
        yield served


def flowers_paths() -> set[str]:
    """All that Flower's own SuperLink serves."""

    def walk(routes: list[Any]) -> Iterator[str]:
        for route in routes:
            if hasattr(route, "original_router"):
                yield from walk(route.original_router.routes)
            else:
                yield route.path

    return set(walk(create_app(None).routes))


def context(machine: Machine) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=machine.deployment.kit("any").ca)


def caller(machine: Machine) -> httpx.Client:
    return httpx.Client(verify=context(machine), base_url=f"https://{machine.address}", timeout=60.0)


@contextlib.contextmanager
def connected(machine: Machine, timeout_s: float = 20.0) -> Iterator[ssl.SSLSocket]:
    with (
        socket.create_connection(("127.0.0.1", machine.port), timeout_s) as plain,
        context(machine).wrap_socket(plain, server_hostname="127.0.0.1") as tls,
    ):
        yield tls


def status_of(machine: Machine, request: bytes) -> int:
    """The status of the answer to these bytes; 0 where the connection is closed without one."""
    with connected(machine) as tls:
        tls.sendall(request)
        found = b""
        with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
            while b"\r\n" not in found and (part := tls.recv(4096)):
                found += part
    return int(found.split()[1]) if found else 0


def signed(node: InvitedNode, *, timestamp: str | None = None, **changes: bytes | None) -> dict[str, str]:
    """The headers by which a node is known. key, signature: other bytes, or None to leave the header out."""
    if timestamp is None:
        timestamp = datetime.datetime.now(datetime.UTC).isoformat()
    parts = {"key": node.pem, "signature": sign_message(node.key, timestamp.encode()), **changes}
    names = {"key": FLEET_HTTP_PUBLIC_KEY_HEADER, "signature": FLEET_HTTP_SIGNATURE_HEADER}
    encoded = {names[name]: base64.b64encode(part).decode() for name, part in parts.items() if part is not None}
    return {TIMESTAMP_HEADER: timestamp, **encoded}


def head_of(node: InvitedNode) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in signed(node).items())


def activate(machine: Machine, node: InvitedNode, client: httpx.Client | None = None) -> httpx.Response:
    """By one request of its own."""
    body = ActivateNodeRequest(public_key=node.pem, heartbeat_interval=10).SerializeToString()
    with contextlib.nullcontext(client) if client else caller(machine) as by:
        return by.post(ACTIVATE, content=body, headers=signed(node))


@pytest.mark.usefixtures("grid")
def test_nothing_of_flowers_superlink_is_served_but_five_paths(machine: Machine) -> None:
    paths = flowers_paths()
    assert len(paths) > 70
    assert set(OURS) < paths
    assert {"/v1/control/start-run", "/v1/fleet/register-node", "/docs", "/openapi.json", "/health"} <= paths
    methods = ("GET", "PUT", "HEAD", "OPTIONS", "DELETE", "PATCH")
    node = machine.nodes[0]
    with caller(machine) as client:
        for path in paths - set(OURS):
            for method in (*methods, "POST"):
                assert client.request(method, path).status_code == 403, (method, path)
            # Nor to a node that was let in.
            assert client.post(path, headers=signed(node)).status_code == 403, path
        for path in OURS:
            for method in methods:
                assert client.request(method, path, headers=signed(node)).status_code == 403, (method, path)
            assert client.post(path).status_code == 401


@pytest.mark.usefixtures("grid")
def test_no_spelling_of_a_path_gets_round(machine: Machine) -> None:
    """Each with a registered node's signature: what names one of the five is one of the five, and nothing else is served."""
    head = head_of(machine.nodes[0])

    def asked(target: str, more: str = "") -> int:
        return status_of(
            machine, f"POST {target} HTTP/1.1\r\nHost: x\r\n{more}{head}Content-Length: 0\r\n\r\n".encode()
        )

    for target in (
        "/",
        "*",
        f"/{PULL}",
        "/v1//fleet/pull-messages",
        f"{PULL}/",
        "/V1/Fleet/Pull-Messages",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/%2e%2e%2fcontrol/start-run",
        f"{PULL}%2f..%2f..%2fcontrol/start-run",
        f"{PULL};/../../control/start-run",
        f"{PULL}%00",
        "/v1/fleet/%252e%252e/control/start-run",
        f"{PULL}\\..\\..\\control\\start-run",
        f"/v1/control/start-run?path={PULL}",
        f"/v1/control/start-run#{PULL}",
        "https://127.0.0.1/v1/control/start-run",
        f"https://127.0.0.1{PULL}",
        "https://127.0.0.1/docs",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/health",
        "/metrics",
        "/flwr.proto.Fleet/PullMessages",
        "/flwr.proto.Control/StartRun",
    ):
        assert asked(target) in (400, 403), target
    # Of the five: then it is the claim of no node that is refused.
    for target in (PULL, f"{PULL}?x=/v1/control", "/v1/fleet/%70ull-messages"):
        assert asked(target) == 409, target
    for name in ("X-Forwarded-Prefix", "X-Original-URL", "X-Rewrite-URL", "X-HTTP-Method-Override", "X-Forwarded-For"):
        assert asked("/v1/control/start-run", f"{name}: {PULL}\r\n") == 403
    # A second request behind the first one's body.
    hidden = b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\n\r\n"
    assert (
        status_of(machine, b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(hidden) + hidden)
        == 403
    )


@pytest.mark.usefixtures("grid")
def test_other_protocols_are_refused(machine: Machine) -> None:
    upgrade = (
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGVzdA==\r\n"
    )
    for path in ("/", PULL, "/v1/runtime/ws"):
        assert status_of(machine, f"GET {path} HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n".encode()) in (400, 403)
    for request in (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",  # HTTP/2 with prior knowledge, as gRPC would
        b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello\r\n\r\n",
    ):
        assert status_of(machine, request) in (0, 400, 403), request
    with socket.create_connection(("127.0.0.1", machine.port), 10) as plain:  # without TLS
        plain.sendall(f"POST {PULL} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            assert b"HTTP" not in plain.recv(4096)
    old = context(machine)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", machine.port), 10) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        old.wrap_socket(plain, server_hostname="127.0.0.1")
    with connected(machine) as tls:
        assert tls.version() == "TLSv1.3"


def other_keys(node: InvitedNode) -> dict[str, bytes]:
    """Public keys that are not in the registry, the registered one in other spellings, and bytes that are no key."""
    kind = Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    pem = node.pem
    return {
        "another key": public_key_to_bytes(ec.generate_private_key(ec.SECP256R1()).public_key()),
        "another curve": public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key()),
        "RSA": rsa.generate_private_key(65537, 2048).public_key().public_bytes(*kind),
        "Ed25519": ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*kind),
        "nothing": b"",
        "garbage": random.Random(1).randbytes(400),
        "half": pem[: len(pem) // 2],
        "damaged": pem[:60] + b"!" + pem[61:],
        "PEM of nothing": b"-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n",
        "DER": base64.b64decode(b"".join(pem.splitlines()[1:-1])),
        "CRLF": pem.replace(b"\n", b"\r\n"),
        "a line before": b"hello\n" + pem,
        "a line behind": pem + b"\n",
        "twice": pem + pem,
        "a point": node.key.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint),
    }


@pytest.mark.usefixtures("grid")
def test_only_registered_keys_with_their_signatures(machine: Machine) -> None:
    node, other = machine.nodes
    stranger = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC).isoformat()
    attempts: dict[str, dict[str, str]] = {
        "no headers": {},
        "no key": signed(node, key=None),
        "no signature": signed(node, signature=None),
        "no timestamp": {k: v for k, v in signed(node).items() if k != TIMESTAMP_HEADER},
        "a stranger's signature": signed(node, timestamp=now, signature=sign_message(stranger, now.encode())),
        "another node's signature": signed(node, timestamp=now, signature=sign_message(other.key, now.encode())),
        "a signature of another time": signed(node, signature=sign_message(node.key, now.encode())),
        "an empty signature": signed(node, signature=b""),
        "a long signature": signed(node, signature=bytes(5000)),
        "a signature that is not base64": {**signed(node), FLEET_HTTP_SIGNATURE_HEADER: "!!!!"},
        "a key that is not base64": {**signed(node), FLEET_HTTP_PUBLIC_KEY_HEADER: "-----BEGIN PUBLIC KEY-----"},
    }
    attempts |= {name: signed(node, key=key) for name, key in other_keys(node).items()}
    with caller(machine) as client:
        for path in OURS:
            for name, headers in attempts.items():
                answer = client.post(path, content=b"", headers=headers)
                assert answer.status_code == 401, (path, name)
                assert len(answer.content) < 100
        assert activate(machine, node, client).status_code == 200


@pytest.mark.usefixtures("grid")
def test_timestamps(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # a time of no zone is not this machine's
    time.tzset()
    try:
        now = datetime.datetime.now(datetime.UTC)

        def at(seconds: float, zone: datetime.tzinfo = datetime.UTC) -> str:
            return (now + datetime.timedelta(seconds=seconds)).astimezone(zone).isoformat()

        east = datetime.timezone(datetime.timedelta(hours=9, minutes=30))
        good = [at(0), at(0, east), at(-200), at(200), at(0).replace("+00:00", "Z")]
        bad = [at(-400), at(400), at(-1e9), at(1e9), at(0)[:-6], datetime.datetime.now().isoformat()]
        bad += ["NaN", "nan", "inf", "0", "1e9", str(time.time()), "now", "2026", "2026-13-45T00:00:00+00:00", "-1"]
        bad += ["0001-01-01T00:00:00", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "9999-12-31T23:59:59"]
        bad += ["2026-01-01T00:00:00+99:99", "x" * 3000, "2026W01"]
        with caller(machine) as client:
            body = ActivateNodeRequest(public_key=machine.nodes[0].pem).SerializeToString()
            for expected, times in ((200, good), (401, bad)):
                for told in times:
                    headers = signed(machine.nodes[0], timestamp=told)
                    answer = client.post(ACTIVATE, content=body, headers=headers)
                    assert answer.status_code == expected, (told, answer.text)
            headers = signed(machine.nodes[0], timestamp=at(-400))
            assert "clock is -40" in client.post(ACTIVATE, content=body, headers=headers).text
            for odd in (b"", b"\xb2\xb0", b"2026\xff"):
                parts = [(k.encode(), v.encode()) for k, v in signed(machine.nodes[0]).items() if k != TIMESTAMP_HEADER]
                answer = client.post(ACTIVATE, content=body, headers=[*parts, (TIMESTAMP_HEADER.encode(), odd)])
                assert answer.status_code == 401, odd
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_node_cannot_speak_for_another(machine: Machine, grid: SuperLinkGrid) -> None:
    thief, victim = machine.nodes
    assert activate(machine, victim).status_code == 200
    with machine.client(thief) as client:
        client.ActivateNode(ActivateNodeRequest(public_key=thief.pem))
        # While nothing is open to it a node's answers are dropped unread.
        grid.push_messages([Message(RecordDict(), node.node_id, "train", ttl=60.0) for node in (thief, victim)])
        claim = Node(node_id=victim.node_id)
        for call, request, status in (
            (client.ActivateNode, ActivateNodeRequest(public_key=victim.pem), 401),
            (client.DeactivateNode, DeactivateNodeRequest(node_id=victim.node_id), 409),
            (client.SendNodeHeartbeat, SendNodeHeartbeatRequest(node=claim), 409),
            (client.PullMessages, PullMessagesRequest(node=claim), 409),
            (client.PushMessages, PushMessagesRequest(node=claim, messages_list=[ProtoMessage()]), 409),
        ):
            with pytest.raises(httpx.HTTPStatusError) as caught:
                call(request)
            assert caught.value.response.status_code == status
        for other in (0, 1, 2, (1 << 63) - 1):
            with pytest.raises(httpx.HTTPStatusError):
                client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=Node(node_id=other)))
    assert grid.names() == {victim.node_id: victim.name, thief.node_id: thief.name}


def test_approved_and_revoked_while_the_server_runs(machine: Machine, grid: SuperLinkGrid) -> None:
    node = machine.invite("latecomer", approve=False)
    assert activate(machine, node).status_code == 401
    machine.registry.approve(node.request)
    assert ActivateNodeResponse.FromString(activate(machine, node).content).node_id == node.node_id
    assert grid.names() == {node.node_id: "latecomer"}
    assert grid.peer_key(node.node_id) == node.request.peer_key
    request = PullMessagesRequest(node=Node(node_id=node.node_id)).SerializeToString()
    held: list[httpx.Response] = []

    def pull() -> None:
        with caller(machine) as client:
            held.append(client.post(PULL, content=request, headers=signed(node)))

    thread = threading.Thread(target=pull)
    turn = grid._fleet._peers[node.node_id].turn
    thread.start()
    wait_for(lambda: grid._fleet._peers[node.node_id].turn > turn, "the held request")
    machine.registry.revoke("latecomer")
    assert grid.names() == {}
    assert grid.peer_key(node.node_id) == ""
    with caller(machine) as client:
        for path in OURS:
            assert client.post(path, content=request, headers=signed(node)).status_code == 401
    # Neither does the request that was held before bring it anything.
    list(grid.push_messages([Message(RecordDict(), node.node_id, "train", ttl=60.0)]))
    thread.join(20)
    assert [answer.status_code for answer in held] == [401]


@pytest.mark.usefixtures("grid")
def test_of_a_strangers_body_nothing_is_read(machine: Machine) -> None:
    """The answer comes at once, and none of the body was sent."""
    for path in OURS:
        for more in (
            "Content-Length: 1000000000000",
            "Transfer-Encoding: chunked",
            "Expect: 100-continue\r\nContent-Length: 9",
        ):
            started = time.monotonic()
            assert status_of(machine, f"POST {path} HTTP/1.1\r\nHost: x\r\n{more}\r\n\r\n".encode()) == 401
            assert time.monotonic() - started < 5


@pytest.mark.usefixtures("grid")
def test_a_strangers_head_is_limited(machine: Machine) -> None:
    """A megabyte of a head that does not end, and the server answers or hangs up; nodes are served meanwhile."""
    for start, more in (
        (f"POST {PULL} HTTP/1.1\r\nX: ".encode(), b"a" * 65536),
        (b"GET /", b"a" * 65536),
        (b"GET / HTTP/1.1\r\n", b"a: b\r\n" * 10_000),
    ):
        with connected(machine) as tls:
            found = b""
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                tls.sendall(start)
                for _ in range(16):
                    tls.sendall(more)
                found = tls.recv(4096)
            assert b" 400 " in found[:16] or not found
        assert activate(machine, machine.nodes[0]).status_code == 200


def test_limits_of_a_body(machine: Machine, grid: SuperLinkGrid) -> None:
    node = machine.nodes[0]
    assert activate(machine, node).status_code == 200
    head = head_of(node)

    def announced(path: str, *lines: str) -> int:
        told = "".join(f"{line}\r\n" for line in lines)
        return status_of(machine, f"POST {path} HTTP/1.1\r\nHost: x\r\n{head}{told}\r\n".encode("latin-1"))

    # Announced: refused before any of it is read.
    assert announced(PUSH, f"Content-Length: {LIMIT + (1 << 16) + 1}") == 413
    assert announced(PUSH, "Content-Length: 99999999999999999999") in (400, 413)
    for path in OURS[:4]:
        assert announced(path, f"Content-Length: {(1 << 16) + 1}") == 413
    for wrong in ("-1", "+5", "0x10", "five", "1 2", "1.5", "\u00b2", "1,2", "9" * 5000):
        assert announced(PUSH, f"Content-Length: {wrong}") in (400, 413), wrong
    assert announced(PUSH, "Content-Length: 5", "Content-Length: 6") in (400, 413)
    assert announced(PUSH, "Transfer-Encoding: gzip") in (400, 501)
    # Not announced: refused where it passes the limit.
    read = grid.traffic[0]
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    for path, limit in ((PUSH, LIMIT), (PULL, 0)):
        with connected(machine) as tls:
            found = b""
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                tls.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n{head}Transfer-Encoding: chunked\r\n\r\n".encode())
                for _ in range(limit // 65536 + 2):
                    tls.sendall(chunk)
                found = tls.recv(4096)
            assert b" 413 " in found or not found
    assert grid.traffic[0] == read
    # Less than was announced is no request at all.
    with connected(machine) as tls:
        tls.sendall(f"POST {PUSH} HTTP/1.1\r\nHost: x\r\n{head}Content-Length: 1000\r\n\r\nabc".encode())
    assert activate(machine, node).status_code == 200


@pytest.mark.usefixtures("grid")
def test_strangers_are_counted_before_tls(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else anybody takes the worker's memory with connections on which nothing is ever said."""
    monkeypatch.setattr(server.fleet_server, "_MOST_STRANGERS", 8)
    node = machine.nodes[0]
    with machine.client(node) as client:
        client.ActivateNode(ActivateNodeRequest(public_key=node.pem))
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(socket.create_connection(("127.0.0.1", machine.port))) for _ in range(40)]
            for connection in silent:
                connection.setblocking(False)

            def ended() -> int:
                return sum(_has_ended(connection) for connection in silent)

            wait_for(lambda: ended() >= 32, "the end of those that came first")
            assert [_has_ended(connection) for connection in silent[-8:]] == [False] * 8
            # The node's own connection lives on, and another finds room.
            client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=Node(node_id=node.node_id)))
            assert activate(machine, node).status_code == 200


def _has_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def test_garbage_in_a_body(machine: Machine, grid: SuperLinkGrid, caplog: pytest.LogCaptureFixture) -> None:
    node = machine.nodes[0]
    assert activate(machine, node).status_code == 200
    grid.push_messages([Message(RecordDict(), node.node_id, "train", ttl=60.0)])
    nested = b""
    while len(nested) < 60_000:  # a message in a message in a message
        nested = b"\x12" + _varint(len(nested)) + nested
    rng = random.Random(0)
    bodies = [b"\xff" * 9, b"\x0a\xff\xff\xff\xff\x0f", nested, json.dumps({"node": 1}).encode()]
    bodies += [rng.randbytes(rng.randrange(1, 300)) for _ in range(30)]
    with caller(machine) as client:
        for path in OURS:
            for body in bodies:
                answer = client.post(path, content=body, headers=signed(node))
                assert answer.status_code in (400, 401, 409), (path, body[:20])
        # Nested without an end where the contents are.
        claim = PushMessagesRequest(node=Node(node_id=node.node_id)).SerializeToString()
        push = claim + b"\x12" + _varint(len(nested)) + nested
        assert client.post(PUSH, content=push, headers=signed(node)).status_code in (200, 400)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_node_that_stalls(machine: Machine, grid: SuperLinkGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node has few requests read at once, and none is waited for without an end."""
    node, other = machine.nodes
    assert activate(machine, node).status_code == 200
    half = f"POST {PUSH} HTTP/1.1\r\nHost: x\r\n{head_of(node)}Content-Length: 1000\r\n\r\nabc".encode()
    beat = SendNodeHeartbeatRequest(node=Node(node_id=node.node_id)).SerializeToString()
    most = server.fleet._MOST_AT_ONCE
    with contextlib.ExitStack() as stack, caller(machine) as client:
        for _ in range(most):
            stack.enter_context(connected(machine)).sendall(half)
        wait_for(lambda: grid._fleet._read_now[node.pem] == most, "half requests")
        assert client.post(HEARTBEAT, content=beat, headers=signed(node)).status_code == 429
        assert activate(machine, other).status_code == 200  # another node does not feel it
    wait_for(lambda: grid._fleet._read_now[node.pem] == 0, "the end of requests that broke off")
    with caller(machine) as client:
        assert client.post(HEARTBEAT, content=beat, headers=signed(node)).status_code == 200
    monkeypatch.setattr(server.fleet, "_STALL_S", 0.3)
    assert status_of(machine, half) == 408


def test_strangers_are_cut_and_nodes_are_not(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.fleet_server, "_STRANGER_S", 0.6)
    node = machine.nodes[0]
    with machine.serve(LIMIT) as grid, machine.client(node) as client, contextlib.ExitStack() as stack:
        client.ActivateNode(ActivateNodeRequest(public_key=node.pem))
        held: list[object] = []
        request = PullMessagesRequest(node=Node(node_id=node.node_id))
        pull = threading.Thread(target=lambda: held.append(client.PullMessages(request)))
        pull.start()
        strangers = [stack.enter_context(connected(machine)) for _ in range(20)]
        for tls in strangers[:5]:
            tls.sendall(f"POST {PULL} HTTP/1.1\r\nX: ".encode())  # half a head
        started = time.monotonic()
        for tls in strangers:
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                assert not tls.recv(4096)
        assert time.monotonic() - started < 10
        # The node's own was open all the while.
        assert pull.is_alive()
        assert not held
        list(grid.push_messages([Message(RecordDict(), node.node_id, "train", ttl=60.0)]))
        pull.join(10)
        assert len(held) == 1
