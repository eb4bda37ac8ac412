"""The process that trains: the coordinator's main loop, and the nodes' server in a thread of it.

`visard coordinator start` (`server.supervisor`) starts it, and starts it anew where it dies. It goes on from the checkpoint
of an interrupted run, or begins a fresh one.
"""

import contextlib
import dataclasses
import json
import logging
import logging.handlers
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.panel import Panel

from common.config import RunConfig
from common.errors import ConfigError, VisardError
from common.fields import Scalar, keys_of
from common.privacy.units import PrivacyModel
from common.sections import SimulationConfig
from common.telling import PlainFormatter
from server.deployment import Deployment
from server.status import StatusFile
from server.summary import closing_table, run_directory

if TYPE_CHECKING:
    from server.checkpoint import CoordinatorState

LoadRecipe = Callable[[str, Mapping[str, Scalar]], RunConfig]

_PR_SET_PDEATHSIG = 1
_LOOK_S, _ORPHAN_S = 0.5, 5.0
# An end that was raised and swallowed is raised again after so long; what it takes down may last longer.
_AGAIN_S, _LAST_S = 1.0, 20
_LOG_BYTES = 10_000_000
# Of what is dealt to one peer for one round, with room, and of all that goes along with a vector.
_DEALT_BYTES, _BESIDE_BYTES = 512, 1 << 20
# Options that a fresh run fills in where they are left at 0.
_FILLED = ("noise-multiplier", "moment-noise-multiplier", "peers", "survivors")

console = Console()
log = logging.getLogger("visard.coordinator")


def main(folder: Path, supervisor: int, load_recipe: LoadRecipe) -> None:
    """Train to the end the run that `folder`'s settings describe. supervisor: id of the process that started this one.

    load_recipe turns a recipe's name or path, and the options given, into a configuration. Raises a VisardError where the
    run is refused; whatever else it raises is a fault. Call it in the main thread.
    """
    follow(supervisor)
    # Each node has two connections, and strangers have some.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    deployment = Deployment.load(folder)
    os.chdir(deployment.folder)  # what paths in its settings are relative to
    with _logging_to(deployment.log_path), StatusFile(deployment.status_path, supervisor) as status:
        directory = run_directory(deployment.runs_dir, deployment.name)
        for place, name in ((deployment.folder, f".{deployment.status_path.name}.*.tmp"), (directory, ".*.tmp")):
            for left in place.glob(name):  # of workers that were killed while they wrote
                left.unlink(missing_ok=True)
        status.tell("starting", run=deployment.name, listen=deployment.listen, address=deployment.address)
        _train(deployment, directory, load_recipe(deployment.recipe, deployment.run), status)


def _train(deployment: Deployment, directory: Path, config: RunConfig, status: StatusFile) -> None:
    with console.status("starting"):
        from common.privacy.planner import promise
        from server.app import dimensions, run
        from server.certificates import ensure_certificate
        from server.progress import PlainProgress, ProgressBar
        from server.registry import Registry
        from server.superlink import superlink_grid

        state = open_or_resume(directory, config)
    more = f"more:  visard generate {directory} -n 64"
    promised = promise(state.config)
    if state.complete:
        picture = finished(directory, state)
        console.print(
            f"the run {directory.name} is complete, and nothing is left to do: for another, give another `name` in "
            f"{deployment.folder}/coordinator.toml\nfaces: {picture}\n{more}",
            highlight=False,
            soft_wrap=True,
        )
        status.note(state)
        status.tell("complete", f"faces: {picture}", promise=promised)
        return
    private = state.config.privacy.privacy_model is not PrivacyModel.NONE
    console.print(
        promised if private else Panel(f"[bold]{promised}[/]", style="white on red"), highlight=False, soft_wrap=private
    )
    limit = largest_answer(state.config, dimensions(state), deployment.max_message_mib)
    for line in ensure_certificate(deployment):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    registry = Registry(deployment.registry_path)

    def approved() -> int:
        return sum(not node.revoked for node in registry.nodes())

    with contextlib.ExitStack() as stack:
        grid = stack.enter_context(
            superlink_grid(
                deployment.listen,
                deployment.certificate,
                deployment.key,
                registry,
                deployment.signing_key(),
                limit,
            )
        )
        begun = state.next_round > 1 or state.generator_steps > 0 or state.primed > 0
        begins = f"goes on with round {min(state.next_round, state.last_round)}" if begun else "begins"
        console.print(
            f"the run {directory.name} {begins}, and is kept in {directory}\n"
            f"listening on {deployment.listen}; nodes dial {deployment.address}\n"
            f"{approved()} nodes are approved, and a round needs {state.config.training.min_clients}; a kit for another:\n"
            f"  visard coordinator invite NAME {deployment.folder}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        status.tell("starting", promise=promised)
        status.watch(state, lambda: grid.names().values(), approved)
        observer = stack.enter_context(ProgressBar(console, state)) if console.is_terminal else PlainProgress()
        with LeavesOnSignal():
            picture = run(grid, state, directory, [observer, status])
    status.note(state)
    status.tell("complete", f"faces: {picture}")
    console.print(closing_table(state, directory))
    console.print(f"faces: {picture}\n{more}", highlight=False, soft_wrap=True)


def largest_answer(config: RunConfig, dimensions: Mapping[Any, int], max_message_mib: int) -> int:
    """Bytes of the largest answer of an honest node: no more is read of any. dimensions: of the run's vectors, by stage.

    Raises ConfigError where that is above max_message_mib.
    """
    privacy, training = config.privacy, config.training
    dealt = privacy.peers * min(training.deal_rounds, training.num_rounds + 1) * _DEALT_BYTES
    largest = 4 * max(dimensions.values(), default=0) + dealt + _BESIDE_BYTES
    if largest > max_message_mib * 2**20:
        raise ConfigError(
            f"max-message-mib = {max_message_mib}, and a node's answer may have {largest / 2**20:.0f} MiB in this run: raise it in "
            "coordinator.toml, or take a smaller discriminator"
        )
    return largest


def open_or_resume(directory: Path, config: RunConfig) -> "CoordinatorState":
    """The interrupted run in `directory`, or a fresh one where there is none. config: what the settings ask for now.

    Raises ConfigError where the run was begun with something else that cannot change on the way.
    """
    from server.app import CHANGEABLE, open_run, with_places
    from server.checkpoint import CheckpointStore

    # Nobody's faces are where simulated clients would get theirs: public faces may lie there.
    config = dataclasses.replace(config, simulation=dataclasses.replace(config.simulation, data=""))
    if not CheckpointStore(directory).path.exists():
        return open_run(directory, config)
    asked = with_places(config).to_flat()
    state = open_run(directory, None, {key: asked[key] for key in CHANGEABLE})
    begun = state.config.to_flat()
    # Real clients ignore where simulated ones would get their faces.
    free = {*CHANGEABLE, *(key for _, key in keys_of(SimulationConfig))}
    free |= {key for key in _FILLED if not asked[key]}
    if config.privacy.privacy_model is PrivacyModel.NONE:
        free.add("noise-multiplier")
    differ = [key for key, value in asked.items() if key not in free and begun[key] != value]
    if differ:
        told = "; ".join(f"{key} = {begun[key]!r}, now {asked[key]!r}" for key in differ)
        raise ConfigError(
            f"{directory} was begun with {told}. A run keeps its configuration, but for {', '.join(CHANGEABLE)}: put it back in "
            "coordinator.toml to go on with this run, or give another `name` for another"
        )
    return state


def finished(directory: Path, state: "CoordinatorState") -> Path:
    """The last picture of a complete run; what a crash at its very end left out is written first."""
    from server.records import RunRecorder

    picture = directory / "samples" / "final.png"
    try:
        card = json.loads((directory / "generator.json").read_text(encoding="utf-8"))
        written = (card["rounds"], card["generator_steps"]) == (state.next_round - 1, state.generator_steps)
    except (OSError, ValueError, KeyError, TypeError):
        written = False
    if written and picture.exists() and (directory / "generator.safetensors").exists():
        return picture
    return RunRecorder(directory, state).finish(state)


def follow(supervisor: int) -> None:
    """See to it that this process ends when the one that started it does, however that died.

    SIGTERM comes at once (on Linux) or within half a second; five seconds later a thread ends whatever is left, in the
    middle of what it does: all that a run needs is on the disk at any moment.
    """
    linux = sys.platform == "linux"
    if linux:
        import ctypes

        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0):
            linux = False  # not allowed here: the thread will do
    gone = os.getppid() != supervisor  # before it was asked for
    threading.Thread(target=_follow, args=(supervisor, not linux or gone), name="follow", daemon=True).start()


def _follow(supervisor: int, tell: bool) -> None:
    while os.getppid() == supervisor:
        time.sleep(_LOOK_S)
    if tell:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_S)
    os._exit(1)


class LeavesOnSignal:
    """While it is open SIGTERM raises SystemExit, so that everything is taken down in order.

    What a handler raises may be lost, within callbacks that ignore it: it is raised again each second until it arrives here.
    From then on there is a limit to how long taking down may last.
    """

    def __enter__(self) -> Self:
        self._handlers = {n: signal.signal(n, self._leave) for n in (signal.SIGALRM, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if isinstance(error, SystemExit):
            signal.alarm(_LAST_S)

    def _leave(self, _number: int, _frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        raise SystemExit(128 + signal.SIGTERM)


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Everything that is logged goes to the file, warnings to the terminal too; and what ends the context."""
    root, ours = logging.getLogger(), logging.getLogger("visard")
    for handler in root.handlers:
        handler.setLevel(max(handler.level, logging.WARNING))
    file = logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8")
    file.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
    ours.setLevel(logging.INFO)
    log.info("worker %d begins", os.getpid())
    try:
        yield
    except BaseException as error:
        fault = not isinstance(error, VisardError | SystemExit)
        log.info("worker %d ends: %s: %s", os.getpid(), type(error).__name__, error, exc_info=fault)
        raise
    else:
        log.info("worker %d ends: the run is complete", os.getpid())
    finally:
        root.removeHandler(file)
        file.close()
