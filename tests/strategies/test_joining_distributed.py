from __future__ import annotations

import re
from pathlib import Path

JOB = Path(__file__).parent / "jobs" / "joining.py"
OTHERWISE = r"rank 1 was started with WORLD_SIZE=3, rank 0 with 2\n"
SAID = (
    rf"met\nrank\(s\) 1 of 2 have not joined within \d s: see what each of them has printed\n{OTHERWISE}",
    r"met\nrank 1 has not met rank 0 at 127\.0\.0\.1:\d+ within 1 s: it has not started, or has ended;.*\n"
    rf"rank 1 has found rank 0, but {OTHERWISE}",
)


def test_ranks_meet_again_on_one_port_and_name_who_stays_away(run_ranks):
    ranks = run_ranks(JOB, 15, check=False, timeout=90)
    for result, said in zip(ranks, SAID, strict=True):
        assert re.fullmatch(said, result.stdout), result.stderr
    # In the end one dies while the other waits for it in torch, where ranks that have met get to know one another.
    assert [result.returncode for result in ranks] == [1, 7]
    assert re.search(r"\[rank 0\] ending: rank 1 \(.*\) died without an error of its own: killed", ranks[0].stderr)
