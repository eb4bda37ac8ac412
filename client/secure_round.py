"""A client's part in rounds under a secure sum: its share of the noise, its mask, and its help to open the sum.

Claim, for neighbours that differ in one unit, against the coordinator and `colluders` clients: what a masked round lets them
learn is one Gaussian mechanism of noise multiplier sigma on a Poisson sample of rate q. `client.secure_sum` gives them at
most one sum with `noise_shares` honest vectors in it; `common.privacy.lattice` and `distributed_accounting` price that sum.
Peers, survivors and colluders are the deal's, and refused where the instructions say otherwise. All else that the noise
depends on is in the instructions, whose digest the masks are bound to: only those who were asked the same are in one sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
from flwr.app import RecordDict

from client.moments import cached_features
from client.policy import OwnerPolicy
from client.secret_store import PEER_KEY, SECRETS, load_peer_key
from client.secure_sum import SecureSum
from common.errors import PrivacyError
from common.messages import RoundInstructions
from common.privacy.lattice import Lattice
from common.privacy.ledger import Ledger
from common.privacy.masks import DealTerms
from common.privacy.randomness import SecureRandom
from common.privacy.secret_sharing import honest_shares
from common.privacy.units import PrivacyModel
from common.secure_messages import (
    ConfirmRequest,
    DealRequest,
    KeyAnswer,
    KeyRequest,
    MaskRequest,
    UnmaskRequest,
    lattice_of,
)


def secure_sum(policy: OwnerPolicy) -> SecureSum:
    """This owner's half. Raises PrivacyError where its policy knows no peers."""
    if PrivacyModel.DISTRIBUTED not in policy.allowed_privacy_models or not policy.peers:
        raise PrivacyError(
            "a secure sum is asked for, and this owner's policy does not allow `distributed` or names no peers: compare the "
            "fingerprint of the peer set with the other owners and write it into the policy"
        )
    return _opened(policy.state_dir, policy.peers, policy.max_deal_rounds)


def answer_for_sum(policy: OwnerPolicy, content: RecordDict, ledger: Callable[[], Ledger]) -> RecordDict | None:
    """The answer to a message of the secure sum other than a round; None for a message of another kind.

    No face is read. Raises ProtocolError or PrivacyError, and then gives nothing.
    """
    if KeyRequest.name in content:
        KeyRequest.from_record(content)
        return KeyAnswer(secure_sum(policy).public_key).to_record()
    if DealRequest.name in content:
        deal = DealRequest.from_record(content)
        sums = secure_sum(policy)
        _check_terms(policy, deal)
        return sums.deal(deal).to_record()
    if ConfirmRequest.name in content:
        return secure_sum(policy).confirm(ConfirmRequest.from_record(content)).to_record()
    if UnmaskRequest.name in content:
        request = UnmaskRequest.from_record(content)
        answer = secure_sum(policy).unmask(request)
        ledger().unmask(request.run_id, request.server_round, request.digest)  # before the shares leave
        return answer.to_record()
    return None


@dataclass(frozen=True)
class MaskedAnswer:
    """A round of this client under a secure sum, checked before it is charged."""

    sums: SecureSum
    instructions: RoundInstructions
    request: MaskRequest
    place: int
    lattice: Lattice

    @classmethod
    def prepare(cls, policy: OwnerPolicy, instructions: RoundInstructions, content: RecordDict) -> Self:
        """Raises ProtocolError or PrivacyError where the round could not be masked with what was dealt for it, and ConfigError
        where its sum has no room in 32 bits."""
        beside = RecordDict({name: part for name, part in content.items() if name == MaskRequest.name})
        sums, request = secure_sum(policy), MaskRequest.from_record(beside)
        asked_of = instructions.run_id, instructions.server_round, request.deal, request.confirmations
        place, terms = sums.check(*asked_of)
        _check_terms(policy, terms)
        privacy = instructions.privacy
        asked = privacy.peers, privacy.survivors, privacy.colluders
        if asked != (len(terms.peers), terms.threshold, terms.colluders):
            raise PrivacyError(f"peers, survivors and colluders {asked} are not those of deal {request.deal}")
        return cls(sums, instructions, request, place, lattice_of(instructions, vector_length(instructions)))

    def mask(self, total: np.ndarray, random: SecureRandom) -> np.ndarray:
        """The clipped sum (d,) float32, clear, as it may leave: (d,) uint32, noised with this client's share and masked."""
        shared = self.lattice.add_noise_share(torch.from_numpy(total), random)
        asked = self.instructions
        return self.sums.mask(
            asked.run_id, asked.server_round, self.request.deal, self.request.confirmations, shared, asked.digest()
        )


def vector_length(instructions: RoundInstructions) -> int:
    """d of the vector that answers these instructions."""
    if instructions.discriminator is not None:
        return len(instructions.discriminator)
    model = instructions.model
    features = cached_features(model.image_size, model.channels, instructions.feature_seed)
    return features.dim * max(model.num_classes, 1)


def _check_terms(policy: OwnerPolicy, deal: DealTerms) -> None:
    peers, shares = len(deal.peers), honest_shares(len(deal.peers), deal.threshold, deal.colluders)
    for key, value, least in (
        ("min-cohort", peers, policy.min_cohort),
        ("min-noise-shares", shares, policy.min_noise_shares),
        ("min-colluders", deal.colluders, policy.min_colluders),
    ):
        if value < least:
            raise PrivacyError(
                f"{value} is asked and this owner's {key} is {least}: raise it, or the owner lowers {key}"
            )


@lru_cache(maxsize=1024)
def _opened(state_dir: Path, peers: str, max_rounds: int) -> SecureSum:
    return SecureSum(state_dir / SECRETS, load_peer_key(state_dir / PEER_KEY), peers, max_rounds=max_rounds)
