"""The coordinator's seal: what opens it, and that nothing else does."""

import math
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from common import seal as sealing
from common.errors import ProtocolError
from common.seal import CLOCK_TOLERANCE_S, pack

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key()
NOW = 1.8e9
NODE = 2**63 - 7


def seal(records: RecordDict, key: Ed25519PrivateKey, expires: float, node_id: int = NODE) -> RecordDict:
    return sealing.seal(pack(records), key, expires, node_id)


def open_sealed(box: RecordDict, key: Ed25519PublicKey, now: float, node_id: int = NODE) -> RecordDict:
    return sealing.open_sealed(box, key, now, node_id)


def content() -> RecordDict:
    return RecordDict(
        {
            "instructions": ConfigRecord(
                {"run_id": "r", "server_round": 3, "x": [1.5, math.inf], "b": b"\0\xff", "t": True}
            ),
            "numbers": MetricRecord({"loss": 0.25}),
            "arrays": ArrayRecord({"v": Array(np.arange(5, dtype=np.float32))}),
        }
    )


def as_sent(record: RecordDict) -> RecordDict:
    """As it comes out of the wire."""
    return recorddict_from_proto(ProtoRecordDict.FromString(recorddict_to_proto(record).SerializeToString()))


def sealed(**changes: object) -> RecordDict:
    fields = dict(seal(content(), KEY, NOW + 60).config_records["sealed"])
    return RecordDict({"sealed": ConfigRecord({**fields, **changes})})  # type: ignore[dict-item]


@pytest.mark.parametrize("records", [content(), RecordDict()], ids=["all kinds", "nothing"])
def test_what_was_sealed_is_opened(records: RecordDict) -> None:
    box = as_sent(seal(records, KEY, NOW + 60))
    assert list(box) == ["sealed"]
    opened = open_sealed(box, PUBLIC, NOW)
    assert recorddict_to_proto(opened) == recorddict_to_proto(records)


def test_the_signature_is_over_context_time_node_and_digest() -> None:
    """By hand, from RFC 8032's primitive and the module's docstring alone."""
    import hashlib

    body = recorddict_to_proto(content()).SerializeToString()
    signed = (
        b"visard: a coordinator's message, version 1\0" + struct.pack(">dQ", NOW, NODE) + hashlib.sha256(body).digest()
    )
    made = RecordDict({"sealed": ConfigRecord({"body": body, "expires": NOW, "signature": KEY.sign(signed)})})
    assert open_sealed(made, PUBLIC, NOW)["instructions"] == content()["instructions"]


def test_the_clock() -> None:
    box = seal(content(), KEY, NOW)
    open_sealed(box, PUBLIC, NOW + CLOCK_TOLERANCE_S - 1)
    open_sealed(box, PUBLIC, 0.0)  # a node's clock that is far behind: nothing is too early
    for late in (CLOCK_TOLERANCE_S, 1e6, math.inf, math.nan):
        with pytest.raises(ProtocolError, match="out of date"):
            open_sealed(box, PUBLIC, NOW + late)
    with pytest.raises(ProtocolError, match="out of date"):
        open_sealed(seal(content(), KEY, math.nan), PUBLIC, NOW)
    with pytest.raises(ProtocolError, match="out of date"):
        open_sealed(seal(content(), KEY, -math.inf), PUBLIC, NOW)


def test_another_key_opens_nothing() -> None:
    with pytest.raises(ProtocolError, match="not signed with the coordinator's signing key"):
        open_sealed(sealed(), Ed25519PrivateKey.generate().public_key(), NOW)
    with pytest.raises(ProtocolError, match="not signed"):
        open_sealed(seal(content(), Ed25519PrivateKey.generate(), NOW), PUBLIC, NOW)


def test_every_bit_counts() -> None:
    """One flipped bit anywhere, or a byte more or less."""
    fields = dict(seal(RecordDict({"a": ConfigRecord({"b": 1})}), KEY, NOW).config_records["sealed"])
    for name in ("body", "signature"):
        value = fields[name]
        assert isinstance(value, bytes)
        others = [value[:-1], value + b"\0", b"", value[1:], value + value]
        others += [
            value[:place] + bytes([value[place] ^ (1 << bit)]) + value[place + 1 :]
            for place in range(len(value))
            for bit in (0, 7)
        ]
        for other in others:
            with pytest.raises(ProtocolError, match="not signed"):
                open_sealed(RecordDict({"sealed": ConfigRecord({**fields, name: other})}), PUBLIC, NOW)
    for expires in (math.nextafter(NOW, math.inf), -NOW, 0.0, math.inf, math.nan):
        with pytest.raises(ProtocolError, match="not signed"):
            open_sealed(RecordDict({"sealed": ConfigRecord({**fields, "expires": expires})}), PUBLIC, NOW)


def test_parts_of_two_seals_do_not_go_together() -> None:
    one = dict(seal(content(), KEY, NOW).config_records["sealed"])
    two = dict(seal(content(), KEY, NOW + 1e6).config_records["sealed"])
    assert one["body"] == two["body"]
    for name in ("expires", "signature"):
        with pytest.raises(ProtocolError, match="not signed"):
            open_sealed(RecordDict({"sealed": ConfigRecord({**one, name: two[name]})}), PUBLIC, NOW)


def test_what_is_not_sealed() -> None:
    box = sealed()
    for wrong in (
        RecordDict(),
        content(),
        RecordDict({"sealed": ConfigRecord()}),
        RecordDict({"sealed": MetricRecord({"body": 1.0, "expires": NOW, "signature": 1.0})}),
        RecordDict({"sealed": ArrayRecord()}),
        RecordDict({"Sealed": box["sealed"]}),
        # What is beside the seal is not signed.
        RecordDict({"sealed": box["sealed"], "instructions": content()["instructions"]}),
        sealed(more=1),
    ):
        with pytest.raises(ProtocolError, match="not sealed"):
            open_sealed(wrong, PUBLIC, NOW)
    for field, value in (("body", "text"), ("expires", 1), ("expires", "1"), ("signature", "text"), ("body", [b"a"])):
        with pytest.raises(ProtocolError, match="mistyped"):
            open_sealed(sealed(**{field: value}), PUBLIC, NOW)


def test_a_hostile_message_does_not_fill_the_log() -> None:
    names = {f"\x1b[2J{letter}" + letter * 1_000_000: ConfigRecord() for letter in "abcdef"}
    with pytest.raises(ProtocolError) as caught:
        open_sealed(RecordDict(names), PUBLIC, NOW)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_signed_nonsense_is_an_error_of_ours() -> None:
    import hashlib

    for body in (b"\xff\xff\xff", b"\x0a\x05hello", b"\x0a" * 1000):
        signed = (
            b"visard: a coordinator's message, version 1\0"
            + struct.pack(">dQ", NOW, NODE)
            + hashlib.sha256(body).digest()
        )
        made = RecordDict({"sealed": ConfigRecord({"body": body, "expires": NOW, "signature": KEY.sign(signed)})})
        with pytest.raises(ProtocolError, match="cannot be read"):
            open_sealed(made, PUBLIC, NOW)


def test_nothing_is_parsed_before_the_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser is taken away: without it a wrong signature is still told, and a right one is missed."""

    class Parsed(Exception):
        pass

    class Parser:
        @staticmethod
        def FromString(_body: bytes) -> None:  # noqa: N802
            raise Parsed

    monkeypatch.setattr("common.seal.ProtoRecordDict", Parser)
    with pytest.raises(ProtocolError, match="not signed"):
        open_sealed(sealed(signature=bytes(64)), PUBLIC, NOW)
    with pytest.raises(ProtocolError, match="out of date"):
        open_sealed(sealed(), PUBLIC, NOW + 1e9)
    with pytest.raises(ProtocolError, match="Parsed"):
        open_sealed(sealed(), PUBLIC, NOW)


def test_two_processes_agree() -> None:
    """Opened in a process that has only the public key and the bytes."""
    box = recorddict_to_proto(seal(content(), KEY, NOW)).SerializeToString()
    script = textwrap.dedent("""
        import sys
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from flwr.common.serde import recorddict_from_proto
        from flwr.proto.recorddict_pb2 import RecordDict
        from common.seal import open_sealed
        box = recorddict_from_proto(RecordDict.FromString(sys.stdin.buffer.read()))
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(sys.argv[1]))
        print(open_sealed(box, key, float(sys.argv[2]), int(sys.argv[3]))["instructions"]["server_round"])
    """)
    command = [sys.executable, "-c", script, PUBLIC.public_bytes_raw().hex(), str(NOW), str(NODE)]
    done = subprocess.run(command, input=box, capture_output=True, check=True, timeout=60)
    assert done.stdout.decode().strip() == "3"


def test_a_message_for_one_node_is_none_for_another() -> None:
    """Else a machine with a certificate of the authority could have a node answer what it was not asked."""
    packed = pack(content())
    for node in (2, 3, NODE):
        box = sealing.seal(packed, KEY, NOW, node)
        assert sealing.open_sealed(box, PUBLIC, NOW, node)["instructions"] == content()["instructions"]
        for other in {2, 3, NODE} - {node}:
            with pytest.raises(ProtocolError, match="for this node"):
                sealing.open_sealed(box, PUBLIC, NOW, other)
