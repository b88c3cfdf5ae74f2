"""``lightrft plan``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from lightrft_lightning._errors import import_extra
from lightrft_lightning.planning.machine import this_machine
from lightrft_lightning.planning.predict import alternatives, predict
from lightrft_lightning.planning.settings import Planned, of_config

DESCRIPTION = (
    "Memory of a rank and time of each phase of an iteration, before anything is loaded: what will not fit, and which "
    "settings would make it fit. lightrft plan --config examples/tiny_from_scratch.yaml, or "
    "lightrft plan --model <folder or hub id> --strategy lightrft_fsdp --gpus 8 --memory_gb 80"
)


def main(args: Sequence[str]) -> None:
    """``lightrft plan ...``.

    Args:
        args: what follows ``plan``.
    """
    jsonargparse = import_extra("jsonargparse", "cli")
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path)
    given, rest = first.parse_known_args(args)
    parser = jsonargparse.ArgumentParser(prog="lightrft plan", description=DESCRIPTION)
    parser.add_argument("--config", type=Path, help="the YAML file of a run; what flags say wins")
    parser.add_argument("--memory_gb", type=float, help="of a GPU; default: of this machine")
    parser.add_argument("--tflops", type=float, help="of a GPU, in the precision of the run; default: as measured here")
    parser.add_argument("--bandwidth_gb", type=float, help="GB/s of its memory; default: as measured here")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, in bytes and seconds")
    parser.add_class_arguments(Planned, default=None)
    if given.config is not None:
        parser.set_defaults(of_config(given.config))
    flags = parser.parse_args(rest)
    settings = {f.name: flags[f.name] for f in dataclasses.fields(Planned)}
    planned = Planned(**settings)
    machine = this_machine(planned)
    for name, flag, unit in (
        ("memory", "memory_gb", 1e9),
        ("flops", "tflops", 1e12),
        ("bandwidth", "bandwidth_gb", 1e9),
    ):
        if flags[flag] is not None:
            if flags[flag] <= 0:
                raise ValueError(f"--{flag} {flags[flag]}: must be above 0")
            machine = dataclasses.replace(machine, **{name: flags[flag] * unit})
    plan = predict(planned, machine)
    if flags.json:
        phases = [dataclasses.asdict(p) | {"total": p.total, "seconds": plan.seconds(p)} for p in plan.phases]
        print(json.dumps({"peak": plan.peak, "fits": plan.fits, "phases": phases}))
        return
    print(plan.summary())
    if plan.fits is False:
        print("\nIt would fit with")
        for text, other in alternatives(plan):
            print(f"  {text}: {other.peak / 1e9:.2f} GB", flush=True)
