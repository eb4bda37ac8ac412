"""Drawing: labels that the run's classifier agrees with, the same for the same seed, and nothing from a damaged file."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.applications.generate import CLASSIFIER, TrainedGenerator
from common.errors import CheckpointError, ConfigError
from common.gradients import from_uint8, to_uint8
from common.models.discriminators import ClassDiscriminator
from common.sections import ModelConfig
from server.checkpoint import CoordinatorState
from server.records import RunRecorder
from tests.support import RUN_ID, tiny_config


class Grey(nn.Module):
    """Images of one brightness, whatever the class asked for: each third of brightnesses comes as often."""

    def __init__(self) -> None:
        super().__init__()
        self.never_used = nn.Parameter(torch.zeros(1))

    def forward(self, latents: Tensor, _labels: Tensor | None = None) -> Tensor:
        brightness = 2 * torch.special.ndtr(latents[:, 0]) - 1
        return brightness[:, None, None, None].expand(-1, 1, 28, 28)


def by_brightness(num_classes: int, *, likes_last: float = 0.0) -> ClassDiscriminator:
    """Dark is class 0, bright class 1; a third class nothing looks like, unless liked above 1."""
    classifier = ClassDiscriminator(nn.Flatten(), 28 * 28, num_classes)
    with torch.no_grad():
        classifier.classes.weight.zero_()
        classifier.classes.bias.fill_(likes_last - 1.0)
        classifier.classes.weight[0], classifier.classes.weight[1] = -1 / 784, 1 / 784
        classifier.classes.bias[:2] = 0.0
    return classifier


def generator(num_classes: int, classifier: ClassDiscriminator | None) -> TrainedGenerator:
    model = ModelConfig(image_size=28, channels=1, num_classes=num_classes, latent_dim=4)
    return TrainedGenerator(Grey().eval(), model, classifier)


def bright(images: np.ndarray) -> np.ndarray:
    return (images.mean((1, 2, 3)) > 127.5).astype(np.int64)


@pytest.mark.parametrize("count", [1, 2, 5, 64, 256, 700])
def test_labels_are_those_that_the_classifier_sees(count: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        images, labels = generator(2, by_brightness(2)).draw(count, seed=0)
    assert labels is not None
    assert images.shape == (count, 1, 28, 28)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.arange(count) % 2)  # in turn, as asked for
    np.testing.assert_array_equal(bright(images), labels)
    assert len(np.unique(images[:, 0, 0, 0])) > min(count, 50) / 2  # not one image many times
    assert not caplog.records
    # Without the classifier the labels would say nothing of these images.
    plain, asked = generator(2, None).draw(count, seed=0)
    np.testing.assert_array_equal(asked, labels)
    if count >= 64:
        assert 0.3 < (bright(plain) == asked).mean() < 0.7


@pytest.mark.parametrize("label", [0, 1])
def test_one_label_may_be_asked_for(label: int) -> None:
    images, labels = generator(2, by_brightness(2)).draw(300, seed=1, label=label)
    np.testing.assert_array_equal(labels, np.full(300, label))
    assert (bright(images) == label).all()


@pytest.mark.parametrize("count", [3, 63, 64, 256, 320])
def test_a_class_that_never_comes_is_labelled_as_asked_for_and_told(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "visard.generate"):
        images, labels = generator(3, by_brightness(3)).draw(count, seed=0)
    assert labels is not None
    np.testing.assert_array_equal(labels, np.arange(count) % 3)
    seen = labels < 2
    np.testing.assert_array_equal(bright(images)[seen], labels[seen])  # those that come are right all the same
    assert len(caplog.records) == 1
    assert "labelled as they were asked for" in caplog.text
    # Images were drawn for the third class, and are not what lay in memory.
    if count > 63:
        of_third = bright(images)[~seen]
        assert 0.3 < of_third.mean() < 0.7


def test_the_class_that_alone_is_seen_is_no_trap(caplog: pytest.LogCaptureFixture) -> None:
    """A classifier that takes everything for one class: the others are labelled as asked for."""
    with caplog.at_level(logging.WARNING, "visard.generate"):
        images, labels = generator(3, by_brightness(3, likes_last=10.0)).draw(30, seed=0)
    assert labels is not None
    np.testing.assert_array_equal(labels, np.arange(30) % 3)
    assert len(images) == 30
    assert caplog.records


def test_the_seed_decides() -> None:
    trained = generator(2, by_brightness(2))
    before = torch.get_rng_state()
    one, again, other = (trained.draw(100, seed=seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_is_none_is_refused(label: int) -> None:
    with pytest.raises(ConfigError, match=f"label {label} is not one of this generator's: 0 to 1"):
        generator(2, by_brightness(2)).draw(4, seed=0, label=label)
    with pytest.raises(ConfigError, match="none: it is unconditional"):
        generator(0, None).draw(4, seed=0, label=0)


def finished(folder: Path, *, updates: int = 2, **options: object) -> CoordinatorState:
    """A run's folder, as at its end but for the training."""
    state = CoordinatorState.fresh(tiny_config(**options), RUN_ID)  # type: ignore[arg-type]
    state.discriminator_updates = updates
    RunRecorder(folder, state).finish(state)
    return state


def test_the_classifier_lies_with_the_generator(tmp_path: Path) -> None:
    state = finished(tmp_path, num_classes=2, loss="cross-entropy", discriminator="scattering")
    loaded = TrainedGenerator.load(tmp_path)
    assert loaded.classifier is not None
    assert not any(module.training for module in (loaded.network, loaded.classifier))
    for key, value in state.discriminator.state_dict().items():
        assert torch.equal(loaded.classifier.state_dict()[key], value), key
    for key, value in state.ema.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[key], value), key
    images, labels = loaded.draw(40, seed=5)
    assert labels is not None
    seen = loaded.classifier.classify(from_uint8(images)).argmax(1).numpy()
    both = np.unique(seen)
    np.testing.assert_array_equal(seen[np.isin(labels, both)], labels[np.isin(labels, both)])
    np.testing.assert_array_equal(TrainedGenerator.load(tmp_path).draw(40, seed=5)[0], images)


FAULTS = ["cut", "half of the classifier", "half of the generator", "another shape", "a name too many", "no card"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_refused(tmp_path: Path, fault: str) -> None:
    finished(tmp_path, num_classes=2, loss="cross-entropy")
    path = tmp_path / "generator.safetensors"
    weights = load_file(path)
    some = next(key for key in weights if key.startswith(CLASSIFIER))
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif fault == "half of the classifier":
        save_file({key: value for key, value in weights.items() if key != some}, path)
    elif fault == "half of the generator":
        other = next(key for key in weights if not key.startswith(CLASSIFIER) and key.endswith("weight"))
        save_file({key: value for key, value in weights.items() if key != other}, path)
    elif fault == "another shape":
        save_file(weights | {some: torch.zeros(3)}, path)
    elif fault == "a name too many":
        save_file(weights | {f"{CLASSIFIER}more": torch.zeros(3)}, path)
    else:
        (tmp_path / "generator.json").unlink()
    with pytest.raises(CheckpointError, match="no finished generator"):
        TrainedGenerator.load(tmp_path)


def test_a_classifier_that_no_round_of_gradients_taught_labels_nothing(tmp_path: Path) -> None:
    finished(tmp_path, updates=0, num_classes=2, loss="cross-entropy")
    assert not any(key.startswith(CLASSIFIER) for key in load_file(tmp_path / "generator.safetensors"))
    loaded = TrainedGenerator.load(tmp_path)
    assert loaded.classifier is None
    assert len(loaded.draw(5, seed=0)[0]) == 5


@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_generator_without_a_classifier_draws_as_asked(tmp_path: Path, num_classes: int) -> None:
    """Latents in the order of the seed, 256 at once; labels in turn."""
    state = finished(tmp_path, num_classes=num_classes, generator_batch=6)
    assert not any(key.startswith(CLASSIFIER) for key in load_file(tmp_path / "generator.safetensors"))
    loaded = TrainedGenerator.load(tmp_path)
    assert loaded.classifier is None
    images, labels = loaded.draw(300, seed=7)
    rng = torch.Generator().manual_seed(7)
    expected = []
    for first, size in ((0, 256), (256, 44)):
        latents = torch.randn(size, 4, generator=rng)
        classes = torch.arange(first, first + size) % num_classes if num_classes else None
        expected.append(to_uint8(state.ema(latents, classes)))
    np.testing.assert_array_equal(images, np.concatenate(expected))
    assert (labels is None) == (num_classes == 0)
    if labels is not None:
        np.testing.assert_array_equal(labels, np.arange(300) % 3)
        of_one, ones = loaded.draw(5, seed=7, label=1)
        np.testing.assert_array_equal(ones, np.ones(5))
        latents = torch.randn(5, 4, generator=torch.Generator().manual_seed(7))
        np.testing.assert_array_equal(of_one, to_uint8(state.ema(latents, torch.ones(5, dtype=torch.int64))))
