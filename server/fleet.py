"""Flower's Fleet API for one run, and nothing else: what nodes can reach of a coordinator.

Flower's own SuperLink serves its Fleet, Control and Runtime APIs on one port and lets whoever reaches it submit runs,
that is code. Here a request is answered where its path is one of five of the Fleet API's; every other path answers 403 to
everybody, the Control and the Runtime API among them, which do not exist in this process. Of the five nothing is read
before the caller has shown a registered node's key: a signature over the time in the headers, as Flower's nodes make it.

The messages are Flower's protocol buffers, with the content in the message itself: one request brings a node its
instructions and waits where there are none, one takes the answer back. A node that asks for messages while one is
unanswered gets that one again: it has lost it, in a crash or on the way. Answers to anything but its own open message
are dropped.
"""

import asyncio
import datetime
import logging
import threading
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final

from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from google.protobuf.message import DecodeError

from common.kit import node_id_of
from common.seal import CLOCK_TOLERANCE_S
from server.registry import RegisteredNode, Registry

log = logging.getLogger("visard.server")

# A node that was not heard of for so long is not connected; its heartbeat is every ten seconds.
PATIENCE_S: Final = 25.0
# An empty answer after so long: a connection without traffic may be cut on the way.
HOLD_S: Final = 15.0
# All requests but answers are small.
_SMALL_BYTES = 1 << 16
# Requests of one node whose bodies are read at once, and the pause after which such a body is given up.
_MOST_AT_ONCE = 4
_STALL_S = 30.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _Refused(Exception):
    """A request that is answered with an HTTP status and a line of text."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass
class _Peer:
    """A node that is, or was, connected."""

    node: RegisteredNode
    seen: float = 0.0
    active: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)
    turn: int = 0


class Fleet:
    """What is asked of the nodes and what they answered, and the ASGI app through which they reach it.

    The app runs in an event loop of its own thread; the other methods may be called from any thread.
    """

    def __init__(self, registry: Registry, max_message_bytes: int) -> None:
        """max_message_bytes: of one answer."""
        self._registry = registry
        self._limit = max_message_bytes
        self._lock = threading.Lock()
        self._peers: dict[int, _Peer] = {}
        # By node id; a node that is not back yet finds what it was asked when it comes.
        self._asked: dict[int, list[ProtoMessage]] = {}
        self._answers: dict[str, ProtoMessage] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._read_now: Counter[bytes] = Counter()
        self.arrived = threading.Event()
        self.bytes_in = self.bytes_out = 0
        # Addresses of the connections on which a node has shown its key.
        self.known: set[tuple[str, int]] = set()
        self._routes: dict[str, tuple[Any, Callable[..., Awaitable[Any]]]] = {
            "/v1/fleet/activate-node": (ActivateNodeRequest, self._activate),
            "/v1/fleet/deactivate-node": (DeactivateNodeRequest, self._deactivate),
            "/v1/fleet/send-node-heartbeat": (SendNodeHeartbeatRequest, self._heartbeat),
            "/v1/fleet/pull-messages": (PullMessagesRequest, self._pull),
            "/v1/fleet/push-messages": (PushMessagesRequest, self._push),
        }

    def connected(self) -> dict[int, RegisteredNode]:
        """The nodes that are connected and still approved, by node id."""
        now = time.monotonic()
        with self._lock:
            peers = {n: p.node for n, p in self._peers.items() if p.active and now - p.seen < PATIENCE_S}
        return {n: node for n, node in sorted(peers.items()) if self._registry.by_key(node.node_key)}

    def ask(self, messages: list[ProtoMessage]) -> None:
        """Hand these out; what was asked before and not answered is withdrawn."""
        with self._lock:
            self._answers.clear()
            self._asked.clear()
            for message in messages:
                self._asked.setdefault(message.metadata.dst_node_id, []).append(message)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake)

    def approved(self, node_id: int) -> RegisteredNode | None:
        """A node that is, or was, connected, unless it was revoked."""
        with self._lock:
            peer = self._peers.get(node_id)
        return self._registry.by_key(peer.node.node_key) if peer else None

    def answers(self, message_ids: set[str]) -> list[ProtoMessage]:
        """The answers to these messages that have come; each is given once."""
        with self._lock:
            return [self._answers.pop(i) for i in message_ids & self._answers.keys()]

    def close(self) -> None:
        """Let the nodes go that wait for messages."""
        self._closing = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for peer in self._peers.values():
            peer.news.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI app."""
        if scope["type"] != "http":
            return
        self._loop = asyncio.get_running_loop()
        try:
            route = self._routes.get(scope["path"]) if scope["method"] == "POST" else None
            if route is None:
                raise _Refused(403, "nothing is served here but Flower's Fleet API to registered nodes")
            kind, handle = route
            node = self._authenticated(scope)
            limit = self._limit + _SMALL_BYTES if kind is PushMessagesRequest else _SMALL_BYTES
            body = await self._body(scope, receive, node, limit)
            self.bytes_in += len(body)
            if kind is PushMessagesRequest and not self._asked.get(node_id_of(node.node_key)):
                # What unfolds to many times its size is not unfolded to no purpose.
                self._peer(node, node_id_of(node.node_key))
                log.info("an answer of node %s to nothing that is open was dropped", node.name)
                response = b""
            else:
                try:
                    request = kind.FromString(body)
                except DecodeError:
                    raise _Refused(400, "not the protocol buffer of this path") from None
                response = (await handle(node, request, receive)).SerializeToString()
        except _Refused as refused:
            await _respond(send, refused.status, str(refused).encode(), b"text/plain", close=True)
            return
        except Exception:
            log.exception("a request failed")
            await _respond(send, 500, b"the coordinator's log says why", b"text/plain", close=True)
            return
        self.bytes_out += len(response)
        await _respond(send, 200, response, b"application/protobuf")

    async def _body(self, scope: Scope, receive: Receive, node: RegisteredNode, limit: int) -> bytes:
        """Raises _Refused where it is too large, or this node sends too many requests at once."""
        if self._read_now[node.node_key] >= _MOST_AT_ONCE:
            raise _Refused(429, f"more than {_MOST_AT_ONCE} requests of this node at once")
        self._read_now[node.node_key] += 1
        try:
            return await _read(scope, receive, limit)
        finally:
            self._read_now[node.node_key] -= 1

    def _authenticated(self, scope: Scope) -> RegisteredNode:
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        try:
            pem = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
            timestamp = headers[TIMESTAMP_HEADER]
            signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        except (KeyError, ValueError):
            raise _Refused(401, "no registered node's signature") from None
        # A stranger's key is not even parsed; the registered ones are of the right kind.
        node = self._registry.by_key(pem)
        if node is None:
            raise _Refused(401, "this node's key is not approved here")
        try:
            if not verify_signature(bytes_to_public_key(pem), timestamp, signature):
                raise ValueError("another's signature")
            told = datetime.datetime.fromisoformat(timestamp.decode("ascii"))
            if told.tzinfo is None:
                raise ValueError("a time of no zone")
            age = time.time() - told.timestamp()
        except ValueError:
            raise _Refused(401, "no registered node's signature") from None
        if not abs(age) < CLOCK_TOLERANCE_S:
            raise _Refused(401, f"this node's clock is {-age:+.0f} s from the coordinator's")
        self.known.add(tuple(scope["client"]))
        return node

    def _peer(self, node: RegisteredNode, claimed: int) -> _Peer:
        """The peer behind an authenticated request that says it is `claimed`."""
        node_id = node_id_of(node.node_key)
        peer = self._peers.get(node_id)
        if claimed != node_id or peer is None or not peer.active:
            raise _Refused(409, "activate this node first")
        peer.seen = time.monotonic()
        return peer

    def _open_to(self, node: RegisteredNode) -> list[ProtoMessage]:
        """What this node was asked and has not answered, while there is time."""
        with self._lock:
            asked, now = self._asked.get(node_id_of(node.node_key), []), time.time()
            return [m for m in asked if m.metadata.created_at + m.metadata.ttl > now]

    async def _activate(self, node: RegisteredNode, request: Any, _receive: Receive) -> Any:
        if request.public_key != node.node_key:
            raise _Refused(401, "a key that is not the caller's")
        node_id = node_id_of(node.node_key)
        with self._lock:
            peer = self._peers.setdefault(node_id, _Peer(node))
        peer.node, peer.seen, peer.active = node, time.monotonic(), True
        # What its former connection holds ends, and that one's end is not this one's.
        peer.turn += 1
        peer.news.set()
        log.info("node %s is connected", node.name)
        return ActivateNodeResponse(node_id=node_id)

    async def _deactivate(self, node: RegisteredNode, request: Any, _receive: Receive) -> Any:
        self._peer(node, request.node_id).active = False
        log.info("node %s has left", node.name)
        return DeactivateNodeResponse()

    async def _heartbeat(self, node: RegisteredNode, request: Any, _receive: Receive) -> Any:
        self._peer(node, request.node.node_id)
        return SendNodeHeartbeatResponse(success=True)

    async def _pull(self, node: RegisteredNode, request: Any, receive: Receive) -> Any:
        peer = self._peer(node, request.node.node_id)
        peer.turn += 1
        peer.news.set()
        turn, until = peer.turn, time.monotonic() + HOLD_S
        gone = asyncio.ensure_future(receive())  # completes when the node hangs up
        try:
            # A node holds one request: a newer one takes the place of this.
            while peer.turn == turn and not gone.done() and not self._closing:
                peer.news.clear()
                if self._registry.by_key(node.node_key) is None:
                    raise _Refused(401, "this node's key is not approved here")
                if open_ := self._open_to(node):
                    return PullMessagesResponse(messages_list=open_[:1])
                left = until - time.monotonic()
                if left <= 0:
                    break
                news = asyncio.ensure_future(peer.news.wait())
                await asyncio.wait({news, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
            if gone.done() and peer.turn == turn:
                peer.active = False
        finally:
            gone.cancel()
        return PullMessagesResponse()

    async def _push(self, node: RegisteredNode, request: Any, _receive: Receive) -> Any:
        self._peer(node, request.node.node_id)
        for message in request.messages_list[:1]:
            told, node_id = message.metadata, node_id_of(node.node_key)
            with self._lock:
                open_ = self._asked.get(node_id, [])
                asked = next((m for m in open_ if m.metadata.message_id == told.reply_to_message_id), None)
                if asked is None or told.src_node_id != node_id:
                    log.info("an answer of node %s to nothing that is open was dropped", node.name)
                    continue
                open_.remove(asked)
                self._answers[told.reply_to_message_id] = message
            self.arrived.set()
        return PushMessagesResponse()


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes:
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    if lengths and (not lengths[0].isdigit() or int(lengths[0]) > limit):
        raise _Refused(413, f"{lengths[0][:20].decode('latin-1')} bytes; the limit is {limit}")
    parts, size = [], 0
    while True:
        try:
            event = await asyncio.wait_for(receive(), _STALL_S)
        except TimeoutError:
            raise _Refused(408, f"nothing came for {_STALL_S:g} s") from None
        if event["type"] != "http.request":
            raise _Refused(400, "the request broke off")
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _Refused(413, f"more than {limit} bytes")
        if not event.get("more_body", False):
            return b"".join(parts)


async def _respond(send: Send, status: int, body: bytes, kind: bytes, *, close: bool = False) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    # What is left of a refused request's body is not read.
    headers += [(b"connection", b"close")] if close else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
