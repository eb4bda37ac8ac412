"""What a running node tells its owner."""

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.node_status import FILE_NAME, LOCK_NAME, NodeStatus, read_status
from common.errors import ConfigError
from common.telling import PlainFormatter
from tests.coordinator_machine import wait_for
from visard import build

Start = Callable[..., NodeStatus]
# Colours and a clearing of the screen, a line that looks like another record's, and writing from right to left.
HOSTILE = "\x1b[31m red \x9b\x1b[2J\rclear\nINFO visard: forged\u202e\x07turned"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A node's status in tmp_path; its lock is let go at the end."""
    started: list[NodeStatus] = []

    def new(coordinator: str = "here:1") -> NodeStatus:
        started.append(NodeStatus(tmp_path, coordinator))
        return started[-1]

    yield new
    for status in started:
        status.close()


def told(folder: Path) -> dict[str, object]:
    found = read_status(folder)
    assert found is not None
    return found


def test_it_tells_of_connection_rounds_and_refusals(start: Start, tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    status = start()
    first = told(tmp_path)
    assert first["alive"]
    assert (first["pid"], first["coordinator"], first["connection"]) == (os.getpid(), "here:1", "connecting")
    assert (first["run"], first["round"], first["answers"], first["refusals"], first["problems"]) == ("", 0, 0, 0, [])
    status.connection("connected")
    status.asked("abc", 7)
    status.asked("", 0)  # of no round
    status.answered("")
    status.answered("PrivacyError")
    found = told(tmp_path)
    assert (found["connection"], found["run"], found["round"]) == ("connected", "abc", 7)
    assert (found["answers"], found["refusals"]) == (1, 1)
    assert found["last_asked"]
    assert found["last_answered"]
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600


def test_the_file_is_written_now_and_then_for_answers_at_once_for_all_else(start: Start, tmp_path: Path) -> None:
    status = start()
    for _ in range(50):
        status.answered("")
    assert told(tmp_path)["answers"] < 50  # within a second of the former
    status.connection("refused: x")
    assert told(tmp_path)["answers"] == 50


def test_since_is_when_the_connection_changed(start: Start, tmp_path: Path) -> None:
    status = start()
    status._told["since"] = "before"
    status.connection("connecting")
    assert status._told["since"] == "before"
    status.connection("connected")
    assert status._told["since"] != "before"


def test_it_keeps_the_last_warnings(start: Start, tmp_path: Path) -> None:
    log = logging.getLogger("test.node_status")
    log.propagate = False
    status = start()
    log.addHandler(status)
    try:
        log.info("of no interest")
        for number in range(30):
            log.warning("number %d %s", number, "x" * 5_000)
    finally:
        log.removeHandler(status)
    problems = told(tmp_path)["problems"]
    assert isinstance(problems, list)
    assert [text.split()[1] for _when, text in problems] == [str(n) for n in range(20, 30)]
    assert all(len(text) == 1_000 for _when, text in problems)


def test_what_others_write_steers_no_terminal(start: Start, tmp_path: Path) -> None:
    log = logging.getLogger("test.node_status.hostile")
    log.propagate = False
    status = start()
    log.addHandler(status)
    status.connection(f"refused: {HOSTILE}")
    status.asked(HOSTILE, 3)
    log.warning("refused: %s", HOSTILE)
    log.removeHandler(status)
    found = told(tmp_path)
    (_when, problem), *_ = found["problems"]  # type: ignore[misc]
    assert all(str(word).isprintable() for word in (found["connection"], found["run"], problem))
    assert problem == "refused: [31m red [2J clear INFO visard: forged turned"


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_status_file_of_whatever_content_steers_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = partial(CliRunner().invoke, build(), env={"COLUMNS": "200"})
    assert run(["client", "init", "--data", "procedural:persons=4,images=2"]).exit_code == 0
    words = dict.fromkeys(("connection", "since", "coordinator", "run", "last_asked"), HOSTILE)
    content = words | {"round": 3, "answers": 1, "refusals": 1, "problems": [[HOSTILE, HOSTILE]]}
    (tmp_path / "owner.visard" / FILE_NAME).write_text(json.dumps(content))
    shown = run(["client", "status", *form]).output
    assert "forged" in shown
    assert all(line.isascii() and line.isprintable() for line in shown.split("\n"))


def test_a_log_s_formatter_writes_no_line_that_could_pass_for_another_record() -> None:
    formatter = PlainFormatter("%(levelname)s %(name)s: %(message)s")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        fault = sys.exc_info()
    record = logging.LogRecord("visard.client", logging.WARNING, __file__, 1, "told: %s", (HOSTILE * 10_000,), None)
    for exc_info in (None, fault):
        record.exc_info = exc_info
        lines = formatter.format(record).split("\n")
        assert lines[0].startswith("WARNING visard.client: told:")
        assert all(line.isprintable() and line.startswith("  ") for line in lines[1:])
        assert sum(map(len, lines)) < 200_000
    record.args = ("short",)
    *_, last = formatter.format(record).split("\n")
    assert last == "  INFO visard: forged  turned"


def test_warnings_from_several_threads(start: Start, tmp_path: Path) -> None:
    log = logging.getLogger("test.node_status.threads")
    log.propagate = False
    status = start()
    log.addHandler(status)

    def warn() -> None:
        for number in range(20):
            log.warning("problem %d", number)

    threads = [threading.Thread(target=warn) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for number in range(50):
            status.connection(str(number))
            read_status(tmp_path)
    finally:
        for thread in threads:
            thread.join()
        log.removeHandler(status)
    status.connection("end")
    assert told(tmp_path)["connection"] == "end"
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME, LOCK_NAME]


def test_one_node_for_one_folder(start: Start, tmp_path: Path) -> None:
    status = start()
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(ConfigError, match=r"a node runs with .* already.*client status"):
        start("there:2")
    assert (tmp_path / FILE_NAME).read_bytes() == before
    # A look does not take the lock away, nor keep it.
    assert told(tmp_path)["alive"]
    status.close()
    assert not told(tmp_path)["alive"]
    start("there:2")
    assert told(tmp_path)["coordinator"] == "there:2"


def test_a_look_never_keeps_a_node_from_starting(start: Start, tmp_path: Path) -> None:
    """A monitor that looks without a pause."""
    start().close()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            read_status(tmp_path)

    monitor = threading.Thread(target=look)
    monitor.start()
    try:
        for _ in range(200):
            start().close()
    finally:
        over.set()
        monitor.join()


def test_a_killed_node_is_not_alive(start: Start, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from client.node_status import NodeStatus\n"
        "kept = NodeStatus(Path(sys.argv[1]), 'here:1'); kept.connection('connected'); time.sleep(60)"
    )
    node = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    try:
        wait_for(lambda: (read_status(tmp_path) or {}).get("connection") == "connected", "the node")
        assert told(tmp_path)["alive"]
        assert told(tmp_path)["pid"] == node.pid
        with pytest.raises(ConfigError, match="already"):
            start("there:2")
    finally:
        node.send_signal(signal.SIGKILL)
        node.wait()
    found = told(tmp_path)
    assert (found["alive"], found["connection"]) == (False, "connected")


def test_damaged_files(start: Start, tmp_path: Path) -> None:
    for content in (b"", b"{", b"[1]", b'"x"', b"\xff", b"7"):
        (tmp_path / FILE_NAME).write_bytes(content)
        with pytest.raises(ConfigError, match="a running node writes it anew"):
            read_status(tmp_path)
    start()
    assert told(tmp_path)["connection"] == "connecting"


def test_a_disk_that_refuses_stops_nobody(start: Start, tmp_path: Path) -> None:
    status = start()
    (tmp_path / FILE_NAME).unlink()
    (tmp_path / FILE_NAME).mkdir()  # nothing can be renamed over it
    status.connection("connected")
    (tmp_path / FILE_NAME).rmdir()
    status.connection("stopped")
    assert json.loads((tmp_path / FILE_NAME).read_bytes())["connection"] == "stopped"
    assert time.monotonic() - status._written < 60
