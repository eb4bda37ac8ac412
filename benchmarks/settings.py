"""What benchmarks share: options of a recipe on the command line, faces held out, and what was measured, a line of JSON each."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from common.config import RunConfig, flat_fields
from common.errors import ConfigError
from common.faces import FaceDataset
from common.fields import Scalar
from common.privacy.units import PrivacyUnit

# MNIST with a discriminator of real against fake in place of the recipe's classifier: what the benchmarks of the mechanism were
# measured with, and an arm of benchmarks/quality.py.
ADVERSARIAL: dict[str, Scalar] = {
    "privacy-model": "central",
    "discriminator": "dcgan",
    "discriminator-width": 16,
    "loss": "bce",
    "discriminator-steps": 1,
    "discriminator-lr": 5e-4,
    "adam-beta1": 0.0,
    "max-grad-norm": 1.0,
    "sample-rate": 0.03,
    "expected-batch": 180.0,
    "moment-noise-multiplier": 1.5,
    "moment-steps": 1000,
    "moment-weight": 4.0,
    "num-rounds": 300,
    "refine-steps": 0,
    "generator-lr": 2e-4,
    "generator-batch": 500,
}


def settings(items: Iterable[str]) -> dict[str, Scalar]:
    """KEY=VALUE texts as flat keys, each of its option's own type. Raises ConfigError."""
    found: dict[str, Scalar] = {}
    for item in items:
        key, _, text = item.partition("=")
        kind = flat_fields().get(key, (str,))[0]  # an unknown key is refused where the recipe is loaded
        try:
            found[key] = text == "true" if kind is bool else kind(text) if kind in (int, float) else text
        except ValueError:
            raise ConfigError(f"--set {item}: {key} must be a {kind.__name__}") from None
    return found


def hold_out(faces: FaceDataset, count: int) -> tuple[FaceDataset, FaceDataset]:
    """The faces to train on, and `count` or a few more that play no part in it: whole persons where they are known."""
    units = faces.units(PrivacyUnit.PERSON if faces.persons is not None else PrivacyUnit.IMAGE)
    held: list[int] = []
    for unit in np.random.default_rng(0).permutation(len(units)):
        if len(held) < count:
            held += units[unit].tolist()
    return faces.subset(np.setdiff1d(np.arange(len(faces)), held)), faces.subset(np.array(sorted(held)))


def declared(train: FaceDataset, config: RunConfig) -> dict[str, Scalar]:
    """The expected batch of clients that share what was not held out, as an option: the recipe declares all of it."""
    units = len(train.units(config.privacy.unit)) / config.simulation.num_clients
    return {"expected-batch": round(units * config.privacy.sample_rate, 3)}


def keep(results: Path, row: Mapping[str, Any]) -> None:
    """Append what was measured to the file of all results."""
    results.parent.mkdir(exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def mean_and_interval(values: Sequence[float]) -> str:
    """The mean, and half the width of its 95 % interval by Student's t where there are two values or more."""
    if len(values) < 2:
        return f"{np.mean(values):.4g}"
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.4g} ± {half:.2g}"
