"""What a run leaves behind: `runs/NAME/`.

config.toml             the configuration as resolved
rounds.jsonl            one line a round: functions of noisy updates, fakes and public data only
events.out.tfevents.*   the same for TensorBoard
samples/*.png           the generator's moving average on fixed latents
generator.safetensors   its weights; generator.json, its card
checkpoint.safetensors  the coordinator's state
"""

import json
import math
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import save
from torch.utils.tensorboard import SummaryWriter

from common.config import RunConfig
from common.files import write_atomically
from common.gradients import to_uint8
from common.messages import planned_releases
from common.pictures import save_grid
from common.privacy.accounting import epsilon_of
from common.privacy.units import PrivacyModel
from server.checkpoint import CoordinatorState
from server.coordinator import describe
from server.generator import draw_latents

# Generator steps between two pictures, and two TensorBoard entries, of the moment stage.
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
        _drop_rounds_from(self._lines, state.next_round)
        if state.last.get("round") == state.next_round - 1 and not _has_round(self._lines, state.next_round - 1):
            self._write_line(state)
        self._board = SummaryWriter(str(directory), purge_step=state.next_round)
        latents = torch.Generator().manual_seed(state.config.training.seed + 1)
        count = _SAMPLES if state.config.model.num_classes == 0 else 8 * state.config.model.num_classes
        self._latents, self._labels = draw_latents(state.config, count, latents)

    def fit_stepped(self, state: CoordinatorState) -> None:
        """Record and picture the moment stage now and then."""
        if state.generator_steps % _FIT_RECORD_STEPS == 0 or not state.fitting:
            self._scalars("moments/", state.last, state.generator_steps)
        if state.generator_steps % _FIT_SAMPLE_STEPS == 0 or not state.fitting:
            self.picture(state, f"moments-{state.generator_steps:06d}")

    def round_ended(self, state: CoordinatorState) -> None:
        """Write the round's line, and a picture now and then."""
        self._write_line(state)
        self._scalars("rounds/", state.last, state.next_round - 1)
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
        weights = {key: value.detach().cpu().contiguous() for key, value in state.ema.state_dict().items()}
        write_atomically(self.directory / "generator.safetensors", save(weights))
        card = json.dumps(card_of(state), indent=2) + "\n"
        write_atomically(self.directory / "generator.json", card.encode())
        self._board.close()
        return self.picture(state, "final")

    def _write_line(self, state: CoordinatorState) -> None:
        line = {**state.last, "epsilon": epsilon_by_node(state)}
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _scalars(self, prefix: str, figures: dict[str, Any], step: int) -> None:
        for name, value in figures.items():
            if isinstance(value, float) and math.isfinite(value):
                self._board.add_scalar(prefix + name, value, step)


def epsilon_by_node(state: CoordinatorState) -> dict[str, float]:
    """Epsilon of what each node was asked so far, by RDP: an upper bound on what its own ledger holds for this run."""
    config = state.config
    cost: dict[tuple[int, int], float] = {}
    for moments, steps in {(m, s) for m, s in state.charged.values()}:
        releases = planned_releases(config.privacy, moments, config.moments.moment_noise_multiplier, steps)
        cost[moments, steps] = math.ceil(1e4 * epsilon_of(releases, config.privacy.delta)) / 1e4
    return {node: cost[charged[0], charged[1]] for node, charged in state.charged.items()}


def card_of(state: CoordinatorState) -> dict[str, Any]:
    """What goes with the generator's weights: how to build it, what it was promised, and that its images are synthetic."""
    private = state.config.privacy.privacy_model is not PrivacyModel.NONE
    return {
        "format": "visard-generator-1",
        "images": "synthetic",
        "run_id": state.run_id,
        "privacy": describe(state.config),
        "epsilon_spent": max(epsilon_by_node(state).values(), default=0.0) if private else None,
        "delta": state.config.privacy.delta if private else None,
        "rounds": state.next_round - 1,
        "generator_steps": state.generator_steps,
        "config": _without_places(state.config),
    }


def _without_places(config: RunConfig) -> dict[str, Any]:
    """The configuration without the path of anybody's faces: a card travels with the weights."""
    return {key: value for key, value in config.to_flat().items() if key != "data"}


def _drop_rounds_from(path: Path, next_round: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["round"] < next_round]
    write_atomically(path, "".join(kept).encode())


def _has_round(path: Path, server_round: int) -> bool:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return any(json.loads(line)["round"] == server_round for line in lines)
