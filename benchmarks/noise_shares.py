"""What a client's noise share costs a round: draws a second, and the whole of rounding, noise and reduction.

    python benchmarks/noise_shares.py [--count 1000000]

By deviation in lattice steps: seconds for so many draws (the median of five), draws a second, and how many of them
floats could not decide. For comparison, the same number of continuous draws as `local` takes them, and the share of a
client's vector on the lattice of a cohort of ten. One thread. Prints a table and writes
benchmarks/results/noise_shares.json.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from common.privacy import discrete_gaussian as sampler
from common.privacy.discrete_gaussian import LARGEST_DEVIATION, discrete_gaussian
from common.privacy.lattice import Lattice
from common.privacy.randomness import SecureRandom, add_gaussian_noise

RESULTS = Path(__file__).parent / "results" / "noise_shares.json"
DEVIATIONS = (1.0, 3.0, 100.0, 1e4, 1e6, 1e7, LARGEST_DEVIATION)
REPEATS = 5


def seconds(act: Callable[[], object]) -> float:
    """How long it takes: the median."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def undecided(count: int, deviation: float, random: SecureRandom) -> int:
    """How many proposals went to exact arithmetic."""
    with mock.patch.object(sampler, "_exactly_accepted", side_effect=sampler._exactly_accepted) as exactly:
        discrete_gaussian(count, deviation, random)
    return exactly.call_count


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="draws, and length of a vector [1000000]")
    count = parser.parse_args().count
    torch.set_num_threads(1)
    random = SecureRandom()
    lattice = Lattice.of(
        dimension=count, max_grad_norm=1.0, noise_multiplier=1.0, shares=5, clients=10, expected_units=200
    )
    total = torch.randn(count)
    found = []
    for deviation in DEVIATIONS:
        taken = seconds(lambda s=deviation: discrete_gaussian(count, s, random))
        found.append({"deviation": deviation, "seconds": taken, "undecided": undecided(count, deviation, random)})
        print(f"{'draws at ' + format(deviation, 'g'):32}{taken:>9.3f} s {count / taken / 1e6:>9.1f} M/s", end="")
        print(f"{found[-1]['undecided']:>6} undecided")
    share = seconds(lambda: lattice.add_noise_share(total, random))
    continuous = seconds(lambda: add_gaussian_noise(total, 1.0, random))
    print(f"{'noise share, s = ' + format(lattice.share_deviation, '.3g'):32}{share:>9.3f} s")
    print(f"{'continuous noise (local)':32}{continuous:>9.3f} s")
    head = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    times = {"count": count, "draws": found, "noise_share_s": share, "continuous_noise_s": continuous}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**head, **times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
