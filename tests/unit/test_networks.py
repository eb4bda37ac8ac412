"""Feature networks: each is what its name says, and a file that is something else is refused."""

import hashlib
import warnings
from pathlib import Path

import pytest
import torch

from common.errors import DataError
from common.evaluation import networks
from common.evaluation.networks import NETWORKS, drawn_network, feature_network, inception_network, random_network
from common.models.flat import get_flat


class StandIn(torch.nn.Module):
    """Of the interface of inception-2015-12-05.pt: 8 x 8 means of a picture, and nothing else."""

    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        if x.dtype != torch.uint8 or x.shape[1] != 3:
            raise RuntimeError("bytes in three channels")
        if not return_features:
            raise RuntimeError("not the softmax")
        means = torch.nn.functional.adaptive_avg_pool2d(x.float(), 8).flatten(1)
        return torch.nn.functional.pad(means, (0, self.width - 192))


def save_scripted(module: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and what the published network is in
        torch.jit.script(module).save(path)
    return path


def test_the_drawn_network_is_the_one_of_that_name() -> None:
    blob = networks.DRAWN_FILE.read_bytes()
    assert hashlib.sha256(blob).hexdigest() == networks.DRAWN_SHA256
    assert len(blob) <= 300_000
    assert 0.1 < float(drawn_network()(pictures(4, 3, 32)).std()) < 100


def test_the_random_network_is_the_one_of_that_name() -> None:
    digest = hashlib.sha256(get_flat(random_network()).astype("<f2").tobytes()).hexdigest()
    assert digest == "f989d8c91de2cdd9eccd460b49525ae4f967ab8cd292f71bbcbf68bac80df9b9"


def pictures(count: int, channels: int, size: int) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 3), (128, 1)])
def test_every_size_and_grey(name: str, size: int, channels: int) -> None:
    network = feature_network(name)
    assert network.name == name
    images = pictures(6, channels, size)
    with torch.no_grad():
        found = network(images)
        assert found.shape == (6, network.num_features)
        assert torch.allclose(network(images[2:4]), found[2:4], atol=1e-4)  # an image is looked at alone
        assert torch.allclose(network(images.expand(-1, 3, -1, -1)), found, atol=1e-4)


def test_a_damaged_file_of_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = bytearray(networks.DRAWN_FILE.read_bytes())
    blob[-1] ^= 1
    monkeypatch.setattr(networks, "DRAWN_FILE", tmp_path / "damaged")
    networks.DRAWN_FILE.write_bytes(blob)
    with pytest.raises(DataError, match="install Visard anew"):
        drawn_network()


def test_a_scripted_inception_is_named_after_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_scripted(StandIn(), tmp_path / "inception.pt")
    network = feature_network(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert network.name == f"inception:{digest[:12]}"
    pixels = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = network(pixels.float() / 127.5 - 1)
    # The very bytes come back out of [-1, 1], in three channels.
    assert torch.equal(found, StandIn()(pixels.expand(-1, 3, -1, -1), return_features=True))
    monkeypatch.setattr(networks, "INCEPTION_SHA256", digest)
    assert inception_network(path).name == "inception-2015-12-05"


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="choose one of visard-random-1, visard-drawn-1"):
        feature_network("visard-drawn-2")
    with pytest.raises(DataError, match="cannot be read"):
        inception_network(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(DataError, match=r"give inception-2015-12-05\.pt"):
        inception_network(tmp_path / "text.pt")
    with pytest.raises(DataError, match=r"features \(2, 512\)"):
        inception_network(save_scripted(StandIn(512), tmp_path / "narrow.pt"))
    with pytest.raises(DataError, match="return_features"):
        inception_network(save_scripted(torch.nn.Flatten(), tmp_path / "other.pt"))


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.pt").open("wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(DataError, match="the limit is"):
        inception_network(tmp_path / "huge.pt")
