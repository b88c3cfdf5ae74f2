"""The table of callbacks and loggers in docs/lightning.md, under each strategy. See jobs/callbacks.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from lightning.pytorch import callbacks, loggers, profilers

JOB = Path(__file__).parent / "jobs" / "callbacks.py"
PAGE = Path(__file__).parents[2] / "docs" / "lightning.md"
COLUMNS = ("lightrft_fake", "lightrft_fsdp", *(f"lightrft_deepspeed_stage_{stage}" for stage in (1, 2, 3)))
TABLE = PAGE.read_text().partition("## Callbacks and loggers")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| (.+?) \| (.) \| (.) \| (.) \| (.) \| (.) \| (.*?) ?\|$", TABLE, re.M)
NOT_TRIED = {"Profiler", "XLAProfiler", "CometLogger", "LitLogger"}
WORDS = {"=": "equal", "–": "refused: "}

pytestmark = pytest.mark.timeout(600)  # the job of all rows is the setup of the first


@pytest.fixture(scope="module")
def results(run_ranks, tmp_path_factory):
    """By rank, name and strategy."""
    several, one = (tmp_path_factory.mktemp(name) for name in ("several", "one"))
    run_ranks(JOB, several, world_size=2, timeout=500)
    run_ranks(JOB, one, world_size=1, timeout=120)
    alone = json.loads((one / "0.json").read_text())
    of_ranks = [json.loads((several / f"{rank}.json").read_text()) for rank in range(2)]
    return [{name: {**found, **alone[name]} for name, found in of_rank.items()} for of_rank in of_ranks]


def test_the_table_has_every_callback_logger_and_profiler_of_lightning(results):
    names = [name for name, *_ in ROWS]
    assert names == list(results[0])
    for everything in (callbacks.__all__, loggers.__all__, profilers.__all__):
        assert set(everything) - NOT_TRIED <= set(names)


@pytest.mark.parametrize(("name", "cells", "words"), [(name, cells, words) for name, *cells, words in ROWS])
def test_it_does_under_these_strategies_what_it_does_under_lightnings_own_or_is_refused(results, name, cells, words):
    for of_rank in results:
        found = of_rank[name]
        if any(text.startswith("skipped") for text in found.values()):
            pytest.skip(found["lightrft_fake"])
        for strategy, cell in zip(COLUMNS, cells, strict=True):
            assert found[strategy].startswith(WORDS[cell]), (strategy, found[strategy])
            if cell != "=":
                assert any(part in found[strategy] for part in words.split("; ")), (strategy, found[strategy])
