"""Whoever falls silent, and whenever: the sum is the survivors' sum to the last bit, or there is none. And whatever comes
over the wire: a message, or a typed error."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CohortTooSmall, PrivacyError, ProtocolError
from common.secure_messages import (
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


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[int, int, int]:
    """Peers, threshold, colluders: all that the rules allow for seven peers."""
    peers = draw(st.integers(2, 7))
    colluders = draw(st.integers(1, max(1, (peers - 1) // 2)))
    return peers, draw(st.integers(max(colluders + 1, (peers + colluders) // 2 + 1), peers)), colluders


def some(draw: st.DrawFn, places: list[int], most: int) -> set[int]:
    """At most `most` of them."""
    return set(draw(st.lists(st.sampled_from(places), unique=True, max_size=most))) if places else set()


def one_deal(draw: st.DrawFn, cohort: Cohort, number: int, first_round: int, rounds: int) -> SumDeal | None:
    """Some are absent from the dealing, and perhaps one from the confirming: then there is no deal."""
    places = list(cohort.clients)
    slack = len(places) - cohort.threshold + 1
    request = cohort.request(number, first_round, rounds)
    dealing = draw(st.sampled_from([0, 0, 0, slack]))
    absent = some(draw, places, dealing)
    if len(places) - len(absent) < cohort.threshold:
        try:
            cohort.deal(request, absent)
        except CohortTooSmall:
            return None
        raise AssertionError("too few dealt, and the deal went on")
    deal = cohort.deal(request, absent)
    away = some(draw, list(deal.dealers), draw(st.sampled_from([0, 0, 0, 1])))
    try:
        cohort.confirm(deal, away)
    except CohortTooSmall:
        assert away
        return None
    assert not away
    return deal


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_sum_is_the_survivors_sum_or_nothing(data: st.DataObject) -> None:
    draw = data.draw
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        cohort = Cohort(Path(folder), *draw(cohorts()))
        number, server_round, deal = 0, 0, None
        for _ in range(draw(st.integers(1, 3))):
            number += 1
            rounds = draw(st.integers(1, 3))
            deal = one_deal(draw, cohort, number, server_round + 1, rounds)
            if deal is None:
                continue
            for _ in range(draw(st.integers(1, rounds))):
                server_round += 1
                if draw(st.booleans()):
                    deal = restarted(deal)
                one_round(draw, cohort, deal, server_round)


def one_round(draw: st.DrawFn, cohort: Cohort, deal: SumDeal, server_round: int) -> None:
    dealers = list(deal.dealers)
    for place in some(draw, dealers, 2):
        cohort.restart(place)
    vectors = random_vectors(dealers, draw(st.integers(1, 9)), server_round)
    slack = len(dealers) - cohort.threshold + 1
    never, late = some(draw, dealers, slack), some(draw, dealers, draw(st.integers(0, 1)))
    sums = MaskedRound(deal, server_round, len(vectors[dealers[0]]))
    masked = {place: cohort.mask(deal, server_round, place, vectors[place]) for place in dealers if place not in never}
    for place in draw(st.permutations(sorted(masked.keys() - late))):
        sums.add(place, masked[place])
    in_time = masked.keys() - late
    try:
        asked = sums.close()
    except CohortTooSmall:
        assert len(in_time) < cohort.threshold
        return
    assert set(asked.survivors) == in_time
    for place in late & masked.keys():
        refused(lambda place=place: sums.add(place, masked[place]))  # type: ignore[misc]
        refused(lambda place=place: cohort.clients[place].unmask(asked))  # type: ignore[misc]
    helping = in_time - some(draw, list(asked.survivors), len(asked.survivors) - cohort.threshold + 1)
    for place in helping:
        answer = cohort.clients[place].unmask(cohort.send(asked))
        if draw(st.booleans()):
            assert cohort.restart(place).unmask(cohort.send(asked)) == answer
        sums.add_unmasked(cohort.send(answer))
    if len(helping) < cohort.threshold:
        refused(sums.total)
        return
    np.testing.assert_array_equal(sums.total(), plain_sum(vectors[place] for place in in_time))


def refused(call: object) -> None:
    try:
        call()  # type: ignore[operator]
    except (ProtocolError, PrivacyError):
        return
    raise AssertionError("it was answered")


BYTES = st.sampled_from([0, 1, 31, 32, 33, 64, 66, 114, 180]).flatmap(
    lambda size: st.binary(min_size=size, max_size=size)
)
VALUES = st.one_of(
    st.booleans(),
    st.integers(-3, 4),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=4),
    st.just(RUN_ID),
    BYTES,
    st.lists(st.integers(0, 5), max_size=4),
    st.lists(BYTES, max_size=3),
    st.lists(st.floats(), max_size=2),
    st.lists(st.text(max_size=2), max_size=2),
)
KINDS: list[Any] = [
    KeyRequest,
    KeyAnswer,
    DealRequest,
    DealAnswer,
    ConfirmRequest,
    ConfirmAnswer,
    MaskRequest,
    UnmaskRequest,
    UnmaskAnswer,
]


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from(KINDS))
def test_any_record_is_a_message_or_a_typed_error(data: st.DataObject, kind: Any) -> None:
    names = [f.name for f in dataclasses.fields(kind)]
    values = {name: data.draw(VALUES) for name in names if data.draw(st.integers(0, 20))}
    record = RecordDict({kind.name: ConfigRecord(values)})
    try:
        got = kind.from_record(record)
    except kind.error:
        return
    assert from_bytes(to_bytes(got.to_record())) == record
