"""Interrupted and resumed equals uninterrupted, bit for bit, when the noise is a test's; and no round is done twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import server.coordinator
import server.records
from common.config import RunConfig
from common.errors import CheckpointError
from common.faces import FaceDataset
from server.checkpoint import CheckpointStore, CoordinatorState
from server.records import RunRecorder
from tests.support import RUN_ID, keyed_client_app, random_faces, tiny_config, train

CONFIGS = {
    "central": {"privacy_model": "central"},
    "local": {"privacy_model": "local", "discriminator_steps": 2},
    "local, several steps": {"privacy_model": "local", "local_steps": 2, "generator_batch": 6},
    "none, adaptive": {"privacy_model": "none", "adaptive": True, "checkpoint_every": 3},
    "conditional": {"privacy_model": "central", "num_classes": 3, "adam_beta1": 0.5, "generator_batch": 6},
    "without moments": {"privacy_model": "central", "moment_rounds": 0},
    "views and dropout": {
        "privacy_model": "central",
        "discriminator": "conv-dropout",
        "augment": "flip, crop, rotation, colour, blur",
        "augment_views": 2,
    },
    "several steps, views, dropout, wasserstein": {
        "privacy_model": "local",
        "local_steps": 2,
        "discriminator": "conv-dropout",
        "loss": "wasserstein",
        "augment": "crop, colour",
    },
    "classifier": {
        "privacy_model": "central",
        "num_classes": 3,
        "loss": "cross-entropy",
        "generator_batch": 6,
        "refine_steps": 3,
    },
    "refined, views and dropout": {
        "privacy_model": "local",
        "discriminator": "conv-dropout",
        "augment": "crop, colour",
        "discriminator_steps": 3,
        "refine_steps": 3,
    },
}
CLIENTS = 2


def setting(name: str) -> tuple[RunConfig, list[FaceDataset]]:
    config = tiny_config(**CONFIGS[name])  # type: ignore[arg-type]
    classes = config.model.num_classes
    return config, [random_faces(4, 2, seed=client, num_classes=classes) for client in range(CLIENTS)]


class StopAt:
    """An observer, and a client, that press Ctrl-C at a chosen moment."""

    def __init__(
        self, fit_step: int | None = None, server_round: int | None = None, refined: int | None = None
    ) -> None:
        self._fit_step, self._round, self._refined = fit_step, server_round, refined

    def fit_stepped(self, state: CoordinatorState) -> None:
        if state.generator_steps == self._fit_step or (self._refined is not None and state.refined == self._refined):
            raise KeyboardInterrupt

    def round_ended(self, state: CoordinatorState) -> None:
        if state.next_round - 1 == self._round:
            raise KeyboardInterrupt


def stopping_client(node: int, server_round: int, *, after: bool) -> ClientApp:
    """The real app, but for one node in one round, where the process ends before or after it has answered."""
    inner = keyed_client_app()

    def app(message: Message, context: Context) -> Message:
        stops = context.node_id == node and message.content["instructions"]["server_round"] == server_round  # type: ignore[index]
        if stops and not after:
            raise KeyboardInterrupt
        reply = inner(message, context)
        if stops:
            raise KeyboardInterrupt
        return reply

    return app  # type: ignore[return-value]


def everything(state: CoordinatorState) -> dict[str, object]:
    """All of a state but the time it took."""
    found: dict[str, object] = {"rng": state.rng.get_state(), "target": state.moment_target}
    for name in ("generator", "ema", "discriminator"):
        found |= {f"{name}.{key}": value for key, value in getattr(state, name).state_dict().items()}
    for name in ("generator_optimizer", "discriminator_optimizer"):
        for i, slot in getattr(state, name).state_dict()["state"].items():
            found |= {f"{name}.{i}.{key}": value for key, value in slot.items()}
    names = ("run_id", "next_round", "generator_steps", "primed", "refined", "discriminator_steps")
    for name in (*names, "rounds_since_generator_step"):
        found[name] = getattr(state, name)
    found |= {"fake_accuracy": state.fake_accuracy, "charged": state.charged}
    return found | {f"last.{key}": value for key, value in state.last.items() if key != "seconds"}


def assert_same(left: CoordinatorState, right: CoordinatorState) -> None:
    one, other = everything(left), everything(right)
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key  # type: ignore[arg-type]
        else:
            assert value == other[key], key


def rounds_in_ledgers(folder: Path) -> list[Counter[tuple[str, int]]]:
    found = []
    for path in sorted((folder / "clients").glob("*/ledger.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        found.append(Counter((record["type"], record["round"]) for record in records if record["type"] != "opened"))
    return found


def resumed(folder: Path, shares: list[FaceDataset]) -> CoordinatorState:
    state = CheckpointStore(folder).load()
    recorder = RunRecorder(folder, state)
    train(folder, state, shares, [recorder])
    recorder.finish(state)
    return state


@pytest.mark.parametrize("name", list(CONFIGS))
def test_interrupted_after_rounds_and_within_the_fit(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, shares = setting(name)
    whole, folder = tmp_path / "whole", tmp_path / "broken"
    for path in (whole, folder):
        path.mkdir()
    unbroken = train(whole, CoordinatorState.fresh(config, RUN_ID), shares)
    first = config.moments.moment_rounds
    assert unbroken.next_round == first + 5

    # The fit is checkpointed at every step, or hardly ever: it goes on from wherever the disk stands.
    monkeypatch.setattr(server.coordinator, "_FIT_CHECKPOINT_S", -1.0 if name == "central" else 1e9)
    stops = [StopAt(fit_step=1), StopAt(fit_step=3), StopAt(fit_step=4)] if first else []
    stops += [StopAt(server_round=first + 1), StopAt(server_round=first + 3), StopAt(server_round=first + 4)]
    state = CoordinatorState.fresh(config, RUN_ID)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train(folder, state, shares, [RunRecorder(folder, state), stop])
        state = CheckpointStore(folder).load()
    assert_same(resumed(folder, shares), unbroken)
    lines = [json.loads(line)["round"] for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert lines == list(range(1, unbroken.last_round + 1))
    if name != "none, adaptive":
        expected = Counter({(kind, n): 1 for kind in ("charged", "released") for n in lines})
        assert rounds_in_ledgers(folder) == rounds_in_ledgers(whole) == [expected] * CLIENTS


@pytest.mark.parametrize("name", ["classifier", "refined, views and dropout"])
@pytest.mark.parametrize("every_step_saved", [False, True])
def test_interrupted_within_the_refinement(
    tmp_path: Path, name: str, every_step_saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, shares = setting(name)
    whole, folder = _made(tmp_path / "whole"), _made(tmp_path / "broken")
    unbroken = train(whole, CoordinatorState.fresh(config, RUN_ID), shares)
    assert unbroken.refined == 3
    assert unbroken.complete
    monkeypatch.setattr(server.coordinator, "_FIT_CHECKPOINT_S", -1.0 if every_step_saved else 1e9)
    state = CoordinatorState.fresh(config, RUN_ID)
    saved = []
    for step in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            train(folder, state, shares, [RunRecorder(folder, state), StopAt(refined=step)])
        state = CheckpointStore(folder).load()
        assert state.next_round == unbroken.next_round
        saved.append(state.refined)
    # The last step is on the disk in any case.
    assert saved == ([1, 2, 3] if every_step_saved else [0, 0, 3])
    assert_same(resumed(folder, shares), unbroken)
    assert rounds_in_ledgers(folder) == rounds_in_ledgers(whole)
    lines = [json.loads(line)["round"] for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert lines == list(range(1, unbroken.last_round + 1))


@pytest.mark.parametrize("name", ["central", "local", "local, several steps"])
@pytest.mark.parametrize("after", [False, True])
def test_interrupted_within_a_round(tmp_path: Path, name: str, after: bool) -> None:
    """Half of the cohort had answered: asked again, it sends the same bytes under the same charge."""
    config, shares = setting(name)
    whole, folder = tmp_path / "whole", tmp_path / "broken"
    unbroken = train(_made(whole), CoordinatorState.fresh(config, RUN_ID), shares)
    state = CoordinatorState.fresh(config, RUN_ID)
    for node, server_round in ((3, 1), (2, 2), (3, 4)):
        with pytest.raises(KeyboardInterrupt):
            train(_made(folder), state, shares, client_app=stopping_client(node, server_round, after=after))
        state = CheckpointStore(folder).load()
        assert state.next_round == server_round
    assert_same(resumed(folder, shares), unbroken)
    assert rounds_in_ledgers(folder) == rounds_in_ledgers(whole)


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    config, shares = setting("central")
    state = train(_made(tmp_path / "run"), CoordinatorState.fresh(config, RUN_ID), shares)
    before = rounds_in_ledgers(tmp_path / "run")
    assert_same(resumed(tmp_path / "run", shares), state)
    assert rounds_in_ledgers(tmp_path / "run") == before


def test_the_curves_of_an_interrupted_run_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment stage counts generator steps, the rounds count themselves: neither voids the other's events."""
    monkeypatch.setattr(server.records, "_FIT_RECORD_STEPS", 1)
    monkeypatch.setattr(server.coordinator, "_FIT_CHECKPOINT_S", -1.0)
    config, shares = setting("none, adaptive")  # checkpoints every three rounds: what came after is done again
    folder = _made(tmp_path / "run")
    state = CoordinatorState.fresh(config, RUN_ID)
    for stop in (StopAt(fit_step=3), StopAt(server_round=5)):
        with pytest.raises(KeyboardInterrupt):
            train(folder, state, shares, [RunRecorder(folder, state), stop])
        state = CheckpointStore(folder).load()
    resumed(folder, shares)
    curves = {
        ("moments", "moment_loss"): [1, 2, 3, 4],
        ("rounds", "update_norm"): [1, 2, 3, 4, 5],
        ("rounds", "fake_accuracy"): [2, 3, 4, 5],
    }
    for (kind, figure), steps in curves.items():
        board = EventAccumulator(str(folder / "tensorboard" / kind)).Reload()
        assert [event.step for event in board.Scalars(f"{kind}/{figure}")] == steps


def test_damaged_lines_of_the_record_are_dropped(tmp_path: Path) -> None:
    config, shares = setting("central")
    folder = _made(tmp_path / "run")
    state = CoordinatorState.fresh(config, RUN_ID)
    with pytest.raises(KeyboardInterrupt):
        train(folder, state, shares, [RunRecorder(folder, state), StopAt(server_round=3)])
    path = folder / "rounds.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    junk = [b"\0\0\0\n", b"\n", b"[3]\n", b'"round"\n', b'{"round": "2"}\n', b'{"stage": "x"}\n', b"\xff\xfe{\n"]
    path.write_bytes(b"".join([first, second[:20] + b"\n", *junk, second, third[:-1]]))  # the last one torn
    resumed(folder, shares)
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[:3] == [first, second, third]


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    config, _ = setting("central")
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError):
        store.load()
    store.save(CoordinatorState.fresh(config, RUN_ID))
    content = store.path.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        store.path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            store.load()
    store.path.write_bytes(content.replace(b"num-rounds", b"num-roundz"))
    with pytest.raises(CheckpointError, match="num-rounds"):
        store.load()


def test_kill_9_and_resume_from_the_command_line(tmp_path: Path) -> None:
    """A real process, killed in the middle of a round; the second one completes it, and each round is there once."""
    options = ["--data", "procedural:persons=6,images=2", "--num-clients", "2", "--image-size", "28", "--channels", "1"]
    options += ["--discriminator", "mlp", "--discriminator-width", "4", "--generator-width", "2", "--latent-dim", "4"]
    options += ["--moment-steps", "3", "--moment-batch", "4", "--num-rounds", "120", "--generator-batch", "4"]
    options += ["--sample-rate", "0.5", "--expected-batch", "1.5", "--fake-batch", "4", "--sample-every", "1000"]
    command = [sys.executable, "-m", "visard", "simulate", "demo", "--runs-dir", str(tmp_path), "--name", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    lines = tmp_path / "run" / "rounds.jsonl"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, *options], env=environment, cwd=tmp_path, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 200
            while not (lines.exists() and lines.read_text().count("\n") >= 7):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    done = lines.read_text().count("\n")
    assert done < 121, "killed too late to tell anything"
    assert not (tmp_path / "run" / "generator.safetensors").exists()

    second = subprocess.run([*command, "--resume"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert [json.loads(line)["round"] for line in lines.read_text().splitlines()] == list(range(1, 122))
    expected = Counter({(kind, n): 1 for kind in ("charged", "released") for n in range(1, 122)})
    assert rounds_in_ledgers(tmp_path / "run") == [expected] * 2
    assert (tmp_path / "run" / "generator.safetensors").exists()
    board = EventAccumulator(str(tmp_path / "run/tensorboard/rounds"), {"scalars": 0}).Reload()
    steps = [event.step for event in board.Scalars("rounds/update_norm")]
    assert sorted({*steps, done}) == list(range(1, 122))  # killed between a round's line and its event: one is missing


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
