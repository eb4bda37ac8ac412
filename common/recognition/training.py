"""Training of a recogniser, step by step: photographs in, weights and a threshold out.

Who is on a photograph is learned as a classification of the persons trained on. With `softmax` the logits are
cosines between the embedding and a prototype of each person, times the scale (Wang et al. 2017, "NormFace"); cosface (Wang et al.
2018) and arcface (Deng et al. 2019) ask the right person's for a margin. Losses are those of pytorch-metric-learning.
Two photographs are then of one person where the cosine of their embeddings is at least a threshold, chosen on pairs of
persons who play no part in the training.

Nothing here is private: a recogniser trained on photographs remembers them, and stays with their owner.
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.augmentation import Augmentation, step_randomness
from common.device import half_precision, pick_device
from common.errors import CheckpointError, ConfigError, DataError
from common.evaluation.verification import best_threshold, verification_figures
from common.faces import FaceDataset
from common.models import initialise
from common.models.recogniser import Recogniser, embed
from common.recognition.album import draw_pairs
from common.recognition.lesson import Lesson
from common.recognition.recogniser import TrainedRecogniser, network_of
from common.recognition.settings import RecognitionConfig
from common.recognition.state import load_state, save_state
from common.sections import AugmentationConfig

# Share of the steps in which the learning rate rises.
_WARM_UP = 0.15
# Of pairs for validation, of one person.
_PAIRS_A_PERSON = 10


class Observer(Protocol):
    """Is told after every epoch."""

    def __call__(self, stage: str, epoch: int, epochs: int, loss: float, figure: float | None) -> None:
        """stage: pretrain or train; epoch from 1; loss: its mean; figure: on what is kept for validation, where it was looked at."""


def train_recogniser(
    lesson: Lesson,
    kept: FaceDataset | None,
    config: RecognitionConfig,
    *,
    unlabelled: Tensor | None = None,
    checkpoint: Path | None = None,
    observer: Observer | None = None,
) -> TrainedRecogniser:
    """Train on `lesson`.

    kept: photographs for validation. Under goal verify of other persons: the figure is the area under the ROC of their pairs, and the
    threshold is chosen on these. Under goal identify of the same persons, numbered alike: the share that is recognised. None: there is no
    figure, and the last epoch counts. unlabelled: (M, C, S, S) uint8, faces to learn from first, without names
    (config.pretrain_epochs). checkpoint: a file to go on from, written after every epoch; the outcome is the same to the last
    bit as without an interruption, on the same machine. Raises ConfigError, DataError, CheckpointError.
    """
    course = _Course(lesson, config, kept)
    asked = {"config": config.to_flat(), "learned_from": _digest(lesson, kept, unlabelled)}
    first = load_state(checkpoint, course.modules, course.optimizer) if checkpoint and checkpoint.exists() else {}
    for name, value in asked.items() if first else ():
        if first.get(name) != value:
            what = "other options" if name == "config" else "other faces"
            raise CheckpointError(
                f"{checkpoint} does not fit this training ({what}): begin anew under another name, or take its own"
            )
    course.resume(first)
    began = time.monotonic() - float(first.get("seconds", 0.0))
    stages: list[tuple[str, int, Callable[[int], float]]] = [("train", config.epochs, course.epoch)]
    if unlabelled is not None:
        pretrain = _Pretraining(course, unlabelled, config)
        stages.insert(0, ("pretrain", config.pretrain_epochs, pretrain.epoch))
    done = {"pretrain": int(first.get("pretrain", 0)), "train": int(first.get("train", 0))}
    for stage, epochs, run in stages:
        while done[stage] < epochs and not (stage == "train" and course.ended):
            loss = run(done[stage])
            done[stage] += 1
            figure = course.validate() if stage == "train" and kept is not None else None
            if checkpoint:
                told = {**done, **course.told, **asked, "seconds": time.monotonic() - began}
                save_state(checkpoint, course.modules, course.optimizer, told)
            if observer:
                observer(stage, done[stage], epochs, loss, figure)
    return course.finished(done["train"], time.monotonic() - began)


def _digest(lesson: Lesson, kept: FaceDataset | None, unlabelled: Tensor | None) -> str:
    """SHA-256 of all that is learned from and validated on."""
    found = hashlib.sha256()
    tensors = [
        lesson.images,
        lesson.persons,
        *lesson.attributes.values(),
        *([] if unlabelled is None else [unlabelled]),
    ]
    arrays = [] if kept is None else [kept.images, *([] if kept.persons is None else [kept.persons])]
    for array in (*(tensor.numpy() for tensor in tensors), *arrays):
        found.update(repr(array.shape).encode() + array.tobytes())
    return found.hexdigest()


def steps_an_epoch(count: int, config: RecognitionConfig) -> int:
    """Steps in which `count` faces are gone through once, in batches as near to config.batch as can be."""
    return max(1, round(count / config.batch))


class _Course:
    """The networks, the optimizer, and what was best so far."""

    def __init__(self, lesson: Lesson, config: RecognitionConfig, kept: FaceDataset | None) -> None:
        self.lesson, self.config, self.kept = lesson, config, kept
        if len(lesson.images) < config.batch:
            raise DataError(f"{len(lesson.images)} photographs, and batch = {config.batch}: use a smaller batch")
        self.device = pick_device()
        classes = {name: len(values) for name, values in lesson.classes.items()}
        self.network, self.best = network_of(config, classes), network_of(config, classes)
        rng = torch.Generator().manual_seed(config.seed)
        initialise(self.network, rng)
        self.persons = _loss(config, lesson.num_persons, rng)
        self.modules: dict[str, nn.Module] = {"network": self.network, "persons": self.persons, "best": self.best}
        for module in self.modules.values():
            module.to(self.device)
        parameters = [*self.network.parameters(), *self.persons.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        self.augmentation = Augmentation(AugmentationConfig(augment=config.augment), config.image_size, config.channels)
        self.told: dict[str, Any] = {"figure": None, "best_epoch": 0, "epoch": 0}

    def resume(self, told: dict[str, Any]) -> None:
        """Where a checkpoint left off."""
        self.told |= {key: told[key] for key in self.told if key in told}

    @property
    def ended(self) -> bool:
        """Whether patience is at its end."""
        patience = self.config.patience
        return self.kept is not None and 0 < patience <= self.told["epoch"] - self.told["best_epoch"]

    def batches(self, count: int, epoch: int, stage: int) -> list[tuple[Tensor, np.random.Generator, float]]:
        """Places of each batch's faces, the randomness of its step, and how far the stage is, in [0, 1)."""
        rng = np.random.default_rng([self.config.seed, stage, epoch])
        order = torch.from_numpy(rng.permutation(count))
        steps = steps_an_epoch(count, self.config)
        epochs = self.config.pretrain_epochs if stage else self.config.epochs
        return [(order[step::steps], rng, (epoch * steps + step) / (epochs * steps)) for step in range(steps)]

    def views(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """One view of each, (B, C, S, S) in [-1, 1]; within `step_randomness`."""
        faces = images.to(self.device).float().div(127.5).sub(1)
        return self.augmentation(faces).contiguous(memory_format=torch.channels_last)

    def step(self, loss: Tensor, share: float) -> float:
        """Down the gradient of `loss`, at the rate of this share of the stage."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * _rate(share)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return float(loss.detach())

    def epoch(self, epoch: int) -> float:
        """One pass over the lesson; the mean loss."""
        self.network.train()
        lesson, total = self.lesson, 0.0
        batches = self.batches(len(lesson.images), epoch, 0)
        for places, rng, share in batches:
            with step_randomness(self.network, self.augmentation, lambda rng=rng: rng.bytes(32)):  # type: ignore[misc]
                with half_precision(self.device):
                    embeddings = self.network(self.views(lesson.images[places], rng))
                loss = self.persons(embeddings.float(), lesson.persons[places].to(self.device))
                logits = self.network.attribute_logits(embeddings.float())
                for name, found in zip(lesson.classes, logits, strict=True):
                    truth = lesson.attributes[name][places].to(self.device)
                    if bool((truth >= 0).any()):
                        loss = loss + self.config.attribute_weight * functional.cross_entropy(
                            self.config.scale * found, truth, ignore_index=-1
                        )
                total += self.step(loss, share)
        self.told["epoch"] = epoch + 1
        return total / len(batches)

    def validate(self) -> float:
        """The figure on what is kept; the best weights are noted."""
        figure = self.figure()
        if self.told["figure"] is None or figure > self.told["figure"]:
            self.told |= {"figure": figure, "best_epoch": self.told["epoch"]}
            self.best.load_state_dict(self.network.state_dict())
        return figure

    def figure(self) -> float:
        """The network's on what is kept, as it is."""
        if self.kept is None or self.kept.persons is None:
            raise ValueError("nothing is kept for validation")
        if self.config.goal == "identify":
            found = (
                embed(self.network, torch.from_numpy(self.kept.images)) @ prototypes(self.persons, self.lesson.real).T
            )
            return float((found.argmax(1) == torch.from_numpy(self.kept.persons)).float().mean())
        scores, same = kept_scores(self.network, self.kept)
        return verification_figures(scores, same, 0.0).auc

    def finished(self, epochs: int, seconds: float) -> TrainedRecogniser:
        """What came of it: the best weights where patience asks for them, else the last."""
        network, figure = self.network, None
        if self.kept is not None:
            if self.config.patience:
                network, figure = self.best, self.told["figure"]
            else:
                figure = self.figure()
        threshold = None
        if self.kept is not None and self.config.goal == "verify":
            threshold = best_threshold(*kept_scores(network, self.kept))
        network.eval().requires_grad_(False)
        persons = prototypes(self.persons, self.lesson.real)
        return TrainedRecogniser(self.config, network, persons, self.lesson.classes, threshold, figure, epochs, seconds)


class _Pretraining:
    """Faces without names: two views of one are to be nearer than views of others (Chen et al. 2020, "SimCLR": NT-Xent)."""

    def __init__(self, course: _Course, images: Tensor, config: RecognitionConfig) -> None:
        losses = metric_learning()
        if not course.augmentation.is_random:
            raise ConfigError(
                "use = pretrain without augment: two views of a face would be the same; name augmentations"
            )
        if len(images) < config.batch:
            raise ConfigError(
                f"synthetic = {len(images)} faces, and batch = {config.batch}: draw more, or use a smaller batch"
            )
        self.course, self.images = course, images
        self.loss = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=0.2))

    def epoch(self, epoch: int) -> float:
        """One pass over the faces; the mean loss."""
        course, total = self.course, 0.0
        course.network.train()
        batches = course.batches(len(self.images), epoch, 1)
        for places, rng, share in batches:
            with step_randomness(course.network, course.augmentation, lambda rng=rng: rng.bytes(32)):  # type: ignore[misc]
                both = torch.cat([course.views(self.images[places], rng) for _ in range(2)])
                with half_precision(course.device):
                    embeddings = course.network(both).float()
                total += course.step(self.loss(*embeddings.chunk(2)), share)
        return total / len(batches)


def kept_scores(network: Recogniser, kept: FaceDataset) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of pairs of what is kept, always the same pairs, and which are of one person."""
    if kept.persons is None:
        raise DataError("it is not known who is on the photographs kept for validation")
    pairs = draw_pairs(kept.persons, np.random.default_rng(0), _PAIRS_A_PERSON)
    found = embed(network, torch.from_numpy(kept.images))
    return (found[pairs.first] * found[pairs.second]).sum(1).numpy(), pairs.same


def prototypes(loss: nn.Module, real: int) -> Tensor:
    """The directions (real, D) of the real persons, of unit length, on the CPU."""
    weights = loss.W
    if not isinstance(weights, Tensor):
        raise TypeError("the loss has no prototypes")
    return functional.normalize(weights.detach().T[:real]).cpu()


def metric_learning() -> Any:
    """The library of losses. Raises DataError where it is not installed."""
    try:
        from pytorch_metric_learning import losses
    except ImportError as error:
        raise DataError(
            f"a recogniser is trained with pytorch-metric-learning ({error}): pip install 'visard[evaluation]'"
        ) from error
    return losses


def _rate(share: float) -> float:
    """The learning rate's share of its highest, after this share of the steps."""
    if share < _WARM_UP:
        return 0.04 + 0.96 * share / _WARM_UP
    return 0.5 + 0.5 * float(np.cos(np.pi * (share - _WARM_UP) / (1 - _WARM_UP)))


def _loss(config: RecognitionConfig, persons: int, rng: torch.Generator) -> nn.Module:
    losses = metric_learning()
    kinds: dict[str, Callable[[], nn.Module]] = {
        "softmax": lambda: losses.NormalizedSoftmaxLoss(persons, config.embedding, temperature=1 / config.scale),
        "cosface": lambda: losses.CosFaceLoss(persons, config.embedding, margin=config.margin, scale=config.scale),
        # In degrees there.
        "arcface": lambda: losses.ArcFaceLoss(
            persons, config.embedding, margin=float(np.degrees(config.margin)), scale=config.scale
        ),
    }
    # The library draws weights from the global random numbers; they are not kept.
    with torch.random.fork_rng(devices=[]):
        loss = kinds[config.loss]()
    with torch.no_grad():
        loss.W.copy_(torch.randn(config.embedding, persons, generator=rng))  # type: ignore[operator]
    return loss
