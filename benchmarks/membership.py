"""Membership inference on MNIST: a run without privacy, which must be found out, and private ones, which must not.

    python benchmarks/membership.py --data FOLDER [--arm control private recipe] [--seed 0] [--non-members test train]

control: 500 training images at five clients, no privacy, trained until the discriminator knows them by heart. private: the
same networks and rates under privacy-model central at epsilon 10, for 300 rounds. recipe: `visard simulate mnist`, all
training images, with fewer moment steps and rounds, its noise calibrated to them. Non-members are the 10,000 test digits,
or 10,000 training digits that the run does not get (the recipe then trains on 50,000): the two kinds have other writers.
Each arm appends one JSON line to benchmarks/results/membership.jsonl.
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

import numpy as np
import torch
from settings import ADVERSARIAL, settings

from common.config import RunConfig
from common.faces import FaceDataset, load_faces
from common.fields import Scalar
from common.sections import FaceSource
from server.progress import PlainProgress
from server.records import epsilon_so_far
from simulations.audit.membership import MembershipAudit, audit_membership, load_holdout
from simulations.recipe import load_recipe
from simulations.simulate import prepare, simulate

RESULTS = Path(__file__).parent / "results" / "membership.jsonl"
NON_MEMBERS = 10_000
# Least squares never saturates: the discriminator goes on pulling every digit that it knows to the same logit, and has
# five steps for one of the generator to do so.
MEMORISE: dict[str, Scalar] = {
    "num-clients": 5,
    "sample-rate": 1.0,
    "expected-batch": 100.0,
    "discriminator": "mlp",
    "discriminator-width": 16,
    "generator-width": 16,
    "generator-batch": 64,
    "loss": "least-squares",
    "discriminator-steps": 5,
    "discriminator-lr": 3e-4,
    "generator-lr": 1e-3,
    "adam-beta1": 0.5,
    "moment-rounds": 0,
    "moment-weight": 0.0,
    "num-rounds": 1500,
    "sample-every": 1500,
}
# Training images, and options over the recipe `mnist`.
ARMS: dict[str, tuple[int, dict[str, Scalar]]] = {
    "control": (500, {**MEMORISE, "privacy-model": "none", "checkpoint-every": 1500}),
    "private": (500, {**MEMORISE, "num-rounds": 300}),
    "recipe": (60_000, {"moment-steps": 300, "num-rounds": 100}),
}


def dealt_and_held_out(data: str, count: int, non_members: str, seed: int, folder: Path) -> Path:
    """A file whose split 'train' is `count` training digits, or all but the non-members, and 'test' the non-members."""
    train, test = (load_faces(FaceSource(data=data), 28, 1, split=split) for split in ("train", "test"))
    order = np.random.default_rng(seed).permutation(len(train))
    held_out = test if non_members == "test" else train.subset(order[-NON_MEMBERS:])
    spare = 0 if non_members == "test" else NON_MEMBERS
    dealt = train.subset(np.sort(order[: min(count, len(train) - spare)]))
    path = folder / "digits.npz"
    arrays = {
        f"{kind}_{split}": array
        for split, faces in (("train", dealt), ("test", held_out))
        for kind, array in _plain(faces)
    }
    np.savez(path, allow_pickle=False, **arrays)
    return path


def _plain(faces: FaceDataset) -> list[tuple[str, np.ndarray]]:
    return [("x", faces.images[:, 0]), ("y", np.asarray(faces.labels))]


def arm_config(arm: str, data: Path, overrides: dict[str, Scalar]) -> RunConfig:
    """The recipe `mnist`, adversarial, with the arm's options, and with those given on top."""
    return load_recipe("mnist", {**ADVERSARIAL, **ARMS[arm][1], **overrides, "data": str(data)})


def run_arm(
    arm: str, data: str, non_members: str, seed: int, overrides: dict[str, Scalar]
) -> tuple[MembershipAudit, dict[str, object]]:
    """Train one arm, attack it, and say what came of it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        file = dealt_and_held_out(data, ARMS[arm][0], non_members, seed, Path(scratch))
        config = arm_config(arm, file, {**overrides, "seed": seed})
        directory = Path(scratch) / arm
        state, digits = prepare(directory, config)
        simulate(directory, state, digits, [PlainProgress()])
        trained = time.monotonic() - began
        audit = audit_membership(directory, load_holdout(state.config), seed=seed)
    given = "".join(f" {key}={value}" for key, value in overrides.items())
    return audit, {
        "command": f"python benchmarks/membership.py --data FOLDER --arm {arm} --seed {seed} --non-members {non_members}"
        + (f" --set{given}" if given else ""),
        "arm": arm,
        "non_members_from": non_members,
        "seed": seed,
        "clients": state.config.simulation.num_clients,
        "rounds": state.next_round - 1,
        "generator_steps": state.generator_steps,
        "noise_multiplier": round(state.config.privacy.noise_multiplier, 4),
        "epsilon_rdp": epsilon_so_far(state),
        "audit": dataclasses.asdict(audit),
        "train_seconds": round(trained),
        "seconds": round(time.monotonic() - began),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "torch": torch.__version__,
    }


def main() -> None:
    """Run the arms that were asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with the four IDX files of MNIST")
    parser.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--non-members", nargs="+", choices=["test", "train"], default=["test"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other options of the recipe")
    options = parser.parse_args()
    lines = [f"{'arm':<9}{'seed':>5} {'attack':<12}{'AUC':>7}{'95 %':>16}{'TPR @ 0.1 %':>13}{'95 %':>18}"]
    for non_members in options.non_members:
        for seed in options.seed:
            for arm in options.arm:
                audit, row = run_arm(arm, options.data, non_members, seed, settings(options.set))
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                lines += [f"{audit.members} members, {audit.non_members} non-members of '{non_members}'"]
                lines += table(arm, seed, audit)
    print("\n".join(lines))


def table(arm: str, seed: int, audit: MembershipAudit) -> list[str]:
    """A line an attack, and a line a ceiling."""
    lines = []
    for attack in audit.attacks:
        line = f"{arm:<9}{seed:>5} {attack.attack:<12}{attack.auc:>7.3f}{f'{attack.auc_low:.3f} - {attack.auc_high:.3f}':>16}"
        if attack.tpr is not None:
            line += f"{attack.tpr:>13.4f}{f'{attack.tpr_low:.4f} - {attack.tpr_high:.4f}':>18}"
        lines.append(line)
    for ceiling in audit.ceilings:
        name = f"<= {ceiling.guarantee}" + ("" if ceiling.rigorous else " (yardstick)")
        lines.append(f"{name:<27}{ceiling.auc:>7.3f}{ceiling.tpr:>29.4f}")
    return lines


if __name__ == "__main__":
    main()
