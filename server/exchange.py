"""Instructions out, updates in: one round over Flower's Grid.

Every reply is checked before it is used; a client that refuses, fails or answers nonsense is left out of the round and
counted by the kind of its error. The grid is polled here with a short, growing wait (Flower's own `send_and_receive`
sleeps three seconds).
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.errors import BudgetExhausted, BudgetsSpent, CohortTooSmall, MalformedUpdate
from common.messages import DiscriminatorUpdate, RoundInstructions
from common.privacy.chain import remember
from common.sections import TrainingConfig

log = logging.getLogger("visard.server")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.005, 0.1


class Exchange:
    """The coordinator's end of the wire.

    After a round: `refusals` counts the errors by kind, `bytes_down` and `bytes_up` are the array bytes sent and
    received. `spent` are the nodes that said that their budget is: they are not asked again.
    """

    def __init__(self, grid: Grid, training: TrainingConfig) -> None:
        self._grid = grid
        self._training = training
        self.refusals: Counter[str] = Counter()
        self.bytes_down = self.bytes_up = 0
        self.spent: set[int] = set()

    def wait_for_clients(self, least: int = 0) -> list[int]:
        """The connected nodes with a budget left, once there are enough: min-clients, and `least`.

        Raises BudgetsSpent where those that are spent are missing, CohortTooSmall after round-timeout-s.
        """
        wanted = max(least, self._training.min_clients)
        deadline = time.monotonic() + self._training.round_timeout_s
        wait, told = _FIRST_WAIT_S, False
        while len(nodes := self.nodes()) < wanted:
            if time.monotonic() > deadline:
                self._end_where_spent(set(self._grid.get_node_ids()), wanted)
                raise CohortTooSmall(
                    f"{len(nodes)} clients are connected after {self._training.round_timeout_s:g} s and {wanted} are needed: "
                    "start more clients and --resume, also with a smaller --min-clients"
                )
            if not told:
                log.info("waiting for %d clients, %d connected", wanted, len(nodes))
                told = True
            time.sleep(wait)
            wait = min(wait * 1.5, 1.0)
        return nodes

    def nodes(self) -> list[int]:
        """The connected nodes with a budget left."""
        return sorted(set(self._grid.get_node_ids()) - self.spent)

    def collect(
        self, instructions: RoundInstructions, nodes: list[int], dimension: int, heads: dict[str, str]
    ) -> Iterator[DiscriminatorUpdate]:
        """Ask `nodes` and yield each valid update of `dimension` as it arrives.

        heads: the last head seen of each client's ledger, in hex. They go along, so that a client notices where an older
        copy took its ledger's place, and those that come back are kept in it.

        Raises CohortTooSmall at the end where fewer than min-clients answered, BudgetsSpent where that will not change:
        what was yielded must then be dropped.
        """
        self.begin(instructions, len(nodes))
        content = instructions.to_record(map(bytes.fromhex, heads.values()))
        answered = 0
        for node, reply in self.ask(dict.fromkeys(nodes, content), instructions.server_round):
            update = None
            with self.refusing(node):
                update = self.update_of(reply, instructions, dimension, heads)
            if update is not None:
                answered += 1
                yield update
        self.require(answered, nodes, instructions.server_round)

    def begin(self, instructions: RoundInstructions, clients: int) -> None:
        """Count a round's bytes and refusals from here."""
        self.refusals = Counter()
        self.bytes_down, self.bytes_up = clients * instructions.num_bytes, 0

    def ask(self, contents: Mapping[int, RecordDict], server_round: int) -> Iterator[tuple[int, RecordDict]]:
        """Send each node its message and yield (node, content) of what comes back in time; errors are counted."""
        timeout_s = self._training.round_timeout_s
        messages = [
            Message(content, dst_node_id=node, message_type="train", ttl=timeout_s, group_id=str(server_round))
            for node, content in contents.items()
        ]
        for reply in self._replies(messages, time.monotonic() + timeout_s):
            if reply.has_error():
                self.refusals[str(reply.error.reason)[:40]] += 1
                if reply.error.reason == BudgetExhausted.__name__:
                    self.spent.add(reply.metadata.src_node_id)
                continue
            yield reply.metadata.src_node_id, reply.content

    def update_of(
        self, content: RecordDict, instructions: RoundInstructions, dimension: int, heads: dict[str, str]
    ) -> DiscriminatorUpdate:
        """A client's update, its ledger's head remembered in `heads`. Raises MalformedUpdate."""
        update = DiscriminatorUpdate.from_record(content, instructions, dimension)
        if update.head is not None:
            remember(heads, update.head)
        self.bytes_up += update.vector.nbytes
        return update

    @contextmanager
    def refusing(self, node: int) -> Iterator[None]:
        """Leave out a node whose answer is malformed."""
        try:
            yield
        except MalformedUpdate as error:
            log.warning("an answer of node %d is refused: %s", node, error)
            self.refusals["MalformedUpdate"] += 1

    def require(self, answered: int, nodes: list[int], server_round: int) -> None:
        """Raise CohortTooSmall where fewer than min-clients answered, BudgetsSpent where that will not change."""
        if answered < self._training.min_clients:
            self._end_where_spent(
                set(nodes) | (self.spent & set(self._grid.get_node_ids())), self._training.min_clients
            )
            raise CohortTooSmall(
                f"round {server_round}: {answered} of {len(nodes)} clients gave an update ({self.reasons()}) and min-clients is "
                f"{self._training.min_clients}. The clients' logs say why; --resume goes on from here, also with a smaller --min-clients"
            )

    def reasons(self) -> str:
        """Why clients were left out of this round, in words."""
        return ", ".join(f"{count} x {kind}" for kind, count in self.refusals.items()) or "no answer in time"

    def _end_where_spent(self, connected: set[int], wanted: int) -> None:
        """Raise BudgetsSpent where the connected would be enough, had they all a budget."""
        spent, left = len(connected & self.spent), len(connected - self.spent)
        if left < wanted <= left + spent:
            raise BudgetsSpent(
                f"{spent} clients have spent their budgets, {left} are left and {wanted} are needed: "
                f"the run ends with what it has"
            )

    def _replies(self, messages: list[Message], deadline: float) -> Iterator[Message]:
        pending = {identifier for identifier in self._grid.push_messages(messages) if identifier}
        wait = _FIRST_WAIT_S
        while pending and time.monotonic() < deadline:
            arrived = False
            for reply in self._grid.pull_messages(list(pending)):
                arrived = True
                if reply.metadata.reply_to_message_id in pending:
                    pending.discard(reply.metadata.reply_to_message_id)
                    yield reply
            wait = _FIRST_WAIT_S if arrived else min(wait * 1.5, _LONGEST_WAIT_S)
            if pending:
                time.sleep(wait)
        if pending:
            self.refusals["no answer in time"] += len(pending)
