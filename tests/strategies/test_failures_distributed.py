from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from lightrft_lightning.strategies.failures import RankFailedError, watch_ranks

JOB = Path(__file__).parent / "jobs" / "failing.py"
TIMEOUT = 8.0
"""The deadline in `JOB`."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank of each case in jobs/failing.py left behind, by case; all cases run at the same time."""
    job = subprocess.run(
        [sys.executable, str(JOB), str(tmp_path_factory.mktemp("ranks"))],
        capture_output=True, text=True, timeout=150, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    cases = {}
    for rank in json.loads(job.stdout):
        cases.setdefault(rank["case"], []).append(rank)
    for case in cases.values():
        times = [float(at) for r in case for at in re.findall(r"failing ([\d.]+)", r["stdout"])]
        failed_at = max(times, default=float("nan"))
        for rank in case:
            rank["seconds"] = rank["at"] - failed_at
    return cases


def bystanders(case):
    return [r for r in case if r["rank"] != r["culprit"]]


# How the job fails, what the others must say about rank {r}, and how long they may take.
EXPECTED = {
    "raise 1": (r"rank 1 \(.*, pid \d+\) failed: ValueError: boom", 10),
    "raise 0": (r"rank 0 \(.*, pid \d+\) failed: ValueError: boom", 10),
    "raise 1, others compute": (r"rank 1 \(.*, pid \d+\) failed: ValueError: boom", 10),
    "raise 0, others compute": (r"rank 0 \(.*, pid \d+\) failed: ValueError: boom", 10),
    "raise 1, others clean up": (r"rank 1 \(.*, pid \d+\) failed: ValueError: boom", 10),
    "raise 1, after an error caught": (r"rank 1 \(.*, pid \d+\) failed: ValueError: boom", 10),
    "hang 1": (r"rank 1 .* did not come to a collective for \d+ s: .* in failing.py:\d+ \(hangs\) for \d", TIMEOUT + 9),
    "hang 0": (r"rank 0 .* did not come to a collective for \d+ s: .* in failing.py:\d+ \(hangs\) for \d", TIMEOUT + 9),
    "spin 1": (r"rank 1 .* did not come to a collective for \d+ s: .* in failing.py:\d+ \(spins\) for \d", TIMEOUT + 9),
    "kill 1": (r"rank 1 .* died without an error of its own: killed .* last seen in failing.py:\d+", 10),
    "kill 0": (r"rank 0 .* died without an error of its own: killed .* last seen in failing.py:\d+", 10),
    "kill 1, others compute": (r"rank 1 .* died without an error of its own: killed", 10),
    "kill 1, workers left": (r"rank 1 .* died without an error of its own: killed", 10),
    "stop 1": (r"rank 1 .* has given no sign of life for \d+ s: stopped, .* last seen in failing.py", TIMEOUT + 9),
    "stop 0": (r"rank 0 .* has given no sign of life for \d+ s: stopped, .* last seen in failing.py", TIMEOUT + 9),
    "leave 1": (r"rank 1 .* had ended already when rank 0 needed it", 10),
    "leave 0": (r"rank 0 .* had ended already when rank 1 needed it", 10),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_others_end_in_time_with_an_error_that_names_the_rank_and_the_cause(ranks, name):
    text, seconds = EXPECTED[name]
    for rank in bystanders(ranks[name]):
        assert rank["code"] == 1, rank
        assert re.search(rf"rank {rank['rank']}\W.*(ending: |ended because ){text}", rank["stderr"]), rank["stderr"]
        assert 0 <= rank["seconds"] < seconds


@pytest.mark.parametrize("name", ["raise 1", "raise 0", "raise 1, others compute"])
def test_the_rank_that_raises_shows_its_own_error_only(ranks, name):
    (culprit,) = (r for r in ranks[name] if r["rank"] == r["culprit"])
    assert culprit["code"] == 1 and "ValueError: boom" in culprit["stderr"]
    assert "RankFailedError" not in culprit["stderr"] and "ending" not in culprit["stderr"]


def test_an_error_that_all_ranks_raise_stays_each_ones_own(ranks):
    for rank in ranks["raise all"]:
        assert rank["code"] == 1 and f"ValueError: boom on rank {rank['rank']}" in rank["stderr"]
        assert "RankFailedError" not in rank["stderr"] and rank["seconds"] < 10


def test_a_rank_that_hangs_is_told_so_and_ends(ranks):
    for name in ("hang 1", "hang 0"):
        (culprit,) = (r for r in ranks[name] if r["rank"] == r["culprit"])
        assert culprit["code"] == 1 and "the main thread does not end" in culprit["stderr"]


def test_a_rank_that_hangs_at_its_end_is_ended_and_disturbs_nobody(ranks):
    for name in ("hang 1, at its end", "hang 0, at its end", "hang all, at their end", "hang 1, after an error"):
        stuck = [r for r in ranks[name] if r["culprit"] in (None, r["rank"])]
        for rank in stuck:
            assert rank["code"] == 1 and TIMEOUT - 1 < rank["seconds"] < TIMEOUT + 14, rank
            told = r"does not end, it is" if "error" in name else r"rank \d .* has not ended for \d+ s: it is"
            assert re.search(rf"{told} in failing.py:\d+ \((hangs|spins)\)", rank["stderr"]), rank["stderr"]
        for rank in (r for r in ranks[name] if r not in stuck):
            assert rank["code"] == ("error" in name), rank


def test_two_collectives_that_never_meet_are_both_shown(ranks):
    for rank in ranks["elsewhere 1"]:
        assert rank["code"] == 1 and rank["seconds"] < TIMEOUT + 9
        assert re.search(r"\(waits_for_something_else\) > recv", rank["stderr"])
        assert re.search(r"> all_reduce", rank["stderr"])


def test_cleaning_up_runs_on_the_other_ranks(ranks):
    (rank,) = bystanders(ranks["raise 1, others clean up"])
    assert "cleaned up" in rank["stdout"]


def test_a_rank_that_is_slow_within_the_deadline_is_no_failure(ranks):
    # Three steps of 0.45 deadlines each: the waiting rank stands at the same line for longer than the deadline.
    for name in ("slow 0", "slow 1"):
        assert [r["code"] for r in ranks[name]] == [0, 0]
        assert "ending" not in "".join(r["stderr"] for r in ranks[name])


def test_killed_and_stopped_really_were(ranks):
    for name in ("kill 1", "kill 0", "stop 1"):
        (culprit,) = (r for r in ranks[name] if r["rank"] == r["culprit"])
        assert culprit["code"] == -signal.SIGKILL


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("raise", 1)])
def test_a_rank_can_end_at_any_moment(run_ranks, how, code):
    for rank in run_ranks(JOB.with_name("ends_while_watched.py"), how, check=False, preloaded=False):
        assert rank.returncode == code and "terminate called" not in rank.stderr, rank.stderr


def test_one_process_is_not_watched():
    assert watch_ranks(timedelta(seconds=1)) is None


def test_the_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(RankFailedError(1, "ValueError: boom", "rank 0 ended because ...")))
    assert (error.rank, error.cause, str(error)) == (1, "ValueError: boom", "rank 0 ended because ...")
