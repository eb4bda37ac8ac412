"""Instructions out, updates in: one round over Flower's Grid.

Every reply is checked before it is used; a client that refuses, fails or answers nonsense is left out of the round and
counted by the kind of its error. The grid is polled here with a short, growing wait (Flower's own `send_and_receive`
sleeps three seconds).
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator

from flwr.app import Message
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

    def wait_for_clients(self) -> list[int]:
        """The connected nodes with a budget left, once there are enough.

        Raises BudgetsSpent where those that are spent are missing, CohortTooSmall after round-timeout-s.
        """
        wanted, deadline = self._training.min_clients, time.monotonic() + self._training.round_timeout_s
        wait, told = _FIRST_WAIT_S, False
        while len(nodes := sorted(set(self._grid.get_node_ids()) - self.spent)) < wanted:
            if time.monotonic() > deadline:
                self._end_where_spent(set(self._grid.get_node_ids()))
                raise CohortTooSmall(
                    f"{len(nodes)} clients are connected after {self._training.round_timeout_s:g} s and min-clients is {wanted}: "
                    "start more clients and --resume, also with a smaller --min-clients"
                )
            if not told:
                log.info("waiting for %d clients, %d connected", wanted, len(nodes))
                told = True
            time.sleep(wait)
            wait = min(wait * 1.5, 1.0)
        return nodes

    def collect(
        self, instructions: RoundInstructions, nodes: list[int], dimension: int, heads: dict[str, str]
    ) -> Iterator[DiscriminatorUpdate]:
        """Ask `nodes` and yield each valid update of `dimension` as it arrives.

        heads: the last head seen of each client's ledger, in hex. They go along, so that a client notices where an older
        copy took its ledger's place, and those that come back are kept in it.

        Raises CohortTooSmall at the end where fewer than min-clients answered, BudgetsSpent where that will not change:
        what was yielded must then be dropped.
        """
        content = instructions.to_record(map(bytes.fromhex, heads.values()))
        timeout_s = self._training.round_timeout_s
        messages = [
            Message(
                content, dst_node_id=node, message_type="train", ttl=timeout_s, group_id=str(instructions.server_round)
            )
            for node in nodes
        ]
        self.refusals = Counter()
        self.bytes_down, self.bytes_up = len(nodes) * instructions.num_bytes, 0
        answered = 0
        for reply in self._replies(messages, time.monotonic() + timeout_s):
            if reply.has_error():
                self.refusals[str(reply.error.reason)[:40]] += 1
                if reply.error.reason == BudgetExhausted.__name__:
                    self.spent.add(reply.metadata.src_node_id)
                continue
            try:
                update = DiscriminatorUpdate.from_record(reply.content, instructions, dimension)
            except MalformedUpdate as error:
                log.warning("round %d: update refused: %s", instructions.server_round, error)
                self.refusals["MalformedUpdate"] += 1
                continue
            if update.head is not None:
                remember(heads, update.head)
            self.bytes_up += update.vector.nbytes
            answered += 1
            yield update
        if answered < self._training.min_clients:
            self._end_where_spent(set(nodes) | (self.spent & set(self._grid.get_node_ids())))
            reasons = ", ".join(f"{count} x {kind}" for kind, count in self.refusals.items()) or "no answer in time"
            raise CohortTooSmall(
                f"round {instructions.server_round}: {answered} of {len(nodes)} clients gave an update ({reasons}) and min-clients is "
                f"{self._training.min_clients}. The clients' logs say why; --resume goes on from here, also with a smaller --min-clients"
            )

    def _end_where_spent(self, connected: set[int]) -> None:
        """Raise BudgetsSpent where the connected would be enough, had they all a budget."""
        spent, left = len(connected & self.spent), len(connected - self.spent)
        if left < self._training.min_clients <= left + spent:
            raise BudgetsSpent(
                f"{spent} clients have spent their budgets, {left} are left and min-clients is "
                f"{self._training.min_clients}: the run ends with what it has"
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
