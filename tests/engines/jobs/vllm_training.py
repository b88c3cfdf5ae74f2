"""Reinforcement learning with real vLLM, one process a rank; see strategies/jobs/checks.py.

Arguments: folder, strategies, one after the other: importing vLLM takes longer than any check.
"""

from __future__ import annotations

import os
import sys

import checks
import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lightrft_lightning import PromptDataModule, RLHFModule, SamplingParams, TransformersRollout
from lightrft_lightning.engines.vllm import VLLMRollout
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

os.environ["TORCHELASTIC_RUN_ID"] = "test"  # how Lightning recognises torchrun
STRATEGIES = sys.argv[2:]
RANKS = int(os.environ.get("WORLD_SIZE", 1))
ARGS = {"enforce_eager": True, "max_model_len": 64, "kv_cache_memory_bytes": 1 << 24}
PROMPTS = [{"prompt": f"{a}+{b}="} for a in range(3, 11) for b in range(5, 13)]


def sevens(completion):
    return completion.count("7") / 4


class Curve(pl.Callback):
    def __init__(self):
        self.rewards, self.mismatch, self.versions = [], [], []

    def on_train_batch_end(self, trainer, module, *args):
        metrics = trainer.callback_metrics
        self.rewards.append(float(metrics["train/reward"]))
        self.mismatch.append(float(metrics["train/mismatch_max"]))
        self.versions.append({t.policy_version for t in module.last_trajectories})


class Greedy(pl.Callback):
    """Compares the greedy tokens of engine, transformers and trainer at the end of the fit, while all are alive."""

    def on_train_end(self, trainer, module):
        engine, strategy = module.rollout_engine, trainer.strategy
        ids = [module.tokenizer(row["prompt"])["input_ids"] for row in PROMPTS]
        mine = ids[strategy.global_rank :: RANKS]
        sampling = SamplingParams(temperature=0.0, max_new_tokens=6)
        self.engine = engine.generate(mine, sampling)
        own = TransformersRollout()
        own.strategy = strategy
        own.connect(module.actor, module.tokenizer)
        self.own = own.generate(mine, sampling)
        self.forward, self.logprobs = [], []
        with torch.no_grad(), strategy.gathered_parameters(module.actor):
            for prompt, (done,) in zip(mine, self.engine, strict=True):
                logits = module.actor(input_ids=torch.tensor([[*prompt, *done.token_ids]])).logits[0]
                scores = logits[len(prompt) - 1 : -1].log_softmax(-1)
                self.forward.append(tuple(scores.argmax(-1).tolist()))
                self.logprobs.append(scores.max(-1).values.tolist())


def train(strategy, iterations, callbacks=(), adapter=False, settings=None, **engine):
    curve = Curve()
    rollout = VLLMRollout(ARGS, **engine)
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=RANKS, max_epochs=iterations // 3, limit_train_batches=3,
        callbacks=[rollout, curve, *callbacks], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    sampling = SamplingParams(n=8, max_new_tokens=4)
    model = tiny_llama(seed=0, layers=2)
    model.config.tie_word_embeddings = (
        True  # the head is one tensor with the embeddings, which vLLM's CPU build repacks
    )
    model.tie_weights()
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj", "up_proj"], r=4))
    module = RLHFModule(model, sevens, char_tokenizer(), sampling, lr=3e-3, seed=1, **(settings or {}))
    trainer.fit(module, PromptDataModule(PROMPTS, batch_size=8 // RANKS, tokenizer=char_tokenizer()))
    return curve


def check_reward_rises_and_logprobs_agree():
    for strategy in STRATEGIES:
        curve = train(strategy, 12)
        assert sum(curve.rewards[-3:]) > sum(curve.rewards[:3]) + 0.6, curve.rewards
        assert max(curve.mismatch) < 1e-3, curve.mismatch
        assert curve.versions == [{i} for i in range(12)], curve.versions


def check_hot_first_tokens_and_replaced_prompts():
    settings = {"first_token_temperature": 2.0, "dynamic_sampling": True, "sampling_attempts": 1}
    for strategy in STRATEGIES:
        curve = train(strategy, 3, settings=settings)
        assert max(curve.mismatch) < 1e-3, curve.mismatch
        with checks.unwatched(), pytest.raises(ValueError, match="VLLMRollout takes at most 2"):
            train(strategy, 3, settings={"first_token_temperature": 5.0})


def check_adapters_arrive():
    for strategy in STRATEGIES:
        curve = train(strategy, 6, adapter=True, lora="adapter")
        assert max(curve.mismatch) < 1e-3, curve.mismatch
        assert len(set(curve.rewards)) > 1


def check_greedy_tokens_agree_after_three_steps():
    for strategy in STRATEGIES:
        greedy = Greedy()
        train(strategy, 3, callbacks=[greedy], verify="all")
        got = [done.token_ids for (done,) in greedy.engine]
        assert len(got) == len(PROMPTS) // RANKS
        assert got == [done.token_ids for (done,) in greedy.own] == greedy.forward
        for (done,), expected in zip(greedy.engine, greedy.logprobs, strict=True):
            assert max(abs(a - b) for a, b in zip(done.logprobs, expected, strict=True)) < 1e-3


if __name__ == "__main__":
    checks.run(dict(globals()))
