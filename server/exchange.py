"""Instructions out, updates in: one round over Flower's Grid.

Every reply is checked before it is used; a client that refuses, fails or answers nonsense is left out of the round and
counted by the kind of its error. The grid is polled here with a short, growing wait (Flower's own `send_and_receive`
sleeps three seconds). What clients write is theirs alone: it is counted and logged in short, in plain letters.
"""

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.errors import BudgetExhausted, BudgetsSpent, CohortTooSmall, MalformedUpdate, VisardError
from common.messages import DiscriminatorUpdate, RoundInstructions
from common.privacy.chain import remember
from common.sections import TrainingConfig

log = logging.getLogger("visard.server")

# What goes on with a run that an error has ended.
GO_ON = "Nothing is lost: `visard coordinator start` goes on, or `visard simulate NAME --resume`"

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.005, 0.1
# Seconds between two looks at who is connected, and those after which a node that is not is given up.
_LOOK_S, _GONE_S = 1.0, 30.0
# Seconds that the nodes of an interrupted run get to come back.
_RETURN_S = 75.0
_UNUSUAL = re.compile(r"[^A-Za-z0-9 _.-]")


class Exchange:
    """The coordinator's end of the wire.

    Where there is a registry: peer_key, the public peer key that a node was registered with, in hex; names, of the nodes that
    are connected.

    After a round: `refusals` counts the errors by kind, `bytes_down` and `bytes_up` are the array bytes sent and
    received. `spent` are the nodes that said that their budget is: they are not asked again.
    """

    def __init__(
        self,
        grid: Grid,
        training: TrainingConfig,
        peer_key: Callable[[int], str] | None = None,
        names: Callable[[], Mapping[int, str]] = dict,
    ) -> None:
        self._grid = grid
        self._training = training
        self._peer_key = peer_key
        self._names, self._named = names, dict[int, str]()
        # A grid that hears of answers wakes up for them.
        self._pause: Callable[[float], object] = getattr(grid, "wait_for_reply", time.sleep)
        self._ready: list[int] = []
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
                    f"start more clients, also with a smaller min-clients. {GO_ON}"
                )
            if not told:
                log.info("waiting for %d clients, %d connected", wanted, len(nodes))
                told = True
            time.sleep(wait)
            wait = min(wait * 1.5, 1.0)
        self._ready = nodes
        return nodes

    def wait_for_return(self, nodes: Collection[int]) -> None:
        """Wait until these are connected, those with spent budgets aside: 75 s at most, and no longer than round-timeout-s."""
        deadline = time.monotonic() + min(_RETURN_S, self._training.round_timeout_s)
        wait, told = _FIRST_WAIT_S, False
        while missing := set(nodes) - self.spent - set(self._grid.get_node_ids()):
            if time.monotonic() > deadline:
                log.warning(
                    "going on without %s, of the last round, who did not come back", self.named(*sorted(missing))
                )
                return
            if not told:
                log.info("waiting for %d clients of the last round to come back", len(missing))
                told = True
            time.sleep(wait)
            wait = min(wait * 1.5, 1.0)

    def nodes(self) -> list[int]:
        """The connected nodes with a budget left."""
        return sorted(set(self._grid.get_node_ids()) - self.spent)

    def named(self, *nodes: int) -> str:
        """These nodes in words, as the registry calls them."""
        self._named |= self._names()  # one that has left keeps its name
        return ", ".join(f"node {self._named.get(node, node)}" for node in nodes)

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
        valid: set[int] = set()
        replies = self.ask(
            dict.fromkeys(nodes, content),
            instructions.server_round,
            lambda: len(valid) >= self._training.min_clients,
        )
        for node, reply in replies:
            update = None
            with self.refusing(node):
                update = self.update_of(reply, instructions, dimension, heads)
            if update is not None:
                valid.add(node)
                yield update
        self.require(len(valid), nodes, instructions.server_round)

    def begin(self, instructions: RoundInstructions, clients: int) -> None:
        """Count a round's bytes and refusals from here."""
        self.refusals = Counter()
        self.bytes_down, self.bytes_up = clients * instructions.num_bytes, 0

    def ask(
        self, contents: Mapping[int, RecordDict], server_round: int, enough: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, RecordDict]]:
        """Send each node its message and yield (node, content) of what comes back in time; errors are counted.

        enough: whether the round could do without those that have not answered. From then on they get straggler-wait-s, and one
        that has not been connected for 30 s gets no more. Until then all have round-timeout-s: a node that comes back is given its
        message again.
        """
        timeout_s = self._training.round_timeout_s
        messages = [
            Message(content, dst_node_id=node, message_type="train", ttl=timeout_s, group_id=str(server_round))
            for node, content in contents.items()
        ]
        for node, reply in self._replies(messages, enough):
            if reply.has_error():
                self.refusals[_UNUSUAL.sub("?", str(reply.error.reason)[:40])] += 1
                if reply.error.reason == BudgetExhausted.__name__:
                    self.spent.add(node)
                continue
            yield node, reply.content

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
        """Leave out a node whose answer is malformed, also in a way that nobody thought of."""
        try:
            yield
        except MalformedUpdate as error:
            log.warning("an answer of %s is refused: %.200s", self.named(node), error)
            self.refusals["MalformedUpdate"] += 1
        except VisardError:
            raise
        except Exception:
            log.exception("an answer of %s cannot be read", self.named(node))
            self.refusals["MalformedUpdate"] += 1

    def check_peer_key(self, node: int, key: bytes) -> None:
        """Raise MalformedUpdate where a node tells another peer key than it was registered with."""
        if self._peer_key is not None and self._peer_key(node) != key.hex():
            raise MalformedUpdate(f"peer key {key.hex()} is not the one that {self.named(node)} was registered with")

    def require(self, answered: int, nodes: list[int], server_round: int) -> None:
        """Raise CohortTooSmall where fewer than min-clients answered, BudgetsSpent where that will not change."""
        if answered < self._training.min_clients:
            # Of a cohort the others count too: they could be asked.
            able = {*nodes, *self._ready}
            self._end_where_spent(able | (self.spent & set(self._grid.get_node_ids())), self._training.min_clients)
            raise CohortTooSmall(
                f"round {server_round}: {answered} of {len(nodes)} clients gave an update ({self.reasons()}) and min-clients is "
                f"{self._training.min_clients}. The clients' logs say why; a smaller min-clients can do with them. {GO_ON}"
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

    def _replies(self, messages: list[Message], enough: Callable[[], bool]) -> Iterator[tuple[int, Message]]:
        now = time.monotonic()
        deadline, looked, closing = now + self._training.round_timeout_s, now, False
        identifiers = self._grid.push_messages(messages)
        # Whose answer it is follows from what was asked, not from what an answer says of itself.
        pending = {i: m.metadata.dst_node_id for i, m in zip(identifiers, messages, strict=True) if i}
        seen = dict.fromkeys(pending.values(), now)
        wait = _FIRST_WAIT_S
        while pending and time.monotonic() < deadline:
            arrived = False
            for reply in self._grid.pull_messages(list(pending)):
                node = pending.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    arrived = True
                    yield node, reply
            now = time.monotonic()
            if now - looked >= _LOOK_S:
                looked = now
                seen |= dict.fromkeys(self._grid.get_node_ids(), now)
            if enough():
                if not closing and self._training.straggler_wait_s:
                    closing, deadline = True, min(deadline, now + self._training.straggler_wait_s)
                for identifier in [i for i, node in pending.items() if looked - seen[node] > _GONE_S]:
                    del pending[identifier]
                    self.refusals["disconnected"] += 1
            wait = _FIRST_WAIT_S if arrived else min(wait * 1.5, _LONGEST_WAIT_S)
            if pending:
                self._pause(max(min(wait, deadline - now), 0.0))
        if pending:
            self.refusals["no answer in time"] += len(pending)
