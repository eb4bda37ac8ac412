"""What we need to know of Flower before importing it: the tested version and its environment.

Three modules (`client.node`, `server.superlink`, `simulations.engine`) lean on parts of Flower that are not documented
and that change without notice, so they refuse every version but the one they were tested with.
"""

import logging
from importlib import metadata
from ipaddress import ip_address
from typing import Final

from common.errors import ConfigError, ProtocolError

TESTED_VERSION: Final = "1.41.0"

# For every process of Flower that we start: nothing is reported home, looked up or installed.
ENVIRONMENT: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def require_tested_flower() -> None:
    """Raise ConfigError unless the installed Flower is the version that we were tested with."""
    try:
        installed = metadata.version("flwr")
    except metadata.PackageNotFoundError:
        raise ConfigError(f"flwr is not installed; pip install flwr=={TESTED_VERSION}") from None
    if installed != TESTED_VERSION:
        raise ConfigError(
            f"flwr {installed} is installed, but only {TESTED_VERSION} was tested; pip install flwr=={TESTED_VERSION}"
        )


def quiet_flower_log() -> None:
    """Keep Flower's log to warnings. Call it after importing flwr, which sets its logger to DEBUG."""
    logging.getLogger("flwr").setLevel(logging.WARNING)


def loopback_address(address: str) -> tuple[str, int]:
    """Split `HOST:PORT` (or `[::1]:PORT`) of this machine's loopback interface into host and port.

    Raises ConfigError where it is not an address, and ProtocolError where it is one of another interface: without TLS
    and node keys whoever reaches the port could run code on the coordinator.
    """
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"{address!r} is not an address; write HOST:PORT, for example 127.0.0.1:9092")
    try:
        is_loopback = ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ProtocolError(
            f"{address!r} is not on the loopback interface, and TLS and node keys are a later addition; use 127.0.0.1"
        )
    return host, int(port)
