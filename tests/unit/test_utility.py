import pytest
import torch

from common.errors import ConfigError, DataError
from common.evaluation.utility import CLASSIFIERS, equal_steps, synthetic_accuracy


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


def test_other_classifiers_learn_the_same_way() -> None:
    images, labels = _bars(640, 0, 90)
    test_images, test_labels = _bars(200, 1, 90)
    for classifier in CLASSIFIERS:
        good, again, shifted = (
            synthetic_accuracy(images, truth, test_images, test_labels, seed=0, epochs=3, classifier=classifier)
            for truth in (labels, labels, (labels + 1) % 4)
        )
        assert good == again
        assert good > 0.95, classifier
        assert shifted < 0.05, classifier


def test_logistic_regression_sees_no_more_than_a_linear_function_can() -> None:
    """Two pixels, whose exclusive or is the label: the other two tell it."""
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (1280, 2), generator=random)
    images = torch.zeros(1280, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, :4, :], images[:, 0, 4:, :] = ((255 * bits[:, i, None, None]).to(torch.uint8) for i in (0, 1))
    labels = bits[:, 0] ^ bits[:, 1]
    found = {
        name: synthetic_accuracy(images[:1024], labels[:1024], images[1024:], labels[1024:], seed=0, classifier=name)
        for name in CLASSIFIERS
    }
    assert found["cnn"] == found["mlp"] == 1.0
    assert found["logistic"] < 0.8


def test_the_test_set_has_no_part_in_the_training() -> None:
    images, labels = _bars(256, 0, 255)
    test_images, test_labels = _bars(100, 1, 255)
    for classifier in CLASSIFIERS:
        whole = synthetic_accuracy(images, labels, test_images, test_labels, seed=0, epochs=1, classifier=classifier)
        halves = [
            synthetic_accuracy(images, labels, *half, seed=0, epochs=1, classifier=classifier)
            for half in zip(test_images.split(50), test_labels.split(50), strict=True)
        ]
        assert whole == pytest.approx(sum(halves) / 2)


def test_sets_of_unlike_sizes_are_taught_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = torch.optim.Adam.step

    def counted(self: torch.optim.Adam) -> None:
        sizes.append(len(taught))
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    test_images, test_labels = _bars(200, 1, 90)
    found = []
    for count in (60, 240, 440):
        taught, labels = _bars(count, 0, 90)
        arguments = (taught, labels, test_images, test_labels)
        found.append(synthetic_accuracy(*arguments, seed=0, steps=40, classifier="mlp"))
    assert [sizes.count(count) for count in (60, 240, 440)] == [40, 40, 40]
    assert min(found) > 0.95, found
    sizes.clear()
    synthetic_accuracy(*arguments, seed=0, classifier="mlp")
    assert len(sizes) == 5 * (440 // 128), "without steps, 5 epochs"


def test_steps_are_5_epochs_of_the_largest_and_some_hundreds_at_least() -> None:
    assert (equal_steps(440), equal_steps(128 * 60), equal_steps(128 * 100 + 5)) == (300, 300, 500)


def test_another_classifier_is_refused() -> None:
    images, labels = _bars(10, 0, 0)
    with pytest.raises(ConfigError, match="choose one of cnn, mlp, logistic"):
        synthetic_accuracy(images, labels, images, labels, seed=0, classifier="forest")
    with pytest.raises(ConfigError, match="steps = 0: give 1 or more"):
        synthetic_accuracy(images, labels, images, labels, seed=0, steps=0)
