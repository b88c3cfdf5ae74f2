"""What docs/rewards.md shows is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lightrft_lightning import TransformersRollout
from lightrft_lightning.models.scalar import load_scalar_model
from lightrft_lightning.models.tiny import char_tokenizer
from lightrft_lightning.rewards import REWARDS, InProcesses, Judge, RemoteReward, RewardModel, Rewards

TEXT = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my-reward-model", "my-other-model"):
        load_scalar_model({"name": "tiny-llama", "layers": 1, "width": 16, "heads": 2}).save_pretrained(name)
        char_tokenizer().save_pretrained(name)
    Path("my_rewards.py").write_text("def right(completion, answer): return 1.0")


def test_the_yaml_examples(folder):
    names = [Rewards(yaml.safe_load(block)["rewards"]).names for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.S)]
    assert names == [
        ["exact_match", "right", "overlong"], ["right"], ["remote"], ["judge"], ["reward_model", "reward_model_1"],
    ]  # fmt: skip


def test_the_python_examples(folder, tiny_model, tiny_tokenizer):
    engine = TransformersRollout()
    engine.connect(tiny_model, tiny_tokenizer)
    scope = {"Rewards": Rewards, "InProcesses": InProcesses, "RemoteReward": RemoteReward, "Judge": Judge}
    scope |= {"RewardModel": RewardModel, "engine": engine}
    first, *blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert "RLHFModule(" in first and len(blocks) == 5
    for block in blocks:
        exec(block, scope)


def test_every_registered_name_is_in_the_guide():
    assert [name for name in REWARDS if f"`{name}`" not in TEXT and not name.startswith("test_")] == []
