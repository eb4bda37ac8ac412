"""What a CSV or UTKFace's names say of photographs, and what labels and persons come of it."""

import csv
import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import DataError
from common.faces import SkippedImages, load_faces, read_faces
from common.faces.attributes import AGE_GROUPS, read_table, utkface
from common.sections import FaceSource


def put(root, **brightness):
    """Images named by file, each of one brightness: a picture is told by its pixels."""
    for name, value in brightness.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (30, 40), value).save(path.with_suffix(".png"))
    return root


def table(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def load(root, csv_path="", **source):
    return load_faces(FaceSource(data=str(root), attributes=csv_path, **source), 28, 1)


def brightness(faces):
    return faces.images[:, 0, 5, 5].tolist()


# Reading a CSV

CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]), max_size=8).map(
    str.strip
)
NAME = st.text("abcdefgh_ ,;\"'\n\té", min_size=1, max_size=6).map(str.strip).filter(bool)


@st.composite
def tables(draw):
    columns = draw(st.lists(NAME.filter(lambda name: name != "file"), max_size=4, unique=True))
    files = draw(
        st.lists(st.from_regex(r"[a-z]{1,3}(/[a-z]{1,3})?\.jpg", fullmatch=True), min_size=1, max_size=6, unique=True)
    )
    rows = [{"file": file, **{column: draw(CELL) for column in columns}} for file in files]
    return columns, rows


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tables(), st.randoms(use_true_random=False), st.sampled_from(",;\t"), st.booleans(), st.sampled_from(["\n", "\r\n"])
)
def test_any_order_of_rows_and_columns_says_the_same(tmp_path, content, random, delimiter, mark, newline):
    columns, rows = content
    shuffled, order = random.sample(rows, len(rows)), random.sample(["file", *columns], len(columns) + 1)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, order, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(shuffled)
    path = tmp_path / "a.csv"
    table(path, text.getvalue(), "utf-8-sig" if mark else "utf-8")
    read = read_table(path, "file")
    assert set(read.columns) == set(columns)
    assert set(read.rows) == {row["file"] for row in rows}
    for column in columns:
        assert read.column(column, [row["file"] for row in rows]) == [row[column] for row in rows]


@pytest.mark.parametrize("delimiter", list(",;\t"))
def test_free_text_does_not_mislead_about_the_delimiter(tmp_path, delimiter):
    lines = [["file", "said"], ["a.png", "one; two; three"], ["b.png", "1,5"]]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(lines)
    table(tmp_path / "a.csv", text.getvalue())
    assert read_table(tmp_path / "a.csv", "file").column("said", ["a.png", "b.png"]) == ["one; two; three", "1,5"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ("file,age\n", "no rows"),
        ("image,age\na.png,3\n", "file-column"),
        ("fil,age\na.png,3\n", "did you mean 'fil'"),
        ("file,age,age\na.png,3,4\n", "twice"),
        ("file,file\na.png,b.png\n", "twice"),
        ("file,age\na.png,3,4\n", "line 2: 3 cells"),
        ("file,age\na.png\n", "line 2: 1 cells"),
        ("file,age\na.png,3\n./a.png,3\n", "second row for a.png"),
        ("file,age\n,3\n", "no file name"),
        ('file,age\na.png,"3\n', "cannot be read"),
        ("file,age\na.png,\0\n", "null"),
        ("file,age\na.png," + "x" * 1001 + "\n", "1000 characters"),
    ],
)
def test_what_is_wrong_with_a_csv_is_said(tmp_path, text, why):
    table(tmp_path / "a.csv", text)
    with pytest.raises(DataError, match=why):
        read_table(tmp_path / "a.csv", "file")


def test_a_csv_that_is_not_there_or_no_utf_8_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "none.csv", "file")
    table(tmp_path / "a.csv", "file,name\na.png,Zoë\n", "latin-1")
    with pytest.raises(DataError, match="UTF-8"):
        read_table(tmp_path / "a.csv", "file")


# A CSV and the images it describes


def test_columns_become_attributes_of_images_and_of_persons_in_folders(tmp_path):
    root = put(tmp_path / "images", ann__1=10, ann__2=20, bob__1=30)
    path = table(tmp_path / "a.csv", "age;image;smile\n7;bob\\1.png;no\n5;ann/1.png;yes\n6;./ann/2.png; no \n")
    faces = load(root, path, file_column="image")
    assert brightness(faces) == [10, 20, 30]
    assert faces.persons.tolist() == [0, 0, 1]
    assert {name: column.tolist() for name, column in faces.attributes.items()} == {
        "age": ["5", "6", "7"],
        "smile": ["yes", "no", "no"],
    }
    assert faces.labels is None


def test_a_csv_among_the_images_is_none_of_them(tmp_path):
    root = put(tmp_path / "images", a=10, b=20)
    path = table(root / "a.csv", "file,age\na.png,1\nb.png,2\n")
    reading = read_faces(FaceSource(data=str(root), attributes=path), 28, 1)
    assert (reading.names, reading.skipped, reading.remarks) == (("a.png", "b.png"), (), ())
    asked = FaceSource(data=str(root), attributes=path, person_column="age")
    assert read_faces(asked, 28, 1).skipped == ()


def test_rows_without_a_file_and_files_without_a_row_are_counted(tmp_path):
    root = put(tmp_path / "images", a=10, b=20, c=30)
    path = table(tmp_path / "a.csv", "file,who,age\na.png,Ann,1\nb.png,,2\nx.png,Ann,3\n")
    with pytest.warns(SkippedImages, match="3 images read, 1 skipped.*1 kept with a remark.*c.png"):
        faces = load(root, path)
    assert faces.attributes["age"].tolist() == ["1", "2", ""]
    with pytest.warns(SkippedImages, match="1 images read, 3 skipped"):
        faces = load(root, path, person_column="who")
    assert (brightness(faces), faces.persons.tolist()) == ([10], [0])
    asked = FaceSource(data=str(root), attributes=path, label_column="age", label_values="2,1")
    reading = read_faces(asked, 28, 1)
    assert reading.faces.labels.tolist() == [1, 0]
    assert reading.skipped == (("x.png", "a row of a.csv without a file"), ("c.png", "no row in a.csv"))
    with pytest.raises(DataError, match="names none of the files"):
        load(root, table(tmp_path / "b.csv", "file,age\nimages/a.png,1\n"))
    with pytest.raises(DataError, match="did you mean 'who'"):
        load(root, path, person_column="whom")


def test_labels_are_the_places_in_the_list(tmp_path):
    values = ["b", "a", "", "c", "a", "A"]
    root = put(tmp_path / "images", **{f"i{i}": 10 * (i + 1) for i in range(6)})
    lines = [f"i{i}.png,{value}" for i, value in enumerate(values)]
    path = table(tmp_path / "a.csv", "\n".join(["file,kind", *lines]))
    with pytest.warns(SkippedImages, match="4 images read, 2 skipped: 2 has another kind"):
        faces = load(root, path, label_column="kind", label_values="c, a,b")
    wanted = [(10 * (i + 1), ["c", "a", "b"].index(v)) for i, v in enumerate(values) if v in ("a", "b", "c")]
    assert list(zip(brightness(faces), faces.labels.tolist(), strict=True)) == wanted
    assert faces.labels.dtype == np.int64
    with pytest.raises(DataError, match="such as"):
        load(root, path, label_column="kind", label_values="x,y")
    with pytest.raises(DataError, match="did you mean 'kind'"):
        load(root, path, label_column="kin", label_values="a,b")
    with pytest.raises(DataError, match="no attributes"):
        load(root, label_column="kind", label_values="a,b")


# Persons


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["Ann", " Ann", "Ann ", "ann", "Bob", "Eve\t"]), min_size=4, max_size=4), st.randoms())
def test_no_person_of_a_csv_is_ever_two(tmp_path_factory, said, random):
    """Whatever folders their images lie in: same name, same person; other name, other person."""
    tmp_path = tmp_path_factory.mktemp("persons")
    files = ["a.png", "x/b.png", "y/c.png", "y/z/d.png"]
    root = put(tmp_path / "images", a=10, x__b=20, y__c=30, y__z__d=40)
    lines = [f'"{file}","{name}"' for file, name in zip(files, said, strict=True)]
    random.shuffle(lines)
    faces = load(root, table(tmp_path / "a.csv", "\n".join(["file,who", *lines])), person_column="who")
    assert brightness(faces) == [10, 20, 30, 40]
    for i in range(4):
        for j in range(4):
            assert (faces.persons[i] == faces.persons[j]) == (said[i].strip() == said[j].strip())
    assert "who" not in faces.attributes


def test_a_person_in_two_folders_is_one_and_folders_may_be_of_many(tmp_path):
    root = put(tmp_path / "images", neutral__1=10, neutral__2=20, smiling__1=30, smiling__2=40)
    path = table(tmp_path / "a.csv", "file,who\nneutral/1.png,A\nneutral/2.png,B\nsmiling/1.png,A\nsmiling/2.png,B\n")
    assert load(root, path, person_column="who").persons.tolist() == [0, 1, 0, 1]
    assert load(root, path).persons.tolist() == [0, 0, 1, 1]


def test_a_folder_of_one_person_written_two_ways_is_refused(tmp_path):
    root = put(tmp_path / "images", ann__1=10, ann__2=20, bob__1=30, bob__2=40)
    path = table(tmp_path / "a.csv", "file,who\nann/1.png,Ann\nann/2.png,ann\nbob/1.png,Bob\nbob/2.png,Bob\n")
    with pytest.raises(DataError, match="'Ann' and 'ann'"):
        load(root, path, person_column="who")


def test_who_else_is_on_a_photograph_is_not_taken_for_its_person(tmp_path):
    root = put(tmp_path / "images", ann__1=10, bob__1=30)
    with pytest.raises(DataError, match="use detect largest"):
        load(root, detect="all")


# UTKFace


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("100_0_0_20170112215240346.jpg.chip.jpg", ("100", "male", "White", "60+")),
        ("1_1_4_20161219154956384.jpg", ("1", "female", "Others", "0-12")),
        ("26_1_3_20170116171048641.jpg.chip", ("26", "female", "Indian", "20-39")),
        ("61_1_20170109142408075.jpg.chip.jpg", None),  # in the set itself, without a race
        ("39_1_20170116174525125.jpg.chip.jpg", None),
        ("20_2_1_20170116174525125.jpg.chip.jpg", None),
        ("20_1_5_20170116174525125.jpg.chip.jpg", None),
        ("face.jpg", None),
    ],
)
def test_utkface_names(name, found):
    said = utkface(name)
    assert (said and tuple(said[key] for key in ("age", "gender", "race", "age_group"))) == found


def test_every_age_is_in_one_group_and_the_group_says_so():
    for age in range(121):
        group = utkface(f"{age}_0_0_1.jpg")["age_group"]
        low, _, high = group.rstrip("+").partition("-")
        assert int(low) <= age <= int(high or 999)
    assert list(AGE_GROUPS.values()) == sorted(AGE_GROUPS.values())


def test_utkface_by_name_with_labels(tmp_path):
    root = tmp_path / "images"
    for folder in ("part1", "part2"):
        (root / folder).mkdir(parents=True)
    for name, value in {"part1/30_0_1_1.jpg": 40, "part2/50_1_2_2.jpg": 90, "part2/9_1_3.jpg": 120}.items():
        Image.new("L", (30, 40), value).save(root / name)
    with pytest.warns(SkippedImages, match=r"2 images read, 1 skipped.*9_1_3\.jpg"):
        faces = load(root, "utkface", label_column="race", label_values="Asian,Black")
    assert (faces.labels.tolist(), faces.persons) == ([1, 0], None)
    assert faces.attributes["gender"].tolist() == ["male", "female"]
    with pytest.raises(DataError, match="say no persons"):
        load(root, "utkface", person_column="age")
    with pytest.raises(DataError, match="no file is named"):
        load(put(tmp_path / "others", a=10), "utkface")
