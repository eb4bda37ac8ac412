"""What one client receives and sends in a planned run: arrays, keys and shares, without what the wire adds.

Of a secure sum of n peers, whose keys are dealt for R rounds at once (`common.secure_messages`):

    deal, up      R mask keys and R seed digests; for each other peer, sealed, its two shares a round; a confirmation each
    deal, down    the peers' keys; R mask keys of each of them; from each other peer its sealed shares and its confirmation
    round, up     to open the sum, a share of each peer's
"""

from dataclasses import dataclass

from common.models.discriminators import discriminator_size
from common.privacy.masks import KEY_BYTES, SEAL_BYTES
from common.privacy.secret_sharing import SHARE_BYTES
from common.secure_messages import PAIR_BYTES
from simulations.plan_question import ALONE, DISTRIBUTED, Question
from simulations.plan_sizes import feature_dimension, feature_rows

# A float32, or a masked uint32.
VALUE_BYTES, LABEL_BYTES = 4, 8


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client under one privacy model.

    down, up: of an adversarial round. moments_up: of the moment round. Of a secure sum, else 0: dealt, those of the keys of
    dealt_rounds rounds, down and up; unmasking: of a round, up.
    """

    down: int = 0
    up: int = 0
    moments_up: int = 0
    dealt_rounds: int = 0
    dealt: int = 0
    unmasking: int = 0

    @property
    def keys(self) -> int:
        """All that a secure sum adds in the rounds of one deal."""
        return self.dealt + self.dealt_rounds * self.unmasking


def traffic_of(question: Question, model: str, rounds: int) -> Traffic:
    """The bytes of a run of so many adversarial rounds."""
    if model == ALONE:  # its own coordinator
        return Traffic()
    config = question.config
    gradient = moments = fakes = 0
    if rounds:
        gradient = VALUE_BYTES * discriminator_size(config.model)
    if config.moments.moment_rounds:
        moments = VALUE_BYTES * feature_rows(config.model) * feature_dimension(config.model)
    if rounds and config.training.local_steps > 1:
        image = config.model.channels * config.model.image_size**2 + (LABEL_BYTES if config.model.num_classes else 0)
        fakes = config.training.local_steps * config.training.fake_batch * image
    dealt_rounds = peers = 0
    if model == DISTRIBUTED:
        dealt_rounds = min(config.training.deal_rounds, config.moments.moment_rounds + rounds)
        peers = question.clients
    return Traffic(
        down=gradient + fakes,
        up=gradient,
        moments_up=moments,
        dealt_rounds=dealt_rounds,
        dealt=deal_bytes(peers, dealt_rounds) if peers else 0,
        unmasking=SHARE_BYTES * peers,
    )


def deal_bytes(peers: int, rounds: int) -> int:
    """Down and up, of one client of so many peers, for the keys of so many rounds."""
    for_or_from_others = (peers - 1) * (PAIR_BYTES * rounds + SEAL_BYTES + KEY_BYTES)
    up = 2 * KEY_BYTES * rounds + for_or_from_others
    down = KEY_BYTES * peers * (1 + rounds) + for_or_from_others
    return down + up
