"""`visard data check` and `visard data show` as an owner meets them, on drawn faces with everything that goes wrong."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.faces import FaceOptions, procedural_faces
from tests.e2e.test_cli import OPTIONS, Terminal, assert_one_line, size_of

PERSONS, IMAGES = 6, 3


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(monkeypatch, capsys)


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Persons in folders: one photograph at two of them, a torn file, a text file, and somebody with one image."""
    folder = tmp_path / "faces"
    drawn = procedural_faces(range(PERSONS), IMAGES, FaceOptions(64, 3), seed=2)
    for index, image in enumerate(drawn.images):
        path = folder / f"person{index // IMAGES}" / f"{index % IMAGES}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.moveaxis(image, 0, -1)).save(path)
    (folder / "person1" / "copy.png").write_bytes((folder / "person0" / "0.png").read_bytes())
    with Image.open(folder / "person2" / "1.png") as picture:
        picture.save(folder / "person3" / "anew.jpg", quality=85)
    (folder / "person4" / "torn.png").write_bytes((folder / "person4" / "0.png").read_bytes()[:900])
    (folder / "person5" / "notes.txt").write_text("nothing to see")
    (folder / "alone").mkdir()
    Image.new("L", (20, 30), 90).save(folder / "alone" / "1.png")
    return folder


def test_check_tells_what_is_there_and_keeps_it_beside_the_faces(run: Terminal, faces: Path, tmp_path: Path) -> None:
    before = sorted(path for path in faces.rglob("*"))
    code, out, err = run("data", "check", faces)
    assert code == 0, err
    # Drawn: 18; two copies and one alone besides.
    for told in (
        "21",
        "7, 1 of them with one image",
        "2 pictures, 2 as several units",
        "torn.png",
        "notes.txt",
    ):
        assert told in out, told
    assert "at 2 persons" in out
    assert "too few persons to suggest" in out
    assert "private" in out
    assert sorted(path for path in faces.rglob("*")) == before
    folder = tmp_path / "faces.visard" / "check"
    assert {path.name for path in folder.iterdir()} == {"check.json", "contact.png", "copies.png"}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())
    assert size_of(folder / "contact.png") == (5 * 65 - 1, 5 * 65 - 1)


def test_check_as_json_is_nothing_but_json(run: Terminal, faces: Path, tmp_path: Path) -> None:
    code, out, err = run("data", "check", faces, "--json", "--out", tmp_path / "mine", "--image-size", 28)
    assert code == 0, err
    found = json.loads(out)
    assert found == json.loads((tmp_path / "mine" / "check.json").read_text())
    assert (found["images"], found["persons"], found["single"], found["image_size"]) == (21, 7, 1, 28)
    assert {tuple(sorted(copies["names"])) for copies in found["copies"]} == {
        ("person0/0.png", "person1/copy.png"),
        ("person2/1.png", "person3/anew.jpg"),
    }
    assert {name for name, _ in found["skipped"]} == {"person4/torn.png", "person5/notes.txt"}
    assert found["files"]["small"] == 1
    assert not (tmp_path / "faces.visard").exists()


def test_faces_that_a_run_would_refuse_end_with_status_1(run: Terminal, faces: Path, tmp_path: Path) -> None:
    code, out, _ = run("data", "check", faces / "person0", "--out", tmp_path / "mine")
    assert code == 1
    assert "refused: unit person" in out
    assert run("data", "check", faces / "person0", "--unit", "image", "--out", tmp_path / "mine")[0] == 0


def test_check_of_a_source_that_is_no_path_writes_where_it_is_told(run: Terminal, tmp_path: Path) -> None:
    source = "procedural:persons=3,images=2"
    code, out, _ = run("data", "check", source)
    assert code == 0
    assert "give --out" in out
    assert list(tmp_path.iterdir()) == []
    assert run("data", "check", source, "--out", "here")[0] == 0
    assert (tmp_path / "here" / "contact.png").exists()


def test_check_refuses_in_one_line(run: Terminal, faces: Path, tmp_path: Path) -> None:
    assert_one_line(run("data", "check", tmp_path / "nowhere"), "DataError", "nowhere", "check the path")
    (tmp_path / "empty").mkdir()
    assert_one_line(run("data", "check", tmp_path / "empty"), "DataError", "holds no image")
    assert_one_line(run("data", "check", faces, "--image-size", 33), "DataError", "33")
    assert_one_line(run("data", "check", faces, "--out", faces / "check"), "ConfigError", "among the faces")
    (tmp_path / "taken").write_text("")
    code, _, err = run("data", "check", faces, "--out", tmp_path / "taken")
    assert code == 1
    assert err.startswith("DataError: cannot write into")
    assert not list(tmp_path.glob("*.visard"))


def test_show_draws_who_would_hold_what(run: Terminal, tmp_path: Path) -> None:
    code, out, err = run("data", "show", "demo", *OPTIONS, "--partitioner", "power-law", "--out", "held.png")
    assert code == 0, err
    counts = [line.split("│")[1:4] for line in out.splitlines() if line.startswith("│")]
    assert [[int(cell) for cell in row] for row in counts] == [[0, 14, 7], [1, 6, 3], [2, 4, 2]]
    assert "24 images at 3 clients by power-law, exponent 1" in out
    assert size_of(tmp_path / "held.png")[0] > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held.png"]


@pytest.mark.filterwarnings("default::common.faces.SkippedImages")
def test_show_deals_the_owner_s_photographs_out_by_attribute(run: Terminal, faces: Path, tmp_path: Path) -> None:
    rows = ["file,who,hat"]
    for person in range(PERSONS):
        rows += [f"person{person}/{image}.png,p{person},{['no', 'yes'][person % 2]}" for image in range(IMAGES)]
    (tmp_path / "about.csv").write_text("\n".join(rows))
    source = ["--data", faces, "--attributes", tmp_path / "about.csv", "--person-column", "who"]
    how = ["--partitioner", "attribute", "--partition-by", "hat", "--num-clients", 2]
    code, out, err = run("data", "show", "demo", *source, *how)
    assert code == 0, err
    assert "5 no row in about.csv" in err
    counts = [line.split("│")[1:6] for line in out.splitlines() if line.startswith("│")]
    assert [[int(cell) for cell in row] for row in counts] == [[0, 9, 3, 9, 0], [1, 9, 3, 0, 9]]
    assert (tmp_path / "held.png").exists()


def test_show_refuses_in_one_line(run: Terminal, tmp_path: Path) -> None:
    source = ["--data", "procedural:persons=4,images=1"]
    assert_one_line(run("data", "show", "demo", *source, "--num-clients", 9), "DataError", "4 persons for 9 clients")
    by = ["--partitioner", "dirichlet", "--partition-by", "age", "--num-clients", 2]
    assert_one_line(run("data", "show", "demo", *source, *by), "DataError", "'age'", "name one of theirs")
    assert_one_line(run("data", "show", "demo", *source, "--partitioner", "dirichlet"), "ConfigError", "partition-by")
    assert_one_line(run("data", "show", "nothing"), "ConfigError", "there is no recipe")
    assert not (tmp_path / "held.png").exists()
