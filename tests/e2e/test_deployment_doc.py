"""What docs/deployment.md tells an operator to type, typed; and the set-up of the compose file, without its containers."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.coordinator_machine import free_address

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "deployment.md"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "120",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
# The same run, smaller.
SMALL = (
    "--image-size 28 --channels 1 --generator-width 8 --discriminator mlp --discriminator-width 8 --expected-batch 2 "
    "--sample-rate 0.1 --moment-noise-multiplier 4 --moment-steps 3 --num-rounds 3 --moment-weight 0"
)


def commands_of(section: str) -> str:
    """The blocks of a section that are meant to be run as they are."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def run(command: list[str], folder: Path, environment: dict[str, str], timeout_s: float) -> str:
    """What it prints; it and all that it has started are gone afterwards. Fails where it ends with an error."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, printed
    return printed


@pytest.mark.slow
@pytest.mark.e2e
def test_the_trial_on_one_machine(tmp_path: Path) -> None:
    script = commands_of("A trial on one machine")
    for told in ("--address localhost:9092", "--moment-steps 200 --num-rounds 20", "procedural:persons=800,images=2"):
        assert told in script
    script = script.replace("localhost:9092", free_address().replace("127.0.0.1", "localhost"))
    script = script.replace("--moment-steps 200 --num-rounds 20", SMALL)
    script = script.replace("procedural:persons=800,images=2", "procedural:persons=40,images=2")
    printed = run(["bash", "-euo", "pipefail", "-c", script], tmp_path, ENVIRONMENT, 240)
    # By telephone: what is told on one side and on the other.
    told = re.findall(r"^  ((?:[0-9a-f]{4} ){15}[0-9a-f]{4})$", printed, re.MULTILINE)
    assert len(told) == 1 + 3 * 4  # init; then each time invite, join (both), approve
    for invited, joined, requested, approved in zip(*[iter(told[1:])] * 4, strict=True):
        assert invited == joined == told[0]
        assert requested == approved
    records = [json.loads(line) for line in (tmp_path / "coordinator/runs/demo/rounds.jsonl").read_text().splitlines()]
    assert records[-1]["round"] == 4  # a moment round, and three
    assert "connected" in printed
    assert "not connected, as the coordinator has ended" in printed
    assert json.loads((tmp_path / "coordinator/status.json").read_text())["state"] == "complete"
    for secret in ("coordinator/signing.key", "coordinator/ca.key", "north/owner.visard/node.key"):
        assert (tmp_path / secret).stat().st_mode & 0o077 == 0


@pytest.mark.e2e
@pytest.mark.slow
def test_first_time_sets_up_all_services(tmp_path: Path) -> None:
    """`packaging/first-time.sh` with a stand-in for docker: each service's volume is a folder, and so is /exchange."""
    stand_in = tmp_path / "bin" / "docker"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"""#!{sys.executable}
import pathlib, subprocess, sys
words, root = sys.argv[1:], pathlib.Path({str(tmp_path)!r})
if words != ["compose", "build"]:
    words = words[words.index("-T") + 1 :]
    entry = ["visard"]
    if words[0] == "--entrypoint":
        entry, words = [words[1]], words[2:]
    place = root / words[0]
    place.mkdir(exist_ok=True)
    (root / "exchange").mkdir(exist_ok=True)
    told = [word.replace("/exchange", str(root / "exchange")) for word in words[1:]]
    sys.exit(subprocess.run([*entry, *told], cwd=place).returncode)
"""
    )
    stand_in.chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{stand_in.parent}:{ENVIRONMENT['PATH']}"}
    run([str(ROOT / "packaging" / "first-time.sh"), "--num-rounds", "3"], tmp_path, environment, 240)
    known = json.loads((tmp_path / "coordinator/coordinator/nodes.json").read_text())["nodes"]
    assert [node["name"] for node in known] == ["client-1", "client-2", "client-3"]
    for node in known:
        policy = (tmp_path / node["name"] / "owner.toml").read_text()
        # In its own volume: whoever can write to /exchange cannot change whom a node trusts.
        assert f'coordinator = "{node["name"]}.kit.toml"' in policy
