"""What a running node tells its owner, in `node.json` beside the ledger: read by `visard client status`.

For the owner's eyes alone: it may name files and counts. It never leaves the machine.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO, Any

from common.errors import ConfigError
from common.files import write_atomically
from common.telling import plain

FILE_NAME, LOCK_NAME = "node.json", "node.lock"
_KEPT = 10
_EVERY_S = 1.0
# For so long at most the lock may be held by one who looks whether it is.
_LOOK_S = 0.2


class NodeStatus(logging.Handler):
    """Keeps the file up to date; as a handler of the client's log it keeps the last warnings, which say why a round was refused."""

    def __init__(self, folder: Path, coordinator: str) -> None:
        """folder: the owner's state-dir. coordinator: its address. Raises ConfigError where a node runs there already."""
        super().__init__(logging.WARNING)
        # Held until this process ends, however it ends.
        self._held = (folder / LOCK_NAME).open("ab")
        until = time.monotonic() + _LOOK_S
        while not (locked := _locked(self._held)) and time.monotonic() < until:
            time.sleep(_LOOK_S / 20)
        if not locked:
            self._held.close()
            raise ConfigError(
                f"a node runs with {folder} already: one process for one ledger; `visard client status` tells of it"
            )
        self._path = folder / FILE_NAME
        self._written = 0.0
        # A warning may come from any thread.
        self._writing = threading.RLock()
        self._problems: deque[list[str]] = deque(maxlen=_KEPT)
        self._told: dict[str, Any] = {
            "pid": os.getpid(),
            "coordinator": coordinator,
            "started": _now(),
            "connection": "connecting",
            "since": _now(),
            "run": "",
            "round": 0,
            "last_asked": "",
            "last_answered": "",
            "answers": 0,
            "refusals": 0,
        }
        self._write()

    def connection(self, state: str) -> None:
        """connecting, connected, stopped, or what is waited for."""
        state = plain(state)
        if state != self._told["connection"]:
            self._told |= {"connection": state, "since": _now()}
            self._write()

    def asked(self, run: str, server_round: int) -> None:
        """A message of the coordinator's is to be answered; of a round where server_round is not 0."""
        self._told["last_asked"] = _now()
        if server_round:
            self._told |= {"run": plain(run), "round": server_round}
        self.connection("connected")

    def answered(self, refusal: str) -> None:
        """It is answered. refusal: the kind of error, or nothing."""
        self._told["last_answered"] = _now()
        self._told["refusals" if refusal else "answers"] += 1
        self._write(now_and_then=not refusal)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        self._problems.append([_now(), plain(record.getMessage()[:1000])])
        self._write()

    def close(self) -> None:
        """Let another node use the folder."""
        self._held.close()
        super().close()

    def _write(self, *, now_and_then: bool = False) -> None:
        if now_and_then and time.monotonic() - self._written < _EVERY_S:
            return
        self._written = time.monotonic()
        # A status that cannot be written stops nobody from training: the ledger says so if the disk is full.
        with self._writing, contextlib.suppress(OSError):
            content = json.dumps(self._told | {"problems": list(self._problems), "updated": _now()}, indent=1)
            write_atomically(self._path, content.encode(), private=True)


def read_status(folder: Path) -> dict[str, Any] | None:
    """What the node last told, and `alive`: whether it runs. None where there was none. Raises ConfigError on a damaged file."""
    try:
        told = dict(json.loads((folder / FILE_NAME).read_text(encoding="utf-8")))
        with (folder / LOCK_NAME).open("ab") as lock:
            return told | {"alive": not _locked(lock)}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read {folder / FILE_NAME}: {error}; a running node writes it anew") from error


def _locked(file: IO[bytes]) -> bool:
    """Take the lock; False where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
