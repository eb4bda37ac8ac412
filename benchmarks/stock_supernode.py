"""Seconds a round with Flower's own processes: `flower-superlink`, `flower-supernode` and `flwr run`, TLS and node keys on.

    python benchmarks/stock_supernode.py [--nodes 2] [--parameters 1000000] [--rounds 10]

The apps are Visard's, the faces are few and drawn, and the networks are small in arithmetic, so that what is seen is what
the processes cost. Every process is a real one, on loopback, with its own FLWR_HOME in a temporary folder. Prints the
seconds of each round, the median, and the range.
"""

import argparse
import contextlib
import datetime
import ipaddress
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client.policy import discriminator_size
from common.fields import Scalar
from common.flower import ENVIRONMENT
from common.sections import ModelConfig

Start = Callable[[Sequence[str], Path, dict[str, str]], "subprocess.Popen[bytes]"]

ROOT = Path(__file__).parents[1]
PERSONS, IMAGES = 20, 2
# Little arithmetic: a round's seconds are then those of the processes. 28 x 28 pixels, one channel.
SMALL: dict[str, Scalar] = {
    "image-size": 28,
    "channels": 1,
    "discriminator": "mlp",
    "generator-width": 8,
    "privacy-model": "local",
    "epsilon": 10.0,
    "sample-rate": 0.1,
    "expected-batch": 2.0,
}


@dataclass(frozen=True)
class StockFlower:
    """A SuperLink and SuperNodes that are up. Node i has its policy, its ledger and its log in folder/node-i."""

    folder: Path
    nodes: int
    environment: dict[str, str]

    def run(self, options: Mapping[str, Scalar], timeout_s: float) -> "subprocess.CompletedProcess[str]":
        """`flwr run . --stream` of this project's app, to its end. options: of the run, over SMALL.

        Raises TimeoutExpired after timeout_s; the run is then still going and ends with the SuperLink.
        """
        config = {**SMALL, "min-clients": self.nodes, "runs-dir": str(self.folder / "runs"), **options}
        words = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        return subprocess.run(
            ["flwr", "run", str(ROOT), "here", "--stream", "--run-config", words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def logs(self) -> str:
        """The end of every process' log, for a message of failure."""
        paths = sorted(self.folder.rglob("*.log"))
        return "\n".join(f"== {path.relative_to(self.folder)}\n{path.read_text()[-2000:]}" for path in paths)


@contextlib.contextmanager
def stock_flower(folder: Path, nodes: int) -> Iterator[StockFlower]:
    """Start a SuperLink with TLS and node authentication and `nodes` SuperNodes of known keys; end them all afterwards.

    folder: an empty one, for all that they write. Each node's owner has PERSONS drawn persons. Raises RuntimeError where a
    command fails or the SuperLink does not come up, TimeoutExpired where a command does not end.
    """
    ports = _free_ports(nodes + 1)
    address = f"127.0.0.1:{ports[0]}"
    certificate, key = _certificate(folder)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("FLWR_")},
        **ENVIRONMENT,
        "FLWR_HOME": str(folder / "flower"),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        # Flower starts its helpers by name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    (folder / "flower").mkdir()
    (folder / "flower" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\nroot-certificates = "{certificate}"\n'
    )
    flower = StockFlower(folder, nodes, environment)
    with _processes(folder) as start:
        link = [
            "flower-superlink",
            "--host",
            "127.0.0.1",
            "--port",
            str(ports[0]),
            "--ssl-ca-certfile",
            str(certificate),
        ]
        link += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--enable-supernode-auth"]
        link += ["--disable-runtime-dependency-installation"]
        superlink = start(link, folder, environment)
        deadline = time.monotonic() + 120
        while not _answers(ports[0]):
            if superlink.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the SuperLink does not come up\n{flower.logs()}")
            time.sleep(0.1)
        for number in range(nodes):
            home = folder / f"node-{number}"
            home.mkdir()
            own = {**environment, "FLWR_HOME": str(home / "flower")}
            faces = f"procedural:persons={PERSONS},images={IMAGES},first={PERSONS * number}"
            init = [sys.executable, "-m", "visard", "client", "init", "--data", faces, "--out", "owner.toml"]
            _command(init, home, {**own, "PYTHONPATH": str(ROOT)})
            _command(["flwr", "supernode", "register", str(_node_key(home)), "here"], home, environment)
            node = ["flower-supernode", "--superlink", address, "--root-certificates", str(certificate)]
            node += ["--auth-supernode-private-key", "node.key", "--port", str(ports[1 + number])]
            node += ["--node-config", 'policy="owner.toml"']
            start(node, home, own)
        yield flower


def stock_round_seconds(nodes: int, parameters: int, rounds: int) -> list[float]:
    """Seconds of each of `rounds` adversarial rounds with `nodes` SuperNodes, as the coordinator notes them.

    The discriminator is a perceptron of about `parameters` parameters, sent down and up once a round by each node. Raises
    RuntimeError where the run does not get to its end.
    """

    def size(width: int) -> int:
        return discriminator_size(
            ModelConfig(image_size=28, channels=1, discriminator="mlp", discriminator_width=width)
        )

    width = min(range(1, 200), key=lambda w: abs(size(w) - parameters))
    options: dict[str, Scalar] = {"discriminator-width": width, "moment-rounds": 0, "num-rounds": rounds}
    with tempfile.TemporaryDirectory() as folder, stock_flower(Path(folder), nodes) as flower:
        done = flower.run(options, timeout_s=120 + 60 * rounds)
        lines = [path.read_text().splitlines() for path in (Path(folder) / "runs").glob("*/rounds.jsonl")]
        if len(lines) != 1 or len(lines[0]) != rounds:
            raise RuntimeError(f"the run did not get to its end\n{done.stdout[-3000:]}{done.stderr}{flower.logs()}")
        return [json.loads(line)["seconds"] for line in lines[0]]


@contextlib.contextmanager
def _processes(folder: Path) -> Iterator[Start]:
    """Start processes that log into their working folder; at the end all of them, and all that they started, are killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(command: Sequence[str], where: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        with (where / f"{command[0]}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    command,
                    cwd=where,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return started[-1]

    try:
        yield start
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            # A SuperNode leaves its ClientApps behind; they are in its group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _kill_what_is_left(folder)


def _kill_what_is_left(folder: Path) -> None:
    """A SuperLink's helper has a session of its own: it and its children are known by their FLWR_HOME in `folder`.

    Looks into /proc; where there is none (macOS) they are left to end by themselves, which they do once they find their
    parent gone.
    """
    mark = f"FLWR_HOME={folder}{os.sep}".encode()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if mark in _read(path)]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    raise RuntimeError(f"processes {left} with a FLWR_HOME in {folder} cannot be killed: end them by hand")


def _read(path: Path) -> bytes:
    """A file of /proc; nothing where its process is over or somebody else's."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _command(command: Sequence[str], where: Path, environment: dict[str, str]) -> None:
    """Run a short command to its end; its output comes with the error."""
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}\n{done.stdout}{done.stderr}")


def _free_ports(count: int) -> list[int]:
    """So many ports of the loopback interface that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, for a day, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "server.crt", folder / "server.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    _write_key(paths[1], key, serialization.PrivateFormat.PKCS8)
    return paths


def _node_key(home: Path) -> Path:
    """A key pair as `ssh-keygen -t ecdsa -b 384` makes it: `node.key`, and the public half, whose path is returned."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_key(home / "node.key", key, serialization.PrivateFormat.OpenSSH)
    public = home / "node.key.pub"
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    return public


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey, kind: serialization.PrivateFormat) -> None:
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--parameters", type=int, default=1_000_000, help="of the discriminator, about")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    seconds = stock_round_seconds(options.nodes, options.parameters, options.rounds)
    print(*(f"{each:.1f}" for each in seconds), "s")
    print(f"median {statistics.median(seconds):.2f} s a round, {min(seconds):.2f} to {max(seconds):.2f}")


if __name__ == "__main__":
    main()
