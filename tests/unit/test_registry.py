"""The nodes that may connect: one name, one key, and a revoked key never again."""

import json
import multiprocessing
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.errors import ConfigError
from common.kit import Kit, NodeRequest, node_id_of
from common.privacy.masks import fingerprint
from server.deployment import Deployment, create
from server.registry import Registry


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("kit") / "coordinator"
    create(Deployment(folder=folder, address="localhost:9092", listen="127.0.0.1:9092"))
    return Deployment.load(folder).kit("any")


class Node:
    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.peer = X25519PrivateKey.generate().public_key().public_bytes_raw()

    def asks(self, name: str) -> NodeRequest:
        return NodeRequest.create(replace(self.kit, name=name), self.key, self.peer.hex())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nodes.json"


def test_who_is_let_in_is_found_by_its_key(kit: Kit, path: Path) -> None:
    registry, other = Registry(path), Registry(path)
    assert (registry.nodes(), registry.peer_keys(), registry.by_key(b"")) == ([], [], None)
    alice, bob = Node(kit), Node(kit)
    asked = alice.asks("alice")
    added = registry.approve(asked)
    assert (added.name, added.node_key, added.peer_key) == ("alice", asked.node_key.encode(), alice.peer.hex())
    assert added.node_id == node_id_of(asked.node_key.encode())
    assert added.approved
    assert not added.revoked
    # Another process sees it at once, and so it does what follows.
    assert other.by_key(added.node_key) == added
    other.approve(bob.asks("bob"))
    assert [node.name for node in registry.nodes()] == ["alice", "bob"]
    assert registry.peer_keys() == [alice.peer, bob.peer]
    assert registry.peer_fingerprint() == fingerprint([bob.peer, alice.peer])
    gone = other.revoke("alice")
    assert gone == replace(added, revoked=gone.revoked)
    assert registry.by_key(added.node_key) is None
    assert registry.by_key(bob.asks("bob").node_key.encode()) is not None
    assert registry.peer_keys() == [bob.peer]
    assert [bool(node.revoked) for node in registry.nodes()] == [True, False]
    assert Registry(path).nodes() == registry.nodes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_second_approval_of_the_same_changes_nothing(kit: Kit, path: Path) -> None:
    registry, alice = Registry(path), Node(kit)
    first = registry.approve(alice.asks("alice"))
    before = path.stat()
    assert registry.approve(alice.asks("alice")) == first
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(registry.nodes()) == 1


def test_names_and_keys_are_one_node_s(kit: Kit, path: Path) -> None:
    registry, alice, other = Registry(path), Node(kit), Node(kit)
    registry.approve(alice.asks("alice"))
    for request, told in (
        (other.asks("alice"), "the name 'alice' is taken .*--revoke alice"),
        (alice.asks("bob"), "the node key of 'bob' is that of 'alice'"),
    ):
        with pytest.raises(ConfigError, match=told):
            registry.approve(request)
    other.peer = alice.peer
    with pytest.raises(ConfigError, match="the peer key of 'bob' is that of 'alice'"):
        registry.approve(other.asks("bob"))
    assert len(registry.nodes()) == 1
    # A different peer key under the same node key is another node too.
    alice.peer = Node(kit).peer
    with pytest.raises(ConfigError, match="taken"):
        registry.approve(alice.asks("alice"))


def test_a_revoked_key_is_never_let_in_again(kit: Kit, path: Path) -> None:
    registry, alice = Registry(path), Node(kit)
    registry.approve(alice.asks("alice"))
    registry.revoke("alice")
    for name in ("alice", "bob"):
        with pytest.raises(ConfigError, match=r"was revoked on .* joins anew"):
            registry.approve(alice.asks(name))
    back = Node(kit)
    back.peer = alice.peer  # her ledger and its keys are as they were
    with pytest.raises(ConfigError, match="the peer key of 'bob'"):
        registry.approve(back.asks("bob"))
    added = registry.approve(back.asks("alice"))
    assert registry.by_key(added.node_key) == added
    assert [node.name for node in registry.nodes()] == ["alice", "alice"]
    assert registry.peer_keys() == [alice.peer]
    registry.revoke("alice")
    assert all(node.revoked for node in registry.nodes())


def test_who_is_not_there_is_not_revoked(kit: Kit, path: Path) -> None:
    registry = Registry(path)
    with pytest.raises(ConfigError, match="'alice' is no node here: approved are none"):
        registry.revoke("alice")
    assert not path.exists()
    for name in ("alice", "bob"):
        registry.approve(Node(kit).asks(name))
    registry.revoke("alice")
    with pytest.raises(ConfigError, match=r"'alice' was revoked on .* already: approved are bob"):
        registry.revoke("alice")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'"a word"',
        b'{"version": 2, "nodes": []}',
        b'{"version": 1}',
        b'{"version": 1, "nodes": 3}',
        b'{"version": 1, "nodes": [3]}',
        b'{"version": 1, "nodes": [{"name": "alice"}]}',
        b'{"version": 1, "nodes": [{"name": "a", "node_key": "x", "peer_key": "00", "approved": "", "revoked": ""}]}',
    ],
)
def test_a_damaged_registry_lets_nobody_in(kit: Kit, path: Path, content: bytes) -> None:
    registry, asked = Registry(path), Node(kit).asks("alice")
    registry.approve(asked)
    assert registry.by_key(asked.node_key.encode()) is not None
    path.write_bytes(content)
    for use in (registry.nodes, registry.peer_keys, lambda: registry.by_key(asked.node_key.encode())):
        with pytest.raises(ConfigError, match=r"cannot be read .*restore it from a copy"):
            use()
    with pytest.raises(ConfigError):
        registry.approve(asked)
    assert path.read_bytes() == content


def test_a_registry_that_is_gone_lets_nobody_in(kit: Kit, path: Path) -> None:
    registry, asked = Registry(path), Node(kit).asks("alice")
    registry.approve(asked)
    path.unlink()
    assert registry.by_key(asked.node_key.encode()) is None


def test_what_is_not_changed_is_not_read_again(kit: Kit, path: Path) -> None:
    registry, asked = Registry(path), Node(kit).asks("alice")
    registry.approve(asked)
    assert registry.by_key(asked.node_key.encode()) is registry.by_key(asked.node_key.encode())
    kept = json.loads(path.read_text())
    kept["nodes"][0]["revoked"] = "2026-01-01"
    path.write_text(json.dumps(kept))
    assert registry.by_key(asked.node_key.encode()) is None


def _approve(path: Path, requests: list[NodeRequest]) -> None:
    for request in requests:
        Registry(path).approve(request)


def test_approvals_at_once_lose_nothing(kit: Kit, path: Path) -> None:
    asked = [Node(kit).asks(f"node-{number}") for number in range(40)]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_approve, args=(path, asked[start::4])) for start in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert {node.name for node in Registry(path).nodes()} == {request.name for request in asked}
