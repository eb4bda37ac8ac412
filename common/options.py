"""Every option of a run as an option of a command, made from the configuration itself."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from common.config import PRESETS, RunConfig, expand_preset, flat_fields
from common.fields import Scalar

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
    own = inspect.signature(command)
    names: dict[str, str] = {}
    added = []
    for section, section_type in get_type_hints(RunConfig).items():
        for f in dataclasses.fields(section_type) if section in sections else ():
            key = f.name.replace("_", "-")
            target, default, help_text = flat_fields()[key]
            kind = target if target in (bool, int, float) else str
            flag = f"--{key}/--no-{key}" if kind is bool else f"--{key}"
            option = typer.Option(
                flag, help=help_text, show_default=str(default) or "none", rich_help_panel=_PANELS[section]
            )
            annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
            added.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
            names[f.name] = key

    if "training" in sections:
        told = "; ".join(
            f"{name}: {', '.join(f'{key} {value:g}' for key, value in keys.items())}" for name, keys in PRESETS.items()
        )
        option = typer.Option("--preset", help=f"Options set together. {told}", rich_help_panel=_PANELS["training"])
        preset = Annotated[str | None, option]
        added.append(inspect.Parameter("preset", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=preset))
        names["preset"] = "preset"

    @wraps(command)
    def wrapper(**given: Any) -> None:
        overrides: dict[str, Scalar] = {
            names[name]: value for name in names if (value := given.pop(name, None)) is not None
        }
        command(**given, overrides=expand_preset(overrides))

    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.parameters.values() if p.name != "overrides"]
    wrapper.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*kept, *added]}
    return wrapper
