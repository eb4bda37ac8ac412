"""The node process: one long-lived process that answers a SuperLink's messages with the ClientApp installed here.

Flower's own SuperNode runs whatever app the coordinator sends, in a new process for each message. That would void a
budget that the owner enforces, and import torch in every round. This node speaks the same Fleet protocol but never
fetches an app: a coordinator can ask only what the installed ClientApp answers. Nor does it read the coordinator's
run config: all that is asked is in the message.

The parts of Flower used here are not documented; `common.flower` refuses untested versions.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import httpx
from flwr.app import Context, Error, Message, RecordDict, UserConfigValue
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from common.errors import ProtocolError
from common.flower import loopback_address, quiet_flower_log, require_tested_flower

log = logging.getLogger("visard.client")

_SHORTEST_WAIT_S = 0.02
_LONGEST_POLL_WAIT_S = 0.25
_LONGEST_RETRY_WAIT_S = 2.0
_DOWNLOAD_TIMEOUT_S = 30.0


class _Stopped(BaseException):
    """SIGTERM or Ctrl-C. Not an Exception, so that no handler on the way takes it for a failure of the app."""


def run_node(superlink: str, client_app: ClientApp, node_config: Mapping[str, UserConfigValue]) -> None:
    """Answer the messages of the SuperLink at `superlink` (HOST:PORT) with `client_app` until SIGTERM or Ctrl-C.

    node_config: what the owner decided; the app finds it in `context.node_config`. `context.run_config` is empty, and
    `context.state` is kept in memory for as long as the run lasts.

    Waits for a SuperLink that is not up yet or goes away, for ever, and registers again where it was forgotten. An
    exception out of the app is answered with its class name alone.

    Raises ConfigError on a malformed address or a Flower that was not tested, and ProtocolError on an address that is
    not loopback or a SuperLink that refuses this node.
    """
    require_tested_flower()
    quiet_flower_log()
    loopback_address(superlink)
    with _signals_as_stop(), contextlib.suppress(_Stopped):
        node = _WarmNode(superlink, client_app, node_config)
        try:
            while True:
                node.serve_until_forgotten()
        finally:
            node.stopping.set()


class _WarmNode:
    """One ClientApp and any number of connections, one after the other, each under a new key."""

    def __init__(self, superlink: str, client_app: ClientApp, node_config: Mapping[str, UserConfigValue]) -> None:
        self._superlink = superlink
        self._client_app = client_app
        self._node_config = dict(node_config)
        self._context = Context(0, 0, {}, RecordDict(), {})
        self.stopping = threading.Event()

    def serve_until_forgotten(self) -> None:
        """Register, answer messages, and return when the SuperLink no longer knows this node."""
        private_key, public_key = generate_key_pairs()
        interceptors: list[Any] = [
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(private_key, public_key),
        ]
        with FleetHttpClient.from_server_address(self._superlink, True, None, interceptors) as client:
            node = self._register(client, public_key_to_bytes(public_key))
            log.info("joined the SuperLink at %s as node %d", self._superlink, node.node_id)
            heartbeat = HeartbeatSender(lambda: _heartbeat(client, node))
            heartbeat.start()
            try:
                self._serve(client, node)
            finally:
                with contextlib.suppress(httpx.HTTPError):
                    client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
                    client.UnregisterNode(UnregisterNodeFleetRequest(node_id=node.node_id))
                if heartbeat.is_running:
                    heartbeat.stop()

    def _register(self, client: FleetHttpClient, public_key: bytes) -> Node:
        activation = ActivateNodeRequest(public_key=public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        try:
            self._retry(client.RegisterNode, RegisterNodeFleetRequest(public_key=public_key))
            return Node(node_id=self._retry(client.ActivateNode, activation).node_id)
        except _RefusedError as error:
            raise ProtocolError(f"the SuperLink at {self._superlink} refuses this node: {error}") from error

    def _serve(self, client: FleetHttpClient, node: Node) -> None:
        wait_s = _SHORTEST_WAIT_S
        while True:
            try:
                pulled = self._retry(client.PullMessages, PullMessagesRequest(node=node))
            except _RefusedError as error:
                log.warning("the SuperLink no longer knows this node (%s); joining again", error)
                time.sleep(_LONGEST_POLL_WAIT_S)
                return
            for proto, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                try:
                    self._answer(client, node, proto.metadata.run_id, tree)
                except Exception as error:
                    # The run ended, the message expired, the coordinator died half way through sending it, or sent
                    # what Flower cannot read. The next message may be better.
                    log.warning("a message was dropped: %s", type(error).__name__)
            wait_s = _SHORTEST_WAIT_S if pulled.messages_list else min(1.5 * wait_s, _LONGEST_POLL_WAIT_S)
            time.sleep(wait_s)

    def _answer(self, client: FleetHttpClient, node: Node, run_id: int, tree: ObjectTree) -> None:
        def retrying(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
            return lambda request: self._retry(call, request)

        message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(retrying(client.PullObject), node, run_id),
            make_confirm_message_received_fn_protobuf(retrying(client.ConfirmMessageReceived), node, run_id),
            return_type=Message,
            max_time=_DOWNLOAD_TIMEOUT_S,
            initial_backoff=_SHORTEST_WAIT_S,
            backoff_cap=0.5,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        reply = self._run_app(message, self._context_of(run_id, node.node_id))
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            # Flower would report the app's run time here; it depends on how many faces were drawn, so it stays.
            push = PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
            )
            pushed = self._retry(client.PushMessages, push)
            push_objects(
                get_all_nested_objects(reply),
                make_push_object_fn_protobuf(retrying(client.PushObject), node, run_id, pushed.session_id),
                object_ids_to_push=set(pushed.objects_to_push),
            )

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

    def _retry(self, call: Callable[[Any], Any], request: Any) -> Any:
        """Call until the SuperLink answers. Raises _RefusedError where its answer is an error."""
        wait_s, down_since = _SHORTEST_WAIT_S, time.monotonic()
        warned = False
        while True:
            try:
                answer = call(request)
            except httpx.TransportError as error:
                if not warned and time.monotonic() - down_since > 1.0:
                    log.warning("waiting for the SuperLink at %s (%s)", self._superlink, type(error).__name__)
                    warned = True
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in (502, 503, 504):
                    raise _RefusedError(f"status {error.response.status_code}: {error.response.text[:200]}") from error
            else:
                if warned:
                    log.warning("the SuperLink is back after %.0f s", time.monotonic() - down_since)
                return answer
            # Flower's transfer threads wait here too, and would keep a stopped process alive.
            if self.stopping.wait(wait_s):
                raise _RefusedError("stopped")
            wait_s = min(2 * wait_s, _LONGEST_RETRY_WAIT_S)


class _RefusedError(Exception):
    """The SuperLink answered a call with an error."""


def _heartbeat(client: FleetHttpClient, node: Node) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL))
        return True
    return False


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
