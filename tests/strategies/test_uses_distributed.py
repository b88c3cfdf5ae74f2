"""The table of uses in docs/lightning.md: a plain LightningModule under each strategy. See jobs/uses.py."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).parent / "jobs" / "uses.py"
PAGE = Path(__file__).parents[2] / "docs" / "lightning.md"
COLUMNS = ("lightrft_fake", "lightrft_fsdp", *(f"lightrft_deepspeed_stage_{stage}" for stage in (1, 2, 3)))
USES = PAGE.read_text().partition("## Callbacks")[0]
ROWS = re.findall(r"^\| (.+?) \| (.) \| (.) \| (.) \| (.) \| (.) \| (.*?) ?\|$", USES, re.M)
WORDS = {"=": r"equal$", "–": r"refused: ", "≠": r"differs: "}

pytestmark = pytest.mark.timeout(600)  # the job of all rows is the setup of the first


@pytest.fixture(scope="module")
def results(run_ranks, tmp_path_factory, uses):
    """By rank, use and strategy."""
    folder = tmp_path_factory.mktemp("uses")
    run_ranks(JOB, folder, world_size=2, timeout=500)
    of_ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    alone = uses.run(["lightrft_fake"], "auto")
    return [{name: {**found, **alone[name]} for name, found in of_rank.items()} for of_rank in of_ranks]


@pytest.fixture(scope="module")
def uses():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(JOB.parent)
        yield __import__("uses")
    sys.modules.pop("uses")


def test_the_table_has_every_use(uses):
    assert [name for name, *_ in ROWS] == list(uses.USES) and len(ROWS) > 27


@pytest.mark.parametrize(("name", "cells", "words"), [(name, cells, words) for name, *cells, words in ROWS])
def test_a_plain_module_trains_as_under_lightnings_own_strategies_or_is_refused(results, name, cells, words):
    for of_rank in results:
        for strategy, cell in zip(COLUMNS, cells, strict=True):
            assert re.match(WORDS[cell], of_rank[name][strategy]), (strategy, of_rank[name][strategy])
            if cell != "=":
                assert any(part in of_rank[name][strategy] for part in words.split("; ")), of_rank[name][strategy]
