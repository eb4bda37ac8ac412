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
_STAGES = {"prior": "public faces", "moments": "moment stage", "refine": "refinement"}


class ProgressBar:
    """An observer that draws a bar for each stage of the generator's steps and one for the rounds. Use it as a context manager."""

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
        steps = config.moments.moment_steps * config.moments.moment_rounds
        # Of a run that is gone on with, some are done.
        self._bars = {
            name: self._progress.add_task(
                f"{name:<7}", total=total, completed=min(done, total), figures="", start=False, visible=total > 0
            )
            for name, done, total in (
                ("prior", state.primed, config.training.public_steps),
                ("moments", state.generator_steps, steps),
                ("rounds", state.next_round - 1, state.last_round),
                ("refine", state.refined, config.training.refine_steps if config.training.num_rounds else 0),
            )
        }

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def fit_stepped(self, state: CoordinatorState) -> None:
        """Move the bar of the stage that the step was of."""
        stage, done, _ = state.fit
        self._move(stage, done, state)

    def round_ended(self, state: CoordinatorState) -> None:
        """Move the rounds' bar."""
        self._move("rounds", state.next_round - 1, state)

    def _move(self, name: str, done: int, state: CoordinatorState) -> None:
        self._progress.start_task(self._bars[name])
        self._progress.update(self._bars[name], completed=done, figures=_figures(state))


class PlainProgress:
    """An observer that prints a line now and then, for logs."""

    def __init__(self) -> None:
        self._told = 0.0

    def fit_stepped(self, state: CoordinatorState) -> None:
        """Tell the steps of the stage."""
        stage, done, total = state.fit
        self._tell(f"{_STAGES[stage]}: step {done} of {total}", state, done == total)

    def round_ended(self, state: CoordinatorState) -> None:
        """Tell the rounds."""
        self._tell(f"round {state.next_round - 1} of {state.last_round}", state, state.next_round > state.last_round)

    def _tell(self, what: str, state: CoordinatorState, always: bool = False) -> None:
        if always or time.monotonic() - self._told > _LINE_S:
            print(f"{what}  {_figures(state)}", flush=True)
            self._told = time.monotonic()


def _figures(state: CoordinatorState) -> str:
    names = ("prior_loss", "moment_loss", "generator_loss", "fake_accuracy", "label_accuracy", "update_norm")
    return "  ".join(f"{name.replace('_', ' ')} {state.last[name]:.3g}" for name in names if name in state.last)
