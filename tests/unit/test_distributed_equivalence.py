"""`distributed` against pooled DP-SGD: the sum that is opened is that of the persons, however they are divided, and its noise
is `central`'s where as many noise shares are left as are counted on.

Left to whoever opened a sum and knows the colluders' vectors is what H clients gave: their persons' clipped sum on the
lattice, and H noise shares. All randomness is keyed, so that every figure comes again; with fresh keys one test raises a
false alarm with probability 1e-6 at most.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from scipy import stats

from client.app import create_app
from client.discriminator import gradient_update
from client.moments import moment_update
from common.config import RunConfig
from common.faces import FaceDataset
from common.messages import RoundInstructions, Stage
from common.models.discriminators import discriminator_of
from common.models.features import RandomFeatures
from common.models.flat import get_flat, set_flat
from common.models.losses import LOSSES
from common.privacy.clipping import FLOAT_SLACK
from common.privacy.discrete_gaussian import discrete_gaussian
from common.privacy.lattice import Lattice
from common.privacy.randomness import add_gaussian_noise
from common.secure_messages import lattice_of
from server.checkpoint import CoordinatorState
from server.coordinator import collect
from server.exchange import Exchange
from server.secure_exchange import SecureExchange
from simulations.audit.wire import RUN_ID, Wire, answer_size, gradient_round, moment_round
from tests.support import keyed, keyed_client_app, random_faces, tiny_config

FALSE_ALARM = 1e-6
PERSONS, CLIENTS = 15, 5
FIRST_NODE = 2
# In the middle of the persons' gradient norms: some are clipped and some are not.
CLIP = 2.6
ROUNDS = 6
# Of five clients four survive and one colludes: three honest shares are counted on.
SHARES = 3
# Client of each person: evenly, one client with nearly all, by chance.
DIVISIONS = {
    "evenly": np.arange(PERSONS) % CLIENTS,
    "one has nearly all": np.array([0, 1, 2, 3] + [4] * (PERSONS - 4)),
    "by chance": np.concatenate([np.random.default_rng(0).permutation(CLIENTS), [3, 1, 1, 0, 4, 1, 3, 3, 0, 1]]),
}


def law_of(noise: np.ndarray) -> float:
    """The p-value of (R, d) values being independent and N(0, 1): their variance, their distribution twice, pairs of rows."""
    flat = noise.reshape(-1)
    square = float(np.square(flat).sum())
    bins = np.bincount(np.minimum((stats.norm.cdf(flat) * 100).astype(int), 99), minlength=100)
    pairs = np.abs((noise @ noise.T)[np.triu_indices(len(noise), 1)]) / math.sqrt(noise.shape[1])
    return least(
        2 * min(stats.chi2.sf(square, flat.size), stats.chi2.cdf(square, flat.size)),
        stats.kstest(flat, "norm", method="asymp").pvalue,
        stats.chisquare(bins).pvalue,
        2 * len(pairs) * stats.norm.sf(pairs.max()),
    )


def same_law(one: np.ndarray, other: np.ndarray) -> float:
    """The p-value of two samples, any shape, being of one normal law: their variances, and their distributions."""
    law = stats.f(one.size, other.size)
    ratio = np.square(one).mean() / np.square(other).mean()
    compared = stats.ks_2samp(one.reshape(-1), other.reshape(-1), method="asymp")
    return least(2 * min(law.sf(ratio), law.cdf(ratio)), compared.pvalue)


def least(*p_values: float) -> float:
    """Of several tests (Bonferroni)."""
    return min(1.0, len(p_values) * float(min(p_values)))


@dataclass(frozen=True)
class Opened:
    """A sum that was opened, (d,) in steps of the lattice, and whose it is."""

    lattice: Lattice
    steps: np.ndarray
    survivors: list[int]


def config_with(**changes: object) -> RunConfig:
    return tiny_config(
        **{
            "privacy_model": "distributed",
            "num_clients": CLIENTS,
            "min_clients": 4,
            "epsilon": 1e6,
            "noise_multiplier": 0.9,
            "moment_noise_multiplier": 2.0,
            "max_grad_norm": CLIP,
            "sample_rate": 1.0,
            "expected_batch": 3.0,
            "deal_rounds": 100,
            "discriminator_width": 4,
        }
        | changes  # type: ignore[arg-type]
    )


def shares_of(faces: FaceDataset, division: np.ndarray) -> list[FaceDataset]:
    owner = division[faces.persons]
    return [faces.subset(np.flatnonzero(owner == client)) for client in range(CLIENTS)]


def other_keys(number: int) -> ClientApp:
    """The real app, its randomness a function of the node, the round, and `number`."""
    return create_app(lambda asked, context: keyed(number, context.node_id, asked.server_round))


def without(node: int) -> ClientApp:
    """The real app, but one node answers no round."""
    inner = keyed_client_app()

    def app(message: Message, context: Context) -> Message:
        if context.node_id == node and "instructions" in message.content:
            raise ConnectionError("this node is away")
        return inner(message, context)

    return app  # type: ignore[return-value]


def federation(
    folder: Path, config: RunConfig, shares: list[FaceDataset], app: ClientApp | None = None
) -> Callable[[RoundInstructions], Opened]:
    """A coordinator and its clients, all real: what is asked of it is opened."""
    wire = Wire(folder, config, shares, app or keyed_client_app())
    exchange, kept = Exchange(wire.grid, config.training), {}
    secure = SecureExchange(exchange, kept, {}, config.training, lambda: None)

    def ask(instructions: RoundInstructions) -> Opened:
        dimension = answer_size(instructions)
        lattice = lattice_of(instructions, dimension)
        total = secure.collect(instructions, exchange.nodes(), dimension, 100)
        steps = total.numpy() / lattice.granularity
        assert (steps == np.rint(steps)).all()
        survivors = sorted(wire.nodes.index(kept["nodes"][str(place)]) for place in kept["survivors"])
        return Opened(lattice, steps.astype(np.int64), survivors)

    return ask


def given_by(
    client: int, instructions: RoundInstructions, lattice: Lattice, share: FaceDataset
) -> tuple[np.ndarray, np.ndarray]:
    """A client's clipped sum and its noise share, (d,) each in steps, from its key."""
    random = keyed("client", FIRST_NODE + client, instructions.server_round)
    update = moment_update if instructions.stage is Stage.MOMENTS else gradient_update
    clear = lattice.round(update(instructions, share, random))
    return clear, discrete_gaussian(lattice.dimension, lattice.share_deviation, random)


def pooled(instructions: RoundInstructions, faces: FaceDataset) -> np.ndarray:
    """Brute force in float64, one person after the other: the sum of what all of them add, (d,)."""
    model, clip = instructions.model, instructions.privacy.max_grad_norm
    total = np.zeros(answer_size(instructions))
    if instructions.stage is Stage.MOMENTS:
        features = RandomFeatures(model.image_size, model.channels, instructions.feature_seed)
        for unit in faces.units(instructions.privacy.unit):
            total += np.mean([features(faces.tensor(np.array([image])))[0].double().numpy() for image in unit], axis=0)
        return total
    assert instructions.discriminator is not None
    discriminator = discriminator_of(model)
    set_flat(discriminator, instructions.discriminator.copy())
    discriminator.double()
    clipped = False
    for unit in faces.units(instructions.privacy.unit):
        loss = LOSSES[model.loss].real(discriminator(faces.tensor(unit).double(), None)).mean()
        parts = torch.autograd.grad(loss, list(discriminator.parameters()))
        gradient = torch.cat([part.reshape(-1) for part in parts]).numpy()
        factor = min(1.0, clip * (1 - FLOAT_SLACK) / float(np.linalg.norm(gradient)))
        clipped |= factor < 1
        total += gradient * factor
    assert clipped
    return total


def weights_of(config: RunConfig) -> np.ndarray:
    return get_flat(CoordinatorState.fresh(config, RUN_ID).discriminator)


def people() -> FaceDataset:
    return random_faces(PERSONS, 2)


def asked_of(config: RunConfig, stage: Stage, server_round: int = 1) -> RoundInstructions:
    if stage is Stage.MOMENTS:
        return moment_round(config, server_round)
    return gradient_round(config, weights_of(config), server_round)


def unit_norm(asked: RoundInstructions) -> float:
    """The most that one person adds."""
    return 1.0 if asked.stage is Stage.MOMENTS else asked.privacy.max_grad_norm


def central_releases(folder: Path, config: RunConfig, faces: FaceDataset, stage: Stage) -> np.ndarray:
    """Central's sums of ROUNDS rounds, (R, d): one client holds all persons."""
    wire = Wire(folder, config, [faces], keyed_client_app())
    exchange, sums = Exchange(wire.grid, config.training), []
    for server_round in range(1, ROUNDS + 1):
        asked = asked_of(config, stage, server_round)
        state = CoordinatorState.fresh(config, RUN_ID)
        mean = collect(state, exchange, asked, keyed("coordinator", server_round)).double().numpy()
        units = asked.privacy.declared_units if stage is Stage.MOMENTS else asked.privacy.expected_batch
        sums.append(mean * units)
    return np.stack(sums)


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("division", list(DIVISIONS))
def test_the_sum_is_that_of_the_pooled_persons_whoever_holds_them(tmp_path: Path, division: str, stage: Stage) -> None:
    """Less the noise shares, known from the keys, it is brute force's, but for half a step of each client."""
    config = config_with()
    asked = asked_of(config, stage)
    shares = shares_of(people(), DIVISIONS[division])
    opened = federation(tmp_path, config, shares)(asked)
    assert opened.survivors == list(range(CLIENTS))
    given = [given_by(client, asked, opened.lattice, share) for client, share in enumerate(shares)]
    clear = opened.steps - sum(noise for _, noise in given)
    assert np.array_equal(clear, sum(rounded for rounded, _ in given))
    # float32 has a tenth of a step left at most.
    error = np.abs(clear - pooled(asked, people()) / opened.lattice.granularity)
    assert error.max() <= CLIENTS / 2 + 0.1
    assert np.abs(clear).max() > 1000


@pytest.mark.parametrize("stage", list(Stage))
def test_what_is_left_to_colluders_is_central_s_release_of_the_others(tmp_path: Path, stage: Stage) -> None:
    """One client is away, and one tells the coordinator its vector: H shares hide the rest, and they are central's noise."""
    config, away, colluder = config_with(), 4, 0
    division = DIVISIONS["by chance"]
    shares = shares_of(people(), division)
    ask = federation(tmp_path, config, shares, without(FIRST_NODE + away))
    honest = people().subset(np.flatnonzero(~np.isin(division[people().persons], [away, colluder])))
    left = []
    for server_round in range(1, ROUNDS + 1):
        asked = asked_of(config, stage, server_round)
        opened = ask(asked)
        assert opened.survivors == [0, 1, 2, 3]
        left.append(opened.steps - sum(given_by(colluder, asked, opened.lattice, shares[colluder])))
    lattice = opened.lattice
    signal, claimed = pooled(asked, honest), asked.release.noise_multiplier * unit_norm(asked)
    deviation = lattice.noise_deviation(SHARES)
    assert asked.privacy.noise_shares == lattice.shares == SHARES
    assert claimed <= deviation <= claimed * 1.0011
    noise = np.stack(left) * lattice.granularity - signal
    assert law_of(noise / deviation) > FALSE_ALARM
    central = config_with(privacy_model="central", num_clients=1, min_clients=1)
    released = central_releases(tmp_path / "central", central, honest, stage)
    assert law_of((released - signal) / claimed) > FALSE_ALARM
    assert same_law(noise / deviation, (released - signal) / claimed) > FALSE_ALARM
    # So is a fault found: noise a fiftieth low, that of a share more, or of a round before.
    assert law_of(0.98 * noise / deviation) < FALSE_ALARM
    assert same_law(noise * math.sqrt(1 + 1 / SHARES), released - signal) < FALSE_ALARM
    assert law_of(np.stack([noise[0], noise[0]]) / deviation) < FALSE_ALARM


@pytest.mark.parametrize("stage", list(Stage))
def test_two_divisions_of_the_same_persons_release_the_same_law(tmp_path: Path, stage: Stage) -> None:
    """All five answer. The difference is noise alone: of H shares priced, five are in each sum."""
    config, sums = config_with(), []
    for number, division in enumerate(["evenly", "one has nearly all"]):
        ask = federation(tmp_path / str(number), config, shares_of(people(), DIVISIONS[division]), other_keys(number))
        opened = [ask(asked_of(config, stage, server_round)) for server_round in range(1, ROUNDS + 1)]
        sums.append(np.stack([one.steps for one in opened]) * opened[0].lattice.granularity)
    apart = (sums[0] - sums[1]) / (math.sqrt(2) * opened[0].lattice.noise_deviation(CLIENTS))
    assert law_of(apart) > FALSE_ALARM
    signal = pooled(asked_of(config, stage), people())
    along = float(apart.sum(0) @ signal) / math.sqrt(ROUNDS) / float(np.linalg.norm(signal))
    assert 2 * stats.norm.sf(abs(along)) > FALSE_ALARM


def test_the_number_drawn_is_the_pooled_binomial(tmp_path: Path) -> None:
    """All faces alike and little noise, so that the sum tells how many were drawn of all persons together."""
    rate, rounds = 0.3, 30
    picture = np.random.default_rng(1).integers(0, 256, (1, 1, 28, 28), dtype=np.uint8)
    faces = FaceDataset(np.repeat(picture, PERSONS, axis=0), np.arange(PERSONS, dtype=np.int64))
    config = config_with(
        sample_rate=rate, images_per_person=1, noise_multiplier=0.05, max_grad_norm=1.0, discriminator="dcgan"
    )
    ask = federation(tmp_path, config, shares_of(faces, DIVISIONS["one has nearly all"]))
    one = pooled(asked_of(config, Stage.GRADIENTS), faces.subset(np.array([0])))
    drawn = []
    for server_round in range(1, rounds + 1):
        opened = ask(asked_of(config, Stage.GRADIENTS, server_round))
        drawn.append(float(opened.steps @ one) * opened.lattice.granularity / float(one @ one))
    counts = np.rint(drawn).astype(int)
    assert np.abs(drawn - counts).max() < 6 * 0.05 * math.sqrt(CLIENTS / SHARES)
    bins = [-1, 3, 4, 5, PERSONS]
    observed = np.histogram(counts, np.array(bins) + 0.5)[0]
    expected = np.diff(stats.binom(PERSONS, rate).cdf(bins)) * rounds
    assert stats.chisquare(observed, expected).pvalue > FALSE_ALARM
    assert stats.binomtest(int(counts.sum()), rounds * PERSONS, rate).pvalue > FALSE_ALARM


@pytest.mark.parametrize("shares", [1, 2, 14])
def test_as_many_shares_as_are_counted_on_are_central_s_noise(shares: int) -> None:
    """On the lattice itself, on many coordinates."""
    dimension = 300_000
    lattice = Lattice.of(
        dimension=dimension, max_grad_norm=0.7, noise_multiplier=0.6, shares=shares, clients=20, expected_units=50
    )
    total = torch.from_numpy(np.random.default_rng(0).normal(0, 1e-2, dimension))
    parts = torch.stack([total * part for part in np.random.default_rng(1).dirichlet(np.ones(shares))])
    given = np.zeros(dimension, np.uint32)
    for client, part in enumerate(parts):
        given += lattice.add_noise_share(part, keyed("share", client))
    noise = (lattice.decode(given) - total.numpy())[None] / (0.6 * 0.7)
    central = (add_gaussian_noise(total, 0.6 * 0.7, keyed("central")).double() - total).numpy()[None] / (0.6 * 0.7)
    lattice_cost = lattice.noise_deviation(shares) / (0.6 * 0.7)
    assert law_of(np.vstack([noise / lattice_cost, central])) > FALSE_ALARM
    assert same_law(noise / lattice_cost, central) > FALSE_ALARM
    # Of one variance and another shape: found.
    triangular = np.random.default_rng(2).triangular(-math.sqrt(6), 0, math.sqrt(6), (2, dimension))
    assert law_of(triangular) < FALSE_ALARM
    assert same_law(triangular, central) < FALSE_ALARM
