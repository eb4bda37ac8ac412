"""Whatever is asked in whatever order, with crashes and roll-backs between, a ledger never passes its budget nor
answers twice."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.errors import BudgetExhausted, LedgerCorrupt, PrivacyError
from common.privacy.accounting import Release, epsilon_of
from common.privacy.chain import remember
from common.privacy.ledger import Ledger
from common.privacy.ledger_report import verify_ledger

DELTA = 1e-5
ROUNDS = st.integers(1, 4)
RUNS = st.sampled_from(["a" * 32, "a" * 32, "b" * 32])
DIGESTS = st.sampled_from("xxy")
RELEASES = st.sampled_from(
    [
        Release("moments", 3.0, 1.0),
        Release("gradients", 1.0, 0.1),
        Release("gradients", 0.7, 0.3, 2),
        Release("gradients", 5.0, 0.05, 10),
        Release("gradients", 0.2, 0.5),
    ]
)
FILES = ("ledger.jsonl", "ledger.head", "ledger.key", "released.bin")


class LedgerMachine(RuleBasedStateMachine):
    """Two handles on one ledger, a coordinator that remembers heads, a model of what was promised, and a disk that is
    torn, rolled back and restored.

    Every round is asked as the client's app asks it: the witness first, then the charge. What was promised is what
    anybody saw: a reply stays sent whatever becomes of the disk.
    """

    @initialize(max_epsilon=st.sampled_from([0.5, 2.0, 6.0, 20.0, 20.0, 60.0]))
    def begin(self, max_epsilon: float) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.max_epsilon = max_epsilon
        self.charged: dict[tuple[str, int], tuple[Release, str]] = {}
        self.released: dict[tuple[str, int], bytes] = {}
        self.last: tuple[str, int] | None = None
        self.heads: dict[str, str] = {}
        self.copies: list[dict[str, bytes]] = []  # of the whole folder, after each record
        self.newest: dict[str, bytes] | None = None  # what the disk held before it was rolled back
        self.open_both()

    def open(self) -> Ledger:
        return Ledger(self.folder, max_epsilon=self.max_epsilon, delta=DELTA)

    def open_both(self) -> None:
        self.ledgers = [self.open(), self.open()]

    def content(self) -> bytes:
        return (self.folder / "ledger.jsonl").read_bytes()

    def copy(self) -> dict[str, bytes]:
        return {name: (self.folder / name).read_bytes() for name in FILES if (self.folder / name).exists()}

    def put(self, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            with (self.folder / name).open("r+b") as file:
                file.truncate(0)
                file.write(content)
        self.open_both()

    def reply_from(self, ledger: Ledger) -> None:
        """The coordinator reads a reply's head."""
        remember(self.heads, ledger.head())

    @rule(which=st.integers(0, 1), run=RUNS, server_round=ROUNDS, release=RELEASES, digest=DIGESTS)
    def ask(self, which: int, run: str, server_round: int, release: Release, digest: str) -> None:
        key, ledger = (run, server_round), self.ledgers[which]
        before = self.content()
        known = self.charged.get(key)
        older = any(other == run and number > server_round for other, number in self.charged)
        try:
            ledger.check_witness([bytes.fromhex(head) for head in self.heads.values()])
            answer = ledger.charge(run, server_round, release, [release], digest)
        except LedgerCorrupt:
            assert self.newest is not None
        except BudgetExhausted:
            assert known is None
            assert self.content() == before
        except PrivacyError:
            assert older if known is None else known[1] != digest or (key in self.released and key != self.last)
            assert self.content() == before
        else:
            assert self.newest is None
            assert known is not None or not older
            self.reply_from(ledger)
            if known is None:
                assert answer is None
                self.charged[key] = (release, digest)
                self.copies.append(self.copy())
            else:
                assert known[1] == digest
                assert answer == self.released.get(key)

    @precondition(lambda self: self.newest is None)
    @rule(which=st.integers(0, 1), run=RUNS, server_round=ROUNDS, reply=st.binary(max_size=4), lost=st.booleans())
    def release(self, which: int, run: str, server_round: int, reply: bytes, lost: bool) -> None:
        key, ledger = (run, server_round), self.ledgers[which]
        try:
            ledger.release(run, server_round, reply)
        except PrivacyError:
            assert key not in self.charged or key in self.released
        else:
            assert key in self.charged
            assert key not in self.released
            self.released[key] = reply
            self.last = key
            self.copies.append(self.copy())
            if not lost:
                self.reply_from(ledger)

    @precondition(lambda self: self.newest is None)
    @rule(which=st.integers(0, 1), run=RUNS, server_round=ROUNDS, release=RELEASES, reply=st.binary(max_size=4))
    def whole_round(self, which: int, run: str, server_round: int, release: Release, reply: bytes) -> None:
        """Asked, answered, and asked again by a coordinator that lost the answer."""
        self.ask(which, run, server_round, release, "x")
        self.release(which, run, server_round, reply, False)
        self.ask(1 - which, run, server_round, release, "x")

    @rule(torn=st.binary(max_size=30).filter(lambda text: b"\n" not in text))
    def crash(self, torn: bytes) -> None:
        """The power goes while a next line is written."""
        with (self.folder / "ledger.jsonl").open("ab") as file:
            file.write(torn)
        self.open_both()

    def older_copies(self) -> list[dict[str, bytes]]:
        """Those that the coordinator knows to be past."""
        seen = max((int.from_bytes(bytes.fromhex(head)[32:40], "big") for head in self.heads.values()), default=0)
        return [copy for copy in self.copies if copy["ledger.jsonl"].count(b"\n") < seen]

    @precondition(lambda self: self.newest is None and self.older_copies())
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        """The whole folder as it was, its head included."""
        older, newest = data.draw(st.sampled_from(self.older_copies())), self.copy()
        self.put(older)
        self.newest = newest

    @precondition(lambda self: self.newest is not None)
    @rule()
    def restore(self) -> None:
        assert self.newest is not None
        self.put(self.newest)
        self.newest = None

    @invariant()
    def the_budget_holds(self) -> None:
        if not hasattr(self, "folder"):
            return
        releases = [release for release, _ in self.charged.values()]
        assert epsilon_of(releases, DELTA) <= self.max_epsilon
        if self.newest is None:
            fresh = self.open()
            assert sorted(fresh.releases) == sorted(releases)
            assert fresh.epsilon <= self.max_epsilon
            assert fresh.epsilon == self.ledgers[0].epsilon or self.ledgers[0].releases != fresh.releases

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            report = verify_ledger(self.folder)
            assert report.problem is None
            assert report.epsilon <= self.max_epsilon
            shutil.rmtree(self.folder)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
