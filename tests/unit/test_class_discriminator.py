"""The classifier: its margin is the softmax's, its units are clipped as a loop clips them, and weights chosen to harm gain nothing."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from common.gradients import fake_mean
from common.models import initialise
from common.models.discriminators import DISCRIMINATORS, ClassDiscriminator, build_discriminator
from common.models.losses import LOSSES
from common.privacy.clipping import FLOAT_SLACK, clipped_sum
from common.privacy.units import PrivacyModel
from common.sections import PrivacyConfig

LOSS = LOSSES["cross-entropy"]
PHOTOGRAPHS = torch.arange(7)
PERSONS = torch.tensor(
    [0, 0, 0, 1, 2, 2, 5]
)  # persons 3 and 4 drew no images; 0 and 2 have several, of several classes

each_body = pytest.mark.parametrize("name", DISCRIMINATORS)


def classifier(name: str, num_classes: int) -> ClassDiscriminator:
    found = build_discriminator(name, image_size=28, channels=1, num_classes=num_classes, width=4, classifier=True)
    assert isinstance(found, ClassDiscriminator)
    return found.eval()  # without dropout; tests/contracts/test_models.py has it on


def some_images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def flat_gradient(model: ClassDiscriminator, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def by_hand(model: ClassDiscriminator, images: Tensor, labels: Tensor, units: Tensor, c: float) -> Tensor:
    """torch's own cross-entropy, a unit at a time."""
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for unit in units.unique():
        own = units == unit
        gradient = flat_gradient(model, functional.cross_entropy(model.classify(images[own]), labels[own]))
        total += gradient * min(1.0, c * (1 - FLOAT_SLACK) / float(gradient.norm()))
    return total


@each_body
@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_the_loss_of_a_margin_is_the_cross_entropy(name: str, num_classes: int) -> None:
    model, images = classifier(name, num_classes), some_images(20)
    labels = torch.arange(20) % num_classes
    for scale in (1.0, 30.0):
        with torch.no_grad():
            model.classes.weight.mul_(scale)
        logits, margins = model.classify(images), model(images, labels)
        assert logits.shape == (20, num_classes)
        assert margins.shape == (20,)
        expected = functional.cross_entropy(logits, labels, reduction="none")
        torch.testing.assert_close(LOSS.real(margins), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(LOSS.generator(margins), expected, atol=1e-5, rtol=1e-5)
        # Above 0 exactly where the class has more than half of the softmax.
        assert torch.equal(margins > 0, logits.softmax(1)[torch.arange(20), labels] > 0.5)


def test_the_loss_of_a_margin_is_finite_however_sure_the_classifier_is() -> None:
    model, images = classifier("mlp", 3), some_images(6)
    with torch.no_grad():
        model.classes.bias.copy_(torch.tensor([1e4, -1e4, 0.0]))
    labels = torch.arange(6) % 3
    loss = LOSS.real(model(images, labels))
    torch.testing.assert_close(loss, functional.cross_entropy(model.classify(images), labels, reduction="none"))
    assert torch.isfinite(flat_gradient(model, loss.sum())).all()


@each_body
@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("units", [PHOTOGRAPHS, PERSONS], ids=["image", "person"])
@pytest.mark.parametrize("method", ["book-keeping", "opacus"])
def test_units_are_clipped_as_a_loop_clips_them(name: str, num_classes: int, units: Tensor, method: str) -> None:
    model, images, labels = classifier(name, num_classes), some_images(7), torch.arange(7) % num_classes
    norms = [
        float(by_hand(model, images[u], labels[u], PHOTOGRAPHS[:1], math.inf).norm()) for u in PHOTOGRAPHS.split(1)
    ]
    c = sorted(norms)[3] * 0.9  # some units are clipped and some are not
    expected = by_hand(model, images, labels, units, c)
    found = clipped_sum(model, LOSS.real, images, labels, units, 7, c, chunk_size=3, method=method)  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 1e-5 * expected.norm()


@each_body
@pytest.mark.parametrize("where", ["all weights", "one of the last layer", "one bias"])
@pytest.mark.parametrize("value", [1e8, 1e30, math.inf, -math.inf, math.nan])
def test_hostile_weights_get_no_more_than_the_bound(name: str, where: str, value: float) -> None:
    """A unit whose gradient is not finite adds zero; any other, C at most."""
    model, images, labels, c = classifier(name, 3), some_images(6), torch.arange(6) % 3, 1e-3
    with torch.no_grad():
        if where == "one bias":
            model.classes.bias[1] = value
        elif where == "one of the last layer":
            model.classes.weight[1, 0] = value
        else:
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * value)
    for unit in torch.arange(6).split(2):
        one = torch.zeros(2, dtype=torch.int64)
        found = clipped_sum(model, LOSS.real, images[unit], labels[unit], one, 1, c).double()
        plain = flat_gradient(model, LOSS.real(model(images[unit], labels[unit])).mean())
        assert found.norm() <= c  # false for nan
        if not torch.isfinite(plain).all():
            assert not found.any()
        if math.isnan(value):
            assert not found.any()


@each_body
@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e30])
def test_an_image_that_is_no_image_adds_zero_and_leaves_the_others_alone(name: str, bad: float) -> None:
    model, images, labels = classifier(name, 3), some_images(4), torch.arange(4) % 3
    spoilt = images.clone()
    spoilt[1] = bad
    alone = clipped_sum(model, LOSS.real, spoilt[1:2], labels[1:2], PHOTOGRAPHS[:1], 1, 0.1)
    assert alone.norm() <= 0.1
    if not math.isfinite(bad):
        assert not alone.any()
    found = clipped_sum(model, LOSS.real, spoilt, labels, PHOTOGRAPHS[:4], 4, 0.1) - alone
    kept = torch.tensor([0, 2, 3])
    others = clipped_sum(model, LOSS.real, images[kept], labels[kept], PHOTOGRAPHS[:3], 3, 0.1)
    torch.testing.assert_close(found, others, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("privacy_model", [PrivacyModel.CENTRAL, PrivacyModel.NONE])
def test_fakes_teach_it_nothing(privacy_model: PrivacyModel) -> None:
    privacy = PrivacyConfig(privacy_model=privacy_model)
    model, images, labels = classifier("dcgan", 3), some_images(6), torch.arange(6) % 3
    found = fake_mean(model, LOSS, images, labels, privacy)
    assert found.shape == (sum(p.numel() for p in model.parameters()),)
    assert not found.any()
    assert not flat_gradient(model, LOSS.fake(model(images, labels)).sum()).any()
    other = build_discriminator("dcgan", image_size=28, channels=1, num_classes=3, width=4)
    assert fake_mean(other, LOSSES["bce"], images, labels, privacy).any()


def test_a_classifier_that_learned_tells_the_classes_apart() -> None:
    """Bars, upright and flat, on the fixed features: a linear layer is enough."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (64,), generator=random)
    images = torch.full((64, 1, 28, 28), -1.0)
    for image, label, place in zip(images, labels, torch.randint(2, 24, (64,), generator=random), strict=True):
        bar = image[0, place : place + 2] if label else image[0, :, place : place + 2]
        bar.fill_(1.0)
    model = classifier("scattering", 2)
    initialise(model, random)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    for _ in range(60):
        optimizer.zero_grad()
        LOSS.real(model(images[:32], labels[:32])).mean().backward()
        optimizer.step()
    assert (model.classify(images[32:]).argmax(1) == labels[32:]).float().mean() > 0.95
