"""What docs/environments.md shows is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from lightrft_lightning import Prompt, RLHFModule, SamplingParams
from lightrft_lightning.environments import ENVIRONMENTS, Turn
from lightrft_lightning.environments.episodes import Episodes

TEXT = (Path(__file__).parents[2] / "docs" / "environments.md").read_text()


def test_the_python_examples(tiny_model, tiny_tokenizer):
    scope = {"RLHFModule": RLHFModule, "SamplingParams": SamplingParams, "model": tiny_model}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(block, scope)
    guess = Episodes({"name": "guess", "most": 10}).make()
    guess.reset(Prompt((1,), ""), 27)
    told = [guess.step(Turn(text, (1,), "eos", k, False)) for k, text in enumerate(["?", "3", "9", "7"], 1)]
    assert [o.text for o in told] == ["A number, please.", "higher", "lower", ""]
    assert [o.reward for o in told] == [None, -0.1, -0.1, 1.0] and told[-1].done and told[0].error


def test_the_yaml_example(tiny_model):
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    module = RLHFModule(tiny_model, **yaml.safe_load(block)["model"])
    assert module.rewards.names == ["environment"] and module.episodes.max_turns == 4


def test_every_registered_name_is_in_the_guide():
    names = [name for name in ENVIRONMENTS if name not in ("guess", "counts")]
    assert [name for name in names if f"environment: {name}" not in TEXT] == []
