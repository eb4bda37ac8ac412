"""The coordinator's half of the secure sum (Bonawitz et al. 2017, with keys of each round dealt ahead).

    deal = SumDeal(request)                     ask every client deal.request
    place = deal.add_dealt(answer)              ... until enough have answered
    deal.close_dealing()                        ask each dealer deal.confirm_request(place)
    deal.add_confirmed(answer)                  ... until all of them have answered
    deal.close_confirming()                     keep deal.to_state(): from here on a restart goes on

    sums = MaskedRound(deal, server_round, d)   ask each dealer deal.mask_request(place) beside the instructions
    sums.add(place, vector)                     ... as vectors arrive; they are added and dropped
    request = sums.close()                      keep request.survivors, then ask every survivor
    sums.add_unmasked(answer)                   ... until sums.enough, or the time is over
    total = sums.total()

It holds what clients publish and what they seal for one another; a round's shares until its sum is opened; and no client's
secret, but for that moment, in which it rebuilds the survivors' seeds and the mask keys of those that dropped, for that
round. No state that is saved has any of these.

Memory does not grow with the number of clients, but for the keys. Every answer is compared with what was asked:
MalformedUpdate for one that does not fit, and CohortTooSmall where too few answered.
"""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.errors import CheckpointError, CohortTooSmall, MalformedUpdate
from common.privacy.masks import (
    KEY_BYTES,
    add_mask,
    pair_mask_key,
    pair_sign,
    seed_digest,
    self_mask_key,
    transcript,
)
from common.privacy.secret_sharing import SHARE_BYTES, rebuild
from common.secure_messages import (
    ConfirmAnswer,
    ConfirmRequest,
    DealAnswer,
    DealRequest,
    MaskRequest,
    UnmaskAnswer,
    UnmaskRequest,
)


class SumDeal:
    """One deal: who dealt, their public keys, and what they confirmed to one another."""

    def __init__(self, request: DealRequest) -> None:
        self.request = request
        self.dealers: tuple[int, ...] = ()
        self._mask_keys: dict[int, bytes] = {}
        self._seed_digests: dict[int, bytes] = {}
        self._sealed: dict[int, tuple[bytes, ...]] = {}
        self._tags: dict[int, tuple[bytes, ...]] = {}
        self.transcript = b""

    def add_dealt(self, answer: DealAnswer) -> int:
        """Take in a client's deal. Returns its place, which is its own word: a false one is found at the confirmation."""
        size = self.request.rounds * KEY_BYTES
        if self.dealers:
            raise MalformedUpdate(f"deal {self.request.deal} is closed")
        self._check(answer, len(self.request.peers))
        if len(answer.mask_keys) != size or len(answer.sealed) != len(self.request.peers) - 1:
            raise MalformedUpdate(f"a deal of {len(answer.mask_keys)} bytes of keys for {len(answer.sealed)} peers")
        if answer.place in self._mask_keys:
            raise MalformedUpdate(f"place {answer.place} has dealt before")
        self._mask_keys[answer.place] = answer.mask_keys
        self._seed_digests[answer.place] = answer.seed_digests
        self._sealed[answer.place] = answer.sealed
        return answer.place

    def close_dealing(self) -> None:
        """Whoever has dealt is in. Raises CohortTooSmall."""
        if len(self._mask_keys) < self.request.threshold:
            raise CohortTooSmall(
                f"{len(self._mask_keys)} of {len(self.request.peers)} clients dealt keys and the sum needs "
                f"{self.request.threshold}: start more clients and deal anew"
            )
        self.dealers = tuple(sorted(self._mask_keys))
        keys = [self._mask_keys[place] for place in self.dealers]
        self.transcript = transcript(self.request, self.dealers, keys)

    def confirm_request(self, place: int) -> ConfirmRequest:
        """What the dealer at `place` is asked to confirm, with the shares for it."""
        return ConfirmRequest(
            run_id=self.request.run_id,
            deal=self.request.deal,
            dealers=self.dealers,
            mask_keys=tuple(self._mask_keys[dealer] for dealer in self.dealers),
            # A dealer's list leaves out itself: those after it have moved up by one.
            sealed=tuple(self._sealed[d][place - 1 - (place > d)] for d in self.dealers if d != place),
        )

    def add_confirmed(self, answer: ConfirmAnswer) -> None:
        """Take in what a dealer confirms to the others."""
        self._check(answer, len(self.request.peers))
        if answer.place not in self.dealers or answer.place in self._tags:
            raise MalformedUpdate(f"place {answer.place} has not dealt, or has confirmed before")
        if len(answer.tags) != len(self.dealers) - 1:
            raise MalformedUpdate(f"{len(answer.tags)} confirmations for {len(self.dealers) - 1} other dealers")
        self._tags[answer.place] = answer.tags

    @property
    def confirmed(self) -> set[int]:
        """The dealers that have confirmed so far."""
        return set(self._tags)

    def close_confirming(self) -> None:
        """All dealers must have confirmed. Raises CohortTooSmall: then deal anew, with the next number."""
        missing = len(self.dealers) - len(self._tags)
        if missing or not self.dealers:
            raise CohortTooSmall(f"{missing} of {len(self.dealers)} dealers did not confirm: deal anew without them")
        self._sealed = {}

    def mask_request(self, place: int, *, first: bool) -> MaskRequest:
        """What goes along with a masked round's instructions to `place`. first: with the confirmations, which each client
        needs once."""
        tags = [self._tags[d][_entry(self.dealers, d, place)] for d in self.dealers if d != place]
        return MaskRequest(self.request.deal, tuple(tags) if first else ())

    def mask_key(self, place: int, server_round: int) -> bytes:
        """A dealer's public mask key of a round."""
        return _of_round(self._mask_keys[place], self.request.index(server_round))

    def seed_digest(self, place: int, server_round: int) -> bytes:
        """The digest of a dealer's seed of a round."""
        return _of_round(self._seed_digests[place], self.request.index(server_round))

    def to_state(self) -> dict[str, Any]:
        """All of a confirmed deal, for a JSON file. Public but for the confirmations, which open nothing."""
        request = self.request
        return {
            "run_id": request.run_id,
            "deal": request.deal,
            "first_round": request.first_round,
            "rounds": request.rounds,
            "peers": [peer.hex() for peer in request.peers],
            "threshold": request.threshold,
            "colluders": request.colluders,
            "dealers": list(self.dealers),
            "mask_keys": [self._mask_keys[place].hex() for place in self.dealers],
            "seed_digests": [self._seed_digests[place].hex() for place in self.dealers],
            "tags": [b"".join(self._tags[place]).hex() for place in self.dealers],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """The inverse of `to_state`. Raises CheckpointError for what it did not write."""
        try:
            names = "run_id", "deal", "first_round", "rounds", "threshold", "colluders"
            peers = tuple(bytes.fromhex(peer) for peer in state["peers"])
            deal = cls(DealRequest(**{name: state[name] for name in names}, peers=peers))
            for i, place in enumerate(state["dealers"]):
                deal._mask_keys[place] = bytes.fromhex(state["mask_keys"][i])
                deal._seed_digests[place] = bytes.fromhex(state["seed_digests"][i])
            deal.close_dealing()
            for i, place in enumerate(state["dealers"]):
                tags = bytes.fromhex(state["tags"][i])
                cut = tuple(_of_round(tags, k) for k in range(len(tags) // KEY_BYTES))
                deal.add_confirmed(ConfirmAnswer(deal.request.run_id, deal.request.deal, place, cut))
            deal.close_confirming()
        except (ValueError, KeyError, TypeError, IndexError, MalformedUpdate, CohortTooSmall) as error:
            raise CheckpointError(f"the saved deal cannot be read ({error}): remove it, and deal anew") from error
        return deal

    def _check(self, answer: DealAnswer | ConfirmAnswer, peers: int) -> None:
        asked = self.request.run_id, self.request.deal
        if (answer.run_id, answer.deal) != asked or answer.place > peers:
            raise MalformedUpdate(f"an answer from place {answer.place} to deal {answer.deal}, not to deal {asked[1]}")


class MaskedRound:
    """One round's sum. asked: digest of its instructions, to which masks are bound. survivors: of a round whose request to unmask
    was sent before a restart; no others are added then.
    """

    def __init__(
        self,
        deal: SumDeal,
        server_round: int,
        dimension: int,
        survivors: Iterable[int] | None = None,
        asked: str = "",
    ) -> None:
        deal.request.index(server_round)
        self._deal = deal
        self._round = server_round
        self._asked = asked
        self._sum = np.zeros(dimension, np.uint32)
        self._wanted = set(deal.dealers if survivors is None else survivors)
        self._fixed = survivors is not None
        self._added: set[int] = set()
        self._request: UnmaskRequest | None = None
        self._answers: dict[int, bytes] = {}

    def add(self, place: int, vector: np.ndarray) -> None:
        """Add a masked vector, (d,) uint32. One that comes after `close`, or twice, is refused."""
        if self._request is not None:
            raise MalformedUpdate(f"a vector for round {self._round} from place {place} came late")
        if place not in self._wanted or place in self._added:
            raise MalformedUpdate(f"place {place} is not waited for in round {self._round}, or has answered before")
        if vector.dtype != np.uint32 or vector.shape != self._sum.shape:
            raise MalformedUpdate(f"a vector of {vector.dtype} and shape {vector.shape}: want uint32 {self._sum.shape}")
        self._sum += vector
        self._added.add(place)

    def close(self) -> UnmaskRequest:
        """Whoever was added survives: what every survivor is asked. Raises CohortTooSmall."""
        if self._request is None:
            threshold = self._deal.request.threshold
            if len(self._added) < threshold or (self._fixed and self._added != self._wanted):
                needed = len(self._wanted) if self._fixed else threshold
                raise CohortTooSmall(
                    f"round {self._round}: {len(self._added)} masked vectors came in time and the sum needs {needed}; the "
                    "round is void"
                )
            survivors = tuple(sorted(self._added))
            dropped = tuple(place for place in self._deal.dealers if place not in self._added)
            terms = self._deal.request
            self._request = UnmaskRequest(terms.run_id, terms.deal, self._round, survivors, dropped)
        return self._request

    def add_unmasked(self, answer: UnmaskAnswer) -> None:
        """Take in a survivor's shares."""
        asked = self.close()
        if (answer.run_id, answer.server_round) != (asked.run_id, asked.server_round):
            raise MalformedUpdate(f"shares for round {answer.server_round}, not for round {asked.server_round}")
        if answer.place not in asked.survivors or answer.place in self._answers:
            raise MalformedUpdate(f"place {answer.place} does not survive, or has answered before")
        if len(answer.shares) != len(self._deal.dealers) * SHARE_BYTES:
            raise MalformedUpdate(f"{len(answer.shares)} bytes of shares for {len(self._deal.dealers)} dealers")
        self._answers[answer.place] = answer.shares

    @property
    def enough(self) -> bool:
        """Whether the shares that came open the sum. More are compared with these, so that a wrong one shows."""
        return len(self._answers) >= self._deal.request.threshold

    def total(self) -> np.ndarray:
        """The sum of the survivors' vectors modulo 2^32, (d,) uint32; once.

        Raises CohortTooSmall with too few answers, MalformedUpdate where their shares open something else than was dealt:
        then the round is void.
        """
        asked, threshold = self.close(), self._deal.request.threshold
        if not self.enough:
            raise CohortTooSmall(
                f"round {self._round}: {len(self._answers)} survivors helped to unmask and the sum needs {threshold}; the "
                "round is void"
            )
        answers, self._answers = self._answers, {}
        try:
            secrets = dict(zip(self._deal.dealers, rebuild(answers, threshold), strict=True))
            self._take_self_masks(secrets, asked.survivors)
            self._take_pair_masks(secrets, asked)
        except ValueError as error:
            raise MalformedUpdate(f"round {self._round}: {error}; the round is void") from error
        return self._sum

    def _take_self_masks(self, seeds: dict[int, bytes], survivors: tuple[int, ...]) -> None:
        for place in survivors:
            if seed_digest(seeds[place]) != self._deal.seed_digest(place, self._round):
                raise ValueError(f"the seed of place {place} is not the one that was dealt")
            add_mask(self._sum, self_mask_key(seeds[place], self._deal.transcript, self._round, place), -1)

    def _take_pair_masks(self, keys: dict[int, bytes], asked: UnmaskRequest) -> None:
        """The masks that survivors share with those that dropped: no vector came in which they would cancel."""
        for place in asked.dropped:
            key = X25519PrivateKey.from_private_bytes(keys[place])
            if key.public_key().public_bytes_raw() != self._deal.mask_key(place, self._round):
                raise ValueError(f"the mask key of place {place} is not the one that was dealt")
            for survivor in asked.survivors:
                public_key = self._deal.mask_key(survivor, self._round)
                shared = pair_mask_key(
                    key, public_key, self._deal.transcript, self._round, (place, survivor), self._asked
                )
                add_mask(self._sum, shared, -pair_sign(survivor, place))


def _entry(dealers: tuple[int, ...], sender: int, receiver: int) -> int:
    """Where in a sender's list for the other dealers the receiver's entry stands."""
    return [dealer for dealer in dealers if dealer != sender].index(receiver)


def _of_round(blob: bytes, index: int) -> bytes:
    return blob[index * KEY_BYTES : (index + 1) * KEY_BYTES]
