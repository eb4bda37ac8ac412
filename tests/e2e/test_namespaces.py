"""Machines of their own: the coordinator and each node in a network namespace, with an address and a cable each.

Needs root and `ip netns`; nothing is left of it, and the machine's own network is not touched: the bridge between them is in
a namespace too.
"""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.coordinator_machine import wait_for
from tests.e2e.deployed import SMALL, deployment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

FLEET = ("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages")
COORDINATOR, OTHER_ADDRESS, PORT = "10.77.0.1", "10.77.0.99", 9092

# What a stranger's machine sees: the status of every path of Flower's SuperLink, of the node's own and of others.
STRANGER = """
import json, sys
import httpx
import ssl
from tests.integration.test_fleet import OURS, flowers_paths

found = {}
with httpx.Client(verify=ssl.create_default_context(cafile=sys.argv[2]), base_url=f"https://{sys.argv[1]}", timeout=60) as client:
    for path in sorted(flowers_paths() | set(OURS) | {"/", "/docs", "/metrics"}):
        for method in ("POST", "GET"):
            found[f"{method} {path}"] = client.request(method, path, content=b"x" if method == "POST" else None).status_code
print(json.dumps(found))
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


class Network:
    """A bridge and the machines on it, by name."""

    def __init__(self) -> None:
        self._prefix = f"visard-{os.getpid()}-"
        self._made: list[str] = []

    def begin(self) -> None:
        """Make the bridge. Whoever calls it sees to it that `remove` is called."""
        self._add("bridge")
        ip("-n", self.space("bridge"), "link", "add", "br0", "type", "bridge")
        ip("-n", self.space("bridge"), "link", "set", "br0", "up")

    def space(self, name: str) -> str:
        return self._prefix + name

    def run_in(self, name: str) -> list[str]:
        """What is put before a command."""
        return ["ip", "netns", "exec", self.space(name)]

    def add(self, name: str, *addresses: str) -> None:
        """Another machine, with a cable to the bridge."""
        self._add(name)
        space, bridge, cable = self.space(name), self.space("bridge"), f"to{len(self._made)}"
        ip("-n", bridge, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("-n", bridge, "link", "set", cable, "master", "br0", "up")
        for address in addresses:
            ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")

    def plug(self, name: str, state: str) -> None:
        """Put the cable in, `up`, or take it out, `down`."""
        ip("-n", self.space(name), "link", "set", "eth0", state)

    def remove(self) -> None:
        for space in self._made:
            with contextlib.suppress(subprocess.SubprocessError):
                ip("netns", "delete", space)

    def _add(self, name: str) -> None:
        ip("netns", "add", self.space(name))
        self._made.append(self.space(name))
        ip("-n", self.space(name), "link", "set", "lo", "up")


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and the command `ip` for network namespaces")
    with contextlib.ExitStack() as stack:
        made = Network()
        stack.callback(made.remove)
        try:
            made.begin()
            made.add("coordinator", COORDINATOR, OTHER_ADDRESS)
            for number in range(3):
                made.add(f"owner-{number}", f"10.77.0.{10 + number}")
            made.add("stranger", "10.77.0.66")
        except subprocess.SubprocessError as error:
            pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}")
        yield made


@pytest.mark.slow
def test_machines_of_their_own(network: Network, tmp_path: Path) -> None:
    run = {**SMALL, "privacy-model": "distributed", "peers": "3", "survivors": "3", "num-rounds": "9"}
    run |= {"round-timeout-s": "200"}
    with deployment(tmp_path, 3, run, address=f"{COORDINATOR}:{PORT}") as made:
        assert f'listen = "0.0.0.0:{PORT}"' in (made.coordinator / "coordinator.toml").read_text()
        made.prefixes = {owner: network.run_in(owner) for owner in made.owners} | {"": network.run_in("coordinator")}
        coordinator = made.start_coordinator()
        coordinator.wait_until(lambda: made.status().get("state") == "waiting for clients", "waiting for clients")

        # Under a name that is not in the certificate it is another machine.
        kit = tmp_path / "owner-2.kit.toml"
        right = kit.read_text()
        kit.write_text(right.replace(f"{COORDINATOR}:{PORT}", f"{OTHER_ADDRESS}:{PORT}"))
        misled = made.start_node("owner-2")
        assert misled.wait() == 1
        assert (
            f"the machine at {OTHER_ADDRESS}:{PORT} has no certificate of the invitation's authority" in misled.told()
        )
        kit.write_text(right)

        nodes = made.start_nodes()
        coordinator.wait_until(lambda: len(made.rounds("small")) >= 2, "two rounds")
        pid = nodes["owner-0"].process.pid
        network.plug("owner-0", "down")
        unplugged = time.monotonic()
        asked = ["-c", STRANGER, f"{COORDINATOR}:{PORT}", made.coordinator / "ca.crt"]
        stranger = made.start(*asked, prefix=network.run_in("stranger"), name="stranger")
        assert stranger.wait() == 0, stranger.log.read_text()
        statuses = json.loads(stranger.log.read_text().splitlines()[-1])
        keyed = {f"POST /v1/fleet/{name}" for name in FLEET}
        assert keyed <= set(statuses)
        assert {path: status for path, status in statuses.items() if status != 403} == dict.fromkeys(keyed, 401)
        assert len(statuses) > 100, "the routes of Control and Runtime are among them"

        # A cable that was out for some seconds: the same process is back by itself, and no round is lost.
        time.sleep(max(0.0, 6.0 - (time.monotonic() - unplugged)))
        done = len(made.rounds("small"))
        assert done < 10, "nothing was left to do without it"
        network.plug("owner-0", "up")
        assert coordinator.wait() == 0, coordinator.log.read_text()
        assert nodes["owner-0"].process.pid == pid
        assert nodes["owner-0"].process.poll() is None
        assert [line["round"] for line in made.rounds("small")] == list(range(1, 11))
        assert {line.get("survivors") for line in made.rounds("small")} == {3}
        run_id = made.run_id("small")
        for owner in made.owners:
            assert made.charged(owner) == {(run_id, number): 1 for number in range(1, 11)}
        wait_for(
            lambda: "no connection" in made.node_status("owner-1")["connection"], "the nodes' word that it is gone"
        )
