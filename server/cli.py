"""`visard coordinator start|status|stop`, and the worker that `start` runs. What is slow to import is imported when used."""

import json
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.errors import VisardError
from common.telling import tell_error
from server.status import STALE_S, age_s, read_status
from server.supervisor import REFUSED, Signals, holder, supervise
from server.supervisor import stop as stop_supervisor

if TYPE_CHECKING:
    from server.worker import LoadRecipe

console = Console()

_FOLDER = Annotated[
    Path, typer.Argument(metavar="DIR", help="The coordinator's folder, as `visard coordinator init` made it")
]
_DEFAULT = Path("coordinator")


def start(folder: _FOLDER = _DEFAULT) -> None:
    """Train with the nodes that connect: a fresh run, or on with the interrupted one.

    Starts each round with the nodes that are connected then, once there are enough. A process that dies is started anew.
    Ctrl-C, SIGTERM and SIGHUP stop it in order; the same command goes on.
    """
    with Signals() as signals:
        from server.deployment import Deployment

        deployment = Deployment.load(folder)
        status = supervise(
            # -P: what lies in the folder it is started from is none of its modules. faulthandler: a crash in C says where.
            [
                sys.executable,
                "-P",
                "-X",
                "faulthandler",
                "-m",
                "visard",
                "coordinator",
                "worker",
                str(deployment.folder),
            ],
            signals,
            lock_path=deployment.lock_path,
            status_path=deployment.status_path,
            log_path=deployment.log_path,
            go_on=_start_command(folder),
        )
    sys.exit(status)


def worker_command(load_recipe: "LoadRecipe") -> Callable[..., None]:
    """The command that `start` runs. `load_recipe` turns a recipe's name or path, and options, into a configuration."""

    def worker(folder: Path, supervisor: Annotated[int, typer.Option()]) -> None:
        """Train; started by `visard coordinator start` and by nobody else."""
        from server.worker import main

        try:
            main(folder, supervisor, load_recipe)
        except VisardError as error:
            tell_error(error)
            sys.exit(REFUSED)
        except Exception:
            traceback.print_exc()
            sys.exit(1)

    return worker


def status(
    folder: _FOLDER = _DEFAULT,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else")] = False,
) -> None:
    """Tell what the coordinator is doing. Ends with status 0 where it runs or its run is complete, 1 otherwise."""
    from server.deployment import Deployment

    deployment = Deployment.load(folder)
    found = observed(deployment.lock_path, deployment.status_path)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        console.print(_table(found))
        if not found["running"] and found["state"] != "complete":
            console.print(f"go on with: {_start_command(folder)}", highlight=False, markup=False, soft_wrap=True)
    sys.exit(int(found["stale"] or not (found["running"] or found["state"] == "complete")))


def stop(
    folder: _FOLDER = _DEFAULT,
    timeout_s: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for its end")] = 60.0,
) -> None:
    """Stop the coordinator in order, and wait for its end. Nothing is lost: `visard coordinator start` goes on."""
    from server.deployment import Deployment

    ran = stop_supervisor(Deployment.load(folder).lock_path, timeout_s)
    told = f"stopped. Go on with: {_start_command(folder)}" if ran else f"no coordinator runs in {folder}"
    console.print(told, highlight=False, markup=False, soft_wrap=True)


def observed(lock_path: Path, status_path: Path) -> dict[str, Any]:
    """What the status file says, and whether it can be believed: `running`, and `stale` where who runs does not write.

    Where nobody runs, the state is never one of a running coordinator.
    """
    pid, found = holder(lock_path), read_status(status_path)
    age = age_s(found)
    found = {"state": "never started", "message": "", **found, "running": pid is not None, "stale": False}
    if pid is None and "connected" in found:
        found["connected"] = []
    if pid is not None and age > STALE_S:
        since = f"{age:.0f} s" if found.get("updated") else "its start"
        found |= {"stale": True, "message": f"process {pid} runs, but has told nothing since {since}"}
    if pid is None and found["state"] not in ("never started", "complete", "stopped", "failed"):
        found |= {"message": f"nobody runs it; it was ended without notice ({found['state']})", "state": "stopped"}
    return found


def _table(found: dict[str, Any]) -> Table:
    table = Table(show_header=False, title=escape(str(found.get("run", "coordinator"))), title_justify="left")
    table.add_row("state", f"[bold]{found['state']}[/]" + (" [red](stale)[/]" if found["stale"] else ""))
    rows = {"": found["message"], "promise": found.get("promise"), "nodes dial": found.get("address")}
    if "round" in found:
        rows["round"] = f"{found['round']} of {found['last_round']} done, stage {found['stage']}"
        rows["generator steps"] = found["generator_steps"]
        rows["time"] = f"{found['seconds'] / 60:.1f} min"
        rows["refused last round"] = ", ".join(f"{count} x {kind}" for kind, count in found["refusals"].items())
    if "approved" in found:
        names = ": " + ", ".join(found["connected"]) if found["connected"] else ""
        rows["connected"] = f"{len(found['connected'])} of {found['approved']} approved nodes{names}"
    if found["running"]:
        rows["processes"] = ", ".join(f"{name} {pid}" for name, pid in found.get("pids", {}).items())
    rows |= {
        "started anew": found.get("restarts") or None,
        "since": found.get("started"),
        "as of": found.get("updated"),
    }
    for name, value in rows.items():
        if value not in (None, ""):
            table.add_row(name, escape(str(value)))
    return table


def _start_command(folder: Path) -> str:
    return shlex.join(["visard", "coordinator", "start", *([] if folder == _DEFAULT else [str(folder)])])
