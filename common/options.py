"""Every option of a run as an option of a command, made from the configuration itself."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from common.config import PRESETS, RunConfig, expand_preset, flat_fields
from common.fields import Scalar, key_of

_PANELS = {
    "model": "Networks",
    "privacy": "Privacy",
    "augmentation": "Augmentation",
    "moments": "Moment stage",
    "training": "Training",
    "simulation": "Simulated clients",
}


def with_run_options(command: Callable[..., None], sections: tuple[str, ...] = tuple(_PANELS)) -> Callable[..., None]:
    """Give `command` an option for each field of the named sections of `RunConfig`.

    `command` has a parameter `overrides`: it gets the flat keys that were given on the command line, and those only, a
    preset's among them.
    """
    fields: list[tuple[str, type, Any, str, str]] = []
    for section, section_type in get_type_hints(RunConfig).items():
        for f in dataclasses.fields(section_type) if section in sections else ():
            target, default, help_text = flat_fields()[key_of(f.name)]
            fields.append((f.name, target, default, help_text, _PANELS[section]))
    if "training" in sections:
        told = "; ".join(
            f"{name}: {', '.join(f'{key} {value:g}' for key, value in keys.items())}" for name, keys in PRESETS.items()
        )
        fields.append(("preset", str, "", f"Options set together. {told}", _PANELS["training"]))

    def expanding(**given: Any) -> None:
        command(**{**given, "overrides": expand_preset(given["overrides"])})

    expanding.__signature__ = inspect.signature(command)  # type: ignore[attr-defined]
    return with_options(wraps(command)(expanding), fields)


def with_section_options(command: Callable[..., None], section: type, panel: str) -> Callable[..., None]:
    """Give `command` an option for each field of one section; its parameter `overrides` gets those that were given."""
    hints = get_type_hints(section)
    fields = [(f.name, hints[f.name], f.default, str(f.metadata["help"]), panel) for f in dataclasses.fields(section)]
    return with_options(command, fields)


def with_options(
    command: Callable[..., None], fields: Iterable[tuple[str, type, Any, str, str]]
) -> Callable[..., None]:
    """Give `command` an option for each field: its name, type, default, help and the panel that it is shown in."""
    own = inspect.signature(command)
    names: dict[str, str] = {}
    added = []
    for name, target, default, help_text, panel in fields:
        key = key_of(name)
        kind = target if target in (bool, int, float) else str
        flag = f"--{key}/--no-{key}" if kind is bool else f"--{key}"
        shown: Any = str(default) or "none"
        option = typer.Option(flag, help=help_text, show_default=name != "preset" and shown, rich_help_panel=panel)
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        added.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
        names[name] = key

    @wraps(command)
    def wrapper(**given: Any) -> None:
        overrides: dict[str, Scalar] = {
            names[name]: value for name in names if (value := given.pop(name, None)) is not None
        }
        command(**given, overrides=overrides)

    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.parameters.values() if p.name != "overrides"]
    wrapper.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*kept, *added]}
    return wrapper
