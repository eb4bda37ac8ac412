"""A disk that takes nothing, or no more: a typed error, nothing released, and the ledger is whole afterwards."""

import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import LedgerUnwritable
from common.privacy.ledger_report import verify_ledger
from tests.unit.test_ledger import RUN, charge, fill, open_ledger

ROOT = Path(__file__).parents[2]


@contextmanager
def no_file_longer_than(limit: int) -> Iterator[None]:
    """Writes beyond it fail with EFBIG, after what still fits was written: a disk that fills up (Python ignores
    SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_charge_for_which_there_is_no_room_has_not_happened(tmp_path: Path) -> None:
    ledger = fill(tmp_path, 25)  # longer than the head's file: only the ledger meets the limit
    before = (tmp_path / "ledger.jsonl").read_bytes()
    for room in range(0, 450, 37):
        with no_file_longer_than(len(before) + room), pytest.raises(LedgerUnwritable, match="nothing was released"):
            charge(ledger, 26)
        assert (tmp_path / "ledger.jsonl").read_bytes() == before
        assert len(ledger.releases) == 25
    assert charge(ledger, 26) is None
    assert len(open_ledger(tmp_path).releases) == 26


def test_a_reply_for_which_there_is_no_room_is_not_released(tmp_path: Path) -> None:
    ledger = fill(tmp_path, 25)
    with no_file_longer_than(100_000), pytest.raises(LedgerUnwritable):
        ledger.release(RUN, 25, bytes(200_000))
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with no_file_longer_than(len(before) + 30), pytest.raises(LedgerUnwritable):
        ledger.release(RUN, 25, b"kept, not sent")
    for again in (ledger, open_ledger(tmp_path)):
        assert charge(again, 25) is None  # not released: computed again under the same charge
    ledger.release(RUN, 25, b"sent")
    assert charge(open_ledger(tmp_path), 25) == b"sent"
    assert not list(tmp_path.glob("*.tmp"))
    assert verify_ledger(tmp_path).problem is None


def test_a_head_that_cannot_be_written_does_not_stop_what_was_charged(tmp_path: Path) -> None:
    """The line is on the disk and counts; nobody was told, so the same round is charged no second time."""
    ledger = fill(tmp_path, 1)
    assert (tmp_path / "ledger.jsonl").stat().st_size < 3_000
    failed = 0
    for server_round in (2, 3):
        try:
            with no_file_longer_than(4096):  # room for one of the head's two slots
                charge(ledger, server_round)
        except LedgerUnwritable:
            failed += 1
        assert charge(ledger, server_round) is None
    assert failed == 1
    assert len(ledger.releases) == len(open_ledger(tmp_path).releases) == 3


def test_a_ledger_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LedgerUnwritable):
        open_ledger(tmp_path / "file" / "below")
    with no_file_longer_than(60), pytest.raises(LedgerUnwritable):
        open_ledger(tmp_path / "small")
    assert len(fill(tmp_path / "small").releases) == 3


# In a mount name space of its own: a small disk that fills up, and one that is read-only, mean it even to root.
SMALL_DISK = textwrap.dedent("""
    import os, subprocess, sys
    from pathlib import Path
    from common.errors import LedgerUnwritable
    from common.privacy.accounting import Release
    from common.privacy.ledger import Ledger
    from common.privacy.ledger_report import verify_ledger

    disk = Path(sys.argv[1])
    mount = lambda *options: subprocess.run(["mount", *options, disk], check=True)
    mount("-t", "tmpfs", "-o", "size=64k", "tmpfs")
    step, folder = Release("gradients", 5.0, 0.1), disk / "ledger"
    def opened():
        return Ledger(folder, max_epsilon=1e3, delta=1e-5)
    def refused(act):
        try:
            act()
        except LedgerUnwritable:
            return True
        return False
    def charge(n):
        return lambda: ledger.charge("a" * 32, n, step, [step], "asked")

    ledger, n = opened(), 0
    while not refused(charge(n + 1)):
        n += 1
    assert n > 20, n
    assert len(opened().releases) == len(ledger.releases) == n
    assert refused(lambda: ledger.release("a" * 32, n, bytes(9000)))
    assert refused(charge(n + 1))
    assert verify_ledger(folder).problem is None and verify_ledger(folder).torn == 0

    mount("-o", "remount,size=1m")
    assert charge(n + 1)() is None
    ledger.release("a" * 32, n, bytes(9000))

    mount("-o", "remount,ro")
    assert refused(charge(n + 2)) and refused(lambda: ledger.release("a" * 32, n + 1, b"x")) and refused(opened)
    assert refused(lambda: Ledger(disk / "another", max_epsilon=1e3, delta=1e-5))
    report = verify_ledger(folder)
    assert report.problem is None and (report.rounds, report.answered) == (n + 1, 1)
    mount("-o", "remount,rw")
    assert charge(n + 2)() is None and len(opened().releases) == n + 2
""")


def test_a_full_disk_and_a_read_only_one(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    spaces = [unshare or "unshare", "--user", "--map-root-user", "--mount"]
    probe = [*spaces, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if unshare is None or subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("needs user name spaces, to mount a small disk")
    done = subprocess.run(
        [*spaces, sys.executable, "-c", SMALL_DISK, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
