"""A client's half of the secure sum (Bonawitz et al. 2017, with keys of each round dealt ahead).

Claim, for an honest client whose policy pins the peer set: the coordinator and `colluders` clients learn of its vector of a
round at most one sum, which holds the vectors of `common.privacy.secret_sharing.honest_shares` honest clients or more.
What it rests on is checked here, whatever the coordinator says:

- the peers are those whose fingerprint is pinned, and the threshold is high enough for them;
- vectors of clients that were asked different things in a round are not in one sum: their masks do not cancel;
- no vector leaves before every dealer has confirmed that it sees the same dealers and the same keys;
- a round is masked once, in ascending order, with keys and a seed that serve that round alone and are then deleted;
- of a masked round one request to unmask is answered, the latest round's only: never both secrets of one client, none for
  fewer than `threshold` survivors, and none where this client is not a survivor itself.

It knows nothing of faces. The state is on the disk before an answer leaves.
"""

import hmac
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from client.secret_store import Held, RunState, SecretStore
from common.errors import PrivacyError, ProtocolError
from common.privacy.masks import (
    KEY_BYTES,
    MAX_ROUNDS_AHEAD,
    DealTerms,
    add_mask,
    agree,
    context,
    derive,
    digest,
    fingerprint,
    pair_mask_key,
    pair_sign,
    seal,
    seed_digest,
    self_mask_key,
    transcript,
    unseal,
)
from common.privacy.secret_sharing import SHARE_BYTES, split
from common.secure_messages import (
    PAIR_BYTES,
    ConfirmAnswer,
    ConfirmRequest,
    DealAnswer,
    DealRequest,
    UnmaskAnswer,
    UnmaskRequest,
)


class SecureSum:
    """What one client does for secure sums. All methods raise ProtocolError or PrivacyError, and then give nothing.

    folder: where secrets are kept between messages. key: the peer key. pinned: fingerprint of the peer set, from the owner's
    policy. max_rounds: most rounds that one deal may serve.
    """

    def __init__(self, folder: Path, key: X25519PrivateKey, pinned: str, *, max_rounds: int = MAX_ROUNDS_AHEAD) -> None:
        self._store = SecretStore(folder, key)
        self._key = key
        self._pinned = pinned
        self._max_rounds = max_rounds

    @property
    def public_key(self) -> bytes:
        """This client among the peers: 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def deal(self, request: DealRequest) -> DealAnswer:
        """Make keys and seeds for the rounds asked for, and shares of them; those of an earlier deal are gone then."""
        place = self._place(request)
        if request.rounds > self._max_rounds:
            raise ProtocolError(f"a deal for {request.rounds} rounds; this owner's limit is {self._max_rounds}")
        with self._store.opened(request.run_id) as state:
            if request.deal <= state.deal:
                raise ProtocolError(f"deal {request.deal}: deal {state.deal} of this run was answered before")
            if request.first_round <= state.masked_round:
                raise ProtocolError(f"a deal from round {request.first_round}: {state.masked_round} was masked before")
            keys = [X25519PrivateKey.generate() for _ in range(request.rounds)]
            secrets = [secret for key in keys for secret in (key.private_bytes_raw(), os.urandom(KEY_BYTES))]
            mask_keys = b"".join(key.public_key().public_bytes_raw() for key in keys)
            shares = split(secrets, request.threshold, len(request.peers))
            state.deal = request.deal
            state.held = Held(
                terms=request,
                place=place,
                kept_from=request.first_round,
                own=b"".join(secrets),
                mask_keys={place: mask_keys},
                shares={place: shares[place - 1]},
            )
            others = [other for other in request.places if other != place]
            sealed = [
                seal(
                    self._channel(request, other),
                    shares[other - 1],
                    _shares_context(request, mask_keys, place, other),
                )
                for other in others
            ]
            self._store.save(state)
            self._store.forget_old_runs()
        seeds = b"".join(seed_digest(seed) for seed in secrets[1::2])
        return DealAnswer(request.run_id, request.deal, place, mask_keys, seeds, tuple(sealed))

    def confirm(self, request: ConfirmRequest) -> ConfirmAnswer:
        """Take in what the others dealt, and tell each of them what was seen. Asked the same again, the answer is the same."""
        with self._store.opened(request.run_id) as state:
            held = _held(state, request.deal)
            terms, place = held.terms, held.place
            others = [other for other in request.dealers if other != place]
            if len(others) == len(request.dealers) or request.dealers[-1] > len(terms.peers):
                raise PrivacyError("the dealers are not of the cohort, or this client is not among them")
            if len(request.dealers) < terms.threshold:
                raise PrivacyError(f"{len(request.dealers)} dealers are fewer than the threshold, {terms.threshold}")
            seen = transcript(terms, request.dealers, request.mask_keys)
            if not held.transcript:
                self._take_in(held, request, others)
                held.dealers, held.transcript = request.dealers, seen
                self._store.save(state)
            elif held.transcript != seen:
                raise PrivacyError(f"deal {request.deal} was confirmed with other dealers or keys")
            tags = tuple(self._tag(held, place, other) for other in others)
        return ConfirmAnswer(request.run_id, request.deal, place, tags)

    def check(self, run_id: str, server_round: int, deal: int, confirmations: Sequence[bytes]) -> tuple[int, DealTerms]:
        """This client's place and the terms of the deal, where it could mask this round or has; changes nothing."""
        with self._store.opened(run_id) as state:
            held = self._ready(state, server_round, deal, confirmations)
            return held.place, held.terms

    def mask(
        self,
        run_id: str,
        server_round: int,
        deal: int,
        confirmations: Sequence[bytes],
        vector: np.ndarray,
        asked: str = "",
    ) -> np.ndarray:
        """The masked vector of a round, (d,) uint32, once: keep it, for the same round is not masked again.

        vector: (d,) uint32. asked: digest of the round's instructions, on which the noise in the vector depends.
        confirmations: the other dealers' tags in order; may be empty once they were verified.
        """
        if vector.dtype != np.uint32 or vector.ndim != 1 or not len(vector):
            raise ProtocolError(f"a vector of {vector.dtype} and shape {vector.shape}: want uint32 and one dimension")
        with self._store.opened(run_id) as state:
            held = self._ready(state, server_round, deal, confirmations)
            if server_round <= state.masked_round:
                raise PrivacyError(f"round {server_round}: round {state.masked_round} of this run was masked before")
            held.agreed = True
            key, seed = held.use(server_round)
            masks = _masks(held, key, seed, asked)
            state.masked_round = server_round
            self._store.save(state)
        masked = vector.copy()
        for mask_key, sign in masks:
            add_mask(masked, mask_key, sign)
        return masked

    def unmask(self, request: UnmaskRequest) -> UnmaskAnswer:
        """The shares that open a round's sum: of the survivors' seeds, and of the mask keys of those that dropped."""
        with self._store.opened(request.run_id) as state:
            held = _held(state, request.deal)
            if not request.server_round == state.masked_round == held.kept_from:
                raise PrivacyError(f"round {request.server_round} is not the round that was masked last")
            self._place(held.terms)  # another set may have been pinned since
            if request.dealers != held.dealers:
                raise PrivacyError("survivors and dropped are not all who dealt, or others are among them")
            if len(request.survivors) < held.terms.threshold:
                raise PrivacyError(
                    f"{len(request.survivors)} survivors are fewer than the threshold, {held.terms.threshold}"
                )
            if held.place not in request.survivors:
                raise PrivacyError("this client masked the round and is not among the survivors")
            if held.unmasked and held.unmasked != request.digest:
                raise PrivacyError(f"round {request.server_round} was unmasked with other survivors")
            if not held.unmasked:
                held.unmasked = request.digest
                self._store.save(state)
            survivors = set(request.survivors)
            shares = [_share(held.shares[place], seed=place in survivors) for place in held.dealers]
        return UnmaskAnswer(request.run_id, request.server_round, held.place, b"".join(shares))

    def _ready(self, state: RunState, server_round: int, deal: int, confirmations: Sequence[bytes]) -> Held:
        held = _held(state, deal)
        self._place(held.terms)
        if not held.transcript:
            raise PrivacyError(f"deal {deal} was not confirmed by this client")
        try:
            held.terms.index(server_round)
        except ValueError as error:
            raise ProtocolError(f"deal {deal} does not serve this round: {error}") from error
        if confirmations or not held.agreed:
            self._verify(held, confirmations)
        return held

    def _place(self, terms: DealTerms) -> int:
        found = fingerprint(terms.peers)
        if not hmac.compare_digest(found, self._pinned):
            raise PrivacyError(
                f"the peer set {found} is not the pinned {self._pinned}: compare it with the other owners"
            )
        if self.public_key not in terms.peers:
            raise PrivacyError("this client's key is not in the peer set")
        return terms.peers.index(self.public_key) + 1

    def _channel(self, terms: DealTerms, other: int) -> bytes:
        """What this client and another know alone, for as long as their peer keys last."""
        try:
            return agree(self._key, terms.peers[other - 1])
        except ValueError as error:
            raise PrivacyError(f"the peer key of place {other}: {error}") from error

    def _take_in(self, held: Held, request: ConfirmRequest, others: list[int]) -> None:
        """Check what the others dealt and keep it."""
        mask_keys = dict(zip(request.dealers, request.mask_keys, strict=True))
        if mask_keys[held.place] != held.mask_keys[held.place]:
            raise PrivacyError("other mask keys than this client dealt")
        every = {keys[i : i + KEY_BYTES] for keys in request.mask_keys for i in range(0, len(keys), KEY_BYTES)}
        if len(every) != len(request.dealers) * held.terms.rounds:
            raise PrivacyError("a mask key is dealt twice")
        shares = {held.place: held.shares[held.place]}
        for other, sealed in zip(others, request.sealed, strict=True):
            about = _shares_context(held.terms, mask_keys[other], other, held.place)
            try:
                shares[other] = unseal(self._channel(held.terms, other), sealed, about)
            except ValueError as error:
                raise PrivacyError(f"the shares from place {other}: {error}") from error
        held.mask_keys = mask_keys
        held.shares = {place: shares[place] for place in request.dealers}

    def _tag(self, held: Held, sender: int, receiver: int) -> bytes:
        """What convinces `receiver` that `sender` saw this transcript; one of them is this client."""
        other = receiver if sender == held.place else sender
        return derive(self._channel(held.terms, other), context("confirmation", held.transcript, sender, receiver))

    def _verify(self, held: Held, confirmations: Sequence[bytes]) -> None:
        others = [other for other in held.dealers if other != held.place]
        if len(confirmations) != len(others):
            raise PrivacyError(f"{len(confirmations)} confirmations of {len(others)} other dealers")
        for other, tag in zip(others, confirmations, strict=True):
            if not hmac.compare_digest(tag, self._tag(held, other, held.place)):
                raise PrivacyError(f"place {other} has not confirmed what this client has")


def _held(state: RunState, deal: int) -> Held:
    if state.held is None or state.held.terms.deal != deal:
        raise ProtocolError(f"deal {deal} is not held here: the last of this run was deal {state.deal}")
    return state.held


def _shares_context(terms: DealTerms, mask_keys: bytes, sender: int, receiver: int) -> bytes:
    """What sealed shares are bound to: the deal, the way, and the sender's mask keys, so that none can be swapped."""
    return context("shares", terms.digest, sender, receiver, digest("mask keys", mask_keys))


def _masks(held: Held, key: X25519PrivateKey, seed: bytes, asked: str) -> list[tuple[bytes, int]]:
    """Keys and signs of this client's masks in round `kept_from`."""
    server_round, place = held.kept_from, held.place
    masks = [(self_mask_key(seed, held.transcript, server_round, place), 1)]
    for other in held.dealers:
        if other == place:
            continue
        try:
            shared = pair_mask_key(
                key, held.mask_keys[other][:KEY_BYTES], held.transcript, server_round, (place, other), asked
            )
        except ValueError as error:
            raise PrivacyError(f"the mask key of place {other}: {error}") from error
        masks.append((shared, pair_sign(place, other)))
    return masks


def _share(pairs: bytes, *, seed: bool) -> bytes:
    """Of a dealer's shares of a round, the one of its seed or the one of its mask key."""
    return pairs[SHARE_BYTES:PAIR_BYTES] if seed else pairs[:SHARE_BYTES]
