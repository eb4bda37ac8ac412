"""Faces in a photograph and five points on each, by MTCNN: three small networks, each stricter than the one before.

K. Zhang, Z. Zhang, Z. Li, Y. Qiao, "Joint Face Detection and Alignment using Multitask Cascaded Convolutional
Networks", IEEE Signal Processing Letters 23(10), 2016, https://arxiv.org/abs/1604.02878. The weights are those of the
package `mtcnn` (MIT licence, 2 MB), the optional extra `faces`; they run here in torch, on the CPU, and nothing is ever
downloaded. Only the package's data is read: to import it would need TensorFlow.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.errors import DataError
from common.faces.alignment import eye_places, frame, level

PACKAGE = "mtcnn"
# The files are pickles: nothing but these exact bytes is ever opened.
WEIGHTS = {
    "pnet": "ea6b0c3e685ebee3165326ad6484acc95f2ef78f1c94fbf40a55704fa989f7b5",
    "rnet": "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee",
    "onet": "94f6ea2f4cf985275ee958cdd762d17b6009348a4fb9d8c6be39ba73ffd22ca3",
}
# Photographs are looked at with at most this many pixels on the longer side: it bounds time and memory.
LONGER_SIDE = 1024
# The smallest face that is looked for, in pixels of the image as it is looked at.
MIN_FACE = 20
# What each network must be sure of; the first two and the pyramid's step as in the paper's own code.
PROPOSAL_SCORE, REFINED_SCORE, FACE_SCORE = 0.6, 0.7, 0.8
PYRAMID_STEP = 0.709
# A face less sure than this counts only where there is no surer one.
SURE_SCORE = 0.95
# Only as sure as this may a face lie on its side or upside down: turned copies raise more false alarms.
TURNED_SCORE = 0.98
# The side in pixels of a levelled cut that is looked at again, and how far the eyes may be from where the first look
# put them, as a share of it.
SECOND_LOOK, STRAYED = 160, 0.125
# Candidates kept at each step, the best first: hostile textures must not take for ever.
MAX_CANDIDATES = 500

Weights = list[torch.Tensor]


@dataclass(frozen=True)
class Face:
    """One face, in pixels of the image from its top left corner.

    box: float64 (4,), left, top, right, bottom; it may pass the edges. points: float64 (5, 2), (x, y) of the person's
    right eye (left in an upright image), left eye, tip of the nose, right and left corner of the mouth. score: in (0, 1].
    """

    box: np.ndarray
    points: np.ndarray
    score: float

    @property
    def side(self) -> float:
        """The longer side of the box in pixels."""
        return float(np.max(self.box[2:] - self.box[:2]))


def find_faces(image: Image.Image) -> list[Face]:
    """Every face in an image of mode L or RGB, the largest first; the same image gives the same faces.

    Smaller ones than MIN_FACE pixels, or than 1/50 of the longer side, are not looked for. Faces tilted by up to about
    45 degrees are found as they are. Where nothing is found for certain, the image is also looked at on its sides and
    upside down: many files lack the orientation. Raises DataError where the package with the weights is missing.
    """
    networks = _networks()
    scale = max(1.0, max(image.size) / LONGER_SIDE)
    size = (max(1, round(image.width / scale)), max(1, round(image.height / scale)))
    seen = image.convert("RGB")
    if size != image.size:
        seen = seen.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    found = _cascade(networks, seen)
    if _best(found) < SURE_SCORE:
        turned = [(turns, _cascade(networks, seen.transpose(turn))) for turns, turn in enumerate(TURNS, 1)]
        turns, faces = max(turned, key=lambda entry: _best(entry[1]))
        if _best(faces) >= TURNED_SCORE:
            found = [_turned_back(face, turns, size) for face in faces]
    if _best(found) >= SURE_SCORE:
        found = [face for face in found if face.score >= SURE_SCORE]
    ratio = np.array(image.size) / size
    found = [Face(face.box * np.tile(ratio, 2), face.points * ratio, face.score) for face in found]
    return sorted(found, key=lambda face: -face.side)


def settled(image: Image.Image, face: Face) -> Face:
    """The face with its points found once more in the levelled cut: the networks are surest of upright faces.

    As it was where the second look does not show it.
    """
    seen = level(image, face.points, SECOND_LOOK, 1.0).convert("RGB")
    middle = SECOND_LOOK * np.mean(eye_places(1.0), axis=0)
    for again in sorted(_cascade(_networks(), seen, SECOND_LOOK // 3), key=lambda again: -again.score):
        if np.abs(again.points[:2].mean(0) - middle).max() < STRAYED * SECOND_LOOK:
            centre, axes = frame(face.points, 1.0)
            points = centre + (again.points * 2 / SECOND_LOOK - 1) @ axes.T
            return Face(face.box, points, face.score)
    return face


def detector_state() -> list[object]:
    """Which detector this is, for the keys of caches. Raises DataError where its package is missing."""
    return [PACKAGE, _distribution().version, LONGER_SIDE, MIN_FACE, FACE_SCORE, SURE_SCORE, TURNED_SCORE]


def _distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            f"to find faces needs the package {PACKAGE!r}, which is not installed: pip install 'visard[faces]', or set "
            "detect = 'none' and cut the photographs to the faces yourself"
        ) from error


@functools.cache
def _networks() -> tuple[Weights, Weights, Weights]:
    distribution = _distribution()
    try:
        joblib: Any = importlib.import_module("joblib")
        importlib.import_module("lz4")
    except ImportError as error:
        raise DataError(f"the package {PACKAGE!r} lacks {error.name!r}: pip install 'visard[faces]'") from error
    networks: list[Weights] = []
    for name, expected in WEIGHTS.items():
        path = distribution.locate_file(f"mtcnn/assets/weights/{name}.lz4")
        try:
            with open(str(path), "rb") as file:  # noqa: PTH123  (a SimplePath, no Path)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != expected:
                    raise DataError(
                        f"{PACKAGE} {distribution.version} has {name} with SHA-256 {digest}, known is {expected}: "
                        "pip install --force-reinstall 'visard[faces]'"
                    )
                file.seek(0)
                arrays = joblib.load(file)
        except OSError as error:
            raise DataError(
                f"the weights {path} cannot be read ({error.strerror}): pip install 'visard[faces]'"
            ) from error
        networks.append([_in_torch(array) for array in arrays])
    proposal, refine, output = networks
    return proposal, refine, output


def _in_torch(array: np.ndarray) -> torch.Tensor:
    """Kernels from (H, W, in, out) to (out, in, H, W), slopes from (1, 1, C) to (C,); the rest as it is."""
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(array.reshape(-1) if array.ndim == 3 else array))


@torch.inference_mode()
def _cascade(networks: tuple[Weights, Weights, Weights], image: Image.Image, smallest: int = MIN_FACE) -> list[Face]:
    proposal, refine, output = networks
    boxes = _proposals(proposal, image, smallest)
    if len(boxes):
        moves, scores = (found.numpy() for found in _refine(refine, _patches(image, boxes, 24)))
        sure = scores > REFINED_SCORE
        boxes, scores = _moved(boxes, moves)[sure], scores[sure]
        boxes = _squared(boxes[_separate(boxes, scores, 0.7)])
    if not len(boxes):
        return []
    moves, places, scores = (found.numpy() for found in _output(output, _patches(image, boxes, 48)))
    extent = boxes[:, 2:] - boxes[:, :2]
    points = boxes[:, None, :2] + places.reshape(-1, 2, 5).transpose(0, 2, 1) * extent[:, None]
    boxes = _moved(boxes, moves)
    sure = (scores > FACE_SCORE) & ((boxes[:, 2:] - boxes[:, :2]).max(1) >= smallest)
    boxes, points, scores = boxes[sure], points[sure], scores[sure]
    kept = _separate(boxes, scores, 0.7, of_smaller=True)
    return [Face(boxes[i], points[i], float(scores[i])) for i in kept]


def _proposals(weights: Weights, image: Image.Image, smallest: int) -> np.ndarray:
    """Square boxes, float64 (N, 4), from the first network run over a pyramid of the image; N <= MAX_CANDIDATES."""
    boxes, scores = [np.zeros((0, 4))], [np.zeros(0, dtype=np.float32)]
    scale = 12 / smallest  # the network looks at 12 pixels at a time, every other pixel
    while min(image.size) * scale >= 12:
        size = (math.ceil(image.width * scale), math.ceil(image.height * scale))
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), dtype=np.float32)
        moves, sure = (found[0].numpy() for found in _propose(weights, _normalised(pixels[None])))
        y, x = np.nonzero(sure > PROPOSAL_SCORE)
        best = np.argsort(-sure[y, x], kind="stable")[:MAX_CANDIDATES]
        y, x = y[best], x[best]
        cells = np.stack([2 * x, 2 * y, 2 * x + 12, 2 * y + 12], axis=1) + 12.0 * moves[:, y, x].T
        kept = _separate(cells, sure[y, x], 0.5)
        boxes.append(cells[kept] / scale)
        scores.append(sure[y, x][kept])
        scale *= PYRAMID_STEP
    every, likely = np.concatenate(boxes), np.concatenate(scores)
    return _squared(every[_separate(every, likely, 0.7)[:MAX_CANDIDATES]])


def _conv(x: torch.Tensor, weights: Weights, at: int) -> torch.Tensor:
    return F.prelu(F.conv2d(x, weights[at], weights[at + 1]), weights[at + 2])


def _propose(w: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, H, W) -> moves of the boxes (B, 4, h, w), scores (B, h, w)."""
    x = F.max_pool2d(_conv(x, w, 0), 2, 2, ceil_mode=True)
    x = _conv(_conv(x, w, 3), w, 6)
    return F.conv2d(x, w[9], w[10]), F.conv2d(x, w[11], w[12]).softmax(1)[:, 1]


def _refine(w: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, 24, 24) -> moves (B, 4), scores (B,)."""
    x = F.max_pool2d(_conv(x, w, 0), 3, 2, ceil_mode=True)
    x = F.max_pool2d(_conv(x, w, 3), 3, 2)
    x = F.prelu(_flat(_conv(x, w, 6)) @ w[9] + w[10], w[11])
    return x @ w[12] + w[13], (x @ w[14] + w[15]).softmax(1)[:, 1]


def _output(w: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, 3, 48, 48) -> moves (B, 4), five x and five y as shares of the box (B, 10), scores (B,)."""
    x = F.max_pool2d(_conv(x, w, 0), 3, 2, ceil_mode=True)
    x = F.max_pool2d(_conv(x, w, 3), 3, 2)
    x = F.max_pool2d(_conv(x, w, 6), 2, 2, ceil_mode=True)
    x = F.prelu(_flat(_conv(x, w, 9)) @ w[12] + w[13], w[14])
    return x @ w[15] + w[16], x @ w[17] + w[18], (x @ w[19] + w[20]).softmax(1)[:, 1]


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 2, 1).flatten(1)  # column by column, as the weights were trained


def _patches(image: Image.Image, boxes: np.ndarray, size: int) -> torch.Tensor:
    """What lies in each box, black beyond the edges, as (N, 3, size, size)."""
    pixels = np.empty((len(boxes), size, size, 3), dtype=np.float32)
    for patch, (left, top, right, bottom) in zip(pixels, np.rint(boxes).astype(int).tolist(), strict=True):
        cut = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
        patch[:] = np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR))
    return _normalised(pixels)


def _normalised(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((pixels - 127.5) / 128).permute(0, 3, 1, 2)


def _moved(boxes: np.ndarray, moves: np.ndarray) -> np.ndarray:
    extent = boxes[:, 2:] - boxes[:, :2]
    return np.asarray(boxes + moves * np.tile(extent, 2))


def _squared(boxes: np.ndarray) -> np.ndarray:
    """Squares of the longer side about the same centres."""
    centres, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True) / 2
    return np.concatenate([centres - half, centres + half], axis=1)


def _separate(boxes: np.ndarray, scores: np.ndarray, limit: float, *, of_smaller: bool = False) -> np.ndarray:
    """Non-maximum suppression: the indices, best first, of boxes that no better one overlaps by more than `limit`.

    The overlap is a share of the union, or of the smaller box.
    """
    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-6), axis=1)
    left = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while left.size:
        best, left = left[0], left[1:]
        kept.append(int(best))
        low, high = np.maximum(boxes[best, :2], boxes[left, :2]), np.minimum(boxes[best, 2:], boxes[left, 2:])
        common = np.prod(np.maximum(high - low, 0.0), axis=1)
        whole = np.minimum(areas[best], areas[left]) if of_smaller else areas[best] + areas[left] - common
        left = left[common <= limit * whole]
    return np.array(kept, dtype=np.int64)


def _best(faces: list[Face]) -> float:
    return max((face.score for face in faces), default=0.0)


def _turned_back(face: Face, turns: int, size: tuple[int, int]) -> Face:
    """A face found after `turns` anticlockwise quarter turns, as it lies in the image of (width, height) `size`."""
    corners = face.box.reshape(2, 2)
    points = np.concatenate([corners, face.points])
    for turn in reversed(range(turns)):
        points = np.stack([size[turn % 2] - points[:, 1], points[:, 0]], axis=1)
    return Face(np.concatenate([points[:2].min(0), points[:2].max(0)]), points[2:], face.score)


TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
