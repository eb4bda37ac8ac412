"""How a node comes to a coordinator, as both sides type it: init, invite, join, nodes."""

import os
import pty
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import Result
from cryptography import x509
from typer.testing import CliRunner

from client.cli import read_peer_keys
from client.join import load_node_key, node_key_path
from client.policy import OwnerPolicy
from common.errors import ConfigError, PrivacyError
from common.kit import Kit, NodeRequest, grouped, public_key_pem
from server.certificates import names_of
from server.deployment import SETTINGS, Deployment
from server.registry import Registry
from simulations.recipe import load_recipe
from visard import build

ADDRESS = ["--address", "host.example.org:9092"]


def visard(*command: str) -> Result:
    return CliRunner().invoke(build(), list(command), env={"COLUMNS": "200"})


def done(*command: str) -> str:
    result = visard(*command)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refused(*command: str, kind: type[Exception] = ConfigError) -> str:
    error = visard(*command).exception
    assert isinstance(error, kind), error
    return str(error)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def coordinator(here: Path) -> Deployment:
    done("coordinator", "init", *ADDRESS)
    return Deployment.load(here / "coordinator")


def owner(name: str) -> str:
    """A policy of a new owner. Returns its path."""
    done("client", "init", "--data", "procedural:persons=4,images=2", "--out", f"{name}.toml")
    return f"{name}.toml"


def invited(name: str) -> Path:
    """A request of a new node: invited, joined."""
    done("coordinator", "invite", name)
    done("client", "join", f"{name}.kit.toml", "--policy", owner(name))
    return Path(f"{name}.request.toml")


def letting_in(*requests: Path | str) -> list[str]:
    """The words that let these in; their fingerprints, as the owners read them."""
    read = [word for path in requests for word in ("--fingerprint", NodeRequest.from_file(Path(path)).fingerprint)]
    return [*(word for path in requests for word in ("--approve", str(path))), *read]


def test_init_writes_what_was_given_and_no_more(here: Path) -> None:
    told = done("coordinator", "init", *ADDRESS, "--privacy-model", "local", "--num-rounds", "7", "--no-adaptive")
    found = Deployment.load(here / "coordinator")
    assert found.run == {"privacy-model": "local", "num-rounds": 7, "adaptive": False}
    assert (found.recipe, found.name, found.listen, found.names) == ("demo", "demo", "0.0.0.0:9092", ())
    assert grouped(found.kit("any").fingerprint) in told
    for line in ("coordinator/coordinator.toml is written", "privacy-model local", "invite NAME coordinator"):
        assert line in told
    assert stat.S_IMODE((here / "coordinator").stat().st_mode) == 0o700


def test_init_takes_all_that_it_offers(here: Path) -> None:
    (here / "mine.toml").write_text("num-rounds = 9\n")
    (here / "public").mkdir()
    names = ["--name-in-certificate", "10.0.0.7", "--name-in-certificate", "::7"]
    run = ["--recipe", "mine.toml", "--name", "second", "--reference", "public", "--preset", "classic-adam"]
    done("coordinator", "init", "some/where", "--listen", "10.0.0.7:1", *ADDRESS, *names, *run)
    found = Deployment.load(here / "some" / "where")
    assert (found.listen, found.name, found.names) == ("10.0.0.7:1", "second", ("10.0.0.7", "::7"))
    assert found.recipe == str(here / "mine.toml"), "wherever it is started"
    preset = {"discriminator-lr": 2e-4, "generator-lr": 2e-4, "adam-beta1": 0.5}
    assert found.run == {"reference": str(here / "public"), **preset}
    assert load_recipe(found.recipe, found.run).training.num_rounds == 9


@pytest.mark.parametrize(
    ("address", "listen"),
    [
        ("localhost:9092", "127.0.0.1:9092"),
        ("127.0.0.1:1", "127.0.0.1:1"),
        ("[::1]:9092", "[::1]:9092"),
        ("10.0.0.7:9092", "0.0.0.0:9092"),
        ("[2001:db8::1]:9092", "[::]:9092"),
    ],
)
def test_it_listens_where_nodes_dial(here: Path, address: str, listen: str) -> None:
    done("coordinator", "init", "--address", address)
    assert Deployment.load(here / "coordinator").listen == listen


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--address", "host"], "write HOST:PORT"),
        (["--address", "::1:9092"], "stands in brackets"),
        (["--address", "host:70000"], "outside [1, 65535]"),
        (["--address", "0.0.0.0:9092"], "no place that a node can dial"),
        ([*ADDRESS, "--listen", "9092"], "write HOST:PORT"),
        ([*ADDRESS, "--name-in-certificate", "ho st"], "neither a DNS name"),
        ([*ADDRESS, "--recipe", "dmo"], "did you mean 'demo'"),
        ([*ADDRESS, "--privacy-model", "lokal"], "choose one of"),
        ([*ADDRESS, "--epsilon", "-1"], "epsilon = -1.0 is outside"),
        ([*ADDRESS, "--name", "../other"], "cannot name a run"),
        ([*ADDRESS, "--certificate", "a.crt", "--ca", "ca.crt"], "only --certificate, --ca: give all three"),
        ([*ADDRESS, "--certificate", "a", "--key", "b", "--ca", "c", "--name-in-certificate", "x"], "has its names"),
        (
            [*ADDRESS, "--certificate", "a.crt", "--key", "a.key", "--ca", "ca.crt"],
            "ca.crt (No such file or directory)",
        ),
    ],
)
def test_a_coordinator_that_cannot_work_is_not_made(here: Path, given: list[str], told: str) -> None:
    assert told in refused("coordinator", "init", *given)
    assert list(here.iterdir()) == []


def test_init_overwrites_nothing(coordinator: Deployment) -> None:
    before = (coordinator.folder / SETTINGS).read_bytes()
    assert "not overwritten" in refused("coordinator", "init", *ADDRESS)
    assert (coordinator.folder / SETTINGS).read_bytes() == before


def test_a_given_certificate_stays_where_it_is(coordinator: Deployment, here: Path) -> None:
    files = {"certificate": coordinator.certificate, "key": coordinator.key, "ca": coordinator.ca}
    options = [word for name, path in files.items() for word in (f"--{name}", str(path.relative_to(here)))]
    done("coordinator", "init", "second", *ADDRESS, *options)
    found = Deployment.load(here / "second")
    assert {name: getattr(found, name) for name in files} == files
    # The same authority, but another signing key: another coordinator.
    assert found.kit("any").fingerprint != coordinator.kit("any").fingerprint


def test_an_edited_address_is_in_the_next_kit(coordinator: Deployment) -> None:
    done("coordinator", "invite", "alice")
    settings = coordinator.folder / SETTINGS
    settings.write_text(settings.read_text().replace("host.example.org", "moved.example.org"))
    told = done("coordinator", "invite", "alice")
    assert grouped(coordinator.kit("any").fingerprint) in told
    kit = Kit.from_file(Path("alice.kit.toml"))
    assert (kit.name, kit.address) == ("alice", "moved.example.org:9092")
    assert kit.fingerprint == coordinator.kit("any").fingerprint


def test_invite_overwrites_no_other_file(coordinator: Deployment, here: Path) -> None:
    (here / "alice.kit.toml").write_text("mine")
    assert "move it away" in refused("coordinator", "invite", "alice")
    done("coordinator", "invite", "alice", "coordinator", "--out", "bob.toml")
    assert "no kit of 'bob'" in refused("coordinator", "invite", "bob", "--out", "bob.toml")
    assert (here / "alice.kit.toml").read_text() == "mine"
    assert "cannot name a node" in refused("coordinator", "invite", "Alice B")
    assert "visard coordinator init" in refused("coordinator", "invite", "alice", "elsewhere")


def test_join_asks_to_be_let_in(coordinator: Deployment, here: Path) -> None:
    policy = owner("alice")
    done("coordinator", "invite", "alice")
    before = tomllib.loads(Path(policy).read_text())
    told = done("client", "join", "alice.kit.toml", "--policy", policy)
    request = NodeRequest.from_file(here / "alice.request.toml")
    key = node_key_path(here / "alice.visard")
    assert request.node_key.encode() == public_key_pem(load_node_key(key))
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert (request.name, request.coordinator) == ("alice", coordinator.kit("any").fingerprint)
    for line in (grouped(request.coordinator), grouped(request.fingerprint), "visard client start --policy alice.toml"):
        assert line in told
    assert tomllib.loads(Path(policy).read_text()) == before | {"coordinator": "alice.kit.toml"}
    assert OwnerPolicy.from_file(Path(policy)).coordinator == str(here / "alice.kit.toml")
    shown = done("client", "init", "--data", "procedural:persons=4,images=2", "--out", "other.toml")
    assert request.peer_key not in shown, "every owner has a peer key of their own"


def test_joining_again_is_the_same_request(coordinator: Deployment, here: Path) -> None:
    request = invited("alice")
    files = [request, here / "alice.visard" / "node.key", here / "alice.toml"]
    before = [path.read_bytes() for path in files]
    told = done("client", "join", "alice.kit.toml", "--policy", "alice.toml")
    assert "is as it was" in told
    assert "replaced" not in told
    assert [path.read_bytes() for path in files] == before
    done("client", "join", "alice.kit.toml", "--policy", "alice.toml", "--out", "again.toml")
    assert NodeRequest.from_file(Path("again.toml")).fingerprint == NodeRequest.from_file(request).fingerprint


def test_another_coordinator_s_kit_replaces_the_former_and_says_so(coordinator: Deployment, here: Path) -> None:
    request = NodeRequest.from_file(invited("alice"))
    done("coordinator", "init", "second", "--address", "second.example.org:9092")
    done("coordinator", "invite", "alice", "second", "--out", "second.kit.toml")
    told = done("client", "join", "second.kit.toml", "--policy", "alice.toml")
    assert f"the former kit {here / 'alice.kit.toml'} (coordinator {grouped(request.coordinator)}) is replaced" in told
    second = Deployment.load(here / "second").kit("alice").fingerprint
    now = NodeRequest.from_file(Path("alice.request.toml"))
    assert (now.coordinator, now.node_key) == (second, request.node_key)
    assert OwnerPolicy.from_file(Path("alice.toml")).coordinator == str(here / "second.kit.toml")
    # Written over the former kit's file, it is another coordinator all the same.
    Path("second.kit.toml").unlink()
    done("coordinator", "invite", "alice", "--out", "second.kit.toml")
    told = done("client", "join", "second.kit.toml", "--policy", "alice.toml")
    assert f"the former coordinator ({grouped(second)}) is replaced" in told
    Path("second.kit.toml").unlink()
    assert "cannot be read any more" in done("client", "join", "alice.kit.toml", "--policy", "alice.toml")


def test_a_kit_elsewhere_is_named_by_its_whole_path(coordinator: Deployment, here: Path) -> None:
    (here / "mine").mkdir()
    done("client", "init", "--data", "procedural:persons=4,images=2", "--out", "mine/owner.toml")
    done("coordinator", "invite", "alice")
    done("client", "join", "alice.kit.toml", "--policy", "mine/owner.toml")
    assert tomllib.loads(Path("mine/owner.toml").read_text())["coordinator"] == str(here / "alice.kit.toml")


def test_what_cannot_join(coordinator: Deployment, here: Path) -> None:
    policy = owner("alice")
    done("coordinator", "invite", "alice")
    before = Path(policy).read_text()
    join = ("client", "join", "alice.kit.toml", "--policy", policy)
    (here / "alice.request.toml").write_text("mine")
    assert "name another with --out" in refused(*join)
    (here / "alice.request.toml").unlink()
    assert "visard coordinator invite" in refused("client", "join", "nothing.toml", "--policy", policy)
    assert "visard client init" in refused("client", "join", "alice.kit.toml", "--policy", "nobody.toml")
    assert Path(policy).read_text() == before
    (here / "alice.visard" / "node.key").chmod(0o644)
    assert "set it to 600" in refused(*join)
    (here / "alice.visard" / "node.key").write_text("a word")
    assert "no secret key in PEM" in refused(*join)
    (here / "alice.visard" / "node.key").unlink()
    (here / "alice.visard" / "peer.key").unlink()
    refused(*join, kind=PrivacyError)
    with pytest.raises(ConfigError, match="visard client join KIT"):
        load_node_key(node_key_path(here / "alice.visard"))


def test_a_policy_without_the_key_is_told_to_have_it(coordinator: Deployment) -> None:
    policy = Path(owner("alice"))
    policy.write_text(policy.read_text().replace('coordinator = ""', ""))
    done("coordinator", "invite", "alice")
    assert "no line coordinator =" in refused("client", "join", "alice.kit.toml", "--policy", str(policy))
    assert not Path("alice.request.toml").exists()


def test_nodes_are_let_in_and_listed(coordinator: Deployment, here: Path) -> None:
    assert "no node may connect yet" in done("coordinator", "nodes")
    asked = {name: NodeRequest.from_file(invited(name)) for name in ("alice", "bob")}
    told = done("coordinator", "nodes", *letting_in("alice.request.toml", "bob.request.toml"))
    registry = Registry(coordinator.registry_path)
    for name, request in asked.items():
        assert f"{name} is let in" in told
        assert grouped(request.fingerprint) in told
        assert registry.by_key(request.node_key.encode()) is not None
    assert f"fingerprint of the 2 approved nodes' peer keys:\n  {registry.peer_fingerprint()}" in told
    listed = done("coordinator", "nodes", "--peers", "peers.txt")
    assert "is let in" not in listed
    assert read_peer_keys(here / "peers.txt") == registry.peer_keys()
    pinned = done("client", "peers", "peers.txt", "--policy", "alice.toml", "--pin")
    assert registry.peer_fingerprint() in pinned
    told = done("coordinator", "nodes", "coordinator", "--revoke", "bob")
    assert "bob is revoked" in told
    assert [node.name for node in registry.nodes() if not node.revoked] == ["alice"]
    assert "approve two or more" in refused("coordinator", "nodes", "--peers", "peers.txt")


def test_a_node_that_lost_its_key_comes_back_with_another(coordinator: Deployment, here: Path) -> None:
    done("coordinator", "nodes", *letting_in(invited("alice")))
    (here / "alice.visard" / "node.key").rename(here / "lost.key")
    assert "no request of this node's key" in refused("client", "join", "alice.kit.toml", "--policy", "alice.toml")
    done("client", "join", "alice.kit.toml", "--policy", "alice.toml", "--out", "new.toml")
    assert "--revoke alice" in refused("coordinator", "nodes", *letting_in("new.toml"))
    done("coordinator", "nodes", "--revoke", "alice", *letting_in("new.toml"))
    assert [bool(node.revoked) for node in Registry(coordinator.registry_path).nodes()] == [True, False]
    assert "joins anew" in refused("coordinator", "nodes", *letting_in("alice.request.toml"))
    # Of a revocation and an approval both are done, or neither.
    before = coordinator.registry_path.read_bytes()
    refused("coordinator", "nodes", "--revoke", "alice", *letting_in("alice.request.toml"))
    refused("coordinator", "nodes", "--revoke", "alice", "--approve", "new.toml", "--fingerprint", "0" * 64)
    assert "give it alone" in refused("coordinator", "nodes", "--revoke", "alice", "--peers", "peers.txt")
    assert coordinator.registry_path.read_bytes() == before


def test_nobody_is_let_in_whose_fingerprint_was_not_compared(coordinator: Deployment, here: Path) -> None:
    alice, bob = invited("alice"), invited("bob")
    read = {name: done("client", "fingerprint", "--policy", f"{name}.toml").strip() for name in ("alice", "bob")}
    assert read["alice"] == grouped(NodeRequest.from_file(alice).fingerprint)
    nodes = ("coordinator", "nodes", "--approve", str(alice))
    assert "`visard client fingerprint` prints it" in refused(*nodes)
    assert "nobody is let in" in refused(*nodes, "--fingerprint", read["bob"])
    assert "64 hex digits" in refused(*nodes, "--fingerprint", read["alice"][:-1])
    assert "2 of --fingerprint and 1 of --approve" in refused(
        *nodes, "--fingerprint", read["alice"], "--fingerprint", read["bob"]
    )
    assert "1 of --fingerprint and 0 of --approve" in refused("coordinator", "nodes", "--fingerprint", read["bob"])
    both = (*nodes, "--approve", str(bob), "--fingerprint")
    refused(*both, read["bob"], "--fingerprint", read["alice"])
    assert not coordinator.registry_path.exists()
    told = done(*both, read["alice"].upper(), "--fingerprint", "".join(read["bob"].split()))
    assert f"alice asks to be let in. The fingerprint of its request:\n  {read['alice']}" in told
    assert "bob is let in" in told


@pytest.mark.parametrize(("typed", "let_in"), [("y", True), ("n", False), ("", False)])
def test_in_a_terminal_it_asks(coordinator: Deployment, here: Path, typed: str, let_in: bool) -> None:
    request = invited("alice")
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-m", "visard", "coordinator", "nodes", "--approve", str(request)]
        os.write(ours, f"{typed}\n".encode())
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "200"}
        ended = subprocess.run(command, stdin=theirs, capture_output=True, text=True, env=environment, timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert "did its owner read you the same by telephone? [y/N]" in ended.stdout
    assert grouped(NodeRequest.from_file(request).fingerprint) in ended.stdout
    assert ended.returncode == (0 if let_in else 1), ended.stderr
    assert coordinator.registry_path.exists() == let_in
    assert ("nobody is let in and nothing is changed" in ended.stderr) == (not let_in)


def test_requests_that_are_refused(coordinator: Deployment, here: Path) -> None:
    path = invited("alice")
    assert "'alice' is no node here" in refused("coordinator", "nodes", "--revoke", "alice")
    changed = path.read_text().replace('name = "alice"', 'name = "bob"')
    Path("changed.toml").write_text(changed)
    assert "its proof is wrong" in refused("coordinator", "nodes", "--approve", "changed.toml")
    assert "visard client join" in refused("coordinator", "nodes", "--approve", "nothing.toml")
    done("coordinator", "init", "second", *ADDRESS)
    told = refused("coordinator", "nodes", "second", "--approve", str(path))
    assert f"a request to the coordinator {grouped(coordinator.kit('any').fingerprint)}" in told
    # None is let in where one of several is refused.
    refused("coordinator", "nodes", "--approve", str(path), "--approve", "changed.toml")
    assert not coordinator.registry_path.exists()
    assert "visard coordinator init" in refused("coordinator", "nodes", "elsewhere")


def test_no_secret_is_told(coordinator: Deployment, here: Path) -> None:
    secrets = [coordinator.signing_key().private_bytes_raw().hex(), coordinator.key.read_text().splitlines()[1]]
    shown = [
        done("coordinator", "invite", "alice"),
        done("client", "join", "alice.kit.toml", "--policy", owner("alice")),
    ]
    shown.append(done("coordinator", "nodes", *letting_in("alice.request.toml")))
    shown.append(done("client", "fingerprint", "--policy", "alice.toml"))
    secrets.append((here / "alice.visard" / "node.key").read_text().splitlines()[1])
    secrets.append((here / "alice.visard" / "peer.key").read_bytes().hex())
    files = [path.read_text() for path in here.glob("*.toml")] + [coordinator.registry_path.read_text()]
    for text in (*shown, *files, (coordinator.folder / SETTINGS).read_text()):
        assert not [secret for secret in secrets if secret in text]


def test_further_names_are_in_the_certificate(here: Path) -> None:
    done("coordinator", "init", *ADDRESS, "--name-in-certificate", "10.0.0.7")
    found = x509.load_pem_x509_certificate((here / "coordinator" / "server.crt").read_bytes())
    assert names_of(found) == {"host.example.org", "10.0.0.7", "localhost", "127.0.0.1", "::1"}
