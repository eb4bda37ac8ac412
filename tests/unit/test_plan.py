"""The planner against brute force, simulated noise, the accountant that runs use, and what was seen of recorded runs."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from common.config import flat_fields
from common.errors import ConfigError
from common.models.discriminators import DISCRIMINATORS, discriminator_of, discriminator_size
from common.models.features import RandomFeatures
from common.models.flat import num_parameters
from common.privacy.accounting import calibrate_noise_multiplier, epsilon_of
from common.privacy.planner import run_releases, with_noise
from common.privacy.units import PrivacyModel
from common.sections import ModelConfig
from simulations.plan import Plan, make_plan, noise_factor
from simulations.plan_advice import suggest
from simulations.plan_budget import MAX_ROUNDS, Schedule, least_moment_noise
from simulations.plan_bytes import Traffic
from simulations.plan_cli import run_command
from simulations.plan_question import ALONE, CENTRAL, DISTRIBUTED, LOCAL, Asked, ask
from simulations.plan_verdict import RECORDED_RUNS, ROUNDS_SEEN, THRESHOLDS, Verdict, judge
from simulations.recipe import load_recipe
from tests.support import LFW_WITH_ROUNDS


def plan_of(recipe: str = "lfw", options: dict[str, Any] | None = None, *, tight: bool = False, **asked: Any) -> Plan:
    return make_plan(ask(recipe, options or {}, Asked(**asked)), tight=tight)


SCHEDULES = [
    Schedule(1e-5, 0.15, 1, None),
    Schedule(1e-5, 0.01, 1, 20.0),
    Schedule(1e-7, 0.3, 4, 5.0),
    Schedule(1e-5, 1.0, 1, None),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(("noise", "rounds"), [(0.1, 3), (1.3, 10_000), (30.0, 7)])
def test_the_quick_epsilon_is_the_full_one(schedule: Schedule, noise: float, rounds: int) -> None:
    full = schedule.epsilon(noise, rounds)
    assert full == epsilon_of(schedule.releases(noise, rounds), schedule.delta)
    assert full <= schedule.quick_epsilon(noise, rounds) <= full * (1 + 1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=str)
@pytest.mark.parametrize(("epsilon", "rounds"), [(2.0, 1), (2.0, 300), (9.0, 40)])
def test_noise_for_an_epsilon_costs_that_epsilon(schedule: Schedule, epsilon: float, rounds: int) -> None:
    noise = schedule.least_noise(epsilon, rounds)
    assert 0.995 * epsilon <= schedule.epsilon(noise, rounds) <= epsilon
    assert schedule.epsilon(noise / 1.0011, rounds) > epsilon
    # What fits with that noise is that many rounds, and perhaps the few that the 0.1 % leave room for.
    assert rounds <= schedule.most_rounds(epsilon, noise) <= 1.01 * rounds + 1


@pytest.mark.parametrize(("epsilon", "rounds"), [(2.0, 300), (20.0, 3)])
def test_noise_is_that_of_a_run(epsilon: float, rounds: int) -> None:
    for schedule in (SCHEDULES[1], SCHEDULES[3]):
        steps, fixed = rounds * schedule.local_steps, schedule.releases(0.0, 0)
        run = calibrate_noise_multiplier(epsilon, schedule.delta, schedule.sample_rate, steps, fixed)
        assert schedule.least_noise(epsilon, rounds) == run


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(("epsilon", "noise"), [(2.0, 1.1), (4.0, 2.5), (1.0, 6.0), (1.0, 0.5)])
def test_rounds_are_the_most_that_fit(schedule: Schedule, epsilon: float, noise: float) -> None:
    found = schedule.most_rounds(epsilon, noise)
    limit = min(found + 2, 60)
    counted = 0
    while counted < limit and schedule.quick_epsilon(noise, counted + 1) <= epsilon:
        counted += 1
    assert counted == min(found, limit)
    if found:
        assert schedule.epsilon(noise, found) <= epsilon
    assert schedule.epsilon(noise, found + 1) > epsilon


def test_rounds_end_at_what_a_run_may_have() -> None:
    assert Schedule(1e-5, 1e-6, 1, None).most_rounds(10.0, 50.0) == MAX_ROUNDS


def test_epsilon_rises_with_rounds_and_falls_with_noise() -> None:
    schedule = SCHEDULES[1]
    by_rounds = [schedule.quick_epsilon(1.0, rounds) for rounds in (0, 1, 10, 100, 1000)]
    by_noise = [schedule.quick_epsilon(noise, 100) for noise in (8.0, 4.0, 1.0, 0.3, 0.02, 0.005)]
    assert all(a < b for a, b in itertools.pairwise(by_rounds))
    assert all(a < b for a, b in itertools.pairwise(by_noise))
    assert by_noise[-1] == math.inf
    assert Schedule(1e-5, 0.1, 1, None).quick_epsilon(1.0, 0) == 0.0


def test_the_least_moment_noise_costs_that_epsilon() -> None:
    noise = least_moment_noise(3.0, 1e-5)
    assert 0.995 * 3.0 <= Schedule(1e-5, 0.1, 1, noise).epsilon(0.0, 0) <= 3.0
    with pytest.raises(ConfigError, match="too small for any release"):
        least_moment_noise(1e-9, 1e-5)


@pytest.mark.parametrize(
    ("given", "solved"),
    [
        ({}, "noise-multiplier"),
        ({"epsilon": 12.0}, "noise-multiplier"),
        ({"num-rounds": 20}, "noise-multiplier"),
        ({"epsilon": 12.0, "num-rounds": 20}, "noise-multiplier"),
        ({"noise-multiplier": 0.0, "num-rounds": 20}, "noise-multiplier"),
        ({"noise-multiplier": 2.0}, "epsilon"),
        ({"noise-multiplier": 2.0, "num-rounds": 20}, "epsilon"),
        ({"noise-multiplier": 2.0, "epsilon": 12.0}, "rounds"),
    ],
)
def test_two_of_three_give_the_third(given: dict[str, Any], solved: str) -> None:
    plan = plan_of(LFW_WITH_ROUNDS, given)
    assert plan.question.solved == solved
    assert plan.noise_multiplier == pytest.approx(given.get("noise-multiplier") or plan.noise_multiplier)
    if solved != "rounds":
        assert plan.rounds == given.get("num-rounds", 100)
    if solved == "epsilon":
        assert plan.budget == plan.epsilon
    else:
        assert plan.budget == given.get("epsilon", 10.0)
        assert 0.99 * plan.budget <= plan.epsilon <= plan.budget


def test_a_recipe_with_its_own_noise_is_priced(tmp_path: Any) -> None:
    path = tmp_path / "own.toml"
    path.write_text("noise-multiplier = 1.5\nnum-rounds = 10\nepsilon = 9.0\n")
    assert plan_of(str(path)).question.solved == "epsilon"
    assert plan_of(str(path), {"epsilon": 9.0}).question.solved == "noise-multiplier"


def test_all_three_are_refused() -> None:
    with pytest.raises(ConfigError, match="give two"):
        ask("lfw", {"epsilon": 9.0, "noise-multiplier": 2.0, "num-rounds": 5}, Asked())


def test_rounds_asked_of_a_recipe_without_have_room_beside_its_moments() -> None:
    given = {"epsilon": 9.0, "noise-multiplier": 1.5}
    plan, with_rounds = plan_of("lfw", given), plan_of("lfw", {"epsilon": 9.0, "num-rounds": 1})
    moments = with_rounds.question.config.moments.moment_noise_multiplier
    assert moments <= plan.question.config.moments.moment_noise_multiplier <= moments + 0.001
    assert plan.rounds > 1
    assert any("not one round fits" in note for note in plan_of("lfw", given | {"noise-multiplier": 0.3}).notes)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("lfw", {}),
        ("london", {}),
        ("mnist", {}),
        ("lfw", {"privacy-model": "local", "epsilon": 3.0}),
        ("lfw", {"num-clients": 13, "survivors": 11, "colluders": 3}),
        (LFW_WITH_ROUNDS, {}),
        (LFW_WITH_ROUNDS, {"privacy-model": "distributed"}),
        (LFW_WITH_ROUNDS, {"privacy-model": "distributed", "num-clients": 13, "survivors": 11, "colluders": 3}),
    ],
)
def test_a_recipe_s_plan_is_its_run(recipe: str, options: dict[str, Any]) -> None:
    run = with_noise(load_recipe(recipe, options))
    plan = plan_of(recipe, options)
    cohort = plan.question.cohort
    if run.privacy.privacy_model is PrivacyModel.DISTRIBUTED:
        assert cohort is not None
        assert (cohort.peers, cohort.survivors) == (run.privacy.peers, run.privacy.survivors)
        assert plan.question.noise_shares == run.privacy.noise_shares
    assert plan.noise_multiplier == run.privacy.noise_multiplier
    assert plan.question.config.moments.moment_noise_multiplier == run.moments.moment_noise_multiplier
    assert plan.epsilon == epsilon_of(run_releases(run), run.privacy.delta)
    assert (plan.rounds, plan.question.model) == (run.training.num_rounds, str(run.privacy.privacy_model))


@pytest.mark.parametrize(
    ("options", "asked", "expected"),
    [
        # persons, sample rate, batch of all; lfw has 1680, 0.15, 252
        ({}, {}, (1680, 0.15, 252)),
        ({}, {"persons": 800}, (800, 0.15, 120)),
        ({}, {"batch": 168}, (1680, 0.1, 168)),
        ({}, {"persons": 800, "batch": 80}, (800, 0.1, 80)),
        ({"expected-batch": 12.6}, {}, (840, 0.15, 126)),
        ({"sample-rate": 0.3}, {}, (840, 0.3, 252)),
        ({"sample-rate": 0.3}, {"persons": 1000}, (1000, 0.3, 300)),
        ({"sample-rate": 0.3}, {"batch": 30}, (100, 0.3, 30)),
        ({"expected-batch": 10.0}, {"persons": 1000}, (1000, 0.1, 100)),
        ({"num-clients": 20}, {}, (3360, 0.15, 504)),
        ({"num-clients": 20}, {"persons": 1680}, (1680, 0.15, 252)),
    ],
)
def test_of_persons_batch_and_sample_rate_the_third_follows(
    options: dict[str, Any], asked: dict[str, Any], expected: tuple[float, float, float]
) -> None:
    question = ask("lfw", options, Asked(**asked))
    assert (question.persons, question.config.privacy.sample_rate, question.batch) == pytest.approx(expected)


def test_the_command_s_options_are_the_plan_s() -> None:
    question = ask("lfw", {"delta": 1e-6}, Asked(persons=800, batch=80))
    config = load_recipe("lfw", question.options)
    assert config.privacy == question.config.privacy
    assert set(question.options) == {"delta", "sample-rate", "expected-batch"}


@pytest.mark.parametrize(
    ("options", "asked", "told"),
    [
        ({}, {"batch": 2000}, "more than the 1,680 units"),
        ({"sample-rate": 0.1}, {"batch": 20, "persons": 200}, "the third follows"),
        ({"expected-batch": 3.0}, {"batch": 30}, "give one"),
        ({}, {"persons": 0}, "persons = 0 is outside"),
        ({}, {"batch": float("nan")}, "batch = nan is outside"),
        ({"privacy-model": "distributed", "survivors": 5}, {}, "survivors = 5 .* use 6 to 10"),
        ({"privacy-model": "distributed", "survivors": 11}, {}, "survivors = 11"),
        ({"privacy-model": "distributed", "peers": 9}, {}, "peers = 9 and num-clients = 10"),
        ({"privacy-model": "distributed", "local-steps": 2}, {}, "local-steps = 2"),
        ({"colluders": 0}, {}, "colluders = 0"),
        ({"num-clients": 1, "privacy-model": "distributed"}, {}, "two clients"),
        ({"privacy-model": "none"}, {}, "nothing to compute"),
    ],
)
def test_what_cannot_be_asked_is_refused(options: dict[str, Any], asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ask("lfw", options, Asked(**asked))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epsilon": 5.0}, r"alone costs epsilon 7\.82, over the budget 5.*without rounds 0\.\d+ would do"),
        ({"moment-rounds": 0, "epsilon": 0.05, "noise-multiplier": 0.9}, "not one round"),
        ({"noise-multiplier": 0.001, "epsilon": 9.0}, "protects nobody"),
        ({"noise-multiplier": 0.001}, "under 0.01 protect nobody"),
        ({"moment-rounds": 0, "epsilon": 1e-6}, "cannot be done"),
    ],
)
def test_a_budget_that_holds_nothing_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        plan_of(LFW_WITH_ROUNDS, options)


def test_the_budget_may_hold_the_moment_release_alone() -> None:
    plan = plan_of(LFW_WITH_ROUNDS, {"epsilon": 7.83, "noise-multiplier": 0.5})
    assert (plan.rounds, plan.noise_multiplier) == (0, 0.0)
    assert plan.chosen.signals.update_snr is None
    assert any("not one round fits" in note for note in plan.notes)


# Of 7 survivors two collude, and by telling clients different survivors a coordinator could leave out one more.
CLIENTS, SURVIVORS, COLLUDERS, HONEST, BATCH, SIGMA, BOUND = 10, 7, 2, 4, 40.0, 1.7, 0.5


def test_noise_of_each_model_is_that_of_simulated_clients() -> None:
    options = {"num-clients": CLIENTS, "noise-multiplier": SIGMA, "max-grad-norm": BOUND}
    plan = plan_of(LFW_WITH_ROUNDS, options | {"survivors": SURVIVORS, "colluders": COLLUDERS}, batch=BATCH)
    rng, draws = np.random.default_rng(5), 100_000
    shares = SIGMA * BOUND / math.sqrt(HONEST)
    seen = {
        LOCAL: rng.normal(0, SIGMA * BOUND, (draws, CLIENTS)).sum(1) / BATCH,
        DISTRIBUTED: rng.normal(0, shares, (draws, CLIENTS)).sum(1) / BATCH,
        CENTRAL: rng.normal(0, SIGMA * BOUND, draws) / BATCH,
        ALONE: rng.normal(0, SIGMA * BOUND, draws) / (BATCH / CLIENTS),
    }
    for model, noise in seen.items():
        assert plan.models[model].signals.mean_noise == pytest.approx(noise.std(), rel=0.02), model
    # What is left where only the honest shares are in the sum is the whole of a trusted curator's noise.
    assert plan.question.noise_shares == HONEST
    left = rng.normal(0, shares, (draws, HONEST)).sum(1)
    assert left.std() == pytest.approx(SIGMA * BOUND, rel=0.02)
    ratio = plan.models[CENTRAL].signals.update_snr / plan.models[LOCAL].signals.update_snr  # type: ignore[operator]
    assert ratio == pytest.approx(math.sqrt(CLIENTS))


def test_moment_signal_to_noise_is_that_of_simulated_releases() -> None:
    plan = plan_of("utkface", {"privacy-model": "local"})
    config, rng = plan.question.config, np.random.default_rng(6)
    features = RandomFeatures(config.model.image_size, config.model.channels, seed=3)
    noise = rng.normal(0, config.moments.moment_noise_multiplier, (plan.question.clients, features.dim)).sum(0)
    one_class = plan.question.persons / config.model.num_classes
    assert plan.chosen.signals.moment_snr == pytest.approx(one_class / np.linalg.norm(noise), rel=0.02)


def test_equal_noise_is_equal_noise() -> None:
    """Central at local's epsilon for the same noise: the run with that noise multiplier has the plan's mean noise."""
    plan = plan_of(LFW_WITH_ROUNDS)
    for model in (LOCAL, ALONE, DISTRIBUTED):
        share = 1 / noise_factor(plan.question, model)
        same = plan_of(
            LFW_WITH_ROUNDS,
            {"noise-multiplier": share * plan.noise_multiplier, "moment-noise-multiplier": share * 0.65},
        )
        assert same.models[model].signals.mean_noise == pytest.approx(plan.chosen.signals.mean_noise)
        assert same.models[model].signals.moment_snr == pytest.approx(plan.chosen.signals.moment_snr)
        assert plan.models[model].equal_noise_epsilon == pytest.approx(same.epsilon, rel=1e-6)
        assert plan.epsilon_after(model, plan.rounds) == plan.models[model].equal_noise_epsilon
    curve = [plan.epsilon_after(LOCAL, rounds) for rounds in (0, 1, 50, 500)]
    assert all(a < b for a, b in itertools.pairwise(curve))


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize(("size", "classes"), [(28, 0), (64, 3)])
def test_parameters_are_counted(name: str, size: int, classes: int) -> None:
    for loss in ("bce", "cross-entropy") if classes else ("bce",):
        model = ModelConfig(image_size=size, num_classes=classes, discriminator=name, discriminator_width=4, loss=loss)
        assert discriminator_size(model) == num_parameters(discriminator_of(model))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epsilon": 1.0},
        {"epsilon": 2.0, "noise-multiplier": 1.0},
        {"noise-multiplier": 0.7, "num-rounds": 20},
        {"noise-multiplier": 2.0, "num-rounds": 20},
        {"num-rounds": 0},
        {"epsilon": 1.0, "num-rounds": 0},
    ],
)
@pytest.mark.parametrize("recipe", ["mnist", "lfw"])
def test_a_moment_noise_left_open_is_the_same_in_the_plan_and_in_its_run(recipe: str, options: dict[str, Any]) -> None:
    plan = plan_of(recipe, options)
    words = run_command(plan)[3:]
    told = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    kinds = {key: flat_fields()[key][0] for key in told}
    # What the run computes by itself it is not told.
    assert ("moment-noise-multiplier" in told) is (plan.question.solved != "noise-multiplier")
    config = with_noise(load_recipe(recipe, {key: kinds[key](value) for key, value in told.items()}))
    assert config.moments.moment_noise_multiplier == plan.question.config.moments.moment_noise_multiplier
    assert epsilon_of(run_releases(config), config.privacy.delta) == pytest.approx(plan.epsilon, rel=2e-3)


def test_bytes_are_those_of_the_vectors() -> None:
    plan = plan_of("utkface", {"num-rounds": 60})
    for model in (CENTRAL, LOCAL, DISTRIBUTED):
        traffic = plan.models[model].traffic
        assert (traffic.down, traffic.up) == (4 * plan.parameters, 4 * plan.parameters)
        assert traffic.moments_up == 4 * 2 * plan.dimension
        assert bool(traffic.keys) is (model == DISTRIBUTED)
    assert plan.models[ALONE].traffic == Traffic()
    steps = {"privacy-model": "local", "local-steps": 3, "fake-batch": 10, "num-rounds": 60}
    local = plan_of("utkface", steps).models[LOCAL]
    assert local.traffic.down - local.traffic.up == 30 * (3 * 32 * 32 + 8)
    without = plan_of("utkface").models[LOCAL].traffic
    assert (without.down, without.up, without.moments_up) == (0, 0, 4 * 2 * plan.dimension)


def test_prv_stands_beside() -> None:
    assert plan_of("lfw").epsilon_prv is None
    for recipe in ("lfw", LFW_WITH_ROUNDS):
        tight = plan_of(recipe, tight=True)
        assert tight.epsilon_prv is not None
        assert 0.8 * tight.epsilon < tight.epsilon_prv < tight.epsilon
    assert plan_of(LFW_WITH_ROUNDS, {"noise-multiplier": 0.2}, tight=True).epsilon_prv is None


@pytest.mark.parametrize(
    ("recipe", "options", "seen"),
    [
        ("orl", {}, Verdict.HOPELESS),
        ("london", {}, Verdict.MARGINAL),
        ("lfw", {}, Verdict.GOOD),
        ("utkface", {}, Verdict.GOOD),
        ("mnist", {}, Verdict.GOOD),
        ("mnist", {"num-rounds": 0}, Verdict.GOOD),
        ("mnist", {"privacy-model": "local"}, Verdict.GOOD),
        ("fashion-mnist", {"num-rounds": 0}, Verdict.GOOD),
        (LFW_WITH_ROUNDS, {}, Verdict.GOOD),
        (LFW_WITH_ROUNDS, {"moment-rounds": 0}, Verdict.HOPELESS),
    ],
)
def test_recorded_runs_are_judged_as_they_were_seen(recipe: str, options: dict[str, Any], seen: Verdict) -> None:
    assert plan_of(recipe, options).chosen.signals.judgement.verdict is seen


def test_thresholds_lie_between_the_recorded_runs() -> None:
    for run in RECORDED_RUNS:
        assert judge(run.moment_snr, None).verdict is run.verdict
    assert [least for least, _ in THRESHOLDS] == sorted((least for least, _ in THRESHOLDS), reverse=True)
    assert "below ORL" in judge(0.01, None).because
    assert "as LFW" in judge(14.0, None).because
    assert "above" in judge(1e6, None).because
    between = judge(3.0, None).because
    assert "London" in between
    assert "MNIST at epsilon 1" in between
    # Rounds alone: nothing good was seen, and beyond what was tried nothing is known.
    assert judge(None, ROUNDS_SEEN).verdict is Verdict.HOPELESS
    assert judge(None, 2 * ROUNDS_SEEN).verdict is Verdict.MARGINAL
    adversarial = {"privacy-model": "central", "discriminator": "dcgan", "discriminator-width": 16, "loss": "bce"}
    batch = {"sample-rate": 0.03, "expected-batch": 180.0, "num-rounds": 300, "moment-noise-multiplier": 1.5}
    assert plan_of("mnist", adversarial | batch).chosen.signals.update_snr == pytest.approx(16.3, abs=0.05)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("london", {"privacy-model": "local"}),
        ("lfw", {}),
        (LFW_WITH_ROUNDS, {}),
        ("orl", {"noise-multiplier": 2.0, "num-rounds": 10, "moment-noise-multiplier": 0.6}),
        (LFW_WITH_ROUNDS, {"moment-rounds": 0}),
        ("mnist", {"num-rounds": 0}),
        ("orl", {"privacy-model": "distributed"}),
    ],
)
def test_each_suggestion_does_what_it_says(recipe: str, options: dict[str, Any]) -> None:
    plan = plan_of(recipe, options)
    suggestions = suggest(plan)
    assert 1 <= len(suggestions) <= 5
    kept = {key: value for key, value in options.items() if key != "noise-multiplier"}
    for suggestion in suggestions:
        asked = {key: suggestion.options[key] for key in ("persons", "batch") if key in suggestion.options}
        others = {key: value for key, value in suggestion.options.items() if key not in asked}
        changed = plan_of(
            recipe, {"num-rounds": plan.rounds, **kept, "epsilon": plan.budget, **others}, **asked
        ).chosen.signals
        figure = {"moments": "moment_snr", "update": "update_snr"}[suggestion.figure]
        assert getattr(plan.chosen.signals, figure) == suggestion.before
        assert getattr(changed, figure) == pytest.approx(suggestion.after, rel=0.002)
        assert changed.judgement.verdict is suggestion.verdict
        assert suggestion.before is None or suggestion.after > 1.04 * suggestion.before


def test_enough_persons_reach_the_next_verdict() -> None:
    more = suggest(plan_of("orl"))[0]
    assert more.options.keys() == {"persons"}
    assert more.verdict is Verdict.MARGINAL
    assert suggest(plan_of("london"))[0].verdict is Verdict.GOOD


def test_rounds_without_moments_are_advised_to_release_moments() -> None:
    changes = [suggestion.options for suggestion in suggest(plan_of(LFW_WITH_ROUNDS, {"moment-rounds": 0}))]
    assert any(options.get("moment-rounds") == 1 and options["num-rounds"] == 0 for options in changes)


def test_a_delta_that_would_publish_somebody_is_noted() -> None:
    assert any("published whole" in note for note in plan_of("lfw", {"delta": 1e-3}).notes)
    assert not any("published whole" in note for note in plan_of("lfw").notes)
