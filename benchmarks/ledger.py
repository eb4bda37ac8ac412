"""What the ledger costs a round: charge, release, pricing, opening.

    python benchmarks/ledger.py [--folder FOLDER]

A charge and a release are each on the disk when they return (fsync), so these two depend on the disk under FOLDER (the
temporary folder where none is given); the price of a bare 512-byte append with fsync there is printed beside them.
Pricing is timed with 10,000 different (noise multiplier, sample rate): all at once, and the next one for a ledger that
was just opened and holds the 10,000 others. Prints a table and writes benchmarks/results/ledger.json.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from common.privacy import accounting
from common.privacy.accounting import Release
from common.privacy.ledger import Ledger
from common.privacy.ledger_report import verify_ledger

RESULTS = Path(__file__).parent / "results" / "ledger.json"
RUN, DELTA = "a" * 32, 1e-5
ROUNDS, CHARGES = 10_000, 300
# Orders that a first charge may fix: budgets of epsilon 8, 3 and 0.5 at q = 0.1, and the lowest, whose series is longest.
ORDERS = (3.2, 6.5, 24.0, 1.05)


def seconds(act: Callable[[], Any]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def different_releases(count: int, least_noise: float = 5.0) -> list[Release]:
    """Rounds of which no two have the same noise and rate."""
    rng = np.random.default_rng(0)
    return [
        Release("gradients", float(sigma), float(rate))
        for sigma, rate in zip(rng.uniform(least_noise, 50.0, count), rng.uniform(0.001, 0.2, count), strict=True)
    ]


def bare_append(folder: Path) -> list[float]:
    """The disk's own price: 512 bytes appended and flushed."""
    with (folder / "bare").open("ab", buffering=0) as file:

        def append() -> None:
            file.write(bytes(512))
            os.fsync(file.fileno())

        return [seconds(append) for _ in range(100)]


def rounds_on_disk(folder: Path) -> dict[str, list[float]]:
    """Charges and releases of a reply of 400 kB, as a client of the default discriminator makes them."""
    releases, reply = different_releases(CHARGES), os.urandom(400_000)
    ledger = Ledger(folder / "rounds", max_epsilon=8.0, delta=DELTA)
    plan = [Release("gradients", 5.0, 0.1, ROUNDS)]
    charged, released = [], []
    for number, release in enumerate(releases, start=1):
        charged.append(seconds(lambda n=number, r=release: ledger.charge(RUN, n, r, plan, "0" * 64)))
        released.append(seconds(lambda n=number: ledger.release(RUN, n, reply)))
    return {"charge": charged, "release": released}


def long_ledger(folder: Path) -> dict[str, float]:
    """A ledger of 10,000 different charges: opened, asked for one more, verified."""
    releases = different_releases(ROUNDS + 1)
    plan = [Release("gradients", 20.0, 0.1, ROUNDS)]
    with mock.patch("os.fsync"):  # only to fill it
        ledger = Ledger(folder / "long", max_epsilon=8.0, delta=DELTA)
        for number, release in enumerate(releases[:-1], start=1):
            ledger.charge(RUN, number, release, plan, "0" * 64)
    os.sync()
    accounting._price.cache_clear()
    found: dict[str, float] = {}
    found["reopen_10000_s"] = seconds(lambda: Ledger(folder / "long", max_epsilon=8.0, delta=DELTA))
    again = Ledger(folder / "long", max_epsilon=8.0, delta=DELTA)
    found["next_of_10000_ms"] = 1e3 * seconds(lambda: again.charge(RUN, ROUNDS + 1, releases[-1], plan, "0" * 64))
    found["check_witness_ms"] = 1e3 * seconds(lambda: again.check_witness([again.head().to_bytes()]))
    found["verify_10000_s"] = seconds(lambda: verify_ledger(folder / "long"))
    found["order"] = json.loads((folder / "long" / "ledger.jsonl").read_text().splitlines()[1])["order"]
    return found


def pricing() -> dict[str, float]:
    """All 10,000 at once, in seconds, by order."""
    releases = different_releases(ROUNDS, least_noise=0.6)
    found = {}
    for order in ORDERS:
        found[str(order)] = seconds(lambda at=order: accounting.rdp_at(releases, at))
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the ledgers are made [the temporary folder]")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as name:
        folder = Path(name)
        times = {"bare append": bare_append(folder), **rounds_on_disk(folder)}
        found = long_ledger(folder)
    priced = pricing()
    for kind, values in times.items():
        print(f"{kind:32}{1e3 * statistics.median(values):>9.2f} ms median {1e3 * max(values):>9.2f} ms at most")
        found[f"{kind.replace(' ', '_')}_median_ms"] = 1e3 * statistics.median(values)
    for order, spent in priced.items():
        print(f"{'price 10,000 at order ' + order:32}{spent:>9.3f} s")
    for key, value in found.items():
        print(f"{key:32}{value:>9.3f}")
    head = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**head, **found, "price_10000_s_by_order": priced}, indent=1) + "\n")


if __name__ == "__main__":
    main()
