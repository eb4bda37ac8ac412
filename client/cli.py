"""`visard client start`: one owner's node. What is slow to import is imported when it is used."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.errors import ConfigError, DataError
from common.privacy.units import PrivacyUnit

console = Console()


def start(
    data: Annotated[str, typer.Option(help="The owner's faces: a folder or an .npz file; they never leave it")],
    coordinator: Annotated[str, typer.Option(help="HOST:PORT of the coordinator, loopback only")] = "127.0.0.1:9092",
    max_epsilon: Annotated[
        float, typer.Option(min=0, help="Budget of these faces over all runs and coordinators, ever")
    ] = 10.0,
    delta: Annotated[float, typer.Option(help="Delta of that budget")] = 1e-5,
    unit: Annotated[PrivacyUnit, typer.Option(help="The least that must be protected")] = PrivacyUnit.PERSON,
    crop: Annotated[float, typer.Option(help="Share of the shorter side that the centre crop keeps")] = 1.0,
    allow_central: Annotated[
        bool, typer.Option("--allow-central", help="Trust the coordinator with clear gradient sums; it adds the noise")
    ] = False,
    allow_non_private: Annotated[
        bool, typer.Option("--allow-non-private", help="NO PRIVACY: answer runs without any protection")
    ] = False,
    state_dir: Annotated[
        Path | None, typer.Option(help="Folder of the privacy ledger [beside the data, with .visard added]")
    ] = None,
) -> None:
    """Train with these faces for a coordinator, until stopped with Ctrl-C.

    Runs only what is installed here, never code that a coordinator sends, and refuses every round that the options above do not allow.
    Waits for a coordinator that is not up yet.

    TLS, node keys and supervision are a later addition: until then the coordinator must be on this machine.
    """
    policy = owner_config(data, max_epsilon, delta, unit, crop, allow_central, allow_non_private, state_dir)
    with console.status("starting"):
        from flwr.app import Context, RecordDict

        from client.app import app
        from client.node import run_node
        from client.policy import OwnerPolicy

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
    data: str,
    max_epsilon: float,
    delta: float,
    unit: PrivacyUnit,
    crop: float,
    allow_central: bool,
    allow_non_private: bool,
    state_dir: Path | None,
) -> dict[str, str | float | bool]:
    """The node's configuration, with absolute paths.

    Raises DataError where the faces are not there, ConfigError where there is no place for the ledger.
    """
    if data.startswith("procedural:"):
        if state_dir is None:
            raise ConfigError(f"{data} lies nowhere, so the ledger cannot lie beside it: give --state-dir")
    else:
        path = Path(data).expanduser().resolve()
        if not path.exists():
            raise DataError(f"there are no faces at {path}: --data is a folder or an .npz file")
        data = str(path)
        # Named after the data and not after a run: it is one budget for these faces, whoever asks.
        state_dir = state_dir or path.with_name(path.name + ".visard")
    return {
        "data": data,
        "state-dir": str(state_dir.expanduser().resolve()),
        "max-epsilon": max_epsilon,
        "delta": delta,
        "unit": str(unit),
        "crop": crop,
        "allow-central": allow_central,
        "allow-non-private": allow_non_private,
    }
