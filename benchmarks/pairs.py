"""Every discriminator with every generator: seconds, memory, and the distance of what comes out to public faces.

    python benchmarks/pairs.py [--rounds 100] [--size 32]

Each pair trains in a process of its own: the moment stage, then that many private rounds (central, epsilon 10 a person) on drawn
faces. The distance (common/evaluation/fidelity.py) is to 2,000 drawn faces of other persons, after the moment stage and at the end;
the first line says how far two such sets of drawn faces are from each other. Appends JSON lines to benchmarks/results/pairs.jsonl.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common.config import RunConfig
from common.evaluation.fidelity import FrechetDistance
from common.faces import load_faces
from common.models.discriminators import DISCRIMINATORS, discriminator_of
from common.models.flat import num_parameters
from common.models.generators import GENERATORS, generator_of
from common.sections import FaceSource
from server.checkpoint import CoordinatorState
from simulations.simulate import prepare, simulate

RESULTS = Path(__file__).parent / "results" / "pairs.jsonl"
PUBLIC = "procedural:persons=1000,images=2,first=100000"
RECIPE = {
    "data": "procedural:persons=4000,images=2",
    "num-clients": 10,
    "crop": 0.8,
    "images-per-person": 2,
    "sample-rate": 0.05,
    "expected-batch": 20.0,
    "moment-noise-multiplier": 0.8,
    "moment-steps": 200,
    "moment-batch": 128,
    "moment-weight": 1.0,
    "discriminator-width": 16,
    "generator-width": 16,
    "reference": PUBLIC,
}


class Watch:
    """An observer that keeps the distance and the time at the end of either stage."""

    def __init__(self) -> None:
        self.frechet: dict[str, float] = {}
        self.round_seconds: list[float] = []

    def fit_stepped(self, state: CoordinatorState) -> None:
        """Keep what was measured."""
        if "frechet" in state.last:
            self.frechet["moments"] = state.last["frechet"]

    def round_ended(self, state: CoordinatorState) -> None:
        """Keep what was measured."""
        if state.last["stage"] == "gradients":
            self.round_seconds.append(state.last["seconds"])
        if "frechet" in state.last and state.last["stage"] == "gradients":
            self.frechet["rounds"] = state.last["frechet"]


def measure(generator: str, discriminator: str, size: int, rounds: int) -> dict[str, Any]:
    """Train one pair in this process."""
    config = RunConfig.from_flat(
        {
            **RECIPE,
            "generator": generator,
            "discriminator": discriminator,
            "image-size": size,
            "num-rounds": rounds,
            "sample-every": rounds,
        }
    )
    watch, began = Watch(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        state, faces = prepare(Path(scratch) / "run", config)
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = simulate(Path(scratch) / "run", state, faces, [watch])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "generator": generator,
        "discriminator": discriminator,
        "image_size": size,
        "generator_parameters": num_parameters(generator_of(config.model)),
        "discriminator_parameters": num_parameters(discriminator_of(config.model)),
        "rounds": rounds,
        "seconds": round(time.monotonic() - began, 1),
        "ms_per_round": round(1000 * sorted(watch.round_seconds)[len(watch.round_seconds) // 2]),
        "peak_mib_over_start": round((peak - start) / 1024),
        "frechet_after_moments": watch.frechet["moments"],
        "frechet_after_rounds": watch.frechet["rounds"],
        "epsilon_rdp": round(max(outcome.ledgers)[0], 3),
        "seed": config.training.seed,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "torch": torch.__version__,
    }


def between_drawn_sets(size: int) -> float:
    """The distance of as many drawn faces, of other persons still, to the reference: what would be perfect."""
    sets = [
        load_faces(FaceSource(data=data, crop=RECIPE["crop"]), size, 3)
        for data in (PUBLIC, PUBLIC.replace("100000", "200000"))
    ]
    real, fresh = (torch.from_numpy(faces.images).float().div(127.5).sub(1) for faces in sets)
    return round(FrechetDistance([real])([fresh]), 2)


def main() -> None:
    """Run all pairs, each in its process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument(
        "--pair", nargs=2, metavar=("GENERATOR", "DISCRIMINATOR"), help="only this one, in this process"
    )
    options = parser.parse_args()
    if options.pair:
        print(json.dumps(measure(*options.pair, options.size, options.rounds)))
        return
    print(f"between two sets of drawn faces: {between_drawn_sets(options.size)}")
    print(f"{'generator':<12}{'discriminator':<15}{'s':>6}{'ms/round':>10}{'MiB':>7}{'moments':>9}{'rounds':>8}")
    for generator in GENERATORS:
        for discriminator in DISCRIMINATORS:
            command = [sys.executable, __file__, "--pair", generator, discriminator]
            command += ["--rounds", str(options.rounds), "--size", str(options.size)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{generator:<12}{discriminator:<15}{row['seconds']:>6.0f}{row['ms_per_round']:>10}"
                f"{row['peak_mib_over_start']:>7}{row['frechet_after_moments']:>9.1f}{row['frechet_after_rounds']:>8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
