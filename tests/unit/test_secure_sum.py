"""Both halves of the secure sum together: rounds, restarts, what lies on the disk, and answers that the coordinator refuses."""

import dataclasses
import itertools
import json
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from client.secret_store import OWN_BYTES, RUNS_KEPT, SecretStore, load_peer_key, make_peer_key
from client.secure_sum import SecureSum
from common.errors import CheckpointError, CohortTooSmall, MalformedUpdate, PrivacyError, ProtocolError
from common.privacy.masks import KEY_BYTES, fingerprint
from common.privacy.secret_sharing import SHARE_BYTES
from common.secure_messages import (
    PAIR_BYTES,
    ConfirmAnswer,
    ConfirmRequest,
    DealAnswer,
    DealRequest,
    KeyAnswer,
    KeyRequest,
    MaskRequest,
    UnmaskAnswer,
    UnmaskRequest,
)
from server.secure_sum import MaskedRound, SumDeal
from tests.secure_cohort import IN_MEMORY, Cohort, from_bytes, plain_sum, random_vectors, restarted, to_bytes
from tests.support import RUN_ID


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        yield Path(name)


@pytest.fixture
def cohort(folder: Path) -> Cohort:
    """Five of whom four must survive."""
    return Cohort(folder, 5, 4)


def check_round(cohort: Cohort, deal: SumDeal, server_round: int, **named: Any) -> None:
    """A round of 100 words in which all that masked are in the sum, but for the late."""
    absent = named.pop("absent", ())
    vectors = random_vectors([place for place in deal.dealers if place not in absent], 100, server_round)
    total = cohort.sum(deal, server_round, vectors, **named)
    np.testing.assert_array_equal(
        total, plain_sum(v for place, v in vectors.items() if place not in named.get("late", ()))
    )


# Rounds.


def test_rounds_of_two_deals(cohort: Cohort) -> None:
    first = cohort.confirm(cohort.deal(cohort.request(1, 1, 3)))
    check_round(cohort, first, 1)
    check_round(cohort, first, 2, absent=(1,))
    check_round(cohort, first, 3, late=(5,))
    second = cohort.confirm(cohort.deal(cohort.request(2, 4, 2)))
    check_round(cohort, second, 4, silent=(3,))
    check_round(cohort, second, 5, absent=(2,), silent=())


def test_rounds_may_be_left_out(cohort: Cohort) -> None:
    deal = cohort.confirm(cohort.deal(cohort.request(1, 5, 6)))
    check_round(cohort, deal, 7, absent=(4,))
    check_round(cohort, deal, 10)


def test_who_did_not_deal_is_not_missed(cohort: Cohort) -> None:
    deal = cohort.confirm(cohort.deal(absent=(2,)))
    assert deal.dealers == (1, 3, 4, 5)
    check_round(cohort, deal, 1)
    vectors = random_vectors((1, 3, 4), 10)
    with pytest.raises(CohortTooSmall, match="3 masked vectors came in time and the sum needs 4"):
        cohort.sum(deal, 2, vectors)
    check_round(cohort, deal, 3)


def test_a_deal_that_one_did_not_confirm_is_replaced(cohort: Cohort) -> None:
    with pytest.raises(CohortTooSmall, match="1 of 5 dealers did not confirm"):
        cohort.confirm(cohort.deal(), absent=(3,))
    check_round(cohort, cohort.confirm(cohort.deal(cohort.request(2), absent=(3,))), 1)


def test_too_few_deal(cohort: Cohort) -> None:
    with pytest.raises(CohortTooSmall, match="3 of 5 clients dealt keys"):
        cohort.deal(absent=(1, 2))


def test_too_few_help_to_unmask(cohort: Cohort) -> None:
    deal = cohort.confirm(cohort.deal())
    with pytest.raises(CohortTooSmall, match="3 survivors helped to unmask"):
        check_round(cohort, deal, 1, silent=(1, 2))
    check_round(cohort, deal, 2)


@pytest.mark.parametrize("terms", [(2, 2, 1), (3, 3, 1), (4, 4, 3), (9, 6, 1), (12, 8, 3)])
def test_cohorts_of_other_sizes(terms: tuple[int, int, int], folder: Path) -> None:
    cohort = Cohort(folder, *terms)
    deal = cohort.confirm(cohort.deal(cohort.request(rounds=1)))
    gone = range(1, 1 + terms[0] - terms[1])
    check_round(cohort, deal, 1, absent=gone)


def test_two_runs_at_once(cohort: Cohort) -> None:
    deals = [cohort.confirm(cohort.deal(cohort.request(run_id=run))) for run in (RUN_ID, "b" * 32)]
    for server_round, deal in itertools.product((1, 2), deals):
        check_round(cohort, deal, server_round, absent=(server_round,))


# Restarts.


class Forgetful(Cohort):
    """Every client is a new process for every message."""

    def send(self, message: Any) -> Any:
        for place in self.keys:
            self.restart(place)
        return super().send(message)


def test_clients_restart_at_every_step(folder: Path) -> None:
    cohort = Forgetful(folder, 4, 3)
    deal = cohort.confirm(cohort.deal())
    check_round(cohort, deal, 1, absent=(2,))
    check_round(cohort, deal, 2)


def test_the_same_request_is_answered_alike_before_and_after_a_restart(cohort: Cohort) -> None:
    deal = cohort.deal()
    request = deal.confirm_request(1)
    answers = [cohort.clients[1].confirm(request) for _ in range(2)]
    answers.append(cohort.restart(1).confirm(request))
    assert answers[0] == answers[1] == answers[2]
    cohort.confirm(deal)
    vectors = random_vectors(deal.dealers, 5)
    for place in deal.dealers:
        cohort.mask(deal, 1, place, vectors[place])
    asked = UnmaskRequest(RUN_ID, 1, 1, (1, 2, 3, 4), (5,))
    shares = [cohort.clients[1].unmask(asked) for _ in range(2)]
    shares.append(cohort.restart(1).unmask(asked))
    assert shares[0] == shares[1] == shares[2]
    assert cohort.clients[1].confirm(request) == answers[0]


def test_a_masked_round_is_not_masked_again_after_a_restart(cohort: Cohort) -> None:
    deal = cohort.confirm(cohort.deal())
    vector = np.arange(5, dtype=np.uint32)
    cohort.mask(deal, 1, 1, vector)
    for client in (cohort.clients[1], cohort.restart(1)):
        with pytest.raises(PrivacyError, match="was masked before"):
            client.mask(RUN_ID, 1, 1, deal.mask_request(1, first=True).confirmations, vector)
    cohort.mask(deal, 2, 1, vector)


def test_a_round_is_checked_before_it_is_masked_and_after(cohort: Cohort) -> None:
    """Before, so that nothing is charged for a round that could not be masked; after, for its answer is sent again."""
    deal = cohort.confirm(cohort.deal())
    confirmations = deal.mask_request(2, first=True).confirmations
    before = stored(cohort, 2)
    for _ in range(2):
        place, terms = cohort.clients[2].check(RUN_ID, 1, 1, confirmations)
        assert (place, terms.digest) == (2, deal.request.digest)
    assert stored(cohort, 2) == before
    with pytest.raises(PrivacyError, match="0 confirmations of 4"):
        cohort.clients[2].check(RUN_ID, 1, 1, ())
    cohort.mask(deal, 1, 2, np.ones(3, np.uint32))
    assert cohort.clients[2].check(RUN_ID, 1, 1, ())[0] == 2


def test_the_vector_given_is_left_as_it_was(cohort: Cohort) -> None:
    deal = cohort.confirm(cohort.deal())
    vector = np.arange(5, dtype=np.uint32)
    masked = cohort.mask(deal, 1, 1, vector)
    np.testing.assert_array_equal(vector, np.arange(5))
    assert masked.dtype == np.uint32
    assert (masked != vector).any()


def test_a_coordinator_goes_on_from_its_file(cohort: Cohort) -> None:
    deal = restarted(cohort.confirm(cohort.deal()))
    check_round(cohort, deal, 1, absent=(2,))
    again = restarted(restarted(deal))
    assert again.to_state() == deal.to_state()
    assert again.transcript == deal.transcript
    check_round(cohort, again, 2)


def test_a_round_goes_on_with_the_survivors_that_were_told(cohort: Cohort) -> None:
    """The coordinator died when it had sent requests to unmask. Clients send their masked vectors again, the late one too."""
    deal = cohort.confirm(cohort.deal())
    vectors = random_vectors(deal.dealers, 10)
    masked = {place: cohort.mask(deal, 1, place, vectors[place]) for place in deal.dealers}
    sums = MaskedRound(deal, 1, 10)
    for place in (1, 2, 3, 5):
        sums.add(place, masked[place])
    asked = sums.close()
    cohort.clients[1].unmask(asked)
    again = MaskedRound(restarted(deal), 1, 10, survivors=asked.survivors)
    with pytest.raises(MalformedUpdate, match="place 4 is not waited for"):
        again.add(4, masked[4])
    for place in (5, 3, 2):
        again.add(place, masked[place])
    assert asked.dropped == (4,)
    short = MaskedRound(deal, 1, 10, survivors=asked.survivors)
    for place in (2, 3, 5):
        short.add(place, masked[place])
    with pytest.raises(CohortTooSmall, match="3 masked vectors came in time and the sum needs 4"):
        short.close()
    all_told = MaskedRound(deal, 1, 10, survivors=deal.dealers)
    for place in (1, 2, 3, 5):
        all_told.add(place, masked[place])
    with pytest.raises(CohortTooSmall, match="4 masked vectors came in time and the sum needs 5"):
        all_told.close()
    again.add(1, masked[1])
    assert again.close() == asked
    for place in asked.survivors:
        again.add_unmasked(cohort.clients[place].unmask(again.close()))
    np.testing.assert_array_equal(again.total(), plain_sum(vectors[place] for place in (1, 2, 3, 5)))


@pytest.mark.parametrize(
    "change",
    [
        {"dealers": [1, 2]},
        {"dealers": [1, 2, 3, 4, 99]},
        {"threshold": 3},
        {"tags": []},
        {"tags": ["00" * 32] * 5},
        {"mask_keys": ["zz"]},
        {"peers": []},
        {"run_id": None},
    ],
    ids=str,
)
def test_a_coordinator_s_damaged_file(cohort: Cohort, change: dict[str, Any]) -> None:
    state = cohort.confirm(cohort.deal()).to_state() | change
    with pytest.raises(CheckpointError, match="deal anew"):
        SumDeal.from_state(state)
    with pytest.raises(CheckpointError):
        SumDeal.from_state({})


# The client's disk.


def stored(cohort: Cohort, place: int, run_id: str = RUN_ID) -> Any:
    with SecretStore(cohort.folder / str(place), cohort.keys[place]).opened(run_id) as state:
        return state


def test_what_was_used_is_gone_from_the_disk(cohort: Cohort) -> None:
    deal = cohort.confirm(cohort.deal(cohort.request(rounds=4)))
    before = stored(cohort, 1).held
    own = [before.own[i * OWN_BYTES : (i + 1) * OWN_BYTES] for i in range(4)]
    check_round(cohort, deal, 2, absent=(3,))
    after = stored(cohort, 1).held
    assert after.own == bytes(OWN_BYTES) + own[2] + own[3]
    assert {len(shares) for shares in after.shares.values()} == {3 * PAIR_BYTES}
    assert all(shares == before.shares[place][PAIR_BYTES:] for place, shares in after.shares.items())
    assert {len(keys) for keys in after.mask_keys.values()} == {3 * KEY_BYTES}
    check_round(cohort, deal, 4)
    last = stored(cohort, 1).held
    assert last.own == bytes(OWN_BYTES)
    cohort.deal(cohort.request(2, 5, 1))
    replaced = stored(cohort, 1).held
    assert set(replaced.shares) == {1}, "nobody's shares of the earlier deal"


def test_nothing_lies_there_in_clear_or_for_others_to_read(cohort: Cohort) -> None:
    cohort.confirm(cohort.deal())
    held = stored(cohort, 1).held
    (path,) = (cohort.folder / "1").glob("*.run")
    content = path.read_bytes()
    secrets = [held.own[i : i + 16] for i in range(0, len(held.own), 16)]
    secrets += [shares[i + 8 : i + 24] for shares in held.shares.values() for i in range(0, len(shares), SHARE_BYTES)]
    assert len(secrets) == 12 + 30
    assert not [secret for secret in secrets if secret in content or secret.hex().encode() in content]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((cohort.folder / "1").stat().st_mode) == 0o700


def test_of_many_runs_the_last_keep_their_secrets(cohort: Cohort) -> None:
    runs = [f"{number:032x}" for number in range(RUNS_KEPT + 2)]
    deals = [cohort.confirm(cohort.deal(cohort.request(run_id=run))) for run in runs[:2]]
    check_round(cohort, deals[0], 2)
    for run in runs[2:]:
        cohort.deal(cohort.request(run_id=run))
    assert [stored(cohort, 1, run).held is not None for run in runs] == [False, False] + [True] * RUNS_KEPT
    assert (stored(cohort, 1, runs[0]).deal, stored(cohort, 1, runs[0]).masked_round) == (1, 2)
    with pytest.raises(ProtocolError, match="is not held here"):
        cohort.mask(deals[0], 3, 1, np.ones(1, np.uint32))
    with pytest.raises(ProtocolError, match="was answered before"):
        cohort.clients[1].deal(cohort.request(run_id=runs[0]))
    with pytest.raises(ProtocolError, match="was masked before"):
        cohort.clients[1].deal(cohort.request(2, 2, run_id=runs[0]))


@pytest.mark.parametrize(
    "damage",
    [lambda c: b"", lambda c: c[:-1], lambda c: c[:60] + b"x" + c[61:], lambda c: bytes(len(c))],
    ids=["empty", "cut", "changed", "zeros"],
)
def test_a_damaged_state_answers_nothing(cohort: Cohort, damage: Callable[[bytes], bytes]) -> None:
    deal = cohort.confirm(cohort.deal())
    (path,) = (cohort.folder / "1").glob("*.run")
    path.write_bytes(damage(path.read_bytes()))
    for call in (
        lambda: cohort.mask(deal, 1, 1, np.ones(1, np.uint32)),
        lambda: cohort.clients[1].deal(cohort.request(2)),
    ):
        with pytest.raises(PrivacyError, match="cannot be read with this peer key"):
            call()
    cohort.clients[1].deal(cohort.request(run_id="b" * 32))


def test_one_run_s_state_is_not_another_s(cohort: Cohort) -> None:
    cohort.deal()
    (path,) = (cohort.folder / "1").glob("*.run")
    shutil.copy(path, path.with_name("b" * 32 + ".run"))
    with pytest.raises(PrivacyError, match="cannot be read"):
        cohort.clients[1].deal(cohort.request(run_id="b" * 32))


def test_a_disk_that_refuses(cohort: Cohort, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    client = SecureSum(tmp_path / "file" / "secrets", cohort.keys[1], fingerprint(cohort.peers))
    with pytest.raises(PrivacyError, match="the disk refuses"):
        client.deal(cohort.request())


def test_two_processes_mask_a_round_once(cohort: Cohort) -> None:
    deal = cohort.confirm(cohort.deal())
    confirmations = deal.mask_request(1, first=True).confirmations
    gate, outcomes = threading.Barrier(4), []

    def attempt() -> None:
        client = SecureSum(cohort.folder / "1", cohort.keys[1], fingerprint(cohort.peers))
        gate.wait()
        try:
            outcomes.append(client.mask(RUN_ID, 1, 1, confirmations, np.ones(10, np.uint32)).tobytes())
        except PrivacyError:
            outcomes.append(b"")

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(bool, outcomes)) == [False, False, False, True]


def test_a_peer_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "peer.key"
    key = make_peer_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_peer_key(path).private_bytes_raw() == key.private_bytes_raw() == path.read_bytes()
    with pytest.raises(PrivacyError, match="exists"):
        make_peer_key(path)
    assert load_peer_key(path).private_bytes_raw() == key.private_bytes_raw()
    path.chmod(0o640)
    with pytest.raises(PrivacyError, match="has mode 640"):
        load_peer_key(path)
    path.chmod(0o600)
    path.write_bytes(bytes(31))
    with pytest.raises(PrivacyError, match="31 bytes"):
        load_peer_key(path)
    with pytest.raises(PrivacyError, match="cannot be read"):
        load_peer_key(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(PrivacyError, match="the disk refuses"):
        make_peer_key(tmp_path / "file" / "peer.key")


# The coordinator's half.


class Recorded:
    """One honest session as the coordinator saw it: bytes, and masked vectors."""

    def __init__(self, cohort: Cohort) -> None:
        deal = cohort.deal()
        self.dealt = [data for data in cohort.wire if b"secure_deal_answer" in data]
        cohort.confirm(deal)
        self.confirmed = [data for data in cohort.wire if b"secure_confirm_answer" in data]
        self.request = deal.request
        self.vectors = random_vectors((1, 2, 3, 4), 8)
        self.masked = {place: cohort.mask(deal, 1, place, self.vectors[place]) for place in (1, 2, 3, 4)}
        asked = UnmaskRequest(RUN_ID, 1, 1, (1, 2, 3, 4), (5,))
        self.unmasked = [to_bytes(cohort.clients[place].unmask(asked).to_record()) for place in (1, 2, 3, 4)]

    def dealing(self) -> SumDeal:
        deal = SumDeal(self.request)
        for data in self.dealt:
            deal.add_dealt(DealAnswer.from_record(from_bytes(data)))
        return deal

    def confirming(self) -> SumDeal:
        deal = self.dealing()
        deal.close_dealing()
        for data in self.confirmed:
            deal.add_confirmed(ConfirmAnswer.from_record(from_bytes(data)))
        return deal

    def unmasking(self, answers: int = 4) -> MaskedRound:
        deal = self.confirming()
        deal.close_confirming()
        sums = MaskedRound(deal, 1, 8)
        for place, vector in self.masked.items():
            sums.add(place, vector)
        sums.close()
        for data in self.unmasked[:answers]:
            sums.add_unmasked(UnmaskAnswer.from_record(from_bytes(data)))
        return sums


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(Cohort(tmp_path_factory.mktemp("recorded"), 5, 4))


def test_a_recorded_session_gives_its_sum(recorded: Recorded) -> None:
    """The coordinator's half needs nothing but what came over the wire."""
    np.testing.assert_array_equal(recorded.unmasking().total(), plain_sum(recorded.vectors.values()))


def again(recorded: Recorded, data: bytes, kind: Any, **changes: Any) -> Any:
    return dataclasses.replace(kind.from_record(from_bytes(data)), **changes)


REFUSED: dict[str, Callable[[Recorded], object]] = {
    "deal: twice": lambda r: r.dealing().add_dealt(again(r, r.dealt[0], DealAnswer)),
    "deal: after the close": lambda r: r.confirming().add_dealt(again(r, r.dealt[0], DealAnswer)),
    "deal: another run": lambda r: SumDeal(r.request).add_dealt(again(r, r.dealt[0], DealAnswer, run_id="a" * 32)),
    "deal: another deal": lambda r: SumDeal(r.request).add_dealt(again(r, r.dealt[0], DealAnswer, deal=2)),
    "deal: a place outside the cohort": lambda r: SumDeal(r.request).add_dealt(
        again(r, r.dealt[0], DealAnswer, place=6)
    ),
    "deal: fewer rounds": lambda r: SumDeal(r.request).add_dealt(
        again(r, r.dealt[0], DealAnswer, mask_keys=bytes(32), seed_digests=bytes(32), sealed=(bytes(66 + 48),) * 4)
    ),
    "deal: fewer peers": lambda r: SumDeal(r.request).add_dealt(
        again(r, r.dealt[0], DealAnswer, sealed=(bytes(3 * 66 + 48),) * 3)
    ),
    "confirm: twice": lambda r: r.confirming().add_confirmed(again(r, r.confirmed[0], ConfirmAnswer)),
    "confirm: before the close": lambda r: r.dealing().add_confirmed(again(r, r.confirmed[0], ConfirmAnswer)),
    "confirm: another run": lambda r: closed(r).add_confirmed(again(r, r.confirmed[0], ConfirmAnswer, run_id="a" * 32)),
    "confirm: another deal": lambda r: closed(r).add_confirmed(again(r, r.confirmed[0], ConfirmAnswer, deal=2)),
    "confirm: a place outside": lambda r: closed(r).add_confirmed(again(r, r.confirmed[0], ConfirmAnswer, place=6)),
    "confirm: fewer tags": lambda r: closed(r).add_confirmed(
        again(r, r.confirmed[0], ConfirmAnswer, tags=(bytes(32),))
    ),
    "mask: a stranger": lambda r: opened(r).add(6, np.zeros(8, np.uint32)),
    "mask: twice": lambda r: opened(r, 1).add(1, np.zeros(8, np.uint32)),
    "mask: another length": lambda r: opened(r).add(1, np.zeros(9, np.uint32)),
    "mask: another type": lambda r: opened(r).add(1, np.zeros(8, np.int64)),
    "mask: another shape": lambda r: opened(r).add(1, np.zeros((8, 1), np.uint32)),
    "mask: late": lambda r: r.unmasking().add(5, np.zeros(8, np.uint32)),
    "unmask: twice": lambda r: r.unmasking(4).add_unmasked(again(r, r.unmasked[0], UnmaskAnswer)),
    "unmask: another run": lambda r: r.unmasking(0).add_unmasked(
        again(r, r.unmasked[0], UnmaskAnswer, run_id="a" * 32)
    ),
    "unmask: another round": lambda r: r.unmasking(0).add_unmasked(
        again(r, r.unmasked[0], UnmaskAnswer, server_round=2)
    ),
    "unmask: from one that dropped": lambda r: r.unmasking(0).add_unmasked(
        again(r, r.unmasked[0], UnmaskAnswer, place=5)
    ),
    "unmask: from a stranger": lambda r: r.unmasking(0).add_unmasked(again(r, r.unmasked[0], UnmaskAnswer, place=6)),
    "unmask: a share less": lambda r: r.unmasking(0).add_unmasked(
        again(r, r.unmasked[0], UnmaskAnswer, shares=bytes(4 * SHARE_BYTES))
    ),
}


def closed(recorded: Recorded) -> SumDeal:
    deal = recorded.dealing()
    deal.close_dealing()
    return deal


def opened(recorded: Recorded, added: int = 0) -> MaskedRound:
    deal = recorded.confirming()
    deal.close_confirming()
    sums = MaskedRound(deal, 1, 8)
    for place in range(1, added + 1):
        sums.add(place, recorded.masked[place])
    return sums


@pytest.mark.parametrize("name", list(REFUSED))
def test_answers_that_do_not_fit_are_refused(name: str, recorded: Recorded) -> None:
    with pytest.raises(MalformedUpdate):
        REFUSED[name](recorded)


@pytest.mark.parametrize(
    ("dealer", "secret"), [(0, "the seed of place 1"), (3, "the seed of place 4"), (4, "the mask key of place 5")]
)
def test_a_wrong_share_makes_no_wrong_sum(recorded: Recorded, dealer: int, secret: str) -> None:
    """With no answer to spare: what was rebuilt is not what was dealt."""
    sums = recorded.unmasking(3)
    honest = UnmaskAnswer.from_record(from_bytes(recorded.unmasked[3]))
    shares = bytearray(honest.shares)
    shares[dealer * SHARE_BYTES + 20] ^= 1
    sums.add_unmasked(dataclasses.replace(honest, shares=bytes(shares)))
    with pytest.raises(MalformedUpdate, match=rf"{secret} is not the one|no secret"):
        sums.total()
    with pytest.raises(CohortTooSmall):
        sums.total()


def test_a_wrong_share_among_more_than_enough_shows(cohort: Cohort) -> None:
    deal = cohort.confirm(cohort.deal())
    sums = MaskedRound(deal, 1, 4)
    for place, vector in random_vectors(deal.dealers, 4).items():
        sums.add(place, cohort.mask(deal, 1, place, vector))
    for place in deal.dealers:
        answer = cohort.clients[place].unmask(sums.close())
        wrong = bytes(32) + b"\x01" + answer.shares[33:]
        sums.add_unmasked(dataclasses.replace(answer, shares=wrong) if place == 3 else answer)
    with pytest.raises(MalformedUpdate, match="do not fit together"):
        sums.total()


def test_a_sum_is_opened_once(recorded: Recorded) -> None:
    sums = recorded.unmasking()
    sums.total()
    with pytest.raises(CohortTooSmall):
        sums.total()


def test_a_round_of_another_deal_is_not_begun(recorded: Recorded) -> None:
    with pytest.raises(ValueError, match="server_round"):
        MaskedRound(recorded.confirming(), 4, 8)


def everything_in(thing: Any, seen: set[int] | None = None) -> Iterator[bytes]:
    """All bytes that an object leads to."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, bytes | bytearray):
        yield bytes(thing)
    elif isinstance(thing, str):
        yield thing.encode()
    elif isinstance(thing, dict):
        yield from (data for item in (*thing.keys(), *thing.values()) for data in everything_in(item, seen))
    elif isinstance(thing, list | tuple | set):
        yield from (data for item in thing for data in everything_in(item, seen))
    elif hasattr(thing, "__dict__"):
        yield from everything_in(vars(thing), seen)


def test_the_coordinator_keeps_no_client_s_secret(cohort: Cohort) -> None:
    deal = cohort.deal()
    sealed = deal.confirm_request(1).sealed
    assert sealed[0] in list(everything_in(deal))
    cohort.confirm(deal)
    secrets = [
        held.own[i : i + KEY_BYTES]
        for held in (stored(cohort, place).held for place in deal.dealers)
        for i in range(0, len(held.own), KEY_BYTES)
    ]
    assert len(secrets) == 5 * 3 * 2
    sums = MaskedRound(deal, 1, 4)
    for place, vector in random_vectors((1, 2, 3, 4), 4).items():
        sums.add(place, cohort.mask(deal, 1, place, vector))
    asked = sums.close()
    shares = [cohort.clients[place].unmask(asked) for place in asked.survivors]
    for answer in shares:
        sums.add_unmasked(answer)
    assert any(shares[0].shares in data for data in everything_in(sums)), "the search finds what is there"
    sums.total()
    left = b"\n".join([*everything_in(sums), *everything_in(deal), json.dumps(deal.to_state()).encode()])
    assert deal.mask_key(1, 1) in left
    for secret in [*secrets, *sealed, *(answer.shares[:SHARE_BYTES] for answer in shares)]:
        assert secret not in left
        assert secret.hex().encode() not in left


# The wire.

MESSAGES: list[Any] = [
    DealRequest(RUN_ID, 1, 1, 2, (bytes(32), b"\1" * 32), 2, 1),
    DealAnswer(RUN_ID, 1, 1, bytes(64), bytes(64), (bytes(2 * 66 + 48),)),
    ConfirmRequest(RUN_ID, 1, (1, 2), (bytes(64), bytes(64)), (bytes(2 * 66 + 48),)),
    ConfirmAnswer(RUN_ID, 1, 1, (bytes(32),)),
    MaskRequest(1, ()),
    MaskRequest(1, (bytes(32), bytes(32))),
    UnmaskRequest(RUN_ID, 1, 1, (1, 2), ()),
    UnmaskRequest(RUN_ID, 1, 10**8, (1, 1000), (2, 3)),
    UnmaskAnswer(RUN_ID, 1, 1, bytes(66)),
    KeyRequest(RUN_ID),
    KeyAnswer(bytes(32)),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_messages_survive_the_wire(message: Any) -> None:
    got = type(message).from_record(from_bytes(to_bytes(message.to_record())))
    assert got == message
    assert type(got) is type(message)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_other_records_are_refused(message: Any) -> None:
    kind, record = type(message), message.to_record()
    fields = record[message.name]
    for wrong in (
        RecordDict(),
        RecordDict({"other": fields}),
        RecordDict({message.name: fields, "more": ConfigRecord()}),
        RecordDict({message.name: ConfigRecord()}),
        RecordDict({message.name: ConfigRecord({**fields, "more": 1})}),
        *(RecordDict({message.name: ConfigRecord({k: v for k, v in fields.items() if k != gone})}) for gone in fields),
    ):
        with pytest.raises(message.error, match="want one ConfigRecord"):
            kind.from_record(wrong)


def test_the_bytes_of_messages() -> None:
    assert [message.num_bytes for message in MESSAGES] == [64, 308, 308, 32, 0, 64, 0, 0, 66, 0, 32]


def test_every_field_of_an_unmask_request_is_in_its_digest() -> None:
    asked = UnmaskRequest(RUN_ID, 1, 1, (1, 2, 3), (4,))
    changes: list[dict[str, Any]] = [
        {"run_id": "b" * 32},
        {"deal": 2},
        {"server_round": 2},
        {"survivors": (1, 2)},
        {"dropped": ()},
        {"survivors": (1, 2, 3, 4), "dropped": ()},
        {"survivors": (1, 2), "dropped": (3, 4)},
    ]
    assert len({asked.digest, *(dataclasses.replace(asked, **change).digest for change in changes)}) == 8


OUT_OF_RANGE: list[tuple[int, dict[str, Any]]] = [
    (1, {"place": 0}),
    (1, {"place": 1001}),
    (1, {"deal": 0}),
    (1, {"deal": 10**9}),
    (1, {"run_id": "x" * 32}),
    (1, {"mask_keys": b""}),
    (1, {"mask_keys": bytes(63)}),
    (1, {"mask_keys": bytes(32 * 1001)}),
    (1, {"seed_digests": bytes(32)}),
    (1, {"sealed": ()}),
    (1, {"sealed": (bytes(2 * 66 + 47),)}),
    (1, {"sealed": (bytes(2 * 66 + 48),) * 1000}),
    (2, {"dealers": (1,), "mask_keys": (bytes(64),), "sealed": ()}),
    (2, {"dealers": (1, 1001)}),
    (2, {"mask_keys": (bytes(64), bytes(32))}),
    (2, {"sealed": (bytes(180), bytes(180))}),
    (3, {"tags": ()}),
    (3, {"tags": (bytes(31),)}),
    (3, {"tags": (bytes(32),) * 1000}),
    (3, {"place": 0}),
    (4, {"deal": 0}),
    (4, {"confirmations": (b"",)}),
    (4, {"confirmations": (bytes(32),) * 1000}),
    (6, {"server_round": 0}),
    (6, {"server_round": 10**8 + 1}),
    (6, {"survivors": (2, 1)}),
    (6, {"survivors": (1, 1001)}),
    (6, {"dropped": (2,)}),
    (8, {"shares": b""}),
    (8, {"shares": bytes(65)}),
    (8, {"shares": bytes(33 * 1001)}),
    (8, {"place": 0}),
    (8, {"server_round": 0}),
    (8, {"run_id": ""}),
    (9, {"run_id": "x" * 32}),
    (10, {"public_key": bytes(31)}),
    (10, {"public_key": bytes(33)}),
]


@pytest.mark.parametrize(("which", "change"), OUT_OF_RANGE, ids=lambda value: str(value)[:40])
def test_messages_out_of_range_cannot_be_made(which: int, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        dataclasses.replace(MESSAGES[which], **change)


def test_clients_that_were_asked_different_things_are_in_no_sum(tmp_path: Path) -> None:
    """With less noise asked of the others, one client's share would be all there is: their masks must not cancel."""
    cohort = Cohort(tmp_path, 3, 3)
    deal = cohort.confirm(cohort.deal())
    vector = np.arange(4, dtype=np.uint32)
    sums = MaskedRound(deal, 1, 4, asked="one thing")
    for place, asked in ((1, "one thing"), (2, "one thing"), (3, "another")):
        request = deal.mask_request(place, first=True)
        client = cohort.clients[place]
        sums.add(place, client.mask(deal.request.run_id, 1, request.deal, request.confirmations, vector, asked))
    for place in (1, 2, 3):
        sums.add_unmasked(cohort.clients[place].unmask(sums.close()))
    assert not (sums.total() == 3 * vector).any()
