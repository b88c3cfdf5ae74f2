"""Settings that are given to a run which goes on from a checkpoint win, and one line says so."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training import make_data, make_module, make_trainer

from lightrft_lightning import FakeStrategy, RLHFModule, SamplingParams, SFTModule
from lightrft_lightning.checkpoints import settings
from lightrft_lightning.checkpoints.folder import CheckpointError
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(settings, "rank_zero_info", lines.append)
    return lines


class Rates(pl.Callback):
    """Of each optimizer, before each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *args):
        self.seen.append(tuple(o.param_groups[0]["lr"] for o in trainer.optimizers))


def run(path, module, epochs=1, resume=False, callbacks=(), **trainer):
    """The rates before each batch of two an epoch, and the Trainer; a first run leaves a checkpoint."""
    rates, kept = Rates(), path / "kept.ckpt"
    made = make_trainer(
        path, callbacks=[rates, *callbacks], max_epochs=epochs, limit_train_batches=2, limit_val_batches=0, **trainer
    )
    made.fit(module, make_data(), ckpt_path=str(kept) if resume else None)
    if not resume:
        made.save_checkpoint(kept)
    return rates.seen, made


def cosine(step, steps, lr=1e-3):
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


LINEAR = [1e-3 * (8 - step) / 8 for step in range(2, 8)]
CASES = {
    "lr": ({}, {"lr": 5e-4}, [5e-4] * 6, "lr 0.001 -> 0.0005"),
    "after the end": ({"lr_schedule": "cosine"}, {}, [1e-3] * 6, "lr_schedule 'cosine' -> 'constant'"),
    "a schedule": ({}, {"lr_schedule": "linear"}, LINEAR, "lr_schedule 'constant' -> 'linear'"),
    "a later end": (
        {"lr_schedule": "cosine"}, {"lr_schedule": "cosine"},
        [cosine(step, 8) for step in range(2, 8)], "num_training_steps 2 -> 8",
    ),
    "a warm-up": (
        {"lr_schedule": "linear", "warmup_ratio": 0.5}, {"lr_schedule": "linear", "warmup_ratio": 0.5, "lr": 8e-4},
        [4e-4, 6e-4, 8e-4, 6e-4, 4e-4, 2e-4], "lr 0.001 -> 0.0008, num_training_steps 2 -> 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rate_and_schedule_given_now_hold_from_the_first_step(tmp_path, said, case):
    then, now, expected, line = CASES[case]
    run(tmp_path, make_module(**then))
    assert not said
    rates, _ = run(tmp_path, make_module(**now), epochs=4, resume=True)
    assert [rate for (rate,) in rates] == pytest.approx(expected)
    assert len(said) == 1 and said[0].endswith(line)


def test_other_settings_win_too_and_are_all_named(tmp_path, said):
    run(tmp_path, make_module())
    now = make_module(weight_decay=0.1, seed=4, sampling=SamplingParams(n=2, max_new_tokens=6))
    strategy = FakeStrategy(adam_betas=(0.8, 0.9), max_norm=0.5)
    _, trainer = run(tmp_path, now, epochs=2, resume=True, strategy=strategy)
    matrices, vectors = trainer.optimizers[0].param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert matrices["betas"] == vectors["betas"] == (0.8, 0.9)
    assert len(now.last_trajectories) == 4 * 2
    (line,) = said
    for part in (
        "weight_decay 0.0 -> 0.1", "seed 3 -> 4", "sampling.n 4 -> 2", "max_norm 1.0 -> 0.5",
        "betas (0.9, 0.95) -> (0.8, 0.9)",
    ):  # fmt: skip
        assert part in line


def test_policy_and_critic_each_have_their_own(tmp_path, said):
    ppo = {"algorithm": "ppo", "sampling": SamplingParams(n=1, max_new_tokens=6)}
    critic = {"lr": 2e-3, "lr_schedule": "linear", "warmup_iterations": 1}
    run(tmp_path, make_module(critic=critic, **ppo))  # one step of the policy, two of the critic
    now = make_module(critic={**critic, "lr": 4e-3, "lr_schedule": "cosine"}, lr_schedule="linear", **ppo)
    rates, _ = run(tmp_path, now, epochs=2, resume=True)
    assert rates[0] == pytest.approx((1e-3 * 2 / 3, cosine(2, 4, 4e-3)))
    for part in ("critic.lr 0.002 -> 0.004", "critic.lr_schedule 'linear' -> 'cosine'", "lr_schedule 'constant' -> "):
        assert part in said[0]


def test_what_a_run_has_made_of_unchanged_settings_stays(tmp_path, said):
    class Slower(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.optimizers[0].param_groups[0]["lr"] /= 2

    run(tmp_path, make_module(), callbacks=[Slower()])
    rates, _ = run(tmp_path, make_module(), epochs=2, resume=True)
    assert rates[0] == (1e-3 / 4,) and not said


def test_an_adapted_coefficient_goes_on_and_a_fixed_one_is_what_is_given(tmp_path):
    run(tmp_path, make_module(kl_coef=0.5, kl_target=1.0, kl_horizon=100))
    adapted, fixed = make_module(kl_coef=0.5, kl_target=1.0, lr=0.0, kl_horizon=10**9), make_module(kl_coef=0.2)
    for module in (adapted, fixed):
        run(tmp_path, module, epochs=2, resume=True)
    assert adapted.kl_coef < 0.49 and fixed.kl_coef == 0.2


class OwnSchedule(RLHFModule):
    """With two rates, and a schedule of the user's own."""

    optimizer = torch.optim.AdamW
    rate = 1e-3
    schedule = None

    def configure_optimizers(self):
        first, *others = self.actor.parameters()
        optimizer = self.optimizer([{"params": [first], "lr": self.rate}, {"params": others, "lr": 2 * self.rate}])
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


def own(**settings):
    module = make_module()
    module.__class__ = type(
        "Own", (OwnSchedule,), {k: staticmethod(v) if callable(v) else v for k, v in settings.items()}
    )
    return module


step = torch.optim.lr_scheduler.StepLR
OWN = {  # schedule then, settings now, the rates after two steps and three, what the line says
    "rate": (
        lambda o: step(o, 1, 0.5), {"rate": 4e-3}, (1e-3, 5e-4), "lr 0.001 -> 0.004, lr of group 1 0.002 -> 0.008",
    ),
    "factor": (
        lambda o: step(o, 1, 0.5), {"schedule": lambda o: step(o, 1, 0.1)}, (2.5e-4, 2.5e-5), "gamma 0.5 -> 0.1",
    ),
    "kind": (
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 2), {"schedule": lambda o: step(o, 1, 0.5)},
        (1e-3, 5e-4), "schedule 'CosineAnnealingLR' -> 'StepLR, from its beginning'",
    ),
    "function": (
        lambda o: step(o, 1, 0.5),
        {"schedule": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda made: 1 / (1 + made))},
        (1e-3 / 3, 1e-3 / 4), "schedule 'StepLR' -> 'LambdaLR'",
    ),
    "none": (lambda o: step(o, 1, 0.5), {"schedule": None}, (1e-3, 1e-3), "schedule 'StepLR' -> 'None'"),
    "the same": (lambda o: step(o, 1, 0.5), {}, (2.5e-4, 1.25e-4), None),
}  # fmt: skip


def test_schedules_of_the_users_own_too(tmp_path, said):
    saved = {}
    for case, (then, now, expected, line) in OWN.items():
        if then not in saved:
            run(tmp_path / case, own(schedule=then))
            saved[then] = tmp_path / case
        said.clear()
        rates, _ = run(saved[then], own(**{"schedule": then, **now}), epochs=2, resume=True)
        assert [rate for (rate,) in rates] == pytest.approx(expected), case
        assert (said or [None])[0] == (line and f"Settings given now win over the checkpoint's: {line}"), case


def test_optimizers_of_the_users_own_that_cannot_go_on_are_refused(tmp_path):
    run(tmp_path, own())
    with pytest.raises(CheckpointError, match=r"another kind of optimizer .*: with 'amsgrad', without 'dampening'"):
        run(tmp_path, own(optimizer=torch.optim.SGD), epochs=2, resume=True)
    with pytest.raises(ValueError, match="returns a ReduceLROnPlateau, which is stepped with a metric"):
        run(tmp_path, own(schedule=torch.optim.lr_scheduler.ReduceLROnPlateau))
    two = own()
    two.configure_optimizers = lambda: [torch.optim.SGD(two.actor.parameters())] * 2
    with pytest.raises(ValueError, match="returns 2 optimizers, 1 are needed: one for the model"):
        run(tmp_path, two)


def test_supervised_modules_have_it_too(tmp_path, said):
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}]
    seen = []
    for lr, ckpt_path in ((1e-2, None), (3e-3, "last")):
        module = SFTModule(tiny_llama(seed=0, width=32, layers=2), char_tokenizer(), lr=lr)
        rates, save = Rates(), ModelCheckpoint(tmp_path, save_last=True)
        trainer = pl.Trainer(
            strategy="lightrft_fake", accelerator="cpu", max_epochs=1 if ckpt_path is None else 2, logger=False,
            callbacks=[rates, save], default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, make_data(train=rows, val=None, batch_size=2), ckpt_path=ckpt_path)
        seen += rates.seen
    assert seen == [(1e-2,), (3e-3,)] and said == ["Settings given now win over the checkpoint's: lr 0.01 -> 0.003"]
