"""The gate: what the shipped client and coordinator release, against the mechanism that the ledgers charged for.

The auditor is the coordinator and every owner at once: canary persons stand in for faces (`simulations.audit.canaries`),
rounds are asked over the in-process Grid, and all that is looked at is what came back and what the ledgers say. Under
`local` a release is a client's vector, under `central` the coordinator's noised mean, under `distributed` the mean of the
opened sum, in which everybody's share of noise is; there single masked vectors are looked at too.

- at the run's rate: so little noise that a release tells who was drawn. Contributions, their bound and the sampler then
  show exactly. `at a small rate` it is 1 / canaries: in a third of the rounds nobody is drawn. `clipped hard` has a
  clipping norm that is far below every gradient.
- noise: everybody is drawn and the noise is the run's; without the known sum, noise alone is left.
- steps: rounds of several steps with fakes, where the run has such.
- views and dropout, where the run has such: their chance is the client's secret, so only the norm of one unit alone.
- moments: the moment release, where the run has it, with the run's noise and with little.
- the last round of each kind asked again, but under a secure sum, where each is masked once.

All is done twice, with new ledgers, the same questions and the same global seeds, and under `local` by two clients with
the same faces: noise or draws that come again are seeded. Not seen: a mechanism that knows when it is audited (by the
rate, the noise, dots for faces), a seed fixed when Python starts or of few bits, and what leaks beside the vectors (time,
logs).
`common.evaluation.release_tests` says how small a fault is found.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from flwr.clientapp import ClientApp

from client.app import app as shipped_client_app
from common.config import RunConfig
from common.errors import ConfigError
from common.evaluation.release_tests import ReleaseTest, alarms, exact_test
from common.privacy.units import PrivacyModel
from simulations.audit.canaries import make_canaries
from simulations.audit.estimate import Measured, measured_epsilon
from simulations.audit.secure_checks import secure_tests
from simulations.audit.stages import FULL, Effort, Stages
from simulations.audit.tap import Tap


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
    config: RunConfig, folder: Path, effort: Effort = FULL, client_app: ClientApp = shipped_client_app
) -> GateReport:
    """Audit the mechanism of a run, its noise calibrated. Faces and ledgers of the canaries are kept in `folder`.

    Raises ConfigError for a run without privacy.
    """
    if config.privacy.privacy_model is PrivacyModel.NONE:
        raise ConfigError("privacy-model none promises nothing: there is no noise to audit; audit a private run")
    began = time.monotonic()
    canaries = make_canaries(config, effort.canaries)
    tap = Tap(folder, canaries, client_app)
    gate = Stages(canaries, tap, effort)
    if config.training.num_rounds:
        gate.draws("at the run's rate", config.privacy.sample_rate, effort.draw_rounds, canaries)
        gate.draws("at a small rate", 1 / len(canaries.contributions), effort.draw_rounds, canaries)
        gate.clipped_harder()
        gate.everybody()
        if config.training.local_steps > 1:
            gate.steps()
        gate.alone(config, folder, client_app)
    if config.moments.moment_rounds:
        gate.moments()
    gate.tests += secure_tests(tap)
    gate.tests.append(exact_test("releases that came", tap.releases, tap.releases + tap.missing))
    gate.tests.append(exact_test("rounds asked again that are answered the same", tap.same_again, tap.asked_again))
    charges = tap.charges()
    matching = sum(charged == tap.asked for charged in charges)
    gate.tests.append(exact_test("ledgers that charge what was asked, once", matching, len(charges)))
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
        releases=tap.releases,
        seconds=round(time.monotonic() - began, 2),
    )
