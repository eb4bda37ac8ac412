"""An older copy of the whole folder fits together; a head that a coordinator remembers shows that it is older."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from client.app import open_ledger as open_ledger_of_client
from common.errors import LedgerCorrupt, MalformedUpdate, ProtocolError
from common.messages import DiscriminatorUpdate, RoundInstructions, witness_of
from common.privacy.chain import HEAD_BYTES, MAX_HEADS, Head, remember
from common.privacy.ledger import Ledger, adopt_ledger
from server.checkpoint import CheckpointStore, CoordinatorState
from tests.integration.test_resume import StopAt
from tests.support import (
    RUN_ID,
    gradient_instructions,
    random_faces,
    tiny_config,
    train,
)
from tests.unit.test_ledger import charge, fill, kinds, open_ledger
from tests.unit.test_ledger_chain import contents, put

KEY = Ed25519PrivateKey.generate()
WEIGHTS = np.arange(5, dtype=np.float32)
INSTRUCTIONS = gradient_instructions(tiny_config(privacy_model="local"), WEIGHTS)


def head_of(count: int, digest: bytes = bytes(32), key: Ed25519PrivateKey = KEY) -> Head:
    return Head.sign(key, count, digest)


def roll_back(folder: Path, files: dict[str, bytes]) -> Ledger:
    """Put an old copy of the whole folder back, file by file and in place, as a disk's snapshot would."""
    for name, content in files.items():
        put(folder, name, content)
    return open_ledger(folder)


def test_an_older_copy_is_refused_for_good_once_a_witness_knows_better(tmp_path: Path) -> None:
    ledger = fill(tmp_path)
    old, seen = contents(tmp_path), [ledger.head().to_bytes()]
    ledger.check_witness(seen)
    charge(ledger, 4)
    ledger.check_witness(seen)  # ahead: a reply was lost
    seen = [head_of(90).to_bytes(), ledger.head().to_bytes(), head_of(1, key=Ed25519PrivateKey.generate()).to_bytes()]
    newest = contents(tmp_path)

    ledger = roll_back(tmp_path, old)
    ledger.check_witness(seen[:1])  # nobody knows better
    with pytest.raises(LedgerCorrupt, match="an older copy was put in its place"):
        ledger.check_witness(seen)
    assert kinds(tmp_path)[-1] == "rolled-back"
    # Nobody is answered any more, whether a witness comes along or not.
    for again in (ledger, open_ledger(tmp_path)):
        for ask_again in (lambda: again.check_witness([]), lambda: charge(again, 9)):  # noqa: B023
            with pytest.raises(LedgerCorrupt):
                ask_again()
    assert kinds(tmp_path).count("rolled-back") == 1
    restored = roll_back(tmp_path, newest)
    restored.check_witness(seen)
    assert charge(restored, 9) is None


def test_a_rolled_back_ledger_that_went_on_is_refused_at_any_length(tmp_path: Path) -> None:
    ledger = fill(tmp_path)
    old = contents(tmp_path)
    charge(ledger, 4)
    seen = [ledger.head().to_bytes()]
    for more in range(1, 4):
        ledger = roll_back(tmp_path, old)
        for server_round in range(10, 10 + more):
            charge(ledger, server_round)
        with pytest.raises(LedgerCorrupt):
            ledger.check_witness(seen)


def test_of_two_adopted_copies_one_is_refused(tmp_path: Path) -> None:
    """The owner's word that it is the only copy does not make it so."""
    one = fill(tmp_path / "one")
    (tmp_path / "two").mkdir()
    for name, content in contents(tmp_path / "one").items():
        (tmp_path / "two" / name).write_bytes(content)
    adopt_ledger(tmp_path / "two")
    two = open_ledger(tmp_path / "two")
    charge(two, 5)
    with pytest.raises(LedgerCorrupt):
        one.check_witness([two.head().to_bytes()])


def test_nobody_but_the_ledger_can_make_its_head(tmp_path: Path) -> None:
    ledger = fill(tmp_path)
    head = ledger.head()
    invented = [
        dataclasses.replace(head, count=head.count + 1),
        dataclasses.replace(head, digest=bytes(32)),
        dataclasses.replace(head_of(99), public_key=head.public_key),
        dataclasses.replace(head, signature=bytes(64)),
    ]
    for wrong in invented:
        with pytest.raises(ProtocolError, match="signature does not hold"):
            ledger.check_witness([wrong.to_bytes()])
    for bit in range(0, 8 * HEAD_BYTES, 7):
        damaged = bytearray(head.to_bytes())
        damaged[bit // 8] ^= 1 << bit % 8
        if bit // 8 >= 32:  # else it is another ledger's, and passed over
            with pytest.raises(ProtocolError):
                ledger.check_witness([bytes(damaged)])
        with pytest.raises(MalformedUpdate):
            reply(ledger_head=bytes(damaged))
    for hostile in ([b""], [head.to_bytes()[:-1]], [head.to_bytes()] * 2, [head_of(1).to_bytes()] * (MAX_HEADS + 1)):
        with pytest.raises(ProtocolError):
            ledger.check_witness(hostile)
    ledger.check_witness([head.to_bytes()])
    assert charge(ledger, 9) is None


def reply(**scalars: Any) -> DiscriminatorUpdate:
    record = DiscriminatorUpdate(RUN_ID, 1, WEIGHTS).to_record()
    record["update"] = ConfigRecord({**record["update"], **scalars})  # type: ignore[dict-item]
    return DiscriminatorUpdate.from_record(record, INSTRUCTIONS, 5)


def test_heads_cross_the_wire_both_ways() -> None:
    assert reply().head is None
    head = head_of(7)
    assert reply(ledger_head=head.to_bytes()).head == head
    for hostile in (b"", b"\x00" * HEAD_BYTES, head.to_bytes() + b"x", "text", 7, [1]):
        with pytest.raises(MalformedUpdate):
            reply(ledger_head=hostile)
    heads = [head_of(count).to_bytes() for count in range(1, 4)]
    sent = INSTRUCTIONS.to_record(heads)
    assert witness_of(sent) == heads
    assert witness_of(INSTRUCTIONS.to_record()) == []
    assert RoundInstructions.from_record(sent).digest() == INSTRUCTIONS.digest()


@pytest.mark.parametrize(
    "witness",
    [
        ConfigRecord({}),
        ConfigRecord({"heads": b"x" * HEAD_BYTES}),
        ConfigRecord({"heads": [b"x"]}),
        ConfigRecord({"heads": ["x" * HEAD_BYTES]}),
        ConfigRecord({"heads": [1, 2]}),
        ConfigRecord({"heads": [b"x" * HEAD_BYTES], "more": 1}),
        ConfigRecord({"heads": [bytes(HEAD_BYTES)] * (MAX_HEADS + 1)}),
        MetricRecord({"heads": [1]}),
        ArrayRecord({"heads": Array("uint8", (1,), "visard.raw", b"x")}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_hostile_witness_gives_a_typed_error(witness: ConfigRecord) -> None:
    with pytest.raises(ProtocolError):
        witness_of(RecordDict({"witness": witness}))


@settings(deadline=None)
@given(st.lists(st.binary(max_size=2 * HEAD_BYTES), max_size=3))
def test_any_bytes_are_a_witness_or_a_typed_error(heads: list[bytes]) -> None:
    try:
        found = witness_of(RecordDict({"witness": ConfigRecord({"heads": heads})}))
    except ProtocolError:
        return
    assert found == heads
    assert all(len(head) == HEAD_BYTES for head in heads)


def test_the_furthest_head_of_each_ledger_is_remembered() -> None:
    heads: dict[str, str] = {}
    other = head_of(3, key=Ed25519PrivateKey.generate())
    first, further, fork, older = head_of(5), head_of(6), head_of(6, b"f" * 32), head_of(2)
    for head in (first, other, further, fork, older):
        remember(heads, head)
    assert sorted(heads.values()) == sorted([other.to_bytes().hex(), further.to_bytes().hex()])
    for number in range(MAX_HEADS - 1):
        heads[f"{number:064x}"] = further.to_bytes().hex()
    assert len(heads) == MAX_HEADS + 1
    remember(heads, further)
    assert len(heads) == MAX_HEADS
    assert other.public_key.hex() not in heads  # not heard from for longest
    assert further.public_key.hex() in heads


def test_a_client_whose_folder_is_rolled_back_leaves_the_run(tmp_path: Path) -> None:
    """From end to end: the coordinator remembers in its checkpoint, and the client looks at no face."""
    config = tiny_config(privacy_model="local", min_clients=1)  # five rounds
    shares = [random_faces(4, 2, seed=client) for client in range(2)]
    clients = [tmp_path / "clients" / f"{number:04d}" for number in range(2)]
    state = CoordinatorState.fresh(config, RUN_ID)
    old: dict[str, bytes] = {}
    for stop in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, state, shares, [StopAt(server_round=stop)])
        state = CheckpointStore(tmp_path).load()
        keys = {Ledger(client, max_epsilon=config.privacy.epsilon, delta=1e-5).public_key for client in clients}
        assert set(state.ledger_heads) == keys
        old = old or contents(clients[0])

    for name, content in old.items():
        put(clients[0], name, content)
    open_ledger_of_client.cache_clear()  # a node that was started again after the old copy was put in
    final = train(tmp_path, state, shares)
    assert final.last["refusals"] == {"LedgerCorrupt": 1}
    assert kinds(clients[0])[-1] == "rolled-back"
    assert [kinds(client).count("charged") for client in clients] == [2, 5]
