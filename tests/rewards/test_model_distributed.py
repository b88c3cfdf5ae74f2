"""Reward models sharded over two processes, with unequal numbers of samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightrft_lightning.models.scalar import load_scalar_model
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama
from lightrft_lightning.rewards import RewardModel

JOB = Path(__file__).parent / "jobs" / "reward_model_ranks.py"


@pytest.mark.parametrize("strategy", ["lightrft_fsdp", "zero_3"])
def test_sharded_reward_models_give_the_values_of_one_process(run_ranks, tmp_path, strategy):
    model = load_scalar_model({"name": "tiny-llama", "layers": 2, "width": 32, "heads": 2})
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    policy = tiny_llama(0, layers=1, width=16, heads=2)
    for name, one in (("rm", model), ("policy", policy)):
        one.save_pretrained(tmp_path / name)
        char_tokenizer().save_pretrained(tmp_path / name)
    run_ranks(JOB, tmp_path, strategy, tmp_path / "rm", tmp_path / "policy", timeout=200)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    reward_model = RewardModel(tmp_path / "rm", template="{completion}")
    for rank in ranks:
        texts, values, rest = zip(*rank["found"], strict=True)
        expected = reward_model([""] * len(texts), list(texts))
        assert values == pytest.approx(expected, abs=1e-5) and rest == pytest.approx(expected, abs=1e-5)
        assert rank["saved"] == []
        assert "val/reward/reward_model" in rank["metrics"] and rank["metrics"] == ranks[0]["metrics"]
    assert len(ranks[0]["found"]) != len(ranks[1]["found"])
    whole = sum(p.numel() for p in model.parameters())
    assert all(rank["held"] < 0.6 * whole for rank in ranks)
