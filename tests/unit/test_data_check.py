"""What an owner is told of their own faces: against brute force, and against copies and damage made for the purpose."""

import io
import itertools
import json
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from rich.console import Console

from client.check import LEAST_UNITS, Findings, check, declared
from client.duplicates import BLOCK, alike, equal_pairs, fingerprints, joined
from client.report import FRAME, PRIVATE, RED, save, show
from common.errors import DataError
from common.faces import FaceDataset, FaceOptions, Reading, procedural_faces, read_faces
from common.privacy.units import PrivacyUnit
from common.sections import FaceSource

DRAWN = procedural_faces(range(12), 3, FaceOptions(64, 3), seed=5)


def picture(index: int, size: int = 64) -> Image.Image:
    return Image.fromarray(np.moveaxis(DRAWN.images[index], 0, -1)).resize((size, size))


def write(folder: Path, name: str, image: Image.Image, **options: object) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def looked_at(folder: Path, unit: PrivacyUnit = PrivacyUnit.PERSON, **reading: object) -> tuple[Findings, Reading]:
    source = FaceSource(data=str(folder), **reading)  # type: ignore[arg-type]
    found = read_faces(source, 32, 3)
    return check(source, found, unit), found


def by_persons(folder: Path, persons: int = 4, images: int = 3) -> Path:
    for person in range(persons):
        for image in range(images):
            write(folder, f"p{person}/{image}.png", picture(3 * person + image))
    return folder


def told(findings: Findings) -> str:
    out = io.StringIO()
    show(findings, Console(file=out, width=200))
    return out.getvalue()


def saved_anew(image: np.ndarray, quality: int, size: int) -> np.ndarray:
    """As JPEG, at another size, brighter."""
    buffer = io.BytesIO()
    changed = Image.fromarray(np.moveaxis(image, 0, -1)).resize((size, size)).point(lambda value: value * 0.9 + 12)
    changed.save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as again:
        return np.moveaxis(np.asarray(again.resize(image.shape[1:])), -1, 0)


@pytest.mark.parametrize(("quality", "size"), [(90, 64), (60, 64), (90, 45)])
def test_copies_saved_anew_are_found_and_other_faces_of_a_person_are_not(quality: int, size: int) -> None:
    again = np.stack([saved_anew(image, quality, size) for image in DRAWN.images])
    pairs = {tuple(pair) for pair in alike(fingerprints(np.concatenate([DRAWN.images, again]))).tolist()}
    count = len(DRAWN)
    assert pairs <= {(i, i + count) for i in range(count)}
    assert len(pairs) >= count - 1


def test_grey_and_even_pictures() -> None:
    images = np.zeros((5, 1, 28, 28), np.uint8)
    images[1] = 200  # even as well
    images[2] = images[3] = np.random.default_rng(0).integers(0, 256, (28, 28))
    images[4] = 255 - images[2]
    assert sorted(map(tuple, alike(fingerprints(images)).tolist())) == [(0, 1), (2, 3)]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_all_pairs_are_compared_across_blocks(seed: int, count: int) -> None:
    """Copies anywhere among more pictures than a block has."""
    rng = np.random.default_rng(seed)
    base = np.repeat(np.repeat(rng.integers(0, 256, (6, 1, 16, 16), dtype=np.uint8), 2, axis=2), 2, axis=3)
    whose = rng.integers(0, 6, BLOCK + count)
    found = {tuple(pair) for pair in alike(fingerprints(base[whose])).tolist()}
    assert found == {(i, j) for i, j in itertools.combinations(range(len(whose)), 2) if whose[i] == whose[j]}


@given(st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=20))
def test_equal_pairs_join_all_that_is_equal(keys: list[str | None]) -> None:
    expected = {key: [i for i, other in enumerate(keys) if other == key] for key in keys if key is not None}
    sets = joined(equal_pairs(keys))
    assert sorted(sets) == sorted(members for members in expected.values() if len(members) > 1)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda pair: pair[0] != pair[1]), max_size=15))
def test_joined_is_the_connected_components(pairs: list[tuple[int, int]]) -> None:
    sets = [{node} for node in {node for pair in pairs for node in pair}]
    for one, other in pairs:
        both = [members for members in sets if members & {one, other}]
        sets = [members for members in sets if members not in both] + [set.union(*both)]
    found = joined(np.array(pairs, dtype=np.int64).reshape(-1, 2))
    assert sorted(found) == sorted(sorted(members) for members in sets)


@given(st.integers(LEAST_UNITS, 10**7), st.floats(1, 50))
def test_declared_constants_are_round_and_within_a_fifth(units: int, images_a_person: float) -> None:
    found = declared(units, images_a_person)
    assert found is not None
    assert 0.8 <= found.units / units <= 1.25
    assert len(f"{found.units:.10g}".replace(".", "").rstrip("0")) <= 2
    assert found.expected_batch / found.sample_rate == pytest.approx(found.units)
    assert 0 < found.sample_rate <= 0.5
    assert found.images_per_person in (1, 2, 4, 8)
    assert found.images_per_person in (8, *(n for n in (1, 2, 4) if n >= images_a_person > n / 2))


def test_no_constants_are_suggested_for_so_few_that_they_would_be_the_counts() -> None:
    assert declared(LEAST_UNITS - 1, 3.0) is None
    figures = (20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 400, 500, 600, 800, 1000)
    assert {found.units for units in range(LEAST_UNITS, 1001) if (found := declared(units, 3.0))} == set(figures)


def test_counts_sizes_and_what_is_refused(tmp_path: Path) -> None:
    folder = by_persons(tmp_path / "faces")
    write(folder, "p4/only.png", picture(30, size=20))
    write(folder, "p0/grey.png", picture(31).convert("L"))
    findings, _ = looked_at(folder)
    assert (findings.images, findings.photographs, findings.persons, findings.single) == (14, 14, 5, 1)
    spread = findings.images_a_person
    assert spread is not None
    assert (spread.least, spread.median, spread.most) == (1, 3, 4)
    assert findings.files is not None
    assert (findings.files.count, findings.files.small, findings.files.grey) == (14, 1, 1)
    assert (findings.files.side.least, findings.files.side.median) == (20, 64)
    assert findings.files.sizes == {"64x64": 13, "20x20": 1}
    assert findings.grey == 1
    assert findings.copies == []
    assert findings.refused is None
    assert findings.declared is None
    assert PRIVATE in told(findings)
    # A tighter crop leaves fewer pixels than the run's in all.
    assert looked_at(folder, crop=0.45)[0].files.small == 14  # type: ignore[union-attr]


def test_faces_of_nobody_known_are_refused_for_persons_only(tmp_path: Path) -> None:
    for i in range(30):
        write(tmp_path, f"{i}.png", picture(i))
    findings, _ = looked_at(tmp_path)
    assert findings.persons is None
    assert findings.refused is not None
    assert findings.declared is None
    assert "refused: unit person" in told(findings)
    findings, _ = looked_at(tmp_path, PrivacyUnit.IMAGE)
    assert findings.refused is None
    assert findings.declared == declared(30, 1.0)
    assert "--sample-rate 0.5 --expected-batch 15\n" in told(findings)


def test_copies_across_persons_halve_the_protection_and_within_one_do_not(tmp_path: Path) -> None:
    folder = by_persons(tmp_path)
    (folder / "p1" / "same.png").write_bytes((folder / "p0" / "0.png").read_bytes())
    write(folder, "p3/anew.jpg", picture(3 * 2 + 1), quality=80)
    (folder / "p2" / "again.png").write_bytes((folder / "p2" / "0.png").read_bytes())
    findings, reading = looked_at(folder)
    found = [(sorted(copies.names), copies.persons, copies.same_bytes, copies.halves) for copies in findings.copies]
    assert sorted(found[:2]) == [
        (["p0/0.png", "p1/same.png"], 2, True, True),
        (["p2/1.png", "p3/anew.jpg"], 2, False, True),
    ]
    assert found[2:] == [(["p2/0.png", "p2/again.png"], 1, True, False)]
    assert all([reading.names[i] for i in copies.images] == copies.names for copies in findings.copies)
    # Where images are protected, each copy is a unit of its own.
    assert all(copies.halves for copies in looked_at(folder, PrivacyUnit.IMAGE)[0].copies)


def test_alike_faces_of_one_photograph_are_no_copies() -> None:
    images = np.repeat(DRAWN.images[:3], [2, 1, 1], axis=0)
    source = FaceSource(data="hf:somewhere")
    of_one = FaceDataset(images, photographs=np.array([0, 0, 1, 2]))
    assert check(source, Reading(of_one, ("",) * 4, ()), PrivacyUnit.IMAGE).copies == []
    of_two = FaceDataset(images, photographs=np.array([0, 1, 1, 2]))
    (copies,) = check(source, Reading(of_two, ("",) * 4, ()), PrivacyUnit.IMAGE).copies
    assert copies.names == ["image 0", "image 1"]


def test_attributes_and_labels(tmp_path: Path) -> None:
    rows = ["file,hat,age,code"]
    for i in range(30):
        write(tmp_path / "faces", f"{i}.png", picture(i))
        rows.append(f"{i}.png,{['no', 'yes', ''][i % 3]},{20 + i},c{i}")
    (tmp_path / "about.csv").write_text("\n".join(rows))
    findings, _ = looked_at(tmp_path / "faces", attributes=str(tmp_path / "about.csv"))
    hat, age, code = (findings.attributes[name] for name in ("hat", "age", "code"))
    assert (hat.distinct, hat.counts, hat.range, hat.missing) == (2, {"no": 10, "yes": 10}, None, 10)
    assert (age.distinct, age.counts) == (30, {})
    assert age.range is not None
    assert (age.range.least, age.range.median, age.range.most) == (20, 34.5, 49)
    assert (code.distinct, code.counts, code.range) == (30, {}, None)
    text = told(findings)
    assert "--label-column hat --label-values no,yes --num-classes 2" in text
    assert "--label-column age" not in text
    pasted = {"label_column": "hat", "label_values": "no,yes"}
    labelled, _ = looked_at(tmp_path / "faces", attributes=str(tmp_path / "about.csv"), **pasted)
    assert labelled.labels == {"no": 10, "yes": 10}
    assert labelled.images == 20
    assert len(labelled.skipped) == 10


def test_what_cannot_be_used_is_told_by_reason_and_listed_by_name(tmp_path: Path) -> None:
    folder = by_persons(tmp_path / "faces")
    whole = (folder / "p0" / "0.png").read_bytes()
    (folder / "p0" / "torn.png").write_bytes(whole[: len(whole) // 2])
    (folder / "p1" / "[red]notes\x1b.txt").write_text("not a face")
    findings, reading = looked_at(folder)
    assert {name for name, _ in findings.skipped} == {"p0/torn.png", "p1/[red]notes\x1b.txt"}
    text = told(findings)
    assert "torn.png" in text
    assert "[red]notes" in text
    assert "\x1b" not in text
    written = save(findings, reading.faces, tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "check.json").read_text())
    assert {name for name, _ in listed["skipped"]} == {name for name, _ in findings.skipped}
    assert written == ["check.json", "contact.png"]


def test_the_files_are_for_their_owner_alone_and_copies_are_framed(tmp_path: Path) -> None:
    folder = by_persons(tmp_path / "faces")
    (folder / "p1" / "same.png").write_bytes((folder / "p0" / "0.png").read_bytes())
    findings, reading = looked_at(folder)
    out = tmp_path / "state" / "check"
    assert save(findings, reading.faces, out) == ["check.json", "contact.png", "copies.png"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o600}
    with Image.open(out / "copies.png") as sheet:
        pixels = np.asarray(sheet)
    (copies,) = findings.copies
    assert pixels.shape == (64 + 2 * FRAME, 2 * (64 + 2 * FRAME) + 1, 3)
    assert (pixels[0, : 64 + 2 * FRAME] == RED).all()
    inside = pixels[FRAME : FRAME + 64 : 2, FRAME : FRAME + 64 : 2]
    assert np.array_equal(np.moveaxis(inside, -1, 0), reading.faces.images[copies.images[0]])
    # What an earlier check found does not stay behind.
    (folder / "p1" / "same.png").unlink()
    save(*(lambda found, read: (found, read.faces))(*looked_at(folder)), out)
    assert not (out / "copies.png").exists()


def test_the_contact_sheet_shows_what_the_discriminator_would_see(tmp_path: Path) -> None:
    findings, reading = looked_at(by_persons(tmp_path / "faces"), crop=0.5)
    save(findings, reading.faces, tmp_path / "out")
    with Image.open(tmp_path / "out" / "contact.png") as sheet:
        first = np.asarray(sheet)[:64:2, :64:2]
    assert np.array_equal(np.moveaxis(first, -1, 0), reading.faces.images[0])


def test_nothing_is_written_where_it_cannot_be(tmp_path: Path) -> None:
    findings, reading = looked_at(by_persons(tmp_path / "faces"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="give --out"):
        save(findings, reading.faces, tmp_path / "file" / "check")


def test_a_file_that_changes_meanwhile_is_said(tmp_path: Path) -> None:
    folder = by_persons(tmp_path)
    source = FaceSource(data=str(folder))
    found = read_faces(source, 32, 3)
    (folder / "p0" / "0.png").unlink()
    with pytest.raises(DataError, match="a moment ago"):
        check(source, found, PrivacyUnit.PERSON)


def test_a_drawn_line_makes_another_picture() -> None:
    """Near, and no copy: spectacles on the same face."""
    one = picture(0)
    other = one.copy()
    ImageDraw.Draw(other).rectangle((14, 22, 50, 34), outline="black", width=3)
    both = np.stack([np.moveaxis(np.asarray(image), -1, 0) for image in (one, other)])
    assert len(alike(fingerprints(both))) == 0


def test_a_thousand_copies_of_one_picture_are_one_finding() -> None:
    faces = FaceDataset(np.repeat(DRAWN.images[:2], [1, 1000], axis=0))
    (copies,) = check(FaceSource(data="hf:somewhere"), Reading(faces, ("",) * 1001, ()), PrivacyUnit.IMAGE).copies
    assert copies.images == list(range(1, 1001))
