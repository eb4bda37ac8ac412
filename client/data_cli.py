"""`visard data check`: an owner's own look at the faces. What is slow to import is imported when it is used."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from client.cli import with_source_options
from common.privacy.units import PrivacyUnit
from common.sections import FaceSource


@with_source_options
def check(
    data: Annotated[
        str, typer.Argument(metavar="DIR", help="The faces: a folder, an .npz file, or a source such as hf:PATH")
    ],
    image_size: Annotated[int, typer.Option(help="Side of the run's images in pixels: 28, 32, 64 or 128")] = 32,
    channels: Annotated[int, typer.Option(help="1 for grey, 3 for colour")] = 3,
    unit: Annotated[PrivacyUnit, typer.Option(help="Who is to be protected")] = PrivacyUnit.PERSON,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for check.json and the pictures", show_default="DIR.visard/check, beside the data"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else")] = False,
    *,
    reading: dict[str, Any],
) -> None:
    """Look at your own faces before any run does: counts, sizes, copies, damaged files, and what a run would use.

    What it finds is exact and private. Nothing is sent anywhere; the files are for their owner alone.
    Ends with status 1 where a run would refuse these faces.
    """
    folder = _folder(data, out)
    console = Console(stderr=as_json)
    progress = Console(stderr=True)
    source = FaceSource(data=data, **reading)

    def bar(items: Sequence[Any], what: str) -> Iterable[Any]:
        return track(items, what, console=progress, transient=True, disable=not progress.is_terminal)

    with progress.status("starting"):
        from client.check import check as examine
        from client.report import save, show
        from common.faces import read_faces

    found = read_faces(source, image_size, channels, track=lambda pictures: bar(pictures, "reading the faces"))
    findings = examine(source, found, unit, bar)
    if as_json:
        print(json.dumps(findings.to_json(), indent=1))
    else:
        show(findings, console)
    if folder is not None:
        written = ", ".join(save(findings, found.faces, folder))
        console.print(f"{written} in {folder}", highlight=False, markup=False, soft_wrap=True)
    elif not as_json:
        console.print("no files were written, since this source is no path: give --out", highlight=False)
    if findings.refused:
        sys.exit(1)


def _folder(data: str, out: Path | None) -> Path | None:
    """Where to write; None for a source without a path. Raises ConfigError where that is among the faces."""
    from common.faces.places import local_path, refuse_among

    if out is not None:
        refuse_among(out, data)
        return out.expanduser().resolve()
    place = local_path(data)
    return None if place is None else place.with_name(place.name + ".visard") / "check"
