from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_reward.py"


def test_it_learns_what_the_rewards_ask_for(tmp_path):
    run = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    before, after = map(float, re.search(r"Done: training reward (.*) -> (.*) \(means", run.stdout).groups())
    assert after > before + 0.3
    assert list(tmp_path.iterdir()) == []
