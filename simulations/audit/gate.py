"""The gate: what the shipped client and coordinator release, against the mechanism that the ledgers charged for.

The auditor is the coordinator and every owner at once: canary persons stand in for faces (`simulations.audit.canaries`),
rounds are asked over the in-process Grid, and all that is looked at is what came back and what the ledgers say. Under
`local` a release is a client's vector, under `central` the coordinator's noised mean.

- draws: the run's sample rate, and so little noise that a release tells who was drawn. Contributions, their bound and the
  sampler then show exactly. `few` is the same at the rate 1 / canaries: in a third of the rounds nobody is drawn.
- noise: everybody is drawn and the noise is the run's; without the known sum, noise alone is left.
- steps: rounds of several steps with fakes, where the run has such.
- moments: the moment release, where the run has it.

All is done twice, with new ledgers, the same questions and the same global seeds, and under `local` by two clients with
the same faces: noise or draws that come again are seeded. Not seen: a mechanism that knows when it is audited (by the
rate, the noise, dots for faces), a seed fixed when Python starts, and what leaks beside the vectors (time, logs).
`common.evaluation.release_tests` says how small a fault is found.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.clientapp import ClientApp
from scipy import linalg, stats

from client.app import app as shipped_client_app
from common.config import RunConfig
from common.errors import ConfigError
from common.evaluation.release_tests import (
    ReleaseTest,
    alarms,
    contribution_tests,
    deviation_test,
    exact_test,
    noise_tests,
    rate_test,
    same_draws_test,
    sampler_tests,
    signal_test,
)
from common.messages import RoundInstructions
from common.privacy.units import PrivacyModel
from simulations.audit.canaries import Canaries, fakes_for, inverse_gram, make_canaries, moment_sums
from simulations.audit.estimate import Measured, measured_epsilon
from simulations.audit.tap import TWINS, Tap
from simulations.audit.wire import gradient_round, moment_round

# Noise multiplier of the rounds in which draws are read: 0 and 1 are 13 standard errors apart, and a ledger prices half
# of it still.
_READING_NOISE = 0.025
# Learning rate of several steps over the expected batch: so small that the weights, and with them the gradients, stay where
# they are; float32 still tells the noise.
_STEP_SIZE = 5e-6
# Steps that are asked of one round: with more, one draw's share would drown.
_MOST_STEPS = 3
# Of each release where draws are read, as many coordinates are kept for tests of its noise.
_KEPT = 16384
_MAX_FLOATS = 2**26


@dataclass(frozen=True)
class Effort:
    """How much is asked: canaries at most, and rounds of each kind."""

    canaries: int = 128
    draw_rounds: int = 64
    noise_rounds: int = 8
    step_rounds: int = 6


SHORT = Effort(canaries=32, draw_rounds=12, noise_rounds=4, step_rounds=3)


@dataclass(frozen=True)
class GateReport:
    """What the gate found; passed: no alarm. releases: looked at. discriminator: which network was audited."""

    passed: bool
    alarms: list[ReleaseTest]
    tests: list[ReleaseTest]
    measured: Measured
    privacy_model: str
    unit: str
    discriminator: str
    parameters: int
    canaries: int
    releases: int
    seconds: float


def audit_gate(
    config: RunConfig, folder: Path, effort: Effort = Effort(), client_app: ClientApp = shipped_client_app
) -> GateReport:
    """Audit the mechanism of a run, its noise calibrated. Faces and ledgers of the canaries are kept in `folder`.

    Raises ConfigError for a run without privacy.
    """
    if config.privacy.privacy_model is PrivacyModel.NONE:
        raise ConfigError("privacy-model none promises nothing: there is no noise to audit; audit a private run")
    began = time.monotonic()
    canaries = make_canaries(config, effort.canaries)
    gate = _Gate(canaries, Tap(folder, canaries.config, canaries.faces, client_app), effort)
    gate.run()
    raised = alarms(gate.tests)
    return GateReport(
        passed=not raised,
        alarms=raised,
        tests=gate.tests,
        measured=measured_epsilon(config, gate.noise, gate.contribution, gate.drawn, gate.moment_noise),
        privacy_model=str(config.privacy.privacy_model),
        unit=str(config.privacy.unit),
        discriminator=canaries.config.model.discriminator,
        parameters=len(canaries.weights),
        canaries=len(canaries.contributions),
        releases=gate.tap.releases,
        seconds=round(time.monotonic() - began, 2),
    )


class _Gate:
    """One audit. noise, moment_noise: (measured over charged standard deviation, values it was measured on). contribution:
    the most that a unit added on average, over C. drawn: (units drawn, of how many chances).
    """

    def __init__(self, canaries: Canaries, tap: Tap, effort: Effort) -> None:
        self.canaries, self.tap, self.effort = canaries, tap, effort
        self.config = canaries.config
        self.tests: list[ReleaseTest] = []
        self.noise = self.moment_noise = (1.0, 0)
        self.contribution, self.drawn = 1.0, (0, 0)
        self._inverse = inverse_gram(canaries.contributions)
        self._errors = np.sqrt(np.diag(self._inverse))  # of the coefficients, at sigma 1

    def run(self) -> None:
        """Ask everything that the run would, and test it."""
        if self.config.training.num_rounds:
            self.drawn, self.contribution = self._draws("at the run's rate", self.config.privacy.sample_rate)
            self._draws("at a small rate", 1 / len(self._errors))
            self._everybody()
            if self.config.training.local_steps > 1:
                self._steps()
        if self.config.moments.moment_rounds:
            self._moments()
        asked = self.tap.releases + self.tap.missing
        self.tests.append(exact_test("releases that came", self.tap.releases, asked))
        charges = self.tap.charges()
        matching = sum(charged == self.tap.asked for charged in charges)
        self.tests.append(exact_test("ledgers that charge what was asked, once", matching, len(charges)))

    def _draws(self, name: str, rate: float) -> tuple[tuple[int, int], float]:
        """Returns how many units were drawn of how many chances, and the most that one added, over its contribution."""
        contributions, clip = self.canaries.contributions, self.config.privacy.max_grad_norm
        units, sigma = len(contributions), _READING_NOISE
        some = np.random.default_rng(0).permutation(contributions.shape[1])[:_KEPT]
        kept_contributions = contributions[:, some]

        def keep(release: np.ndarray) -> np.ndarray:
            coefficients = self._inverse @ (contributions @ (release / clip))
            left = release[some] / clip - (coefficients > 0.5) @ kept_contributions
            return np.concatenate([coefficients, left]).astype(np.float32)

        kept = self.tap.ask(self.effort.draw_rounds, self._round(noise_multiplier=sigma, sample_rate=rate), keep)
        sigma, rate = self._charged(sigma, rate)
        twins = kept[..., :units]
        flat = _whole(kept)
        if len(flat) < 2:
            return (0, 0), 1.0
        drawn, noise = flat[:, :units] > 0.5, flat[:, units:] / sigma
        self.tests += contribution_tests(f"{name}: contribution", flat[:, :units], drawn, sigma * self._errors)
        self.tests += sampler_tests(f"{name}: draws", drawn, rate)
        self.tests.append(same_draws_test(f"{name}: draws: twins", twins[0] > 0.5, twins[1] > 0.5, rate))
        if self.tap.sources > 1:
            self.tests.append(same_draws_test(f"{name}: draws: clients", twins[:, 0] > 0.5, twins[:, 1] > 0.5, rate))
        self.tests += noise_tests(f"{name}: noise", noise, [noise.shape[1]])
        return (int(drawn.sum()), drawn.size), _largest_contribution(flat[:, :units], drawn, sigma * self._errors)

    def _everybody(self) -> None:
        privacy = self.config.privacy
        signal = self.canaries.contributions.sum(0)
        asked = self._round(sample_rate=1.0)
        rounds = self._fitting(self.effort.noise_rounds, len(signal))
        left = _whole(self.tap.ask(rounds, asked, lambda release: release / privacy.max_grad_norm - signal))
        sigma, _ = self._charged(privacy.noise_multiplier, 1.0)
        self.noise = self._test_known("noise", left / sigma, self.canaries.contributions, self.canaries.layers)

    def _steps(self) -> None:
        """The sum over a round's steps tells how often each unit was drawn; the fakes must count as declared."""
        privacy, steps = self.config.privacy, min(self.config.training.local_steps, _MOST_STEPS)
        fakes, labels, of_fakes = fakes_for(self.canaries, steps)
        signals = np.vstack([self.canaries.contributions, of_fakes])
        inverse, units = inverse_gram(signals), len(signals) - 1
        scale = privacy.expected_batch / privacy.max_grad_norm

        def keep(release: np.ndarray) -> np.ndarray:
            coefficients = inverse @ (signals @ (release * scale))
            counts = np.rint(coefficients[:units] * steps) / steps
            left = release * scale - np.append(counts, privacy.expected_batch) @ signals
            return np.concatenate([coefficients, left]).astype(np.float32)

        changes = {
            "fakes": fakes,
            "fake_labels": labels,
            "local_steps": steps,
            "local_lr": _STEP_SIZE * privacy.expected_batch,
        }
        asked = self._round(changes, noise_multiplier=_READING_NOISE)
        kept = self.tap.ask(self._fitting(self.effort.step_rounds, len(self.canaries.weights)), asked, keep)
        sigma, rate = self._charged(_READING_NOISE, privacy.sample_rate)
        flat = _whole(kept)
        if len(flat) < 2:
            return
        sigma /= math.sqrt(steps)
        times = np.rint(flat[:, :units] * steps)
        off = flat[:, : units + 1] - np.column_stack([times / steps, np.full(len(flat), privacy.expected_batch)])
        off /= sigma * np.sqrt(np.diag(inverse))
        self.tests += [
            deviation_test("steps: contribution of units", off[:, :units]),
            deviation_test("steps: contribution of fakes", off[:, units]),
            rate_test("steps: draws: rate", int(times.sum()), times.size * steps, rate),
            # Once for the round instead of for each step would be all or nothing.
            rate_test("steps: drawn twice", int((times > 1).sum()), times.size, float(stats.binom.sf(1, steps, rate))),
            *noise_tests("steps: noise", flat[:, units + 1 :] / sigma, self.canaries.layers),
        ]

    def _moments(self) -> None:
        sums = moment_sums(self.canaries)
        signal = sums.sum(0)
        rounds = self._fitting(self.effort.noise_rounds, len(signal))
        asked = partial(moment_round, self.config)
        left = _whole(self.tap.ask(rounds, asked, lambda release: release - signal))
        sigma, _ = self._charged(self.config.moments.moment_noise_multiplier, 1.0)
        self.moment_noise = self._test_known("moments", left / sigma, sums, [left.shape[1]])

    def _fitting(self, rounds: int, size: int) -> int:
        """As many rounds as fit into memory with releases of `size`."""
        return max(1, min(rounds, _MAX_FLOATS // (TWINS * self.tap.sources * size)))

    def _test_known(self, name: str, noise: np.ndarray, signals: np.ndarray, layers: list[int]) -> tuple[float, int]:
        """Returns the noise's measured over charged standard deviation, and how many values it is of."""
        if len(noise) < 2:
            return 1.0, 0
        self.tests += noise_tests(name, noise, layers)
        # Along the units' directions, those that float32 can tell apart, the known sum must have been all.
        _, sizes, directions = linalg.svd(signals, full_matrices=False)
        directions = directions[sizes > 1e-3 * sizes[0]]
        whitened = directions @ (noise.mean(0) * math.sqrt(len(noise)))
        self.tests.append(signal_test(f"{name}: what the units add", whitened))
        return float(np.sqrt(np.square(noise, dtype=np.float64).mean())), noise.size

    def _round(self, changes: dict[str, Any] | None = None, **privacy: float) -> Callable[[int], RoundInstructions]:
        changed = dataclasses.replace(self.config.privacy, **privacy)  # type: ignore[arg-type]
        return lambda number: gradient_round(
            self.config, self.canaries.weights, number, privacy=changed, **(changes or {})
        )

    def _charged(self, noise_multiplier: float, sample_rate: float) -> tuple[float, float]:
        """Noise and rate that the ledgers charged for last: the claim. As asked, where they hold nothing."""
        charges = self.tap.charges()[0]
        return (charges[-1].noise_multiplier, charges[-1].sample_rate) if charges else (noise_multiplier, sample_rate)


def _largest_contribution(coefficients: np.ndarray, drawn: np.ndarray, errors: np.ndarray) -> float:
    """The most that one unit adds, over its clipped contribution: what all add on average, unless one surely adds more."""
    counts = drawn.sum(0)
    seen = counts > 0
    if not seen.any():
        return 1.0
    means = (coefficients * drawn).sum(0)[seen] / counts[seen]
    errors = errors[seen] / np.sqrt(counts[seen])
    return float(max(np.average(means, weights=errors**-2), (means - 5 * errors).max()))


def _whole(kept: np.ndarray) -> np.ndarray:
    """The releases that came, (N, ...), without those that did not."""
    flat = kept.reshape(-1, kept.shape[-1])
    came: np.ndarray = flat[~np.isnan(flat).any(1)]
    return came
