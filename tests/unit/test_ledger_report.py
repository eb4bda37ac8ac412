"""Reading a ledger without opening it: everything is computed again, and the first thing wrong is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import LedgerCorrupt
from common.privacy.accounting import ORDERS, Release, epsilon_at_order, epsilon_at_orders, rdp_of
from common.privacy.chain import GENESIS, line_hash, public_bytes, seal
from common.privacy.ledger import adopt_ledger
from common.privacy.ledger_report import charges, verify_ledger
from tests.unit.test_ledger import DELTA, RUN, STEP, charge, fill, lines, open_ledger, stripped


def test_a_whole_ledger_verifies_wherever_it_lies(tmp_path: Path) -> None:
    ledger = fill(tmp_path / "one")
    charge(ledger, 9, Release("moments", 4.0, 1.0))
    exported = tmp_path / "exported.jsonl"
    shutil.copy(tmp_path / "one" / "ledger.jsonl", exported)
    before = (tmp_path / "one" / "ledger.jsonl").read_bytes()
    for path in (tmp_path / "one", exported):
        report = verify_ledger(path, ledger.public_key)
        assert report.problem is None
        assert report.line is None
        assert (report.public_key, report.records, report.rounds, report.answered) == (ledger.public_key, 7, 4, 2)
        assert (report.runs, report.unprotected, report.copies, report.torn) == ((RUN,), "", 0, 0)
        assert report.delta == DELTA
        assert report.epsilon == ledger.epsilon == pytest.approx(report.recomputed_epsilon, rel=1e-9)
        assert report.order is not None
        assert report.epsilon == pytest.approx(
            epsilon_at_orders(rdp_of(ledger.releases), DELTA)[ORDERS.index(report.order)], rel=1e-6
        )
    assert (tmp_path / "one" / "ledger.jsonl").read_bytes() == before
    for path in ("nothing", "one/released.bin"):
        try:
            assert verify_ledger(tmp_path / path).problem
        except LedgerCorrupt:
            assert path == "nothing"


def test_charges_come_with_what_was_spent_up_to_them(tmp_path: Path) -> None:
    ledger = fill(tmp_path, 4)
    charge(ledger, 9, Release("moments", 4.0, 1.0))
    found = list(charges(tmp_path))
    assert [entry.server_round for entry in found] == [1, 2, 3, 4, 9]
    assert [entry.answered for entry in found] == [True, True, True, False, False]
    assert [entry.release for entry in found] == ledger.releases
    assert [lines(tmp_path)[entry.line - 1]["round"] for entry in found] == [1, 2, 3, 4, 9]
    order = verify_ledger(tmp_path).order
    assert order is not None
    for number, entry in enumerate(found, start=1):
        expected = epsilon_at_orders(rdp_of(ledger.releases[:number]), DELTA)[ORDERS.index(order)]
        assert entry.epsilon == pytest.approx(expected, rel=1e-6)
    assert found[-1].epsilon == ledger.epsilon
    ledger.note_unprotected(RUN)
    report = verify_ledger(tmp_path)
    assert report.unprotected == RUN
    assert report.epsilon == report.recomputed_epsilon == float("inf")


def test_every_damage_is_named_with_its_line(tmp_path: Path) -> None:
    fill(tmp_path)
    parts = (tmp_path / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    exported = tmp_path / "exported.jsonl"
    for at in range(len(parts)):
        for damaged in (
            b"[]\n",
            parts[at].replace(b'"type"', b'"kind"'),
            parts[at][:-6] + b'00"}\n',
            b"[" * 9999 + b"\n",
        ):
            exported.write_bytes(b"".join([*parts[:at], damaged, *parts[at + 1 :]]))
            report = verify_ledger(exported)
            assert report.problem
            assert report.line == at + 1
            assert report.records == at
    other = fill(tmp_path / "other").public_key
    assert "it was opened with the key" in (verify_ledger(tmp_path, other).problem or "")
    assert verify_ledger(tmp_path / "other", other.upper()).problem is None
    # A copy that is cut off verifies by itself, but not beside its head; a torn line is told.
    whole = b"".join(parts)
    exported.write_bytes(whole[:-5])
    assert verify_ledger(exported).problem is None
    assert verify_ledger(exported).torn == len(parts[-1]) - 5
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(parts[:-1]))
    assert "vouches for 6 lines" in (verify_ledger(tmp_path).problem or "")
    assert verify_ledger(tmp_path).line == 0
    exported.write_bytes(b"")
    assert verify_ledger(exported).problem == "there is no whole line"
    exported.write_bytes(b"".join([*parts[:4], b"{}\n"]))
    with pytest.raises(LedgerCorrupt, match="line 5"):
        list(charges(exported))


def forge(path: Path, records: list[dict[str, Any]]) -> None:
    """A ledger that its own owner writes, with a good key and a good chain."""
    key, content, digest = Ed25519PrivateKey.generate(), b"", GENESIS
    opening = {
        "type": "opened",
        "version": 1,
        "public_key": public_bytes(key).hex(),
        "place": {"machine": "", "inode": 1},
    }
    for number, record in enumerate([opening, *records], start=1):
        line = seal(record, number, digest, key)
        content, digest = content + line, line_hash(line[:-1])
    path.write_bytes(content)


def test_an_owner_s_own_false_sums_are_found(tmp_path: Path) -> None:
    fill(tmp_path / "true")
    true = [stripped(record) for record in lines(tmp_path / "true")][1:]
    path = tmp_path / "forged.jsonl"
    forge(path, true)
    honest = verify_ledger(path)
    assert honest.problem is None
    assert honest.order is not None
    for at, record in enumerate(true):
        if record["type"] == "charged":
            for factor in (0.5, 1 - 1e-7, 1 + 1e-7, 2.0):
                forge(path, [*true[:at], {**record, "rdp": record["rdp"] * factor}, *true[at + 1 :]])
                report = verify_ledger(path)
                assert report.line is not None
                assert report.line >= at + 2
            for changed in (
                {"steps": 0},
                {"order": 1.7},
                {"order": 5.0},
                {"mechanism": "none"},
                {"noise_multiplier": 9.0},
            ):
                forge(path, [*true[:at], {**record, **changed}, *true[at + 1 :]])
                assert verify_ledger(path).problem
    forge(path, [{**record, "rdp": 0.5 * record["rdp"]} if "rdp" in record else record for record in true])
    report = verify_ledger(path)
    assert report.line == 2
    assert report.epsilon < report.recomputed_epsilon == pytest.approx(honest.epsilon)
    assert epsilon_at_order(0.0, honest.order, DELTA) == 0.0


def test_adopting_is_counted(tmp_path: Path) -> None:
    fill(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    adopt_ledger(tmp_path / "two")
    assert verify_ledger(tmp_path / "two").copies == 1
    assert json.loads((tmp_path / "two" / "ledger.jsonl").read_text().splitlines()[-1])["type"] == "adopted"
    assert charge(open_ledger(tmp_path / "two"), 9, STEP) is None
