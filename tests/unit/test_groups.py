"""Which group a face is of is learned from some persons and judged by others."""

import numpy as np
import pytest
import torch

from common.errors import DataError
from common.evaluation import groups as groups_module
from common.evaluation.groups import MAX_GROUPS, halves, hard_to_tell, tell_groups, too_small


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


def test_who_is_of_several_groups_is_one_of_each() -> None:
    groups, persons = np.tile(np.array(["no", "yes", "yes", "no"], "U5"), 50), np.repeat(np.arange(50), 4)
    assert too_small(groups, persons) == {}
    groups[:4] = ["", "", "beard", "no"]
    assert too_small(groups, persons) == {"beard": 1}
    assert too_small(np.array(["", ""]), np.array([0, 1])) == {}
    once = groups[groups != "beard"], persons[groups != "beard"]
    learned, judged = halves(*once, seed=0)
    assert not set(once[1][learned]) & set(once[1][judged])
    assert set(once[0][learned]) == set(once[0][judged]) == {"no", "yes"}


def test_a_group_that_nobody_begins_with_reaches_both_halves() -> None:
    groups, persons = np.full((20, 3), "no", dtype="U4"), np.repeat(np.arange(20), 3)
    groups[[4, 11], 2] = "yes"
    groups[[11, 12], 1] = "much"
    for seed in range(20):
        learned, judged = halves(groups.ravel(), persons, seed=seed)
        assert sorted([*learned, *judged]) == list(range(60))
        assert not set(persons[learned]) & set(persons[judged])
        assert set(groups.ravel()[learned]) == set(groups.ravel()[judged]) == {"no", "yes", "much"}
        assert abs(len(learned) - len(judged)) <= 12
    groups[11, 2] = "no"
    with pytest.raises(DataError, match=r"group 'yes' has 1 images, of 1 person\(s\), and cannot be halved"):
        halves(groups.ravel(), persons, seed=0)


def test_groups_that_are_told_wrongly_too_often() -> None:
    truth = np.repeat(["a", "b", "c"], [100, 20, 10])
    said = truth.copy()
    assert hard_to_tell(said, truth) == set()
    said[100:106] = "a"
    assert hard_to_tell(said, truth) == set(), "6 of 20 b are missed, and 6 of 106 a are none"
    said[106] = "a"
    assert hard_to_tell(said, truth) == {"b"}
    said[:6] = "c"
    assert hard_to_tell(said, truth) == {"b", "c"}, "all c are found, but 6 of 16 are none"
    said[-10:] = "a"
    assert hard_to_tell(said, truth) == {"b", "c"}


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
    with pytest.raises(DataError, match=r"group 'b' has 2 images, of 1 person\(s\), and cannot be halved by person"):
        halves(groups, np.array([0, 1, 2, 2]), seed=0)
