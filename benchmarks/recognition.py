"""Do synthetic faces help face recognition? One recogniser with them and without, from the same photographs.

    python benchmarks/recognition.py orl --data ORL [--generator RUN] [--arm none ...] [--shots 2 3 5] [--seed 0 ... 9]
    python benchmarks/recognition.py lfw --data LFW [--data REST] --pairs PAIRS [--generator RUN] [--arm ...] [--seed 0 1 2]

    none         photographs alone
    pretrain     synthetic faces first, without names
    identities   synthetic persons as classes beside the real ones
    variation    synthetic faces near each photograph, with its name

orl: identification of 40 persons from `--shots` photographs of each, tested on five others; each seed is another division. lfw:
verification, trained on the persons outside folds 9 and 10, a tenth of them kept to choose the threshold on, and tested on the
pairs of these folds. All arms of a task take as many steps, to a pass over the data (pretrain's first stage comes on top, and is in
the row).

A generator must not have learned from what is tested on: `--make RUN` trains the one that `--generator` takes on just the photographs
of lfw that the recogniser may see, those kept for its threshold among them: `visard simulate lfw`, epsilon 10 for each person.

Each run appends a JSON line to benchmarks/results/recognition.jsonl; one that is there is not done again. Without --data what was
measured is shown: means over the seeds with 95 % intervals by Student's t, and what each arm adds, seed by seed.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from settings import declared, keep, mean_and_interval

from common.applications.generate import TrainedGenerator
from common.evaluation.disturbances import robustness
from common.faces import SkippedImages
from common.faces.dataset import FaceDataset
from common.fields import Scalar
from common.recognition.album import Album, read_album, split_photographs
from common.recognition.preparation import prepare
from common.recognition.settings import RecognitionConfig
from common.recognition.training import steps_an_epoch, train_recogniser
from common.sections import FaceSource
from server.progress import PlainProgress
from simulations.recipe import load_recipe
from simulations.recognise import Asked, asked_pairs, evaluate_verification, verify_pairs, without_pairs
from simulations.simulate import prepare as prepare_run
from simulations.simulate import simulate

RESULTS = Path(__file__).parent / "results" / "recognition.jsonl"
FOLDS = (9, 10)
MOST_SHOTS = 5
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "pretrain": {"use": "pretrain", "synthetic": 2000, "pretrain_epochs": 10},
    "identities": {"use": "identities", "synthetic": 200, "variations": 4},
    "variation": {"use": "variation", "variations": 2},
}
CONFIGS = {
    "orl": RecognitionConfig(
        image_size=64,
        channels=1,
        network="cnn",
        width=16,
        batch=32,
        goal="identify",
        validation=0.0,
        epochs=60,
        augment="flip,crop,rotation,colour,erase",  # these faces are not levelled
    ),
    "lfw": RecognitionConfig(detect="largest", crop=0.7, epochs=30),
}
Row = dict[str, Any]


def config_of(task: str, arm: str, seed: int, epochs: int) -> RecognitionConfig:
    """The recogniser of an arm, before its epochs are matched."""
    return dataclasses.replace(CONFIGS[task], **ARMS[arm], seed=seed, epochs=epochs or CONFIGS[task].epochs)


def trained(album: Album, config: RecognitionConfig, generator: TrainedGenerator | None, steps: int) -> tuple[Any, Row]:
    """A recogniser after about `steps` steps, and what it was."""
    began = time.monotonic()
    prepared = prepare(album, config, generator if config.use != "none" else None)
    each = steps_an_epoch(len(prepared.lesson.images), config)
    config = dataclasses.replace(config, epochs=max(1, round(steps / each)))
    found = train_recogniser(
        prepared.lesson,
        prepared.kept,
        config,
        unlabelled=prepared.unlabelled,
        observer=lambda *told: print(*told, flush=True) if told[1] % 5 == 0 else None,
    )
    before = (
        0 if prepared.unlabelled is None else steps_an_epoch(len(prepared.unlabelled), config) * config.pretrain_epochs
    )
    told = {
        "learned_from": prepared.told,
        "steps": each * config.epochs,
        "pretrain_steps": before,
        "seconds": round(time.monotonic() - began),
        "figure": found.figure,
    }
    return dataclasses.replace(found, names=list(prepared.names)), told


def run_orl(album: Album, arm: str, seed: int, shots: int, options: argparse.Namespace, generator: Any) -> Row:
    """One division: accuracy on five photographs of each person, also disturbed."""
    learned, tested = split_photographs(album.persons, MOST_SHOTS, np.random.default_rng(seed))
    few = album.subset(learned)
    if shots < MOST_SHOTS:
        few = few.subset(split_photographs(few.persons, shots, np.random.default_rng(seed))[0])
    config = config_of("orl", arm, seed, options.epochs)
    # As many as with five photographs of each: fewer photographs are gone through more often.
    steps = config.epochs * steps_an_epoch(len(learned), config)
    recogniser, told = trained(few, config, generator, steps)
    test = album.subset(tested)

    def accuracy(images: np.ndarray) -> float:
        return float((recogniser.scores(images).argmax(1).numpy() == test.persons).mean())

    disturbed = {name: np.mean(some) for name, some in robustness(accuracy, test.faces.images, seed=0).items()}
    return {"accuracy": round(100 * disturbed.pop("none"), 2), "disturbed": percent(disturbed), **told}


def run_lfw(album: Album, asked: Asked, arm: str, seed: int, options: argparse.Namespace, generator: Any) -> Row:
    """Verification on the pairs of the folds that nothing was learned from, also disturbed."""
    left, config = without_pairs(album, asked), config_of("lfw", arm, seed, options.epochs)
    steps = config.epochs * steps_an_epoch(
        len(prepare(left, dataclasses.replace(config, use="none")).lesson.images), config
    )
    recogniser, told = trained(left, config, generator, steps)
    threshold = recogniser.needed_threshold()
    found = evaluate_verification(recogniser, album, asked, threshold, [], disturbed=True)
    _, figures = verify_pairs(recogniser, album.faces.images, asked.pairs, threshold)
    return {
        "accuracy": round(100 * figures["accuracy"], 2),
        "auc": round(100 * figures["auc"], 2),
        "tar_at_far": {str(far): rate for far, rate in figures["tar_at_far"].items()},
        "missing": asked.missing,
        "disturbed": percent({name: np.mean(some) for name, some in found["robustness"].items() if name != "none"}),
        **told,
    }


def percent(shares: dict[str, Any]) -> dict[str, float]:
    """Shares in percent: means over the three severities."""
    return {name: round(100 * float(share), 2) for name, share in shares.items()}


def make(run: Path, album: Album, asked: Asked, seed: int) -> None:
    """The generator: the recipe `lfw` on what the recogniser may see, cut as its faces are."""
    faces = without_pairs(album, asked).faces
    images = torch.nn.functional.interpolate(torch.from_numpy(faces.images).float(), 32, mode="area")
    several = np.flatnonzero(np.bincount(faces.persons)[faces.persons] > 1)
    smaller = FaceDataset(images.round().to(torch.uint8).numpy(), faces.persons).subset(several)
    run.parent.mkdir(parents=True, exist_ok=True)
    smaller.save(run.with_suffix(".npz"))
    given: dict[str, Scalar] = {"data": str(run.with_suffix(".npz")), "detect": "none", "crop": 1.0, "seed": seed}
    config = load_recipe("lfw", {**given, **declared(smaller, load_recipe("lfw", given))})
    state, held = prepare_run(run, config)
    simulate(run, state, held, [PlainProgress()])


def read_rows() -> list[Row]:
    """All that was measured."""
    return [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()] if RESULTS.exists() else []


def show(rows: Sequence[Row]) -> None:
    """Means over the seeds, and what each arm adds to photographs alone, seed by seed."""
    for task, shots, length in sorted({(row["task"], row["shots"], row["asked_epochs"]) for row in rows}):
        own = [row for row in rows if (row["task"], row["shots"], row["asked_epochs"]) == (task, shots, length)]
        print(f"\n{task}, {f'{shots} photographs a person, ' if shots else ''}{length} epochs")
        bare = {row["seed"]: row for row in own if row["arm"] == "none"}
        for arm in ARMS:
            some = [row for row in own if row["arm"] == arm]
            if some:
                told = [f"accuracy {mean_and_interval([row['accuracy'] for row in some])}"]
                both = [(row, bare[row["seed"]]) for row in some if row["seed"] in bare]
                if arm != "none" and both:
                    told.append(f"added {mean_and_interval([a['accuracy'] - b['accuracy'] for a, b in both])}")
                for name in some[0]["disturbed"]:
                    told.append(f"{name} {np.mean([row['disturbed'][name] for row in some]):.1f}")
                print(f"{arm:<11}{len(some):>3} seeds  {'  '.join(told)}")


def main() -> None:
    """Measure what was asked for and is not there yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=("orl", "lfw"), default="orl")
    parser.add_argument(
        "--data", action="append", help="folder of persons' folders; without it, what was measured is shown"
    )
    parser.add_argument("--pairs", type=Path, help="LFW's pairs.txt")
    parser.add_argument("--generator", type=Path, help="folder of a finished run")
    parser.add_argument("--make", type=Path, help="train that generator first, into this folder, where it is not there")
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=["none"])
    parser.add_argument("--shots", type=int, nargs="+", default=[5])
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=0, help="in place of the task's own")
    options = parser.parse_args()
    if not options.data:
        show(read_rows())
        return
    warnings.simplefilter("ignore", SkippedImages)
    if options.task == "orl" and options.make is not None:
        parser.error("--make is for lfw: forty persons give no generator")
    album = read_album([FaceSource(data=folder) for folder in options.data], CONFIGS[options.task])
    asked = None
    if options.task == "lfw":
        if options.pairs is None:
            parser.error("lfw needs --pairs")
        asked = asked_pairs(album, options.pairs, FOLDS)
        if options.make is not None and not (options.make / "generator.safetensors").exists():
            make(options.make, album, asked, seed=0)
    place = options.generator or options.make
    generator = None if place is None else TrainedGenerator.load(place)
    for seed in options.seed:
        for shots in options.shots if options.task == "orl" else [0]:
            for arm in options.arm:
                length = options.epochs or CONFIGS[options.task].epochs
                config = json.dumps(config_of(options.task, arm, seed, length).to_flat())
                key = {"task": options.task, "arm": arm, "seed": seed, "shots": shots, "asked_epochs": length}
                key |= {"generator": "" if place is None or arm == "none" else place.name}
                key |= {"config": hashlib.sha256(config.encode()).hexdigest()[:12]}
                if any(key.items() <= row.items() for row in read_rows()):
                    continue
                if asked is None:
                    figures = run_orl(album, arm, seed, shots, options, generator)
                else:
                    figures = run_lfw(album, asked, arm, seed, options, generator)
                row = {
                    **key,
                    **figures,
                    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                    "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
                    "torch": torch.__version__,
                }
                keep(RESULTS, row)
                print(arm, f"seed {seed}", figures["accuracy"], f"{figures['seconds']} s", flush=True)
    show(read_rows())


if __name__ == "__main__":
    main()
