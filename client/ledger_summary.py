"""What a ledger says, run by run, for its owner to read. Nothing is written: it may lie on a read-only disk."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import LedgerCorrupt
from common.faces.places import local_path
from common.privacy.accounting import Release, tight_epsilon_of
from common.privacy.chain import place_of
from common.privacy.ledger_file import FILE_NAME
from common.privacy.ledger_report import Charge, LedgerReport, charges, verify_ledger

# PRV takes up to a second for a run, longer for many different noises and for little noise: then it is left out.
MAX_TIGHT_RUNS, MAX_TIGHT_PAIRS, LEAST_TIGHT_NOISE = 5, 8, 0.4


@dataclass(frozen=True)
class RunSpent:
    """One run. epsilon: spent by all runs once its last round was charged, at the ledger's order; infinite for an
    unprotected run. tight_epsilon: the same by PRV, None where that takes long. charges: its own, in order.
    """

    run: str
    charges: tuple[Charge, ...]
    unprotected: bool
    epsilon: float
    tight_epsilon: float | None

    @property
    def answered(self) -> int:
        """Rounds whose reply was released."""
        return sum(charge.answered for charge in self.charges)

    @property
    def mechanisms(self) -> dict[str, list[Release]]:
        """Its releases by mechanism, in the order of their first use."""
        found: dict[str, list[Release]] = {}
        for charge in self.charges:
            found.setdefault(charge.release.mechanism, []).append(charge.release)
        return found


@dataclass(frozen=True)
class Spending:
    """A ledger's report and its runs, in the order of their first record.

    rolled_back: the line that says so; None where no witness showed it. moved: it lies elsewhere than it says. has_key:
    whether the signing key is beside it. charges: all, in order.
    """

    report: LedgerReport
    runs: tuple[RunSpent, ...]
    charges: tuple[Charge, ...]
    rolled_back: int | None
    moved: bool
    has_key: bool


def find_ledger(place: str) -> Path:
    """The ledger's file that an owner means: by its state folder, by the faces beside that, or by the file itself.

    Raises LedgerCorrupt where there is none; none is created.
    """
    path = local_path(place) or Path(place).resolve()
    beside = path.with_name(path.name + ".visard")
    for folder in (path, beside):
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    if path.is_file():
        return path
    raise LedgerCorrupt(
        f"there is no ledger in {path} nor in {beside}: give the state folder (DIR.visard), the faces' folder beside it, "
        f"or a {FILE_NAME}"
    )


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Keep a client from writing meanwhile, so that the lines and the head beside them belong together.

    Needs no leave to write. A disk that knows no locks is read without. Raises LedgerCorrupt where it cannot be opened.
    """
    try:
        handle = file.open("rb")
    except OSError as error:
        raise LedgerCorrupt(f"there is no ledger to read at {file} ({error})") from error
    with handle:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield


def summarise(file: Path) -> Spending:
    """Read a ledger run by run. Raises LedgerCorrupt at the first line that does not follow the one before."""
    with held(file):
        report, found = verify_ledger(file), tuple(charges(file))
        records = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
        inode = file.stat().st_ino
    return Spending(
        report=report,
        runs=_runs(report, found, records),
        charges=found,
        rolled_back=rolled_back_at(records),
        moved=_moved(report, records, inode),
        has_key=file.with_name("ledger.key").exists(),
    )


def read_rolled_back(file: Path) -> int | None:
    """The line in which a witness showed that records are missing. For a file whose lines were verified."""
    return rolled_back_at([json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]])


def rolled_back_at(records: list[dict[str, Any]]) -> int | None:
    """The line, from 1, of the first `rolled-back` record."""
    return next((number for number, record in enumerate(records, start=1) if record["type"] == "rolled-back"), None)


def _moved(report: LedgerReport, records: list[dict[str, Any]], inode: int) -> bool:
    places = [record["place"] for record in records if record["type"] in ("opened", "adopted")]
    try:
        return bool(places) and places[-1] != place_of(bytes.fromhex(report.public_key), inode)
    except ValueError:  # a key that is none is the report's problem
        return True


def _runs(report: LedgerReport, found: tuple[Charge, ...], records: list[dict[str, Any]]) -> tuple[RunSpent, ...]:
    open_runs = {str(record["run"]) for record in records if record["type"] == "unprotected"}
    names = dict.fromkeys(str(record["run"]) for record in records if record["type"] in ("charged", "unprotected"))
    pairs = {(charge.release.noise_multiplier, charge.release.sample_rate) for charge in found}
    quick = (
        len(names) <= MAX_TIGHT_RUNS
        and len(pairs) <= MAX_TIGHT_PAIRS
        and all(noise >= LEAST_TIGHT_NOISE for noise, _ in pairs)
    )
    runs = []
    for name in names:
        own = tuple(charge for charge in found if charge.run == name)
        unprotected = name in open_runs
        tight = None
        if quick and own and not unprotected and report.delta is not None:
            until = [charge.release for charge in found if charge.line <= own[-1].line]
            tight = tight_epsilon_of(until, report.delta)
        epsilon = float("inf") if unprotected else own[-1].epsilon
        runs.append(RunSpent(name, own, unprotected, epsilon, tight))
    return tuple(runs)
