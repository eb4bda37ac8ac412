"""Masks and keys against their plainest forms, and that no two uses share a key."""

import dataclasses
import hashlib
import hmac
import os
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from common.privacy.masks import (
    KEY_BYTES,
    SEAL_BYTES,
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
from tests.support import RUN_ID

PEERS = tuple(sorted(hashlib.sha256(bytes([i])).digest() for i in range(5)))
TERMS = DealTerms(RUN_ID, 2, 10, 4, PEERS, 4, 1)
# Points of order 1, 2, 4 and 8 of Curve25519 and its twist, some spelt in two ways (RFC 7748, section 6.1).
P = 2**255 - 19
ORDER_EIGHT = 325606250916557431795983626356110631294008115727848805560023387167927233504
LOW_ORDER = [number.to_bytes(32, "little") for number in (0, 1, ORDER_EIGHT, P - 1, P, P + 1)]


def keystream(key: bytes, words: int) -> np.ndarray:
    """AES on the counter, block by block."""
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = (4 * words + 15) // 16
    stream = b"".join(block.update(i.to_bytes(16, "big")) for i in range(blocks))
    return np.array([int.from_bytes(stream[4 * i : 4 * i + 4], "little") for i in range(words)], np.uint32)


@pytest.mark.parametrize("words", [1, 3, 4, 5, 1000, 65535, 65536, 65537, 140_000])
def test_a_mask_is_the_key_s_stream(words: int) -> None:
    key = os.urandom(32)
    vector = np.zeros(words, np.uint32)
    add_mask(vector, key)
    np.testing.assert_array_equal(vector[-1000:], keystream(key, words)[-1000:])
    np.testing.assert_array_equal(vector[:1000], keystream(key, words)[:1000])


def test_masks_are_added_and_taken_away_modulo_2_to_the_32() -> None:
    rng = np.random.default_rng(0)
    start = rng.integers(0, 2**32, 70_000, dtype=np.uint32)
    key, vector = os.urandom(32), start.copy()
    add_mask(vector, key)
    wide = start.astype(np.uint64) + keystream(key, len(start))
    assert (wide >= 2**32).any()
    np.testing.assert_array_equal(vector, (wide % 2**32).astype(np.uint32))
    add_mask(vector, key, -1)
    np.testing.assert_array_equal(vector, start)
    assert vector.dtype == np.uint32


def test_a_mask_of_nothing() -> None:
    add_mask(np.zeros(0, np.uint32), bytes(32))


def test_masks_are_uniform_and_differ_by_key() -> None:
    one, other = np.zeros(200_000, np.uint32), np.zeros(200_000, np.uint32)
    add_mask(one, os.urandom(32))
    add_mask(other, os.urandom(32))
    for words in (one, other, one - other):
        counts = np.bincount(words.view(np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
        assert stats.kstest(words[:20_000] / 2**32, "uniform").pvalue > 1e-6


def test_derived_keys_are_hkdf_s() -> None:
    """RFC 5869 in three lines."""
    secret, about, salt = os.urandom(32), b"what for", os.urandom(32)
    for given in (b"", salt):
        extracted = hmac.digest(given or bytes(32), secret, "sha256")
        assert derive(secret, about, given) == hmac.digest(extracted, about + b"\x01", "sha256")


def test_contexts_never_run_into_one_another() -> None:
    parts: list[tuple[Any, ...]] = [
        ("a", "b"),
        ("ab",),
        ("a", b"b"),
        ("a", "b", ""),
        ("a", "", "b"),
        ("a", 1),
        ("a", "1"),
        ("a", (1).to_bytes(8, "big")),
        ("a", 1, 2),
        ("a", 258),
        ("a",),
        ("a", b""),
    ]
    assert len({context(*given) for given in parts}) == len(parts)
    assert len({digest(*given) for given in parts}) == len(parts)
    with pytest.raises(OverflowError):
        context("a", -1)


def test_two_key_holders_agree_and_a_third_does_not() -> None:
    a, b, c = (X25519PrivateKey.generate() for _ in range(3))
    shared = agree(a, b.public_key().public_bytes_raw())
    assert shared == agree(b, a.public_key().public_bytes_raw())
    assert shared != agree(c, a.public_key().public_bytes_raw())


@pytest.mark.parametrize("public_key", [*LOW_ORDER, bytes(31), bytes(33), b""])
def test_public_keys_whose_secret_everybody_knows_are_refused(public_key: bytes) -> None:
    with pytest.raises(ValueError, match="low order"):
        agree(X25519PrivateKey.generate(), public_key)


def test_what_is_sealed_is_opened_by_its_secret_and_context_only() -> None:
    secret, content = os.urandom(32), os.urandom(100)
    sealed = seal(secret, content, b"about")
    assert len(sealed) == len(content) + SEAL_BYTES
    assert unseal(secret, sealed, b"about") == content
    assert content not in sealed
    assert seal(secret, content, b"about")[:KEY_BYTES] != sealed[:KEY_BYTES]
    for at in range(len(sealed)):
        changed = bytearray(sealed)
        changed[at] ^= 1
        with pytest.raises(ValueError, match="not sealed"):
            unseal(secret, bytes(changed), b"about")
    for wrong in (
        (os.urandom(32), sealed, b"about"),
        (secret, sealed, b"About"),
        (secret, sealed[:-1], b"about"),
        (secret, sealed + b"x", b"about"),
        (secret, sealed[: SEAL_BYTES - 1], b"about"),
        (secret, b"", b"about"),
    ):
        with pytest.raises(ValueError, match="sealed"):
            unseal(*wrong)
    assert unseal(secret, seal(secret, b"", b""), b"") == b""


def test_a_fingerprint_names_a_set() -> None:
    name = fingerprint(PEERS)
    assert len(name) == 64
    assert fingerprint(reversed(PEERS)) == name
    others = [PEERS[1:], (*PEERS, bytes(32)), (*PEERS, PEERS[0]), (PEERS[0] + PEERS[1], *PEERS[2:]), ()]
    assert len({name, *(fingerprint(peers) for peers in others)}) == 1 + len(others)


CHANGES: dict[str, dict[str, Any]] = {
    "run_id": {"run_id": "f" * 32},
    "deal": {"deal": 3},
    "first_round": {"first_round": 11},
    "rounds": {"rounds": 5},
    "peers": {"peers": (*PEERS[:4], b"\xff" * 32)},
    "threshold": {"threshold": 5},
    "colluders": {"colluders": 2},
}


def test_every_field_of_a_deal_is_in_its_digest() -> None:
    assert set(CHANGES) == {f.name for f in dataclasses.fields(DealTerms)}
    changed = [dataclasses.replace(TERMS, **change) for change in CHANGES.values()]
    assert len({TERMS.digest, *(terms.digest for terms in changed)}) == 1 + len(changed)


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": "A" * 32},
        {"run_id": "0" * 31},
        {"run_id": "../" * 10 + "ab"},
        {"deal": 0},
        {"deal": 10**9},
        {"first_round": 0},
        {"first_round": 10**8 - 2},
        {"rounds": 0},
        {"rounds": -1},
        {"rounds": 1001},
        {"rounds": 10**9},
        {"peers": ()},
        {"peers": PEERS[:1], "threshold": 1, "colluders": 0},
        {"peers": PEERS[::-1]},
        {"peers": (PEERS[0], *PEERS[:4])},
        {"peers": (*PEERS[:4], b"\xff" * 31)},
        {"peers": tuple(i.to_bytes(32, "big") for i in range(1001)), "rounds": 1, "threshold": 1000},
        {"peers": tuple(i.to_bytes(32, "big") for i in range(1000)), "rounds": 11, "threshold": 1000},
        {"threshold": 3},
        {"threshold": 6},
        {"colluders": 0},
        {"colluders": 3},
    ],
    ids=str,
)
def test_terms_out_of_range_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        dataclasses.replace(TERMS, **change)


def test_the_rounds_that_a_deal_serves() -> None:
    assert [TERMS.index(server_round) for server_round in range(10, 14)] == [0, 1, 2, 3]
    for server_round in (9, 14, 0, -1):
        with pytest.raises(ValueError, match="server_round"):
            TERMS.index(server_round)


def test_a_transcript_holds_the_dealers_and_all_their_keys() -> None:
    keys = [bytes([i]) * 128 for i in range(4)]
    seen = [
        transcript(TERMS, (1, 2, 3, 4), keys),
        transcript(TERMS, (1, 2, 3, 5), keys),
        transcript(TERMS, (1, 2, 3, 4), keys[::-1]),
        transcript(TERMS, (1, 2, 3, 4), [*keys[:3], bytes([3]) * 127 + b"x"]),
        transcript(dataclasses.replace(TERMS, deal=3), (1, 2, 3, 4), keys),
    ]
    assert len(set(seen)) == len(seen)


def test_pair_masks_cancel_and_serve_one_pair_and_round() -> None:
    a, b = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    publics = a.public_key().public_bytes_raw(), b.public_key().public_bytes_raw()
    at_a = pair_mask_key(a, publics[1], b"t" * 32, 7, (2, 5))
    at_b = pair_mask_key(b, publics[0], b"t" * 32, 7, (5, 2))
    assert at_a == at_b
    vector = np.zeros(50, np.uint32)
    add_mask(vector, at_a, pair_sign(2, 5))
    assert vector.any()
    add_mask(vector, at_b, pair_sign(5, 2))
    assert not vector.any()
    others = [
        pair_mask_key(a, publics[1], b"u" * 32, 7, (2, 5)),
        pair_mask_key(a, publics[1], b"t" * 32, 8, (2, 5)),
        pair_mask_key(a, publics[1], b"t" * 32, 7, (2, 4)),
        pair_mask_key(a, publics[1], b"t" * 32, 7, (3, 5)),
        self_mask_key(agree(a, publics[1]), b"t" * 32, 7, 2),
        self_mask_key(agree(a, publics[1]), b"t" * 32, 7, 5),
    ]
    assert len({at_a, *others}) == 1 + len(others)


def test_a_self_mask_serves_one_deal_round_and_place() -> None:
    given = [(b"s" * 32, b"t" * 32, 7, 2), (b"r" * 32, b"t" * 32, 7, 2), (b"s" * 32, b"u" * 32, 7, 2)]
    given += [(b"s" * 32, b"t" * 32, 8, 2), (b"s" * 32, b"t" * 32, 7, 3)]
    assert len({self_mask_key(*one) for one in given}) == len(given)


def test_a_seed_s_digest_is_not_its_mask_key() -> None:
    seed = os.urandom(32)
    assert seed_digest(seed) == hashlib.sha256(context("seed", seed)).digest()
    assert seed_digest(seed) != self_mask_key(seed, b"", 0, 0)
