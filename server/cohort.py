"""Which of the connected clients are asked in a round."""

import hashlib
from collections.abc import Iterable


def cohort_of(nodes: Iterable[int], size: int, run_id: str, server_round: int) -> list[int]:
    """`size` of these nodes, ascending; all of them where there are no more, or where size is 0.

    Rendezvous hashing (Thaler and Ravishankar 1998): the nodes with the smallest SHA-256 of run, round and node id. Asked again
    after a crash it is the same choice; a node that is gone has its place taken by one other, and the rest stay.
    Over the rounds all are asked alike often. The choice is public: nothing is gained in privacy from not being asked.
    """

    def weight(node: int) -> bytes:
        return hashlib.sha256(f"visard cohort 1\n{run_id} {server_round} {node}".encode()).digest()

    return sorted(sorted(nodes, key=weight)[: size or None])
