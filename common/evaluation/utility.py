"""What synthetic images are good for: train on synthetic, test on real.

Esteban, Hyland and Raetsch 2017, "Real-valued (medical) time series generation with recurrent conditional GANs"; the
figure in the tables of differentially private image generation (Cao et al. 2021, "Don't generate me", which gives it for a
CNN, an MLP and logistic regression).
"""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import nn
from torch.nn import functional as F

from common.errors import ConfigError, DataError
from common.models import build_initialised, initialise

_BATCH = 128
_TEST_BATCH = 1000
_LEARNING_RATE = 2e-3
_EPOCHS = 5
# 5 epochs of a few hundred images are a handful of steps, from which nothing is learned.
_LEAST_STEPS = 300


def _cnn(image_size: int, channels: int, num_classes: int) -> nn.Module:
    """Two convolutions (3x3, 32 and 64 filters) with batch norm and pooling, one hidden layer of 128."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (image_size // 4) ** 2, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def _mlp(image_size: int, channels: int, num_classes: int) -> nn.Module:
    """One hidden layer of 100, as scikit-learn's."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, 100), nn.ReLU(), nn.Linear(100, num_classes))


def _logistic(image_size: int, channels: int, num_classes: int) -> nn.Module:
    """Logistic regression on the pixels, without a penalty."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, num_classes))


def equal_steps(most: int) -> int:
    """Steps that teach well whichever of several sets it is, of which the largest has `most` images: 5 epochs of that one, and 300
    at least. Without them a larger set teaches longer, and seems to be the better for it.
    """
    return max(_LEAST_STEPS, _EPOCHS * (most // _BATCH))


def synthetic_accuracy(
    images: torch.Tensor,
    labels: torch.Tensor,
    test_images: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    seed: int,
    epochs: int = _EPOCHS,
    steps: int | None = None,
    classifier: str = "cnn",
) -> float:
    """Share, 0 to 1, of the test images that a small classifier trained on `images` alone labels rightly.

    images, test_images: (N, C, S, S) uint8, or float in [-1, 1]; labels: (N,) int64 from 0. classifier: one of CLASSIFIERS,
    all trained alike. steps: of 128 images (all, where there are fewer), in place of `epochs`, to compare sets of unlike sizes
    (`equal_steps`). The test set plays no part in the training: its length is fixed and nothing is selected. On
    real test images the result is a figure about private data unless the set is public: it is for trials and benchmarks, not
    for a coordinator's log. Arithmetic is bfloat16 on a CPU too; the initial weights and the order come from `seed`. Raises
    DataError on unlike shapes and on fewer than 2 images, ConfigError on another classifier or fewer than 1 step.
    """
    if classifier not in CLASSIFIERS:
        raise ConfigError(f"classifier {classifier!r}: choose one of {', '.join(CLASSIFIERS)}")
    if steps is not None and steps < 1:
        raise ConfigError(f"steps = {steps}: give 1 or more, or None to count in epochs")
    _check(images, labels, test_images, test_labels)
    generator = torch.Generator().manual_seed(seed)
    num_classes = int(max(labels.max(), test_labels.max())) + 1
    construct = CLASSIFIERS[classifier]
    model = build_initialised(lambda: construct(images.shape[2], images.shape[1], num_classes))
    initialise(model, generator)
    # Batches come as channels_last; the weights follow at the first convolution.
    model = model.to(images.device)
    batches = len(images) // _BATCH or 1
    total_steps = epochs * batches if steps is None else steps
    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_LEARNING_RATE, total_steps=total_steps)
    device = images.device.type
    for batch in islice(_batches(len(images), generator, whole=steps is not None), total_steps):
        with torch.autocast(device, torch.bfloat16):
            logits = model(_as_input(images[batch]))
        loss = F.cross_entropy(logits.float(), labels[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    model.eval()
    right = 0
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        for batch, truth in zip(
            torch.split(test_images, _TEST_BATCH), torch.split(test_labels, _TEST_BATCH), strict=True
        ):
            right += int((model(_as_input(batch)).argmax(dim=1) == truth).sum())
    return right / len(test_images)


def _batches(count: int, generator: torch.Generator, *, whole: bool) -> Iterator[torch.Tensor]:
    """Indices of batches without end, in a new order each epoch. whole: of _BATCH images each, what is left over sitting an epoch
    out; else an epoch is parted evenly, into batches of _BATCH images or somewhat more.
    """
    batches = count // _BATCH or 1
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order.split(_BATCH)[:batches] if whole else order.tensor_split(batches)


def _as_input(images: torch.Tensor) -> torch.Tensor:
    scaled = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
    return scaled.contiguous(memory_format=torch.channels_last)


def _check(images: torch.Tensor, labels: torch.Tensor, test_images: torch.Tensor, test_labels: torch.Tensor) -> None:
    for name, one, other in (("training", images, labels), ("test", test_images, test_labels)):
        if one.ndim != 4 or other.shape != (len(one),) or len(one) < 2:
            raise DataError(
                f"{name} images of shape {tuple(one.shape)} with labels of shape {tuple(other.shape)}; give at least 2 "
                "images (N, C, S, S) and one label for each"
            )
    if images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"training images are {tuple(images.shape[1:])}, test images {tuple(test_images.shape[1:])}; "
            "bring them to one shape"
        )


# Each makes a module (B, C, S, S) -> logits (B, num_classes) from S, C and num_classes.
CLASSIFIERS: dict[str, Callable[[int, int, int], nn.Module]] = {"cnn": _cnn, "mlp": _mlp, "logistic": _logistic}
