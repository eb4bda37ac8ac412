"""Accuracy of a CNN trained on synthetic images and tested on the real test set, beside moments only with as many generator steps.

    python benchmarks/utility.py mnist --data FOLDER [--arm moments central local] [--seed 0] [--set num-rounds=200 ...]

The recipe is mnist or fashion-mnist, whose folders have a test set. Every arm is `visard simulate RECIPE` with other options; each
appends one JSON line to benchmarks/results/utility.jsonl. The test set is read once, after training.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
from settings import settings

from common.applications.generate import TrainedGenerator
from common.config import RunConfig
from common.evaluation.utility import synthetic_accuracy
from common.faces import load_faces
from common.fields import Scalar
from server.progress import PlainProgress
from server.records import epsilon_so_far
from simulations.recipe import load_recipe
from simulations.simulate import prepare, simulate

RESULTS = Path(__file__).parent / "results" / "utility.jsonl"
SYNTHETIC_IMAGES = 20_000


def arm_config(recipe: str, arm: str, overrides: dict[str, Scalar]) -> RunConfig:
    """The recipe; `moments` gets the adversarial stage's generator steps as moment steps instead."""
    config = load_recipe(recipe, {**overrides, **({"privacy-model": arm} if arm != "moments" else {})})
    if arm == "moments":
        extra = config.training.num_rounds // config.training.discriminator_steps
        moments = dataclasses.replace(config.moments, moment_steps=config.moments.moment_steps + extra)
        config = dataclasses.replace(
            config, moments=moments, training=dataclasses.replace(config.training, num_rounds=0)
        )
    return config


def run_arm(recipe: str, arm: str, overrides: dict[str, Scalar], keep: Path | None) -> dict[str, object]:
    """Train one arm and measure it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        directory = (keep or Path(scratch)) / f"{recipe}-{arm}-{overrides['seed']}"
        state, digits = prepare(directory, arm_config(recipe, arm, overrides))
        outcome = simulate(directory, state, digits, [PlainProgress()])
        trained = time.monotonic() - began
        images, labels = TrainedGenerator.load(directory).draw(SYNTHETIC_IMAGES, seed=1)
    config = state.config
    real = load_faces(config.simulation, config.model.image_size, config.model.channels, split="test")
    accuracy = synthetic_accuracy(
        torch.from_numpy(images),
        torch.from_numpy(labels),
        torch.from_numpy(real.images),
        torch.from_numpy(real.labels),
        seed=0,
    )
    _, tight = max(outcome.ledgers)
    return {
        "recipe": recipe,
        "arm": arm,
        "accuracy": round(100 * accuracy, 2),
        "epsilon_rdp": epsilon_so_far(state),
        "epsilon_prv": round(tight, 3),
        "delta": config.privacy.delta,
        "unit": str(config.privacy.unit),
        "clients": config.simulation.num_clients,
        "rounds": state.next_round - 1,
        "generator_steps": state.generator_steps,
        "noise_multiplier": round(config.privacy.noise_multiplier, 4),
        "seed": config.training.seed,
        "train_seconds": round(trained),
        "seconds": round(time.monotonic() - began),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "torch": torch.__version__,
        "overrides": {key: value for key, value in overrides.items() if key not in ("data", "seed")},
    }


def main() -> None:
    """Run the arms that were asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=["mnist", "fashion-mnist"])
    parser.add_argument("--data", required=True, help="folder with the four IDX files")
    parser.add_argument(
        "--arm", nargs="+", choices=["moments", "central", "local"], default=["moments", "central", "local"]
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other options of the recipe")
    parser.add_argument("--keep", type=Path, help="folder to keep the runs in")
    options = parser.parse_args()
    overrides: dict[str, Scalar] = {"data": str(Path(options.data).resolve()), **settings(options.set)}
    rows = []
    for seed in options.seed:
        for arm in options.arm:
            row = run_arm(options.recipe, arm, {**overrides, "seed": seed}, options.keep)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
    print(f"{'arm':<9}{'seed':>5}{'accuracy':>10}{'epsilon':>9}{'rounds':>8}{'G steps':>9}{'seconds':>9}")
    for row in rows:
        print(
            f"{row['arm']:<9}{row['seed']:>5}{row['accuracy']:>10}{row['epsilon_rdp']:>9}{row['rounds']:>8}"
            f"{row['generator_steps']:>9}{row['seconds']:>9}"
        )


if __name__ == "__main__":
    main()
