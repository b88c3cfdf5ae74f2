"""What every benchmark needs: where it ran, a Markdown table, a JSON file next to it."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
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
    """Rows with the same keys as a Markdown table; floats with three significant digits."""

    def cell(value: Any) -> str:
        return (
            f"{value:.3g}"
            if isinstance(value, float) and abs(value) < 1000
            else f"{value:.0f}"
            if isinstance(value, float)
            else str(value)
        )

    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([cell(row[key]) for key in header] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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


def report(
    name: str, rows: Sequence[dict[str, Any]], settings: dict[str, Any], out: Path | None = None, **more: Any
) -> None:
    """Print the table and what has changed, and write ``benchmarks/results/<name>.json``, or `out`, with `more`."""
    machine = machine_info()
    print(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, {settings}\n")
    print(markdown_table(rows))
    path = out or RESULTS / f"{name}.json"
    if path.exists():
        last = json.loads(path.read_text())
        same = "the same settings" if last["settings"] == json.loads(json.dumps(settings)) else "OTHER SETTINGS"
        versions = "" if last["machine"] == machine else f", on {last['machine']}"
        print(f"\nagainst the run of {last['when']} ({same}{versions}):")
        print("\n".join(f"- {line}" for line in compared(rows, last["rows"])) or "- no row of it is here again")
    path.parent.mkdir(parents=True, exist_ok=True)
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    result = {"benchmark": name, "when": when, "machine": machine, "settings": settings, "rows": list(rows)}
    path.write_text(json.dumps(result | more, indent=2) + "\n")
    print(f"\nwritten to {path}")
