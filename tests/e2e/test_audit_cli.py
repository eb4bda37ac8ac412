"""`visard audit` as a person meets it: a verdict, two files, status 1 where something is wrong, one line for a mistake."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.audit import plants
from tests.e2e.test_cli import OPTIONS, Terminal
from tests.support import random_faces

MODEL = ["--privacy-model", "local"]


@pytest.fixture
def visard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Terminal(monkeypatch, capsys)


@pytest.fixture
def run(visard: Terminal, tmp_path: Path) -> Path:
    assert visard("simulate", "demo", "--name", "tiny", *OPTIONS, *MODEL)[0] == 0
    return tmp_path / "runs" / "tiny"


def test_a_recipe_is_audited(visard: Terminal, tmp_path: Path) -> None:
    code, out, _ = visard("audit", "demo", "--parts", "gate,ledgers", "--quick", *OPTIONS, *MODEL)
    folder = tmp_path / "runs" / "audit-demo"
    found = json.loads((folder / "audit.json").read_text())
    assert (code, found["passed"], found["gate"]["passed"]) == (0, True, True)
    assert "a recipe has not been run" in found["skipped"]["ledgers"]
    page = (folder / "audit.md").read_text()
    assert "nothing found wrong" in page
    assert len([line for line in page.splitlines() if line.startswith("| noise: ")]) > 8
    assert "passed" in out
    assert sorted(path.name for path in folder.iterdir()) == ["audit.json", "audit.md"], "no canary stays behind"


def test_a_recipe_without_rounds_is_audited_for_its_moments(visard: Terminal, tmp_path: Path) -> None:
    parts = ["--parts", "gate,one-run,inversion", "--quick"]
    code, out, err = visard("audit", "demo", *parts, *OPTIONS, *MODEL, "--num-rounds", "0")
    found = json.loads((tmp_path / "runs" / "audit-demo" / "audit.json").read_text())
    assert (code, found["gate"]["passed"]) == (0, True), err
    assert "in the moment release" in " ".join(out.replace("│", " ").split())
    assert found["one_run"]["bound"] <= found["one_run"]["claimed_epsilon"]
    assert "no noised round" in (tmp_path / "runs" / "audit-demo" / "audit.md").read_text()


def test_what_is_wrong_ends_with_status_1(visard: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plants.no_clipping(monkeypatch)
    code, out, _ = visard("audit", "demo", "--parts", "gate", "--quick", "--out", "found", *OPTIONS, *MODEL)
    assert (code, "FAILED" in out) == (1, True)
    assert "SOMETHING IS WRONG" in (tmp_path / "found" / "audit.md").read_text()
    assert "ALARM" in (tmp_path / "found" / "audit.md").read_text()


def test_a_run_is_audited_by_its_folder(visard: Terminal, run: Path, tmp_path: Path) -> None:
    # Of other dots than the run's drawn faces: told apart without any leak, as the docs warn, so only that it is done counts.
    random_faces(20, 1, seed=5).save(tmp_path / "others.npz")
    parts = "ledgers,gate,membership"
    code, out, err = visard("audit", run, "--parts", parts, "--quick", "--holdout", tmp_path / "others.npz")
    found = json.loads((run / "audit.json").read_text())
    assert (code, err) in ((0, ""), (1, "")), out
    assert (found["ledgers"]["passed"], found["ledgers"]["ledgers"], found["gate"]["passed"]) == (True, 3, True)
    assert {attack["attack"] for attack in found["membership"]["attacks"]} >= {"gan-leaks", "monte-carlo"}
    assert (found["membership"]["members"], found["membership"]["non_members"]) == (12, 20)


def test_a_ledger_that_was_changed_is_found(visard: Terminal, run: Path) -> None:
    ledger = run / "clients" / "0001" / "ledger.jsonl"
    damaged = bytearray(ledger.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    ledger.write_bytes(bytes(damaged))
    code, out, _ = visard("audit", run, "--parts", "ledgers")
    assert (code, "FAILED" in out, "0001" in out) == (1, True, True)


def test_a_ledger_of_another_run_is_found(visard: Terminal, run: Path, tmp_path: Path) -> None:
    assert visard("simulate", "demo", "--name", "other", "--seed", "1", *OPTIONS, *MODEL)[0] == 0
    (run / "clients" / "0001" / "ledger.jsonl").write_bytes(
        (tmp_path / "runs" / "other" / "clients" / "0001" / "ledger.jsonl").read_bytes()
    )
    (run / "clients" / "0001" / "ledger.head").unlink()
    code, _, _ = visard("audit", run, "--parts", "ledgers")
    problems = json.loads((run / "audit.json").read_text())["ledgers"]["problems"]
    assert code == 1
    assert any("of another run" in problem for problem in problems)
    assert any("is not there" in problem for problem in problems), "the run's own is missing"


def test_a_ledger_without_its_last_lines_is_found(visard: Terminal, run: Path) -> None:
    ledger = run / "clients" / "0001" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-2]))
    (run / "clients" / "0001" / "ledger.head").unlink()
    code, out, _ = visard("audit", run, "--parts", "ledgers")
    assert (code, "that the coordinator saw last" in " ".join(out.replace("│", " ").split())) == (1, True)


def test_nothing_done_is_not_nothing_wrong(visard: Terminal, tmp_path: Path) -> None:
    code, _, _ = visard("audit", "demo", "--parts", "membership", *OPTIONS)
    assert (code, json.loads((tmp_path / "runs" / "audit-demo" / "audit.json").read_text())["passed"]) == (1, False)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["demo", "--parts", "gates"], "choose of ledgers, gate"),
        (["demo", "--parts", ""], "choose of ledgers, gate"),
        (["demmo"], "did you mean 'demo'"),
        (["demo", "--privacy-model", "none"], "promises nothing"),
        (["."], "cannot resume"),
        (["demo", "--one-run-rounds", "0"], "one-run-rounds"),
    ],
)
def test_a_mistake_is_told_in_a_line(visard: Terminal, arguments: list[str], told: str) -> None:
    code, out, err = visard("audit", *arguments)
    assert code in (1, 2)
    assert told in " ".join((out + err).replace("│", " ").split())
    assert "Traceback" not in out + err


def test_a_run_keeps_its_configuration(visard: Terminal, run: Path) -> None:
    code, _, err = visard("audit", run, "--epsilon", "3")
    assert (code, "leave out --epsilon" in err) == (1, True)


def test_a_run_without_privacy_is_audited_for_what_it_leaks(visard: Terminal, tmp_path: Path) -> None:
    assert visard("simulate", "demo", "--name", "bare", *OPTIONS, "--privacy-model", "none")[0] == 0
    random_faces(20, 1, seed=5).save(tmp_path / "others.npz")
    run = tmp_path / "runs" / "bare"
    code, _, _ = visard(
        "audit", run, "--parts", "ledgers,gate,one-run,membership", "--holdout", tmp_path / "others.npz"
    )
    found = json.loads((run / "audit.json").read_text())
    assert (code, set(found["skipped"])) == (0, {"ledgers", "gate", "one-run"})
    assert found["membership"]["kept"] is None
    assert np.isfinite(found["membership"]["attacks"][0]["auc"])
