"""The lengths of what a client sends in a planned run."""

from functools import lru_cache

import torch

from common.models.discriminators import DISCRIMINATORS
from common.models.features import RandomFeatures
from common.models.flat import num_parameters
from common.sections import ModelConfig


@lru_cache(maxsize=64)
def count_parameters(model: ModelConfig) -> int:
    """Parameters of the discriminator, counted without making any."""
    with torch.device("meta"):
        return num_parameters(
            DISCRIMINATORS[model.discriminator](
                image_size=model.image_size,
                channels=model.channels,
                num_classes=model.num_classes,
                width=model.discriminator_width,
            )
        )


def feature_dimension(model: ModelConfig) -> int:
    """Entries of the moment release, a class."""
    return _dimension(model.image_size, model.channels)


def feature_rows(model: ModelConfig) -> int:
    """Classes of the moment release; one without labels."""
    return max(model.num_classes, 1)


@lru_cache(maxsize=8)
def _dimension(image_size: int, channels: int) -> int:
    return RandomFeatures(image_size, channels, seed=0).dim
