"""Dealing one data set out to simulated clients."""

import numpy as np

from common.errors import DataError
from common.faces import FaceDataset


def partition(dataset: FaceDataset, num_clients: int, how: str, seed: int) -> list[np.ndarray]:
    """The image indices, int64 and ascending, of each client: disjoint, complete, none empty, fixed by the seed.

    how: a key of PARTITIONERS. Raises DataError for an unknown one and where there is too little to deal out.
    """
    if how not in PARTITIONERS:
        raise DataError(f"partitioner {how!r}: use one of {sorted(PARTITIONERS)}")
    if num_clients < 1:
        raise DataError(f"{num_clients} clients: deal out to 1 or more")
    return PARTITIONERS[how](dataset, num_clients, np.random.default_rng(seed))


def iid(dataset: FaceDataset, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Images dealt out at random, evenly to within one.

    On data with persons a person may then be at several clients. The promise for unit 'person' takes each person to be
    at one client only: with one person at k clients, `local` composes k times and `central` has k times the
    sensitivity, so the epsilon in the ledgers does not hold for that person. Use 'person' there.
    """
    if len(dataset) < num_clients:
        raise DataError(f"{len(dataset)} images for {num_clients} clients: use more images or fewer clients")
    shares = np.array_split(rng.permutation(len(dataset)), num_clients)
    return [np.sort(share).astype(np.int64) for share in shares]


def by_person(dataset: FaceDataset, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Persons dealt out at random, evenly to within one person; all images of a person go to the same client."""
    if dataset.persons is None:
        raise DataError(
            "partitioner 'person' on faces without persons: use 'iid', or put each person's images in a folder"
        )
    if dataset.num_persons < num_clients:
        raise DataError(f"{dataset.num_persons} persons for {num_clients} clients: use more persons or fewer clients")
    client_of = np.empty(dataset.num_persons, dtype=np.int64)
    client_of[rng.permutation(dataset.num_persons)] = np.arange(dataset.num_persons) % num_clients
    owner = client_of[dataset.persons]
    return [np.flatnonzero(owner == client).astype(np.int64) for client in range(num_clients)]


PARTITIONERS = {"iid": iid, "person": by_person}
