"""How owners come to know one another: peer keys, the fingerprint of their set, and where a policy keeps it."""

import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from typer.testing import CliRunner

from client.cli import console, read_peer_keys
from client.policy import OwnerPolicy
from client.policy_file import load_policy_file, set_key
from client.run_check import rounds_of
from client.secret_store import load_peer_key
from client.secure_round import secure_sum
from client.simulated import simulated_limits, simulated_peers
from common.errors import ConfigError, PrivacyError, VisardError
from common.privacy.masks import fingerprint
from common.privacy.units import PrivacyModel
from tests.support import tiny_config
from visard import build

RUN = ["--image-size", "28", "--channels", "1", "--discriminator", "mlp", "--discriminator-width", "4"]


def visard(*command: str) -> Result:
    return CliRunner().invoke(build(), list(command), env={"COLUMNS": "200"})


def refused(*command: str) -> VisardError:
    error = visard(*command).exception
    assert isinstance(error, VisardError)
    return error


def keys(count: int) -> list[bytes]:
    return [X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a new owner's policy in it."""
    monkeypatch.chdir(tmp_path)
    assert visard("client", "init", "--data", "procedural:persons=4,images=2").exit_code == 0
    return tmp_path


def own_key(folder: Path) -> bytes:
    return load_peer_key(folder / "owner.visard" / "peer.key").public_key().public_bytes_raw()


def listed(path: Path, found: list[bytes]) -> Path:
    path.write_text("\n".join(key.hex() for key in found))
    return path


def test_init_makes_a_peer_key_for_the_owner_alone_and_keeps_it(folder: Path) -> None:
    path = folder / "owner.visard" / "peer.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    (folder / "owner.toml").rename(folder / "old.toml")
    shown = visard("client", "init", "--data", "procedural:persons=4,images=2")
    assert shown.exit_code == 0
    assert path.read_bytes() == before, "the same faces and ledger, the same client"
    assert own_key(folder).hex() in shown.output
    assert before.hex() not in shown.output


def test_the_fingerprint_is_told_and_pinned_and_nothing_else_changes(folder: Path) -> None:
    policy = folder / "owner.toml"
    text, state = policy.read_text(), OwnerPolicy.from_file(policy)
    found = [own_key(folder), *keys(3)]
    told = visard("client", "peers", str(listed(folder / "keys.txt", found)))
    assert told.exit_code == 0, told.output
    assert f"4 peers: {fingerprint(found)}" in told.output
    assert policy.read_text() == text, "without --pin nothing is written"
    # In whatever order the others wrote them, and with lines between.
    (folder / "other.txt").write_text("\n\n".join(f"  {key.hex().upper()} " for key in reversed(found)) + "\n")
    pinned = visard("client", "peers", "other.txt", "--pin")
    assert f"4 peers: {fingerprint(found)}" in pinned.output
    assert "next start" in pinned.output
    after = policy.read_text().splitlines()
    changed = [(a, b) for a, b in zip(text.splitlines(), after, strict=True) if a != b]
    assert changed == [('peers = ""', f'peers = "{fingerprint(found)}"')]
    assert stat.S_IMODE(policy.stat().st_mode) == 0o600
    assert OwnerPolicy.from_file(policy).peers == fingerprint(found)
    assert OwnerPolicy.from_file(policy).ledger == state.ledger
    # A cohort that changes is pinned anew.
    visard("client", "peers", str(listed(folder / "keys.txt", found[:3])), "--pin")
    assert OwnerPolicy.from_file(policy).peers == fingerprint(found[:3])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "0 lines"),
        ("{own}", "1 lines"),
        ("{own}\n{own}", "two different keys"),
        ("{own}\n{own_upper}", "two different keys"),
        ("{own}\nab", "two different keys"),
        ("{own}\n{other}{other}", "two different keys"),
        ("{own}\nmy friend", "cannot read peer keys"),
        ("{other}\n{another}", "does not have this client's own peer key"),
    ],
)
def test_lists_that_name_no_cohort_are_refused(folder: Path, content: str, told: str) -> None:
    other, another = keys(2)
    own = own_key(folder).hex()
    given = {"own": own, "own_upper": own.upper(), "other": other.hex(), "another": another.hex()}
    (folder / "keys.txt").write_text(content.format(**given))
    before = (folder / "owner.toml").read_bytes()
    error = refused("client", "peers", "keys.txt", "--pin")
    assert isinstance(error, ConfigError)
    assert told in str(error)
    assert (folder / "owner.toml").read_bytes() == before


def test_what_is_missing_is_named(folder: Path) -> None:
    found = listed(folder / "keys.txt", [own_key(folder), *keys(1)])
    assert "nowhere.txt" in str(refused("client", "peers", "nowhere.txt"))
    assert "visard client init" in str(refused("client", "peers", str(found), "--policy", "nobody.toml"))
    (folder / "binary").write_bytes(b"\xff\xfe" * 40)
    assert "cannot read peer keys" in str(refused("client", "peers", "binary"))
    (folder / "owner.visard" / "peer.key").unlink()
    assert isinstance(refused("client", "peers", str(found)), PrivacyError)


def test_a_peer_key_that_others_may_read_is_not_used(folder: Path) -> None:
    found = listed(folder / "keys.txt", [own_key(folder), *keys(1)])
    (folder / "owner.visard" / "peer.key").chmod(0o644)
    assert "set it to 600" in str(refused("client", "peers", str(found)))


def test_keys_are_read_as_they_are(tmp_path: Path) -> None:
    found = keys(5)
    assert read_peer_keys(listed(tmp_path / "keys.txt", found)) == found


@pytest.mark.parametrize("value", ["a word", True, 3, 2.5, 'with "quotes" \\ and = signs', "é"])
def test_a_key_of_a_policy_is_given_another_value(folder: Path, value: Any) -> None:
    policy = folder / "owner.toml"
    before = tomllib.loads(policy.read_text())
    comments = [line for line in policy.read_text().splitlines() if line.startswith("#")]
    set_key(policy, "max-epsilon", value)
    assert load_policy_file(policy)["max-epsilon"] == value
    assert tomllib.loads(policy.read_text()) == before | {"max-epsilon": value}
    assert [line for line in policy.read_text().splitlines() if line.startswith("#")] == comments


@pytest.mark.parametrize(
    "text", ["", "# peers = 3\n", "speers = 1\npeers-too = 2\n", "[peers]\n", "peers = 1\n peers = 2\n"]
)
def test_a_key_that_is_not_there_once_is_not_set(tmp_path: Path, text: str) -> None:
    policy = tmp_path / "owner.toml"
    policy.write_text(text)
    with pytest.raises(ConfigError, match="no line peers ="):
        set_key(policy, "peers", "x")
    assert policy.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["owner.toml"]


def test_a_key_is_set_where_its_line_is_written_otherwise(tmp_path: Path) -> None:
    policy = tmp_path / "owner.toml"
    policy.write_text("# a comment = here\r\nmin-cohort=3\npeers=''   # none yet\nunit = 'person'")
    set_key(policy, "peers", "ab")
    assert tomllib.loads(policy.read_text()) == {"min-cohort": 3, "peers": "ab", "unit": "person"}
    set_key(policy, "unit", "image")
    assert tomllib.loads(policy.read_text()) == {"min-cohort": 3, "peers": "ab", "unit": "image"}


def owner(**keys: Any) -> OwnerPolicy:
    given = {"data": "/faces", "state-dir": "/state", "max-epsilon": 3.0, "allowed-privacy-models": "distributed"}
    return OwnerPolicy.from_config(given | {key.replace("_", "-"): value for key, value in keys.items()})


def test_the_policy_s_keys_are_strict_where_the_owner_says_nothing() -> None:
    policy = owner()
    found = policy.peers, policy.min_noise_shares, policy.min_colluders, policy.max_deal_rounds
    assert found == ("", 2, 1, 200)
    assert owner(peers="0f" * 32).to_flat()["peers"] == "0f" * 32


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peers", "0F" * 32),
        ("peers", "0f" * 31),
        ("peers", "0f" * 33),
        ("peers", "zz" * 32),
        ("peers", " " * 64),
        ("min_noise_shares", 0),
        ("min_colluders", 0),
        ("max_deal_rounds", 0),
        ("max_deal_rounds", 1001),
        ("min_colluders", "few"),
    ],
)
def test_keys_out_of_range_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key.replace("_", "-")):
        owner(**{key: value})


def test_a_run_is_judged_by_its_cohort() -> None:
    config = tiny_config(privacy_model="distributed", num_clients=5, survivors=4)
    (asked, _) = rounds_of(config)
    pinned = "ab" * 32

    def refused_keys(**keys: Any) -> list[str]:
        return [refusal.key for refusal in owner(**keys).refusals(asked)]

    assert refused_keys() == ["peers"]
    assert refused_keys(peers=pinned) == refused_keys(peers=pinned, min_noise_shares=3) == []
    assert refused_keys(peers=pinned, min_noise_shares=4) == ["min-noise-shares"]
    assert refused_keys(peers=pinned, min_colluders=2) == ["min-colluders"]
    local = owner(allowed_privacy_models="local", peers=pinned, min_noise_shares=100, min_colluders=100)
    assert [refusal.key for refusal in local.refusals(asked)] == [
        "allowed-privacy-models",
        "min-noise-shares",
        "min-colluders",
    ]
    (plain, _) = rounds_of(tiny_config(privacy_model="local"))
    assert local.refusals(plain) == []


def test_a_node_without_peers_has_no_secure_sum(folder: Path) -> None:
    for keys in ({}, {"peers": "ab" * 32, "allowed_privacy_models": "local,central"}):
        with pytest.raises(PrivacyError, match="compare the fingerprint"):
            secure_sum(owner(**keys))
    policy = OwnerPolicy.from_file(folder / "owner.toml")
    with pytest.raises(PrivacyError):
        secure_sum(policy)


def test_check_tells_of_a_cohort_that_is_too_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 160)  # in a narrow terminal what is looked for is on two lines
    text = (folder / "owner.toml").read_text().replace('["local"]', '["distributed"]')
    (folder / "owner.toml").write_text(text)
    run = ["--privacy-model", "distributed", "--moment-noise-multiplier", "4", *RUN]
    unpinned = visard("client", "check", "demo", *run, "--peers", "5", "--survivors", "4")
    assert (unpinned.exit_code, "visard client peers FILE --pin" in unpinned.output) == (1, True)
    set_key(folder / "owner.toml", "peers", "ab" * 32)
    fits = visard("client", "check", "demo", *run, "--peers", "5", "--survivors", "4")
    assert fits.exit_code == 0, fits.output
    assert "nothing would be refused" in fits.output
    few = visard("client", "check", "demo", *run, "--peers", "3", "--survivors", "3", "--colluders", "2")
    assert few.exit_code == 1
    assert "min-noise-shares" in few.output
    set_key(folder / "owner.toml", "min-colluders", 2)
    assert "min-colluders" in visard("client", "check", "demo", *run, "--peers", "5", "--survivors", "4").output


def test_simulated_owners_pin_one_another_and_keep_their_keys(tmp_path: Path) -> None:
    folders = [tmp_path / "clients" / str(number) for number in range(3)]
    flat = tiny_config(privacy_model="distributed").to_flat()
    first = simulated_peers(flat, folders)
    held = [load_peer_key(folder / "peer.key").public_key().public_bytes_raw() for folder in folders]
    assert first == {"peers": fingerprint(held)}
    assert simulated_peers(flat, folders) == first
    policy = OwnerPolicy.from_config(
        {"data": "/faces", "state-dir": str(folders[0]), **simulated_limits(flat), **first}
    )
    assert policy.allowed_privacy_models == (PrivacyModel.DISTRIBUTED,)
    assert secure_sum(policy).public_key == held[0]
    other = tmp_path / "other"
    assert simulated_peers(tiny_config(privacy_model="local").to_flat(), [other / "0"]) == {}
    assert not other.exists()


def test_a_state_folder_that_is_gone_is_told(folder: Path) -> None:
    found = listed(folder / "keys.txt", [own_key(folder), *keys(1)])
    (folder / "owner.visard").rename(folder / "moved.visard")
    error = refused("client", "peers", str(found))
    assert isinstance(error, PrivacyError)
    assert "owner.visard" in str(error)
