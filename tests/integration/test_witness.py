"""An older copy of a whole ledger that took its place between two runs of one coordinator is noticed in the second."""

import shutil
from pathlib import Path

import pytest

from client.app import open_ledger
from common.errors import CheckpointError, CohortTooSmall
from server.app import open_run, run
from server.witness import FILE_NAME
from simulations.engine import InProcessGrid
from tests.support import keyed_client_app, node_configs, random_faces, tiny_config


def test_a_roll_back_between_two_runs(tmp_path: Path) -> None:
    config = tiny_config(num_rounds=2, privacy_model="local", num_clients=2, epsilon=8.0)
    shares = [random_faces(4, 2, seed=client) for client in range(2)]
    owners = [node | {"max-epsilon": 100.0} for node in node_configs(tmp_path / "owners", config, shares)]
    ledger, copy = Path(str(owners[0]["state-dir"])), tmp_path / "copy"

    def train(name: str) -> None:
        open_ledger.cache_clear()
        run(InProcessGrid(keyed_client_app(), owners), open_run(tmp_path / name, config), tmp_path / name)

    train("first")
    shutil.copytree(ledger, copy)
    train("second")
    for kept in copy.iterdir():  # in place, so that the file is where it was
        (ledger / kept.name).write_bytes(kept.read_bytes())
    with pytest.raises(CohortTooSmall, match="1 x LedgerCorrupt"):
        train("third")
    (tmp_path / FILE_NAME).write_text("[]")
    with pytest.raises(CheckpointError, match="is damaged"):
        train("fourth")
