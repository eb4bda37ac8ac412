"""Shamir's secret sharing (Shamir 1979) of 32-byte secrets, and how many honest clients a released sum holds.

Claim: fewer than `threshold` shares of a secret have a distribution that does not depend on it; `threshold` of them
give it. Shares are values of a random polynomial of degree threshold - 1 over the integers modulo PRIME, at x = 1..n; the
secret is its value at 0.
"""

import secrets as system
from collections.abc import Mapping, Sequence

# The least prime above 2^256: every 32-byte secret is below it, and a share takes 33 bytes.
PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def check_threshold(peers: int, threshold: int, colluders: int) -> None:
    """Refuse a threshold that `colluders` clients and the coordinator could get around. Raises ValueError."""
    if not 1 <= colluders < threshold <= peers:
        raise ValueError(
            f"threshold = {threshold} with {peers} peers and {colluders} colluders: want 1 <= colluders < threshold <= peers"
        )
    if not 2 * threshold > peers + colluders:
        raise ValueError(
            f"threshold = {threshold} is too low for {peers} peers and {colluders} colluders: raise it above "
            f"{(peers + colluders) // 2}, so that nobody can get both secrets of one client"
        )


def honest_shares(peers: int, threshold: int, colluders: int) -> int:
    """The least number of honest clients whose vectors any released sum holds, whatever the coordinator does.

    It and `colluders` clients (c) may work together against the other m = peers - c. They hold their own shares of
    every secret, so s = threshold - c honest answers open one. In a round each honest client answers once, to one choice
    of survivors S (at least `threshold`, itself among them) and dropped D = U - S.

    Say that A are the honest clients whose seed was opened and B those whose mask key was. No client is in both: that
    takes 2 s answers of at most m honest clients, and 2 threshold > peers + c says 2 s > m. Where an honest client is in
    neither, the masks between it and all of A stay unknown, and nothing is released. Else what is released is the sum of A
    (the masks among A are unknown but for their sum, zero). Each of B was named in the D of s honest clients; at most m
    answered, each with a D of at most peers - threshold = m - s members: |B| <= floor(m (m - s) / s), and |A| = m - |B|.

    It is never more than s, for s^2 - m (2 s - m) = (m - s)^2; and where fewer than `peers` dealt, m is smaller or s as it
    was, and |A| no smaller. Raises ValueError as `check_threshold` does.
    """
    check_threshold(peers, threshold, colluders)
    honest, needed = peers - colluders, threshold - colluders
    return honest - honest * (honest - needed) // needed


def split(secrets: Sequence[bytes], threshold: int, count: int) -> list[bytes]:
    """Share 32-byte secrets among `count` holders: for x = 1..count the shares of all secrets in turn, 33 bytes each."""
    if not 1 <= threshold <= count or any(len(secret) != SECRET_BYTES for secret in secrets):
        raise ValueError(f"want 1 <= threshold = {threshold} <= {count} holders and secrets of {SECRET_BYTES} bytes")
    polynomials = [
        [*(system.randbelow(PRIME) for _ in range(threshold - 1)), int.from_bytes(secret, "big")] for secret in secrets
    ]
    holders = []
    for x in range(1, count + 1):
        held = bytearray()
        for coefficients in polynomials:
            value = 0
            for coefficient in coefficients:
                value = value * x + coefficient  # reduced once: x is small, and this is quicker
            held += (value % PRIME).to_bytes(SHARE_BYTES, "big")
        holders.append(bytes(held))
    return holders


def rebuild(shares: Mapping[int, bytes], threshold: int) -> list[bytes]:
    """The secrets of which `shares[x]` holds the shares at x, as `split` made them.

    Where more than `threshold` holders are given, all must fit one polynomial a secret; that is tested with one random
    word of the dual code (Cascudo and David 2017), which a wrong share passes with probability 1 / PRIME.

    Raises ValueError with fewer holders, or shares that are malformed or do not fit together.
    """
    points = sorted(shares)
    lengths = {len(held) for held in shares.values()}
    if len(points) < threshold or points[0] < 1 or len(lengths) != 1 or min(lengths) % SHARE_BYTES:
        raise ValueError(f"{len(points)} holders' shares of {sorted(lengths)} bytes: want {threshold} of equal length")
    columns = list(zip(*(_numbers(shares[x]) for x in points), strict=True))
    if any(value >= PRIME for column in columns for value in column):
        raise ValueError("a share is no number below the prime")
    if len(points) > threshold:
        word = _random_dual_word(points, threshold)
        if any(sum(map(int.__mul__, word, column)) % PRIME for column in columns):
            raise ValueError("the shares do not fit together: a holder sent a wrong one")
    weights = [_weight_at_zero(x, points[:threshold]) for x in points[:threshold]]
    found = [sum(map(int.__mul__, weights, column)) % PRIME for column in columns]
    if any(secret >> (8 * SECRET_BYTES) for secret in found):
        raise ValueError("the shares fit no secret of 32 bytes")
    return [secret.to_bytes(SECRET_BYTES, "big") for secret in found]


def _numbers(held: bytes) -> list[int]:
    return [int.from_bytes(held[start : start + SHARE_BYTES], "big") for start in range(0, len(held), SHARE_BYTES)]


def _weight_at_zero(x: int, points: Sequence[int]) -> int:
    """Lagrange's weight of the value at x for the value at 0."""
    above = below = 1
    for other in points:
        if other != x:
            above, below = above * other % PRIME, below * (other - x) % PRIME
    return above * pow(below, -1, PRIME) % PRIME


def _random_dual_word(points: Sequence[int], threshold: int) -> list[int]:
    """Weights whose sum over the values of any polynomial of degree below `threshold` is zero, otherwise random."""
    factors = [system.randbelow(PRIME) for _ in range(len(points) - threshold)]
    word = []
    for x in points:
        value, below = 0, 1
        for factor in factors:
            value = (value * x + factor) % PRIME
        for other in points:
            if other != x:
                below = below * (x - other) % PRIME
        word.append(value * pow(below, -1, PRIME) % PRIME)
    return word
