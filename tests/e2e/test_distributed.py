"""A run under a secure sum as people make it: keys, fingerprints, policies, a coordinator and nodes; and simulated."""

import json
import re
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.privacy.ledger import Ledger
from common.privacy.masks import fingerprint
from tests.e2e import test_cli, test_three_processes
from tests.e2e.test_cli import OPTIONS, Terminal
from tests.e2e.test_three_processes import Start, wait_for
from visard import build

pytestmark = [
    pytest.mark.e2e,
    # flwr's own, when it packs an app.
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]

run, start, address = test_cli.run, test_three_processes.start, test_three_processes.address

SMALL = ["--image-size", "28", "--channels", "1", "--discriminator", "mlp", "--discriminator-width", "2"]
SMALL += ["--generator-width", "4", "--moment-steps", "3", "--expected-batch", "2", "--sample-rate", "0.1"]
SMALL += ["--privacy-model", "distributed", "--peers", "4", "--survivors", "3", "--round-timeout-s", "60"]


def visard(*command: str) -> str:
    done = CliRunner().invoke(build(), list(command), env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def owners(folder: Path, number: int) -> str:
    """Policies of owners who allow a secure sum, pinned to one another's keys. Returns the fingerprint."""
    keys = []
    for i in range(number):
        policy = folder / f"owner-{i}.toml"
        told = visard(
            "client", "init", "--data", f"procedural:persons=20,images=2,first={20 * i}", "--out", str(policy)
        )
        keys += re.findall(r"^  ([0-9a-f]{64})$", told, re.MULTILINE)
        text = policy.read_text()
        assert text.count('allowed-privacy-models = ["local"]') == 1
        policy.write_text(
            text.replace('allowed-privacy-models = ["local"]', 'allowed-privacy-models = ["distributed"]')
        )
    (folder / "keys.txt").write_text("\n".join(keys))
    found = fingerprint(map(bytes.fromhex, keys))
    for i in range(number):
        told = visard("client", "peers", str(folder / "keys.txt"), "--policy", str(folder / f"owner-{i}.toml"), "--pin")
        assert f"{number} peers: {found}" in told
    return found


def rounds_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def nodes(start: Start, address: str, number: int) -> list["subprocess.Popen[str]"]:
    command = ["-m", "visard", "client", "start", "--coordinator", address, "--policy"]
    return [start(*command, f"owner-{i}.toml") for i in range(number)]


@pytest.mark.slow
def test_three_train_and_one_that_pinned_others_is_left_out(
    start: Start,
    address: str,
    tmp_path: Path,
) -> None:
    found = owners(tmp_path, 4)
    wrong = tmp_path / "owner-3.toml"
    wrong.write_text(wrong.read_text().replace(found, "ab" * 32))
    clients = nodes(start, address, 4)
    command = ["-m", "visard", "coordinator", "start", "demo", "--name", "small", "--address", address]
    coordinator = start(*command, *SMALL, "--num-rounds", "3", "--deal-rounds", "2")
    output, _ = coordinator.communicate(timeout=200)
    assert coordinator.returncode == 0, output
    assert f"the peer set is {found}" in output
    assert "small: done" in output
    assert "Traceback" not in output
    rounds = rounds_of(tmp_path / "runs/small")
    assert [(line["round"], line["survivors"]) for line in rounds] == [(n, 3) for n in range(1, 5)]
    assert [line["refusals"] for line in rounds] == [{"PrivacyError": 1}, {}, {"PrivacyError": 1}, {}]
    assert [bool(line["bytes_dealt"]) for line in rounds] == [True, False, True, False]
    for i, client in enumerate(clients):
        assert client.poll() is None, "a node runs until it is stopped"
        client.terminate()
        said, _ = client.communicate(timeout=60)
        assert client.returncode == 0
        ledger = Ledger(tmp_path / f"owner-{i}.visard", max_epsilon=10.0, delta=1e-5)
        if i < 3:
            assert "refused" not in said
            assert [release.mechanism for release in ledger.releases] == ["secure-moments"] + ["secure-gradients"] * 3
            assert 0 < ledger.epsilon <= 10
        else:
            assert f"the peer set {found} is not the pinned {'ab' * 32}" in " ".join(said.split())
            assert ledger.releases == []


@pytest.mark.slow
def test_a_coordinator_that_is_killed_finds_its_clients_again(
    start: Start,
    address: str,
    tmp_path: Path,
) -> None:
    """At a new SuperLink every node has another id: each is known by its key, and no round is lost."""
    owners(tmp_path, 4)
    clients = nodes(start, address, 4)
    command = ["-m", "visard", "coordinator", "start", "demo", "--name", "small", "--address", address]
    first = start(*command, *SMALL, "--num-rounds", "20", "--deal-rounds", "50")
    lines = tmp_path / "runs/small/rounds.jsonl"
    wait_for(lambda: first.poll() is not None or (lines.exists() and len(rounds_of(lines.parent)) >= 4), "rounds")
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    done = len(rounds_of(lines.parent))
    assert 4 <= done < 21
    second = start(*command, "--resume")
    output, _ = second.communicate(timeout=250)
    assert second.returncode == 0, output
    assert "void" not in output
    assert [line["round"] for line in rounds_of(lines.parent)] == list(range(1, 22))
    assert {line["survivors"] for line in rounds_of(lines.parent)} <= {3, 4}
    for i, client in enumerate(clients):
        client.terminate()
        client.communicate(timeout=60)
        records = [json.loads(line) for line in (tmp_path / f"owner-{i}.visard/ledger.jsonl").read_text().splitlines()]
        found = Counter(record["round"] for record in records if record["type"] == "charged")
        assert set(found.values()) == {1}


def test_simulated_owners_share_the_noise(run: Terminal, tmp_path: Path) -> None:
    code, out, err = run("simulate", "demo", *OPTIONS, "--privacy-model", "distributed", "--deal-rounds", "2")
    assert code == 0, err
    assert (
        "epsilon 10, delta 1e-05 for each person, against the coordinator and any 1 of 3 clients together"
        in " ".join(out.split())
    )
    assert "demo: done" in out
    worst = re.search(r"worst of 3 ledgers\W+([\d.]+) of the budget used; ([\d.]+) by PRV", out)
    assert worst is not None, out
    assert 0 < float(worst[2]) <= float(worst[1]) <= 10
    rounds = rounds_of(tmp_path / "runs" / "demo")
    assert [line["survivors"] for line in rounds] == [3] * 5
    clients = sorted((tmp_path / "runs" / "demo" / "clients").glob("*/"))
    assert len(clients) == 3
    assert not list(tmp_path.glob("runs/demo/clients/*/released.bin"))
    assert all((client / "peer.key").stat().st_mode & 0o777 == 0o600 for client in clients)
    # A second run of the same name is another run; this one is over.
    again = run("simulate", "demo", "--resume")
    assert again[0] == 0
    assert rounds_of(tmp_path / "runs" / "demo") == rounds
