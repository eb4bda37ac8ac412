"""Dealing one data set out to simulated clients.

What is dealt out are groups of images that must not be parted. Where the source knows persons a group is a person with all
images, in every partitioner but `iid`; otherwise it is one photograph, with all faces that were cut from it. A partitioner
says which client holds each group.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.errors import DataError
from common.faces import FaceDataset
from common.sections import SimulationConfig

LABEL = "label"  # partition-by for the class labels; any other name is an attribute's
MAX_DRAWS = 100


@dataclass(frozen=True)
class Groups:
    """What is dealt out, as whole as it is.

    of_image: int64 (N,), the group of each image. count: how many groups, G. what: their name in the plural. values: int64
    (G,), the place in `names` of each group's value of partition-by; both empty where nothing is named there.
    """

    of_image: np.ndarray
    count: int
    what: str
    values: np.ndarray
    names: np.ndarray

    def __len__(self) -> int:
        return self.count


def partition(dataset: FaceDataset, simulation: SimulationConfig, seed: int) -> list[np.ndarray]:
    """The image indices, int64 and ascending, of each of `simulation.num_clients` clients: disjoint, complete, none empty,
    fixed by the seed.

    Raises DataError where there is too little to deal out, or the faces do not have what `simulation.partitioner` goes by.
    """
    groups = _groups(dataset, simulation)
    if len(groups) < simulation.num_clients:
        raise DataError(
            f"{len(groups)} {groups.what} for {simulation.num_clients} clients: use more {groups.what} or fewer clients"
        )
    client_of = PARTITIONERS[simulation.partitioner](groups, simulation, np.random.default_rng(seed))
    owner = client_of[groups.of_image]
    return [np.flatnonzero(owner == client).astype(np.int64) for client in range(simulation.num_clients)]


def iid(groups: Groups, simulation: SimulationConfig, rng: np.random.Generator) -> np.ndarray:
    """Photographs dealt out at random, evenly to within one.

    On data with persons a person may then be at several clients. The promise for unit 'person' takes each person to be
    at one client only: with one person at k clients, `local` composes k times and `central` has k times the
    sensitivity, so the epsilon in the ledgers does not hold for that person. Use 'person' there.
    """
    shares = np.array_split(rng.permutation(len(groups)), simulation.num_clients)
    return _client_of(shares)


def by_person(groups: Groups, simulation: SimulationConfig, rng: np.random.Generator) -> np.ndarray:
    """Persons dealt out at random, evenly to within one person; all images of a person go to the same client."""
    return _in_turn(rng.permutation(len(groups)), simulation.num_clients)


def dirichlet(groups: Groups, simulation: SimulationConfig, rng: np.random.Generator) -> np.ndarray:
    """Each value of partition-by spread over the clients in proportions drawn from Dirichlet(alpha, ..., alpha).

    alpha is the measure of likeness of Hsu, Qi and Brown 2019 ("Measuring the effects of non-identical data
    distribution"): towards 0 one client holds a value, towards infinity all hold alike. Drawn for each value over the clients, and
    anew while a client is empty, as in Yurochkin et al. 2019 ("Bayesian nonparametric federated learning of neural
    networks"). Where MAX_DRAWS draws leave clients empty, each of those is given one random group, in the order of their
    numbers, by the client that then has most groups.
    """
    clients = simulation.num_clients
    for _ in range(MAX_DRAWS):
        client_of = np.empty(len(groups), dtype=np.int64)
        for value in range(len(groups.names)):
            members = rng.permutation(np.flatnonzero(groups.values == value))
            shares = rng.dirichlet(np.full(clients, simulation.dirichlet_alpha))
            client_of[members] = np.repeat(np.arange(clients), apportioned(len(members), shares))
        held = np.bincount(client_of, minlength=clients)
        if held.all():
            break
    for client in np.flatnonzero(held == 0):
        giver = int(np.argmax(held))
        client_of[rng.choice(np.flatnonzero(client_of == giver))] = client
        held[giver] -= 1
        held[client] += 1
    return client_of


def attribute(groups: Groups, simulation: SimulationConfig, rng: np.random.Generator) -> np.ndarray:
    """One value of partition-by a client, as where alpha goes to 0 in Hsu, Qi and Brown 2019, and no client without any.

    Each value gets one client, and each further client goes to the value with the most groups for each client it would then have (the
    highest averages of D'Hondt), so that the number of clients is proportional to the value's groups and never above it.
    Within a value groups are dealt out evenly to within one. Clients are numbered value by value. Raises DataError for
    fewer clients than values.
    """
    held = np.bincount(groups.values, minlength=len(groups.names))
    if simulation.num_clients < len(held):
        raise DataError(
            f"{simulation.num_clients} clients for {len(held)} values of {simulation.partition_by!r}, one value a client: use "
            f"num-clients = {len(held)} or more, an attribute with fewer values, or partitioner dirichlet"
        )
    clients = np.ones(len(held), dtype=np.int64)
    for _ in range(simulation.num_clients - len(held)):
        clients[np.argmax(held / (clients + 1))] += 1
    client_of = np.empty(len(groups), dtype=np.int64)
    for value, first in enumerate(np.cumsum(clients) - clients):
        members = rng.permutation(np.flatnonzero(groups.values == value))
        client_of[members] = first + _in_turn(np.arange(len(members)), int(clients[value]))
    return client_of


def power_law(groups: Groups, simulation: SimulationConfig, rng: np.random.Generator) -> np.ndarray:
    """Client k, counted from 0, holds a share of the groups proportional to (k + 1) to the power of minus the exponent.

    Shares are rounded by largest remainder; each client that this leaves without any gets one from the client that then
    has most.
    """
    clients = simulation.num_clients
    counts = apportioned(len(groups), np.arange(1.0, clients + 1) ** -simulation.power_law_exponent)
    while not counts.all():  # ends, since there are as many groups as clients
        counts[np.argmin(counts)] += 1
        counts[np.argmax(counts)] -= 1
    return _client_of(np.split(rng.permutation(len(groups)), np.cumsum(counts)[:-1]))


def apportioned(total: int, weights: np.ndarray) -> np.ndarray:
    """`total` in whole parts, int64, proportional to `weights` (K,), by largest remainder (Hamilton): each part is within one of exact.

    Of equal remainders the first is rounded up.
    """
    exact = total * (weights / weights.sum())
    parts: np.ndarray = np.floor(exact).astype(np.int64)
    rounded_up = np.argsort(parts - exact, kind="stable")[: total - int(parts.sum())]
    parts[rounded_up] += 1
    return parts


def values_of(dataset: FaceDataset, by: str) -> np.ndarray:
    """(N,) of int64 or text: the label, or the attribute called `by`, of each image. Raises DataError where there is none."""
    column = dataset.labels if by == LABEL and dataset.labels is not None else dataset.attributes.get(by)
    if column is None:
        known = [*dataset.attributes, *([LABEL] if dataset.labels is not None else [])]
        raise DataError(
            f"partition-by = {by!r}: these faces have {', '.join(known) or 'no attributes and no labels'}; name one of theirs, "
            "or give some with attributes = a CSV or 'utkface'"
        )
    return np.asarray(column)


def _groups(dataset: FaceDataset, simulation: SimulationConfig) -> Groups:
    if simulation.partitioner == "person" and dataset.persons is None:
        raise DataError(
            "partitioner 'person' on faces without persons: use 'iid', or put each person's images in a folder"
        )
    if simulation.partitioner != "iid" and dataset.persons is not None:
        of_image, what = dataset.persons, "persons"
    elif dataset.photographs is not None:
        of_image, what = dataset.photographs, "photographs"
    else:
        of_image, what = np.arange(len(dataset)), "images"
    count = int(of_image.max(initial=-1)) + 1
    if not simulation.partition_by:
        return Groups(of_image, count, what, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.str_))
    names, of_value = np.unique(values_of(dataset, simulation.partition_by), return_inverse=True)
    present, values = np.unique(_most_frequent(of_image, of_value), return_inverse=True)
    return Groups(of_image, count, what, values.astype(np.int64), names[present])


def _most_frequent(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(G,): the value that each group has most often; of equally frequent ones the least."""
    pairs, counts = np.unique(np.stack([groups, values]), axis=1, return_counts=True)
    order = np.lexsort((pairs[1], -counts, pairs[0]))
    first_of_group = np.unique(pairs[0, order], return_index=True)[1]
    return np.asarray(pairs[1, order][first_of_group])


def _client_of(shares: list[np.ndarray]) -> np.ndarray:
    """(G,) from the groups of each client."""
    client_of = np.empty(sum(map(len, shares)), dtype=np.int64)
    for client, share in enumerate(shares):
        client_of[share] = client
    return client_of


def _in_turn(order: np.ndarray, clients: int) -> np.ndarray:
    """(G,): group order[i] at client i modulo `clients`."""
    client_of = np.empty(len(order), dtype=np.int64)
    client_of[order] = np.arange(len(order)) % clients
    return client_of


PARTITIONERS: dict[str, Callable[[Groups, SimulationConfig, np.random.Generator], np.ndarray]] = {
    "iid": iid,
    "person": by_person,
    "dirichlet": dirichlet,
    "attribute": attribute,
    "power-law": power_law,
}
