"""A Flower SuperLink of our own, and a Grid on it for a main loop in this process.

`flwr run` would ship our code to a fresh process for each run and let Flower start and end it. Here the coordinator
is the process that the operator started: it starts a SuperLink on loopback, hands in an empty app so that there is a
run, takes the place of that app's ServerApp and talks to the nodes through a Grid. Leaving the context manager ends
the run and the SuperLink; the SuperLink also ends by itself within a second of this process, however this process
died.

The parts of Flower used here are not documented; `common.flower` refuses untested versions.
"""

import contextlib
import hashlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import fab_to_proto, message_from_proto, run_from_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from common.errors import ConfigError, ProtocolError
from common.flower import ENVIRONMENT, loopback_address, quiet_flower_log, require_tested_flower

log = logging.getLogger("visard.server")

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0
_UPLOAD_TIMEOUT_S = 30.0
_OUTAGE_TIMEOUT_S = 10.0

# The SuperLink ends when the process whose id is its first argument ends.
_SUPERLINK = """\
import sys
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.superlink.cli.flower_superlink import flower_superlink
start_parent_process_monitor(int(sys.argv.pop(1)))
flower_superlink()
"""

# The app that a run must have. No node of ours fetches it, and the SuperLink never starts it.
_STUB = {
    "pyproject.toml": b"""\
[project]
name = "visard-stub"
version = "1.0.0"
[tool.flwr.app]
publisher = "visard"
[tool.flwr.app.components]
serverapp = "stub:app"
clientapp = "stub:app"
""",
    "stub.py": b'raise SystemExit("join this run with: visard client start")\n',
}


class SuperLinkGrid(HttpGrid):
    """Flower's HttpGrid with replies pulled one by one, short waits, and an end when the SuperLink is gone."""

    def __init__(self, address: str, token: str, process: "subprocess.Popen[bytes]") -> None:
        super().__init__(address, insecure=True, token=token)
        self._process = process
        gives_up = self._retry_invoker.should_giveup
        self._retry_invoker.should_giveup = lambda error: (
            process.poll() is not None or (gives_up is not None and gives_up(error))
        )
        self._retry_invoker.max_time = _OUTAGE_TIMEOUT_S

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages. Returns their ids in order, "" where one was refused. Raises ProtocolError on an outage."""
        with self._outages():
            return [message_id or "" for message_id in super().push_messages(list(messages))]

    def get_node_ids(self) -> list[int]:
        """The ids of the nodes that are online. Raises ProtocolError on an outage."""
        with self._outages():
            return sorted(super().get_node_ids())

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies that are there, each fetched only when it is asked for: one at a time is in memory.

        A reply that cannot be fetched or read is yielded as an error. What a reply says of itself (sender, message it
        replies to) is what the SuperLink checked, not what the sender wrote into the body. Raises ProtocolError on an
        outage.
        """
        client, run_id = self._runtime_client, self.run.run_id
        pull_object = make_pull_object_fn_protobuf(client.PullObject, self.node, run_id)
        with self._outages():
            response = client.PullMessages(PullAppMessagesRequest(message_ids=list(message_ids)))
        for proto, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            metadata = message_from_proto(proto).metadata
            try:
                with self._outages():
                    contents = pull_objects(
                        [node.object_id for node in iterate_object_tree(tree)],
                        pull_object,
                        max_time=_UPLOAD_TIMEOUT_S,
                        initial_backoff=0.02,
                        backoff_cap=0.5,
                    )
                    client.ConfirmMessageReceived(
                        ConfirmMessageReceivedRequest(
                            node=self.node, run_id=run_id, message_object_id=metadata.message_id
                        )
                    )
                body = inflate_object_from_contents(metadata.message_id, contents)
                if not isinstance(body, Message):
                    raise ProtocolError("the reply is not a message")
                content, error = (None, body.error) if body.has_error() else (body.content, None)
            except Exception as problem:
                if self._process.poll() is not None:
                    raise
                # Whatever a sender can make Flower's decoder raise concerns this one reply.
                log.warning("the reply of node %d is unreadable: %s", metadata.src_node_id, type(problem).__name__)
                content, error = None, Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, type(problem).__name__)
            yield make_message(metadata, content, error)

    @contextlib.contextmanager
    def _outages(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            code = self._process.poll()
            state = "runs but does not answer" if code is None else f"ended with status {code}"
            raise ProtocolError(
                f"the SuperLink {state} ({type(error).__name__}); see its log, then resume the run"
            ) from error


@contextlib.contextmanager
def superlink_grid(address: str, state_dir: Path | None = None) -> Iterator[SuperLinkGrid]:
    """Start a SuperLink on `address` (loopback) and yield a Grid for a new run on it, `grid.run.run_id`.

    state_dir: where `superlink.log` goes; a temporary folder by default. The SuperLink keeps its own state in memory:
    what must outlive a crash is in the coordinator's checkpoint, and nodes register anew.

    While it is open, SIGTERM raises SystemExit in the main thread, so that everything is taken down in order.
    Raises ConfigError on an address in use or a Flower that was not tested, ProtocolError where the SuperLink does
    not come up.
    """
    require_tested_flower()
    quiet_flower_log()
    host, port = loopback_address(address)
    _require_free(host, port)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="visard-")))
        log_path = (state_dir or folder) / "superlink.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_sigterm_as_exit())
        secret = secrets.token_bytes(32)
        process = stack.enter_context(_superlink_process(host, port, folder, log_path, secret))
        token = _start_run(address, secret)
        yield stack.enter_context(_serverapp_task(address, token, process))


@contextlib.contextmanager
def _superlink_process(
    host: str, port: int, folder: Path, log_path: Path, secret: bytes
) -> "Iterator[subprocess.Popen[bytes]]":
    secret_path = folder / "secret"
    secret_path.touch(mode=0o600, exist_ok=False)
    secret_path.write_bytes(secret)
    command = [sys.executable, "-c", _SUPERLINK, str(os.getpid()), "--insecure", "--host", host, "--port", str(port)]
    command += ["--isolation", "process", "--disable-runtime-dependency-installation"]
    command += ["--superexec-auth-secret-file", str(secret_path)]
    with log_path.open("wb") as log_file:
        # A session of its own: Ctrl-C in the terminal must reach this process alone, which then takes the SuperLink
        # down.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "FLWR_LOG_LEVEL": "WARNING", "FLWR_HOME": str(folder), **ENVIRONMENT},
            start_new_session=True,
        )
    try:
        _wait_until_healthy(process, f"http://{host}:{port}/health", log_path)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(process: "subprocess.Popen[bytes]", url: str, log_path: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    with httpx.Client(timeout=2.0) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                last = log_path.read_text(errors="replace").strip().splitlines()[-1:]
                raise ProtocolError(
                    f"the SuperLink ended with status {process.returncode}: {' '.join(last) or 'no log'}"
                )
            with contextlib.suppress(httpx.TransportError):
                if client.get(url).is_success:
                    return
            time.sleep(0.1)
    raise ProtocolError(f"the SuperLink did not answer within {_START_TIMEOUT_S:.0f} s; its log is {log_path}")


def _start_run(address: str, secret: bytes) -> str:
    """Hand in the stub app and take its ServerApp task. Returns the task's token."""
    fab = build_fab_from_files(_STUB)[0]
    interceptors: list[Any] = [RuntimeVersionHttpInterceptor("flwr-cli")]
    with ControlHttpClient.from_server_address(address, True, None, interceptors) as control:
        control.StartRun(StartRunRequest(fab=fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {}))))
    interceptors = [
        RuntimeVersionHttpInterceptor("flower-superexec"),
        SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=["/flwr.proto.Runtime/AcquireTask"]),
    ]
    with RuntimeHttpClient.from_server_address(address, True, None, interceptors) as runtime:
        token = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])).token
    if not token:
        raise ProtocolError("the SuperLink gave no task for the new run; see its log")
    return str(token)


@contextlib.contextmanager
def _serverapp_task(address: str, token: str, process: "subprocess.Popen[bytes]") -> Iterator[SuperLinkGrid]:
    """Be the ServerApp: report that it runs, keep it alive, and report at the end how it went."""
    grid = SuperLinkGrid(address, token, process)
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
    sub_status, details = SubStatus.FAILED, "the coordinator was stopped"
    try:
        task = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        heartbeat.start()
        TaskIdentity.run_id, TaskIdentity.node_id = task.run.run_id, task.context.node_id
        TaskIdentity.task_id = task.task_id
        grid.set_run(run_from_proto(task.run))
        yield grid
        sub_status, details = SubStatus.COMPLETED, ""
    finally:
        grid._retry_invoker.max_tries = 1
        with contextlib.suppress(httpx.HTTPError):
            grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status=sub_status, details=details))
        if heartbeat.is_running:
            heartbeat.stop()
        grid.close()


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --address") from error


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: object) -> NoReturn:
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
