"""Runs the functions of a job one after the other on every rank; the test suite shows each as a test of its own."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

torch.set_num_threads(1)


def run(checks: dict[str, Callable[[], None]]) -> None:
    """Call every ``check_*`` of `checks`; what came of it goes into ``<first argument>/<rank>.json``."""
    results = {}
    for name, check in checks.items():
        if name.startswith("check_"):
            try:
                check()
                results[name] = "ok"
            except BaseException:
                results[name] = traceback.format_exc()
    Path(sys.argv[1], f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(results))
