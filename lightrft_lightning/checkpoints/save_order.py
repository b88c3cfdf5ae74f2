"""When `ModelCheckpoint` saves: behind all hooks of the moment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


def model_checkpoints(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    """The Trainer's, in their order."""
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]


@contextlib.contextmanager
def saving_last(trainer: pl.Trainer, hook: str) -> Iterator[list[Callable[[], None]]]:
    """Collect what `ModelCheckpoint` does in a hook.

    By itself it comes before the module's own hook of this name, whose doing would be in no checkpoint of this moment,
    and is not done again by a run that resumes from it.
    """
    waiting: list[Callable[[], None]] = []
    callbacks = model_checkpoints(trainer)
    for callback in callbacks:
        own = getattr(callback, hook)
        vars(callback)[hook] = lambda *args, own=own: waiting.append(lambda: own(*args))
    try:
        yield waiting
    finally:
        for callback in callbacks:
            del vars(callback)[hook]
