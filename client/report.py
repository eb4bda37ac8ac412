"""What `visard data check` shows of its findings: tables in the terminal, and files in the owner's own place.

`check.json` lists everything. `contact.png` is what the discriminator would see; `copies.png` has a row for each picture that
is there more than once, framed in red where that costs protection.
"""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Column as TableColumn
from rich.table import Table

from client.check import MAX_VALUES, Column, Copies, Files, Findings, Spread
from common.errors import DataError
from common.faces import FaceDataset
from common.files import write_atomically
from common.pictures import save_grid, save_png

PRIVATE = (
    "These are exact counts of your own faces: they are private. Keep them with the faces, and declare none of them."
)
MAX_LISTED = 5
CONTACT_FACES = 100
COPY_ROWS, COPY_COLUMNS = 40, 6
CELL = 64
FRAME = 3
RED, GREY = (214, 39, 40), (160, 160, 160)


def show(findings: Findings, console: Console) -> None:
    """Print the findings, a few examples of each."""
    console.print(_text(findings.data), highlight=False, soft_wrap=True)
    table = Table(show_header=False)
    for name, told in _rows(findings):
        table.add_row(name, told)
    console.print(table)
    if findings.attributes:
        console.print(_attribute_table(findings.attributes))
    if findings.copies:
        _show_copies(findings.copies, console)
    for what, notes in (("not used", findings.skipped), ("used with a remark", findings.remarks)):
        if notes:
            console.print(_notes_table(what, notes))
    _show_advice(findings, console)
    if findings.refused:
        console.print(f"[bold red]refused:[/] {findings.refused}", highlight=False, soft_wrap=True)
    console.print(f"[yellow]{PRIVATE}[/]", highlight=False, soft_wrap=True)


def save(findings: Findings, faces: FaceDataset, folder: Path) -> list[str]:
    """Write the files into `folder`, for its owner alone; the names written. Raises DataError where that cannot be done."""
    writers: dict[str, Callable[[Path], None]] = {
        "check.json": lambda path: write_atomically(path, json.dumps(findings.to_json(), indent=1).encode()),
        "contact.png": lambda path: save_grid(path, _spread_over(faces), scale=max(1, CELL // faces.image_size)),
    }
    if findings.copies:
        writers["copies.png"] = lambda path: save_png(path, _copies_sheet(findings.copies, faces))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        (folder / "copies.png").unlink(missing_ok=True)  # of an earlier check
        for name, write in writers.items():
            write(folder / name)
            (folder / name).chmod(0o600)
    except OSError as error:
        raise DataError(f"cannot write into {folder} ({error.strerror}): give --out a folder of your own") from error
    return list(writers)


def _rows(findings: Findings) -> list[tuple[str, str]]:
    rows = [("images that a run would use", f"{findings.images:,}")]
    if findings.photographs != findings.images:
        rows.append(("cut from photographs", f"{findings.photographs:,}"))
    if findings.images_a_person is not None:
        rows.append(("persons", f"{findings.persons:,}, {findings.single:,} of them with one image"))
        rows.append(("images a person", _spread(findings.images_a_person)))
    else:
        rows.append(("persons", "not known"))
    rows += _file_rows(findings.files, findings.image_size) if findings.files else []
    if findings.grey is not None:
        rows.append(("without any colour", f"{findings.grey:,} of {findings.images:,}"))
    if findings.labels:
        rows.append(("labels", ", ".join(f"{_text(value)}: {count:,}" for value, count in findings.labels.items())))
    rows.append(("not used", f"{len(findings.skipped):,}"))
    bad = sum(copies.halves for copies in findings.copies)
    told = f"{len(findings.copies):,} picture{'' if len(findings.copies) == 1 else 's'}"
    if bad:
        told += f", [bold red]{bad:,} as several units, so that their protection is divided[/]"
    if not findings.compared:
        told += "; too many images to look for copies that differ in a pixel"
    return [*rows, ("there more than once", told)]


def _file_rows(files: Files, image_size: int) -> list[tuple[str, str]]:
    sizes = ", ".join(f"{size} ({count:,})" for size, count in files.sizes.items())
    small = f"{files.small:,} of {files.count:,}"
    return [
        ("pixels, shorter side", _spread(files.side)),
        ("most frequent sizes", sizes),
        (f"smaller than {image_size} pixels", f"[yellow]{small}, enlarged[/]" if files.small else small),
        ("stored as grey", f"{files.grey:,} of {files.count:,}"),
    ]


def _attribute_table(attributes: dict[str, Column]) -> Table:
    table = Table(_folded("attribute"), "values", _folded(""), "not said")
    for name, column in attributes.items():
        counts = ", ".join(f"{_text(value)}: {count:,}" for value, count in column.counts.items())
        told = _spread(column.range) if column.range and not counts else counts
        table.add_row(_text(name), f"{column.distinct:,}", told, f"{column.missing:,}")
    return table


def _show_copies(found: Sequence[Copies], console: Console) -> None:
    table = Table(_folded("there more than once"), "")
    for copies in found[:MAX_LISTED]:
        how = "same file" if copies.same_bytes else "same picture"
        whose = f", at {copies.persons} persons" if copies.persons > 1 else ""
        more = ["..."] if len(copies.names) > MAX_LISTED else []
        names = ", ".join([*map(_text, copies.names[:MAX_LISTED]), *more])
        style = "red" if copies.halves else None
        table.add_row(names, how + whose, style=style)
    _rest(table, len(found))
    console.print(table)
    if any(copies.halves for copies in found):
        console.print(
            "[red]In red: whoever is on these is counted more than once, and each has a part of the protection only. Keep one of "
            "each, or put them into one person's folder.[/]",
            highlight=False,
            soft_wrap=True,
        )


def _notes_table(what: str, notes: Sequence[tuple[str, str]]) -> Table:
    table = Table(what, _folded("why"), _folded("such as"))
    by_reason = Counter(reason for _, reason in notes)
    for reason, count in by_reason.most_common(MAX_VALUES):
        names = [_text(name) for name, why in notes if why == reason][:MAX_LISTED]
        table.add_row(f"{count:,}", _text(reason), ", ".join(names) + (", ..." if count > len(names) else ""))
    return table


def _show_advice(findings: Findings, console: Console) -> None:
    """Lines to paste."""
    lines = []
    if findings.declared:
        declared = findings.declared
        options = f"--sample-rate {declared.sample_rate:g} --expected-batch {declared.expected_batch:g}"
        if findings.unit == "person":
            options += f" --images-per-person {declared.images_per_person}"
        lines.append(
            f"for clients with about {declared.units:g} {findings.unit}s each: {options}\n"
            "  (public: agree on round figures such as these with the other clients; never derive them from exact counts)"
        )
    elif not findings.refused:
        lines.append(f"too few {findings.unit}s to suggest constants: the figures would be the counts themselves")
    for name, column in findings.attributes.items():
        values = list(column.counts)
        if 2 <= len(values) <= MAX_VALUES and not any("," in value or value != value.strip() for value in values):
            pasted = shlex.join(
                ["--label-column", name, "--label-values", ",".join(values), "--num-classes", str(len(values))]
            )
            lines.append(f"to condition on {_text(name)}: {_text(pasted)}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _folded(header: str) -> TableColumn:
    """A column that shows long names whole."""
    return TableColumn(header, overflow="fold")


def _rest(table: Table, count: int) -> None:
    if count > MAX_LISTED:
        table.add_row(f"... and {count - MAX_LISTED:,} more, in check.json", "")


def _spread(spread: Spread) -> str:
    return f"{spread.least:g} to {spread.most:g}, median {spread.median:g}"


def _text(text: str) -> str:
    """Safe to print: names come from files and may hold control characters, broken Unicode or rich's markup."""
    return escape("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text))


def _spread_over(faces: FaceDataset) -> np.ndarray:
    """At most CONTACT_FACES images (K, C, H, H), from the beginning to the end."""
    count = min(CONTACT_FACES, len(faces))
    return np.asarray(faces.images[np.linspace(0, len(faces) - 1, count).round().astype(int)])


def _copies_sheet(found: Sequence[Copies], faces: FaceDataset) -> np.ndarray:
    """uint8 (3, height, width): a row for each of the first COPY_ROWS, framed."""
    scale = max(1, CELL // faces.image_size)
    side = scale * faces.image_size + 2 * FRAME
    rows = found[:COPY_ROWS]
    columns = min(COPY_COLUMNS, max(len(copies.images) for copies in rows))
    sheet = np.full((3, len(rows) * (side + 1) - 1, columns * (side + 1) - 1), 255, np.uint8)
    for row, copies in enumerate(rows):
        for column, image in enumerate(copies.images[:columns]):
            cell = np.empty((3, side, side), np.uint8)
            cell[:] = np.array(RED if copies.halves else GREY, np.uint8)[:, None, None]
            cell[:, FRAME:-FRAME, FRAME:-FRAME] = faces.images[image].repeat(scale, axis=1).repeat(scale, axis=2)
            top, left = row * (side + 1), column * (side + 1)
            sheet[:, top : top + side, left : left + side] = cell
    return sheet
