"""What a coordinator tells of itself: `status.json`, and what `visard coordinator status` makes of it."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import pytest

import visard
from common.errors import CohortTooSmall
from server.checkpoint import CoordinatorState
from server.cli import observed
from server.deployment import Deployment
from server.status import STALE_S, StatusFile, age_s, amend_status, read_status
from tests.support import tiny_config

KEYS = {"state", "message", "run", "round", "last_round", "stage", "generator_steps", "seconds", "refusals"}
KEYS |= {"connected", "approved", "pids", "restarts", "started", "updated"}


@contextmanager
def held(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_file_says_what_the_run_does(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    amend_status(path, state="starting", message="", restarts=3, started="2026-01-01T00:00:00+00:00")
    state = CoordinatorState.fresh(tiny_config(min_clients=2))
    names = ["b"]
    with StatusFile(path, supervisor=17) as status:
        assert read_status(path)["state"] == "starting"
        status.tell("starting", run="mine")
        status.watch(state, lambda: names, lambda: 3)
        found = read_status(path)
        assert found.keys() == KEYS
        assert (found["state"], found["message"]) == ("waiting for clients", "1 of 2 are connected")
        assert (found["connected"], found["approved"], found["run"]) == (["b"], 3, "mine")
        assert found["pids"] == {"supervisor": 17, "worker": os.getpid()}
        assert (found["restarts"], found["started"]) == (3, "2026-01-01T00:00:00+00:00")
        assert (found["round"], found["last_round"], found["stage"]) == (0, 5, "moments")
        # Nobody calls an observer while the main loop waits: a thread looks again.
        names.append("a")
        wait_for(lambda: read_status(path)["state"] == "training")
        assert read_status(path)["connected"] == ["a", "b"]
        state.next_round, state.generator_steps, state.last = 3, 7, {"refusals": {"RoundFailed": 2}}
        status.round_ended(state)
        wait_for(lambda: read_status(path)["round"] == 2)
        found = read_status(path)
        assert (found["stage"], found["generator_steps"], found["refusals"]) == ("gradients", 7, {"RoundFailed": 2})
        status.tell("complete", "faces: here")
    assert (read_status(path)["state"], read_status(path)["message"]) == ("complete", "faces: here")
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_rounds_that_follow_fast_are_not_all_written(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    state = CoordinatorState.fresh(tiny_config())
    with StatusFile(path, supervisor=1) as status:
        status.watch(state, lambda: [], lambda: 0)
        seen = set()
        began = time.monotonic()
        for number in range(2, 200):
            state.next_round = number
            status.round_ended(state)
            seen.add(read_status(path)["updated"])
            time.sleep(0.005)
        assert len(seen) <= 2 + 2 * (time.monotonic() - began)


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (CohortTooSmall("too few"), "failed", "CohortTooSmall: too few"),
        (RuntimeError("broken"), "failed", "RuntimeError: broken; its traceback is in the log"),
        (SystemExit(143), "stopped", ""),
    ],
)
def test_how_it_ended(tmp_path: Path, error: BaseException, state: str, message: str) -> None:
    path = tmp_path / "status.json"
    with pytest.raises(type(error)), StatusFile(path, supervisor=1):
        raise error
    assert (read_status(path)["state"], read_status(path)["message"]) == (state, message)


def test_a_registry_that_cannot_be_read_and_a_full_disk_stop_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def damaged() -> int:
        raise ValueError("damaged")

    path = tmp_path / "folder" / "status.json"
    path.parent.mkdir()
    state = CoordinatorState.fresh(tiny_config())
    with StatusFile(path, supervisor=1) as status:
        status.watch(state, lambda: [], damaged)
        status.fit_stepped(state)
        time.sleep(2.2)
        path.unlink()
        path.parent.rmdir()
        status.round_ended(state)
    assert [record.getMessage() for record in caplog.records] == [
        "the status cannot tell who is connected: ValueError: damaged"
    ]


def test_what_is_damaged_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    assert read_status(path) == {}
    for text in ("", "[1]", '{"state": ', "nonsense"):
        path.write_text(text)
        assert read_status(path) == {}
    assert age_s({}) == age_s({"updated": 3}) == age_s({"updated": "yesterday"}) == float("inf")
    now = datetime.now().astimezone()
    assert age_s({"updated": (now - timedelta(seconds=5)).isoformat()}, now) == pytest.approx(5)


def test_what_is_seen_from_outside(tmp_path: Path) -> None:
    lock, path = tmp_path / "lock", tmp_path / "status.json"
    found = observed(lock, path)
    assert (found["state"], found["running"], found["stale"]) == ("never started", False, False)
    amend_status(path, state="training", round=3)
    found = observed(lock, path)
    assert (found["state"], found["running"], found["round"]) == ("stopped", False, 3)
    assert found["message"] == "nobody runs it; it was ended without notice (training)"
    with held(lock):
        found = observed(lock, path)
        assert (found["state"], found["running"], found["stale"]) == ("training", True, False)
        old = datetime.now().astimezone() - timedelta(seconds=STALE_S + 5)
        path.write_text(json.dumps({"state": "training", "updated": old.isoformat()}))
        found = observed(lock, path)
        assert (found["running"], found["stale"]) == (True, True)
        assert found["message"] == f"process {os.getpid()} runs, but has told nothing since 15 s"
        path.unlink()
        assert observed(lock, path)["stale"]
    for state in ("complete", "stopped", "failed"):
        amend_status(path, state=state, message="as told")
        found = observed(lock, path)
        assert (found["state"], found["message"], found["running"]) == (state, "as told", False)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "coordinator"
    folder.mkdir()
    Deployment(folder=folder, address="faces.example:9092", listen="0.0.0.0:9092").write()
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["visard", "coordinator", *arguments])
        try:
            visard.main()
        except SystemExit as left:
            return int(left.code or 0), capsys.readouterr().out
        return 0, capsys.readouterr().out

    code, out = run("status")
    assert code == 1
    assert "never started" in out
    assert out.endswith("go on with: visard coordinator start\n")
    state = CoordinatorState.fresh(tiny_config(min_clients=2))
    with StatusFile(folder / "status.json", supervisor=17) as status:
        status.tell("starting", run="[bold]", address="faces.example:9092")
        status.watch(state, lambda: ["a", "b"], lambda: 3)
    with held(folder / "lock"):
        code, out = run("status", str(folder))
        assert code == 0
        for told in (
            "training",
            "0 of 5 done, stage moments",
            "2 of 3 approved nodes: a, b",
            "supervisor 17",
            "[bold]",
        ):
            assert told in out
        code, out = run("status", "--json")
        assert code == 0
        assert json.loads(out) == {**read_status(folder / "status.json"), "running": True, "stale": False}
    code, out = run("status", str(folder))
    assert code == 1
    assert "ended without notice" in out
    assert "0 of 3 approved nodes" in out
    assert out.replace("\n", "").endswith(f"visard coordinator start {folder}")
    amend_status(folder / "status.json", state="complete")
    assert run("status")[0] == 0
    assert run("stop") == (0, "no coordinator runs in coordinator\n")
    assert run("status", str(tmp_path))[0] == 1, "there is no coordinator here"
