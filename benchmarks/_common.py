"""What every benchmark needs: where it ran, a Markdown table, a JSON file and a picture of it."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "lightning", "deepspeed", "transformers", "trl", "peft")


def machine_info() -> dict[str, Any]:
    """CPU model, cores and versions. Imports none of the packages it names."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_model(), "cores": cores, "python": platform.python_version(), **versions}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def need_device(device: str) -> None:
    """End with a message if there is no such device here."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: not run, as this machine has no GPU that torch can use")


SHAPES = {  # hidden size, layers, heads of queries and of keys, width of the MLP, vocabulary
    "135M": (576, 30, 9, 3, 1536, 49152),  # SmolLM2
    "0.5B": (896, 24, 14, 2, 4864, 151_936),  # Qwen2.5
    "1.5B": (1536, 28, 12, 2, 8960, 151_936),
}


def llama(shape: str, layers: int | None = None, vocab: int | None = None, **more: Any) -> Any:
    """A Llama with random weights, of one of `SHAPES` but for `layers` and `vocab`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, depth, heads, kv_heads, mlp, size = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers or depth, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=mlp, vocab_size=vocab or size, tie_word_embeddings=True, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def now(device: str) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def resident_mb() -> float:
    """What this process has resident, in MB, after giving back what the C library keeps for later."""
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak_rss_mb() -> float:
    """The most memory this process has had resident so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([_cell(row[key]) for key in header] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    """Floats have three significant digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def spread(values: Sequence[float]) -> str:
    """How far the lowest and the highest are from the median, like ``-3% +8%``."""
    middle = median(values)
    return f"{min(values) / middle - 1:+.0%} {max(values) / middle - 1:+.0%}"


def compared(rows: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> list[str]:
    """What has changed since `before`, a line for each row that both have; measured numbers are the floats."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        numbers = (float, list)
        texts = {k: v for k, v in row.items() if not isinstance(v, numbers) and not re.search("spread|rewards", k)}
        return tuple(texts.items())

    last = {key(row): row for row in before}
    lines = []
    for row in rows:
        was = last.get(key(row), {})
        changes = [
            f"{k} {was[k]:.3g} -> {v:.3g} ({v / was[k] - 1:+.0%})"
            for k, v in row.items()
            if isinstance(v, float) and isinstance(was.get(k), float) and was[k] and v != was[k]
        ]
        if changes:
            lines.append(f"{', '.join(str(v) for _, v in key(row))}: {'; '.join(changes)}")
    return lines


@dataclass(frozen=True)
class Bars:
    """What of a table is drawn: for each row the numbers in `columns`, side by side.

    Attributes:
        labels: columns that say which row it is.
        columns: of numbers in the same unit.
        unit: of these.
        log: whether the axis is logarithmic.
    """

    labels: Sequence[str]
    columns: Sequence[str]
    unit: str
    log: bool = False

    def draw(self, rows: Sequence[dict[str, Any]], path: Path) -> None:
        from matplotlib.figure import Figure

        count, names = len(self.columns), [", ".join(_cell(row[label]) for label in self.labels) for row in rows]
        figure = Figure(figsize=(7, 1.2 + len(rows) * (0.2 + 0.15 * count)), layout="constrained")
        axes = figure.add_subplot(ylabel=", ".join(self.labels), xlabel=self.unit, title=path.stem)
        for k, column in enumerate(self.columns):
            at = [i + 0.8 * ((k + 0.5) / count - 0.5) for i in range(len(rows))]
            axes.barh(at, [row[column] for row in rows], 0.8 / count, label=column)
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        if self.log:
            axes.set_xscale("log")
        if count > 1:
            figure.legend(loc="outside upper right", fontsize="small", ncols=min(count, 3))
        figure.savefig(path, dpi=110)


def draw_curves(runs: Mapping[str, Sequence[Sequence[float]]], path: Path, ylabel: str, window: int = 1) -> None:
    """A line a name over the iterations: the mean of its runs, between the lowest and the highest of them.

    Args:
        runs: of each name the curves.
        path: of the picture.
        ylabel: what they show.
        window: iterations of a running mean.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    many = len(runs) > 5
    figure = Figure(figsize=(9, 6) if many else (7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel=ylabel, title=path.stem)
    for k, (name, of_name) in enumerate(runs.items()):
        smooth = [[mean(c[max(0, i + 1 - window) : i + 1]) for i in range(len(c))] for c in of_name]
        at_each = list(zip(*smooth, strict=False))
        x, color = range(1, len(at_each) + 1), colormaps["tab20" if many else "tab10"](k % (20 if many else 10))
        axes.plot(x, [mean(values) for values in at_each], label=name, color=color)
        axes.fill_between(x, list(map(min, at_each)), list(map(max, at_each)), color=color, alpha=0.1, linewidth=0)
    axes.legend(fontsize="small", ncols=2 if many else 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def report(
    name: str,
    rows: Sequence[dict[str, Any]],
    settings: dict[str, Any],
    out: Path | None = None,
    bars: Bars | None = None,
    **more: Any,
) -> Path:
    """Print the table and what has changed, and write ``benchmarks/results/<name>.json``, or `out`, with `more`.

    A picture of the `bars` goes beside it. Returns the path of the JSON file.
    """
    machine = machine_info()
    print(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, {settings}\n")
    print(markdown_table(rows))
    path = out or RESULTS / f"{name}.json"
    if path.exists():
        last = json.loads(path.read_text())
        same = "the same settings" if last["settings"] == json.loads(json.dumps(settings)) else "OTHER SETTINGS"
        versions = "" if last["machine"] == machine else f", on {last['machine']}"
        print(f"\nagainst the run of {last['when']} ({same}{versions}):")
        changes = compared(rows, last["rows"]) or ["no row of it is here again, or none has changed"]
        print("\n".join(f"- {line}" for line in changes))
    path.parent.mkdir(parents=True, exist_ok=True)
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    result = {"benchmark": name, "when": when, "machine": machine, "settings": settings, "rows": list(rows)}
    path.write_text(json.dumps(result | more, indent=2) + "\n")
    print(f"\nwritten to {path}")
    if bars is not None:
        bars.draw(rows, path.with_suffix(".png"))
    return path
