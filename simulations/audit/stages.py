"""The rounds that the gate asks, and what it makes of each (`simulations.audit.gate` says why)."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.clientapp import ClientApp
from scipy import linalg, stats

from common.config import RunConfig
from common.evaluation.release_tests import (
    ReleaseTest,
    contribution_tests,
    deviation_test,
    direction_test,
    noise_tests,
    norm_test,
    rate_test,
    same_draws_test,
    sampler_tests,
    signal_test,
)
from common.messages import RoundInstructions
from common.privacy.units import PrivacyModel
from simulations.audit.canaries import Canaries, clipped_harder, fakes_for, has_dropout, inverse_gram, moment_sums
from simulations.audit.tap import TWINS, Tap
from simulations.audit.wire import Wire, gradient_round, moment_round

# Noise multiplier of the rounds in which draws are read: 0 and 1 are 13 standard errors apart, and a ledger prices half
# of it still.
READING_NOISE = 0.025
# Of rounds of several steps, the declared batch; and how far a step goes, over C: so little that weights and gradients
# stay where they are, and float32 still tells the noise.
_STEP_BATCH, _STEP = 2.0, 8e-5
# Steps that are asked of one round: with more, one draw's share would drown.
_MOST_STEPS = 3
# How much smaller the clipping norm is where every unit is clipped hard.
_HARDER = 100.0
# Units that are asked alone for the norm of what augmented views and dropout make of them, and rounds.
_ALONE, _ALONE_ROUNDS = 4, 4
# Of each release where draws are read, as many coordinates are kept for tests of its noise.
_KEPT = 16384
_MAX_FLOATS = 2**26


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is asked: canaries at most, and rounds of each kind."""

    canaries: int = 128
    draw_rounds: int = 64
    noise_rounds: int = 8
    step_rounds: int = 8


FULL = Effort()
SHORT = Effort(canaries=32, draw_rounds=12, noise_rounds=4, step_rounds=6)


class Stages:
    """Asks, and collects tests. noise, moment_noise: (measured over charged standard deviation, values it was measured on).
    contribution: the most that a unit added on average, over C. drawn: (units drawn, of how many chances).
    """

    def __init__(self, canaries: Canaries, tap: Tap, effort: Effort) -> None:
        self.canaries, self.tap, self.effort = canaries, tap, effort
        self.config = canaries.config
        self.tests: list[ReleaseTest] = []
        self.noise = self.moment_noise = (1.0, 0)
        self.contribution, self.drawn = 1.0, (0, 0)

    def draws(self, name: str, rate: float, rounds: int, canaries: Canaries) -> None:
        """Little noise: coefficients of the known contributions tell who was drawn, and what each added."""
        contributions, privacy = canaries.contributions, canaries.config.privacy
        inverse, units = inverse_gram(contributions), len(contributions)
        some = np.random.default_rng(0).permutation(contributions.shape[1])[:_KEPT]

        def keep(release: np.ndarray) -> np.ndarray:
            coefficients = inverse @ (contributions @ (release / privacy.max_grad_norm))
            signal = (coefficients > 0.5) @ contributions
            left = release / privacy.max_grad_norm - signal
            return np.concatenate([coefficients, [_along(left, signal)], left[some]]).astype(np.float32)

        asked = self._round(canaries, noise_multiplier=READING_NOISE, sample_rate=rate)
        kept = self.tap.ask(rounds, asked, keep)
        sigma, rate = self._charged(asked)
        twins, flat = kept[..., :units] > 0.5, _whole(kept)
        if len(flat) < 2:
            return
        coefficients, drawn, noise = flat[:, :units], flat[:, :units] > 0.5, flat[:, units + 1 :] / sigma
        errors = sigma * np.sqrt(np.diag(inverse))
        self.tests += contribution_tests(f"{name}: contribution", coefficients, drawn, errors)
        self.tests += sampler_tests(f"{name}: draws", drawn, rate)
        self.tests.append(same_draws_test(f"{name}: draws: twins", twins[0], twins[1], rate))
        if self.tap.sources > 1:
            self.tests.append(same_draws_test(f"{name}: draws: clients", twins[:, 0], twins[:, 1], rate))
        self.tests += noise_tests(f"{name}: noise", noise, [noise.shape[1]])
        if drawn.any():
            along = flat[drawn.any(1), units] / sigma
            self.tests.append(direction_test(f"{name}: noise: along what it hides", along))
        if not self.drawn[1]:
            self.drawn = int(drawn.sum()), drawn.size
            self.contribution = _largest_contribution(coefficients, drawn, errors)

    def clipped_harder(self) -> None:
        """The same at a clipping norm that is far below every gradient's."""
        rounds = max(2, self.effort.draw_rounds // 4)
        self.draws("clipped hard", 0.25, rounds, clipped_harder(self.canaries, _HARDER))

    def everybody(self) -> None:
        """All drawn, the run's noise: without the known sum, noise is left."""
        signals, clip = self.canaries.contributions, self.config.privacy.max_grad_norm
        signal = signals.sum(0)
        asked = self._round(self.canaries, sample_rate=1.0)
        rounds = self._fitting(self.effort.noise_rounds, len(signal))
        left = _whole(self.tap.ask(rounds, asked, lambda release: release / clip - signal))
        sigma, _ = self._charged(asked)
        self.noise = self._test_known("noise", left / sigma, signals, self.canaries.layers)

    def steps(self) -> None:
        """The sum over a round's steps tells how often each unit was drawn; the fakes must count as declared."""
        privacy, steps = self.config.privacy, min(self.config.training.local_steps, _MOST_STEPS)
        fakes, labels, of_fakes = fakes_for(self.canaries, steps)
        signals, units = self.canaries.contributions, len(self.canaries.contributions)
        # Fakes that must add nothing have no direction to look along: what they add all the same is found in the noise.
        if of_fakes.any():
            signals = np.vstack([signals, of_fakes])
        inverse, known = inverse_gram(signals), np.full(len(signals) - units, _STEP_BATCH)
        scale = _STEP_BATCH / privacy.max_grad_norm

        def keep(release: np.ndarray) -> np.ndarray:
            coefficients = inverse @ (signals @ (release * scale))
            signal = np.append(np.rint(coefficients[:units] * steps) / steps, known) @ signals
            left = release * scale - signal
            return np.concatenate([coefficients, [_along(left, signal)], left]).astype(np.float32)

        changes = {
            "fakes": fakes,
            "fake_labels": labels,
            "local_steps": steps,
            "local_lr": _STEP / privacy.max_grad_norm,
        }
        asked = self._round(self.canaries, changes, noise_multiplier=READING_NOISE, expected_batch=_STEP_BATCH)
        kept = self.tap.ask(self._fitting(self.effort.step_rounds, len(self.canaries.weights)), asked, keep)
        sigma, rate = self._charged(asked)
        flat = _whole(kept)
        if len(flat) < 2:
            return
        sigma /= math.sqrt(steps)
        times = np.rint(flat[:, :units] * steps)
        read = len(signals)
        off = flat[:, :read] - np.column_stack([times / steps, np.tile(known, (len(flat), 1))])
        off /= sigma * np.sqrt(np.diag(inverse))
        self.tests += [
            deviation_test("steps: contribution of units", off[:, :units]),
            *(deviation_test("steps: contribution of fakes", off[:, row]) for row in range(units, read)),
            rate_test("steps: draws: rate", int(times.sum()), times.size * steps, rate),
            # Once for the round instead of for each step would be all or nothing.
            rate_test("steps: drawn twice", int((times > 1).sum()), times.size, float(stats.binom.sf(1, steps, rate))),
            direction_test("steps: noise: along what it hides", flat[:, read] / sigma),
            *noise_tests("steps: noise", flat[:, read + 1 :] / sigma, self.canaries.layers),
        ]

    def moments(self) -> None:
        """The moment release: with the run's noise, and with little, which shows what each unit adds."""
        sums = moment_sums(self.canaries)
        signal = sums.sum(0)
        rounds = self._fitting(self.effort.noise_rounds, len(signal))
        asked = partial(moment_round, self.config)
        left = _whole(self.tap.ask(rounds, asked, lambda release: release - signal))
        sigma, _ = self._charged(asked)
        self.moment_noise = self._test_known("moments", left / sigma, sums, [left.shape[1]])
        quiet = dataclasses.replace(self.config.moments, moment_noise_multiplier=READING_NOISE)
        asked = partial(moment_round, dataclasses.replace(self.config, moments=quiet))
        inverse = np.linalg.pinv((sums @ sums.T).astype(np.float64), hermitian=True)
        found = _whole(self.tap.ask(rounds, asked, lambda release: inverse @ (sums @ release)))
        sigma, _ = self._charged(asked)
        if len(found):
            errors = sigma * np.sqrt(np.diag(inverse))
            self.tests += contribution_tests("moments: contribution", found, np.ones(found.shape, dtype=bool), errors)

    def alone(self, config: RunConfig, folder: Path, client_app: ClientApp) -> None:
        """One unit alone, with the run's own augmentation and dropout: whatever they draw, it adds C at most."""
        if not (config.augmentation.names or has_dropout(config)):
            return
        privacy = dataclasses.replace(
            self.config.privacy, privacy_model=PrivacyModel.LOCAL, noise_multiplier=READING_NOISE, sample_rate=1.0
        )
        config = dataclasses.replace(config, privacy=privacy)
        model = dataclasses.replace(config.model, weight_clip=self.config.model.weight_clip)
        config = dataclasses.replace(config, model=model)
        units = self.canaries.units[:_ALONE]
        weights = self.canaries.weights_for(config)
        wire = Wire(folder / "alone", config, [self.canaries.faces.subset(unit) for unit in units], client_app)
        norms = []
        for number in range(_ALONE_ROUNDS):
            answers = wire.ask(gradient_round(config, weights, number + 1))
            norms += [float(np.linalg.norm(a / privacy.max_grad_norm)) for a in answers if not isinstance(a, str)]
        self.tests.append(norm_test("views and dropout: most of one unit", norms, READING_NOISE, len(weights)))

    def _fitting(self, rounds: int, size: int) -> int:
        """As many rounds as fit into memory with releases of `size`."""
        return max(1, min(rounds, _MAX_FLOATS // (TWINS * self.tap.sources * size)))

    def _test_known(self, name: str, noise: np.ndarray, signals: np.ndarray, layers: list[int]) -> tuple[float, int]:
        """Returns the noise's measured over charged standard deviation, and how many values it is of."""
        if len(noise) < 2:
            return 1.0, 0
        self.tests += noise_tests(name, noise, layers)
        signal = signals.sum(0)
        self.tests.append(direction_test(f"{name}: along what it hides", noise @ (signal / np.linalg.norm(signal))))
        # Along the units' directions, those that float32 can tell apart, the known sum must have been all.
        _, sizes, directions = linalg.svd(signals, full_matrices=False)
        directions = directions[sizes > 1e-3 * sizes[0]]
        whitened = directions @ (noise.mean(0) * math.sqrt(len(noise)))
        self.tests.append(signal_test(f"{name}: what the units add", whitened))
        return float(np.sqrt(np.square(noise, dtype=np.float64).mean())), noise.size

    def _round(
        self, canaries: Canaries, changes: dict[str, Any] | None = None, **privacy: float
    ) -> Callable[[int], RoundInstructions]:
        changed = dataclasses.replace(canaries.config.privacy, **privacy)  # type: ignore[arg-type]
        return lambda number: gradient_round(self.config, canaries.weights, number, privacy=changed, **(changes or {}))

    def _charged(self, asked: Callable[[int], RoundInstructions]) -> tuple[float, float]:
        """Noise on a release, over C, and rate, as the ledgers charged for them last: the claim. As asked, where they hold nothing."""
        example = asked(1)
        charges = self.tap.charges()[0]
        claim = charges[-1] if charges else example.release
        return claim.noise_multiplier * self.tap.noise_factor(example), claim.sample_rate


def _along(noise: np.ndarray, signal: np.ndarray) -> float:
    """The noise's component along the signal; 0 where there is none."""
    length = float(np.linalg.norm(signal))
    return float(noise @ signal) / length if length else 0.0


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
