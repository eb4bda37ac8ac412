"""TOML files that explain themselves: how a commented one is written, and how a small one of words is read."""

import textwrap
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tomli_w

from common.errors import ConfigError

# Kits and requests come from other people: what is longer is none.
_MAX_BYTES = 1 << 16


def commented(header: str, entries: Iterable[tuple[str, Any, str]]) -> bytes:
    """A TOML file of (key, value, meaning), each meaning a comment above its key. A value may be a table."""
    parts = [_comment(header)]
    for key, value, meaning in entries:
        parts.append(_comment(meaning) + tomli_w.dumps({key: value}, multiline_strings=True))
    return "\n".join(parts).encode()


def load_words(path: Path, what: str, keys: Iterable[str], remedy: str) -> dict[str, str]:
    """The texts under exactly `keys` in the file. what, remedy: words for the message.

    Raises ConfigError where it is missing, damaged, too long, or has other keys or values.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES:,} bytes")
        found = tomllib.loads(content.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the {what} {path}: {error}; {remedy}") from error
    wanted = list(keys)
    for problem, names in (
        ("lacks", [key for key in wanted if key not in found]),
        ("has the unknown key", [key for key in found if key not in wanted]),
        ("has no text for", [key for key in found if not isinstance(found[key], str)]),
    ):
        if names:
            raise ConfigError(f"the {what} {path} {problem} {', '.join(names)}: {remedy}")
    return found


def _comment(text: str) -> str:
    return textwrap.fill(text, 118, initial_indent="# ", subsequent_indent="# ", break_long_words=False) + "\n"
