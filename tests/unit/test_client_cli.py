"""What `visard client start` makes of its options."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import owner_config
from common.errors import ConfigError, DataError
from common.privacy.units import PrivacyUnit
from visard import build

GIVEN = (5.0, 1e-6, PrivacyUnit.PERSON, 1.0, False, False)


def test_the_ledger_lies_beside_the_faces_whoever_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faces").mkdir()
    monkeypatch.chdir(tmp_path)
    config = owner_config("faces", *GIVEN, None)
    assert config["data"] == str(tmp_path / "faces")
    assert config["state-dir"] == str(tmp_path / "faces.visard")
    assert owner_config("faces/../faces", *GIVEN, None) == config
    assert owner_config("faces", *GIVEN, Path("elsewhere"))["state-dir"] == str(tmp_path / "elsewhere")
    assert (config["max-epsilon"], config["delta"], config["unit"]) == (5.0, 1e-6, "person")
    assert config["allow-central"] is config["allow-non-private"] is False


def test_faces_that_are_not_there_and_faces_without_a_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no faces at"):
        owner_config(str(tmp_path / "nothing"), *GIVEN, None)
    with pytest.raises(ConfigError, match="give --state-dir"):
        owner_config("procedural:persons=2", *GIVEN, None)


@pytest.mark.parametrize("command", ["client", "coordinator"])
def test_help_says_what_is_not_there_yet(command: str) -> None:
    shown = CliRunner().invoke(build(), [command, "start", "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    text = " ".join(shown.output.split())
    assert "TLS, node keys and supervision are a later addition" in text
