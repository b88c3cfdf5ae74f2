"""How a model keeps what it has read: chosen by what it computes, in place of its name."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from lightrft_lightning import SamplingParams, TransformersRollout
from lightrft_lightning.engines import memory
from lightrft_lightning.engines.memory import NoMemory, OwnMemory, PaddedCache, settle_memory
from lightrft_lightning.models.tiny import char_tokenizer

PROMPTS = [[20], [3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15], [10, 11, 12]]


def connected(model, **settings):
    engine = TransformersRollout(**settings)
    engine.connect(model, char_tokenizer("abc"))
    return engine


@pytest.mark.parametrize(
    ("name", "way"),
    {
        "llama": PaddedCache, "bloom": PaddedCache, "falcon (alibi)": PaddedCache, "mistral (window)": PaddedCache,
        "mamba": OwnMemory, "mamba2": OwnMemory, "falcon_mamba": OwnMemory, "bart": OwnMemory,
        "rwkv": NoMemory, "recurrent_gemma": NoMemory, "minimax": NoMemory, "openai-gpt": NoMemory,
    }.items(),
)  # fmt: skip
@pytest.mark.parametrize("max_batch_size", [None, 3])
def test_samples_have_the_logprobs_of_the_models_own_forward(name, way, max_batch_size):
    model = tiny_model(name).eval()
    engine = connected(model, max_batch_size=max_batch_size)
    groups = engine.generate(PROMPTS, SamplingParams(n=4, max_new_tokens=9))
    assert engine._memory is way
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for c in group:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *c.token_ids]]), use_cache=False).logits[0]
            plain = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(c.token_ids)[:, None])
            torch.testing.assert_close(torch.tensor(c.logprobs), plain.squeeze(-1), atol=1e-5, rtol=0)


def test_the_batch_size_changes_no_token_of_a_recurrent_model():
    model, sampling = tiny_model("mamba").eval(), SamplingParams(n=4, max_new_tokens=9)
    together, cut = (connected(model, max_batch_size=m).generate(PROMPTS, sampling) for m in (None, 2))
    assert [[c.token_ids for c in g] for g in cut] == [[c.token_ids for c in g] for g in together]


def test_what_is_slower_is_told_once_for_a_model(caplog):
    engine = connected(tiny_model("recurrent_gemma").eval())
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            engine.connect(engine._model, engine.tokenizer)
            engine.generate([[5, 6]], SamplingParams(n=1, max_new_tokens=2))
    told = [r.getMessage() for r in caplog.records if "reads the whole text again for every token" in r.getMessage()]
    assert len(told) == 1 and "a cache with padding on the left: off by" in told[0]


def test_a_model_that_does_not_read_from_left_to_right_is_refused():
    model = tiny_model("bert (is_decoder)").eval()
    for module in model.modules():  # as it is without `is_decoder`
        if hasattr(module, "is_causal"):
            module.is_causal = False
    model.config.is_decoder = False
    with pytest.raises(ValueError, match=r"cannot generate with BertLMHeadModel: .*without a cache: off by"):
        connected(model).generate([[5, 6]], SamplingParams(n=1, max_new_tokens=2))


def test_a_cache_that_loses_a_row_is_noticed(monkeypatch):
    monkeypatch.setattr(memory.PaddedCache, "select", lambda self, rows: None)
    assert settle_memory(tiny_model("llama").eval()) is OwnMemory


def test_impossible_tokens_are_no_difference():
    model = tiny_model("llama").eval()
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: nn.functional.pad(head(x)[..., :-4], (0, 4), value=-torch.inf)
    assert settle_memory(model) is PaddedCache


def test_weights_that_change_with_the_mode_are_refused():
    model = tiny_model("llama").train()
    before, scaled = model.lm_head.weight.clone(), [False]

    def scale(module, args, kwargs):
        if module.training == scaled[0]:
            scaled[0] = not scaled[0]
            with torch.no_grad():
                module.lm_head.weight.mul_(0.5 if scaled[0] else 2.0)

    model.register_forward_pre_hook(scale, with_kwargs=True)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM changes its weights in place in evaluation mode"):
        connected(model).generate([[5, 6]], SamplingParams(n=1, max_new_tokens=2))
    assert torch.equal(model.lm_head.weight, before)


def test_the_weights_of_a_model_that_scales_them_in_evaluation_mode_stay():
    model = tiny_model("rwkv", num_hidden_layers=7).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    connected(model).generate([[5, 6]], SamplingParams(n=1, max_new_tokens=2))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_texts_whose_positions_depend_on_their_neighbours_are_refused():
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    engine = connected(tiny_model("phi3", original_max_position_embeddings=16, rope_parameters=rope))
    engine.generate([[3, 4, 5]], SamplingParams(n=1, max_new_tokens=13))
    with pytest.raises(ValueError, match=r"is 17, and beyond 16 the positions of the model's rope_type='longrope'"):
        engine.generate([[3, 4, 5]], SamplingParams(n=1, max_new_tokens=14))
