"""Checkpoints of two real processes; the checks themselves are in jobs/checkpoint_ranks.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

JOB = Path(__file__).parent / "jobs" / "checkpoint_ranks.py"


@pytest.fixture(scope="module")
def results(run_ranks, tmp_path_factory):
    """What came of each check, by rank."""
    folder = tmp_path_factory.mktemp("checkpoint_ranks")
    run_ranks(JOB, folder, timeout=200)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", re.findall(r"^def (check_\w+)", JOB.read_text(), re.M))
def test_two_ranks(results, check):
    for rank in results:
        assert rank[check] == "ok", rank[check]
