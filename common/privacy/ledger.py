"""A client's ledger: what was spent, on disk before any face is looked at.

Claim: whatever is asked, in whatever order and after whatever crash, the releases charged here are together
(max_epsilon, delta) differentially private under adding or removing one unit. The RDP order is chosen at the first
charge from the schedule then planned and never again, which makes the running total a privacy filter for noise and
rates chosen later in view of earlier answers (Feldman, Zrnic 2021, theorem 4.3). A round that was charged and not
released may be computed again under the same charge, since nobody saw the first result; once released, the same bytes
are sent again and nothing else. There is no refund.

What is on the disk is `common.privacy.ledger_file`, what its records mean `common.privacy.ledger_state`. An older copy
of the whole folder fits together and cannot be told from the newest by itself: that takes a witness. Every reply carries
the ledger's signed head, the coordinator sends the heads that it knows along with each round, and a ledger on whose
chain its own head is not has been rolled back. A coordinator that sends no head back witnesses nothing.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import BudgetExhausted, LedgerCorrupt, LedgerUnwritable, PrivacyError, ProtocolError
from common.files import flush_folder, write_atomically
from common.privacy.accounting import MECHANISMS, ORDERS, Release, epsilon_at_order, filter_order
from common.privacy.chain import MAX_HEADS, Head, owner_of
from common.privacy.ledger_file import LedgerFile
from common.privacy.ledger_state import LedgerState, total_after
from common.privacy.units import PrivacyUnit

_REPLY_NAME = "released.bin"


class Ledger:
    """The ledger in `directory`, with the last released reply beside it in `released.bin`.

    One budget for one data set, over all runs and coordinators. unit: the least that its owner protects; IMAGE allows both
    units. public_key: the ledger that it must be; empty takes any, and makes one where there is none. key_path: the signing
    key's place, if not there.

    Raises LedgerCorrupt where the files cannot be trusted, LedgerMoved where they are a copy, LedgerUnwritable where the
    disk takes nothing; so do all methods that write.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_epsilon: float,
        delta: float,
        unit: PrivacyUnit = PrivacyUnit.IMAGE,
        public_key: str = "",
        key_path: Path | None = None,
    ) -> None:
        if public_key and not (directory / "ledger.jsonl").exists():
            raise LedgerCorrupt(
                f"the ledger {public_key[:16]} is not in {directory}: mount its disk, or name its folder as state-dir. A new one would "
                "spend the budget again; only `visard client init` makes one"
            )
        _make_private(directory)
        self._reply_path = directory / _REPLY_NAME
        self._max_epsilon = max_epsilon
        self._delta = delta
        self._state = LedgerState(delta, unit)
        self._file = LedgerFile(directory, self._state.take_in, key_path)
        with self._file.locked():
            _sweep(directory)
        if public_key and self.public_key != public_key:
            raise LedgerCorrupt(
                f"{directory} holds the ledger {self.public_key[:16]}, and the policy names {public_key[:16]}: another ledger would "
                "spend the budget again; name the folder of the right one as state-dir"
            )

    @property
    def epsilon(self) -> float:
        """What was spent, at the ledger's fixed RDP order: the bound on which refusal rests."""
        return self._state.epsilon

    @property
    def releases(self) -> list[Release]:
        """Every charge, in order."""
        return list(self._state.releases)

    @property
    def public_key(self) -> str:
        """The public key that names this ledger, 64 hex digits."""
        return self._file.public_key.hex()

    @property
    def order(self) -> float | None:
        """The RDP order at which this ledger counts; None before its first charge."""
        return self._state.order

    @property
    def rolled_back(self) -> bool:
        """Whether a witness has shown that records are missing: nothing is answered any more."""
        return self._state.rolled_back

    def head(self) -> Head:
        """Number and hash of the last record, signed: what a reply carries for the coordinator to remember."""
        with self._file.locked():
            return self._file.head()

    def check_witness(self, heads: Sequence[bytes]) -> None:
        """Compare with the heads that a coordinator remembers; call it before anything is charged.

        Heads of other ledgers are passed over. Raises LedgerCorrupt, now and ever after, where this ledger's own is not
        on its chain: an older copy was put in its place. Being ahead of it is normal, a reply may be lost. Raises ProtocolError for what
        is no head, for two heads of this ledger, and for one that its key never signed.
        """
        if len(heads) > MAX_HEADS:
            raise ProtocolError(f"a witness of {len(heads)} heads; the limit is {MAX_HEADS}")
        with self._file.locked():
            try:
                mine = [Head.from_bytes(head) for head in heads if owner_of(head) == self._file.public_key]
            except ValueError as error:
                raise ProtocolError(f"the witness is refused: {error}") from error
            if len(mine) > 1:
                raise ProtocolError(f"the witness is refused: {len(mine)} heads of one ledger")
            for head in mine:
                if not self._file.holds(head) and not self._state.rolled_back:
                    # On the disk, so that no other coordinator is answered either.
                    self._file.append({"type": "rolled-back", "head": head.to_bytes().hex()})
            self._refuse_rolled_back()

    def charge(
        self,
        run_id: str,
        server_round: int,
        release: Release,
        plan: Sequence[Release],
        instructions: str,
        unit: PrivacyUnit = PrivacyUnit.PERSON,
    ) -> bytes | None:
        """Charge a round before its data is touched.

        `plan`: the schedule of the run, used at a ledger's first charge to fix the RDP order; it binds nobody.
        `instructions`: their digest. `unit`: what the release protects. Returns None where the round is to be computed, or
        the very bytes to send again where it was answered before. Raises BudgetExhausted before anything is written where
        max_epsilon would be passed, and PrivacyError where a round number comes back with other instructions, or after a
        later one.
        """
        with self._file.locked():
            state = self._state
            known = state.charged.get((run_id, server_round))
            if known is not None:
                return self._repeat(run_id, server_round, known, instructions)
            self._refuse_rolled_back()
            if server_round < state.last_rounds.get(run_id, 0):
                raise PrivacyError(
                    f"round {server_round} comes after round {state.last_rounds[run_id]} of its run: a run goes forward; ask for a "
                    "later round"
                )
            if state.unprotected:
                raise BudgetExhausted(
                    f"these faces were given to run {state.unprotected} without any privacy, so no epsilon holds for them: "
                    "private runs need other faces"
                )
            if release.mechanism not in MECHANISMS or release.steps < 1:
                raise PrivacyError(
                    f"{release.steps} steps of {release.mechanism!r}: want 1 or more, of one of {MECHANISMS}"
                )
            order = state.order
            if order is None:
                order = ORDERS[filter_order(plan or [release], self._max_epsilon, self._delta)]
            rdp = total_after(state.rdp, release, order)
            epsilon = epsilon_at_order(rdp, order, self._delta)
            if not epsilon <= min(self._max_epsilon, sys.float_info.max):
                raise BudgetExhausted(
                    f"round {server_round} would bring epsilon from {self.epsilon:.4g} to {epsilon:.4g}, over the owner's "
                    f"max-epsilon {self._max_epsilon:g}; nothing was computed. Only the owner can raise max-epsilon"
                )
            self._file.append(
                {
                    "type": "charged",
                    "run": run_id,
                    "round": server_round,
                    "mechanism": release.mechanism,
                    "noise_multiplier": release.noise_multiplier,
                    "sample_rate": release.sample_rate,
                    "steps": release.steps,
                    "unit": str(unit),
                    "instructions": instructions,
                    "order": order,
                    "delta": self._delta,
                    "rdp": rdp,
                }
            )
            return None

    def note_unprotected(self, run_id: str) -> None:
        """Write down, before it happens, that a run gets these faces without privacy. From then on epsilon is infinite."""
        with self._file.locked():
            if not self._state.unprotected:
                self._file.append({"type": "unprotected", "run": run_id})

    def forget_reply(self) -> None:
        """Delete the last reply, where nobody can ask for it again."""
        self._reply_path.unlink(missing_ok=True)

    def release(self, run_id: str, server_round: int, reply: bytes) -> None:
        """Put the noised reply on the disk and note its hash: from here on this round is answered with these bytes
        only."""
        with self._file.locked():
            state = self._state
            if (run_id, server_round) not in state.charged or (run_id, server_round) in state.released:
                raise PrivacyError(
                    f"round {server_round} was not charged, or was answered before: nothing may be released"
                )
            write_atomically(self._reply_path, reply)
            digest = hashlib.sha256(reply).hexdigest()
            self._file.append({"type": "released", "run": run_id, "round": server_round, "reply": digest})

    def unmask(self, run_id: str, server_round: int, request: str) -> None:
        """Note, before it happens, that this client helps to open a round's secure sum. `request`: the request's digest.

        Raises PrivacyError for a round that was not answered, and for a second request that is another.
        """
        with self._file.locked():
            state, key = self._state, (run_id, server_round)
            self._refuse_rolled_back()
            if key not in state.released:
                raise PrivacyError(f"round {server_round} was not answered here: there is nothing of it to unmask")
            known = state.unmasked.get(key)
            if known is None:
                self._file.append({"type": "unmasked", "run": run_id, "round": server_round, "request": request})
            elif known != request:
                raise PrivacyError(f"round {server_round} was unmasked for another request; a round is opened once")

    def _refuse_rolled_back(self) -> None:
        if self._state.rolled_back:
            raise LedgerCorrupt(
                f"a coordinator remembers a record of this ledger that {self._file.path} does not hold: an older copy was put in its "
                "place. What was spent since is missing, so this client trains no more until its owner restores the newest folder; if "
                "that is gone for good, the budget of these faces counts as spent"
            )

    def _repeat(self, run_id: str, server_round: int, known: str, instructions: str) -> bytes | None:
        if known != instructions:
            raise PrivacyError(f"round {server_round} was charged for other instructions; a round is answered once")
        digest = self._state.released.get((run_id, server_round))
        if digest is None:
            return None
        reply = self._reply_path.read_bytes() if self._reply_path.exists() else b""
        if hashlib.sha256(reply).hexdigest() != digest:
            raise PrivacyError(
                f"round {server_round} was answered and its answer is no longer kept; ask for a later round"
            )
        return reply


def adopt_ledger(directory: Path, key_path: Path | None = None) -> bool:
    """Write down that the ledger in `directory` has its place here from now on: the owner's word that it is the only
    copy in use and that no record is missing.

    For a ledger restored from a backup or moved to another machine; also one whose head file is gone or damaged.
    Returns whether there was anything to adopt. Raises LedgerCorrupt where there is no ledger, or one that cannot be
    trusted; a coordinator's witness still refuses one that is too old.
    """
    if not (directory / "ledger.jsonl").exists():
        raise LedgerCorrupt(f"there is no ledger in {directory}: nothing to adopt")
    file = LedgerFile(directory, LedgerState().take_in, key_path, adopt=True)
    with file.locked():
        if not (file.moved or file.headless):
            return False
        file.append({"type": "adopted", "place": file.place})
        return True


def _make_private(directory: Path) -> None:
    try:
        if not directory.is_dir():
            directory.mkdir(parents=True)
            flush_folder(directory.parent)
        if directory.stat().st_mode & 0o077:
            directory.chmod(0o700)  # a reply under `central` is a clear sum
    except OSError as error:
        raise LedgerUnwritable(
            f"no ledger can be kept in {directory} ({error}): nothing was released. Make it writable, or give another state-dir"
        ) from error


def _sweep(directory: Path) -> None:
    """Delete what a killed process left of a reply; nobody is writing one now, since the ledger is locked."""
    for leftover in directory.glob(f".{_REPLY_NAME}.*.tmp"):
        leftover.unlink(missing_ok=True)
