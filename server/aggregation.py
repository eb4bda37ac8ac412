"""From the clients' vectors to one average, and the noise of the `central` model.

Claim (`central`): with equal sample rates at every client the sum of the clipped gradients has, for any division of the
units among the clients, the distribution of pooled DP-SGD's sum, since every unit enters independently with probability
q wherever it is. One unit moves it by at most C; N(0, (sigma C)^2) is added once. Under `local` every vector arrives
noised and nothing is added; all is divided by declared constants and by the number of clients that answered, which the
coordinator sees anyway. So are a bound on each vector's length and an aggregator that leaves outliers out.

For a mean the vectors are added one by one as they arrive: memory does not grow with the cohort, and as float32 values of
one lattice (`add_gaussian_noise`) they give the same sum in any order. The other aggregators (`server.robust`) need all
vectors at once. Under `distributed` the sum comes from `server.secure_exchange`, noised by the clients' shares, and only
`declared_mean` is left to do here.
"""

import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from common.cohort import liars
from common.messages import DiscriminatorUpdate, RoundInstructions, Stage
from common.privacy.randomness import SecureRandom, add_gaussian_noise
from common.privacy.units import PrivacyModel
from common.sections import TrainingConfig
from server.robust import ROBUST, bounded, expected_norm

_LARGEST = torch.finfo(torch.float32).max

log = logging.getLogger("visard.server")


def average(
    updates: Iterable[DiscriminatorUpdate],
    instructions: RoundInstructions,
    dimension: int,
    random: SecureRandom,
    training: TrainingConfig,
) -> Tensor:
    """The declared mean over units of the clients' vectors: (dimension,) float32 on the CPU.

    training: says by which aggregator, and how long a vector may be. In the moment stage the units of one class are declared to be
    declared_units / num_classes at each client. Raises CohortTooSmall where the aggregator needs more.
    """
    bound = update_bound(instructions, dimension, training)
    vectors = (_within(bound, torch.from_numpy(update.vector.copy())) for update in updates)
    if training.aggregator != "mean":
        kept = list(vectors)
        middle = ROBUST[training.aggregator](kept, liars(training.poisoners, len(kept)))
        return declared_mean(middle, 1, instructions)
    total, clients = torch.zeros(dimension, dtype=torch.float64), 0
    for vector in vectors:
        total += vector
        clients += 1
    privacy, moments = instructions.privacy, instructions.stage is Stage.MOMENTS
    if privacy.privacy_model is PrivacyModel.CENTRAL:
        noise = instructions.moment_noise_multiplier if moments else privacy.noise_multiplier * privacy.max_grad_norm
        total = add_gaussian_noise(total, noise, random)
    return declared_mean(total, clients, instructions)


def update_bound(instructions: RoundInstructions, dimension: int, training: TrainingConfig) -> float:
    """The norm to which longer vectors are scaled down; infinite where there is no bound.

    Under `central` there is none: an honest sum carries no noise, and is as long as its client has units.
    """
    if training.update_bound == 0 or instructions.privacy.privacy_model is PrivacyModel.CENTRAL:
        return math.inf
    return training.update_bound * expected_norm(instructions, dimension)


def _within(bound: float, vector: Tensor) -> Tensor:
    shorter = bounded(vector, bound)
    if shorter is not vector:
        log.info("an update longer than update-bound (norm %.3g) is scaled down to %.3g", vector.norm(), bound)
    return shorter


def declared_mean(total: Tensor, clients: int, instructions: RoundInstructions) -> Tensor:
    """A sum of `clients` clients' vectors, (d,), over what they are declared to hold: (d,) float32."""
    privacy, moments = instructions.privacy, instructions.stage is Stage.MOMENTS
    if moments:
        divisor = privacy.declared_units / max(instructions.model.num_classes, 1)
    elif instructions.local_steps == 1:
        divisor = privacy.expected_batch
    else:
        divisor = 1.0
    # What passes float32 would be infinite there: without a bound a client may send as much.
    return (total / (divisor * clients)).clamp(-_LARGEST, _LARGEST).to(torch.float32)
