"""What the sections of a configuration are made of: fields that are options, their checks, and how a value is read."""

import dataclasses
import math
import tomllib
from collections.abc import Iterable
from dataclasses import field
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.privacy.units import PrivacyModel, PrivacyUnit

Scalar = bool | int | float | str


def option(default: Any, help_text: str) -> Any:
    """A field of a section: its default, and what it is in words."""
    return field(default=default, metadata={"help": help_text})


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def between(config: object, names: Iterable[str], low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse a field outside [low, high] (or (low, high]), and anything that is not finite."""
    for name in names:
        value = getattr(config, name)
        inside = math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
        bracket = "(" if open_low else "["
        require(inside, f"{key_of(name)} = {value} is outside {bracket}{low:g}, {high:g}]")


def one_of(config: object, name: str, choices: Iterable[Any]) -> None:
    """Refuse a field that is none of `choices`."""
    value, listed = getattr(config, name), list(choices)
    require(value in listed, f"{key_of(name)} = {value!r}: choose one of {', '.join(map(str, listed))}")


def listed(text: str) -> list[str]:
    """The words of a comma-separated list, without the space around them."""
    return [word.strip() for word in text.split(",")] if text.strip() else []


def key_of(name: str) -> str:
    """A field's key: `num_rounds` is `num-rounds`."""
    return name.replace("_", "-")


def keys_of(section_type: type) -> list[tuple[str, str]]:
    """(field, key) of a section's fields."""
    return [(f.name, key_of(f.name)) for f in dataclasses.fields(section_type)]


def plain(value: Any) -> Any:
    """A value as it stands in a TOML file."""
    return str(value) if isinstance(value, PrivacyModel | PrivacyUnit) else value


def convert(key: str, value: Scalar, target: type) -> Any:
    """Convert without guessing: an int may stand for a float; nothing else changes its type. Raises ConfigError."""
    if target is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if issubclass(target, PrivacyModel | PrivacyUnit):
        try:
            return target(str(value))
        except ValueError:
            raise ConfigError(f"{key} = {value!r}: choose one of {', '.join(target)}") from None
    require(type(value) is target, f"{key} = {value!r} must be a {target.__name__}")
    return value


def load_toml(path: Path) -> dict[str, Scalar]:
    """Read a flat TOML file. Raises ConfigError where it is missing, damaged or nested."""
    try:
        flat = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    for key, value in flat.items():
        require(isinstance(value, bool | int | float | str), f"{path}: {key!r} must be a single value, not {value!r}")
    return flat
