"""Who holds what in a simulation: the clients' shares as numbers and as a picture."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common.faces import FaceDataset
from common.files import write_atomically
from simulations.partition import LABEL, values_of

MAX_CLIENTS = 20
MAX_VALUES = 10
FACES = 6
OTHERS, NOT_SAID = "the rest", "not said"
# Inches.
ROW, LEFT, BARS, COUNTS, TITLE, LEGEND, BOTTOM = 0.55, 0.95, 5.2, 1.25, 0.5, 0.3, 0.55
DOTS_PER_INCH = 120
PLAIN, REST = "#5b7fa6", "#b0b0b0"
LEGEND_CHARACTERS = 110  # fit in its one line


@dataclass(frozen=True)
class Holding:
    """One client's share. persons: None where the source knows none. values: images of each value, in the order of all values."""

    images: int
    persons: int | None
    values: dict[str, int]


@dataclass(frozen=True)
class Holdings:
    """by: the attribute told apart, 'label' or ''. values: its values, of many the rarest together as OTHERS."""

    by: str
    values: list[str]
    clients: list[Holding]


def told_by(faces: FaceDataset, partition_by: str) -> str:
    """What to tell the shares apart by: what they are dealt out by, else the labels, else nothing."""
    return partition_by or (LABEL if faces.labels is not None else "")


def holdings(faces: FaceDataset, shares: Sequence[np.ndarray], by: str, label_names: Sequence[str] = ()) -> Holdings:
    """Count what each client holds.

    shares: the image indices of each. by: an attribute, 'label' or ''. label_names: what the labels 0, 1, ... are called.
    Raises DataError where the faces do not have `by`.
    """
    names, value_of = _named_values(faces, by, label_names)
    found = []
    for share in shares:
        counts = np.bincount(value_of[share], minlength=len(names))
        persons = None if faces.persons is None else len(np.unique(faces.persons[share]))
        found.append(Holding(len(share), persons, dict(zip(names, counts.tolist(), strict=True)) if by else {}))
    return Holdings(by, names if by else [], found)


def draw(path: Path, faces: FaceDataset, shares: Sequence[np.ndarray], held: Holdings, title: str) -> None:
    """Write a PNG: a bar a client, its counts, and a few of its faces; the first MAX_CLIENTS clients.

    It may show photographs: the file is for its owner alone (0600). Raises OSError.
    """
    clients = held.clients[:MAX_CLIENTS]
    height = TITLE + (LEGEND if held.by else 0) + ROW * len(clients) + BOTTOM
    width = LEFT + BARS + COUNTS + FACES * ROW + 0.15
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    rows = ROW * len(clients)
    bars = figure.add_axes((LEFT / width, BOTTOM / height, BARS / width, rows / height))
    _bars(bars, held, clients)
    pictures = figure.add_axes(
        ((LEFT + BARS + COUNTS) / width, BOTTOM / height, FACES * ROW / width, rows / height), sharey=bars
    )
    for row, share in enumerate(shares[: len(clients)]):
        _faces(pictures, faces, share, row)
    pictures.set(xlim=(0, FACES), ylim=(len(clients) - 0.5, -0.5), aspect="auto")
    pictures.axis("off")
    note = f"   (the first {MAX_CLIENTS} of {len(held.clients)} clients)" if len(held.clients) > MAX_CLIENTS else ""
    figure.text(0.15 / width, 1 - 0.12 / height, title + note, va="top", fontsize=11, parse_math=False)
    if held.by:
        _legend(figure, held, 0.15 / width, 1 - (TITLE - 0.05) / height)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue(), private=True)


def _bars(axes: Axes, held: Holdings, clients: Sequence[Holding]) -> None:
    places = range(len(clients))
    left = np.zeros(len(clients))
    for value, colour in _colours(held.values) if held.by else [("", PLAIN)]:
        widths = np.array([client.values[value] if held.by else client.images for client in clients], dtype=float)
        axes.barh(places, widths, left=left, height=0.72, color=colour, linewidth=0)
        left += widths
    for place, client in zip(places, clients, strict=True):
        axes.text(1.02, place, _counts(client), transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks(places, [f"client {client}" for client in places], fontsize=8)
    axes.set_xlim(0, max(client.images for client in clients))
    axes.set_xlabel("images", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _counts(client: Holding) -> str:
    images = f"{client.images:,} image{'s' if client.images != 1 else ''}"
    if client.persons is None:
        return images
    return f"{images}\n{client.persons:,} person{'s' if client.persons != 1 else ''}"


def _faces(axes: Axes, faces: FaceDataset, share: np.ndarray, row: int) -> None:
    """From the beginning of the share to its end, so that they are of different persons where there are several."""
    chosen = share[np.unique(np.linspace(0, len(share) - 1, FACES).round().astype(int))]
    for column, image in enumerate(faces.images[chosen]):
        pixels = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
        place = (column + 0.04, column + 0.96, row + 0.46, row - 0.46)
        axes.imshow(pixels, extent=place, cmap="gray", vmin=0, vmax=255, aspect="auto", interpolation="nearest")


def _legend(figure: Figure, held: Holdings, left: float, top: float) -> None:
    """One line: the attribute, and the colour of each value."""
    colours = _colours(held.values)
    handles = [Patch(alpha=0), *(Patch(color=colour) for _, colour in colours)]
    legend = figure.legend(
        handles,
        ["." for _ in handles],
        loc="upper left",
        bbox_to_anchor=(left, top),
        ncols=len(handles),
        fontsize=8,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1,
        columnspacing=1,
    )
    # Set afterwards: in a label, matplotlib would take $ for mathematics and _ for something to hide.
    for text, name in zip(legend.get_texts(), [f"{held.by}:", *(name or NOT_SAID for name, _ in colours)], strict=True):
        text.set_parse_math(False)
        text.set_text(_short(name, LEGEND_CHARACTERS // len(handles)))


def _colours(values: Sequence[str]) -> list[tuple[str, Any]]:
    """A colour for each value: matplotlib's ten, with black for their grey, which is for the rest."""
    palette = ["black" if i == 7 else colour for i, colour in enumerate(colormaps["tab10"].colors)]  # type: ignore[attr-defined]
    return [(value, REST if value == OTHERS else palette[i]) for i, value in enumerate(values)]


def _short(name: str, most: int) -> str:
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name)
    return shown if len(shown) <= most else shown[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _named_values(faces: FaceDataset, by: str, label_names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The values' names, and int64 (N,) the place of each image's value in them."""
    if not by:
        return [""], np.zeros(len(faces), dtype=np.int64)
    found, value_of = np.unique(values_of(faces, by), return_inverse=True)
    names = [str(value) for value in found]
    if by == LABEL and label_names:
        names = [label_names[int(value)] for value in found]
    if len(names) > MAX_VALUES:
        counts = np.bincount(value_of)
        kept = np.sort(np.argsort(-counts, kind="stable")[: MAX_VALUES - 1])
        place = np.full(len(names), len(kept), dtype=np.int64)
        place[kept] = np.arange(len(kept))
        return [*(names[i] for i in kept), OTHERS], place[value_of]
    return names, value_of.astype(np.int64)
