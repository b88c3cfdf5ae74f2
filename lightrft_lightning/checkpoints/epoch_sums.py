"""What a module has logged in an epoch that is not over: the sums behind `self.log(..., on_epoch=True)` of this rank.

Lightning leaves them out of checkpoints, so that the mean over an epoch would be one over its rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync

_SETTINGS = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
)  # fmt: skip


def epoch_sums(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """The sums so far, as plain values; `torchmetrics` objects are left out, as they are states of the module."""
    results = trainer.fit_loop.epoch_loop._results
    return {
        key: {
            "settings": {name: getattr(metric.meta, name) for name in _SETTINGS},
            "reduce": metric.meta.reduce_fx.__name__,
            "sync": (metric.meta.sync.should, metric.meta.sync.rank_zero_only),
            "value": metric.value.detach().cpu().clone(),
            "count": int(getattr(metric, "cumulated_batch_size", 0)),
        }
        for key, metric in results.items()
        if metric.is_tensor and metric.meta.on_epoch and not metric.has_reset and metric.meta.sync.group is None
    }


def restore(trainer: pl.Trainer, sums: Mapping[str, Mapping[str, Any]]) -> None:
    """Undo `epoch_sums`, before the next batch."""
    for key, one in sums.items():
        should, rank_zero_only = one["sync"]
        meta = _Metadata(**one["settings"], reduce_fx=getattr(torch, one["reduce"]))
        meta.sync = _Sync(_should=should, fn=trainer.strategy.reduce, rank_zero_only=rank_zero_only)
        metric = _ResultMetric(meta, True)
        metric.value = one["value"]
        if meta.is_mean_reduction:
            metric.cumulated_batch_size = torch.tensor(one["count"])
        metric._update_count = 1
        trainer.fit_loop.epoch_loop._results[key] = metric.to(trainer.strategy.root_device)
    if sums:
        # Lightning empties them at the first batch of an epoch, which it tells by this.
        trainer._logger_connector._first_loop_iter = True
