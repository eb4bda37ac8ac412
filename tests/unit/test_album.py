"""Who is on which photograph, which pairs a list asks about, and how photographs are divided."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from common.pictures import save_png
from common.recognition.album import Album, draw_pairs, read_album, read_pairs, split_photographs
from common.recognition.settings import RecognitionConfig
from common.sections import FaceSource

CONFIG = RecognitionConfig(image_size=28, channels=1)


def photograph(path: Path, seed: int) -> np.ndarray:
    """A picture of noise, and how it is read: 28 pixels need no scaling."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, (1, 28, 28), dtype=np.uint8)
    save_png(path, image)
    return image


def folders(root: Path, persons: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """So many photographs of each person, NAME/NAME_000n.png; what is on each."""
    files = [f"{name}/{name}_{n:04d}.png" for name, count in persons.items() for n in range(1, count + 1)]
    return {file: photograph(root / file, seed + place) for place, file in enumerate(files)}


def album_of(*roots: Path, **source: str) -> Album:
    return read_album([FaceSource(data=str(root), **source) for root in roots], CONFIG)  # type: ignore[arg-type]


def test_folders_are_the_names_of_persons(tmp_path: Path) -> None:
    made = folders(tmp_path, {"Cara": 2, "Ann": 3, "Ben": 1})
    album = album_of(tmp_path)
    assert list(album.files) == sorted(made)
    for file, image, person in zip(album.files, album.faces.images, album.persons, strict=True):
        assert (image == made[file]).all()
        assert album.names[person] == file.split("/")[0]
    assert dict(album.faces.attributes) == {}, "the column of files is no attribute"
    some = album.subset(np.array([5, 3]))
    assert (some.files, some.names) == (["Cara/Cara_0002.png", "Ben/Ben_0001.png"], ["Ben", "Cara"])
    assert [some.names[person] for person in some.persons] == ["Cara", "Ben"]


def test_one_name_in_two_sources_is_one_person(tmp_path: Path) -> None:
    folders(tmp_path / "a", {"Ann": 2, "Ben": 1})
    folders(tmp_path / "b", {"Dan": 1, "Ann": 1}, seed=50)
    album = album_of(tmp_path / "a", tmp_path / "b")
    assert len(album.files) == 5
    assert sorted(album.names) == ["Ann", "Ben", "Dan"]
    assert [album.names[person] for person in album.persons] == [file.split("/")[0] for file in album.files]
    assert album.faces.num_persons == 3


def test_persons_of_a_column(tmp_path: Path) -> None:
    for number in range(5):
        photograph(tmp_path / "faces" / f"{number}.png", number)
    rows = [
        "file,who,hair",
        *(f"{n}.png,{who},{hair}" for n, (who, hair) in enumerate(zip("xyxzz", "abaab", strict=True))),
    ]
    table = tmp_path / "who.csv"
    table.write_text("\n".join(rows))
    album = album_of(tmp_path / "faces", attributes=str(table), person_column="who")
    assert album.persons.tolist() == [0, 1, 0, 2, 2]
    assert album.names == ["x", "y", "z"]
    assert album.faces.attributes["hair"].tolist() == list("abaab")
    assert set(album.faces.attributes) == {"hair"}
    # Beside another source only what both say is kept, and who is called the same is one person.
    photograph(tmp_path / "more" / "0.png", 9)
    photograph(tmp_path / "more" / "1.png", 10)
    (tmp_path / "more.csv").write_text("file,who,age\n0.png,x,3\n1.png,x,4")
    sources = [
        FaceSource(data=str(tmp_path / name), attributes=str(tmp_path / csv), person_column="who")
        for name, csv in (("faces", "who.csv"), ("more", "more.csv"))
    ]
    both = read_album(sources, CONFIG)
    assert both.names == ["x", "y", "z"]
    assert both.persons.tolist() == [0, 1, 0, 2, 2, 0, 0]
    assert dict(both.faces.attributes) == {}


def test_who_is_on_them_is_asked_only_where_it_is_needed(tmp_path: Path) -> None:
    for number in range(3):
        photograph(tmp_path / "loose" / f"{number}.png", number)
    album = album_of(tmp_path / "loose")
    assert (list(album.files), list(album.names)) == (["0.png", "1.png", "2.png"], [])
    assert list(album.subset(np.array([1])).files) == ["1.png"]
    with pytest.raises(DataError, match=r"not known who is on.*folder of their own.*--person-column"):
        _ = album.persons
    folders(tmp_path / "named", {"Ann": 1, "Ben": 1})
    with pytest.raises(DataError, match=r"some of the folders say who .* name one kind"):
        album_of(tmp_path / "loose", tmp_path / "named")
    with pytest.raises(DataError, match=r"nowhere.*check the path"):
        album_of(tmp_path / "nowhere")


def test_faces_without_files_have_persons_all_the_same() -> None:
    album = read_album([FaceSource(data="procedural:persons=3,images=2")], CONFIG)
    assert album.files == [""] * 6
    # Numbers mean the same persons in the same source alone.
    assert album.names == [f"procedural:persons=3,images=2, person {number}" for number in range(3)]
    assert album.persons.tolist() == [0, 0, 1, 1, 2, 2]
    assert set(album.faces.attributes) == {"hair", "beard", "glasses"}


def test_the_second_reading_comes_from_the_cache_and_a_change_is_seen(tmp_path: Path) -> None:
    folders(tmp_path, {"Ann": 2, "Ben": 2})
    read: list[int] = []

    def track(pictures: Sequence[Any]) -> Sequence[Any]:
        read.append(len(pictures))
        return pictures

    source = [FaceSource(data=str(tmp_path))]
    first, second = (read_album(source, CONFIG, track) for _ in range(2))
    assert read == [4]
    assert (first.faces.images == second.faces.images).all()
    assert (first.persons == second.persons).all()
    assert (list(first.files), list(first.names)) == (list(second.files), list(second.names))

    place = list(first.files).index("Ben/Ben_0001.png")
    other = photograph(tmp_path / "Ben" / "Ben_0001.png", 99)
    os.utime(tmp_path / "Ben" / "Ben_0001.png", (2e9, 2e9))
    third = read_album(source, CONFIG, track)
    assert read == [4, 4]
    assert (third.faces.images[place] == other).all()
    assert not (first.faces.images[place] == other).all()


def numbered(persons: dict[str, int], ending: str = "jpg") -> list[str]:
    return [f"{name}/{name}_{n:04d}.{ending}" for name, count in persons.items() for n in range(1, count + 1)]


PERSONS = {"George_W._Bush": 4, "Ann": 3, "Ben": 1, "Cara": 12}


def listed(folds: int, each: int, seed: int) -> list[tuple[str, ...]]:
    """Lines of pairs, fold by fold; some name photographs that nobody has."""
    rng, names = np.random.default_rng(seed), list(PERSONS)
    lines: list[tuple[str, ...]] = []
    for _ in range(folds):
        for _ in range(each):
            name = names[rng.integers(4)]
            lines.append((name, *map(str, rng.integers(1, PERSONS[name] + 2, 2))))
        for _ in range(each):
            one, other = (names[i] for i in rng.choice(4, 2, replace=False))
            lines.append((one, str(rng.integers(1, 5)), other, str(rng.integers(1, 5))))
    return lines


@pytest.mark.parametrize(("folds", "each", "header"), [(3, 4, "3\t4"), (1, 6, "6"), (1, 2, "1 2")])
@pytest.mark.parametrize("seed", range(3))
def test_a_list_of_pairs_is_what_a_loop_reads(tmp_path: Path, folds: int, each: int, header: str, seed: int) -> None:
    files = [numbered(PERSONS)[i] for i in np.random.default_rng(seed).permutation(20)]
    lines = listed(folds, each, seed)
    path = tmp_path / "pairs.txt"
    path.write_text("\n".join([header, *("\t".join(line) for line in lines)]) + "\n")
    pairs, missing = read_pairs(path, files)

    expected, lost = [], []
    for number, line in enumerate(lines):
        one, n, other, m = line if len(line) == 4 else (line[0], line[1], line[0], line[2])
        wanted = [f"{one}/{one}_{int(n):04d}.jpg", f"{other}/{other}_{int(m):04d}.jpg"]
        if set(wanted) <= set(files):
            expected.append((*map(files.index, wanted), one == other, 1 + number // (2 * each)))
        else:
            lost.append(1 + number // (2 * each))
    found = zip(*(getattr(pairs, name).tolist() for name in ("first", "second", "same", "folds")), strict=True)
    assert (list(found), missing) == (expected, lost)
    assert pairs.photographs.tolist() == sorted({place for pair in expected for place in pair[:2]})


def test_pairs_of_some_folds(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("2 1\nAnn 1 2\nAnn 1 Ben 1\nCara 1 2\nCara 3 Ben 1\n")
    pairs, missing = read_pairs(path, numbered(PERSONS))
    assert missing == []
    second = pairs.of_folds([2])
    assert (second.same.tolist(), second.folds.tolist()) == ([True, False], [2, 2])
    assert second.first.tolist() == pairs.first[2:].tolist()
    assert len(pairs.of_folds([2, 1]).same) == 4
    with pytest.raises(DataError, match=r"no pair in the folds 7, 9: there are \[1 2\]"):
        pairs.of_folds([7, 9])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no list of pairs .*pairs.txt"),
        ("", "no list of pairs"),
        ("many\nAnn 1 2\nAnn 1 Ben 1\n", "no list of pairs .*'many'"),
        ("0\n", "no list of pairs .*first line is 0"),
        ("10 0\n", "no list of pairs .*first line is 10 0"),
        ("-1 -1\nAnn 1 2\nAnn 1 Ben 1\n", "no list of pairs .*first line is -1 -1"),
        ("1\nAnn 1 2\n", r"says 1 folds of 2 x 1 pairs and has 1 lines of pairs: is it whole\?"),
        ("1\nAnn 1 2\nAnn 1\n", "line 3: 'Ann 1' is no pair; write NAME n m or NAME n OTHER m"),
        ("1\nAnn one 2\nAnn 1 Ben 1\n", "line 2: 'Ann one 2' is no pair"),
        ("1\nCarra 1 2\nAnn 7 Ben 1\n", r"none of the 2 pairs of .*did you mean 'Cara/Cara_0001'\?"),
    ],
)
def test_a_damaged_list_is_told(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "pairs.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=told):
        read_pairs(path, numbered(PERSONS))


def test_faces_without_files_are_in_no_list(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("1\nAnn 1 2\nAnn 1 Ben 1\n")
    with pytest.raises(DataError, match="none of the 2 pairs"):
        read_pairs(path, ["", ""])


@pytest.mark.parametrize("seed", range(5))
def test_drawn_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    persons = rng.permutation(np.repeat(np.arange(8), [1, 2, 3, 4, 5, 1, 9, 2]))
    pairs = draw_pairs(persons, np.random.default_rng(seed), per_person=4)
    # Each pair of a person's once, and at most four of each: 1 + 3 + 4 + 4 + 4 + 1.
    assert (int(pairs.same.sum()), len(pairs.same)) == (17, 34)
    assert ((persons[pairs.first] == persons[pairs.second]) == pairs.same).all()
    assert (pairs.first != pairs.second).all()
    genuine = {frozenset(pair) for pair in zip(pairs.first[:17].tolist(), pairs.second[:17].tolist(), strict=True)}
    assert len(genuine) == 17
    assert pairs.same[:17].all()
    assert set(pairs.folds.tolist()) == {1}
    again = draw_pairs(persons, np.random.default_rng(seed), per_person=4)
    assert (pairs.first == again.first).all()
    assert (pairs.second == again.second).all()


@pytest.mark.parametrize("persons", [[0, 0, 0], [0, 1, 2], [0], []])
def test_no_pairs_can_be_drawn(persons: list[int]) -> None:
    whole = np.array(persons, dtype=np.int64)
    told = rf"{len(set(persons))} persons, {int(persons.count(0) > 1)} of them .* pairs need two persons, and one"
    with pytest.raises(DataError, match=told):
        draw_pairs(whole, np.random.default_rng(0))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_photographs_are_split(count: int) -> None:
    persons = np.random.default_rng(count).permutation(np.repeat(np.arange(4), [4, 5, 9, 4]))
    chosen, rest = split_photographs(persons, count, np.random.default_rng(0))
    assert sorted([*chosen.tolist(), *rest.tolist()]) == list(range(22))
    assert np.bincount(persons[chosen]).tolist() == [count] * 4
    assert (np.diff(chosen) > 0).all()
    assert (np.diff(rest) > 0).all()
    other, _ = split_photographs(persons, count, np.random.default_rng(1))
    assert chosen.tolist() != other.tolist()


def test_too_few_photographs_to_split() -> None:
    with pytest.raises(
        DataError, match=r"person 1 has 2 photographs: 2 to learn from leave none to test with; ask fewer"
    ):
        split_photographs(np.array([0, 0, 0, 1, 1]), 2, np.random.default_rng(0))
