"""`visard plan` as a person meets it: tables, a picture, JSON and refusals, and no file that was not asked for."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.privacy.accounting import calibrate_noise_multiplier
from simulations.recipe import load_recipe
from tests.e2e.test_cli import Terminal, assert_one_line, size_of
from tests.support import LFW_WITH_ROUNDS


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal(monkeypatch, capsys)


def cells(out: str, label: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.startswith(f"│ {label}")]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_a_recipe_s_plan(run: Terminal, tmp_path: Path) -> None:
    """`lfw` has no rounds: its one release of moments has all of epsilon."""
    code, out, err = run("plan", "lfw")
    assert code == 0, err
    sigma = calibrate_noise_multiplier(10.0, 1e-5, 1.0, 1)
    first = out.splitlines()[0]
    assert first == f"lfw: 1,680 persons at 10 clients; a moment release of noise {sigma:.4g}; epsilon 10, delta 1e-05"
    assert "planned for distributed" in out
    assert cells(out, "who is trusted") == ["nobody", "clients", "coordinator", "itself"]
    # Ten clients, seven of them with noise that nobody else knows; 24,632 features.
    factors = [math.sqrt(10), math.sqrt(10 / 7), 1, 10]
    expected = [1680 / (factor * sigma * math.sqrt(24_632)) for factor in factors]
    assert [float(cell) for cell in cells(out, "s/n of the moments")] == pytest.approx(expected, rel=0.003)
    assert cells(out, "verdict") == ["good", "good", "good", "marginal"]
    (epsilon,) = set(cells(out, "epsilon  "))
    assert 9.98 < float(epsilon) <= 10
    assert cells(out, "a client's moments, up") == ["99 kB", "99 kB", "99 kB", "0 kB"]
    assert cells(out, "a client's keys, 1 round ") == ["0 kB", "4 kB", "0 kB", "0 kB"]
    assert "distributed: good (" in out
    for of_rounds in ("noise multiplier", "in a step", "discriminator", "rounds", "update", "a client's round"):
        assert of_rounds not in out
    assert out.splitlines()[-1] == "run it: visard simulate lfw"
    # The run that it tells is without more words the plan's: it computes the very noise.
    found = json.loads(run("plan", "lfw", "--json")[1])
    assert (found["command"], found["moment_noise_multiplier"]) == (["visard", "simulate", "lfw"], sigma)
    assert (found["rounds"], found["noise_multiplier"], found["epsilon_by_rounds"]) == (0, 0.0, [])
    assert list(tmp_path.iterdir()) == []


def test_a_plan_with_rounds(run: Terminal, tmp_path: Path) -> None:
    code, out, err = run("plan", LFW_WITH_ROUNDS)
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
    assert "adversarial rounds have not been shown to help" in out
    assert 1 <= sum(line.startswith("- ") for line in out.splitlines()) <= 5
    assert out.splitlines()[-1] == f"run it: {shlex.join(['visard', 'simulate', LFW_WITH_ROUNDS])}"
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_is_told_runs_that_plan(run: Terminal) -> None:
    given = ["--persons", 800, "--noise-multiplier", 2.0, "--epsilon", 9, "--adaptive"]
    code, out, err = run("plan", LFW_WITH_ROUNDS, *given)
    assert code == 0, err
    words = shlex.split(out.splitlines()[-1].partition("run it: ")[2])
    assert words[:3] == ["visard", "simulate", LFW_WITH_ROUNDS]
    assert "--adaptive" in words
    assert (words[words.index("--epsilon") + 1], words[words.index("--expected-batch") + 1]) == ("9", "12")
    code, out, err = run("plan", LFW_WITH_ROUNDS, *given, "--json")
    assert int(words[words.index("--num-rounds") + 1]) == json.loads(out)["rounds"] > 1


def test_a_distributed_plan_is_a_run_s(run: Terminal) -> None:
    given = ["--privacy-model", "distributed", "--survivors", 9, "--colluders", 2]
    code, out, err = run("plan", LFW_WITH_ROUNDS, *given)
    assert code == 0, err
    assert "planned for distributed" in out
    told = shlex.join(["visard", "simulate", LFW_WITH_ROUNDS, *map(str, given)])
    assert out.splitlines()[-1] == f"run it: {told}"
    found = json.loads(run("plan", LFW_WITH_ROUNDS, *given, "--json")[1])
    assert (found["privacy_model"], found["survivors"], found["colluders"], found["noise_shares"]) == (
        "distributed",
        9,
        2,
        7,
    )
    assert found["models"]["distributed"]["noise_factor"] == pytest.approx((10 / 7) ** 0.5)
    alone = json.loads(run("plan", LFW_WITH_ROUNDS, "--num-clients", 1, "--json")[1])
    assert (alone["survivors"], alone["colluders"], alone["noise_shares"]) == (None, None, None)
    out = run("plan", LFW_WITH_ROUNDS, "--survivors", 3)[1]
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
    ("recipe", "options"),
    [
        ("lfw", ()),
        (LFW_WITH_ROUNDS, ()),
        (LFW_WITH_ROUNDS, ("--num-rounds", 0)),
        (LFW_WITH_ROUNDS, ("--noise-multiplier", 0.2, "--moment-rounds", 0)),
        (LFW_WITH_ROUNDS, ("--num-clients", 1)),
    ],
)
def test_json_is_nothing_but_json(run: Terminal, recipe: str, options: tuple[object, ...]) -> None:
    code, out, err = run("plan", recipe, *options, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(found) == KEYS
    names = ["local", "distributed", "central", "alone"] if found["clients"] > 1 else ["local", "central", "alone"]
    assert list(found["models"]) == names
    assert all(set(model) == MODEL_KEYS for model in found["models"].values())
    assert all(set(row) == {"rounds", *names} for row in found["epsilon_by_rounds"])
    assert all(set(s) == {"change", "options", "figure", "before", "after", "verdict"} for s in found["suggestions"])
    assert (found["epsilon_by_rounds"] == []) is (found["rounds"] == 0)
    assert load_recipe(recipe, {}).privacy.delta == found["delta"]


def test_the_picture_shows_a_line_for_each_model(run: Terminal, tmp_path: Path) -> None:
    code, out, err = run("plan", LFW_WITH_ROUNDS, "--out", "plan.png", "--json")
    assert code == 0, err
    json.loads(out)
    assert size_of(tmp_path / "plan.png") == (1008, 600)
    with Image.open(tmp_path / "plan.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in ("1b6ca8", "2a9d5c", "d1495b", "7a7a7a"):
        wanted = [int(colour[i : i + 2], 16) for i in (0, 2, 4)]
        assert (pixels == wanted).all(axis=1).sum() > 300, colour
    assert "picture: plan.png" in run("plan", LFW_WITH_ROUNDS, "--out", "plan.png")[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["lfw-nonprivate"], "nothing to compute"),
        ([LFW_WITH_ROUNDS, "--epsilon", "5"], "the moment release alone costs"),
        (["lfw", "--epsilon", "12", "--noise-multiplier", "2", "--num-rounds", "3"], "give two"),
        (["lfw", "--batch", "5000"], "more than the 1,680 units"),
        ([LFW_WITH_ROUNDS, "--privacy-model", "distributed", "--survivors", "3"], "survivors = 3"),
        (["lfw", "--num-clients", "1"], "two clients"),
        (["lfw", "--out", "plan.png"], "leave out --out"),
        ([LFW_WITH_ROUNDS, "--num-rounds", "0", "--out", "plan.png"], "leave out --out"),
        (["lfw", "--unit", "client"], "unit = 'client'"),
        (["lfw", "--noise-multiplier", "2"], "is of the rounds, and there are none"),
        (["nothing"], "there is no recipe"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(
    run: Terminal, tmp_path: Path, arguments: list[str], told: str
) -> None:
    assert_one_line(run("plan", *arguments), "ConfigError", told)
    assert list(tmp_path.iterdir()) == []
