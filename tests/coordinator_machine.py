"""A coordinator's machine for tests: a folder with its authority, certificate, signing key and registry, and nodes that were let in.

    machine = make_machine(tmp_path, nodes=2)       # tmp_path/coordinator, tmp_path/node-0 ..., on a free port of loopback
    with machine.serve() as grid:                   # the real server, in this process
        with machine.client(machine.nodes[0]) as client:
            client.ActivateNode(...)                # Flower's own client, with the node's key and the kit's authority
    stranger = machine.invite("stranger", approve=False)

Everything is made by the modules that the commands use; keys and kits lie where they put them: `coordinator/` is a
deployment's folder, `node-0/` a state-dir with `node.key` and `peer.key`, `node-0.kit.toml` its kit.

`free_address()` and `wait_for(condition, what)` are for anybody.
"""

import contextlib
import random
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.join import make_node_key, node_key_path
from client.secret_store import PEER_KEY, make_peer_key
from common.fields import Scalar
from common.kit import Kit, NodeRequest, node_id_of, public_key_pem
from server.deployment import Deployment, create
from server.registry import Registry
from server.superlink import SuperLinkGrid, superlink_grid


@dataclass(frozen=True)
class InvitedNode:
    """A node with its own keys and a kit, approved or not."""

    kit: Kit
    kit_path: Path
    state_dir: Path
    key: EllipticCurvePrivateKey
    request: NodeRequest

    @property
    def name(self) -> str:
        return self.kit.name

    @property
    def pem(self) -> bytes:
        """Its public key as the registry has it."""
        return public_key_pem(self.key)

    @property
    def node_id(self) -> int:
        return node_id_of(self.pem)


@dataclass(frozen=True)
class Machine:
    """A coordinator's folder and the nodes that it invited."""

    deployment: Deployment
    registry: Registry
    nodes: list[InvitedNode] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.deployment.address

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def serve(self, max_message_bytes: int = 1 << 26) -> AbstractContextManager[SuperLinkGrid]:
        """The server on its address, in threads of this process."""
        own = self.deployment
        return superlink_grid(own.listen, own.certificate, own.key, self.registry, own.signing_key(), max_message_bytes)

    def invite(self, name: str, *, approve: bool = True) -> InvitedNode:
        """Another node, with fresh keys."""
        place = self.deployment.folder.parent
        state_dir, kit, kit_path = place / name, self.deployment.kit(name), place / f"{name}.kit.toml"
        state_dir.mkdir(mode=0o700)
        kit.write(kit_path)
        key = make_node_key(node_key_path(state_dir))
        peer = make_peer_key(state_dir / PEER_KEY)
        request = NodeRequest.create(kit, key, peer.public_key().public_bytes_raw().hex())
        request.write(place / f"{name}.request.toml")
        node = InvitedNode(kit, kit_path, state_dir, key, request)
        if approve:
            self.registry.approve(request)
        return node

    def client(self, node: InvitedNode) -> FleetHttpClient:
        """Flower's client with this node's key. A context manager."""
        signs = NodeAuthHttpInterceptor(node.key, node.key.public_key())
        return FleetHttpClient.from_server_address(self.address, False, node.kit.ca.encode(), [signs])


def make_machine(
    folder: Path, nodes: int = 2, *, name: str = "demo", recipe: str = "demo", run: Mapping[str, Scalar] | None = None
) -> Machine:
    """A new one in `folder`/coordinator, with `nodes` approved nodes node-0, node-1 ... . run: run options of [run]."""
    address = free_address()
    folder = folder / "coordinator"
    create(Deployment(folder=folder, address=address, listen=address, name=name, recipe=recipe, run=run or {}))
    deployment = Deployment.load(folder)
    machine = Machine(deployment, Registry(deployment.registry_path))
    machine.nodes.extend(machine.invite(f"node-{number}") for number in range(nodes))
    return machine


def free_address() -> str:
    """A port of loopback below those that outgoing connections are given, so that none takes it between two starts."""
    while True:
        port = random.randint(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return f"127.0.0.1:{port}"


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Until it holds. A failure says what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)
