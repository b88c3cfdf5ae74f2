"""What can be seen of any training data from outside, to tell a resumed run that they are others.

`PromptDataModule` knows more of its rows, and tells it itself.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import IterableDataset


def sizes(trainer: pl.Trainer) -> list[dict[str, int | None]]:
    """Rows and batch size of each training data loader that says them; nothing with a data module of prompts."""
    loader = trainer.fit_loop._combined_loader
    if loader is None or getattr(trainer.datamodule, "train_prompts", None):  # type: ignore[attr-defined]
        return []
    return [{"rows": _rows(one), "batch_size": getattr(one, "batch_size", None)} for one in loader.flattened]


def _rows(loader: Any) -> int | None:
    data = getattr(loader, "dataset", None)
    return len(data) if isinstance(data, Sized) and not isinstance(data, IterableDataset) else None


def tell_changes(then: Sequence[dict[str, int | None]], now: Sequence[dict[str, int | None]], in_epoch: bool) -> None:
    """One line, if the data are not those that a checkpoint was written with.

    Args:
        then: `sizes` of then.
        now: of this run, once its data loaders are there.
        in_epoch: the checkpoint is from the middle of an epoch.
    """
    changes = [
        f"{after[name]} {what} in place of {before[name]}"
        for before, after in zip(then, now, strict=False)
        for name, what in (("rows", "rows"), ("batch_size", "in a batch"))
        if before[name] != after[name] and None not in (before[name], after[name])
    ]
    if changes:
        rest = "Training goes on at the same place of the epoch: in this one some rows may come again or be left out"
        whole = "The next epoch is over these"
        rank_zero_warn(
            f"the training data are not those of the checkpoint: {', '.join(changes)}. {rest if in_epoch else whole}"
        )
