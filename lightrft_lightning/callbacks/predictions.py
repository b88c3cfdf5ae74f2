"""`WritePredictions`: what `predict` generated, as a JSONL file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightrft_lightning.callbacks._output import output_dir


class WritePredictions(Callback):
    """Writes one line a completion during `predict`, as each batch is done; an older file is replaced.

    With several processes each writes a file of its own, with its rank in the name.

    Args:
        filename: name of the file.
        dirpath: where to; default: the logger's folder, or the Trainer's `default_root_dir`.

    Attributes:
        path: this process's file, once there is one.
    """

    def __init__(self, filename: str = "predictions.jsonl", dirpath: str | None = None) -> None:
        self.filename = filename
        self.dirpath = dirpath
        self.path: Path | None = None

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = (Path(self.dirpath) if self.dirpath else output_dir(trainer)) / self.filename
        if trainer.world_size > 1:
            path = path.with_name(f"{path.stem}.rank{trainer.global_rank}{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.path = path

    @override
    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(completion, ensure_ascii=False) + "\n" for completion in outputs)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rank_zero_info(f"Predictions written to {self.path}")
