"""Does it matter who holds what? UTKFace dealt out evenly, by Dirichlet, and one race a client.

    python benchmarks/partitions.py --data UTKFACE_IMAGES [--arm iid dirichlet attribute] [--set KEY=VALUE ...]

Each arm is the recipe `utkface` with rounds and another partitioner. 1,000 photographs are held out first: the distance of the
generated faces to them (common/evaluation/fidelity.py), overall and for each race, and the accuracy on them of a CNN that learned
gender from 5,000 generated faces. Held out and training faces are public here. Appends JSON lines to
benchmarks/results/partitions.jsonl.
"""

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from settings import settings

from common.applications.generate import TrainedGenerator
from common.evaluation.fidelity import FrechetDistance
from common.evaluation.utility import synthetic_accuracy
from common.faces import FaceDataset, load_faces
from common.fields import Scalar
from server.progress import PlainProgress
from server.records import epsilon_so_far
from simulations.recipe import load_recipe
from simulations.simulate import prepare, simulate

RESULTS = Path(__file__).parent / "results" / "partitions.jsonl"
HELD_OUT, SYNTHETIC = 1000, 5000
ARMS: dict[str, dict[str, Scalar]] = {
    "iid": {"partitioner": "iid"},
    "dirichlet": {"partitioner": "dirichlet", "partition-by": "race", "dirichlet-alpha": 0.1},
    "attribute": {"partitioner": "attribute", "partition-by": "race"},
}
# Rounds, whose updates the partition could matter to: the recipe has none. As when the recorded lines were measured.
ROUNDS: dict[str, Scalar] = {
    "privacy-model": "central",
    "discriminator-width": 16,
    "expected-batch": 25.0,
    "moment-noise-multiplier": 0.7,
    "moment-steps": 1200,
    "moment-lr": 2e-3,
    "num-rounds": 60,
    "generator-batch": 128,
    "moment-weight": 4.0,
}


def split(data: str, folder: Path) -> tuple[Path, FaceDataset]:
    """A file with the faces to train on, and those held out."""
    config = load_recipe("utkface", {"data": data})
    faces = load_faces(config.simulation, config.model.image_size, config.model.channels)
    order = np.random.default_rng(0).permutation(len(faces))
    path = folder / "train.npz"
    faces.subset(order[HELD_OUT:]).save(path)
    return path, faces.subset(order[:HELD_OUT])


def run_arm(arm: str, train: Path, held: FaceDataset, overrides: dict[str, Scalar]) -> dict[str, Any]:
    """Train one arm and measure it."""
    began = time.monotonic()
    saved: dict[str, Scalar] = {"data": str(train), "attributes": "", "label-column": "", "label-values": ""}
    config = load_recipe("utkface", {**ROUNDS, **saved, **ARMS[arm], **overrides})
    with tempfile.TemporaryDirectory() as scratch:
        state, faces = prepare(Path(scratch) / "run", config)
        outcome = simulate(Path(scratch) / "run", state, faces, [PlainProgress()])
        images, labels = TrainedGenerator.load(Path(scratch) / "run").draw(SYNTHETIC, seed=1)
    fakes, real = (torch.from_numpy(each).float().div(127.5).sub(1) for each in (images, held.images))
    accuracy = synthetic_accuracy(
        torch.from_numpy(images),
        torch.from_numpy(labels),
        torch.from_numpy(held.images),
        torch.from_numpy(held.labels),
        seed=0,
    )
    races = held.attributes["race"]
    return {
        "arm": arm,
        "frechet": round(FrechetDistance([real])([fakes]), 1),
        "frechet_by_race": {
            str(race): round(FrechetDistance([real[torch.from_numpy(races == race)]])([fakes]), 1)
            for race in np.unique(races)
        },
        "gender_accuracy": round(100 * accuracy, 1),
        "epsilon_rdp": epsilon_so_far(state),
        "epsilon_prv": round(max(outcome.ledgers)[1], 3) if outcome.ledgers else None,
        "unit": str(config.privacy.unit),
        "privacy_model": str(config.privacy.privacy_model),
        "clients": config.simulation.num_clients,
        "rounds": state.next_round - 1,
        "seed": config.training.seed,
        "seconds": round(time.monotonic() - began),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "torch": torch.__version__,
        "overrides": overrides,
    }


def main() -> None:
    """Run the arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of UTKFace images")
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other options of the recipe")
    options = parser.parse_args()
    overrides = settings(options.set)
    with tempfile.TemporaryDirectory() as folder:
        train, held = split(options.data, Path(folder))
        for seed in options.seed:
            for arm in options.arm:
                row = run_arm(arm, train, held, {**overrides, "seed": seed})
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                by_race = "  ".join(f"{race} {value}" for race, value in row["frechet_by_race"].items())
                print(
                    f"{arm:<10} seed {seed}  frechet {row['frechet']:>7}  gender {row['gender_accuracy']:>5} %  "
                    f"epsilon {row['epsilon_rdp']}  {row['seconds']} s  ({by_race})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
