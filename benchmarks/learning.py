"""Does it learn? Runs an example's YAML file with several seeds through the command line, as a user would.

Prints a row a run: validation reward before and after, mean training reward of the first and the last iterations,
iterations and minutes of training (model loading and supervised warm-up counted); writes JSON and a plot of the curves.

    python benchmarks/learning.py examples/tiny_from_scratch.yaml --seeds 1 2 3

With algorithms (``all``: every preset) the same for each of them, within 250 iterations of 2 optimizer steps each.
What two of them need beside that is in OWN_FLAGS.

    python benchmarks/learning.py examples/tiny_from_scratch.yaml --algorithms all --jobs 2
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from _common import RESULTS, draw_curves, report

from lightrft_lightning.algorithms import PRESETS

BUDGET = [
    "--model.steps_per_epoch", "2", "--trainer.limit_train_batches", "50", "--trainer.max_epochs", "5",
    "--trainer.max_time", "00:01:00:00",
]  # fmt: skip
"""Two steps an iteration, so that the losses see ratios other than 1; the number of iterations is the limit."""
OWN_FLAGS = {
    "ppo": ["--model.critic", "{lr: 1.0e-3, warmup_iterations: 5}"],
    "reinforce": ["--model.lr", "3.0e-4"],  # at the example's 5e-4 one seed of three ends at 0.797
}
MEAN_OVER = 10
"""Iterations of the running mean in a plot of many algorithms."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--algorithms", nargs="+", choices=["all", *PRESETS], metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--out", type=Path, help="JSON file, the plot beside it; default: in benchmarks/results")
    parser.add_argument("--add", action="store_true", help="keep the runs that the file has, and make the missing ones")
    arguments, flags = parser.parse_known_args()  # what is left goes to the command line
    config, algorithms = arguments.config.resolve(), arguments.algorithms or [""]
    if "all" in algorithms:
        algorithms = list(PRESETS)
    name = f"learning_{config.stem}" + ("_algorithms" if arguments.algorithms else "")
    out = arguments.out or RESULTS / f"{name}.json"
    settings = {"config": config.name, "flags": [*(BUDGET if arguments.algorithms else []), *flags]}
    if arguments.algorithms:
        settings["own flags"] = OWN_FLAGS
    before = json.loads(out.read_text()) if arguments.add and out.exists() else {"rows": [], "curves": []}
    rows: list[dict[str, Any]] = before["rows"]
    curves = [[float(reward) for reward in curve.split()] for curve in before["curves"]]
    done = {(row.get("algorithm", ""), row["seed"]) for row in rows}
    wanted = [run for run in product(algorithms, arguments.seeds) if run not in done]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = {pool.submit(run, config, *one, flags, arguments.jobs == 1): one for one in wanted}
        for finished in as_completed(results):
            algorithm, seed = results[finished]
            minutes, output, curve = finished.result()
            rows.append(({"algorithm": algorithm} if algorithm else {}) | summarise(seed, output, curve, minutes))
            curves.append(curve)
            order = sorted(range(len(rows)), key=lambda i: (rows[i].get("algorithm", ""), rows[i]["seed"]))
            rows, curves = [rows[i] for i in order], [curves[i] for i in order]
            # As text, because numbers would take a line each.
            report(name, rows, settings, out, curves=[" ".join(f"{reward:.4f}" for reward in c) for c in curves])
            runs: dict[str, list[list[float]]] = {}
            for row, curve in zip(rows, curves, strict=True):
                runs.setdefault(row.get("algorithm") or f"seed {row['seed']}", []).append(curve)
            window = MEAN_OVER if len(runs) > 5 else 1
            draw_curves(runs, out.with_suffix(".png"), "mean training reward", window)


def run(config: Path, algorithm: str, seed: int, flags: list[str], show: bool) -> tuple[float, str, list[float]]:
    """One run; returns its minutes, what it printed and the training reward of each iteration."""
    command = [sys.executable, "-m", "lightrft_lightning.cli", "fit", "--config", str(config)]
    if algorithm:
        command += ["--model.algorithm", algorithm, *BUDGET, *OWN_FLAGS.get(algorithm, [])]
    lines, start = [], time.perf_counter()
    with TemporaryDirectory() as folder:
        command += ["--seed_everything", str(seed), "--trainer.default_root_dir", folder]
        command += ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", folder]
        environment = os.environ if show else {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            [*command, *flags], stdout=subprocess.PIPE, text=True, env=environment, cwd=None if show else folder
        ) as process:
            for line in process.stdout or ():
                if show:
                    print(line, end="", flush=True)
                lines.append(line)
        if process.returncode:
            raise SystemExit(f"{algorithm} seed {seed} ended with exit code {process.returncode}: {lines[-5:]}")
        minutes = (time.perf_counter() - start) / 60
        with next(Path(folder).rglob("metrics.csv")).open() as file:
            rewards = [row["train/reward"] for row in csv.DictReader(file)]
    return minutes, "".join(lines), [float(reward) for reward in rewards if reward]


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


if __name__ == "__main__":
    main()
