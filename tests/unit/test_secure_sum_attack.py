"""The best attack on what honest clients do give: one sum of at least `honest_shares` of them comes out, and no more.

The adversary is the coordinator with some clients: it holds all that went over the wire, also the vectors that it said were
late, and all that its clients have on their disks.
"""

import itertools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scipy import stats

from client.secret_store import OWN_BYTES, SecretStore
from common.privacy.masks import KEY_BYTES, add_mask, pair_mask_key, pair_sign, self_mask_key
from common.privacy.secret_sharing import SHARE_BYTES, honest_shares, rebuild
from common.secure_messages import UnmaskRequest
from server.secure_sum import SumDeal
from tests.secure_cohort import IN_MEMORY, Cohort, plain_sum
from tests.support import RUN_ID

DIMENSION = 20_000


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        yield Path(name)


class Adversary:
    """Opens whatever it can of one round and takes all known masks off any set of vectors."""

    def __init__(self, cohort: Cohort, deal: SumDeal, colluders: Iterable[int]) -> None:
        self.cohort, self.deal, self.colluders = cohort, deal, set(colluders)
        self.masked: dict[int, np.ndarray] = {}
        self.seeds: dict[int, bytes] = {}
        self.keys: dict[int, bytes] = {}
        self.seed_shares: dict[int, dict[int, bytes]] = {place: {} for place in deal.dealers}
        self.key_shares: dict[int, dict[int, bytes]] = {place: {} for place in deal.dealers}
        for place in self.colluders:
            with SecretStore(cohort.folder / str(place), cohort.keys[place]).opened(RUN_ID) as state:
                assert state.held is not None
                self.keys[place], self.seeds[place] = state.held.own[:KEY_BYTES], state.held.own[KEY_BYTES:OWN_BYTES]
                for dealer, shares in state.held.shares.items():
                    self.key_shares[dealer][place] = shares[:SHARE_BYTES]
                    self.seed_shares[dealer][place] = shares[SHARE_BYTES : 2 * SHARE_BYTES]

    def ask(self, place: int, survivors: Iterable[int]) -> None:
        """Bring an honest client to unmask, with survivors of the coordinator's choice."""
        chosen = tuple(sorted(survivors))
        dropped = tuple(v for v in self.deal.dealers if v not in chosen)
        answer = self.cohort.clients[place].unmask(UnmaskRequest(RUN_ID, 1, 1, chosen, dropped))
        for i, dealer in enumerate(self.deal.dealers):
            held = self.seed_shares if dealer in chosen else self.key_shares
            held[dealer][place] = answer.shares[i * SHARE_BYTES : (i + 1) * SHARE_BYTES]

    def open(self) -> None:
        """Rebuild every secret of which there are shares enough."""
        for shares, secrets in ((self.seed_shares, self.seeds), (self.key_shares, self.keys)):
            for dealer, held in shares.items():
                if len(held) >= self.deal.request.threshold:
                    (secrets[dealer],) = rebuild(held, self.deal.request.threshold)

    def residue(self, places: Iterable[int]) -> np.ndarray:
        """The sum of these masked vectors without any mask that is known or cancels."""
        total, transcript = np.zeros(DIMENSION, np.uint32), self.deal.transcript
        for place in places:
            total += self.masked[place]
            if place in self.seeds:
                add_mask(total, self_mask_key(self.seeds[place], transcript, 1, place), -1)
            for other in self.deal.dealers:
                holder, partner = (other, place) if other in self.keys else (place, other)
                if other != place and holder in self.keys:
                    key = X25519PrivateKey.from_private_bytes(self.keys[holder])
                    shared = pair_mask_key(key, self.deal.mask_key(partner, 1), transcript, 1, (place, other))
                    add_mask(total, shared, -pair_sign(place, other))
        return total


def uniform(words: np.ndarray) -> bool:
    """No test at hand tells it from random words: of its bytes, its size, and one word after the other."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    scaled = words / 2**32
    tests = [
        stats.chisquare(counts).pvalue,
        stats.kstest(scaled, "uniform").pvalue,
        stats.kstest((words[1:] - words[:-1]) / 2**32, "uniform").pvalue,
    ]
    return min(tests) > 1e-7


def told(honest: Iterable[int], *dropped: int) -> dict[int, set[int]]:
    return {place: set(dropped) for place in honest}


# Peers, threshold, colluders (the last places), what each honest client is told of the dropped, who is then in the sum.
CASES = {
    "all survive": (5, 4, 1, told((1, 2, 3, 4)), {1, 2, 3, 4}),
    "one is said to be late": (5, 4, 1, told((1, 2, 3), 4), {1, 2, 3}),
    "a colluder is said to be late": (5, 4, 1, told((1, 2, 3, 4), 5), {1, 2, 3, 4}),
    "two colluders": (7, 5, 2, told((1, 2, 3, 4, 5)), {1, 2, 3, 4, 5}),
    "two colluders, two are late": (7, 5, 2, told((1, 2, 3), 4, 5), {1, 2, 3}),
    "too few answer": (5, 4, 1, told((1, 2)), set()),
    "some are told one thing, some another": (5, 4, 1, told((1, 2), 4) | told((3, 4)), set()),
    "each is told another thing: the least sum that there is": (
        6,
        4,
        1,
        {1: {3, 4}, 2: {3, 5}, 3: {4, 5}, 4: {3, 5}, 5: {4}},
        {1, 2},
    ),
    "nobody is asked": (4, 3, 1, {}, set()),
}


@pytest.mark.parametrize("name", list(CASES))
def test_only_the_honest_clients_sum_comes_out(name: str, folder: Path) -> None:
    peers, threshold, colluding, answers, in_sum = CASES[name]
    cohort = Cohort(folder, peers, threshold, colluding)
    deal = cohort.confirm(cohort.deal(cohort.request(rounds=1)))
    honest = range(1, peers - colluding + 1)
    adversary = Adversary(cohort, deal, range(honest.stop, peers + 1))
    vectors = {place: np.full(DIMENSION, place, np.uint32) for place in honest}
    adversary.masked = {place: cohort.mask(deal, 1, place, vectors[place]) for place in honest}
    for masked in adversary.masked.values():
        assert uniform(masked), "as it comes over the wire"
    for place, dropped in answers.items():
        adversary.ask(place, set(deal.dealers) - dropped)
    adversary.open()
    assert not set(honest) & adversary.seeds.keys() & adversary.keys.keys(), "both secrets of an honest client"
    assert not in_sum or len(in_sum) >= honest_shares(peers, threshold, colluding)
    for size in range(1, len(honest) + 1):
        for places in itertools.combinations(honest, size):
            residue = adversary.residue(places)
            if set(places) == in_sum:
                np.testing.assert_array_equal(residue, plain_sum(vectors[place] for place in places))
            else:
                assert uniform(residue), f"something of {places} shows"


def test_the_attack_opens_a_client_when_more_collude_than_was_said(folder: Path) -> None:
    """It is no straw man: with all others in league, one honest vector is its own sum."""
    cohort = Cohort(folder, 5, 4)
    deal = cohort.confirm(cohort.deal(cohort.request(rounds=1)))
    adversary = Adversary(cohort, deal, (2, 3, 4, 5))
    vector = np.full(DIMENSION, 7, np.uint32)
    adversary.masked = {1: cohort.mask(deal, 1, 1, vector)}
    assert uniform(adversary.masked[1])
    adversary.open()
    np.testing.assert_array_equal(adversary.residue([1]), vector)


def test_what_looks_uniform_to_the_attack() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, DIMENSION, dtype=np.uint32)
    assert uniform(words)
    assert not uniform(words >> 1)
    assert not uniform(words & ~np.uint32(1))
    assert not uniform(np.repeat(words[: DIMENSION // 2], 2))
    assert not uniform(np.arange(DIMENSION, dtype=np.uint32))
