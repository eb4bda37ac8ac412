"""Files are replaced whole, and never written through what somebody else has put in their way."""

import os
import stat
from pathlib import Path

import pytest

from common.errors import CheckpointError
from common.files import write_atomically
from server.checkpoint import CheckpointStore, CoordinatorState
from tests.support import tiny_config


def temporary_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def test_a_leftover_s_mode_does_not_stay(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    left = temporary_of(path)
    left.write_bytes(b"from a crash, and longer than what follows")
    left.chmod(0o666)
    with left.open("rb") as reader:  # who had it open reads nothing new
        write_atomically(path, b"new", private=True)
        assert reader.read().startswith(b"from a crash")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("hard", [True, False])
def test_it_does_not_write_through_a_link(tmp_path: Path, hard: bool) -> None:
    path, elsewhere = tmp_path / "secret", tmp_path / "elsewhere"
    elsewhere.write_bytes(b"theirs")
    link = temporary_of(path)
    link.hardlink_to(elsewhere) if hard else link.symlink_to(elsewhere)
    write_atomically(path, b"new", private=True)
    assert (path.read_bytes(), elsewhere.read_bytes()) == (b"new", b"theirs")
    assert not path.is_symlink()


def test_where_it_cannot_be_written_the_former_stays(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"former")
    temporary_of(path).mkdir()
    with pytest.raises(OSError):  # noqa: PT011  # of another number on other systems
        write_atomically(path, b"new")
    assert path.read_bytes() == b"former"


def test_a_checkpoint_that_cannot_be_written_asks_for_room_only_where_that_would_help(tmp_path: Path) -> None:
    store, state = CheckpointStore(tmp_path / "missing"), CoordinatorState.fresh(tiny_config())
    with pytest.raises(CheckpointError, match="see to the disk and to who may write there, then go on"):
        store.save(state)
