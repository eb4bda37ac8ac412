"""How good the generated images are for their epsilon: accuracy of classifiers trained on them, and distance to images held out.

    python benchmarks/quality.py RECIPE --data FOLDER [--arm recipe ...] [--epsilon 1 10] [--seed 0 1 2] [--set KEY=VALUE ...]

RECIPE is mnist, fashion-mnist, or one of faces (utkface, lfw, a path to a .toml). Each arm is `visard simulate RECIPE` with other
options:

    recipe       as it stands
    moments      digits: the moment release alone, with all of epsilon and as many generator steps (the faces' recipes are that)
    central      a trusted curator in place of the secure sum
    none         the recipe without privacy
    adversarial  the moments, then a convolutional discriminator of real against fake, by a trusted curator
    plain        the same without moments, a plain DP-GAN
    prior        drawn faces alone: no client is asked anything
    public       the recipe, begun from drawn faces (--set public=SOURCE public-steps=N: from others)
    real         no run: the training images themselves in place of generated ones

The images of reference are the test set, or 1,000 photographs held out before the run (whole persons where persons are protected);
they play no part in it, and are looked at once, after it. Each run appends a JSON line to benchmarks/results/quality.jsonl; one that
is there already is not done again (take its line out after a change to the recipe, and its folder), and one that was interrupted goes
on, with --keep.
Without --data what was measured is shown: means over the seeds, and what a public start adds to the recipe, seed by seed, with
95 % intervals by Student's t.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from settings import ADVERSARIAL, declared, hold_out, keep, mean_and_interval, settings

from common.applications.generate import TrainedGenerator
from common.config import RunConfig
from common.evaluation.fidelity import measure_fidelity
from common.evaluation.utility import CLASSIFIERS, synthetic_accuracy
from common.faces import FaceDataset, load_faces
from common.fields import Scalar
from server.checkpoint import FILE_NAME
from server.prior import public_faces
from server.progress import PlainProgress
from server.records import epsilon_so_far
from simulations.recipe import load_recipe
from simulations.simulate import Outcome, prepare, simulate

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
DIGITS = ("mnist", "fashion-mnist")
PUBLIC: dict[str, Scalar] = {"public": "procedural:persons=1000,images=5,first=100000", "public-steps": 400}
SYNTHETIC_FACES = 5000
# As many as the training set has.
SYNTHETIC_DIGITS = 60_000
ARMS: dict[str, dict[str, Scalar]] = {
    "recipe": {},
    "moments": {"num-rounds": 0, "refine-steps": 0},
    "central": {"privacy-model": "central"},
    "none": {"privacy-model": "none"},
    "adversarial": {"moment-noise-multiplier": 0.0},
    "plain": {"moment-rounds": 0},
    "prior": {"moment-rounds": 0, "num-rounds": 0, "refine-steps": 0},
    "public": {},
    "real": {},
}
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: what is asked for."""

    recipe: str
    arm: str
    epsilon: float
    seed: int
    settings: str
    synthetic: int

    def config(self, given: dict[str, Scalar]) -> RunConfig:
        """The recipe with the arm's options; `given` says where the faces are."""
        # Those of public faces are in `given`.
        own = {key: value for key, value in settings(self.settings.split()).items() if key not in PUBLIC}
        budget: dict[str, Scalar] = {"epsilon": self.epsilon, "seed": self.seed}
        rounds = rounds_against_fakes(self.recipe) if self.arm in ("adversarial", "plain") else {}
        if self.arm not in ("prior", "public"):
            given = {key: value for key, value in given.items() if key not in PUBLIC}
        config = load_recipe(self.recipe, {**given, **rounds, **own, **ARMS[self.arm], **budget})
        if self.arm == "moments":
            # In place of those of the rounds and of the refinement.
            whole = load_recipe(self.recipe, {**given, **own})
            more = whole.training.num_rounds // whole.training.discriminator_steps + whole.training.refine_steps
            moments = dataclasses.replace(config.moments, moment_steps=config.moments.moment_steps + more)
            config = dataclasses.replace(config, moments=moments)
        return config

    @property
    def name(self) -> str:
        """Of its folder."""
        own = hashlib.sha256(self.settings.encode()).hexdigest()[:8] if self.settings else "as-it-is"
        return f"{Path(self.recipe).stem}-{self.arm}-{self.epsilon:g}-{self.seed}-{own}"


def rounds_against_fakes(recipe: str) -> dict[str, Scalar]:
    """Options of a run whose rounds teach a discriminator of real against fake."""
    if recipe in DIGITS:
        return ADVERSARIAL
    own = ("sample-rate", "expected-batch", "moment-noise-multiplier", "moment-steps")
    others = {key: value for key, value in ADVERSARIAL.items() if key not in own}
    # As fast as it takes for a hundred rounds to change anything (benchmarks/dynamics.py).
    faster: dict[str, Scalar] = {"generator-lr": 2e-3, "discriminator-lr": 2e-3, "moment-weight": 1.0}
    return {**others, **faster, "num-rounds": 100, "generator-batch": 128}


def synthetic_count(recipe: str) -> int:
    """Images drawn where no other number is asked for."""
    return SYNTHETIC_DIGITS if recipe in DIGITS else SYNTHETIC_FACES


def split(
    recipe: str, asked: dict[str, Scalar], count: int, folder: Path
) -> tuple[dict[str, Scalar], FaceDataset, FaceDataset]:
    """Where the faces to train on and the public ones are, as options, the former, and the images of reference."""
    config = load_recipe(recipe, {**PUBLIC, **asked})
    size, channels = config.model.image_size, config.model.channels
    if recipe in DIGITS:
        train, test = (load_faces(config.simulation, size, channels, split=split) for split in ("train", "test"))
        return {"data": asked["data"]}, train, test
    faces = load_faces(config.simulation, size, channels)
    train, held = hold_out(faces, count)
    own, public = (folder / f"{Path(recipe).stem}{kind}.npz" for kind in ("", "-public"))
    train.save(own)
    public_faces(config).save(public)
    given: dict[str, Scalar] = {
        "data": str(own),
        "public": str(public),
        "public-steps": config.training.public_steps,
        "attributes": "",
        "label-column": "",
        "label-values": "",
    }
    return {**given, **declared(train, config), "detect": "none", "crop": 1.0}, train, held


def measure(cell: Cell, given: dict[str, Scalar], train: FaceDataset, reference: FaceDataset, runs: Path) -> Row:
    """Train one arm and measure it."""
    began, told = time.monotonic(), {}
    if cell.arm == "real":
        order = np.random.default_rng(0).permutation(len(train))[: cell.synthetic]
        images, labels = train.images[order], None if train.labels is None else train.labels[order]
    else:
        directory = runs / cell.name
        told = run_figures(trained(cell, given, directory))
        images, labels = TrainedGenerator.load(directory).draw(cell.synthetic, seed=1)
    figures = image_figures(torch.from_numpy(images), labels, reference)
    options = f" --set {cell.settings}" if cell.settings else ""
    if cell.synthetic != synthetic_count(cell.recipe):
        options += f" --synthetic {cell.synthetic}"
    return {
        **dataclasses.asdict(cell),
        **figures,
        **told,
        "seconds": round(time.monotonic() - began),  # of this process: an interrupted run took train_seconds in all
        "command": f"python benchmarks/quality.py {cell.recipe} --data FOLDER --arm {cell.arm} --epsilon {cell.epsilon:g} "
        f"--seed {cell.seed}{options}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "torch": torch.__version__,
    }


def image_figures(made: torch.Tensor, labels: np.ndarray | None, reference: FaceDataset) -> Row:
    """Accuracy on the images of reference after training on `made` (N, C, S, S) uint8, and how near they are."""
    real, accuracy = torch.from_numpy(reference.images), {}
    if labels is not None and reference.labels is not None:
        truth = torch.from_numpy(reference.labels)
        for classifier in CLASSIFIERS:
            share = synthetic_accuracy(made, torch.from_numpy(labels), real, truth, seed=0, classifier=classifier)
            accuracy[classifier] = round(100 * share, 2)
    fidelity = dataclasses.asdict(measure_fidelity(made[:SYNTHETIC_FACES], real))
    return {
        "accuracy": accuracy,
        "fidelity": {name: round(v, 4) if isinstance(v, float) else v for name, v in fidelity.items()},
    }


def run_figures(outcome: Outcome) -> Row:
    """What a run was, and what it spent."""
    state, config = outcome.state, outcome.state.config
    return {
        "epsilon_rdp": epsilon_so_far(state),
        "epsilon_prv": round(max(outcome.ledgers)[1], 3) if outcome.ledgers else None,
        "delta": config.privacy.delta,
        "unit": str(config.privacy.unit),
        "privacy_model": str(config.privacy.privacy_model),
        "clients": config.simulation.num_clients,
        "rounds": state.next_round - 1,
        "generator_steps": state.generator_steps,
        "noise_multiplier": round(config.privacy.noise_multiplier, 4),
        "moment_noise_multiplier": round(config.moments.moment_noise_multiplier, 4),
        "train_seconds": round(state.seconds),
    }


def trained(cell: Cell, given: dict[str, Scalar], directory: Path) -> Outcome:
    """The run of `directory`, from wherever it stands."""
    begun = (directory / FILE_NAME).exists()
    state, faces = prepare(directory, None if begun else cell.config(given))
    return simulate(directory, state, faces, [PlainProgress()])


def read_rows(results: Path) -> dict[Cell, Row]:
    """All that was measured."""
    lines = results.read_text("utf-8").splitlines() if results.exists() else []
    names = [field.name for field in dataclasses.fields(Cell)]
    return {Cell(*(row[name] for name in names)): row for row in map(json.loads, lines)}


def told_figures(row: Row) -> dict[str, float]:
    """What is shown of a run: accuracy (%) of each classifier, and fidelity."""
    return {**row["accuracy"], **{name: row["fidelity"][name] for name in ("frechet", "recall", "coverage")}}


def show(rows: dict[Cell, Row]) -> None:
    """Print means over the seeds of every kind of run, and what a public start adds to the recipe at each seed."""
    kinds: dict[Cell, dict[int, dict[str, float]]] = {}
    for cell, row in rows.items():
        kinds.setdefault(dataclasses.replace(cell, seed=0), {})[cell.seed] = told_figures(row)
    for kind, by_seed in list(kinds.items()):
        bare = kinds.get(dataclasses.replace(kind, arm="recipe"), {})
        if kind.arm == "public" and by_seed.keys() & bare.keys():
            kinds[dataclasses.replace(kind, arm="added by it")] = {
                seed: {name: value - bare[seed][name] for name, value in by_seed[seed].items()}
                for seed in by_seed.keys() & bare.keys()
            }
    for kind, by_seed in sorted(kinds.items(), key=lambda item: (item[0].recipe, -item[0].epsilon)):
        names = next(iter(by_seed.values()))
        told = (f"{name} {mean_and_interval([found[name] for found in by_seed.values()])}" for name in names)
        head = f"{kind.recipe:<14}{kind.arm:<12} epsilon {kind.epsilon:g}, {len(by_seed)} seeds"
        print(f"{head}  {'  '.join(told)}  {kind.settings}")


def main() -> None:
    """Measure what was asked for and is not there yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="mnist", help="name of a recipe, or a path to a .toml")
    parser.add_argument("--data", help="the recipe's folder; without it, what was measured is shown")
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=["recipe"])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[10.0])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other options of the recipe")
    parser.add_argument("--synthetic", type=int, default=0, help="images drawn; by default 60000 digits, 5000 faces")
    parser.add_argument("--held-out", type=int, default=1000, help="photographs of faces to compare to")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of what was measured")
    parser.add_argument("--keep", type=Path, help="folder to keep the runs in; what is interrupted goes on from there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.data:
            (options.keep or Path(scratch)).mkdir(parents=True, exist_ok=True)
            data = Path(options.data).resolve() if Path(options.data).exists() else options.data
            asked = {**settings(options.set), "data": str(data)}
            given, train, reference = split(options.recipe, asked, options.held_out, options.keep or Path(scratch))
        for seed in options.seed if options.data else ():
            for epsilon in options.epsilon:
                for arm in options.arm:
                    if arm in ("prior", "public") and options.recipe in DIGITS:
                        parser.error(f"the arm {arm} is for faces")
                    count = options.synthetic or synthetic_count(options.recipe)
                    cell = Cell(options.recipe, arm, epsilon, seed, " ".join(options.set), count)
                    if cell not in read_rows(options.results):
                        row = measure(cell, given, train, reference, options.keep or Path(scratch))
                        keep(options.results, row)
                        show({cell: row})
    show(read_rows(options.results))


if __name__ == "__main__":
    main()
