"""Generators, discriminators, GAN losses and the fixed random features. docs/models.md has a table of them all.

The builders (`build_generator`, `build_discriminator`) never touch torch's global random numbers and always return
the same weights; a run then draws its own start with `initialise`.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

_LEAKY_SLOPE = 0.2
_GENERATOR_STD = 0.02


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter of `module` anew, in place, from `generator` alone (a CPU generator; the module may be
    anywhere).

    Convolutions and hidden linear layers: N(0, gain^2 / fan_in), gain^2 = 2 / (1 + 0.2^2) (He et al. 2015), because
    most of our discriminators have no normalisation that would mend a start which fades from layer to layer. The last
    layer (one output) and convolutions of one pixel, which are the shortcuts of residual blocks and feed no leaky ReLU
    of their own: gain 1. Embeddings: N(0, 1 / features). Transposed convolutions: N(0, 0.02^2) (Radford et al. 2016).
    Biases 0; norms: scale 1, shift 0, running statistics fresh. Raises TypeError for a layer with parameters of its
    own that it does not know.
    """
    for layer in module.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            _fill(layer.weight, _GENERATOR_STD, generator)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            linear = layer.weight.shape[0] == 1 or layer.weight.shape[2:] == (1, 1)
            gain = 1.0 if linear else math.sqrt(2.0 / (1.0 + _LEAKY_SLOPE**2))
            _fill(layer.weight, gain / math.sqrt(layer.weight[0].numel()), generator)
        elif isinstance(layer, nn.Embedding):
            _fill(layer.weight, 1.0 / math.sqrt(layer.embedding_dim), generator)
        elif isinstance(layer, nn.GroupNorm | nn.LayerNorm | nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_parameters()
        elif next(layer.parameters(recurse=False), None) is not None:
            raise TypeError(
                f"initialise does not know {type(layer).__name__}; add its rule to common/models/__init__.py"
            )
        bias = getattr(layer, "bias", None)
        if isinstance(bias, torch.Tensor):
            nn.init.zeros_(bias)


def build_initialised(construct: Callable[[], nn.Module]) -> nn.Module:
    """Construct a module on no device at all, then give it weights from a fixed seed: the global random numbers are
    not used."""
    with torch.device("meta"):
        module = construct()
    module.to_empty(device="cpu")
    initialise(module, torch.Generator().manual_seed(0))
    return module


def _fill(weight: torch.Tensor, std: float, generator: torch.Generator) -> None:
    # Drawn on the CPU in float32 whatever the module's device and type, so that a seed means the same weights
    # everywhere.
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)
