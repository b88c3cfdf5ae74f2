"""What a fit finds out at its start about the folders of its checkpoints."""

from __future__ import annotations

import os
import re

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from stops import Toy

from lightrft_lightning import CheckpointError
from lightrft_lightning.checkpoints import claim, owners
from lightrft_lightning.checkpoints.store import Ranks


def fit(path, ckpt_path=None, callbacks=()):
    trainer = pl.Trainer(
        strategy="lightrft_fake", accelerator="cpu", max_epochs=1, logger=False, limit_val_batches=0,
        callbacks=[ModelCheckpoint(path, save_last=True), *callbacks], enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=path,
    )  # fmt: skip
    trainer.fit(Toy("resumable"), ckpt_path=ckpt_path)


def test_another_run_in_the_same_folder_is_told_at_the_start(tmp_path, caplog):
    parent = os.getppid()
    other = tmp_path / f".run.{owners._machine():08x}-{parent}-{owners._start_of(parent)}-00aa.lightrft-tmp"
    other.touch()
    fit(tmp_path)
    told = [r.getMessage() for r in caplog.records if "another run is writing" in r.getMessage()]
    assert len(told) == 1 and str(tmp_path) in told[0] and f"process {parent} on this machine" in told[0]
    other.unlink()
    caplog.clear()
    fit(tmp_path)
    assert "another run" not in caplog.text
    assert not list(tmp_path.glob(".*"))


def test_a_run_shows_itself_as_long_as_it_goes_on(tmp_path):
    class Look(pl.Callback):
        def on_train_batch_end(self, *args):
            seen.append(len(list(tmp_path.glob(".run.*"))))

    seen: list[int] = []
    fit(tmp_path, callbacks=[Look()])
    assert seen == [1, 1, 1, 1] and not list(tmp_path.glob(".*"))


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_batch(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"dirpath='.*file/checkpoints'\) cannot be written: NotADirectoryError"):
        fit(tmp_path / "file" / "checkpoints")


def test_a_folder_that_ranks_do_not_share_is_named_with_ranks_and_hosts(tmp_path, monkeypatch):
    class Two(Ranks):
        def gather(self, value):
            return [("node0", True), value]

    monkeypatch.setattr(claim, "_SHOWN_WITHIN", 0.1)
    monkeypatch.setattr(claim.socket, "gethostname", lambda: "node1")
    with pytest.raises(CheckpointError, match=r"rank 1 on node1 does not see what rank 0 on node0 writes there.*share"):
        claim.look(tmp_path / "marker", Two(1, 2))


def test_a_checkpoint_that_was_moved_aside_is_not_passed_over(tmp_path, monkeypatch):
    """Where a system cannot exchange names, a kill between two renames hides `last.ckpt` from ckpt_path="last"."""
    fit(tmp_path)
    (tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.lightrft-old")
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt in .* had been moved aside by a save that was killed.*start"
    ):
        fit(tmp_path, "last")
    fit(tmp_path, "last")


def test_a_run_that_asks_for_the_last_checkpoint_and_finds_none_says_that_it_begins(tmp_path, caplog):
    caplog.set_level("INFO")
    fit(tmp_path / "new" / "version_0" / "checkpoints", "last")
    told = r'ckpt_path="last": there is no last.ckpt in .*new.version_0.checkpoints\. The run starts from the beginning'
    assert re.search(told, caplog.text)
    caplog.clear()
    fit(tmp_path / "new" / "version_1" / "checkpoints", "last")
    assert re.search(
        r"this folder is new. An earlier run has left .*version_0.*ckpt: give ModelCheckpoint a", caplog.text
    )
    caplog.clear()
    fit(tmp_path / "new" / "version_1" / "checkpoints", "last")
    assert "there is no last" not in caplog.text
    (tmp_path / "new" / "version_1" / "checkpoints" / "last.ckpt").rename(tmp_path / "elsewhere")
    fit(tmp_path / "new" / "version_1" / "checkpoints", "last")
    assert re.search(r"there is no last.ckpt in .* \(but epoch=0.*ckpt: pass the path of one to go on", caplog.text)
