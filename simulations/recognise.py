"""What `visard recognise` does: train, measure, name and group faces, at the owner of the photographs."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError
from common.evaluation.disturbances import robustness
from common.evaluation.fairness import verification_by_group
from common.evaluation.identification import cluster, clustering_figures, identification_accuracy
from common.evaluation.verification import folded_accuracy, verification_figures
from common.faces import FaceDataset, FaceOptions
from common.faces.preprocessing import UnreadableImageError, decode
from common.files import write_atomically
from common.pictures import save_grid
from common.recognition.album import Album, Pairs, draw_pairs, read_pairs
from common.recognition.recogniser import TrainedRecogniser

# Persons on the picture of all groups, and photographs of each.
_ROWS, _COLUMNS = 12, 10


@dataclass(frozen=True)
class Asked:
    """The pairs that a list asks about; those whose photographs are not there are counted in `missing`."""

    pairs: Pairs
    missing: int = 0


def asked_pairs(album: Album, listed: Path | None, folds: Sequence[int], seed: int = 0) -> Asked:
    """Those of a list in the manner of LFW's, of some of its folds or all; without a list, pairs drawn from the album."""
    if listed is None:
        return Asked(draw_pairs(album.persons, np.random.default_rng(seed)))
    pairs, missing = read_pairs(listed, album.files)
    if not folds:
        return Asked(pairs, len(missing))
    return Asked(pairs.of_folds(folds), sum(fold in folds for fold in missing))


def without_pairs(album: Album, asked: Asked) -> Album:
    """The photographs of all persons who are in none of the pairs. Raises DataError where nobody is left."""
    tested = np.unique(album.persons[asked.pairs.photographs])
    left = np.flatnonzero(~np.isin(album.persons, tested))
    if not len(left):
        raise DataError("everybody is in one of these pairs, and nobody is left to learn from: name fewer --folds")
    return album.subset(left)


def verify_pairs(
    recogniser: TrainedRecogniser, images: np.ndarray, pairs: Pairs, threshold: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """Cosines (M,) of the pairs, and the figures at the threshold."""
    used = pairs.photographs
    found = recogniser.embed(images[used])
    first, second = (found[np.searchsorted(used, places)] for places in (pairs.first, pairs.second))
    scores = (first * second).sum(1).numpy()
    return scores, asdict(verification_figures(scores, pairs.same, threshold))


def evaluate_verification(
    recogniser: TrainedRecogniser, album: Album, asked: Asked, threshold: float, by: Sequence[str], disturbed: bool
) -> dict[str, Any]:
    """Figures on pairs, under disturbances of both photographs, and by group of the persons' attributes."""
    pairs, images = asked.pairs, album.faces.images
    for name in by:
        if name not in album.faces.attributes:
            known = ", ".join(album.faces.attributes) or "none"
            raise DataError(f"the photographs have no attribute {name!r}: they have {known}")
    scores, figures = verify_pairs(recogniser, images, pairs, threshold)
    told: dict[str, Any] = {"goal": "verify", "missing": asked.missing, **figures}
    kinds = [len(np.unique(pairs.same[pairs.folds == fold])) for fold in np.unique(pairs.folds)]
    if len(kinds) > 1 and min(kinds) == 2:
        told["folds"] = folded_accuracy(scores, pairs.same, pairs.folds)._asdict()
    if disturbed:
        used = pairs.photographs
        moved = Pairs(np.searchsorted(used, pairs.first), np.searchsorted(used, pairs.second), pairs.same, pairs.folds)
        told["robustness"] = robustness(
            lambda worse: float(verify_pairs(recogniser, worse, moved, threshold)[1]["accuracy"]), images[used], seed=0
        )
    for name in by:
        first, second = (album.faces.attributes[name][places] for places in (pairs.first, pairs.second))
        # Pairs across groups are of no group, and a group needs pairs of both kinds.
        groups = np.where(first == second, first, "")
        few = [g for g in np.unique(groups) if g and len(set(pairs.same[groups == g].tolist())) < 2]
        groups = np.where(np.isin(groups, few), "", groups)
        inside = groups != ""
        found = verification_by_group(scores[inside], pairs.same[inside], groups[inside], threshold, seed=0)
        told.setdefault("by", {})[name] = {**asdict(found), "left_out": few}
    return told


def evaluate_identification(recogniser: TrainedRecogniser, album: Album, disturbed: bool) -> dict[str, Any]:
    """Shares recognised at rank 1 and 5 among the persons it was trained on. Raises DataError where none of them is here."""
    places = {name: number for number, name in enumerate(recogniser.names)}
    known = np.array([places.get(name, -1) for name in album.names])
    truth = known[album.persons]
    chosen = np.flatnonzero(truth >= 0)
    if not len(chosen):
        raise DataError(
            f"none of the {len(album.names)} persons is one of the {len(recogniser.names)} that it was trained on: their folders' names "
            "must be the same"
        )
    images, truth = album.faces.images[chosen], truth[chosen]
    ranks = [rank for rank in (1, 5) if rank <= len(recogniser.names)]

    def measured(some: np.ndarray) -> dict[int, float]:
        return identification_accuracy(recogniser.scores(some).numpy(), truth, ranks)

    told: dict[str, Any] = {
        "goal": "identify",
        "photographs": len(chosen),
        "strangers": len(album.files) - len(chosen),
        "ranks": measured(images),
    }
    if disturbed:
        told["robustness"] = robustness(lambda some: measured(some)[1], images, seed=0)
    return told


def evaluate_attributes(recogniser: TrainedRecogniser, faces: FaceDataset) -> dict[str, float]:
    """The share of each attribute that it tells rightly, of the faces where it is known; none where it is of no face."""
    found = recogniser.attributes(faces.images)
    told = {}
    for name, values in found.items():
        known = faces.attributes.get(name, np.array("")) != ""
        if known.any():
            told[name] = float((values == faces.attributes[name])[known].mean())
    return told


def identify(recogniser: TrainedRecogniser, paths: Sequence[Path], most: int) -> list[list[tuple[str, float]]]:
    """The `most` likeliest persons on each photograph, with their cosines. Raises DataError."""
    images = np.stack([_photograph(path, recogniser) for path in paths])
    scores = recogniser.scores(images)
    values, order = scores.topk(min(most, scores.shape[1]), dim=1)
    return [
        [(recogniser.names[place], value) for place, value in zip(row, some, strict=True)]
        for row, some in zip(order.tolist(), values.tolist(), strict=True)
    ]


def compare(recogniser: TrainedRecogniser, one: Path, other: Path) -> float:
    """The cosine of two photographs. Raises DataError."""
    first, second = recogniser.embed(np.stack([_photograph(path, recogniser) for path in (one, other)]))
    return float(first @ second)


def group(recogniser: TrainedRecogniser, album: Album, threshold: float, out: Path) -> dict[str, Any]:
    """Who might be one person, by embedding alone: `clusters.csv` and `clusters.png` in `out`, and figures where persons are known."""
    faces = album.faces
    found = cluster(recogniser.embed(faces.images).numpy(), threshold)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["cluster", "file"])
    writer.writerows(sorted(zip(found.tolist(), album.files, strict=True)))
    write_atomically(out / "clusters.csv", table.getvalue().encode(), private=True)
    blank = np.full(faces.images.shape[1:], 255, np.uint8)
    rows = []
    for number in range(min(_ROWS, int(found.max()) + 1)):
        some = list(faces.images[np.flatnonzero(found == number)[:_COLUMNS]])
        rows += some + [blank] * (_COLUMNS - len(some))
    save_grid(out / "clusters.png", np.stack(rows), columns=_COLUMNS, scale=1)
    if faces.persons is None:
        return {"count": len(faces), "clusters": int(found.max()) + 1}
    return asdict(clustering_figures(found, faces.persons))


def write_figures(path: Path, told: dict[str, Any]) -> None:
    """Figures as JSON, for the owner alone: they are computed from photographs."""
    write_atomically(path, (json.dumps(told, indent=2) + "\n").encode(), private=True)


def _photograph(path: Path, recogniser: TrainedRecogniser) -> np.ndarray:
    config = recogniser.config
    if not path.is_file():
        raise DataError(f"there is no file {path}: check the path")
    try:
        return decode(path, FaceOptions(config.image_size, config.channels, config.crop, config.detect))[0]
    except UnreadableImageError as error:
        raise DataError(f"{path}: {error}") from error
