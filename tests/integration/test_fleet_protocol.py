"""What is asked of nodes and what becomes of their answers, over a real server on loopback and Flower's own client."""

import contextlib
import random
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import message_from_proto, recorddict_to_proto
from flwr.proto.error_pb2 import Error as ProtoError
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata as ProtoMetadata
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import Array as ProtoArray
from flwr.proto.recorddict_pb2 import ArrayRecord as ProtoArrayRecord
from flwr.proto.recorddict_pb2 import ConfigRecord as ProtoConfigRecord
from flwr.proto.recorddict_pb2 import ConfigRecordValue
from flwr.proto.recorddict_pb2 import MetricRecord as ProtoMetricRecord
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supernode.fleet_http_client import FleetHttpClient
from google.protobuf.message import DecodeError

import server.fleet
from common.errors import ConfigError
from common.seal import open_sealed
from server.superlink import SuperLinkGrid, superlink_grid
from tests.coordinator_machine import InvitedNode, Machine, make_machine, wait_for


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return make_machine(tmp_path_factory.mktemp("fleet"), nodes=2)


@pytest.fixture
def grid(machine: Machine) -> Iterator[SuperLinkGrid]:
    with machine.serve() as served:
        yield served


class Connected:
    """A node by hand: Flower's client and nothing else."""

    def __init__(self, client: FleetHttpClient, node: InvitedNode) -> None:
        self.client, self.node, self.node_id = client, node, node.node_id
        self.activate()

    def activate(self) -> None:
        found = self.client.ActivateNode(ActivateNodeRequest(public_key=self.node.pem, heartbeat_interval=10))
        assert found.node_id == self.node_id

    def pull(self) -> ProtoMessage | None:
        found = self.client.PullMessages(PullMessagesRequest(node=Node(node_id=self.node_id))).messages_list
        assert len(found) <= 1
        return found[0] if found else None

    def push(self, *answers: ProtoMessage) -> None:
        self.client.PushMessages(PushMessagesRequest(node=Node(node_id=self.node_id), messages_list=answers))

    def answer(self, asked: ProtoMessage | str, number: int = 1, **metadata: object) -> ProtoMessage:
        """What a node would say, up to what is changed in its metadata."""
        to = asked if isinstance(asked, str) else asked.metadata.message_id
        told = {"src_node_id": self.node_id, "reply_to_message_id": to, "message_type": "train", **metadata}
        content = recorddict_to_proto(RecordDict({"answer": ConfigRecord({"number": number})}))
        return ProtoMessage(metadata=ProtoMetadata(**told), content=content)  # type: ignore[arg-type]


@pytest.fixture
def nodes(machine: Machine, grid: SuperLinkGrid) -> Iterator[list[Connected]]:
    """Both, connected."""
    with contextlib.ExitStack() as stack:
        yield [Connected(stack.enter_context(machine.client(node)), node) for node in machine.nodes]
    assert grid is not None


def ask(grid: SuperLinkGrid, *nodes: Connected, ttl: float = 60.0) -> list[str]:
    """One message for each; their ids."""
    content = RecordDict({"question": ConfigRecord({"x": 1})})
    found = list(grid.push_messages([Message(content, node.node_id, "train", ttl=ttl) for node in nodes]))
    assert len(set(found)) == len(nodes)
    return found


def numbers(grid: SuperLinkGrid, *identifiers: str) -> dict[str, object]:
    """What has been answered: the number, or the error's reason."""
    return {
        reply.metadata.reply_to_message_id: reply.error.reason
        if reply.has_error()
        else reply.content["answer"]["number"]
        for reply in grid.pull_messages(identifiers)
    }


def test_a_question_and_its_answer(machine: Machine, grid: SuperLinkGrid, nodes: list[Connected]) -> None:
    one, two = nodes
    vector = np.arange(1000, dtype=np.float32)
    content = RecordDict({"v": ArrayRecord({"v": Array(vector)}), "question": ConfigRecord({"x": 1})})
    asked = [Message(content, node.node_id, "train", ttl=60.0, group_id="7") for node in nodes]
    identifiers = list(grid.push_messages(asked))
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(machine.nodes[0].kit.signing_key))
    for node, identifier, name in zip(nodes, identifiers, machine.nodes, strict=True):
        got = node.pull()
        assert got is not None
        assert (got.metadata.message_id, got.metadata.dst_node_id) == (identifier, name.node_id)
        assert (got.metadata.group_id, got.metadata.message_type, got.metadata.ttl) == ("7", "train", 60.0)
        opened = open_sealed(message_from_proto(got).content, key, time.time(), name.node_id)
        np.testing.assert_array_equal(opened.array_records["v"]["v"].numpy(), vector)
    assert numbers(grid, *identifiers) == {}
    two.push(two.answer(identifiers[1], 2))
    assert numbers(grid, identifiers[0]) == {}
    assert numbers(grid, *identifiers) == {identifiers[1]: 2}
    assert numbers(grid, *identifiers) == {}  # each is given once
    one.push(one.answer(identifiers[0], 1))
    grid.wait_for_reply(10)
    [reply] = list(grid.pull_messages(identifiers))
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (one.node_id, 1)
    assert reply.metadata.group_id == "7"


def test_a_node_that_asks_again_is_given_the_same_again(grid: SuperLinkGrid, nodes: list[Connected]) -> None:
    """It has lost it; after the answer there is nothing to be had."""
    one, _two = nodes
    [identifier] = ask(grid, one)
    first, second = one.pull(), one.pull()
    assert first is not None
    assert first == second
    one.activate()  # a new process of the same node
    assert one.pull() == first
    one.push(one.answer(first))
    assert numbers(grid, identifier) == {identifier: 1}


def test_a_request_for_messages_is_held_and_ended(
    grid: SuperLinkGrid, nodes: list[Connected], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = nodes
    monkeypatch.setattr(server.fleet, "HOLD_S", 0.5)
    started = time.monotonic()
    assert one.pull() is None
    assert 0.4 < time.monotonic() - started < 5
    monkeypatch.setattr(server.fleet, "HOLD_S", 30.0)
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(node.pull) for node in nodes]
        wait_for(lambda: all(grid._fleet._peers[node.node_id].turn >= 2 for node in nodes), "held requests")
        time.sleep(0.1)
        assert not any(future.done() for future in held)
        started = time.monotonic()
        ask(grid, two)  # of another's message a node hears nothing
        got = held[1].result(5)
        assert got is not None
        assert got.metadata.dst_node_id == two.node_id
        assert time.monotonic() - started < 2
        assert not held[0].done()
        ask(grid, one)
        assert held[0].result(5) is not None


def test_a_newer_request_takes_the_place_of_an_older(
    machine: Machine, grid: SuperLinkGrid, nodes: list[Connected]
) -> None:
    one = nodes[0]
    with ThreadPoolExecutor(1) as pool, machine.client(machine.nodes[0]) as second:
        older = pool.submit(one.pull)
        wait_for(lambda: grid._fleet._peers[one.node_id].turn >= 2, "the held request")
        newer = Connected(second, machine.nodes[0])  # the node was started anew
        assert older.result(5) is None
        [identifier] = ask(grid, one)
        assert newer.pull() is not None
        newer.push(newer.answer(identifier, 5))
        assert numbers(grid, identifier) == {identifier: 5}


def test_of_several_answers_the_first_is_taken(grid: SuperLinkGrid, nodes: list[Connected]) -> None:
    one, _two = nodes
    [identifier] = ask(grid, one)
    one.push(one.answer(identifier, 1))
    one.push(one.answer(identifier, 2))
    assert numbers(grid, identifier) == {identifier: 1}
    one.push(one.answer(identifier, 3))
    assert numbers(grid, identifier) == {}
    # Two in one request: one node, one message, one answer.
    [identifier] = ask(grid, one)
    one.push(one.answer(identifier, 1), one.answer(identifier, 2))
    assert numbers(grid, identifier) == {identifier: 1}
    one.push()  # none in one is no error


def test_answers_to_what_was_not_asked_are_dropped(grid: SuperLinkGrid, nodes: list[Connected]) -> None:
    one, two = nodes
    first, second = ask(grid, one, two)
    one.push(one.answer(second, 66))  # another node's question
    one.push(one.answer(second, 66, src_node_id=two.node_id))  # in another node's name
    one.push(one.answer(first, 66, src_node_id=two.node_id))
    one.push(one.answer("", 66), one.answer("0" * 32, 66))
    one.push(ProtoMessage())
    assert numbers(grid, first, second) == {}
    # A new question withdraws the old ones, of all nodes.
    third, fourth = ask(grid, one, two)
    one.push(one.answer(first, 66))
    got = one.pull()
    assert got is not None
    assert got.metadata.message_id == third
    one.push(one.answer(third, 3))
    assert numbers(grid, first, second, third, fourth) == {third: 3}
    # An answer that came and was not fetched is gone with its question.
    two.push(two.answer(fourth, 4))
    [fifth] = ask(grid, one)
    assert numbers(grid, fourth, fifth) == {}


def test_what_an_answer_says_of_itself_is_not_believed(grid: SuperLinkGrid, nodes: list[Connected]) -> None:
    one = nodes[0]
    [identifier] = ask(grid, one)
    told = {"run_id": 99, "message_id": "mine", "dst_node_id": 77, "group_id": "666", "ttl": -1.0, "created_at": 1e300}
    one.push(one.answer(identifier, 1, message_type="query.evil", **told))
    [reply] = list(grid.pull_messages([identifier]))
    about = reply.metadata
    assert (about.run_id, about.src_node_id, about.dst_node_id) == (grid.run.run_id, one.node_id, 1)
    assert (about.message_type, about.group_id, about.reply_to_message_id) == ("train", "", identifier)


def test_what_is_out_of_date(grid: SuperLinkGrid, nodes: list[Connected], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.fleet, "HOLD_S", 0.3)
    one = nodes[0]
    [identifier] = ask(grid, one, ttl=0.2)
    time.sleep(0.3)
    assert one.pull() is None
    # An answer that comes late is the main loop's to judge; fetching it is no error.
    one.push(one.answer(identifier, 1))
    assert numbers(grid, identifier) == {identifier: 1}


def test_who_is_connected(
    machine: Machine, grid: SuperLinkGrid, nodes: list[Connected], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = nodes
    ids = sorted([one.node_id, two.node_id])
    assert grid.get_node_ids() == ids
    assert grid.names() == {node.node_id: node.name for node in sorted(machine.nodes, key=lambda n: n.node_id)}
    assert [grid.peer_key(node.node_id) for node in machine.nodes] == [n.request.peer_key for n in machine.nodes]
    assert grid.peer_key(7) == ""
    two.client.DeactivateNode(DeactivateNodeRequest(node_id=two.node_id))
    assert grid.get_node_ids() == [one.node_id]
    for call in (two.pull, two.push):
        with pytest.raises(httpx.HTTPStatusError, match="409"):
            call()
    two.activate()
    assert grid.get_node_ids() == ids
    monkeypatch.setattr(server.fleet, "PATIENCE_S", 0.4)
    wait_for(lambda: grid.get_node_ids() == [], "silence to be noticed", 10)
    one.push()  # whatever it sends
    assert grid.get_node_ids() == [one.node_id]


def test_a_node_that_is_killed_is_gone_and_back_at_once(machine: Machine, grid: SuperLinkGrid) -> None:
    """It was waiting for messages, and its connection is cut without a word."""
    node = machine.nodes[0]
    for _ in range(3):
        killed = machine.client(node)
        before = Connected(killed, node)
        turn = grid._fleet._peers[node.node_id].turn
        waiting = threading.Thread(target=_suppressed(before.pull))
        waiting.start()
        wait_for(lambda turn=turn: grid._fleet._peers[node.node_id].turn > turn, "the held request")  # type: ignore[misc]
        for connection in killed._client._transport._pool.connections:  # type: ignore[attr-defined]
            stream = connection._connection._network_stream.get_extra_info("socket")
            with contextlib.suppress(OSError):
                socket.socket.shutdown(stream, socket.SHUT_RDWR)
        waiting.join(10)
        wait_for(lambda: node.node_id not in grid.get_node_ids(), "the server to notice", 5)
        killed.close()
        with machine.client(node) as client:
            again = Connected(client, node)
            [identifier] = ask(grid, again)
            started = time.monotonic()
            assert again.pull() is not None
            assert time.monotonic() - started < 2
            assert node.node_id in grid.get_node_ids()
            again.push(again.answer(identifier))


def _suppressed(call: Callable[[], object]) -> Callable[[], None]:
    def quietly() -> None:
        with contextlib.suppress(httpx.HTTPError):
            call()

    return quietly


def hostile_contents() -> dict[str, ProtoRecordDict]:
    """What Flower's decoder was not made for."""

    def arrays(**fields: object) -> ProtoRecordDict:
        array = ProtoArray(**{"dtype": "float32", "shape": [1], "stype": "raw", "data": b"abcd", **fields})  # type: ignore[arg-type]
        record = ProtoArrayRecord(items=[ProtoArrayRecord.Item(key="v", value=array)])
        return ProtoRecordDict(items=[ProtoRecordDict.Item(key="a", array_record=record)])

    def config(*items: ProtoConfigRecord.Item) -> ProtoRecordDict:
        return ProtoRecordDict(items=[ProtoRecordDict.Item(key="c", config_record=ProtoConfigRecord(items=items))])

    one = ProtoConfigRecord.Item(key="k", value=ConfigRecordValue(sint64=1))
    return {
        "nothing": ProtoRecordDict(),
        "an item of no kind": ProtoRecordDict(items=[ProtoRecordDict.Item(key="x")]),
        "an item without a name": ProtoRecordDict(items=[ProtoRecordDict.Item()]),
        "a value of no kind": config(ProtoConfigRecord.Item(key="k")),
        "a value of no kind in it": config(ProtoConfigRecord.Item(key="k", value=ConfigRecordValue())),
        "twice the same": config(one, one),
        "many": config(*[ProtoConfigRecord.Item(key=str(i), value=one.value) for i in range(50_000)]),
        "a metric of no kind": ProtoRecordDict(
            items=[
                ProtoRecordDict.Item(key="m", metric_record=ProtoMetricRecord(items=[ProtoMetricRecord.Item(key="k")]))
            ]
        ),
        "a huge shape": arrays(shape=[2**31 - 1] * 64),
        "a negative shape": arrays(shape=[-1, -(2**31)]),
        "an object dtype": arrays(dtype="object"),
        "a pickle": arrays(stype="numpy.ndarray", data=b"\x93NUMPY\x01\x00\x02\x00{}", dtype="object"),
        "no data": arrays(data=b""),
        "a long name": arrays(dtype="f" * 1_000_000),
        "control characters": config(ProtoConfigRecord.Item(key="\x1b[2J\x00\n", value=one.value)),
    }


def test_hostile_answers_are_errors_and_never_raise(
    machine: Machine, grid: SuperLinkGrid, nodes: list[Connected], caplog: pytest.LogCaptureFixture
) -> None:
    one = nodes[0]

    def outcome(message: ProtoMessage) -> str:
        [identifier] = ask(grid, one)
        message.metadata.CopyFrom(one.answer(identifier).metadata)
        one.push(message)
        [reply] = list(grid.pull_messages([identifier]))
        assert reply.metadata.src_node_id == one.node_id
        if reply.has_error():
            assert not reply.has_content()
            return reply.error.reason or ""
        assert isinstance(reply.content, RecordDict)
        return "content"

    found = {name: outcome(ProtoMessage(content=content)) for name, content in hostile_contents().items()}
    assert set(found.values()) <= {"content", "MalformedUpdate"}
    assert found["an item of no kind"] == "MalformedUpdate"
    assert found["nothing"] == "content"
    # Neither and both.
    assert outcome(ProtoMessage()) == "MalformedUpdate"
    error = ProtoError(code=-1, reason="x" * 1_000_000)
    assert outcome(ProtoMessage(error=error)) == "x" * 1_000_000  # the exchange shortens it
    assert outcome(ProtoMessage(error=error, content=ProtoRecordDict())) in ("content", "MalformedUpdate")
    assert not outcome(ProtoMessage(error=ProtoError()))
    # Changed at random.
    rng, honest = random.Random(3), one.answer("").content
    honest.MergeFrom(hostile_contents()["a huge shape"])
    whole = honest.SerializeToString()
    for _ in range(150):
        changed = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        with contextlib.suppress(DecodeError, UnicodeDecodeError):
            outcome(ProtoMessage(content=ProtoRecordDict.FromString(bytes(changed))))
    assert all(len(record.getMessage()) < 300 for record in caplog.records)
    assert machine.nodes[0].node_id in grid.get_node_ids()


def test_answers_of_many_small_parts_are_not_unfolded(grid: SuperLinkGrid, nodes: list[Connected]) -> None:
    """Each part would be an object of Python's: a second of the main loop's time for each MiB."""
    one, many = nodes[0], 100_000

    def of(text: bytes) -> ProtoRecordDict:
        return ProtoRecordDict.FromString(text)

    item = ProtoRecordDict.Item
    array = item(key="a")
    array.array_record.items.add(key="v").value.shape.extend([1] * many)
    longlist = item(key="c")
    longlist.config_record.items.add(key="v").value.sint_list.vals.extend([1] * many)
    keys = item(key="c")
    for _ in range(many // 10):
        keys.config_record.items.add()
    for content in (of(b"\x0a\x00" * many), *(ProtoRecordDict(items=[wide]) for wide in (array, longlist, keys))):
        [identifier] = ask(grid, one)
        answer = one.answer(identifier)
        answer.content.CopyFrom(content)
        one.push(answer)
        began = time.process_time()
        assert numbers(grid, identifier) == {identifier: "MalformedUpdate"}
        assert time.process_time() - began < 0.5
    [identifier] = ask(grid, one)
    one.push(one.answer(identifier, 5))
    assert numbers(grid, identifier) == {identifier: 5}


def test_a_node_that_is_not_back_yet_finds_its_message_when_it_comes(machine: Machine, grid: SuperLinkGrid) -> None:
    """After a restart of the coordinator, say: in a secure sum nobody else could answer."""
    late = machine.nodes[0]
    content = RecordDict({"question": ConfigRecord({"x": 1})})
    [identifier] = grid.push_messages([Message(content, late.node_id, "train", ttl=60.0)])
    assert grid.get_node_ids() == []
    with machine.client(late) as client:
        node = Connected(client, late)
        asked = node.pull()
        assert asked is not None
        node.push(node.answer(asked, 3))
    assert numbers(grid, identifier) == {identifier: 3}


def test_answers_to_nothing_take_no_memory(machine: Machine, grid: SuperLinkGrid, nodes: list[Connected]) -> None:
    one = nodes[0]
    large = one.answer("0" * 32)
    large.content.items[0].config_record.items[0].value.bytes = bytes(1 << 20)
    for _ in range(20):
        one.push(large)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(60):
        one.push(large)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 30
    assert not grid._fleet._answers
    for _ in range(150):
        one.push(one.answer("0" * 32))
        one.activate()
    assert len(grid._fleet._peers) == 2
    assert machine.registry.nodes()


def test_fifty_nodes_at_once(tmp_path: Path) -> None:
    """Each in a thread with its own connection; three rounds, and all answers are there."""
    machine = make_machine(tmp_path, nodes=50)
    rounds, over = 3, threading.Event()

    def live(node: InvitedNode) -> int:
        with machine.client(node) as client:
            connected, served = Connected(client, node), 0
            while not over.is_set():
                asked = connected.pull()
                if asked is not None:
                    connected.push(connected.answer(asked, node.node_id % 1000))
                    served += 1
            return served

    with machine.serve() as grid, ThreadPoolExecutor(50) as pool:
        living = [pool.submit(live, node) for node in machine.nodes]
        try:
            wait_for(lambda: len(grid.get_node_ids()) == 50, "fifty nodes")
            for _ in range(rounds):
                messages = [Message(RecordDict(), n, "train", ttl=60.0) for n in grid.get_node_ids()]
                replies = grid.send_and_receive(messages, timeout=60)
                assert {r.metadata.src_node_id: r.content["answer"]["number"] for r in replies} == {
                    node.node_id: node.node_id % 1000 for node in machine.nodes
                }
        finally:
            over.set()
            grid.push_messages([Message(RecordDict(), n, "train", ttl=60.0) for n in grid.get_node_ids()])
        assert all(future.result(30) >= rounds for future in living)


def test_the_end_of_the_server(machine: Machine) -> None:
    """Held requests end, the port is free at once, and the nodes may come to the next one."""
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool, machine.client(machine.nodes[0]) as client:
            with machine.serve() as grid:
                node = Connected(client, machine.nodes[0])
                turn = grid._fleet._peers[node.node_id].turn
                held = pool.submit(_suppressed(node.pull))
                wait_for(lambda peer=grid._fleet._peers[node.node_id], turn=turn: peer.turn > turn, "it")  # type: ignore[misc]
                started = time.monotonic()
            assert time.monotonic() - started < 5
            held.result(5)
    with machine.serve(), machine.client(machine.nodes[0]) as client:
        Connected(client, machine.nodes[0])


def test_what_keeps_a_server_from_starting(machine: Machine, tmp_path: Path) -> None:
    own = machine.deployment
    with machine.serve(), pytest.raises(ConfigError, match=r"cannot listen on .* choose another"), machine.serve():
        pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", machine.port))
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot listen on .* choose another"), machine.serve():
            pass
    garbage = tmp_path / "garbage.crt"
    garbage.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for certificate, key in (
        (garbage, own.key),
        (own.certificate, garbage),
        (tmp_path / "none", own.key),
        (own.ca, own.key),
    ):
        with (
            pytest.raises(ConfigError, match="cannot load the certificate"),
            superlink_grid(own.listen, certificate, key, machine.registry, own.signing_key(), 1 << 20),
        ):
            pass
    for listen in ("127.0.0.1", "127.0.0.1:0", "127.0.0.1:70000", ":9092", "192.0.2.7:9092"):
        with (
            pytest.raises(ConfigError),
            superlink_grid(listen, own.certificate, own.key, machine.registry, own.signing_key(), 1 << 20),
        ):
            pass
    # After all that the port is free.
    with machine.serve():
        trusted = ssl.create_default_context(cadata=machine.nodes[0].kit.ca)
        answer = httpx.get(f"https://{machine.address}/", verify=trusted)
        assert answer.status_code == 403
        assert "server" not in answer.headers
