"""What every test stands on: one thread, signals that reach whoever they are sent to, no trace left outside its own folder."""

import signal
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

# Where the suite itself runs in the background or under nohup these are ignored, and whatever it starts would ignore them too:
# an ignored signal is inherited, a handler is not.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)


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
