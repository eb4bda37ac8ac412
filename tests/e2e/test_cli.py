"""The `visard` command as a person meets it: files promised, errors in one line, nothing overwritten."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import server.superlink
import server.worker
import simulations.simulate
import visard
from client.app import app
from common.config import RunConfig
from common.fields import load_toml
from server.checkpoint import CoordinatorState
from server.progress import PlainProgress
from simulations.engine import InProcessGrid
from simulations.simulate import dealt_out
from tests.support import node_configs, random_faces, tiny_config

TINY = {
    "data": "procedural:persons=12,images=2",
    "num-clients": 3,
    "image-size": 28,
    "channels": 1,
    "discriminator": "mlp",
    "discriminator-width": 4,
    "generator-width": 2,
    "latent-dim": 4,
    "moment-steps": 20,
    "moment-batch": 6,
    "num-rounds": 4,
    "generator-batch": 4,
    "fake-batch": 4,
    "sample-rate": 0.5,
    "expected-batch": 2.0,
    "sample-every": 2,
    "round-timeout-s": 60.0,
}
OPTIONS = [text for key, value in TINY.items() for text in (f"--{key}", str(value))]


class Terminal:
    """Runs the command in this process: exit code, standard output, standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["visard", *map(str, arguments)])
        self._capsys.readouterr()
        code = 0
        try:
            visard.main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(monkeypatch, capsys)


def assert_one_line(result: tuple[int, str, str], kind: str, *told: str) -> None:
    code, out, err = result
    assert code not in (0, None)
    assert err.strip().startswith(f"{kind}: "), (out, err)
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in out + err
    for text in told:
        assert text in err


def test_a_run_leaves_what_it_promises_and_is_never_overwritten(run: Terminal, tmp_path: Path) -> None:
    code, out, err = run("simulate", "demo", *OPTIONS)
    assert code == 0, err
    folder = tmp_path / "runs" / "demo"
    assert "epsilon 10, delta 1e-05 for each person" in out
    assert str(Path("runs/demo/samples/final.png")) in out

    config = RunConfig.from_flat(load_toml(folder / "config.toml"))
    assert config.training.num_rounds == 4
    assert config.privacy.noise_multiplier > 0
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in rounds] == [1, 2, 3, 4, 5]
    assert [line["stage"] for line in rounds] == ["moments"] + ["gradients"] * 4
    assert all(set(line["epsilon_by_node"]) == {"2", "3", "4"} and line["refusals"] == {} for line in rounds)
    assert max(rounds[-1]["epsilon"], *rounds[-1]["epsilon_by_node"].values()) <= 10.0
    names = {path.name for path in (folder / "samples").iterdir()}
    assert names == {"moments-000020.png", "round-000002.png", "round-000004.png", "round-000005.png", "final.png"}
    assert size_of(folder / "samples" / "final.png") == (8 * 57 - 1, 8 * 57 - 1)
    card = json.loads((folder / "generator.json").read_text())
    assert (card["images"], card["rounds"], card["delta"]) == ("synthetic", 5, 1e-5)
    assert 0 < card["epsilon_spent"] <= 10.0
    assert "data" not in card["config"]
    assert (folder / "checkpoint.safetensors").exists()
    assert sorted(path.name for path in (folder / "clients").iterdir()) == ["0000", "0001", "0002"]
    # Copies of faces do not stay behind.
    assert not [path for path in folder.rglob("*.npz") if "cache" not in path.parts]

    moments, board = (EventAccumulator(str(folder / "tensorboard" / kind)).Reload() for kind in ("moments", "rounds"))
    assert [event.step for event in moments.Scalars("moments/moment_loss")] == [10, 20]
    assert [event.step for event in board.Scalars("rounds/update_norm")] == [1, 2, 3, 4, 5]
    assert [event.step for event in board.Scalars("rounds/fake_accuracy")] == [2, 3, 4, 5]

    content = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, out, err = run("simulate", "demo", *OPTIONS, "--num-rounds", "1")
    assert code == 0, err
    assert (tmp_path / "runs" / "demo-2" / "generator.safetensors").exists()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == content
    assert_one_line(run("simulate", "demo", *OPTIONS, "--name", "demo"), "ConfigError", "--resume")
    assert_one_line(run("simulate", "demo", "--resume", "--num-rounds", "9"), "ConfigError", "leave out --num-rounds")

    code, out, err = run("generate", folder, "-n", 5, "--seed", 3)
    assert code == 0, err
    made = folder / "generated"
    assert str(made) in out
    images = sorted(made.glob("synthetic-*.png"))
    assert len(images) == 5
    assert size_of(images[0]) == (28, 28)
    assert (made / "sheet.png").exists()
    run("generate", folder, "-n", 5, "--seed", 3, "--out", tmp_path / "again")
    run("generate", folder, "-n", 5, "--seed", 4, "--out", tmp_path / "other")
    same = [path.read_bytes() == (tmp_path / "again" / path.name).read_bytes() for path in images]
    differ = [path.read_bytes() != (tmp_path / "other" / path.name).read_bytes() for path in images]
    assert all(same)
    assert any(differ)
    assert_one_line(run("generate", folder, "--label", 3), "ConfigError", "label 3", "unconditional")
    (folder / "generator.safetensors").write_bytes(b"nonsense")
    assert_one_line(run("generate", folder), "CheckpointError", "no finished generator")


class Stop:
    """Presses Ctrl-C when round 2 has ended, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.armed = True
        monkeypatch.setattr(PlainProgress, "round_ended", self)

    def __call__(self, state: CoordinatorState) -> None:
        if self.armed and state.next_round == 3:
            self.armed = False
            raise KeyboardInterrupt


class NamedGrid(InProcessGrid):
    """Knows its nodes' names."""

    def names(self) -> dict[int, str]:
        return {node: f"node-{node}" for node in self.get_node_ids()}


@pytest.fixture
def coordinator(run: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """The worker of `visard coordinator start` in this process, and clients in the place of connected ones."""

    @contextlib.contextmanager
    def grid(*_given: object) -> Iterator[InProcessGrid]:
        shares = [random_faces(4, 2, seed=client) for client in range(3)]
        yield NamedGrid(app, node_configs(tmp_path / "owners", tiny_config(), shares))

    monkeypatch.setattr(server.superlink, "superlink_grid", grid)
    monkeypatch.setattr(server.worker, "follow", lambda _supervisor: None)
    return run


COORDINATED = [
    text for key, value in TINY.items() if key not in ("data", "num-clients") for text in (f"--{key}", str(value))
]


def told_command(out: str) -> list[str]:
    """The command line that the last line of an interrupted run tells."""
    last = out.rstrip().splitlines()[-1]
    assert last.startswith("stopped; nothing is lost. Go on with: visard "), out
    return shlex.split(last.partition("with: visard ")[2])


def test_ctrl_c_tells_a_command_that_goes_on(run: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for runs_dir in ([], ["--runs-dir", tmp_path / "my [runs]"]):
        Stop(monkeypatch)
        code, out, err = run("simulate", "demo", *OPTIONS, "--name", "stopped", *runs_dir)
        assert code == 130, err
        command = told_command(out)
        assert ("--runs-dir" in command) is bool(runs_dir)
        code, out, err = run(*command)
        assert code == 0, err
        assert "stopped: done" in out


def test_ctrl_c_before_the_first_checkpoint_promises_nothing(run: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulations.simulate, "run", interrupted)
    code, out, _ = run("simulate", "demo", *OPTIONS)
    assert code == 130
    assert "nothing is lost" not in out
    assert "--resume" not in out
    assert "start anew" in out


def test_both_commands_close_with_the_same_table(coordinator: Terminal, tmp_path: Path) -> None:
    folder = tmp_path / "machine"
    code, out, err = coordinator("coordinator", "init", folder, "--address", "127.0.0.1:9092", *COORDINATED)
    assert code == 0, err
    tables = []
    for arguments in (
        ["simulate", "demo", *OPTIONS, "--name", "table"],
        ["coordinator", "worker", folder, "--supervisor", 1],
    ):
        code, out, err = coordinator(*arguments)
        assert code == 0, err
        tables.append(dict(re.findall(r"^│ (\S.*?)\s+│ (\S.*?)\s*│$", out, re.MULTILINE)))
    assert "9092" in out
    assert str(folder / "runs/demo/samples/final.png") in out
    code, out, err = coordinator("coordinator", "worker", folder, "--supervisor", 1)
    assert code == 0, err
    assert "the run demo is complete" in out
    assert str(folder / "runs/demo/samples/final.png") in out
    assert "9092" not in out, "no port is opened for it"
    simulated, coordinated = tables
    assert simulated.pop("worst of 3 ledgers").count("by PRV") == 1
    figures = {"moment loss", "generator loss", "fake accuracy"}
    assert (
        simulated.keys()
        == coordinated.keys()
        == {"rounds", "generator steps", "time", "epsilon of all rounds"} | figures
    )
    assert simulated["rounds"] == coordinated["rounds"] == "5"
    assert simulated["epsilon of all rounds"] == coordinated["epsilon of all rounds"]
    assert re.fullmatch(r"[\d.]+ of 10 \(delta 1e-05\)", coordinated["epsilon of all rounds"])
    code, out, err = coordinator("simulate", "demo", *OPTIONS, "--name", "open", "--privacy-model", "none")
    assert code == 0, err
    assert "infinite: no privacy" in out


def test_a_recipe_s_relative_data_path_serves_a_resume_from_anywhere(
    run: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_faces(12, 2).save(tmp_path / "faces.npz")
    Path("own.toml").write_text(tomli_w.dumps({**TINY, "data": "faces.npz"}))
    Stop(monkeypatch)
    code, _, err = run("simulate", "own.toml", "--runs-dir", tmp_path / "runs")
    assert code == 130, err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = run("simulate", "own", "--runs-dir", tmp_path / "runs", "--resume")
    assert code == 0, err


def test_labels(run: Terminal, tmp_path: Path) -> None:
    """A conditional run without privacy says so in red, and draws the label that it is asked for."""
    rows = tmp_path / "faces.npz"
    random_faces(12, 2, num_classes=3).save(rows)
    code, out, err = run(
        *["simulate", "demo", *OPTIONS, "--data", rows, "--num-classes", 3, "--privacy-model", "none"],
        *["--num-rounds", 1, "--name", "three", "--generator-batch", 6, "--runs-dir", tmp_path / "mine"],
    )
    assert code == 0, err
    assert "NO PRIVACY" in out
    assert "infinite: no privacy" in out
    folder = tmp_path / "mine" / "three"
    assert json.loads((folder / "generator.json").read_text())["epsilon_spent"] is None
    assert str(tmp_path) not in (folder / "generator.json").read_text()
    kinds = {
        json.loads(line)["type"] for path in folder.rglob("ledger.jsonl") for line in path.read_text().splitlines()
    }
    assert kinds == {"opened", "unprotected"}
    code, out, err = run("generate", folder, "-n", 4, "--label", 2)
    assert code == 0, err
    made = sorted(path.name for path in (folder / "generated").glob("synthetic-*"))
    assert made == [f"synthetic-{i:05d}-label2.png" for i in range(4)]
    assert_one_line(run("generate", folder, "--label", 3), "ConfigError", "0 to 2")


@pytest.mark.parametrize(
    ("arguments", "kind", "told"),
    [
        (["simulate", "dmeo"], "ConfigError", "did you mean 'demo'"),
        (["simulate", "nowhere.toml"], "ConfigError", "no recipe"),
        (["simulate", "demo", "--sample-rate", "1.5"], "ConfigError", "sample-rate = 1.5 is outside (0, 1]"),
        (["simulate", "demo", "--loss", "wgan"], "ConfigError", "choose one of minimax, bce, hinge"),
        (["simulate", "demo", "--privacy-model", "trust"], "ConfigError", "local, distributed, central, none"),
        (["simulate", "demo", "--local-steps", "3"], "ConfigError", "local-steps = 3"),
        (["simulate", "demo", "--epsilon", "0.1"], "ConfigError", "moment release alone"),
        (["simulate", "demo", "--name", "../x"], "ConfigError", "give another --name"),
        (["simulate", "demo", "--name", ""], "ConfigError", "give another --name"),
        (["coordinator", "start", "nowhere"], "ConfigError", "there is no coordinator in nowhere"),
        (["simulate", "demo", "--data", "no/such/[bold]folder[/x]"], "DataError", "[bold]folder[/x]"),
        (["simulate", "demo", "--data", "procedural:people=3"], "DataError", "people=3"),
        (["simulate", "demo", "--resume"], "CheckpointError", "cannot resume"),
        (["generate", "nowhere"], "CheckpointError", "no finished generator in nowhere"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(run: Terminal, arguments: list[str], kind: str, told: str) -> None:
    assert_one_line(run(*arguments), kind, told)


@pytest.mark.parametrize(
    "arguments", [["simulate", "--num-round", "3"], ["simulate", "--num-rounds", "many"], ["train"], ["generate"]]
)
def test_a_wrong_option_is_a_usage_error(run: Terminal, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in out + err


def test_help_names_every_option(run: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    code, out, _ = run("simulate", "--help")
    assert code == 0
    missing = [key for key in RunConfig().to_flat() if not re.search(rf"--{key}\b", out)]
    assert not missing


def test_the_installed_command(tmp_path: Path) -> None:
    """A real process: exit code and streams."""
    command = Path(sys.executable).with_name("visard")
    found = subprocess.run([command, "generate", "nowhere"], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.startswith("CheckpointError: no finished generator in nowhere")
    assert "Traceback" not in found.stderr


def test_copies_of_faces_do_not_outlive_a_simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes: a terminated one clears up, and what a killed one leaves is gone when the next one begins."""
    cache = tmp_path / "cache" / "visard"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "visard", "simulate", "demo", *OPTIONS, "--privacy-model", "none"]
    command += ["--num-rounds", "100000"]

    def copies() -> list[Path]:
        return sorted(cache.glob("clients-*/*.npz"))

    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 200
            while len(copies()) < 3:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert copies()[0].parent.name.startswith(f"clients-{process.pid}-")
            running = copies()
            with dealt_out(random_faces(12, 2), tiny_config()) as files:
                assert copies() == sorted([*running, *files])
            assert copies() == running  # another simulation leaves them alone
            process.send_signal(number)
            assert process.wait(60) == code
        finally:
            process.kill()
            process.wait()
        assert copies() == ([] if number == signal.SIGTERM else running)
    with dealt_out(random_faces(12, 2), tiny_config()) as files:
        assert copies() == files
    assert not list(cache.glob("clients-*"))
