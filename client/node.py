"""The node process: one long-lived process that answers a coordinator's messages with the ClientApp installed here.

Flower's own SuperNode runs whatever app the coordinator sends, in a new process for each message. That would void a
budget that the owner enforces, and import torch in every round. This node speaks Flower's Fleet protocol but never
fetches an app: a coordinator can ask only what the installed ClientApp answers, and only under the signing key that the
owner has pinned. Nor does it read the coordinator's run config: all that is asked is in the message.

The parts of Flower used here are not documented; `common.flower` refuses untested versions.
"""

import contextlib
import datetime
import email.utils
import logging
import secrets
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict, UserConfigValue
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.node_status import NodeStatus
from common.errors import ConfigError, ProtocolError
from common.flower import quiet_flower_log, require_tested_flower
from common.kit import Kit, node_id_of
from common.seal import open_sealed
from common.telling import plain

log = logging.getLogger("visard.client")

_RANDOM = secrets.SystemRandom()

_HEARTBEAT_S = 10.0
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.1, 30.0
# After this long without an answer the owner is told.
_TELL_AFTER_S = 2.0
# For each step of a farewell: whoever stops a node does not wait for a coordinator that is silent.
_FAREWELL_S = 0.4
_TOO_LARGE = 413
_TURN_S = 1.0
# Of a coordinator that is busy, or of what stands before one that is down.
_TEMPORARY = (429, 502, 503, 504)


class _Stopped(BaseException):
    """SIGTERM or Ctrl-C. Not an Exception, so that no handler on the way takes it for a failure of the app."""


class _RefusedError(Exception):
    """The coordinator answered a call with an error."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def run_node(
    kit: Kit,
    key: EllipticCurvePrivateKey,
    client_app: ClientApp,
    node_config: Mapping[str, UserConfigValue],
    status: NodeStatus,
    max_message_bytes: int = 1 << 30,
) -> None:
    """Answer the messages of the coordinator that made `kit` with `client_app` until SIGTERM or Ctrl-C.

    key: the node's, whose public half the coordinator approves. node_config: what the owner decided; the app finds it in
    `context.node_config`. `context.run_config` is empty, and `context.state` is kept in memory for as long as the run
    lasts. max_message_bytes: a longer response of the coordinator is not read.

    Waits for a coordinator that is not up, does not know this node yet or goes away, for ever and ever less often. An
    exception out of the app is answered with its class name alone.

    Raises ConfigError on a Flower that was not tested, or where the first answer comes from a
    machine that cannot show a certificate of the kit's authority; once connected it waits for the right one instead.
    """
    require_tested_flower()
    quiet_flower_log()
    with _signals_as_stop(), contextlib.suppress(_Stopped):
        node = _WarmNode(kit, key, client_app, node_config, status, max_message_bytes)
        try:
            while True:
                node.serve_until_forgotten()
        finally:
            node.stopping.set()
            status.connection("stopped")


class _WarmNode:
    """One ClientApp and any number of connections, one after the other, under one key."""

    def __init__(
        self,
        kit: Kit,
        key: EllipticCurvePrivateKey,
        client_app: ClientApp,
        node_config: Mapping[str, UserConfigValue],
        status: NodeStatus,
        max_message_bytes: int,
    ) -> None:
        self._kit, self._key, self._status = kit, key, status
        self._signing_key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(kit.signing_key))
        self._client_app = client_app
        self._node_config = dict(node_config)
        self._limit = max_message_bytes
        self._context = Context(0, 0, {}, RecordDict(), {})
        self._was_connected = False
        self._again_s = _SHORTEST_WAIT_S
        self.stopping = threading.Event()

    def serve_until_forgotten(self) -> None:
        """Connect, answer messages, and return when the coordinator no longer knows this node."""
        public_key = public_key_to_bytes(self._key.public_key())
        client = FleetHttpClient.from_server_address(
            self._kit.address,
            False,
            self._kit.ca.encode(),
            [NodeAuthHttpInterceptor(self._key, self._key.public_key())],
        )
        # Called before a body is read.
        client._client.event_hooks = {"response": [self._check_response]}
        client._client.follow_redirects = False
        left = threading.Event()
        with client:
            activation = ActivateNodeRequest(public_key=public_key, heartbeat_interval=_HEARTBEAT_S)
            self._retry(client.ActivateNode, activation, unknown_is_final=False)
            # Not as the answer says: seals are for this node's own id.
            node = Node(node_id=node_id_of(public_key))
            try:
                self._was_connected = True
                self._status.connection("connected")
                log.info("connected to the coordinator at %s", self._kit.address)
                threading.Thread(target=self._beat, args=(client, node, left), name="heartbeat", daemon=True).start()
                self._serve(client, node)
            finally:
                left.set()
                client._client.timeout = _FAREWELL_S
                with contextlib.suppress(httpx.HTTPError, ProtocolError, ValueError):
                    client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))

    def _serve(self, client: FleetHttpClient, node: Node) -> None:
        wait_s = _SHORTEST_WAIT_S
        while True:
            try:
                # The coordinator holds this until it asks for something, some seconds at most.
                asked_at = time.monotonic()
                pulled = self._retry(client.PullMessages, PullMessagesRequest(node=node))
                self._again_s = _SHORTEST_WAIT_S
                if not pulled.messages_list and time.monotonic() - asked_at < _TURN_S:
                    # Sent away: another process with this key asks too, or the coordinator is about to end.
                    self.stopping.wait(_TURN_S)
                for asked in pulled.messages_list:
                    self._push(client, node, self._answer(asked, node.node_id))
                    wait_s = _SHORTEST_WAIT_S
            except _RefusedError as error:
                log.info("the coordinator no longer knows this node (%s); connecting again", error)
                self._status.connection(f"refused: {error}")
                self.stopping.wait(self._again_s)
                self._again_s = min(2 * self._again_s, _LONGEST_WAIT_S)
                return
            except ProtocolError as error:
                # Asked again at once it would be refused at once.
                log.warning("a message was refused: %s", error)
                self._status.connection(f"refused: {error}")
                self.stopping.wait(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _answer(self, asked: ProtoMessage, node_id: int) -> Message:
        """Raises ProtocolError for what the holder of the signing key did not send."""
        try:
            sealed = message_from_proto(asked)
            content = sealed.content if sealed.has_content() else RecordDict()
        except Exception as error:  # not signed yet: whatever Flower makes of bytes that anybody wrote
            raise ProtocolError(f"a message that cannot be read ({type(error).__name__})") from error
        message = make_message(sealed.metadata, open_sealed(content, self._signing_key, time.time(), node_id))
        self._status.asked(*_round_of(message.content))
        reply = self._run_app(message, self._context_of(message.metadata.run_id, node_id))
        self._status.answered((reply.error.reason or "error") if reply.has_error() else "")
        return reply

    def _push(self, client: FleetHttpClient, node: Node, reply: Message) -> None:
        # Flower would report the app's run time here; it depends on how many faces were drawn, so it stays.
        try:
            self._retry(client.PushMessages, PushMessagesRequest(node=node, messages_list=[message_to_proto(reply)]))
        except _RefusedError as error:
            if error.status != _TOO_LARGE or reply.has_error():
                raise
            log.error("the coordinator takes no answer of this size: %s", error)
            about = reply.metadata
            refusal = make_message(about, error=Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "MalformedUpdate"))
            self._push(client, node, refusal)

    def _run_app(self, message: Message, context: Context) -> Message:
        try:
            reply = self._client_app(message, context)
            if not isinstance(reply, Message) or reply.metadata.reply_to_message_id != message.metadata.message_id:
                raise ProtocolError("the ClientApp did not return a reply to its message")
        except Exception as error:
            # The class name leaves; the text, which may hold a path or a count, stays in the owner's log.
            log.exception("the ClientApp failed")
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)
        return reply

    def _context_of(self, run_id: int, node_id: int) -> Context:
        if self._context.run_id != run_id:
            self._context = Context(run_id, node_id, dict(self._node_config), RecordDict(), {})
        return self._context

    def _beat(self, client: FleetHttpClient, node: Node, left: threading.Event) -> None:
        while not left.wait(_HEARTBEAT_S) and not self.stopping.is_set():
            with contextlib.suppress(httpx.HTTPError, ProtocolError, RuntimeError, ValueError):
                client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=_HEARTBEAT_S))

    def _check_response(self, response: httpx.Response) -> None:
        length = response.headers.get("content-length", "")
        # Either would make a body longer than its length says.
        encoding = response.headers.get("content-encoding", "") + response.headers.get("transfer-encoding", "")
        if encoding or not length.isdecimal() or int(length) > self._limit:
            raise ProtocolError(
                f"a response of {length[:20] or '?'} bytes {encoding[:20]} is not read; the limit is {self._limit}"
            )

    def _retry(self, call: Callable[[Any], Any], request: Any, *, unknown_is_final: bool = True) -> Any:
        """Call until the coordinator answers.

        unknown_is_final: raise _RefusedError where it does not know this node; otherwise that is waited for as well.
        """
        wait_s, down_since, told = _SHORTEST_WAIT_S, time.monotonic(), ""
        while True:
            try:
                answer = call(request)
            except httpx.HTTPStatusError as error:
                status, reason = error.response.status_code, plain(error.response.text[:300])
                if status not in _TEMPORARY and unknown_is_final:
                    raise _RefusedError(status, f"{reason} (status {status})") from error
                problem = f"refused: {reason} (status {status}){_clock_hint(error.response)}"
            except httpx.TransportError as error:
                problem = self._outage(error)
            except (ProtocolError, ValueError) as error:  # a response that is too long, or none of Flower's
                problem = f"refused: {error}"
            else:
                if told:
                    log.warning("the coordinator is back after %.0f s", time.monotonic() - down_since)
                    self._status.connection("connected")
                return answer
            if problem != told and (time.monotonic() - down_since > _TELL_AFTER_S or problem.startswith("refused")):
                log.warning("waiting for the coordinator at %s: %s", self._kit.address, problem)
                self._status.connection(problem)
                told = problem
            # Not all nodes at once.
            if self.stopping.wait(wait_s * _RANDOM.uniform(0.8, 1.2)):
                raise _RefusedError(0, "stopped")
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _outage(self, error: httpx.TransportError) -> str:
        """What to tell of it. Raises ConfigError where the certificate is wrong before there was any connection."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            return f"no connection ({type(error).__name__})"
        problem = (
            f"the machine at {self._kit.address} has no certificate of the invitation's authority for that name "
            f"({cause.verify_message}): the invitation is of another coordinator or out of date, or somebody stands between"
        )
        if not self._was_connected:
            raise ConfigError(problem) from error
        return f"refused: {problem}"


def _round_of(content: RecordDict) -> tuple[str, int]:
    """The run and the round that instructions are of, for the owner's eyes; "", 0 for other messages."""
    asked = content.get("instructions")
    if isinstance(asked, ConfigRecord):
        run, number = asked.get("run_id"), asked.get("server_round")
        if isinstance(run, str) and isinstance(number, int):
            return run[:64], number
    return "", 0


def _clock_hint(response: httpx.Response) -> str:
    """Where the clocks differ: signatures over the time are refused then."""
    with contextlib.suppress(KeyError, ValueError):
        there = email.utils.parsedate_to_datetime(response.headers["date"])
        ahead = (datetime.datetime.now(datetime.UTC) - there).total_seconds()
        if abs(ahead) > 3:
            return f"; this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's: set it"
    return ""


@contextlib.contextmanager
def _signals_as_stop() -> Iterator[None]:
    """Make SIGTERM and SIGINT raise _Stopped in the main thread; a second signal acts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def stop(signum: int, frame: object) -> NoReturn:
        restore()
        raise _Stopped

    for number in previous:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()
