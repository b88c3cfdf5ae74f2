"""Does it learn? Runs an example's YAML file with several seeds through the command line, as a user would.

Prints a row a run: validation reward before and after, mean training reward of the first and the last iterations,
iterations and minutes of training (model loading and supervised warm-up counted); writes JSON and a plot of the curves.

    python benchmarks/learning.py examples/tiny_from_scratch.yaml --seeds 1 2 3

With algorithms (``all``: every preset) the same for each of them, within 250 iterations of 2 optimizer steps each:

    python benchmarks/learning.py examples/tiny_from_scratch.yaml --algorithms all
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from _common import RESULTS, report

from lightrft_lightning.algorithms import PRESETS

BUDGET = [
    "--model.steps_per_epoch", "2", "--trainer.limit_train_batches", "50", "--trainer.max_epochs", "5",
    "--trainer.max_time", "00:01:00:00",
]  # fmt: skip
"""Two steps an iteration, so that the losses see ratios other than 1; the number of iterations is the limit."""
OWN_FLAGS = {"ppo": ["--model.critic", "{lr: 1.0e-3, warmup_iterations: 5}"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--algorithms", nargs="+", choices=["all", *PRESETS], metavar="NAME")
    parser.add_argument("--out", type=Path, help="JSON file, the plot beside it; default: in benchmarks/results")
    arguments, flags = parser.parse_known_args()  # what is left goes to the command line
    config, algorithms = arguments.config, arguments.algorithms or [None]
    if "all" in algorithms:
        algorithms = list(PRESETS)
    name = f"learning_{config.stem}" + ("_algorithms" if arguments.algorithms else "")
    out = arguments.out or RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[list[float]]] = {}
    for seed, algorithm in product(arguments.seeds, algorithms):
        chosen = ["--model.algorithm", algorithm, *BUDGET, *OWN_FLAGS.get(algorithm, [])] if algorithm else []
        with TemporaryDirectory() as folder:
            minutes, output, metrics = run(config, seed, Path(folder), [*chosen, *flags])
        curve = [float(row["train/reward"]) for row in metrics if row.get("train/reward")]
        curves.setdefault(algorithm or f"seed {seed}", []).append(curve)
        rows.append(({"algorithm": algorithm} if algorithm else {}) | summarise(seed, output, curve, minutes))
        plot(curves, out.with_suffix(".png"), config.stem)
        report(name, rows, {"config": config.name, "flags": [*(BUDGET if arguments.algorithms else []), *flags]}, out)


def run(config: Path, seed: int, folder: Path, flags: list[str]) -> tuple[float, str, list[dict[str, str]]]:
    """One run; returns its minutes, what it printed and the rows of Lightning's `metrics.csv`."""
    command = [sys.executable, "-m", "lightrft_lightning.cli", "fit", "--config", str(config)]
    command += ["--seed_everything", str(seed), "--trainer.default_root_dir", str(folder)]
    command += ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", str(folder)]
    lines = []
    start = time.perf_counter()
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(f"seed {seed} ended with exit code {process.returncode}")
    minutes = (time.perf_counter() - start) / 60
    with next(folder.rglob("metrics.csv")).open() as file:
        return minutes, "".join(lines), list(csv.DictReader(file))


def summarise(seed: int, output: str, rewards: list[float], minutes: float) -> dict[str, Any]:
    """The validation rewards are those of the summary line: loggers do not see the one before training."""
    found = re.search(r"validation reward (-?[\d.]+) -> (-?[\d.]+)", output)
    before, after = map(float, found.groups()) if found else (math.nan, math.nan)
    window = max(1, math.ceil(len(rewards) / 10))
    return {
        "seed": seed,
        "validation before": before,
        "validation after": after,
        f"training, first {window}": mean(rewards[:window]),
        f"training, last {window}": mean(rewards[-window:]),
        "iterations": len(rewards),
        "minutes": minutes,
    }


def plot(curves: dict[str, list[list[float]]], path: Path, title: str) -> None:
    """A line a name: the mean over its runs, within the range from the lowest to the highest."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4) if len(curves) < 6 else (9, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="mean training reward", title=title)
    for k, (name, runs) in enumerate(curves.items()):
        at_each = list(zip(*runs, strict=False))
        x, color = range(1, len(at_each) + 1), colormaps["tab20"](k % 20)
        axes.plot(x, [mean(values) for values in at_each], label=name, color=color)
        axes.fill_between(x, list(map(min, at_each)), list(map(max, at_each)), color=color, alpha=0.1, linewidth=0)
    axes.legend(fontsize="small", ncols=1 if len(curves) < 6 else 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
