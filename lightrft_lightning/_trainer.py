"""What the package's modules ask of the Trainer that runs them."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightrft_lightning._errors import import_extra
from lightrft_lightning.strategies.base import StrategyBase
from lightrft_lightning.strategies.lightrft_calls import cosine_to_a_tenth

log = logging.getLogger(__name__)

LR_SCHEDULES = ("constant", "linear", "cosine", "cosine_with_min_lr")


def check_strategy(module: pl.LightningModule) -> None:
    """For `setup`.

    Raises:
        TypeError: the Trainer has a strategy that is not one of this package.
        ValueError: it would train weights of 16 bits.
    """
    if not isinstance(module.trainer.strategy, StrategyBase):
        raise TypeError(
            f"{type(module).__name__} trains through a lightrft strategy, got "
            f"{type(module.trainer.strategy).__name__}: use Trainer(strategy='lightrft_fake')"
        )
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BatchSizeFinder | LearningRateFinder):
            name = type(callback).__name__
            raise ValueError(f"{name} works with automatic optimization only: leave it out and set the value yourself")
    precision, fitting = str(module.trainer.precision), module.trainer.state.fn == TrainerFn.FITTING
    if fitting and precision.startswith(("bf16-true", "16-true", "transformer-engine")):
        mixed = "16-mixed" if precision == "16-true" else "bf16-mixed"
        raise ValueError(
            f"Trainer(precision={precision!r}): {type(module).__name__} would train 16-bit weights, where steps are "
            f"rounded away at the usual learning rates: use precision={mixed!r}, which keeps them in float32"
        )
    # Its advice is to save the weights of before the step, from which a resumed run could not go on.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")


def check_quantization(strategy: StrategyBase, quantization: str | None) -> None:
    """For `setup`.

    Raises:
        ValueError: the strategy cannot train a model with such weights.
    """
    if quantization is not None and (problem := strategy.quantization_problem()) is not None:
        raise ValueError(f"quantization={quantization!r}: {problem}")


def with_lr_schedule(
    module: Any, model: Any, settings: Any, steps_per_batch: int = 1, idle_batches: int = 0
) -> dict[str, Any]:
    """An optimizer and its schedule over all steps of the fit, as `configure_optimizers` returns them.

    Args:
        module: the `LightningModule`.
        model: what the optimizer trains.
        settings: what has ``lr``, ``weight_decay``, ``lr_schedule`` and ``warmup_ratio``.
        steps_per_batch: optimizer steps of one batch.
        idle_batches: in which it makes no step.

    Raises:
        ValueError: the number of steps is not known.
    """
    optimizer = module.strategy.create_optimizer(model, lr=settings.lr, weight_decay=settings.weight_decay)
    if settings.lr_schedule == "constant" and not settings.warmup_ratio:
        return {"optimizer": optimizer}
    trainer = module.trainer
    steps: float = trainer.max_steps
    if steps <= 0:
        steps = (_planned_batches(trainer) - idle_batches) * steps_per_batch
    if not 0 < steps < float("inf"):
        raise ValueError(
            f"lr_schedule={settings.lr_schedule!r}, warmup_ratio={settings.warmup_ratio} need a known number of "
            "steps: set Trainer(max_epochs=...) or max_steps"
        )
    name = "constant_with_warmup" if settings.lr_schedule == "constant" else settings.lr_schedule
    get_scheduler = import_extra("transformers", "hf").get_scheduler
    warmup = round(int(steps) * settings.warmup_ratio)
    if name == "cosine_with_min_lr":
        scheduler = cosine_to_a_tenth(optimizer, int(steps), settings.warmup_ratio)
    else:
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=int(steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def check_optimizers(trainer: pl.Trainer, number: int = 1) -> None:
    """Look at what `configure_optimizers` returns, as the user may have written his own.

    Args:
        trainer: of a fit that begins.
        number: of optimizers that the module steps.

    Raises:
        ValueError: another number, or a schedule that is stepped with a metric.
    """
    if len(trainer.optimizers) != number:
        raise ValueError(
            f"configure_optimizers returns {len(trainer.optimizers)} optimizers, {number} are needed: one for the model"
            + (", then one for the critic" if number == 2 else "")
        )
    for config in trainer.lr_scheduler_configs:
        name = type(config.scheduler).__name__
        if isinstance(config.scheduler, ReduceLROnPlateau):
            raise ValueError(
                f"configure_optimizers returns a {name}, which is stepped with a metric; here schedules are stepped "
                "after each optimizer step. Leave it out and step it in a callback (on_train_batch_end)"
            )
        if config.interval != "step" or config.frequency != 1:
            rank_zero_only(log.warning)(
                "optimization is manual: %s is stepped after each optimizer step, interval=%r and frequency=%r have no "
                "effect",
                name, config.interval, config.frequency,
            )  # fmt: skip


def _planned_batches(trainer: pl.Trainer) -> float:
    if trainer.datamodule is None:  # type: ignore[attr-defined]
        return trainer.estimated_stepping_batches
    # Not `estimated_stepping_batches`: it sets the data loader up before Lightning has read the loader's position
    # from the checkpoint, and a resumed run would then start the data from the beginning.
    batches = len(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
    limit = trainer.limit_train_batches
    return (trainer.max_epochs or 0) * (min(batches, limit) if isinstance(limit, int) else int(batches * limit))
