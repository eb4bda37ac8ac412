"""local, distributed and central at one epsilon: noise on the mean update, quality, bytes, and seconds.

    python benchmarks/distributed.py --data FOLDER [--part noise quality seconds masks] [--model ...] [--clients 2 5 10 20]
                                     [--epsilon 10] [--seed 0] [--picture docs/distributed.png]

The recipe mnist (FOLDER holds its four IDX files) with the real apps; all digits together, the rate and the expected batch
are the same for any number of clients K.

noise    50 rounds whose rate draws nobody, so that a released mean is noise alone: its standard deviation over central's,
         measured and computed. Bytes of one client, as serialised: its answer to a round over 4 d; its part in opening a
         sum; and, up and down, what the keys of all these rounds take.
quality  a shortened run: accuracy of a CNN trained on generated digits and tested on the real test set.
seconds  rounds of such a run, all clients in turn on one thread. CPU seconds too: others may use the machine.
masks    each part of a secure sum of a million parameters and ten clients, all clients together on one thread.

Appends a JSON line each to benchmarks/results/distributed.jsonl, leaves out what is there, and prints all.
"""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product, repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_to_proto
from matplotlib.figure import Figure
from settings import ADVERSARIAL, keep

from client.app import app as shipped_client_app
from client.secure_sum import SecureSum
from common.applications.generate import TrainedGenerator
from common.config import RunConfig
from common.evaluation.utility import synthetic_accuracy
from common.faces import load_faces
from common.fields import Scalar
from common.messages import Stage
from common.models.discriminators import discriminator_of
from common.models.flat import num_parameters
from common.privacy.masks import fingerprint
from common.privacy.planner import with_noise
from common.privacy.randomness import SecureRandom
from common.privacy.units import PrivacyModel
from common.secure_messages import DealRequest, lattice_for
from server.checkpoint import CoordinatorState
from server.records import epsilon_so_far
from server.secure_sum import MaskedRound, SumDeal
from simulations.recipe import load_recipe
from simulations.simulate import prepare, simulate

RESULTS = Path(__file__).parent / "results" / "distributed.jsonl"
MODELS = ("central", "distributed", "local")
SYNTHETIC_IMAGES = 10_000
# Of all clients together: 60,000 digits at the recipe's rate, 0.03.
BATCH = 1800.0
# A quarter of the recipe's generator steps.
SHORT: dict[str, Scalar] = {"moment-steps": 300, "moment-batch": 250, "num-rounds": 20}
# Over epsilon: the moment release takes a like part of any budget, and the recipe's of 10.
MOMENT_NOISE = 15.0
WIDE, WIDE_CLIENTS, WIDE_ROUNDS = 162, 10, 5
CHANGES: dict[str, dict[str, Scalar]] = {
    # In 50 rounds one of the digits is drawn with probability 3e-6.
    "noise": {"sample-rate": 1e-12, "num-rounds": 50, "moment-rounds": 0, "discriminator-steps": 1000},
    "quality": {},
    "seconds": {"num-rounds": 8, "moment-rounds": 0},
    "masks": {"discriminator-width": WIDE},
}
COLUMNS = {
    "noise": ("measured", "computed", "up_round_over_4d", "up_opening", "up_keys", "down_keys"),
    "quality": ("accuracy", "epsilon_rdp", "epsilon_prv", "noise_multiplier"),
    "seconds": ("seconds_round", "cpu_seconds_round"),
    "masks": ("parameters", "seconds"),
}

Row = dict[str, Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Cell:
    """What one line is about."""

    part: str
    model: str
    clients: int
    epsilon: float
    seed: int

    def config(self, data: str) -> RunConfig:
        """Its run, with the noise of the shortened one."""
        options: dict[str, Scalar] = {
            **ADVERSARIAL,
            **SHORT,
            "data": data,
            "privacy-model": self.model,
            "num-clients": self.clients,
            "expected-batch": BATCH / self.clients,
            "epsilon": self.epsilon,
            "moment-noise-multiplier": MOMENT_NOISE / self.epsilon,
            "seed": self.seed,
        }
        sigma = with_noise(load_recipe("mnist", options)).privacy.noise_multiplier
        return with_noise(load_recipe("mnist", {**options, "noise-multiplier": sigma, **CHANGES[self.part]}))


class Metered(ClientApp):
    """The shipped ClientApp. up, down: serialised bytes of all clients by kind of message."""

    def __init__(self) -> None:
        super().__init__()
        self.up: Counter[str] = Counter()
        self.down: Counter[str] = Counter()

    def __call__(self, message: Message, context: Context) -> Message:
        """As shipped."""
        kind = next(name for name in message.content if name not in ("arrays", "witness"))
        reply = shipped_client_app(message, context)
        self.down[kind] += size_of(message.content)
        self.up[kind] += size_of(reply.content)
        return reply


def size_of(content: RecordDict) -> int:
    """Bytes of a message's content on the wire."""
    return len(recorddict_to_proto(content).SerializeToString())


class Watch:
    """An observer. released: the mean of each round; wall, cpu: seconds of each."""

    def __init__(self) -> None:
        self.released: list[np.ndarray] = []
        self.wall: list[float] = []
        self.cpu = [time.process_time()]

    def fit_stepped(self, state: CoordinatorState) -> None:
        """Not a round."""
        self.cpu[-1] = time.process_time()

    def round_ended(self, state: CoordinatorState) -> None:
        """Keep the round."""
        if state.released is not None:
            self.released.append(state.released[1].numpy().astype(np.float64))
        self.wall.append(state.last["seconds"])
        self.cpu.append(time.process_time())


def trained(config: RunConfig, directory: Path, app: ClientApp = shipped_client_app) -> tuple[Row, Watch]:
    """Run to the end. The first round, before which keys are dealt, is not among the seconds."""
    state, digits = prepare(directory, config)
    watch, first = Watch(), config.moments.moment_rounds + 1
    outcome = simulate(directory, state, digits, [watch], app)
    row = {
        "noise_shares": config.privacy.noise_shares if config.privacy.peers else None,
        "noise_multiplier": round(config.privacy.noise_multiplier, 4),
        "rounds": state.next_round - 1,
        "epsilon_rdp": epsilon_so_far(state),
        "epsilon_prv": round(max(outcome.ledgers)[1], 3),
        "seconds_round": round(statistics.median(watch.wall[first:]), 3),
        "cpu_seconds_round": round(statistics.median(np.diff(watch.cpu)[first:]), 3),
    }
    return row, watch


def computed_noise(config: RunConfig) -> float:
    """Standard deviation of a coordinate of the mean update over central's, where all clients answer."""
    privacy, clients = config.privacy, config.simulation.num_clients
    if privacy.privacy_model is not PrivacyModel.DISTRIBUTED:
        return 1.0 if privacy.privacy_model is PrivacyModel.CENTRAL else math.sqrt(clients)
    dimension = num_parameters(discriminator_of(config.model))
    lattice = lattice_for(privacy, Stage.GRADIENTS, privacy.noise_multiplier, dimension)
    return lattice.noise_deviation(clients) / (privacy.noise_multiplier * privacy.max_grad_norm)


def noise_row(config: RunConfig, directory: Path) -> Row:
    """Noise on the mean update, and the bytes of a client's messages."""
    app, clients = Metered(), config.simulation.num_clients
    run, watch = trained(config, directory, app)
    released = np.stack(watch.released)
    central = config.privacy.noise_multiplier * config.privacy.max_grad_norm / BATCH
    measured = float(np.sqrt(np.square(released).mean())) / central
    keys = ("secure_key_request", "secure_deal_request", "secure_confirm_request")
    return {
        **run,
        "parameters": released.shape[1],
        "measured": round(measured, 4),
        "standard_error": round(measured / math.sqrt(2 * released.size), 4),
        "computed": round(computed_noise(config), 4),
        "up_round_over_4d": round(app.up["instructions"] / clients / len(released) / (4 * released.shape[1]), 4),
        "up_opening": round(app.up["secure_unmask_request"] / clients / len(released)),
        "up_keys": round(sum(app.up[kind] for kind in keys) / clients),
        "down_keys": round(sum(app.down[kind] for kind in keys) / clients),
    }


def quality_row(config: RunConfig, directory: Path) -> Row:
    """A shortened run, and what its images are good for."""
    run, _ = trained(config, directory)
    images, labels = TrainedGenerator.load(directory).draw(SYNTHETIC_IMAGES, seed=1)
    real = load_faces(config.simulation, config.model.image_size, config.model.channels, split="test")
    tensors = [torch.from_numpy(array) for array in (images, labels, real.images, real.labels)]
    return {**run, "accuracy": round(100 * synthetic_accuracy(*tensors, seed=0), 2)}


def seconds_row(config: RunConfig, directory: Path) -> Row:
    """Adversarial rounds alone."""
    return trained(config, directory)[0]


def masks_row(config: RunConfig, directory: Path) -> Row:
    """Rounds without learning: the two halves of the secure sum themselves."""
    privacy, clients, taken = config.privacy, config.simulation.num_clients, dict[str, list[float]]()

    def timed(name: str, act: Callable[..., Result], *given: Iterable[Any]) -> list[Result]:
        began = time.perf_counter()
        results = list(map(act, *given))
        taken.setdefault(name, []).append(time.perf_counter() - began)
        return results

    dimension, run_id = num_parameters(discriminator_of(config.model)), "0" * 32
    lattice = lattice_for(privacy, Stage.GRADIENTS, privacy.noise_multiplier, dimension)
    totals = torch.randn(clients, dimension, generator=torch.Generator().manual_seed(config.training.seed)) / 1000
    keys = {key.public_key().public_bytes_raw(): key for key in (X25519PrivateKey.generate() for _ in range(clients))}
    peers = tuple(sorted(keys))
    sums = [SecureSum(directory / str(i), keys[peer], fingerprint(peers)) for i, peer in enumerate(peers)]
    terms = DealRequest(run_id, 1, 1, config.training.deal_rounds, peers, privacy.survivors, privacy.colluders)
    deal = SumDeal(terms)
    for dealt in timed("deal", SecureSum.deal, sums, repeat(terms)):
        deal.add_dealt(dealt)
    deal.close_dealing()
    for seen in timed("confirm", SecureSum.confirm, sums, [deal.confirm_request(place) for place in deal.dealers]):
        deal.add_confirmed(seen)
    deal.close_confirming()
    tags = [deal.mask_request(place, first=True).confirmations for place in deal.dealers]
    for server_round in range(1, 2 * WIDE_ROUNDS + 1):
        left = privacy.survivors if server_round > WIDE_ROUNDS else clients
        given = timed("noise shares", lattice.add_noise_share, totals, [SecureRandom() for _ in sums])
        masked = timed("masks", SecureSum.mask, sums, repeat(run_id), repeat(server_round), repeat(1), tags, given)
        opening = MaskedRound(deal, server_round, dimension)
        for place, vector in enumerate(masked[:left], 1):
            opening.add(place, vector)
        for answer in timed("shares to open", SecureSum.unmask, sums[:left], repeat(opening.close())):
            opening.add_unmasked(answer)
        [total] = timed(f"opening, {clients - left} dropped", MaskedRound.total, [opening])
        if not np.array_equal(total, np.sum(given[:left], axis=0, dtype=np.uint32)):
            raise SystemExit("the sum that was opened is wrong")
    seconds = {name: round(statistics.median(times), 4) for name, times in taken.items()}
    return {
        "parameters": dimension,
        "deal_rounds": terms.rounds,
        "noise_shares": privacy.noise_shares,
        "seconds": seconds,
    }


PARTS = {"noise": noise_row, "quality": quality_row, "seconds": seconds_row, "masks": masks_row}


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """What is asked for. Two clients' secure sum has one honest share, as under local: it is not trained with."""
    for seed, epsilon, part in product(options.seed, options.epsilon, options.part):
        if part == "masks":
            yield Cell(part, "distributed", WIDE_CLIENTS, epsilon, seed)
            continue
        for clients, model in product(options.clients, options.model):
            if part == "noise" or clients > 2 or model == "central":
                yield Cell(part, model, clients, epsilon, seed)


def measure(data: str, cell: Cell) -> Row:
    """One line."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        found = PARTS[cell.part](cell.config(data), Path(scratch) / "run")
    asked = " ".join(f"--{name} {value}" for name, value in asdict(cell).items())
    return {
        **asdict(cell),
        **found,
        "run_seconds": round(time.monotonic() - began),
        "settings": SHORT | CHANGES[cell.part],
        "command": f"python benchmarks/distributed.py --data FOLDER {asked}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "torch": torch.__version__,
    }


def read_rows() -> dict[Cell, Row]:
    """All that was measured."""
    lines = RESULTS.read_text("utf-8").splitlines() if RESULTS.exists() else []
    rows = [json.loads(line) for line in lines]
    return {Cell(*(row[field.name] for field in fields(Cell))): row for row in rows}


def show(rows: dict[Cell, Row]) -> None:
    """Print a table of each part."""
    for part, columns in COLUMNS.items():
        print(f"\n{part:<9}{'model':<12}{'K':>3}{'H':>4}{'epsilon':>9}{'seed':>5}  {'  '.join(columns)}")
        found = [(cell, row) for cell, row in rows.items() if cell.part == part]
        for cell, row in sorted(found, key=lambda one: (-one[0].epsilon, one[0].clients, one[0].model)):
            head = f"{'':<9}{cell.model:<12}{cell.clients:>3}{row['noise_shares'] or '':>4}{cell.epsilon:>9g}{cell.seed:>5}"
            print(head, *(f" {row[column]!s:>{len(column)}}" for column in columns))


def draw(rows: dict[Cell, Row], path: Path) -> None:
    """Noise on the mean update over central's: lines as computed, dots as measured."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    noise = {cell: row["measured"] for cell, row in rows.items() if cell.part == "noise"}
    clients = range(2, max(cell.clients for cell in noise) + 1)
    for model, colour in zip(MODELS, ("tab:green", "tab:blue", "tab:red"), strict=True):
        computed = [computed_noise(Cell("noise", model, number, 10.0, 0).config("")) for number in clients]
        axes.plot(clients, computed, color=colour, label=model, linewidth=1)
        dots = [(cell.clients, measured) for cell, measured in noise.items() if cell.model == model]
        axes.plot(*zip(*dots, strict=True), "o", color=colour, markersize=5)
    axes.set(xlabel="clients", ylabel="noise on the mean update, in central's", ylim=(0, None))
    axes.set_xticks(sorted({cell.clients for cell in noise}))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure what was asked for and is not there yet, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the four IDX files; without it, what was measured is shown")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 5, 10, 20])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[10.0])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--picture", type=Path, help="where to draw the noise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_rows()
    for cell in cells(options) if options.data else ():
        if cell not in rows:
            rows[cell] = measure(str(Path(options.data).resolve()), cell)
            keep(RESULTS, rows[cell])
    show(rows)
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
