"""The ledger: charged before anything is computed, released once, and whole after every crash."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import BudgetExhausted, ConfigError, LedgerCorrupt, PrivacyError
from common.privacy.accounting import ORDERS, Release, epsilon_at_orders, epsilon_of, filter_order, rdp_at, rdp_of
from common.privacy.ledger import Ledger
from common.privacy.ledger_state import total_after
from common.privacy.units import PrivacyUnit

RUN = "a" * 32
DELTA = 1e-5
STEP = Release("gradients", 2.0, 0.1)
PLAN = [Release("moments", 4.0, 1.0), Release("gradients", 2.0, 0.1, 50)]


def open_ledger(folder: Path, max_epsilon: float = 10.0) -> Ledger:
    return Ledger(folder, max_epsilon=max_epsilon, delta=DELTA)


def charge(ledger: Ledger, server_round: int, release: Release = STEP, digest: str = "asked") -> bytes | None:
    return ledger.charge(RUN, server_round, release, PLAN, digest)


def exhaust(ledgers: list[Ledger]) -> int:
    """Charge round after round, at each ledger in turn, until one refuses; how many were charged."""
    for done in itertools.count():
        try:
            charge(ledgers[done % len(ledgers)], done + 1)
        except BudgetExhausted:
            return done
    raise AssertionError


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def stripped(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what chains it."""
    return {key: value for key, value in record.items() if key not in ("number", "previous", "signature")}


def kinds(folder: Path) -> list[str]:
    return [record["type"] for record in lines(folder)]


def fill(folder: Path, rounds: int = 3) -> Ledger:
    """A ledger with rounds charged and released, the last one charged only."""
    ledger = open_ledger(folder)
    for server_round in range(1, rounds + 1):
        charge(ledger, server_round)
        if server_round < rounds:
            ledger.release(RUN, server_round, f"reply {server_round}".encode())
    return ledger


def test_a_charge_is_on_the_disk_when_it_returns(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    assert ledger.epsilon == 0.0
    assert charge(ledger, 7) is None
    order = filter_order(PLAN, 10.0, DELTA)
    opened, charged = (stripped(line) for line in lines(tmp_path))
    assert set(opened) == {"type", "version", "public_key", "place"}
    assert (opened["type"], opened["version"], opened["public_key"]) == ("opened", 1, ledger.public_key)
    assert charged.pop("rdp") == pytest.approx(rdp_of([STEP])[order])
    assert charged == {
        "type": "charged",
        "run": RUN,
        "round": 7,
        "mechanism": "gradients",
        "noise_multiplier": 2.0,
        "sample_rate": 0.1,
        "steps": 1,
        "unit": "person",
        "instructions": "asked",
        "order": ORDERS[order],
        "delta": DELTA,
    }
    assert ledger.epsilon == pytest.approx(epsilon_at_orders(rdp_of([STEP]), DELTA)[order])
    ledger.release(RUN, 7, b"noised")
    assert stripped(lines(tmp_path)[2]) == {
        "type": "released",
        "run": RUN,
        "round": 7,
        "reply": hashlib.sha256(b"noised").hexdigest(),
    }


def test_nothing_is_released_that_was_not_charged(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    charge(ledger, 1)
    for run, server_round in ((RUN, 2), ("b" * 32, 1)):
        with pytest.raises(PrivacyError, match="was not charged"):
            ledger.release(run, server_round, b"x")
    ledger.release(RUN, 1, b"first")
    before = (tmp_path / "released.bin").read_bytes()
    with pytest.raises(PrivacyError, match="answered before"):
        ledger.release(RUN, 1, b"second")
    assert (tmp_path / "released.bin").read_bytes() == before == b"first"


def test_an_exhausted_budget_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    one = epsilon_of([STEP], DELTA)
    with pytest.raises(BudgetExhausted, match=r"max-epsilon"):
        charge(open_ledger(tmp_path / "none", one * 0.999), 1)
    assert kinds(tmp_path / "none") == ["opened"]

    ledger = open_ledger(tmp_path, 3.0)
    done = exhaust([ledger])
    assert done > 3
    content, spent = (tmp_path / "ledger.jsonl").read_bytes(), ledger.epsilon
    assert spent <= 3.0
    assert len(ledger.releases) == done
    for again in (ledger, open_ledger(tmp_path, 3.0)):
        with pytest.raises(BudgetExhausted):
            charge(again, done + 1)
        assert again.epsilon == pytest.approx(spent)
    assert (tmp_path / "ledger.jsonl").read_bytes() == content
    # A smaller demand may still fit, a larger budget is the owner's to give, and a smaller one binds at once.
    assert charge(open_ledger(tmp_path, 3.5), done + 1) is None
    with pytest.raises(BudgetExhausted):
        charge(open_ledger(tmp_path, 1.0), done + 2, Release("gradients", 1e4, 0.001))


@pytest.mark.parametrize("noise_multiplier", [0.0, -1.0, 1e-300, float("nan")])
def test_a_release_without_bound_never_fits(tmp_path: Path, noise_multiplier: float) -> None:
    with pytest.raises(BudgetExhausted):
        charge(open_ledger(tmp_path, 1e9), 1, Release("gradients", noise_multiplier, 0.1))
    assert kinds(tmp_path) == ["opened"]


@pytest.mark.parametrize("sample_rate", [0.0, -0.1, 1.0001, 2.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_never_fits(tmp_path: Path, sample_rate: float) -> None:
    for max_epsilon in (10.0, float("inf")):
        with pytest.raises(BudgetExhausted):
            charge(open_ledger(tmp_path, max_epsilon), 1, Release("gradients", 1.0, sample_rate))
    assert kinds(tmp_path) == ["opened"]


@pytest.mark.parametrize(
    "release",
    [Release("gradients", 1.0, 0.1, 0), Release("gradients", 1.0, 0.1, -5), Release("refund", 1.0, 0.1)],
    ids=str,
)
def test_no_charge_lowers_what_was_spent(tmp_path: Path, release: Release) -> None:
    ledger = fill(tmp_path)
    before = ledger.epsilon
    with pytest.raises(PrivacyError, match="want 1 or more"):
        charge(ledger, 9, release)
    assert ledger.epsilon == before == open_ledger(tmp_path).epsilon


def test_a_round_asked_again_gives_the_same_bytes(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    charge(ledger, 1)
    content = (tmp_path / "ledger.jsonl").read_bytes()
    # Charged and not released: computed again under the same charge.
    for again in (ledger, open_ledger(tmp_path)):
        assert charge(again, 1) is None
    assert (tmp_path / "ledger.jsonl").read_bytes() == content
    ledger.release(RUN, 1, b"the reply")
    content = (tmp_path / "ledger.jsonl").read_bytes()
    for again in (ledger, open_ledger(tmp_path)):
        assert charge(again, 1) == b"the reply"
        assert len(again.releases) == 1
    assert (tmp_path / "ledger.jsonl").read_bytes() == content


def test_a_round_with_other_instructions_is_refused(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    charge(ledger, 1)
    with pytest.raises(PrivacyError, match="other instructions"):
        charge(ledger, 1, digest="something else")
    ledger.release(RUN, 1, b"reply")
    with pytest.raises(PrivacyError, match="other instructions"):
        charge(ledger, 1, digest="something else")
    # Another run's round of the same number is another round.
    assert ledger.charge("b" * 32, 1, STEP, PLAN, "something else") is None
    assert len(ledger.releases) == 2


def test_a_reply_that_is_no_longer_kept_is_not_made_again(tmp_path: Path) -> None:
    ledger = fill(tmp_path)
    with pytest.raises(PrivacyError, match="no longer kept"):
        charge(ledger, 1)
    assert charge(ledger, 2) == b"reply 2"
    (tmp_path / "released.bin").unlink()
    with pytest.raises(PrivacyError, match="no longer kept"):
        charge(ledger, 2)


def test_the_order_is_fixed_at_the_first_charge(tmp_path: Path) -> None:
    """Later plans and releases, for which another order would be better, do not move it: that makes it a filter."""
    first = [Release("gradients", 0.8, 0.01, 50)]
    other = Release("moments", 4.0, 1.0)
    order = filter_order(first, 10.0, DELTA)
    assert filter_order([other], 10.0, DELTA) != order
    ledger = open_ledger(tmp_path)
    ledger.charge(RUN, 1, first[0], first, "x")
    ledger.charge(RUN, 2, other, [other], "y")
    assert open_ledger(tmp_path).epsilon == pytest.approx(
        float(epsilon_at_orders(rdp_of([*first, other]), DELTA)[order])
    )
    assert ledger.epsilon > epsilon_of([*first, other], DELTA)
    assert kinds(tmp_path) == ["opened", "charged", "charged"]


def test_a_ledger_keeps_its_delta(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(ConfigError, match="opened for delta"):
        Ledger(tmp_path, max_epsilon=10.0, delta=1e-6)
    Ledger(tmp_path / "unused", max_epsilon=10.0, delta=1e-5)
    Ledger(tmp_path / "unused", max_epsilon=10.0, delta=1e-6)  # nothing was charged yet


def test_different_rounds_cost_the_same_at_once_and_one_by_one(tmp_path: Path) -> None:
    """Each is priced before it is charged, at the one order, also by a ledger that was just opened."""
    releases = [Release("gradients", 1.0 + i / 20, 0.01 + i / 300) for i in range(20)]
    one_by_one = 0.0
    for release in releases:
        one_by_one = total_after(one_by_one, release, 4.0)
    assert one_by_one == pytest.approx(rdp_at(releases, 4.0).sum(), rel=1e-12)
    assert one_by_one == pytest.approx(rdp_of(releases)[ORDERS.index(4.0)], rel=1e-6)
    for i in range(0, 20, 2):
        charge(open_ledger(tmp_path, 100.0), i + 1, releases[i])
    order = filter_order(PLAN, 100.0, DELTA)
    expected = epsilon_at_orders(rdp_of(releases[::2]), DELTA)[order]
    assert open_ledger(tmp_path, 100.0).epsilon == pytest.approx(expected)


def test_a_ledger_that_shrinks_while_it_is_open_is_not_believed(tmp_path: Path) -> None:
    ledger = fill(tmp_path)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(LedgerCorrupt, match="shrunk"):
        charge(ledger, 9)


def test_faces_once_given_without_privacy_have_no_epsilon_any_more(tmp_path: Path) -> None:
    ledger = fill(tmp_path)
    ledger.note_unprotected(RUN)
    ledger.note_unprotected(RUN)
    for again in (ledger, open_ledger(tmp_path)):
        assert again.epsilon == float("inf")
        with pytest.raises(BudgetExhausted, match="without any privacy"):
            charge(again, 9)
    assert kinds(tmp_path).count("unprotected") == 1


def test_what_a_ledger_keeps_is_for_its_owner_alone(tmp_path: Path) -> None:
    fill(tmp_path / "ledger")
    assert (tmp_path / "ledger").stat().st_mode & 0o077 == 0


def test_damage_done_while_it_is_open_stops_it_too(tmp_path: Path) -> None:
    ledger = fill(tmp_path)
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b"nonsense\n")
    with pytest.raises(LedgerCorrupt):
        charge(ledger, 9)


def test_two_ledgers_on_one_file_see_each_other_s_charges(tmp_path: Path) -> None:
    one, other = open_ledger(tmp_path, 3.0), open_ledger(tmp_path, 3.0)
    done = exhaust([one, other])
    for ledger in (one, other):
        with pytest.raises(BudgetExhausted):
            charge(ledger, 1000)
        assert len(ledger.releases) == done
        assert 2.5 < ledger.epsilon <= 3.0
    one.release(RUN, 1, b"from one")
    assert charge(other, 1) == b"from one"


def test_a_run_goes_forward(tmp_path: Path) -> None:
    """A round that was passed over is not answered later: no coordinator needs it."""
    ledger = open_ledger(tmp_path)
    charge(ledger, 5)
    with pytest.raises(PrivacyError, match="comes after round 5"):
        charge(ledger, 4)
    assert charge(ledger, 5) is None, "the last one may be asked for again"
    assert ledger.charge("b" * 32, 1, STEP, PLAN, "asked") is None, "another run counts for itself"
    assert len(ledger.releases) == 2


def test_image_charges_are_no_person_s_promise(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, max_epsilon=10.0, delta=DELTA, unit=PrivacyUnit.IMAGE)
    ledger.charge(RUN, 1, STEP, PLAN, "asked", PrivacyUnit.IMAGE)
    with pytest.raises(ConfigError, match="charged for single images"):
        Ledger(tmp_path, max_epsilon=10.0, delta=DELTA, unit=PrivacyUnit.PERSON)
    assert Ledger(tmp_path, max_epsilon=10.0, delta=DELTA, unit=PrivacyUnit.IMAGE).epsilon == ledger.epsilon


def test_a_named_ledger_is_never_made_anew_nor_taken_for_another(tmp_path: Path) -> None:
    first = fill(tmp_path / "first")
    named = Ledger(tmp_path / "first", max_epsilon=10.0, delta=DELTA, public_key=first.public_key)
    assert named.epsilon == first.epsilon
    with pytest.raises(LedgerCorrupt, match="is not in"):
        Ledger(tmp_path / "gone", max_epsilon=10.0, delta=DELTA, public_key=first.public_key)
    assert not (tmp_path / "gone").exists()
    fill(tmp_path / "other")
    with pytest.raises(LedgerCorrupt, match="another ledger"):
        Ledger(tmp_path / "other", max_epsilon=10.0, delta=DELTA, public_key=first.public_key)


def test_a_huge_budget_leaves_a_ledger_that_can_be_kept_to_a_small_one(tmp_path: Path) -> None:
    release = Release("moments", 5.0, 1.0)
    ledger = open_ledger(tmp_path, 1e6)
    ledger.charge(RUN, 1, release, [release], "asked")
    assert ledger.epsilon < 5, "and not 226, as at the order for such a budget"
