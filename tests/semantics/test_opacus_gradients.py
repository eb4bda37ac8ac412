"""What we rely on, and what we guard against, in Opacus's per-sample gradients.

A test named `..._is_wrong` documents a fault of Opacus 1.6: if it fails, Opacus has been mended and the guard in
`common.privacy.clipping` can be lifted.
"""

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from torch import nn

from common.errors import PrivacyError
from common.models.discriminators import DISCRIMINATORS, build_discriminator
from common.models.losses import LOSSES
from common.privacy import clipping
from common.privacy.clipping import clipped_sum

UNITS = torch.arange(6)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def convolution(padding_mode: str = "zeros") -> nn.Module:
    layers = nn.Conv2d(2, 4, 3, padding=1, padding_mode=padding_mode), nn.Tanh(), nn.Conv2d(4, 3, 3, stride=2)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(27, 1), nn.Flatten(0))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def images() -> torch.Tensor:
    return torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def alone(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    rows = []
    for image in batch:
        gradients = torch.autograd.grad(LOSSES["bce"].real(model(image[None])).sum(), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def by_opacus(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    hooked = GradSampleModule(model, loss_reduction="sum")
    LOSSES["bce"].real(hooked(batch)).sum().backward()
    return torch.cat([p.grad_sample.flatten(1) for p in hooked.parameters()], dim=1)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_hooks_are_right_in_plain_memory() -> None:
    assert error(by_opacus(copy.deepcopy(convolution()), images()), alone(convolution(), images())) < 1e-5


def test_hooks_in_channels_last_memory_is_wrong() -> None:
    model = convolution().to(memory_format=torch.channels_last)
    batch = images().contiguous(memory_format=torch.channels_last)
    assert error(by_opacus(model, batch), alone(convolution(), images())) > 0.01


def test_hooks_with_reflect_padding_is_wrong() -> None:
    model = convolution("reflect")
    expected = alone(model, images())
    assert error(by_opacus(model, images()), expected) > 0.01


def test_hooks_of_a_model_in_eval_mode_fail() -> None:
    hooked = GradSampleModule(convolution().eval(), loss_reduction="sum")
    with pytest.raises(ValueError, match="No activations"):
        LOSSES["bce"].real(hooked(images())).sum().backward()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_our_paths_agree_where_opacus_alone_would_not(channels_last: bool, training: bool) -> None:
    model, batch = convolution().train(training), images()
    if channels_last:
        model, batch = model.to(memory_format=torch.channels_last), batch.contiguous(memory_format=torch.channels_last)
    sums = [
        clipped_sum(model, LOSSES["bce"].real, batch, None, UNITS, 6, 0.1, method=method)
        for method in ("book-keeping", "opacus")
    ]
    assert error(sums[0], sums[1]) < 1e-5


def test_our_opacus_path_refuses_other_padding() -> None:
    with pytest.raises(PrivacyError, match="reflect"):
        clipped_sum(convolution("reflect"), LOSSES["bce"].real, images(), None, UNITS, 6, 0.1, method="opacus")


def test_our_opacus_path_finds_wrong_gradients() -> None:
    class ChannelsLast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.contiguous(memory_format=torch.channels_last)

    model = nn.Sequential(ChannelsLast(), *convolution())
    with pytest.raises(PrivacyError, match="miss the plain gradient"):
        clipped_sum(model, LOSSES["bce"].real, images(), None, UNITS, 6, 0.1, method="opacus")
    found = clipped_sum(model, LOSSES["bce"].real, images(), None, UNITS, 6, 0.1)
    assert error(found, clipped_sum(convolution(), LOSSES["bce"].real, images(), None, UNITS, 6, 0.1)) < 1e-5


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("units", [UNITS, torch.tensor([0, 0, 0, 1, 1, 2])], ids=["image", "person"])
def test_book_keeping_agrees_with_opacus(name: str, num_classes: int, loss: str, units: torch.Tensor) -> None:
    model = build_discriminator(name, image_size=28, channels=2, num_classes=num_classes, width=4).eval()  # no masks
    batch = torch.randn(6, 2, 28, 28, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(6) % num_classes if num_classes else None
    sums = [
        clipped_sum(model, LOSSES[loss].real, batch, labels, units, 6, 0.5, method=method)
        for method in ("book-keeping", "opacus")
    ]
    assert error(sums[0], sums[1]) < 1e-5


def test_fakes_go_the_same_way_with_the_fake_loss() -> None:
    model = convolution()
    rows = []
    for image in images():
        gradients = torch.autograd.grad(LOSSES["hinge"].fake(model(image[None])).sum(), list(model.parameters()))
        row = torch.cat([g.flatten() for g in gradients])
        rows.append(row * min(1.0, 0.1 * (1 - clipping.FLOAT_SLACK) / float(row.norm())))
    found = clipped_sum(model, LOSSES["hinge"].fake, images(), None, UNITS, 6, 0.1)
    assert error(found, torch.stack(rows).sum(0)) < 1e-5
