"""A whole federation on one machine: deal out the faces, run the unmodified apps, keep what comes of it."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flwr.app import UserConfigValue
from flwr.clientapp import ClientApp

from client.app import app as shipped_client_app
from client.simulated import simulated_limits, simulated_peers
from common.config import RunConfig
from common.errors import ConfigError, DataError
from common.faces import FaceDataset, load_faces
from common.faces.cache import cache_folder
from common.fields import Scalar
from common.privacy.accounting import tight_epsilon_of
from common.privacy.ledger import Ledger
from common.privacy.units import PrivacyModel
from server.app import open_run, run
from server.checkpoint import CoordinatorState
from server.coordinator import Observer
from simulations.engine import InProcessGrid
from simulations.partition import partition


@dataclass(frozen=True)
class Outcome:
    """What came of a simulation. ledgers: (epsilon by the client's own ledger, the same by PRV) of each client, if
    private.
    """

    state: CoordinatorState
    picture: Path
    ledgers: list[tuple[float, float]]


def prepare(
    directory: Path, config: RunConfig | None, changes: Mapping[str, Scalar] | None = None
) -> tuple[CoordinatorState, FaceDataset]:
    """The run's state, and all its faces. `config` None resumes, with `changes`. Raises ConfigError, CheckpointError or DataError."""
    state = open_run(directory, config, changes)
    return state, load_simulated_faces(state.config)


def load_simulated_faces(config: RunConfig) -> FaceDataset:
    """All the faces that a simulation deals out. Raises DataError where their labels or persons do not fit the run."""
    model = config.model
    faces = load_faces(config.simulation, model.image_size, model.channels, cache_dir=cache_folder() / "faces")
    faces.units(config.privacy.unit)
    # A client must not tell of labels that it cannot use; who simulates holds all faces and should know.
    if model.num_classes and (faces.labels is None or int(faces.labels.max()) >= model.num_classes):
        found = "none" if faces.labels is None else f"0 to {int(faces.labels.max())}"
        raise DataError(
            f"num-classes = {model.num_classes} and the faces' labels are {found}: set num-classes to fit, 0 for none"
        )
    return faces


def simulate(
    directory: Path,
    state: CoordinatorState,
    faces: FaceDataset,
    observers: Sequence[Observer] = (),
    client_app: ClientApp = shipped_client_app,
) -> Outcome:
    """Train to the end. Each simulated client is an ordinary one: own faces, own policy, own ledger under the run's
    folder.
    """
    owners = directory.absolute() / "clients"
    with dealt_out(faces, state.config) as files:
        node_configs = owner_configs(state.config, files, owners)
        picture = run(InProcessGrid(client_app, node_configs), state, directory, observers)
    return Outcome(state, picture, close_ledgers(directory, state.config))


@contextmanager
def dealt_out(faces: FaceDataset, config: RunConfig) -> Iterator[list[Path]]:
    """Files with each client's share, gone when the context ends: copies of faces do not stay in the run's folder."""
    shares = partition(faces, config.simulation, config.training.seed)
    with _own_folder(cache_folder()) as folder:
        files = [folder / f"{client:04d}.npz" for client in range(len(shares))]
        for file, share in zip(files, shares, strict=True):
            faces.subset(share).save(file)
        yield files


@contextmanager
def _own_folder(root: Path) -> Iterator[Path]:
    """A folder that is gone when the context ends or, where its process is killed, when the next simulation begins.

    A lock in it says that its process runs: the process id in its name may be another's by then, or be of another
    container.
    """
    with ExitStack() as stack:
        with (root / "clients.lock").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)  # nobody takes a folder that is being made for one left behind
            for left in root.glob("clients-*"):
                with suppress(OSError), (left / "running").open("w") as running:
                    fcntl.flock(running, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"clients-{os.getpid()}-", dir=root))
            fcntl.flock(stack.enter_context((Path(name) / "running").open("w")), fcntl.LOCK_EX)
        yield Path(name)


def owner_config(config: RunConfig, data: Path, state_dir: Path) -> dict[str, UserConfigValue]:
    """What a simulated owner sets: the run's budget, and whatever else the run needs."""
    return {"data": str(data), "state-dir": str(state_dir), **simulated_limits(config.to_flat())}


def owner_configs(config: RunConfig, files: Sequence[Path], owners: Path) -> list[dict[str, UserConfigValue]]:
    """What the owners of these faces set, each with its state in a folder of `owners` named after its file."""
    if config.privacy.privacy_model is PrivacyModel.DISTRIBUTED and config.privacy.peers != len(files):
        raise ConfigError(f"peers = {config.privacy.peers} and {len(files)} clients are simulated: leave peers out")
    peers = simulated_peers(config.to_flat(), [owners / file.stem for file in files])
    return [{**owner_config(config, file, owners / file.stem), **peers} for file in files]


def close_ledgers(directory: Path, config: RunConfig) -> list[tuple[float, float]]:
    """Epsilon that each simulated client's own ledger holds, and the same releases by PRV; none in a run without privacy.

    Deletes the replies kept for sending again: under `central` they are clear sums, and a run's folder is passed on.
    """
    privacy = config.privacy
    if privacy.privacy_model is PrivacyModel.NONE:
        return []
    found = []
    tight: dict[tuple[object, ...], float] = {}
    for client in sorted((directory / "clients").glob("*/")):
        ledger = Ledger(client, max_epsilon=privacy.epsilon, delta=privacy.delta)
        ledger.forget_reply()
        releases = tuple(sorted(ledger.releases))
        if releases not in tight:
            tight[releases] = tight_epsilon_of(releases, privacy.delta)
        found.append((ledger.epsilon, tight[releases]))
    return found


def declared_against_held(config: RunConfig, faces: FaceDataset) -> str | None:
    """A remark where the declared constants are far from what the simulated clients hold, which would waste noise or
    bias the mean."""
    held = len(faces.units(config.privacy.unit)) / config.simulation.num_clients
    declared = config.privacy.declared_units
    if 0.8 <= declared / held <= 1.25:
        return None
    return (
        f"expected-batch {config.privacy.expected_batch:g} at sample-rate {config.privacy.sample_rate:g} declares {declared:.0f} units "
        f"a client, which is more than a fifth {'above' if declared > held else 'below'} what the simulated clients hold"
    )
