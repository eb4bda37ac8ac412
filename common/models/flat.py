"""A model's parameters as one flat vector, which is how they travel, and back."""

import numpy as np
import torch
from torch import Tensor, nn


def num_parameters(model: nn.Module) -> int:
    """Number of scalars in all parameters."""
    return sum(p.numel() for p in model.parameters())


def get_flat(model: nn.Module) -> np.ndarray:
    """Parameters in the order of `model.parameters()`: (d,) float32, a copy."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).to("cpu", torch.float32).numpy()


def set_flat(model: nn.Module, vector: np.ndarray | Tensor) -> None:
    """Write (d,) float32 into the parameters, in place. Raises ValueError where d is not the model's."""
    for parameter, values in zip(model.parameters(), split_flat(model, torch.as_tensor(vector)), strict=True):
        with torch.no_grad():
            parameter.copy_(values)


def split_flat(model: nn.Module, vector: Tensor) -> list[Tensor]:
    """Views of (d,) in the shapes of the parameters. Raises ValueError where d is not the model's."""
    parameters = list(model.parameters())
    if vector.numel() != num_parameters(model):
        raise ValueError(f"a vector of {vector.numel()} for a model of {num_parameters(model)} parameters")
    parts = vector.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
