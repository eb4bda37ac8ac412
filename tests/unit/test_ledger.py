"""The ledger: charged before anything is computed, released once, and whole after every crash."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from common.errors import BudgetExhausted, ConfigError, LedgerCorrupt, PrivacyError
from common.privacy.accounting import ORDERS, Release, epsilon_at_orders, epsilon_of, filter_order, rdp_of
from common.privacy.ledger import Ledger

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


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


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
    opened, charged = lines(tmp_path)
    order = filter_order(PLAN, 10.0, DELTA)
    assert opened == {"type": "opened", "order": ORDERS[order], "delta": DELTA}
    assert charged == {
        "type": "charged",
        "run": RUN,
        "round": 7,
        "mechanism": "gradients",
        "noise_multiplier": 2.0,
        "sample_rate": 0.1,
        "steps": 1,
        "instructions": "asked",
    }
    assert ledger.epsilon == pytest.approx(epsilon_at_orders(rdp_of([STEP]), DELTA)[order])
    ledger.release(RUN, 7, b"noised")
    assert lines(tmp_path)[2] == {
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
    assert (tmp_path / "none" / "ledger.jsonl").read_bytes() == b""

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
    assert (tmp_path / "ledger.jsonl").read_bytes() == b""


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
    assert [line["type"] for line in lines(tmp_path)] == ["opened", "charged", "charged"]


def test_a_torn_last_line_is_recovered_wherever_it_tore(tmp_path: Path) -> None:
    fill(tmp_path / "whole")
    whole = (tmp_path / "whole" / "ledger.jsonl").read_bytes()
    reply = (tmp_path / "whole" / "released.bin").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    folder = tmp_path / "torn"
    last = ends[-2]
    for length in [*range(0, last, 7), *ends, *(end - 1 for end in ends), *range(last, len(whole) + 1)]:
        folder.mkdir(exist_ok=True)
        (folder / "ledger.jsonl").write_bytes(whole[:length])
        (folder / "released.bin").write_bytes(reply)
        ledger = open_ledger(folder)
        kept = max([end for end in ends if end <= length], default=0)
        assert (folder / "ledger.jsonl").read_bytes() == whole[:kept]
        assert len(ledger.releases) == whole[:kept].count(b'"charged"')
    # It goes on from there.
    assert (folder / "ledger.jsonl").read_bytes() == whole
    assert charge(ledger, 9) is None
    assert len(open_ledger(folder).releases) == 4


def test_any_other_damage_stops_the_client(tmp_path: Path) -> None:
    fill(tmp_path / "whole")
    whole = (tmp_path / "whole" / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    folder = tmp_path / "damaged"
    folder.mkdir()
    path = folder / "ledger.jsonl"

    def opens(content: bytes) -> None:
        path.write_bytes(content)
        open_ledger(folder)

    damages = [b"\n", b"{}\n", b"[]\n", b"null\n", b"17\n", b'"charged"\n', b"\x00\x00\n", b"\xff\n"]
    damages += [b'{"type": "refunded", "run": "a", "round": 1}\n', b'{"type": "charged"}\n']
    damages += [whole[1].replace(b"gradients", b"gradient"), whole[1].replace(b"1", b"x"), whole[1][:-5] + b"\n"]
    damages += [whole[1].replace(b'"round": 1', b'"round": Infinity')]
    for place in range(len(whole) - 1):
        for damage in damages:
            with pytest.raises(LedgerCorrupt, match=f"line {place + 1} of"):
                opens(b"".join([*whole[:place], damage, *whole[place + 1 :]]))
    with pytest.raises(LedgerCorrupt, match="second charge"):
        opens(b"".join([*whole, whole[1]]))
    with pytest.raises(LedgerCorrupt, match="line 2"):
        opens(whole[0] + b"".join(whole[1:]).replace(b"{", b"", 1))
    with pytest.raises(ConfigError, match="opened for delta"):
        Ledger(tmp_path / "whole", max_epsilon=10.0, delta=1e-6)


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
    assert [line["type"] for line in lines(tmp_path)].count("unprotected") == 1


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


# Forks children that charge round after round and tell of it in a file; kills them where told so.
DRIVER = textwrap.dedent("""
    import os, signal, sys, time
    from pathlib import Path
    from common.errors import BudgetExhausted
    from common.privacy.accounting import Release
    from common.privacy.ledger import Ledger

    folder, max_epsilon, delays = Path(sys.argv[1]), float(sys.argv[2]), [float(text) for text in sys.argv[3:]]
    step = Release("gradients", 2.0, 0.1)

    def charge_on(number, stride, told):
        ledger = Ledger(folder, max_epsilon=max_epsilon, delta=1e-5)
        try:
            while True:
                if ledger.charge("a" * 32, number, step, [step], "asked") is None:
                    os.write(told, f"charged {number}\\n".encode())
                    ledger.release("a" * 32, number, f"reply {number}".encode() * 1000)
                    os.write(told, f"released {number}\\n".encode())
                number += stride
        except BudgetExhausted:
            os.write(told, b"exhausted\\n")
            os._exit(7)

    def fork(number, stride, name):
        told = os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        return os.fork() or charge_on(number, stride, told)

    if not delays:
        children = [fork(first, 2, f"told-{first}") for first in (0, 1)]
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [7, 7]
    for i, delay in enumerate(delays):
        child = fork(1000 * i, 1, f"told-{i}")
        while not (folder / f"told-{i}").stat().st_size:
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
""")


def drive(folder: Path, *arguments: float) -> list[list[str]]:
    """Run the driver; what each child told."""
    subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), *map(str, arguments)],
        check=True,
        timeout=250,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return [path.read_text().splitlines() for path in sorted(folder.glob("told-*"))]


def numbers(told: list[str], kind: str) -> list[int]:
    return [int(line.split()[1]) for line in told if line.startswith(kind)]


def test_two_processes_share_one_budget(tmp_path: Path) -> None:
    told = drive(tmp_path, 3.0)
    assert [text[-1] for text in told] == ["exhausted"] * 2
    ledger = open_ledger(tmp_path, 3.0)
    charged = [number for text in told for number in numbers(text, "charged")]
    assert len(charged) == len(set(charged)) == len(ledger.releases)
    assert 2.5 < ledger.epsilon <= 3.0
    with pytest.raises(BudgetExhausted):
        charge(ledger, 10**6)


def test_a_charge_that_was_told_survives_kill_9(tmp_path: Path) -> None:
    """Killed at whatever moment, the file holds every charge and release that a client may have acted on."""
    told = drive(tmp_path, 1e6, 0.0, 0.002, 0.005, 0.011, 0.03, 0.0)
    ledger = open_ledger(tmp_path, 1e6)
    kept = lines(tmp_path)
    for kind in ("charged", "released"):
        rounds = [int(line["round"]) for line in kept if line["type"] == kind]  # type: ignore[call-overload]
        assert rounds == sorted(set(rounds))
        assert {number for text in told for number in numbers(text, kind)} <= set(rounds)
        assert len(rounds) >= (6 if kind == "charged" else 1)
    last = rounds[-1]
    if (tmp_path / "released.bin").read_bytes() == f"reply {last}".encode() * 1000:
        assert charge(ledger, last) == f"reply {last}".encode() * 1000
    else:
        # Killed while the next round's answer took its place: nobody asks again for a round that was followed by one.
        assert (RUN, last + 1) in {(line["run"], line["round"]) for line in kept if line["type"] == "charged"}
        with pytest.raises(PrivacyError, match="no longer kept"):
            charge(ledger, last)
    assert charge(ledger, last + 2) is None
