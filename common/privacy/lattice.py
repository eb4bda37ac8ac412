"""The lattice on which clipped sums are added: rounding, a noise share, and addition modulo 2^32.

Each client rounds the clipped sum over its persons to whole multiples of gamma, adds its share of discrete Gaussian
noise, and takes the result modulo 2^32. Masked vectors are added modulo 2^32, so the coordinator gets the sum of all
rounded sums and shares modulo 2^32, and nothing else (Kairouz, Liu, Steinke 2021, "The distributed discrete Gaussian
mechanism for federated learning with secure aggregation").

Claim: one person, who is at one client, moves the integer sum by at most C / gamma + sqrt(d) in L2 norm. By clipping,
that client's real sum moves by at most C; rounding moves each coordinate by at most 1/2 with the person and by at most
1/2 without. gamma is a power of two, so the division is exact, and rounding is to the nearest with no error of its own.
gamma depends on public constants only, with gamma sqrt(d) <= 1e-3 C. What this costs is in `distributed_accounting`.

Where the sum passes the range, 2^32, it wraps. That spoils the coordinate for training, but costs no privacy: a sum
modulo 2^32 is computed from the sum, and reducing each client's part first gives the same.

What this closes, as every value after rounding is an integer and its noise has exactly the distribution claimed:
- telling the sum from the low bits or the gaps of floating-point noise (Mironov 2012, "On significance of the least
  significant bits for differential privacy"; Haney et al. 2022, "Precision-based attacks and interval refining"):
  every integer modulo 2^32 can come out, whatever the sum;
- noise whose tails or values a float cannot reach, and noise that is rounded away beside a large sum;
- rounding of the released sum that depends on the order in which it is added up: integers add without rounding.
What it does not close:
- the clipped sum is itself computed in floats before it is rounded. That one person moves it by at most C rests on
  `clipping`'s analysis and its slack, not on this module (Casacuberta et al. 2022, "Widespread underestimation of
  sensitivity in differentially private libraries");
- the noise is as good as AES-256 in counter mode is;
- time: of the clipping, and of rare branches in the sampler.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import ConfigError, PrivacyError
from common.privacy.discrete_gaussian import discrete_gaussian
from common.privacy.distributed_accounting import share_deviation
from common.privacy.randomness import SecureRandom

# gamma sqrt(d) / C at most.
COARSEST = 1e-3
# Sums are read as -2^31 .. 2^31 - 1.
_HALF_RANGE = 2**31
# The range is passed with probability at most 2 exp(-_CERTAINTY) a round, on what was declared.
_CERTAINTY = 60.0
# Below 2^62, so that noise can be added in int64.
_LARGEST_STEPS = 2.0**61


@dataclass(frozen=True)
class Lattice:
    """The lattice of a run's secure sums, and each client's noise on it. The same at all clients; public.

    granularity: gamma, a power of two. share_deviation: of each client's share, in steps of gamma. shares: how many of
    them are always in a sum, H. sensitivity: what one person moves, in steps of gamma.
    """

    dimension: int
    granularity: float
    share_deviation: float
    shares: int
    sensitivity: float

    @classmethod
    def of(
        cls,
        *,
        dimension: int,
        max_grad_norm: float,
        noise_multiplier: float,
        shares: int,
        clients: int,
        expected_units: float,
        worst_mean: float = 1.0,
    ) -> "Lattice":
        """The coarsest lattice allowed, which leaves the most room, with noise that is priced at `noise_multiplier`.

        The shares are larger by the lattice's cost, at most 0.1 %: H of them have sigma (C + gamma sqrt(d)).

        Args:
            dimension: d, the length of a vector.
            max_grad_norm: C.
            noise_multiplier: sigma, as in `accounting.Release`.
            shares: H, how many honest shares are in every released sum.
            clients: n, how many may be in a sum.
            expected_units: persons (or images) expected in a round, of all clients together, as declared.
            worst_mean: the largest |mean| over these units that a coordinate may plausibly have, in C. 1 is certain.

        Raises:
            ConfigError: a constant out of range, or the range 2^32 cannot hold the sum at gamma sqrt(d) <= 1e-3 C.
        """
        for name, value in (
            ("dimension", dimension),
            ("max-grad-norm", max_grad_norm),
            ("noise-multiplier", noise_multiplier),
            ("noise shares", shares),
            ("expected units", expected_units),
        ):
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} = {value}: a secure sum needs a positive, finite one")
        if not (0 < worst_mean <= 1 and shares <= clients):
            raise ConfigError(
                f"worst mean {worst_mean:g}, {shares} noise shares of {clients} clients: at most 1, and at most the clients"
            )
        # The power of two at or below.
        granularity = math.ldexp(0.5, math.frexp(COARSEST * max_grad_norm / math.sqrt(dimension))[1])
        sensitivity = max_grad_norm / granularity + math.sqrt(dimension)
        deviation = share_deviation(noise_multiplier, shares, sensitivity)
        units = _most_units(expected_units) * worst_mean * max_grad_norm / granularity
        # Each share is sub-Gaussian, and so is their sum: a bound for all d coordinates together.
        noise = deviation * math.sqrt(2 * clients * (_CERTAINTY + math.log(2 * dimension)))
        if units + clients / 2 + noise >= _HALF_RANGE:
            raise ConfigError(
                f"a sum of {expected_units:g} expected units in {dimension} coordinates may reach {units:.3g} lattice steps and its "
                f"noise {noise:.3g}, over the {_HALF_RANGE:.3g} that 32 bits hold at gamma sqrt(d) <= {COARSEST:g} C: lower "
                "sample-rate and expected-batch, num-clients, noise-multiplier or the discriminator's width"
            )
        return cls(dimension, granularity, deviation, shares, sensitivity)

    def noise_deviation(self, clients: int) -> float:
        """Standard deviation of each coordinate of a sum with so many clients' shares, in the vectors' own units."""
        return math.sqrt(clients) * self.share_deviation * self.granularity

    def round(self, total: np.ndarray) -> np.ndarray:
        """Real values to whole steps, to the nearest: (d,) float64 or float32 to (d,) int64.

        Raises PrivacyError for a wrong shape, and for values that are not finite or have no int64.
        """
        if total.shape != (self.dimension,):
            raise PrivacyError(f"a vector of shape {total.shape} for a lattice of {self.dimension} coordinates")
        with np.errstate(over="ignore", invalid="ignore"):
            steps = np.rint(total.astype(np.float64) / self.granularity)
        if not bool((np.abs(steps) <= _LARGEST_STEPS).all()):
            raise PrivacyError("the clipped sum has a value that is not finite, or far above what clipping allows")
        return steps.astype(np.int64)

    def add_noise_share(self, total: torch.Tensor, random: SecureRandom) -> np.ndarray:
        """What a client gives to the secure sum: its clipped sum, rounded, with its noise share, modulo 2^32.

        total: (d,) any float type. Returns (d,) uint32. Raises PrivacyError as `round`, before any noise is drawn.
        """
        steps = self.round(total.detach().to("cpu", torch.float64).numpy())
        noise = discrete_gaussian(self.dimension, self.share_deviation, random)
        return np.asarray(steps + noise, dtype=np.int64).astype(np.uint32)

    def decode(self, total: np.ndarray) -> np.ndarray:
        """The sum modulo 2^32, (d,) uint32, as real values, (d,) float64: those of the noisy sum, unless it wrapped."""
        if total.dtype != np.uint32 or total.shape != (self.dimension,):
            raise ValueError(f"got {total.dtype} {total.shape}; a sum is uint32 ({self.dimension},)")
        return np.asarray(total.astype(np.int32) * self.granularity)

    def fill(self, decoded: np.ndarray) -> float:
        """How much of the range a decoded sum takes: its largest coordinate, 0 to 1. Near 1 it may have wrapped.

        Computed from what is released, so it costs nothing.
        """
        return float(np.abs(decoded).max() / (_HALF_RANGE * self.granularity))


def _most_units(expected: float) -> float:
    """A number of units that a Poisson sample passes with probability at most exp(-_CERTAINTY) (Bernstein)."""
    third = _CERTAINTY / 3
    return expected + third + math.sqrt(third**2 + 2 * _CERTAINTY * expected)
