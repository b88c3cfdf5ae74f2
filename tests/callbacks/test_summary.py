from __future__ import annotations

import re

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightrft_lightning.callbacks import ExportModel, Summary
from lightrft_lightning.rewards.watch import NoRewardError

VALIDATION = r"validation reward (\d\.\d{3}) -> (\d\.\d{3})"


class Rewards(pl.Callback):
    """What the summary should say."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.train.append(float(trainer.callback_metrics["train/reward"]))

    def on_validation_end(self, trainer, pl_module):
        self.val.append(float(trainer.callback_metrics["val/reward"]))


def last_line(capsys):
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "iteration" in line]) == 1
    return lines[-1]


def test_validation_reward_before_and_after(fit, capsys, tmp_path):
    rewards = Rewards()
    fit(ExportModel(), Summary(), rewards, max_epochs=2)
    line = last_line(capsys)
    match = re.fullmatch(rf"Done: {VALIDATION}, 8 iterations, \d+\.\d minutes, model in (.*)", line)
    assert match, line
    assert [float(v) for v in match.groups()[:2]] == pytest.approx([rewards.val[0], rewards.val[-1]], abs=6e-4)
    assert match.group(3) == str(tmp_path / "model")


@pytest.mark.parametrize("settings", [{"num_sanity_val_steps": 1}, {"limit_val_batches": 0}])
def test_training_reward_where_the_start_was_not_validated(fit, capsys, settings):
    rewards = Rewards()
    fit(Summary(), rewards, limit_train_batches=6, **settings)
    line = last_line(capsys)
    match = re.match(r"Done: training reward (.*) -> (.*) \(means of the first and last 3\), 6 iterations, ", line)
    assert match, line
    expected = [sum(rewards.train[:3]) / 3, sum(rewards.train[-3:]) / 3]
    assert [float(v) for v in match.groups()] == pytest.approx(expected, abs=6e-4)
    assert line.endswith("model not exported")


def test_says_when_the_last_validation_was(fit, capsys):
    fit(Summary(), max_epochs=3, limit_train_batches=2, check_val_every_n_epoch=2)
    assert re.search(rf"{VALIDATION} \(at iteration 4\), 6 iterations", last_line(capsys))


def test_after_ctrl_c(fit, capsys, interrupt):
    with pytest.raises(SystemExit):
        fit(ExportModel(), Summary(), interrupt(after=3))
    assert re.match(r"Stopped by Ctrl-C: training reward .*, 3 iterations, .* model in", last_line(capsys))


def test_not_after_an_error(fit, capsys, interrupt):
    with pytest.raises(ZeroDivisionError):
        fit(Summary(), interrupt(after=3, error=ZeroDivisionError))
    assert "iteration" not in capsys.readouterr().out


def test_after_early_stopping_and_the_end_of_time(fit, capsys):
    fit(Summary(), EarlyStopping("val/reward", patience=1, mode="max", stopping_threshold=-1.0), max_epochs=9)
    assert re.search(rf"Done: {VALIDATION}, 4 iterations", last_line(capsys))
    fit(Summary(), max_epochs=-1, max_time={"seconds": 1}, limit_val_batches=0)
    assert "Done: training reward" in last_line(capsys)


def test_one_iteration_and_no_reward(fit, capsys):
    fit(Summary(), limit_train_batches=1, limit_val_batches=0)
    assert re.match(r"Done: training reward \d\.\d{3}, 1 iteration, ", last_line(capsys))

    fit(Summary(), max_epochs=0)
    assert last_line(capsys).startswith("Done: no reward, 0 iterations, ")


def test_not_after_a_run_without_any_reward(fit, capsys):
    def fails(completion):
        raise RuntimeError

    with pytest.raises(NoRewardError):
        fit(Summary(), rewards=fails, limit_train_batches=1)
    assert "iteration" not in capsys.readouterr().out


def test_a_resumed_run_counts_from_its_beginning(fit, capsys, tmp_path):
    rewards = Rewards()
    fit(Summary(), rewards, ModelCheckpoint(tmp_path, save_last=True, save_top_k=0))
    last_line(capsys)
    fit(Summary(), rewards, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    line = last_line(capsys)
    match = re.match(rf"Done: {VALIDATION}, 8 iterations, ", line)
    assert match, line
    assert [float(v) for v in match.groups()] == pytest.approx([rewards.val[0], rewards.val[-1]], abs=6e-4)


def test_says_nothing_about_a_validation(fit, capsys):
    trainer, module = fit(Summary())
    capsys.readouterr()
    trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
    assert "iteration" not in capsys.readouterr().out
