"""The coordinator's Flower app: parse, build, call `coordinate`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import RunConfig
from common.errors import ConfigError
from common.faces.places import absolute, overlap
from common.fields import Scalar
from common.messages import Stage
from common.models.features import RandomFeatures
from common.models.flat import num_parameters
from common.privacy.planner import with_noise
from common.privacy.units import PrivacyModel
from common.secure_messages import lattice_for
from server.checkpoint import CheckpointStore, CoordinatorState
from server.coordinator import Observer, coordinate
from server.exchange import Exchange
from server.progress import PlainProgress
from server.quality import Judge
from server.records import RunRecorder
from server.witness import Witness

# What a run may do otherwise when it is resumed: neither its promise nor its result depends on it.
CHANGEABLE = ("min-clients", "round-timeout-s", "straggler-wait-s", "sample-every", "stop-when", "reference")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run under Flower (`flwr run`): a fresh run in `runs-dir`, named after Flower's run id."""
    flat = dict(context.run_config)
    directory = Path(str(flat.pop("runs-dir", "runs"))).expanduser() / f"flwr-{context.run_id}"
    picture = run(grid, open_run(directory, RunConfig.from_flat(flat)), directory, [PlainProgress()])
    print(f"pictures and the generator are in {picture.parent.parent}")


def open_run(
    directory: Path, config: RunConfig | None, changes: Mapping[str, Scalar] | None = None
) -> CoordinatorState:
    """A fresh state for `config`, its noise calibrated, or for None the state of the interrupted run in `directory`.

    changes: options of a resumed run that may be given anew, CHANGEABLE only. Raises ConfigError for others and where a
    fresh run would overwrite another, CheckpointError where there is nothing to resume.
    """
    if config is None:
        fixed = set(changes or {}) - set(CHANGEABLE)
        if fixed:
            raise ConfigError(
                f"a resumed run keeps its configuration, but for {', '.join(CHANGEABLE)}: leave out "
                f"--{', --'.join(sorted(fixed))} (a --preset stands for several), or start a new run"
            )
        state = CheckpointStore(directory).load()
        before = state.config.training.stop_when
        state.config = with_places(RunConfig.from_flat({**state.config.to_flat(), **(changes or {})}))
        # Budgets may have been raised, or others come: to ask for the same round again costs nobody anything.
        if state.ended_by == "budgets" or state.config.training.stop_when != before:
            state.ended_by = state.stopped = ""
            state.refined = 0  # rounds come again, and with them another discriminator
        return state
    if CheckpointStore(directory).path.exists():
        raise ConfigError(f"{directory} holds a run already: continue it with --resume, or give another --name")
    state = CoordinatorState.fresh(with_noise(with_places(config)))
    check_sums(state)
    return state


def dimensions(state: CoordinatorState) -> dict[Stage, int]:
    """The length of the vectors that clients send in each stage that the run has."""
    config, found = state.config, {}
    if config.moments.moment_rounds:
        features = RandomFeatures(config.model.image_size, config.model.channels, config.moments.feature_seed)
        found[Stage.MOMENTS] = features.dim * max(config.model.num_classes, 1)
    if config.training.num_rounds:
        found[Stage.GRADIENTS] = num_parameters(state.discriminator)
    return found


def check_sums(state: CoordinatorState) -> None:
    """Raise ConfigError where the secure sum of a distributed run would not fit its 32 bits: before anything is charged."""
    config = state.config
    if config.privacy.privacy_model is not PrivacyModel.DISTRIBUTED:
        return
    noise = {
        Stage.MOMENTS: config.moments.moment_noise_multiplier,
        Stage.GRADIENTS: config.privacy.noise_multiplier,
    }
    for stage, dimension in dimensions(state).items():
        lattice_for(config.privacy, stage, noise[stage], dimension)


def with_places(config: RunConfig) -> RunConfig:
    """The configuration with paths that mean the same from any folder.

    Raises ConfigError where the reference or the public faces of a private run are among the faces that are simulated
    clients': comparing to them, or learning from them, would tell of them without noise.
    """
    simulation, training = config.simulation, config.training
    private = config.privacy.privacy_model is not PrivacyModel.NONE
    for key, place, doing in (
        ("reference", training.reference, "comparing to it"),
        ("public", training.public, "learning from it"),
    ):
        if private and place and overlap(place, simulation.data):
            raise ConfigError(
                f"{key} = {place!r} is among what the clients hold, and {doing} would tell of them without noise: give public faces"
            )
    attributes = absolute(simulation.attributes)
    simulation = dataclasses.replace(simulation, data=absolute(simulation.data), attributes=attributes)
    training = dataclasses.replace(training, reference=absolute(training.reference), public=absolute(training.public))
    return dataclasses.replace(config, simulation=simulation, training=training)


def run(grid: Grid, state: CoordinatorState, directory: Path, observers: Sequence[Observer] = ()) -> Path:
    """Train to the end, writing all of `runs/NAME/`. Returns the path of the last picture."""
    judge = Judge(state)  # before anything is written: its faces may not be there
    directory.mkdir(parents=True, exist_ok=True)
    recorder, witness = RunRecorder(directory, state), Witness(directory.parent, state)
    coordinate(
        state,
        judge,
        Exchange(grid, state.config.training, getattr(grid, "peer_key", None), getattr(grid, "names", dict)),
        CheckpointStore(directory),
        [recorder, witness, *observers],
    )
    return recorder.finish(state)
