"""What public faces teach before the first round: a generator, and a discriminator, that do not begin with nothing.

Public faces are nobody's secret, so there is no noise and no privacy is spent; no client's faces are looked at. The generator is
fitted to the exact mean random features of the public faces, with the loss of the moment stage (`server.moments`); the
discriminator takes as many steps, clipped as in a round, so that gradients are of the same scale, but without noise. That a
private training goes further from a public start is the finding of De et al. 2022, "Unlocking high-accuracy differentially
private image classification through scale". Both networks then begin the run with a fresh Adam: by the small squares of
gradients without noise the first steps on noisy ones would be too long.

The faces are read at the coordinator and stay there: only weights that learned from them go on.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.config import RunConfig
from common.errors import DataError
from common.faces import FaceDataset, read_faces
from common.faces.folders import BY_NAME
from common.gradients import fake_mean, real_sum
from common.models.features import RandomFeatures
from common.models.losses import LOSSES
from common.sections import FaceSource
from server.checkpoint import CheckpointStore, CoordinatorState
from server.discriminator import adam_step
from server.generator import GeneratorTrainer
from server.moments import MomentLoss

if TYPE_CHECKING:
    from server.coordinator import Observer

# Seconds between two checkpoints.
_CHECKPOINT_S = 10.0
# Faces whose features are computed at once.
_BATCH = 250

log = logging.getLogger("visard.server")


def learn_prior(
    state: CoordinatorState, trainer: GeneratorTrainer, store: CheckpointStore, observers: Sequence["Observer"]
) -> None:
    """The steps on the public faces, from wherever they are; nothing where they are done, or none are asked for.

    Raises DataError, before anything is saved, where the faces cannot be read.
    """
    if not state.priming:
        return
    prior = Prior(state, trainer)
    while state.priming:
        began = time.monotonic()
        state.last = prior.step()
        if not state.priming:
            state.generator_optimizer = torch.optim.Adam(state.generator.parameters())
            state.discriminator_optimizer = torch.optim.Adam(state.discriminator.parameters())
        state.seconds += time.monotonic() - began
        if time.monotonic() - store.saved > _CHECKPOINT_S or not state.priming:
            store.save(state)
        for observer in observers:
            observer.fit_stepped(state)


class Prior:
    """One step at a time on the public faces, of `state`'s networks in place."""

    def __init__(self, state: CoordinatorState, trainer: GeneratorTrainer) -> None:
        """Raises DataError where the faces cannot be read."""
        model, device = state.config.model, next(state.generator.parameters()).device
        self._state, self._trainer = state, trainer
        self._faces = public_faces(state.config)
        features = RandomFeatures(model.image_size, model.channels, state.config.moments.feature_seed).to(device)
        means = mean_features(features, self._faces, max(model.num_classes, 1)).to(device)
        self._moment_loss = MomentLoss(features, means)

    def step(self) -> dict[str, float]:
        """One step of the discriminator, where these faces can teach it, and one of the generator. Returns the figures."""
        loss = LOSSES[self._state.config.model.loss]
        if loss.sees_fakes or self._faces.labels is not None:
            adam_step(self._state, self._gradient())
        return self._trainer.prior_step(self._moment_loss)

    def _gradient(self) -> Tensor:
        """Of the discriminator's loss, as a round's without noise: (d,) float32."""
        state, config = self._state, self._state.config
        loss, device = LOSSES[config.model.loss], next(state.discriminator.parameters()).device
        count = config.training.fake_batch
        chosen = torch.randint(len(self._faces), (count,), generator=state.rng).numpy()
        fakes, fake_labels = self._trainer.fakes(count)
        # Faces without labels could be of any class, as the fakes are in turn.
        labels = fake_labels if self._faces.labels is None else torch.from_numpy(self._faces.labels[chosen]).to(device)
        with self._trainer.randomness():
            units = torch.arange(count, device=device)
            reals = self._faces.tensor(chosen).to(device)
            views, view_labels, units = self._trainer.augmentation.views_of(reals, labels, units)
            real = real_sum(state.discriminator, loss, views, view_labels, units, count, config.privacy) / count
            fake_views = self._trainer.augmentation(fakes)
            return real + fake_mean(state.discriminator, loss, fake_views, fake_labels, config.privacy)


def public_faces(config: RunConfig) -> FaceDataset:
    """The run's public faces, cut as the clients' are; labelled where they have labels of all of the run's classes, else
    without labels.

    Labels are found as in `--data`, but for those in a CSV: it is a file of the simulated clients'. Raises DataError.
    """
    model, run = config.model, config.simulation
    # What is drawn by us is drawn where it should be, and not to be looked for.
    detect = "none" if config.training.public.startswith("procedural:") else run.detect
    plain = FaceSource(data=config.training.public, crop=run.crop, detect=detect)
    found = None
    if model.num_classes and run.label_column:
        attributes = BY_NAME if run.attributes == BY_NAME else ""
        labelled = dataclasses.replace(
            plain, attributes=attributes, label_column=run.label_column, label_values=run.label_values
        )
        with suppress(DataError):  # no such labels: what else is wrong with them comes again
            found = read_faces(labelled, model.image_size, model.channels)
    if found is None or not _has_all(found.faces.labels, model.num_classes):
        try:
            found = read_faces(plain, model.image_size, model.channels)
        except DataError as error:
            raise DataError(f"--public: {error}") from error
    found.warn(plain.data)
    if model.num_classes and _has_all(found.faces.labels, model.num_classes):
        return found.faces
    if model.num_classes:
        log.warning(
            "the public faces have not the labels of all %d classes: every class begins with the mean of all of them",
            model.num_classes,
        )
    return FaceDataset(found.faces.images)


def _has_all(labels: np.ndarray | None, num_classes: int) -> bool:
    return labels is not None and np.array_equal(np.unique(labels), np.arange(num_classes))


@torch.no_grad()
def mean_features(features: RandomFeatures, faces: FaceDataset, num_classes: int) -> Tensor:
    """The exact mean features of each class, (num_classes, dim) float32 on the CPU; without labels that of all faces in
    every row.
    """
    device = next(features.buffers()).device
    total, counts = torch.zeros(num_classes, features.dim, dtype=torch.float64), torch.zeros(num_classes)
    for low in range(0, len(faces), _BATCH):
        some = np.arange(low, min(low + _BATCH, len(faces)))
        embedded = features(faces.tensor(some).to(device)).cpu().double()
        member = torch.ones(num_classes, len(some), dtype=torch.float64)
        if faces.labels is not None:
            member = torch.from_numpy(faces.labels[some] == np.arange(num_classes)[:, None]).double()
        total += member @ embedded
        counts += member.sum(1)
    return (total / counts[:, None]).float()
