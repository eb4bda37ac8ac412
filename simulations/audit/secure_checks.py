"""What only a secure sum must keep: single masked vectors tell nothing, and a round is opened once."""

from itertools import pairwise

import numpy as np
from scipy import stats

from common.evaluation.release_tests import ReleaseTest, exact_test
from common.secure_messages import UnmaskRequest
from server.secure_sum import SumDeal
from simulations.audit.tap import Tap


def secure_tests(tap: Tap) -> list[ReleaseTest]:
    """Tests of all masked vectors that came over the wires, and of a second request to open the last round."""
    masked = [vectors for wire in tap.wires for vectors in wire.grid.masked.values()]
    if not masked:
        return []
    apart = [after[: len(before)] - before[: len(after)] for vectors in masked for before, after in pairwise(vectors)]
    return [
        _uniform_test("masked vectors: uniform", [word for vectors in masked for word in vectors]),
        # A mask that serves twice is gone from the difference.
        _uniform_test("masked vectors: uniform, less the round before", apart),
        *_second_opening(tap),
    ]


def _uniform_test(name: str, vectors: list[np.ndarray]) -> ReleaseTest:
    """Chi-square of the highest and of the lowest byte of each vector's words, the worst of all."""
    worst = 1.0
    for words in vectors:
        for shift in (0, 24):
            counts = np.bincount((words >> np.uint32(shift)) & np.uint32(0xFF), minlength=256)
            worst = min(worst, float(stats.chisquare(counts).pvalue))
    return ReleaseTest(name, min(1.0, 2 * len(vectors) * worst), worst, 1.0)


def _second_opening(tap: Tap) -> list[ReleaseTest]:
    """Ask every client to open the last round again, for others: with both answers a vector would lie open."""
    refused = asked = 0
    for wire, kept in zip(tap.wires, tap.sums, strict=True):
        if not kept.get("deal") or not kept.get("opening"):
            return []
        terms, survivors = SumDeal.from_state(kept["deal"]).request, kept["survivors"]
        if len(survivors) <= terms.threshold:
            return []
        nodes = [kept["nodes"][str(place)] for place in survivors[:-1]]
        dropped = tuple(place for place in range(1, len(terms.peers) + 1) if place not in survivors)
        first = UnmaskRequest(terms.run_id, terms.deal, kept["opening"], tuple(survivors), dropped)
        other = UnmaskRequest(
            terms.run_id, terms.deal, kept["opening"], tuple(survivors[:-1]), tuple(sorted((*dropped, survivors[-1])))
        )
        wire.send(first.to_record(), nodes)  # so that all have opened it; some were not needed
        answers = wire.send(other.to_record(), nodes)
        asked += len(nodes)
        refused += sum(answer.has_error() for answer in answers)
    return [exact_test("second openings that are refused", refused, asked)]
