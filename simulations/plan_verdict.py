"""Hopeless, marginal or good: what our own recorded runs looked like at their signal-to-noise.

The signal-to-noise of the moment release is the units of a class over the norm of that class's noise (simulations/plan.py).
In every recorded run what images look like was learned from that release, so it decides. Rounds against fakes have not been
shown to help at these sizes; rounds that teach a classifier do, and rest on the moments all the same (docs/quality.md).
Where there is no moment release, nothing good has been seen.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from simulations.plan_words import number

# A run whose signal-to-noise is within this factor is called the same.
_ALIKE = 1.1


class Verdict(StrEnum):
    """What to expect."""

    HOPELESS = "hopeless"
    MARGINAL = "marginal"
    GOOD = "good"


@dataclass(frozen=True)
class RecordedRun:
    """One run of ours and what came of it.

    units: those that it had, of all clients together. classes: 1 without. dim: of the features. moment_noise: the
    multiplier. noise_factor: the noise on the sum over that of a trusted coordinator.
    """

    name: str
    units: int
    classes: int
    dim: int
    moment_noise: float
    noise_factor: float
    verdict: Verdict
    seen: str

    @property
    def moment_snr(self) -> float:
        """Units of a class over the norm of its noise."""
        return self.units / self.classes / (self.noise_factor * self.moment_noise * math.sqrt(self.dim))


@dataclass(frozen=True)
class Judgement:
    """A verdict and the recorded runs that it rests on."""

    verdict: Verdict
    because: str


def judge(moment_snr: float | None, update_snr: float | None) -> Judgement:
    """The verdict on a plan; None: it has no moment release, or no rounds."""
    if moment_snr is not None:
        verdict = next(verdict for least, verdict in THRESHOLDS if moment_snr >= least)
        told = f"s/n of the moments {number(moment_snr)}"
        near = min(RECORDED_RUNS, key=lambda run: abs(math.log(run.moment_snr / moment_snr)))
        if _ALIKE > near.moment_snr / moment_snr > 1 / _ALIKE:
            return Judgement(verdict, f"{told}, as {_told(near)}")
        below = max((run for run in RECORDED_RUNS if run.moment_snr <= moment_snr), key=_snr, default=None)
        above = min((run for run in RECORDED_RUNS if run.moment_snr > moment_snr), key=_snr, default=None)
        if below is not None and above is not None:
            return Judgement(verdict, f"{told}, between {_told(below)} and {_told(above)}")
        only, side = (above, "below") if below is None else (below, "above")
        return Judgement(verdict, f"{told}, {side} {_told(only)}" if only else "")
    if update_snr is None or update_snr <= ROUNDS_SEEN:
        return Judgement(
            Verdict.HOPELESS, f"no moments, and rounds have not been shown to help up to s/n {ROUNDS_SEEN:g}"
        )
    return Judgement(Verdict.MARGINAL, f"no moments, and rounds of s/n over {ROUNDS_SEEN:g} have not been tried")


def _snr(run: RecordedRun) -> float:
    return run.moment_snr


def _told(run: RecordedRun) -> str:
    return f"{run.name} at {number(run.moment_snr)} ({run.seen})"


# docs/results.md, docs/quality.md and benchmarks/results/{utility,quality}.jsonl; at delta 1e-5.
RECORDED_RUNS = (
    RecordedRun("ORL, 40 persons", 40, 1, 19_928, 0.53, 1.0, Verdict.HOPELESS, "an oval under noise"),
    RecordedRun(
        "London, 102 persons", 102, 1, 24_632, 0.53, 1.0, Verdict.MARGINAL, "faces under speckle, little variety"
    ),
    RecordedRun("MNIST at epsilon 1", 60_000, 10, 13_048, 7.67, math.sqrt(10 / 7), Verdict.GOOD, "digits, 95.8 %"),
    RecordedRun("MNIST `local`", 60_000, 10, 13_048, 1.5, math.sqrt(10), Verdict.GOOD, "digits, 91.6 %"),
    RecordedRun(
        "LFW, 1,421 persons", 1_421, 1, 24_632, 0.53, math.sqrt(10 / 7), Verdict.GOOD, "plainly faces, speckled"
    ),
    RecordedRun("UTKFace, 4,560 images", 4_560, 2, 24_632, 0.53, math.sqrt(10 / 7), Verdict.GOOD, "faces, gender 87 %"),
    RecordedRun("MNIST, moments only", 60_000, 10, 13_048, 1.5, 1.0, Verdict.GOOD, "digits, 92.6 %"),
    RecordedRun("Fashion-MNIST, moments only", 60_000, 10, 13_048, 1.5, 1.0, Verdict.GOOD, "clothes, 79.6 %"),
    RecordedRun("MNIST at epsilon 10", 60_000, 10, 13_048, 0.953, math.sqrt(10 / 7), Verdict.GOOD, "digits, 97.0 %"),
)

# Least signal-to-noise of the moment release -> verdict: the geometric means of neighbours with different verdicts, ORL and
# London (0.53, 1.2), London and LFW (1.2, 14: digits, good at 5.7, are easier than faces), rounded. Between 1.2 and 5.7 nothing was
# tried.
THRESHOLDS = ((4.0, Verdict.GOOD), (0.8, Verdict.MARGINAL), (0.0, Verdict.HOPELESS))

# The largest signal-to-noise of an update in a recorded run, rounded up: MNIST `central`, 300 rounds at 16.3, which did not help.
ROUNDS_SEEN = 20.0
