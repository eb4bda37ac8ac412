"""`visard recognise` as a person meets it: trained, measured, asked; stopped and gone on with; one line for a mistake."""

import contextlib
import csv
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import visard as command
from common.faces import FaceOptions, procedural_faces
from common.models.generators import generator_of
from common.pictures import save_png
from common.recognition.recogniser import FILE_NAME, TrainedRecogniser
from common.recognition.state import read_tensors
from simulations import recognise_cli
from tests.e2e.test_cli import Terminal, assert_one_line
from tests.support import tiny_config

SMALL = {
    "image-size": 28,
    "channels": 1,
    "network": "cnn",
    "width": 4,
    "embedding": 8,
    "augment": "",
    "dropout": 0.2,
    "batch": 8,
    "epochs": 3,
    "validation": 0.3,
}
PERSONS, IMAGES = 12, 5
DRAWN = "procedural:persons=30,images=4"


def options(**changes: object) -> list[str]:
    given = SMALL | {key.replace("_", "-"): value for key, value in changes.items()}
    return [text for key, value in given.items() for text in (f"--{key}", str(value))]


def train(*arguments: object, **changes: object) -> list[object]:
    return ["recognise", "train", *arguments, *options(**changes)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Photographs of persons, a list of pairs of them, a generator, and two trained recognisers; made once."""
    folder = tmp_path_factory.mktemp("recognised")
    faces = procedural_faces(range(PERSONS), IMAGES, FaceOptions(28, 1), 0)
    assert faces.persons is not None
    for place, (image, person) in enumerate(zip(faces.images, faces.persons, strict=True)):
        path = folder / "faces" / f"p[{person:02d}]" / f"p[{person:02d}]_{1 + place % IMAGES:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, image)
    lines = ["2\t3"]
    for first in (0, 6):
        lines += [f"p[{first:02d}] 1 2", f"p[{first:02d}] 1 3", f"p[{first + 1:02d}] 4 99"]
        lines += [f"p[{first:02d}] {n} p[{first + 1:02d}] {n}" for n in (1, 2, 3)]
    (folder / "pairs.txt").write_text("\n".join(lines))
    config = tiny_config()
    (folder / "run").mkdir()
    (folder / "run" / "generator.json").write_text(json.dumps({"config": config.to_flat()}))
    save_file(generator_of(config.model).state_dict(), folder / "run" / "generator.safetensors")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for goal, more in (("verify", {}), ("identify", {"epochs": 25, "validation": 0.2, "dropout": 0.0})):
            source = folder / "faces" if goal == "identify" else DRAWN
            arguments = train("--data", source, "--runs-dir", folder, "--name", goal, goal=goal, **more)
            extra = ["--learn-attributes", "glasses"] if goal == "verify" else []
            monkeypatch.setattr("sys.argv", ["visard", *map(str, [*arguments, *extra])])
            with contextlib.suppress(SystemExit):
                command.main()
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def visard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    return Terminal(monkeypatch, capsys)


def flowing(out: str) -> str:
    """What was printed, without the lines of tables."""
    return " ".join("".join(" " if "\u2500" <= letter <= "\u257f" else letter for letter in out).split())


def figures(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return found


def test_it_is_trained_measured_and_asked_who_is_one(visard: Terminal, made: dict[str, Path], tmp_path: Path) -> None:
    faces, pairs = made["faces"], ["--pairs", made["pairs.txt"], "--folds", "2"]
    code, out, err = visard(*train("--data", faces, *pairs, "--runs-dir", "my [runs]", "--name", "it"))
    assert (code, err) == (0, "")
    run = Path("my [runs]") / "it"
    assert str(run) in out, "brackets are no markup"
    # Two persons are in these pairs, and 0.3 of the ten others are three.
    assert f"35 photographs of 7 persons; {3 * IMAGES} photographs of 3 other persons kept" in out
    assert "train: epoch 3 of 3" in out
    assert "it: done" in out
    assert "one person from a cosine of" in out
    again = shlex.split(out.strip().splitlines()[-1].removeprefix("next: visard "))
    assert sorted(path.name for path in run.iterdir()) == ["recogniser.safetensors", "recognition.json"]
    trained = TrainedRecogniser.load(run)
    assert not {"p[06]", "p[07]"} & set(trained.names)

    code, out, err = visard(*again[:-1], faces, *pairs, "--robust")
    assert (code, err) == (0, "")
    found = figures(run)
    assert (found["goal"], found["missing"], found["pairs"], found["genuine"]) == ("verify", 1, 5, 2)
    assert found["threshold"] == trained.threshold
    assert "folds" not in found, "there is one"
    assert set(found["robustness"]) == {"none", "noise", "blur", "jpeg", "occlusion", "resolution"}
    assert found["robustness"]["none"] == [found["accuracy"]]
    told = flowing(out)
    for text in ("pairs 5, 2 of one person", "pairs without their photographs 1", "too few pairs to say", "occlusion"):
        assert text in told
    assert str(run / "evaluation.json") in out
    assert visard("recognise", "evaluate", run, "--data", faces, "--threshold", 1)[0] == 0
    drawn = figures(run)
    assert (drawn["pairs"], drawn["genuine"]) == (2 * PERSONS * 10, PERSONS * 10)
    assert drawn["accuracy"] == 0.5, "nobody is accepted"
    assert "robustness" not in drawn

    one, other, third = (faces / "p[00]" / f"p[00]_000{n}.png" for n in (1, 2, 3))
    code, out, _ = visard("recognise", "verify", run, one, one)
    assert (code, out.startswith("one person: cosine 1.000, one person from ")) == (0, True)
    code, out, _ = visard("recognise", "verify", run, one, other, "--threshold", 1)
    assert (code, out.startswith("two persons: cosine "), "from 1.000" in out) == (0, True, True)

    code, out, _ = visard("recognise", "identify", run, one, third, "--most", 2)
    assert (code, out.count("p[00]_0001.png"), out.count("p[00]_0003.png")) == (0, 1, 1)
    listed = [word for word in flowing(out).split() if word.startswith("p[") and "_" not in word]
    assert len(listed) == 4
    assert set(listed) <= set(trained.names)


def test_error_rates_are_told_by_group(visard: Terminal, made: dict[str, Path]) -> None:
    run = made["verify"]
    code, out, err = visard("recognise", "evaluate", run, "--data", DRAWN, "--by", "glasses", "--seed", 3)
    assert (code, err) == (0, "")
    found = figures(run)
    rates = found["by"]["glasses"]
    groups = {kind: {g["group"]: g for g in rates[kind]["groups"]} for kind in ("false_match", "false_non_match")}
    assert groups["false_match"].keys() == groups["false_non_match"].keys() == {"no", "yes"}
    assert sum(g["count"] for g in groups["false_non_match"].values()) == found["genuine"] == 30 * 6
    assert 0 < sum(g["count"] for g in groups["false_match"].values()) < 30 * 6, "pairs across groups belong to none"
    assert 0 <= found["attributes"]["glasses"] <= 1
    for text in ("false match", "false non match", "glasses told rightly"):
        assert text in flowing(out)
    # A group that has not pairs of both kinds is left out, and told.
    code, out, err = visard("recognise", "evaluate", run, "--data", DRAWN, "--by", "hair")
    assert (code, err) == (0, "")
    left_out = figures(run)["by"]["hair"]["left_out"]
    assert {group["group"] for group in figures(run)["by"]["hair"]["false_match"]["groups"]}.isdisjoint(left_out)
    assert ("without pairs of both kinds" in flowing(out)) == bool(left_out)
    # Where photographs do not say the attribute it cannot be told how often it is told rightly.
    assert visard("recognise", "evaluate", run, "--data", made["faces"])[0] == 0
    assert figures(run)["attributes"] == {}


def test_persons_that_it_knows_are_named(visard: Terminal, made: dict[str, Path], tmp_path: Path) -> None:
    run, faces = made["identify"], made["faces"]
    trained = TrainedRecogniser.load(run)
    assert trained.names == [f"p[{number:02d}]" for number in range(PERSONS)]
    assert trained.threshold is None
    (tmp_path / "some" / "p[03]").mkdir(parents=True)
    (tmp_path / "some" / "who").mkdir()
    for n in (1, 2, 3):
        for owner, name in (("p[03]", "p[03]"), ("p[04]", "who")):
            picture = (faces / owner / f"{owner}_000{n}.png").read_bytes()
            (tmp_path / "some" / name / f"{n}.png").write_bytes(picture)
    code, out, err = visard("recognise", "evaluate", run, "--data", tmp_path / "some", "--robust")
    assert (code, err) == (0, "")
    found = figures(run)
    assert (found["goal"], found["photographs"], found["strangers"]) == ("identify", 3, 3)
    assert found["robustness"]["none"] == [found["ranks"]["1"]]
    assert "3, and 3 of strangers left out" in flowing(out)
    assert visard("recognise", "evaluate", run, "--data", faces)[0] == 0
    assert figures(run)["ranks"]["1"] > 0.5
    assert figures(run)["ranks"]["1"] <= figures(run)["ranks"]["5"] <= 1
    known = [path for path in sorted(faces.rglob("*.png")) if path.name.endswith("_0001.png")]
    code, out, err = visard("recognise", "identify", run, *known, "--most", 1)
    rows = [line.replace("│", " ").split() for line in out.splitlines() if "_0001.png" in line]
    assert len(rows) == PERSONS
    assert sum(file.startswith(f"{name}_") for file, name, _ in rows) >= PERSONS // 2
    # For verification a threshold is given, as there were no strangers to choose one on.
    verify = ["recognise", "evaluate", run, "--data", faces, "--pairs", made["pairs.txt"]]
    assert_one_line(visard(*verify), "ConfigError", "trained to identify", "or give --threshold")
    code, out, _ = visard(*verify, "--threshold", 0.5)
    assert (code, figures(run)["missing"]) == (0, 2)
    folds = figures(run)["folds"]
    assert folds["mean"] == pytest.approx(sum(folds["per_fold"]) / 2)
    assert "each fold at the others' threshold" in flowing(out)


def test_persons_of_a_table_are_known_by_their_names(visard: Terminal, made: dict[str, Path]) -> None:
    """Whoever has the name is the person, in whatever place; where there are only numbers nobody is taken for another."""
    for place, persons in (("all", range(6)), ("some", range(3, 6))):
        Path(place).mkdir()
        rows = ["file,who"]
        for person in persons:
            for n in (1, 2, 3):
                source = made["faces"] / f"p[{person:02d}]" / f"p[{person:02d}]_000{n}.png"
                (Path(place) / f"{person}{n}.png").write_bytes(source.read_bytes())
                rows.append(f"{person}{n}.png,name {person}")
        Path(f"{place}.csv").write_text("\n".join(rows))
    by_table = ["--person-column", "who"]
    asked = train(
        *by_table,
        "--data",
        "all",
        "--attributes",
        "all.csv",
        "--name",
        "it",
        goal="identify",
        epochs=40,
        validation=0.0,
    )
    assert visard(*asked)[0] == 0
    run = Path("recognisers") / "it"
    assert TrainedRecogniser.load(run).names == [f"name {person}" for person in range(6)]
    for place in ("all", "some"):
        code, _, err = visard("recognise", "evaluate", run, *by_table, "--data", place, "--attributes", f"{place}.csv")
        assert (code, err, figures(run)["strangers"]) == (0, "", 0)
        assert figures(run)["ranks"]["1"] > 0.8, "they are its own photographs"
    numbered = visard("recognise", "evaluate", run, "--data", "procedural:persons=6,images=3")
    assert_one_line(numbered, "DataError", "none of the 6 persons is one of the 6 that it was trained on")


def test_photographs_are_grouped(visard: Terminal, made: dict[str, Path], tmp_path: Path) -> None:
    run, faces = made["verify"], made["faces"]
    code, out, err = visard("recognise", "cluster", run, "--data", faces, "--out", tmp_path / "a [b]")
    assert (code, err) == (0, "")
    files = sorted(path.relative_to(faces).as_posix() for path in faces.rglob("*.png"))
    with (tmp_path / "a [b]" / "clusters.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert sorted(row["file"] for row in rows) == files
    clusters = {int(row["cluster"]) for row in rows}
    assert clusters == set(range(len(clusters)))
    with Image.open(tmp_path / "a [b]" / "clusters.png") as picture:
        assert picture.size == (10 * 29 - 1, min(12, len(clusters)) * 29 - 1)
    for text in (f"photographs {len(files)}", f"persons {PERSONS}", f"clusters {len(clusters)}", "bcubed f"):
        assert text in flowing(out)
    assert str(tmp_path / "a [b]" / "clusters.csv") in out
    # Nobody is known in a folder without persons; who is nobody's like is alone.
    (tmp_path / "loose").mkdir()
    for number, file in enumerate(files[:6]):
        (tmp_path / "loose" / f"{number}.png").write_bytes((faces / file).read_bytes())
    code, out, _ = visard("recognise", "cluster", run, "--data", tmp_path / "loose", "--threshold", 0.99999)
    assert code == 0
    assert "photographs 6 clusters 6" in flowing(out)
    assert "rand" not in out
    assert (run / "clusters" / "clusters.csv").read_text().splitlines()[1:] == [f"{n},{n}.png" for n in range(6)]
    for out_folder in (faces, faces / "p[00]", faces / "new"):
        found = visard("recognise", "cluster", run, "--data", faces, "--out", out_folder)
        assert_one_line(found, "ConfigError", "lies among the faces")
    assert sorted(path.relative_to(faces).as_posix() for path in faces.rglob("*.*g")) == files
    assert not (faces / "new").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"use": "pretrain", "synthetic": 16, "pretrain_epochs": 1, "augment": "flip,crop"},
        {"use": "identities", "synthetic": 3, "variations": 2, "loss": "cosface"},
        {"use": "variation", "variations": 1, "smallest": 5, "goal": "identify", "loss": "arcface"},
    ],
    ids=["pretrain", "identities", "variation"],
)
def test_a_generator_lends_its_faces(
    visard: Terminal, made: dict[str, Path], tmp_path: Path, changes: dict[str, object]
) -> None:
    arguments = ["--data", made["faces"], "--generator", made["run"], "--name", "lent"]
    code, out, err = visard(*train(*arguments, **{**changes, "epochs": 1}))
    assert (code, err) == (0, "")
    told = {"pretrain": "after 16 synthetic faces", "identities": "6 faces of 3", "variation": "36 variations of them"}
    assert told[str(changes["use"])] in out
    assert ("pretrain: epoch 1 of 1" in out) is (changes["use"] == "pretrain")
    assert TrainedRecogniser.load(tmp_path / "recognisers" / "lent").epochs == 1


def stopping(monkeypatch: pytest.MonkeyPatch, stage: str, last: int) -> None:
    """Presses Ctrl-C after this epoch of this stage."""

    @contextlib.contextmanager
    def progress() -> Iterator[Any]:
        def observer(now: str, epoch: int, *_told: object) -> None:
            if (now, epoch) == (stage, last):
                raise KeyboardInterrupt

        yield observer

    monkeypatch.setattr(recognise_cli, "_progress", progress)


def outcome(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors, told = read_tensors(run / FILE_NAME)
    del told["seconds"]
    return tensors, told


def test_stopped_and_gone_on_with_is_the_same(
    visard: Terminal, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--data", made["faces"], "--generator", made["run"], "--pairs", made["pairs.txt"], "--folds", "1"]
    changes: dict[str, Any] = {"use": "pretrain", "synthetic": 16, "pretrain_epochs": 2, "augment": "flip,crop"}
    whole = train(*arguments, "--name", "whole", **changes)
    code, _, err = visard(*whole)
    assert (code, err) == (0, "")
    tensors, told = outcome(tmp_path / "recognisers" / "whole")
    runs_dir = tmp_path / "my [runs]"
    stopped = [*arguments, "--runs-dir", runs_dir, "--name", "stopped"]
    next_one = train(*stopped, **changes)
    for stage, epoch in (("pretrain", 1), ("train", 2)):
        with monkeypatch.context() as patched:
            stopping(patched, stage, epoch)
            code, out, err = visard(*next_one)
        assert (code, err) == (130, "")
        last = out.rstrip().splitlines()[-1]
        assert last.startswith("stopped; nothing is lost. Go on with: visard "), out
        next_one = [*shlex.split(last.partition("with: visard ")[2])]
        assert next_one[-1] == "--resume"
        assert str(runs_dir) in next_one
        assert not (runs_dir / "stopped" / FILE_NAME).exists()
        # Neither begun anew by mistake, nor gone on with as something else.
        assert_one_line(visard(*train(*stopped)), "ConfigError", "--resume goes on with it; else give another --name")
        refused = visard(*next_one, "--epochs", 9, "--lr", 0.1)
        assert_one_line(refused, "ConfigError", "leave out --epochs, --lr")
    code, out, err = visard(*next_one)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in (runs_dir / "stopped").iterdir()) == [FILE_NAME, "recognition.json"]
    resumed, said = outcome(runs_dir / "stopped")
    assert said == told
    assert resumed.keys() == tensors.keys()
    for key, value in tensors.items():
        assert torch.equal(value, resumed[key]), key
    for finished in (whole, next_one):
        assert_one_line(visard(*finished), "ConfigError", "holds a finished recogniser: give another --name")


def test_stopped_before_the_first_epoch_there_is_nothing_to_go_on_with(
    visard: Terminal, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = train("--data", made["faces"], "--name", "early", epochs=1)

    def interrupted(*_given: object, **_more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("common.recognition.training.train_recogniser", interrupted)
        code, out, _ = visard(*arguments)
    assert (code, "before the first epoch: start anew" in out, "nothing is lost" in out) == (130, True, False)
    assert visard(*arguments)[0] == 0
    for damaged in ("", "[]", '{"epoch": 3}'):
        (tmp_path / "recognisers" / "late").mkdir(exist_ok=True)
        (tmp_path / "recognisers" / "late" / "recognition.json").write_text(damaged)
        resumed = visard("recognise", "train", "--data", made["faces"], "--name", "late", "--resume")
        assert_one_line(resumed, "ConfigError")


def test_a_mistake_is_told_in_a_line(visard: Terminal, made: dict[str, Path], tmp_path: Path) -> None:
    faces, listed = made["faces"], made["pairs.txt"]
    photograph = faces / "p[00]" / "p[00]_0001.png"
    (tmp_path / "loose").mkdir()
    (tmp_path / "single" / "one").mkdir(parents=True)
    for place in ("loose/a.png", "loose/b.png", "single/one/a.png", "single/one/b.png"):
        (tmp_path / place).write_bytes(photograph.read_bytes())
    (tmp_path / "whole.txt").write_text("1\nnobody 1 2\nnobody 1 noone 1\n")
    (tmp_path / "everybody.txt").write_text(
        f"{PERSONS}\n"
        + "\n".join(f"p[{n:02d}] 1 2" for n in range(PERSONS))
        + "\n"
        + "\n".join(f"p[{n:02d}] 1 p[{(n + 1) % PERSONS:02d}] 2" for n in range(PERSONS))
    )
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / FILE_NAME).write_bytes((made["verify"] / FILE_NAME).read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no picture")
    here = ["--data", faces]
    verify, identify = made["verify"], made["identify"]
    trained: list[tuple[list[object], str, str]] = [
        (["--data", "no/such/[b]folder[/b]"], "DataError", "[b]folder[/b] is no folder"),
        (["--data", "loose"], "DataError", "not known who is on the photographs"),
        ([*here, "--data", "loose"], "DataError", "name one kind"),
        (["--data", "single", "--validation", 0], "DataError", "1 person"),
        (["--data", "single"], "DataError", "pairs of strangers need two or more"),
        ([*here, "--smallest", 9], "DataError", "nobody has 9 photographs"),
        ([*here, "--learn-attributes", "age"], "DataError", "there is no attribute 'age': there are none"),
        (["--data", DRAWN, "--learn-attributes", "glases"], "DataError", "there are beard, glasses, hair"),
        ([*here, "--use", "identities"], "ConfigError", "name the run of a generator"),
        ([*here, "--generator", made["run"]], "ConfigError", "leave the generator out"),
        ([*here, "--use", "variation", "--generator", "unfinished"], "CheckpointError", "no finished generator in unf"),
        ([*here, "--use", "pretrain", "--generator", made["run"]], "ConfigError", "name augmentations"),
        ([*here, "--pairs", listed, "--folds", "1,two"], "ConfigError", "--folds 1,two: give whole numbers"),
        ([*here, "--pairs", listed, "--folds", "7"], "DataError", "no pair in the folds 7: there are [1 2]"),
        ([*here, "--pairs", "whole.txt"], "DataError", "none of the 2 pairs"),
        ([*here, "--pairs", "nowhere.txt"], "DataError", "no list of pairs"),
        ([*here, "--pairs", "everybody.txt"], "DataError", "nobody is left to learn from: name fewer --folds"),
        (["--data", DRAWN, "--pairs", listed], "DataError", "none of the 12 pairs"),
        ([*here, "--batch", 500], "DataError", "use a smaller batch"),
        ([*here, "--loss", "triplet"], "ConfigError", "choose one of softmax, cosface, arcface"),
        ([*here, "--crop", 7], "ConfigError", "crop = 7.0"),
        ([*here, "--name", "../x"], "ConfigError", "give another --name"),
    ]
    for arguments, kind, told in trained:
        assert_one_line(visard("recognise", "train", "--name", "new", *options(), *arguments), kind, told)
    assert not (tmp_path / "recognisers" / "new" / FILE_NAME).exists()
    labelled = ["--use", "variation", "--generator", made["run"], "--label-column", "glasses", *options()]
    (tmp_path / "recognisers" / "a-run").mkdir(parents=True)
    (tmp_path / "recognisers" / "a-run" / "config.toml").touch()
    asked: list[tuple[list[object], str, str]] = [
        (["train", *here, "--folds", "1"], "ConfigError", "--folds names folds of --pairs, and there is none"),
        (["train", *here, "--label-column", "glasses"], "ConfigError", "--label-column says nothing with use = none"),
        (["evaluate", verify, *here, "--folds", "1"], "ConfigError", "there is none: leave it out"),
        (["evaluate", identify, *here, "--by", "age"], "ConfigError", "--by is for a recogniser trained to verify"),
        (["verify", verify, photograph, photograph, "--threshold", "7"], "ConfigError", "no cosine"),
        (["train", *here, "--name", "a-run"], "ConfigError", "holds a run, whose files are passed on"),
        (["train", *here, *labelled], "ConfigError", "no attribute 'glasses': they have none"),
        (
            ["train", "--data", DRAWN, *labelled, "--label-values", "no"],
            "ConfigError",
            "glasses has the values yes, wh",
        ),
        (["train", "--data", DRAWN, *labelled, "--label-values", "no,yes"], "ConfigError", "num_classes=0"),
        (["train", *here, "--name", "new2", "--resume"], "ConfigError", "nothing to resume in recognisers/new2"),
        (["evaluate", "nowhere", *here], "CheckpointError", "is this the folder of a recogniser?"),
        (["evaluate", "damaged", *here], "CheckpointError", "cannot be read"),
        (["evaluate", verify, "--data", "loose"], "DataError", "not known who is on the photographs"),
        (["evaluate", verify, "--data", "single"], "DataError", "pairs need two persons"),
        (["evaluate", verify, *here, "--by", "age"], "DataError", "no attribute 'age': they have none"),
        (["evaluate", verify, *here, "--pairs", listed, "--folds", "x"], "ConfigError", "give whole numbers"),
        (["evaluate", identify, "--data", "single"], "DataError", "none of the 1 persons is one of the 12"),
        (["verify", identify, photograph, photograph], "ConfigError", "no persons to choose a threshold on"),
        (["verify", verify, photograph, "gone.png"], "DataError", "gone.png"),
        (["identify", verify, "text.png"], "DataError", "text.png"),
        (["cluster", identify, *here], "ConfigError", "or give --threshold"),
        (["cluster", verify, "--data", "nowhere"], "DataError", "check the path"),
    ]
    for arguments, kind, told in asked:
        assert_one_line(visard("recognise", *arguments), kind, told)
    for usage in (["train"], ["evaluate", verify], ["identify", verify], ["train", *here, "--epochs", "many"], []):
        code, out, err = visard("recognise", *usage)
        assert (code, "Traceback" in out + err) == (2, False)
