"""The proof at the start of a fit: it finds faults whose own cures are switched off here."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Trainer
from training import PROMPTS, make_data, make_module, make_trainer, weights_of
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    RobertaConfig,
)

from lightrft_lightning import PromptDataModule, RewardModule, SamplingParams, SFTModule, TransformersRollout
from lightrft_lightning.callbacks.rollout import DriftError
from lightrft_lightning.engines import memory
from lightrft_lightning.models import attention, logprobs, rope
from lightrft_lightning.models.attention import FLEX
from lightrft_lightning.models.proof import Proof, apart, made_up_texts, some_of
from lightrft_lightning.models.tiny import char_tokenizer
from lightrft_lightning.strategies.fake import FakeStrategy

SMALL = {
    "vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA2 = Gemma2Config(**SMALL, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0)
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 12}


def model_of(config, kernel="sdpa"):
    """With weights that are large enough for attention to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def fit(tmp_path):
    def fit(model, trainer=None, **settings):
        module = make_module(model=model, **{"lr": 0.0, "sampling": SamplingParams(n=2, max_new_tokens=24), **settings})
        defaults = {"limit_train_batches": 1, "limit_val_batches": 0}
        make_trainer(tmp_path, **{**defaults, **(trainer or {})}).fit(module, make_data(batch_size=2))
        return module

    return fit


def test_a_cap_that_a_kernel_leaves_out_is_found(fit, monkeypatch, caplog):
    assert fit(model_of(GEMMA2)).actor.config._attn_implementation == "eager"
    assert "takes 'eager', not 'sdpa': it leaves out the model's attn_logit_softcapping=2.0 (the policy)" in caplog.text
    monkeypatch.setattr(attention, "sdpa_problem", lambda model: None)
    caplog.clear()
    assert fit(model_of(GEMMA2)).actor.config._attn_implementation == "eager"
    assert "takes 'eager', not 'sdpa': its log-probabilities are off by" in caplog.text
    with pytest.raises(RuntimeError, match=r"'sdpa': .* off by .* are 0\.001 .*set attn_implementation='eager'"):
        fit(model_of(GEMMA2), attn_implementation="sdpa")
    module = fit(model_of(GEMMA2), attn_implementation="sdpa", check_numerics=False)
    assert module.actor.config._attn_implementation == "sdpa"


def test_a_bias_that_the_plain_kernel_adds_twice_is_known(fit):
    config = FalconConfig(**SMALL, alibi=True, multi_query=False, parallel_attn=False)
    module = fit(model_of(config), share_prompts=False)
    assert module.actor.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match=r"'eager': it adds the model's alibi=True twice"):
        fit(model_of(config), share_prompts=False, attn_implementation="eager")


def test_a_named_kernel_that_leaves_something_out_is_refused(fit):
    for check_numerics in (True, False):
        with pytest.raises(RuntimeError, match=r"'sdpa': it leaves out .*attn_logit_softcapping=2\.0"):
            fit(model_of(GEMMA2), attn_implementation="sdpa", check_numerics=check_numerics)


def test_a_window_that_the_layout_does_not_have_is_found(fit, monkeypatch):
    monkeypatch.setattr(logprobs, "shared_prompt_masks", lambda config, batch, *args: batch.attention_mask(*args))
    with pytest.raises(RuntimeError, match=r"off by .* \(the policy\). What to do: set share_prompts=False"):
        fit(model_of(MistralConfig(**SMALL, sliding_window=8)))


def test_what_begins_beyond_the_short_texts_is_found_if_the_run_goes_there(fit, monkeypatch):
    config = MistralConfig(**{**SMALL, "max_position_embeddings": 1024}, sliding_window=300)
    assert fit(model_of(config), sampling=SamplingParams(n=2, max_new_tokens=330)).iteration == 1
    monkeypatch.setattr(logprobs, "shared_prompt_masks", lambda config, batch, *args: batch.attention_mask(*args))
    with pytest.raises(RuntimeError, match=r"off by .* \(the policy\). What to do: set share_prompts=False"):
        fit(model_of(config), sampling=SamplingParams(n=2, max_new_tokens=330))


def test_positions_that_begin_elsewhere_are_found(fit):
    config = RobertaConfig(**{**SMALL, "is_decoder": True, "max_position_embeddings": 130})
    with pytest.raises(RuntimeError, match="set share_prompts=False"):
        fit(model_of(config))


def test_positions_by_the_longest_text_of_a_pass_are_found(fit, monkeypatch):
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}
    model = model_of(LlamaConfig(**SMALL, rope_parameters=longrope))
    with pytest.raises(ValueError, match=r"rope_type='longrope' begin to depend on the length of the whole text is 12"):
        fit(model)
    few = SamplingParams(n=2, max_new_tokens=8)
    assert fit(model, sampling=few).iteration == 1
    with pytest.raises(ValueError, match=r"val_sampling\.max_new_tokens=24 make .* depend on the length"):
        fit(model, sampling=few, val_sampling=SamplingParams(max_new_tokens=24))
    monkeypatch.setattr(rope, "length_limit", lambda config: None)
    with pytest.raises(RuntimeError, match="depends on the other texts of a pass"):
        fit(model)
    with pytest.raises(RuntimeError, match="depends on the other texts of a pass"):
        fit(model, share_prompts=False)


class Elsewhere(TransformersRollout):
    """Reports other log-probabilities than those it draws from, of the tokens from some place on."""

    def __init__(self, off, first=0):
        super().__init__()
        self.off, self.first, self.dtype = off, first, None

    def generate(self, prompts, sampling, streams=None):
        return [[self._changed(c) for c in group] for group in super().generate(prompts, sampling, streams)]

    def _changed(self, completion):
        changed = tuple(p + self.off * (i >= self.first) for i, p in enumerate(completion.logprobs))
        return dataclasses.replace(completion, logprobs=changed)


def test_an_engine_that_draws_from_something_else_is_found_before_the_first_step(fit):
    for engine in (Elsewhere(0.01), Elsewhere(0.01, first=8), Elsewhere(float("nan"))):
        message = r"Elsewhere samples from another distribution .* off by (0\.01|inf) nats, allowed are 0\.001"
        with pytest.raises(DriftError, match=message):
            fit(None, {"engine": engine}, lr=1e-2)
    fit(None, {"engine": Elsewhere(0.01)}, check_numerics=False)
    low = Elsewhere(0.01)
    low.dtype = torch.bfloat16
    fit(None, {"engine": low})
    with pytest.raises(DriftError, match=r"allowed are 0\.1"):
        low.off = 0.3
        fit(None, {"engine": low})


def test_a_state_that_an_engine_forgets_is_found(fit, monkeypatch):
    """The state of these models is no argument that their forward names, so it is swallowed without an error."""
    config = MambaConfig(vocab_size=16, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0)
    model = model_of(config, "eager")
    assert fit(model, share_prompts=False).iteration == 1
    monkeypatch.setattr(memory, "forward_arguments", lambda model: {"past_key_values": None, "attention_mask": None})
    monkeypatch.setattr(memory, "_difference", lambda found, wanted: 0.0)
    with pytest.raises(DriftError, match=r"TransformersRollout samples from another .* allowed are 0\.001"):
        fit(model, share_prompts=False)


def test_it_leaves_no_trace(fit):
    def trained(**settings):
        torch.manual_seed(5)
        module = fit(None, lr=1e-2, dropout=0.1, gradient_checkpointing=True, **settings)
        return module, torch.get_rng_state()

    (proven, state), (unproven, same) = trained(), trained(check_numerics=False)
    assert torch.equal(state, same)
    for name, value in weights_of(proven).items():
        assert torch.equal(value, weights_of(unproven)[name])
    assert proven.actor.training and proven.actor.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", [SFTModule, RewardModule])
def test_training_on_given_texts_is_proven_too(tmp_path, monkeypatch, caplog, kind):
    texts = {"answer": "11111111111"} if kind is SFTModule else {"chosen": "1=111111111", "rejected": "00"}
    rows = [{"prompt": p["prompt"], **texts} for p in PROMPTS]
    monkeypatch.setattr(attention, "sdpa_problem", lambda model: None)

    def fit(config, **settings):
        module = kind(model_of(config), char_tokenizer("0123456789+= "), **settings)
        silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(strategy="lightrft_fake", accelerator="cpu", max_steps=1, default_root_dir=tmp_path, **silent)
        trainer.fit(module, PromptDataModule(rows, batch_size=2))
        return module.model

    assert fit(GEMMA2).config._attn_implementation == "eager" and "takes 'eager', not 'sdpa'" in caplog.text
    assert fit(GEMMA2, check_numerics=False).config._attn_implementation == "sdpa"
    with monkeypatch.context() as without:
        without.setattr(logprobs, "shared_prompt_masks", lambda config, batch, *args: batch.attention_mask(*args))
        with pytest.raises(RuntimeError, match="set share_prompts=False"):
            fit(MistralConfig(**SMALL, sliding_window=6))


def test_the_compiled_kernel_gives_the_log_probabilities_of_the_plain_one(tiny_model):
    texts = made_up_texts([range(3, 40), range(3, 12)], tiny_model.config.vocab_size, longest=96, new=60)
    proof = Proof(FakeStrategy(), nullcontext, texts, share_prompts=True, token_budget=1000)
    found, exact = proof.as_trained(tiny_model, FLEX, True, False), proof.exactly(tiny_model)
    assert (found - exact.values).abs().max() < 1e-5


def test_one_token_that_is_far_off_is_no_difference_but_few_late_ones_are():
    right = torch.zeros(40)
    lengths = [30, 10]
    assert apart(right, right, lengths) == 0
    wrong = right.clone()
    wrong[5] = 0.5
    assert apart(wrong, right, lengths) == pytest.approx(0.5 / 40)
    late = right.clone()
    late[16:30] = 0.5
    assert apart(late, right, lengths) == 0.5
    assert apart(right.fill_(-torch.inf), right, lengths) == 0
    assert apart(torch.full((40,), torch.nan), torch.zeros(40), lengths) == float("inf")


def test_texts_are_short_and_long_and_of_the_runs_tokens():
    prompts = [tuple(range(3, 23)), (5, 6, 7)]
    texts = made_up_texts(prompts, 100, longest=60, new=40)
    assert texts == made_up_texts(prompts, 100, longest=60, new=40)
    assert [(len(t.prompt.token_ids), len(t.completion.token_ids), t.group) for t in texts] == [
        (20, 4, 0), (20, 40, 0), (20, 20, 0), (3, 4, 1), (3, 40, 1),
    ]  # fmt: skip
    assert {i for t in texts for i in (*t.prompt.token_ids, *t.completion.token_ids)} <= set(range(3, 23))
    assert all(len(t.prompt.token_ids) + len(t.completion.token_ids) <= 2 for t in made_up_texts([], 9, 2, 1))


def test_longest_and_shortest_samples_are_compared_first():
    texts = made_up_texts([tuple(range(60))], 100, longest=250, new=150)
    many = [dataclasses.replace(t, group=k) for k in range(20) for t in texts]
    some = some_of(many, torch.device("cpu"))
    lengths = [len(t.completion.token_ids) for t in some]
    assert lengths[:2] == [150, 4] and len(set(lengths)) == 3
    assert sum(60 + n for n in lengths) <= 512
    assert some_of([], torch.device("cpu")) == []
