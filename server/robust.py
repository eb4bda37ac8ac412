"""What clients that lie cannot do: a bound on the length of an update, and averages that leave outliers out.

All of it looks at updates that were noised before they got here (`local`; under `none` there is nothing to protect): it is
post-processing and costs no privacy. A client may send anything; of n that answer, f = floor(poisoners * n) may be in league.

median, trimmed-mean   of each coordinate (Yin, Chen, Ramchandran and Bartlett 2018). Where f lie, and f < n / 2, each
                       coordinate is within the range of the honest ones.
krum, multi-krum       the vector nearest to its n - f - 2 nearest others, or the mean of the n - f best by that measure
                       (Blanchard, El Mhamdi, Guerraoui and Stainer 2017), for n > 2f + 2.

What they cost, and where they do not help: the noise of a local update is mostly longer than what it hides. A median has up to
pi / 2 times the mean's variance, Krum's one vector n times. Clients that are unlike are outliers to each other, and a
liar that sends no noise is nearer to everybody than any honest client: Krum may choose it.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from common.cohort import enough_for_krum
from common.errors import CohortTooSmall
from common.messages import RoundInstructions, Stage
from common.privacy.units import PrivacyModel

# Coordinates that are held in double precision, or sorted, at once.
_CHUNK = 1 << 16

Aggregator = Callable[[Sequence[Tensor], int], Tensor]


def expected_norm(instructions: RoundInstructions, dimension: int) -> float:
    """The length that an honest client's vector is expected to have at most, from public constants: the root of its mean square.

    A sum over u units of norm at most C each, with N(0, (sigma C)^2) on each of d coordinates, has a mean square of at
    most (C u)^2 + d (sigma C)^2. u is the expected batch; in the moment stage, in which nobody is left out, the units a
    client is declared to hold, and C = 1. Of several local steps the client sends a mean: each step's sum is divided by the expected
    batch, independent noise averages out to sigma C / (batch sqrt(steps)), and the fakes' half is a mean of vectors of
    norm at most C. Where weights are projected after a step, that shortens the way back to the start.

    Infinite in gradient rounds without a privacy model: nothing is clipped, so nothing is known.

    **Honest ones and a bound of m times this.** The noise's norm differs from sigma C sqrt(d) by 8 sigma C at most but
    once in 10^13 vectors, and is all but at right angles to the sum. Were it in line with the sum, the sum would still
    have sqrt(m^2 - 1) times the length counted with here, whatever the noise: m = 4, the default, touches no client whose step
    draws up to 3.8 times the expected batch, or that holds as many times the declared units, though all its gradients be
    clipped and point one way. Mostly the noise is far longer than C u, or gradients differ, and the room is larger.
    """
    privacy, steps = instructions.privacy, instructions.local_steps
    private = privacy.privacy_model is not PrivacyModel.NONE
    if instructions.stage is Stage.MOMENTS:
        noise, signal = instructions.moment_noise_multiplier, privacy.declared_units
    elif not private:
        return math.inf
    else:
        noise, signal = privacy.noise_multiplier * privacy.max_grad_norm, privacy.expected_batch * privacy.max_grad_norm
        if steps > 1:
            noise, signal = noise / (privacy.expected_batch * math.sqrt(steps)), 2 * privacy.max_grad_norm
    return math.hypot(noise * math.sqrt(dimension) if private else 0.0, signal)


def bounded(vector: Tensor, bound: float) -> Tensor:
    """`vector`, (d,) float32, scaled down to norm `bound` where it is longer."""
    norm = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    return vector if norm <= bound else (vector.double() * (bound / norm)).float()


def median(vectors: Sequence[Tensor], lying: int) -> Tensor:
    """Of each coordinate the middle value, or the mean of the two in the middle: (d,) float64. `lying` is not needed."""
    return trimmed_mean(vectors, (len(vectors) - 1) // 2)


def trimmed_mean(vectors: Sequence[Tensor], lying: int) -> Tensor:
    """Of each coordinate the mean without the `lying` smallest and as many largest values: (d,) float64.

    vectors: n of (d,) float32. Raises CohortTooSmall unless n > 2 lying.
    """
    if len(vectors) <= 2 * lying:
        raise CohortTooSmall(f"{len(vectors)} updates, and {lying} are left out on either side: start more clients")
    kept = slice(lying, len(vectors) - lying)
    return torch.cat([part.sort(dim=0).values[kept].double().mean(dim=0) for part in _parts(vectors)])


def krum(vectors: Sequence[Tensor], lying: int) -> Tensor:
    """The one vector that is nearest to its n - lying - 2 nearest others: (d,) float64. Raises CohortTooSmall."""
    return vectors[_by_nearness(vectors, lying)[0]].double()


def multi_krum(vectors: Sequence[Tensor], lying: int) -> Tensor:
    """The mean of the n - lying vectors that Krum would choose first: (d,) float64. Raises CohortTooSmall."""
    chosen = _by_nearness(vectors, lying)[: len(vectors) - lying]
    total = torch.zeros(len(vectors[0]), dtype=torch.float64)
    for place in chosen:
        total += vectors[place]
    return total / len(chosen)


def _by_nearness(vectors: Sequence[Tensor], lying: int) -> list[int]:
    """The places of n vectors by the sum of squared distances to their n - lying - 2 nearest others. Takes n^2 d / 2 steps."""
    count = len(vectors)
    if not enough_for_krum(count, lying):
        raise CohortTooSmall(
            f"{count} updates of which {lying} may be lies: Krum needs {2 * lying + 3}; start more clients, or take another aggregator"
        )
    pairs = torch.zeros(count * (count - 1) // 2, dtype=torch.float64)
    for part in _parts(vectors):
        pairs += torch.pdist(part.double()).square_()
    squared = torch.zeros(count, count, dtype=torch.float64)
    squared[*torch.triu_indices(count, count, offset=1)] = pairs
    squared += squared.T.clone()
    # The distance to itself, 0, comes first and is left out.
    scores = squared.sort(dim=1).values[:, 1 : count - lying - 1].sum(dim=1).tolist()
    # Two that are nearest to each other may score the same: which is first must not depend on who answered first.
    return sorted(range(count), key=lambda place: (scores[place], hashlib.sha256(vectors[place].numpy().data).digest()))


def _parts(vectors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The same coordinates of all vectors: (n, up to _CHUNK)."""
    for first in range(0, len(vectors[0]), _CHUNK):
        yield torch.stack([vector[first : first + _CHUNK] for vector in vectors])


# All but the mean, which `server.aggregation` forms without keeping the vectors.
ROBUST: dict[str, Aggregator] = {
    "median": median,
    "trimmed-mean": trimmed_mean,
    "krum": krum,
    "multi-krum": multi_krum,
}
