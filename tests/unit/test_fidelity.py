"""The Frechet distance is what its formula says, and grows as faces get worse."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from common.errors import DataError
from common.evaluation.fidelity import FidelityFeatures, FrechetDistance
from common.faces import FaceOptions, procedural_faces


@pytest.fixture(scope="module")
def faces() -> tuple[torch.Tensor, torch.Tensor]:
    drawn = procedural_faces(range(300), 2, FaceOptions(32, 3, 0.8), 0)
    order = np.random.default_rng(0).permutation(600)
    return drawn.tensor(order[:300]), drawn.tensor(order[300:])


def test_the_distance_is_the_formula(faces: tuple[torch.Tensor, torch.Tensor]) -> None:
    features = FidelityFeatures()
    with torch.no_grad():
        real, fake = (features(images).double().numpy() for images in faces)
    mean = real.mean(0) - fake.mean(0)
    of_real, of_fake = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    expected = mean @ mean + np.trace(of_real + of_fake - 2 * sqrtm(of_real @ of_fake).real)
    assert FrechetDistance(faces[0].split(64))(faces[1].split(100)) == pytest.approx(expected, rel=1e-3)


def test_worse_faces_are_farther(faces: tuple[torch.Tensor, torch.Tensor]) -> None:
    whole, good = FrechetDistance([faces[0]]), faces[1]

    def distance(images: torch.Tensor) -> float:
        return whole([images])

    noise = torch.randn(good.shape, generator=torch.Generator().manual_seed(0))
    fair = distance(good)
    assert distance(faces[0]) < 0.1 < fair
    speckled = [distance((good + sigma * noise).clamp(-1, 1)) for sigma in (0.1, 0.3, 1.0)]
    assert [fair, *speckled] == sorted([fair, *speckled])
    blurred = [distance(torch.nn.functional.avg_pool2d(good, k, 1, k // 2)) for k in (3, 7, 15)]
    assert [fair, *blurred] == sorted([fair, *blurred])
    assert distance(good[:5].repeat(60, 1, 1, 1)) > 2 * fair  # few modes
    assert distance(good) == fair  # nothing stays from call to call


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (64, 3), (128, 3)])
def test_every_size_and_grey(size: int, channels: int) -> None:
    images = torch.rand(8, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distance = FrechetDistance([images])
    assert distance([images]) < 0.1
    assert distance([-images]) > 0.1


def test_one_image_has_no_covariance() -> None:
    one = torch.zeros(1, 3, 32, 32)
    with pytest.raises(DataError, match="2 or more"):
        FrechetDistance([one])
    with pytest.raises(DataError, match="2 or more"):
        FrechetDistance([torch.zeros(2, 3, 32, 32)])([one])
