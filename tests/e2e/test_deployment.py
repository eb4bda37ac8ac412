"""A whole deployment on loopback, through `visard` commands: from the first `init` to the generator, and who is kept out."""

import json
import signal
from pathlib import Path

import pytest

from common.privacy.ledger_report import verify_ledger
from tests.coordinator_machine import wait_for
from tests.e2e import test_cli
from tests.e2e.deployed import SMALL, Made, deployment, drawn, options, visard
from tests.e2e.test_cli import Terminal, assert_one_line
from tests.unit.test_faces_real_data import at_hand

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

run = test_cli.run

DISTRIBUTED = {"privacy-model": "distributed", "peers": "3", "survivors": "3", "round-timeout-s": "200"}


def assert_charged_once_a_round(made: Made, name: str) -> None:
    rounds = {(made.run_id(name), line["round"]) for line in made.rounds(name)}
    for owner in made.owners:
        assert made.charged(owner) == dict.fromkeys(rounds, 1), owner
        report = verify_ledger(made.state_dir(owner))
        assert report.answered == report.rounds
        assert 0 < report.epsilon <= 10


@pytest.mark.slow
def test_three_owners_train_together(tmp_path: Path) -> None:
    """And what all the commands say meanwhile; stopped in every way on the way, the same commands go on."""
    recipe = {**SMALL, **DISTRIBUTED, "num-rounds": "24", "deal-rounds": "9"}
    with deployment(tmp_path, 3, recipe) as made:
        where = made.coordinator
        asked = options({key: value for key, value in recipe.items() if key != "min-clients"})
        assert "nothing would be refused" in made.visard(
            "client", "check", "demo", "--policy", made.policy("owner-0"), *asked
        )
        assert "never started" in made.visard("coordinator", "status", where, code=1)
        assert "no node was started" in made.visard("client", "status", "--policy", made.policy("owner-0"), code=1)

        coordinator = made.start_coordinator()
        coordinator.wait_until(lambda: made.status().get("state") == "waiting for clients", "waiting for clients")
        told = json.loads(made.visard("coordinator", "status", where, "--json"))
        assert (told["running"], told["stale"], told["connected"], told["approved"]) == (True, False, [], 3)
        assert told["pids"]["supervisor"] == coordinator.process.pid
        second = made.start_coordinator()
        assert second.wait() == 1
        assert f"a coordinator runs in {where} already, as process {coordinator.process.pid}" in second.told()

        nodes = {"owner-0": made.start_node("owner-0")}
        coordinator.wait_until(lambda: made.status()["connected"] == ["owner-0"], "the first node")
        twice = made.start_node("owner-0")
        assert twice.wait() == 1
        assert "one process for one ledger" in twice.told()
        nodes |= {owner: made.start_node(owner) for owner in ("owner-1", "owner-2")}
        coordinator.wait_until(lambda: made.rounds("small"), "a round")
        assert "connected, since" in made.visard("client", "status", "--policy", made.policy("owner-1"))
        assert "3 of 3 approved nodes: owner-0, owner-1, owner-2" in made.visard("coordinator", "status", where)

        # Stopped by its own command, while three nodes are at work.
        assert "stopped. Go on with: visard coordinator start" in made.visard("coordinator", "stop", where)
        assert coordinator.wait() == 128 + signal.SIGTERM
        assert "stopped; nothing is lost. Go on with: visard coordinator start" in coordinator.told()
        assert f"no coordinator runs in {where}" in made.visard("coordinator", "stop", where)
        assert "stopped" in made.visard("coordinator", "status", where, code=1)
        done = len(made.rounds("small"))
        assert 1 <= done < 25

        # Two nodes are stopped, one with Ctrl-C, and the coordinator waits for them.
        nodes["owner-0"].signal(signal.SIGTERM)
        nodes["owner-1"].signal(signal.SIGINT)
        for owner in ("owner-0", "owner-1"):
            assert nodes[owner].wait(30) == 0, nodes[owner].told()
            assert nodes[owner].told().endswith("stopped")
        coordinator = made.start_coordinator()
        coordinator.wait_until(lambda: made.status().get("connected") == ["owner-2"], "the node that was not stopped")
        assert made.status()["state"] == "waiting for clients"
        for owner in ("owner-0", "owner-1"):
            nodes[owner] = made.start_node(owner)
        coordinator.wait_until(lambda: len(made.rounds("small")) > done, "another round")
        coordinator.signal(signal.SIGINT)
        assert coordinator.wait() == 128 + signal.SIGINT
        assert len(made.rounds("small")) < 25
        made.wait_until_free()

        coordinator = made.start_coordinator()
        assert coordinator.wait() == 0, coordinator.log.read_text()
        assert "goes on with round" in coordinator.told()
        assert "small: done" in coordinator.told()
        assert [line["round"] for line in made.rounds("small")] == list(range(1, 26))
        assert {line["survivors"] for line in made.rounds("small")} == {3}
        assert_charged_once_a_round(made, "small")
        folder = made.run_folder("small")
        generator = (folder / "generator.safetensors").read_bytes()

        assert "complete" in made.visard("coordinator", "status", where)
        again = made.start_coordinator()
        assert again.wait() == 0
        assert "the run small is complete, and nothing is left to do" in again.told()
        assert (folder / "generator.safetensors").read_bytes() == generator
        assert_charged_once_a_round(made, "small")
        for node in nodes.values():
            assert node.process.poll() is None, "a node runs until it is stopped"
            node.signal(signal.SIGTERM)
            assert node.wait(30) == 0
        for path in tmp_path.glob("*.log"):
            said = path.read_text()
            assert "Traceback" not in said
            assert "PRIVATE KEY" not in said
        assert "not running" in made.visard("client", "status", "--policy", made.policy("owner-0"), code=1)


@pytest.mark.slow
def test_three_owners_of_photographs_of_real_people(tmp_path: Path) -> None:
    """The recipe orl, shortened, on its 40 persons."""
    photographs = at_hand("orl_faces")
    persons = sorted(path for path in photographs.iterdir() if path.is_dir())
    for number, person in enumerate(persons):
        share = tmp_path / f"owner-{number % 3}"
        share.mkdir(exist_ok=True)
        (share / person.name).symlink_to(person)
    shorter = {**DISTRIBUTED, "num-rounds": "6", "moment-steps": "20"}
    with deployment(
        tmp_path, 3, shorter, name="orl", recipe="orl", data=lambda number: str(tmp_path / f"owner-{number}")
    ) as made:
        made.start_nodes()
        coordinator = made.start_coordinator()
        assert coordinator.wait(500) == 0, coordinator.log.read_text()
        assert [line["round"] for line in made.rounds("orl")] == list(range(1, 8))
        assert_charged_once_a_round(made, "orl")
        assert (made.run_folder("orl") / "samples" / "final.png").exists()


@pytest.mark.slow
def test_who_is_kept_out(tmp_path: Path) -> None:
    """Before it is let in a node waits; afterwards it joins the run; revoked it is out; and impostors of either side stay out."""
    endless = {**SMALL, "privacy-model": "local", "num-rounds": "100000", "epsilon": "10", "straggler-wait-s": "1"}
    with deployment(tmp_path, 2, endless) as made:
        coordinator = made.start_coordinator()
        coordinator.wait_until(lambda: made.status().get("state") == "waiting for clients", "waiting for clients")
        made.start_nodes()
        coordinator.wait_until(lambda: made.rounds("small"), "a round")

        # Not let in yet: it waits, and says why.
        request = made.ask_to_be_let_in("late", drawn(7))
        late = made.start_node("late")
        late.wait_until(lambda: "this node's key is not approved here" in late.told(), "a refusal")
        assert "not approved here" in made.visard("client", "status", "--policy", made.policy("late"), code=1)
        assert made.status()["connected"] == ["owner-0", "owner-1"]
        assert made.charged("late") == {}
        assert "late is let in" in made.approve(request)
        coordinator.wait_until(lambda: "late" in made.status()["connected"], "the node that was let in")
        late.wait_until(lambda: made.charged("late"), "its first round")
        assert made.node_status("late")["connection"] == "connected"

        # Revoked: it is out of the next round, and the run goes on.
        assert "owner-0 is revoked" in made.visard("coordinator", "nodes", made.coordinator, "--revoke", "owner-0")
        coordinator.wait_until(lambda: made.status()["connected"] == ["late", "owner-1"], "the end of the revoked one")
        wait_for(lambda: "not approved here" in made.node_status("owner-0")["connection"], "the revoked one's word")
        rounds, charged = len(made.rounds("small")), made.charged("owner-0")
        coordinator.wait_until(lambda: len(made.rounds("small")) > rounds + 3, "rounds without it")
        assert made.charged("owner-0") == charged

        # Another coordinator at this address, first under another authority, then with its own key under the right one.
        other = tmp_path / "other"
        made.visard("coordinator", "init", other, "--address", made.address, *options(SMALL))
        made.visard("coordinator", "invite", "late", other, "--out", tmp_path / "other.kit.toml")
        own, others = ((tmp_path / f"{name}.kit.toml").read_text() for name in ("late", "other"))
        late.signal(signal.SIGTERM)
        assert late.wait(30) == 0
        (tmp_path / "late.kit.toml").write_text(others)
        lost = made.start_node("late")
        assert lost.wait() == 1
        assert "ConfigError: the machine at" in lost.told()
        assert "no certificate of the invitation's authority for that name" in lost.told()
        assert "Traceback" not in lost.told()

        key = {text: next(line for line in text.splitlines() if line.startswith("signing")) for text in (own, others)}
        (tmp_path / "late.kit.toml").write_text(own.replace(key[own], key[others]))
        charged = made.charged("late")
        deceived = made.start_node("late")
        deceived.wait_until(lambda: "is not signed with the coordinator's signing key" in deceived.told(), "a refusal")
        told = " ".join(made.visard("client", "status", "--policy", made.policy("late"), code=1).split())
        assert "refused: a message that is not signed with the coordinator's signing key" in told
        assert made.charged("late") == charged
        deceived.signal(signal.SIGTERM)
        assert deceived.wait(30) == 0
        coordinator.signal(signal.SIGHUP)
        assert coordinator.wait() == 128 + signal.SIGHUP


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator, another one, an owner who has not joined, and a request to the other one."""
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("here", "there"):
        visard("coordinator", "init", name, "--address", "127.0.0.1:20000", *options(SMALL), folder=folder)
    visard("client", "init", "--data", drawn(0), folder=folder)
    visard("client", "init", "--data", drawn(1), "--out", "guest.toml", folder=folder)
    visard("coordinator", "invite", "guest", "there", folder=folder)
    visard("client", "join", "guest.kit.toml", "--policy", "guest.toml", folder=folder)
    (folder / "junk.toml").write_text("name = [1]\n")
    (folder / "broken").mkdir()
    (folder / "broken/coordinator.toml").write_text(
        'address = "127.0.0.1:20000"\nlisten = "127.0.0.1:20000"\nnmae = "x"\n'
    )
    return folder


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("coordinator start nowhere", "there is no coordinator in nowhere: `visard coordinator init"),
        ("coordinator status nowhere", "there is no coordinator in nowhere"),
        ("coordinator stop nowhere", "there is no coordinator in nowhere"),
        ("coordinator start broken", "unknown key 'nmae': did you mean 'name'?"),
        ("coordinator init here --address 127.0.0.1:20000", "is there already and is not overwritten"),
        ("coordinator init new --address example.org", "write HOST:PORT"),
        ("coordinator init new --address 0.0.0.0:9092", "is no place that a node can dial"),
        ("coordinator init new --address a.org:1 --recipe dmeo", "did you mean 'demo'"),
        ("coordinator init new --address a.org:1 --sample-rate 2", "sample-rate = 2.0 is outside (0, 1]"),
        ("coordinator init new --address a.org:1 --name ../x", "../x"),
        ("coordinator init new --address a.org:1 --key k.pem", "give all three"),
        ("coordinator invite ../me here", "cannot name a node"),
        ("coordinator nodes here --approve nothing.toml", "nothing.toml"),
        ("coordinator nodes here --approve junk.toml", "junk.toml"),
        ("coordinator nodes here --approve guest.request.toml", "is a request to the coordinator"),
        ("coordinator nodes here --revoke nobody", "'nobody' is no node here"),
        ("coordinator nodes here --peers peers.txt", "approve two or more"),
        ("client join nothing.toml", "nothing.toml"),
        ("client join junk.toml", "junk.toml"),
        ("client join guest.kit.toml --policy nothing.toml", "nothing.toml"),
        ("client start", "names no coordinator: get an invitation from its operators"),
        ("client start --policy nothing.toml", "visard client init"),
        ("client status --policy nothing.toml", "visard client init"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    run: Terminal, folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, told: str
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(path for path in folder.rglob("*") if path.suffix != ".lock")
    assert_one_line(run(*command.split()), "ConfigError", told)
    assert sorted(path for path in folder.rglob("*") if path.suffix != ".lock") == before, "it left something behind"


@pytest.mark.parametrize(
    "command",
    ["coordinator init new", "coordinator start a b", "coordinator start demo --min-clients 2", "client join"],
)
def test_a_wrong_option_is_a_usage_error(run: Terminal, command: str) -> None:
    code, out, err = run(*command.split())
    assert code == 2
    assert "Usage" in out + err
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_a_port_that_is_taken_is_told_once(tmp_path: Path) -> None:
    with deployment(tmp_path, 2, {**SMALL, "privacy-model": "local"}) as made:
        first = made.start_coordinator()
        first.wait_until(lambda: made.status().get("state") == "waiting for clients", "the first coordinator")
        made.visard("coordinator", "init", tmp_path / "second", "--address", made.address, *options(SMALL))
        second = made.start("-m", "visard", "coordinator", "start", tmp_path / "second", name="second")
        assert second.wait() == 1
        assert f"ConfigError: cannot listen on {made.address}" in second.told()
        assert second.told().count("cannot listen") == 1, "it was started anew"
        assert "Traceback" not in second.told()
        for name in ("signing.key", "ca.key", "server.key"):
            assert (made.coordinator / name).stat().st_mode & 0o777 == 0o600
        assert made.coordinator.stat().st_mode & 0o777 == 0o700
        # An end that nobody asked for: the worker follows its supervisor, and the port is free.
        first.kill()
        made.wait_until_free()
        third = made.start("-m", "visard", "coordinator", "start", tmp_path / "second", name="second")
        third.wait_until(lambda: f"listening on {made.address}" in third.told(), "its turn")
