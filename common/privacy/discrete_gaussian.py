"""The discrete Gaussian: integers y with probability proportional to exp(-y^2 / (2 s^2)), drawn exactly.

Canonne, Kamath, Steinke 2020, "The discrete Gaussian for differential privacy", for the distribution; the sampler is a
rejection of its own, made for vectors. Claim: where the words of `SecureRandom` are uniform and independent, the draws
are independent and have this distribution with no error at all, for every float64 s. Floats only decide where they
cannot be wrong; the rest, one draw in 10^9 or so, is decided in exact arithmetic, with more random bits as needed.

With t an integer, t >= s sqrt(2 ln 2), a proposal is a sign, v >= 0 with probability 2^-(v + 1) and u uniform on 0 to
t - 1; its size is y = v t + u. It is accepted with probability 2^v exp(-y^2 / (2 s^2)), which is at most 1:
y^2 / (2 s^2) >= v^2 ln 2 >= v ln 2. So y comes out in proportion to exp(-y^2 / (2 s^2)); minus zero is refused, as it
would count zero twice. At large s, 53 % are accepted. How many proposals it takes does not depend on the values drawn.

Where floats decide: a uniform R in [0, 1), whose first 64 bits are one word, is compared with that probability. With
s in [1, 2^28] and v <= 30: y < 31 t is exact in float64; y^2 / (2 s^2) <= 2,280 has a relative error of at most five
roundings, 5 * 2^-53, which is 2^-39.5 of error in the exponent, and v ln 2 and the difference add less than 2^-41. The
exponential is at most 1, and taken to be right to 2^-40 of itself (NumPy's is within 4 units in the last place, 2^-50);
R's float misses less than 2^-52. Together less than 2^-38. `_MARGIN` is 64 times as wide.

Not covered: time. The exact path takes longer, whether it is taken depends on the draws, and caches are what they are.
"""

from decimal import Decimal, localcontext

import numpy as np

from common.privacy.randomness import SecureRandom

LEAST_DEVIATION, LARGEST_DEVIATION = 1.0, 2.0**28
# Above sqrt(2 ln 2) = 1.17741, by more than the rounding of its product.
_WIDTH = 1.1775
_MARGIN = 2.0**-32
# v comes from the first 31 bits of a word: how many are zero before the first one.
_HALVINGS = 31
_LOG_2 = float(np.log(2.0))
# Proposals at a time: what fits a processor's cache.
_BLOCK = 16_384
_LOW = np.uint64(2**32 - 1)
_SIGN, _REST = np.uint64(2**32), np.uint64(33)


def discrete_gaussian(count: int, deviation: float, random: SecureRandom) -> np.ndarray:
    """`count` independent draws, (count,) int64, of parameter s = `deviation` (their standard deviation, but for 1e-7).

    Raises ValueError for a deviation outside [LEAST_DEVIATION, LARGEST_DEVIATION].
    """
    if not LEAST_DEVIATION <= deviation <= LARGEST_DEVIATION:
        raise ValueError(f"deviation = {deviation} must lie in [{LEAST_DEVIATION:g}, {LARGEST_DEVIATION:g}]")
    drawn = np.empty(count, dtype=np.int64)
    done = 0
    while done < count:
        # About as many proposals as are still needed: what is left over is thrown away, which favours no value.
        some = _accepted(min(_BLOCK, 2 * (count - done) + 16), float(deviation), random)[: count - done]
        drawn[done : done + len(some)] = some
        done += len(some)
    return drawn


def _accepted(proposals: int, deviation: float, random: SecureRandom) -> np.ndarray:
    """Those of so many proposals that are accepted, int64."""
    width = int(np.ceil(_WIDTH * deviation))
    words, fractions = random.words(2 * proposals).reshape(2, proposals)
    # Lemire 2019, "Fast random integer generation in an interval": exact with the refusals below.
    product = (words & _LOW) * np.uint64(width)
    kept = (product & _LOW) >= np.uint64(2**32 % width)
    bits = words >> _REST
    halvings = np.bitwise_count((bits - np.uint64(1)) & ~bits).astype(np.int64)  # 64 where all bits are zero
    size = halvings * width + (product >> np.uint64(32)).astype(np.int64)
    negative = (words & _SIGN) != 0
    kept &= ~(negative & (size == 0))
    # 2^v exp(-y^2 / (2 s^2)) - R, in float64.
    gap = size.astype(np.float64)
    gap *= gap
    gap *= -0.5 / (deviation * deviation)
    gap += halvings * _LOG_2
    np.exp(gap, out=gap)
    gap -= fractions * 2.0**-64
    accepted = kept & (gap > 0)
    unsure = kept & ((np.abs(gap) <= _MARGIN) | (halvings >= _HALVINGS))
    for place in np.flatnonzero(unsure):
        v = int(halvings[place])
        if v >= _HALVINGS:
            v = _HALVINGS + _zeros_before_one(random)
            size[place] += (v - int(halvings[place])) * width
        accepted[place] = _exactly_accepted(int(size[place]), v, deviation, int(fractions[place]), random)
    return np.where(negative, -size, size)[accepted]


def _zeros_before_one(random: SecureRandom) -> int:
    zeros = 0
    while True:
        word = int(random.words(1)[0])
        if word:
            return zeros + (word & -word).bit_length() - 1
        zeros += 64


def _exactly_accepted(size: int, halvings: int, deviation: float, word: int, random: SecureRandom) -> bool:
    """Whether R < 2^v exp(-y^2 / (2 s^2)), R's first 64 bits being `word`: with twice as many bits of R until it is certain.

    A float64 is a Decimal without error, and every operation, the exponential too, is right to 5 * 10^-prec of itself.
    So x is right to 20 * 10^-prec of itself, and what it and the others take from the probability is less than `lost`.
    """
    known, bits = word, 64
    while True:
        with localcontext(prec=bits // 3 + 40) as context:
            s = Decimal(deviation)
            x = Decimal(size) * Decimal(size) / (2 * s * s)
            scaled = (-x).exp() * 2 ** (halvings + bits)
            lost = scaled * (x + 10) * Decimal(10) ** (2 - context.prec)
            if known + 1 <= scaled - lost:
                return True
            if known >= scaled + lost:
                return False
        more = random.words(bits // 64).astype(">u8").tobytes()
        known, bits = known << bits | int.from_bytes(more), 2 * bits
