"""A process that charges and replies, killed again and again: what it told stays true, and it never tells two things.

The child is a client at its barest: it charges a round, draws an answer that no two draws share, releases it, and tells
of each step on a pipe, the answer last. Killed at a random moment, it is started again on the round that it was asked
for, as a coordinator asks again. Two processes share a ledger in the other test.
"""

import hashlib
import os
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest

from common.errors import BudgetExhausted
from common.privacy.accounting import ORDERS, Release, epsilon_at_order, rdp_of
from common.privacy.ledger import Ledger
from common.privacy.ledger_report import charges, verify_ledger

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
RUN, STEP = "a" * 32, Release("gradients", 2.0, 0.1)

# Forked from one process that has read all its modules, so that a kill takes milliseconds.
KILLS = textwrap.dedent("""
    import hashlib, os, random, signal, sys, time
    from pathlib import Path
    from common.errors import PrivacyError
    from common.privacy.accounting import Release, rdp_of
    from common.privacy.ledger import Ledger

    folder, told_path, kills, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Release("gradients", 2.0, 0.1)
    told = os.open(told_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def work(server_round, begun):
        ledger = Ledger(folder, max_epsilon=1e6, delta=1e-5)
        os.write(begun, b"x")
        while True:
            try:
                reply = ledger.charge("a" * 32, server_round, step, [step], f"asked {server_round}")
            except PrivacyError as error:
                # The next round's answer had begun to take its place: never computed again.
                os.write(told, f"refused {server_round} {type(error).__name__}\\n".encode())
                server_round += 1
                continue
            os.write(told, f"charged {server_round}\\n".encode())
            if reply is None:
                reply = os.urandom(20_000)
                ledger.release("a" * 32, server_round, reply)
            # From here on the coordinator has it, and asks for the next one.
            os.write(told, f"replied {server_round} {hashlib.sha256(reply).hexdigest()}\\n".encode())
            server_round += 1

    rdp_of([step])  # priced once, here: a child would be killed while it did
    random.seed(int(sys.argv[4]))
    for _ in range(kills):
        replied = [line.split() for line in Path(told_path).read_text().splitlines() if line.startswith("replied")]
        # A reply may be lost on its way: then its round is asked for again.
        asked = int(replied[-1][1]) + random.randint(0, 1) if replied else 1
        reader, begun = os.pipe()
        child = os.fork()
        if not child:
            try:
                work(asked, begun)
            finally:
                os._exit(3)
        if random.random() < 0.9:
            os.read(reader, 1)  # else it may die while it reads the ledger
        time.sleep(random.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(reader), os.close(begun)
""")

SHARED = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    from common.errors import BudgetExhausted
    from common.privacy.accounting import Release
    from common.privacy.ledger import Ledger

    def work(first):
        ledger, server_round, run = Ledger(Path(sys.argv[1]), max_epsilon=3.0, delta=1e-5), first, "ab"[first] * 32
        told = os.open(sys.argv[2], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        step = Release("gradients", 2.0, 0.1)
        try:
            while True:
                assert ledger.charge(run, server_round, step, [step], "asked") is None
                os.write(told, f"charged {server_round}\\n".encode())
                ledger.release(run, server_round, b"reply")
                server_round += 2
        except BudgetExhausted:
            os._exit(7)

    children = [os.fork() or work(first) for first in (0, 1)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [7, 7]
""")


def run(script: str, *arguments: object) -> None:
    subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        check=True,
        timeout=280,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    ("kills", "seed"), [(40, 0), *(pytest.param(250, seed, marks=pytest.mark.slow) for seed in range(1, 5))]
)
def test_killed_at_random_moments(tmp_path: Path, kills: int, seed: int) -> None:
    folder, told = tmp_path / "ledger", tmp_path / "told"
    told.touch()
    run(KILLS, folder, told, kills, seed)

    charged, replied, refused = set(), defaultdict(set), []
    for kind, server_round, *said in (line.split() for line in told.read_text().splitlines()):
        charged.add(int(server_round))
        if kind == "replied":
            replied[int(server_round)].add(said[0])
        elif kind == "refused":
            refused.append((int(server_round), said[0]))
    assert all(number in replied and error == "PrivacyError" for number, error in refused)
    assert all(len(answers) == 1 for answers in replied.values())  # never two answers for one round
    report = verify_ledger(folder)
    assert report.problem is None
    kept = list(charges(folder))
    rounds = [entry.server_round for entry in kept]
    assert rounds == list(range(1, len(rounds) + 1))  # nothing charged twice
    assert charged <= set(rounds)  # nothing lost
    answered = {entry.server_round for entry in kept if entry.answered}
    assert set(replied) <= answered
    assert len(rounds) - len(answered) <= 1  # only a round that is under way
    assert len(replied) > kills / 4, "killed too soon to tell anything"
    assert report.order is not None
    spent = len(rounds) * rdp_of([STEP])[ORDERS.index(report.order)]
    assert report.epsilon == pytest.approx(epsilon_at_order(spent, report.order, 1e-5), rel=1e-6)

    ledger = Ledger(folder, max_epsilon=1e6, delta=1e-5)
    assert len(ledger.releases) == len(rounds)
    assert ledger.charge(RUN, len(rounds) + 1, STEP, [STEP], "asked") is None
    assert not list(folder.glob("*.tmp"))
    assert not list(folder.glob(".*.tmp"))
    last = max(answered)
    again = (folder / "released.bin").read_bytes()
    if last == len(rounds):
        assert ledger.charge(RUN, last, STEP, [STEP], f"asked {last}") == again
        assert replied.get(last, {hashlib.sha256(again).hexdigest()}) == {hashlib.sha256(again).hexdigest()}


def test_two_processes_share_one_budget(tmp_path: Path) -> None:
    folder, told = tmp_path / "ledger", tmp_path / "told"
    run(SHARED, folder, told)
    charged = [int(line.split()[1]) for line in told.read_text().splitlines()]
    ledger = Ledger(folder, max_epsilon=3.0, delta=1e-5)
    assert len(charged) == len(set(charged)) == len(ledger.releases)
    assert {number % 2 for number in charged} == {0, 1}
    assert 2.5 < ledger.epsilon <= 3.0
    assert verify_ledger(folder).problem is None
    with pytest.raises(BudgetExhausted):
        ledger.charge(RUN, 10**6, STEP, [STEP], "asked")
