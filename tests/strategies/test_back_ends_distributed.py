"""FSDP2 and DeepSpeed ZeRO in real processes; the checks themselves are in jobs/."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "jobs"
JOBS = {
    "fsdp_loop": 2, "fsdp_trainer": 2, "fsdp_hybrid": 4,
    "deepspeed_loop": 2, "deepspeed_options": 2, "deepspeed_trainer": 2, "deepspeed_checkpoint": 2,
    "interface one": 1, "interface two": 2, "adam_8bit": 2, "supervised_trainer": 2, "ahead_trainer lightrft_fsdp": 2,
}  # fmt: skip
"""And on how many processes each runs."""
JOBS |= {
    f"algorithms_trainer {strategy}": 2
    for strategy in ("lightrft_fsdp", *(f"lightrft_deepspeed_stage_{stage}" for stage in (1, 2, 3)))
}
CHECKS = [
    (job, check)
    for job in JOBS
    for check in re.findall(r"^def (check_\w+)", (FOLDER / f"{job.split()[0]}.py").read_text(), re.M)
]


@pytest.fixture(scope="module")
def results(run_ranks, tmp_path_factory):
    """What came of each check, by job and rank."""
    cache = {}

    def of(job):
        if job not in cache:
            cache[job] = None
            folder = tmp_path_factory.mktemp(job.replace(" ", "_"))
            script, *arguments = job.split()
            run_ranks(FOLDER / f"{script}.py", folder, *arguments, world_size=JOBS[job], timeout=280)
            cache[job] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(JOBS[job])]
        return cache[job] or pytest.fail("the job failed, as its first check has it")

    return of


@pytest.mark.parametrize(("job", "check"), CHECKS)
def test_in_real_processes(results, job, check):
    for rank in results(job):
        assert rank[check] == "ok", rank[check]
