"""Small federations for tests: tiny networks, random faces, and noise that a test can draw again."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.app import create_app
from client.simulated import simulated_peers
from common.config import RunConfig
from common.faces import FaceDataset
from common.fields import Scalar
from common.messages import RoundInstructions, Stage
from common.privacy.planner import with_noise
from common.privacy.randomness import SecureRandom
from server.checkpoint import CheckpointStore, CoordinatorState
from server.coordinator import Observer, coordinate
from server.exchange import Exchange
from server.quality import Judge
from simulations.engine import InProcessGrid
from simulations.simulate import owner_config

RUN_ID = "0123456789abcdef" * 2
# A recipe of people's faces with rounds; those that come with Visard have none.
LFW_WITH_ROUNDS = str(Path(__file__).parent / "lfw_with_rounds.toml")

TINY: dict[str, Scalar] = {
    "image-size": 28,
    "channels": 1,
    "generator-width": 2,
    "latent-dim": 4,
    "discriminator": "mlp",
    "discriminator-width": 4,
    "moment-steps": 4,
    "moment-batch": 6,
    "num-rounds": 4,
    "generator-batch": 4,
    "fake-batch": 4,
    "sample-rate": 0.5,
    "expected-batch": 2.0,
    "images-per-person": 2,
    "data": "procedural:persons=12,images=2",
    "num-clients": 3,
    "sample-every": 1000,
    "round-timeout-s": 60.0,
}


def tiny_config(**overrides: Scalar) -> RunConfig:
    """A configuration of tiny networks, its noise calibrated; `num_rounds=2` is `num-rounds`."""
    return with_noise(RunConfig.from_flat(TINY | {key.replace("_", "-"): value for key, value in overrides.items()}))


def keyed(*parts: object) -> SecureRandom:
    """Randomness that is the same for the same parts."""
    return SecureRandom(hashlib.sha256(repr(parts).encode()).digest())


def random_faces(persons: int, images: int, *, seed: int = 0, num_classes: int = 0) -> FaceDataset:
    """Noise for pictures: (persons * images, 1, 28, 28), persons in order; labels in turn where there are classes."""
    rng = np.random.default_rng(seed)
    count = persons * images
    return FaceDataset(
        images=rng.integers(0, 256, (count, 1, 28, 28), dtype=np.uint8),
        persons=np.repeat(np.arange(persons), images).astype(np.int64),
        labels=np.arange(count, dtype=np.int64) % num_classes if num_classes else None,
    )


def keyed_client_app() -> ClientApp:
    """The real ClientApp, with noise that is a function of the node and the round."""

    def new_random(instructions: RoundInstructions, context: Context) -> SecureRandom:
        return keyed("client", context.node_id, instructions.server_round)

    return create_app(new_random)


def keyed_coordinator(state: CoordinatorState) -> SecureRandom:
    """The coordinator's noise as a function of the round."""
    return keyed("coordinator", state.next_round)


def node_configs(folder: Path, config: RunConfig, shares: Sequence[FaceDataset]) -> list[dict[str, Scalar]]:
    """What the owner of each share sets. Faces and ledgers are kept in `folder`."""
    (folder / "faces").mkdir(parents=True, exist_ok=True)
    owners = [folder / "clients" / f"{number:04d}" for number in range(len(shares))]
    peers = simulated_peers(config.to_flat(), owners)
    found = []
    for owner, share in zip(owners, shares, strict=True):
        path = folder / "faces" / f"{owner.name}.npz"
        if not path.exists():
            share.save(path)
        found.append({**owner_config(config, path, owner), **peers})
    return found  # type: ignore[return-value]


def train(
    folder: Path,
    state: CoordinatorState,
    shares: Sequence[FaceDataset],
    observers: Sequence[Observer] = (),
    client_app: ClientApp | None = None,
    policy: Callable[[int, dict[str, Scalar]], dict[str, Scalar]] = lambda _client, config: config,
) -> CoordinatorState:
    """Run `state` to its end over real ClientApps in this process, with test noise."""
    configs = [policy(i, c) for i, c in enumerate(node_configs(folder, state.config, shares))]
    grid = InProcessGrid(client_app or keyed_client_app(), configs)
    exchange, store = Exchange(grid, state.config.training), CheckpointStore(folder)
    coordinate(state, Judge(state), exchange, store, observers, keyed_coordinator)
    return state


def gradient_instructions(config: RunConfig, weights: np.ndarray, server_round: int = 1) -> RoundInstructions:
    """Instructions of a round of one gradient step."""
    return RoundInstructions(
        run_id=RUN_ID,
        server_round=server_round,
        stage=Stage.GRADIENTS,
        model=config.model,
        privacy=config.privacy,
        augmentation=config.augmentation,
        moment_rounds=config.moments.moment_rounds,
        moment_noise_multiplier=config.moments.moment_noise_multiplier,
        feature_seed=config.moments.feature_seed,
        planned_steps=config.training.num_rounds,
        min_clients=config.training.min_clients,
        discriminator=weights,
    )


def ask(grid: InProcessGrid, instructions: RoundInstructions) -> list[Message]:
    """Every client's reply to one round."""
    content = instructions.to_record()
    group = str(instructions.server_round)
    return grid.send_and_receive(
        [Message(content, node, "train", ttl=60.0, group_id=group) for node in grid.get_node_ids()]
    )
