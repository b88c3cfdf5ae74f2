"""The strategy examples as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(folder, script, *flags, ok=True):
    """What the script prints (or its error if not `ok`), started in an empty folder."""
    command = [sys.executable, str(EXAMPLES / script), *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, env=dict(os.environ))
    assert (done.returncode == 0) is ok, done.stderr
    return done.stdout if ok else done.stderr


def test_hand_written_loop_learns_and_goes_on_from_its_checkpoint(tmp_path):
    output = run(tmp_path, "hand_written_loop.py")
    rewards = [float(r) for r in re.findall(r"reward=([\d.]+)", output)]
    assert rewards[0] < 0.2 and rewards[-1] > 0.8, output
    assert "saved runs/hand_written_loop/step_30" in output

    output = run(tmp_path, "hand_written_loop.py", "--resume", "--iterations", "5")
    rewards = [float(r) for r in re.findall(r"reward=([\d.]+)", output)]
    assert "iteration= 35" in output and rewards[0] > 0.8, output
    assert sorted(p.name for p in (tmp_path / "runs/hand_written_loop").iterdir()) == ["latest", "step_30", "step_35"]


def test_hand_written_loop_is_short_enough_to_read():
    assert len((EXAMPLES / "hand_written_loop.py").read_text().splitlines()) < 60


def test_hand_written_loop_names_a_wrong_flag(tmp_path):
    error = run(tmp_path, "hand_written_loop.py", "--strategy", "lightrft_fke", ok=False)
    assert "unknown strategy 'lightrft_fke'. Did you mean 'lightrft_fake'?" in error


def test_own_strategy_trains_in_a_trainer_and_in_a_loop(tmp_path):
    output = run(tmp_path, "own_strategy.py")
    for name in ("in_a_trainer", "in_a_loop"):
        assert re.search(rf"{name}: y = 3\.00 x \+ 1\.00, 160 steps, gradient norm [\d.]+ -> 0\.0", output), output
