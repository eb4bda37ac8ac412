"""Who holds what: the counts against counting by hand, and a picture for any names and any number of clients."""

import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from common.faces import FaceDataset
from simulations.show import FACES, MAX_VALUES, OTHERS, draw, holdings, told_by


def faces(count: int, channels: int = 3, **rest) -> FaceDataset:
    rng = np.random.default_rng(0)
    return FaceDataset(rng.integers(0, 256, (count, channels, 8, 8), dtype=np.uint8), **rest)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def test_counts_are_those_by_hand() -> None:
    dataset = faces(
        7,
        persons=np.array([0, 0, 1, 2, 2, 2, 3]),
        attributes={"hat": np.array(["no", "yes", "no", "", "no", "yes", "no"])},
    )
    held = holdings(dataset, [np.array([0, 1, 2]), np.array([3, 4, 5, 6])], "hat")
    assert held.values == ["", "no", "yes"]
    assert [(c.images, c.persons, c.values) for c in held.clients] == [
        (3, 2, {"": 0, "no": 2, "yes": 1}),
        (4, 2, {"": 1, "no": 2, "yes": 1}),
    ]
    with pytest.raises(DataError, match="'shoes': these faces have hat"):
        holdings(dataset, [np.arange(7)], "shoes")


def test_labels_have_their_names_and_are_told_apart_unasked() -> None:
    dataset = faces(4, labels=np.array([2, 0, 2, 2]))
    assert told_by(dataset, "") == "label"
    assert told_by(dataset, "hat") == "hat"
    assert told_by(faces(4), "") == ""
    shares = [np.arange(4)]
    assert holdings(dataset, shares, "label").clients[0].values == {"0": 1, "2": 3}
    assert holdings(dataset, shares, "label", ["a", "b", "c"]).clients[0].values == {"a": 1, "c": 3}


def test_the_rarest_of_many_values_are_counted_together() -> None:
    column = np.array([f"{i:02d}" for i in range(30) for _ in range(2 if i % 3 == 0 else 1)])
    dataset = faces(len(column), attributes={"age": column})
    held = holdings(dataset, np.array_split(np.arange(len(column)), 3), "age")
    assert held.values == [*(f"{i:02d}" for i in range(0, 3 * (MAX_VALUES - 1), 3)), OTHERS]
    assert sum(client.values[OTHERS] for client in held.clients) == len(column) - 2 * (MAX_VALUES - 1)
    assert all(sum(client.values.values()) == client.images for client in held.clients)


@pytest.mark.parametrize(("clients", "rows"), [(1, 1), (2, 2), (20, 20), (23, 20)])
def test_the_picture_has_a_row_for_each_client_up_to_twenty(tmp_path: Path, clients: int, rows: int) -> None:
    path = tmp_path / "held.png"
    dataset = faces(3 * clients, persons=np.arange(3 * clients) // 3)
    shares = np.array_split(np.arange(3 * clients), clients)
    draw(path, dataset, shares, holdings(dataset, shares, ""), "title")
    height = pixels(path).shape[0]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    draw(path, dataset, shares[:1], holdings(dataset, shares[:1], ""), "title")
    assert height - pixels(path).shape[0] == pytest.approx((rows - 1) * 66, abs=1)


@pytest.mark.parametrize("name", ["$x$", "$", "_hidden", "[bold]", "a\nb", "x" * 500, "\\frac{", ""])
def test_any_name_can_be_drawn(tmp_path: Path, name: str) -> None:
    dataset = faces(6, channels=1, attributes={"$a_": np.array([name, "other"] * 3)})
    shares = [np.array([0, 1, 2]), np.array([3, 4, 5])]
    draw(tmp_path / "held.png", dataset, shares, holdings(dataset, shares, "$a_"), "$title")
    # Nine bars' colours stay apart from the grey of OTHERS, and the widest of names does not widen the picture.
    assert pixels(tmp_path / "held.png").shape[1] < 1400


def test_the_faces_beside_a_bar_are_its_client_s_own(tmp_path: Path) -> None:
    """Two clients with faces of one colour each: that colour is in its row, and in no other."""
    images = np.zeros((2 * FACES, 3, 8, 8), np.uint8)
    images[:FACES, 0] = 255
    images[FACES:, 2] = 255
    dataset = FaceDataset(images)
    shares = [np.arange(FACES), np.arange(FACES, 2 * FACES)]
    draw(tmp_path / "held.png", dataset, shares, holdings(dataset, shares, ""), "")
    shown = pixels(tmp_path / "held.png")
    red, blue = ((shown == colour).all(axis=2) for colour in ([255, 0, 0], [0, 0, 255]))
    assert red.sum() == pytest.approx(FACES * (66 * 0.92) ** 2, rel=0.05)
    assert red.sum() == pytest.approx(blue.sum(), rel=0.02)
    assert np.flatnonzero(red.any(axis=1)).max() < np.flatnonzero(blue.any(axis=1)).min()
