"""The clipped sum under weights that a coordinator chose to break it: one unit still gets no more than the bound."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from common.models.discriminators import DISCRIMINATORS, build_discriminator
from common.models.losses import LOSSES
from common.privacy.bookkeeping import clip_factors
from common.privacy.clipping import clipped_sum
from common.privacy.layers import Product


def random_images(count: int, channels: int, size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def one_unit(
    model: nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, c: float
) -> torch.Tensor:
    return clipped_sum(model, loss, images, None, torch.zeros(len(images), dtype=torch.int64), 1, c).double()


def hostile_models(name: str) -> Iterator[nn.Module]:
    """Finite weights chosen to make float arithmetic cancel, overflow or vanish."""
    size = 64 if name == "dcgan" else 28  # at 64 the last convolution takes its norms from Gram matrices
    for kind in ("bias", "scaled", "random"):
        for scale in (1e-20, 1e-8, 1e3, 1e4, 1e5, 1e6, 1e8, 1e12, 1e20):
            model = build_discriminator(name, image_size=size, channels=1, num_classes=0, width=4)
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for key, p in model.named_parameters():
                    if kind == "bias" and key.endswith("bias"):
                        p.fill_(scale)
                    elif kind == "scaled":
                        p.mul_(scale)
                    elif kind == "random":
                        p.copy_(torch.randn(p.shape, generator=generator) * scale)
                model.head.bias.zero_()
            yield model


def cancelling_mlp(bias: float, logit: float) -> nn.Module:
    """Hidden features of about `bias`, and an output gradient of another sign for each of a person's images."""
    model = build_discriminator("mlp", image_size=28, channels=1, num_classes=0, width=4)
    first, second, third = (layer for layer in model.body.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        first.weight.copy_(torch.randn(first.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
        first.bias.fill_(bias)
        second.weight[0, :2] = torch.tensor([0.01, -0.01])
        second.bias.fill_(1.0)
        third.weight[:2, :2] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        model.head.weight[0, :2] = 1.0
        model.head.bias.fill_(logit)
    return model


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_hostile_weights_get_no_more_than_the_bound(name: str, size: int) -> None:
    for model in hostile_models(name):
        pixels = 64 if name == "dcgan" else 28
        images = random_images(2 * size, 1, pixels).clamp(-1, 1)
        for c in (1e-6, 1e-3, 1.0):
            for own in (images[:size], images[size:]):
                contribution = one_unit(model, LOSSES["bce"].real, own, c).norm()
                assert contribution <= c  # false for nan


@pytest.mark.parametrize("bias", [1e2, 1e4, 1e5, 1e6, 1e8])
@pytest.mark.parametrize("logit", [-60.0, 1.0])
def test_cancelling_gradients_get_no_more_than_the_bound(bias: float, logit: float) -> None:
    model = cancelling_mlp(bias, logit)
    for seed in range(20):
        images = random_images(4, 1, 28, seed).clamp(-1, 1)
        for loss in (LOSSES["bce"].real, LOSSES["hinge"].real):
            for size in (2, 4):
                assert one_unit(model, loss, images[:size], 0.01).norm() <= 0.01


@pytest.mark.parametrize("count", [2, 3, 8, 33, 65])
def test_one_unit_does_not_change_how_hostile_weights_round_the_others(count: int) -> None:
    for bias in (1e4, 1e6, 1e8):
        model = cancelling_mlp(bias, 1.0)  # the hinge: rounding decides whether an image has a gradient at all
        for seed in range(8):
            images, units = random_images(count, 1, 28, seed).clamp(-1, 1), torch.arange(count)
            for loss in (LOSSES["bce"].real, LOSSES["hinge"].real):
                whole = clipped_sum(model, loss, images, None, units, count, 0.01).double()
                less = clipped_sum(model, loss, images[1:], None, units[1:] - 1, count - 1, 0.01).double()
                assert (whole - less).norm() <= 0.01


@pytest.mark.parametrize("exponent", [-44, -30, -10, 10, 17, 25, 38])
def test_a_product_is_clipped_at_every_magnitude(exponent: int) -> None:
    # One factor near the smallest float, the other near the largest: squares of float32 would vanish or overflow.
    generator = torch.Generator().manual_seed(1)
    for positions in (1, 4):
        x = torch.randn(3, 1, positions, 6, generator=generator).clamp(-3, 3).double() * 10.0**exponent
        gy = torch.randn(3, 1, positions, 5, generator=generator).clamp(-3, 3).double() * 10.0 ** min(-exponent, 37)
        x[1, :, 1::2], gy[1, :, 1::2] = -x[1, :, 0::2][:, : positions // 2], gy[1, :, 0::2][:, : positions // 2]
        product = Product(nn.Parameter(torch.zeros(5, 6)), x.float(), gy.float())
        for c in (1e-6, 1.0, 100.0):
            factors = clip_factors(product.squared_norms(), c)
            for unit in range(3):
                alone = Product(product.parameter, product.x[unit : unit + 1], product.gy[unit : unit + 1])
                if factors[unit] == 0:
                    alone.without(torch.tensor([True]))
                total = alone.zeros()
                alone.add_to(total, factors[unit : unit + 1])
                assert total.double().norm() <= c


@pytest.mark.parametrize("positions", [4, 64])
def test_norms_from_gram_matrices_keep_their_digits_where_the_gradient_cancels(positions: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = 1.0 + 0.025 * positions**0.5 * torch.randn(8, 1, positions, 512, generator=generator)
    gy = torch.randn(8, 1, positions, 64, generator=generator)
    gy -= gy.mean(2, keepdim=True)  # |x| |gy| is about 40 times |gy^T x|
    expected = (gy.double().mT @ x.double()).square().sum((1, 2, 3))
    found = Product(nn.Parameter(torch.zeros(64, 512)), x, gy).squared_norms()
    assert ((found / expected - 1).abs() < 1e-7).all()
