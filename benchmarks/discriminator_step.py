"""What a private discriminator step costs: book-keeping and Opacus beside the plain step, in one run.

    python benchmarks/discriminator_step.py

Time is CPU time, the methods taking turns; a ratio is the median over the plain step's median. Memory is the peak of
the resident set over its start, each method in a process of its own (Linux). Every method computes the gradient of the
same real half; the private ones clip each image (or person of four images) to norm 1. Prints a table and writes
benchmarks/results/discriminator_step.json.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from common.models.discriminators import build_discriminator
from common.models.losses import LOSSES
from common.privacy.clipping import clipped_sum

RESULTS = Path(__file__).parent / "results" / "discriminator_step.json"
CASES = {
    "64x64 colour, batch 128, width 64": {"image_size": 64, "channels": 3, "num_classes": 0, "width": 64, "batch": 128},
    "28x28 grey, 10 classes, batch 128, width 32": {
        "image_size": 28,
        "channels": 1,
        "num_classes": 10,
        "width": 32,
        "batch": 128,
    },
}
METHODS = ("plain", "book-keeping", "book-keeping, persons of 4", "Opacus hooks", "Opacus ghost")
ROUNDS, OPACUS_EVERY = 20, 7  # Opacus is several times slower and is timed in three rounds only
Step = Callable[[], None]


def build_step(case: dict[str, int], method: str) -> Step:
    """Return a function that takes one step; Opacus gets plain memory (it is wrong in channels-last)."""
    batch, num_classes = case["batch"], case["num_classes"]
    model = build_discriminator("dcgan", **{key: value for key, value in case.items() if key != "batch"})
    shape = (batch, case["channels"], case["image_size"], case["image_size"])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    arguments = [images] if num_classes == 0 else [images, torch.arange(batch) % num_classes]
    real = LOSSES["bce"].real
    if not method.startswith("Opacus"):
        model = model.to(memory_format=torch.channels_last)
        arguments[0] = arguments[0].contiguous(memory_format=torch.channels_last)

    def plain() -> None:
        model.zero_grad()
        real(model(*arguments)).sum().backward()

    def book_keeping() -> None:
        size = 4 if "4" in method else 1
        labels = arguments[1] if num_classes > 0 else None
        clipped_sum(model, real, arguments[0], labels, torch.arange(batch) // size, batch // size, 1.0)

    if method == "plain":
        return plain
    if method.startswith("book-keeping"):
        return book_keeping
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

    if method == "Opacus hooks":
        hooked = GradSampleModule(model, loss_reduction="sum")

        def hooks() -> None:
            hooked.zero_grad()
            real(hooked(*arguments)).sum().backward()
            rows = [p.grad_sample for p in hooked.parameters()]
            norms = torch.stack([row.flatten(1).norm(dim=1) for row in rows]).norm(dim=0)
            factors = (1.0 / norms).clamp(max=1.0)
            for row in rows:
                torch.einsum("i,i...", factors, row)

        return hooks
    fast = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum")

    def ghost() -> None:
        fast.zero_grad()
        losses = real(fast(*arguments))
        losses.sum().backward(retain_graph=True)
        factors = fast.get_clipping_coef()
        fast.zero_grad()
        fast.disable_hooks()
        (factors * losses).sum().backward()
        fast.enable_hooks()

    return ghost


def status(field: str) -> float:
    """A field of /proc/self/status in MiB, VmHWM (peak) or VmRSS (now)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def print_peak(case: str, method: str) -> None:
    """In a process of its own: the peak over the start of two steps, in MiB, on standard output."""
    step = build_step(CASES[case], method)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = status("VmRSS")
    step()
    step()
    print(status("VmHWM") - start)


def peak_mib(case: str, method: str) -> float:
    """Measure `print_peak` in a new process."""
    command = [sys.executable, __file__, case, method]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def times_s(case: str) -> dict[str, list[float]]:
    """CPU seconds of each method's steps, the methods taking turns."""
    steps = {method: build_step(CASES[case], method) for method in METHODS}
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    for turn in range(-1, ROUNDS):
        for method, step in steps.items():
            if method.startswith("Opacus") and turn % OPACUS_EVERY != 0:
                continue
            start = time.process_time()
            step()
            if turn >= 0:  # the first turn warms up
                found[method].append(time.process_time() - start)
    return found


def main() -> None:
    """Measure, print the table, write the results."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    rows = []
    for case in CASES:
        print(f"\n{case}\n{'':32}{'time':>10}{'ratio':>8}{'steps':>7}{'memory':>11}{'ratio':>8}")
        times = times_s(case)
        peaks = {method: peak_mib(case, method) for method in METHODS}
        base_s, base_mib = statistics.median(times["plain"]), peaks["plain"]
        for method in METHODS:
            median_s, mib = statistics.median(times[method]), peaks[method]
            print(
                f"{method:32}{median_s * 1e3:>7.1f} ms{median_s / base_s:>8.2f}{len(times[method]):>7}"
                f"{mib:>7.0f} MiB{mib / base_mib:>8.2f}"
            )
            rows.append(
                {
                    "case": case,
                    "method": method,
                    "median_s": median_s,
                    "ratio": median_s / base_s,
                    "steps": len(times[method]),
                    "peak_mib": mib,
                    "peak_ratio": mib / base_mib,
                }
            )
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    head = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": 1,
        "torch": torch.__version__,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    print(f"\n{head}\nwritten to {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        torch.set_num_threads(1)
        print_peak(sys.argv[1], sys.argv[2])
    else:
        main()
