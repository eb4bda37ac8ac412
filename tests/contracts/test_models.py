"""Every entry of the model and loss registries keeps the same contract, at every size, in grey and in colour, with
classes and without."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from common.errors import ConfigError
from common.models import initialise
from common.models.discriminators import DISCRIMINATORS, ClassDiscriminator, Discriminator, build_discriminator
from common.models.flat import num_parameters
from common.models.generators import GENERATORS, Generator, build_generator
from common.models.losses import LOSSES
from common.models.stochastic import seeded_masks
from common.privacy.bookkeeping import unknown_layer
from common.privacy.clipping import FLOAT_SLACK, check_no_cross_sample, clipped_sum

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
SIZES = [28, 32, 64, 128]
EVERY_SHAPE = list(itertools.product(SIZES, [1, 3], [0, 10]))  # image_size, channels, num_classes
EVERY_SIZE = [(28, 1, 10), (32, 3, 0), (64, 1, 3), (128, 3, 0)]

# Every body judges whether an image is real, and tells classes; the latter only where there are some.
JUDGES = [*DISCRIMINATORS, *(f"{name} of classes" for name in DISCRIMINATORS)]
CLASS_SHAPES = [(28, 1, 10), (32, 3, 2)]

each_generator = pytest.mark.parametrize("name", GENERATORS)
each_discriminator = pytest.mark.parametrize("name", DISCRIMINATORS)
each_judge = pytest.mark.parametrize("name", JUDGES)
every_shape = pytest.mark.parametrize("shape", EVERY_SHAPE, ids=str)
every_size = pytest.mark.parametrize("shape", EVERY_SIZE, ids=str)


def judges_at(shapes: list[tuple[int, int, int]]) -> pytest.MarkDecorator:
    """Every discriminator at these shapes, and every classifier at some."""
    pairs = [(name, shape) for name in JUDGES for shape in (CLASS_SHAPES if name not in DISCRIMINATORS else shapes)]
    return pytest.mark.parametrize(("name", "shape"), pairs, ids=str)


Shape = tuple[int, int, int]


def a_generator(name: str, shape: Shape, width: int = 4) -> Generator:
    image_size, channels, num_classes = shape
    return build_generator(
        name, image_size=image_size, channels=channels, num_classes=num_classes, latent_dim=16, width=width
    )


def a_discriminator(name: str, shape: Shape, width: int = 4) -> Discriminator | ClassDiscriminator:
    image_size, channels, num_classes = shape
    body = name.removesuffix(" of classes")
    return build_discriminator(
        body, image_size=image_size, channels=channels, num_classes=num_classes, width=width, classifier=body != name
    )


def some_images(shape: Shape, count: int, seed: int = 1) -> torch.Tensor:
    size = (count, shape[1], shape[0], shape[0])
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def some_latents(count: int) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(1))


def some_labels(num_classes: int, batch: int) -> torch.Tensor | None:
    return torch.arange(batch) % num_classes if num_classes else None


def reloaded(model: nn.Module, fresh: nn.Module) -> nn.Module:
    """`fresh`, of other weights, after the state of `model` has been to safetensors and back."""
    initialise(fresh, torch.Generator().manual_seed(99))
    state = load(save({name: value.contiguous() for name, value in model.state_dict().items()}))
    fresh.load_state_dict(state)
    return fresh


@each_generator
@every_shape
def test_generator_draws_images(name: str, shape: Shape) -> None:
    model = a_generator(name, shape)
    latent, labels = some_latents(5), some_labels(shape[2], 5)
    images = model(latent, labels)
    assert images.shape == (5, shape[1], shape[0], shape[0])
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert images.std(0).max() > 0.01  # different latents, different images
    assert images.abs().mean() < 0.7  # tanh is not saturated, or nothing would be learned
    torch.testing.assert_close(
        model.to(memory_format=torch.channels_last)(latent, labels), images, atol=1e-4, rtol=1e-4
    )


@each_generator
@every_size
def test_every_weight_of_a_generator_learns(name: str, shape: Shape) -> None:
    model = a_generator(name, shape)
    model(some_latents(4), some_labels(shape[2], 4)).square().sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert torch.isfinite(p.grad).all(), key
        assert p.grad.any(), key


@each_generator
def test_generator_is_the_same_after_safetensors(name: str) -> None:
    shape = (32, 3, 10)
    model = a_generator(name, shape)
    model(some_latents(8), some_labels(10, 8))  # moves the running statistics
    other = reloaded(model, a_generator(name, shape))
    latent, labels = some_latents(3), some_labels(10, 3)
    assert torch.equal(model.eval()(latent, labels), other.eval()(latent, labels))


@each_generator
def test_class_changes_the_image(name: str) -> None:
    model = a_generator(name, (28, 1, 3)).eval()
    images = model(torch.zeros(3, 16), torch.arange(3))
    assert (images[0] - images[1]).abs().max() > 1e-4


@judges_at(EVERY_SHAPE)
def test_discriminator_judges_each_image_alone(name: str, shape: Shape) -> None:
    model = a_discriminator(name, shape).eval()
    images, labels = some_images(shape, 4), some_labels(shape[2], 4)
    logits = model(images, labels)
    assert logits.shape == (4,)
    assert logits.dtype == torch.float32
    for i in range(4):
        alone = model(images[i : i + 1], None if labels is None else labels[i : i + 1])
        torch.testing.assert_close(alone[0], logits[i], atol=1e-5, rtol=1e-5)
    last = images.contiguous(memory_format=torch.channels_last)
    found = model.to(memory_format=torch.channels_last)(last, labels)
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


@judges_at(EVERY_SIZE)
def test_an_image_leaves_the_logits_of_others_alone_under_the_same_masks(name: str, shape: Shape) -> None:
    model = a_discriminator(name, shape)
    images, labels = some_images(shape, 4), some_labels(shape[2], 4)
    check_no_cross_sample(model, images, labels)
    assert unknown_layer(model) is None
    assert model.training
    replaced = images.clone()
    replaced[1] = some_images(shape, 1, seed=2)[0]
    with seeded_masks(b"7"):
        logits = model(images, labels)
    with seeded_masks(b"7"):
        others = model(replaced, labels)
    torch.testing.assert_close(others[[0, 2, 3]], logits[[0, 2, 3]], atol=1e-6, rtol=1e-6)
    assert (others[1] - logits[1]).abs() > 1e-4


@judges_at(EVERY_SIZE)
@pytest.mark.parametrize("size", [1, 2])
def test_clipped_sum_is_that_of_each_unit_alone(name: str, shape: Shape, size: int) -> None:
    # In one chunk, the padding to whole tiles of 32 images included, book-keeping and this loop wear the same masks.
    model = a_discriminator(name, shape, width=2)
    images, labels, units = some_images(shape, 4), some_labels(shape[2], 4), torch.arange(4) // size
    padded = torch.cat([images, torch.zeros(28, *images.shape[1:])])
    padded_labels = None if labels is None else torch.cat([labels, torch.zeros(28, dtype=torch.int64)])
    with seeded_masks(b"5"):
        losses = LOSSES["wasserstein"].real(model(padded, padded_labels))  # does not fade where a logit is large
    gradients = []
    for unit in range(4 // size):
        own = losses[:4][units == unit].mean()
        parts = torch.autograd.grad(own, list(model.parameters()), retain_graph=True)
        gradients.append(torch.cat([part.flatten() for part in parts]).double())
    norms = torch.stack([gradient.norm() for gradient in gradients])
    assert norms.min() > 1e-3
    c = float(norms.mean())  # one unit is clipped and one is not
    factors = (c * (1 - FLOAT_SLACK) / norms).clamp(max=1.0)
    expected = factors @ torch.stack(gradients)
    with seeded_masks(b"5"):
        found = clipped_sum(
            model, LOSSES["wasserstein"].real, images, labels, units, 4 // size, c, method="book-keeping"
        )
    assert (found - expected).norm() < 1e-5 * expected.norm()


@judges_at([(32, 3, 0), (32, 3, 10)])
def test_discriminator_is_the_same_after_safetensors(name: str, shape: Shape) -> None:
    model = a_discriminator(name, shape).eval()
    other = reloaded(model, a_discriminator(name, shape)).eval()
    images, labels = some_images(shape, 3), some_labels(shape[2], 3)
    assert torch.equal(model(images, labels), other(images, labels))


@each_judge
def test_class_changes_the_logit(name: str) -> None:
    model = a_discriminator(name, (28, 1, 3)).eval()
    logits = model(torch.ones(3, 1, 28, 28), torch.arange(3))
    assert len(set(logits.tolist())) == 3


@each_discriminator
@every_size
def test_signal_neither_fades_nor_explodes_at_the_start(name: str, shape: Shape) -> None:
    model = a_discriminator(name, (*shape[:2], 0), width=16)
    noise = torch.randn(32, shape[1], shape[0], shape[0], generator=torch.Generator().manual_seed(1))
    coarse = some_images((4, shape[1], 0), 32)
    smooth = nn.functional.interpolate(coarse, size=shape[0], mode="bilinear")
    for seed in (11, 12):  # not those of the images, which would be like the weights
        initialise(model, torch.Generator().manual_seed(seed))
        with torch.no_grad(), seeded_masks(b"1"):
            for images in (noise, smooth):
                logits = model(images)
                # Features that are fixed and of norm 1 at most have no depth to fade in.
                assert logits.std() > (3e-4 if name == "scattering" else 0.05)
                assert logits.std() < 4
                assert logits.abs().max() < 10


@pytest.mark.parametrize(
    ("build", "name"),
    [(a_generator, name) for name in GENERATORS] + [(a_discriminator, name) for name in JUDGES],
)
def test_start_depends_on_the_given_generator_alone(build: Callable[[str, Shape], nn.Module], name: str) -> None:
    before = torch.get_rng_state()
    model, other = build(name, (28, 1, 2)), build(name, (28, 1, 2))
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    initialise(model, torch.Generator().manual_seed(5))
    initialise(other, torch.Generator().manual_seed(6))
    weights = [key for key, p in model.named_parameters() if p.dim() > 1]
    for key in weights:
        assert not torch.equal(model.state_dict()[key], other.state_dict()[key]), key
    initialise(other, torch.Generator().manual_seed(5))
    for key, value in model.state_dict().items():
        assert torch.isfinite(value).all(), key
        assert torch.equal(value, other.state_dict()[key]), key
    assert torch.equal(before, torch.get_rng_state())


@each_generator
def test_start_resets_running_statistics(name: str) -> None:
    model = a_generator(name, (28, 1, 0))
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    model(some_latents(4))
    initialise(model, torch.Generator().manual_seed(0))
    for key, value in model.state_dict().items():
        assert torch.equal(value, fresh[key]), key


def test_start_refuses_an_unknown_layer() -> None:
    with pytest.raises(TypeError, match="PReLU"):
        initialise(torch.nn.PReLU(), torch.Generator())


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_per_sample_and_has_the_right_sign(name: str) -> None:
    loss = LOSSES[name]
    logits = torch.linspace(0.01, 0.99, 5)  # least squares turns at 0 and at 1
    for part, direction in ((loss.real, -1), (loss.fake, 1), (loss.generator, -1)):
        values = part(logits)
        assert values.shape == logits.shape
        if part != loss.fake or loss.sees_fakes:
            assert torch.all(torch.diff(values) * direction > 0)
        else:
            assert not values.any()
        assert torch.equal(part(logits[2:3]), values[2:3])
        assert torch.isfinite(part(torch.tensor([-1e4, 1e4]))).all()


def test_wrong_requests_are_typed_errors() -> None:
    with pytest.raises(ConfigError, match="known are"):
        a_discriminator("vit", (28, 1, 0))
    with pytest.raises(ConfigError, match="known are"):
        a_generator("vit", (28, 1, 0))
    for name in DISCRIMINATORS:
        with pytest.raises(ConfigError, match="image_size is 30"):
            a_discriminator(name, (30, 1, 0))
        with pytest.raises(ConfigError, match="width"):
            a_discriminator(name, (28, 1, 0), width=0)
        with pytest.raises(ConfigError, match="num_classes=0"):
            a_discriminator(name, (28, 1, 0))(torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.int64))
        for num_classes in (0, 1):
            with pytest.raises(ConfigError, match=f"num_classes = {num_classes}; it takes 2 or more"):
                a_discriminator(f"{name} of classes", (28, 1, num_classes))
    for name in GENERATORS:
        with pytest.raises(ConfigError, match="image_size is 30"):
            a_generator(name, (30, 1, 0))
        with pytest.raises(ConfigError, match="width"):
            a_generator(name, (28, 1, 0), width=0)
        with pytest.raises(ConfigError, match="no labels"):
            a_generator(name, (28, 1, 2))(torch.zeros(2, 16))


@pytest.mark.parametrize("name", dict.fromkeys([*GENERATORS, *DISCRIMINATORS]))
def test_the_documented_numbers_of_parameters(name: str) -> None:
    documented = re.findall(rf"^\| `{name}` \|([ |\d,]+)\|$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    counts = []
    shape = {"channels": 3, "num_classes": 0, "width": 32}
    with torch.device("meta"):
        if name in GENERATORS:
            counts.append([GENERATORS[name](image_size=size, latent_dim=64, **shape) for size in SIZES])
        if name in DISCRIMINATORS:
            counts.append([DISCRIMINATORS[name](image_size=size, **shape) for size in SIZES])
    expected = [" | ".join(f"{num_parameters(model):,}" for model in models) for models in counts]
    assert [row.strip() for row in documented] == expected
