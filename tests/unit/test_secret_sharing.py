"""Shares: any threshold of them give the secret, fewer tell nothing, wrong ones show; and who can be left out of a sum."""

import itertools
import math
import os

import numpy as np
import pytest
from scipy import stats

from common.privacy.secret_sharing import (
    PRIME,
    SECRET_BYTES,
    SHARE_BYTES,
    check_threshold,
    honest_shares,
    rebuild,
    split,
)

THRESHOLDS = [(n, t, c) for n in range(2, 7) for c in range(1, n) for t in range(c + 1, n + 1) if 2 * t > n + c]


def probable_prime(number: int) -> bool:
    """Miller and Rabin with the first forty odd bases: wrong once in 4^40 for a number nobody chose to deceive."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(3, 83, 2):
        value = pow(base, odd, number)
        if value in (1, number - 1):
            continue
        for _ in range(twos - 1):
            value = value * value % number
            if value == number - 1:
                break
        else:
            return False
    return True


def test_the_prime_is_the_least_above_every_secret() -> None:
    assert probable_prime(PRIME)
    assert not any(probable_prime(number) for number in range(2 ** (8 * SECRET_BYTES) + 1, PRIME, 2))
    assert PRIME < 2 ** (8 * SHARE_BYTES)


@pytest.mark.parametrize(("threshold", "count"), [(1, 1), (1, 3), (2, 3), (3, 5), (5, 5)])
def test_any_threshold_of_holders_rebuild_all_secrets(threshold: int, count: int) -> None:
    secrets = [bytes(32), b"\xff" * 32, *(os.urandom(32) for _ in range(3))]
    shares = split(secrets, threshold, count)
    assert [len(held) for held in shares] == [SHARE_BYTES * len(secrets)] * count
    for size in range(threshold, count + 1):
        for points in itertools.combinations(range(1, count + 1), size):
            assert rebuild({x: shares[x - 1] for x in points}, threshold) == secrets


def test_a_share_is_the_value_of_one_polynomial_of_full_degree() -> None:
    """By Lagrange's formula in its plainest form: a share beyond the first t follows from these, and from t - 1 it does not."""
    threshold, count = 4, 7
    values = [int.from_bytes(held, "big") for held in split([os.urandom(32)], threshold, count)]

    def predicted(known: list[int], at: int) -> int:
        total = 0
        for x in known:
            above = math.prod(at - other for other in known if other != x)
            below = math.prod(x - other for other in known if other != x)
            total += values[x - 1] * above * pow(below, -1, PRIME)
        return total % PRIME

    for at in range(5, 8):
        assert predicted([1, 2, 3, 4], at) == values[at - 1]
        assert predicted([1, 2, 3], at) != values[at - 1]


def test_fewer_shares_than_the_threshold_do_not_depend_on_the_secret() -> None:
    """Each share of a constant secret is uniform, and so is what two of three give when they guess."""
    trials = 2000
    dealt = [split([b"\x01" * 32], 3, 4) for _ in range(trials)]
    for x in range(4):
        scaled = [int.from_bytes(shares[x], "big") / PRIME for shares in dealt]
        assert stats.kstest(scaled, "uniform").pvalue > 1e-5
    guesses = [rebuild({1: s[0], 2: s[1], 3: bytes(33)}, 3) for s in dealt[:500] if _fits(s)]
    scaled = [int.from_bytes(guess[0], "big") / 2**256 for guess in guesses]
    assert stats.kstest(scaled, "uniform").pvalue > 1e-5


def _fits(shares: list[bytes]) -> bool:
    try:
        rebuild({1: shares[0], 2: shares[1], 3: bytes(33)}, 3)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("liar", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_share_among_more_than_the_threshold_shows(liar: int, which: int) -> None:
    secrets = [os.urandom(32), os.urandom(32)]
    shares = dict(enumerate(split(secrets, 4, 5), 1))
    wrong = bytearray(shares[liar])
    wrong[SHARE_BYTES * which + 20] ^= 1
    with pytest.raises(ValueError, match="do not fit together"):
        rebuild(shares | {liar: bytes(wrong)}, 4)
    honest = {x: held for x, held in shares.items() if x != liar}
    assert rebuild(honest, 4) == secrets


def test_several_wrong_shares_show_too_though_they_agree() -> None:
    """Two of five shift their values alike, or by a line that vanishes between them."""
    shares = {x: int.from_bytes(held, "big") for x, held in enumerate(split([os.urandom(32)], 3, 5), 1)}
    for shifts in ({1: 7, 2: 7}, {1: 1, 2: 2}, {4: 5, 5: -5}, {1: 1, 2: 1, 3: 1, 4: 1}):
        changed = {x: ((value + shifts.get(x, 0)) % PRIME).to_bytes(33, "big") for x, value in shares.items()}
        with pytest.raises(ValueError, match="do not fit together"):
            rebuild(changed, 3)


def test_with_no_share_to_spare_a_wrong_one_gives_another_secret() -> None:
    """What the digests of seeds are for: nothing in the shares tells."""
    secret = b"\x05" * 32
    shares = dict(enumerate(split([secret], 3, 3), 1))
    value = int.from_bytes(shares[2], "big")
    shares[2] = ((value + 1) % PRIME).to_bytes(33, "big")
    try:
        assert rebuild(shares, 3) != [secret]
    except ValueError as error:
        assert "no secret" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "shares",
    [
        {},
        {1: bytes(33)},
        {1: bytes(33), 2: bytes(66)},
        {1: bytes(32), 2: bytes(32)},
        {0: bytes(33), 1: bytes(33)},
        {-1: bytes(33), 1: bytes(33)},
        {1: PRIME.to_bytes(33, "big"), 2: bytes(33)},
        {1: b"\xff" * 33, 2: bytes(33)},
    ],
    ids=["none", "too few", "ragged", "cut", "x = 0 is the secret", "negative", "the prime", "over the prime"],
)
def test_malformed_shares_are_refused(shares: dict[int, bytes]) -> None:
    with pytest.raises(ValueError, match=r"holders|prime|secret"):
        rebuild(shares, 2)


def test_shares_of_a_number_that_no_secret_has() -> None:
    top = (2**256).to_bytes(33, "big")
    with pytest.raises(ValueError, match="no secret"):
        rebuild({1: top, 2: top, 3: top}, 2)


@pytest.mark.parametrize(("threshold", "count", "secret"), [(0, 3, 32), (4, 3, 32), (2, 3, 31), (2, 3, 33)])
def test_what_cannot_be_shared_is_refused(threshold: int, count: int, secret: int) -> None:
    with pytest.raises(ValueError, match="secrets of 32 bytes"):
        split([bytes(secret)], threshold, count)


@pytest.mark.parametrize(
    "terms", [(3, 2, 1), (4, 2, 1), (5, 3, 1), (3, 4, 1), (3, 3, 0), (3, 3, 3), (3, 2, 2), (2, 1, 1), (0, 0, 0)]
)
def test_thresholds_that_can_be_got_around_are_refused(terms: tuple[int, int, int]) -> None:
    for check in (check_threshold, honest_shares):
        with pytest.raises(ValueError, match="threshold"):
            check(*terms)


@pytest.mark.parametrize("terms", [(2, 2, 1), (3, 3, 1), (10, 7, 1), (10, 10, 9), (100, 67, 33)])
def test_honest_shares_by_its_formula(terms: tuple[int, int, int]) -> None:
    n, t, c = terms
    assert honest_shares(n, t, c) == min(t - c, math.ceil((n - c) * (2 * t - n - c) / (t - c)))
    assert 1 <= honest_shares(n, t, c) <= t - c


@pytest.mark.parametrize(("n", "t", "c"), THRESHOLDS)
def test_no_answers_of_honest_clients_release_a_sum_of_fewer(n: int, t: int, c: int) -> None:
    """Every set of answers that honest clients can be brought to give, one each, all colluders' shares known beside them."""
    honest, m = range(n - c), n - c
    answers = [sorted(set(_answers(u, n, t, m))) for u in honest]
    seeds = keys = np.zeros((1,) * m + (m,), np.int8)
    for u, choices in enumerate(answers):
        shape = [1] * m + [m]
        shape[u] = len(choices)
        seeds = seeds + np.array([s for s, _ in choices], np.int8).reshape(shape)
        keys = keys + np.array([d for _, d in choices], np.int8).reshape(shape)
    in_sum, opened = seeds + c >= t, keys + c >= t
    assert not (in_sum & opened).any(), "both secrets of one client"
    released = (in_sum | opened).all(axis=-1) & in_sum.any(axis=-1)
    least = int(in_sum.sum(axis=-1)[released].min())
    assert least >= honest_shares(n, t, c)
    if t == n:
        assert least == honest_shares(n, t, c) == n - c


def _answers(u: int, n: int, t: int, m: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(seeds, keys) of honest clients of which u can be made to give shares: none, or those of any S and D that it accepts."""
    found = [((0,) * m, (0,) * m)]
    others = [v for v in range(n) if v != u]
    for size in range(n - t + 1):
        for dropped in itertools.combinations(others, size):
            keys = tuple(int(v in dropped) for v in range(m))
            found.append((tuple(1 - key for key in keys), keys))
    return found


def test_the_bound_is_met_by_an_attack() -> None:
    """Six clients, threshold 4, one colludes: each honest client is told of others that dropped, and three of five are left
    out. With the threshold less what colluders know, three noise shares, the promise would not have held."""
    n, t, c = 6, 4, 1
    told = {0: {2, 3}, 1: {2, 4}, 2: {3, 4}, 3: {2, 4}, 4: {3}}
    assert all(u not in dropped and len(dropped) <= n - t for u, dropped in told.items())
    left_out = [v for v in told if sum(v in dropped for dropped in told.values()) + c >= t]
    in_sum = [v for v in told if sum(v not in dropped for dropped in told.values()) + c >= t]
    assert (left_out, in_sum) == ([2, 3, 4], [0, 1])
    assert honest_shares(n, t, c) == len(in_sum) < t - c


@pytest.mark.parametrize("m", [2, 3, 4])
def test_what_opened_secrets_release(m: int) -> None:
    """The claim beneath the bound, by linear algebra. Rows are the masked vectors of m honest clients, columns the masks that
    stay unknown; a combination that removes all columns is one that is released."""
    pairs = list(itertools.combinations(range(m), 2))
    for state in itertools.product("ABN", repeat=m):
        unknown = [(v,) for v in range(m) if state[v] != "A"] + [
            p for p in pairs if "B" not in (state[p[0]], state[p[1]])
        ]
        matrix = np.zeros((m, len(unknown)))
        for column, members in enumerate(unknown):
            matrix[members[0], column] = 1
            if len(members) == 2:
                matrix[members[1], column] = -1
        released = m - (np.linalg.matrix_rank(matrix) if unknown else 0)
        in_sum = np.array([s == "A" for s in state], float)
        expected = 1 if "N" not in state and in_sum.any() else 0
        assert released == expected, state
        if expected:
            assert not (in_sum @ matrix).any(), "and it is the plain sum of A"
