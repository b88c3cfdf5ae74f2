"""`SGLangRollout` and the real SGLang, on a CPU (see real_sglang): what it computes, and that weights arrive."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import safetensors.torch
import torch

from lightrft_lightning import FakeStrategy, PromptDataModule, RLHFModule, SamplingParams, SGLangRollout
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.weight_sync import PolicyWeights, WeightMismatchError
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()
PROMPTS = [TOKENIZER(f"{a}+{b}=")["input_ids"] for a in (1, 22) for b in (3, 456)]
SAMPLING = SamplingParams(n=3, max_new_tokens=8, temperature=0.7, seed=5)
GREEDY = SamplingParams(n=2, max_new_tokens=8, temperature=0.0)
STRATEGY = FakeStrategy()


def model_with(seed=0):
    return tiny_llama(seed=seed, width=32, layers=2)


def trainers_logprobs(model, prompt, completion, temperature, top_k=0):
    """Of the tokens under the distribution that they were drawn from, by a forward pass."""
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / (temperature or 1.0)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()


@torch.no_grad()
def check_agreement(model, groups, sampling):
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == sampling.n
        for completion in group:
            expected = trainers_logprobs(model, prompt, completion, sampling.temperature, sampling.top_k)
            assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def tokens(groups):
    """Without log-probabilities, which vary with the batch."""
    return [[completion.token_ids for completion in group] for group in groups]


@pytest.fixture
def engine(sglang):
    """With the weights of the model of seed 0."""
    sglang.update_weights(PolicyWeights(STRATEGY, model_with()), 0)
    return sglang


# -------------------------------------------------------------------- generation


@pytest.mark.parametrize("sampling", [SAMPLING, GREEDY, SamplingParams(n=2, max_new_tokens=6, top_k=3)])
def test_logprobs_are_the_trainers(engine, sampling):
    groups = engine.generate(PROMPTS, sampling)
    check_agreement(model_with(), groups, sampling)
    if sampling.temperature:
        assert len({completion.token_ids for completion in groups[1]}) == sampling.n
    else:
        greedy = trainers_greedy(model_with(), PROMPTS[2], 8)
        assert [list(completion.token_ids) for completion in groups[2]] == [greedy, greedy]


@torch.no_grad()
def trainers_greedy(model, prompt, limit):
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and ids[-1] != TOKENIZER.eos_token_id:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_draws_depend_on_seed_stream_and_number_only(engine):
    everything = tokens(engine.generate(PROMPTS, SAMPLING, [4, 0, 9, 2]))
    assert tokens(engine.generate(PROMPTS[2:], SAMPLING, [9, 2])) == everything[2:]
    assert tokens(engine.generate(PROMPTS[2:], SAMPLING, [8, 2])) != everything[2:]
    assert len({completion for group in everything for completion in group}) > 6


def test_stop_strings_and_limits(engine):
    sampling = SamplingParams(n=8, max_new_tokens=12, stop=("3", "7"))
    completions = [completion for group in engine.generate(PROMPTS, sampling) for completion in group]
    for completion in completions:
        text = TOKENIZER.decode(completion.token_ids)
        assert completion.finish_reason == (
            "stop" if text[-1] in "37" else "eos" if completion.token_ids[-1] == TOKENIZER.eos_token_id else "length"
        )
    assert {"stop", "length"} <= {completion.finish_reason for completion in completions}


def test_too_long_a_prompt_is_refused_in_sglangs_words(engine):
    with pytest.raises(EngineError, match=r"status 400: .*64 tokens"):
        engine.generate([PROMPTS[0] * 20], SAMPLING)


# -------------------------------------------------------------------- weights


@pytest.mark.parametrize("verify", ["sample", "all", "off"])
def test_updates_arrive(engine, monkeypatch, verify):
    monkeypatch.setattr(engine, "verify", verify)
    for bucket_bytes in (20_000, 1 << 20):
        monkeypatch.setattr(engine, "bucket_bytes", bucket_bytes)
        model = model_with(seed=bucket_bytes)
        engine.update_weights(PolicyWeights(STRATEGY, model), bucket_bytes)
        check_agreement(model, engine.generate(PROMPTS, SAMPLING), SAMPLING)
        assert engine.version == bucket_bytes
    engine._before = None


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_tensor_that_is_lost_is_caught(engine, monkeypatch, lost):
    save = safetensors.torch.save_file
    engine._before = None
    with monkeypatch.context() as patch:
        patch.setattr(
            safetensors.torch, "save_file", lambda ts, *a: save({n: t for n, t in ts.items() if n != lost}, *a)
        )
        with pytest.raises(WeightMismatchError):
            engine.update_weights(PolicyWeights(STRATEGY, model_with(seed=1)), 8)
    check_agreement(model_with(1), engine.generate(PROMPTS, SAMPLING), SAMPLING)


# -------------------------------------------------------------------- the whole


def test_trains(engine, tmp_path):
    """Under a `Trainer`, with a server that runs already."""
    callback = SGLangRollout(url=engine._client.url, key=engine._key, deadline=60.0, drift_limit=1e-3, verify="all")
    trainer = pl.Trainer(
        strategy="lightrft_fake", accelerator="cpu", devices=1, limit_train_batches=3, max_epochs=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[callback],
        default_root_dir=tmp_path,
    )  # fmt: skip
    module = RLHFModule(model_with(), lambda completion: len(set(completion)), TOKENIZER, SAMPLING, seed=0, lr=1e-3)
    prompts = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]
    trainer.fit(module, datamodule=PromptDataModule(prompts, batch_size=4, seed=0))
    assert callback.version == 3 and float(trainer.callback_metrics["train/mismatch_max"]) < 1e-3
    engine._held = engine._before = None  # another trainer has used it
