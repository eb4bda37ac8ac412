"""The owner's policy file: how `visard client` writes it, reads it, and judges a run by it."""

import dataclasses
import stat
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from flwr.app import Context, RecordDict
from PIL import Image
from typer.testing import CliRunner

from client.cli import console
from client.policy import OwnerPolicy
from client.policy_file import load_policy_file
from client.run_check import check_run, spent
from client.simulated import simulated_owner
from common.errors import ConfigError, DataError, LedgerCorrupt
from common.faces import load_faces
from common.faces.loading import check_source
from common.fields import key_of
from common.privacy.accounting import epsilon_of
from common.privacy.ledger import Ledger
from common.privacy.planner import planned_steps, run_releases
from common.privacy.units import PrivacyModel, PrivacyUnit
from common.sections import FaceSource
from tests.support import random_faces, tiny_config
from visard import build

RUN = ["--image-size", "28", "--channels", "1", "--discriminator", "mlp", "--discriminator-width", "4"]


def visard(*command: str) -> Result:
    return CliRunner().invoke(build(), list(command), env={"COLUMNS": "200"})


def written(policy: Path) -> OwnerPolicy:
    return OwnerPolicy.from_config(load_policy_file(policy))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "faces").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_new_policy_has_every_key_its_meaning_and_its_default(folder: Path) -> None:
    shown = visard("client", "init", "--data", "faces")
    assert shown.exit_code == 0, shown.output
    assert "visard client start --policy owner.toml" in shown.output
    text = (folder / "owner.toml").read_text()
    assert stat.S_IMODE((folder / "owner.toml").stat().st_mode) == 0o600
    assert set(tomllib.loads(text)) == {key_of(f.name) for f in dataclasses.fields(OwnerPolicy)}
    joined = " ".join(text.replace("# ", "").split())
    for f in dataclasses.fields(OwnerPolicy):
        assert " ".join(f.metadata["help"].split()) in joined, f.name
    assert "(default 0.5)" in text
    # The ledger lies beside the faces, whoever asks and wherever the policy lies.
    assert written(folder / "owner.toml") == OwnerPolicy(
        data=str(folder / "faces"),
        state_dir=folder / "faces.visard",
        max_epsilon=10.0,
        ledger=Ledger(folder / "faces.visard", max_epsilon=10.0, delta=1e-5).public_key,
    )
    elsewhere = visard("client", "init", "--data", "faces/../faces", "--out", "second.toml")
    assert elsewhere.exit_code == 0
    assert written(folder / "second.toml") == written(folder / "owner.toml")


def test_a_policy_is_never_overwritten(folder: Path) -> None:
    (folder / "owner.toml").write_text("max-epsilon = 0.5\n")
    refused = visard("client", "init", "--data", "faces")
    assert isinstance(refused.exception, ConfigError)
    assert "not overwritten" in str(refused.exception)
    assert (folder / "owner.toml").read_text() == "max-epsilon = 0.5\n"


def test_a_source_without_a_path_has_its_ledger_beside_the_policy(folder: Path) -> None:
    assert visard("client", "init", "--data", "procedural:persons=2", "--out", "drawn.toml").exit_code == 0
    policy = written(folder / "drawn.toml")
    assert (policy.data, policy.state_dir) == ("procedural:persons=2", folder / "drawn.visard")


def test_every_way_of_reading_reaches_the_policy(folder: Path) -> None:
    odd = folder / 'fa"ces\\ # é'
    odd.mkdir()
    (folder / "who.csv").write_text("file,who\n")
    options = ["--crop", "0.5", "--detect", "largest", "--attributes", "who.csv", "--person-column", "who"]
    assert visard("client", "init", "--data", str(odd), *options).exit_code == 0
    assert written(folder / "owner.toml").source == FaceSource(
        data=str(odd), crop=0.5, detect="largest", attributes=str(folder / "who.csv"), person_column="who"
    )
    shown = visard("client", "init", "--help")
    assert [f.name for f in dataclasses.fields(FaceSource) if f"--{key_of(f.name)} " not in shown.output] == []


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        (["--data", "nothing"], DataError, "no faces at"),
        (["--data", "faces", "--attributes", "nobody.csv"], DataError, "no CSV at"),
        (["--data", "faces", "--person-column", "who"], ConfigError, "without attributes"),
    ],
)
def test_a_policy_that_cannot_work_is_not_written(
    folder: Path, options: list[str], error: type[Exception], told: str
) -> None:
    refused = visard("client", "init", *options)
    assert isinstance(refused.exception, error)
    assert told in str(refused.exception)
    assert not (folder / "owner.toml").exists()


def test_paths_are_relative_to_the_policy_s_own_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "own.toml").write_text(
        'data = "faces"\nstate-dir = "../state"\nattributes = "all.csv"\nmax-epsilon = 2\n'
        'allowed-privacy-models = ["local", "none"]\n'
    )
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(ConfigError, match=r"own.toml names no ledger"):
        OwnerPolicy.from_file(folder / "own.toml")
    with (folder / "own.toml").open("a") as file:
        file.write(f'ledger = "{"ab" * 32}"\n')
    policy = written(folder / "own.toml")
    assert (policy.data, policy.attributes) == (str(folder / "faces"), str(folder / "all.csv"))
    assert (policy.state_dir, policy.max_epsilon) == (folder.parent / "state", 2.0)
    assert policy.allowed_privacy_models == (PrivacyModel.LOCAL, PrivacyModel.NONE)
    # Flower's own node is given the file's path.
    node = Context(1, 2, {"policy": str(folder / "own.toml")}, RecordDict(), {})
    assert OwnerPolicy.from_context(node) == policy
    node.node_config["max-epsilon"] = 100.0
    with pytest.raises(ConfigError, match="beside it max-epsilon"):
        OwnerPolicy.from_context(node)


@pytest.mark.parametrize(
    "content", ["data = ", "[owner]\ndata = 'x'\n", "allowed-discriminators = [1]\n", "data = 2026-01-01\n"]
)
def test_a_damaged_policy_is_refused(folder: Path, content: str) -> None:
    (folder / "owner.toml").write_text(content)
    with pytest.raises(ConfigError):
        written(folder / "owner.toml")
    for command in (["client", "start"], ["client", "check", "demo"]):
        assert isinstance(visard(*command).exception, ConfigError)
    (folder / "owner.toml").unlink()
    with pytest.raises(ConfigError, match="visard client init"):
        written(folder / "owner.toml")


def drawn_policy(folder: Path, **changes: Any) -> OwnerPolicy:
    given = {"data": "procedural:persons=20,images=2", "state_dir": folder / "state", "max_epsilon": 10.0}
    return OwnerPolicy(**(given | changes))


def test_what_a_run_would_cost_is_what_the_ledger_then_says(tmp_path: Path) -> None:
    policy = drawn_policy(tmp_path)
    faces = load_faces(policy.source, 28, 1)
    config = tiny_config(privacy_model="local", epsilon=4.0)
    found = check_run(config, policy, faces)
    assert (found.units, found.images, found.spent, found.releases, found.refused) == (20, 40, 0.0, 0, [])
    assert not policy.state_dir.exists(), "looking leaves no ledger behind"
    for number in (1, 2):
        ledger = Ledger(policy.state_dir, max_epsilon=policy.max_epsilon, delta=policy.delta)
        plan = run_releases(config)
        ledger.charge("a" * 32, 2 * number, plan[0], plan, "moments")
        for step in range(planned_steps(config)):
            ledger.charge(f"{number:032x}", step + 1, dataclasses.replace(plan[1], steps=1), plan, "gradients")
        assert ledger.epsilon == pytest.approx(found.after, rel=1e-9)
        before, found = found, check_run(config, policy, faces)
        assert found.spent == pytest.approx(before.after, rel=1e-9)
        assert found.releases == number * 5
        assert found.after > before.after >= epsilon_of(ledger.releases, policy.delta) * (1 - 1e-9)
    poor = dataclasses.replace(policy, max_epsilon=found.after * 0.99)
    assert [refusal.key for refusal in check_run(config, poor, faces).refused] == ["max-epsilon"]


def test_faces_that_do_not_fit_the_run_are_told(tmp_path: Path) -> None:
    policy = drawn_policy(tmp_path)
    faces = dataclasses.replace(load_faces(policy.source, 28, 1), persons=None)
    found = check_run(tiny_config(privacy_model="local"), policy, faces)
    assert (found.units, [refusal.key for refusal in found.refused]) == (None, ["data"])


def test_a_ledger_that_saw_a_run_without_privacy_holds_no_epsilon(tmp_path: Path) -> None:
    policy = drawn_policy(tmp_path)
    Ledger(policy.state_dir, max_epsilon=10.0, delta=1e-5).note_unprotected("a" * 32)
    assert spent(policy).epsilon == float("inf")
    found = check_run(tiny_config(privacy_model="local"), policy, load_faces(policy.source, 28, 1))
    assert (found.after, [refusal.key for refusal in found.refused]) == (float("inf"), ["max-epsilon"])


def test_check_prints_what_would_be_refused_and_ends_with_status_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 160)  # in a narrow terminal what is looked for is on two lines
    assert visard("client", "init", "--data", "procedural:persons=20,images=2").exit_code == 0
    allowed = visard("client", "check", "demo", "--privacy-model", "local", *RUN)
    assert allowed.exit_code == 0, allowed.output
    for told in ("20 units (person), 40 images", "epsilon 0 spent in 0 releases, 10 left of 10", "nothing would be"):
        assert told in allowed.output
    refused = visard("client", "check", "demo", "--unit", "image", "--sample-rate", "0.9", "--min-clients", "1", *RUN)
    assert refused.exit_code == 1
    assert refused.exception is None or isinstance(refused.exception, SystemExit)
    for key in ("allowed-privacy-models", "unit", "max-sample-rate", "min-cohort"):
        assert key in refused.output
    assert "min-noise-multiplier" not in refused.output
    bare = visard("client", "check", "demo", "--privacy-model", "none", *RUN)
    assert bare.exit_code == 1
    assert "NO PRIVACY" in bare.output
    assert Ledger(folder / "owner.visard", max_epsilon=10.0, delta=1e-5).releases == []


def test_the_least_that_is_protected_is_written_as_a_word(folder: Path) -> None:
    (folder / "owner.toml").write_text('data = "faces"\nstate-dir = "s"\nmax-epsilon = 1.0\nunit = "image"\n')
    assert written(folder / "owner.toml").unit is PrivacyUnit.IMAGE


def test_a_node_without_a_coordinator_is_told_how_to_join(folder: Path) -> None:
    assert visard("client", "init", "--data", "procedural:persons=4,images=2").exit_code == 0
    with pytest.raises(ConfigError, match="visard client join KIT --policy owner\\.toml"):
        CliRunner().invoke(build(), ["client", "start"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "holds no image"),
        (["--attributes", "table.csv", "--person-column", "nme"], "did you mean 'name'"),
        (
            ["--attributes", "table.csv", "--label-column", "kind", "--label-values", "x,y"],
            "no image has kind among x, y",
        ),
    ],
)
def test_faces_that_cannot_be_read_are_told_before_a_node_starts(folder: Path, given: list[str], told: str) -> None:
    """In a round the error would come after its charge, and the coordinator would see that there was one."""
    if given:
        Image.new("L", (40, 40)).save(folder / "faces" / "one.png")
        (folder / "table.csv").write_text("file,name,kind\none.png,ann,z\n")
    assert visard("client", "init", "--data", "faces", *given).exit_code == 0
    with pytest.raises(DataError, match=told):
        CliRunner().invoke(build(), ["client", "start"], catch_exceptions=False)
    assert not (folder / "faces.visard" / "cache").exists()


def test_a_policy_whose_ledger_is_not_found_spends_nothing_again(folder: Path) -> None:
    """A folder that was moved, a disk that is not mounted: a new ledger would have the whole budget once more."""
    assert visard("client", "init", "--data", "procedural:persons=20,images=2").exit_code == 0
    (folder / "owner.visard").rename(folder / "moved.visard")
    for command in (["start"], ["check", "demo", "--privacy-model", "local", *RUN]):
        with pytest.raises(LedgerCorrupt, match=r"is not in .*owner.visard"):
            CliRunner().invoke(build(), ["client", *command], catch_exceptions=False)
    assert not (folder / "owner.visard").exists()


def test_saved_faces_of_any_size_may_start(tmp_path: Path) -> None:
    random_faces(2, 2).save(tmp_path / "saved.npz")
    check_source(FaceSource(data=str(tmp_path / "saved.npz")))
    np.savez(tmp_path / "plain.npz", images=np.zeros((2, 30, 30), np.uint8))
    check_source(FaceSource(data=str(tmp_path / "plain.npz")))


def test_flower_s_engine_deals_out_persons_only() -> None:
    run = tiny_config(partitioner="power-law").to_flat()
    with pytest.raises(ConfigError, match="deal out otherwise with `visard simulate`"):
        simulated_owner({"partition-id": 0, "num-partitions": 2}, run, 1)
