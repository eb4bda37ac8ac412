"""`visard client join` and `fingerprint`: what an owner does with the kit that the coordinator sent. Slow imports wait for use."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from cryptography.hazmat.primitives.asymmetric import ec
from rich.console import Console

from client.cli import PolicyOption
from common.errors import ConfigError, VisardError
from common.keys import load_key, write_key
from common.kit import Kit, NodeRequest, grouped, public_key_pem

if TYPE_CHECKING:
    from client.policy import OwnerPolicy

console = Console()

_POLICY = Path("owner.toml")


def join(
    kit: Annotated[
        Path, typer.Argument(help="The kit that the coordinator sent, which `visard coordinator invite` makes")
    ],
    policy: PolicyOption = _POLICY,
    out: Annotated[
        Path | None, typer.Option(help="The request to write", show_default="NAME.request.toml, NAME as in the kit")
    ] = None,
) -> None:
    """Ask a coordinator to be let in: make this node's key, write the request to send, and name the kit in the policy.

    Then compare both fingerprints by another way than the files went, by telephone for instance: whoever could change the kit on
    its way could be your coordinator. Joining again writes the same request; another coordinator's kit replaces the former.
    """
    with console.status("joining"):
        from client.policy import OwnerPolicy
        from client.policy_file import set_key

        owner = OwnerPolicy.from_file(policy)
    invited = Kit.from_file(kit)
    peer_key = _public_peer_key(owner)
    path = node_key_path(owner.state_dir)
    key = load_node_key(path) if path.exists() else make_node_key(path)
    request = NodeRequest.create(invited, key, peer_key)
    out = Path(f"{invited.name}.request.toml") if out is None else out
    known = _written_before(out, key)
    same = known is not None and known.fingerprint == request.fingerprint
    former = _former(owner.coordinator, kit)
    if not former and known is not None and known.coordinator != invited.fingerprint:
        former = f"the former coordinator ({grouped(known.coordinator)}) is replaced"
    set_key(policy, "coordinator", _beside(kit, policy))
    if not same:
        request.write(out)
    lines = [
        *([former] if former else []),
        f"this node is {invited.name} of the coordinator at {invited.address}; {policy} names its kit, {kit}",
        "the coordinator's fingerprint, to compare with its operators by telephone:",
        f"  {grouped(invited.fingerprint)}",
        f"{out} is {'as it was' if same else 'written'}: send it to "
        "the coordinator. Its fingerprint, to read to them by telephone:",
        f"  {grouped(request.fingerprint)}",
        f"once it has let you in:\n  visard client start --policy {policy}",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def fingerprint(policy: PolicyOption = _POLICY) -> None:
    """Print the fingerprint of this node's request, for its owner to read to the coordinator's operators by telephone.

    It follows from the keys on this machine and the kit that was joined with, and not from a file that was sent.
    """
    from client.policy import OwnerPolicy

    owner = OwnerPolicy.from_file(policy)
    kit, key = joined_kit(owner, policy), load_node_key(node_key_path(owner.state_dir))
    request = NodeRequest.create(kit, key, _public_peer_key(owner))
    console.print(grouped(request.fingerprint), highlight=False, soft_wrap=True)


def joined_kit(owner: "OwnerPolicy", policy: Path) -> Kit:
    """The kit that the policy names. Raises ConfigError where it names none, and where the file is missing or damaged."""
    if not owner.coordinator:
        raise ConfigError(
            f"{policy} names no coordinator: get an invitation from its operators, then `visard client join KIT --policy {policy}`"
        )
    return Kit.from_file(Path(owner.coordinator))


def node_key_path(state_dir: Path) -> Path:
    """Where a node keeps the secret key by which coordinators know it."""
    return state_dir / "node.key"


def make_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A new key in `path`, for its owner alone (0600). Raises OSError."""
    key = ec.generate_private_key(ec.SECP256R1())
    write_key(path, key)
    return key


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a node's key. Raises ConfigError where there is none, it is of another kind, or others may read it."""
    if not path.exists():
        raise ConfigError(
            f"there is no node key {path}: `visard client join KIT` makes it, with the kit that the coordinator sent"
        )
    key = load_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"{path} is no P-256 key: restore it, or move it away and join anew, which makes another")
    return key


def _public_peer_key(owner: "OwnerPolicy") -> str:
    from client.secret_store import PEER_KEY, load_peer_key

    return load_peer_key(owner.state_dir / PEER_KEY).public_key().public_bytes_raw().hex()


def _written_before(out: Path, key: ec.EllipticCurvePrivateKey) -> NodeRequest | None:
    """The request of this node in `out`, if any. Raises ConfigError where another file is there."""
    if not out.exists():
        return None
    try:
        known = NodeRequest.from_file(out)
    except ConfigError:
        known = None
    if known is None or known.node_key.encode() != public_key_pem(key):
        raise ConfigError(
            f"{out} is there and is no request of this node's key: move it away, or name another with --out"
        )
    return known


def _former(path: str, kit: Path) -> str:
    """What to say of the kit that the policy names so far, where it is another's."""
    if not path or Path(path) == kit.resolve():
        return ""
    try:
        told = f"coordinator {grouped(Kit.from_file(Path(path)).fingerprint)}"
    except VisardError:
        told = "which cannot be read any more"
    return f"the former kit {path} ({told}) is replaced"


def _beside(kit: Path, policy: Path) -> str:
    """The kit's path as the policy has it: relative to its folder where it lies within."""
    path, folder = kit.resolve(), policy.resolve().parent
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
