"""A checkpoint of any strategy at any world size resumes under any other; on the same one, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).parent / "jobs" / "resume.py"
ALONE = ("lightrft_fake", "lightrft_fsdp@1")
TWO = ("lightrft_fsdp", "lightrft_deepspeed_stage_1", "lightrft_deepspeed_stage_2", "lightrft_deepspeed_stage_3")
ALL = (*ALONE, *TWO)


def run_alone(*args):
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(JOB), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def differences(run_ranks, tmp_path_factory):
    """To the uninterrupted run, by ``source -> strategy``."""
    folder = tmp_path_factory.mktemp("any")
    run_alone("save", folder, *ALONE)
    run_ranks(JOB, "save", folder, *TWO, timeout=200)
    run_alone("load", folder, folder / "alone.json", *ALONE, "--", *ALL)
    run_ranks(JOB, "load", folder, folder / "two.json", *TWO, "--", *ALL, timeout=250)
    return {**json.loads((folder / "alone.json").read_text()), **json.loads((folder / "two.json").read_text())}


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("source", ALL)
def test_resume(differences, source, strategy):
    found = differences[f"{source} -> {strategy}"]
    assert found["numbers"] < 1e-5 and found["weights"] < 1e-5, found
    if source == strategy:
        assert found["equal"], found
