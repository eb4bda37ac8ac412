"""The one-run lower bound on a whole federated run: canary persons, each in by a coin, and what is released tells on them.

Steinke, Nasr, Jagielski 2023 ("Privacy auditing with one (1) training run"; the bound is `common.evaluation.one_run`),
with the white-box adversary of Nasr et al. 2023 ("Tight auditing of differentially private machine learning"): it knows
every round's weights, the ordinary faces and the canaries' patterns, all but the coins, and hears what each privacy
model releases. Under `local` that is each client's vector on the wire; under `central` and `distributed` the mean that left
the coordinator's aggregation, noise and all, never a clear sum. Each canary is one unit at one client, by number, whether in
or not, so that one coin more or less is a neighbouring data set.

The run is the shipped one: coordinator, ClientApp, policies and ledgers as they are. Scores are computed with dropout
off, on images that are not augmented and at the weights that began a round, by gradients of the auditor's own. Where
that is not what a client computed the bound is weaker; it holds for any score.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp
from torch import Tensor

from client.app import app as shipped_client_app
from common.config import RunConfig
from common.device import pick_device
from common.errors import ConfigError
from common.evaluation.one_run import bound_of_scores, log_ratios, unit_gradients
from common.faces import FaceDataset
from common.gradients import from_uint8
from common.messages import DiscriminatorUpdate, RoundInstructions, Stage
from common.models.discriminators import discriminator_of
from common.models.features import RandomFeatures
from common.models.flat import set_flat
from common.models.losses import LOSSES
from common.privacy.ledger import Ledger
from common.privacy.units import PrivacyModel
from common.secure_messages import lattice_of
from server.app import open_run, run
from server.checkpoint import CoordinatorState
from simulations.audit.canary_persons import draw_canaries, persons_of, with_canaries
from simulations.audit.wire import answer_size
from simulations.engine import InProcessGrid
from simulations.partition import partition
from simulations.simulate import load_simulated_faces, owner_configs

CANARIES = 300
# Ordinary images whose gradients stand for all others' in what the auditor hears; all features it knows exactly.
_KNOWN = 64
_FEATURES_AT_ONCE = 512


@dataclass(frozen=True)
class OneRunAudit:
    """What came of it.

    canaries: m, of which `members` were in. guesses, correct: the auditor's. bound: epsilon is at least this, at
    `confidence`, for `delta`. claimed_epsilon: the largest of the clients' ledgers, read from the disk. rounds: gradient
    rounds. recalibrated: the run was made shorter than its configuration says, with noise for the same epsilon.
    """

    privacy_model: str
    unit: str
    canaries: int
    members: int
    guesses: int
    correct: int
    bound: float
    confidence: float
    claimed_epsilon: float
    delta: float
    rounds: int
    recalibrated: bool
    noise_multiplier: float
    seed: int
    seconds: float


def audit_one_run(
    config: RunConfig,
    faces: FaceDataset | None,
    folder: Path,
    num_canaries: int = CANARIES,
    seed: int = 0,
    num_rounds: int | None = None,
    client_app: ClientApp = shipped_client_app,
) -> OneRunAudit:
    """Train as `config` says, canaries among the faces, and guess who was in. All that the run leaves is in `folder`.

    faces: the ordinary ones; None for those that the configuration names. seed: of canaries and coins. num_rounds: fewer
    gradient rounds than configured, to save time. The auditor holds a gradient of each canary, 4 bytes a parameter.
    Raises ConfigError for a run without privacy, for a folder that holds a run and for less than one canary.
    """
    began = time.monotonic()
    if config.privacy.privacy_model is PrivacyModel.NONE:
        raise ConfigError("privacy-model = none: there is no epsilon to audit; use local or central")
    if num_canaries < 1:
        raise ConfigError(f"num_canaries = {num_canaries}: a fifth of them is guessed; give some hundreds")
    shorter = num_rounds is not None and num_rounds < config.training.num_rounds
    directory = folder / "run"
    state = open_run(directory, _shortened(config, num_rounds if shorter else None))
    config = state.config
    faces = load_simulated_faces(config) if faces is None else faces
    rng = np.random.default_rng(seed)
    canaries = draw_canaries(config, num_canaries, rng)
    members = rng.random(num_canaries) < 0.5
    shares = [faces.subset(share) for share in partition(faces, config.simulation, config.training.seed)]
    auditor = _Auditor(config, canaries, shares, faces.subset(rng.permutation(len(faces))[:_KNOWN]))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        files = []
        for client, share in enumerate(shares):
            own = np.arange(client, num_canaries, config.simulation.num_clients)
            held = with_canaries(share, canaries, own[members[own]])
            file = Path(name) / f"{client:04d}.npz"
            held.save(file)
            files.append(file)
        grid = _TappedGrid(client_app, owner_configs(config, files, directory.absolute() / "clients"))
        run(grid, state, directory, [_Listener(auditor, grid)])
    bound = bound_of_scores(auditor.scores, members, config.privacy.delta)
    return OneRunAudit(
        privacy_model=str(config.privacy.privacy_model),
        unit=str(config.privacy.unit),
        canaries=num_canaries,
        members=int(members.sum()),
        guesses=bound.guesses,
        correct=bound.correct,
        bound=bound.epsilon,
        confidence=bound.confidence,
        claimed_epsilon=max(_claim(client, config) for client in sorted((directory / "clients").glob("*/"))),
        delta=config.privacy.delta,
        rounds=state.next_round - 1 - config.moments.moment_rounds,
        recalibrated=shorter,
        noise_multiplier=config.privacy.noise_multiplier,
        seed=seed,
        seconds=time.monotonic() - began,
    )


class _Auditor:
    """Scores, about the log-likelihood ratios of in against out, from what is released and all but the coins.

    Canary i is at client i modulo their number, if it is in.
    """

    def __init__(
        self, config: RunConfig, canaries: FaceDataset, shares: Sequence[FaceDataset], known: FaceDataset
    ) -> None:
        self._config, self._shares = config, shares
        self._device = pick_device()
        self._discriminator = discriminator_of(config.model).to(self._device).eval()
        self._canaries, self._units = self._batch(canaries), torch.from_numpy(persons_of(canaries)).to(self._device)
        self._known = self._batch(known)
        self.scores = np.zeros(canaries.num_persons)

    def hear(self, asked: RoundInstructions, mean: Tensor, answers: dict[int, np.ndarray | None]) -> None:
        """A round has ended. mean: what the coordinator's aggregation gave; answers: the vectors of those that answered,
        None where these are clear."""
        privacy, clients = asked.privacy, len(self._shares)
        if asked.stage is Stage.MOMENTS:
            vectors, sums = self._moments(asked)
            others = vectors[:0]
            rate, noise, steps = 1.0, asked.moment_noise_multiplier, 1
            divisor = privacy.declared_units / max(asked.model.num_classes, 1)
        else:
            vectors, others = self._gradients(asked)
            sums = torch.zeros(clients, 1, device=self._device)
            rate, noise = privacy.sample_rate, privacy.noise_multiplier * privacy.max_grad_norm
            steps, divisor = asked.local_steps, privacy.expected_batch
        # Of each of the ordinary images that stand for the units that a step is expected to draw.
        spread = privacy.expected_batch * steps / max(len(others), 1)
        if privacy.privacy_model is PrivacyModel.DISTRIBUTED:
            noise = lattice_of(asked, len(mean.reshape(-1))).noise_deviation(len(answers))
        if privacy.privacy_model is not PrivacyModel.LOCAL:
            spread *= len(answers)
            heard = [(slice(None), mean.to(self._device) * (divisor * len(answers)) - sums[list(answers)].sum(0))]
        else:
            scale = np.float32(divisor * steps if steps > 1 else 1.0)  # several steps come as their mean, divided
            heard = [
                (slice(client, None, clients), torch.from_numpy(vector * scale).to(self._device) - sums[client])
                for client, vector in answers.items()
                if vector is not None
            ]
        for who, total in heard:
            self.scores[who] += log_ratios(vectors[who], others, spread, total, noise * steps**0.5, rate, steps)

    def _gradients(self, asked: RoundInstructions) -> tuple[Tensor, Tensor]:
        """Clipped gradients of the canaries (m, d), and of some ordinary faces, and of fakes where clients have them."""
        if asked.discriminator is None:
            raise ValueError("gradient rounds carry weights")
        set_flat(self._discriminator, asked.discriminator.copy())
        loss, limit = LOSSES[asked.model.loss], asked.privacy.max_grad_norm
        own = unit_gradients(self._discriminator, loss.real, *self._canaries, self._units, limit)
        others = [unit_gradients(self._discriminator, loss.real, *self._known, None, limit)]
        if asked.fakes is not None and loss.sees_fakes:
            images = from_uint8(asked.fakes[:_KNOWN]).to(self._device)
            given = asked.fake_labels
            labels = None if given is None else torch.from_numpy(given[:_KNOWN].copy()).to(self._device)
            others.append(unit_gradients(self._discriminator, loss.fake, images, labels, None, limit))
        return own, torch.cat(others)

    @torch.no_grad()
    def _moments(self, asked: RoundInstructions) -> tuple[Tensor, Tensor]:
        """Mean feature vectors of the canaries (m, d), and their sum over each client's ordinary units (clients, d)."""
        model, unit = asked.model, asked.privacy.unit
        features = RandomFeatures(model.image_size, model.channels, asked.feature_seed).to(self._device)
        rows = max(model.num_classes, 1)

        def placed(images: Tensor, labels: Tensor | None, weights: Tensor, place: Tensor, count: int) -> Tensor:
            total = torch.zeros(count * rows, features.dim, device=self._device)
            place = place * rows if labels is None else place * rows + labels
            for some in torch.arange(len(images)).split(_FEATURES_AT_ONCE):
                total.index_add_(0, place[some], features(images[some]) * weights[some, None])
            return total.view(count, -1)

        sums = []
        for share in self._shares:
            weights = np.zeros(len(share), np.float32)
            for images in share.units(unit):
                weights[images] = 1 / len(images)
            zero = torch.zeros(len(share), dtype=torch.int64, device=self._device)
            sums.append(placed(*self._batch(share), torch.from_numpy(weights).to(self._device), zero, 1))
        weights_of_own = (1 / torch.bincount(self._units))[self._units]
        return placed(*self._canaries, weights_of_own, self._units, len(self.scores)), torch.cat(sums)

    def _batch(self, faces: FaceDataset) -> tuple[Tensor, Tensor | None]:
        labels = faces.labels if self._config.model.num_classes else None
        images = faces.tensor(np.arange(len(faces))).to(self._device)
        return images, None if labels is None else torch.from_numpy(labels).to(self._device)


class _TappedGrid(InProcessGrid):
    """Notes the answers of the latest round."""

    answers: dict[int, np.ndarray | None]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """As without a tap."""
        messages = list(messages)
        if "instructions" not in messages[0].content:  # of a secure sum, between the rounds
            return super().push_messages(messages)
        self._asked, self.answers = RoundInstructions.from_record(messages[0].content), {}
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """As without a tap."""
        clients = self.get_node_ids()
        for reply in super().pull_messages(message_ids):
            if reply.has_content() and "update" in reply.content:
                update = DiscriminatorUpdate.from_record(reply.content, self._asked, answer_size(self._asked))
                clear = self._asked.privacy.privacy_model is not PrivacyModel.LOCAL
                self.answers[clients.index(reply.metadata.src_node_id)] = None if clear else update.vector
            yield reply


class _Listener:
    """An observer that passes on to the auditor what each round released."""

    def __init__(self, auditor: _Auditor, grid: _TappedGrid) -> None:
        self._auditor, self._grid = auditor, grid

    def fit_stepped(self, state: CoordinatorState) -> None:
        """Nothing is released between rounds."""

    def round_ended(self, state: CoordinatorState) -> None:
        """Hear the round."""
        if state.released is not None:
            self._auditor.hear(*state.released, self._grid.answers)


def _shortened(config: RunConfig, num_rounds: int | None) -> RunConfig:
    """The configuration to its last round, or to that of `num_rounds`, whose noise is then calibrated anew."""
    training = dataclasses.replace(config.training, stop_when="", reference="")
    privacy = config.privacy
    if num_rounds is not None:
        training = dataclasses.replace(training, num_rounds=num_rounds)
        privacy = dataclasses.replace(privacy, noise_multiplier=0.0)
    return dataclasses.replace(config, training=training, privacy=privacy)


def _claim(client: Path, config: RunConfig) -> float:
    """Epsilon by the ledger in a client's folder. The reply kept there is deleted: under `central` it is a clear sum."""
    ledger = Ledger(client, max_epsilon=config.privacy.epsilon, delta=config.privacy.delta)
    ledger.forget_reply()
    return ledger.epsilon
