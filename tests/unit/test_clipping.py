"""The clipped sum against a loop in which each unit goes alone through plain autograd."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from common.errors import PrivacyError
from common.models import initialise
from common.models.discriminators import DISCRIMINATORS, build_discriminator
from common.models.losses import LOSSES
from common.privacy import clipping
from common.privacy.clipping import FLOAT_SLACK, MAX_UNITS, check_no_cross_sample, clipped_sum

Loss = Callable[[torch.Tensor], torch.Tensor]
IMAGES = torch.arange(7)
# Every discriminator with one loss, and two with every loss. Dropout is off where sums are compared;
# tests/contracts/test_models.py has it on.
PAIRS = [(name, loss) for name in DISCRIMINATORS for loss in LOSSES if name in ("dcgan", "mlp") or loss == "bce"]
PERSONS = torch.tensor([0, 0, 0, 1, 2, 2, 5])  # persons 3 and 4 drew no images; 0 and 2 have several


def random_images(count: int, channels: int, size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def by_hand(
    model: nn.Module, loss: Loss, images: torch.Tensor, labels: torch.Tensor | None, units: torch.Tensor, c: float
) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for unit in units.unique():
        own = units == unit
        logits = model(images[own]) if labels is None else model(images[own], labels[own])
        gradients = torch.autograd.grad(loss(logits).mean(), parameters, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        gradient = torch.cat([g.flatten() for g in flat]).double()
        total += gradient * min(1.0, c * (1 - FLOAT_SLACK) / max(float(gradient.norm()), 1e-30))
    return total


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", ["book-keeping", "opacus"])
@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("units", [IMAGES, PERSONS], ids=["image", "person"])
@pytest.mark.parametrize(("name", "loss"), PAIRS)
def test_every_discriminator_against_the_loop(
    name: str, units: torch.Tensor, num_classes: int, loss: str, method: str
) -> None:
    model = build_discriminator(name, image_size=28, channels=1, num_classes=num_classes, width=4).eval()
    images = random_images(7, 1, 28)
    labels = torch.arange(7) % num_classes if num_classes else None
    norms = [
        float(by_hand(model, LOSSES[loss].real, images[i : i + 1], _at(labels, i), IMAGES[:1], math.inf).norm())
        for i in range(7)
    ]
    c = sorted(norms)[3] * 0.9  # some units are clipped and some are not
    expected = by_hand(model, LOSSES[loss].real, images, labels, units, c)
    found = clipped_sum(model, LOSSES[loss].real, images, labels, units, 7, c, chunk_size=3, method=method)  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    assert found.shape == (sum(p.numel() for p in model.parameters()),)
    assert error(found, expected) < 1e-5
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def _at(labels: torch.Tensor | None, i: int) -> torch.Tensor | None:
    return None if labels is None else labels[i : i + 1]


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_larger_images_and_both_memory_formats(image_size: int, channels_last: bool) -> None:
    model = build_discriminator("dcgan", image_size=image_size, channels=3, num_classes=0, width=8)
    images = random_images(7, 3, image_size)
    expected = by_hand(model, LOSSES["bce"].real, images, None, PERSONS, 0.5)
    if channels_last:
        model, images = (
            model.to(memory_format=torch.channels_last),
            images.contiguous(memory_format=torch.channels_last),
        )
    for method in ("book-keeping", "opacus"):
        found = clipped_sum(model, LOSSES["bce"].real, images, None, PERSONS, 6, 0.5, method=method)  # type: ignore[arg-type]
        assert error(found, expected) < 1e-5


class Head(nn.Module):
    """Any body, its output summed with fixed weights to one logit."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.body(images).flatten(1)
        return torch.tanh(features) @ torch.linspace(-1, 1, features.shape[1])


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "no bias": nn.Conv2d(4, 6, 3, bias=False),
    "stride and padding": nn.Conv2d(4, 6, (4, 3), stride=(2, 1), padding=(1, 2)),
    "input not covered": nn.Conv2d(4, 6, 3, stride=4),
    "dilation": nn.Conv2d(4, 6, 3, dilation=2, padding=1),
    "groups": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, padding=1),
    "same": nn.Conv2d(4, 6, (5, 3), padding="same"),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "reflect": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "pointwise": nn.Conv2d(4, 6, 1),
    "one position": nn.Conv2d(4, 6, 9),
    "many features": nn.Conv2d(4, 64, 7, stride=2),
}
OTHERS = {
    "group norm": nn.GroupNorm(2, 4),
    "layer norm": nn.LayerNorm((4, 9, 9)),
    "layer norm without bias": nn.LayerNorm(9, bias=False),
    "linear on positions": nn.Linear(9, 5),
    "linear without bias": nn.Sequential(nn.Flatten(), nn.Linear(324, 5, bias=False)),
}


@pytest.mark.parametrize("layer", [*CONVOLUTIONS, *OTHERS])
@pytest.mark.parametrize("units", [IMAGES, PERSONS], ids=["image", "person"])
def test_every_layer_against_the_loop(layer: str, units: torch.Tensor) -> None:
    model = Head(nn.Conv2d(2, 4, 1), nn.Tanh(), {**CONVOLUTIONS, **OTHERS}[layer])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    images = random_images(7, 2, 9)
    expected = by_hand(model, LOSSES["bce"].real, images, None, units, 0.2)
    found = clipped_sum(model, LOSSES["bce"].real, images, None, units, 7, 0.2, chunk_size=4, method="book-keeping")
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("padding_idx", [None, 1])
def test_embedding_of_several_tokens(padding_idx: int | None) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3, padding_idx=padding_idx)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = (images * 2.5 + 2.5).long().clamp(0, 4).flatten(1)
            return torch.tanh(self.embedding(tokens)).sum((1, 2))

    model = Tokens()
    initialise(model, torch.Generator().manual_seed(1))
    expected = by_hand(model, LOSSES["bce"].real, random_images(7, 1, 2), None, PERSONS, 0.1)
    found = clipped_sum(model, LOSSES["bce"].real, random_images(7, 1, 2), None, PERSONS, 6, 0.1, method="book-keeping")
    assert error(found, expected) < 1e-5


def small_model() -> nn.Module:
    return build_discriminator("dcgan", image_size=28, channels=1, num_classes=0, width=4)


def real_sum(model: nn.Module, images: torch.Tensor, units: torch.Tensor, c: float, **options: object) -> torch.Tensor:
    count = int(units[-1]) + 1 if len(units) else 0
    return clipped_sum(model, LOSSES["bce"].real, images, None, units, count, c, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["book-keeping", "opacus"])
def test_no_images_give_zeros(method: str) -> None:
    model = small_model()
    none = torch.zeros(0, dtype=torch.int64)
    found = clipped_sum(model, LOSSES["bce"].real, torch.zeros(0, 1, 28, 28), None, none, 0, 1.0, method=method)  # type: ignore[arg-type]
    assert found.shape == (sum(p.numel() for p in model.parameters()),)
    assert not found.any()
    assert not clipped_sum(model, LOSSES["bce"].real, torch.zeros(0, 1, 28, 28), None, none, 4, 1.0).any()


def test_chunks_change_nothing_but_rounding() -> None:
    images = random_images(7, 1, 28)
    whole = real_sum(small_model(), images, PERSONS, 0.3, chunk_size=100)
    for chunk_size in (1, 2, 3, 5):
        assert error(real_sum(small_model(), images, PERSONS, 0.3, chunk_size=chunk_size), whole) < 1e-6


@pytest.mark.parametrize("method", ["book-keeping", "opacus"])
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_one_unit_moves_the_sum_by_at_most_the_bound(name: str, method: str) -> None:
    model = build_discriminator(name, image_size=28, channels=1, num_classes=0, width=4).eval()
    images = random_images(64, 1, 28) * 3
    units = torch.arange(64) // 2
    for c in (1e-3, {"conv-dropout": 0.03, "scattering": 0.3}.get(name, 1.0)):  # of some, gradients are below 1
        whole = real_sum(model, images, units, c, method=method)
        for left_out in (0, 13, 31):
            kept = units != left_out
            rest = units[kept] - (units[kept] > left_out).long()
            moved = (whole.double() - real_sum(model, images[kept], rest, c, method=method).double()).norm()
            assert moved <= c
            assert moved > 0.99 * c  # every unit is clipped here, and only by what it must


def test_more_units_than_one_sum_takes() -> None:
    model = build_discriminator("mlp", image_size=28, channels=1, num_classes=0, width=1)
    count = MAX_UNITS + 3
    images = random_images(64, 1, 28).repeat(count // 64 + 1, 1, 1, 1)[:count]
    units = torch.arange(count)
    found = real_sum(model, images, units, 0.01)
    one, rest = real_sum(model, images[:64], units[:64], 0.01).double(), real_sum(model, images[:3], units[:3], 0.01)
    assert found.dtype == torch.float32
    assert error(found, one * (MAX_UNITS // 64) + rest) < 1e-5


@pytest.mark.parametrize("method", ["book-keeping", "opacus"])
def test_parts_of_persons_against_the_loop(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "MAX_UNITS", 2)
    model, images = small_model(), random_images(7, 1, 28)
    labels_model = build_discriminator("dcgan", image_size=28, channels=1, num_classes=3, width=4)
    found = clipped_sum(model, LOSSES["bce"].real, images, None, PERSONS, 7, 0.1, method=method)  # type: ignore[arg-type]
    assert error(found, by_hand(model, LOSSES["bce"].real, images, None, PERSONS, 0.1)) < 1e-5
    labels = torch.arange(7) % 3
    found = clipped_sum(labels_model, LOSSES["bce"].real, images, labels, PERSONS, 7, 0.1)
    assert error(found, by_hand(labels_model, LOSSES["bce"].real, images, labels, PERSONS, 0.1)) < 1e-5


def test_many_equal_units_stay_within_the_slack() -> None:
    # The worst case for float32 rounding: all clipped gradients point the same way, so the sum is as long as can be.
    model = small_model()
    images = random_images(1, 1, 28).expand(1500, 1, 28, 28)
    whole = real_sum(model, images, torch.arange(1500), 0.01).double()
    less = real_sum(model, images[1:], torch.arange(1499), 0.01).double()
    assert whole.norm() <= 1500 * 0.01
    assert (whole - less).norm() <= 0.01


def test_infinite_bound_means_no_clipping() -> None:
    model, images = small_model(), random_images(4, 1, 28)
    found = real_sum(model, images, IMAGES[:4], math.inf)
    loss = LOSSES["bce"].real(model(images)).sum()
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert error(found, plain) < 1e-5


@pytest.mark.parametrize("method", ["book-keeping", "opacus"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_unit_without_finite_gradient_adds_zero(method: str, bad: float) -> None:
    model, images = small_model(), random_images(7, 1, 28)
    images[1, 0, 3, 3] = bad  # one image of person 0

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return functional.softplus(-logits) + logits.square()

    found = clipped_sum(model, loss, images, None, PERSONS, 6, 0.5, method=method)  # type: ignore[arg-type]
    others = clipped_sum(model, loss, images[3:], None, PERSONS[3:], 6, 0.5)
    assert error(found, others) < 1e-6
    everyone = clipped_sum(model, loss, images[:3], None, PERSONS[:3], 1, 0.5, method=method)  # type: ignore[arg-type]
    assert not everyone.any()


def test_zero_gradients_add_zero() -> None:
    found = clipped_sum(small_model(), lambda logits: logits * 0.0, random_images(3, 1, 28), None, IMAGES[:3], 3, 1.0)
    assert not found.any()


def test_frozen_parameters_get_zeros_and_do_not_count() -> None:
    model, images = small_model(), random_images(7, 1, 28)
    first = next(model.parameters())
    first.requires_grad_(False)
    for method in ("book-keeping", "opacus"):
        found = real_sum(model, images, IMAGES, 0.1, method=method)
        assert not found[: first.numel()].any()
        assert error(found[first.numel() :], by_hand(model, LOSSES["bce"].real, images, None, IMAGES, 0.1)) < 1e-5
        assert not first.requires_grad


def test_works_without_grad_mode_and_in_eval_mode_and_keeps_gradients() -> None:
    model, images = small_model().eval(), random_images(7, 1, 28)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    expected = by_hand(model, LOSSES["bce"].real, images, None, IMAGES, 0.1)
    for method in ("book-keeping", "opacus"):
        with torch.no_grad():
            assert error(real_sum(model, images, IMAGES, 0.1, method=method), expected) < 1e-5
    assert not model.training
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())


@pytest.mark.parametrize("method", ["book-keeping", "opacus"])
def test_bfloat16_forward_keeps_the_bound(method: str) -> None:
    model = build_discriminator("dcgan", image_size=32, channels=1, num_classes=0, width=8)
    images, units = random_images(24, 1, 32), torch.zeros(4, dtype=torch.int64)
    for i in range(0, 24, 4):
        batch = images[i : i + 4]
        with torch.autocast("cpu", torch.bfloat16):
            found = real_sum(model, batch, units, 0.1, method=method)
        assert found.dtype == torch.float32
        # Norms or sums taken in bfloat16 would be off by about 1e-3.
        assert abs(float(found.double().norm()) / (0.1 * (1 - FLOAT_SLACK)) - 1) < 1e-5
        assert error(found, by_hand(model, LOSSES["bce"].real, batch, None, units, 0.1)) < 0.05


def test_low_matmul_precision_of_the_process_is_set_aside_and_restored() -> None:
    model, images = (
        build_discriminator("mlp", image_size=28, channels=1, num_classes=0, width=4),
        random_images(7, 1, 28),
    )
    expected = by_hand(model, LOSSES["bce"].real, images, None, IMAGES, 0.1)
    torch.set_float32_matmul_precision("medium")
    try:
        found = real_sum(model, images, IMAGES, 0.1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert error(found, expected) < 1e-5


def test_model_is_restored_after_an_error() -> None:
    model = small_model()

    def broken(logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        clipped_sum(model, broken, random_images(2, 1, 28), None, IMAGES[:2], 2, 1.0)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(layer._forward_hooks for layer in model.modules())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.linear(torch.tanh(self.linear(images.flatten(1))))
        return hidden.sum(1)


class BatchFolded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        folded: torch.Tensor = self.linear(images.flatten(1).reshape(-1, 2))
        return folded.reshape(images.shape[0], -1).sum(1)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.scale * images.flatten(1).tanh()).square()


class MinibatchStd(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images, images.std(0, correction=0, keepdim=True).mean((1, 2, 3), True).expand_as(images)], 1)


class ChangedLater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.second(self.first(images.flatten(1)))
        return functional.relu_(output).sum(1)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Flatten(0))
    model[2].weight = model[1].weight
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Twice(), "runs twice"),
        (BatchFolded(), "batch dimension"),
        (tied(), "share one"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 1)), "one logit each"),
        (nn.Sequential(nn.BatchNorm2d(1), Head(nn.Linear(2, 1))), "mixes images"),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1), nn.Flatten(0)), "mixes images"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.ReLU(inplace=True), nn.Flatten(0)), "in place"),
        (ChangedLater(), "in place"),
        (nn.Flatten(), "no parameters"),
    ],
)
def test_models_on_which_it_would_be_wrong_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        real_sum(model, random_images(2, 1, 2), IMAGES[:2], 1.0)


def test_layers_of_another_kind_go_through_opacus() -> None:
    model = nn.Sequential(Scale(), nn.Linear(4, 1), nn.Flatten(0))
    with pytest.raises(PrivacyError, match="Scale"):
        real_sum(model, random_images(7, 1, 2), IMAGES, 0.1, method="book-keeping")
    found = real_sum(model, random_images(7, 1, 2), PERSONS, 0.1)
    assert error(found, by_hand(model, LOSSES["bce"].real, random_images(7, 1, 2), None, PERSONS, 0.1)) < 1e-5


def test_a_layer_that_runs_twice_goes_through_opacus_when_asked() -> None:
    found = real_sum(model := Twice(), random_images(7, 1, 2), PERSONS, 0.1, method="opacus")
    assert error(found, by_hand(model, LOSSES["bce"].real, random_images(7, 1, 2), None, PERSONS, 0.1)) < 1e-5


def test_wrong_arguments_are_refused() -> None:
    model, images = small_model(), random_images(3, 1, 28)
    for c in (0.0, -1.0, math.nan, 1e-7):
        with pytest.raises(PrivacyError, match="max_grad_norm"):
            real_sum(model, images, IMAGES[:3], c)
    with pytest.raises(PrivacyError, match="must not decrease"):
        real_sum(model, images, torch.tensor([0, 1, 0]), 1.0)
    with pytest.raises(PrivacyError, match="must not decrease"):
        clipped_sum(model, LOSSES["bce"].real, images, None, torch.tensor([0, 1, 2]), 2, 1.0)
    with pytest.raises(PrivacyError, match="for 3 images"):
        real_sum(model, images, IMAGES[:2], 1.0)
    with pytest.raises(PrivacyError, match="int64"):
        real_sum(model, images, IMAGES[:3].int(), 1.0)
    with pytest.raises(PrivacyError, match="chunk_size"):
        real_sum(model, images, IMAGES[:3], 1.0, chunk_size=0)
    with pytest.raises(PrivacyError, match="method"):
        real_sum(model, images, IMAGES[:3], 1.0, method="ghost")
    with pytest.raises(PrivacyError, match="not averaged"):
        clipped_sum(model, lambda logits: logits.mean(), images, None, IMAGES[:3], 3, 1.0)
    with pytest.raises(PrivacyError, match="max_norm"):
        real_sum(nn.Sequential(model, nn.Embedding(2, 2, max_norm=1.0)), images, IMAGES[:3], 1.0)


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_our_discriminators_do_not_mix_images(name: str, num_classes: int) -> None:
    model = build_discriminator(name, image_size=28, channels=1, num_classes=num_classes, width=4)
    check_no_cross_sample(model, random_images(4, 1, 28), torch.arange(4) % num_classes if num_classes else None)


class OddBatchNorm(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    "layer",
    [
        OddBatchNorm(1, affine=False),
        nn.SyncBatchNorm(1),
        nn.BatchNorm2d(1, track_running_stats=False),
        nn.InstanceNorm2d(1, track_running_stats=True),
        MinibatchStd(),
        nn.Softmax(dim=0),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_mix_images_are_found(layer: nn.Module) -> None:
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(1), nn.Flatten(0))
    with torch.random.fork_rng():
        if type(layer) is not nn.SyncBatchNorm:
            model(random_images(4, 1, 6))
        before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
        with pytest.raises(PrivacyError):
            check_no_cross_sample(model, random_images(4, 1, 6), None)
    for name, value in before.items():
        assert torch.equal(value, model.state_dict()[name])


def test_dropout_is_allowed_and_left_on() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 1), nn.Flatten(0))
    check_no_cross_sample(model, random_images(4, 1, 6), None)
    assert model[1].training
    with pytest.raises(PrivacyError, match="at least 2"):
        check_no_cross_sample(model, random_images(1, 1, 6), None)
