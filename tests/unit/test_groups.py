"""Which group a face is of is learned from some persons and judged by others."""

import numpy as np
import pytest
import torch

from common.errors import DataError
from common.evaluation import groups as groups_module
from common.evaluation.groups import MAX_GROUPS, halves, tell_groups, too_small


def test_no_person_is_on_both_sides_of_the_classifier() -> None:
    persons = np.repeat(np.arange(40), 3)
    groups = np.where(persons < 10, "few", "many")
    groups[::7] = ""
    learned, judged = halves(groups, persons, seed=0)
    assert not set(persons[learned]) & set(persons[judged])
    assert sorted([*learned, *judged]) == np.flatnonzero(groups != "").tolist()
    assert len(set(persons[learned][groups[learned] == "few"])) == 5
    learned, judged = halves(groups, None, seed=0)
    assert abs(len(learned) - len(judged)) <= 2


def test_groups_of_one_person_are_named() -> None:
    groups, persons = np.array(["a", "a", "b", "b", "c", "a", ""]), np.array([0, 0, 1, 2, 3, 4, 5])
    assert too_small(groups, persons) == {"c": 1}
    assert too_small(np.array(["a", "a", "b", "b"]), np.array([0, 0, 1, 2])) == {"a": 2}
    assert too_small(groups, None) == {"c": 1}


def test_the_classifier_tells_who_is_bright(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "_STEPS", 30)
    rng = np.random.default_rng(0)
    bright = rng.random(200) < 0.5
    images = rng.integers(0, 100, (200, 1, 28, 28)) + 120 * bright[:, None, None, None]
    pictures, groups = torch.from_numpy(images.astype(np.uint8)), np.where(bright, "day", "night")
    said, none = tell_groups(pictures[:100], groups[:100], [pictures[100:], pictures[:0]], seed=0)
    assert (said == groups[100:]).mean() > 0.95
    assert len(none) == 0


def test_what_cannot_be_learned_is_refused() -> None:
    groups, images = np.array(["a", "a", "b", "b"]), torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"not all images are \(1, 28, 28\)"):
        tell_groups(images, groups, [images[..., :14, :14]], seed=0)
    with pytest.raises(DataError, match="give 2 or more of each"):
        tell_groups(images[:1], groups[:1], [], seed=0)
    with pytest.raises(DataError, match=rf"21 groups, the limit is {MAX_GROUPS}"):
        halves(np.array([str(i) for i in range(21)] * 2), None, seed=0)
    with pytest.raises(DataError, match=r"group 'b' has 2 images and cannot be halved by person"):
        halves(groups, np.array([0, 1, 2, 2]), seed=0)
