"""A trained recogniser: embeds faces, names persons, says whether two photographs are of one."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from common.device import pick_device
from common.errors import CheckpointError, ConfigError
from common.models.recogniser import Recogniser, build_recogniser, embed
from common.recognition.settings import RecognitionConfig
from common.recognition.state import read_tensors, write_tensors

FILE_NAME = "recogniser.safetensors"


@dataclass
class TrainedRecogniser:
    """A recogniser after its training, in evaluation mode.

    prototypes: (P, D), the directions of the persons it was trained on, of unit length. classes: the values of each attribute it
    tells. threshold: cosine from which two photographs count as one person's; None where it was trained for identification.
    figure: what it reached on what was kept for validation, None where nothing was. names: (P,), of the persons.
    """

    config: RecognitionConfig
    network: Recogniser
    prototypes: Tensor
    classes: dict[str, list[str]]
    threshold: float | None
    figure: float | None
    epochs: int
    seconds: float
    names: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write `recogniser.safetensors`, whole or not at all. Raises CheckpointError."""
        tensors = {f"network.{key}": value for key, value in self.network.state_dict().items()}
        told = {
            "config": self.config.to_flat(),
            "classes": self.classes,
            "threshold": self.threshold,
            "figure": self.figure,
            "epochs": self.epochs,
            "seconds": self.seconds,
            "names": self.names,
        }
        write_tensors(folder / FILE_NAME, {**tensors, "prototypes": self.prototypes}, told)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote. Raises CheckpointError where it is missing or damaged."""
        tensors, told = read_tensors(folder / FILE_NAME)
        try:
            config, classes = RecognitionConfig.from_flat(told["config"]), dict(told["classes"])
            network = network_of(config, {name: len(values) for name, values in classes.items()})
            own = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
            network.load_state_dict(own)
            rest = {key: told[key] for key in ("threshold", "figure", "epochs", "seconds", "names")}
            found = cls(config, network, tensors["prototypes"], classes, **rest)
        except (KeyError, TypeError, ValueError, RuntimeError, ConfigError) as error:
            short = textwrap.shorten(str(error), 200)  # torch names every tensor, in a line each
            raise CheckpointError(f"{folder / FILE_NAME} is damaged ({short}): train it anew") from error
        network.to(pick_device()).eval().requires_grad_(False)
        return found

    def embed(self, images: np.ndarray) -> Tensor:
        """Embeddings of unit length (N, D) of faces (N, C, S, S) uint8."""
        return embed(self.network, torch.from_numpy(images))

    def scores(self, images: np.ndarray) -> Tensor:
        """Cosines (N, P) of faces to the persons it was trained on."""
        return self.embed(images) @ self.prototypes.T

    def needed_threshold(self) -> float:
        """The threshold. Raises ConfigError where there is none."""
        if self.threshold is None:
            raise ConfigError(
                f"this recogniser was trained to {self.config.goal}, and kept no persons to choose a threshold on: train one with "
                "--goal verify and a --validation above 0, or give --threshold"
            )
        return self.threshold

    def attributes(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Each attribute that it tells, as text (N,)."""
        if not self.classes:
            return {}
        with torch.no_grad():
            logits = self.network.attribute_logits(self.embed(images).to(next(self.network.parameters()).device))
        return {
            name: np.array(values)[found.argmax(1).cpu().numpy()]
            for (name, values), found in zip(self.classes.items(), logits, strict=True)
        }


def network_of(config: RecognitionConfig, classes: Mapping[str, int]) -> Recogniser:
    """The network that a configuration names, with weights from a fixed seed."""
    return build_recogniser(
        config.network,
        config.image_size,
        config.channels,
        width=config.width,
        embedding=config.embedding,
        dropout=config.dropout,
        attributes=classes,
    )
