"""What a coordinator is doing, for whoever asks: `status.json`, written anew each second while it runs.

Nothing in it comes from faces: names of nodes, counts, and figures that the run's records hold too.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from common.errors import VisardError
from common.files import write_atomically

if TYPE_CHECKING:
    from server.checkpoint import CoordinatorState

# Older than this it is not what a running coordinator writes.
STALE_S = 10.0

_PERIOD_S = 1.0

log = logging.getLogger("visard.server")


def read_status(path: Path) -> dict[str, Any]:
    """What the file says; nothing where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def amend_status(path: Path, **changes: Any) -> None:
    """Change what the file says. A disk that is full stops nothing: the next one may be written."""
    _write(path, {**read_status(path), **changes})


def age_s(status: dict[str, Any], now: datetime | None = None) -> float:
    """Seconds since it was written, by the clock on the wall; infinite where it does not say."""
    try:
        updated = datetime.fromisoformat(status["updated"])
        return ((now or datetime.now().astimezone()) - updated).total_seconds()
    except (KeyError, TypeError, ValueError):
        return float("inf")


class StatusFile:
    """Keeps the file up to date: a context manager, and an observer of the run.

    A thread writes each second, as nothing calls observers while the main loop waits for clients. What ends the context
    is what the file says last: `failed` with the reason, `stopped`, or what was told.
    """

    def __init__(self, path: Path, supervisor: int) -> None:
        """supervisor: id of the process that began the file, whose words are kept."""
        self._path = path
        self._content = {**read_status(path), "pids": {"supervisor": supervisor, "worker": os.getpid()}}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="status", daemon=True)
        self._written, self._trouble = float("-inf"), ""
        self._look: Callable[[], dict[str, Any]] | None = None

    def __enter__(self) -> Self:
        self.tell("starting")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if isinstance(error, VisardError):
            self.tell("failed", f"{type(error).__name__}: {error}")
        elif isinstance(error, Exception):
            self.tell("failed", f"{type(error).__name__}: {error}; its traceback is in the log")
        elif error is not None:
            self.tell("stopped")

    def tell(self, state: str, message: str = "", **more: Any) -> None:
        """Write at once that the coordinator is in another state, and whatever else is known from here on."""
        with self._lock:
            self._look = None
            self._content |= {"state": state, "message": message, **more}
            self._write()

    def watch(
        self, state: "CoordinatorState", connected: Callable[[], Iterable[str]], approved: Callable[[], int]
    ) -> None:
        """From here on tell whether it trains or waits. connected: names of the nodes that are; approved: how many may be."""
        config = state.config
        wanted = max(config.training.min_clients, config.privacy.survivors)

        def look() -> dict[str, Any]:
            names = sorted(connected())
            seen = {"connected": names, "approved": approved()}
            if len(names) >= wanted or state.priming or state.fitting or state.refining:
                return {"state": "training", "message": "", **seen}
            return {
                "state": "waiting for clients",
                "message": f"{len(names)} of {wanted} are connected",
                **seen,
            }

        self.note(state)
        with self._lock:
            self._look = look
            self._write()

    def note(self, state: "CoordinatorState") -> None:
        """Take down how far the run is; written with what is told next, or within a second."""
        moments = state.fitting or state.next_round <= state.config.moments.moment_rounds
        stage = "moments" if moments else "gradients"
        with self._lock:
            self._content |= {
                "round": state.next_round - 1,
                "last_round": state.last_round,
                "stage": "prior" if state.priming else stage,
                "generator_steps": state.primed + state.generator_steps,
                "seconds": round(state.seconds, 1),
                "refusals": state.last.get("refusals", self._content.get("refusals", {})),
            }

    def fit_stepped(self, state: "CoordinatorState") -> None:
        """A generator step of no round is done."""
        self._noted(state)

    def round_ended(self, state: "CoordinatorState") -> None:
        """A round is done."""
        self._noted(state)

    def _noted(self, state: "CoordinatorState") -> None:
        self.note(state)
        with self._lock:
            if time.monotonic() - self._written >= _PERIOD_S:
                self._write()

    def _keep_writing(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            with self._lock:
                self._write()

    def _write(self) -> None:
        if self._look is not None:
            try:
                self._content |= self._look()
            except Exception as error:  # whatever is wrong with a look at the nodes, the run goes on
                if str(error) != self._trouble:
                    log.warning("the status cannot tell who is connected: %s: %s", type(error).__name__, error)
                self._trouble = str(error)
        _write(self._path, self._content)
        self._written = time.monotonic()


def _write(path: Path, content: dict[str, Any]) -> None:
    updated = datetime.now().astimezone().isoformat(timespec="milliseconds")
    with contextlib.suppress(OSError):
        write_atomically(path, (json.dumps({**content, "updated": updated}, indent=2) + "\n").encode())
