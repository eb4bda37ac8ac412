"""`visard plan` as a person meets it: tables, a picture, JSON and refusals, and no file that was not asked for."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simulations.recipe import load_recipe
from tests.e2e.test_cli import Terminal, assert_one_line, size_of


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal(monkeypatch, capsys)


def cells(out: str, label: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.startswith(f"│ {label}")]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_a_recipe_s_plan(run: Terminal, tmp_path: Path) -> None:
    code, out, err = run("plan", "lfw")
    assert code == 0, err
    assert "1,680 persons at 10 clients, 252 of them in a step (sample rate 0.15)" in out
    assert cells(out, "who is trusted") == ["nobody", "clients", "coordinator", "itself"]
    assert cells(out, "verdict") == ["good", "good", "good", "marginal"]
    assert len(set(cells(out, "epsilon  "))) == 1
    assert [float(cell) for cell in cells(out, "s/n of the moments")] == [5.21, 13.8, 16.5, 1.65]
    assert "central: good (" in out
    assert "plainly faces" in out
    assert cells(out, "a client's keys, 50 rounds") == ["0 kB", "97 kB", "0 kB", "0 kB"]
    assert "distributed holds against the coordinator and any 1 of the 10 clients" in out
    assert "adversarial rounds have not been seen to help" in out
    assert 1 <= sum(line.startswith("- ") for line in out.splitlines()) <= 5
    assert out.splitlines()[-1] == "run it: visard simulate lfw"
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_is_told_runs_that_plan(run: Terminal) -> None:
    given = ["--persons", 800, "--noise-multiplier", 2.0, "--epsilon", 9, "--adaptive"]
    code, out, err = run("plan", "lfw", *given)
    assert code == 0, err
    words = shlex.split(out.splitlines()[-1].partition("run it: ")[2])
    assert words[:3] == ["visard", "simulate", "lfw"]
    assert "--adaptive" in words
    assert (words[words.index("--epsilon") + 1], words[words.index("--expected-batch") + 1]) == ("9", "12")
    code, out, err = run("plan", "lfw", *given, "--json")
    assert int(words[words.index("--num-rounds") + 1]) == json.loads(out)["rounds"] > 1


def test_a_distributed_plan_is_a_run_s(run: Terminal) -> None:
    given = ["--privacy-model", "distributed", "--survivors", 9, "--colluders", 2]
    code, out, err = run("plan", "lfw", *given)
    assert code == 0, err
    assert "planned for distributed" in out
    told = shlex.join(map(str, given))
    assert out.splitlines()[-1] == f"run it: visard simulate lfw {told}"
    found = json.loads(run("plan", "lfw", *given, "--json")[1])
    assert (found["privacy_model"], found["survivors"], found["colluders"], found["noise_shares"]) == (
        "distributed",
        9,
        2,
        7,
    )
    assert found["models"]["distributed"]["noise_factor"] == pytest.approx((10 / 7) ** 0.5)
    alone = json.loads(run("plan", "lfw", "--num-clients", 1, "--json")[1])
    assert (alone["survivors"], alone["colluders"], alone["noise_shares"]) == (None, None, None)
    out = run("plan", "lfw", "--survivors", 3)[1]
    assert "no distributed run: survivors = 3" in out
    assert "a client's keys" not in out


MODEL_KEYS = {
    *("noise_factor", "mean_noise", "update_snr", "moment_snr", "verdict", "because"),
    *("equal_noise_epsilon", "bytes_down", "bytes_up", "moment_bytes_up"),
    *("dealt_rounds", "dealt_bytes", "unmasking_bytes"),
}
KEYS = {
    *("recipe", "privacy_model", "unit", "units", "clients", "batch", "expected_batch", "sample_rate", "delta"),
    *(
        "survivors",
        "colluders",
        "noise_shares",
        "solved",
        "budget",
        "epsilon",
        "epsilon_prv",
        "noise_multiplier",
        "rounds",
    ),
    *("local_steps", "moment_noise_multiplier", "moment_dimension", "discriminator_parameters", "models"),
    *("epsilon_by_rounds", "suggestions", "notes", "command"),
}


@pytest.mark.parametrize(
    "options", [(), ("--num-rounds", 0), ("--noise-multiplier", 0.2, "--moment-rounds", 0), ("--num-clients", 1)]
)
def test_json_is_nothing_but_json(run: Terminal, options: tuple[object, ...]) -> None:
    code, out, err = run("plan", "lfw", *options, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(found) == KEYS
    names = ["local", "distributed", "central", "alone"] if found["clients"] > 1 else ["local", "central", "alone"]
    assert list(found["models"]) == names
    assert all(set(model) == MODEL_KEYS for model in found["models"].values())
    assert all(set(row) == {"rounds", *names} for row in found["epsilon_by_rounds"])
    assert all(set(s) == {"change", "options", "figure", "before", "after", "verdict"} for s in found["suggestions"])
    assert (found["epsilon_by_rounds"] == []) is (found["rounds"] == 0)
    assert load_recipe("lfw", {}).privacy.delta == found["delta"]


def test_the_picture_shows_a_line_for_each_model(run: Terminal, tmp_path: Path) -> None:
    code, out, err = run("plan", "lfw", "--out", "plan.png", "--json")
    assert code == 0, err
    json.loads(out)
    assert size_of(tmp_path / "plan.png") == (1008, 600)
    with Image.open(tmp_path / "plan.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in ("1b6ca8", "2a9d5c", "d1495b", "7a7a7a"):
        wanted = [int(colour[i : i + 2], 16) for i in (0, 2, 4)]
        assert (pixels == wanted).all(axis=1).sum() > 300, colour
    assert "picture: plan.png" in run("plan", "lfw", "--out", "plan.png")[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["lfw-nonprivate"], "nothing to compute"),
        (["lfw", "--epsilon", "5"], "the moment release alone costs"),
        (["lfw", "--epsilon", "12", "--noise-multiplier", "2", "--num-rounds", "3"], "give two"),
        (["lfw", "--batch", "5000"], "more than the 1,680 units"),
        (["lfw", "--privacy-model", "distributed", "--survivors", "3"], "survivors = 3"),
        (["lfw", "--privacy-model", "distributed", "--num-clients", "1"], "two clients"),
        (["lfw", "--num-rounds", "0", "--out", "plan.png"], "leave out --out"),
        (["lfw", "--unit", "client"], "unit = 'client'"),
        (["nothing"], "there is no recipe"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(
    run: Terminal, tmp_path: Path, arguments: list[str], told: str
) -> None:
    assert_one_line(run("plan", *arguments), "ConfigError", told)
    assert list(tmp_path.iterdir()) == []
