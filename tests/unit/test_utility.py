import pytest
import torch

from common.errors import DataError
from common.evaluation.utility import synthetic_accuracy


def _bars(count: int, seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Uint8 images with a bright bar in the row band that is their label."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=random)
    rows = torch.arange(28)[None, None, :, None] // 7 == labels[:, None, None, None]
    images = rows * 160.0 + noise * torch.rand((count, 1, 28, 28), generator=random)
    return images.clamp(0, 255).to(torch.uint8), labels


def test_good_images_teach_and_wrong_labels_do_not() -> None:
    images, labels = _bars(640, 0, 90)
    test_images, test_labels = _bars(200, 1, 90)
    good = synthetic_accuracy(images, labels, test_images, test_labels, seed=0, epochs=3)
    assert good > 0.95
    shifted = synthetic_accuracy(images, (labels + 1) % 4, test_images, test_labels, seed=0, epochs=3)
    assert shifted < 0.05


def test_bytes_and_floats_give_the_same_and_the_seed_decides() -> None:
    images, labels = _bars(256, 2, 255)
    test_images, test_labels = _bars(100, 3, 255)
    before = torch.random.get_rng_state()
    one = synthetic_accuracy(images, labels, test_images, test_labels, seed=1, epochs=1)
    floats = synthetic_accuracy(
        images.float() / 127.5 - 1, labels, test_images.float() / 127.5 - 1, test_labels, seed=1, epochs=1
    )
    assert one == floats
    assert torch.equal(before, torch.random.get_rng_state())


def test_unlike_shapes_are_refused() -> None:
    images, labels = _bars(10, 0, 0)
    with pytest.raises(DataError, match="one label for each"):
        synthetic_accuracy(images, labels[:5], images, labels, seed=0)
    with pytest.raises(DataError, match="one label for each"):
        synthetic_accuracy(images[:1], labels[:1], images, labels, seed=0)
    with pytest.raises(DataError, match="one shape"):
        synthetic_accuracy(images, labels, images[:, :, :24, :24], labels, seed=0)
