"""Keys and masks of the secure sum (Bonawitz et al. 2017): what both halves of the protocol must compute alike.

Claim: whoever lacks a client's self-mask seed, or lacks both mask keys of some pair that it is in, sees its masked vector
as uniform noise modulo 2^32, as far as X25519 (RFC 7748), HKDF-SHA256 (RFC 5869) and AES-256 in counter mode hold.

Every key is derived under a context: what it is for and which deal, round and clients it belongs to, each part with
its type and length, so that no two uses share one. Each of a vector's words takes the next four bytes of the stream.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.privacy.secret_sharing import check_threshold

KEY_BYTES = 32
# What sealing adds: the salt and the tag.
SEAL_BYTES = KEY_BYTES + 16
MAX_ROUND = 10**8
MAX_PEERS, MAX_ROUNDS_AHEAD = 1000, 1000
# Peers squared times rounds: the coordinator passes on 66 bytes for each, once a deal.
MAX_DEALT = 10**7

_DOMAIN = b"visard secure sum 1\n"
_TYPES = {bytes: b"b", str: b"s", int: b"i"}
# 256 KiB at a time stay in a core's cache.
_CHUNK_WORDS = 1 << 16
_ZEROS = memoryview(bytes(4 * _CHUNK_WORDS))


def context(purpose: str, *parts: bytes | str | int) -> bytes:
    """An unambiguous text of a purpose and what it concerns: other parts never give the same. Integers from 0 to 2^64."""
    packed = [_DOMAIN]
    for part in (purpose, *parts):
        content = part.to_bytes(8, "big") if isinstance(part, int) else part.encode() if isinstance(part, str) else part
        packed += [_TYPES[type(part)], len(content).to_bytes(8, "big"), content]
    return b"".join(packed)


def digest(purpose: str, *parts: bytes | str | int) -> bytes:
    """SHA-256 of a `context`."""
    return hashlib.sha256(context(purpose, *parts)).digest()


def derive(secret: bytes, about: bytes, salt: bytes = b"") -> bytes:
    """A 32-byte key for one context (HKDF-SHA256)."""
    return HKDF(SHA256(), KEY_BYTES, salt, about).derive(secret)


def agree(key: X25519PrivateKey, public_key: bytes) -> bytes:
    """What two key holders alone know. Raises ValueError for a public key of low order, whose secret everybody knows."""
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError as error:
        raise ValueError("a public key of low order, or of another length than 32 bytes") from error


def seal(secret: bytes, content: bytes, about: bytes) -> bytes:
    """Encrypt and authenticate `content` with AES-256-GCM under a key of its own (fresh salt); `about` is bound to it."""
    salt = os.urandom(KEY_BYTES)
    return salt + AESGCM(derive(secret, about, salt)).encrypt(bytes(12), content, about)


def unseal(secret: bytes, sealed: bytes, about: bytes) -> bytes:
    """The content that was sealed with this secret about this. Raises ValueError for anything else."""
    if len(sealed) < SEAL_BYTES:
        raise ValueError(f"{len(sealed)} bytes are too few for anything sealed")
    salt, rest = sealed[:KEY_BYTES], sealed[KEY_BYTES:]
    try:
        return AESGCM(derive(secret, about, salt)).decrypt(bytes(12), rest, about)
    except InvalidTag as error:
        raise ValueError("it was not sealed with this key about this") from error


def fingerprint(peers: Iterable[bytes]) -> str:
    """What operators compare out of band: 64 hex digits that name a set of peer keys, whatever their order."""
    return digest("peers", *sorted(peers)).hex()


@dataclass(frozen=True)
class DealTerms:
    """What the keys of a deal are bound to. All public.

    deal: number of the deal in its run, from 1. first_round, rounds: it serves this many rounds from this one. peers: the
    X25519 public keys of the whole cohort, ascending; a client's *place* is its position here, from 1, and the x of its
    shares. threshold: least survivors for which a sum is released. colluders: clients that may work with the coordinator.

    Raises ValueError where a value is out of range, peers are not sorted and distinct, or the threshold is too low.
    """

    run_id: str
    deal: int
    first_round: int
    rounds: int
    peers: tuple[bytes, ...]
    threshold: int
    colluders: int

    def __post_init__(self) -> None:
        check_run_id(self.run_id)
        within("deal", self.deal, 1, MAX_ROUND)
        within("rounds", self.rounds, 1, MAX_ROUNDS_AHEAD)
        within("first_round", self.first_round, 1, MAX_ROUND - self.rounds + 1)
        within("the number of peers", len(self.peers), 2, MAX_PEERS)
        within("peers squared times rounds", len(self.peers) ** 2 * self.rounds, 1, MAX_DEALT)
        if any(len(peer) != KEY_BYTES for peer in self.peers) or list(self.peers) != sorted(set(self.peers)):
            raise ValueError("peers are not distinct keys of 32 bytes in ascending order")
        check_threshold(len(self.peers), self.threshold, self.colluders)

    @property
    def places(self) -> range:
        """All places."""
        return range(1, len(self.peers) + 1)

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 over every field."""
        numbers = self.deal, self.first_round, self.rounds, self.threshold, self.colluders
        return digest("deal", self.run_id, *numbers, fingerprint(self.peers))

    def index(self, server_round: int) -> int:
        """Which of the deal's rounds this is, from 0. Raises ValueError for none of them."""
        within("server_round", server_round, self.first_round, self.first_round + self.rounds - 1)
        return server_round - self.first_round


def check_run_id(run_id: str) -> None:
    """Raises ValueError for anything but 32 hex digits."""
    if len(run_id) != 32 or not set(run_id) <= set("0123456789abcdef"):
        raise ValueError("run_id is not 32 hex digits")


def within(name: str, value: int, low: int, high: int) -> None:
    """Raises ValueError for a value outside low..high."""
    if not low <= value <= high:
        raise ValueError(f"{name} = {value} is outside {low}..{high}")


def transcript(terms: DealTerms, dealers: Sequence[int], mask_keys: Sequence[bytes]) -> bytes:
    """SHA-256 over all that honest clients must have seen alike: the terms, who dealt, and every public mask key."""
    return digest("transcript", terms.digest, len(dealers), *dealers, *mask_keys)


def seed_digest(seed: bytes) -> bytes:
    """By which the coordinator knows that it has rebuilt the right seed; of a random seed it tells nothing."""
    return digest("seed", seed)


def self_mask_key(seed: bytes, deal_transcript: bytes, server_round: int, place: int) -> bytes:
    """The key of a client's own mask in a round."""
    return derive(seed, context("self mask", deal_transcript, server_round, place))


def pair_mask_key(
    key: X25519PrivateKey,
    public_key: bytes,
    deal_transcript: bytes,
    server_round: int,
    places: tuple[int, int],
    asked: str = "",
) -> bytes:
    """The key of the mask that two clients share in a round, from one's mask key and the other's public one.

    `places` in either order. asked: digest of all that the round asks: between clients that were asked different things, with
    less noise say, masks do not cancel, and no sum of theirs opens. Raises ValueError as `agree` does.
    """
    about = context("pair mask", deal_transcript, server_round, min(places), max(places), asked)
    return derive(agree(key, public_key), about)


def pair_sign(place: int, other: int) -> int:
    """With which sign `place` takes the mask that it shares with `other`: theirs cancel."""
    return 1 if place < other else -1


def add_mask(vector: np.ndarray, key: bytes, sign: int = 1) -> None:
    """Add the mask of a key to `vector` (d,) uint32, modulo 2^32 and in place; sign -1 takes it away. A key serves once."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    buffer = bytearray(4 * min(len(vector), _CHUNK_WORDS) + 15)
    for start in range(0, len(vector), _CHUNK_WORDS):
        part = vector[start : start + _CHUNK_WORDS]
        stream.update_into(_ZEROS[: 4 * len(part)], buffer)
        words = np.frombuffer(buffer, "<u4", len(part))
        if sign > 0:
            part += words
        else:
            part -= words
