"""An in-process Flower `Grid`: unmodified ServerApps and ClientApps on one machine, without Ray, sockets or pickles.

A client runs when its reply is pulled, one after the other, so that the caller's running sum is all that a round keeps:
memory does not grow with the cohort. What a client is given are copies; it cannot reach into the coordinator or into
another client.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict, UserConfigValue
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.errors import ProtocolError
from common.flower import require_tested_flower

log = logging.getLogger("visard.simulations")


class InProcessGrid(Grid):
    """A Grid whose clients are calls of `client_app` in this process.

    node_configs: for each simulated client what its owner would configure. Client i has node id `i + 2`; 1 is the
    coordinator.
    run_config: what every client finds in `context.run_config`.

    Flower keeps the identity of a coordinator in one variable of the process: of two grids, the last made is in force.
    Raises ConfigError where the installed Flower is not the tested version.
    """

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Sequence[Mapping[str, UserConfigValue]],
        run_config: Mapping[str, UserConfigValue] | None = None,
        *,
        run_id: int = 1,
    ) -> None:
        require_tested_flower()
        self._client_app = client_app
        self._node_configs = {SUPERLINK_NODE_ID + 1 + i: dict(config) for i, config in enumerate(node_configs)}
        self._run_config = dict(run_config or {})
        self._states: dict[int, RecordDict] = {}
        self._waiting: dict[str, Message] = {}
        self._message_numbers = count(1)
        self.set_run(Run.create_empty(run_id))
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        TaskIdentity.task_id = 1

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run
        TaskIdentity.run_id = run.run_id

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message; Flower deprecates this in favour of `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The node ids of all clients, ascending. They are always online."""
        return list(self._node_configs)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages for their clients; nothing runs yet. Raises ProtocolError for a node id that no client has."""
        message_ids = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            if node_id not in self._node_configs:
                raise ProtocolError(f"no client has node id {node_id}; see get_node_ids()")
            message_id = f"message-{next(self._message_numbers)}"
            message.metadata.__dict__["_message_id"] = message_id
            self._waiting[message_id] = message
            message_ids.append(message_id)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Run one client for each step of the iterator and yield its reply; a message is answered once.

        Messages of clients that the caller does not wait for stay unrun. The clients share the caller's thread, so
        neither the time to live of a message nor a deadline of the caller interrupts them.
        """
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is not None:
                yield self._answer(message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then pull everything at once."""
        return list(self.pull_messages(self.push_messages(messages)))

    def _answer(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        context = Context(
            run_id=self._run.run_id,
            node_id=node_id,
            node_config=dict(self._node_configs[node_id]),
            state=_copy_records(self._states.get(node_id, RecordDict())),
            run_config=dict(self._run_config),
        )
        request = make_message(copy.copy(message.metadata), _copy_records(message.content))
        try:
            reply = self._client_app(request, context)
            if not isinstance(reply, Message) or reply.metadata.reply_to_message_id != message.metadata.message_id:
                raise ProtocolError("the ClientApp did not return a reply to its message")
        except Exception as error:
            # As at a real node: the class name leaves; the text, which may hold a path or a count, stays in the log.
            log.exception("the ClientApp of node %d failed", node_id)
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)
        if context.state:
            self._states[node_id] = context.state
        return Message(_copy_records(reply.content) if reply.has_content() else reply.error, reply_to=message)


def _copy_records(records: RecordDict) -> RecordDict:
    """Copy all that can be changed; the bytes of arrays are immutable and shared."""
    copied = RecordDict()
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            copied[name] = ArrayRecord(dict(record))
        elif isinstance(record, ConfigRecord):
            copied[name] = ConfigRecord({key: copy.copy(value) for key, value in record.items()})
        else:
            copied[name] = MetricRecord({key: copy.copy(value) for key, value in record.items()})
    return copied
