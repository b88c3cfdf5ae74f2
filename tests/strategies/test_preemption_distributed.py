from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

JOB = Path(__file__).parent / "jobs" / "preempted.py"
SIGNALS = int(os.environ.get("LIGHTRFT_PREEMPTIONS", "2"))
"""In each chain of runs."""
SOME = ("background, validation within the epoch", "slurm", "two, the second, slurm")


@pytest.fixture(scope="module")
def chains(run_ranks, tmp_path_factory):
    """What came of every chain of runs in jobs/preempted.py; all of them, if `LIGHTRFT_PREEMPTIONS` is set."""
    names = () if "LIGHTRFT_PREEMPTIONS" in os.environ else SOME
    folder = tmp_path_factory.mktemp("runs")
    (job,) = run_ranks(JOB, folder, SIGNALS, 3, *names, world_size=1, timeout=200 * SIGNALS)
    return json.loads(job.stdout)


def test_runs_that_are_preempted_at_random_moments_do_what_one_run_does(chains):
    preempted = 0
    for name, chain in chains.items():
        if name not in ("twice", "setup", "setup, computing", "requeued"):
            *ended, (_, last) = chain["codes"]
            assert last == [0] * chain["ranks"], chain["errors"]
            assert all(codes == [143] * chain["ranks"] for _, codes in ended)
            # Every iteration and validation once, with the same metrics to the last bit; the same weights at the end.
            assert chain["log"] == chain["undisturbed"], (name, chain["codes"])
            preempted += len(ended)
    assert preempted >= SIGNALS * 2


def test_all_that_ends_a_run_is_told_once(chains):
    """A signal before the first batch finds nothing to save; the job is queued again in any case."""
    for name, where in (("slurm", r"hpc_ckpt_\d"), (SOME[0], "checkpoints/last"), (SOME[2], r"hpc_ckpt_\d")):
        ended = sum(codes[0] == 143 for _, codes in chains[name]["codes"])
        told = ["the run ends after this iteration", rf"(saved .*{where}\.ckpt|nothing to save has happened)"]
        told += ["job 7 is queued again"] * ("slurm" in name)
        for line in told:
            assert len(re.findall(rf"^.*{line}", chains[name]["errors"], re.M)) == ended, (name, line)
    assert chains["requeued"] == "requeue 7\n" * chains["requeued"].count("\n") != ""
    assert "SIGUSR1 on another rank: the run ends after this iteration" in chains[SOME[2]]["errors"]
    assert not any("RankFailedError" in chain["errors"] for name, chain in chains.items() if name in SOME)


def test_a_second_signal_ends_all_ranks_at_once(chains):
    chain = chains["twice"]
    ((_, codes),) = chain["codes"]
    assert codes == [143, 1] and chain["log"] == [] and chain["seconds"] < 60
    cause = "was told by a second signal, SIGTERM, to end at once"
    assert f"this process {cause}" in chain["errors"]
    assert re.search(rf"rank 1 ended because rank 0 .* failed: {cause}", chain["errors"])


def test_a_signal_while_a_run_is_set_up_ends_it_in_good_order(chains):
    """Callbacks hear of it and close what they have started; a library that computes meanwhile has its time."""
    chain = chains["setup"]
    ((_, codes),) = chain["codes"]
    assert codes == [143, 1] and chain["log"] == []
    assert "SIGTERM before the first batch: the run ends" in chain["errors"]
    assert re.search(r"rank 1 ended because rank 0 .* failed: SystemExit: 143", chain["errors"])
    chain = chains["setup, computing"]
    assert chain["codes"][0][1] == [143]
    assert "was told by SIGTERM to end, and had not after 0.1 s" in chain["errors"]
