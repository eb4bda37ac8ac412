"""The one-run lower bound on epsilon beside the epsilon that the ledgers claim, for whole federated runs.

    python benchmarks/one_run.py [--recipe demo] [--epsilon 1 4 8] [--model local central] [--canaries 500] [--seed 0]
                                 [--set num-rounds=100 ...]

Without a recipe: a DCGAN discriminator on 28x28 grey drawn faces of 400 persons at two clients, 100 rounds. Prints a table
and appends one JSON line a run to benchmarks/results/one_run.jsonl.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import tempfile
from pathlib import Path

import torch
from settings import settings

from common.config import RunConfig
from common.fields import Scalar
from simulations.audit.one_run import OneRunAudit, audit_one_run
from simulations.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "one_run.jsonl"
SMALL: dict[str, Scalar] = {
    "data": "procedural:persons=400,images=2",
    "num-clients": 2,
    "image-size": 28,
    "channels": 1,
    "generator-width": 8,
    "discriminator-width": 16,
    "num-rounds": 100,
    "sample-rate": 0.1,
    "expected-batch": 32.0,
    "moment-steps": 100,
    "moment-batch": 64,
    # Costs epsilon 0.4 of the budget, which may be 1.
    "moment-noise-multiplier": 10.0,
    "sample-every": 1000,
}


def config_of(recipe: str | None, model: str, epsilon: float, changes: dict[str, Scalar]) -> RunConfig:
    """One cell of the table."""
    cell: dict[str, Scalar] = {**changes, "privacy-model": model, "epsilon": epsilon}
    return load_recipe(recipe, cell) if recipe else RunConfig.from_flat({**SMALL, **cell})


def row_of(recipe: str | None, found: OneRunAudit, changes: dict[str, Scalar]) -> dict[str, object]:
    """What is kept of an audit."""
    figures = {
        name: round(value, 4) if isinstance(value, float) and name != "delta" else value
        for name, value in dataclasses.asdict(found).items()
    }
    return {
        "recipe": recipe or "small",
        **figures,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "torch": torch.__version__,
        "overrides": {key: value for key, value in changes.items() if key != "data"},
    }


def main() -> None:
    """Audit every cell that was asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="a recipe in place of the small configuration")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 4.0, 8.0])
    parser.add_argument("--model", nargs="+", choices=["local", "central"], default=["local", "central"])
    parser.add_argument("--canaries", type=int, default=500)
    parser.add_argument("--rounds", type=int, help="fewer gradient rounds than configured")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other options")
    options = parser.parse_args()
    changes = settings(options.set)
    print(f"{'model':<9}{'seed':>5}{'claimed':>9}{'bound':>7}{'correct':>9}{'guesses':>9}{'rounds':>8}{'seconds':>9}")
    for model in options.model:
        for epsilon in options.epsilon:
            config = config_of(options.recipe, model, epsilon, changes)
            for seed in options.seed:
                with tempfile.TemporaryDirectory() as scratch:
                    found = audit_one_run(config, None, Path(scratch), options.canaries, seed, options.rounds)
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row_of(options.recipe, found, changes)) + "\n")
                print(
                    f"{model:<9}{seed:>5}{found.claimed_epsilon:>9.2f}{found.bound:>7.2f}{found.correct:>9}{found.guesses:>9}"
                    f"{found.rounds:>8}{found.seconds:>9.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
