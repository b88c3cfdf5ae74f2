from __future__ import annotations

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from stops import Toy
from torch.utils.data import DataLoader


class Rows(Toy):
    def __init__(self, rows, batch_size=4):
        super().__init__()
        self.rows, self.batch_size = rows, batch_size

    def train_dataloader(self):
        return DataLoader([float(i) for i in range(self.rows)], batch_size=self.batch_size)


@pytest.fixture
def fit(tmp_path):
    def fit(module, ckpt_path=None, **settings):
        pl.Trainer(
            strategy="lightrft_fake", accelerator="cpu", logger=False, limit_val_batches=0, default_root_dir=tmp_path,
            callbacks=[ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
            enable_progress_bar=False, enable_model_summary=False, max_epochs=2,
        ).fit(module, ckpt_path=ckpt_path)  # fmt: skip

    return fit


def test_a_users_own_data_that_have_changed_are_told(fit, tmp_path, recwarn):
    fit(Rows(16))
    fit(Rows(16), tmp_path / "step=6.ckpt")
    assert not any("training data" in str(w.message) for w in recwarn)
    with pytest.warns(UserWarning, match=r"checkpoint: 12 rows in place of 16. Training goes on at the same place"):
        fit(Rows(12), tmp_path / "step=6.ckpt")
    with pytest.warns(UserWarning, match=r"checkpoint: 2 in a batch in place of 4. .*come again or be left out"):
        fit(Rows(16, batch_size=2), tmp_path / "step=6.ckpt")
    with pytest.warns(UserWarning, match=r"checkpoint: 20 rows in place of 16. The next epoch is over these"):
        fit(Rows(20), tmp_path / "step=4.ckpt")
