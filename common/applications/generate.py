"""Draw new faces from a finished run's generator."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.config import RunConfig
from common.device import pick_device
from common.errors import CheckpointError, ConfigError
from common.gradients import from_uint8, to_uint8
from common.models.discriminators import ClassDiscriminator, discriminator_of
from common.models.generators import generator_of
from common.sections import ModelConfig

# Before the names of the classifier's weights in a generator's file.
CLASSIFIER = "classifier."
# Images drawn at once.
_BATCH = 256
# Candidates for each image wanted, before the generator's word is taken for its class.
_MOST_CANDIDATES = 20

log = logging.getLogger("visard.generate")


@dataclass(frozen=True)
class TrainedGenerator:
    """A generator ready to draw: `network` in evaluation mode, what it is, and the classifier of its run, if there is one.

    The classifier was trained with the same promise as the generator, and labels what is drawn: an image asked for as
    one class that looks like another is an image of the other.
    """

    network: nn.Module
    model: ModelConfig
    classifier: ClassDiscriminator | None = None

    @classmethod
    def load(cls, run: Path) -> "TrainedGenerator":
        """Read `generator.safetensors` and `generator.json` of a run.

        Raises CheckpointError where they are missing or damaged.
        """
        try:
            card = json.loads((run / "generator.json").read_text(encoding="utf-8"))
            model = RunConfig.from_flat(card["config"]).model
            weights = load_file(run / "generator.safetensors")
            of_classifier = {key: weights.pop(key) for key in list(weights) if key.startswith(CLASSIFIER)}
            network, classifier = generator_of(model), discriminator_of(model)
            network.load_state_dict(weights)
            if of_classifier:
                classifier.load_state_dict({k.removeprefix(CLASSIFIER): v for k, v in of_classifier.items()})
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError, ConfigError) as error:
            raise CheckpointError(
                f"no finished generator in {run}: {error}. A run writes it at its end; an interrupted one goes on with --resume"
            ) from error
        for module in (network, classifier):
            module.to(pick_device()).eval().requires_grad_(False)
        taught = classifier if isinstance(classifier, ClassDiscriminator) and of_classifier else None
        return cls(network, model, taught)

    def draw(self, count: int, seed: int, label: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Images (count, C, H, W) uint8 and their labels (count,) int64, None where unconditional.

        Labels go round in turn unless `label` names one. With a classifier as many images are drawn as it takes until
        enough look like each class; where 20 times as many as wanted do not do, the rest are labelled as they were asked
        for, and a warning is logged. Raises ConfigError for a label that the generator does not have.
        """
        classes = self.model.num_classes
        if label is not None and not 0 <= label < classes:
            known = f"0 to {classes - 1}" if classes else "none: it is unconditional"
            raise ConfigError(f"label {label} is not one of this generator's: {known}")
        rng = torch.Generator().manual_seed(seed)
        if not classes:
            return self._images(count, None, rng), None
        labels = torch.arange(count) % classes if label is None else torch.full((count,), label)
        if self.classifier is None:
            return self._images(count, labels, rng), labels.numpy()
        return self._sorted(labels, rng), labels.numpy()

    def _sorted(self, labels: Tensor, rng: torch.Generator) -> np.ndarray:
        """Images (N, C, H, W) uint8 that look like `labels` (N,) to the classifier."""
        side = self.model.image_size
        images = np.empty((len(labels), self.model.channels, side, side), np.uint8)
        empty = {int(label): np.flatnonzero(labels == label).tolist()[::-1] for label in labels.unique()}
        drawn, trusted = 0, False
        while missing := [label for label, places in empty.items() if places]:
            trusted = drawn >= _MOST_CANDIDATES * len(labels)
            asked = torch.tensor(missing)[torch.arange(drawn, drawn + _BATCH) % len(missing)]
            candidates = self._images(_BATCH, asked, rng)
            for place, label in enumerate((asked if trusted else self._classes(candidates)).tolist()):
                if empty.get(label):
                    images[empty[label].pop()] = candidates[place]
            drawn += _BATCH
        if trusted:
            log.warning(
                "of %d images hardly any look like some of their classes: these are labelled as they were asked for",
                drawn,
            )
        return images

    def _classes(self, images: np.ndarray) -> Tensor:
        if self.classifier is None:
            raise ValueError("there is no classifier")
        return self.classifier.classify(from_uint8(images).to(pick_device())).argmax(1).cpu()

    def _images(self, count: int, labels: Tensor | None, rng: torch.Generator) -> np.ndarray:
        """Images (count, C, H, W) uint8 as asked for."""
        device = next(self.network.parameters()).device
        drawn = []
        for low in range(0, count, _BATCH):
            size = min(_BATCH, count - low)
            latents = torch.randn(size, self.model.latent_dim, generator=rng).to(device)
            some = None if labels is None else labels[low : low + size].to(device)
            drawn.append(to_uint8(self.network(latents, some)))
        return np.concatenate(drawn)
