from __future__ import annotations

import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from lightrft_lightning import PromptDataModule, RLHFModule, SamplingParams, TransformersRollout
from lightrft_lightning.callbacks.warmup import SupervisedWarmup
from lightrft_lightning.models.tiny import tiny_llama
from lightrft_lightning.tasks import addition

ROWS = addition(size=40, low=0, high=9, template="{a}+{b}=")


def exact(completion: str, answer: str) -> float:
    return float(completion == answer)


class AfterWarmup(Callback):
    """Keeps the weights that the warm-up leaves, and the validation reward of the sanity check."""

    def on_train_start(self, trainer, pl_module):
        self.weights = weights_of(pl_module.actor)
        self.gradients = [p.grad for p in pl_module.actor.parameters() if p.grad is not None]


class CountingEngine(TransformersRollout):
    """Counts the weights that it is given."""

    updates = 0

    def update_weights(self, named_tensors, version):
        self.updates += 1
        super().update_weights(named_tensors, version)


def weights_of(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def fit(warmup, tokenizer, path, rows=ROWS, ckpt_path=None, callbacks=(), model=None, **settings):
    """Fit no iteration at all, or as many as `settings` say; returns the module and what `AfterWarmup` kept."""
    module = RLHFModule(
        model or tiny_llama(0, width=32, layers=2), exact, tokenizer, SamplingParams(n=2, max_new_tokens=3), seed=0
    )
    after = AfterWarmup()
    defaults = {"max_epochs": 1, "limit_train_batches": 1, "num_sanity_val_steps": 0, "logger": False}
    defaults |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        strategy="lightrft_fake", accelerator="cpu", default_root_dir=path,
        callbacks=[CountingEngine(), warmup, after, *callbacks], **{**defaults, **settings},
    )  # fmt: skip
    trainer.fit(module, datamodule=PromptDataModule(train=rows, val=rows[:8], batch_size=4), ckpt_path=ckpt_path)
    return trainer, module, after


def test_learns_the_answers(tiny_tokenizer, tmp_path, caplog):
    warmup = SupervisedWarmup(steps=150, lr=5e-3, batch_size=20, until=0.9)
    caplog.set_level("INFO")
    trainer, _, after = fit(warmup, tiny_tokenizer, tmp_path, num_sanity_val_steps=-1)
    line = next(r.message for r in caplog.records if "warm-up" in r.message)
    steps, before, end, exactly = re.search(
        r"(\d+) steps .* loss (.*) -> (.*), exact answers .* -> (\d+)%", line
    ).groups()
    assert float(end) < 0.5 < 2 < float(before)
    assert int(steps) < 150
    assert int(exactly) >= 90
    assert after.gradients == []
    assert trainer.callbacks[0].updates == 2  # after the warm-up and after the iteration
    assert trainer.callbacks[0].version == 1


def test_sanity_check_sees_the_result(tiny_tokenizer, tmp_path):
    rewards = []

    class Sanity(Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            rewards.append(float(trainer.callback_metrics["val/reward"]))

    fit(SupervisedWarmup(150, 5e-3, 20), tiny_tokenizer, tmp_path, callbacks=[Sanity()], num_sanity_val_steps=-1)
    assert rewards[0] > 0.5


def test_seed_decides(tiny_tokenizer, tmp_path):
    def warm(global_seed, seed):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        model = tiny_llama(0, width=32, layers=2)
        model.config.attention_dropout = 0.2
        after = fit(SupervisedWarmup(3, batch_size=8, seed=seed), tiny_tokenizer, tmp_path, model=model)[2]
        return after.weights, torch.equal(torch.get_rng_state(), state)

    first, untouched = warm(1, 5)
    assert untouched
    assert torch.equal(first, warm(2, 5)[0])
    assert not torch.equal(first, warm(1, 6)[0])


def test_resumed_fit_has_its_weights_from_the_checkpoint(tiny_tokenizer, tmp_path, caplog):
    caplog.set_level("INFO")
    keep = ModelCheckpoint(tmp_path, filename="kept", save_last=True)
    settings = {"callbacks": [keep], "enable_checkpointing": True}
    _, first, _ = fit(SupervisedWarmup(3), tiny_tokenizer, tmp_path, **settings)
    caplog.clear()
    for sanity in (0, 1):
        _, _, after = fit(
            SupervisedWarmup(3), tiny_tokenizer, tmp_path, ckpt_path=tmp_path / "last.ckpt", max_epochs=2,
            num_sanity_val_steps=sanity,
        )  # fmt: skip
        assert torch.equal(after.weights, weights_of(first.actor))
    assert "warm-up" not in caplog.text


def test_second_fit_of_a_trainer_goes_on(tiny_tokenizer, tmp_path, caplog):
    caplog.set_level("INFO")
    trainer, module, _ = fit(SupervisedWarmup(3), tiny_tokenizer, tmp_path)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=trainer.datamodule)
    assert caplog.text.count("warm-up") == 1


def test_fast_dev_run_takes_one_step(tiny_tokenizer, tmp_path, caplog):
    caplog.set_level("INFO")
    fit(SupervisedWarmup(50), tiny_tokenizer, tmp_path, fast_dev_run=True)
    assert "Supervised warm-up: 1 steps" in caplog.text


def test_bad_settings(tiny_tokenizer, tmp_path):
    for settings in ({"steps": 0}, {"lr": 0.0}, {"batch_size": 0}, {"until": 1.5}):
        name, value = next(iter(settings.items()))
        with pytest.raises(ValueError, match=f"{name}={value}"):
            SupervisedWarmup(**settings)
    with pytest.raises(ValueError, match=r"training prompt 0: unknown column 'anser'. Did you mean 'answer'"):
        fit(SupervisedWarmup(answer_column="anser"), tiny_tokenizer, tmp_path)
    with pytest.raises(TypeError, match="SupervisedWarmup"):
        pl.Trainer(callbacks=[SupervisedWarmup()], max_steps=1, logger=False, enable_checkpointing=False).fit(
            BoringModel()
        )
