"""Clipped sums of gradients by book-keeping, for layers that we know; `common.privacy.clipping` is the way in.

Bu, Mao and Xu 2022, "Scalable and efficient training of large convolutional neural networks with differential
privacy"; Bu et al. 2023, "Differentially private optimization on large model at small cost". Hooks keep every layer's
input x, and one backward pass gives every layer's output gradient gy and no weight gradient. A unit's images are joined
along positions, so the gradient of a weight for one unit is gy^T x with gy (T, O) and x (T, F), T positions of all its
images, and no per-image gradient is ever built. Its norm comes from that product, kept, or where the product would be
large and T is small from the Gram matrices: |gy^T x|^2 = sum((gy gy^T) * (x x^T)). The sum over units is one more
product, with gy scaled by the clip factors. `common.privacy.layers` does the layers.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from common.errors import PrivacyError
from common.privacy.layers import PARTS, Product, Reorder, Rows, Scratch

FLOAT_SLACK = 1e-3
LARGEST_NORM = 1e15
# Matrix products round the last rows of a batch otherwise than the rest, unless the batch fills their tiles. Without
# padding, one image more would change the rounding of others, which chosen weights blow up to whole gradients.
_TILE = 32

PerSampleLoss = Callable[[torch.Tensor], torch.Tensor]
_Kept = tuple[nn.Module, torch.Tensor, torch.Tensor | None]  # a layer, its input, its output's gradient


def unknown_layer(model: nn.Module) -> str | None:
    """Name, in words, the first layer with parameters that book-keeping cannot do; None if it can do all."""
    for name, layer in model.named_modules():
        # Subclasses are not taken: their forward pass may be another.
        if next(layer.parameters(recurse=False), None) is not None and type(layer) not in PARTS:
            return f"{name or 'the model'}, a {type(layer).__name__}"
    return None


def clip_factors(squared_norms: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    """min(1, C (1 - FLOAT_SLACK) / norm) for each unit, 0 if its norm is not finite or above LARGEST_NORM.

    (U,) float64 to (U,) float32. The limit keeps the factors far from the denormal floats, which have few digits.
    """
    usable = (squared_norms >= 0) & (squared_norms <= LARGEST_NORM**2)
    factors = (max_grad_norm * (1.0 - FLOAT_SLACK) / squared_norms.sqrt()).clamp(max=1.0)
    return factors.masked_fill(~usable, 0.0).float()


def forward_logits(model: nn.Module, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """The logits (B,), or PrivacyError for any other shape: [B, 1] would broadcast against (B,) and mix samples."""
    logits = model(images) if labels is None else model(images, labels)
    if not isinstance(logits, torch.Tensor) or logits.shape != images.shape[:1]:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise PrivacyError(
            f"the model gave {got} for {images.shape[0]} images; it must give one logit each, shape (B,)"
        )
    return logits


def sum_of_losses(per_sample_loss: PerSampleLoss, logits: torch.Tensor) -> torch.Tensor:
    """The losses' float32 sum, or PrivacyError if they are not one for each logit."""
    losses = per_sample_loss(logits)
    if losses.shape != logits.shape:
        raise PrivacyError(
            f"per_sample_loss gave {tuple(losses.shape)} for logits {tuple(logits.shape)}; give (B,), not averaged"
        )
    return losses.float().sum()


class BookKeeping:
    """Adds up clipped gradients. Within the `with`, the model's parameters are frozen and its layers are hooked."""

    def __init__(self, model: nn.Module, per_sample_loss: PerSampleLoss) -> None:
        unknown = unknown_layer(model)
        if unknown is not None:
            raise PrivacyError(f"book-keeping does not know {unknown}; use method='auto' or 'opacus'")
        for name, layer in model.named_modules():
            if getattr(layer, "inplace", False):
                raise PrivacyError(f"{name} changes a layer's output in place; use inplace=False")
        self._model, self._per_sample_loss = model, per_sample_loss
        self._trained = {p for p in model.parameters() if p.requires_grad}
        self._seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor, int, int]] = {}
        self._totals: dict[torch.Tensor, tuple[torch.Tensor, Reorder]] = {}
        self._scratch = Scratch()
        self._stack = ExitStack()

    def __enter__(self) -> None:
        for layer in self._model.modules():
            if any(p.requires_grad for p in layer.parameters(recurse=False)):
                self._stack.callback(layer.register_forward_hook(self._keep).remove)
        for p in self._trained:
            self._stack.callback(p.requires_grad_, True)
            p.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        self._seen.clear()
        self._scratch = Scratch()
        self._stack.close()

    def add(self, images: torch.Tensor, labels: torch.Tensor | None, size: int, max_grad_norm: float) -> None:
        """Add the units of these images, `size` images each, in order."""
        kept = self._forward_and_back(images, labels, size)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            gradients = self._gradients(kept, images.shape[0], size)
            if not gradients:
                return
            squared = torch.stack([gradient.squared_norms() for gradient in gradients]).sum(0)
            factors = clip_factors(squared, max_grad_norm)
            dropped = (factors == 0) & (squared != 0)
            some_dropped = bool(dropped.any())
            for gradient in gradients:
                if some_dropped:
                    gradient.without(dropped)  # infinity times zero is not zero
                if gradient.parameter not in self._totals:
                    self._totals[gradient.parameter] = gradient.zeros(), gradient.reorder
                gradient.add_to(self._totals[gradient.parameter][0], factors)

    def total(self) -> torch.Tensor:
        """The sum so far, (d,) float32 in `model.parameters()` order."""
        flat = []
        for p in self._model.parameters():
            if p in self._totals:
                total, reorder = self._totals[p]
                flat.append(reorder(total).flatten())
            else:
                flat.append(torch.zeros(p.numel(), device=p.device))
        return torch.cat(flat)

    def _keep(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        name = type(layer).__name__
        if layer in self._seen:
            raise PrivacyError(f"a {name} runs twice in one forward pass; use method='opacus'")
        if len(args) != 1:
            raise PrivacyError(f"a {name} is called with {len(args)} positional inputs; call it with exactly 1")
        if not output.requires_grad:
            output.requires_grad_()  # the first layer: nothing before it asks for a gradient
        self._seen[layer] = args[0].detach(), output, args[0]._version, output._version

    def _forward_and_back(self, images: torch.Tensor, labels: torch.Tensor | None, size: int) -> list[_Kept]:
        batch, padding = images.shape[0], -images.shape[0] % _TILE
        if padding > 0:
            images = torch.cat([images, torch.zeros_like(images[:1]).expand(padding, *images.shape[1:])])
            labels = None if labels is None else torch.cat([labels, torch.zeros_like(labels[:1]).expand(padding)])
        try:
            loss = sum_of_losses(self._per_sample_loss, forward_logits(self._model, images, labels)) / size
            seen = list(self._seen.items())
        finally:
            self._seen.clear()
        outputs = [output for _, (_, output, _, _) in seen]
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True) if outputs else ()
        kept: list[_Kept] = []
        for (layer, (x, output, *versions)), gy in zip(seen, gradients, strict=True):
            name = type(layer).__name__
            if versions != [x._version, output._version]:
                raise PrivacyError(f"the input or output of a {name} is changed in place; use inplace=False")
            if x.shape[0] != images.shape[0] or output.shape[0] != images.shape[0]:
                raise PrivacyError(
                    f"a {name} sees {x.shape[0]} rows of {images.shape[0]} images; "
                    "keep the batch dimension first and whole"
                )
            kept.append((layer, x[:batch], None if gy is None else gy[:batch]))
        return kept

    def _gradients(self, kept: list[_Kept], batch: int, size: int) -> list[Rows | Product]:
        gradients: list[Rows | Product] = []
        while kept:  # emptied on the way, to free what is done
            layer, x, gy = kept.pop()
            if gy is not None:
                gradients += PARTS[type(layer)](layer, x, gy.float(), batch // size, self._scratch)
        return [gradient for gradient in gradients if gradient.parameter in self._trained]
