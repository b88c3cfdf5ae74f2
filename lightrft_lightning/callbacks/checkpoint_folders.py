"""Where a fit will put its checkpoints, looked at before it begins: folders that take no files, disks without room."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightrft_lightning.models.export import check_writable, existing_parent
from lightrft_lightning.models.merging import whole_shape

log = logging.getLogger(__name__)

GIB = 2**30


def check_checkpoints(trainer: pl.Trainer, model: nn.Module) -> None:
    """For `on_fit_start`, on all ranks together; the first one looks. Too little room is told in one line.

    Args:
        trainer: with its callbacks.
        model: what is trained.

    Raises:
        ValueError: a folder cannot be written.
    """
    problem: str | None = None
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        for callback in _checkpoints(trainer):
            try:
                check_writable(Path(str(callback.dirpath)))
            except ValueError as err:
                problem = f"{type(callback).__name__}(dirpath={str(callback.dirpath)!r}): {err}"
        if problem is None and (short := _too_little_room(trainer, model)) is not None:
            log.warning(short)
    if (problem := trainer.strategy.broadcast(problem)) is not None:
        raise ValueError(f"{problem}. Choose another folder before training")


def _checkpoints(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    """Those that go to a local disk."""
    found: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in found if isinstance(c, ModelCheckpoint) and c.dirpath and "://" not in str(c.dirpath)]


def _too_little_room(trainer: pl.Trainer, model: nn.Module) -> str | None:
    for callback in _checkpoints(trainer):
        # The one that is being written is there before the one that it replaces is removed.
        kept = (callback.save_top_k if callback.save_top_k >= 0 else 1) + bool(callback.save_last) + 1
        size, folder = _checkpoint_bytes(model, callback.save_weights_only), Path(str(callback.dirpath))
        free = shutil.disk_usage(existing_parent(folder)).free
        if kept * size > free:
            return (
                f"{free / GIB:.1f} GiB are free at {folder}: up to {kept} checkpoints of about {size / GIB:.1f} GiB "
                "will not fit. Make room, lower save_top_k, or set save_weights_only=True"
            )
    return None


def _checkpoint_bytes(model: nn.Module, weights_only: bool) -> int:
    """Weights, and two float32 moments of each that is trained."""
    sizes = {p: math.prod(whole_shape(p)) for p in model.parameters()}
    moments = 0 if weights_only else 8 * sum(size for p, size in sizes.items() if p.requires_grad)
    return moments + sum(size * p.element_size() for p, size in sizes.items())
