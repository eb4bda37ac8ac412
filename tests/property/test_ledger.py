"""Whatever is asked in whatever order, with crashes between, a ledger never passes its budget nor answers twice."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.errors import BudgetExhausted, PrivacyError
from common.privacy.accounting import Release, epsilon_of
from common.privacy.ledger import Ledger

DELTA = 1e-5
ROUNDS = st.integers(1, 8)
RUNS = st.sampled_from(["a" * 32, "b" * 32])
RELEASES = st.sampled_from(
    [
        Release("moments", 3.0, 1.0),
        Release("gradients", 1.0, 0.1),
        Release("gradients", 0.7, 0.3, 2),
        Release("gradients", 5.0, 0.05, 10),
        Release("gradients", 0.2, 0.5),
    ]
)


class LedgerMachine(RuleBasedStateMachine):
    """Two handles on one file, a model of what was promised, and a crash that may tear the last line."""

    @initialize(max_epsilon=st.sampled_from([0.5, 2.0, 6.0, 20.0]))
    def begin(self, max_epsilon: float) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.max_epsilon = max_epsilon
        self.charged: dict[tuple[str, int], tuple[Release, str]] = {}
        self.released: dict[tuple[str, int], bytes] = {}
        self.last: tuple[str, int] | None = None
        self.ledgers = [self.open(), self.open()]

    def open(self) -> Ledger:
        return Ledger(self.folder, max_epsilon=self.max_epsilon, delta=DELTA)

    @rule(which=st.integers(0, 1), run=RUNS, server_round=ROUNDS, release=RELEASES, digest=st.sampled_from("xy"))
    def charge(self, which: int, run: str, server_round: int, release: Release, digest: str) -> None:
        key = (run, server_round)
        before = (self.folder / "ledger.jsonl").read_bytes()
        known = self.charged.get(key)
        try:
            answer = self.ledgers[which].charge(run, server_round, release, [release], digest)
        except BudgetExhausted:
            assert known is None
            assert (self.folder / "ledger.jsonl").read_bytes() == before
        except PrivacyError:
            assert known is not None
            assert known[1] != digest or (key in self.released and key != self.last)
            assert (self.folder / "ledger.jsonl").read_bytes() == before
        else:
            if known is None:
                assert answer is None
                self.charged[key] = (release, digest)
            else:
                assert known[1] == digest
                assert answer == self.released.get(key)

    @rule(which=st.integers(0, 1), run=RUNS, server_round=ROUNDS, reply=st.binary(max_size=4))
    def release(self, which: int, run: str, server_round: int, reply: bytes) -> None:
        key = (run, server_round)
        try:
            self.ledgers[which].release(run, server_round, reply)
        except PrivacyError:
            assert key not in self.charged or key in self.released
        else:
            assert key in self.charged
            assert key not in self.released
            self.released[key] = reply
            self.last = key

    @rule(torn=st.binary(max_size=30).filter(lambda text: b"\n" not in text))
    def crash(self, torn: bytes) -> None:
        """The power goes while a next line is written."""
        with (self.folder / "ledger.jsonl").open("ab") as file:
            file.write(torn)
        self.ledgers = [self.open(), self.open()]

    @invariant()
    def the_budget_holds(self) -> None:
        if not hasattr(self, "folder"):
            return
        releases = [release for release, _ in self.charged.values()]
        fresh = self.open()
        assert sorted(fresh.releases) == sorted(releases)
        assert fresh.epsilon <= self.max_epsilon
        assert epsilon_of(releases, DELTA) <= self.max_epsilon

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
