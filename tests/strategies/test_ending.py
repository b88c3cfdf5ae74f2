from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

JOB = Path(__file__).parent / "jobs" / "endings.py"
TWICE = (
    r"printed\n\[rank 3: node7\] has not ended for 0 s: {0}; in 0 s it is ended\n"
    r"\[rank 3: node7\] has not ended for 1 s after its end: {0}; leaving at once\n"
)
LOADER = r"it waits for the thread 'loader' in endings\.py:\d+ \(hangs\)"
SAID = {
    "thread": (1, TWICE.format(LOADER)),
    "worker_of_a_pool": (1, TWICE.format(r"it waits for the thread 'pool_0' in endings\.py:\d+ \(hangs\)")),
    "handler": (1, TWICE.format(r"it is in endings\.py:\d+ \(hangs\)")),
    "destructor": (1, r"printed\n(?s:.*)Timeout (?s:.*)Thread (?s:.*)"),  # others complain of what is gone already
    "error": (1, rf"(?s:.*)ValueError: boom\n.*has not ended for 0 s after its error: {LOADER}; leaving at once\n"),
    "preempted": (143, TWICE.format(LOADER)),
    "nothing": (0, r"(printed\n)+"),
}


@pytest.fixture(scope="module")
def endings(run_ranks):
    (job,) = run_ranks(JOB, world_size=1, preloaded=False)
    return json.loads(job.stdout)


@pytest.mark.parametrize("how", SAID)
def test_a_process_that_does_not_end_is_ended_and_says_what_it_waited_for(endings, how):
    code, text = endings[how]
    assert code == SAID[how][0]
    assert re.fullmatch(SAID[how][1], "".join(sorted(text.splitlines(True), key="printed\n".__ne__))), text
