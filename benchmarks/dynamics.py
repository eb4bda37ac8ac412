"""What helps a discriminator of real against fake under noise? One change at a time, all from one moment checkpoint.

    python benchmarks/dynamics.py --data MNIST [--arm ...] [--seed 0 1 2] [--rounds 100] [--moment-steps 300]

The generator is fitted to the moment release first (half of epsilon 10), once a seed. Every arm begins there and spends the
other half on `--rounds` rounds, one generator step each unless it says otherwise:

    start        nothing more: the checkpoint
    moments      the fit to the same release from the start, with as many generator steps more
    unclipped    rounds without privacy: no clipping, no noise
    clipped      gradients, of fakes too, clipped to 1, no noise
    noised       the same with the noise of epsilon

and the others change one thing of `noised`: `ARMS` says which.

A trusted curator holds all images (one client, `central`), in one process: the loop is the coordinator's, the steps are
the client's. Labels are those asked for. CNN accuracy on the real test set after 10,000 drawn images, and fidelity of
5,000. Each run appends a JSON line to benchmarks/results/dynamics.jsonl; one that is there is not
done again. Without --data what was measured is shown: means over the seeds and 95 % intervals by Student's t.
"""

import argparse
import copy
import dataclasses
import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from flwr.clientapp import ClientApp
from settings import ADVERSARIAL, keep, mean_and_interval

from client.discriminator import gradient_update
from client.moments import moment_update
from common.config import RunConfig
from common.evaluation.fidelity import measure_fidelity
from common.evaluation.utility import synthetic_accuracy
from common.faces import FaceDataset, load_faces
from common.fields import Scalar
from common.messages import DiscriminatorUpdate, RoundInstructions, Stage
from common.models.flat import num_parameters
from common.privacy.planner import with_noise
from common.privacy.randomness import SecureRandom
from common.sections import FaceSource
from server.checkpoint import CheckpointStore, CoordinatorState
from server.coordinator import coordinate
from server.exchange import Exchange
from server.generator import GeneratorTrainer
from server.quality import Judge
from simulations.engine import InProcessGrid
from simulations.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "dynamics.jsonl"
SYNTHETIC, COMPARED = 10_000, 5_000
Row = dict[str, Any]


class Adam(torch.optim.Adam):
    """The discriminator's Adam with what arms change.

    decay: share of the learning rate that weights lose a step (AdamW: Loshchilov and Hutter 2019). noise: variance of the noise in each
    coordinate of the gradient, taken off the second moment before the root (DP-AdamBC: Tang, Shpilevskiy and Lecuyer 2024, algorithm 1;
    the floor under the root is here a tenth of that variance, as a constant would be another for each model). steps: over how many the
    learning rate falls linearly to 0; 0: it stays.
    """

    def __init__(
        self, parameters: list[torch.nn.Parameter], decay: float = 0.0, noise: float = 0.0, steps: int = 0
    ) -> None:
        super().__init__(parameters)
        self._decay, self._noise, self._steps, self._taken = decay, noise, steps, 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step along the parameters' gradients."""
        self._taken += 1
        (group,) = self.param_groups
        if self._steps:
            group["lr"] *= 1 - (self._taken - 1) / self._steps
        for parameter in group["params"]:
            parameter.mul_(1 - group["lr"] * self._decay)
        if not self._noise:
            super().step()
            return
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            slot = self.state[parameter]
            if not slot:
                slot["first"], slot["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            slot["first"].lerp_(parameter.grad, 1 - beta1)
            slot["second"].lerp_(parameter.grad.square(), 1 - beta2)
            first, second = slot["first"] / (1 - beta1**self._taken), slot["second"] / (1 - beta2**self._taken)
            parameter -= group["lr"] * first / (second - self._noise).clamp(min=0.1 * self._noise).sqrt()


@dataclasses.dataclass(frozen=True)
class Arm:
    """One change: options of the run, and what is none."""

    options: dict[str, Scalar] = dataclasses.field(default_factory=dict)
    noise: bool = True
    decay: float = 0.0
    corrected: bool = False
    falling: bool = False


ARMS = {
    "start": Arm(),
    "moments": Arm(),
    "unclipped": Arm({"privacy-model": "none"}),
    "clipped": Arm(noise=False),
    "noised": Arm(),
    "alone": Arm({"moment-weight": 0.0}),
    "adaptive": Arm({"adaptive": True}),
    "normalised": Arm({"max-grad-norm": 0.01}),
    "hinge": Arm({"loss": "hinge"}),
    "projected": Arm({"loss": "wasserstein"}),
    "decay": Arm(decay=1.0),
    "corrected": Arm(corrected=True),
    "falling": Arm(falling=True),
    "large-batch": Arm({"sample-rate": 0.1}),
    "wide": Arm({"discriminator-width": 48}),
    # One linear layer on fixed features, at a rate of its own.
    "scattering": Arm({"discriminator": "scattering", "discriminator-lr": 1e-2}),
    "views": Arm({"augment": "crop", "augment-views": 4}),
}


class Pooled(Exchange):
    """All images at one client, in this process."""

    def __init__(self, faces: FaceDataset, config: RunConfig) -> None:
        super().__init__(InProcessGrid(ClientApp(), []), config.training)
        self._faces = faces

    def wait_for_clients(self, least: int = 0) -> list[int]:
        """The one."""
        return [1]

    def collect(
        self, instructions: RoundInstructions, nodes: list[int], dimension: int, heads: dict[str, str]
    ) -> Iterator[DiscriminatorUpdate]:
        """Its answer."""
        answer = moment_update if instructions.stage is Stage.MOMENTS else gradient_update
        vector = answer(instructions, self._faces, SecureRandom())
        yield DiscriminatorUpdate(instructions.run_id, instructions.server_round, vector)


class Silent(SecureRandom):
    """Noise of nothing, for a control."""

    def gaussian(self, count: int) -> torch.Tensor:
        """Zeros (count,)."""
        return torch.zeros(count, dtype=torch.float64)


def config_of(arm: str, seed: int, options: argparse.Namespace, units: int) -> RunConfig:
    """The whole run of an arm; its noise is calibrated to epsilon 10, half of it for the moments."""
    more = options.rounds if arm == "moments" else 0
    asked: dict[str, Scalar] = {
        **ADVERSARIAL,
        "data": options.data,
        "num-clients": 1,
        "min-clients": 1,
        "seed": seed,
        "epsilon": 10.0,
        "num-rounds": options.rounds,
        "moment-noise-multiplier": 0.0,
        "moment-steps": options.moment_steps + more,
        "moment-lr": 1e-2,
        # A generator that moves: at the rates of a run from scratch, 2e-4 and 5e-4, a hundred rounds change nothing.
        "generator-lr": 2e-3,
        "generator-batch": 200,
        "discriminator-lr": 2e-3,
        "moment-weight": 1.0,
        "sample-every": 10**6,
        **ARMS[arm].options,
    }
    config = load_recipe("mnist", {**asked, "expected-batch": units * float(asked["sample-rate"])})
    config = with_noise(config)
    if arm in ("start", "moments"):
        return dataclasses.replace(config, training=dataclasses.replace(config.training, num_rounds=0))
    return config


def fitted(config: RunConfig, faces: FaceDataset, folder: Path, release: CoordinatorState | None) -> CoordinatorState:
    """The state after the moment stage; release: whose moment release it is fitted to, in place of one of its own."""
    state = CoordinatorState.fresh(config)
    if release is not None:
        state.moment_target, state.next_round = release.moment_target, release.next_round
    coordinate(state, Judge(state), Pooled(faces, config), CheckpointStore(folder), [])
    return state


def checkpoint(seed: int, options: argparse.Namespace, faces: FaceDataset) -> CoordinatorState:
    """Where all arms of a seed begin, fitted once and then kept: its noise is never drawn twice the same."""
    folder = options.keep / Path(options.data).name / f"{seed}-{options.rounds}-{options.moment_steps}"
    folder.mkdir(parents=True, exist_ok=True)
    store = CheckpointStore(folder)
    return (
        store.load()
        if store.path.exists()
        else fitted(config_of("start", seed, options, len(faces)), faces, folder, None)
    )


def run_arm(arm: str, config: RunConfig, start: CoordinatorState, faces: FaceDataset, folder: Path) -> CoordinatorState:
    """The arm's rounds from `start`, which stays as it is."""
    state = CoordinatorState.fresh(config)
    for name in ("generator", "ema", "moment_target", "generator_steps", "next_round"):
        setattr(state, name, copy.deepcopy(getattr(start, name)))
    state.rng.set_state(start.rng.get_state())
    state.generator_optimizer = torch.optim.Adam(state.generator.parameters())
    change, privacy = ARMS[arm], config.privacy
    deviation = privacy.noise_multiplier * privacy.max_grad_norm / privacy.expected_batch
    state.discriminator_optimizer = Adam(
        list(state.discriminator.parameters()),
        change.decay,
        deviation**2 if change.corrected else 0.0,
        config.training.num_rounds if change.falling else 0,
    )
    new_random = SecureRandom if change.noise else Silent
    coordinate(state, Judge(state), Pooled(faces, config), CheckpointStore(folder), [], lambda _state: new_random())
    return state


def measure(state: CoordinatorState, test: FaceDataset) -> dict[str, float]:
    """Figures of the moving average's images."""
    trainer = GeneratorTrainer(dataclasses.replace(state, generator=state.ema, rng=torch.Generator().manual_seed(1)))
    drawn = [trainer.fakes(500) for _ in range(SYNTHETIC // 500)]
    images = torch.cat([some for some, _ in drawn]).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    labels = torch.cat([some for _, some in drawn if some is not None])
    real, truth = torch.from_numpy(test.images), torch.tensor(test.labels)
    found = dataclasses.asdict(measure_fidelity(images[:COMPARED], real))
    accuracy = synthetic_accuracy(images, labels, real, truth, seed=0)
    return {
        "accuracy": round(100 * accuracy, 2),
        **{name: round(found[name], 4) for name in ("frechet", "precision", "recall", "density", "coverage")},
    }


def read_rows() -> list[Row]:
    """All that was measured."""
    return [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()] if RESULTS.exists() else []


def show(rows: list[Row]) -> None:
    """Means over the seeds, and what each arm adds to the checkpoint, seed by seed."""
    for length in sorted({(row["data"], row["rounds"], row["moment_steps"]) for row in rows}):
        print("\n{}, {} rounds after {} moment steps".format(*length))
        chosen = [row for row in rows if (row["data"], row["rounds"], row["moment_steps"]) == length]
        start = {row["seed"]: row["figures"]["accuracy"] for row in chosen if row["arm"] == "start"}
        for arm in ARMS:
            own = [row for row in chosen if row["arm"] == arm]
            if own:
                told = {name: mean_and_interval([row["figures"][name] for row in own]) for name in own[0]["figures"]}
                told["added"] = mean_and_interval(
                    [row["figures"]["accuracy"] - start[row["seed"]] for row in own if row["seed"] in start]
                )
                print(f"{arm:<17}{len(own)} seeds  {'  '.join(f'{name} {value}' for name, value in told.items())}")


def main() -> None:
    """Measure what was asked for and is not there yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="MNIST's folder; without it, what was measured is shown")
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--moment-steps", type=int, default=300)
    parser.add_argument(
        "--keep", type=Path, default=Path("runs/dynamics"), help="folder of the checkpoints to begin at"
    )
    options = parser.parse_args()
    if options.data:
        train, test = (load_faces(FaceSource(data=options.data), 28, 1, split=split) for split in ("train", "test"))
    for seed in options.seed if options.data else ():
        for arm in options.arm:
            key = {"data": Path(options.data).name, "arm": arm, "seed": seed}
            key |= {"rounds": options.rounds, "moment_steps": options.moment_steps}
            if any(key.items() <= row.items() for row in read_rows()):
                continue
            start = checkpoint(seed, options, train)
            config = config_of(arm, seed, options, len(train))
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as name:
                if arm == "start":
                    state = start
                elif arm == "moments":
                    state = fitted(config, train, Path(name), start)
                else:
                    state = run_arm(arm, config, start, train, Path(name))
            seconds = round(time.monotonic() - began)
            figures = measure(state, test)
            noised = config.training.num_rounds > 0 and ARMS[arm].noise
            row = {
                **key,
                "figures": figures,
                "noise_multiplier": round(config.privacy.noise_multiplier, 4) if noised else 0.0,
                "parameters": num_parameters(state.discriminator),
                "generator_steps": state.generator_steps,
                "seconds": seconds,
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
                "torch": torch.__version__,
            }
            keep(RESULTS, row)
            print(arm, seed, figures, f"{seconds} s", flush=True)
    show(read_rows())


if __name__ == "__main__":
    main()
