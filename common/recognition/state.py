"""A recogniser's files: the checkpoint of a training, and what comes of it. Tensors as safetensors, the rest as JSON."""

import errno
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from common.errors import CheckpointError
from common.files import write_atomically

_OPTIMIZER = "optimizer."


def save_state(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, told: dict[str, Any]
) -> None:
    """Write all that a training is between two epochs, whole or not at all. Raises CheckpointError."""
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{number}.{key}": value for key, value in slots.items()}
    write_tensors(path, tensors, told)


def load_state(path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put back what `save_state` wrote, and return what was told. Raises CheckpointError where it is damaged or another's."""
    tensors, told = read_tensors(path)
    try:
        for name, module in modules.items():
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            module.load_state_dict(own)
        slots: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            if key.startswith(_OPTIMIZER):
                number, _, slot = key.removeprefix(_OPTIMIZER).partition(".")
                slots.setdefault(int(number), {})[slot] = value
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    except (RuntimeError, ValueError, KeyError) as error:
        short = textwrap.shorten(str(error), 200)  # torch names every tensor, in a line each
        raise CheckpointError(f"{path} does not fit this training ({short}): begin anew under another name") from error
    return told


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], told: dict[str, Any]) -> None:
    """Tensors, and JSON in the header, for the owner's eyes alone: they remember photographs. Raises CheckpointError."""
    # Weights in channels_last are saved as what they are: safetensors wants them contiguous.
    whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        write_atomically(path, save(whole, {"visard": json.dumps(told)}), private=True)
    except OSError as error:
        full = (
            "; the disk is full: make room, the training goes on from its last epoch"
            if error.errno == errno.ENOSPC
            else ""
        )
        raise CheckpointError(f"cannot write {path}: {error.strerror}{full}") from error


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. Raises CheckpointError where it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(json.loads(file.metadata()["visard"]))  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): is this the folder of a recogniser?") from error
