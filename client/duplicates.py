"""Pictures that an owner holds more than once.

A photograph at two persons is two units of privacy: who is on it has half the protection that is promised. A photograph
twice at one person is drawn twice as often, and costs no protection.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

# Side of the grid of the hash: 2 * 16 * 16 comparisons.
SIDE = 16
# A cell is brighter by more than this share of the picture's standard deviation, and by a grey level: in an even background the
# noise of compression is less.
MARGIN, LEAST_MARGIN = 0.05, 1.0
# At most this share of the hash may differ, and the thumbnails must correlate this much. Saved anew as JPEG of quality 60, 900
# of 900 faces of LFW, UTKFace and ORL are found, and of 6,897 in LFW nothing but copies.
MAX_DIFFERENCE = 0.1
MIN_CORRELATION = 0.99
# Above this many, every picture against every other would take minutes: only equal pixels are looked for.
MAX_COMPARED = 100_000
BLOCK = 256


@dataclass(frozen=True)
class Fingerprints:
    """bits: uint64 (N, 2 * SIDE * SIDE / 64). thumbnails: float32 (N, SIDE * SIDE), mean 0 and norm 1; all 0 where a picture
    has no contrast.
    """

    bits: np.ndarray
    thumbnails: np.ndarray


def fingerprints(images: Sequence[np.ndarray] | np.ndarray) -> Fingerprints:
    """Difference hashes of N pictures, uint8 (C, H, H), C 1 or 3.

    A bit says whether a cell of a small grey copy is brighter than the one left of it, or than the one above it. The hash
    of Krawetz 2013 ("Kind of like that"), in both directions and finer. It does not change with brightness or contrast,
    and little with size and compression.
    """
    count = len(images)
    across = np.empty((count, SIDE, SIDE + 1), dtype=np.float32)
    down = np.empty((count, SIDE + 1, SIDE), dtype=np.float32)
    small = np.empty((count, SIDE, SIDE), dtype=np.float32)
    for i, image in enumerate(images):
        colours = Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1))
        grey = colours.convert("L").convert("F")
        across[i] = np.asarray(grey.resize((SIDE + 1, SIDE), Image.Resampling.BOX))
        down[i] = np.asarray(grey.resize((SIDE, SIDE + 1), Image.Resampling.BOX))
        small[i] = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))
    margin = np.maximum(LEAST_MARGIN, MARGIN * small.std(axis=(1, 2), keepdims=True))
    brighter = [across[:, :, 1:] > across[:, :, :-1] + margin, down[:, 1:] > down[:, :-1] + margin]
    bits = np.packbits(np.concatenate([part.reshape(count, -1) for part in brighter], axis=1), axis=1)
    flat = small.reshape(count, -1)
    flat -= flat.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    return Fingerprints(bits.view(np.uint64), np.divide(flat, norms, out=np.zeros_like(flat), where=norms > 0))


def alike(prints: Fingerprints, track: Callable[[Sequence[int]], Iterable[int]] = iter) -> np.ndarray:
    """The pairs, int64 (P, 2) with the lesser index first, whose hashes and thumbnails are those of one picture.

    Compares all pairs: seconds for ten thousand pictures, a minute for a hundred thousand. track: passes the beginnings of the
    blocks on, for a progress bar. Pictures without contrast are alike to each other and to nothing else.
    """
    bits, thumbnails = prints.bits, prints.thumbnails
    limit = int(MAX_DIFFERENCE * bits.shape[1] * 64)
    found = [np.zeros((0, 2), dtype=np.int64)]
    for start in track(range(0, len(bits), BLOCK)):
        block, rest = bits[start : start + BLOCK], bits[start:]
        distance = np.zeros((len(block), len(rest)), dtype=np.uint16)
        for word in range(bits.shape[1]):
            distance += np.bitwise_count(block[:, None, word] ^ rest[None, :, word])
        one, other = np.nonzero(distance <= limit)
        one, other = (index[one < other] for index in (one, other))
        found.append(np.stack([one, other], axis=1) + start)
    pairs = np.concatenate(found)
    left, right = thumbnails[pairs[:, 0]], thumbnails[pairs[:, 1]]
    blank = ~left.any(axis=1) & ~right.any(axis=1)
    return np.asarray(pairs[((left * right).sum(axis=1) >= MIN_CORRELATION) | blank])


def equal_pairs(keys: Sequence[object]) -> np.ndarray:
    """Pairs, int64 (P, 2), that join all equal keys, each to the first that is equal to it; None is equal to nothing."""
    first: dict[object, int] = {}
    pairs = [(first[key], i) for i, key in enumerate(keys) if key is not None and first.setdefault(key, i) != i]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def joined(pairs: np.ndarray) -> list[list[int]]:
    """The sets that pairs (P, 2) join, each ascending, by their least member."""
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for one, other in pairs.tolist():
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    members: dict[int, list[int]] = {}
    for node in sorted(parent):
        members.setdefault(root(node), []).append(node)
    return list(members.values())
