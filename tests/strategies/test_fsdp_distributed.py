"""FSDP2 in two real processes (four for hybrid sharding); the checks themselves are in jobs/."""

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

    def of(job, ranks=2):
        if job not in cache:
            folder = tmp_path_factory.mktemp(job)
            run_ranks(JOBS / f"{job}.py", folder, world_size=ranks, timeout=200)
            cache[job] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
        return cache[job]

    return of


@pytest.mark.parametrize("check", checks_of("fsdp_loop"))
def test_hand_written_loop(results, check):
    for rank in results("fsdp_loop"):
        assert rank[check] == "ok", rank[check]


@pytest.mark.parametrize("check", checks_of("fsdp_trainer"))
def test_trainer(results, check):
    for rank in results("fsdp_trainer"):
        assert rank[check] == "ok", rank[check]


@pytest.mark.parametrize("check", checks_of("fsdp_hybrid"))
def test_hybrid_sharding(results, check):
    for rank in results("fsdp_hybrid", 4):
        assert rank[check] == "ok", rank[check]
