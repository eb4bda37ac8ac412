"""The losses against their formulae, their stationary points in one dimension, and the projection of weights."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from common.models.discriminators import build_discriminator
from common.models.losses import LOSSES, project_weights


def log_s(logit: float) -> float:
    """Log of the logistic function."""
    return -math.log(1.0 + math.exp(-logit))


def log_not_s(logit: float) -> float:
    """Log of one minus the logistic function, 1 - s(x) = s(-x)."""
    return log_s(-logit)


# name -> what real, fake and generator give for the logit x
FORMULAE: dict[str, Callable[[float], tuple[float, float, float]]] = {
    "minimax": lambda x: (-log_s(x), -log_not_s(x), log_not_s(x)),
    "bce": lambda x: (-log_s(x), -log_not_s(x), -log_s(x)),
    "hinge": lambda x: (max(0.0, 1 - x), max(0.0, 1 + x), -x),
    "least-squares": lambda x: (0.5 * (x - 1) ** 2, 0.5 * x**2, 0.5 * (x - 1) ** 2),
    "wasserstein": lambda x: (-x, x, -x),
    "cross-entropy": lambda x: (-log_s(x), 0.0, -log_s(x)),
}
ADVERSARIAL = [name for name, loss in LOSSES.items() if loss.sees_fakes]


def test_all_losses_but_one_have_a_half_on_fakes() -> None:
    assert set(LOSSES) - set(ADVERSARIAL) == {"cross-entropy"}


@pytest.mark.parametrize("name", LOSSES)
def test_against_the_formula(name: str) -> None:
    loss, logits = LOSSES[name], torch.linspace(-4, 4, 9)
    found = torch.stack([loss.real(logits), loss.fake(logits), loss.generator(logits)], dim=1)
    expected = torch.tensor([FORMULAE[name](logit) for logit in logits.tolist()])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_only_minimax_saturates_for_the_generator() -> None:
    slopes = {}
    for name, loss in LOSSES.items():
        sure_of_a_fake = torch.tensor([-20.0], requires_grad=True)
        loss.generator(sure_of_a_fake).sum().backward()
        assert sure_of_a_fake.grad is not None
        slopes[name] = float(sure_of_a_fake.grad)
    assert -1e-8 < slopes.pop("minimax") < 0
    assert max(slopes.values()) < -0.99


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_no_discriminator_gains_where_real_and_fake_are_alike(name: str) -> None:
    # At its best logit for a point that is as often real as fake, 0 or 1/2, the two halves' gradients cancel.
    best = torch.tensor([0.5 if name == "least-squares" else 0.0], requires_grad=True)
    loss = LOSSES[name]
    (loss.real(best) + loss.fake(best)).sum().backward()
    assert best.grad is not None
    assert float(best.grad) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_generator_of_one_number_finds_the_mean(name: str) -> None:
    # Real numbers N(2, 1), fakes m + N(0, 1), logit a + b x: m must go to 2 under every loss. Averaged over the last
    # steps, as a saddle point is circled and not reached.
    random = torch.Generator().manual_seed(0)
    shift = torch.zeros((), requires_grad=True)
    discriminator = nn.Linear(1, 1)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.zero_()
    loss, seen = LOSSES[name], []
    # A decay of the weight, not of the bias, makes the circles shrink.
    groups = [{"params": [discriminator.weight], "weight_decay": 0.3}, {"params": [discriminator.bias]}]
    lower = torch.optim.SGD(groups, lr=0.1)
    upper = torch.optim.SGD([shift], lr=0.05)
    for _ in range(1500):
        real = 2 + torch.randn(64, 1, generator=random)
        fake = shift + torch.randn(64, 1, generator=random)
        lower.zero_grad()
        halves = loss.real(discriminator(real).squeeze(1)), loss.fake(discriminator(fake.detach()).squeeze(1))
        (halves[0].mean() + halves[1].mean()).backward()
        lower.step()
        project_weights(discriminator, loss, 0.3)
        upper.zero_grad()
        loss.generator(discriminator(fake).squeeze(1)).mean().backward()
        upper.step()
        seen.append(float(shift.detach()))
    assert sum(seen[-500:]) / 500 == pytest.approx(2.0, abs=0.2)


def test_weights_are_projected_for_the_loss_that_asks_and_no_other() -> None:
    for name, loss in LOSSES.items():
        model = build_discriminator("dcgan", image_size=28, channels=1, num_classes=2, width=4)
        before = [p.detach().clone() for p in model.parameters()]
        addresses = [p.data_ptr() for p in model.parameters()]
        project_weights(model, loss, 0.05)
        assert addresses == [p.data_ptr() for p in model.parameters()]
        for p, old in zip(model.parameters(), before, strict=True):
            expected = old.clamp(-0.05, 0.05) if name == "wasserstein" else old
            assert torch.equal(p, expected)
            assert p.requires_grad
        assert loss.bounded_weights == (name == "wasserstein")
    assert not torch.equal(before[0], expected)


def test_a_projection_keeps_what_fits() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, -0.02, 0.0], [0.02, 0.05, 7.0]]))
        model.bias.copy_(torch.tensor([-0.05, 0.06]))
    project_weights(model, LOSSES["wasserstein"], 0.05)
    assert torch.equal(model.weight, torch.tensor([[-0.05, -0.02, 0.0], [0.02, 0.05, 0.05]]))
    assert torch.equal(model.bias, torch.tensor([-0.05, 0.05]))


@pytest.mark.parametrize("weight_clip", [0.0, -1.0, math.nan, math.inf])
def test_a_useless_bound_is_refused(weight_clip: float) -> None:
    with pytest.raises(ConfigError, match="weight_clip"):
        project_weights(nn.Linear(1, 1), LOSSES["wasserstein"], weight_clip)
