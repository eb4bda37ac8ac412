"""Every generator, discriminator and loss goes through a whole small private run: moments, rounds, and a generator to draw from."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.applications.generate import TrainedGenerator
from common.faces import FaceDataset
from common.fields import Scalar
from common.models.discriminators import DISCRIMINATORS
from common.models.flat import get_flat
from common.models.generators import GENERATORS
from common.models.losses import LOSSES
from common.privacy.accounting import epsilon_of
from common.privacy.ledger import Ledger
from common.sections import AUGMENTATIONS, IMAGE_SIZES
from server.checkpoint import CoordinatorState
from server.records import RunRecorder
from tests.support import RUN_ID, tiny_config, train


def faces(seed: int, size: int, channels: int, num_classes: int) -> FaceDataset:
    """Four persons of two images, of noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(8) % num_classes if num_classes else None
    return FaceDataset(rng.integers(0, 256, (8, channels, size, size), dtype=np.uint8), np.arange(8) // 2, labels)


def one_run(folder: Path, **options: Scalar) -> None:
    config = tiny_config(num_rounds=2, num_clients=2, generator_width=4, moment_steps=2, **options)
    model = config.model
    state = CoordinatorState.fresh(config, RUN_ID)
    start = get_flat(state.discriminator), get_flat(state.generator)
    recorder = RunRecorder(folder, state)
    held = [faces(client, model.image_size, model.channels, model.num_classes) for client in range(2)]
    train(folder, state, held, [recorder])
    recorder.finish(state)
    for before, network in zip(start, (state.discriminator, state.generator), strict=True):
        after = get_flat(network)
        assert np.isfinite(after).all()
        assert (after != before).mean() > 0.5
    for client in range(2):
        ledger = Ledger(folder / "clients" / f"{client:04d}", max_epsilon=config.privacy.epsilon, delta=1e-5)
        assert 0.9 * config.privacy.epsilon <= epsilon_of(ledger.releases, 1e-5) <= config.privacy.epsilon
    drawn, labels = TrainedGenerator.load(folder).draw(4, seed=0)
    assert drawn.shape == (4, model.channels, model.image_size, model.image_size)
    assert (labels is None) == (model.num_classes == 0)


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("discriminator", DISCRIMINATORS)
def test_every_pair(generator: str, discriminator: str, tmp_path: Path) -> None:
    one_run(tmp_path, generator=generator, discriminator=discriminator, num_classes=2, channels=3, image_size=32)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss: str, tmp_path: Path) -> None:
    one_run(tmp_path, loss=loss, weight_clip=0.03, num_classes=0 if LOSSES[loss].sees_fakes else 2)


@pytest.mark.parametrize("discriminator", DISCRIMINATORS)
def test_every_classifier(discriminator: str, tmp_path: Path) -> None:
    one_run(
        tmp_path, discriminator=discriminator, loss="cross-entropy", num_classes=3, generator_batch=6, refine_steps=2
    )


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_every_size(size: int, tmp_path: Path) -> None:
    one_run(tmp_path, image_size=size, discriminator="dcgan", moment_rounds=1, generator="resnet")


@pytest.mark.parametrize("augment", [*AUGMENTATIONS, ",".join(AUGMENTATIONS)])
def test_every_augmentation(augment: str, tmp_path: Path) -> None:
    one_run(tmp_path, augment=augment, augment_views=2, channels=3)


def test_wasserstein_keeps_the_weights_within_their_bound(tmp_path: Path) -> None:
    config = tiny_config(loss="wasserstein", weight_clip=0.01, num_clients=2)
    state = CoordinatorState.fresh(config, RUN_ID)
    train(tmp_path, state, [faces(client, 28, 1, 0) for client in range(2)])
    assert max(parameter.abs().max() for parameter in state.discriminator.parameters()) <= torch.tensor(0.01)
