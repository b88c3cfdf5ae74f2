"""Metrics that callbacks monitor, looked at before a fit: a name with a typing mistake ends it after an epoch."""

from __future__ import annotations

import difflib
import logging

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_only

log = logging.getLogger(__name__)

LOGGED = {
    "RLHFModule": "train/reward train/reward_std train/length train/finished train/loss train/kl train/grad_norm "
    "val/reward val/reward_std val/length val/finished val/pass@1",
    "SFTModule": "train/loss train/perplexity train/accuracy train/exact train/grad_norm val/loss val/perplexity "
    "val/accuracy val/exact",
    "RewardModule": "train/loss train/accuracy train/margin train/reward train/grad_norm val/loss val/accuracy "
    "val/margin val/reward",
}
"""What callbacks may wait for; modules log more, and so may a user's own code."""


def tell_monitors(module: pl.LightningModule, has_validation: bool) -> None:
    """One line for each callback that monitors what will probably not be logged.

    Args:
        module: in a `Trainer`.
        has_validation: whether there are validation data; True if that is not known.
    """
    kind = next((c.__name__ for c in type(module).__mro__ if c.__name__ in LOGGED), "")
    names = LOGGED.get(kind, "").split()
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or not names:
            continue
        like = difflib.get_close_matches(monitor, names, n=1, cutoff=0.85)
        if monitor not in names and like and not monitor.startswith(tuple(f"{name}/" for name in names)):
            problem = f"{kind} logs {like[0]!r}"
        elif monitor in names and monitor.startswith("val/") and not has_validation:
            problem = "there are no validation data, PromptDataModule(val=...)"
        else:
            continue
        rank_zero_only(log.warning)(
            "%s(monitor=%r): %s; if nothing else logs that name, the callback ends the run when it looks for it",
            type(callback).__name__, monitor, problem,
        )  # fmt: skip
