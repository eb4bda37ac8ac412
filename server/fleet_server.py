"""The HTTPS server under the Fleet API, and what it withstands before anybody has shown a key.

A connection costs hundreds of kilobytes from the moment it is accepted, most of it for TLS, and anybody can open
one. So those on which no registered node has shown its key are counted from there on: the oldest makes room for the
newest, and none is left open for long. Requests' heads are short, TLS is 1.3.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

from common.errors import ConfigError, ProtocolError
from common.kit import split_address
from server.fleet import Fleet

_START_TIMEOUT_S = 30.0
# At the end, what is being answered gets so long.
_GRACE_S = 0.5
# Connections on which no node has shown its key: so many, for so long.
_MOST_STRANGERS, _STRANGER_S = 256, 20.0
# Requests at once, and connections that the kernel keeps until they are accepted.
_MOST_REQUESTS, _BACKLOG = 2048, 128
_HEAD_BYTES = 1 << 14


class _Listener(socket.socket):
    """A listening socket that knows its connections from the moment they are accepted."""

    def __init__(self, family: socket.AddressFamily, known: set[tuple[str, int]]) -> None:
        """known: addresses on which a node has shown its key; those that are gone are taken out."""
        # Where the protocol is not named asyncio does not take it for TCP, and each answer waits 40 ms for an acknowledgement.
        super().__init__(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._known = known
        self._open: list[tuple[socket.socket, tuple[str, int], float]] = []

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection; where there are too many strangers, in the place of the one that is here longest."""
        connection, address = super().accept()
        strangers = self._strangers()
        if len(strangers) >= _MOST_STRANGERS:
            # Taken out here: the loop closes it later, and may accept many before.
            self._open.remove(strangers[0])
            _cut(strangers[0][0])
        self._open.append((connection, address[:2], time.monotonic()))
        return connection, address

    def cut_strangers(self, seconds: float) -> None:
        """End connections without a key that are older than `seconds`."""
        for connection, _, since in self._strangers():
            if time.monotonic() - since > seconds:
                _cut(connection)

    def cut_all(self) -> None:
        """End all connections."""
        for connection, _, _ in self._open:
            _cut(connection)

    def _strangers(self) -> list[tuple[socket.socket, tuple[str, int], float]]:
        self._open = [entry for entry in self._open if entry[0].fileno() != -1]
        self._known &= {address for _, address, _ in self._open}
        return [entry for entry in self._open if entry[1] not in self._known]


class FleetServer:
    """uvicorn with the Fleet API at `listen` (HOST:PORT). `serve` is for a thread of its own."""

    def __init__(self, fleet: Fleet, listen: str, certificate: Path, key: Path) -> None:
        """Raises ConfigError on an address in use and a certificate that cannot be loaded."""
        self._listen = listen
        self._listener = _listening(listen, fleet.known)
        try:
            self._server = _server(fleet, certificate, key)
        except BaseException:
            self._listener.close()
            raise

    def serve(self) -> None:
        """Serve until `stop`."""
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            runner.run(self._main())

    def wait_until_serving(self, thread: threading.Thread) -> None:
        """Raises ProtocolError where the server does not come up in `thread`."""
        until = time.monotonic() + _START_TIMEOUT_S
        while not self._server.started:
            if not thread.is_alive() or time.monotonic() > until:
                raise ProtocolError(f"the server at {self._listen} did not come up; the log says why")
            time.sleep(0.01)

    def stop(self) -> None:
        """Have `serve` end within a second or two."""
        self._server.should_exit = True

    def close(self) -> None:
        """Give the address back."""
        self._listener.close()

    async def _main(self) -> None:
        watch = asyncio.ensure_future(self._watch())
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        looked = time.monotonic()
        while not self._server.should_exit:
            await asyncio.sleep(0.1)
            if time.monotonic() - looked > _STRANGER_S / 4:
                looked = time.monotonic()
                self._listener.cut_strangers(_STRANGER_S)
        # Nodes' farewells, which come when they next read, are not waited for.
        while True:
            await asyncio.sleep(_GRACE_S)
            self._listener.cut_all()


def _cut(connection: socket.socket) -> None:
    """End it at once, and tell the loop, which then closes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _listening(listen: str, known: set[tuple[str, int]]) -> _Listener:
    host, port = split_address(listen, "listen")
    listener = _Listener(socket.AF_INET6 if ":" in host else socket.AF_INET, known)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {listen}: {error.strerror or error}; choose another `listen`") from error
    return listener


def _server(fleet: Fleet, certificate: Path, key: Path) -> uvicorn.Server:
    config = uvicorn.Config(
        fleet,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        loop="asyncio",
        # The faster parser has no limit to a request's head.
        http="h11",
        h11_max_incomplete_event_size=_HEAD_BYTES,
        # Nobody's word on where he calls from is taken.
        proxy_headers=False,
        limit_concurrency=_MOST_REQUESTS,
        backlog=_BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )
    # It tells of every connection that breaks; what goes wrong in the app is in our own log.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"cannot load the certificate {certificate} with the key {key}: {error}") from error
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    return uvicorn.Server(config)
