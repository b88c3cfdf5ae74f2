"""What the callbacks that show or write something have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightrft_lightning._errors import import_extra

if TYPE_CHECKING:
    from rich.console import Console

    from lightrft_lightning.module import RLHFModule


def console() -> Console:
    """Standard output as it is now: coloured in a terminal, plain text in a file, a pipe or a notebook."""
    made: Console = import_extra("rich.console", "cli").Console(highlight=False, markup=False, force_jupyter=False)
    return made


def output_dir(trainer: pl.Trainer) -> Path:
    """The logger's folder, or the Trainer's `default_root_dir`. Call it on every rank."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def rlhf_module(callback: pl.Callback, pl_module: pl.LightningModule) -> RLHFModule:
    """`pl_module`, checked.

    Raises:
        TypeError: it is no `RLHFModule`, and what the callback works with is missing.
    """
    from lightrft_lightning.module import RLHFModule

    if not isinstance(pl_module, RLHFModule):
        raise TypeError(f"{type(callback).__name__} works with an RLHFModule, got {type(pl_module).__name__}")
    return pl_module


def trained_model(callback: pl.Callback, pl_module: pl.LightningModule) -> Any:
    """The model that `pl_module` trains.

    Raises:
        TypeError: it is none of this package's modules.
    """
    from lightrft_lightning.supervised import SupervisedModule

    return pl_module.model if isinstance(pl_module, SupervisedModule) else rlhf_module(callback, pl_module).actor


def train_reward(trainer: pl.Trainer, module: RLHFModule) -> float | None:
    """Mean reward of the iteration that just ended; None if no sample of it could be scored."""
    # Lightning keeps the last value of a metric that was not logged again, so the metric alone may be an old one.
    if not any(t.reward is not None for t in module.last_trajectories):
        return None
    return metric(trainer, "train/reward")


def metric(trainer: pl.Trainer, name: str) -> float | None:
    """The latest value that was logged under `name`, or None."""
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)


def is_full_sanity_check(trainer: pl.Trainer) -> bool:
    """Whether Lightning's sanity check goes through the whole validation set (``num_sanity_val_steps=-1``)."""
    return trainer.num_sanity_val_batches == trainer.num_val_batches
