"""What do public faces bring? One recipe from a public start, without it, and that start alone.

    python benchmarks/prior.py --data FOLDER [--recipe utkface] [--public SOURCE] [--public-steps N] [--arm prior without with]
        [--seed 0 1 2] [--set KEY=VALUE ...]

    prior        the public faces alone: no client is asked anything
    without      the recipe as it stands
    with         the recipe, begun from the public faces

Photographs are held out first (whole persons where they are known): every figure compares to these (common/evaluation), which
play no part in any run. The public faces are drawn ones unless others are named. Each run appends a JSON line to
benchmarks/results/prior.jsonl; at the end come the means over the seeds and what the public start adds, seed by seed, with 95 %
intervals by Student's t.
"""

import argparse
import dataclasses
import datetime
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t
from settings import declared, hold_out, keep, settings

from common.applications.generate import TrainedGenerator
from common.evaluation.fidelity import measure_fidelity
from common.evaluation.utility import synthetic_accuracy
from common.faces import FaceDataset, load_faces
from common.faces.places import name_of
from common.fields import Scalar
from server.prior import public_faces
from server.progress import PlainProgress
from server.records import epsilon_so_far
from simulations.recipe import load_recipe
from simulations.simulate import prepare, simulate

RESULTS = Path(__file__).parent / "results" / "prior.jsonl"
ARMS: dict[str, dict[str, Scalar]] = {
    "prior": {"moment-rounds": 0, "num-rounds": 0, "refine-steps": 0},
    "without": {"public": "", "public-steps": 0},
    "with": {},
}
FIGURES = ("frechet", "kernel", "precision", "recall", "density", "coverage")


def split(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Scalar], FaceDataset]:
    """The faces to train on and the public ones, as options of a run, and those held out."""
    asked = {"data": options.data, "public": options.public, "public-steps": options.public_steps}
    config = load_recipe(options.recipe, {**settings(options.set), **asked})
    faces = load_faces(config.simulation, config.model.image_size, config.model.channels)
    train, held = hold_out(faces, options.held_out)
    train.save(folder / "train.npz")
    public_faces(config).save(folder / "public.npz")
    # Cut and labelled already.
    given: dict[str, Scalar] = {"data": str(folder / "train.npz"), "attributes": "", "person-column": ""}
    given |= {"label-column": "", "label-values": "", "detect": "none", "crop": 1.0}
    public: dict[str, Scalar] = {"public": str(folder / "public.npz"), "public-steps": options.public_steps}
    return {**given, **declared(train, config), **public}, held


def run_arm(
    arm: str, seed: int, given: dict[str, Scalar], held: FaceDataset, options: argparse.Namespace
) -> dict[str, Any]:
    """Train one arm and measure it."""
    began = time.monotonic()
    overrides = settings(options.set)
    config = load_recipe(options.recipe, {**overrides, **given, **ARMS[arm], "seed": seed})
    with tempfile.TemporaryDirectory() as scratch:
        state, faces = prepare(Path(scratch) / "run", config)
        outcome = simulate(Path(scratch) / "run", state, faces, [PlainProgress()])
        images, labels = TrainedGenerator.load(Path(scratch) / "run").draw(options.synthetic, seed=1)
    made, real = torch.from_numpy(images), torch.from_numpy(held.images)
    found = dataclasses.asdict(measure_fidelity(made, real))
    figures = {name: round(found[name], 4) for name in FIGURES}
    if labels is not None and held.labels is not None:
        share = synthetic_accuracy(made, torch.from_numpy(labels), real, torch.from_numpy(held.labels), seed=0)
        figures["accuracy"] = round(100 * share, 2)
    return {
        "recipe": Path(options.recipe).stem,
        "arm": arm,
        "seed": seed,
        "public": "" if arm == "without" else name_of(options.public),
        "public_steps": state.primed,
        "figures": figures,
        "network": found["network"],
        "held_out": found["reference"],
        "synthetic": found["generated"],
        "epsilon_rdp": epsilon_so_far(state),
        "epsilon_prv": round(max(outcome.ledgers)[1], 3) if outcome.ledgers else None,
        "unit": str(config.privacy.unit),
        "privacy_model": str(config.privacy.privacy_model),
        "rounds": state.next_round - 1,
        "seconds": round(time.monotonic() - began),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "torch": torch.__version__,
        "overrides": overrides,
    }


def mean_and_interval(values: list[float]) -> str:
    """The mean, and half the width of its 95 % interval where there are two values or more."""
    if len(values) < 2:
        return f"{np.mean(values):.4g}"
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.4g} ± {half:.2g}"


def show(rows: list[dict[str, Any]]) -> None:
    """Means over the seeds of each arm, and of what the public start adds at each seed."""
    seeds = len({row["seed"] for row in rows})
    print(f"\nmeans over {seeds} seeds" + (" with 95 % intervals" if seeds > 1 else ""))
    by_arm = {arm: {row["seed"]: row["figures"] for row in rows if row["arm"] == arm} for arm in ARMS}
    if by_arm["with"] and by_arm["without"]:
        by_arm["added"] = {
            seed: {name: value - by_arm["without"][seed][name] for name, value in figures.items()}
            for seed, figures in by_arm["with"].items()
        }
    for arm, found in by_arm.items():
        for name in next(iter(found.values()), {}):
            print(f"{arm:<9}{name:<11}{mean_and_interval([figures[name] for figures in found.values()])}")


def main() -> None:
    """Run the arms and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the recipe's faces: a folder or another source")
    parser.add_argument("--recipe", default="utkface", help="name of a recipe, or a path to a .toml")
    parser.add_argument("--public", default="procedural:persons=1000,images=5,first=100000", help="the public faces")
    parser.add_argument("--public-steps", type=int, default=400)
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other options of the recipe")
    parser.add_argument("--held-out", type=int, default=1000, help="photographs to compare to")
    parser.add_argument("--synthetic", type=int, default=5000, help="faces drawn of each run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to append to")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        given, held = split(options, Path(folder))
        for seed in options.seed:
            for arm in options.arm:
                row = run_arm(arm, seed, given, held, options)
                keep(options.results, row)
                rows.append(row)
                told = "  ".join(f"{name} {value:g}" for name, value in row["figures"].items())
                print(f"{arm:<9}seed {seed}  {told}  epsilon {row['epsilon_rdp']}  {row['seconds']} s", flush=True)
    show(rows)


if __name__ == "__main__":
    main()
