"""The coordinator's signature on what it sends.

TLS names the machine at the other end, under whatever authority signed its certificate. The seal names the coordinator:
its operators hand out the public half of its signing key with every invitation, and a node reads nothing that was not
signed with it. A seal is Ed25519 (RFC 8032) over a context, the time until which the message holds, the node that it is
for, and the SHA-256 of its content; the content is Flower's own protobuf form of the records.
"""

import hashlib
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from common.errors import ProtocolError

_RECORD = "sealed"
_FIELDS = ("body", "expires", "signature")
_CONTEXT = b"visard: a coordinator's message, version 1\0"
# Node authentication lets clocks differ by so much; a message is refused when it is older than its time by more.
CLOCK_TOLERANCE_S = 300.0


@dataclass(frozen=True)
class Packed:
    """Records as one blob, and its SHA-256."""

    body: bytes
    digest: bytes


def pack(content: RecordDict) -> Packed:
    """Make ready for any number of seals."""
    body = bytes(recorddict_to_proto(content).SerializeToString())
    return Packed(body, hashlib.sha256(body).digest())


def seal(packed: Packed, key: Ed25519PrivateKey, expires: float, node_id: int) -> RecordDict:
    """The blob, signed for one node, in a record of its own. expires: seconds since 1970."""
    signature = key.sign(_signed(packed.digest, expires, node_id))
    return RecordDict({_RECORD: ConfigRecord({"body": packed.body, "expires": expires, "signature": signature})})


def open_sealed(record: RecordDict, key: Ed25519PublicKey, now: float, node_id: int) -> RecordDict:
    """What the holder of the signing key sent to this node. The content is not parsed before its signature was verified.

    now: seconds since 1970. Raises ProtocolError where the seal is missing, another's, another node's or out of date.
    """
    fields = record.get(_RECORD)
    if set(record) != {_RECORD} or not isinstance(fields, ConfigRecord) or set(fields) != set(_FIELDS):
        raise ProtocolError(
            f"a message with records {[name[:20] for name in sorted(record)[:4]]} is not sealed: a coordinator of ours seals each"
        )
    body, expires, signature = (fields[name] for name in _FIELDS)
    if not isinstance(body, bytes) or not isinstance(expires, float) or not isinstance(signature, bytes):
        raise ProtocolError("a seal with mistyped fields")
    try:
        key.verify(signature, _signed(hashlib.sha256(body).digest(), expires, node_id))
    except InvalidSignature:
        raise ProtocolError(
            "a message that is not signed with the coordinator's signing key, for this node, is refused: the invitation is of another "
            "coordinator, or somebody stands between"
        ) from None
    # A comparison that NaN fails.
    if not now < expires + CLOCK_TOLERANCE_S:
        raise ProtocolError(f"a message that held until {expires:.0f} came at {now:.0f}: it is out of date")
    try:
        return recorddict_from_proto(ProtoRecordDict.FromString(body))
    except Exception as error:  # signed, but by a Visard that packs otherwise
        raise ProtocolError(f"a signed message that cannot be read ({type(error).__name__})") from error


def _signed(digest: bytes, expires: float, node_id: int) -> bytes:
    return _CONTEXT + struct.pack(">dQ", expires, node_id) + digest
