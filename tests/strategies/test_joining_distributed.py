from __future__ import annotations

import re
from pathlib import Path

JOB = Path(__file__).parent / "jobs" / "joining.py"
SAID = (
    r"met\nrank\(s\) 1 of 2 have not joined within \d s: see what each of them has printed\n",
    r"met\nrank 1 has not met rank 0 at 127\.0\.0\.1:\d+ within 1 s: it has not started, or has ended;.*\n",
)


def test_ranks_meet_again_on_one_port_and_name_who_stays_away(run_ranks):
    for result, said in zip(run_ranks(JOB, 15), SAID, strict=True):
        assert re.fullmatch(said, result.stdout), result.stdout
