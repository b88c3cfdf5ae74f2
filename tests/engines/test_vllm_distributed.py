"""Real vLLM (its CPU build) in real processes; the checks themselves are in jobs/."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "jobs"
JOBS = {
    ("vllm_engine",): 1,
    ("vllm_training", "lightrft_fake"): 1,
    ("vllm_training", "lightrft_fsdp", "lightrft_deepspeed_stage_3"): 2,
    ("vllm_tensor_parallel",): 2,
}
"""Script and arguments, and on how many processes each runs."""
CHECKS = [
    (job, check)
    for job in JOBS
    for check in re.findall(r"^def (check_\w+)", (FOLDER / f"{job[0]}.py").read_text(), re.M)
]


@pytest.fixture(scope="module")
def results(run_ranks, tmp_path_factory):
    """What came of each check, by job and rank."""
    cache = {}

    def of(job):
        if job not in cache:
            cache[job] = None
            script, *arguments = job
            folder = tmp_path_factory.mktemp(script)
            env = {"PYTHONPATH": str(FOLDER.parents[1] / "strategies" / "jobs")}
            # Fresh: vLLM's shared memory has one name in all jobs, and goes with the end of an interpreter only.
            options = {"world_size": JOBS[job], "timeout": 280, "env": env, "preloaded": False}
            run_ranks(FOLDER / f"{script}.py", folder, *arguments, **options)
            cache[job] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(JOBS[job])]
        return cache[job] or pytest.fail("the job failed, as its first check has it")

    return of


@pytest.mark.parametrize(("job", "check"), CHECKS)
def test_in_real_processes(results, job, check):
    for rank in results(job):
        assert rank[check] == "ok", rank[check]


HANGS = {
    "start": "start", "request": "_run", "generate": "_run", "update": "_call", "end_of_update": "_forget_prefixes",
    "verify": "_call", "sleep": "sleep", "wake_up": "wake_up", "close": "close",
}  # fmt: skip
"""Phases of jobs/vllm_hangs.py, and the method of `VLLMRollout` in which each hangs."""


@pytest.fixture(scope="module")
def hung(run_ranks, tmp_path_factory):
    """The folder with the output of each phase, and their exit codes."""
    folder, env = tmp_path_factory.mktemp("hung"), {"PYTHONPATH": str(FOLDER.parents[1] / "strategies" / "jobs")}
    options = {"world_size": 1, "timeout": 120, "env": env, "preloaded": False}
    (result,) = run_ranks(FOLDER / "vllm_hangs.py", folder, **options)
    return folder, json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("phase", HANGS)
def test_a_call_that_hangs_ends_the_process_with_its_place(hung, phase):
    folder, codes = hung
    output = (folder / f"phase_{phase}").read_text()
    assert codes[f"phase_{phase}"] == 1 and "Timeout (0:00:0" in output
    assert re.search(rf'engines.vllm\.py", line \d+ in {HANGS[phase]}$', output, re.M), output
    assert len(codes) == len(HANGS)
