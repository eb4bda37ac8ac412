"""What `visard plan` says of the distributed model, against the lattice, the secure sum's messages and what a run refuses."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError
from common.privacy.lattice import Lattice
from server.secure_sum import MaskedRound, SumDeal
from simulations.plan import Plan, make_plan
from simulations.plan_advice import suggest
from simulations.plan_bytes import deal_bytes
from simulations.plan_question import ALONE, CENTRAL, DISTRIBUTED, LOCAL, Asked, ask
from tests.secure_cohort import IN_MEMORY, Cohort
from tests.support import LFW_WITH_ROUNDS


def plan_of(options: dict[str, Any], **asked: Any) -> Plan:
    return make_plan(ask(LFW_WITH_ROUNDS, options, Asked(**asked)), tight=False)


def test_distributed_noise_is_that_of_the_lattice() -> None:
    plan = plan_of({"privacy-model": "distributed", "num-clients": 12, "survivors": 9, "colluders": 2})
    question, privacy = plan.question, plan.question.config.privacy
    lattice = Lattice.of(
        dimension=plan.parameters,
        max_grad_norm=privacy.max_grad_norm,
        noise_multiplier=plan.noise_multiplier,
        shares=question.noise_shares,
        clients=question.clients,
        expected_units=question.batch,
    )
    # It takes up to 0.1 % more, for what rounding may do.
    noise = lattice.noise_deviation(question.clients) / question.batch
    assert 1 <= noise / plan.chosen.signals.mean_noise <= 1.0011  # type: ignore[operator]


def test_survivors_by_default() -> None:
    for clients in range(2, 200):
        question = ask(LFW_WITH_ROUNDS, {"num-clients": clients}, Asked())
        cohort = question.cohort
        assert cohort is not None
        assert (cohort.peers, cohort.colluders) == (clients, 1)
        assert 2 * cohort.survivors > clients + 1
        assert 4 * clients <= 5 * cohort.survivors <= 5 * clients
        assert 1 <= question.noise_shares < cohort.survivors


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num-clients": 1}, "two clients or more"),
        ({"num-clients": 1001}, "peers = 1001"),
        ({"survivors": 5}, "use 6 to 10"),
        ({"num-clients": 3, "colluders": 3}, "colluders = 3"),
        ({"peers": 12}, "num-clients = 10"),
    ],
)
def test_where_there_is_no_sum_distributed_is_left_out(options: dict[str, Any], why: str) -> None:
    plan = plan_of(options | {"privacy-model": "local"})
    assert list(plan.models) == [LOCAL, CENTRAL, ALONE]
    assert any(note.startswith("no distributed run") and why in note for note in plan.notes)
    assert not any(suggestion.options.get("privacy-model") for suggestion in suggest(plan))
    with pytest.raises(ConfigError, match=why):
        ask(LFW_WITH_ROUNDS, options | {"privacy-model": "distributed"}, Asked())


def test_a_sum_that_passes_its_range_is_left_out() -> None:
    persons, distributed = 1e10, {"privacy-model": "distributed"}
    with pytest.raises(ConfigError, match="that 32 bits hold"):
        plan_of(distributed, persons=persons)
    while DISTRIBUTED not in plan_of({}, persons=persons / 2).models:
        persons /= 2
    # As many as fit, but not twice as many: those are not advised.
    within = plan_of(distributed, persons=persons / 2)
    assert not any("persons" in suggestion.options for suggestion in suggest(within))
    left_out = plan_of({"privacy-model": "local"}, persons=persons)
    assert DISTRIBUTED not in left_out.models
    assert any("no distributed run" in note and "that 32 bits hold" in note for note in left_out.notes)
    assert not any("privacy-model" in suggestion.options for suggestion in suggest(left_out))
    # The moments alone, whose sums are smaller, are a run.
    assert DISTRIBUTED in plan_of({"num-rounds": 0}, persons=persons).models


@pytest.mark.parametrize(
    ("options", "rounds"),
    [({}, 50), ({"deal-rounds": 7}, 7), ({"num-rounds": 20}, 21), ({"num-rounds": 0}, 1), ({"moment-rounds": 0}, 50)],
)
def test_keys_are_dealt_for_rounds_that_there_are(options: dict[str, Any], rounds: int) -> None:
    traffic = plan_of(options).models[DISTRIBUTED].traffic
    assert traffic.dealt_rounds == rounds
    assert (traffic.dealt, traffic.unmasking) == (deal_bytes(10, rounds), 330)
    assert traffic.keys == traffic.dealt + rounds * traffic.unmasking


def test_bytes_of_keys_are_those_of_a_client_s_messages() -> None:
    peers, rounds = 5, 3
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        cohort = Cohort(Path(folder), peers, threshold=4)
        request = cohort.request(rounds=rounds)
        deal = SumDeal(request)
        answers = {place: client.deal(request) for place, client in cohort.clients.items()}
        for answer in answers.values():
            deal.add_dealt(answer)
        deal.close_dealing()
        shown = deal.confirm_request(2)
        cohort.confirm(deal)
        messages = [request, answers[2], shown, cohort.clients[2].confirm(shown), deal.mask_request(2, first=True)]
        assert sum(message.num_bytes for message in messages) == deal_bytes(peers, rounds)
        masked = MaskedRound(deal, 1, 8)
        for place in cohort.clients:
            masked.add(place, cohort.mask(deal, 1, place, np.zeros(8, np.uint32)))
        unmasked = cohort.clients[2].unmask(masked.close()).num_bytes
    traffic = plan_of({"num-clients": peers, "deal-rounds": rounds}).models[DISTRIBUTED].traffic
    assert (traffic.dealt, traffic.unmasking) == (deal_bytes(peers, rounds), unmasked)


def test_distributed_is_advised_in_place_of_local() -> None:
    local = plan_of({"privacy-model": "local"})
    advised = [suggestion for suggestion in suggest(local) if "privacy-model" in suggestion.options]
    assert [suggestion.options for suggestion in advised] == [{"privacy-model": "distributed"}]
    assert advised[0].after == local.models[DISTRIBUTED].signals.moment_snr
    for other in ({"privacy-model": "local", "local-steps": 2}, {}, {"privacy-model": "distributed"}):
        assert not any("privacy-model" in suggestion.options for suggestion in suggest(plan_of(other)))


def test_against_whom_distributed_holds_is_noted() -> None:
    (note,) = [note for note in plan_of({"survivors": 7, "colluders": 2}).notes if "distributed" in note]
    assert "the coordinator and any 2 of the 10 clients" in note
    assert "without 7 survivors and 4 honest noise shares" in note
    assert "all 10 clients answering" in note
