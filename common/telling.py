"""How errors and logs are told to people, whose terminals nobody else is to steer."""

import logging

from rich.console import Console
from rich.markup import escape

# Of one record in a log: what others write is in it.
_LONGEST = 1 << 15


def tell_error(error: BaseException) -> None:
    """One line on standard error, without a traceback: what Visard refuses on purpose says itself why, and what to do."""
    told = "\n".join(map(_printable, str(error).splitlines()))
    Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {escape(told)}", highlight=False, soft_wrap=True)


def plain(text: str) -> str:
    """On one line, and nothing that would steer a terminal: neither control characters nor such as turn the writing round."""
    return " ".join(_printable(text).split())


class PlainFormatter(logging.Formatter):
    """Writes nothing that would steer a terminal, and no line within a record that could pass for another record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, 32 KiB of it at most; lines after its first are indented."""
        return "\n  ".join(map(_printable, super().format(record)[:_LONGEST].splitlines()))


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else " " for c in line)
