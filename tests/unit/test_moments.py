import itertools

import pytest
import torch

from common.errors import ConfigError
from common.models.features import Group, RandomFeatures
from server.moments import MomentLoss

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
