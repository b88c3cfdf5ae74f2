"""`ExportModel`: the trained model as a Hugging Face folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightrft_lightning.callbacks._output import output_dir, trained_model
from lightrft_lightning.models.export import ExportError, check_room, rehearse

log = logging.getLogger(__name__)


class ExportModel(Callback):
    """Writes a folder that `from_pretrained` and vLLM open when `fit` ends, by Ctrl-C too.

    After any other exception nothing is written, as the weights may be broken; nor with a `fast_dev_run`. List it
    before `Summary`, which tells where the model is.

    Before training everything but the weights is tried: the folder, the room on its disk, configuration, tokenizer,
    adapters. At the end the weights are written first, and what fails beside them ends the run with an error after
    all other callbacks have written theirs.

    Args:
        dirpath: the folder; default: ``model`` in the logger's folder or the Trainer's `default_root_dir`.

    Attributes:
        exported: the folder, once the weights are in it.

    Raises:
        ValueError: when `fit` starts: the model could not be exported at its end; the message says what to do.
        ExportError: when it ends: something beside the weights could not be written.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.exported: Path | None = None
        self._problem: ExportError | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trained_model(self, pl_module)
        self.exported = self._problem = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        directory, problem = self._directory(trainer), None
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            try:
                size = rehearse(trained_model(self, pl_module), pl_module.tokenizer, directory)
                check_room(directory, size)
            except ValueError as err:
                problem = str(err)
        if (problem := trainer.strategy.broadcast(problem)) is not None:
            raise ValueError(f"ExportModel, which would write {directory} at the end of this run: {problem}")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._export(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._problem is not None:  # checkpoints have been written by now
            raise self._problem

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self._export(trainer, pl_module)
            if self._problem is not None:
                log.error(self._problem)

    def _directory(self, trainer: pl.Trainer) -> Path:
        return Path(self.dirpath) if self.dirpath else output_dir(trainer) / "model"

    def _export(self, trainer: pl.Trainer, pl_module: Any) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        nothing_new = batches == 0 or self.exported is not None
        if nothing_new or trainer.state.fn != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        directory = self._directory(trainer)
        try:
            pl_module.strategy.save_model(trained_model(self, pl_module), pl_module.tokenizer, directory)
        except ExportError as err:
            self._problem = err
        except Exception as err:
            if pl_module.strategy.world_size > 1:  # other ranks may wait for this one
                raise
            self._problem = ExportError(
                f"the model could not be written into {directory}: {str(err) or type(err).__name__}. The module "
                "still has its weights (strategy.save_model), and so have this run's checkpoints (lightrft convert)"
            )
            self._problem.__cause__ = err
            return
        self.exported = directory
