"""The module's main claim: every back end computes the same. Runs the benchmark whose table the README quotes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "parity.py"
NAMES = ("lightrft_fsdp", "lightrft_deepspeed_stage_1", "lightrft_deepspeed_stage_2", "lightrft_deepspeed_stage_3")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The table's rows by strategy."""
    out = tmp_path_factory.mktemp("parity") / "parity.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--out", str(out)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {row["strategy"]: row for row in json.loads(out.read_text())["rows"]}


@pytest.mark.parametrize("name", NAMES)
def test_hand_written_loop(rows, name):
    """Actor and critic, 20 optimizer steps with accumulation, clipping and ragged sequences."""
    for what in ("loss", "gradient norm", "parameters"):
        assert rows[name][what] < 1e-5, rows[name]


@pytest.mark.parametrize("name", NAMES)
def test_grpo_under_a_trainer(rows, name):
    assert rows[name]["same token ids"] == "yes"
    assert rows[name]["GRPO gradient norm"] < 1e-5, rows[name]
    assert rows[name]["GRPO parameters"] < 1e-5, rows[name]
