"""How many clients a run's aggregator needs, and how many of them it may be lied to by. All of it is public."""

import math

AGGREGATORS = ("mean", "median", "trimmed-mean", "krum", "multi-krum")
_KRUM = ("krum", "multi-krum")


def liars(poisoners: float, clients: int) -> int:
    """f, the clients of a round that may lie: floor(poisoners * clients), where 0.29 of 100 are 29."""
    return math.floor(poisoners * clients + 1e-9)


def least_clients(aggregator: str, poisoners: float) -> int:
    """The number of clients from which on `aggregator` does what it is for, whatever more of them answer.

    A median of two is their mean. A trimmed mean and Krum guard against nobody where f = 0 though poisoners is not, and
    Krum needs n > 2f + 2 (Blanchard et al. 2017). poisoners: in [0, 0.49].
    """
    if aggregator == "mean":
        return 1
    if aggregator == "median":
        return 3
    least = math.ceil(1 / poisoners - 1e-9) if poisoners else 1
    if aggregator in _KRUM:
        # From 2 / (1 - 2 poisoners) on there are always enough.
        upto = math.ceil(2 / (1 - 2 * poisoners)) + 1
        short = [n for n in range(1, upto) if not enough_for_krum(n, liars(poisoners, n))]
        least = max([least, *(n + 1 for n in short)])
    return least


def enough_for_krum(clients: int, lying: int) -> bool:
    """Whether n > 2f + 2."""
    return clients > 2 * lying + 2
