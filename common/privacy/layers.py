"""The gradient of each parameter for each privacy unit, layer by layer, for `common.privacy.bookkeeping`.

From a layer's input x and its output's gradient gy, a unit's images joined along positions, the gradient of a weight is
gy^T x, gy (T, O) and x (T, F). Where T is small it is kept as the product it is (`Product`), and else multiplied out
(`Rows`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

# Gram matrices cost arithmetic, kept products cost memory traffic; a float moved is worth about this many
# multiplications (measured on one CPU core).
_FLOPS_PER_FLOAT = 24
# Blocks of this many floats (1 MB) stay in a processor's cache; a GPU would rather have few and large ones.
_BLOCK_FLOATS = 2**18
_GPU_BLOCK_FLOATS = 2**26
# Up to how many positions T, and how far |x| |gy| / |gy^T x|, a product is kept. The rounding of a float32 product is
# at most (T + 2) 2^-24 |x| |gy| in norm, here 5e-4 of the norm that is reported: half of FLOAT_SLACK. (Faces on our
# discriminators have ratios of 1 to 9.)
_MAX_POSITIONS = 128
_MAX_CANCELLATION = 64.0
# A product whose |x| is larger counts as not finite: gy times a factor may be denormal, with few digits.
_LARGEST_INPUT = 1e18

Reorder = Callable[[torch.Tensor], torch.Tensor]


def _as_it_is(total: torch.Tensor) -> torch.Tensor:
    return total


class Scratch:
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
class Rows:
    """A parameter's gradient for each unit, rows (U, ...); `reorder` brings one to the parameter's own order."""

    parameter: torch.Tensor
    rows: torch.Tensor
    reorder: Reorder = _as_it_is

    def zeros(self) -> torch.Tensor:
        """An empty total for `add_to`."""
        return self.rows.new_zeros(self.rows.shape[1:])

    def squared_norms(self) -> torch.Tensor:
        """(U,) float64."""
        # Float32 in the last dimension only: a sum of squares does not cancel, and of squares that overflow the unit
        # adds zero, while those that vanish (under 1e-45) amount to nothing beside MIN_GRAD_NORM.
        norms: torch.Tensor = torch.linalg.vector_norm(self.rows, dim=-1)
        return norms.double().view(len(norms), -1).square().sum(1)

    def without(self, units: torch.Tensor) -> None:
        """Put zero for these units, (U,) bool."""
        self.rows = self.rows.masked_fill(_like(units, self.rows), 0.0)

    def add_to(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        """Add the units' gradients to the total, each times its factor, (U,) float32."""
        total += (factors @ self.rows.flatten(1)).view(total.shape)


@dataclass
class Product:
    """A weight's gradient (G, O, F) for unit u is gy[u]^T x[u]; x (U, G, T, F), gy (U, G, T, O), not multiplied out."""

    parameter: torch.Tensor
    x: torch.Tensor
    gy: torch.Tensor
    reorder: Reorder = _as_it_is

    def zeros(self) -> torch.Tensor:
        """An empty total for `add_to`."""
        return self.x.new_zeros(self.x.shape[1], self.gy.shape[3], self.x.shape[3])

    def squared_norms(self) -> torch.Tensor:
        """(U,) float64: the squared norm or, where gy^T x cancels so far that float32 would add mostly rounding, more:
        at least (|x| |gy| / _MAX_CANCELLATION)^2, of which that rounding is a small part."""
        if self.x.shape[2] == 1:
            of_x, of_gy = _squares(self.x).sum(2), _squares(self.gy).sum(2)
            squared = of_x * of_gy
        else:
            of_x, of_gy, squared = self._gram()
            squared = squared.maximum(of_x * of_gy / _MAX_CANCELLATION**2)
        return squared.masked_fill(of_x > _LARGEST_INPUT**2, math.inf).sum(1)

    def _gram(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """|x|^2, |gy|^2 and |gy^T x|^2 = sum((gy gy^T) * (x x^T)), each (U, G). In float64: float32 cancels."""
        parts = []
        floats = _BLOCK_FLOATS if self.x.device.type == "cpu" else _GPU_BLOCK_FLOATS
        step = max(1, floats // self.x.shape[1:].numel())
        for x, gy in zip(self.x.split(step), self.gy.split(step), strict=True):
            x, gy = x.double(), gy.double()
            of_x, of_gy = x @ x.mT, gy @ gy.mT
            traces = (gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (of_x, of_gy))
            parts.append(torch.stack([*traces, (of_x * of_gy).sum((-2, -1))]))
        of_x, of_gy, squared = torch.cat(parts, 1)
        return of_x, of_gy, squared

    def without(self, units: torch.Tensor) -> None:
        """Put zero for these units, (U,) bool."""
        self.x = self.x.masked_fill(_like(units, self.x), 0.0)
        self.gy = self.gy.masked_fill(_like(units, self.gy), 0.0)

    def add_to(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        """Add the units' gradients to the total, each times its factor, (U,) float32."""
        gy = (self.gy * factors[:, None, None, None]).transpose(0, 1).flatten(1, 2)
        total.baddbmm_(gy.mT, self.x.transpose(0, 1).flatten(1, 2))


def _squares(values: torch.Tensor) -> torch.Tensor:
    """Sum of squares over the last dimension, in float64: of two factors one may vanish in float32, and not the other."""
    norms: torch.Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64)
    return norms.square()


def _like(units: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return units.view(-1, *[1] * (values.dim() - 1))


def _kept_as_product(positions: int, features: int, outputs: int) -> bool:
    if positions == 1:
        return True
    cheaper = positions**2 * (features + outputs) < _FLOPS_PER_FLOAT * features * outputs
    return cheaper and positions <= _MAX_POSITIONS


def _joined(weight: torch.Tensor, x: torch.Tensor, gy: torch.Tensor, reorder: Reorder) -> Rows | Product:
    if _kept_as_product(x.shape[2], x.shape[3], gy.shape[3]):
        return Product(weight, x, gy, reorder)
    return Rows(weight, gy.mT @ x, reorder)


def _linear(
    layer: nn.Linear, x: torch.Tensor, gy: torch.Tensor, num_units: int, _: Scratch
) -> Iterator[Rows | Product]:
    x = x.float().reshape(num_units, 1, -1, layer.in_features)
    gy = gy.reshape(num_units, 1, -1, layer.out_features)
    yield _joined(layer.weight, x, gy, _as_it_is)
    if layer.bias is not None:
        yield Rows(layer.bias, gy.sum((1, 2)))


def _embedding(
    layer: nn.Embedding, x: torch.Tensor, gy: torch.Tensor, num_units: int, _: Scratch
) -> Iterator[Rows | Product]:
    # A linear layer on one-hot rows.
    one_hot = (x.reshape(-1, 1) == torch.arange(layer.num_embeddings, device=x.device)).float()
    if layer.padding_idx is not None:
        one_hot[:, layer.padding_idx] = 0.0
    one_hot = one_hot.view(num_units, 1, -1, layer.num_embeddings)
    gy = gy.reshape(num_units, 1, -1, layer.embedding_dim)
    yield _joined(layer.weight, one_hot, gy, lambda total: total.mT)


def _conv(
    layer: nn.Conv2d, x: torch.Tensor, gy: torch.Tensor, num_units: int, scratch: Scratch
) -> Iterator[Rows | Product]:
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

    if _kept_as_product(positions, features, outputs // groups):
        yield Product(layer.weight, joined(0, num_units), gy, reorder)
    else:
        rows = scratch.floats(layer, "rows", (num_units, groups, outputs // groups, features), x.device)
        step = max(1, _BLOCK_FLOATS // (groups * positions * features))
        for first in range(0, num_units, step):
            last = min(first + step, num_units)
            torch.matmul(gy[first:last].mT, joined(first, last), out=rows[first:last])
        yield Rows(layer.weight, rows, reorder)
    if layer.bias is not None:
        yield Rows(layer.bias, gy.sum(2).flatten(1))


def _patches(layer: nn.Conv2d, x: torch.Tensor, height: int, width: int, scratch: Scratch) -> torch.Tensor:
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
    layer: nn.GroupNorm, x: torch.Tensor, gy: torch.Tensor, num_units: int, _: Scratch
) -> Iterator[Rows | Product]:
    normed = functional.group_norm(x.float(), layer.num_groups, eps=layer.eps)
    shape = (num_units, x.shape[0] // num_units, x.shape[1], -1)
    yield Rows(layer.weight, (gy * normed).reshape(shape).sum((1, 3)))
    yield Rows(layer.bias, gy.reshape(shape).sum((1, 3)))


def _layer_norm(
    layer: nn.LayerNorm, x: torch.Tensor, gy: torch.Tensor, num_units: int, _: Scratch
) -> Iterator[Rows | Product]:
    normed = functional.layer_norm(x.float(), layer.normalized_shape, eps=layer.eps)
    shape = (num_units, -1, math.prod(layer.normalized_shape))
    yield Rows(layer.weight, (gy * normed).reshape(shape).sum(1))
    if layer.bias is not None:
        yield Rows(layer.bias, gy.reshape(shape).sum(1))


PARTS: dict[type[nn.Module], Callable[..., Iterator[Rows | Product]]] = {
    nn.Conv2d: _conv,
    nn.Embedding: _embedding,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Linear: _linear,
}
