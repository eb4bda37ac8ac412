"""Faces out of plain arrays and other libraries: each by its own loading code, on small copies written here."""

import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from common.faces import FaceOptions, load_faces, procedural_faces, read_faces
from common.faces.source import QUIET
from common.sections import FaceSource

PERSONS, EACH = 4, 3
NAMES = ["Ann", "Bob", "Cid", "Dee"]


@pytest.fixture(scope="module")
def drawn():
    return procedural_faces(range(PERSONS), EACH, FaceOptions(32, 3), seed=1)


def load(data, size=32, channels=3, *, split="train", cache_dir=None, **source):
    return load_faces(FaceSource(data=data, **source), size, channels, split=split, cache_dir=cache_dir)


def colour_images(faces):
    return [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in faces.images]


# Arrays


@pytest.mark.parametrize("layout", ["channels first", "channels last", "grey", "grey with an axis"])
def test_plain_arrays_in_every_layout(tmp_path, drawn, layout):
    colour = drawn.images
    images = {
        "channels first": colour,
        "channels last": colour.transpose(0, 2, 3, 1),
        "grey": colour[:, 0],
        "grey with an axis": colour[:, 0, :, :, None],
    }[layout]
    np.savez(
        tmp_path / "faces.npz", images=images, labels=np.arange(12)[:, None], persons=np.array(NAMES)[drawn.persons]
    )
    faces = load(str(tmp_path / "faces.npz"))
    assert np.array_equal(faces.images, np.repeat(colour[:, :1], 3, axis=1) if "grey" in layout else colour)
    assert faces.labels.tolist() == list(range(12))
    assert faces.persons.tolist() == drawn.persons.tolist()
    assert load(str(tmp_path / "faces.npz"), 28, 1, crop=0.5).images.shape == (12, 1, 28, 28)


def test_arrays_named_as_in_medmnist_and_keras_have_two_splits(tmp_path, drawn):
    one, other = drawn.images[:7], drawn.images[7:]
    np.savez(
        tmp_path / "med.npz",
        train_images=one,
        train_labels=np.ones((7, 1), np.uint8),
        test_images=other,
        val_images=one,
    )
    np.savez(
        tmp_path / "keras.npz", x_train=one, y_train=np.ones(7, np.uint8), x_test=other, y_test=np.zeros(5, np.int32)
    )
    for name, labels in (("med", None), ("keras", [0] * 5)):
        path = str(tmp_path / f"{name}.npz")
        train, test = load(path), load(path, split="test")
        assert np.array_equal(train.images, one)
        assert np.array_equal(test.images, other)
        assert train.labels.tolist() == [1] * 7
        assert (test.labels if labels is None else test.labels.tolist()) == labels


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"pictures": np.zeros((2, 8, 8), np.uint8)}, "no array called"),
        ({"images": np.zeros((2, 8, 8), np.float32)}, "must be uint8"),
        ({"images": np.zeros((2, 8), np.uint8)}, "must be uint8"),
        ({"images": np.zeros((2, 4, 8, 8), np.uint8)}, "must be uint8"),
        ({"images": np.zeros((0, 8, 8), np.uint8)}, "must be uint8"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros(3, np.int64)}, "labels"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.array([0, -1])}, "labels"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros((2, 14), np.int64)}, "labels"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "persons": np.zeros(2)}, "persons"),
        ({"images": np.array([{}, {}], dtype=object)}, "pickles"),
    ],
)
def test_arrays_that_are_no_faces_are_refused(tmp_path, arrays, why):
    np.savez(tmp_path / "faces.npz", **arrays)
    with pytest.raises(DataError, match=why):
        load(str(tmp_path / "faces.npz"))


def test_saved_faces_keep_what_is_known_and_can_be_labelled_anew(tmp_path, drawn):
    path = tmp_path / "faces.npz"
    whole = type(drawn)(drawn.images, drawn.persons, drawn.persons, {"name": np.array(NAMES)[drawn.persons]})
    share = whole.subset(np.array([11, 0, 6, 7]))
    share.save(path)
    faces = load(str(path))
    for column in ("images", "persons", "labels"):
        assert np.array_equal(getattr(faces, column), getattr(share, column))
    assert faces.attributes["name"].tolist() == ["Dee", "Ann", "Cid", "Cid"]
    with pytest.warns(UserWarning, match="1 skipped"):
        named = load(str(path), label_column="name", label_values="Cid,Dee")
    assert (named.labels.tolist(), named.persons.tolist()) == ([1, 0, 0], [1, 0, 0])


def test_attributes_are_for_folders(tmp_path, drawn):
    drawn.save(tmp_path / "faces.npz")
    for data in (str(tmp_path / "faces.npz"), "procedural:persons=2", "skimage:lfw_subset"):
        with pytest.raises(DataError, match="folders of images only"):
            load(data, attributes="utkface")
    with pytest.raises(DataError, match="use none"):
        load("procedural:persons=2", detect="largest")


# scikit-image and scikit-learn


def test_the_faces_of_scikit_image_without_what_is_no_face():
    pixels = pytest.importorskip("skimage.data").lfw_subset()
    faces = load("skimage:lfw_subset", 28, 1)
    assert (faces.images.shape, faces.persons, faces.labels) == ((100, 1, 28, 28), None, None)
    means = np.abs(faces.images.mean((1, 2, 3)) / 255 - pixels[:100].mean((1, 2)))
    assert means.max() < 0.01
    with pytest.raises(DataError, match="only skimage:lfw_subset"):
        load("skimage:astronaut")
    with pytest.raises(DataError, match="no split"):
        load("skimage:lfw_subset", split="test")


@pytest.fixture
def lfw_home(tmp_path, drawn):
    """What scikit-learn leaves after downloading and unpacking."""
    lfw = pytest.importorskip("sklearn.datasets._lfw")
    home = tmp_path / "lfw_home"
    for target in lfw.TARGETS:
        home.mkdir(exist_ok=True)
        (home / target.filename).write_text("")
    for i, image in enumerate(colour_images(drawn)):
        name = NAMES[drawn.persons[i]] + "_Smith"
        (home / "lfw_funneled" / name).mkdir(parents=True, exist_ok=True)
        image.resize((250, 250)).save(home / "lfw_funneled" / name / f"{name}_{i % EACH + 1:04d}.jpg")
    return tmp_path


def test_lfw_has_the_persons_and_pictures_of_fetch_lfw_people(lfw_home):
    datasets = pytest.importorskip("sklearn.datasets")
    whole = (slice(0, 250), slice(0, 250))
    theirs = datasets.fetch_lfw_people(
        data_home=lfw_home, download_if_missing=False, color=True, resize=None, slice_=whole
    )
    faces = load(f"sklearn:lfw,data_home={lfw_home}")
    assert faces.num_persons == len(theirs.target_names) == PERSONS
    sizes = (250, 250)
    for person in range(PERSONS):
        mine = faces.images[faces.persons == person]
        small = [
            np.asarray(
                Image.fromarray(np.rint(image * 255).astype(np.uint8)).resize((32, 32), Image.Resampling.LANCZOS)
            )
            for image in theirs.images[theirs.target == person]
        ]
        assert theirs.images.shape[1:3] == sizes
        apart = np.array([[np.abs(a.transpose(1, 2, 0) - b.astype(float)).mean() for b in small] for a in mine])
        assert len(mine) == len(small) == EACH
        assert apart.min(1).max() < 3  # each has its own among theirs, which come shuffled


def test_lfw_is_unpacked_by_scikit_learn_where_only_its_archive_is_there(lfw_home):
    unpacked = lfw_home / "lfw_home" / "lfw_funneled"
    with tarfile.open(lfw_home / "lfw_home" / "lfw-funneled.tgz", "w:gz") as archive:
        archive.add(unpacked, "lfw_funneled")
    before = load(f"sklearn:lfw,data_home={lfw_home}")
    shutil.rmtree(unpacked)
    after = load(f"sklearn:lfw,data_home={lfw_home}")
    assert np.array_equal(after.images, before.images)
    assert after.persons.tolist() == before.persons.tolist()
    assert unpacked.is_dir()


def test_a_photograph_taken_out_of_lfw_is_gone_although_scikit_learn_cached_it(lfw_home):
    datasets = pytest.importorskip("sklearn.datasets")
    datasets.fetch_lfw_people(data_home=lfw_home, download_if_missing=False)
    source, cache = f"sklearn:lfw,data_home={lfw_home}", lfw_home / "cache"
    assert len(load(source, cache_dir=cache)) == PERSONS * EACH
    (lfw_home / "lfw_home" / "lfw_funneled" / "Ann_Smith" / "Ann_Smith_0001.jpg").unlink()
    assert len(load(source, cache_dir=cache)) == PERSONS * EACH - 1
    assert len(list(cache.iterdir())) == 1


def test_olivetti_is_what_fetch_olivetti_faces_gives(tmp_path):
    datasets, joblib = pytest.importorskip("sklearn.datasets"), pytest.importorskip("joblib")
    pixels = np.random.default_rng(0).integers(0, 256, (400, 4096), dtype=np.uint8)
    joblib.dump(pixels, tmp_path / "olivetti_py3.pkz", compress=6)
    theirs = datasets.fetch_olivetti_faces(data_home=tmp_path, download_if_missing=False)
    faces = load(f"sklearn:olivetti,data_home={tmp_path}", 64, 1)
    assert faces.persons.tolist() == theirs.target.tolist()
    assert np.array_equal(faces.images[:, 0], pixels.reshape(400, 64, 64).transpose(0, 2, 1))
    assert np.abs(faces.images[:, 0] / 255 - theirs.images).max() < 1e-6
    (tmp_path / "olivetti_py3.pkz").write_bytes(b"damaged")
    with pytest.raises(DataError, match="olivetti"):
        load(f"sklearn:olivetti,data_home={tmp_path}", 64, 1)


@pytest.mark.parametrize("data", ["sklearn:digits", "sklearn:lfw,home=/x", "sklearn:", "sklearn:lfw,data_home="])
def test_what_scikit_learn_has_no_faces_for(data):
    pytest.importorskip("sklearn")
    with pytest.raises(DataError):
        load(data)


# Hugging Face


@pytest.fixture
def rows(drawn, monkeypatch, tmp_path):
    """The drawn faces as a data set, in a home of its own, with no network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "who": datasets.Value("string"),
            "age": datasets.Value("int32"),
            "gender": datasets.ClassLabel(names=["male", "female"]),
            "box": datasets.Array2D((1, 2), "float32"),
        }
    )
    table = {
        "photo": colour_images(drawn),
        "who": [NAMES[person] + " " * (i % 2) for i, person in enumerate(drawn.persons)],
        "age": (20 + drawn.persons).tolist(),
        "gender": (drawn.persons % 2).tolist(),
        "box": [[[0.0, 1.0]]] * len(drawn),
    }
    return datasets.Dataset.from_dict(table, features=features)


def save(rows, path, how):
    if how == "parquet":
        path.mkdir()
        rows.to_parquet(str(path / "train.parquet"))
    else:
        rows.save_to_disk(str(path))
    return path


@pytest.mark.parametrize("how", ["saved", "parquet"])
def test_hugging_face_rows_with_attributes_labels_and_persons(tmp_path, drawn, rows, how):
    data = f"hf:{save(rows, tmp_path / 'faces', how)}"
    faces = load(data)
    assert np.array_equal(faces.images, drawn.images)
    assert faces.persons is faces.labels is None
    assert {name: column[3] for name, column in faces.attributes.items()} == {
        "who": "Bob",
        "age": "21",
        "gender": "female",
    }
    labelled = load(f"{data},image=photo,person=who", label_column="gender", label_values="female,male")
    assert labelled.persons.tolist() == drawn.persons.tolist()
    assert labelled.labels.tolist() == (1 - drawn.persons % 2).tolist()
    assert set(labelled.attributes) == {"age", "gender"}
    assert not (tmp_path / "hf-cache").exists(), "a copy of the photographs is left behind"


def test_a_folder_of_images_as_hugging_face_reads_it(tmp_path, drawn, rows):
    for i, image in enumerate(colour_images(drawn)):
        path = tmp_path / "faces" / ("test" if i % EACH == 0 else "train") / NAMES[drawn.persons[i]] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    reading = read_faces(FaceSource(data=f"hf:{tmp_path / 'faces'},person=label"), 32, 3)
    kept = [i for i in range(len(drawn)) if i % EACH]
    assert np.array_equal(reading.faces.images, drawn.images[kept])
    assert reading.faces.persons.tolist() == drawn.persons[kept].tolist()
    assert reading.names[0] == "train/Ann/01.png"
    assert len(load(f"hf:{tmp_path / 'faces'}", split="test")) == PERSONS
    assert len(load(f"hf:{tmp_path / 'faces'},split=test")) == PERSONS
    assert not (tmp_path / "hf-cache").exists()


def test_splits_on_disk_and_rows_without_an_image_or_a_person(tmp_path, drawn, rows):
    datasets = pytest.importorskip("datasets")
    holes = rows.select(range(5)).to_list()
    holes[1]["photo"] = None
    holes[2]["photo"] = {"bytes": b"no image", "path": "broken.png"}
    holes[3]["who"] = None
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(holes, features=rows.features), "test": rows.select([7])}
    )
    splits.save_to_disk(str(tmp_path / "both"))
    reading = read_faces(FaceSource(data=f"hf:{tmp_path / 'both'},person=who"), 32, 3)
    assert np.array_equal(reading.faces.images, drawn.images[[0, 4]])
    assert len(reading.skipped) == 3
    assert "broken.png" in [name for name, _ in reading.skipped]
    assert np.array_equal(load(f"hf:{tmp_path / 'both'}", split="test").images, drawn.images[[7]])
    with pytest.raises(DataError, match="it has train, test"):
        load(f"hf:{tmp_path / 'both'},split=dev")


def test_a_row_taken_out_is_gone_from_the_cache(tmp_path, rows):
    cache, path = tmp_path / "cache", tmp_path / "faces"
    save(rows, path, "parquet")
    assert len(load(f"hf:{path}", cache_dir=cache)) == 12
    assert len(load(f"hf:{path},person=who", cache_dir=cache)) == 12
    assert len(list(cache.iterdir())) == 2
    rows.select(range(11)).to_parquet(str(path / "train.parquet"))
    assert len(load(f"hf:{path}", cache_dir=cache)) == 11
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        (",person=whom", "did you mean 'who'"),
        (",image=who", "one of photo"),
        (",person=box", "persons are text"),
        (",persons=who", "did you mean 'person'"),
        (",split=dev", "it has train"),
        (",split", "write split="),
        ("/nowhere", "no folder"),
    ],
)
def test_what_hugging_face_rows_lack_is_said(tmp_path, rows, extra, why):
    with pytest.raises(DataError, match=why):
        load(f"hf:{save(rows, tmp_path / 'faces', 'saved')}{extra}")


def test_offline_a_name_at_the_hub_is_an_error_and_nothing_is_asked(rows):
    with pytest.raises(DataError, match="check the path or the name"):
        load("hf:nobody/faces-of-nobody")


# Flower's data sets


def flower_s_data_sets():
    os.environ.update(QUIET)  # read when it is imported
    return pytest.importorskip("flwr_datasets", reason="flwr-datasets is not installed")


@pytest.mark.parametrize("how", ["saved", "parquet"])
def test_parts_are_those_of_flower_s_federated_dataset(tmp_path, drawn, rows, how):
    federated = flower_s_data_sets()
    path = save(rows, tmp_path / "faces", how)
    parts = [load(f"flwr-datasets:{path},partitions=5,partition={part}") for part in range(5)]
    everything = sorted(image.tobytes() for part in parts for image in part.images)
    assert everything == sorted(image.tobytes() for image in drawn.images)
    assert not (tmp_path / "hf-cache").exists()
    if how == "parquet":
        theirs = federated.FederatedDataset(
            dataset=str(path), partitioners={"train": 5}, cache_dir=str(tmp_path / "theirs")
        )
        for number, part in enumerate(parts):
            images = [np.asarray(image).transpose(2, 0, 1) for image in theirs.load_partition(number)["photo"]]
            assert np.array_equal(part.images, np.stack(images))


def test_parts_by_a_column(tmp_path, drawn, rows):
    flower_s_data_sets()
    data = f"flwr-datasets:{save(rows, tmp_path / 'faces', 'saved')}"
    for part in range(4):
        faces = load(f"{data},by=age,partition={part},person=who")
        assert (len(faces), faces.num_persons, set(faces.attributes["age"])) == (EACH, 1, {str(20 + part)})
    for wrong, why in (
        ("partition=1", "of how many"),
        ("partitions=3", "say partition"),
        ("partitions=0,partition=0", "no number"),
        ("partitions=3,partition=3", "count from 0"),
        ("partitions=13,partition=1", "count from 0"),
        ("partitions=3,by=age,partition=1", "partitions=4"),
        ("by=aged,partition=1", "did you mean 'age'"),
        ("partitions=5,partition=1,person=who", "in other parts"),
    ):
        with pytest.raises(DataError, match=why):
            load(f"{data},{wrong}")


# What is not installed, and what is not told


def test_a_package_that_is_not_installed_is_named():
    sources = {
        "skimage": "skimage:lfw_subset",
        "sklearn": "sklearn:lfw",
        "datasets": "hf:somebody/faces",
        "flwr_datasets": "flwr-datasets:somebody/faces,partitions=2,partition=0",
    }
    code = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in sources)
    code += "from common.errors import DataError\nfrom common.faces import load_faces\nfrom common.sections import FaceSource\n"
    for data in sources.values():
        code += (
            f"try:\n    load_faces(FaceSource(data={data!r}), 32, 3)\nexcept DataError as error:\n    print(error)\n"
        )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    told = done.stdout.splitlines()
    assert len(told) == len(sources), done.stderr
    for line, (name, data) in zip(told, sources.items(), strict=True):
        assert line.startswith(f"{data} needs {name} (")
        assert line.endswith("pip install 'visard[data]'")


def test_reading_a_folder_imports_none_of_these_libraries_and_they_are_told_to_be_quiet(tmp_path):
    Image.new("L", (30, 30)).save(tmp_path / "face.png")
    code = (
        "import os\nfrom common.errors import DataError\nfrom common.faces import load_faces\n"
        "from common.sections import FaceSource\n"
        f"load_faces(FaceSource(data={str(tmp_path)!r}), 32, 3)\n"
        "print({'skimage', 'sklearn', 'datasets', 'flwr_datasets', 'huggingface_hub'} & set(sys.modules))\n"
        "try:\n    load_faces(FaceSource(data='hf:nobody/faces'), 32, 3)\nexcept DataError:\n    pass\n"
        "print([os.environ.get(name) for name in ('HF_HUB_DISABLE_TELEMETRY', 'FLWR_TELEMETRY_ENABLED')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + code],
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if "TELEMETRY" not in key} | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout.splitlines() == ["set()", "['1', '0']"], done.stderr
