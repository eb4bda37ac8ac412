"""The clipped sum: each privacy unit's mean gradient, clipped, then summed. The one place where faces meet gradients.

Claims, for a model that passes `check_no_cross_sample` and a loss that takes each logit alone:
- Adding or removing one unit (all its images) moves the result by at most max_grad_norm in L2 norm, over all parameters
  jointly (Abadi et al. 2016, "Deep learning with differential privacy", with units in place of examples). In exact
  arithmetic it is max_grad_norm * (1 - FLOAT_SLACK); the slack takes up the float32 rounding of one unit's norm and of
  the sum of up to MAX_UNITS units, which the tests measure and no proof bounds.
- Norms and sums are float32, never TF32 or bfloat16, whatever the forward pass or the process has chosen.
- A unit whose gradient is not finite (its squared norm overflows float32, or an image or weight is not a number) adds
  zero. Neither the result nor an error tells that there was one.
Time and memory do depend on the number of units and images drawn.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from common.errors import PrivacyError
from common.privacy.bookkeeping import (
    FLOAT_SLACK,
    BookKeeping,
    PerSampleLoss,
    clip_factors,
    forward_logits,
    sum_of_losses,
    unknown_layer,
)

__all__ = ["FLOAT_SLACK", "MAX_UNITS", "check_no_cross_sample", "clipped_sum"]

MAX_UNITS = 8192
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def clipped_sum(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    units: torch.Tensor,
    num_units: int,
    max_grad_norm: float,
    *,
    chunk_size: int | None = None,
    method: Literal["auto", "book-keeping", "opacus"] = "auto",
) -> torch.Tensor:
    """Sum over units of the mean gradient of the unit's images, clipped to max_grad_norm.

    Args:
        model: gives logits (B,) for images, or for images and labels. Its `.grad`, modes and weights are left alone. A
            frozen parameter (requires_grad False) gets zeros and does not count in the norm.
        per_sample_loss: maps logits (B,) to losses (B,), each from its own logit alone.
        images: (B, C, H, W) on the model's device; channels_last is fastest. B = 0 gives zeros.
        labels: (B,) int64, or None.
        units: (B,) int64, the unit of each image, non-decreasing, in 0..num_units-1. A unit without images adds zero.
        num_units: how many units were drawn.
        max_grad_norm: > 0; math.inf for no clipping, which promises nothing.
        chunk_size: images in memory at a time, about; a unit is never split. By default 64, and 32 for 64x64
            pixels, which suits a processor's caches; a GPU likes more.
        method: "auto" takes book-keeping where it knows every layer with parameters (Conv2d, Linear, GroupNorm,
            LayerNorm, Embedding), and Opacus's GradSampleModule, several times slower, elsewhere.

    Returns:
        (d,) float32, on the model's device, in `model.parameters()` order.

    Raises:
        PrivacyError: wrong arguments, or a model on which the clipping would be wrong.
    """
    _check_arguments(model, images, units, num_units, max_grad_norm, chunk_size)
    if chunk_size is None:
        chunk_size = 64 if images.shape[-2:].numel() < 64 * 64 else 32
    if method == "auto":
        method = "book-keeping" if unknown_layer(model) is None else "opacus"
    elif method not in ("book-keeping", "opacus"):
        raise PrivacyError(f"method is {method!r}; known are 'auto', 'book-keeping', 'opacus': choose one of these")
    images = images.detach()
    path = BookKeeping(model, per_sample_loss) if method == "book-keeping" else _Opacus(model, per_sample_loss)
    with _full_precision(), torch.enable_grad(), path:
        for index, size in _chunks(units, num_units, chunk_size):
            path.add(images[index], None if labels is None else labels[index], size, max_grad_norm)
    return path.total()


def check_no_cross_sample(model: nn.Module, example_images: torch.Tensor, labels: torch.Tensor | None) -> None:
    """Refuse a model in which one image's logit depends on another image, or which keeps something of the images.

    example_images: (B, C, H, W), B >= 2, public or random; labels as for `clipped_sum`. Dropout is off for the test.
    The logit of each image alone must equal its logit in the batch, its gradient must reach no other image, and no
    buffer may change (a running mean would leave the client without noise). The model is left as it was.

    Raises PrivacyError.
    """
    if example_images.shape[0] < 2:
        raise PrivacyError(f"check_no_cross_sample got {example_images.shape[0]} images; give at least 2")
    _refuse_cross_sample_layers(model)
    buffers = [b.detach().clone() for b in model.buffers()]
    dropouts = [m for m in model.modules() if isinstance(m, _DROPOUT) and m.training]
    try:
        for layer in dropouts:
            layer.training = False
        _check_images_apart(model, example_images, labels)
        named = zip(model.named_buffers(), buffers, strict=True)
        changed = [name for (name, now), before in named if not torch.equal(now, before)]
        if changed:
            raise PrivacyError(f"a forward pass changes the buffers {changed}, which get no noise; use other layers")
    finally:
        for layer in dropouts:
            layer.training = True
        for now, before in zip(model.buffers(), buffers, strict=True):
            now.data.copy_(before)


def _check_images_apart(model: nn.Module, images: torch.Tensor, labels: torch.Tensor | None) -> None:
    with torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        logits = forward_logits(model, images, labels)
        tolerance = 1e-4 * (0.1 + float(logits.detach().abs().max()))
        for i in range(images.shape[0]):
            one = slice(i, i + 1)
            with torch.no_grad():
                alone = forward_logits(model, images[one], None if labels is None else labels[one])
            (reached,) = torch.autograd.grad(logits[i], images, retain_graph=True, allow_unused=True)
            together = float(logits[i].detach())
            others = 0 if reached is None else int(reached.count_nonzero()) - int(reached[i].count_nonzero())
            if others > 0 or not abs(float(alone[0]) - together) <= tolerance:
                raise PrivacyError(
                    f"image {i}'s logit is {together:.6g} in a batch and {float(alone[0]):.6g} alone, its "
                    f"gradient reaches {others} values of other images; remove the layer that mixes images"
                )


class _Opacus:
    """Per-image gradients from Opacus's GradSampleModule, on a copy of the model in plain (not channels-last) memory.

    Opacus 1.6.0 is silently wrong for channels-last memory and for a padding mode other than zeros: the first is
    undone, the second refused, and in every chunk the per-image gradients must sum to the plain gradient.
    """

    def __init__(self, model: nn.Module, per_sample_loss: PerSampleLoss) -> None:
        from opacus.grad_sample import GradSampleModule  # slow to import, and seldom needed

        for name, layer in model.named_modules():
            mode = getattr(layer, "padding_mode", "zeros")
            if mode != "zeros":
                raise PrivacyError(f"{name} has padding_mode {mode!r}, on which Opacus is wrong; use 'zeros'")
        plain = copy.deepcopy(model)
        for p in plain.parameters():
            p.data = p.data.contiguous()
        for layer in plain.modules():
            if next(layer.parameters(recurse=False), None) is not None:
                layer.training = True  # Opacus's hooks do nothing in a layer without this flag
        try:
            self._model: Any = GradSampleModule(plain, loss_reduction="sum")
        except NotImplementedError as error:
            raise PrivacyError(f"neither book-keeping nor Opacus knows a layer ({error}); replace it") from error
        self._per_sample_loss = per_sample_loss
        self._total = torch.cat([torch.zeros(p.numel(), device=p.device) for p in model.parameters()])

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def add(self, images: torch.Tensor, labels: torch.Tensor | None, size: int, max_grad_norm: float) -> None:
        """Add the units of these images, `size` images each, in order."""
        self._model.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")  # images need no gradient
            loss = sum_of_losses(self._per_sample_loss, forward_logits(self._model, images.contiguous(), labels))
            torch.autograd.backward(loss)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            self._add_clipped(images.shape[0], size, max_grad_norm)

    def _add_clipped(self, batch: int, size: int, max_grad_norm: float) -> None:
        per_unit = []
        wrong, scale = 0.0, 0.0
        for p in self._model.parameters():
            if not p.requires_grad or p.grad is None:
                per_unit.append(torch.zeros(batch // size, p.numel(), device=p.device))
                continue
            rows = p.grad_sample.detach().float().reshape(batch, -1)
            wrong += float((rows.sum(0) - p.grad.flatten()).square().sum())
            scale += float(rows.square().sum())
            per_unit.append(rows.view(-1, size, p.numel()).mean(1))
            p.grad_sample = None
        if math.isfinite(scale) and wrong > 1e-4 * batch * scale:
            raise PrivacyError(
                f"Opacus's per-image gradients miss the plain gradient by {wrong**0.5:.3g} of {scale**0.5:.3g}; "
                "use layers that book-keeping knows"
            )
        squared = torch.stack([rows.square().sum(1) for rows in per_unit]).sum(0)
        factors = torch.where(squared.isfinite(), clip_factors(squared, max_grad_norm), 0.0)
        bad = ~squared.isfinite()[:, None]
        self._total += torch.cat([factors @ rows.masked_fill(bad, 0.0) for rows in per_unit])

    def total(self) -> torch.Tensor:
        """The sum so far, (d,) float32 in `model.parameters()` order."""
        return self._total


def _chunks(units: torch.Tensor, num_units: int, chunk_size: int) -> Iterator[tuple[slice | torch.Tensor, int]]:
    """Which images to take together, and how many each unit has: units of equal size, so that they stack."""
    counts = torch.bincount(units.cpu(), minlength=num_units)
    starts = counts.cumsum(0) - counts
    for size in sorted(set(counts.tolist()) - {0}):
        of_this_size = starts[counts == size]
        step = max(1, chunk_size // size)
        for begin in range(0, len(of_this_size), step):
            firsts = of_this_size[begin : begin + step]
            low, high = int(firsts[0]), int(firsts[-1]) + size
            if high - low == len(firsts) * size:
                yield slice(low, high), size  # neighbours: no copy
            else:
                yield (firsts[:, None] + torch.arange(size)).flatten().to(units.device), size


def _refuse_cross_sample_layers(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise PrivacyError(f"{name} is a {type(layer).__name__}, which mixes images; use GroupNorm instead")
        if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
            raise PrivacyError(f"{name} has max_norm or scale_grad_by_freq, which mix images; switch them off")


def _check_arguments(
    model: nn.Module,
    images: torch.Tensor,
    units: torch.Tensor,
    num_units: int,
    max_grad_norm: float,
    chunk_size: int | None,
) -> None:
    if not max_grad_norm > 0:
        raise PrivacyError(f"max_grad_norm is {max_grad_norm}; it must be > 0 (math.inf for no clipping)")
    if chunk_size is not None and chunk_size < 1:
        raise PrivacyError(f"chunk_size is {chunk_size}; it must be at least 1")
    if units.dtype != torch.int64 or units.shape != images.shape[:1]:
        raise PrivacyError(
            f"units are {units.dtype} {tuple(units.shape)} for {images.shape[0]} images; give int64, one for each image"
        )
    if len(units) > 0 and (int(units[0]) < 0 or int(units[-1]) >= num_units or bool((units.diff() < 0).any())):
        raise PrivacyError(f"units must not decrease and must lie in 0..{num_units - 1}; sort the images by unit")
    if num_units > MAX_UNITS and math.isfinite(max_grad_norm):
        raise PrivacyError(f"num_units is {num_units}; the float slack is meant for {MAX_UNITS} at most: draw fewer")
    _refuse_cross_sample_layers(model)
    owned = [p for layer in model.modules() for p in layer.parameters(recurse=False)]
    if len(owned) == 0 or len(owned) != len(set(owned)):
        raise PrivacyError("the model has no parameters, or two layers share one; give each layer its own")


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 and no bfloat16 in float32 products and convolutions, on any device, whatever the process has set."""
    backends: Any = torch.backends
    holders: tuple[Any, ...]
    exact: object
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9
        holders = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
        name, exact = "fp32_precision", "ieee"
    else:
        holders, name, exact = (backends.cuda.matmul, backends.cudnn), "allow_tf32", False
    before = [getattr(holder, name) for holder in holders]
    try:
        for holder in holders:
            setattr(holder, name, exact)
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            setattr(holder, name, value)
