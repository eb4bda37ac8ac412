"""What a run would cost an owner's faces, and what of it the owner's policy would refuse. Nothing is sent or charged.

All of it is exact and therefore **private**: it is for the owner's eyes.
"""

import math
from dataclasses import dataclass

import numpy as np

from client.discriminator import fitting_units
from client.policy import OwnerPolicy, Refusal
from common.config import RunConfig
from common.errors import DataError, LedgerCorrupt
from common.faces import FaceDataset
from common.messages import RoundInstructions, Stage
from common.privacy.accounting import ORDERS, epsilon_at_orders, filter_order, rdp_of
from common.privacy.ledger import Ledger
from common.privacy.planner import planned_steps, run_releases
from common.privacy.units import PrivacyModel


@dataclass(frozen=True)
class Spent:
    """Of a ledger. releases: how many. order: index into ORDERS at which it counts, None before the first release."""

    epsilon: float
    rdp: np.ndarray
    releases: int
    order: int | None


@dataclass(frozen=True)
class RunFindings:
    """units: held, None where the faces do not fit the run. declared: what the run declares. spent: epsilon so far, inf after a run
    without privacy. after: epsilon of the ledger when the run is over. refused: what the policy would not allow.
    """

    images: int
    units: int | None
    declared: float
    spent: float
    releases: int
    after: float
    refused: list[Refusal]


def spent(policy: OwnerPolicy) -> Spent:
    """What the policy's ledger holds; one that does not exist yet is not made. Raises LedgerCorrupt or ConfigError."""
    if not policy.ledger and not (policy.state_dir / "ledger.jsonl").exists():
        return Spent(0.0, rdp_of([]), 0, None)
    ledger = Ledger(
        policy.state_dir,
        max_epsilon=policy.max_epsilon,
        delta=policy.delta,
        unit=policy.unit,
        public_key=policy.ledger,
    )
    if ledger.rolled_back:
        raise LedgerCorrupt(
            f"the ledger in {policy.state_dir} was rolled back: an older copy took its place, and nothing is "
            "answered until the newest is restored"
        )
    releases = ledger.releases
    rdp = rdp_of(releases)
    if not releases or not math.isfinite(ledger.epsilon):
        return Spent(ledger.epsilon, rdp, len(releases), None)
    order = None if ledger.order is None else ORDERS.index(ledger.order)
    return Spent(ledger.epsilon, rdp, len(releases), order)


def epsilon_after(config: RunConfig, policy: OwnerPolicy, before: Spent) -> float:
    """Epsilon of the ledger when the whole run is charged to it too: the bound on which refusal rests."""
    if config.privacy.privacy_model is PrivacyModel.NONE or not math.isfinite(before.epsilon):
        return math.inf
    plan = run_releases(config)
    order = filter_order(plan, policy.max_epsilon, policy.delta) if before.order is None else before.order
    return float(epsilon_at_orders(before.rdp + rdp_of(plan), policy.delta)[order])


def rounds_of(config: RunConfig) -> list[RoundInstructions]:
    """What a run would ask in each of its stages, without the arrays."""
    moments, training = config.moments, config.training
    stages = [Stage.MOMENTS] * moments.moment_rounds + [Stage.GRADIENTS] * (training.num_rounds > 0)
    return [
        RoundInstructions(
            run_id="0" * 32,
            server_round=number,
            stage=stage,
            model=config.model,
            privacy=config.privacy,
            augmentation=config.augmentation,
            moment_rounds=moments.moment_rounds,
            moment_noise_multiplier=moments.moment_noise_multiplier,
            feature_seed=moments.feature_seed,
            planned_steps=planned_steps(config),
            min_clients=training.min_clients,
            local_steps=training.local_steps,
            local_lr=training.local_lr,
        )
        for number, stage in enumerate(stages, start=1)
    ]


def check_run(config: RunConfig, policy: OwnerPolicy, faces: FaceDataset) -> RunFindings:
    """Judge a run, its noise calibrated, for these faces and this policy.

    Raises LedgerCorrupt or ConfigError where the ledger cannot be read.
    """
    refused = list(dict.fromkeys(r for asked in rounds_of(config) for r in policy.refusals(asked)))
    units = None
    try:
        units = len(fitting_units(faces, config.model, config.privacy.unit))
    except DataError as error:
        refused.append(Refusal("data", f"{len(faces)} images", "unfit for this run", str(error)))
    before = spent(policy)
    after = epsilon_after(config, policy, before)
    if config.privacy.privacy_model is not PrivacyModel.NONE and not after <= policy.max_epsilon:
        told = f"epsilon {after:.4g} when the run is over"
        remedy = "the run ends early here; ask for a smaller epsilon or fewer rounds, or the owner raises max-epsilon"
        refused.append(Refusal("max-epsilon", told, f"{policy.max_epsilon:g}", remedy))
    return RunFindings(
        len(faces), units, config.privacy.declared_units, before.epsilon, before.releases, after, refused
    )
