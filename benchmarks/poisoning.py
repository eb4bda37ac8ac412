"""Ten clients of which two lie: accuracy under each aggregator, and what became of the updates.

    python benchmarks/poisoning.py --data FOLDER [--attack none flip scale both] [--aggregator mean ...] [--bound 4 0]
                                   [--epsilon 10] [--seed 0]

The recipe mnist (FOLDER holds its four IDX files) under privacy-model local, with the real apps, in the shortened run of
benchmarks/distributed.py: 300 generator steps of the moment stage with batches of 250, then 20 rounds. Two of the ten clients
multiply their updates, noise and all, in the moment round and in every other one: by -1 (flip), by 10 (scale) or by
-10 (both). No client's privacy keeps it from doing so. poisoners = 0.2, update-bound as said (0: none).

accuracy   of a CNN trained on generated digits and tested on the real test set.
cosine     between what the aggregator made of a round and the mean of the honest updates, noise included; of the moment round,
           and the median of the others. length: the former's norm over the latter's.
lies       of the 21 rounds, those in which Krum chose a liar's update.

Appends a JSON line each to benchmarks/results/poisoning.jsonl, leaves out what is there, and prints all.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from settings import ADVERSARIAL, keep

from client.app import app as shipped_client_app
from common.applications.generate import TrainedGenerator
from common.cohort import AGGREGATORS
from common.config import RunConfig
from common.evaluation.utility import synthetic_accuracy
from common.faces import load_faces
from common.fields import Scalar
from common.messages import Stage
from server.checkpoint import CoordinatorState
from server.records import epsilon_so_far
from simulations.recipe import load_recipe
from simulations.simulate import prepare, simulate

RESULTS = Path(__file__).parent / "results" / "poisoning.jsonl"
SYNTHETIC_IMAGES = 10_000
CLIENTS, LIARS = 10, (2, 3)  # node ids begin with 2
ATTACKS = {"none": 1.0, "flip": -1.0, "scale": 10.0, "both": -10.0}
# Over epsilon: the moment release takes a like part of any budget, and the recipe's of 10.
MOMENT_NOISE = 15.0
SETTINGS: dict[str, Scalar] = {
    "moment-steps": 300,
    "moment-batch": 250,
    "num-rounds": 20,
    "privacy-model": "local",
    "num-clients": CLIENTS,
    "min-clients": 5,
    "poisoners": 0.2,
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What one line is about."""

    attack: str
    aggregator: str
    bound: float
    epsilon: float
    seed: int

    def config(self, data: str) -> RunConfig:
        """Its run."""
        changes: dict[str, Scalar] = {
            "aggregator": self.aggregator,
            "update-bound": self.bound,
            "epsilon": self.epsilon,
            "moment-noise-multiplier": MOMENT_NOISE / self.epsilon,
            "seed": self.seed,
        }
        return load_recipe("mnist", {**ADVERSARIAL, **SETTINGS, **changes, "data": data})


class Poisoned(ClientApp):
    """The shipped ClientApp, at two nodes in the hands of liars. sent: by node, what left each in this round."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = np.float32(factor)
        self.sent: dict[int, np.ndarray] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        """As shipped, but for the liars' vectors."""
        reply = shipped_client_app(message, context)
        array = reply.content["arrays"]["vector"]
        vector = np.frombuffer(array.data, np.float32)
        if context.node_id in LIARS:
            vector = vector * self._factor
            lie = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=vector.tobytes())
            record = RecordDict({"update": reply.content["update"], "arrays": ArrayRecord({"vector": lie})})
            reply = Message(record, reply_to=message)
        self.sent[context.node_id] = vector
        return reply


class Watch:
    """An observer that compares what came out of each round to what went in."""

    def __init__(self, app: Poisoned) -> None:
        self._app = app
        self.rounds: list[tuple[str, float, float, bool]] = []

    def fit_stepped(self, state: CoordinatorState) -> None:
        """Not a round."""

    def round_ended(self, state: CoordinatorState) -> None:
        """Keep the round's figures."""
        if state.released is None:
            return
        instructions, released = state.released
        privacy, made = instructions.privacy, released.numpy().astype(np.float64)
        moments = instructions.stage is Stage.MOMENTS
        made *= privacy.declared_units / max(instructions.model.num_classes, 1) if moments else privacy.expected_batch
        honest = np.mean([v for node, v in self._app.sent.items() if node not in LIARS], axis=0, dtype=np.float64)
        lied = any(cosine(made, self._app.sent[node]) > 1 - 1e-6 for node in LIARS)
        length = float(np.linalg.norm(made) / np.linalg.norm(honest))
        self.rounds.append((str(instructions.stage), cosine(made, honest), length, lied))

    def figures(self) -> Row:
        """Of the whole run."""
        row: Row = {"lies": sum(lied for *_, lied in self.rounds)}
        for stage in Stage:
            of_stage = [(angle, length) for name, angle, length, _ in self.rounds if name == stage]
            row[f"cosine_{stage}"] = round(statistics.median(angle for angle, _ in of_stage), 4)
            row[f"length_{stage}"] = round(statistics.median(length for _, length in of_stage), 4)
        return row


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Of the angle between two vectors."""
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def measure(data: str, cell: Cell) -> Row:
    """One line."""
    began, config = time.monotonic(), cell.config(data)
    app = Poisoned(ATTACKS[cell.attack])
    watch = Watch(app)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "run"
        state, digits = prepare(directory, config)
        simulate(directory, state, digits, [watch], app)
        images, labels = TrainedGenerator.load(directory).draw(SYNTHETIC_IMAGES, seed=1)
    real = load_faces(config.simulation, config.model.image_size, config.model.channels, split="test")
    tensors = [torch.from_numpy(array) for array in (images, labels, real.images, real.labels)]
    return {
        **asdict(cell),
        "accuracy": round(100 * synthetic_accuracy(*tensors, seed=0), 2),
        **watch.figures(),
        "noise_multiplier": round(state.config.privacy.noise_multiplier, 4),
        "rounds": state.next_round - 1,
        "epsilon_rdp": epsilon_so_far(state),
        "run_seconds": round(time.monotonic() - began),
        "settings": SETTINGS,
        "command": f"python benchmarks/poisoning.py --data FOLDER {' '.join(f'--{k} {v}' for k, v in asdict(cell).items())}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "torch": torch.__version__,
    }


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """What is asked for. The robust aggregators have the bound's default, the mean is seen without it too."""
    asked = product(options.epsilon, options.seed, options.attack, options.aggregator, options.bound)
    for epsilon, seed, attack, aggregator, bound in asked:
        if aggregator == "mean" or bound == options.bound[0]:
            yield Cell(attack, aggregator, bound, epsilon, seed)


def read_rows() -> dict[Cell, Row]:
    """All that was measured."""
    lines = RESULTS.read_text("utf-8").splitlines() if RESULTS.exists() else []
    return {Cell(*(row[field.name] for field in fields(Cell))): row for row in map(json.loads, lines)}


def show(rows: dict[Cell, Row]) -> None:
    """Print a table."""
    columns = ("accuracy", "cosine_moments", "length_moments", "cosine_gradients", "length_gradients", "lies")
    print(f"{'attack':<8}{'aggregator':<14}{'bound':>6}{'epsilon':>8}{'seed':>5}  {'  '.join(columns)}")
    for cell, row in rows.items():
        head = f"{cell.attack:<8}{cell.aggregator:<14}{cell.bound:>6g}{cell.epsilon:>8g}{cell.seed:>5}"
        print(head, *(f" {row[column]!s:>{len(column)}}" for column in columns))


def main() -> None:
    """Measure what was asked for and is not there yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the four IDX files; without it, what was measured is shown")
    parser.add_argument("--attack", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--aggregator", nargs="+", choices=AGGREGATORS, default=list(AGGREGATORS))
    parser.add_argument("--bound", type=float, nargs="+", default=[4.0, 0.0])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[10.0])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_rows()
    for cell in cells(options) if options.data else ():
        if cell not in rows:
            rows[cell] = measure(str(Path(options.data).resolve()), cell)
            keep(RESULTS, rows[cell])
    show(rows)


if __name__ == "__main__":
    main()
