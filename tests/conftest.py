"""What every test stands on: one thread, and no trace left outside its own folder."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preprocessed faces go to a temporary folder, not to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A folder for one run."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder
