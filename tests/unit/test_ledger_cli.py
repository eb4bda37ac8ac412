"""A ledger's figures run by run, against the ledger itself; found by folder, faces or file, and never changed."""

from pathlib import Path

import pytest
from PIL import Image

from client.ledger_picture import draw
from client.ledger_summary import find_ledger, summarise
from client.ledger_words import short, span
from common.errors import ConfigError, LedgerCorrupt
from common.privacy.accounting import Release, tight_epsilon_of
from tests.unit.test_ledger import DELTA, RUN, charge, fill, open_ledger

OTHER = "b" * 32


def test_runs_add_up_to_the_ledger(tmp_path: Path) -> None:
    ledger = fill(tmp_path / "l")
    ledger.charge(OTHER, 1, Release("moments", 4.0, 1.0), [], "asked")
    charge(ledger, 7)
    spending = summarise(tmp_path / "l" / "ledger.jsonl")
    assert [(run.run, len(run.charges), run.answered) for run in spending.runs] == [(RUN, 4, 2), (OTHER, 1, 0)]
    first, second = spending.runs
    assert first.epsilon == ledger.epsilon > second.epsilon > 0
    assert first.tight_epsilon == tight_epsilon_of(ledger.releases, DELTA)
    assert second.tight_epsilon == tight_epsilon_of(ledger.releases[:4], DELTA)
    assert (spending.moved, spending.rolled_back, spending.has_key) == (False, None, True)
    ledger.note_unprotected("c")
    last = summarise(tmp_path / "l" / "ledger.jsonl").runs[-1]
    assert (last.run, last.unprotected, last.epsilon, last.charges) == ("c", True, float("inf"), ())


def test_a_ledger_is_found_and_none_is_made(tmp_path: Path) -> None:
    state = tmp_path / "faces.visard"
    fill(state)
    for place in (state, tmp_path / "faces", state / "ledger.jsonl"):
        assert find_ledger(str(place)) == state / "ledger.jsonl"
    with pytest.raises(LedgerCorrupt, match="no ledger"):
        find_ledger(str(tmp_path / "others"))
    assert [path.name for path in tmp_path.iterdir()] == ["faces.visard"]


def test_the_picture_is_for_its_owner_and_needs_charges(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "l")
    out = tmp_path / "pictures" / "chart.png"
    with pytest.raises(ConfigError, match="nothing was charged"):
        draw(out, summarise(tmp_path / "l" / "ledger.jsonl"))
    charge(ledger, 1)
    ledger.note_unprotected("$x_{$")
    draw(out, summarise(tmp_path / "l" / "ledger.jsonl"), 10.0)
    assert out.stat().st_mode & 0o777 == 0o600
    with Image.open(out) as picture:
        assert picture.width > 900


def test_words() -> None:
    assert short("\x1b[31mre") == "?[31mre"
    assert short("a" * 32) == "aaaaaaaa..."
    assert (span([2.0, 2.0]), span([3.0, 1.5])) == ("2", "1.5 to 3")
