from __future__ import annotations

import struct

import matplotlib
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightrft_lightning.callbacks import RewardCurve


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def test_collects_and_draws(fit, tmp_path):
    curve = RewardCurve()
    trainer, _ = fit(curve, max_epochs=2, limit_train_batches=2)
    assert [i for i, _ in curve.train] == [1, 2, 3, 4]
    assert [i for i, _ in curve.val] == [0, 2, 4]
    assert curve.train[-1][1] == pytest.approx(float(trainer.callback_metrics["train/reward"]))
    assert curve.val[-1][1] == pytest.approx(float(trainer.callback_metrics["val/reward"]))
    assert curve.path == tmp_path / "reward.png"
    assert png_size(curve.path) == (910, 520)
    assert list(tmp_path.iterdir()) == [curve.path]


def test_a_short_sanity_check_is_no_point(fit):
    curve = RewardCurve()
    fit(curve, num_sanity_val_steps=1)
    assert [i for i, _ in curve.val] == [4]


def test_is_drawn_on_the_way(fit, interrupt, tmp_path):
    curve = RewardCurve(every_n=2)
    with pytest.raises(RuntimeError):
        fit(curve, interrupt(after=3, error=RuntimeError))
    assert curve.path is not None and curve.path.exists()


def test_is_drawn_after_ctrl_c(fit, interrupt):
    curve = RewardCurve(every_n=100)
    with pytest.raises(SystemExit):
        fit(curve, interrupt(after=3))
    assert curve.path is not None and curve.path.exists()
    assert [i for i, _ in curve.train] == [1, 2, 3]


def test_goes_into_the_folder_of_the_logger_or_the_one_given(fit, tmp_path):
    curve = RewardCurve()
    fit(curve, logger=CSVLogger(tmp_path, name="log"))
    assert curve.path == tmp_path / "log" / "version_0" / "reward.png"
    given = RewardCurve("curve.svg", dirpath=str(tmp_path / "new" / "folder"))
    fit(given, logger=CSVLogger(tmp_path, name="log"))
    assert b"<svg" in (tmp_path / "new" / "folder" / "curve.svg").read_bytes()


def test_a_resumed_run_has_the_whole_curve(fit, tmp_path):
    straight = RewardCurve()
    fit(straight, ModelCheckpoint(tmp_path, save_last=True, save_top_k=0), max_epochs=2, limit_train_batches=2)
    resumed = RewardCurve()
    fit(resumed, max_epochs=3, limit_train_batches=2, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.train[:4] == straight.train
    assert [i for i, _ in resumed.train] == [1, 2, 3, 4, 5, 6]
    assert [i for i, _ in resumed.val] == [0, 2, 4, 6]


def test_a_fast_dev_run_writes_nothing(fit, tmp_path):
    fit(RewardCurve(), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_the_users_matplotlib_back_end_stays(tmp_path):
    matplotlib.use("svg")
    curve = RewardCurve()
    curve.train = [(i, i / 60) for i in range(1, 61)]
    curve.draw(tmp_path / "reward.png")
    assert matplotlib.get_backend() == "svg"
    assert png_size(tmp_path / "reward.png") == (910, 520)


def test_a_failed_drawing_leaves_the_old_picture(tmp_path):
    curve = RewardCurve()
    curve.train = [(1, 0.5)]
    curve.draw(tmp_path / "reward.png")
    before = (tmp_path / "reward.png").read_bytes()
    curve.train = [(1, "no number")]
    curve.val = [(1, 0.5), (2, object())]
    with pytest.raises(TypeError):
        curve.draw(tmp_path / "reward.png")
    assert (tmp_path / "reward.png").read_bytes() == before


def test_bad_setting():
    with pytest.raises(ValueError, match="every_n=0"):
        RewardCurve(every_n=0)
