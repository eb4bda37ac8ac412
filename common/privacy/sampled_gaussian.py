"""RDP of the sampled Gaussian mechanism at one order, for many (sigma, q) at once.

Mironov, Talwar, Zhang 2019, "Renyi differential privacy of the sampled Gaussian mechanism", section 3.3: for an integer
order a finite sum, else the series over both halves of the integral, whose terms past the order alternate in sign and
shrink ever more slowly. So what is left out after one of them is half of it, to within its step from the one before.
Opacus computes the same one pair and one order at a time.
"""

import math
from functools import lru_cache

import numpy as np
import torch

# The series ends where terms are below the one and their steps below the other.
_SMALL_TERM, _SMALLEST_STEP = 1e-5, 1e-13
# Float error of log A, and of the series' end: added to it, so that the result is never too small.
_SLACK = 1e-12
# Where noise is large and the order near 1 the series may end earlier; its last step is then larger, and added.
_MOST_TERMS = 8_192
# Terms at a time: what fits a processor's cache.
_BLOCK, _MOST_PAIRS = 32_768, 1_024


def rdp_at_order(noise_multipliers: np.ndarray, sample_rates: np.ndarray, order: float) -> np.ndarray:
    """RDP of one step of each pair, rounded up: (n,), (n,) float64 to (n,) float64.

    Infinity for whatever has no bound: noise that is not above 0.01, a rate outside (0, 1], NaN.
    """
    sigma, q = np.asarray(noise_multipliers, dtype=np.float64), np.asarray(sample_rates, dtype=np.float64)
    found = np.full(sigma.shape, np.inf)
    bounded = (sigma >= 0.01) & np.isfinite(sigma) & (q > 0) & (q <= 1)
    whole, sampled = bounded & (q == 1), bounded & (q < 1)
    found[whole] = order / (2 * sigma[whole] ** 2)
    if sampled.any():
        log_a = (_whole_order if float(order).is_integer() else _fractional_order)(sigma[sampled], q[sampled], order)
        found[sampled] = (np.maximum(log_a, 0.0) + _SLACK) / (order - 1)
    return np.where(np.isnan(found), np.inf, found * (1 + 1e-9) + _SLACK)


@lru_cache(maxsize=8)
def _log_binomials(order: int) -> np.ndarray:
    return np.array([math.log(math.comb(order, i)) for i in range(order + 1)])


def _whole_order(sigma: np.ndarray, q: np.ndarray, order: float) -> np.ndarray:
    total = np.full(sigma.shape, -np.inf)
    log_q, log_rest, half = np.log(q), np.log1p(-q), 1 / (2 * sigma**2)
    for i, log_coefficient in enumerate(_log_binomials(int(order))):
        total = np.logaddexp(total, log_coefficient + i * log_q + (order - i) * log_rest + (i * i - i) * half)
    return total


def _fractional_order(sigma: np.ndarray, q: np.ndarray, order: float) -> np.ndarray:
    """Terms (i, pair) in blocks of rows, until the last row is small for every pair."""
    if len(sigma) > _MOST_PAIRS:
        parts = [slice(start, start + _MOST_PAIRS) for start in range(0, len(sigma), _MOST_PAIRS)]
        return np.concatenate([_fractional_order(sigma[part], q[part], order) for part in parts])
    log_q, log_rest, half = np.log(q), np.log1p(-q), 1 / (2 * sigma**2)
    z0 = sigma**2 * (log_rest - log_q) + 0.5
    scale, total = np.full(sigma.shape, -np.inf), np.zeros(sigma.shape)  # the sum is total * exp(scale)
    log_coefficient, sign = 0.0, 1.0
    rows = min(max(_BLOCK // len(sigma), 16), 512)
    for start in range(0, _MOST_TERMS, rows):
        i = np.arange(start, start + rows, dtype=np.float64)
        j = order - i
        # Binomial coefficients of the block and of the next one's first row: each is the former times j / (i + 1).
        logs = log_coefficient + np.cumsum(np.append(0.0, np.log(np.abs(j)) - np.log1p(i)))
        signs = sign * np.cumprod(np.append(1.0, np.sign(j)))
        log_coefficient, sign = float(logs[-1]), float(signs[-1])
        i, j, logs, signs = i[:, None], j[:, None], logs[:-1, None], signs[:-1, None]
        low = i * log_q + j * log_rest + (i * i - i) * half + _log_tail((i - z0) / sigma)
        high = j * log_q + i * log_rest + (j * j - j) * half + _log_tail((z0 - j) / sigma)
        terms = logs + np.logaddexp(low, high)
        larger = np.maximum(scale, terms.max(0))
        total = total * np.exp(scale - larger) + (signs * np.exp(terms - larger)).sum(0)
        scale, last = larger, np.exp(np.minimum(terms[-1], 0.0))
        step = np.abs(last - np.exp(np.minimum(terms[-2], 0.0)))
        if ((last < _SMALL_TERM) & (step < _SMALLEST_STEP)).all():
            break
    # Half of the last term away, since the next one takes off nearly as much: what is left is less than one step.
    left_out = step - 0.5 * signs[-1, 0] * last
    with np.errstate(divide="ignore"):
        return np.asarray(scale + np.log(np.maximum(total + left_out * np.exp(-scale), 0.0)))


def _log_tail(z: np.ndarray) -> np.ndarray:
    """log P(Z > z) for a standard normal Z."""
    return np.asarray(torch.special.log_ndtr(torch.from_numpy(-z)).numpy())
