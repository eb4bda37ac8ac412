"""What we need to know of Flower before importing it: the tested version and its environment.

Three modules (`client.node`, `server.superlink`, `simulations.engine`) lean on parts of Flower that are not documented
and that change without notice, so they refuse every version but the one they were tested with.
"""

import logging
from importlib import metadata
from typing import Final

from common.errors import ConfigError

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
