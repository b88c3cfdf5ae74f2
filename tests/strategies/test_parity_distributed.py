"""The module's main claim: every back end computes the same. Runs the benchmark whose table the README quotes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "parity.py"
NAMES = ("lightrft_fsdp", "lightrft_deepspeed_stage_1", "lightrft_deepspeed_stage_2", "lightrft_deepspeed_stage_3")


@pytest.fixture(scope="module")
def rows(run_ranks, tmp_path_factory):
    """The table's rows by strategy; its ranks run as jobs of these tests do."""
    folder, parity = tmp_path_factory.mktemp("parity"), benchmark()

    def run(name):
        out = folder / f"{name}.pt"
        ranks, env = parity.BACK_ENDS[name], {"TORCHELASTIC_RUN_ID": "parity", "PYTHONPATH": str(BENCHMARK.parent)}
        run_ranks(BENCHMARK, "--rank-of", name, "--output", out, world_size=ranks, timeout=280, env=env)
        return torch.load(out, weights_only=False)

    expected = run("lightrft_fake")
    return {name: parity.compare(name, "cpu", run(name), expected) for name in NAMES}


def benchmark():
    spec = importlib.util.spec_from_file_location("parity", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARK.parent)
        spec.loader.exec_module(module)
    return module


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
