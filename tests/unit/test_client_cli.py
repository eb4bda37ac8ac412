"""What `visard client start` makes of its options."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import owner_config
from client.policy import OwnerPolicy
from common.errors import ConfigError, DataError
from common.fields import key_of
from common.privacy.units import PrivacyUnit
from common.sections import FaceSource
from visard import build

GIVEN = (5.0, 1e-6, PrivacyUnit.PERSON, False, False)


def test_the_ledger_lies_beside_the_faces_whoever_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faces").mkdir()
    monkeypatch.chdir(tmp_path)
    config = owner_config(FaceSource(data="faces"), *GIVEN, None)
    assert config["data"] == str(tmp_path / "faces")
    assert config["state-dir"] == str(tmp_path / "faces.visard")
    assert owner_config(FaceSource(data="faces/../faces"), *GIVEN, None) == config
    assert owner_config(FaceSource(data="faces"), *GIVEN, Path("elsewhere"))["state-dir"] == str(tmp_path / "elsewhere")
    assert (config["max-epsilon"], config["delta"], config["unit"]) == (5.0, 1e-6, "person")
    assert config["allow-central"] is config["allow-non-private"] is False


def test_faces_that_are_not_there_and_faces_without_a_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no faces at"):
        owner_config(FaceSource(data=str(tmp_path / "nothing")), *GIVEN, None)
    with pytest.raises(ConfigError, match="give --state-dir"):
        owner_config(FaceSource(data="procedural:persons=2"), *GIVEN, None)


def test_every_way_of_reading_reaches_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faces").mkdir()
    (tmp_path / "who.csv").write_text("file,who\n")
    monkeypatch.chdir(tmp_path)
    source = FaceSource(data="faces", crop=0.5, detect="largest", attributes="who.csv", person_column="who")
    config = owner_config(source, *GIVEN, None)
    policy = OwnerPolicy.from_config(config)
    paths = {"data": str(tmp_path / "faces"), "attributes": str(tmp_path / "who.csv")}
    assert policy.source == dataclasses.replace(source, **paths)
    assert owner_config(FaceSource(data="faces", attributes="utkface"), *GIVEN, None)["attributes"] == "utkface"
    with pytest.raises(DataError, match="no CSV at"):
        owner_config(FaceSource(data="faces", attributes="nobody.csv"), *GIVEN, None)


def test_every_way_of_reading_is_an_option() -> None:
    shown = CliRunner().invoke(build(), ["client", "start", "--help"], env={"COLUMNS": "200"})
    assert [f.name for f in dataclasses.fields(FaceSource) if f"--{key_of(f.name)} " not in shown.output] == []


def test_options_of_the_command_line_are_refused_where_they_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    command = ["client", "start", "--data", str(tmp_path / "faces"), "--person-column", "who"]
    refused = CliRunner().invoke(build(), command)
    assert isinstance(refused.exception, ConfigError)
    assert "without attributes" in str(refused.exception)


@pytest.mark.parametrize("command", ["client", "coordinator"])
def test_help_says_what_is_not_there_yet(command: str) -> None:
    shown = CliRunner().invoke(build(), [command, "start", "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    text = " ".join(shown.output.split())
    assert "TLS, node keys and supervision are a later addition" in text
