"""Named experiments: `simulations/recipes/NAME.toml`, each a set of overrides of the defaults."""

import difflib
from collections.abc import Mapping
from pathlib import Path

from common.config import RunConfig, expand_preset
from common.errors import ConfigError
from common.fields import Scalar, load_toml

FOLDER = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """The recipes that come with Visard."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(recipe: str, overrides: Mapping[str, Scalar]) -> RunConfig:
    """A recipe by name, or a TOML file by path, with overrides on top.

    Raises ConfigError, with the nearest name, for neither.
    """
    path = Path(recipe) if recipe.endswith(".toml") else FOLDER / f"{recipe}.toml"
    if not path.exists():
        near = difflib.get_close_matches(recipe, recipe_names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"there is no recipe {recipe!r}: {hint}recipes are {', '.join(recipe_names())}, or a path to a .toml"
        )
    return RunConfig.from_flat({**expand_preset(load_toml(path)), **expand_preset(overrides)})
