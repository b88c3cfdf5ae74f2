"""SIGKILL of one or both ranks in the middle of a save; see jobs/checkpoint_kill.py."""

from __future__ import annotations

import json
from pathlib import Path

JOB = Path(__file__).parent / "jobs" / "checkpoint_kill.py"
ROUNDS = 20


def test_ranks_killed_at_random_points_of_a_save(run_ranks, tmp_path):
    """The newest checkpoint is always complete, and what is resumed is bit for bit the uninterrupted run."""
    (done,) = run_ranks(JOB, tmp_path / "checkpoints", ROUNDS, world_size=1, timeout=250)
    *rounds, end = (json.loads(line) for line in done.stdout.splitlines())
    assert len(rounds) == ROUNDS
    assert sum(one["inside"] for one in rounds) >= ROUNDS // 2  # most kills came during a save
    assert {tuple(one["victims"]) for one in rounds} == {(0,), (1,), (0, 1)}
    for one in rounds:
        survivors = [code for rank, code in enumerate(one["codes"]) if rank not in one["victims"]]
        assert survivors in ([], [3]), one  # they end with an error of their own, they are not left waiting
        assert one["latest"] in one["there"] or one["latest"] == "same"
    assert rounds[-1]["n"] > ROUNDS
    assert end["left"] == []  # the next save removes what killed ones have left
