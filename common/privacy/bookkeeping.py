"""Clipped sums of gradients by book-keeping, for layers that we know; `common.privacy.clipping` is the way in.

Bu, Mao and Xu 2022, "Scalable and efficient training of large convolutional neural networks with differential
privacy"; Bu et al. 2023, "Differentially private optimization on large model at small cost". Hooks keep every layer's
input x, and one backward pass gives every layer's output gradient gy and no weight gradient. A unit's images are joined
along positions, so the gradient of a weight for one unit is gy^T x with gy (T, O) and x (T, F), T positions of all its
images, and no per-image gradient is ever built. Its norm comes from that product, kept, or where the product would be
large and T is small from the Gram matrices: |gy^T x|^2 = sum((gy gy^T) * (x x^T)). The sum over units is one more
product, with gy scaled by the clip factors.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from common.errors import PrivacyError

FLOAT_SLACK = 1e-3
# Gram matrices cost arithmetic, kept products cost memory traffic; a float moved is worth about this many
# multiplications (measured on one CPU core).
_FLOPS_PER_FLOAT = 24
# Convolution patches are built this many floats at a time (1 MB), so that they stay in the processor's cache.
_BLOCK_FLOATS = 2**18

PerSampleLoss = Callable[[torch.Tensor], torch.Tensor]
_Reorder = Callable[[torch.Tensor], torch.Tensor]
_Kept = tuple[nn.Module, torch.Tensor, torch.Tensor | None]  # a layer, its input, its output's gradient


def unknown_layer(model: nn.Module) -> str | None:
    """Name, in words, the first layer with parameters that book-keeping cannot do; None if it can do all."""
    for name, layer in model.named_modules():
        # Subclasses are not taken: their forward pass may be another.
        if next(layer.parameters(recurse=False), None) is not None and type(layer) not in _PARTS:
            return f"{name or 'the model'}, a {type(layer).__name__}"
    return None


def clip_factors(squared_norms: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    """min(1, C (1 - FLOAT_SLACK) / norm) for each unit; (U,) to (U,)."""
    return (max_grad_norm * (1.0 - FLOAT_SLACK) / squared_norms.sqrt()).clamp(max=1.0)


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
        self._totals: dict[torch.Tensor, tuple[torch.Tensor, _Reorder]] = {}
        self._scratch = _Scratch()
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
        self._scratch = _Scratch()
        self._stack.close()

    def add(self, images: torch.Tensor, labels: torch.Tensor | None, size: int, max_grad_norm: float) -> None:
        """Add the units of these images, `size` images each, in order."""
        kept = self._forward_and_back(images, labels, size)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            gradients = self._gradients(kept, images.shape[0], size)
            if not gradients:
                return
            squared = torch.stack([gradient.squared_norms() for gradient in gradients]).sum(0)
            finite = squared.isfinite()
            if bool(finite.all()):
                factors = clip_factors(squared, max_grad_norm)
                for gradient in gradients:
                    if gradient.parameter not in self._totals:
                        self._totals[gradient.parameter] = gradient.zeros(), gradient.reorder
                    gradient.add_to(self._totals[gradient.parameter][0], factors)
                return
        if bool(finite.any()):
            # Infinity times zero is not zero: do the others again without the units that are not finite.
            del gradients
            left = finite.repeat_interleave(size)
            self.add(images[left], None if labels is None else labels[left], size, max_grad_norm)

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
            kept.append((layer, x, gy))
        return kept

    def _gradients(self, kept: list[_Kept], batch: int, size: int) -> list["_Rows | _Product"]:
        gradients: list[_Rows | _Product] = []
        while kept:  # emptied on the way, to free what is done
            layer, x, gy = kept.pop()
            if gy is not None:
                gradients += _PARTS[type(layer)](layer, x, gy.float(), batch // size, self._scratch)
        return [gradient for gradient in gradients if gradient.parameter in self._trained]


def _as_it_is(total: torch.Tensor) -> torch.Tensor:
    return total


class _Scratch:
    """Buffers that live from chunk to chunk: fresh memory costs more than the copy into it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[nn.Module, str], torch.Tensor] = {}

    def floats(
        self, layer: nn.Module, use: str, shape: tuple[int, ...], device: torch.device, *, zeros: bool = False
    ) -> torch.Tensor:
        """A float32 tensor (zeros when new, if asked for) that keeps what was written for this layer and use before."""
        numel, buffer = math.prod(shape), self._buffers.get((layer, use))
        if buffer is None or buffer.numel() < numel:
            buffer = torch.zeros(numel, device=device) if zeros else torch.empty(numel, device=device)
            self._buffers[layer, use] = buffer
        return buffer[:numel].view(shape)


@dataclass
class _Rows:
    """A parameter's gradient for each unit, rows (U, ...); `reorder` brings one to the parameter's own order."""

    parameter: torch.Tensor
    rows: torch.Tensor
    reorder: _Reorder = _as_it_is

    def zeros(self) -> torch.Tensor:
        return self.rows.new_zeros(self.rows.shape[1:])

    def squared_norms(self) -> torch.Tensor:
        # Over the last dimension first: one long float32 sum of squares would lose digits.
        norms: torch.Tensor = torch.linalg.vector_norm(self.rows, dim=-1)
        return norms.view(len(norms), -1).square().sum(1)

    def add_to(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        total += (factors @ self.rows.flatten(1)).view(total.shape)


@dataclass
class _Product:
    """A weight's gradient (G, O, F) for unit u is gy[u]^T x[u]; x (U, G, T, F), gy (U, G, T, O), not multiplied out."""

    parameter: torch.Tensor
    x: torch.Tensor
    gy: torch.Tensor
    reorder: _Reorder = _as_it_is

    def zeros(self) -> torch.Tensor:
        return self.x.new_zeros(self.x.shape[1], self.gy.shape[3], self.x.shape[3])

    def squared_norms(self) -> torch.Tensor:
        if self.x.shape[2] == 1:
            return (self.x.square().sum((2, 3)) * self.gy.square().sum((2, 3))).sum(1)
        return ((self.x @ self.x.mT) * (self.gy @ self.gy.mT)).sum((1, 2, 3))

    def add_to(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        gy = (self.gy * factors[:, None, None, None]).transpose(0, 1).flatten(1, 2)
        total.baddbmm_(gy.mT, self.x.transpose(0, 1).flatten(1, 2))


def _gram_is_cheaper(positions: int, features: int, outputs: int) -> bool:
    return positions == 1 or positions**2 * (features + outputs) < _FLOPS_PER_FLOAT * features * outputs


def _joined(weight: torch.Tensor, x: torch.Tensor, gy: torch.Tensor, reorder: _Reorder) -> _Rows | _Product:
    if _gram_is_cheaper(x.shape[2], x.shape[3], gy.shape[3]):
        return _Product(weight, x, gy, reorder)
    return _Rows(weight, gy.mT @ x, reorder)


def _linear(
    layer: nn.Linear, x: torch.Tensor, gy: torch.Tensor, num_units: int, _: _Scratch
) -> Iterator[_Rows | _Product]:
    x = x.float().reshape(num_units, 1, -1, layer.in_features)
    gy = gy.reshape(num_units, 1, -1, layer.out_features)
    yield _joined(layer.weight, x, gy, _as_it_is)
    if layer.bias is not None:
        yield _Rows(layer.bias, gy.sum((1, 2)))


def _embedding(
    layer: nn.Embedding, x: torch.Tensor, gy: torch.Tensor, num_units: int, _: _Scratch
) -> Iterator[_Rows | _Product]:
    # A linear layer on one-hot rows.
    one_hot = (x.reshape(-1, 1) == torch.arange(layer.num_embeddings, device=x.device)).float()
    if layer.padding_idx is not None:
        one_hot[:, layer.padding_idx] = 0.0
    one_hot = one_hot.view(num_units, 1, -1, layer.num_embeddings)
    gy = gy.reshape(num_units, 1, -1, layer.embedding_dim)
    yield _joined(layer.weight, one_hot, gy, lambda total: total.mT)


def _conv(
    layer: nn.Conv2d, x: torch.Tensor, gy: torch.Tensor, num_units: int, scratch: _Scratch
) -> Iterator[_Rows | _Product]:
    (kernel_h, kernel_w), groups = layer.kernel_size, layer.groups
    (batch, outputs, height, width), channels = gy.shape, x.shape[1] // groups
    size, features = batch // num_units, kernel_h * kernel_w * channels
    positions = size * height * width
    patches = _patches(layer, x.float(), height, width, scratch)
    gy = gy.permute(0, 2, 3, 1).reshape(num_units, positions, groups, outputs // groups).transpose(1, 2)

    def joined(first: int, last: int) -> torch.Tensor:
        block = scratch.floats(layer, "patches", (last - first, positions, groups, features), x.device)
        block.view(-1, *patches.shape[1:]).copy_(patches[first * size : last * size])
        return block.transpose(1, 2)

    def reorder(total: torch.Tensor) -> torch.Tensor:
        return total.view(outputs, kernel_h, kernel_w, channels).permute(0, 3, 1, 2)

    if _gram_is_cheaper(positions, features, outputs // groups):
        yield _Product(layer.weight, joined(0, num_units), gy, reorder)
    else:
        rows = scratch.floats(layer, "rows", (num_units, groups, outputs // groups, features), x.device)
        step = max(1, _BLOCK_FLOATS // (groups * positions * features))
        for first in range(0, num_units, step):
            last = min(first + step, num_units)
            torch.matmul(gy[first:last].mT, joined(first, last), out=rows[first:last])
        yield _Rows(layer.weight, rows, reorder)
    if layer.bias is not None:
        yield _Rows(layer.bias, gy.sum(2).flatten(1))


def _patches(layer: nn.Conv2d, x: torch.Tensor, height: int, width: int, scratch: _Scratch) -> torch.Tensor:
    """A view (B, height, width, groups, kernel height, kernel width, channels / groups) of the padded input."""
    # In channels-last memory a row of a patch is one stretch of kernel width * channels floats: quick to copy.
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    if layer.padding_mode != "zeros":
        x, left, right, top, bottom = functional.pad(x, [left, right, top, bottom], layer.padding_mode), 0, 0, 0, 0
    (batch, channels, inner_h, inner_w), groups = x.shape, layer.groups
    shape = (batch, top + inner_h + bottom, left + inner_w + right, channels)
    padded = scratch.floats(layer, "padded", shape, x.device, zeros=True)  # its margin is never written
    padded[:, top : top + inner_h, left : left + inner_w] = x.permute(0, 2, 3, 1)
    (stride_h, stride_w), (dilation_h, dilation_w) = layer.stride, layer.dilation
    step_b, step_h, step_w, _ = padded.stride()
    return padded.as_strided(
        (batch, height, width, groups, *layer.kernel_size, channels // groups),
        (step_b, step_h * stride_h, step_w * stride_w, channels // groups, step_h * dilation_h, step_w * dilation_w, 1),
    )


def _group_norm(
    layer: nn.GroupNorm, x: torch.Tensor, gy: torch.Tensor, num_units: int, _: _Scratch
) -> Iterator[_Rows | _Product]:
    normed = functional.group_norm(x.float(), layer.num_groups, eps=layer.eps)
    shape = (num_units, x.shape[0] // num_units, x.shape[1], -1)
    yield _Rows(layer.weight, (gy * normed).reshape(shape).sum((1, 3)))
    yield _Rows(layer.bias, gy.reshape(shape).sum((1, 3)))


def _layer_norm(
    layer: nn.LayerNorm, x: torch.Tensor, gy: torch.Tensor, num_units: int, _: _Scratch
) -> Iterator[_Rows | _Product]:
    normed = functional.layer_norm(x.float(), layer.normalized_shape, eps=layer.eps)
    shape = (num_units, -1, math.prod(layer.normalized_shape))
    yield _Rows(layer.weight, (gy * normed).reshape(shape).sum(1))
    if layer.bias is not None:
        yield _Rows(layer.bias, gy.reshape(shape).sum(1))


_PARTS: dict[type[nn.Module], Callable[..., Iterator[_Rows | _Product]]] = {
    nn.Conv2d: _conv,
    nn.Embedding: _embedding,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Linear: _linear,
}
