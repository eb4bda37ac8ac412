"""What would help a plan, each with what it would do. Its budget is held; the noise follows."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from common.errors import ConfigError
from common.fields import Scalar
from common.privacy.units import PrivacyModel
from simulations.plan import Plan, schedule_of, signals_of
from simulations.plan_budget import least_moment_noise
from simulations.plan_question import DISTRIBUTED, LOCAL, Question, changed
from simulations.plan_range import check_range
from simulations.plan_verdict import THRESHOLDS, Verdict
from simulations.plan_words import in_rounds, number

MAX_SUGGESTIONS = 5
# A change is worth telling from here: a twentieth more signal-to-noise.
_WORTH = 1.05


@dataclass(frozen=True)
class Suggestion:
    """One change.

    options: of the command line. figure: `moments` or `update`, the signal-to-noise that rises from `before` (None: the
    plan has no such figure) to `after`. verdict: after it.
    """

    change: str
    options: Mapping[str, Scalar]
    figure: str
    before: float | None
    after: float
    verdict: Verdict


def suggest(plan: Plan) -> list[Suggestion]:
    """At most MAX_SUGGESTIONS, only such as help; those that change the moment release first, as the verdict rests on it."""
    question = plan.question
    held = changed(question, training={"num_rounds": plan.rounds})
    found = []
    for candidate in CANDIDATES:
        try:
            suggested = candidate(plan, held)
        except ConfigError:  # out of range, not within the budget, or no secure sum
            continue
        if suggested is not None and _helps(plan, suggested):
            found.append(suggested)
    return found[:MAX_SUGGESTIONS]


def _more_persons(plan: Plan, held: Question) -> Suggestion | None:
    """As many as the next verdict takes, twice as many at least, at the same sample rate."""
    snr = plan.chosen.signals.moment_snr
    factor = 2.0
    if snr is not None:
        above = [least for least, _ in THRESHOLDS if least > snr]
        factor = max(2.0, min(above, default=0.0) / snr)
    persons = _two_digits_up(factor * held.persons)
    batch = held.config.privacy.expected_batch * persons / held.persons
    return _told(
        plan,
        changed(held, privacy={"expected_batch": batch}),
        f"{persons:,.0f} {held.units} in place of {held.persons:,.0f}",
        {"persons": persons},
    )


def _distributed(plan: Plan, held: Question) -> Suggestion | None:
    if held.model != LOCAL or DISTRIBUTED not in plan.models:
        return None
    other = changed(held, privacy={"privacy_model": PrivacyModel.DISTRIBUTED})
    return _told(plan, other, "distributed in place of local", {"privacy-model": DISTRIBUTED})


def _moments_only(plan: Plan, held: Question) -> Suggestion | None:
    """All of epsilon for the moment release, which the plan may not have; not where the rounds teach a classifier, which help."""
    if held.config.model.loss == "cross-entropy":
        return None
    noise = least_moment_noise(plan.budget, held.config.privacy.delta)
    options: dict[str, Scalar] = {"num-rounds": 0, "moment-noise-multiplier": _rounded_up(noise)}
    if not held.config.moments.moment_rounds:
        options["moment-rounds"] = 1
    moments = {"moment_rounds": 1, "moment_noise_multiplier": _rounded_up(noise)}
    other = changed(held, moments=moments, training={"num_rounds": 0})
    return _told(plan, other, f"all of epsilon {plan.budget:.4g} for the moment release, no rounds", options)


def _larger_batch(plan: Plan, held: Question) -> Suggestion | None:
    privacy = held.config.privacy
    rate = min(2 * privacy.sample_rate, 1.0)
    batch = held.batch * rate / privacy.sample_rate
    other = changed(held, privacy={"sample_rate": rate, "expected_batch": batch / held.clients})
    return _told(plan, other, f"a batch of {number(batch)} in place of {number(held.batch)}", {"batch": batch})


def _fewer_steps(plan: Plan, held: Question) -> Suggestion | None:
    if plan.rounds < 2:
        return None
    rounds = plan.rounds // 2
    other = changed(held, training={"num_rounds": rounds})
    return _told(plan, other, f"{in_rounds(rounds)} in place of {plan.rounds:,}", {"num-rounds": rounds})


def _smaller_discriminator(plan: Plan, held: Question) -> Suggestion | None:
    width = held.config.model.discriminator_width
    if width < 2:
        return None
    other = changed(held, model={"discriminator_width": width // 2})
    return _told(
        plan, other, f"a discriminator of width {width // 2} in place of {width}", {"discriminator-width": width // 2}
    )


def _told(plan: Plan, other: Question, change: str, options: Mapping[str, Scalar]) -> Suggestion | None:
    """What the change does to the moment release or, where it leaves that as it is, to the update; None: nothing."""
    rounds = other.config.training.num_rounds
    noise = schedule_of(other.config).least_noise(plan.budget, rounds)
    if other.model == DISTRIBUTED:
        check_range(other, noise, rounds)
    before, after = plan.chosen.signals, signals_of(other, other.model, noise, rounds)
    figures = (("moments", before.moment_snr, after.moment_snr), ("update", before.update_snr, after.update_snr))
    for figure, was, becomes in figures:
        if becomes is not None and becomes != was:
            return Suggestion(change, options, figure, was, becomes, after.judgement.verdict)
    return None


def _helps(plan: Plan, suggested: Suggestion) -> bool:
    if suggested.before is None:
        return suggested.verdict is not plan.chosen.signals.judgement.verdict
    return suggested.after >= _WORTH * suggested.before


def _two_digits_up(count: float) -> float:
    """The next number of two digits and zeros."""
    unit = 10 ** max(len(str(math.ceil(count))) - 2, 0)
    return float(math.ceil(count / unit) * unit)


def _rounded_up(noise: float) -> float:
    """To three digits after the point."""
    return math.ceil(noise * 1000) / 1000


CANDIDATES: tuple[Callable[[Plan, Question], Suggestion | None], ...] = (
    _more_persons,
    _distributed,
    _moments_only,
    _fewer_steps,
    _larger_batch,
    _smaller_discriminator,
)
