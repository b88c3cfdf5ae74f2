"""`ExportModel`: the trained model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightrft_lightning.callbacks._output import output_dir, trained_model


class ExportModel(Callback):
    """Writes a folder that `from_pretrained` and vLLM open when `fit` ends, by Ctrl-C too.

    After any other exception nothing is written, as the weights may be broken; nor with a `fast_dev_run`. List it
    before `Summary`, which tells where the model is.

    Args:
        dirpath: the folder; default: ``model`` in the logger's folder or the Trainer's `default_root_dir`.

    Attributes:
        exported: the folder, once it was written.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.exported: Path | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trained_model(self, pl_module)
        self.exported = None

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._export(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self._export(trainer, pl_module)

    def _export(self, trainer: pl.Trainer, pl_module: Any) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        nothing_new = batches == 0 or self.exported is not None
        if nothing_new or trainer.state.fn != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        directory = Path(self.dirpath) if self.dirpath else output_dir(trainer) / "model"
        pl_module.strategy.save_model(trained_model(self, pl_module), pl_module.tokenizer, directory)
        self.exported = directory
