"""The coordinator's supervisor, as processes: what it starts anew and what not, and that no signal is lost."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from common.errors import ProtocolError
from server.deployment import Deployment
from server.supervisor import holder, stop

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}

# Does the next thing of a list, one thing a life: "exit N", "kill N", "round R exit N", "wait", "stubborn".
WORKER = """\
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
lives = folder / "lives"
number = len(lives.read_text().splitlines()) if lives.exists() else 0
plan = json.loads((folder / "plan").read_text())
with lives.open("a") as file:
    file.write(f"{os.getpid()} {time.monotonic()}\\n")
words = plan[min(number, len(plan) - 1)].split()
if words[0] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / "up").touch()
if words[0] == "round":
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "round": int(words[1])}))
    words = words[2:]
if words[0] in ("wait", "stubborn"):
    time.sleep(600)
if words[0] == "kill":
    os.kill(os.getpid(), int(words[1]))
os._exit(int(words[1]))
"""

SUPERVISOR = """\
import sys
from pathlib import Path
from common.errors import VisardError
from common.telling import tell_error
from server.supervisor import Signals, supervise
folder, first_wait_s, patience_s = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
try:
    with Signals() as signals:
        code = supervise(
            [sys.executable, "-S", str(folder / "worker.py"), str(folder)], signals, lock_path=folder / "lock",
            status_path=folder / "status.json", log_path=folder / "log", go_on="go on so",
            first_wait_s=first_wait_s, patience_s=patience_s,
        )
except VisardError as error:
    tell_error(error)
    sys.exit(1)
assert not {"torch", "flwr", "numpy"} & sys.modules.keys()
sys.exit(code)
"""

# `visard coordinator start` with another worker: the program that it starts is said to be the interpreter.
VISARD = """\
import sys
sys.executable = sys.argv.pop(1)
print("begun", flush=True)
import visard
visard.main()
"""


class Coordinator:
    """A folder, and the processes that were started in it."""

    def __init__(self, folder: Path, plan: list[str]) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        folder.mkdir(exist_ok=True)
        (folder / "worker.py").write_text(WORKER)
        (folder / "plan").write_text(json.dumps(plan))

    def start(self, first_wait_s: float = 0.01, patience_s: float = 30.0, **more: object) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", SUPERVISOR, str(self.folder), str(first_wait_s), str(patience_s)]
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
        )  # type: ignore[call-overload]
        self.started.append(process)
        return process  # type: ignore[no-any-return]

    def lives(self) -> list[tuple[int, float]]:
        """Process id and time of each start of the worker."""
        lives = self.folder / "lives"
        lines = lives.read_text().splitlines() if lives.exists() else []
        return [(int(pid), float(when)) for pid, when in (line.split() for line in lines)]

    def status(self) -> dict[str, object]:
        return dict(json.loads((self.folder / "status.json").read_text()))

    def up(self) -> None:
        wait_for(lambda: (self.folder / "up").exists(), "the worker")

    def clean(self) -> None:
        for process in self.started:
            process.kill()
        for pid, _ in self.lives():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.communicate()


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Callable[[list[str]], Coordinator]]:
    made: list[Coordinator] = []

    def make(plan: list[str]) -> Coordinator:
        made.append(Coordinator(tmp_path / str(len(made)), plan))
        return made[-1]

    yield make
    for one in made:
        one.clean()


Make = Callable[[list[str]], Coordinator]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


def lives(pid: int) -> bool:
    """Whether it runs; a dead one that nobody has waited for does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_worker_that_dies_is_started_anew_until_it_is_done(coordinator: Make) -> None:
    one = coordinator(["kill 9", "kill 11", "exit 1", "exit 143", "exit 0"])
    process = one.start()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(one.lives()) == 5
    told = output.splitlines()
    assert [line.partition(" the worker ")[2].partition(";")[0] for line in told] == [
        "was ended by signal 9 (SIGKILL)",
        "was ended by signal 11 (SIGSEGV)",
        "ended with status 1",
        "ended with status 143",
    ]
    assert all(line.startswith(time.strftime("%Y-%m-%d ")) for line in told)
    assert (one.folder / "log").read_text().splitlines() == told
    assert one.status()["restarts"] == 4
    assert holder(one.folder / "lock") is None


def test_what_was_refused_on_purpose_is_not_tried_again(coordinator: Make) -> None:
    one = coordinator(["exit 3"])
    process = one.start()
    assert process.communicate(timeout=60)[0] == ""
    assert (process.returncode, len(one.lives())) == (1, 1)


def test_waits_double_and_begin_again_after_a_round(coordinator: Make) -> None:
    plan = ["exit 9", "exit 9", "exit 9", "round 1 exit 9", "exit 9", "round 1 exit 9", "round 2 exit 9", "exit 0"]
    one = coordinator(plan)
    process = one.start(first_wait_s=0.1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    waits = [float(line.rpartition(" in ")[2].removesuffix(" s")) for line in output.splitlines()]
    assert waits == [0.1, 0.2, 0.4, 0.1, 0.2, 0.4, 0.1]
    times = [when for _, when in one.lives()]
    assert all(later - earlier >= wait for earlier, later, wait in zip(times, times[1:], waits, strict=False))


def test_it_gives_up_after_ten_failures_without_a_round(coordinator: Make) -> None:
    one = coordinator(["exit 9"] * 3 + ["round 1 exit 9"] + ["exit 7"])
    process = one.start(first_wait_s=0.001)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(one.lives()) == 3 + 10
    last = output.splitlines()[-1]
    assert last.startswith("ProtocolError: the coordinator's worker ended with status 7, and so on 10 times")
    assert str(one.folder / "log") in last
    assert last.endswith("go on so")
    assert one.status()["state"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_worker_and_tells_how_to_go_on(coordinator: Make, number: signal.Signals) -> None:
    one = coordinator(["wait"])
    process = one.start()
    one.up()
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert output.splitlines() == ["stopped; nothing is lost. Go on with: go on so"]
    assert not lives(one.lives()[0][0])
    assert one.status()["state"] == "stopped"


def test_a_worker_that_does_not_end_is_killed(coordinator: Make) -> None:
    one = coordinator(["stubborn"])
    process = one.start(patience_s=0.5)
    one.up()
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert not lives(one.lives()[0][0])


def test_a_signal_between_a_worker_s_end_and_its_restart(coordinator: Make) -> None:
    one = coordinator(["exit 9"])
    process = one.start(first_wait_s=60.0)
    assert process.stdout is not None
    assert "started anew in 60 s" in process.stdout.readline()
    assert one.status()["state"] == "starting"
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, len(one.lives())) == (143, 1)
    assert "Go on with" in output


def test_ctrl_c_in_the_terminal_does_not_reach_the_worker(coordinator: Make) -> None:
    one = coordinator(["wait"])
    process = one.start(start_new_session=True)
    one.up()
    assert os.getsid(one.lives()[0][0]) == one.lives()[0][0]
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_nohup_is_respected(coordinator: Make) -> None:
    one = coordinator(["wait"])
    process = one.start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    one.up()
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_a_second_one_is_refused_and_a_look_does_not_refuse_the_first(coordinator: Make) -> None:
    one = coordinator(["wait"])
    (one.folder / "lock").touch()
    with (one.folder / "lock").open() as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        first = one.start()
        time.sleep(0.5)
    one.up()
    assert holder(one.folder / "lock") == first.pid
    second = one.start()
    output, _ = second.communicate(timeout=30)
    assert second.returncode == 1
    assert output.startswith(f"ConfigError: a coordinator runs in {one.folder} already, as process {first.pid}:")
    assert len(one.lives()) == 1
    assert first.poll() is None


def test_nobody_starts_beside_a_worker_whose_supervisor_was_killed(coordinator: Make) -> None:
    one = coordinator(["stubborn", "exit 0"])
    first = one.start()
    one.up()
    first.kill()
    first.wait()
    assert holder(one.folder / "lock") == first.pid
    second = one.start()
    time.sleep(1.5)
    assert (second.poll(), len(one.lives())) == (None, 1)
    os.kill(one.lives()[0][0], signal.SIGKILL)
    second.communicate(timeout=20)
    assert (second.returncode, len(one.lives())) == (0, 2)


def test_stop(coordinator: Make) -> None:
    one = coordinator(["wait"])
    lock = one.folder / "lock"
    assert not stop(lock, 1.0)
    lock.write_text(f"{os.getpid()}\n")
    assert not stop(lock, 1.0), "the file alone says nothing: nobody holds it"
    process = one.start()
    one.up()
    # Whoever started it waits for it meanwhile.
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(process.communicate, timeout=20)
        assert stop(lock, 20.0)
        ended.result()
    assert process.returncode == 143
    assert holder(lock) is None
    other = coordinator(["stubborn"])
    other.start()
    other.up()
    with pytest.raises(ProtocolError, match=r"still runs after 0.2 s.*kill -9"):
        stop(other.folder / "lock", 0.2)


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """A program that takes the worker's arguments: it writes its id into the folder and waits to be ended."""
    path = tmp_path / "interpreter"
    path.write_text(
        f"#!{sys.executable} -S\n"
        "import os, pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('worker') + 1])\n"
        "(folder / 'lives').write_text(f'{os.getpid()} 0\\n')\n"
        "(folder / 'up').touch()\n"
        "time.sleep(600)\n"
    )
    path.chmod(0o755)
    return path


def deployed(folder: Path) -> Coordinator:
    one = Coordinator(folder, [])
    Deployment(folder=folder, address="127.0.0.1:9092", listen="127.0.0.1:9092").write()
    return one


def test_the_command_imports_neither_torch_nor_flower(tmp_path: Path, interpreter: Path) -> None:
    one = deployed(tmp_path / "here")
    script = VISARD.replace(
        "visard.main()", "import atexit; atexit.register(lambda: print(*sys.modules)); visard.main()"
    )
    command = [sys.executable, "-c", script, str(interpreter), "coordinator", "start", str(one.folder)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    one.started.append(process)
    try:
        one.up()
        process.terminate()
        output, _ = process.communicate(timeout=20)
    finally:
        one.clean()
    assert process.returncode == 143
    modules = output.split()
    assert f"start {one.folder}" in output
    assert "server.supervisor" in modules
    assert not {"torch", "flwr"} & set(modules)


@pytest.mark.e2e
def test_no_signal_is_lost_whenever_it_comes(tmp_path: Path, interpreter: Path) -> None:
    rng = np.random.default_rng(7)
    tries = [
        (number, float(delay))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for delay in np.concatenate([rng.uniform(0, 0.05, 3), rng.uniform(0.05, 1.2, 9)])
    ]

    def one_try(number: int) -> tuple[bool, str]:
        (sent, delay), one = tries[number], deployed(tmp_path / str(number))
        command = [sys.executable, "-c", VISARD, str(interpreter), "coordinator", "start", str(one.folder)]
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        one.started.append(process)
        try:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(sent)
            output, errors = process.communicate(timeout=30)
            # A signal before the command's first line ends the interpreter itself.
            assert process.returncode in (128 + sent, -sent), (sent, delay, errors)
            began = bool(one.lives())
            if began:
                assert process.returncode == 128 + sent
                assert output == f"stopped; nothing is lost. Go on with: visard coordinator start {one.folder}\n"
                assert not errors
                assert not lives(one.lives()[0][0])
            assert holder(one.folder / "lock") is None
            return began, errors
        finally:
            one.clean()

    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(one_try, range(len(tries))))
    assert {began for began, _ in outcomes} == {True, False}, "the delays must cover both"
