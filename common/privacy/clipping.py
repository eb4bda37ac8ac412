"""The clipped sum: each privacy unit's mean gradient, clipped, then summed. The one place where faces meet gradients.

Claims, for a model that passes `check_no_cross_sample`, whatever its weights (they may be chosen to harm), and a loss
that takes each logit alone:
- One unit adds at most max_grad_norm to the sum, in L2 norm over all parameters jointly (Abadi et al. 2016, "Deep
  learning with differential privacy", with units in place of examples). In exact arithmetic it is max_grad_norm *
  (1 - FLOAT_SLACK). Proven for book-keeping and a unit alone in its sum, from the standard bounds for float32 products
  and sums, which leave rounding less than the slack; and measured by the tests under hostile weights.
- In exact arithmetic that is also how far adding or removing one unit (all its images) moves the sum. In float32 the
  other units' gradients, and their sum of up to MAX_UNITS, may then round otherwise. The rest of the slack is for that:
  measured on a processor by the tests, under hostile weights too (book-keeping runs whole tiles of images, in which the
  neighbours do not change an image's rounding), neither proven, nor measured on a GPU. Larger draws are sums of such
  sums, each with that slack.
- Nothing is TF32 or bfloat16 but the forward pass, if it has chosen so.
- With dropout all of this is said of given masks; that secret masks keep it private is argued in
  `common.models.stochastic`.
- A unit whose gradient is not finite (or above LARGEST_NORM) adds zero. Neither the result nor an error tells that
  there was one, nor how many units there were.
Time and memory do depend on the number of units and images drawn, and a little on units that add zero.
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
    LARGEST_NORM,
    BookKeeping,
    PerSampleLoss,
    clip_factors,
    forward_logits,
    sum_of_losses,
    unknown_layer,
)

__all__ = ["FLOAT_SLACK", "LARGEST_NORM", "MAX_UNITS", "MIN_GRAD_NORM", "check_no_cross_sample", "clipped_sum"]

MAX_UNITS = 8192
MIN_GRAD_NORM = 1e-6  # less drowns in what float32 cannot tell from zero
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
        num_units: how many units were drawn, any number.
        max_grad_norm: at least MIN_GRAD_NORM; math.inf for no clipping, which promises nothing.
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
    total: torch.Tensor | None = None
    for own, first, count in _parts(units, num_units):
        some, some_labels = images[own], None if labels is None else labels[own]
        path = BookKeeping(model, per_sample_loss) if method == "book-keeping" else _Opacus(model, per_sample_loss)
        with _full_precision(), torch.enable_grad(), path:
            for index, size in _chunks(units[own] - first, count, chunk_size):
                path.add(some[index], None if some_labels is None else some_labels[index], size, max_grad_norm)
        total = path.total() if total is None else total.double() + path.total()
    if total is None:
        raise ValueError("there is always one part")
    return total.float()


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
    undone, the second refused, and on two random images the per-image gradients must sum to the plain gradient (not on
    the faces: an error would tell of them).
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

        self._checked = False

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def add(self, images: torch.Tensor, labels: torch.Tensor | None, size: int, max_grad_norm: float) -> None:
        """Add the units of these images, `size` images each, in order."""
        if not self._checked:
            random = torch.randn(2, *images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
            self._check(self._rows(random, None if labels is None else torch.zeros_like(labels[:1]).expand(2)))
            self._checked = True
        batch = images.shape[0]
        rows = self._rows(images, labels)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            per_unit = [each.view(batch // size, size, -1).mean(1) for each in rows]
            norms = [torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in per_unit]
            factors = clip_factors(torch.stack(norms).square().sum(0), max_grad_norm)
            zero = (factors == 0)[:, None]
            self._total += torch.cat([factors @ each.masked_fill(zero, 0.0) for each in per_unit])

    def _rows(self, images: torch.Tensor, labels: torch.Tensor | None) -> list[torch.Tensor]:
        """Each parameter's gradient for each image, (B, numel) float32; the sums are in the copy's `.grad`."""
        self._model.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")  # images need no gradient
            loss = sum_of_losses(self._per_sample_loss, forward_logits(self._model, images.contiguous(), labels))
            torch.autograd.backward(loss)
        rows = []
        for p in self._model.parameters():
            if p.requires_grad and p.grad is not None:
                rows.append(p.grad_sample.detach().float().reshape(len(images), -1))
                p.grad_sample = None
            else:
                rows.append(torch.zeros(len(images), p.numel(), device=images.device))
        return rows

    def _check(self, rows: list[torch.Tensor]) -> None:
        pairs = [(r, p.grad) for r, p in zip(rows, self._model.parameters(), strict=True) if p.grad is not None]
        wrong = sum(float((r.sum(0) - grad.flatten()).square().sum()) for r, grad in pairs)
        scale = sum(float(r.square().sum()) for r, _ in pairs)
        if math.isfinite(scale) and wrong > 2e-4 * scale:
            raise PrivacyError(
                f"Opacus's per-image gradients miss the plain gradient by {wrong**0.5:.3g} of {scale**0.5:.3g}; "
                "use layers that book-keeping knows"
            )

    def total(self) -> torch.Tensor:
        """The sum so far, (d,) float32 in `model.parameters()` order."""
        return self._total


def _parts(units: torch.Tensor, num_units: int) -> Iterator[tuple[slice, int, int]]:
    """At most MAX_UNITS units at a time: their images, the first unit and how many. At least one part, perhaps empty."""
    for first in range(0, max(num_units, 1), MAX_UNITS):
        last = min(first + MAX_UNITS, num_units)
        low, high = torch.searchsorted(units, torch.tensor([first, last], device=units.device)).tolist()
        yield slice(low, high), first, last - first


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
    if not max_grad_norm >= MIN_GRAD_NORM:
        raise PrivacyError(
            f"max_grad_norm is {max_grad_norm}; it must be at least {MIN_GRAD_NORM} (math.inf for no clipping)"
        )
    if chunk_size is not None and chunk_size < 1:
        raise PrivacyError(f"chunk_size is {chunk_size}; it must be at least 1")
    if units.dtype != torch.int64 or units.shape != images.shape[:1]:
        raise PrivacyError(
            f"units are {units.dtype} {tuple(units.shape)} for {images.shape[0]} images; give int64, one for each image"
        )
    if len(units) > 0 and (int(units[0]) < 0 or int(units[-1]) >= num_units or bool((units.diff() < 0).any())):
        raise PrivacyError(f"units must not decrease and must lie in 0..{num_units - 1}; sort the images by unit")
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
