"""load_faces: each kind of source, what is wrong with sources, and the cache."""

import gzip
import os
import shutil
import stat
import warnings

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from common.faces import FaceDataset, FaceOptions, SkippedImages, load_faces, read_faces
from common.faces.gallery import Gallery
from common.faces.preprocessing import NoFaceFound
from common.privacy.units import PrivacyUnit
from common.sections import FaceSource


def load(path, size=28, channels=1, *, split="train", cache_dir=None, **source):
    return load_faces(FaceSource(data=str(path), **source), size, channels, split=split, cache_dir=cache_dir)


def put(folder, name, brightness=100, mode="L"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (30, 40), brightness).save(folder / name)


@pytest.fixture
def people(tmp_path):
    root = tmp_path / "people"
    put(root / "ann", "1.png", 10)
    put(root / "ann", "2.jpg", 20)
    put(root / "bob", "1.pgm", 30)
    return root


def test_a_folder_of_person_folders(people):
    faces = load(people)
    assert faces.persons.tolist() == [0, 0, 1]
    assert faces.labels is None
    assert faces.images[:, 0, 5, 5].tolist() == [10, 20, 30]


def test_a_folder_of_images_has_no_persons(tmp_path):
    put(tmp_path, "b.png", 60)
    put(tmp_path, "a.png", (50, 50, 50), "RGB")
    faces = load(tmp_path)
    assert faces.persons is None
    assert faces.images[:, 0, 5, 5].tolist() == [50, 60]


def test_hidden_names_are_ignored_without_a_word(people):
    put(people / ".cache", "1.png")
    put(people / "ann", ".hidden.png")
    (people / ".DS_Store").write_bytes(b"x")
    assert len(load(people)) == 3


def test_bad_files_are_counted_in_one_warning(people):
    for number in range(20):
        (people / "ann" / f"bad{number:02d}.jpg").write_bytes(b"")
    (people / "bob" / "notes.txt").write_text("not a face")
    (people / "list.csv").write_text("name,age")
    put(people / "only_bad", "x.png")
    (people / "only_bad" / "x.png").write_bytes((people / "only_bad" / "x.png").read_bytes()[:50])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        faces = load(people)
    assert faces.persons.tolist() == [0, 0, 1]
    assert [warning.category for warning in caught] == [SkippedImages]
    message = str(caught[0].message)
    assert "3 images read, 23 skipped" in message
    assert message.count("bad") <= 5


def test_links_that_loop_do_not_hang(people):
    (people / "ann" / "self").symlink_to("self")
    (people / "loop").symlink_to(people)
    (people / "again").symlink_to(people / "ann")
    (people / "bob" / "up").symlink_to(people)
    os.mkfifo(people / "ann" / "pipe")
    with pytest.warns(SkippedImages):
        faces = load(people)
    assert faces.num_persons == 2  # 'again' sorts before 'ann' and is the same person
    assert len(faces) == 3


@pytest.mark.parametrize(
    "content", [{}, {"notes.txt": b"no face"}, {"face.jpg": b""}, {"ann/face.jpg": b""}, {"ann/": b""}]
)
def test_sources_without_an_image_are_errors(tmp_path, content):
    for name, data in content.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_bytes(data)
    with pytest.raises(DataError, match="no image"):
        load(tmp_path)


def test_images_that_all_turn_out_damaged_are_an_error(tmp_path):
    put(tmp_path, "face.png")
    (tmp_path / "face.png").write_bytes((tmp_path / "face.png").read_bytes()[:60])
    with pytest.raises(DataError, match="1 skipped"):
        load(tmp_path)


def test_missing_and_mistaken_sources_are_explained(people, tmp_path):
    with pytest.raises(DataError, match="no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="hold only folders"):
        load(tmp_path)
    with pytest.raises(DataError, match="split"):
        load(people, split="test")
    with pytest.raises(DataError, match="split"):
        load(people, split="dev")
    put(people, "loose.png")
    with pytest.raises(DataError, match=r"loose\.png"):
        load(people)


# IDX


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


@pytest.fixture
def digits(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 6), ("t10k", 4)):
        images = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8)))
    return tmp_path


def test_idx_splits_labels_and_pixels(digits):
    train, test = (load(digits, split=split) for split in ("train", "test"))
    assert train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert train.persons is None
    assert len(test) == 4
    raw = gzip.decompress((digits / "train-images-idx3-ubyte.gz").read_bytes())
    assert train.images.tobytes() == raw[16:]
    assert load(digits, 32, 3).images.shape == (6, 3, 32, 32)


def test_damaged_idx_is_an_error(digits):
    images, labels = digits / "train-images-idx3-ubyte.gz", digits / "train-labels-idx1-ubyte"
    raw, packed = gzip.decompress(images.read_bytes()), images.read_bytes()
    huge = raw[:4] + (2**31).to_bytes(4, "big") + raw[8:]
    flat = raw[:8] + bytes(4) + raw[12:]
    for wrong in (raw[:-1], raw + b"x", raw[:10], b"", b"\0\0\x0d\3" + raw[4:], idx(np.zeros(6, np.uint8)), huge, flat):
        images.write_bytes(gzip.compress(wrong))
        with pytest.raises(DataError):
            load(digits)
    for wrong in (packed[:-9], packed[:40] + bytes(4) + packed[44:], b"plain", packed[:-4] + bytes(4)):
        images.write_bytes(wrong)
        with pytest.raises(DataError):
            load(digits)
    images.write_bytes(packed)
    labels.write_bytes(idx(np.zeros(5, np.uint8)))
    with pytest.raises(DataError, match="5 labels"):
        load(digits)
    labels.unlink()
    with pytest.raises(DataError, match="labels"):
        load(digits)


# .npz


def test_npz_must_fit_the_options(tmp_path):
    path = tmp_path / "faces.npz"
    FaceDataset(np.zeros((2, 1, 28, 28), np.uint8)).save(path)
    assert len(load(path)) == 2
    for size, channels in ((32, 1), (28, 3)):
        with pytest.raises(DataError, match="28 pixels"):
            load(path, size, channels)


# The cache


def test_the_cache_answers_and_is_the_owners_alone(people, tmp_path):
    cache = tmp_path / "state" / "cache"
    first = load(people, cache_dir=cache)
    (entry,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    FaceDataset(255 - first.images, first.persons).save(entry)  # so that it is seen who answers
    again = load(people, cache_dir=cache)
    assert np.array_equal(again.images, 255 - first.images)
    entry.write_bytes(b"damaged")
    assert np.array_equal(load(people, cache_dir=cache).images, first.images)


def test_a_changed_source_is_read_anew_and_the_old_copy_deleted(people, tmp_path):
    cache = tmp_path / "cache"
    load(people, cache_dir=cache)
    load(people, crop=0.5, cache_dir=cache)
    assert len(list(cache.iterdir())) == 2
    (cache / f".{next(cache.iterdir()).name}.7.tmp").write_bytes(b"half of a copy")
    load(people, cache_dir=cache)
    (people / "ann" / "1.png").unlink()
    assert load(people, 32, cache_dir=cache).persons.tolist() == [0, 1]
    (entry,) = cache.iterdir()  # at whatever size, with whatever crop: no copy has the photograph
    assert load(people, cache_dir=cache).persons.tolist() == [0, 1]
    assert len(list(cache.iterdir())) == 2
    assert entry.exists()
    path = people / "bob" / "1.pgm"
    before = path.stat()
    put(people / "bob", "1.pgm", 77)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert load(people, cache_dir=cache).images[1, 0, 5, 5] == 77


def test_no_copy_outlives_a_source_that_is_gone_or_empty(people, tmp_path):
    cache, other = tmp_path / "cache", tmp_path / "other"
    put(other, "1.png")
    load(other, cache_dir=cache)
    (kept,) = cache.iterdir()
    load(people, cache_dir=cache)
    shutil.rmtree(people / "ann")
    (people / "bob" / "1.pgm").unlink()
    with pytest.raises(DataError, match="no image"):
        load(people, cache_dir=cache)
    assert list(cache.iterdir()) == [kept]
    shutil.rmtree(other)
    with pytest.raises(DataError, match="no folder"):
        load(other, cache_dir=cache)
    assert not list(cache.iterdir())


def test_splits_and_procedural_faces_are_cached_apart(digits):
    cache = digits / "cache"
    sizes = [len(load(digits, split=split, cache_dir=cache)) for split in ("train", "test", "train")]
    assert sizes == [6, 4, 6]
    for seed in (0, 1, 0):
        load(f"procedural:persons=2,images=1,seed={seed}", cache_dir=cache)
    assert len(list(cache.iterdir())) == 4


@pytest.fixture
def table(people):
    path = people.with_name("who.csv")
    path.write_text("file,who,mood\nann/1.png,Ann,glad\nann/2.jpg,Ann,sad\nbob/1.pgm,Bob,glad\n")
    return path


def test_what_a_csv_no_longer_says_is_in_no_copy(people, table, tmp_path):
    cache = tmp_path / "cache"
    asked = {"attributes": str(table), "person_column": "who", "cache_dir": cache}
    assert len(load(people, **asked)) == 3
    load(people, crop=0.5, **asked)
    assert len(list(cache.iterdir())) == 2
    table.write_text(table.read_text().replace("ann/1.png,Ann,glad\n", ""))
    with pytest.warns(SkippedImages, match="no row"):
        faces = load(people, **asked)
    assert faces.images[:, 0, 5, 5].tolist() == [20, 30]
    assert len(list(cache.iterdir())) == 1
    load(people, cache_dir=cache)
    assert len(list(cache.iterdir())) == 1  # how it was with the CSV is gone
    with pytest.warns(SkippedImages, match="no row"):
        load(people, **asked)
    table.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        load(people, **asked)
    assert not list(cache.iterdir())


def test_every_way_of_reading_has_a_copy_of_its_own(people, table, tmp_path):
    """Each change of a field of FaceSource changes the outcome here; none may be answered with another's copy."""
    table.write_text(
        "image;file;who;name;mood\n"
        + "\n".join(
            f"{file};{file};{who};{name};{mood}"
            for file, who, name, mood in [
                ("ann/1.png", "A", "C", "glad"),
                ("ann/2.jpg", "A", "C", "sad"),
                ("bob/1.pgm", "B", "C", "glad"),
            ]
        )
    )
    asked = {"attributes": str(table), "person_column": "who", "label_column": "mood", "label_values": "sad,glad"}
    others = [
        {},
        {"person_column": "name"},
        {"person_column": "name", "file_column": "image"},
        {"label_values": "glad,sad"},
        {"label_values": "C", "label_column": "name"},
        {"crop": 0.5},
    ]
    cache = tmp_path / "cache"
    for size in (28, 32):
        for other in others:
            plain, kept = load(people, size, **(asked | other)), load(people, size, cache_dir=cache, **(asked | other))
            again = load(people, size, cache_dir=cache, **(asked | other))
            for faces in (kept, again):
                for column in ("images", "persons", "labels"):
                    assert np.array_equal(getattr(faces, column), getattr(plain, column))
                assert {n: c.tolist() for n, c in faces.attributes.items()} == {
                    n: c.tolist() for n, c in plain.attributes.items()
                }
    assert len(list(cache.iterdir())) == 2 * len(others)


def test_plain_arrays_are_cached_and_forgotten(tmp_path):
    cache, path = tmp_path / "cache", tmp_path / "plain.npz"
    np.savez(path, images=np.full((3, 40, 30), 7, np.uint8))
    assert len(load(path, cache_dir=cache)) == len(load(path, cache_dir=cache)) == 3
    np.savez(path, images=np.full((2, 40, 30), 9, np.uint8))
    assert load(path, cache_dir=cache).images.max() == 9
    assert len(list(cache.iterdir())) == 1
    path.unlink()
    with pytest.raises(DataError):
        load(path, cache_dir=cache)
    assert not list(cache.iterdir())


# The account


def test_the_account_names_every_face_and_everything_left_out(people):
    (people / "ann" / "3.png").write_bytes(b"damaged")
    (people / "notes.txt").write_text("not a face")
    reading = read_faces(FaceSource(data=str(people)), 28, 1)
    assert reading.names == ("ann/1.png", "ann/2.jpg", "bob/1.pgm")
    assert [name for name, _ in reading.skipped] == ["notes.txt", "ann/3.png"]
    with pytest.warns(SkippedImages, match="2 skipped"):
        assert np.array_equal(load(people).images, reading.faces.images)


def test_several_faces_of_a_photograph_have_its_name_label_and_attributes():
    several = {"a": 1, "b": 3, "c": 0, "d": 2}

    def decode(name, options):
        if not several[name]:
            raise NoFaceFound("no face found")
        return [np.full((1, 28, 28), 10 * several[name] + i, np.uint8) for i in range(several[name])]

    gallery = Gallery("here", "abcd", decode, "abcd", None, np.arange(4), {"kind": np.array(["k", "l", "m", "n"])})
    reading = gallery.cut(FaceOptions(28, 1, detect="all"))
    assert "".join(reading.names) == "abbbdd"
    assert reading.faces.images[:, 0, 0, 0].tolist() == [10, 30, 31, 32, 20, 21]
    assert reading.faces.labels.tolist() == [0, 1, 1, 1, 3, 3]
    assert "".join(reading.faces.attributes["kind"]) == "klllnn"
    assert reading.skipped == (("c", "no face found"),)
    assert reading.faces.photographs.tolist() == [0, 1, 1, 1, 2, 2]
    assert len(reading.faces.units(PrivacyUnit.IMAGE)) == 3


def test_what_was_cut_from_one_photograph_stays_one_unit_when_it_is_saved(tmp_path):
    saved = FaceDataset(np.zeros((5, 1, 28, 28), np.uint8), photographs=np.array([0, 0, 1, 2, 2]))
    saved.save(tmp_path / "faces.npz")
    for _ in range(2):  # read, then from the cache
        again = load(tmp_path / "faces.npz", cache_dir=tmp_path / "cache")
        assert [unit.tolist() for unit in again.units(PrivacyUnit.IMAGE)] == [[0, 1], [2], [3, 4]]


def test_no_copy_of_plain_arrays_outlives_a_saved_file_in_their_place(tmp_path):
    path, cache = tmp_path / "faces.npz", tmp_path / "cache"
    np.savez(path, images=np.zeros((3, 40, 40), np.uint8))
    load(path, cache_dir=cache)
    assert list(cache.glob("*.npz"))
    FaceDataset(np.zeros((2, 1, 28, 28), np.uint8)).save(path)
    load(path, cache_dir=cache)
    assert not list(cache.glob("*.npz"))


def test_arrays_without_a_person_are_nobody_s(tmp_path):
    np.savez(tmp_path / "faces.npz", images=np.zeros((4, 28, 28), np.uint8), persons=np.array(["a", "", "b ", " "]))
    with pytest.warns(SkippedImages, match="2 has no person"):
        assert load(tmp_path / "faces.npz").persons.tolist() == [0, 1]
