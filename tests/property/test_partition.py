"""Whatever the data: the clients' shares are disjoint and complete, fixed by the seed, and 'person' splits nobody."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from common.faces import FaceDataset
from simulations.partition import PARTITIONERS, partition


@st.composite
def datasets(draw):
    raw = draw(st.lists(st.integers(0, 20), min_size=1, max_size=80))
    persons = np.unique(raw, return_inverse=True)[1].astype(np.int64)
    return FaceDataset(np.zeros((len(raw), 1, 1, 1), np.uint8), persons)


@given(datasets(), st.sampled_from(sorted(PARTITIONERS)), st.integers(0, 2**32), st.data())
def test_disjoint_complete_and_fixed_by_the_seed(dataset, how, seed, data):
    most = len(dataset) if how == "iid" else dataset.num_persons
    num_clients = data.draw(st.integers(1, most))
    shares = partition(dataset, num_clients, how, seed)
    assert len(shares) == num_clients
    assert all(share.dtype == np.int64 and share.size for share in shares)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(dataset)))
    again = partition(dataset, num_clients, how, seed)
    assert all(np.array_equal(one, other) for one, other in zip(shares, again, strict=True))


@given(datasets(), st.integers(0, 2**32), st.data())
def test_person_splits_nobody_and_deals_persons_evenly(dataset, seed, data):
    num_clients = data.draw(st.integers(1, dataset.num_persons))
    held = [set(dataset.persons[share].tolist()) for share in partition(dataset, num_clients, "person", seed)]
    assert sum(len(persons) for persons in held) == dataset.num_persons
    assert max(map(len, held)) - min(map(len, held)) <= 1


@given(datasets(), st.integers(0, 2**32), st.data())
def test_iid_deals_images_evenly(dataset, seed, data):
    num_clients = data.draw(st.integers(1, len(dataset)))
    sizes = [len(share) for share in partition(dataset, num_clients, "iid", seed)]
    assert max(sizes) - min(sizes) <= 1


@given(datasets(), st.sampled_from(sorted(PARTITIONERS)), st.integers(1, 30))
def test_too_little_to_deal_out_is_an_error(dataset, how, more):
    most = len(dataset) if how == "iid" else dataset.num_persons
    with pytest.raises(DataError):
        partition(dataset, most + more, how, 0)


def test_seeds_and_requests_that_make_no_sense():
    dataset = FaceDataset(np.zeros((50, 1, 1, 1), np.uint8), np.arange(50))
    for how in PARTITIONERS:
        one, other = (partition(dataset, 5, how, seed) for seed in (0, 1))
        assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
        with pytest.raises(DataError):
            partition(dataset, 0, how, 0)
    with pytest.raises(DataError, match="partitioner"):
        partition(dataset, 5, "dirichlet", 0)
    with pytest.raises(DataError, match="without persons"):
        partition(FaceDataset(dataset.images), 5, "person", 0)
