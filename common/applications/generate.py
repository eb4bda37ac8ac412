"""Draw new faces from a finished run's generator."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from common.config import RunConfig
from common.device import pick_device
from common.errors import CheckpointError, ConfigError
from common.gradients import to_uint8
from common.models.generators import generator_of
from common.sections import ModelConfig

# Images drawn at once.
_BATCH = 256


@dataclass(frozen=True)
class TrainedGenerator:
    """A generator ready to draw: `network` in evaluation mode, and what it is."""

    network: nn.Module
    model: ModelConfig

    @classmethod
    def load(cls, run: Path) -> "TrainedGenerator":
        """Read `generator.safetensors` and `generator.json` of a run.

        Raises CheckpointError where they are missing or damaged.
        """
        try:
            card = json.loads((run / "generator.json").read_text(encoding="utf-8"))
            model = RunConfig.from_flat(card["config"]).model
            network = generator_of(model)
            network.load_state_dict(load_file(run / "generator.safetensors"))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError, ConfigError) as error:
            raise CheckpointError(
                f"no finished generator in {run}: {error}. A run writes it at its end; an interrupted one goes on with --resume"
            ) from error
        return cls(network.to(pick_device()).eval().requires_grad_(False), model)

    def draw(self, count: int, seed: int, label: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Images (count, C, H, W) uint8 and their labels (count,) int64, None where unconditional.

        Labels go round in turn unless `label` names one. Raises ConfigError for a label that the generator does not
        have.
        """
        classes = self.model.num_classes
        if label is not None and not 0 <= label < classes:
            known = f"0 to {classes - 1}" if classes else "none: it is unconditional"
            raise ConfigError(f"label {label} is not one of this generator's: {known}")
        rng = torch.Generator().manual_seed(seed)
        device = next(self.network.parameters()).device
        labels = None
        if classes:
            labels = torch.arange(count) % classes if label is None else torch.full((count,), label)
        drawn = []
        for low in range(0, count, _BATCH):
            size = min(_BATCH, count - low)
            latents = torch.randn(size, self.model.latent_dim, generator=rng).to(device)
            some = None if labels is None else labels[low : low + size].to(device)
            drawn.append(to_uint8(self.network(latents, some)))
        return np.concatenate(drawn), None if labels is None else labels.numpy()
