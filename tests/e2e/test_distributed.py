"""Runs under a secure sum as people make them: an owner who pinned other peers is left out; and simulated."""

import json
import re
from pathlib import Path

import pytest

from client.policy_file import set_key
from common.privacy.ledger import Ledger
from tests.e2e import test_cli
from tests.e2e.deployed import SMALL, deployment
from tests.e2e.test_cli import OPTIONS, Terminal

pytestmark = pytest.mark.e2e

run = test_cli.run


def rounds_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_three_train_and_one_that_pinned_others_is_left_out(tmp_path: Path) -> None:
    run = {"privacy-model": "distributed", "peers": "4", "survivors": "3", "min-clients": "2", "round-timeout-s": "60"}
    with deployment(tmp_path, 4, {**SMALL, **run, "num-rounds": "3", "deal-rounds": "2"}) as made:
        pinned = made.visard("client", "peers", tmp_path / "peers.txt", "--policy", made.policy("owner-0"))
        found = re.findall("4 peers: ([0-9a-f]{64})", pinned)[0]
        set_key(made.policy("owner-3"), "peers", "ab" * 32)
        nodes = made.start_nodes()
        coordinator = made.start_coordinator()
        assert coordinator.wait() == 0, coordinator.log.read_text()
        assert f"the peer set is {found}" in (made.coordinator / "coordinator.log").read_text()
        rounds = made.rounds("small")
        assert [(line["round"], line["survivors"]) for line in rounds] == [(n, 3) for n in range(1, 5)]
        assert [line["refusals"] for line in rounds] == [{"PrivacyError": 1}, {}, {"PrivacyError": 1}, {}]
        assert [bool(line["bytes_dealt"]) for line in rounds] == [True, False, True, False]
        for owner, node in nodes.items():
            ledger = Ledger(made.state_dir(owner), max_epsilon=10.0, delta=1e-5)
            if owner != "owner-3":
                assert "refused" not in node.told()
                assert [release.mechanism for release in ledger.releases] == ["secure-moments"] + [
                    "secure-gradients"
                ] * 3
                assert 0 < ledger.epsilon <= 10
            else:
                assert f"the peer set {found} is not the pinned {'ab' * 32}" in node.told()
                assert ledger.releases == []


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
