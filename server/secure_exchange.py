"""One round under a secure sum: keys dealt ahead where that is due, masked vectors in, the sum of the survivors out.

What is kept in `CoordinatorState.sums` is public: the peers' keys, the last deal's public part, which node holds which
place, and who survived a round whose opening was asked for. It is saved before a message leaves that depends on it, so a
coordinator that crashes asks the same again. No client's secret is ever part of it.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from common.errors import BudgetsSpent, CohortTooSmall, MalformedUpdate, RoundVoid
from common.messages import RoundInstructions
from common.privacy.masks import fingerprint
from common.sections import PrivacyConfig, TrainingConfig
from common.secure_messages import (
    ConfirmAnswer,
    DealAnswer,
    DealRequest,
    KeyAnswer,
    KeyRequest,
    UnmaskAnswer,
    lattice_of,
)
from server.exchange import GO_ON, Exchange
from server.secure_sum import MaskedRound, SumDeal

# Dealing is begun anew without clients that were lost on the way, so many times at most.
_ATTEMPTS = 3
# Above this share of the range a sum may have wrapped.
_FULL = 0.75

log = logging.getLogger("visard.server")


class SecureExchange:
    """The secure sums of a run.

    kept: `CoordinatorState.sums`, read and written here. save: puts the state on the disk. After a round `exchange` has its
    figures, bytes_dealt those of the keys dealt in it, both ways, and survivors is how many vectors are in its sum.
    """

    def __init__(
        self,
        exchange: Exchange,
        kept: dict[str, Any],
        heads: dict[str, str],
        training: TrainingConfig,
        save: Callable[[], None],
    ) -> None:
        self._exchange, self._kept, self._heads, self._save = exchange, kept, heads, save
        self._deal_rounds = training.deal_rounds
        self._deal = SumDeal.from_state(kept["deal"]) if kept.get("deal") else None
        self._knows: set[int] = set()  # places that have verified the confirmations
        self._refused: set[int] = set()  # nodes that did not deal
        self._dealt_again: set[int] = set()  # nodes for which keys were dealt anew
        self.bytes_dealt = self.survivors = 0

    def figures(self, privacy: PrivacyConfig) -> dict[str, int]:
        """Of the last round, for its record: its sum has survivors / noise_shares times a trusted curator's variance."""
        return {"survivors": self.survivors, "noise_shares": privacy.noise_shares, "bytes_dealt": self.bytes_dealt}

    def least(self, instructions: RoundInstructions) -> int:
        """Clients that must be connected: all peers before they are known, then the survivors of a sum."""
        return instructions.privacy.survivors if self._kept.get("agreed") else instructions.privacy.peers

    def collect(
        self, instructions: RoundInstructions, nodes: list[int], dimension: int, rounds_left: int
    ) -> torch.Tensor:
        """The noised sum of the survivors' vectors, (d,) float64.

        rounds_left: of the run, this one among them. Raises CohortTooSmall where too few deal or answer, BudgetsSpent where that
        will not change, and RoundVoid where a sum that was to be opened cannot be: its charges stand, and the run goes on with
        the next round.
        """
        self.bytes_dealt = 0
        self._exchange.begin(instructions, len(nodes))
        if not self._kept.get("agreed"):
            self._gather_peers(instructions, nodes)
        self._find_again(instructions, nodes)
        deal = self._deal_for(instructions, nodes, rounds_left)
        survivors = self._kept.get("survivors") if self._kept.get("opening") == instructions.server_round else None
        masked = MaskedRound(deal, instructions.server_round, dimension, survivors, instructions.digest())
        again = self._kept.get("masking") == instructions.server_round
        if not again:
            self._kept["masking"] = instructions.server_round
            self._save()
        self._mask(deal, masked, instructions, dimension)
        try:
            request = masked.close()
        except CohortTooSmall as error:
            self._end_where_spent(deal)
            if again:
                raise RoundVoid(f"round {instructions.server_round} is void: {error}") from error
            raise CohortTooSmall(f"{error} ({self._exchange.reasons()}): start more clients. {GO_ON}") from error
        self._kept |= {"opening": instructions.server_round, "survivors": list(request.survivors)}
        self._save()
        total = self._open(masked, [self._node(place) for place in request.survivors], instructions.server_round)
        lattice = lattice_of(instructions, dimension)
        decoded = lattice.decode(total)
        if lattice.fill(decoded) > _FULL:
            log.warning(
                "round %d: the sum takes %.0f %% of its range and may have wrapped",
                instructions.server_round,
                100 * lattice.fill(decoded),
            )
        self.survivors = len(request.survivors)
        return torch.from_numpy(decoded)

    def _gather_peers(self, instructions: RoundInstructions, nodes: list[int]) -> None:
        """Ask every client for its public peer key, once a run. Owners compare what comes of it: a client that pinned another
        set deals nothing."""
        wanted, keys = instructions.privacy.peers, dict[bytes, int]()
        record = KeyRequest(instructions.run_id).to_record()
        for node, content in self._exchange.ask(dict.fromkeys(nodes, record), instructions.server_round):
            with self._exchange.refusing(node):
                told = KeyAnswer.from_record(content).public_key
                self._exchange.check_peer_key(node, told)
                keys[told] = node
        if len(keys) != wanted:
            heard, rest = sorted(keys.values()), sorted(set(nodes) - set(keys.values()))
            without = f", and not {self._exchange.named(*rest)} ({self._exchange.reasons()})" if rest else ""
            raise CohortTooSmall(
                f"{len(keys)} clients told a peer key ({self._exchange.named(*heard)}{without}), and the run says peers = {wanted}: for "
                f"the first round start all its peers, and stop or revoke every node that is none. {GO_ON}"
            )
        self._kept["peers"] = sorted(key.hex() for key in keys)
        log.info("the peer set is %s: every owner's policy must have this", fingerprint(keys))
        self._save()

    def _find_again(self, instructions: RoundInstructions, nodes: list[int]) -> None:
        """Under Flower's engine a client that comes back is another node: ask those that are not known which peer they are."""
        held = self._kept.get("nodes", {})
        unknown = set(nodes) - set(held.values()) - self._refused
        if self._deal is None or not unknown:
            return
        record = KeyRequest(instructions.run_id).to_record()
        for node, content in self._exchange.ask(dict.fromkeys(unknown, record), instructions.server_round):
            with self._exchange.refusing(node):
                told = KeyAnswer.from_record(content).public_key
                self._exchange.check_peer_key(node, told)
                key = told.hex()
                place = str(self._kept["peers"].index(key) + 1) if key in self._kept["peers"] else ""
                if place in held and held[place] not in nodes:
                    held[place] = node

    def _deal_for(self, instructions: RoundInstructions, nodes: list[int], rounds_left: int) -> SumDeal:
        """The deal that serves this round: the last one, or a new one where it is used up or clients came that are not in it."""
        deal, server_round = self._deal, instructions.server_round
        if deal is not None:
            terms = deal.request
            serves = terms.first_round <= server_round < terms.first_round + terms.rounds
            connected = [place for place in deal.dealers if self._node(place) in nodes]
            enough = len(connected) >= terms.threshold
            if self._kept.get("masking") == server_round:
                # Asked before: whoever has masked it deals no more for it, and sends the same again.
                if not enough:
                    raise RoundVoid(f"round {server_round} is void: {len(connected)} of its dealers are connected")
                return deal
            # Who came, and who lost what was dealt to it: asked once, and not again where that did not help.
            new = set(nodes) - set(self._kept["nodes"].values()) - self._refused
            new |= (set(self._kept.get("lost", [])) & set(nodes)) - self._dealt_again
            if serves and enough and not new:
                return deal
            self._dealt_again |= new
        return self._new_deal(instructions, nodes, min(self._deal_rounds, rounds_left))

    def _new_deal(self, instructions: RoundInstructions, nodes: list[int], rounds: int) -> SumDeal:
        privacy, problem = instructions.privacy, CohortTooSmall("nobody was asked to deal")
        left = list(nodes)
        for _ in range(_ATTEMPTS):
            self._kept["number"] = self._kept.get("number", 0) + 1
            self._kept |= {"deal": None, "nodes": {}, "opening": 0, "masking": 0}
            self._save()  # a number is used once, whatever happens
            request = DealRequest(
                run_id=instructions.run_id,
                deal=self._kept["number"],
                first_round=instructions.server_round,
                rounds=rounds,
                peers=tuple(map(bytes.fromhex, self._kept["peers"])),
                threshold=privacy.survivors,
                colluders=privacy.colluders,
            )
            deal = SumDeal(request)
            try:
                places = self._gather(deal, request, left)
            except CohortTooSmall as error:
                problem = CohortTooSmall(f"{error} ({self._exchange.reasons()}). {GO_ON}")
                # Who died between dealing and telling refuses this number from then on, and deals under the next.
                if "ProtocolError" in self._exchange.refusals:
                    continue
                raise problem from error
            try:
                self._confirm(deal, places)
            except CohortTooSmall as error:
                problem, left = error, [node for place, node in places.items() if place in deal.confirmed]
                continue
            self._refused = set(nodes) - set(places.values())
            self._deal, self._knows = deal, set()
            self._kept |= {
                "agreed": True,
                "lost": [],
                "deal": deal.to_state(),
                "nodes": {str(place): node for place, node in places.items()},
            }
            self._save()
            return deal
        raise problem

    def _gather(self, deal: SumDeal, request: DealRequest, nodes: list[int]) -> dict[int, int]:
        """Ask for keys. Returns the node of each place that dealt."""
        places: dict[int, int] = {}
        record = request.to_record()
        for node, content in self._exchange.ask(dict.fromkeys(nodes, record), request.first_round):
            with self._exchange.refusing(node):
                answer = DealAnswer.from_record(content)
                if answer.place <= len(request.peers):
                    self._exchange.check_peer_key(node, request.peers[answer.place - 1])
                places[deal.add_dealt(answer)] = node
                self.bytes_dealt += answer.num_bytes
        deal.close_dealing()
        return places

    def _confirm(self, deal: SumDeal, places: dict[int, int]) -> None:
        requests = {node: deal.confirm_request(place) for place, node in places.items()}
        self.bytes_dealt += sum(request.num_bytes for request in requests.values())
        records = {node: request.to_record() for node, request in requests.items()}
        for node, content in self._exchange.ask(records, deal.request.first_round):
            with self._exchange.refusing(node):
                answer = ConfirmAnswer.from_record(content)
                if places.get(answer.place) != node:
                    raise MalformedUpdate(f"place {answer.place} is another node's")
                deal.add_confirmed(answer)
                self.bytes_dealt += answer.num_bytes
        deal.close_confirming()

    def _mask(self, deal: SumDeal, masked: MaskedRound, instructions: RoundInstructions, dimension: int) -> None:
        content = instructions.to_record(map(bytes.fromhex, self._heads.values()))
        connected = set(self._exchange.nodes())
        # Where too few are, nobody is left out: who went a moment ago is given the message when it is back.
        wait = sum(self._node(place) in connected for place in deal.dealers) < deal.request.threshold
        records = {}
        for place in deal.dealers:
            if wait or self._node(place) in connected:
                beside = deal.mask_request(place, first=place not in self._knows).to_record()
                records[self._node(place)] = type(content)({**content, **beside})
        places = {self._node(place): place for place in deal.dealers}
        answered: set[int] = set()
        replies = self._exchange.ask(
            records, instructions.server_round, lambda: len(answered) >= deal.request.threshold
        )
        for node, reply in replies:
            with self._exchange.refusing(node):
                update = self._exchange.update_of(reply, instructions, dimension, self._heads)
                if update.place != places[node]:
                    raise MalformedUpdate(f"place {update.place} is another node's")
                masked.add(update.place, update.vector)
                self._knows.add(update.place)
                answered.add(node)
        self._kept["lost"] = sorted(set(records) - answered)

    def _end_where_spent(self, deal: SumDeal) -> None:
        """Raise BudgetsSpent where the dealers with a budget left are too few for a sum, and all together are not."""
        spent = self._exchange.spent
        left = sum(self._node(place) not in spent for place in deal.dealers)
        if left < deal.request.threshold:
            raise BudgetsSpent(
                f"{len(spent)} clients have spent their budgets, {left} of those that dealt are left and survivors is "
                f"{deal.request.threshold}: the run ends with what it has"
            )

    def _open(self, masked: MaskedRound, nodes: list[int], server_round: int) -> np.ndarray:
        record = masked.close().to_record()
        for node, content in self._exchange.ask(dict.fromkeys(nodes, record), server_round):
            with self._exchange.refusing(node):
                masked.add_unmasked(UnmaskAnswer.from_record(content))
            if masked.enough:
                break
        try:
            return masked.total()
        except (CohortTooSmall, MalformedUpdate) as error:
            raise RoundVoid(f"round {server_round} is void: {error} ({self._exchange.reasons()})") from error

    def _node(self, place: int) -> int:
        return int(self._kept["nodes"][str(place)])
