"""What keeps a coordinator going: a small process that starts the one that trains, and starts it anew where it dies.

It imports neither torch nor Flower, so that little in it can fail. One lock file is held by both processes: no second
coordinator runs in the same folder, not even while a worker whose supervisor was killed still ends.

Signals never become exceptions here. A handler that raises is not safe while modules are imported or objects are
collected: Python runs it within callbacks that ignore whatever is raised, and the signal is lost.
"""

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from common.errors import ConfigError, ProtocolError
from server.status import amend_status, read_status

# What a worker ends with where it refused something on purpose, and has told it: to start it anew would help nobody.
REFUSED = 3

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LONGEST_WAIT_S = 60.0
# Failures in a row, with no round between them, after which no more is tried.
_MOST_FAILURES = 10
# A look at the lock takes a moment; a worker whose supervisor was killed ends within seconds.
_LOOK_S, _ORPHAN_S = 1.0, 20.0


class Signals:
    """Notes signals that ask to stop, and wakes whoever waits. Use it as a context manager, in the main thread.

    number: of the first that came, 0 for none. SIGHUP stays ignored where it was (`nohup`).
    """

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [n for n in (*_STOPPING, signal.SIGCHLD) if not (ignored and n == signal.SIGHUP)]
        self._handlers = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._write)

    def wait(self, seconds: float) -> None:
        """Wait until a signal comes, or a child ends, `seconds` at most."""
        select.select([self._read], [], [], max(0.0, seconds))
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number in _STOPPING and not self.number:
            self.number = number


def supervise(
    command: Sequence[str],
    signals: Signals,
    *,
    lock_path: Path,
    status_path: Path,
    log_path: Path,
    go_on: str,
    first_wait_s: float = 1.0,
    patience_s: float = 30.0,
) -> int:
    """Run `command` until it has done its work. Returns the status to end with: 0, 1 where it refused, 128 + a signal.

    command gets ` --supervisor PID` added. It ends with 0 where the run is complete and REFUSED where it has told why not;
    after anything else it is started anew, after first_wait_s seconds and twice as long each time, up to a minute, until a
    round is done. A signal is passed on as SIGTERM, and as SIGKILL patience_s later. log_path: where its story is told.
    go_on: the command line that goes on with what was stopped.

    Raises ConfigError where another supervisor runs, ProtocolError after ten failures in a row without progress.
    """
    with _lock_held(lock_path, signals) as lock:
        if signals.number:
            return 128 + signals.number
        begun: dict[str, Any] = {"state": "starting", "message": "", "restarts": 0, "started": _now()}
        status_path.unlink(missing_ok=True)
        amend_status(status_path, **begun, pids={"supervisor": os.getpid()})
        best, failures, restarts = _progress(status_path), 0, 0
        while True:
            code = _worker([*command, "--supervisor", str(os.getpid())], lock, signals, patience_s)
            if signals.number:
                if code != 0:
                    amend_status(status_path, state="stopped", message=f"by {signal.Signals(signals.number).name}")
                    _say(f"stopped; nothing is lost. Go on with: {go_on}", sys.stdout)
                return 128 + signals.number
            if code in (0, REFUSED):
                return int(code == REFUSED)
            progress = _progress(status_path)
            failures, best = (1, progress) if progress > best else (failures + 1, best)
            ended = _ended(code)
            if failures == _MOST_FAILURES:
                told = (
                    f"the coordinator's worker {ended}, and so on {failures} times without a round between: it is not started again. "
                    f"What it said is above and in {log_path}; then {go_on}"
                )
                amend_status(status_path, state="failed", message=told)
                raise ProtocolError(told)
            wait_s = min(first_wait_s * 2 ** (failures - 1), _LONGEST_WAIT_S)
            restarts += 1
            told = f"the worker {ended}; it is started anew in {wait_s:g} s"
            _say(f"{datetime.now():%Y-%m-%d %H:%M:%S} {told}", sys.stderr, log_path)
            until = time.monotonic() + wait_s
            while (left := until - time.monotonic()) > 0 and not signals.number:
                amend_status(status_path, state="starting", message=told, restarts=restarts)
                signals.wait(min(left, 1.0))


def holder(lock_path: Path) -> int | None:
    """Id of the process that supervises, 0 where the file does not say; None where nobody does."""
    try:
        file = os.open(lock_path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid(file)
    else:
        return None
    finally:
        os.close(file)


def stop(lock_path: Path, timeout_s: float) -> bool:
    """Ask the supervisor to stop, and wait until nothing of it runs. Returns False where nobody supervises.

    Raises ConfigError where it is another user's, ProtocolError where it is still there after timeout_s.
    """
    pid = holder(lock_path)
    if pid is None:
        return False
    # Without its supervisor a worker ends by itself.
    with contextlib.suppress(ProcessLookupError):
        if pid:
            try:
                os.kill(pid, signal.SIGTERM)
            except PermissionError:
                raise ConfigError(f"process {pid} is another user's: stop it as that user") from None
    until = time.monotonic() + timeout_s
    while holder(lock_path) is not None:
        if time.monotonic() > until:
            raise ProtocolError(
                f"process {pid} still runs after {timeout_s:g} s: wait, or end it with `kill -9 {pid}`, which loses one round at most"
            )
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def _lock_held(path: Path, signals: Signals) -> Iterator[int]:
    """Hold the lock with this process's id in it; where a signal asks to stop first, without. Raises ConfigError."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        began = time.monotonic()
        while not signals.number:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = _pid(lock)
                waited = time.monotonic() - began
                if waited > (_LOOK_S if _lives(pid) else _ORPHAN_S):
                    raise ConfigError(
                        f"a coordinator runs in {path.parent} already, as process {pid}: `visard coordinator stop {path.parent}` ends it"
                    ) from None
                signals.wait(0.1)
            else:
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
                break
        yield lock
    finally:
        os.close(lock)


def _worker(command: list[str], lock: int, signals: Signals, patience_s: float) -> int | str:
    """Run a worker to its end. Returns its status, or in words why there was none.

    Its session is its own: Ctrl-C in the terminal reaches this process alone.
    """
    if signals.number:
        return "was not started"
    try:
        worker = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=(lock,))
    except OSError as error:
        return f"could not be started ({error})"
    while worker.poll() is None and not signals.number:
        signals.wait(60.0)
    worker.terminate()
    until = time.monotonic() + patience_s
    while worker.poll() is None and (left := until - time.monotonic()) > 0:
        signals.wait(left)
    if worker.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
    _show_cursor()
    return worker.wait()


def _ended(code: int | str) -> str:
    if isinstance(code, str):
        return code
    if code < 0:
        return f"was ended by signal {-code} ({signal.Signals(-code).name})"
    return f"ended with status {code}"


def _progress(status_path: Path) -> tuple[int, int]:
    """Rounds and generator steps that were done, as far as the status says."""
    status = read_status(status_path)
    return int(status.get("round", 0)), int(status.get("generator_steps", 0))


def _pid(lock: int) -> int:
    text = os.pread(lock, 32, 0).strip()
    return int(text) if text.isdigit() else 0


def _lives(pid: int) -> bool:
    if not pid:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _say(text: str, stream: Any, log_path: Path | None = None) -> None:
    """Tell it; a terminal that is gone, or a full disk, stops nothing."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream, flush=True)
    if log_path is not None:
        with contextlib.suppress(OSError), log_path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def _show_cursor() -> None:
    """Give the terminal its cursor back: a progress bar that was killed has hidden it."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)
