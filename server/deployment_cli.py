"""`visard coordinator init`, `invite` and `nodes`: a coordinator's folder and who may connect. Slow imports wait for their use."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.config import RunConfig
from common.errors import ConfigError
from common.fields import Scalar, require
from common.files import write_atomically
from common.kit import Kit, NodeRequest, grouped, split_address
from common.options import with_run_options
from server.deployment import SETTINGS, Deployment, create
from server.registry import Registry

console = Console()

LoadRecipe = Callable[[str, Mapping[str, Scalar]], RunConfig]
FolderArgument = Annotated[Path, typer.Argument(metavar="[DIR]", help="The coordinator's folder")]
_FOLDER = Path("coordinator")
_TLS_PANEL = "A certificate of your own"


def init_command(load_recipe: LoadRecipe) -> Callable[..., None]:
    """`visard coordinator init`. `load_recipe` turns a recipe's name or path, and the options given, into a configuration."""

    def init(
        folder: FolderArgument = _FOLDER,
        *,
        address: Annotated[
            str, typer.Option(help="HOST:PORT that nodes dial: this machine's name or address as they reach it")
        ],
        listen: Annotated[
            str | None,
            typer.Option(help="HOST:PORT to listen on", show_default="all addresses, or loopback where nodes dial it"),
        ] = None,
        name_in_certificate: Annotated[
            list[str] | None,
            typer.Option(help="Further DNS name or IP address by which nodes may dial; may be repeated"),
        ] = None,
        recipe: Annotated[str, typer.Option(help="The run: name of a recipe, or a path to a .toml")] = "demo",
        name: Annotated[str | None, typer.Option(help="Name of the run's folder", show_default="the recipe's")] = None,
        certificate: Annotated[
            Path | None, typer.Option(help="PEM, with what stands between it and --ca", rich_help_panel=_TLS_PANEL)
        ] = None,
        key: Annotated[Path | None, typer.Option(help="Its secret key", rich_help_panel=_TLS_PANEL)] = None,
        ca: Annotated[Path | None, typer.Option(help="The authority's certificate", rich_help_panel=_TLS_PANEL)] = None,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        """Make a coordinator's folder: settings to edit, a signing key, and TLS under an authority of its own.

        A given certificate stays where it is, and is read from there at each start; it needs --certificate, --key and --ca.
        """
        given = {"certificate": certificate, "key": key, "ca": ca}
        tls: dict[str, Any] = {name: path.expanduser().resolve() for name, path in given.items() if path is not None}
        require(
            len(tls) in (0, 3),
            f"of --certificate, --key and --ca only --{', --'.join(tls)}: give all three, or none for an authority of its own",
        )
        require(
            not tls or not name_in_certificate,
            "--name-in-certificate with --certificate: a given certificate has its names already; leave the option out",
        )
        run = dict(overrides or {})
        config = load_recipe(recipe, run)
        for place in ("reference", "public"):
            if place in run and Path(str(run[place])).expanduser().exists():
                run[place] = str(Path(str(run[place])).expanduser().resolve())
        deployment = Deployment(
            folder=folder,
            address=address,
            listen=listen or _listen_for(address),
            names=tuple(name_in_certificate or ()),
            recipe=str(Path(recipe).expanduser().resolve()) if recipe.endswith(".toml") else recipe,
            name=Path(recipe).stem if name is None else name,
            run=run,
            **tls,
        )
        create(deployment)
        made = Deployment.load(folder)
        training, privacy = config.training, config.privacy
        lines = [
            f"{folder / SETTINGS} is written: read and edit it",
            f"run {made.name}: recipe {recipe}, privacy-model {privacy.privacy_model}, from {training.min_clients} nodes on",
            f"it listens on {made.listen}; nodes dial {made.address}",
            "this coordinator's fingerprint, to compare with each owner by telephone:",
            f"  {grouped(made.kit('any').fingerprint)}",
            "next, for each node, then to begin:",
            f"  visard coordinator invite NAME {folder}",
            f"  visard coordinator nodes {folder} --approve NAME.request.toml",
            f"  visard coordinator start {folder}",
        ]
        _tell(*lines)

    return with_run_options(init, ("model", "privacy", "augmentation", "moments", "training"))


def invite(
    name: Annotated[str, typer.Argument(help="What to call the node: a-z, 0-9, '-' and '.'")],
    folder: FolderArgument = _FOLDER,
    out: Annotated[Path | None, typer.Option(help="The kit to write", show_default="NAME.kit.toml")] = None,
) -> None:
    """Write the kit of one node, to send to its owner. Nothing in it is secret."""
    deployment = Deployment.load(folder)
    kit = deployment.kit(name)
    out = Path(f"{name}.kit.toml") if out is None else out
    if out.exists():
        former = _kit_or_none(out)
        require(
            former is not None and (former.name, former.fingerprint) == (kit.name, kit.fingerprint),
            f"{out} is there and is no kit of {name!r} for this coordinator: move it away, or name another with --out",
        )
    kit.write(out)
    _tell(
        f"{out} is written: send it to the owner, who joins with",
        f"  visard client join {out.name} --policy owner.toml",
        "and sends a request back. This coordinator's fingerprint, to compare by telephone:",
        f"  {grouped(kit.fingerprint)}",
    )


def nodes(
    folder: FolderArgument = _FOLDER,
    approve: Annotated[
        list[Path] | None, typer.Option(help="Let in the node of this request; may be repeated", metavar="FILE")
    ] = None,
    fingerprint: Annotated[
        list[str] | None,
        typer.Option(
            help="What the owner read by telephone, instead of a question; one for each --approve, in their order",
            metavar="HEX",
        ),
    ] = None,
    revoke: Annotated[
        list[str] | None, typer.Option(help="Let this node in no more; may be repeated", metavar="NAME")
    ] = None,
    peers: Annotated[
        Path | None, typer.Option(help="Write the nodes' public peer keys, for `visard client peers`", metavar="FILE")
    ] = None,
) -> None:
    """List the nodes that may connect; let nodes in, and take their leave again. What changes holds at once, also in a run.

    Before a node is let in, its request's fingerprint is compared with its owner by telephone: `visard client fingerprint` prints
    it there. A key that was revoked is never let in again.
    """
    require(
        peers is None or not (approve or revoke),
        "--peers writes the nodes that are approved already: give it alone, after --approve and --revoke",
    )
    deployment = Deployment.load(folder)
    registry = Registry(deployment.registry_path)
    kit = deployment.kit("any")
    requests = [(path, NodeRequest.from_file(path)) for path in approve or []]
    for path, request in requests:
        require(
            request.coordinator == kit.fingerprint,
            f"{path} is a request to the coordinator {grouped(request.coordinator)}, and this is {grouped(kit.fingerprint)}: send its "
            "owner the kit that `visard coordinator invite` makes here",
        )
    _compare(requests, fingerprint or [])
    registry.change(revoke or [], [request for _, request in requests])
    for name in revoke or []:
        _tell(f"{name} is revoked")
    for _, request in requests:
        _tell(f"{request.name} is let in")
    _list(registry, folder)
    if peers is not None:
        keys = registry.peer_keys()
        require(len(keys) >= 2, f"{len(keys)} approved nodes have no peers: approve two or more before --peers")
        write_atomically(peers, "".join(f"{key.hex()}\n" for key in keys).encode())
        _tell(f"{peers} is written: each owner pins it with `visard client peers {peers.name} --pin`")


def _compare(requests: Sequence[tuple[Path, NodeRequest]], read_out: Sequence[str]) -> None:
    """Raise ConfigError unless each request's fingerprint is the one that its owner read out, as given or asked for here."""
    require(
        len(read_out) in (0, len(requests)),
        f"{len(read_out)} of --fingerprint and {len(requests)} of --approve: give one for each, in the same order",
    )
    require(
        bool(read_out) or not requests or sys.stdin.isatty(),
        "nobody is here to say whether the fingerprint is the one that the node's owner reads out: ask the owner, for whom `visard "
        "client fingerprint` prints it, and give it with --fingerprint HEX, or run this in a terminal",
    )
    for given in read_out:
        require(
            re.fullmatch("[0-9a-f]{64}", _digits(given)) is not None,
            f"--fingerprint {given!r}: a fingerprint has 64 hex digits, here with or without blanks",
        )
    changed = (
        "nobody is let in and nothing is changed. If it was read rightly, the file is another's or was changed on its way: ask the "
        "owner for the request again, by another way"
    )
    for number, (path, request) in enumerate(requests):
        _tell(
            f"{path}: {request.name} asks to be let in. The fingerprint of its request:",
            f"  {grouped(request.fingerprint)}",
        )
        if read_out:
            same = _digits(read_out[number]) == request.fingerprint
        else:
            same = typer.confirm("did its owner read you the same by telephone?", default=False)
        require(same, f"the fingerprint of {path} is not the one that the owner of {request.name} read: {changed}")


def _digits(fingerprint: str) -> str:
    return "".join(fingerprint.split()).lower()


def _list(registry: Registry, folder: Path) -> None:
    known = registry.nodes()
    if not known:
        _tell(f"no node may connect yet: visard coordinator invite NAME {folder}")
        return
    table = Table(box=None)
    for title in ("node", "id", "approved", "revoked"):
        table.add_column(title, overflow="fold")
    for node in known:
        table.add_row(
            escape(node.name), f"{node.node_id:016x}", node.approved, node.revoked, style="dim" if node.revoked else ""
        )
    console.print(table, highlight=False)
    approved = registry.peer_keys()
    if len(approved) >= 2:
        _tell(f"fingerprint of the {len(approved)} approved nodes' peer keys:", f"  {registry.peer_fingerprint()}")


def _listen_for(address: str) -> str:
    """Where to listen when nodes dial `address`: on loopback for loopback, else on all addresses of its kind."""
    host, port = split_address(address, dialled=True)
    if host in ("localhost", "127.0.0.1"):
        return f"127.0.0.1:{port}"
    if host == "::1":
        return f"[::1]:{port}"
    return f"[::]:{port}" if ":" in host else f"0.0.0.0:{port}"


def _kit_or_none(path: Path) -> Kit | None:
    try:
        return Kit.from_file(path)
    except ConfigError:
        return None


def _tell(*lines: str) -> None:
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
