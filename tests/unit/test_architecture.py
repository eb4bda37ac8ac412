"""The rooms and the doors between them: who may import whom, read off the sources themselves."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from common.config import RunConfig

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Package -> packages of ours that it may import.
DOORS = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "simulations": {"simulations", "client", "server", "common"},
}
# Where Flower may be imported. Models, losses, clipping, faces, training and evaluation know nothing of federation.
FLOWER = {
    "client/app.py",
    "client/node.py",
    "client/policy.py",
    "client/secure_round.py",
    "common/messages.py",
    "common/seal.py",
    "common/secure_messages.py",
    "server/app.py",
    "server/exchange.py",
    "server/fleet.py",
    "server/superlink.py",
    "simulations/audit/gate.py",
    "simulations/audit/one_run.py",
    "simulations/audit/stages.py",
    "simulations/audit/tap.py",
    "simulations/audit/wire.py",
    "simulations/engine.py",
    "simulations/simulate.py",
}
SOURCES = sorted(path for package in DOORS for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The full names of all modules that a source imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(str(node.module))
    return names


def first(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_room_opens_only_the_doors_it_has(path: Path) -> None:
    relative = path.relative_to(ROOT)
    packages = first(imported(path))
    assert packages & (DOORS.keys() | {"visard", "tests", "benchmarks"}) <= DOORS[relative.parts[0]]
    if "flwr" in packages:
        assert relative.as_posix() in FLOWER


def test_the_list_of_flower_s_doors_is_no_longer_than_it_must_be() -> None:
    assert {path.relative_to(ROOT).as_posix() for path in SOURCES if "flwr" in first(imported(path))} == FLOWER


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "visard.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_no_global_randomness_and_no_assert(path: Path) -> None:
    source = path.read_text()
    assert not first(imported(path)) & {"pickle", "shelve", "dill", "joblib"}
    tree = ast.parse(source)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert "torch.load(" not in source
    if path.relative_to(ROOT).as_posix() == "simulations/audit/tap.py":
        return  # seeds the global generators, to catch a client that draws from them
    assert "random" not in first(imported(path))
    assert not re.search(r"(?<!\.)\btorch\.manual_seed|np\.random\.(?!default_rng|Generator|SeedSequence)\w", source)


def test_all_packages_are_installed() -> None:
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_flower_s_defaults_are_the_configuration_s() -> None:
    declared = dict(PROJECT["tool"]["flwr"]["app"]["config"])
    assert isinstance(declared.pop("runs-dir"), str)
    defaults = RunConfig().to_flat()
    assert declared == defaults
    assert {key: type(value) for key, value in declared.items()} == {k: type(v) for k, v in defaults.items()}


def test_flower_s_bundle_holds_what_the_apps_import() -> None:
    app = PROJECT["tool"]["flwr"]["app"]
    bundled = {path for pattern in app["fab-include"] for path in ROOT.glob(pattern)}
    assert all(any(ROOT.glob(pattern)) for pattern in app["fab-include"])
    needed = {path for path in SOURCES if path.relative_to(ROOT).parts[0] != "simulations"}
    assert needed <= bundled
    for component in app["components"].values():
        module, _, name = component.partition(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path in bundled
        assert re.search(rf"^{name} = ", path.read_text(), re.MULTILINE)


def test_versions_are_pinned_and_no_registry_is_named() -> None:
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+(\s*;.*)?", line), line
    assert "index-url" not in (ROOT / "pyproject.toml").read_text()
