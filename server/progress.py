"""What a person sees of a run while it goes on."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from server.checkpoint import CoordinatorState

# Seconds between two lines of the plain progress.
_LINE_S = 30.0


class ProgressBar:
    """An observer that draws a bar for the moment stage's fit and one for the rounds. Use it as a context manager."""

    def __init__(self, console: Console, state: CoordinatorState) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=24, table_column=Column(min_width=24)),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True, min_width=9)),
            TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("left", table_column=Column(min_width=4)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            # The figures give way where the terminal is narrow.
            TextColumn("[dim]{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console,
            expand=True,
        )
        config = state.config
        steps, fitted = config.moments.moment_steps * config.moments.moment_rounds, config.moments.moment_rounds > 0
        self._fit = self._progress.add_task("moments", total=steps, figures="", start=False, visible=fitted)
        self._rounds = self._progress.add_task("rounds ", total=state.last_round, figures="", start=False)
        # Of a run that is gone on with, some are done.
        self._progress.update(self._fit, completed=min(state.generator_steps, steps))
        self._progress.update(self._rounds, completed=state.next_round - 1)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def fit_stepped(self, state: CoordinatorState) -> None:
        """Move the moment stage's bar."""
        self._progress.start_task(self._fit)
        self._progress.update(self._fit, completed=state.generator_steps, figures=_figures(state))

    def round_ended(self, state: CoordinatorState) -> None:
        """Move the rounds' bar."""
        self._progress.start_task(self._rounds)
        self._progress.update(self._rounds, completed=state.next_round - 1, figures=_figures(state))


class PlainProgress:
    """An observer that prints a line now and then, for logs."""

    def __init__(self) -> None:
        self._told = 0.0

    def fit_stepped(self, state: CoordinatorState) -> None:
        """Tell the moment stage's steps."""
        self._tell(f"moment stage: step {state.generator_steps} of {state.config.moments.moment_steps}", state)

    def round_ended(self, state: CoordinatorState) -> None:
        """Tell the rounds."""
        self._tell(f"round {state.next_round - 1} of {state.last_round}", state, state.next_round > state.last_round)

    def _tell(self, what: str, state: CoordinatorState, always: bool = False) -> None:
        if always or time.monotonic() - self._told > _LINE_S:
            print(f"{what}  {_figures(state)}", flush=True)
            self._told = time.monotonic()


def _figures(state: CoordinatorState) -> str:
    names = ("moment_loss", "generator_loss", "fake_accuracy", "update_norm")
    return "  ".join(f"{name.replace('_', ' ')} {state.last[name]:.3g}" for name in names if name in state.last)
