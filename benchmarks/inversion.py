"""What a malicious coordinator gets back of 64 photographs, without noise and with it: a table, and a picture.

    python benchmarks/inversion.py [--recipe demo] [--size 32] [--channels 3] [--images 64] [--picture docs/inversion.png]

The three attacks of simulations/audit/inversion.py on shipped clients: without noise, with the noise multiplier that the recipe
calibrates to under `local`, and with the least that its whole budget allows for one round. Then a ladder: noise of 0.0001 to 1 times
the clipping norm, from the bottom up until nothing comes back, added to the clear answers as a client would. The faces are drawn ones
(persons from 1,000,000 on); the attacker knows 512 others. Appends JSON lines to benchmarks/results/inversion.jsonl.
"""

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from common.config import RunConfig
from common.evaluation.inversion import BACK_DB, count_back, psnr_table
from common.gradients import to_uint8
from common.privacy.accounting import calibrate_noise_multiplier
from common.privacy.planner import with_noise
from common.privacy.randomness import SecureRandom, add_gaussian_noise
from simulations.audit.inversion import Attack, attacks_on, public_faces
from simulations.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "inversion.jsonl"
LADDER = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
COLUMNS = 12
NAMES = {
    "imprint": "imprint,\n64 in one update",
    "imprint-alone": "imprint,\none in an update",
    "gradient-inversion": "gradient inversion,\none in an update",
}


def measure(attack: Attack, noises: Sequence[float], ladder: bool) -> tuple[dict[str, Any], list[Tensor]]:
    """One attack: its figures, and what it makes of each face without noise and with the first of `noises`."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        clear = attack.answers(Path(folder) / "clear", None)
        noised = [attack.answers(Path(folder) / f"{noise:g}", noise) for noise in noises]
    found = [attack.read(clear, 0.0), *(attack.read(each, noise) for each, noise in zip(noised, noises, strict=True))]
    tables = [psnr_table(attack.victims, images) for images in found]
    seconds, rungs = time.monotonic() - began, {}
    for noise in LADDER if ladder else ():
        again = [add_gaussian_noise(torch.tensor(v), noise * clipping(attack), SecureRandom()).numpy() for v in clear]
        rungs[f"{noise:g}"] = count_back(psnr_table(attack.victims, attack.read(again, noise)))
        if not rungs[f"{noise:g}"]:
            break
    best = tables[0].max(1).values
    model = attack.config.model
    row = {
        "attack": attack.name,
        "network": f"{model.discriminator}-{model.discriminator_width}",
        "image": f"{model.channels}x{model.image_size}x{model.image_size}",
        "images": len(attack.victims),
        "threshold_db": BACK_DB,
        "back_clear": count_back(tables[0]),
        "median_db_clear": round(float(best.median()), 1),
        "noise_multiplier": round(noises[0], 4),
        "back_noised": count_back(tables[1]),
        "best_db_noised": round(float(tables[1].max()), 1),
        "budget_noise_multiplier": round(noises[1], 4),
        "back_budget": count_back(tables[2]),
        "best_db_budget": round(float(tables[2].max()), 1),
        "seconds": round(seconds, 1),
        "back_at": rungs,
    }
    return row, [shown(attack, images[: len(found[0])]) for images in found[:2]]


def shown(attack: Attack, images: Tensor) -> Tensor:
    """For each face what came of its own client; of many at one client, whatever is nearest to it."""
    return images if len(attack.shares) > 1 else images[psnr_table(attack.victims, images).argmax(1)]


def clipping(attack: Attack) -> float:
    """The clipping norm of an attack's round."""
    return attack.config.privacy.max_grad_norm


def draw(path: Path, victims: Tensor, rows: Sequence[tuple[str, Tensor]]) -> None:
    """The faces above, and below what each attack makes of them, with its PSNR in decibels."""
    sheet = [("64 persons' faces\n(12 of them)", victims), *rows]
    figure = Figure(figsize=(1.7 + 0.72 * COLUMNS, 0.91 * len(sheet)), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(sheet), COLUMNS, gridspec_kw={"wspace": 0.06, "hspace": 0.30})
    figure.subplots_adjust(left=1.7 / figure.get_figwidth(), right=0.995, top=0.985, bottom=0.058)
    for line, (name, images) in zip(axes, sheet, strict=True):
        for place, ax in enumerate(line):
            picture = np.moveaxis(to_uint8(images[place : place + 1])[0], 0, -1)
            ax.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            if images is not victims:
                decibels = float(psnr_table(victims[place : place + 1], images[place : place + 1]))
                back = decibels >= BACK_DB
                text = "exact" if decibels >= 60 else f"{decibels:.0f} dB"
                ax.set_xlabel(text, fontsize=7, labelpad=1.5, color="#b3261e" if back else "#5f5f5f")
        line[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center", labelpad=6)
    caption = f"dB: peak signal-to-noise ratio to the face; red: back, {BACK_DB:g} dB or more. All faces are drawn."
    figure.text(0.995, 0.006, caption, fontsize=7, ha="right", va="bottom", color="#5f5f5f")
    figure.savefig(path)


def noises_of(config: RunConfig) -> list[float]:
    """The run's noise multiplier, and the least with which its budget allows one round."""
    privacy = config.privacy
    return [privacy.noise_multiplier, calibrate_noise_multiplier(privacy.epsilon, privacy.delta, 1.0, 1)]


def main() -> None:
    """Run the attacks, print the table, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--no-ladder", action="store_true")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    shape = {"image-size": options.size, "channels": options.channels, "num-classes": 0}
    config = with_noise(load_recipe(options.recipe, {"privacy-model": "local", **shape}))
    noises, rows = noises_of(config), []
    attacks = attacks_on(config, options.images, options.images, public_faces(config.model))
    print(f"{'attack':<20}{'clear':>7}{'sigma':>8}{'back':>6}{'sigma':>8}{'back':>6}{'s':>7}  back at noise")
    for attack in attacks:
        row, pictures = measure(attack, noises, not options.no_ladder)
        row |= {
            "recipe": options.recipe,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
            "torch": torch.__version__,
        }
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{attack.name:<20}{row['back_clear']:>7}{noises[0]:>8.3f}{row['back_noised']:>6}{noises[1]:>8.3f}"
            f"{row['back_budget']:>6}{row['seconds']:>7}  {row['back_at']}",
            flush=True,
        )
        for what, images in zip(("no noise", f"noise {noises[0]:.2g} C"), pictures, strict=True):
            rows.append((f"{NAMES[attack.name]},\n{what}", images))
    if options.picture:
        draw(options.picture, attacks[0].victims, rows)


if __name__ == "__main__":
    main()
