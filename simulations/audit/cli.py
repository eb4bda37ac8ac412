"""`visard audit`: what a run's promise is worth, tried. What is slow to import is imported when it is used."""

import json
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.errors import ConfigError, DataError, VisardError
from common.options import with_run_options
from simulations.recipe import load_recipe, recipe_names

if TYPE_CHECKING:
    from common.config import RunConfig
    from simulations.audit.report import Audit

PARTS = ("ledgers", "gate", "one-run", "membership", "inversion")
_ONE_RUN_ROUNDS = 60
_COLOURS = {True: "green", False: "bold red", None: "cyan"}

console = Console()


def _audit(
    target: Annotated[
        str, typer.Argument(help=f"Folder of a run of `visard simulate`, or a recipe: {', '.join(recipe_names())}")
    ] = "demo",
    parts: Annotated[
        str, typer.Option(help="What to do, comma-separated; ledgers and membership need a run")
    ] = ",".join(PARTS),
    holdout: Annotated[
        str | None,
        typer.Option(
            help="Faces that were not in the run, read like --data: the non-members",
            show_default="the data's test split",
        ),
    ] = None,
    one_run_rounds: Annotated[
        int, typer.Option(min=1, help="Rounds of the run with canaries at most, with noise for the same epsilon")
    ] = _ONE_RUN_ROUNDS,
    quick: Annotated[bool, typer.Option("--quick", help="The gate in short form: a quarter of the releases")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for audit.json and audit.md, which replace those of an earlier audit",
            show_default="RUN, or runs/audit-RECIPE",
        ),
    ] = None,
    overrides: dict[str, Any] | None = None,
) -> None:
    """Audit what really leaves clients: noise, clipping, sampling and ledgers against the claim, and three kinds of attack.

    Ends with status 1 where anything is found wrong. docs/security.md says what each part shows and what it cannot.
    """
    wanted = _wanted(parts)
    run = Path(target) if Path(target).is_dir() else None
    config = _config(target, run, overrides or {})
    if out is not None and out.is_file():
        raise ConfigError(f"{out} is a file: --out names a folder")
    folder = out or run or Path("runs") / f"audit-{Path(target).stem}"
    audit = _perform(target, run, config, wanted, holdout, one_run_rounds, quick, folder)

    from common.files import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "audit.json", (json.dumps(audit.to_json(), indent=2) + "\n").encode())
    write_atomically(folder / "audit.md", audit.to_markdown().encode())
    console.print(_table(audit))
    console.print(f"all figures: {folder / 'audit.md'}, {folder / 'audit.json'}", highlight=False, soft_wrap=True)
    if not audit.passed:
        raise typer.Exit(1)


audit = with_run_options(_audit)


def _wanted(parts: str) -> list[str]:
    wanted = [part.strip() for part in parts.split(",") if part.strip()]
    unknown = [part for part in wanted if part not in PARTS]
    if unknown or not wanted:
        raise ConfigError(f"parts = {parts!r}: choose of {', '.join(PARTS)}")
    return wanted


def _config(target: str, run: Path | None, overrides: dict[str, Any]) -> "RunConfig":
    from common.privacy.planner import with_noise
    from common.privacy.units import PrivacyModel

    if run is None:
        config = with_noise(load_recipe(target, overrides))
    else:
        if overrides:
            raise ConfigError(f"{run} is a run and has its configuration: leave out --{', --'.join(sorted(overrides))}")
        from server.checkpoint import CheckpointStore

        config = CheckpointStore(run).load().config
    if config.privacy.privacy_model is PrivacyModel.NONE and run is None:
        raise ConfigError(
            f"{target} runs with privacy-model none, which promises nothing: audit a run of it by its folder"
        )
    return config


def _perform(
    target: str,
    run: Path | None,
    config: "RunConfig",
    wanted: list[str],
    holdout: str | None,
    one_run_rounds: int,
    quick: bool,
    folder: Path,
) -> "Audit":
    from common.privacy.planner import promise
    from common.privacy.units import PrivacyModel
    from simulations.audit.report import Audit

    audit = Audit(target if run is None else run.name, promise(config))
    private = config.privacy.privacy_model is not PrivacyModel.NONE
    logging.getLogger("visard.client").setLevel(logging.ERROR)  # refusals are part of what is asked
    for part in wanted:
        if part in ("ledgers", "membership") and run is None:
            audit.skipped[part] = "a recipe has not been run: audit the folder of a run"
        elif part in ("ledgers", "gate", "one-run") and not private:
            audit.skipped[part] = "the run promises no privacy"
        else:
            with console.status(f"{part} ..."), _scratch(folder) as scratch:
                _do(part, audit, run, config, holdout, one_run_rounds, quick, Path(scratch))
    return audit


def _scratch(folder: Path) -> "tempfile.TemporaryDirectory[str]":
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=".audit-", dir=folder)


def _do(
    part: str,
    audit: "Audit",
    run: Path | None,
    config: "RunConfig",
    holdout: str | None,
    one_run_rounds: int,
    quick: bool,
    scratch: Path,
) -> None:
    if part == "gate":
        from simulations.audit.gate import audit_gate
        from simulations.audit.stages import FULL, SHORT

        audit.gate = audit_gate(config, scratch, SHORT if quick else FULL)
    elif part == "one-run":
        from simulations.audit.one_run import audit_one_run

        try:
            audit.one_run = audit_one_run(config, None, scratch / "run", num_rounds=one_run_rounds)
        except DataError as error:
            audit.skipped[part] = str(error)
    elif part == "inversion":
        from simulations.audit.inversion import audit_inversion

        audit.inversion = audit_inversion(config)
    elif run is not None and part == "ledgers":
        from simulations.audit.ledgers import audit_ledgers

        audit.ledgers = audit_ledgers(run)
    elif run is not None:
        from simulations.audit.membership import audit_membership, load_holdout

        try:
            audit.membership = audit_membership(run, load_holdout(config, holdout))
        except VisardError as error:
            if holdout is not None:
                raise
            audit.skipped[part] = f"no non-members: give --holdout ({error})"


def _table(audit: "Audit") -> Table:
    from simulations.audit.report import WORDS

    table = Table(title=f"{audit.target}: {audit.promise}", title_justify="left", show_header=False)
    for line in audit.lines():
        table.add_row(line.part, f"[{_COLOURS[line.passed]}]{WORDS[line.passed]}[/]", line.told)
    for part, reason in audit.skipped.items():
        table.add_row(part, "not done", reason)
    return table
