"""A run that has ended stays so when it is resumed, unless something is asked of it that it has not done."""

from __future__ import annotations

import logging
from datetime import timedelta

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from stops import Toy


class Batches(pl.Callback):
    def __init__(self):
        self.number = 0

    def on_train_batch_start(self, *args):
        self.number += 1


@pytest.fixture
def fit(tmp_path):
    def fit(callback, *, resume=True, **settings):
        batches = Batches()
        saves = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=settings.pop("every", None))
        trainer = pl.Trainer(
            strategy="lightrft_fake", accelerator="cpu", logger=False, callbacks=[callback, batches, saves],
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            num_sanity_val_steps=0, **{"max_epochs": 9, **settings},
        )  # fmt: skip
        trainer.fit(Toy("resumable"), ckpt_path=tmp_path / "last.ckpt" if resume else None)
        return batches.number

    return fit


def stop_at_the_second(patience=1, **settings):
    """Nothing is an improvement of 10."""
    return EarlyStopping("val", min_delta=10.0, patience=patience, **settings)


@pytest.mark.parametrize("trainer", [{}, {"val_check_interval": 2}])
def test_a_run_that_early_stopping_has_ended_trains_no_further_batch(fit, caplog, trainer):
    assert fit(stop_at_the_second(), resume=False, **trainer) == (4 if trainer else 8)
    with caplog.at_level(logging.INFO):
        assert fit(stop_at_the_second(), **trainer) == 0
    assert "EarlyStopping(monitor='val') had ended the run of this checkpoint in epoch" in caplog.text
    assert "To go on, raise its patience" in caplog.text


def test_the_validation_that_ends_a_run_is_made_again_if_the_checkpoint_is_from_before_it(fit):
    how = {"val_check_interval": 2, "every": 1}
    assert fit(stop_at_the_second(), resume=False, **how) == 4
    assert fit(stop_at_the_second(), **how) == 0


def test_a_larger_patience_lets_it_go_on(fit, caplog):
    fit(stop_at_the_second(), resume=False)
    with caplog.at_level(logging.INFO):
        assert fit(stop_at_the_second(patience=3)) == 8, "two more validations"
    assert "EarlyStopping(monitor='val'): patience=3 wins over the checkpoint's 1" in caplog.text


def test_another_threshold_lets_it_go_on(fit):
    fit(stop_at_the_second(patience=9, stopping_threshold=1e3), resume=False)
    assert fit(stop_at_the_second(patience=9, stopping_threshold=1e2)) == 0
    assert fit(stop_at_the_second(patience=9, stopping_threshold=-1.0), max_epochs=2) == 4


def test_a_run_whose_time_is_over_trains_no_further_batch(fit):
    assert fit(Timer(timedelta(hours=1)), resume=False, max_epochs=1) == 4
    assert fit(Timer(timedelta(microseconds=1), interval="epoch")) == 0
