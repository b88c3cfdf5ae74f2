"""Log-probabilities at completion tokens: right for any head, at any chunk size, without the full logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tensors import LargestTensor, NewTensors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
)

from lightrft_lightning.experience.packing import pack, unpack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.attention import use_kernel
from lightrft_lightning.models.logprobs import completion_logprobs, find_causal_lm, shared_prompt_problem
from lightrft_lightning.models.rope import length_limit

VOCAB = 61


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trajectory(prompt: list[int], completion: list[int], group: int) -> Trajectory:
    return Trajectory(
        Prompt(tuple(prompt), ""), Completion(tuple(completion), (0.0,) * len(completion), "length"), group
    )


TRAJECTORIES = [
    trajectory([1, 2, 3], [4, 5], 0),
    trajectory([1, 2, 3], [6, 7, 8, 9, 10], 0),
    trajectory([11, 12], [13], 1),
    trajectory([11, 12], [14, 15, 16], 1),
]
NUM_TOKENS = sum(len(t.mask) for t in TRAJECTORIES)

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def llama(**settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **settings}))


def with_bias(model: PreTrainedModel) -> PreTrainedModel:
    nn.init.normal_(model.get_output_embeddings().bias, std=2.0)
    return model


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**{k: v for k, v in SMALL.items() if k not in ("intermediate_size", "num_key_value_heads")})
    ),
    "phi (head with bias)": lambda: with_bias(PhiForCausalLM(PhiConfig(**SMALL))),
    "gemma2 (soft cap)": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0, sliding_window=64)
    ),
    "cohere (logit_scale)": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "granite (logits_scaling)": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
    "opt (head behind a decoder)": lambda: OPTForCausalLM(
        OPTConfig(**{**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "pad_token_id": 1})
    ),
    "mixtral (experts)": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, num_local_experts=4, output_router_logits=True)
    ),
}


def naive(model: nn.Module, temperature: float = 1.0, trajectories: list[Trajectory] = TRAJECTORIES) -> Tensor:
    """log_softmax of the full logits of one sequence at a time."""
    result = []
    for t in trajectories:
        logits = model(input_ids=torch.tensor([t.prompt.token_ids + t.completion.token_ids])).logits[0]
        logprobs = (logits / temperature).log_softmax(-1)[len(t.prompt.token_ids) - 1 : -1]
        result.append(logprobs.gather(-1, torch.tensor(t.completion.token_ids)[:, None])[:, 0])
    return torch.cat(result)


def ours(model: nn.Module, share_prompts: bool = True, budget: int = 1000, **settings: Any) -> Tensor:
    batches = pack(TRAJECTORIES, budget, share_prompts=share_prompts)
    return torch.cat(
        unpack(batches, [completion_logprobs(model, b, **settings).logprobs for b in batches], TRAJECTORIES)
    )


def gradients(model: nn.Module, logprobs: Tensor) -> dict[str, Tensor]:
    (logprobs * torch.linspace(-1, 1, logprobs.numel())).sum().backward()
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_models_own_logits(name: str) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    torch.testing.assert_close(ours(model, temperature=0.7, chunk_size=4), naive(model, 0.7), atol=2e-5, rtol=1e-5)
    expected = gradients(model, naive(model, 0.7))
    got = gradients(model, ours(model, temperature=0.7, chunk_size=4))
    assert got.keys() == expected.keys()
    scale = torch.cat([g.flatten() for g in expected.values()]).norm()
    for parameter, value in expected.items():
        assert (got[parameter] - value).norm() < 1e-5 * scale, parameter


def test_soft_capping_matters_in_this_test() -> None:
    model = ARCHITECTURES["gemma2 (soft cap)"]().eval()
    capped = ours(model)
    model.config.final_logit_softcapping = None
    assert (ours(model) - capped).abs().max() > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradient_checkpointing_of_the_backbone_changes_nothing(attention: str) -> None:
    model = llama(attn_implementation=attention).train()
    before = gradients(model, ours(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    after = gradients(model, ours(model))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_chunk_size_does_not_matter() -> None:
    model = llama().double()
    reference = ours(model, chunk_size=1000)
    expected = gradients(model, reference)
    for chunk_size in (1, 3, NUM_TOKENS):
        logprobs = ours(model, chunk_size=chunk_size)
        torch.testing.assert_close(logprobs, reference, atol=1e-13, rtol=0)
        for name, gradient in gradients(model, logprobs).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-10)


def test_temperature_divides_the_logits() -> None:
    model = llama()
    assert (ours(model, temperature=0.5) - ours(model, temperature=1.0)).abs().max() > 0.1
    torch.testing.assert_close(ours(model, temperature=0.5), naive(model, 0.5), atol=1e-5, rtol=1e-5)


def test_entropy_of_the_sampling_distribution() -> None:
    model = llama()
    (batch,) = pack([TRAJECTORIES[0]], 100)
    result = completion_logprobs(model, batch, temperature=0.7, chunk_size=1, entropy=True)
    logits = model(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits[0, 2:4]
    expected = torch.distributions.Categorical(logits=logits / 0.7).entropy()
    assert result.entropy is not None and not result.entropy.requires_grad
    torch.testing.assert_close(result.entropy, expected, atol=1e-5, rtol=1e-5)
    assert completion_logprobs(model, batch).entropy is None


def test_a_bfloat16_model_gets_a_float32_log_softmax() -> None:
    model = llama(initializer_range=0.5).bfloat16()
    (batch,) = pack(TRAJECTORIES, 1000, share_prompts=False)
    logprobs = completion_logprobs(model, batch).logprobs
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask(torch.bfloat16, "sdpa")).logits
    logits = logits[batch.row, batch.column]
    exact = logits.double().log_softmax(-1).gather(-1, batch.target[:, None])[:, 0]
    rounded = logits.log_softmax(-1).gather(-1, batch.target[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    assert (logprobs - exact).abs().max() < 1e-5
    assert (rounded - exact).abs().max() > 1e-3


def test_the_full_logits_never_exist() -> None:
    vocab, tokens, chunk_size = 400, 128, 16
    model = llama(vocab_size=vocab, hidden_size=16, intermediate_size=16)
    many = [trajectory([1, 2], list(range(3, 35)), g) for g in range(4)]
    (batch,) = pack(many, 1000)
    assert batch.num_policy_tokens == tokens
    with LargestTensor() as control:
        model(input_ids=torch.tensor([t.completion.token_ids for t in many])).logits.log_softmax(-1)
    assert control.numel == tokens * vocab
    with LargestTensor() as largest:
        completion_logprobs(model, batch, chunk_size=chunk_size).logprobs.sum().backward()
    assert largest.numel == chunk_size * vocab


def test_no_logits_wait_for_the_backward_pass() -> None:
    model = llama()
    (batch,) = pack(TRAJECTORIES, 1000)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape[-1])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = completion_logprobs(model, batch, chunk_size=4).logprobs
    assert kept and VOCAB not in kept
    logprobs.sum().backward()


def test_the_heads_gradient_is_summed_in_one_tensor() -> None:
    vocab, width = 400, 16
    model = llama(vocab_size=vocab, hidden_size=width, intermediate_size=width)
    many = [trajectory([1, 2], list(range(3, 35)), g) for g in range(4)]
    (batch,) = pack(many, 1000)
    logprobs = completion_logprobs(model, batch, chunk_size=16).logprobs
    with NewTensors(vocab, width) as new:
        logprobs.sum().backward()
    assert new.count == 2  # the other is that of the input embeddings


def test_a_graph_that_runs_backward_twice_gives_twice_the_gradient() -> None:
    model = llama(tie_word_embeddings=True)
    naive(model).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    total = ours(model, chunk_size=3).sum()
    total.backward(retain_graph=True)
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * expected[name], atol=1e-4, rtol=1e-4)


def test_the_improbable_is_as_exact_as_the_probable() -> None:
    model = llama()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 30  # probabilities down to e^-200
    exact = naive(model.double())
    assert exact.min() < -100
    torch.testing.assert_close(ours(model.float()), exact.float(), atol=1e-4, rtol=1e-5)


def test_hooks_of_the_model_run_once_and_its_forward_is_restored() -> None:
    """Wrappers such as FSDP2 gather the weights in a hook of the root module."""
    model, calls = llama(), []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.register_forward_hook(lambda *_: calls.append("after"))
    ours(model, chunk_size=2)
    assert calls == ["before", "after"]
    assert "forward" not in vars(model) and "forward" not in vars(model.model)
    with pytest.raises(IndexError):
        completion_logprobs(model, pack([trajectory([1, VOCAB + 1], [2], 0)], 9)[0])
    assert "forward" not in vars(model) and "forward" not in vars(model.model)


def test_a_forward_that_someone_else_replaced_survives() -> None:
    model = llama()
    own = model.forward
    model.forward = replaced = lambda *args, **kwargs: own(*args, **kwargs)
    torch.testing.assert_close(ours(model), naive(model), atol=1e-5, rtol=1e-5)
    assert model.forward is replaced


@pytest.mark.parametrize("share_prompts", [True, False])
def test_lora(share_prompts: bool) -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert find_causal_lm(model) is model.get_base_model()
    torch.testing.assert_close(ours(model, share_prompts), naive(model), atol=2e-5, rtol=1e-5)
    expected = gradients(model, naive(model))
    got = gradients(model, ours(model, share_prompts))
    assert expected and all("lora" in name for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-4, rtol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(ours(model), naive(model), atol=2e-5, rtol=1e-5)
        assert (ours(model) - ours(llama())).abs().max() < 1e-6


def test_a_wrapper_that_calls_the_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    model = llama()
    assert torch.equal(ours(Wrapper(model)), ours(model))


def test_no_gradient_under_no_grad() -> None:
    model = llama()
    with torch.no_grad():
        logprobs = ours(model)
    assert not logprobs.requires_grad
    assert torch.equal(logprobs, ours(model).detach())


# ------------------------------------------------------------------ what cannot work is refused


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature={temperature}: must be above 0"):
        ours(llama(), temperature=temperature)


def test_chunk_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="chunk_size=0"):
        ours(llama(), chunk_size=0)


def test_not_a_language_model() -> None:
    with pytest.raises(TypeError, match="Linear is not, and contains no, Hugging Face causal language model"):
        ours(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="LlamaModel"):
        ours(llama().model)


def test_prompt_learning_adapters_are_refused() -> None:
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="use LoRA"):
        ours(model, share_prompts=False)


UNSHARED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1)),
        "recurrent layers",
    ),
    "bloom": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)),
        "no position ids",
    ),
}


@pytest.mark.parametrize("name", UNSHARED)
def test_models_that_cannot_share_prompts_say_so_and_work_without(name: str) -> None:
    build, problem = UNSHARED[name]
    torch.manual_seed(0)
    model = build().eval()
    assert problem in (shared_prompt_problem(model) or "")
    with pytest.raises(ValueError, match=f"{problem}.*share_prompts=False"):
        ours(model)
    torch.testing.assert_close(ours(model, share_prompts=False), naive(model), atol=1e-5, rtol=1e-5)


def test_most_models_can_share_prompts() -> None:
    assert [shared_prompt_problem(build()) for build in ARCHITECTURES.values()] == [None] * len(ARCHITECTURES)


WINDOWS: dict[str, PretrainedConfig] = {
    "of every layer": MistralConfig(**SMALL, sliding_window=3),
    "of some layers": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "in chunks": Llama4TextConfig(
        **SMALL, head_dim=8, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=3
    ),
    "switched off": Qwen2MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "that no layer has": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=3, max_window_layers=2),
}


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_is_as_far_with_a_shared_prompt_as_without(window: str, kernel: str, flex_on_cpu: None) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(WINDOWS[window], attn_implementation="eager").eval()
    expected = naive(model)
    use_kernel(model, kernel)
    for share_prompts in (True, False)[: 1 if kernel == "flex_attention" else 2]:
        torch.testing.assert_close(ours(model, share_prompts), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_positions_by_the_length_of_a_text_do_not_depend_on_other_texts(rope_type: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 6}
    rope = {"rope_type": rope_type, "rope_theta": 100.0, **(factors if rope_type == "longrope" else {"factor": 4.0})}
    longest = 64 if rope_type == "longrope" else 6
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**SMALL, max_position_embeddings=longest, rope_parameters=rope)
    ).eval()
    expected = torch.cat([naive(copy.deepcopy(model), trajectories=[t]) for t in TRAJECTORIES])
    for _ in range(2):  # what dynamic positions remember of a pass
        torch.testing.assert_close(ours(model, share_prompts=False), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=f"shorter and longer than 6 tokens.*{rope_type}.*share_prompts=False"):
        ours(model)
    assert length_limit(model.config) == (6, rope_type)


def test_a_factor_by_the_place_in_the_row_is_refused_for_long_rows() -> None:
    config = Llama4TextConfig(**SMALL, head_dim=8, intermediate_size_mlp=64, num_local_experts=2, floor_scale=9)
    model = AutoModelForCausalLM.from_config(config)
    assert shared_prompt_problem(model, 9) is None
    with pytest.raises(ValueError, match=r"floor_scale=9.*share_prompts=False"):
        ours(model)


def test_a_bias_by_distance_in_the_row_is_refused() -> None:
    sizes = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    model = AutoModelForCausalLM.from_config(FalconConfig(**sizes, alibi=True)).eval()
    with pytest.raises(ValueError, match=r"alibi=True.*share_prompts=False"):
        ours(model)
    torch.testing.assert_close(ours(model, share_prompts=False), naive(model), atol=1e-5, rtol=1e-5)
