"""The coordinator's state, and its one file: `checkpoint.safetensors`.

Tensors as safetensors, the rest as JSON in the header; written beside and renamed, so that a crash at any moment leaves
a whole one. A run continued from it is bit for bit the run that was not interrupted, but for privacy noise, which is
never drawn twice the same.
"""

import copy
import errno
import json
import math
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from common.config import RunConfig
from common.device import pick_device
from common.errors import CheckpointError, ConfigError
from common.files import write_atomically
from common.messages import RoundInstructions
from common.models import initialise
from common.models.discriminators import discriminator_of
from common.models.generators import generator_of
from common.models.losses import LOSSES, project_weights

FILE_NAME = "checkpoint.safetensors"


@dataclass
class CoordinatorState:
    """All that a run is between two rounds. Mutable; the round loop is its only writer.

    ema: the generator's moving average, which draws the pictures. moment_target: (rows, dim) once released. charged:
    for each node that was asked, its moment rounds and gradient steps, answered or not, and the last round that it was
    asked. primed: generator steps on the public faces, before the first round; generator_steps does not count them.
    discriminator_updates: steps of the discriminator in rounds. refined: generator steps after the last round. ledger_heads:
    the last head seen of each client's ledger, by its public key. asked_round: the last round that anybody was asked.
    last: figures of the last round. ended_by: `figure` or `budgets` where the run ended before its last round, and stopped:
    why. sums: of the secure sum, what `server.secure_exchange` keeps: public, no client's secret. released: what the last
    round asked, and the noised mean that came of it; not saved.
    """

    config: RunConfig
    run_id: str
    generator: nn.Module
    ema: nn.Module
    discriminator: nn.Module
    generator_optimizer: torch.optim.Adam
    discriminator_optimizer: torch.optim.Adam
    rng: torch.Generator
    next_round: int = 1
    generator_steps: int = 0
    discriminator_updates: int = 0
    primed: int = 0
    refined: int = 0
    moment_target: Tensor | None = None
    discriminator_steps: int = 1
    rounds_since_generator_step: int = 0
    fake_accuracy: float = 0.5
    seconds: float = 0.0
    charged: dict[str, list[int]] = field(default_factory=dict)
    ledger_heads: dict[str, str] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    asked_round: int = 0
    ended_by: str = ""
    stopped: str = ""
    sums: dict[str, Any] = field(default_factory=dict)
    released: tuple[RoundInstructions, Tensor] | None = None

    @classmethod
    def fresh(cls, config: RunConfig, run_id: str | None = None) -> "CoordinatorState":
        """The state before the first round; weights from the run's seed."""
        device = pick_device()
        rng = torch.Generator().manual_seed(config.training.seed)
        generator, discriminator = generator_of(config.model), discriminator_of(config.model)
        for network in (generator, discriminator):
            initialise(network, rng)
            network.to(device)
        project_weights(discriminator, LOSSES[config.model.loss], config.model.weight_clip)
        return cls(
            config=config,
            run_id=run_id or uuid.uuid4().hex,
            generator=generator,
            ema=copy.deepcopy(generator).requires_grad_(False).eval(),
            discriminator=discriminator,
            generator_optimizer=torch.optim.Adam(generator.parameters()),
            discriminator_optimizer=torch.optim.Adam(discriminator.parameters()),
            rng=rng,
            discriminator_steps=config.training.discriminator_steps,
        )

    @property
    def priming(self) -> bool:
        """Whether the steps on the public faces, which come before the first round, are still under way."""
        return self.primed < self.config.training.public_steps

    @property
    def fitting(self) -> bool:
        """Whether the moment stage's generator steps are still under way."""
        return (
            not self.stopped
            and self.moment_target is not None
            and self.generator_steps < self.config.moments.moment_steps
        )

    @property
    def refining(self) -> bool:
        """Whether all rounds are done and generator steps against the last discriminator are still to come."""
        ended = self.next_round > self.last_round and self.ended_by in ("", "budgets")
        return ended and self.taught and self.refined < self.config.training.refine_steps

    @property
    def taught(self) -> bool:
        """Whether a round of gradients has taught the discriminator anything: all may have been void."""
        return self.discriminator_updates > 0

    @property
    def complete(self) -> bool:
        """Whether nothing of the run is left to do."""
        under_way = self.priming or self.fitting or self.refining
        return self.next_round > self.last_round and not under_way

    @property
    def fit(self) -> tuple[str, int, int]:
        """Of the last generator step of no round: its stage (prior, moments or refine), its number, and how many there are."""
        if self.refined:
            return "refine", self.refined, self.config.training.refine_steps
        if self.generator_steps:
            return "moments", self.generator_steps, self.config.moments.moment_steps
        return "prior", self.primed, self.config.training.public_steps

    @property
    def last_round(self) -> int:
        """Number of the run's last round; rounds count from 1, the moment round included."""
        if self.stopped:
            return self.next_round - 1
        return self.config.moments.moment_rounds + self.config.training.num_rounds


_PLAIN = (
    "run_id",
    "next_round",
    "generator_steps",
    "discriminator_updates",
    "primed",
    "refined",
    "discriminator_steps",
    "rounds_since_generator_step",
    "fake_accuracy",
    "seconds",
    "charged",
    "ledger_heads",
    "last",
    "asked_round",
    "ended_by",
    "stopped",
    "sums",
)
_MODULES = ("generator", "ema", "discriminator")
_OPTIMIZERS = ("generator_optimizer", "discriminator_optimizer")


class CheckpointStore:
    """Saves and loads the state of the run in `directory`. saved: when it last did, by `time.monotonic`."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME
        self.saved = -math.inf

    def save(self, state: CoordinatorState) -> None:
        """Write the state, flushed to the disk before the rename.

        Raises CheckpointError; the former one is then kept.
        """
        tensors: dict[str, Tensor] = {"rng": state.rng.get_state()}
        if state.moment_target is not None:
            tensors["moment_target"] = state.moment_target
        for name in _MODULES:
            tensors |= {f"{name}.{key}": value for key, value in getattr(state, name).state_dict().items()}
        for name in _OPTIMIZERS:
            slots = getattr(state, name).state_dict()["state"]
            tensors |= {f"{name}.{i}.{key}": value for i, slot in slots.items() for key, value in slot.items()}
        header = {name: getattr(state, name) for name in _PLAIN} | {"config": state.config.to_flat()}
        content = save(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, {"state": json.dumps(header)}
        )
        try:
            write_atomically(self.path, content)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise CheckpointError(
                f"cannot write {len(content)} bytes to {self.path}: {error}. The last checkpoint is whole: "
                f"{'make room' if full else 'see to the disk and to who may write there'}, then go on with the run"
            ) from error
        self.saved = time.monotonic()

    def load(self) -> CoordinatorState:
        """Read the state. Raises CheckpointError where the file is missing, damaged or from another version."""
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads(file.metadata()["state"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            state = CoordinatorState.fresh(RunConfig.from_flat(header.pop("config")), header["run_id"])
            for name in _PLAIN:
                setattr(state, name, header[name])
            state.rng.set_state(tensors.pop("rng"))
            state.moment_target = tensors.pop("moment_target", None)
            for name in _MODULES:
                getattr(state, name).load_state_dict(_below(name, tensors))
            for name in _OPTIMIZERS:
                _load_optimizer(getattr(state, name), _below(name, tensors))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, ConfigError) as error:
            raise CheckpointError(f"cannot resume from {self.path}: {error}") from error
        return state


def _below(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _load_optimizer(optimizer: torch.optim.Adam, tensors: dict[str, Tensor]) -> None:
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, slot = key.split(".")
        slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
