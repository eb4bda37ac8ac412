"""`flwr run .`: the same apps under Flower's own simulation engine (Ray)."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from common.flower import ENVIRONMENT

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs flwr[simulation]"),
]

ROOT = Path(__file__).parents[2]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A SuperLink for simulations, and the environment in which `flwr` finds it; all its state is under tmp_path."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path / "flower"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(home), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "superlink.log").open("wb") as log:
        superlink = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while not answers(port):
            assert superlink.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield environment
    finally:
        superlink.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            superlink.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(superlink.pid, signal.SIGKILL)
        superlink.wait()


def flwr_run(environment: dict[str, str], run_config: str) -> "subprocess.CompletedProcess[str]":
    command = ["flwr", "run", str(ROOT), "here", "--stream", "--run-config", run_config, "--federation-config"]
    command += ["num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=2"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_flwr_run_trains_to_the_end(flower: dict[str, str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    done = flwr_run(
        flower,
        f'runs-dir="{runs}" data="procedural:persons=40,images=2" num-rounds=2 moment-steps=3 min-clients=2 image-size=28 '
        'channels=1 discriminator="mlp" discriminator-width=8 generator-width=8 epsilon=10.0 moment-noise-multiplier=4.0',
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = runs.glob("flwr-*")
    log = done.stdout[-3000:]
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in rounds] == ["moments", "gradients", "gradients"], log
    assert (run / "generator.safetensors").exists(), log
    assert sorted(path.name for path in (run / "clients").iterdir()) == ["0", "1"], log
    refused = flwr_run(flower, "num-round=2")
    assert refused.returncode != 0
    assert "Invalid run configuration" in refused.stdout + refused.stderr
