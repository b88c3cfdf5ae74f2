"""What had ended a run before it is resumed: Lightning forgets early stopping, and asks timers before they know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities.rank_zero import rank_zero_info


def given_patience(trainer: pl.Trainer) -> dict[int, int]:
    """The patience of each `EarlyStopping`, by its `id`, before a checkpoint is restored."""
    return {id(callback): callback.patience for callback in _early_stopping(trainer)}


def take_up(trainer: pl.Trainer, patience: Mapping[int, int], metrics: Mapping[str, Any]) -> None:
    """End the fit before its next batch where the run of the checkpoint had been ended.

    Settings given now win, so a larger patience or another threshold lets it go on.

    Args:
        trainer: in a fit, with all states restored.
        patience: from `given_patience`; Lightning overwrites it with the checkpoint's.
        metrics: the checkpoint's ``callback_metrics``.
    """
    for callback in _early_stopping(trainer):
        was, callback.patience = callback.patience, patience.get(id(callback), callback.patience)
        if was != callback.patience:
            rank_zero_info(f"{_name(callback)}: patience={callback.patience} wins over the checkpoint's {was}")
        if _asks_to_stop(callback, metrics.get(callback.monitor)):
            trainer.should_stop = True
            if trainer.fit_loop._can_stop_early:
                rank_zero_info(
                    f"{_name(callback)} had ended the run of this checkpoint in epoch {callback.stopped_epoch}: no "
                    f"further batch is trained on. {callback.stopping_reason_message or ''} To go on, raise its "
                    "patience, change its threshold, or leave the callback out"
                )
    for timer in _of_kind(trainer, Timer):
        if timer._duration is not None:
            timer._check_time_remaining(trainer)


def _asks_to_stop(callback: EarlyStopping, current: Any) -> bool:
    reason = callback.stopping_reason
    if reason == EarlyStoppingReason.PATIENCE_EXHAUSTED:
        return callback.wait_count >= callback.patience
    if reason == EarlyStoppingReason.NON_FINITE_METRIC:
        return callback.check_finite
    limits = {
        EarlyStoppingReason.STOPPING_THRESHOLD: (callback.stopping_threshold, 1),
        EarlyStoppingReason.DIVERGENCE_THRESHOLD: (callback.divergence_threshold, -1),
    }
    limit, sign = limits.get(reason, (None, 1))
    return limit is not None and (current is None or bool(callback.monitor_op(sign * current, sign * limit)))


def _name(callback: EarlyStopping) -> str:
    return f"{type(callback).__name__}(monitor={callback.monitor!r})"


def _early_stopping(trainer: pl.Trainer) -> list[EarlyStopping]:
    return _of_kind(trainer, EarlyStopping)


def _of_kind(trainer: pl.Trainer, kind: type) -> list[Any]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]
