"""Which group a face is of, said by a small network that learned it from reference faces.

Generated faces carry no word of who they are, so a classifier says it, and is wrong more often of some groups than of others:
its own errors, on faces that it did not learn from, go beside whatever it says. Nothing is weighted or corrected.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.device import half_precision
from common.errors import DataError
from common.evaluation.fairness import two_or_more
from common.evaluation.utility import CLASSIFIERS
from common.models import build_initialised, initialise

MAX_GROUPS = 20
_BATCH, _TEST_BATCH = 64, 1000
_LEARNING_RATE = 2e-3
# The share of a group's faces that may be told wrongly, and of those told to be of it that may be others.
MAX_WRONG = 0.3
# Whichever is more steps: a few hundred faces are gone through often.
_EPOCHS, _STEPS = 5, 300


def too_small(groups: np.ndarray, persons: np.ndarray | None) -> dict[str, int]:
    """Groups that `halves` cannot halve, as they are of fewer than two persons (images, where persons is None), and the
    images of each. groups, persons: as there.
    """
    known = np.flatnonzero(groups != "")
    names, of, images = np.unique(groups[known], return_inverse=True, return_counts=True)
    units = images
    if persons is not None:
        # A person whose photographs are of several groups (with glasses and without) is one of each.
        pairs = np.unique(np.stack([of, persons[known]], 1), axis=0)
        units = np.bincount(pairs[:, 0], minlength=len(names))
    return {str(name): int(count) for name, count, own in zip(names, images, units, strict=True) if own < 2}


def halves(groups: np.ndarray, persons: np.ndarray | None, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices to learn from and those to judge by, of groups (N,) text, each group about halved; none of '' in either.

    persons: (N,) int64, so that no person is in both halves; None where they are not known, and each image counts as one. Who is
    of several groups is dealt out by the first photograph's, and changes sides where another group would be on one side alone.
    Raises DataError for fewer than two groups, more than MAX_GROUPS, or a group that does not reach into both halves.
    """
    names = two_or_more(groups)
    if len(names) > MAX_GROUPS:
        raise DataError(f"{len(names)} groups, the limit is {MAX_GROUPS}: give a coarser attribute, such as age_group")
    known = np.flatnonzero(groups != "")
    unit_of = known if persons is None else persons[known]
    _, first, unit = np.unique(unit_of, return_index=True, return_inverse=True)
    rng, to_learn = np.random.default_rng(seed), np.zeros(len(first), dtype=bool)
    for name in names:
        own = rng.permutation(np.flatnonzero(groups[known[first]] == name))
        to_learn[own[: -(-len(own) // 2)]] = True
    present = np.zeros((len(first), len(names)), dtype=bool)
    present[unit, np.searchsorted(names, groups[known])] = True
    _reach_both(to_learn, present)
    learned, judged = known[to_learn[unit]], known[~to_learn[unit]]
    for place, name in enumerate(names):
        if not ((groups[learned] == name).any() and (groups[judged] == name).any()):
            who = "image" if persons is None else "person"
            raise DataError(
                f"group {name!r} has {int((groups == name).sum())} images, of {int(present[:, place].sum())} {who}(s), and cannot be "
                f"halved by {who}: it takes 2 {who}s or more to learn from one and judge by another; add some, or leave the group out"
            )
    return learned, judged


def _reach_both(to_learn: np.ndarray, present: np.ndarray) -> None:
    """Bring each group to both sides, in place, by who can change sides without taking another group from one.

    to_learn: (U,) bool; present: (U, G) bool, who has images of which group.
    """
    for group, learning in itertools.product(range(present.shape[1]), (True, False)):
        if (present[:, group] & (to_learn == learning)).any():
            continue
        for unit in np.flatnonzero(present[:, group]):
            others = present[to_learn != learning].sum(0) - present[unit]
            if (others[present[unit]] > 0).all():
                to_learn[unit] = learning
                break


def hard_to_tell(said: np.ndarray, truth: np.ndarray) -> set[str]:
    """The groups of `truth` of which `said` is wrong too often to take its word: of more than MAX_WRONG of their images, or
    where more than MAX_WRONG of those that it says are of the group are not. Both text (N,), of images not learned from.
    """
    found = set()
    for name in np.unique(truth).tolist():
        right = int(((said == name) & (truth == name)).sum())
        if right < (1 - MAX_WRONG) * max(int((truth == name).sum()), int((said == name).sum())):
            found.add(name)
    return found


def tell_groups(images: Tensor, groups: np.ndarray, others: Sequence[Tensor], *, seed: int) -> list[np.ndarray]:
    """The group of each image of each of `others`, as the CNN of `utility` says that learned from images and groups.

    images: (N, C, S, S) uint8; groups: (N,) text, none ''; others: uint8 (M, C, S, S), on the same device. Returns text (M,) for each.
    5 epochs, and 300 steps at least; weights and order come from `seed`. Raises DataError for unlike shapes.
    """
    if images.dtype != torch.uint8 or groups.shape != images.shape[:1] or len(images) < 2:
        raise DataError(
            f"images are {images.dtype} {tuple(images.shape)} and groups {groups.shape}: give 2 or more of each"
        )
    if any(other.shape[1:] != images.shape[1:] for other in others):
        raise DataError(f"not all images are {tuple(images.shape[1:])}: bring them to one shape")
    names, numbers = np.unique(groups, return_inverse=True)
    truth = torch.from_numpy(numbers.astype(np.int64)).to(images.device)
    random = torch.Generator().manual_seed(seed)
    model = build_initialised(lambda: CLASSIFIERS["cnn"](images.shape[2], images.shape[1], len(names)))
    initialise(model, random)
    model = model.to(images.device)
    batches = len(images) // _BATCH or 1
    epochs = max(_EPOCHS, -(-_STEPS // batches))
    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_LEARNING_RATE, total_steps=epochs * batches)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=random).tensor_split(batches):
            with half_precision(images.device):
                logits = model(_scaled(images[batch]))
            loss = F.cross_entropy(logits.float(), truth[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad(), half_precision(images.device):
        said = [[model(_scaled(some)).argmax(1).cpu().numpy() for some in other.split(_TEST_BATCH)] for other in others]
    return [names[np.concatenate(each)] for each in said]


def _scaled(images: Tensor) -> Tensor:
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
