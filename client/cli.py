"""`visard client start`: one owner's node. What is slow to import is imported when it is used."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from common.errors import ConfigError, DataError
from common.fields import key_of
from common.privacy.units import PrivacyUnit
from common.sections import FaceSource

console = Console()


def with_source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` an option for each field of FaceSource but `data`; its parameter `reading` gets them, name -> value."""
    hints = get_type_hints(FaceSource)
    added = {f.name: f for f in fields(FaceSource) if f.name != "data"}

    @wraps(command)
    def wrapper(**given: Any) -> None:
        reading = {name: given.pop(name) for name in added}
        command(**given, reading=reading)

    own = [p for p in inspect.signature(command).parameters.values() if p.name != "reading"]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=f.default,
            annotation=Annotated[
                hints[name], typer.Option(help=f.metadata["help"], rich_help_panel="Reading the faces")
            ],
        )
        for name, f in added.items()
    ]
    parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *options]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


@with_source_options
def start(
    data: Annotated[
        str,
        typer.Option(help="The owner's faces, which never leave: a folder, an .npz file, or a source such as hf:PATH"),
    ],
    coordinator: Annotated[str, typer.Option(help="HOST:PORT of the coordinator, loopback only")] = "127.0.0.1:9092",
    max_epsilon: Annotated[
        float, typer.Option(min=0, help="Budget of these faces over all runs and coordinators, ever")
    ] = 10.0,
    delta: Annotated[float, typer.Option(help="Delta of that budget")] = 1e-5,
    unit: Annotated[PrivacyUnit, typer.Option(help="The least that must be protected")] = PrivacyUnit.PERSON,
    allow_central: Annotated[
        bool, typer.Option("--allow-central", help="Trust the coordinator with clear gradient sums; it adds the noise")
    ] = False,
    allow_non_private: Annotated[
        bool, typer.Option("--allow-non-private", help="NO PRIVACY: answer runs without any protection")
    ] = False,
    state_dir: Annotated[
        Path | None, typer.Option(help="Folder of the privacy ledger; unless given beside the data, with .visard added")
    ] = None,
    *,
    reading: dict[str, Any],
) -> None:
    """Train with these faces for a coordinator, until stopped with Ctrl-C.

    Runs only what is installed here, never code that a coordinator sends, and refuses every round that the options above do not allow.
    Waits for a coordinator that is not up yet.

    TLS, node keys and supervision are a later addition: until then the coordinator must be on this machine.
    """
    with console.status("starting"):
        from flwr.app import Context, RecordDict

        from client.app import app
        from client.node import run_node
        from client.policy import OwnerPolicy

        policy = owner_config(
            FaceSource(data=data, **reading), max_epsilon, delta, unit, allow_central, allow_non_private, state_dir
        )
        OwnerPolicy.from_context(Context(0, 0, dict(policy), RecordDict(), {}))
    console.print(
        f"{data}: at most epsilon {max_epsilon:g} (delta {delta:g}) for each {unit}, ledger in {policy['state-dir']}",
        highlight=False,
        soft_wrap=True,
    )
    if allow_non_private:
        console.print("[bold white on red] NO PRIVACY [/] runs without any protection are answered", highlight=False)
    run_node(coordinator, app, policy)
    console.print("stopped", highlight=False)


def owner_config(
    source: FaceSource,
    max_epsilon: float,
    delta: float,
    unit: PrivacyUnit,
    allow_central: bool,
    allow_non_private: bool,
    state_dir: Path | None,
) -> dict[str, str | float | bool]:
    """The node's configuration, with absolute paths.

    Raises DataError where the faces are not there, ConfigError where there is no place for the ledger.
    """
    from common.faces.folders import BY_NAME
    from common.faces.loading import SCHEMES

    config = {key_of(f.name): getattr(source, f.name) for f in fields(FaceSource)}
    if source.data.partition(":")[0] in SCHEMES:
        if state_dir is None:
            raise ConfigError(f"{source.data} is no path, so the ledger cannot lie beside it: give --state-dir")
    else:
        path = Path(source.data).expanduser().resolve()
        if not path.exists():
            raise DataError(
                f"there are no faces at {path}: --data is a folder, an .npz file, or begins with {', '.join(f'{s}:' for s in SCHEMES)}"
            )
        config["data"] = str(path)
        # Named after the data and not after a run: it is one budget for these faces, whoever asks.
        state_dir = state_dir or path.with_name(path.name + ".visard")
    if source.attributes and source.attributes != BY_NAME:
        table = Path(source.attributes).expanduser().resolve()
        if not table.is_file():
            raise DataError(f"there is no CSV at {table}: --attributes is one, or {BY_NAME}")
        config["attributes"] = str(table)
    return {
        **config,
        "state-dir": str(state_dir.expanduser().resolve()),
        "max-epsilon": max_epsilon,
        "delta": delta,
        "unit": str(unit),
        "allow-central": allow_central,
        "allow-non-private": allow_non_private,
    }
