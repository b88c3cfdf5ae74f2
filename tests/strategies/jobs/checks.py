"""Runs the functions of a job one after the other on every rank; the test suite shows each as a test of its own."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from lightrft_lightning.strategies import failures

torch.set_num_threads(1)


def run(checks: dict[str, Callable[[], None]]) -> None:
    """Call every ``check_*`` of `checks`; what came of it goes into ``<first argument>/<rank>.json``."""
    gc.freeze()  # see tests/helpers/preloaded.py; now with what the job itself has imported
    gc.unfreeze = lambda: None  # by which every engine of vLLM ends, before three collections
    results = {}
    for name, check in checks.items():
        if name.startswith("check_"):
            gc.freeze()  # what is over is not looked through again
            try:
                check()
                results[name] = "ok"
            except BaseException:
                results[name] = traceback.format_exc()
    Path(sys.argv[1], f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(results))


@contextmanager
def unwatched() -> Iterator[None]:
    """Errors inside are expected on all ranks and caught: none of them is to end the others."""
    if failures._watch is not None:
        failures._watch.stop()
        failures._watch = None
    absent = mock.Mock(verdict=None, **{"report.return_value": None})
    with mock.patch.object(failures, "RankWatch", return_value=absent):
        yield
    failures._watch = None
