from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lightrft_lightning.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = [
    "plan",
    "--model",
    "{name: tiny-llama, layers: 2, width: 64}",
    "--prompt_tokens",
    "8",
    "--completion_tokens",
    "8",
]


def test_a_run_on_this_cpu_is_told_whether_it_fits(capsys):
    assert main(["plan", "--config", str(EXAMPLES / "tiny_from_scratch.yaml"), "--prompt_tokens", "16"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"rollout +0\.\d\d .* s\n", out) and re.search(r"training +0\.\d\d .* s\n", out)
    assert "It fits: it needs 0." in out and "GB in the phase" in out


def test_what_does_not_fit_comes_with_what_would(capsys):
    assert main([*TINY, "--memory_gb", "0.02", "--tflops", "100", "--bandwidth_gb", "1000"]) == 0
    out = capsys.readouterr().out
    assert "does NOT fit" in out
    assert re.search(r"fit with\n  \w+=.*: 0\.0[12] GB", out)


def test_json(capsys):
    assert main([*TINY, "--memory_gb", "80", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["peak"] == max(phase["total"] for phase in plan["phases"])
    assert plan["phases"][0]["name"] == "rollout"


def test_a_model_is_needed(capsys):
    with pytest.raises(SystemExit):
        main(["plan"])
    assert "required: model" in capsys.readouterr().err


def test_errors_are_one_line(capsys):
    for args, message in (
        (["plan", "--model", "no/such/folder"], "no/such/folder"),
        ([*TINY, "--memory_gb", "-1"], "--memory_gb -1.0: must be above 0"),
        ([*TINY, "--gpus", "2"], "gpus=2 with strategy='lightrft_fake'"),
    ):
        assert main(args) == 1
        err = capsys.readouterr().err
        assert err.startswith("lightrft: error: ") and message in err and err.count("\n") == 1
