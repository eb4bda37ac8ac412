"""Visard's apps on Flower's own deployment: `flower-superlink`, `flower-supernode` and `flwr run`, TLS and node keys on."""

import json
from pathlib import Path

import pytest

from benchmarks.stock_supernode import StockFlower, stock_flower
from client.policy import OwnerPolicy
from common.privacy.ledger import Ledger

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

TINY = {"discriminator-width": 8, "num-rounds": 2, "moment-steps": 3, "moment-noise-multiplier": 4.0}


def charges(flower: StockFlower) -> list[list[str]]:
    """What each node's ledger was charged for, once it is opened as the node opens it: with the key in its policy."""
    found = []
    for number in range(flower.nodes):
        policy = OwnerPolicy.from_file(flower.folder / f"node-{number}" / "owner.toml")
        ledger = Ledger(
            policy.state_dir,
            max_epsilon=policy.max_epsilon,
            delta=policy.delta,
            unit=policy.unit,
            public_key=policy.ledger,
        )
        assert 0 < ledger.epsilon <= 10
        found.append([release.mechanism for release in ledger.releases])
    return found


def test_stock_flower_trains_to_the_end_and_the_owners_word_holds(tmp_path: Path) -> None:
    with stock_flower(tmp_path, nodes=2) as flower:
        done = flower.run(TINY, timeout_s=300)
        log = f"{done.stdout[-3000:]}{done.stderr}"
        runs = list((tmp_path / "runs").glob("flwr-*"))
        assert len(runs) == 1, log + flower.logs()
        rounds = [json.loads(line) for line in (runs[0] / "rounds.jsonl").read_text().splitlines()]
        assert [line["stage"] for line in rounds] == ["moments", "gradients", "gradients"], log + flower.logs()
        assert [line["refusals"] for line in rounds] == [{}, {}, {}]
        assert (runs[0] / "generator.safetensors").stat().st_size > 0, log
        # Every message met a new process, and yet one ledger a node, of one record a round.
        spent = charges(flower)
        assert spent == [["moments", "gradients", "gradients"]] * 2

        # What the owner does not allow is refused here too. Flower's command says nothing of it in its status.
        refused = flower.run(TINY | {"privacy-model": "none"}, timeout_s=300)
        assert "CohortTooSmall" in refused.stdout, refused.stdout[-3000:] + refused.stderr + flower.logs()
        assert "2 x PrivacyError" in refused.stdout
        for number in range(2):
            told = (tmp_path / f"node-{number}" / "flower-supernode.log").read_text()
            assert "privacy-model none is asked and this owner's allowed-privacy-models is local" in told
        assert charges(flower) == spent
