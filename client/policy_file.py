"""The owner's policy as a TOML file: how it is read, and how a commented one is written.

Flat keys, one for each field of `client.policy.OwnerPolicy`. Paths are relative to the file's own folder.
"""

import json
import os
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import ConfigError, DataError
from common.faces.folders import BY_NAME
from common.faces.loading import SCHEMES
from common.fields import Scalar
from common.files import write_atomically
from common.sections import FaceSource

_HEADER = """\
# What the owner of these faces allows. No coordinator can change or see it; whatever is outside it is refused before a
# face is looked at. Keep it from others' hands. Paths are relative to this file's folder.
"""
_PATHS = ("data", "attributes", "state-dir", "coordinator")


def load_policy_file(path: Path) -> dict[str, Scalar | Sequence[str]]:
    """The keys of the file, its paths made absolute. Raises ConfigError where it is missing, damaged or nested."""
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read the policy {path}: {error}; `visard client init` writes one, --policy names it"
        ) from error
    for key, value in keys.items():
        words = isinstance(value, list) and all(isinstance(word, str) for word in value)
        if not words and not isinstance(value, bool | int | float | str):
            raise ConfigError(f"{path}: {key!r} must be a single value or a list of words, not {value!r}")
    folder = path.resolve().parent
    for key in _PATHS:
        if isinstance(keys.get(key), str):
            keys[key] = _placed(key, keys[key], folder)
    return keys


def check_places(source: FaceSource) -> None:
    """Raise DataError unless the paths of faces and attributes are there; sources with a scheme are taken as they are."""
    if source.data.partition(":")[0] not in SCHEMES and not Path(source.data).expanduser().exists():
        raise DataError(
            f"there are no faces at {source.data}: data is a folder, an .npz file, or begins with "
            f"{', '.join(f'{scheme}:' for scheme in SCHEMES)}"
        )
    if source.attributes not in ("", BY_NAME) and not Path(source.attributes).expanduser().is_file():
        raise DataError(f"there is no CSV at {source.attributes}: attributes is one, or {BY_NAME}")


def write_policy_file(
    path: Path, keys: Mapping[str, tuple[Scalar | Sequence[str], Scalar | Sequence[str] | None, str]]
) -> None:
    """Write a commented policy that only its owner can read. keys: key -> (value, default, meaning), default None for none.

    Raises ConfigError where `path` exists, OSError where it cannot be written.
    """
    parts = [_HEADER]
    for key, (value, default, meaning) in keys.items():
        told = meaning if default is None else f"{meaning} (default {_toml(default)})"
        comment = textwrap.fill(told, 118, initial_indent="# ", subsequent_indent="# ", break_long_words=False)
        parts.append(f"{comment}\n{key} = {_toml(value)}\n")
    try:
        content = "\n".join(parts).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"a path that is not UTF-8 cannot stand in a policy ({error}): rename the folder") from None
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{path} is there already and is not overwritten: edit it, or name another with --out"
        ) from None
    with os.fdopen(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def set_key(path: Path, key: str, value: Scalar) -> None:
    """Give a key of the policy file another value; comments and the rest stay. Raises ConfigError where the key is not in it."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    places = [number for number, line in enumerate(lines) if line.partition("=")[0].strip() == key]
    if len(places) != 1:
        raise ConfigError(f"{path} has no line {key} = ...: add one, as `visard client init` writes it")
    lines[places[0]] = f"{key} = {_toml(value)}\n"
    write_atomically(path, "".join(lines).encode(), private=True)


def ledger_beside(data: str, policy: Path) -> str:
    """Where a new policy puts the ledger: beside the data and named after it, so that it is one budget for these faces
    whoever asks; for a source without a path, beside the policy."""
    if data.partition(":")[0] in SCHEMES:
        return str(policy.resolve().with_suffix(".visard"))
    place = Path(data).expanduser().resolve()
    return str(place.with_name(place.name + ".visard"))


def _placed(key: str, value: str, folder: Path) -> str:
    if (
        not value
        or (key == "data" and value.partition(":")[0] in SCHEMES)
        or (key == "attributes" and value == BY_NAME)
    ):
        return value
    return str((folder / Path(value).expanduser()).resolve())


def _toml(value: Scalar | Sequence[str]) -> str:
    """A value as TOML has it: its strings and flags are written as JSON's, but for the character DEL."""
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    return f"[{', '.join(map(_toml, value))}]"
