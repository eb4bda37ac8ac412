"""The image, the compose file and the systemd units: what can be told of them without an engine that runs them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

import visard
from common.flower import ENVIRONMENT

ROOT = Path(__file__).parents[2]
PACKAGING = ROOT / "packaging"
UNITS = ("visard-coordinator.service", "visard-client@.service")
STATE = "/var/lib/visard"


@pytest.fixture(scope="module")
def commands() -> click.Command:
    return typer.main.get_command(visard.build())


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, comments left out and lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (PACKAGING / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in lines if line)]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((PACKAGING / "compose.yaml").read_text())
    return found


def check_command(commands: click.Command, words: list[str]) -> None:
    """Fail unless `visard WORDS` is a command of ours with options that it has; what comes after it is not run."""
    command, rest = commands, list(words)
    while isinstance(command, click.Group):
        assert rest, f"{words} ends with a group of commands"
        assert rest[0] in command.commands, f"{words}: there is no {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    command.make_context(" ".join(words), rest)  # raises for options that it does not have, and for what is missing


def final_stage(instructions: list[tuple[str, str]], instruction: str) -> list[str]:
    last = max(place for place, (word, _) in enumerate(instructions) if word == "FROM")
    return [rest for word, rest in instructions[last:] if word == instruction]


def service_words(service: dict[str, Any]) -> list[list[str]]:
    assert service["healthcheck"]["test"][:2] == ["CMD", "visard"]
    return [service["command"], service["healthcheck"]["test"][2:]]


def unit(name: str) -> dict[str, list[str]]:
    """The keys of a unit's [Service], each with its values in order."""
    found: dict[str, list[str]] = {}
    section = (PACKAGING / name).read_text().split("[Service]")[1].split("[Install]")[0]
    for line in section.splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tops = ("client", "common", "server", "simulations")
    found = {".".join(p.parent.relative_to(ROOT).parts) for top in tops for p in (ROOT / top).rglob("*.py")}
    assert set(listed["packages"]) == found
    # Files that are no modules come along where the package data names them.
    others = {p for top in tops for p in (ROOT / top).rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    named = {p for package, globs in listed["package-data"].items() for g in globs for p in (ROOT / package).glob(g)}
    assert others == named


def test_image_has_all_that_is_installed_and_nothing_else(instructions: list[tuple[str, str]]) -> None:
    copied = {word for name, rest in instructions if name == "COPY" for word in rest.split()[:-1] if word[0] != "-"}
    assert copied - {"/opt/visard"} == {
        *("client", "common", "server", "simulations"),
        *("visard.py", "pyproject.toml", "README.md", "constraints.txt"),
    }
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied - {"/opt/visard"}


def test_image_runs_visard_as_nobody_in_particular(
    instructions: list[tuple[str, str]], commands: click.Command
) -> None:
    assert final_stage(instructions, "USER") == ["10001:10001"]
    assert json.loads(final_stage(instructions, "ENTRYPOINT")[0]) == ["visard"]
    assert json.loads(final_stage(instructions, "CMD")[0]) == ["--help"]
    assert final_stage(instructions, "WORKDIR") == [STATE]
    assert json.loads(final_stage(instructions, "VOLUME")[0]) == [STATE]
    shell = json.loads(final_stage(instructions, "HEALTHCHECK")[0].partition(" CMD ")[2])
    asked = re.findall(r"exec visard ([a-z ]+[a-z])", shell[2])
    assert sorted(asked) == ["client status", "coordinator status"]
    for words in asked:
        check_command(commands, words.split())
    environment = dict(word.partition("=")[::2] for word in shlex.split(" ".join(final_stage(instructions, "ENV"))))
    assert environment.items() >= ENVIRONMENT.items()


def test_image_has_the_torch_that_is_tested(instructions: list[tuple[str, str]]) -> None:
    version = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert version is not None
    assert ("ARG", f"TORCH_VERSION={version[1]}") in instructions


def test_services_are_locked_down(compose: dict[str, Any], commands: click.Command) -> None:
    services = compose["services"]
    assert set(services) == {"coordinator", "client-1", "client-2", "client-3"}
    for name, service in services.items():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "unless-stopped"
        assert service["stop_grace_period"] == "60s"
        assert service["init"]
        assert service["networks"] == ["federation"]
        assert "ports" not in service
        assert not {"privileged", "user", "environment", "env_file"} & set(service)
        for words in service_words(service):
            check_command(commands, words)
        volumes = dict(entry.split(":")[:2] for entry in service["volumes"])
        # A volume of its own, under its own name, where the image keeps its state.
        assert volumes[name] == STATE
        assert set(volumes) - {name} <= {"exchange", "/etc/machine-id"}
        assert all(entry in compose["volumes"] for entry in volumes if not entry.startswith("/"))
    assert compose["networks"] == {"federation": {"internal": True}}


def test_first_time_prepares_every_service(compose: dict[str, Any], tmp_path: Path, commands: click.Command) -> None:
    """With a stand-in for docker that notes what it is asked for."""
    stand_in = tmp_path / "docker"
    stand_in.write_text(
        '#!/bin/sh\nprintf "%s\\t" "$@" >> "$ASKED"\necho >> "$ASKED"\ncase "$*" in *"client fingerprint") echo "46ed 1248";; esac\n'
    )
    stand_in.chmod(0o755)
    asked = tmp_path / "asked"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "ASKED": str(asked)}
    subprocess.run([PACKAGING / "first-time.sh", "--num-rounds", "3"], check=True, env=environment, capture_output=True)
    seen = [line.rstrip("\t").split("\t") for line in asked.read_text().splitlines()]
    assert seen[0] == ["compose", "build"]
    clients = set(compose["services"]) - {"coordinator"}
    by_service: dict[str, list[list[str]]] = {}
    for words in seen[1:]:
        assert words[:4] == ["compose", "run", "--rm", "-T"]
        if words[4] == "--entrypoint":  # a kit is fetched
            continue
        by_service.setdefault(words[4], []).append(words[5:])
        check_command(commands, words[5:])
    assert set(by_service) == set(compose["services"])
    begun = by_service["coordinator"][0]
    assert begun[:4] == ["coordinator", "init", "--address", "coordinator:9092"]
    assert begun[-2:] == ["--num-rounds", "3"]
    assert begun[begun.index("--min-clients") + 1] == str(len(clients))
    for client in clients:
        assert [words[1] for words in by_service[client]] == ["init", "join", "fingerprint"]
        request = by_service[client][1][-1]
        approved = [
            words for words in by_service["coordinator"] if words[:4] == ["coordinator", "nodes", "--approve", request]
        ]
        assert [words[4:] for words in approved] == [["--fingerprint", "46ed 1248"]]


@pytest.mark.parametrize("name", UNITS)
def test_units_are_locked_down(name: str, commands: click.Command) -> None:
    found = unit(name)
    words = found["ExecStart"][0].split()
    assert words[0] == "/opt/visard/bin/visard"
    check_command(commands, words[1:])
    assert found["User"] == ["visard"]
    assert found["StateDirectory"][0].split("/")[0] == "visard"
    assert all(word.startswith(STATE) for word in words if word.startswith("/") and word != words[0])
    assert found["WorkingDirectory"][0].startswith(STATE)
    assert found["CapabilityBoundingSet"] == [""]
    assert found["ProtectSystem"] == ["strict"]
    assert found["NoNewPrivileges"] == found["PrivateTmp"] == found["ProtectHome"] == ["yes"]
    assert found["KillMode"] == ["mixed"]
    assert found["SuccessExitStatus"] == ["143"]  # 128 + SIGTERM


def test_units_have_the_same_hardening() -> None:
    first, second = (unit(name) for name in UNITS)
    own = {"ExecStart", "WorkingDirectory", "StateDirectory", "ReadOnlyPaths", "LimitNOFILE"}
    assert {k: v for k, v in first.items() if k not in own} == {k: v for k, v in second.items() if k not in own}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_units_and_finds_them_safe(tmp_path: Path) -> None:
    for name in UNITS:
        # It looks whether the command is there.
        text = (PACKAGING / name).read_text().replace("/opt/visard/bin/visard", sys.executable)
        (tmp_path / name).write_text(text)
    places = [str(tmp_path / name) for name in UNITS]
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *places], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    for place in places:
        command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=15", place]
        rated = subprocess.run(command, capture_output=True, text=True, check=False)
        assert rated.returncode == 0, rated.stdout + rated.stderr
