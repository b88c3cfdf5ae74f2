from __future__ import annotations

from pathlib import Path

import pytest

from lightrft_lightning.planning import Planned, of_config

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 0}, "gpus=0: must be at least 1"),
        ({"strategy": "lightrft_fdsp"}, "'lightrft_fdsp'.*did you mean 'lightrft_fsdp'"),
        ({"precision": "8-true"}, "precision.*'8-true'.*32-true"),
        ({"engine": "vlm"}, "engine.*'vlm'.*vllm"),
        ({"gpus": 2}, "gpus=2 with strategy='lightrft_fake', which is one process"),
        ({"token_budget": 100}, "token_budget=100: a prompt of 256 and a completion of 512 tokens do not fit"),
        ({"kl_coef": -1.0}, r"kl_coef=-1\.0.*must be 0 or more"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=rf"(?i){message}"):
        Planned("tiny-llama", **settings)


def test_every_run_of_the_examples_can_be_planned():
    planned = {}
    for path in EXAMPLES.glob("*.yaml"):
        if path.stem not in ("sft", "reward_model"):
            planned[path.stem] = Planned(**of_config(path))
    assert len(planned) > 4
    tiny = planned["tiny_from_scratch"]
    assert tiny.model == {"name": "tiny-llama", "layers": 3, "width": 128}
    assert (tiny.accelerator, tiny.strategy, tiny.engine) == ("cpu", "lightrft_fake", "transformers")
    assert planned["smollm2_vllm"].engine == "vllm"
    assert planned["tiny_one_step_off"].engine == "remote"


def test_presets_bring_their_critic_and_penalty(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {model: tiny-llama, rewards: last_number, algorithm: ppo, kl_coef: 0.1}")
    found = of_config(tmp_path / "run.yaml")
    assert found["critic"] and found["kl_coef"] == 0.1


def test_refuses_other_files(tmp_path):
    with pytest.raises(ValueError, match=r"sft\.yaml: holds no run of RLHFModule"):
        of_config(EXAMPLES / "sft.yaml")
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml: no such file"):
        of_config(tmp_path / "nothing.yaml")
