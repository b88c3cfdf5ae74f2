"""Does it learn? Runs an example's YAML file with several seeds through the command line, as a user would.

Prints a row a seed: validation reward before and after, mean training reward of the first and the last iterations,
iterations and minutes of training (model loading and supervised warm-up counted); writes JSON and a plot of the curves.

    python benchmarks/learning.py examples/tiny_from_scratch.yaml --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from _common import RESULTS, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments, flags = parser.parse_known_args()  # what is left goes to the command line
    rows, curves = [], {}
    for seed in arguments.seeds:
        with TemporaryDirectory() as folder:
            minutes, output, metrics = run(arguments.config, seed, Path(folder), flags)
        curves[seed] = [float(row["train/reward"]) for row in metrics if row.get("train/reward")]
        rows.append(summarise(seed, output, curves[seed], minutes))
        print(rows[-1], flush=True)
    name = f"learning_{arguments.config.stem}"
    plot(curves, RESULTS / f"{name}.png", arguments.config.stem)
    report(name, rows, {"config": arguments.config.name, "flags": flags})


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


def plot(curves: dict[int, list[float]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="mean training reward", title=title)
    for seed, rewards in curves.items():
        axes.plot(range(1, len(rewards) + 1), rewards, label=f"seed {seed}")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
