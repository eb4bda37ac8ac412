"""`visard evaluate` as a person meets it: tables and two files, nothing done silently, one line for a mistake."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import visard as command
from common.evaluation import groups, utility
from common.faces import FaceDataset, FaceOptions, procedural_faces
from common.pictures import save_png
from simulations.evaluate import NOTE
from simulations.evaluate_cli import evaluate
from tests.e2e.test_cli import OPTIONS, Terminal, assert_one_line

LABELLED = ["--label-column", "glasses", "--label-values", "no,yes", "--num-classes", "2"]
REFERENCE = "procedural:persons=30,images=2"
HOLDOUT = "procedural:persons=20,images=1,first=100"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run without labels and one with, made once."""
    made = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("evaluated")
        monkeypatch.chdir(folder)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name, more in (("plain", []), ("labelled", LABELLED)):
            arguments = ["visard", "simulate", "demo", "--name", name, *OPTIONS, "--privacy-model", "none", *more]
            monkeypatch.setattr("sys.argv", [str(each) for each in arguments])
            with contextlib.suppress(SystemExit):
                command.main()
            made[name] = folder / "runs" / name
    return made


@pytest.fixture
def visard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(groups, "_STEPS", 10)
    monkeypatch.setattr(utility, "_LEAST_STEPS", 10)
    app = command.build()
    if not any(each.name == "evaluate" for each in app.registered_commands):
        app.command("evaluate")(evaluate)
    monkeypatch.setattr(command, "build", lambda: app)
    return Terminal(monkeypatch, capsys)


def read(folder: Path) -> tuple[dict[str, Any], str]:
    return json.loads((folder / "evaluation.json").read_text()), (folder / "evaluation.md").read_text()


def test_a_run_is_judged_in_every_way(visard: Terminal, runs: dict[str, Path]) -> None:
    run = runs["labelled"]
    more = ["--synthetic", 60, "--by", "glasses,hair"]
    code, out, err = visard("evaluate", run, "--reference", REFERENCE, "--holdout", HOLDOUT, *more)
    assert (code, err) == (0, "")
    found, page = read(run)
    assert (found["format"], found["note"], found["run"]) == ("visard-evaluation-1", NOTE, "labelled")
    assert (found["generated"], found["reference"], found["holdout"], found["skipped"]) == (60, 60, 20, {})
    assert (found["fidelity"]["network"], found["fidelity"]["generated"]) == ("visard-drawn-1", 60)

    assert len(found["utility"]) == 9
    taught = {"synthetic": 60, "reference": 60, "reference + synthetic": 120}
    assert {each["taught_on"]: each["taught"] for each in found["utility"]} == taught
    assert {(each["tested_on"], each["tested"]) for each in found["utility"]} == {("holdout", 20)}
    assert {each["steps"] for each in found["utility"]} == {10}, "all arms are taught as long"
    assert "Accuracy on the holdout's faces of classifiers that were taught on others, each for 10 steps" in page
    assert "No --holdout was given" not in page
    for name in ("evaluation.json", "evaluation.md"):
        assert (run / name).stat().st_mode & 0o777 == 0o600, "a run's folder is passed on"

    glasses, hair = found["fairness"]
    faces = procedural_faces(range(30), 2, FaceOptions(28, 1), 0).attributes
    assert (glasses["attribute"], hair["attribute"]) == ("glasses", "hair")
    for each in (glasses, hair):
        column = faces[each["attribute"]]
        column = column[~np.isin(column, list(each["left_out"]))]
        real = {group: float((column == group).mean()) for group in np.unique(column)}
        assert {s["group"]: s["reference"]["value"] for s in each["shares"]["groups"]} == pytest.approx(real)
        assert sum(s["generated"]["value"] for s in each["shares"]["groups"]) == pytest.approx(1)
        assert sum(s["reference_as_told"]["value"] for s in each["shares"]["groups"]) == pytest.approx(1)
        hard = {
            rate["group"]
            for rate, s in zip(each["classifier"]["groups"], each["shares"]["groups"], strict=True)
            if s["hard_to_tell"]
        }
        assert {r["group"] for r in each["classifier"]["groups"] if r["rate"] > groups.MAX_WRONG} <= hard
        assert not any(s["told"] for s in each["shares"]["groups"] if s["hard_to_tell"])
        assert each["taught"] + each["judged"] == len(column)
        assert sum(g["count"] for g in each["classifier"]["groups"]) == each["judged"]
        assert {g["frechet"] for g in each["distances"]["groups"]} == {None}, "193 faces would be needed"
    assert hair["left_out"], "a style of one person alone"
    assert f"{next(iter(hair['left_out']))!r} (2)" in page
    memory = found["memorisation"]
    assert (memory["reference"], memory["holdout"], memory["generated"], memory["tpr"]) == (60, 20, 60, None)
    assert 0 <= memory["gan_leaks"]["low"] <= memory["gan_leaks"]["high"] <= 1

    for title in ("Fidelity", "Utility", "Fairness by glasses: who is generated", "Fairness by hair", "Memorisation"):
        assert f"## {title}" in page
        assert title in out
    assert NOTE in page
    assert "For public data only.\n" in page
    assert NOTE in out
    assert "too few to say" in page
    assert "| classifier errs too often |" in page, "after 10 steps"
    widths = {line.count("|") for line in page.split("## Utility")[1].split("##")[0].splitlines() if line}
    assert widths == {0, 6}
    again, _, _ = visard("evaluate", run, "--reference", REFERENCE, "--holdout", HOLDOUT, *more)
    assert (again, read(run)[0]) == (0, found)


def test_what_is_not_done_is_told(visard: Terminal, runs: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["evaluate", runs["plain"], "--reference", REFERENCE, "--synthetic", 20, "--out", tmp_path / "found"]
    code, out, _ = visard(*arguments, "--network", "visard-random-1")
    found, page = read(tmp_path / "found")
    assert code == 0
    assert not (runs["plain"] / "evaluation.json").exists()
    assert found["fidelity"]["network"] == "visard-random-1"
    assert set(found["skipped"]) == {"utility", "fairness", "memorisation"}
    for told in ("the generator is unconditional", "give --by, of hair, beard, glasses", "give --holdout"):
        assert told in page
        assert told in " ".join(out.split())


def test_synthetic_faces_are_tried_on_the_reference_without_a_holdout(
    visard: Terminal, runs: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "passed on"
    run.mkdir()
    for name in ("generator.json", "generator.safetensors"):
        (run / name).write_bytes((runs["labelled"] / name).read_bytes())
    arguments = ["evaluate", run, "--reference", REFERENCE, "--synthetic", 20]
    assert visard(*arguments)[0] == 0
    assert "name --label-column" in read(run)[0]["skipped"]["utility"], "a card does not say how faces were read"
    assert visard(*arguments, "--label-column", "glasses", "--label-values", "no,yes")[0] == 0
    found = read(run)[0]["utility"]
    assert "No --holdout was given: where the run learned from the reference" in read(run)[1]
    assert {(each["taught_on"], each["tested_on"], each["taught"]) for each in found} == {
        ("synthetic", "reference", 20)
    }


def test_attributes_are_read_beside_a_folder(visard: Terminal, runs: dict[str, Path], tmp_path: Path) -> None:
    drawn = procedural_faces(range(24), 1, FaceOptions(28, 1), 0)
    folder = tmp_path / "photographs"
    folder.mkdir()
    lines = ["file;who"]
    for index, image in enumerate(drawn.images):
        save_png(folder / f"{index}.png", image)
        lines.append(f"{index}.png;{'' if index < 4 else 'a|b' if index % 2 else 'c'}")
    (tmp_path / "who.csv").write_text("\n".join(lines))
    arguments = ["--attributes", tmp_path / "who.csv", "--synthetic", 20, "--by", "who", "--crop", 0.9]
    code, _, err = visard("evaluate", runs["plain"], "--reference", folder, *arguments)
    assert code == 0, err
    found, page = read(runs["plain"])
    (only,) = found["fairness"]
    assert (only["shares"]["reference"], only["shares"]["unknown_reference"], only["taught"]) == (20, 4, 10)
    assert "4 faces have no who, and are left out" in page
    assert "a\\|b" in page


def test_a_mistake_is_told_in_a_line(visard: Terminal, runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    faces = procedural_faces(range(10), 1, FaceOptions(32, 1), 0)
    faces.save(tmp_path / "large.npz")
    few, small = tmp_path / "few.npz", procedural_faces(range(20, 30), 1, FaceOptions(28, 1), 0).images
    FaceDataset(small[:4]).save(few)
    FaceDataset(small, labels=np.arange(10)).save(tmp_path / "classes.npz")
    many = procedural_faces(range(20, 70), 1, FaceOptions(28, 1), 0).images
    FaceDataset(many[:20], labels=np.arange(20) % 2).save(tmp_path / "right.npz")
    FaceDataset(many[20:40]).save(tmp_path / "bare.npz")
    FaceDataset(many[40:42]).save(tmp_path / "two.npz")
    run, reference = runs["labelled"], ["--reference", REFERENCE]
    unlabelled = ["--label-column", "", "--label-values", ""]
    cases: list[tuple[list[object], str, str]] = [
        ([tmp_path / "empty", *reference], "CheckpointError", "no finished generator"),
        ([run, "--reference", tmp_path / "nowhere"], "DataError", "check the path"),
        ([run, "--reference", tmp_path / "empty", *unlabelled], "DataError", "empty"),
        ([run, "--reference", tmp_path / "large.npz", *unlabelled], "DataError", "holds images of 32 pixels"),
        (
            [run, "--reference", few, *unlabelled],
            "DataError",
            "4 reference images: 5 nearest neighbours take 7 or more",
        ),
        ([run, *reference, "--holdout", tmp_path / "two.npz", *unlabelled], "DataError", "2 holdout images: to tell"),
        (
            [run, "--reference", tmp_path / "classes.npz", "--holdout", tmp_path / "bare.npz", *unlabelled],
            "DataError",
            "10 reference images: to tell reference and holdout apart takes 20 or more of each",
        ),
        ([run, *reference, "--by", "glases"], "DataError", "it has hair, beard, glasses; did you mean 'glasses'?"),
        ([run, *reference, "--holdout", REFERENCE], "DataError", "60 of the holdout's 60 images are in the reference"),
        ([run, "--reference", tmp_path / "classes.npz", *unlabelled], "DataError", "go up to 9, the run's to 1"),
        (
            [run, "--reference", tmp_path / "right.npz", "--holdout", tmp_path / "bare.npz", *unlabelled],
            "DataError",
            "the holdout has none",
        ),
        ([run, *reference, "--network", "resnet"], "DataError", "choose one of visard-random-1, visard-drawn-1"),
        ([run, *reference, "--inception", tmp_path / "large.npz"], "DataError", "inception-2015-12-05.pt"),
        ([run, *reference, "--crop", "7"], "ConfigError", "crop = 7.0"),
        ([run, *reference, "--out", few], "ConfigError", "--out names a folder"),
    ]
    for arguments, kind, told in cases:
        result = visard("evaluate", *arguments, "--synthetic", 10)
        assert_one_line(result, kind, told)
        assert "drawing" not in result[1], "refused before a face is drawn"
    code, _, err = visard("evaluate", run, *reference, "--synthetic", 2)
    assert (code, "--synthetic" in err) == (2, True)
