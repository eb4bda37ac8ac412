"""Every entry of the model and loss registries keeps the same contract."""

import pytest
import torch

from common.errors import ConfigError
from common.models import initialise
from common.models.discriminators import DISCRIMINATORS, build_discriminator
from common.models.generators import GENERATORS, build_generator
from common.models.losses import LOSSES

SIZES = [28, 32, 64]


def _labels(num_classes: int, batch: int) -> torch.Tensor | None:
    return torch.arange(batch) % num_classes if num_classes else None


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_classes", [0, 10])
def test_generator_draws_images(name: str, image_size: int, channels: int, num_classes: int) -> None:
    model = build_generator(
        name, image_size=image_size, channels=channels, num_classes=num_classes, latent_dim=16, width=8
    )
    latent = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    images = model(latent, _labels(num_classes, 5))
    assert images.shape == (5, channels, image_size, image_size)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert images.std(0).max() > 0.01  # different latents, different images
    torch.testing.assert_close(
        model.to(memory_format=torch.channels_last)(latent, _labels(num_classes, 5)), images, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize("num_classes", [0, 10])
def test_discriminator_judges_each_image_alone(name: str, image_size: int, num_classes: int) -> None:
    model = build_discriminator(name, image_size=image_size, channels=3, num_classes=num_classes, width=8)
    images = torch.randn(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    labels = _labels(num_classes, 4)
    logits = model(images, labels)
    assert logits.shape == (4,)
    for i in range(4):
        alone = model(images[i : i + 1], None if labels is None else labels[i : i + 1])
        torch.testing.assert_close(alone[0], logits[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GENERATORS)
def test_class_changes_the_image(name: str) -> None:
    model = build_generator(name, image_size=28, channels=1, num_classes=3, latent_dim=8, width=8).eval()
    images = model(torch.zeros(3, 8), torch.arange(3))
    assert (images[0] - images[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_class_changes_the_logit(name: str) -> None:
    model = build_discriminator(name, image_size=28, channels=1, num_classes=3, width=8)
    logits = model(torch.ones(3, 1, 28, 28), torch.arange(3))
    assert len(set(logits.tolist())) == 3


def test_start_depends_on_the_given_generator_alone() -> None:
    before = torch.get_rng_state()
    model = build_discriminator("dcgan", image_size=28, channels=1, num_classes=2, width=4)
    other = build_discriminator("dcgan", image_size=28, channels=1, num_classes=2, width=4)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    torch.rand(3, generator=torch.Generator().manual_seed(5))
    initialise(model, torch.Generator().manual_seed(5))
    initialise(other, torch.Generator().manual_seed(6))
    assert torch.equal(before, torch.get_rng_state())
    weight = model.head.weight.clone()
    assert not torch.equal(weight, other.head.weight)
    initialise(other, torch.Generator().manual_seed(5))
    assert torch.equal(weight, other.head.weight)


def test_start_resets_running_statistics() -> None:
    model = build_generator("dcgan", image_size=28, channels=1, num_classes=0, latent_dim=8, width=8)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.ones(4, 8))
    initialise(model, torch.Generator().manual_seed(0))
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh[name]), name


def test_start_refuses_an_unknown_layer() -> None:
    with pytest.raises(TypeError, match="PReLU"):
        initialise(torch.nn.PReLU(), torch.Generator())


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("image_size", SIZES)
def test_signal_neither_fades_nor_explodes_at_the_start(name: str, image_size: int) -> None:
    model = build_discriminator(name, image_size=image_size, channels=1, num_classes=0, width=16)
    images = torch.randn(64, 1, image_size, image_size, generator=torch.Generator().manual_seed(1))
    assert 0.1 < model(images).std() < 4


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_per_sample_and_has_the_right_sign(name: str) -> None:
    loss = LOSSES[name]
    logits = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0])
    for part, direction in ((loss.real, -1), (loss.fake, 1), (loss.generator, -1)):
        values = part(logits)
        assert values.shape == logits.shape
        assert torch.all(torch.diff(values) * direction >= 0)
        assert torch.equal(part(logits[2:3]), values[2:3])
    assert torch.isfinite(loss.real(torch.tensor([-1e4, 1e4]))).all()


def test_losses_against_their_formulae() -> None:
    logits = torch.linspace(-4, 4, 9)
    logistic = torch.sigmoid(logits.double())
    torch.testing.assert_close(LOSSES["bce"].real(logits), -logistic.log().float())
    torch.testing.assert_close(LOSSES["bce"].fake(logits), -(1 - logistic).log().float())
    torch.testing.assert_close(LOSSES["bce"].generator(logits), -logistic.log().float())
    torch.testing.assert_close(LOSSES["hinge"].real(logits), (1 - logits).clamp(min=0))
    torch.testing.assert_close(LOSSES["hinge"].fake(logits), (1 + logits).clamp(min=0))
    torch.testing.assert_close(LOSSES["hinge"].generator(logits), -logits)


def test_wrong_requests_are_typed_errors() -> None:
    with pytest.raises(ConfigError, match="known are"):
        build_discriminator("vit", image_size=28, channels=1, num_classes=0, width=8)
    with pytest.raises(ConfigError, match="known are"):
        build_generator("vit", image_size=28, channels=1, num_classes=0, latent_dim=8, width=8)
    with pytest.raises(ConfigError, match="image_size is 30"):
        build_discriminator("dcgan", image_size=30, channels=1, num_classes=0, width=8)
    with pytest.raises(ConfigError, match="image_size is 30"):
        build_generator("dcgan", image_size=30, channels=1, num_classes=0, latent_dim=8, width=8)
    with pytest.raises(ConfigError, match="width"):
        build_discriminator("mlp", image_size=28, channels=1, num_classes=0, width=0)
    model = build_discriminator("mlp", image_size=28, channels=1, num_classes=0, width=1)
    with pytest.raises(ConfigError, match="num_classes=0"):
        model(torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.int64))
    conditional = build_generator("dcgan", image_size=28, channels=1, num_classes=2, latent_dim=8, width=8)
    with pytest.raises(ConfigError, match="no labels"):
        conditional(torch.zeros(2, 8))
