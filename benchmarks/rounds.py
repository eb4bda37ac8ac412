"""Seconds of a round beyond the arithmetic: coordinator and warm nodes, each a process, TLS, node keys and seals on.

    python benchmarks/rounds.py [--nodes 3 10] [--parameters 1000000] [--rounds 30] [--stock]

Each round sends every node so many float32 parameters and gets as many back; the nodes answer with what they were sent, so
that nothing is computed. What is timed is `server.exchange`'s own round: seal, send, wait, check. --stock runs Flower's
SuperLink and two of its SuperNodes, with TLS and node keys too, in the same run beside it (`benchmarks/stock_supernode.py`:
whole rounds of a run with next to no faces, as `flwr run` does them). Bytes are those of the HTTP bodies. Prints a table and
appends to benchmarks/results/rounds.jsonl.
"""

import argparse
import datetime
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from settings import keep

from client.node import run_node
from client.node_status import NodeStatus
from common.kit import Kit, NodeRequest
from common.sections import TrainingConfig
from server.deployment import Deployment, create
from server.exchange import Exchange
from server.registry import Registry
from server.superlink import SuperLinkGrid, superlink_grid

RESULTS = Path(__file__).parent / "results" / "rounds.jsonl"
KIT, KEY = "kit.toml", "node.key"


def answer_nothing_but(folder: Path) -> None:
    """A node that answers with what it is sent, until it is stopped."""
    app = ClientApp()

    @app.train()
    def train(message: Message, _context: object) -> Message:
        return Message(message.content, reply_to=message)

    kit = Kit.from_file(folder / KIT)
    key = serialization.load_pem_private_key((folder / KEY).read_bytes(), None)
    run_node(kit, key, app, {}, NodeStatus(folder, kit.address))  # type: ignore[arg-type]


@contextmanager
def federation(folder: Path, nodes: int) -> Iterator[SuperLinkGrid]:
    """A coordinator in this process and `nodes` processes that are connected to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    create(Deployment(folder=folder / "coordinator", address=address, listen=address))
    deployment = Deployment.load(folder / "coordinator")
    registry = Registry(deployment.registry_path)
    with ExitStack() as stack:
        limit = deployment.max_message_mib << 20
        grid = stack.enter_context(
            superlink_grid(address, deployment.certificate, deployment.key, registry, deployment.signing_key(), limit)
        )
        for number in range(nodes):
            own = folder / f"node-{number}"
            own.mkdir()
            key, kit = ec.generate_private_key(ec.SECP256R1()), deployment.kit(f"node-{number}")
            pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            (own / KEY).write_bytes(key.private_bytes(*pem))
            kit.write(own / KIT)
            registry.approve(NodeRequest.create(kit, key, os.urandom(32).hex()))
            process = subprocess.Popen([sys.executable, __file__, "--node", str(own)])
            stack.callback(process.wait)
            stack.callback(process.terminate)
        while len(grid.get_node_ids()) < nodes:
            time.sleep(0.05)
        yield grid


def time_rounds(grid: SuperLinkGrid, parameters: int, rounds: int) -> list[float]:
    """Seconds of each round, and one before that is not counted."""
    exchange = Exchange(grid, TrainingConfig())
    seconds = []
    for number in range(rounds + 1):
        vector = np.random.default_rng(number).standard_normal(parameters, dtype=np.float32)
        array = Array(dtype="float32", shape=vector.shape, stype="visard.raw", data=vector.tobytes())
        content = RecordDict({"arrays": ArrayRecord({"vector": array}), "round": ConfigRecord({"number": number})})
        began = time.perf_counter()
        answers = list(exchange.ask(dict.fromkeys(grid.get_node_ids(), content), number))
        seconds.append(time.perf_counter() - began)
        for _, back in answers:
            if back.array_records["arrays"]["vector"].data != array.data:
                raise SystemExit("an answer differs from what was sent")
        if len(answers) != len(grid.get_node_ids()):
            raise SystemExit(f"{len(answers)} nodes answered")
    return seconds[1:]


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--stock", action="store_true", help="Flower's own SuperNodes beside it: minutes")
    parser.add_argument("--node", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.node:
        answer_nothing_but(given.node)
        return
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "parameters": given.parameters,
    }
    rows = []
    for nodes in given.nodes:
        with tempfile.TemporaryDirectory() as folder, federation(Path(folder), nodes) as grid:
            before = grid.traffic
            seconds = time_rounds(grid, given.parameters, given.rounds)
            came, went = (
                (after - first) / (given.rounds + 1) / nodes for after, first in zip(grid.traffic, before, strict=True)
            )
        rows.append({"node": "visard", "nodes": nodes, "seconds": seconds, "bytes_up": came, "bytes_down": went})
    if given.stock:
        from stock_supernode import stock_round_seconds

        rows.append({"node": "flower-supernode", "nodes": 2, "seconds": stock_round_seconds(2, given.parameters, 5)})
    print(f"{'node':18} {'nodes':>5} {'median s':>9} {'90 % s':>8} {'bytes up, down a node and round'}")
    for row in rows:
        seconds = row.pop("seconds")
        row["median_s"] = round(statistics.median(seconds), 4)
        row["p90_s"] = round(float(np.quantile(seconds, 0.9)), 4)
        row["rounds"] = len(seconds)
        size = f"{row['bytes_up']:,.0f} {row['bytes_down']:,.0f}" if "bytes_up" in row else ""
        print(f"{row['node']:18} {row['nodes']:5} {row['median_s']:9.3f} {row['p90_s']:8.3f} {size}")
        keep(RESULTS, about | row)


if __name__ == "__main__":
    main()
