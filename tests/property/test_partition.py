"""Whatever the data: the clients' shares are disjoint and complete, fixed by the seed, and only 'iid' parts a person."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from common.faces import FaceDataset
from common.sections import SimulationConfig
from simulations.partition import PARTITIONERS, apportioned, partition

BY_VALUE = ("dirichlet", "attribute")


def asked(how: str, num_clients: int, **rest: object) -> SimulationConfig:
    by = {"partition_by": "colour"} if how in BY_VALUE else {}
    return SimulationConfig(partitioner=how, num_clients=num_clients, **(by | rest))  # type: ignore[arg-type]


def faces(count: int, persons=None, colours=None, labels=None) -> FaceDataset:
    return FaceDataset(
        np.zeros((count, 1, 1, 1), np.uint8),
        None if persons is None else np.asarray(persons, dtype=np.int64),
        None if labels is None else np.asarray(labels, dtype=np.int64),
        {} if colours is None else {"colour": np.array(colours, dtype=np.str_)},
    )


@st.composite
def datasets(draw, persons: bool | None = None):
    raw = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3)), min_size=1, max_size=80))
    known = draw(st.booleans()) if persons is None else persons
    numbers = np.unique([person for person, _ in raw], return_inverse=True)[1] if known else None
    return faces(len(raw), numbers, [("", "blue", "red", "green")[c] for _, c in raw])


def num_groups(dataset: FaceDataset, how: str) -> int:
    return len(dataset) if how == "iid" or dataset.persons is None else dataset.num_persons


def usual_colour(dataset: FaceDataset, person: int) -> str:
    counts = Counter(dataset.attributes["colour"][dataset.persons == person].tolist())
    return min(counts, key=lambda colour: (-counts[colour], colour))


def colours_dealt(dataset: FaceDataset) -> list[str]:
    """The value of each group."""
    if dataset.persons is None:
        return dataset.attributes["colour"].tolist()
    return [usual_colour(dataset, person) for person in range(dataset.num_persons)]


@given(datasets(), st.sampled_from(sorted(PARTITIONERS)), st.integers(0, 2**32), st.data())
def test_disjoint_complete_and_fixed_by_the_seed(dataset, how, seed, data):
    if how == "person" and dataset.persons is None:
        return
    least = len(set(colours_dealt(dataset))) if how == "attribute" else 1
    num_clients = data.draw(st.integers(least, num_groups(dataset, how)))
    alpha, exponent = data.draw(st.sampled_from([1e-3, 0.5, 1e3])), data.draw(st.floats(0, 10))
    simulation = asked(how, num_clients, dirichlet_alpha=alpha, power_law_exponent=exponent)
    shares = partition(dataset, simulation, seed)
    assert len(shares) == num_clients
    assert all(share.dtype == np.int64 and share.size and (np.diff(share) > 0).all() for share in shares)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(dataset)))
    again = partition(dataset, simulation, seed)
    assert all(np.array_equal(one, other) for one, other in zip(shares, again, strict=True))
    if how != "iid" and dataset.persons is not None:
        held = [set(dataset.persons[share].tolist()) for share in shares]
        assert sum(map(len, held)) == dataset.num_persons


@given(datasets(persons=True), st.integers(0, 2**32), st.data())
def test_person_deals_persons_evenly(dataset, seed, data):
    num_clients = data.draw(st.integers(1, dataset.num_persons))
    shares = partition(dataset, asked("person", num_clients), seed)
    held = [len(set(dataset.persons[share].tolist())) for share in shares]
    assert max(held) - min(held) <= 1


@given(datasets(), st.integers(0, 2**32), st.data())
def test_iid_deals_images_evenly(dataset, seed, data):
    num_clients = data.draw(st.integers(1, len(dataset)))
    sizes = [len(share) for share in partition(dataset, asked("iid", num_clients), seed)]
    assert max(sizes) - min(sizes) <= 1


@given(datasets(), st.integers(0, 2**32), st.data())
def test_attribute_gives_each_client_one_value_and_clients_by_the_values_sizes(dataset, seed, data):
    colours = colours_dealt(dataset)
    held = Counter(colours)
    num_clients = data.draw(st.integers(len(held), len(colours)))
    clients_of, sizes = Counter(), {}
    for share in partition(dataset, asked("attribute", num_clients), seed):
        groups = share if dataset.persons is None else sorted(set(dataset.persons[share].tolist()))
        (colour,) = {colours[group] for group in groups}
        clients_of[colour] += 1
        sizes.setdefault(colour, []).append(len(groups))
    assert set(clients_of) == set(held)
    assert all(max(of_value) - min(of_value) <= 1 for of_value in sizes.values())
    # No client would do more good at another value: a value that has a second client is no poorer with it.
    for giver in held:
        for taker in held:
            if clients_of[giver] > 1:
                assert held[giver] / clients_of[giver] >= held[taker] / (clients_of[taker] + 1)


@given(st.integers(1, 400), st.integers(1, 20), st.floats(0, 10), st.integers(0, 2**32))
def test_power_law_is_exact_up_to_rounding(count, num_clients, exponent, seed):
    if num_clients > count:
        return
    shares = partition(faces(count), asked("power-law", num_clients, power_law_exponent=exponent), seed)
    sizes = [len(share) for share in shares]
    weights = [k**-exponent for k in range(1, num_clients + 1)]
    exact = [count * weight / math.fsum(weights) for weight in weights]
    lent = 0
    for size, ideal in zip(sizes, exact, strict=True):
        if size == 1 and ideal < 1:
            lent += 1
        else:
            assert size < ideal + 1 + 1e-9
    assert all(size > ideal - 1 - lent - 1e-9 for size, ideal in zip(sizes, exact, strict=True))
    assert sum(sizes) == count
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(0, 1000), st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30))
def test_apportioned_is_the_method_of_largest_remainder(total, weights):
    parts = apportioned(total, np.array(weights))
    exact = [total * weight / sum(weights) for weight in weights]
    assert parts.sum() == total
    assert all(abs(part - ideal) < 1 + 1e-6 for part, ideal in zip(parts, exact, strict=True))
    up = [ideal % 1 for part, ideal in zip(parts, exact, strict=True) if part > ideal]
    down = [ideal % 1 for part, ideal in zip(parts, exact, strict=True) if part <= ideal]
    assert not up or not down or min(up) >= max(down) - 1e-6 or max(down) > 1 - 1e-6


def test_dirichlet_is_as_uneven_as_its_alpha_says():
    """The share of a value at a client is Beta(a, (K-1) a): variance (K-1) / (K^2 (K a + 1)); over many values near that."""
    clients, values, each = 5, 100, 200
    dataset = faces(values * each, colours=np.repeat([f"{v:03d}" for v in range(values)], each))
    found = {}
    for alpha in (0.05, 0.5, 5.0, 500.0):
        shares = partition(dataset, asked("dirichlet", clients, dirichlet_alpha=alpha), 0)
        at = np.stack([np.bincount(share // each, minlength=values) for share in shares]) / each
        found[alpha] = float(((at - 1 / clients) ** 2).mean())
        assert found[alpha] == pytest.approx((clients - 1) / clients**2 / (clients * alpha + 1), rel=0.25, abs=1e-5)
    assert sorted(found.values(), reverse=True) == [found[alpha] for alpha in sorted(found)]


def test_dirichlet_leaves_no_client_empty_where_drawing_again_cannot_help():
    # One value and alpha near 0: one client would hold everything, however often it is drawn.
    dataset = faces(30, colours=["blue"] * 30)
    sizes = [len(share) for share in partition(dataset, asked("dirichlet", 6, dirichlet_alpha=1e-6), 3)]
    assert sorted(sizes) == [1, 1, 1, 1, 1, 25]
    whole = partition(faces(6, colours=["blue"] * 6), asked("dirichlet", 6, dirichlet_alpha=1e-6), 3)
    assert [len(share) for share in whole] == [1] * 6


def test_labels_deal_out_as_attributes_do_and_a_person_counts_by_most_images():
    dataset = faces(8, persons=[0, 0, 0, 1, 1, 2, 2, 3], labels=[1, 1, 0, 1, 0, 1, 1, 0])
    shares = partition(dataset, asked("attribute", 2, partition_by="label"), 0)
    # Person 1 has one image of each label: the first counts.
    assert [share.tolist() for share in shares] == [[3, 4, 7], [0, 1, 2, 5, 6]]


@given(datasets(), st.sampled_from(sorted(PARTITIONERS)), st.integers(1, 30))
def test_too_little_to_deal_out_is_an_error(dataset, how, more):
    with pytest.raises(DataError):
        partition(dataset, asked(how, num_groups(dataset, how) + more), 0)


@pytest.mark.parametrize("how", sorted(PARTITIONERS))
def test_another_seed_deals_out_otherwise(how):
    dataset = faces(50, range(50), ["blue", "red"] * 25)
    one, other = (partition(dataset, asked(how, 5), seed) for seed in (0, 1))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_the_faces_do_not_have():
    dataset = faces(50, colours=[f"{i}" for i in range(50)])
    with pytest.raises(DataError, match="without persons"):
        partition(dataset, asked("person", 5), 0)
    with pytest.raises(DataError, match=r"'age': these faces have colour; name one"):
        partition(dataset, asked("dirichlet", 5, partition_by="age"), 0)
    with pytest.raises(DataError, match=r"'label': these faces have colour"):
        partition(dataset, asked("attribute", 5, partition_by="label"), 0)
    with pytest.raises(DataError, match=r"5 clients for 50 values of 'colour'.*num-clients = 50"):
        partition(dataset, asked("attribute", 5), 0)


@given(st.lists(st.integers(0, 8), min_size=2, max_size=40), st.sampled_from(["iid", "power-law"]), st.integers(0, 99))
def test_the_faces_of_one_photograph_stay_together(raw, how, seed):
    photographs = np.unique(raw, return_inverse=True)[1].astype(np.int64)
    faces = FaceDataset(np.zeros((len(raw), 1, 1, 1), np.uint8), photographs=photographs)
    simulation = SimulationConfig(data="", partitioner=how, num_clients=min(3, int(photographs.max()) + 1))
    shares = partition(faces, simulation, seed)
    held = [set(photographs[share].tolist()) for share in shares]
    assert sum(map(len, held)) == len(set.union(*held)) == photographs.max() + 1
