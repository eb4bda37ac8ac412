"""What the commands that train say and write alike: the run's folder, its end, and how to go on after Ctrl-C."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from common.errors import ConfigError

if TYPE_CHECKING:
    from server.checkpoint import CoordinatorState

RUNS_DIR = Path("runs")


def run_directory(runs_dir: Path, name: str) -> Path:
    """The folder of the run `name`. Raises ConfigError on a name that would lead elsewhere or be hidden."""
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith((".", "-")):
        raise ConfigError(
            f"{name!r} cannot name a run: letters, digits, '-', '_' and '.' only, not beginning with '.' or '-'; give another --name"
        )
    return runs_dir / name


def stopped(directory: Path, command: list[str]) -> str:
    """What Ctrl-C leaves of the run in `directory`, and the command line, made from `command`, that goes on with it."""
    from server.checkpoint import CheckpointStore

    if not CheckpointStore(directory).path.exists():
        return "\nstopped before the first checkpoint: there is nothing to resume, start anew"
    command = [*command, "--name", directory.name]
    if directory.parent != RUNS_DIR:
        command += ["--runs-dir", str(directory.parent)]
    return f"\nstopped; nothing is lost. Go on with: {shlex.join([*command, '--resume'])}"


def closing_table(state: "CoordinatorState", directory: Path) -> Table:
    """What came of the run: rounds, time, the last figures, and the epsilon that the coordinator asked for."""
    from server.records import epsilon_so_far

    privacy = state.config.privacy
    table = Table(show_header=False, title=f"{directory.name}: done", title_justify="left")
    if state.stopped:
        table.add_row("ended early", state.stopped)
    table.add_row("rounds", f"{state.next_round - 1}")
    if state.primed:
        table.add_row("steps on public faces", f"{state.primed}")
    table.add_row("generator steps", f"{state.generator_steps}")
    table.add_row("time", f"{state.seconds / 60:.1f} min")
    for figure in ("moment_loss", "generator_loss", "fake_accuracy", "label_accuracy", "frechet"):
        if figure in state.last:
            table.add_row(figure.replace("_", " "), f"{state.last[figure]:.4g}")
    spent = epsilon_so_far(state)
    if spent is None:
        table.add_row("epsilon", "[bold red]infinite: no privacy[/]")
    else:
        table.add_row("epsilon of all rounds", f"{spent:.4g} of {privacy.epsilon:g} (delta {privacy.delta:g})")
    return table
