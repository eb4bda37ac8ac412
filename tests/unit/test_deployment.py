"""A coordinator's folder: it is made as a whole, reads as it was written, and says what is wrong with it."""

import os
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import ConfigError
from common.fields import key_of
from common.keys import write_key
from server.deployment import SETTINGS, Deployment, create


def made(folder: Path, **given: Any) -> Deployment:
    create(Deployment(**{"folder": folder, "address": "host.example.org:9092", "listen": "0.0.0.0:9092", **given}))
    return Deployment.load(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "coordinator"


def test_it_reads_as_it_was_written(folder: Path) -> None:
    run = {"privacy-model": "local", "num-rounds": 3, "epsilon": 2.5, "adaptive": True, "stop-when": 'odd "\\ é'}
    found = made(folder, names=("10.0.0.7", "other.example"), name="first", max_message_mib=8, run=run)
    assert found == Deployment(
        folder=folder,
        address="host.example.org:9092",
        listen="0.0.0.0:9092",
        names=("10.0.0.7", "other.example"),
        name="first",
        max_message_mib=8,
        certificate=folder / "server.crt",
        key=folder / "server.key",
        ca=folder / "ca.crt",
        run=run,
    )
    assert {key: type(value) for key, value in found.run.items()} == {key: type(value) for key, value in run.items()}
    assert (found.host, found.own_ca) == ("host.example.org", True)
    places = found.runs_dir, found.registry_path, found.signing_key_path, found.status_path, found.lock_path
    assert [path.relative_to(folder).as_posix() for path in (*places, found.log_path, found.ca_key)] == [
        *("runs", "nodes.json", "signing.key", "status.json", "lock"),
        *("coordinator.log", "ca.key"),
    ]


def test_every_key_is_there_with_its_meaning_and_its_default(folder: Path) -> None:
    made(folder)
    text = (folder / SETTINGS).read_text()
    assert set(tomllib.loads(text)) == {key_of(f.name) for f in fields(Deployment)} - {"folder"}
    joined = " ".join(text.replace("# ", "").split())
    for f in fields(Deployment):
        if f.name != "folder":
            assert " ".join(f.metadata["help"].split()) in joined, f.name
    assert "(default 64)" in text
    assert tomllib.loads(text)["certificate"] == "server.crt", "the folder may be moved"
    assert text.rstrip().endswith("[run]")


def test_secrets_are_their_owner_s_alone(folder: Path) -> None:
    old = os.umask(0)
    try:
        made(folder)
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {name for name, mode in modes.items() if mode & 0o077} == {"ca.crt", "server.crt"}
    assert set(modes) == {SETTINGS, "signing.key", "ca.key", "ca.crt", "server.key", "server.crt"}


def test_two_coordinators_are_two(tmp_path: Path) -> None:
    one, other = made(tmp_path / "a"), made(tmp_path / "b")
    assert one.kit("alice").fingerprint != other.kit("alice").fingerprint
    assert one.kit("alice").fingerprint == Deployment.load(tmp_path / "a").kit("bob").fingerprint
    key = one.signing_key().public_key().public_bytes_raw().hex()
    assert (one.kit("alice").signing_key, one.kit("alice").address) == (key, "host.example.org:9092")


def test_a_folder_that_is_there_is_not_overwritten(folder: Path) -> None:
    made(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="not overwritten"):
        made(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["coordinator"]


def test_it_is_made_as_a_whole_or_not_at_all(folder: Path) -> None:
    given = dict.fromkeys(("certificate", "key", "ca"), folder.parent / "nothing.pem")
    with pytest.raises(ConfigError, match=r"cannot read .*nothing.pem"):
        made(folder, **given)
    assert list(folder.parent.iterdir()) == []


def test_a_moved_folder_is_the_same_coordinator(folder: Path) -> None:
    before = made(folder).kit("alice")
    folder.rename(folder.with_name("moved"))
    moved = Deployment.load(folder.with_name("moved"))
    assert moved.kit("alice") == before
    assert moved.certificate == folder.with_name("moved") / "server.crt"
    with pytest.raises(ConfigError, match="visard coordinator init"):
        Deployment.load(folder)


def test_a_recipe_s_path_is_relative_to_the_folder(folder: Path) -> None:
    made(folder)
    text = (folder / SETTINGS).read_text()
    (folder / SETTINGS).write_text(text.replace('recipe = "demo"', 'recipe = "mine.toml"'))
    assert Deployment.load(folder).recipe == str(folder / "mine.toml")
    (folder / SETTINGS).write_text(text.replace('recipe = "demo"', 'recipe = "/else/mine.toml"'))
    assert Deployment.load(folder).recipe == "/else/mine.toml"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text + "[", "cannot read"),
        (lambda text: text.replace("listen =", "lisen ="), "unknown key 'lisen': did you mean 'listen'"),
        (lambda text: text.replace('listen = "0.0.0.0:9092"', ""), "listen is missing"),
        (lambda text: text.replace('"0.0.0.0:9092"', "9092"), "listen = 9092 must be a str"),
        (lambda text: text.replace('"0.0.0.0:9092"', '"0.0.0.0"'), "write HOST:PORT"),
        (lambda text: text.replace("host.example.org", "0.0.0.0"), "no place that a node can dial"),
        (lambda text: text.replace("names = []", 'names = "host"'), "must be a list of words"),
        (lambda text: text.replace("names = []", "names = ['ho st']"), "neither a DNS name"),
        (lambda text: text.replace("= 64", "= 0"), "outside"),
        (lambda text: text.replace("= 64", "= 2048"), "outside"),
        (lambda text: text.replace("= 64", "= 64.0"), "must be a int"),
        (lambda text: text.replace('name = "demo"', 'name = "../demo"'), "cannot name a run"),
        (lambda text: text.replace('ca = "ca.crt"', 'ca = "other.crt"'), "give all three, or none"),
        (lambda text: text + "\n[run.more]\na = 1\n", "table of single values"),
        (lambda text: text.replace("[run]", "run = 3"), "table of single values"),
    ],
)
def test_settings_that_cannot_be(folder: Path, change: Callable[[str], str], told: str) -> None:
    made(folder)
    text = (folder / SETTINGS).read_text()
    assert change(text) != text
    (folder / SETTINGS).write_text(change(text))
    with pytest.raises(ConfigError, match=told) as refused:
        Deployment.load(folder)
    assert SETTINGS in str(refused.value)


def test_defaults_may_be_left_out(folder: Path) -> None:
    before = made(folder)
    (folder / SETTINGS).write_text('address = "host.example.org:9092"\nlisten = "0.0.0.0:9092"\n')
    assert Deployment.load(folder) == before


def test_a_signing_key_that_will_not_do(folder: Path) -> None:
    found = made(folder)
    found.signing_key_path.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it: set it to 600"):
        found.signing_key()
    write_key(found.signing_key_path, ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ConfigError, match="no Ed25519 key"):
        found.signing_key()
    found.signing_key_path.write_bytes(b"a word")
    with pytest.raises(ConfigError, match="no secret key in PEM"):
        found.signing_key()
    found.signing_key_path.unlink()
    with pytest.raises(ConfigError, match="restore it from a copy"):
        found.kit("alice")


def test_reading_a_folder_takes_neither_torch_nor_flower() -> None:
    """The process that supervises a coordinator stays small."""
    code = "import sys, server.deployment, server.registry; sys.exit({'torch', 'flwr'} & set(sys.modules) != set())"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
