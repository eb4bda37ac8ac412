"""The clipped sum: each privacy unit's mean gradient, clipped, then summed. The one place where photographs meet
gradients.

Book-keeping (Bu, Mao and Xu 2022, "Scalable and efficient training of large convolutional neural networks with
differential privacy"; Bu et al. 2023, "Differentially private optimization on large model at small cost"): hooks keep
every layer's input x, one backward pass gives every layer's output gradient gy and no weight gradient. A layer's
weight gradient for one unit is then the product of its x and gy, with the unit's images joined along positions, so no
per-image gradient is ever built. Its norm comes from that product where it is small, else from the Gram matrices of x
and gy; the sum over units is one more product, with gy scaled by the clip factors.

Claims, for a model whose logits pass `check_no_cross_sample`, images and labels being those of the units drawn:
- Adding or removing one unit (all its images) moves the result by at most max_grad_norm in L2 norm, over all
parameters jointly. Clipped
  norms are max_grad_norm * (1 - FLOAT_SLACK); the slack takes up float32 rounding, which tests measure and no proof
  bounds: the norm of one clipped unit, and the sum of up to MAX_UNITS of them. Norms and sums are float32 (never TF32
  or bfloat16) whatever the forward pass is in.
- A unit whose gradient is not finite adds zero: neither the result nor an error tells that there was one.
Timing and memory do depend on the number of units and images.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from common.errors import PrivacyError

FLOAT_SLACK = 1e-3
MAX_UNITS = 8192
# A Gram matrix saves memory, a product saves time; one float written and read costs about as much as this many
# multiplications.
_FLOPS_PER_FLOAT = 16

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_CROSS_SAMPLE = (nn.modules.batchnorm._BatchNorm,)
_BOOKKEPT = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.Embedding)

PerSampleLoss = Callable[[torch.Tensor], torch.Tensor]


def clipped_sum(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    units: torch.Tensor,
    num_units: int,
    max_grad_norm: float,
    *,
    chunk_size: int = 32,
    method: Literal["auto", "book-keeping", "opacus"] = "auto",
) -> torch.Tensor:
    """Sum over units of clip(mean gradient of the unit's images, max_grad_norm): (d,) float32 in `model.parameters()`
    order.

    images: (B, C, H, W); labels: (B,) int64, or None for a model called with images only; units: (B,) int64, the unit
    of each image, non-decreasing in 0..num_units-1 (a unit without images adds zero); max_grad_norm: > 0, math.inf
    for no clipping at all. per_sample_loss maps logits (B,) to losses (B,), each from its own logit alone. A frozen
    parameter (requires_grad False) gets zeros and does not count in the norm. Gradients (`.grad`) are left alone. B =
    0 gives zeros.

    About chunk_size images are in memory at a time; a unit is never split. method "auto" takes book-keeping where
    every layer with parameters is one of Conv2d, Linear, GroupNorm, LayerNorm, Embedding, and otherwise Opacus's
    GradSampleModule, which is several times slower. Raises PrivacyError for wrong arguments and for models on which
    the clipping would be wrong.
    """
    _check_arguments(model, images, units, num_units, max_grad_norm, chunk_size)
    parameters = list(model.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=parameters[0].device)
    if method == "auto":
        method = "book-keeping" if _unknown_layer(model) is None else "opacus"
    elif method not in ("book-keeping", "opacus"):
        raise PrivacyError(f"method is {method!r}; known are 'auto', 'book-keeping', 'opacus': choose one of these")
    step: _BookKeeping | _Opacus = (_BookKeeping if method == "book-keeping" else _Opacus)(model, per_sample_loss)
    with _full_precision(), torch.enable_grad(), step:
        for index, size in _chunks(units, num_units, chunk_size):
            batch = images.detach()[index]
            total += step.clipped(batch, None if labels is None else labels[index], size, max_grad_norm)
    return total.float()


def check_no_cross_sample(model: nn.Module, example_images: torch.Tensor, labels: torch.Tensor | None) -> None:
    """Refuse a model in which one image's logit depends on another image, or whose forward pass keeps something of
    the images.

    example_images: (B, C, H, W), B >= 2, public or random ones; labels as for `clipped_sum`. Dropout is switched off
    for the test. The logit of each image alone must equal its logit in the batch, its gradient must reach no other
    image, and no buffer may change (a running mean would leave the client without noise). Raises PrivacyError; the
    model is left as it was.
    """
    if example_images.shape[0] < 2:
        raise PrivacyError(f"check_no_cross_sample got {example_images.shape[0]} images; give at least 2")
    for name, layer in model.named_modules():
        if isinstance(layer, _CROSS_SAMPLE):
            raise PrivacyError(
                f"{name} is a {type(layer).__name__}, which mixes samples: clipping would bound nothing; "
                "use GroupNorm instead"
            )
    buffers = [b.detach().clone() for b in model.buffers()]
    active = [m for m in model.modules() if isinstance(m, _DROPOUT) and m.training]
    try:
        for layer in active:
            layer.training = False
        _check_samples_apart(model, example_images, labels)
        changed = [n for (n, b), old in zip(model.named_buffers(), buffers, strict=True) if not torch.equal(b, old)]
        if changed:
            raise PrivacyError(
                f"a forward pass changes the buffers {changed}, which are not noised; use layers without such state"
            )
    finally:
        for layer in active:
            layer.training = True
        for b, old in zip(model.buffers(), buffers, strict=True):
            b.data.copy_(old)


def _check_samples_apart(model: nn.Module, images: torch.Tensor, labels: torch.Tensor | None) -> None:
    with torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        logits = _logits(model, images, labels)
        for i in range(images.shape[0]):
            reached = torch.autograd.grad(logits[i], images, retain_graph=True, allow_unused=True)[0]
            others = torch.arange(images.shape[0], device=images.device) != i
            one = slice(i, i + 1)
            alone = _logits(model, images[one].detach(), None if labels is None else labels[one])[0]
            close = torch.isclose(alone, logits[i], rtol=1e-4, atol=1e-5 * (1 + logits.abs().max().item()))
            if not close or (reached is not None and reached[others].count_nonzero() > 0):
                raise PrivacyError(
                    f"image {i}'s logit is {logits[i]:.6g} in a batch and {alone:.6g} alone, or it depends "
                    "on other images; "
                    "clipping bounds nothing then: remove the layer that mixes samples"
                )


# Book-keeping


@dataclass
class _Rows:
    """One parameter's gradient for each unit, as it is: rows (U, ...)."""

    parameter: torch.Tensor
    rows: torch.Tensor

    def squared_norms(self) -> torch.Tensor:
        # Row by row: one long float32 sum of squares would lose digits.
        return torch.linalg.vector_norm(self.rows, dim=-1).square().flatten(1).sum(1)

    def add_to(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        total += (factors @ self.rows.flatten(1)).view(total.shape)


@dataclass
class _Product:
    """One weight's gradient (G, O, F) for unit u: gy[u]^T x[u]; x (U, G, T, F), gy (U, G, T, O), T positions of all its images."""

    parameter: torch.Tensor
    x: torch.Tensor
    gy: torch.Tensor

    def squared_norms(self) -> torch.Tensor:
        if self.x.shape[2] == 1:
            return (self.x.square().sum((2, 3)) * self.gy.square().sum((2, 3))).sum(1)
        return ((self.x @ self.x.mT) * (self.gy @ self.gy.mT)).sum((1, 2, 3))

    def add_to(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        gy = (self.gy * factors[:, None, None, None]).transpose(0, 1).flatten(1, 2)
        total.baddbmm_(gy.mT, self.x.transpose(0, 1).flatten(1, 2))


class _BookKeeping:
    """Hooks on every layer with parameters, which are frozen meanwhile so that the backward pass computes no weight
    gradient."""

    def __init__(self, model: nn.Module, per_sample_loss: PerSampleLoss) -> None:
        unknown = _unknown_layer(model)
        if unknown is not None:
            raise PrivacyError(f"book-keeping does not know {unknown}; use method='auto' or 'opacus'")
        self.model, self.per_sample_loss = model, per_sample_loss
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor, int, int]] = {}
        self.stack = ExitStack()

    def __enter__(self) -> None:
        for layer in self.model.modules():
            if any(p.requires_grad for p in layer.parameters(recurse=False)):
                self.stack.callback(layer.register_forward_hook(self._keep).remove)
        for p in self.trained:
            p.requires_grad_(False)
            self.stack.callback(p.requires_grad_, True)

    def __exit__(self, *_: object) -> None:
        self.seen.clear()
        self.stack.close()

    def _keep(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if layer in self.seen:
            raise PrivacyError(
                f"a {type(layer).__name__} runs twice in one forward pass: its two gradients belong "
                "together; use method='opacus'"
            )
        if len(args) != 1:
            raise PrivacyError(f"a {type(layer).__name__} is called with {len(args)} positional inputs; give exactly 1")
        if not output.requires_grad:
            output.requires_grad_()
        self.seen[layer] = (args[0].detach(), output, args[0]._version, output._version)
        return output

    def clipped(self, images: torch.Tensor, labels: torch.Tensor | None, size: int, bound: float) -> torch.Tensor:
        """The clipped sum over units of `size` images each, in order."""
        parts = self._parts(images, labels, size)
        num_units = images.shape[0] // size
        squared = torch.zeros(num_units, device=images.device)
        for part in parts:
            squared += part.squared_norms()
        if not bool(squared.isfinite().all()):
            # Infinity times a factor of zero is not zero: leave these units out and do the others again.
            kept = squared.isfinite().repeat_interleave(size)
            if not bool(kept.any()):
                return torch.zeros(sum(p.numel() for p in self.model.parameters()), device=images.device)
            del parts
            return self.clipped(images[kept], None if labels is None else labels[kept], size, bound)
        factors = _clip_factors(squared.sqrt(), bound)
        sums = {part.parameter: part.weighted_sum(factors) for part in parts}
        zero = torch.zeros((), device=images.device)
        return torch.cat([sums[p] if p in sums else zero.expand(p.numel()) for p in self.model.parameters()])

    def _parts(self, images: torch.Tensor, labels: torch.Tensor | None, size: int) -> list[_Rows | _Product]:
        try:
            losses = _losses(self.per_sample_loss, _logits(self.model, images, labels))
            outputs = [output for _, output, _, _ in self.seen.values()]
            gradients = torch.autograd.grad(losses.float().sum() / size, outputs, allow_unused=True) if outputs else ()
            kept = list(self.seen.items())
        finally:
            self.seen.clear()
        parts: list[_Rows | _Product] = []
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            for (layer, (x, output, *versions)), gy in zip(kept, gradients, strict=True):
                if versions != [x._version, output._version]:
                    raise PrivacyError(
                        f"the input or output of a {type(layer).__name__} is changed in place; use inplace=False"
                    )
                if x.shape[0] != images.shape[0] or output.shape[0] != images.shape[0]:
                    raise PrivacyError(
                        f"a {type(layer).__name__} sees {x.shape[0]} rows for {images.shape[0]} images; "
                        "keep the batch dimension first"
                    )
                if gy is not None:
                    parts += _layer_parts(layer, x, gy.float(), images.shape[0] // size)
        return [part for part in parts if any(part.parameter is p for p in self.trained)]


def _layer_parts(layer: nn.Module, x: torch.Tensor, gy: torch.Tensor, num_units: int) -> Iterator[_Rows | _Product]:
    if isinstance(layer, nn.Embedding):
        yield from _embedding_parts(layer, x, gy, num_units)
    elif isinstance(layer, nn.GroupNorm | nn.LayerNorm):
        yield from _norm_parts(layer, x.float(), gy, num_units)
    elif isinstance(layer, nn.Conv2d):
        yield from _conv_parts(layer, x.float(), gy, num_units)
    elif isinstance(layer, nn.Linear):
        x, gy = x.float().reshape(num_units, 1, -1, layer.in_features), gy.reshape(num_units, 1, -1, layer.out_features)
        yield _product(layer.weight, x, gy, _as_is)
        if layer.bias is not None:
            yield _Rows(layer.bias, gy.sum((1, 2)))


def _product(
    weight: torch.Tensor, x: torch.Tensor, gy: torch.Tensor, order: Callable[[torch.Tensor], torch.Tensor]
) -> _Rows | _Product:
    positions, features, outputs = x.shape[2], x.shape[3], gy.shape[3]
    if positions == 1 or positions**2 * (features + outputs) < _FLOPS_PER_FLOAT * features * outputs:
        return _Product(weight, x, gy, order)
    return _Rows(weight, gy.mT @ x, order)


def _conv_parts(layer: nn.Conv2d, x: torch.Tensor, gy: torch.Tensor, num_units: int) -> Iterator[_Rows | _Product]:
    # Patches are read from channels-last memory, where a row of the kernel is one stretch of kernel width * channels
    # floats.
    pad = layer._reversed_padding_repeated_twice
    if layer.padding_mode != "zeros":
        x = functional.pad(x, pad, mode=layer.padding_mode)
        pad = [0, 0, 0, 0]
    x = functional.pad(x.permute(0, 2, 3, 1), [0, 0, *pad]).contiguous()
    (kernel_h, kernel_w), (dilation_h, dilation_w) = layer.kernel_size, layer.dilation
    (batch, outputs, height, width), groups = gy.shape, layer.groups
    channels = x.shape[3] // groups
    stride_b, stride_h, stride_w, _ = x.stride()
    patches = x.as_strided(
        (batch, height, width, groups, kernel_h, kernel_w, channels),
        (stride_b, stride_h * layer.stride[0], stride_w * layer.stride[1], channels)
        + (stride_h * dilation_h, stride_w * dilation_w, 1),
    )
    features = kernel_h * kernel_w * channels
    patches = patches.reshape(num_units, -1, groups, features).transpose(1, 2)
    gy = gy.permute(0, 2, 3, 1).reshape(num_units, -1, groups, outputs // groups).transpose(1, 2)

    def order(total: torch.Tensor) -> torch.Tensor:
        return total.view(outputs, kernel_h, kernel_w, channels).permute(0, 3, 1, 2)

    yield _product(layer.weight, patches, gy, order)
    if layer.bias is not None:
        yield _Rows(layer.bias, gy.sum(2).flatten(1))


def _norm_parts(
    layer: nn.GroupNorm | nn.LayerNorm, x: torch.Tensor, gy: torch.Tensor, num_units: int
) -> Iterator[_Rows | _Product]:
    if isinstance(layer, nn.GroupNorm):
        normed = functional.group_norm(x, layer.num_groups, eps=layer.eps)
        shape = (num_units, x.shape[0] // num_units, x.shape[1], -1)
        scale, shift = (gy * normed).reshape(shape).sum((1, 3)), gy.reshape(shape).sum((1, 3))
    else:
        normed = functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        shape = (num_units, -1, math.prod(layer.normalized_shape), 1)
        scale, shift = (gy * normed).reshape(shape).sum((1, 3)), gy.reshape(shape).sum((1, 3))
    if layer.weight is not None:
        yield _Rows(layer.weight, scale)
    if layer.bias is not None:
        yield _Rows(layer.bias, shift)


def _embedding_parts(
    layer: nn.Embedding, x: torch.Tensor, gy: torch.Tensor, num_units: int
) -> Iterator[_Rows | _Product]:
    # An embedding is a linear layer on one-hot rows.
    one_hot = functional.one_hot(x.reshape(-1), layer.num_embeddings).float()
    if layer.padding_idx is not None:
        one_hot[:, layer.padding_idx] = 0
    gy = gy.reshape(num_units, 1, -1, layer.embedding_dim)
    yield _product(layer.weight, one_hot.reshape(num_units, 1, -1, layer.num_embeddings), gy, lambda total: total.mT)


# Opacus


class _Opacus:
    """Per-image gradients from Opacus's GradSampleModule, on a copy of the model in plain (not channels-last) memory.

    Opacus 1.6.0 is silently wrong for channels-last memory and for a padding mode other than zeros: the first is
    undone, the second refused, and in every chunk the per-image gradients must sum to the plain gradient.
    """

    def __init__(self, model: nn.Module, per_sample_loss: PerSampleLoss) -> None:
        from opacus.grad_sample import GradSampleModule

        for name, layer in model.named_modules():
            if getattr(layer, "padding_mode", "zeros") != "zeros":
                raise PrivacyError(
                    f"{name} has padding_mode {layer.padding_mode!r}, for which Opacus's gradients are "
                    "wrong; use 'zeros'"
                )
        plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        for layer in plain.modules():
            if next(layer.parameters(recurse=False), None) is not None:
                layer.training = True  # Opacus's hooks look at this flag and do nothing without it
        try:
            self.model = GradSampleModule(plain, loss_reduction="sum")
        except NotImplementedError as error:
            raise PrivacyError(
                f"neither book-keeping nor Opacus knows a layer of this model ({error}); replace it"
            ) from error
        self.per_sample_loss = per_sample_loss

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def clipped(self, images: torch.Tensor, labels: torch.Tensor | None, size: int, bound: float) -> torch.Tensor:
        """The clipped sum over units of `size` images each, in order."""
        self.model.zero_grad()
        # Asking for the images' gradient keeps torch from warning that Opacus's hooks have no input gradient.
        plain_images = images.contiguous().requires_grad_()
        _losses(self.per_sample_loss, _logits(self.model, plain_images, labels)).float().sum().backward()
        rows = []
        for p in self.model.parameters():
            row = getattr(p, "grad_sample", None)
            rows.append(p.new_zeros(images.shape[0], p.numel()) if row is None else row.detach().flatten(1))
        per_image = torch.cat(rows, dim=1).float()
        plain = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.model.parameters()]
        wrong = torch.linalg.vector_norm(per_image.sum(0) - torch.cat([g.flatten() for g in plain]))
        scale = torch.linalg.vector_norm(per_image, dim=1).sum()
        if scale.isfinite() and wrong > 1e-3 * scale:
            raise PrivacyError(
                f"Opacus's per-image gradients miss the plain gradient by {wrong:.3g} of {scale:.3g}; "
                "simplify the model"
            )
        per_unit = per_image.unflatten(0, (-1, size)).mean(1)
        norms = torch.linalg.vector_norm(per_unit, dim=1)
        finite = norms.square().isfinite()
        factors = torch.where(finite, _clip_factors(norms, bound), 0.0)
        return factors @ per_unit.masked_fill(~finite[:, None], 0.0)


# What both share


def _clip_factors(norms: torch.Tensor, bound: float) -> torch.Tensor:
    # min(1, C / norm); the tiny floor only keeps 0 / 0 out.
    return (bound * (1.0 - FLOAT_SLACK) / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)


def _logits(model: nn.Module, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    logits = model(images) if labels is None else model(images, labels)
    if not isinstance(logits, torch.Tensor) or logits.shape != images.shape[:1]:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise PrivacyError(
            f"the model's output is {got} for {images.shape[0]} images; it must be one logit each, shape (B,)"
        )
    return logits


def _losses(per_sample_loss: PerSampleLoss, logits: torch.Tensor) -> torch.Tensor:
    losses = per_sample_loss(logits)
    if losses.shape != logits.shape:
        raise PrivacyError(
            f"per_sample_loss gave shape {tuple(losses.shape)} for logits {tuple(logits.shape)}; do not average"
        )
    return losses


def _unknown_layer(model: nn.Module) -> str | None:
    """The first layer that book-keeping cannot do, in words, or None."""
    for name, layer in model.named_modules():
        if next(layer.parameters(recurse=False), None) is not None and type(layer) not in _BOOKKEPT:
            return f"{name or 'the model'}, a {type(layer).__name__}"
    return None


def _chunks(units: torch.Tensor, num_units: int, chunk_size: int) -> Iterator[tuple[slice | torch.Tensor, int]]:
    """Which images to take together, and how many each unit has there: units of equal size, so that they stack
    without padding."""
    counts = torch.bincount(units.cpu(), minlength=num_units)
    starts = counts.cumsum(0) - counts
    for size in counts[counts > 0].unique().tolist():
        members = starts[counts == size]
        for first in members.split(max(1, chunk_size // size)):
            if int(first[-1]) - int(first[0]) == (len(first) - 1) * size:
                yield slice(int(first[0]), int(first[-1]) + size), size
            else:
                yield (first[:, None] + torch.arange(size)).flatten().to(units.device), size


def _check_arguments(
    model: nn.Module, images: torch.Tensor, units: torch.Tensor, num_units: int, max_grad_norm: float, chunk_size: int
) -> None:
    if not max_grad_norm > 0:
        raise PrivacyError(f"max_grad_norm is {max_grad_norm}; it must be > 0 (math.inf for no clipping)")
    if chunk_size < 1:
        raise PrivacyError(f"chunk_size is {chunk_size}; it must be at least 1")
    if units.dtype != torch.int64 or units.shape != images.shape[:1]:
        raise PrivacyError(
            f"units is {units.dtype} {tuple(units.shape)} for {images.shape[0]} images; give int64, one for each image"
        )
    if units.numel() > 0:
        low, high = int(units[0]), int(units[-1])
        if low < 0 or high >= num_units or bool((units.diff() < 0).any()):
            raise PrivacyError(f"units must not decrease and lie in 0..{num_units - 1}; sort the images by unit")
    if num_units > MAX_UNITS and math.isfinite(max_grad_norm):
        raise PrivacyError(f"num_units is {num_units}; the float slack is meant for at most {MAX_UNITS}: sample fewer")
    for name, layer in model.named_modules():
        if isinstance(layer, _CROSS_SAMPLE):
            raise PrivacyError(f"{name} is a {type(layer).__name__}, which mixes samples; use GroupNorm instead")
        if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
            raise PrivacyError(f"{name} has max_norm or scale_grad_by_freq, which mix samples; switch them off")
    owned = [p for layer in model.modules() for p in layer.parameters(recurse=False)]
    if len(owned) == 0 or len(owned) != len(set(owned)):
        raise PrivacyError("the model has no parameters, or two layers share one; give each layer its own")


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 and no bfloat16 in float32 products and convolutions, on any device, whatever the process has set."""
    backends = torch.backends
    places: list[tuple[Any, str, object]]
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9
        places = [
            (place, "fp32_precision", "ieee")
            for place in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
        ]
    else:
        places = [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
    before = [getattr(place, name) for place, name, _ in places]
    try:
        for place, name, value in places:
            setattr(place, name, value)
        yield
    finally:
        for (place, name, _), value in zip(places, before, strict=True):
            setattr(place, name, value)
