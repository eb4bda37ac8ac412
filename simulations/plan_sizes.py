"""The lengths of what a client sends in a planned run."""

from functools import lru_cache

from common.models.features import RandomFeatures
from common.sections import ModelConfig


def feature_dimension(model: ModelConfig) -> int:
    """Entries of the moment release, a class."""
    return _dimension(model.image_size, model.channels)


def feature_rows(model: ModelConfig) -> int:
    """Classes of the moment release; one without labels."""
    return max(model.num_classes, 1)


@lru_cache(maxsize=8)
def _dimension(image_size: int, channels: int) -> int:
    return RandomFeatures(image_size, channels, seed=0).dim
