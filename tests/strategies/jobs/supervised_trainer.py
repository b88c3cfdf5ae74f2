"""`RewardModule` and `SFTModule` on every back end, one process a rank, against one process; see checks.py."""

from __future__ import annotations

import sys
from pathlib import Path

import checks
import lightning.pytorch as pl
import pytest
import torch
from deepspeed_trainer import trainer
from fsdp_trainer import one_process, whole
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightrft_lightning import PromptDataModule, RewardModule, SFTModule
from lightrft_lightning.models.scalar import with_scalar_head
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

FOLDER = Path(sys.argv[1])
STRATEGIES = {"fsdp": "lightrft_fsdp", "zero_1": 1, "zero_2": 2, "zero_3": 3}
ROWS = [
    {"prompt": f"{a}+{b}=", "answer": str(a * b), "chosen": str(a + b) * (1 + b), "rejected": "7" * a}
    for a in range(4)
    for b in range(4)
]
SETTINGS = {"lr": 1e-3, "lr_schedule": "cosine", "warmup_ratio": 0.25, "token_budget": 40}


def reward_module(**settings):
    model = with_scalar_head(tiny_llama(seed=0, width=32, layers=2))
    torch.nn.init.normal_(model.score.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return RewardModule(model, char_tokenizer(), center_coef=0.1, **{**SETTINGS, **settings})


def sft_module(**settings):
    return SFTModule(tiny_llama(seed=0, width=32, layers=2), char_tokenizer(), **{**SETTINGS, **settings})


class Save(pl.Callback):
    """In the middle of the second epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        if self.path and trainer.global_step == 5:
            trainer.save_checkpoint(self.path)


def fit(make, strategy, ranks, save_to=None, resume_from=None, **settings):
    """The Trainer, the module, its weights and the held-out metrics; the held-out rows do not divide by the ranks."""
    module, t = make(**settings), trainer(strategy, ranks, callbacks=[Save(save_to)])
    data = PromptDataModule(train=ROWS, val=ROWS[:5], batch_size=4 // ranks, val_batch_size=2, seed=1)
    t.fit(module, data, ckpt_path=resume_from)
    metrics = {name: float(value) for name, value in t.callback_metrics.items()}
    return t, module, whole(t, module.model), metrics


def compare(make, auto):
    with one_process():
        expected, _, reference, metrics = fit(make, "lightrft_fake", 1)
    for name, strategy in STRATEGIES.items():
        t, module, weights, found = fit(make, strategy, 2, FOLDER / f"{make.__name__}_{name}.ckpt")
        assert t.global_step == expected.global_step == 8
        assert found == pytest.approx(metrics, rel=1e-5, abs=1e-6), name
        for key, value in weights.items():
            assert (value - reference[key]).norm() <= 1e-5 * reference[key].norm(), (name, key)
        t.strategy.save_model(module.model, module.tokenizer, FOLDER / f"{make.__name__}_{name}")
        t.strategy.barrier()
        opened = dict(auto.from_pretrained(FOLDER / f"{make.__name__}_{name}").named_parameters())
        assert opened.keys() == weights.keys() and all(torch.equal(opened[key], weights[key]) for key in opened)
        if name in ("fsdp", "zero_3"):
            _, _, resumed, _ = fit(make, strategy, 2, resume_from=FOLDER / f"{make.__name__}_{name}.ckpt")
            assert all(torch.equal(resumed[key], weights[key]) for key in weights), name


def check_reward_model():
    compare(reward_module, AutoModelForSequenceClassification)


def check_supervised_fine_tuning():
    compare(sft_module, AutoModelForCausalLM)


def check_pairs_that_share_no_prompt():
    with one_process():
        _, _, reference, _ = fit(reward_module, "lightrft_fake", 1)
    for strategy in ("lightrft_fsdp", 3):
        _, _, weights, _ = fit(reward_module, strategy, 2, share_prompts=False, token_budget=24)
        for key, value in weights.items():
            assert (value - reference[key]).norm() <= 1e-5 * reference[key].norm(), key


if __name__ == "__main__":
    checks.run(dict(globals()))
