"""`visard client init`, `check` and `peers`: what one owner decides. What is slow to import is imported when it is used."""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.config import RunConfig
from common.errors import ConfigError
from common.fields import Scalar, key_of
from common.options import with_run_options
from common.sections import FaceSource

if TYPE_CHECKING:
    from client.policy import OwnerPolicy
    from client.run_check import RunFindings

console = Console()

LoadRecipe = Callable[[str, Mapping[str, Scalar]], RunConfig]
PolicyOption = Annotated[Path, typer.Option(help="The owner's policy, as `visard client init` writes it")]
_POLICY = Path("owner.toml")
# What a new policy says where the owner gives nothing.
_MAX_EPSILON = 10.0


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
def init(
    data: Annotated[
        str,
        typer.Option(help="The owner's faces, which never leave: a folder, an .npz file, or a source such as hf:PATH"),
    ] = "faces",
    out: Annotated[Path, typer.Option(help="The file to write; one that is there is not overwritten")] = _POLICY,
    *,
    reading: dict[str, Any],
) -> None:
    """Write a policy with every key, its meaning and its default, for the owner to edit."""
    from client.policy import OwnerPolicy
    from client.policy_file import check_places, ledger_beside, write_policy_file
    from client.secret_store import PEER_KEY, load_peer_key, make_peer_key
    from common.faces.folders import BY_NAME
    from common.faces.loading import SCHEMES
    from common.privacy.ledger import Ledger

    source = FaceSource(data=data, **reading)
    check_places(source)
    given = {key_of(f.name): getattr(source, f.name) for f in fields(FaceSource)}
    if data.partition(":")[0] not in SCHEMES:
        given["data"] = str(Path(data).expanduser().resolve())
    if source.attributes not in ("", BY_NAME):
        given["attributes"] = str(Path(source.attributes).expanduser().resolve())
    place = ledger_beside(data, out)
    if out.exists():
        raise ConfigError(f"{out} is there already and is not overwritten: edit it, or name another with --out")
    # The ledger is made here and nowhere else: a node that does not find it answers nothing.
    made = Ledger(Path(place), max_epsilon=_MAX_EPSILON, delta=OwnerPolicy.delta)
    given |= {"state-dir": place, "max-epsilon": _MAX_EPSILON, "ledger": made.public_key}
    key = Path(place) / PEER_KEY
    peer = load_peer_key(key) if key.exists() else make_peer_key(key)
    keys: dict[str, tuple[Any, Any, str]] = {}
    for f in fields(OwnerPolicy):
        default = None if f.default is MISSING else f.default
        keys[key_of(f.name)] = (given.get(key_of(f.name), default), default, f.metadata["help"])
    write_policy_file(out, keys)
    policy = OwnerPolicy.from_file(out)
    console.print(told(policy), highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{out} is written: read and edit it, then\n  visard client check --policy {out} RECIPE   # what a run would cost\n"
        f"  visard client start --policy {out}\n"
        f"this client's public peer key, for the other owners of a distributed run (see `visard client peers --help`):\n"
        f"  {peer.public_key().public_bytes_raw().hex()}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def peers(
    keys: Annotated[
        Path, typer.Argument(help="Text file of all clients' public peer keys, one a line, this one's among them")
    ],
    policy: PolicyOption = _POLICY,
    pin: Annotated[bool, typer.Option("--pin", help="Write the fingerprint into the policy")] = False,
) -> None:
    """Tell the fingerprint of the clients that may form a secure sum. Owners compare it by another way than the coordinator.

    A coordinator that could choose the clients would invent some, and take the noise off. So each owner gets the keys from the
    other owners, compares the fingerprint with them (by telephone, say), and pins it.
    """
    from client.policy import OwnerPolicy
    from client.policy_file import set_key
    from client.secret_store import PEER_KEY, load_peer_key
    from common.privacy.masks import fingerprint

    owner = OwnerPolicy.from_file(policy)
    own = load_peer_key(owner.state_dir / PEER_KEY).public_key().public_bytes_raw()
    found = read_peer_keys(keys)
    if own not in found:
        raise ConfigError(f"{keys} does not have this client's own peer key, {own.hex()}: add it")
    console.print(f"{len(found)} peers: {fingerprint(found)}", highlight=False, soft_wrap=True)
    if pin:
        set_key(policy, "peers", fingerprint(found))
        console.print(f"pinned in {policy}; it takes effect at the next start", highlight=False, soft_wrap=True)


def read_peer_keys(path: Path) -> list[bytes]:
    """Public peer keys, 64 hex digits a line. Raises ConfigError for anything else, and for a key that is there twice."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        keys = [bytes.fromhex(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read peer keys from {path}: {error}; one key of 64 hex digits a line") from error
    if len(keys) < 2 or any(len(key) != 32 for key in keys) or len(set(keys)) < len(keys):
        raise ConfigError(f"{path} has {len(keys)} lines: two different keys of 64 hex digits or more, one a line")
    return keys


def check_command(load_recipe: LoadRecipe) -> Callable[..., None]:
    """`visard client check`. `load_recipe` turns a recipe's name or path, and the options given, into a configuration."""

    def check(
        recipe: Annotated[str, typer.Argument(help="The run: name of a recipe, or a path to a .toml")] = "demo",
        policy: PolicyOption = _POLICY,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        """What a run would cost these faces, and what of it the policy would refuse. Give the run's own options.

        Nothing is sent or charged. What is printed is exact and for the owner alone. Ends with status 1 where the run would be refused.
        """
        config = load_recipe(recipe, overrides or {})
        with console.status("reading the faces"):
            from client.policy import OwnerPolicy
            from client.run_check import check_run
            from common.faces import read_faces
            from common.privacy.planner import with_noise

            owner = OwnerPolicy.from_file(policy)
            config = with_noise(config)
            reading = read_faces(owner.source, config.model.image_size, config.model.channels)
            reading.warn(owner.data)
            found = check_run(config, owner, reading.faces)
        _show(found, config, owner)
        if found.refused:
            sys.exit(1)

    return with_run_options(check, ("model", "privacy", "augmentation", "moments", "training"))


def told(owner: "OwnerPolicy") -> str:
    """What an owner allows, in a line."""
    return (
        f"{owner.data}: at most epsilon {owner.max_epsilon:g} (delta {owner.delta:g}) for each {owner.unit}, ledger in "
        f"{owner.state_dir}"
    )


def _show(found: "RunFindings", config: RunConfig, owner: "OwnerPolicy") -> None:
    from common.privacy.planner import noise_told

    privacy = config.privacy
    held = "no" if found.units is None else f"{found.units:,}"
    lines = [
        f"{owner.data}: {held} units ({privacy.unit}), {found.images:,} images; the run declares {found.declared:,.0f} units a client",
        f"ledger: epsilon {found.spent:.4g} spent in {found.releases:,} releases, {max(owner.max_epsilon - found.spent, 0):.4g} left of "
        f"{owner.max_epsilon:g} (delta {owner.delta:g})",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if privacy.privacy_model == "none":
        console.print("[bold white on red] NO PRIVACY [/] this run has no epsilon", highlight=False)
    else:
        bounded = owner.max_epsilon > 0 and found.after < float("inf")
        share = (found.after - found.spent) / owner.max_epsilon if bounded else float("inf")
        console.print(
            f"this run ({privacy.privacy_model}, {noise_told(config)}): epsilon {found.after:.4g} in all when it is over, "
            f"{share:.0%} of the budget by RDP",
            highlight=False,
            soft_wrap=True,
        )
    if not found.refused:
        console.print("[green]nothing would be refused[/]", highlight=False)
        return
    table = Table(title="would be refused", style="red", title_style="bold red")
    for name in ("key", "asked", "limit", "remedy"):
        table.add_column(name, overflow="fold")
    for refusal in found.refused:
        table.add_row(*map(escape, (refusal.key, refusal.value, refusal.limit, refusal.remedy)), style="red")
    console.print(table)
