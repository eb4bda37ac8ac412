"""The process that trains: how it ends with its supervisor and on signals, and what it makes of settings and checkpoint."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import RunConfig
from common.errors import ConfigError
from common.fields import Scalar
from server.worker import LeavesOnSignal, finished, largest_answer, open_or_resume
from tests.support import TINY, random_faces, tiny_config, train

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

# Starts the script that follows, tells its id, and waits.
PARENT = """\
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
print(child.pid, flush=True)
time.sleep(60)
"""

FOLLOWER = """\
import signal, sys, time
from server.worker import LeavesOnSignal, follow
follow(int(sys.argv[1]))
"""

OBEDIENT = FOLLOWER + "print('up', flush=True); time.sleep(60)"
# What is raised is lost once, as within a callback of an import.
FORGETFUL = (
    FOLLOWER
    + """\
with LeavesOnSignal():
    for _ in range(2):
        try:
            if _ == 0:
                print("up", flush=True)
            time.sleep(60)
        except SystemExit:
            print("lost", flush=True)
            if _ == 1:
                raise
"""
)
STUBBORN = (
    FOLLOWER
    + """\
while True:
    try:
        with LeavesOnSignal():
            print("up", flush=True)
            time.sleep(60)
    except SystemExit:
        signal.alarm(0)
"""
)


@contextlib.contextmanager
def followed(script: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """The parent, and the id of its child, which is up."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, script], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        assert parent.stdout.readline() == "up\n"
        yield parent, child
    finally:
        parent.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()


def ends_within(pid: int, seconds: float) -> float:
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return time.monotonic() - began
        if state == "Z":
            return time.monotonic() - began
        time.sleep(0.02)
    raise AssertionError(f"process {pid} runs after {seconds} s")


def test_a_worker_ends_with_its_supervisor() -> None:
    with followed(OBEDIENT) as (parent, child):
        parent.kill()
        ends_within(child, 2.0)


def test_an_end_that_is_swallowed_comes_again() -> None:
    with followed(FORGETFUL) as (parent, child):
        parent.kill()
        ends_within(child, 3.0)
        assert parent.stdout is not None
        assert parent.stdout.read() == "lost\nlost\n"


def test_whoever_swallows_every_end_is_ended() -> None:
    with followed(STUBBORN) as (parent, child):
        parent.kill()
        assert ends_within(child, 10.0) > 3.0


def test_a_supervisor_that_is_gone_already() -> None:
    gone = subprocess.run([sys.executable, "-c", OBEDIENT, str(2**22 - 1)], env=ENVIRONMENT, timeout=20, check=False)
    assert gone.returncode == -signal.SIGTERM


def test_signals_raise_only_while_it_runs() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
    with pytest.raises(SystemExit) as left, LeavesOnSignal():
        signal.raise_signal(signal.SIGTERM)
    assert 0 < signal.alarm(0) <= 20, "there is a limit to how long taking down may last"
    assert left.value.code == 143
    with LeavesOnSignal():
        pass
    assert signal.alarm(0) == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)) == before


def settings(**changes: Scalar) -> RunConfig:
    return RunConfig.from_flat(TINY | {key.replace("_", "-"): value for key, value in changes.items()})


def test_a_run_is_begun_gone_on_with_and_complete(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    state = open_or_resume(folder, settings())
    assert state.next_round == 1
    assert state.config.privacy.noise_multiplier > 0
    run_id = state.run_id
    assert not state.complete

    class Stop:
        def fit_stepped(self, state: object) -> None: ...
        def round_ended(self, state: object) -> None:
            if state.next_round == 4:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

    faces = [random_faces(4, 2, seed=client) for client in range(2)]
    with pytest.raises(KeyboardInterrupt):
        train(folder, state, faces, [Stop()])
    # What calibration filled in, what may change, and where simulated faces would be: none of it is a difference.
    state = open_or_resume(folder, settings(min_clients=1, round_timeout_s=5.0, data="elsewhere", num_clients=7))
    assert (state.run_id, state.next_round) == (run_id, 4)
    assert (state.config.training.min_clients, state.config.training.round_timeout_s) == (1, 5.0)
    for changes, told in (
        ({"num_rounds": 9}, "num-rounds = 4, now 9"),
        ({"epsilon": 3.0, "seed": 2}, "epsilon = 10.0, now 3.0; seed = 0, now 2"),
        ({"noise_multiplier": 99.0}, "noise-multiplier = .*, now 99.0"),
    ):
        with pytest.raises(ConfigError, match=rf"was begun with {told}.*another `name`"):
            open_or_resume(folder, settings(**changes))
    train(folder, state, faces)
    state = open_or_resume(folder, settings())
    assert state.complete
    # A crash before the last files were written.
    picture = finished(folder, state)
    written = picture.stat().st_mtime_ns
    assert (folder / "generator.safetensors").exists()
    assert finished(folder, state) == picture
    assert picture.stat().st_mtime_ns == written
    (folder / "generator.json").write_text("{}")
    assert finished(folder, state).stat().st_mtime_ns > written


def test_a_noise_that_was_given_counts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    given = settings(noise_multiplier=20.0, privacy_model="local")
    train(folder, open_or_resume(folder, given), [random_faces(4, 2, seed=client) for client in range(2)])
    assert open_or_resume(folder, given).complete
    with pytest.raises(ConfigError, match="noise-multiplier"):
        open_or_resume(folder, settings(noise_multiplier=21.0, privacy_model="local"))
    none = tmp_path / "none"
    asked = settings(privacy_model="none", noise_multiplier=3.0)
    train(none, open_or_resume(none, asked), [random_faces(4, 2, seed=client) for client in range(2)])
    assert open_or_resume(none, asked).complete


def test_no_more_is_read_of_a_node_than_an_honest_answer_has() -> None:
    config = tiny_config(privacy_model="local")
    assert largest_answer(config, {"moments": 10, "gradients": 1000}, 2) == 4000 + (1 << 20)
    assert largest_answer(config, {}, 2) == 1 << 20
    with pytest.raises(ConfigError, match="max-message-mib = 1, and a node's answer may have 39 MiB"):
        largest_answer(config, {"gradients": 10**7}, 1)
    secure = tiny_config(privacy_model="distributed", peers=3, num_clients=3)
    rounds = min(secure.training.deal_rounds, secure.training.num_rounds + 1)
    assert largest_answer(secure, {}, 2) == (1 << 20) + 3 * rounds * 512
