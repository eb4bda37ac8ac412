"""What a run leaves behind: `runs/NAME/`.

config.toml             the configuration as resolved
rounds.jsonl            one line a round: functions of noisy updates, fakes and public data only
tensorboard/            the same for TensorBoard: prior/, moments/ and refine/ by generator step, rounds/ by round
samples/*.png           the generator's moving average on fixed latents
generator.safetensors   its weights, and the classifier's that labels what it draws, if one was taught; generator.json, its card
checkpoint.safetensors  the coordinator's state
"""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import save
from torch.utils.tensorboard import SummaryWriter

from common.applications.generate import CLASSIFIER
from common.config import RunConfig
from common.faces.places import name_of
from common.fields import keys_of
from common.files import write_atomically
from common.gradients import to_uint8
from common.messages import planned_releases
from common.models.discriminators import ClassDiscriminator
from common.pictures import save_grid
from common.privacy.accounting import epsilon_of
from common.privacy.planner import promise
from common.privacy.units import PrivacyModel
from common.sections import SimulationConfig
from server.checkpoint import CoordinatorState
from server.generator import draw_latents

# Generator steps between two pictures, and two TensorBoard entries, where they are of no round.
_FIT_SAMPLE_STEPS, _FIT_RECORD_STEPS = 100, 10
_SAMPLES = 64


class RunRecorder:
    """An observer that writes the run's folder.

    Continues the files of an interrupted run where the checkpoint stands.
    """

    def __init__(self, directory: Path, state: CoordinatorState) -> None:
        self.directory = directory
        self._lines = directory / "rounds.jsonl"
        (directory / "samples").mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "config.toml", tomli_w.dumps(state.config.to_flat()).encode())
        kept = _drop_rounds_from(self._lines, state.next_round)
        if state.last.get("round") == state.next_round - 1 and state.next_round - 1 not in kept:
            self._write_line(state)
        # Several, since each counts steps of its own, from which on the events of an interrupted run are void.
        begun = {"moments": state.generator_steps + 1, "rounds": state.next_round}
        begun |= {"prior": state.primed + 1} if state.config.training.public_steps else {}
        begun |= {"refine": state.refined + 1} if state.config.training.refine_steps else {}
        self._boards = {
            name: SummaryWriter(str(directory / "tensorboard" / name), purge_step=step) for name, step in begun.items()
        }
        latents = torch.Generator().manual_seed(state.config.training.seed + 1)
        count = _SAMPLES if state.config.model.num_classes == 0 else 8 * state.config.model.num_classes
        self._latents, self._labels = draw_latents(state.config, count, latents)

    def fit_stepped(self, state: CoordinatorState) -> None:
        """Record and picture the stage that the step was of now and then."""
        stage, done, total = state.fit
        last = done == total or bool(state.stopped)
        if done % _FIT_RECORD_STEPS == 0 or last:
            _scalars(self._boards[stage], f"{stage}/", state.last, done)
        if done % _FIT_SAMPLE_STEPS == 0 or last:
            self.picture(state, f"{stage}-{done:06d}")

    def round_ended(self, state: CoordinatorState) -> None:
        """Write the round's line, and a picture now and then."""
        self._write_line(state)
        _scalars(self._boards["rounds"], "rounds/", state.last, state.next_round - 1)
        server_round = state.next_round - 1
        if server_round % state.config.training.sample_every == 0 or server_round == state.last_round:
            self.picture(state, f"round-{server_round:06d}")

    def picture(self, state: CoordinatorState, name: str) -> Path:
        """Draw the fixed latents: a column a class where there are classes."""
        path = self.directory / "samples" / f"{name}.png"
        device = next(state.ema.parameters()).device
        labels = self._labels if self._labels is None else self._labels.to(device)
        with torch.no_grad():
            images = to_uint8(state.ema(self._latents.to(device), labels))
        save_grid(path, images, columns=state.config.model.num_classes or None)
        return path

    def finish(self, state: CoordinatorState) -> Path:
        """Write the generator, its card and the last picture. Returns the picture's path."""
        weights = state.ema.state_dict()
        if isinstance(state.discriminator, ClassDiscriminator) and state.taught:
            weights |= {f"{CLASSIFIER}{key}": value for key, value in state.discriminator.state_dict().items()}
        weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        write_atomically(self.directory / "generator.safetensors", save(weights))
        card = json.dumps(card_of(state), indent=2) + "\n"
        write_atomically(self.directory / "generator.json", card.encode())
        for board in self._boards.values():
            board.close()
        return self.picture(state, "final")

    def _write_line(self, state: CoordinatorState) -> None:
        line = {**state.last, "epsilon": epsilon_so_far(state), "epsilon_by_node": epsilon_by_node(state)}
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _scalars(board: SummaryWriter, prefix: str, figures: dict[str, Any], step: int) -> None:
    for name, value in figures.items():
        if isinstance(value, float) and math.isfinite(value):
            board.add_scalar(prefix + name, value, step)
    board.flush()  # what is still in its queue when the process ends would be missing after a resume


def epsilon_by_node(state: CoordinatorState) -> dict[str, float]:
    """Epsilon, by RDP, of what each node was asked under its id.

    A registered node keeps its id; under Flower's engine one that reconnects gets another.
    """
    cost = {charged: _epsilon(state, *charged) for charged in {(m, s) for m, s, _ in state.charged.values()}}
    return {node: cost[charged[0], charged[1]] for node, charged in state.charged.items()}


def epsilon_so_far(state: CoordinatorState) -> float | None:
    """Epsilon, by RDP, of all rounds so far: a bound for every client, however often it reconnected. None without privacy."""
    config = state.config
    if config.privacy.privacy_model is PrivacyModel.NONE:
        return None
    done = max(state.next_round - 1, state.asked_round)
    moments = min(done, config.moments.moment_rounds)
    return _epsilon(state, moments, (done - moments) * config.training.local_steps)


def _epsilon(state: CoordinatorState, moments: int, steps: int) -> float:
    """Rounded up to four digits."""
    config = state.config
    releases = planned_releases(config.privacy, moments, config.moments.moment_noise_multiplier, steps)
    return math.ceil(1e4 * epsilon_of(releases, config.privacy.delta)) / 1e4


def card_of(state: CoordinatorState) -> dict[str, Any]:
    """What goes with the generator's weights: how to build it, what it was promised, and that its images are synthetic."""
    private = state.config.privacy.privacy_model is not PrivacyModel.NONE
    return {
        "format": "visard-generator-1",
        "images": "synthetic",
        "run_id": state.run_id,
        "privacy": promise(state.config),
        "epsilon_spent": epsilon_so_far(state),
        "delta": state.config.privacy.delta if private else None,
        "rounds": state.next_round - 1,
        "stopped": state.stopped,
        "generator_steps": state.generator_steps,
        "config": _without_places(state.config),
    }


def _without_places(config: RunConfig) -> dict[str, Any]:
    """The configuration without where anybody's faces are and how they are read: a card travels with the weights.

    Of the public faces, which are in the weights, the name stays.
    """
    places = {key for _, key in keys_of(SimulationConfig)} | {"reference", "stop-when"}
    kept: dict[str, Any] = {key: value for key, value in config.to_flat().items() if key not in places}
    return kept | {"public": name_of(config.training.public)}


def _drop_rounds_from(path: Path, next_round: int) -> set[int]:
    """Keep the whole lines of earlier rounds, and drop all others. Returns the rounds kept."""
    if not path.exists():
        return set()
    kept = {}
    for line in path.read_bytes().splitlines(keepends=True):
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # damaged
            server_round = json.loads(line)["round"]
            if line.endswith(b"\n") and server_round < next_round:
                kept[server_round] = line
    write_atomically(path, b"".join(kept.values()))
    return set(kept)
