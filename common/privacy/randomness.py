"""Cryptographic randomness for noise and sampling.

A seeded generator would let whoever knows the seed subtract the noise, so nothing that a run is configured with reaches
this module: the key comes from the operating system. Only a test may hand in a key of its own.
"""

import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

# Released values lie on a lattice of this many steps to one standard deviation of the noise.
LATTICE_BITS = 14


class SecureRandom:
    """A stream of AES-256 in counter mode under a fresh key from the operating system (NIST SP 800-38A, section 6.5).

    Not thread-safe. Make one for each round: a key is used once and then forgotten.
    """

    def __init__(self, key: bytes | None = None) -> None:
        """`key`: 32 bytes, for tests only; by default from `os.urandom`."""
        self._stream = Cipher(algorithms.AES(key or os.urandom(32)), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> np.ndarray:
        """`count` uniform uint64."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)

    def uniform(self, count: int) -> np.ndarray:
        """`count` float64 uniform on the 2^52 midpoints of (0, 1), all of them exact: never 0, never 1."""
        return ((self.words(count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def gaussian(self, count: int) -> Tensor:
        """`count` independent standard normal float64, (count,), by Box and Muller (1958)."""
        half = (count + 1) // 2
        uniform = torch.from_numpy(self.uniform(2 * half))
        radius = uniform[:half].log_().mul_(-2.0).sqrt_()
        angle = uniform[half:].mul_(2.0 * math.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]

    def poisson_sample(self, num_units: int, sample_rate: float) -> np.ndarray:
        """The units drawn when each enters independently with probability `sample_rate`: sorted int64 indices, perhaps
        none."""
        return np.flatnonzero(self.uniform(num_units) < sample_rate)

    def choose(self, items: np.ndarray, count: int) -> np.ndarray:
        """At most `count` of `items` without replacement, uniformly."""
        if len(items) <= count:
            return items
        return items[np.argsort(self.words(len(items)), kind="stable")[:count]]


def add_gaussian_noise(total: Tensor, standard_deviation: float, random: SecureRandom) -> Tensor:
    """The Gaussian mechanism on a sum: N(0, standard_deviation^2) added to each coordinate, then rounded to a lattice.

    Claim: where adding or removing one unit moves `total` by at most C in L2 norm, releasing the result is one Gaussian
    mechanism of noise multiplier standard_deviation / C (Dwork, Roth 2014, appendix A). Rounding is post-processing.

    The sum is formed in float64 and rounded to multiples of a power of two near 2^-14 standard deviations, so that the
    low bits of the float32 released, through which the exact sum can be told (Mironov 2012), are the lattice's and not
    the sum's. Not closed: the noise itself takes one of at most 2^104 values a pair of coordinates rather than a
    continuum.

    total: (d,) any float type. Returns (d,) float32 on the CPU.
    """
    if not standard_deviation > 0:
        raise ValueError(f"standard_deviation = {standard_deviation} must be positive")
    noisy = total.detach().to("cpu", torch.float64) + standard_deviation * random.gaussian(total.numel())
    step = 2.0 ** (math.floor(math.log2(standard_deviation)) - LATTICE_BITS)
    return torch.round(noisy / step).mul_(step).to(torch.float32)
