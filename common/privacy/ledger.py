"""A client's ledger: what was spent, on disk before any face is looked at.

An append-only file of JSON lines, flushed to the disk line by line:

    {"type": "opened", "order": 3.2, "delta": 1e-05}
    {"type": "charged", "run": ..., "round": 7, "mechanism": "gradients", "noise_multiplier": ..., "sample_rate": ..., "steps": 1,
     "instructions": SHA-256 of what was asked}
    {"type": "released", "run": ..., "round": 7, "reply": SHA-256 of what was answered}
    {"type": "unprotected", "run": ...}    a run that the owner allowed to see these faces without any privacy

Claim: whatever is asked, in whatever order and after whatever crash, the releases charged here are together
(max_epsilon, delta) differentially private under adding or removing one unit. The RDP order is chosen at the first
charge from the schedule then planned and never again, which makes the running total a privacy filter for noise and
rates chosen later in view of earlier answers (Feldman, Zrnic 2021, theorem 4.3). A round that was charged and not
released may be computed again under the same charge, since nobody saw the first result; once released, the same bytes
are sent again and nothing else. There is no refund.
"""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import BudgetExhausted, ConfigError, LedgerCorrupt, PrivacyError
from common.files import flush_folder, write_atomically
from common.privacy.accounting import MECHANISMS, ORDERS, Release, epsilon_at_orders, filter_order, rdp_of


class Ledger:
    """The ledger in `directory`/ledger.jsonl, with the last released reply beside it in `released.bin`.

    One budget for one data set, over all runs and coordinators. Raises LedgerCorrupt where the file cannot be trusted.
    """

    def __init__(self, directory: Path, *, max_epsilon: float, delta: float) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)  # a reply under `central` is a clear sum
        self._path = directory / "ledger.jsonl"
        self._reply_path = directory / "released.bin"
        self._max_epsilon = max_epsilon
        self._delta = delta
        self._forget()
        with self._locked():
            flush_folder(directory)

    @property
    def epsilon(self) -> float:
        """What was spent, at the ledger's fixed RDP order: the bound on which refusal rests."""
        if self._unprotected:
            return math.inf
        if self._order is None:
            return 0.0
        return float(epsilon_at_orders(self._rdp, self._delta)[self._order])

    @property
    def releases(self) -> list[Release]:
        """Every charge, in order."""
        return list(self._releases)

    def charge(
        self, run_id: str, server_round: int, release: Release, plan: Sequence[Release], instructions: str
    ) -> bytes | None:
        """Charge a round before its data is touched.

        `plan`: the schedule of the run, used at a ledger's first charge to fix the RDP order; it binds nobody. `instructions`: their
        digest. Returns None where the round is to be computed, or the very bytes to send again where it was answered
        before. Raises BudgetExhausted before anything is written where max_epsilon would be passed, and PrivacyError
        where a round number comes back with other instructions.
        """
        with self._locked():
            known = self._charged.get((run_id, server_round))
            if known is not None:
                return self._repeat(run_id, server_round, known, instructions)
            if self._unprotected:
                raise BudgetExhausted(
                    f"these faces were given to run {self._unprotected} without any privacy, so no epsilon holds for them: "
                    "private runs need other faces"
                )
            order = self._order
            if order is None:
                order = filter_order(plan or [release], self._max_epsilon, self._delta)
            rdp = self._rdp + rdp_of([release])
            epsilon = float(epsilon_at_orders(rdp, self._delta)[order])
            if not epsilon <= self._max_epsilon:
                raise BudgetExhausted(
                    f"round {server_round} would bring epsilon from {self.epsilon:.4g} to {epsilon:.4g}, over the owner's "
                    f"max-epsilon {self._max_epsilon:g}; nothing was computed. Only the owner can raise max-epsilon"
                )
            if self._order is None:
                self._append({"type": "opened", "order": ORDERS[order], "delta": self._delta})
            self._append(
                {
                    "type": "charged",
                    "run": run_id,
                    "round": server_round,
                    "mechanism": release.mechanism,
                    "noise_multiplier": release.noise_multiplier,
                    "sample_rate": release.sample_rate,
                    "steps": release.steps,
                    "instructions": instructions,
                }
            )
            return None

    def note_unprotected(self, run_id: str) -> None:
        """Write down, before it happens, that a run gets these faces without privacy. From then on epsilon is infinite."""
        with self._locked():
            if not self._unprotected:
                self._append({"type": "unprotected", "run": run_id})

    def forget_reply(self) -> None:
        """Delete the last reply, where nobody can ask for it again."""
        self._reply_path.unlink(missing_ok=True)

    def release(self, run_id: str, server_round: int, reply: bytes) -> None:
        """Put the noised reply on the disk and note its hash: from here on this round is answered with these bytes
        only."""
        with self._locked():
            if (run_id, server_round) not in self._charged or (run_id, server_round) in self._released:
                raise PrivacyError(
                    f"round {server_round} was not charged, or was answered before: nothing may be released"
                )
            write_atomically(self._reply_path, reply)
            digest = hashlib.sha256(reply).hexdigest()
            self._append({"type": "released", "run": run_id, "round": server_round, "reply": digest})

    def _repeat(self, run_id: str, server_round: int, known: str, instructions: str) -> bytes | None:
        if known != instructions:
            raise PrivacyError(f"round {server_round} was charged for other instructions; a round is answered once")
        digest = self._released.get((run_id, server_round))
        if digest is None:
            return None
        reply = self._reply_path.read_bytes() if self._reply_path.exists() else b""
        if hashlib.sha256(reply).hexdigest() != digest:
            raise PrivacyError(
                f"round {server_round} was answered and its answer is no longer kept; ask for a later round"
            )
        return reply

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file against other processes, and take in what they wrote."""
        with self._path.open("a+b") as self._file:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            size = os.fstat(self._file.fileno()).st_size
            if size < self._size:
                raise LedgerCorrupt(
                    f"{self._path} has shrunk from {self._size} to {size} bytes: this client trains no more until its owner "
                    "restores the ledger"
                )
            if size != self._size:
                self._reload()
            yield

    def _forget(self) -> None:
        self._size = 0
        self._unprotected = ""
        self._order: int | None = None
        self._rdp = np.zeros(len(ORDERS))
        self._releases: list[Release] = []
        self._charged: dict[tuple[str, int], str] = {}
        self._released: dict[tuple[str, int], str] = {}

    def _reload(self) -> None:
        self._forget()
        self._file.seek(0)
        content = self._file.read()
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            # A line without its end was never acknowledged: the power went while it was written.
            self._file.truncate(len(content) - len(torn))
            os.fsync(self._file.fileno())
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._take_in(json.loads(line))
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise LedgerCorrupt(
                    f"line {number} of {self._path} is damaged ({error}): this client trains no more until its owner restores "
                    "the ledger from a copy that is not older than the last round"
                ) from error
        self._size = len(content) - len(torn)

    def _append(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take_in(record)
        self._size += len(line)

    def _take_in(self, record: dict[str, Any]) -> None:
        kind = record["type"]
        if kind == "unprotected":
            self._unprotected = str(record["run"])
            return
        if (kind == "opened") != (self._order is None):
            raise ValueError("the order is not fixed first, and once")
        if kind == "opened":
            self._order = ORDERS.index(record["order"])
            if record["delta"] != self._delta:
                raise ConfigError(
                    f"this ledger was opened for delta {record['delta']:g} and the policy says {self._delta:g}: a ledger keeps its "
                    f"delta; give {record['delta']:g}"
                )
            return
        key = (str(record["run"]), int(record["round"]))
        if kind == "charged":
            release = Release(
                record["mechanism"],
                float(record["noise_multiplier"]),
                float(record["sample_rate"]),
                int(record["steps"]),
            )
            if release.mechanism not in MECHANISMS or release.steps < 1 or key in self._charged:
                raise ValueError(f"an unknown mechanism, no steps, or a second charge of round {key[1]}")
            self._charged[key] = record["instructions"]
            self._releases.append(release)
            self._rdp = self._rdp + rdp_of([release])
        elif kind == "released":
            if key not in self._charged or key in self._released:
                raise ValueError(f"round {key[1]} was not charged, or was answered twice")
            self._released[key] = record["reply"]
        else:
            raise ValueError(f"a record of unknown type {kind!r}")
