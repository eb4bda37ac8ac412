"""What a secure sum of noise shares costs: no more than one sampled Gaussian release, plus less than 10^-18.

A release is a sum of integer vectors, (d,), modulo 2^32. In it are at least H honest shares, in each coordinate
independent draws from the discrete Gaussian N_Z(0, s^2) (`discrete_gaussian`), and the clipped sums of all persons that
were sampled, each at rate q and on their own, rounded to integers client by client (`lattice`). Neighbours: one person
added or removed, who is at one client. Given who else was sampled, that person moves the integers by a vector of L2
norm at most `sensitivity` = C / gamma + sqrt(d): C / gamma by clipping, and sqrt(d) / 2 by rounding that client's sum
with the person, and again without (k times that for one who is at k clients). Further shares, other clients' vectors
and the modulus are computed from this sum or independent of it: post-processing.

Claim: this release is priced as a Gaussian release, Poisson-sampled at rate q, of noise multiplier
    effective_noise_multiplier = sqrt(H s^2 - 4) / sensitivity,
at every order and in both directions, with `rdp_slack` added to its RDP, or `hockey_stick_slack` to epsilon and delta.
`share_deviation` is the s at which that is the multiplier asked for.

Proof. Let theta(v) = 2 sum_{j >= 1} exp(-2 pi^2 v j^2) and tau(v) = log((1 + theta(v)) / (1 - theta(v))). By Poisson's
summation formula, the sum of exp(-(z - x)^2 / (2 v)) over all integers z is sqrt(2 pi v) times a number within
theta(v) of 1, whatever the real x (*). Two distributions whose ratio is within [1 - theta, 1 + theta] or
[1 / (1 + theta), 1 / (1 - theta)] but for a constant have a ratio within exp(+-tau): both sum to 1, so the ratio passes 1.
1. The sum of N_Z(0, a) and N_Z(0, b) has at z the probability exp(-z^2 / (2 (a + b))) times, but for a constant, a sum as
   in (*) with v = a b / (a + b). So its ratio to N_Z(0, a + b) is within exp(+-tau(v)). Adding the shares one by one, with
   a = k s^2 and b = s^2, the sum of H is within exp(+-(tau_1 + ... + tau_{H-1})) of N_Z(0, H s^2), tau_k =
   tau(s^2 k / (k + 1)) (Kairouz, Liu, Steinke 2021, "The distributed discrete Gaussian mechanism", have the same with a
   larger constant).
2. Take x from N(k, S^2 - v), continuous, k an integer; then an integer z with probability proportional to
   exp(-(z - x)^2 / (2 v)). By (*), z has at each integer the density of N(k, S^2), but for a constant and a factor within
   [1 / (1 + theta(v)), 1 / (1 - theta(v))]. So it is within exp(+-tau(v)) of N_Z(0, S^2) moved by k. The second step does
   not know k: discrete noise is, but for that factor, a continuous Gaussian of a little less variance, post-processed.
3. With S^2 = H s^2, v = 4 (`_SMOOTHING`), d independent coordinates, and mixed over who was sampled: the release is
   within exp(+-eta), eta = d (tau_1 + ... + tau_{H-1} + tau(4)), of what post-processing makes of the sampled continuous
   mechanism. With s >= 3 each tau_k is at most tau(4), so eta <= d H tau(4) < 3 * 10^-34 d H. From P <= e^eta P' and
   Q >= e^-eta Q' follow D_a(P || Q) <= D_a(P' || Q') + eta (2 a - 1) / (a - 1), and from an (epsilon, delta) of P', Q' an
   (epsilon + 2 eta, delta e^eta) of P, Q.
Nothing here needs the order to be whole. (At whole orders, the moments of the discrete release are those of N(0, S^2)
exactly; and in the direction in which the person is removed the divergence is the smaller one for any symmetric noise,
as in Mironov, Talwar, Zhang 2019, theorem 5. Neither is used.)

The sampler is exact, so that there is no distance of its own to add; its words are AES-256's, not true chance.
"""

import math

from common.errors import ConfigError

# The variance that is given up for the step from discrete to continuous, in lattice steps squared.
_SMOOTHING = 4.0
# s^2 / 2 >= _SMOOTHING, and a little more.
LEAST_SHARE_DEVIATION = 3.0
# More than all float errors here.
_ROUND = 1e-12


def share_deviation(noise_multiplier: float, shares: int, sensitivity: float) -> float:
    """The least s, in lattice steps, with which `shares` shares have at least this effective noise multiplier.

    sensitivity: in lattice steps. Raises ConfigError where s would be below LEAST_SHARE_DEVIATION.
    """
    needed = math.sqrt(((noise_multiplier * sensitivity) ** 2 + _SMOOTHING) / shares) * (1 + 2 * _ROUND)
    _check(needed, shares)
    return needed


def effective_noise_multiplier(deviation: float, shares: int, sensitivity: float) -> float:
    """The noise multiplier at which a sum with `shares` shares of this s is priced, rounded down.

    deviation, sensitivity: in lattice steps. Raises ConfigError where `deviation` is below LEAST_SHARE_DEVIATION.
    """
    _check(deviation, shares)
    return math.sqrt(shares * deviation**2 - _SMOOTHING) / sensitivity * (1 - _ROUND)


def rdp_slack(order: float, dimension: int, shares: int) -> float:
    """What is added to the RDP of each release at this order, rounded up: below 10^-18 for d H up to 10^14 at any of ORDERS."""
    return (2 * order - 1) / (order - 1) * _closeness(dimension, shares) * (1 + _ROUND)


def hockey_stick_slack(dimension: int, shares: int, rounds: int) -> tuple[float, float]:
    """What is added to epsilon, and the share of delta that is added to delta, for so many releases, rounded up.

    For an (epsilon, delta) of the continuous mechanism that was not made from RDP (PRV).
    """
    eta = rounds * _closeness(dimension, shares) * (1 + _ROUND)
    return 2 * eta, math.expm1(eta) * (1 + _ROUND)


def _closeness(dimension: int, shares: int) -> float:
    """Eta: the largest |log| of the ratio between a release and the continuous one, post-processed."""
    return dimension * shares * _log_ratio(_SMOOTHING)


def _log_ratio(variance: float) -> float:
    """Tau of the module's docstring, rounded up; for variances from 0.1, where sixteen terms are more than enough."""
    theta = 2 * sum(math.exp(-2 * math.pi**2 * variance * j * j) for j in range(1, 17))
    return (math.log1p(theta) - math.log1p(-theta)) * (1 + _ROUND)


def _check(deviation: float, shares: int) -> None:
    if not deviation >= LEAST_SHARE_DEVIATION:
        raise ConfigError(
            f"each of {shares} noise shares has a deviation of {deviation:.3g} lattice steps; it must be at least "
            f"{LEAST_SHARE_DEVIATION:g}: raise noise-multiplier, or take fewer clients"
        )
