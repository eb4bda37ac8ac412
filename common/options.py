"""Every option of a run as an option of a command, made from the configuration itself."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from common.config import RunConfig, Scalar, flat_fields

_PANELS = {
    "model": "Networks",
    "privacy": "Privacy",
    "moments": "Moment stage",
    "training": "Training",
    "simulation": "Simulated clients",
}


def with_run_options(command: Callable[..., None], sections: tuple[str, ...] = tuple(_PANELS)) -> Callable[..., None]:
    """Give `command` an option for each field of the named sections of `RunConfig`.

    `command` has a parameter `overrides`: it gets the flat keys that were given on the command line, and those only.
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
            option = typer.Option(flag, help=f"{help_text} [{default}]", rich_help_panel=_PANELS[section])
            annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
            added.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
            names[f.name] = key

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
