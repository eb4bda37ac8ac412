"""A coordinator's folder: its settings in `coordinator.toml`, its keys, its registry and its runs.

    coordinator.toml   settings, to be edited; the run's own options are its table [run]
    signing.key        Ed25519, signs every instruction; ca.key, ca.crt, server.key, server.crt: TLS
    nodes.json         the registry: names and public keys of the nodes that may connect
    runs/NAME/         checkpoint, records and pictures of a run
    status.json, lock, coordinator.log   of the process that runs

Whoever holds the folder's keys is the coordinator: it is for its owner alone (0700).
"""

import os
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.commented import commented
from common.errors import ConfigError
from common.fields import Scalar, between, convert, key_of, option, require
from common.files import flush_folder, write_atomically
from common.keys import load_key, write_key
from common.kit import Kit, check_host, load_certificate, split_address
from server.certificates import ensure_certificate, make_ca, read
from server.summary import run_directory

SETTINGS = "coordinator.toml"
_OWN_TLS = (Path("server.crt"), Path("server.key"), Path("ca.crt"))
_TLS_KEYS = ("certificate", "key", "ca")
_HEADER = (
    "What this coordinator is; read at each `visard coordinator start`. Relative paths are relative to this file's folder. Whoever "
    "has the folder's keys is the coordinator: keep a copy of it, and keep it from others' hands."
)
_RUN_HELP = (
    "The run's own options, on top of the recipe; `visard coordinator init --help` lists them all. Once the run has begun, most cannot "
    "change: give another name for another run."
)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """The settings. `load` gives absolute paths.

    Raises ConfigError where one is out of range, or does not go with another.
    """

    folder: Path
    address: str = field(
        metadata={"help": 'what nodes dial: "HOST:PORT", an IPv6 literal in brackets; it is in their kits'}
    )
    listen: str = field(metadata={"help": 'where this machine listens: "HOST:PORT"; 0.0.0.0 for all its addresses'})
    names: tuple[str, ...] = option(
        (),
        "further DNS names and IP addresses in the certificate; the address' own, localhost, 127.0.0.1 and ::1 always are. Without "
        "effect on a given certificate",
    )
    recipe: str = option("demo", "the run: name of a recipe, or a path to a .toml")
    name: str = option("demo", "the run's folder under runs/; another name is another run")
    max_message_mib: int = option(64, "largest answer of a node, in MiB")
    certificate: Path = option(
        _OWN_TLS[0],
        "the certificate of TLS, with what stands between it and the authority; own ones are renewed at a start",
    )
    key: Path = option(_OWN_TLS[1], "its secret key")
    ca: Path = option(_OWN_TLS[2], "the authority's certificate, which is in the nodes' kits")
    run: Mapping[str, Scalar] = field(default_factory=dict, metadata={"help": _RUN_HELP})

    def __post_init__(self) -> None:
        split_address(self.address, dialled=True)
        split_address(self.listen, "listen")
        for name in self.names:
            check_host(name, "names")
        between(self, ["max_message_mib"], 1, 2047)
        run_directory(self.runs_dir, self.name)
        own = [self._placed(getattr(self, key)) == self._placed(_OWN_TLS[n]) for n, key in enumerate(_TLS_KEYS)]
        require(
            all(own) or not any(own),
            f"of {', '.join(_TLS_KEYS)} some are given and some are this folder's own: give all three, or none for an own authority",
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the settings in `folder`. Raises ConfigError where they are missing, damaged, unknown or out of range."""
        path = folder / SETTINGS
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"there is no coordinator in {folder}: `visard coordinator init {folder} --address HOST:PORT` makes one, or give "
                "another folder as the last argument"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        try:
            return cls(folder=folder.resolve(), **_parsed(content, folder.resolve()))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def write(self) -> None:
        """Write the settings with their meanings and defaults. Raises OSError."""
        entries = []
        for f in fields(self):
            if f.name != "folder":
                value = getattr(self, f.name)
                plain = str(value) if isinstance(value, Path) else value
                known = f.default is not MISSING and f.default != ()
                default = f" (default {f.default})" if known else ""
                entries.append((key_of(f.name), plain, f.metadata["help"] + default))
        write_atomically(self.folder / SETTINGS, commented(_HEADER, entries), private=True)

    @property
    def own_ca(self) -> bool:
        """Whether certificates are issued here, and not given."""
        return self._placed(self.ca) == self._placed(_OWN_TLS[2])

    @property
    def ca_key(self) -> Path:
        """The own authority's secret key."""
        return self.folder / "ca.key"

    @property
    def host(self) -> str:
        """What nodes must find in the certificate."""
        return split_address(self.address)[0]

    @property
    def runs_dir(self) -> Path:
        """Folder of all runs."""
        return self.folder / "runs"

    @property
    def registry_path(self) -> Path:
        """Where `server.registry.Registry` keeps the nodes."""
        return self.folder / "nodes.json"

    @property
    def signing_key_path(self) -> Path:
        """The key that signs every instruction."""
        return self.folder / "signing.key"

    @property
    def status_path(self) -> Path:
        """What the running process tells of itself."""
        return self.folder / "status.json"

    @property
    def lock_path(self) -> Path:
        """Held while the coordinator runs."""
        return self.folder / "lock"

    @property
    def log_path(self) -> Path:
        """The coordinator's log."""
        return self.folder / "coordinator.log"

    def signing_key(self) -> Ed25519PrivateKey:
        """Read it. Raises ConfigError where it is missing, another kind of key, or others may read it."""
        key = load_key(self.signing_key_path)
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{self.signing_key_path} is no Ed25519 key: restore it from a copy")
        return key

    def kit(self, name: str) -> Kit:
        """The kit of the node `name`. Raises ConfigError where keys are missing or damaged, or the name cannot be a node's."""
        authority = load_certificate(read(self._placed(self.ca)), str(self.ca))
        return Kit(
            name,
            self.address,
            authority.public_bytes(serialization.Encoding.PEM).decode(),
            self.signing_key().public_key().public_bytes_raw().hex(),
        )

    def _placed(self, path: Path) -> Path:
        return self.folder / path.expanduser()


def create(deployment: Deployment) -> None:
    """Make the folder: settings, signing key, and an own authority with a first certificate unless one is given.

    It appears as a whole or not at all. Raises ConfigError where it exists, or a given certificate will not do; OSError.
    """
    folder = deployment.folder.resolve()
    if folder.exists():
        raise ConfigError(
            f"{folder} is there already and is not overwritten, for it may hold a coordinator's keys: name another folder, or edit "
            f"{folder / SETTINGS}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    begun = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    begun.mkdir(mode=0o700)
    try:
        made = replace(deployment, folder=begun)
        made.write()
        write_key(made.signing_key_path, Ed25519PrivateKey.generate())
        if made.own_ca:
            make_ca(made)
        ensure_certificate(Deployment.load(begun))
        begun.rename(folder)
    except BaseException:
        shutil.rmtree(begun, ignore_errors=True)
        raise
    flush_folder(folder.parent)


def _parsed(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings' values by their fields' names, paths made absolute. Raises ConfigError."""
    known = {key_of(f.name): f for f in fields(Deployment) if f.name != "folder"}
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"unknown key {key!r}: {hint}")
        values[known[key].name] = value
    missing = [key for key, f in known.items() if f.default is f.default_factory is MISSING and key not in content]
    require(not missing, f"{', '.join(missing)} is missing: `visard coordinator init` writes all keys")
    for name, value in values.items():
        if name == "run":
            plain = isinstance(value, dict) and all(
                isinstance(word, bool | int | float | str) for word in value.values()
            )
            require(plain, "[run] must be a table of single values, as `visard coordinator init` writes it")
        elif name == "names":
            plain = isinstance(value, list) and all(isinstance(word, str) for word in value)
            require(plain, f"names = {value!r} must be a list of words")
            values[name] = tuple(value)
        else:
            convert(key_of(name), value, int if name == "max_message_mib" else str)
    for name in _TLS_KEYS:
        values[name] = folder / Path(values.get(name, Deployment.__dataclass_fields__[name].default)).expanduser()
    if (recipe := str(values.get("recipe", ""))).endswith(".toml"):
        values["recipe"] = str(folder / Path(recipe).expanduser())
    return values
