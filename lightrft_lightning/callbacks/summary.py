"""`Summary`: one line at the end that says what the run achieved."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightrft_lightning.callbacks._output import (
    console,
    is_full_sanity_check,
    metric,
    rlhf_module,
    train_reward,
)
from lightrft_lightning.callbacks.export import ExportModel


class Summary(Callback):
    """Prints one line when `fit` ends: reward before and after, iterations, minutes, where the model is.

    "Before" and "after" are the validation rewards if the whole validation set was run before training
    (``Trainer(num_sanity_val_steps=-1)``) and later on; otherwise the mean training rewards of the first and the last
    iterations. The line says which. It also comes after Ctrl-C; after another exception it does not. A resumed run
    counts from its beginning. Needs the extra ``cli``.
    """

    def __init__(self) -> None:
        self._train: list[float] = []
        self._val: list[tuple[int, float]] = []
        self._seconds_before = 0.0
        self._start = 0.0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        rlhf_module(self, pl_module)
        console()  # if rich is missing, not only at the end
        self._start = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        reward = train_reward(trainer, rlhf_module(self, pl_module))
        if reward is not None:
            self._train.append(reward)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reward = metric(trainer, "val/reward")
        counts = not trainer.sanity_checking or is_full_sanity_check(trainer)
        if trainer.state.fn == "fit" and counts and reward is not None:
            self._val.append((rlhf_module(self, pl_module).iteration, reward))

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print(trainer, pl_module, "Done")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            self._print(trainer, pl_module, "Stopped by Ctrl-C")

    def _print(self, trainer: pl.Trainer, pl_module: pl.LightningModule, how: str) -> None:
        if trainer.is_global_zero:
            line = self._line(rlhf_module(self, pl_module).iteration, how, _exported_to(trainer))
            console().print(line, soft_wrap=True)

    def _line(self, iterations: int, how: str, exported: str) -> str:
        minutes = (self._seconds_before + time.perf_counter() - self._start) / 60
        counted = f"{iterations} iteration{'' if iterations == 1 else 's'}"
        return f"{how}: {self._before_and_after(iterations)}, {counted}, {minutes:.1f} minutes, {exported}"

    def _before_and_after(self, iterations: int) -> str:
        if len(self._val) > 1 and self._val[0][0] == 0:
            (_, before), (iteration, after) = self._val[0], self._val[-1]
            at = "" if iteration == iterations else f" (at iteration {iteration})"
            return f"validation reward {before:.3f} -> {after:.3f}{at}"
        window = min(10, len(self._train) // 2)
        if window == 0:
            return f"training reward {self._train[0]:.3f}" if self._train else "no reward"
        first, last = sum(self._train[:window]) / window, sum(self._train[-window:]) / window
        means = "first and last" if window == 1 else f"means of the first and last {window}"
        return f"training reward {first:.3f} -> {last:.3f} ({means})"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "train": list(self._train),
            "val": list(self._val),
            "seconds": self._seconds_before + time.perf_counter() - self._start,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train = list(state_dict["train"])
        self._val = [(iteration, reward) for iteration, reward in state_dict["val"]]
        self._seconds_before = state_dict["seconds"]


def _exported_to(trainer: pl.Trainer) -> str:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    folders = [str(c.exported) for c in callbacks if isinstance(c, ExportModel) and c.exported]
    return f"model in {', '.join(folders)}" if folders else "model not exported"
