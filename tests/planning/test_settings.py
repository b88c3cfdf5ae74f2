from __future__ import annotations

from pathlib import Path

import pytest

from lightrft_lightning import SamplingParams
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
        ({"offload": "model"}, "offload.*'model'.*optimizer"),
        ({"offload": "all"}, "offload='all' with engine='transformers'"),
        ({"quantization": "nf4"}, "quantization='nf4': these weights cannot be trained; say --lora_rank"),
        ({"quantization": "nf4", "lora_rank": 8, "strategy": "lightrft_fsdp"}, "quantization='nf4': .* shards"),
        ({"adam_8bit": True, "strategy": "lightrft_deepspeed_offload"}, "adam_8bit=True with adam_offload=True"),
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
    assert planned["smollm2_sglang"].engine == "sglang"
    assert planned["tiny_one_step_off"].engine == "remote"


def test_presets_bring_their_critic_and_penalty(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {model: tiny-llama, rewards: last_number, algorithm: ppo, kl_coef: 0.1}")
    found = of_config(tmp_path / "run.yaml")
    assert found["critic"] and found["kl_coef"] == 0.1


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("lightrft_fsdp", {"strategy": "lightrft_fsdp"}),
        ("{class_path: FakeStrategy, init_args: {adam_8bit: true}}", {"strategy": "lightrft_fake", "adam_8bit": True}),
        (
            "{class_path: lightrft_lightning.FSDPV2Strategy, init_args: {fsdp_cpu_offload: true}}",
            {"strategy": "lightrft_fsdp_offload"},
        ),
        (
            "{class_path: DeepspeedStrategy, init_args: {zero_stage: 3}}",
            {"strategy": "lightrft_deepspeed_stage_3"},
        ),
    ],
)
def test_a_strategy_is_known_by_its_class(tmp_path, written, expected):
    run = f"model: {{model: tiny-llama, rewards: last_number}}\ntrainer: {{strategy: {written}, devices: 1}}"
    (tmp_path / "run.yaml").write_text(run)
    found = of_config(tmp_path / "run.yaml")
    assert {name: found[name] for name in expected} == expected
    Planned(**found)


def test_refuses_other_files(tmp_path):
    with pytest.raises(ValueError, match=r"sft\.yaml: holds no run of RLHFModule"):
        of_config(EXAMPLES / "sft.yaml")
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml: no such file"):
        of_config(tmp_path / "nothing.yaml")


def test_what_a_file_leaves_out_is_what_its_run_takes(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {model: tiny-llama, rewards: exact_match}\n")
    planned = Planned(**of_config(tmp_path / "run.yaml"))
    assert (planned.prompts, planned.n) == (8, 8)
    assert (planned.prompt_tokens, planned.completion_tokens) == (1024, SamplingParams().max_new_tokens)
    (tmp_path / "run.yaml").write_text(
        "model: {model: tiny-llama, rewards: exact_match, sampling: {max_new_tokens: 4}}\n"
    )
    planned = Planned(**of_config(tmp_path / "run.yaml"))
    assert (planned.n, planned.completion_tokens) == (SamplingParams().n, 4)
