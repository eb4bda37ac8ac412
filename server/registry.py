"""Which nodes may connect: `nodes.json` in the coordinator's folder, names and public keys.

A revoked node stays in the file, so that its key is never let in again, under whatever name.
"""

import fcntl
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from common.errors import ConfigError
from common.files import write_atomically
from common.kit import NodeRequest, check_name, load_node_public_key, node_id_of
from common.privacy.masks import fingerprint

_VERSION = 1


@dataclass(frozen=True)
class RegisteredNode:
    """name, node_key (PEM), peer_key (64 hex digits) of its request; approved, revoked: ISO dates (UTC), the latter may be empty."""

    name: str
    node_key: bytes
    peer_key: str
    approved: str
    revoked: str = ""

    @property
    def node_id(self) -> int:
        """Flower's id of the node."""
        return node_id_of(self.node_key)


class Registry:
    """The registered nodes, read again whenever the file has changed. Several threads and processes may use one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # What the file was like, and what was in it: replaced as one, for the threads of a server.
        self._read: tuple[object, list[RegisteredNode], dict[bytes, RegisteredNode]] = (None, [], {})

    def nodes(self) -> list[RegisteredNode]:
        """All, revoked ones too, in the order of their approvals. Raises ConfigError where the file is damaged."""
        return list(self._current()[0])

    def by_key(self, pem: bytes) -> RegisteredNode | None:
        """The approved node with this key, or None. Raises ConfigError where the file is damaged."""
        return self._current()[1].get(pem)

    def peer_keys(self) -> list[bytes]:
        """The public peer keys of approved nodes, 32 bytes each."""
        return [bytes.fromhex(node.peer_key) for node in self._current()[0] if not node.revoked]

    def peer_fingerprint(self) -> str:
        """What the owners compare and pin: the fingerprint of `peer_keys`."""
        return fingerprint(self.peer_keys())

    def approve(self, request: NodeRequest) -> RegisteredNode:
        """Let a node in; one that is in already, with the same keys, stays as it is.

        Whether the request is for this coordinator is the caller's to check. Raises ConfigError where the name or a key is
        another node's, and where the key was revoked.
        """
        with self._changing() as nodes:
            return _approved(nodes, request)

    def revoke(self, name: str) -> RegisteredNode:
        """Take a node's leave to connect. Raises ConfigError where none of that name has it."""
        with self._changing() as nodes:
            return _revoked(nodes, name)

    def change(self, revoke: Iterable[str], approve: Iterable[NodeRequest]) -> None:
        """Revoke nodes, then let others in: all of it, or nothing where `revoke` or `approve` would raise ConfigError."""
        with self._changing() as nodes:
            for name in revoke:
                _revoked(nodes, name)
            for request in approve:
                _approved(nodes, request)

    def _current(self) -> tuple[list[RegisteredNode], dict[bytes, RegisteredNode]]:
        """The nodes, and the approved ones by their keys."""
        try:
            status = self._path.stat()
            seen: object = (status.st_ino, status.st_mtime_ns, status.st_size)
        except FileNotFoundError:
            seen = None
        read = self._read
        if seen != read[0]:
            nodes = self._load() if seen else []
            read = self._read = (seen, nodes, {node.node_key: node for node in nodes if not node.revoked})
        return read[1], read[2]

    @contextmanager
    def _changing(self) -> Iterator[list[RegisteredNode]]:
        """The nodes, to change in place; written at the end of the block unless it raises. One process at a time."""
        with self._path.with_name(f"{self._path.name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self._load() if self._path.exists() else []
            nodes = list(before)
            yield nodes
            if nodes != before:
                kept = [asdict(node) | {"node_key": node.node_key.decode()} for node in nodes]
                content = json.dumps({"version": _VERSION, "nodes": kept}, indent=1)
                write_atomically(self._path, content.encode(), private=True)

    def _load(self) -> list[RegisteredNode]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            if content["version"] != _VERSION:
                raise ValueError(f"version {content['version']}, not {_VERSION}")
            return [_parsed(entry) for entry in content["nodes"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise ConfigError(
                f"the registry {self._path} cannot be read ({type(error).__name__}: {error}): restore it from a copy, or move it away "
                "and approve the nodes anew"
            ) from error


def _approved(nodes: list[RegisteredNode], request: NodeRequest) -> RegisteredNode:
    key = request.node_key.encode()
    for node in nodes:
        if (node.name, node.node_key, node.peer_key, node.revoked) == (request.name, key, request.peer_key, ""):
            return node
    for node in nodes:
        if node.node_key == key and node.revoked:
            raise ConfigError(
                f"this key of {request.name!r} was revoked on {node.revoked} (then {node.name!r}) and is not let in again: its "
                "owner moves node.key away and joins anew, which makes another"
            )
        if node.name == request.name and not node.revoked:
            raise ConfigError(
                f"the name {request.name!r} is taken since {node.approved}, by another key: invite this node under another "
                f"name, or first `visard coordinator nodes --revoke {node.name}`"
            )
        if node.node_key == key or node.node_id == node_id_of(key):
            raise ConfigError(
                f"the node key of {request.name!r} is that of {node.name!r}: one node has one name; revoke {node.name!r}, or let "
                "the owner join with a policy, and so a state-dir, of its own"
            )
        # A node that comes back under its name with a new node key may keep its peer key.
        if node.peer_key == request.peer_key and node.name != request.name:
            raise ConfigError(
                f"the peer key of {request.name!r} is that of {node.name!r}: every owner has a key of their own, which "
                "`visard client init` makes in the state-dir"
            )
    added = RegisteredNode(request.name, key, request.peer_key, _today())
    nodes.append(added)
    return added


def _revoked(nodes: list[RegisteredNode], name: str) -> RegisteredNode:
    for place, node in enumerate(nodes):
        if node.name == name and not node.revoked:
            nodes[place] = replace(node, revoked=_today())
            return nodes[place]
    gone = [node.revoked for node in nodes if node.name == name]
    known = ", ".join(node.name for node in nodes if not node.revoked) or "none"
    told = f"was revoked on {gone[-1]} already" if gone else "is no node here"
    raise ConfigError(f"{name!r} {told}: approved are {known}")


def _parsed(entry: dict[str, str]) -> RegisteredNode:
    if set(entry) != {f.name for f in fields(RegisteredNode)} or not all(isinstance(v, str) for v in entry.values()):
        raise ValueError(f"an entry with {', '.join(entry)}")
    node = RegisteredNode(**{**entry, "node_key": entry["node_key"].encode()})  # type: ignore[arg-type]
    check_name(node.name)
    load_node_public_key(node.node_key)
    bytes.fromhex(node.peer_key)
    return node


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
