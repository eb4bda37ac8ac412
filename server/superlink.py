"""The coordinator's side of the network: the Fleet API over HTTPS, and a Grid on it for a main loop in this process.

`flwr run` would ship our code to a fresh process for each run and let Flower start and end it, and Flower's SuperLink
would hand every object on from one process to the other. Here the server is a thread of the process that trains; the Grid
reaches it in memory. Nothing of it outlives the process: what must is in the coordinator's checkpoint, node ids follow
from the nodes' keys, and nodes connect anew by themselves.

The parts of Flower used here are not documented; `common.flower` refuses untested versions.
"""

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.flower import quiet_flower_log, require_tested_flower
from common.seal import Packed, pack, seal
from server.fleet import Fleet
from server.fleet_server import FleetServer
from server.registry import Registry

log = logging.getLogger("visard.server")

_STOP_TIMEOUT_S = 10.0
# Of records in an answer, of entries in one of them, and of values in a list.
_MOST_PARTS = 2048


class SuperLinkGrid(Grid):
    """A Grid whose messages are sealed and whose nodes are those of the registry, by ids that follow from their keys."""

    def __init__(
        self, fleet: Fleet, signing_key: Ed25519PrivateKey, run_id: int, serving: Callable[[], bool] = lambda: True
    ) -> None:
        """serving: whether the server is up."""
        self._fleet, self._signing_key, self._serving = fleet, signing_key, serving
        self._asked: dict[str, Message] = {}
        self.set_run(Run.create_empty(run_id))
        TaskIdentity.node_id, TaskIdentity.task_id = SUPERLINK_NODE_ID, 1

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run
        TaskIdentity.run_id = run.run_id

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes of all requests' and of all responses' bodies so far."""
        return self._fleet.bytes_in, self._fleet.bytes_out

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message; Flower deprecates this in favour of `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The ids of the nodes that are connected, ascending. Raises RuntimeError where nobody could connect any more."""
        if not self._serving():
            raise RuntimeError("the server's thread has ended; the log says why")
        return list(self._fleet.connected())

    def names(self) -> dict[int, str]:
        """The names of the nodes that are connected."""
        return {node_id: node.name for node_id, node in self._fleet.connected().items()}

    def peer_key(self, node_id: int) -> str:
        """The public peer key that a node was registered with, in hex; "" where it was never connected."""
        node = self._fleet.approved(node_id)
        return node.peer_key if node else ""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Seal and send. Returns the messages' ids in order. Messages that were sent before and are not answered are withdrawn."""
        self._asked.clear()
        protos: list[ProtoMessage] = []
        packed: dict[int, Packed] = {}
        for message in messages:
            about = message.metadata
            about.__dict__["_message_id"] = secrets.token_hex(16)
            # What goes to several nodes is packed once.
            key = id(message.content)
            if key not in packed:
                packed[key] = pack(message.content)
            sealed = seal(packed[key], self._signing_key, time.time() + about.ttl, about.dst_node_id)
            self._asked[about.message_id] = message
            proto = message_to_proto(Message(sealed, about.dst_node_id, about.message_type, ttl=about.ttl))
            proto.metadata.message_id, proto.metadata.group_id = about.message_id, about.group_id
            protos.append(proto)
        self._fleet.ask(protos)
        return list(self._asked)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The answers that have come to these messages. One that cannot be read is an error."""
        self._fleet.arrived.clear()
        for proto in self._fleet.answers(set(message_ids)):
            asked = self._asked.pop(proto.metadata.reply_to_message_id)
            try:
                _check_modest(proto.content)
                answer = message_from_proto(proto)
                told: RecordDict | Error = answer.content if answer.has_content() else answer.error
            except Exception as problem:  # whatever Flower makes of what a node wrote
                node = self._fleet.approved(asked.metadata.dst_node_id)
                log.warning(
                    "an answer of %s cannot be read: %s", node.name if node else "a node", type(problem).__name__
                )
                told = Error(ErrorCode.MESSAGE_UNAVAILABLE, "MalformedUpdate")
            # Whose answer it is and to what is as the Fleet API checked it, not as it says.
            yield Message(told, reply_to=asked)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then pull until all have answered or `timeout` seconds are over."""
        pending, found = set(self.push_messages(messages)), []
        until = time.monotonic() + (3600.0 if timeout is None else timeout)
        while pending and time.monotonic() < until:
            for reply in self.pull_messages(pending):
                pending.discard(reply.metadata.reply_to_message_id)
                found.append(reply)
            self.wait_for_reply(0.1)
        return found

    def wait_for_reply(self, seconds: float) -> None:
        """Wait until an answer has come since the last pull, `seconds` at most."""
        self._fleet.arrived.wait(seconds)


def _check_modest(content: ProtoRecordDict) -> None:
    """Raise ValueError for an answer of many small parts, each of which Python would make an object of."""
    parts = [len(content.items)]
    for item in content.items[:_MOST_PARTS]:
        arrays, scalars = item.array_record.items, item.config_record.items
        parts += [len(arrays), len(scalars), len(item.metric_record.items)]
        parts += [len(array.value.shape) for array in arrays[:_MOST_PARTS]]
        for scalar in scalars[:_MOST_PARTS]:
            kind = scalar.value.WhichOneof("value") or ""
            parts.append(len(getattr(scalar.value, kind).vals) if kind.endswith("_list") else 0)
    if max(parts) > _MOST_PARTS:
        raise ValueError(f"{max(parts)} parts where {_MOST_PARTS} are enough")


@contextlib.contextmanager
def superlink_grid(
    listen: str,
    certificate: Path,
    key: Path,
    registry: Registry,
    signing_key: Ed25519PrivateKey,
    max_message_bytes: int,
) -> Iterator[SuperLinkGrid]:
    """Serve the Fleet API at `listen` (HOST:PORT) over TLS 1.3 to the nodes of `registry`, and yield a Grid on it.

    max_message_bytes: the largest answer that is taken. Raises ConfigError on an address in use, a certificate that
    cannot be loaded or a Flower that was not tested.
    """
    require_tested_flower()
    quiet_flower_log()
    fleet = Fleet(registry, max_message_bytes)
    server = FleetServer(fleet, listen, certificate, key)
    thread = threading.Thread(target=server.serve, name="fleet", daemon=True)
    thread.start()
    try:
        server.wait_until_serving(thread)
        yield SuperLinkGrid(fleet, signing_key, secrets.randbits(62) | 1, thread.is_alive)
    finally:
        fleet.close()
        server.stop()
        thread.join(_STOP_TIMEOUT_S)
        server.close()
