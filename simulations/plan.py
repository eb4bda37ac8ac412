"""What a budget buys, before anybody's data is touched: `visard plan`.

Everything follows from declared, public constants. N units of all clients together, K clients, sample rate q, so B = q N
units in a step; noise multiplier sigma, clipping norm C; sigma_m of the moment release, whose vectors have norm 1.

The noise. At one sigma all four models cost a unit the same epsilon; they differ in whom it holds against, and in the
noise on the sum that training sees. In multiples of a trusted curator's sigma C (the *noise factor* f):

    central      1              the coordinator adds N(0, (sigma C)^2) once
    distributed  sqrt(K / H)    each client adds a share of variance (sigma C)^2 / H, and all K answer; H honest shares are
                                in every sum that is opened, `honest_shares` of K peers, t survivors and c colluders
    local        sqrt(K)        each client adds N(0, (sigma C)^2): K independent ones
    alone        K              one client: the noise of `central`, on N / K units instead of N

The mean update divides by B (alone: by B / K, which is the K above), so each of its d coordinates has noise f sigma C / B.
A unit moves the sum by C at most, so the update's norm is at most C, and its signal-to-noise at most B / (f sigma sqrt(d)).
The moment release sums N / k vectors of norm 1 for each of k classes, noised in D coordinates: N / (k f sigma_m sqrt(D)).
"""

import math
from dataclasses import dataclass

from common.config import RunConfig
from common.errors import ConfigError
from common.models.discriminators import discriminator_size
from common.privacy.accounting import tight_epsilon_of
from simulations.plan_budget import Schedule
from simulations.plan_bytes import Traffic, traffic_of
from simulations.plan_question import ALONE, CENTRAL, DISTRIBUTED, LOCAL, MODELS, Question
from simulations.plan_range import check_range
from simulations.plan_sizes import feature_dimension, feature_rows
from simulations.plan_verdict import Judgement, judge

# PRV takes minutes where epsilon is so large that nobody asks.
_MAX_PRV_EPSILON = 30.0


@dataclass(frozen=True)
class Signals:
    """What training would see under one model; None: no rounds, or no moment release.

    mean_noise: standard deviation of each coordinate of the mean update.
    """

    mean_noise: float | None
    update_snr: float | None
    moment_snr: float | None

    @property
    def judgement(self) -> Judgement:
        """What to expect of it."""
        return judge(self.moment_snr, self.update_snr)


@dataclass(frozen=True)
class ModelPlan:
    """The figures of one privacy model at the plan's noise multiplier.

    equal_noise_epsilon: what the noise of the plan's own model, on the mean update and on the moments, would cost a unit
    under this one (infinite: no promise).
    """

    model: str
    noise_factor: float
    signals: Signals
    equal_noise_epsilon: float
    traffic: Traffic


@dataclass(frozen=True)
class Plan:
    """A question and its answer.

    solved: what was computed, `noise-multiplier`, `epsilon` or `rounds`. budget: the epsilon that was asked for, or what it
    came to. epsilon: what a ledger would count; epsilon_prv: None where it is too large to be worth it. dimension: of the
    moment release, a class. models: for each of MODELS that can be had.
    """

    question: Question
    noise_multiplier: float
    rounds: int
    budget: float
    epsilon: float
    epsilon_prv: float | None
    parameters: int
    dimension: int
    models: dict[str, ModelPlan]
    notes: list[str]

    @property
    def chosen(self) -> ModelPlan:
        """The figures of the privacy model that was asked for."""
        return self.models[self.question.model]

    def epsilon_after(self, model: str, rounds: int) -> float:
        """Epsilon of `model` after so many rounds with the noise on the mean that the plan's own model has."""
        question = self.question
        share = noise_factor(question, question.model) / noise_factor(question, model)
        schedule = schedule_of(question.config, share)
        return schedule.quick_epsilon(self.noise_multiplier * share, rounds)


def make_plan(question: Question, *, tight: bool = True) -> Plan:
    """Compute what is missing, and what it means under each model.

    tight: also PRV, which takes up to half a second. Raises ConfigError where no run would fit the budget, or a secure sum.
    """
    config, schedule = question.config, schedule_of(question.config)
    privacy = config.privacy
    noise, rounds, budget = privacy.noise_multiplier, config.training.num_rounds, privacy.epsilon
    if question.solved == "rounds":
        if not math.isfinite(schedule.epsilon(noise, 1)):
            raise ConfigError(f"noise-multiplier = {noise:g} protects nobody: give 0.01 or more")
        rounds = schedule.most_rounds(budget, noise)
        if rounds == 0 and not config.moments.moment_rounds:
            raise ConfigError(
                f"not one round of noise-multiplier {noise:g} fits epsilon {budget:g}: raise one of them, or lower sample-rate"
            )
    elif question.solved == "noise-multiplier":
        noise = schedule.least_noise(budget, rounds)
    epsilon = schedule.epsilon(noise, rounds)
    if not math.isfinite(epsilon):
        raise ConfigError(f"noise multipliers under 0.01 protect nobody: {noise:g} is asked for; give 0.01 or more")
    if question.solved == "epsilon":
        budget = epsilon
    noise = noise if rounds else 0.0
    tight_epsilon = None
    if tight and epsilon <= _MAX_PRV_EPSILON:
        tight_epsilon = tight_epsilon_of(schedule.releases(noise, rounds), privacy.delta)
    no_sum = _no_sum(question, noise, rounds)
    models: dict[str, ModelPlan] = {}
    plan = Plan(
        question,
        noise,
        rounds,
        budget,
        epsilon,
        tight_epsilon,
        discriminator_size(config.model),
        feature_dimension(config.model),
        models,
        _notes(question, rounds, no_sum),
    )
    for model in MODELS:
        if model != DISTRIBUTED or not no_sum:
            models[model] = _model_plan(plan, model)
    return plan


def noise_factor(question: Question, model: str) -> float:
    """Noise on the sum over that of a trusted curator of all units."""
    clients = question.clients
    if model == DISTRIBUTED:
        return math.sqrt(clients / question.noise_shares)
    return {CENTRAL: 1.0, LOCAL: math.sqrt(clients), ALONE: float(clients)}[model]


def schedule_of(config: RunConfig, share: float = 1.0) -> Schedule:
    """The schedule of a run, its moment noise times `share`."""
    moments = config.moments
    moment_noise = share * moments.moment_noise_multiplier if moments.moment_rounds else None
    return Schedule(config.privacy.delta, config.privacy.sample_rate, config.training.local_steps, moment_noise)


def signals_of(question: Question, model: str, noise: float, rounds: int) -> Signals:
    """The signal-to-noise of `model` at a noise multiplier; the formulas are in the module's docstring."""
    config, factor = question.config, noise_factor(question, model)
    mean_noise = update_snr = moment_snr = None
    if rounds:
        mean_noise = factor * noise * config.privacy.max_grad_norm / question.batch
        update_snr = question.batch / (factor * noise * math.sqrt(discriminator_size(config.model)))
    if config.moments.moment_rounds:
        spread = factor * config.moments.moment_noise_multiplier * math.sqrt(feature_dimension(config.model))
        moment_snr = question.persons / (feature_rows(config.model) * spread)
    return Signals(mean_noise, update_snr, moment_snr)


def _model_plan(plan: Plan, model: str) -> ModelPlan:
    question = plan.question
    signals = signals_of(question, model, plan.noise_multiplier, plan.rounds)
    equal = plan.epsilon_after(model, plan.rounds)
    return ModelPlan(model, noise_factor(question, model), signals, equal, traffic_of(question, model, plan.rounds))


def _no_sum(question: Question, noise: float, rounds: int) -> str:
    """Why there is no distributed run; empty where there is. Raises ConfigError where that is what was asked for."""
    try:
        check_range(question, noise, rounds)
    except ConfigError as error:
        if question.model == DISTRIBUTED:
            raise
        return str(error)
    return ""


def _notes(question: Question, rounds: int, no_sum: str) -> list[str]:
    config, cohort = question.config, question.cohort
    notes = []
    if cohort and not no_sum:
        notes.append(
            f"distributed holds against the coordinator and any {cohort.colluders} of the {cohort.peers} clients together, as no sum "
            f"is opened without {cohort.survivors} survivors and {cohort.noise_shares} honest noise shares; its figures are of all "
            f"{cohort.peers} clients answering"
        )
    else:
        notes.append(f"no distributed run: {no_sum}")
    if rounds and config.moments.moment_rounds:
        if config.model.loss == "cross-entropy":
            seen = "rounds that teach a classifier make labels better, not pictures"
        else:
            seen = "adversarial rounds have not been shown to help at these sizes yet"
        notes.append(f"the verdict rests on the moment release: {seen}")
    elif not rounds and config.training.num_rounds:
        notes.append("not one round fits beside the moment release: it is all there is")
    if config.training.local_steps > 1:
        notes.append(
            f"rounds of {config.training.local_steps} steps are for local only; noise and s/n are those of one step"
        )
    if config.privacy.delta * question.persons >= 1:
        notes.append(
            f"delta {config.privacy.delta:g} is not under 1 / {question.persons:,.0f} {question.units}: it allows that one "
            "of them is published whole; give a smaller --delta"
        )
    return notes
