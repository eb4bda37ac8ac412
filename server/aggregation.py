"""From the clients' vectors to one average, and the noise of the `central` model.

Claim (`central`): with equal sample rates at every client the sum of the clipped gradients has, for any division of the
units among the clients, the distribution of pooled DP-SGD's sum, since every unit enters independently with probability
q wherever it is. One unit moves it by at most C; N(0, (sigma C)^2) is added once. Under `local` every vector arrives
noised and nothing is added; all is divided by declared constants and by the number of clients that answered, which the
coordinator sees anyway.

The vectors are added one by one as they arrive: memory does not grow with the cohort. Under `distributed` the sum comes
from `server.secure_exchange`, noised by the clients' shares, and only `declared_mean` is left to do here.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from common.messages import DiscriminatorUpdate, RoundInstructions, Stage
from common.privacy.randomness import SecureRandom, add_gaussian_noise
from common.privacy.units import PrivacyModel


def average(
    updates: Iterable[DiscriminatorUpdate], instructions: RoundInstructions, dimension: int, random: SecureRandom
) -> Tensor:
    """The declared mean over units of the clients' vectors: (dimension,) float32 on the CPU.

    In the moment stage the units of one class are declared to be declared_units / num_classes at each client.
    """
    total, clients = torch.zeros(dimension, dtype=torch.float64), 0
    for update in updates:
        total += torch.from_numpy(update.vector.copy())
        clients += 1
    privacy, moments = instructions.privacy, instructions.stage is Stage.MOMENTS
    if privacy.privacy_model is PrivacyModel.CENTRAL:
        noise = instructions.moment_noise_multiplier if moments else privacy.noise_multiplier * privacy.max_grad_norm
        total = add_gaussian_noise(total, noise, random)
    return declared_mean(total, clients, instructions)


def declared_mean(total: Tensor, clients: int, instructions: RoundInstructions) -> Tensor:
    """A sum of `clients` clients' vectors, (d,), over what they are declared to hold: (d,) float32."""
    privacy, moments = instructions.privacy, instructions.stage is Stage.MOMENTS
    if moments:
        divisor = privacy.declared_units / max(instructions.model.num_classes, 1)
    elif instructions.local_steps == 1:
        divisor = privacy.expected_batch
    else:
        divisor = 1.0
    return (total / (divisor * clients)).to(torch.float32)
