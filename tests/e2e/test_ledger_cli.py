"""`visard ledger` as an owner meets it: what is said, what is refused, and that reading changes nothing."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from client import ledger_cli
from common.errors import ConfigError, LedgerCorrupt, LedgerMoved
from common.privacy.ledger_report import verify_ledger
from tests.unit.test_ledger import fill, open_ledger


def run(*arguments: object, typed: str | None = None) -> Result:
    app = typer.Typer()
    for command in (ledger_cli.show, ledger_cli.verify, ledger_cli.export, ledger_cli.adopt):
        app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    fill(tmp_path / "faces.visard")
    return tmp_path / "faces.visard"


def test_reading_changes_nothing_and_creates_nothing(state: Path, tmp_path: Path) -> None:
    before = content(state)
    for path in state.iterdir():
        path.chmod(0o400)
    state.chmod(0o500)
    assert run("show", state, "--out", tmp_path / "chart.png").exit_code == 0
    assert run("verify", tmp_path / "faces").exit_code == 0
    assert run("export", state, "--out", tmp_path / "copy").exit_code == 0
    assert content(state) == before
    state.chmod(0o700)
    for command in ("show", "verify", "export", "adopt"):
        assert isinstance(run(command, tmp_path / "none").exception, LedgerCorrupt)
    assert not (tmp_path / "none").exists()


def test_show_tells_the_budget_s_share_and_refuses_to_write_beside(state: Path) -> None:
    told = json.loads(run("show", state, "--json", "--max-epsilon", 10).stdout)
    assert (told["charged"], told["answered"], told["max_epsilon"]) == (3, 2, 10)
    assert told["runs"][0]["mechanisms"]["gradients"]["noise_multipliers"] == [2.0]
    assert told["epsilon"] == verify_ledger(state).epsilon
    assert isinstance(run("show", state, "--out", state / "ledger.jsonl").exception, ConfigError)
    assert isinstance(run("show", state, "--max-epsilon", "nan").exception, ConfigError)


def test_verify_names_the_line(state: Path) -> None:
    key = verify_ledger(state).public_key
    assert run("verify", state, "--public-key", key).exit_code == 0
    assert run("verify", state, "--public-key", "0" * 64).exit_code == 1
    assert isinstance(run("verify", state, "--public-key", "12").exception, ConfigError)
    file = state / "ledger.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"round": 2', b'"round": 5', 1))
    result = run("verify", state)
    assert (result.exit_code, "line 4" in result.stdout) == (1, True)
    assert isinstance(run("export", state).exception, LedgerCorrupt)


def test_an_export_verifies_and_holds_no_secret(state: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    assert run("export", state, "--csv", "--out", out).exit_code == 0
    assert {path.name for path in out.iterdir()} == {"ledger.jsonl", "charges.csv"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in out.iterdir())
    assert (out / "ledger.jsonl").read_bytes() == (state / "ledger.jsonl").read_bytes()
    rows = list(csv.DictReader((out / "charges.csv").read_text().splitlines()))
    assert [(row["round"], row["answered"]) for row in rows] == [("1", "True"), ("2", "True"), ("3", "False")]
    assert run("verify", out).exit_code == 0
    assert isinstance(run("export", state, "--out", out).exception, ConfigError)
    assert isinstance(run("adopt", out, "--yes").exception, LedgerCorrupt)


def test_a_moved_ledger_is_adopted_once_its_owner_says_so(state: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(state, moved)
    with pytest.raises(LedgerMoved):
        open_ledger(moved)
    before = content(moved)
    result = run("adopt", moved, typed="n\n")
    assert (result.exit_code, "twice" in result.stdout) == (1, True)
    assert content(moved) == before
    assert json.loads(run("show", moved, "--json").stdout)["moved"]
    assert run("adopt", moved, "--yes").exit_code == 0
    assert open_ledger(moved).epsilon == open_ledger(state).epsilon
    assert "nothing to adopt" in run("adopt", moved, "--yes").stdout
