import itertools

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from common.models.features import Group, RandomFeatures
from common.models.generators import build_generator
from server.moments import MomentLoss, balanced_labels, moment_learning_rate, moment_step, target_means

_GROUPS = (Group(14, 7, 4, 0.37), Group(28, 1, 8, 0.37))


def _features() -> RandomFeatures:
    return RandomFeatures(28, 1, seed=0, groups=_GROUPS)


def _images(count: int, seed: int) -> torch.Tensor:
    return torch.rand((count, 1, 28, 28), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _naive(features: RandomFeatures, target: torch.Tensor, fakes: torch.Tensor, labels: list[int]) -> float:
    embedded = features(fakes).double()
    losses = []
    for label, mean in enumerate(target.double()):
        own = [embedded[index] for index, other in enumerate(labels) if other == label]
        if len(own) < 2:
            continue
        pairs = [float(one @ other) for one, other in itertools.permutations(own, 2)]
        across = [float(one @ mean) for one in own]
        losses.append(sum(pairs) / len(pairs) - 2 * sum(across) / len(across) + float(mean @ mean))
    return sum(losses) / len(losses)


def test_loss_against_a_naive_loop() -> None:
    features = _features()
    target = torch.randn((4, features.dim), generator=torch.Generator().manual_seed(1)) * 0.1
    fakes = _images(9, 2)
    labels = [0, 1, 1, 3, 0, 1, 2, 0, 0]  # classes 2 and 3 have one fake each
    loss = MomentLoss(features, target)(fakes, torch.tensor(labels))
    assert float(loss) == pytest.approx(_naive(features, target, fakes, labels), abs=1e-5)
    one_class = MomentLoss(features, target[:1])(fakes, None)
    assert float(one_class) == pytest.approx(_naive(features, target[:1], fakes, [0] * 9), abs=1e-5)


def test_loss_of_fakes_like_the_reals_is_zero_on_average() -> None:
    """With the pairs of a fake with itself left in, the mean would be near 1 / 4, far outside the bound."""
    features = _features()
    with torch.no_grad():
        target = features(_images(4000, 3)).mean(dim=0, keepdim=True)
        loss = MomentLoss(features, target)
        losses = torch.stack([loss(batch, None) for batch in _images(2000, 4).split(4)])
        with_self_pairs = torch.stack(
            [(features(batch).mean(dim=0) - target).square().sum() for batch in _images(2000, 4).split(4)]
        )
    error = float(losses.std()) / len(losses) ** 0.5
    assert abs(float(losses.mean())) < 4 * error
    assert float(with_self_pairs.mean()) > 20 * error


def test_noise_in_the_target_is_a_constant() -> None:
    features = _features()
    with torch.no_grad():
        target = features(_images(500, 5)).mean(dim=0, keepdim=True)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(6)) * 0.01
    near, far = _images(64, 7), _images(64, 7).clamp(min=0)
    gaps = []
    for used in (target, target + noise):
        loss = MomentLoss(features, used)
        gaps.append(float(loss(far, None) - loss(near, None)))
    assert gaps[0] > 0.05
    assert gaps[1] == pytest.approx(gaps[0], rel=0.1)


def test_target_means_divides_by_the_declared_constant() -> None:
    total = torch.tensor([[6.0, 3.0], [0.0, -3.0]])
    assert torch.equal(target_means(total, 3.0), torch.tensor([[2.0, 1.0], [0.0, -1.0]]))
    with pytest.raises(ConfigError, match="units_per_class"):
        target_means(total, 0)
    with pytest.raises(ConfigError, match="finite"):
        target_means(total / 0, 3.0)
    with pytest.raises(ConfigError, match="shape"):
        target_means(total[0], 3.0)


def test_wrong_labels_and_targets_are_refused() -> None:
    features = _features()
    target = torch.zeros((2, features.dim))
    with pytest.raises(ConfigError, match="no labels"):
        MomentLoss(features, target)(_images(4, 0), None)
    with pytest.raises(ConfigError, match="some labels"):
        MomentLoss(features, target[:1])(_images(4, 0), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="no class has two"):
        MomentLoss(features, target)(_images(2, 0), torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="shape"):
        MomentLoss(features, target[:, 1:])


def test_balanced_labels() -> None:
    labels = balanced_labels(7, 3)
    assert labels is not None
    assert torch.bincount(labels).tolist() == [3, 2, 2]
    assert balanced_labels(7, 0) is None


def test_learning_rate_rises_holds_and_falls() -> None:
    rates = [moment_learning_rate(step, 400, 2.0) for step in range(400)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[19] == rates[200] == 2.0
    assert rates[300] == pytest.approx(1.0)
    assert 0 < rates[399] < 0.02


class _Shade(nn.Module):
    """A generator with one parameter: every image is of one grey."""

    def __init__(self) -> None:
        super().__init__()
        self.shade = nn.Parameter(torch.tensor(-0.5))

    def forward(self, latent: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return self.shade.expand(len(latent), 1, 28, 28) + 0.01 * latent[:, :1, None, None]


def test_the_fit_finds_the_shade() -> None:
    features = _features()
    generator = _Shade()
    optimizer = torch.optim.Adam(generator.parameters(), lr=1.0)
    loss = MomentLoss(features, features(torch.full((2, 1, 28, 28), 0.3))[:1])
    random = torch.Generator().manual_seed(0)
    for step in range(80):
        moment_step(
            generator,
            optimizer,
            loss,
            step=step,
            num_steps=80,
            batch=8,
            lr=0.05,
            latent_dim=2,
            num_classes=0,
            random=random,
        )
    assert float(generator.shade.detach()) == pytest.approx(0.3, abs=0.03)


def test_a_resumed_fit_equals_an_unbroken_one() -> None:
    features = _features()
    target = torch.randn((2, features.dim), generator=torch.Generator().manual_seed(8)) * 0.1

    def fit(cut: int | None) -> tuple[list[float], dict[str, torch.Tensor]]:
        generator, optimizer, random = _fresh()
        losses = []
        for step in range(4):
            if step == cut:
                saved = generator.state_dict(), optimizer.state_dict(), random.get_state()
                generator, optimizer, random = _fresh()
                generator.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                random.set_state(saved[2])
            losses.append(
                moment_step(
                    generator,
                    optimizer,
                    MomentLoss(features, target),
                    step=step,
                    num_steps=4,
                    batch=6,
                    lr=1e-3,
                    latent_dim=4,
                    num_classes=2,
                    random=random,
                )
            )
        return losses, generator.state_dict()

    def _fresh() -> tuple[nn.Module, torch.optim.Optimizer, torch.Generator]:
        generator = build_generator("dcgan", image_size=28, channels=1, num_classes=2, latent_dim=4, width=2)
        return generator, torch.optim.Adam(generator.parameters()), torch.Generator().manual_seed(0)

    unbroken, resumed = fit(None), fit(2)
    assert unbroken[0] == resumed[0]
    assert all(torch.equal(value, resumed[1][name]) for name, value in unbroken[1].items())
