"""A checkpoint of any strategy at any world size resumes under any other; on the same one, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

JOBS = Path(__file__).parent / "jobs"
ALONE = ("lightrft_fake", "lightrft_fsdp@1")
TWO = ("lightrft_fsdp", "lightrft_deepspeed_stage_1", "lightrft_deepspeed_stage_2", "lightrft_deepspeed_stage_3")
ALL = (*ALONE, *TWO)

pytestmark = pytest.mark.timeout(900)  # the jobs of the first test


def measure(script, run_ranks, folder):
    """What the job found for each ``source -> strategy``."""
    run_ranks(script, "save", folder, *ALONE, world_size=1, timeout=200)
    run_ranks(script, "save", folder, *TWO, timeout=200)
    run_ranks(script, "load", folder, folder / "alone.json", *ALONE, "--", *ALL, world_size=1, timeout=200)
    run_ranks(script, "load", folder, folder / "two.json", *TWO, "--", *ALL, timeout=280)
    return {**json.loads((folder / "alone.json").read_text()), **json.loads((folder / "two.json").read_text())}


@pytest.fixture(scope="module")
def loop(run_ranks, tmp_path_factory):
    return measure(JOBS / "resume.py", run_ranks, tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def trainer(run_ranks, tmp_path_factory):
    return measure(JOBS / "resume_trainer.py", run_ranks, tmp_path_factory.mktemp("trainer"))


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("source", ALL)
def test_hand_written_loop(loop, source, strategy):
    """Actor and critic: losses, gradient norms and weights of steps 4 to 6, after a checkpoint at step 3."""
    found = loop[f"{source} -> {strategy}"]
    assert found["numbers"] < 1e-5 and found["weights"] < 1e-5, found
    if source == strategy:
        assert found["equal"], found


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("source", ALL)
def test_grpo_under_a_trainer(trainer, source, strategy):
    """In the middle of an epoch: the same prompts, completions and weights as without the interruption."""
    found = trainer[f"{source} -> {strategy}"]
    assert found["same tokens"] and found["same step"] and found["weights"] < 1e-5, found
    if source == strategy:
        assert found["equal"], found
