"""Lines that nobody can change, drop or put in unseen, and the signed head that vouches for all of them.

A record is one line of JSON. It carries its number, the SHA-256 of the line before it (newline included; GENESIS before
the first) and, last, an Ed25519 signature (RFC 8032) over everything before the signature:

    {"number": 2, "previous": "<64 hex>", "type": "charged", ..., "signature": "<128 hex>"}

Claim: whoever has the public key finds any line that its owner did not write, and any line that is missing before the
last. That lines are missing at the end shows only beside a head: number and hash of the last line, signed as well.
A head covers every line before it, since each line's hash enters the next.
"""

import hashlib
import hmac
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

GENESIS = hashlib.sha256(b"visard ledger 1").digest()
HEAD_BYTES = 136
# Heads that one message may hold: 1.4 MB.
MAX_HEADS = 10_000

_RECORD, _HEAD = b"visard ledger record 1\n", b"visard ledger head 1\n"
_BEFORE, _AFTER = b', "signature": "', b'"}'
_SEAL_BYTES = len(_BEFORE) + 128 + len(_AFTER)
_LAYOUT = struct.Struct(">32sQ32s64s")
_MACHINE_ID = Path("/etc/machine-id")


def seal(record: dict[str, Any], number: int, previous: bytes, key: Ed25519PrivateKey) -> bytes:
    """The line of a record, newline included. Raises ValueError where a value is not finite."""
    body = json.dumps({"number": number, "previous": previous.hex(), **record}, allow_nan=False).encode()
    return body[:-1] + _BEFORE + key.sign(_RECORD + body).hex().encode() + _AFTER + b"\n"


def unseal(line: bytes, number: int, previous: bytes) -> dict[str, Any]:
    """The record in a line (without its newline) that must be number `number` after the hash `previous`.

    Its signature is not checked here: a head vouches for many lines at once. Raises ValueError, in words for the owner.
    """
    try:
        record = json.loads(_split(line)[0])
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(record, dict) or record.pop("number", None) != number:
        raise ValueError(f"it is not record {number}")
    if record.pop("previous", None) != previous.hex():
        raise ValueError("it does not follow the line before it")
    return record


def check_signature(line: bytes, public_key: bytes) -> None:
    """Raises ValueError where a line (without its newline) was not signed by this key."""
    body, signature = _split(line)
    if not _signed(public_key, signature, _RECORD + body):
        raise ValueError("its signature is not by this ledger's key")


def _split(line: bytes) -> tuple[bytes, bytes]:
    """What is signed, and the signature. The spelling is unique: only one line gives these two."""
    body, sealed = line[:-_SEAL_BYTES] + b"}", line[-_SEAL_BYTES:]
    if not (sealed.startswith(_BEFORE) and sealed.endswith(_AFTER)):
        raise ValueError("it has no signature")
    text = sealed[len(_BEFORE) : -len(_AFTER)]
    signature = bytes.fromhex(text.decode())
    if signature.hex().encode() != text:
        raise ValueError("its signature is misspelt")
    return body, signature


def line_hash(line: bytes) -> bytes:
    """The hash that the next line carries; `line` without its newline."""
    return hashlib.sha256(line + b"\n").digest()


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The 32 bytes of a key that everybody may know; in hex they name the ledger."""
    return key.public_key().public_bytes_raw()


def place_of(public_key: bytes, inode: int) -> dict[str, Any]:
    """Where a ledger lies: its file's inode, and this machine's id where it has one.

    The id goes through HMAC with the public key, as machine-id(5) asks: an exported ledger does not give it away.
    """
    try:
        machine = _MACHINE_ID.read_text().strip()
    except OSError:
        machine = ""
    if len(machine) != 32:  # empty or "uninitialized", as in many containers
        return {"machine": "", "inode": inode}
    return {"machine": hmac.new(public_key, machine.encode(), "sha256").hexdigest(), "inode": inode}


@dataclass(frozen=True)
class Head:
    """What a ledger says of itself: `count` lines, the last of which has the hash `digest`; signed. All public."""

    public_key: bytes
    count: int
    digest: bytes
    signature: bytes

    @classmethod
    def sign(cls, key: Ed25519PrivateKey, count: int, digest: bytes) -> Self:
        """A head under this key."""
        return cls(public_bytes(key), count, digest, key.sign(_head_text(count, digest)))

    @classmethod
    def from_bytes(cls, data: object) -> Self:
        """Unpack and check the signature. Raises ValueError for anything but a head that its key has signed."""
        if not isinstance(data, bytes) or len(data) != HEAD_BYTES:
            size = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
            raise ValueError(f"a ledger's head is {HEAD_BYTES} bytes, not {size}")
        head = cls(*_LAYOUT.unpack(data))
        if head.count < 1:
            raise ValueError("a ledger's head without a line")
        if not _signed(head.public_key, head.signature, _head_text(head.count, head.digest)):
            raise ValueError("a ledger's head whose signature does not hold")
        return head

    def to_bytes(self) -> bytes:
        """HEAD_BYTES bytes."""
        return _LAYOUT.pack(self.public_key, self.count, self.digest, self.signature)


def owner_of(data: object) -> bytes:
    """The public key that a packed head names, without checking the signature. Raises ValueError on a wrong size."""
    if not isinstance(data, bytes) or len(data) != HEAD_BYTES:
        raise ValueError(f"a ledger's head is {HEAD_BYTES} bytes")
    return data[:32]


def remember(heads: dict[str, str], head: Head) -> None:
    """Keep the furthest head seen of each ledger: hex of its public key to hex of its bytes.

    An older one never takes its place, nor does another of the same length: that would be what a rolled-back ledger
    sends. Of more than MAX_HEADS those not heard from for longest are dropped.
    """
    name = head.public_key.hex()
    known = heads.pop(name, None)
    if known is None or _LAYOUT.unpack(bytes.fromhex(known))[1] < head.count:
        known = head.to_bytes().hex()
    heads[name] = known
    while len(heads) > MAX_HEADS:
        del heads[next(iter(heads))]


def _head_text(count: int, digest: bytes) -> bytes:
    return _HEAD + struct.pack(">Q", count) + digest


def _signed(public_key: bytes, signature: bytes, text: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True
