"""`visard client start` and `status`: the node process. What is slow to import is imported when it is used."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from client.cli import PolicyOption, told
from common.telling import plain

if TYPE_CHECKING:
    from client.policy import OwnerPolicy

console = Console()

_POLICY = Path("owner.toml")
# What a message may have beside the discriminator: fakes of rounds with several steps.
_BESIDE_BYTES = 1 << 28


def start(
    policy: PolicyOption = _POLICY,
    device: Annotated[str, typer.Option(help="auto (cuda where there is one, else cpu), cpu, cuda or cuda:N")] = "auto",
) -> None:
    """Train with these faces for the coordinator that was joined, until stopped with Ctrl-C or SIGTERM.

    Runs only what is installed here, never code that a coordinator sends; reads only what is signed with the coordinator's key;
    and refuses every round that the policy does not allow. Waits for a coordinator that is not up, for ever. A policy that was
    edited takes effect at the next start.
    """
    with console.status("starting"):
        import logging

        from client.app import app
        from client.join import joined_kit, load_node_key, node_key_path
        from client.node import run_node
        from client.node_status import NodeStatus
        from client.policy import OwnerPolicy
        from client.policy_file import check_places
        from client.run_check import spent
        from common.device import pick_device, use_device
        from common.faces.loading import check_source
        from common.privacy.units import PrivacyModel

        owner = OwnerPolicy.from_file(policy)
        use_device(device)
        check_places(owner)
        # An error in a round comes after its charge, and the coordinator sees that there was one.
        check_source(owner.source)
        before = spent(owner)
        kit = joined_kit(owner, policy)
        key = load_node_key(node_key_path(owner.state_dir))
        status = NodeStatus(owner.state_dir, kit.address)
    console.print(told(owner), highlight=False, markup=False, soft_wrap=True)
    console.print(f"epsilon {before.epsilon:.4g} of it is spent; computing on {pick_device()}", highlight=False)
    console.print(f"node {kit.name} of the coordinator at {kit.address}", highlight=False, soft_wrap=True)
    if PrivacyModel.NONE in owner.allowed_privacy_models:
        console.print("[bold white on red] NO PRIVACY [/] runs without any protection are answered", highlight=False)
    logging.getLogger("visard.client").addHandler(status)
    run_node(kit, key, app, owner.to_flat(), status, 4 * owner.max_parameters + _BESIDE_BYTES)
    console.print("stopped", highlight=False)


def status(
    policy: PolicyOption = _POLICY,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs")] = False,
) -> None:
    """What the node of this policy does: its connection, the last round, the budget left, and what it refused.

    Ends with status 1 where no node runs or it is not connected. What it prints is for the owner alone.
    """
    from client.node_status import read_status
    from client.policy import OwnerPolicy
    from client.run_check import spent

    owner = OwnerPolicy.from_file(policy)
    found = read_status(owner.state_dir)
    budget = spent(owner)
    told_by_node = found or {"alive": False, "connection": "no node was started with this policy"}
    if not told_by_node["alive"] and found:
        told_by_node["connection"] = f"not running (it was: {found['connection']})"
    left = max(owner.max_epsilon - budget.epsilon, 0.0)
    if as_json:
        import json

        console.print_json(
            json.dumps(told_by_node | {"epsilon_spent": budget.epsilon, "epsilon_left": left}), ensure_ascii=True
        )
    else:
        _show(told_by_node, owner, budget.epsilon, left)
    if not told_by_node["alive"] or told_by_node["connection"] != "connected":
        sys.exit(1)


def _show(found: dict[str, Any], owner: "OwnerPolicy", spent: float, left: float) -> None:
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    since = f", since {found['since']}" if "since" in found else ""
    table.add_row("connection", plain(f"{found['connection']}{since}"))
    if "coordinator" in found:
        table.add_row("coordinator", plain(found["coordinator"]))
        table.add_row("run", plain(f"{found['run'] or 'none yet'}, round {found['round']}"))
        table.add_row("last asked", plain(found["last_asked"] or "never"))
        table.add_row("since its start", f"{found['answers']} answers, {found['refusals']} refusals")
    table.add_row(
        "budget", f"epsilon {left:.4g} left of {owner.max_epsilon:g} ({spent:.4g} spent, delta {owner.delta:g})"
    )
    for when, problem in found.get("problems", []):
        table.add_row(plain(when), plain(problem))
    console.print(table, highlight=False, markup=False)
