"""Resuming from any place, any number of times, as if there had been no stop."""

from __future__ import annotations

import contextlib
import os
import shutil
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from stops import Case, Toy, difference

from lightrft_lightning.data import make_dataloader

SEQUENCES = int(os.environ.get("LIGHTRFT_STOPS", 100))
SHARES = {"plain": 0.4, "shuffled": 0.25, "resumable": 0.25, "sft": 0.04, "reward": 0.02, "rlhf": 0.04}


@pytest.mark.parametrize("kind", SHARES)
def test_runs_that_are_stopped_at_random_places_equal_those_that_are_not(kind, tmp_path):
    for seed in range(round(SEQUENCES * SHARES[kind])):
        case = Case.draw(seed, kind)
        assert not (told := difference(case, tmp_path / str(seed))), f"{case}\n{told}"


def test_a_module_without_stops_trains_as_under_lightnings_own_strategy(tmp_path):
    """Nothing is drawn that Lightning does not draw."""
    finals = []
    for strategy in ("auto", "lightrft_fake"):
        torch.manual_seed(1)
        trainer = pl.Trainer(
            strategy=strategy, accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        module = Toy("shuffled")
        trainer.fit(module)
        finals.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_a_batch_that_was_broken_off_is_trained_on_again(tmp_path):
    """`save_on_exception` saves after the data loader has handed the batch out."""

    class Breaks(pl.Callback):
        def __init__(self, at):
            self.at, self.seen = at, []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.seen.append(batch.tolist())
            if len(self.seen) == self.at:
                raise RuntimeError("broken")

    def fit(at=None, ckpt_path=None):
        breaks = Breaks(at)
        save = ModelCheckpoint(tmp_path, filename="broken", save_on_exception=True, enable_version_counter=False)
        trainer = pl.Trainer(
            strategy="lightrft_fake", accelerator="cpu", max_epochs=2, logger=False, callbacks=[breaks, save],
            limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        with contextlib.nullcontext() if at is None else pytest.raises(RuntimeError, match="broken"):
            trainer.fit(Toy("resumable"), ckpt_path=ckpt_path)
        return breaks.seen

    whole = fit()
    for at in (2, 4, 6):
        done = fit(at)[:-1]
        assert done + fit(ckpt_path=tmp_path / "broken.ckpt") == whole


def test_half_an_epoch_goes_on_with_another_batch_size(tmp_path):
    seen = []

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(batch.tolist())
            if len(seen) == 2:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                trainer.should_stop = True

    class Half(Toy):
        def train_dataloader(self):
            return make_dataloader(self.data, 4 if path is None else 2, seed=1)

    for path in (None, tmp_path / "half.ckpt"):
        pl.Trainer(
            strategy="lightrft_fake", accelerator="cpu", max_epochs=1, logger=False, callbacks=[Save()],
            enable_checkpointing=False, limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
        ).fit(Half("resumable"), ckpt_path=path)  # fmt: skip
    assert [len(batch) for batch in seen] == [4, 4, 2, 2, 2, 2]
    assert sorted(x for batch in seen for x in batch) == [float(i) for i in range(16)]


class Idle(Toy):
    """Manual optimization, with a step in the first batch alone."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        if self.trainer.fit_loop.epoch_loop.total_batch_idx == 0:
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()


@pytest.mark.parametrize(
    ("settings", "saved_at"),
    [
        ({}, [4, 8]),
        ({"every_n_train_steps": 1}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"every_n_train_steps": 3}, [4, 7]),
        ({"train_time_interval": timedelta(0)}, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_batches_without_an_optimizer_step_are_saved_too(tmp_path, settings, saved_at):
    saved = []

    class Save(ModelCheckpoint):
        def _save_last_checkpoint(self, trainer, metrics):
            super()._save_last_checkpoint(trainer, metrics)
            saved.append(trainer.fit_loop.epoch_loop.batch_progress.total.processed)

    def fit(epochs, **more):
        trainer = pl.Trainer(
            strategy="lightrft_fake", accelerator="cpu", max_epochs=epochs, logger=False, limit_val_batches=0,
            callbacks=[Save(tmp_path, save_last=True, **settings)], enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Idle("resumable"), **more)
        return trainer

    fit(2)
    assert saved == saved_at
    saved.clear()
    assert fit(3, ckpt_path=tmp_path / "last.ckpt").fit_loop.epoch_loop.batch_progress.total.completed == 12
    assert saved[-1] == {8: 12, 7: 10}[saved_at[-1]]


def test_a_checkpoint_without_the_gradients_that_wait_says_so(tmp_path):
    trainer = pl.Trainer(
        strategy="lightrft_fake", accelerator="cpu", max_epochs=1, logger=False, accumulate_grad_batches=2,
        val_check_interval=3, callbacks=[ModelCheckpoint(tmp_path, every_n_epochs=1)], enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"in the middle of an accumulation \(accumulate_grad_batches=2\)"):
        trainer.fit(Toy("resumable"))


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
def test_what_a_module_does_in_the_hook_of_a_save_is_in_the_checkpoint(tmp_path, hook):
    """Lightning saves before the module's own hook."""

    class Averaging(Toy):
        def __init__(self):
            super().__init__("resumable")
            self.register_buffer("mean", torch.zeros(3, 1))

    def average(self, *args):
        self.mean.lerp_(self.net[0].weight.detach(), 0.1)

    setattr(Averaging, hook, average)

    class Ends(ModelCheckpoint):
        def _save_last_checkpoint(self, trainer, metrics):
            super()._save_last_checkpoint(trainer, metrics)
            if trainer.global_step == end:
                raise RuntimeError("killed")

    def fit(ckpt_path=None):
        how = {"every_n_train_steps": 1} if hook == "on_train_batch_end" else {"save_on_train_epoch_end": False}
        module, save = Averaging(), Ends(tmp_path, save_last=True, **how)
        trainer = pl.Trainer(
            strategy="lightrft_fake", accelerator="cpu", max_epochs=2, logger=False, callbacks=[save],
            val_check_interval=2, num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="killed") if end else contextlib.nullcontext():
            trainer.fit(module, ckpt_path=ckpt_path)
        return module.mean

    torch.manual_seed(5)
    end = None
    expected = fit()
    shutil.rmtree(tmp_path / "last.ckpt")
    torch.manual_seed(5)
    end = 2
    fit()
    end = 4
    fit("last")
    end = None
    assert torch.equal(fit("last"), expected)
