"""DeepSpeed ZeRO-1, 2 and 3 in two real processes; the checks themselves are in jobs/."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

JOBS = Path(__file__).parent / "jobs"


def checks_of(job):
    return re.findall(r"^def (check_\w+)", (JOBS / f"{job}.py").read_text(), re.M)


@pytest.fixture(scope="module")
def results(run_ranks, tmp_path_factory):
    """What came of each check, by job and rank."""
    cache = {}

    def of(job):
        if job not in cache:
            folder = tmp_path_factory.mktemp(job)
            run_ranks(JOBS / f"{job}.py", folder, timeout=280)
            cache[job] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
        return cache[job]

    return of


@pytest.mark.parametrize("check", checks_of("deepspeed_loop"))
def test_hand_written_loop(results, check):
    for rank in results("deepspeed_loop"):
        assert rank[check] == "ok", rank[check]


@pytest.mark.parametrize("check", checks_of("deepspeed_options"))
def test_options(results, check):
    for rank in results("deepspeed_options"):
        assert rank[check] == "ok", rank[check]


@pytest.mark.parametrize("check", checks_of("deepspeed_trainer"))
def test_trainer(results, check):
    for rank in results("deepspeed_trainer"):
        assert rank[check] == "ok", rank[check]


@pytest.mark.parametrize("check", checks_of("deepspeed_checkpoint"))
def test_checkpoints(results, check):
    for rank in results("deepspeed_checkpoint"):
        assert rank[check] == "ok", rank[check]
