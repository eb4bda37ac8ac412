"""`visard ledger show|verify|export|adopt`: what was spent. What is slow to import is imported when it is used."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from common.errors import ConfigError, LedgerCorrupt
from common.files import write_atomically

console = Console()

_PUBLIC_KEY = re.compile("[0-9a-fA-F]{64}")
_PLACE = typer.Argument(
    metavar="DIR", help="The state folder (DIR.visard), the faces' folder beside it, or a ledger.jsonl"
)
_AS_JSON = typer.Option("--json", help="Print everything as JSON, and nothing else")


def show(
    place: Annotated[str, _PLACE],
    max_epsilon: Annotated[
        float | None, typer.Option(help="The owner's budget, to compare with; the ledger does not hold it")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Draw epsilon against charges to this PNG")] = None,
    as_json: Annotated[bool, _AS_JSON] = False,
) -> None:
    """Show what was spent, run by run. Changes nothing.

    Ends with status 1 where the ledger does not verify, or a witness showed that it was rolled back.
    """
    if max_epsilon is not None and not 0 < max_epsilon < float("inf"):
        raise ConfigError(f"--max-epsilon {max_epsilon:g}: want a number above 0")
    with Console(stderr=True).status("reading the ledger"):
        from client.ledger_summary import find_ledger, summarise
        from client.ledger_tables import as_dict, print_spending

        file = find_ledger(place)
        if out is not None:
            _refuse_beside(out, file)
        spending = summarise(file)
    if as_json:
        print(json.dumps(as_dict(spending, max_epsilon), indent=1))
    else:
        print_spending(console, spending, max_epsilon)
    if out is not None:
        from client.ledger_picture import draw

        draw(out, spending, max_epsilon)
        if not as_json:
            console.print(f"picture: {out}", highlight=False, markup=False, soft_wrap=True)
    if spending.report.problem is not None or spending.rolled_back is not None:
        sys.exit(1)


def verify(
    place: Annotated[str, _PLACE],
    public_key: Annotated[
        str | None, typer.Option(help="The ledger's name, as its owner gave it: 64 hex digits")
    ] = None,
    as_json: Annotated[bool, _AS_JSON] = False,
) -> None:
    """Check a ledger or an exported copy from its first byte to its last: chain, signatures and sums. Changes nothing.

    Ends with status 1, and the line of the first problem, where something does not hold.
    """
    if public_key is not None and not _PUBLIC_KEY.fullmatch(public_key):
        raise ConfigError(f"--public-key {public_key!r}: want 64 hex digits, as `visard ledger show` prints them")
    with Console(stderr=True).status("checking the ledger"):
        from client.ledger_summary import find_ledger, held, read_rolled_back
        from client.ledger_tables import print_checked, report_dict
        from common.privacy.ledger_report import verify_ledger

        file = find_ledger(place)
        with held(file):
            report = verify_ledger(file, public_key)
            rolled_back = None if report.problem is not None else read_rolled_back(file)
    line, problem = report.line, report.problem
    if rolled_back is not None:
        line = rolled_back
        problem = (
            "a coordinator's witness showed that records are missing: an older copy was put in this ledger's place"
        )
    if as_json:
        holds = {"holds": problem is None, "problem": problem, "line": line}
        print(json.dumps({**holds, **report_dict(report), "key_compared": public_key is not None}, indent=1))
    else:
        print_checked(console, report, public_key is not None)
        where = f"line {line}" if line else "the ledger as a whole"
        said = "[green]it holds[/]" if problem is None else f"[bold red]it does not hold[/]: {where}: {escape(problem)}"
        console.print(said, highlight=False, soft_wrap=True)
    if problem is not None:
        sys.exit(1)


def export(
    place: Annotated[str, _PLACE],
    out: Annotated[Path, typer.Option(help="The folder to write; must not hold an earlier copy")] = Path("ledger-copy"),
    as_csv: Annotated[bool, typer.Option("--csv", help="Write the charges as CSV instead of JSON")] = False,
) -> None:
    """Write a copy of the ledger that somebody else can verify: its lines as they are, and its charges as a table.

    The signing key and the last reply stay where they are. Refuses to overwrite, and to export what does not verify.
    """
    with Console(stderr=True).status("checking the ledger"):
        from client.ledger_summary import find_ledger, held
        from client.ledger_tables import charges_csv, charges_json
        from common.privacy.ledger_file import FILE_NAME
        from common.privacy.ledger_report import charges, verify_ledger

        file = find_ledger(place)
        _refuse_beside(out / FILE_NAME, file)
        table = out / ("charges.csv" if as_csv else "charges.json")
        for path in (out / FILE_NAME, table):
            if path.exists() or path.is_symlink():
                raise ConfigError(f"{path} is there already and is not overwritten: name another folder with --out")
        with held(file):
            report, content, found = verify_ledger(file), file.read_bytes(), list(charges(file))
        if report.problem is not None:
            raise LedgerCorrupt(
                f"line {report.line} of {file} does not verify ({report.problem}), nor would a copy: `visard ledger verify` says more"
            )
    if not out.is_dir():
        out.mkdir(parents=True, mode=0o700)
    write_atomically(out / FILE_NAME, content, private=True)
    write_atomically(table, (charges_csv if as_csv else charges_json)(found).encode(), private=True)
    console.print(f"{FILE_NAME}, {table.name} in {out}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        "tell who verifies it the public key by another way, since whoever changes the copy could change the key in it:\n"
        f"visard ledger verify {out} --public-key {report.public_key}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def adopt(
    place: Annotated[str, _PLACE],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
) -> None:
    """Say that a moved or restored ledger has its place here from now on, so that the client uses it again.

    Right for a folder that was moved, and for a backup whose original is gone, where no round was answered since.
    Wrong while the original, or another copy, is in use: each would spend the whole budget of the same faces.
    """
    with Console(stderr=True).status("reading the ledger"):
        from client.ledger_summary import find_ledger, held, read_rolled_back
        from common.privacy.ledger import adopt_ledger
        from common.privacy.ledger_file import FILE_NAME, KEY_NAME
        from common.privacy.ledger_report import verify_ledger

        file = find_ledger(place)
        if file.name != FILE_NAME:
            raise ConfigError(
                f"{file} is a copy for reading: a ledger in use is called {FILE_NAME}, with its key beside it"
            )
        if not file.with_name(KEY_NAME).is_file():
            raise LedgerCorrupt(
                f"there is no {KEY_NAME} beside {file}: an exported copy cannot be adopted. Restore the whole folder"
            )
        with held(file):
            report = verify_ledger(file)
            rolled_back = None if report.line else read_rolled_back(file)
    if report.line or not report.records:
        raise LedgerCorrupt(
            f"{file} does not verify ({report.problem}): adopting does not mend it. Restore a copy that does"
        )
    if rolled_back is not None:
        raise LedgerCorrupt(
            f"line {rolled_back} of {file}: a coordinator's witness showed that records are missing. Adopting does not bring them "
            "back: restore the newest folder; if that is gone for good, the budget of these faces counts as spent"
        )
    if not yes:
        console.print(_EXPLAINED.format(report=report), highlight=False, markup=False, soft_wrap=True)
        typer.confirm("Is this the only copy in use, and the newest?", abort=True)
    done = adopt_ledger(file.parent)
    # An older copy's keys may have masked before: a mask that serves twice is none.
    from client.secret_store import SECRETS

    for dealt in (file.parent / SECRETS).glob("*.run"):
        dealt.unlink(missing_ok=True)
    told = "adopted: the ledger has its place in" if done else "nothing to adopt, the ledger says that it lies in"
    console.print(f"{told} {file.parent}", highlight=False, markup=False, soft_wrap=True)


_EXPLAINED = """\
{report.path}
ledger {report.public_key}
{report.records} records, {report.rounds} rounds charged, epsilon {report.epsilon:.4g}

Adopt it where the folder was moved here, or restored from a backup whose original is gone, and no round was answered
after this copy was made. Two adopted copies would spend the budget of the same faces twice, and what was spent after
an older copy was made would be forgotten; a coordinator that remembers it refuses, and then this client trains no more."""


def _refuse_beside(out: Path, file: Path) -> None:
    """Raise ConfigError where `out` would lie beside the ledger, or among the faces that it is for."""
    folder = file.parent
    if out.expanduser().resolve().parent == folder:
        raise ConfigError(f"--out {out} lies beside the ledger, where nothing else is written: name another folder")
    if folder.suffix == ".visard":
        from common.faces.places import refuse_among

        refuse_among(out, str(folder.with_suffix("")))
