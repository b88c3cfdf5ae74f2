"""Training for real on a from-scratch model of a few thousand parameters; what several test files share."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightrft_lightning import PromptDataModule, RLHFModule, SamplingParams, TransformersRollout
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

PROMPTS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]


def even_digits(completion: str) -> float:
    """Rewards that differ within nearly every group, so that every iteration has a gradient."""
    return sum(c in "02468" for c in completion) - 0.1 * len(completion)


def make_module(**settings):
    dropout = settings.pop("dropout", 0.0)
    model = settings.pop("model", None) or tiny_llama(seed=settings.pop("model_seed", 0), width=32, layers=2)
    if not isinstance(model, str):
        model.config.attention_dropout = dropout
    defaults = {
        "rewards": even_digits,
        "tokenizer": char_tokenizer("0123456789+= "),
        "sampling": SamplingParams(n=4, max_new_tokens=6),
        "lr": 1e-3,
        "seed": 3,
    }
    return RLHFModule(model, **{**defaults, **settings})


def make_trainer(path: Path, **settings):
    callbacks = [settings.pop("engine", None) or TransformersRollout(), *settings.pop("callbacks", [])]
    defaults = {
        "strategy": "lightrft_fake",
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": path,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=callbacks, **{**defaults, **settings})


def make_data(**settings):
    return PromptDataModule(**{"train": PROMPTS, "val": PROMPTS[:4], "batch_size": 4, "seed": 1, **settings})


def weights_of(module):
    return {name: p.detach().clone() for name, p in module.actor.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Record(pl.Callback):
    """Remembers what every iteration logged and sampled."""

    def __init__(self):
        self.metrics, self.tokens = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.metrics.append({k: float(v) for k, v in trainer.logged_metrics.items()})
        self.tokens.append([t.completion.token_ids for t in pl_module.last_trajectories])


class StopAt(pl.Callback):
    def __init__(self, iteration):
        self.iteration = iteration

    def on_train_batch_end(self, trainer, pl_module, *args):
        trainer.should_stop = pl_module.iteration == self.iteration
