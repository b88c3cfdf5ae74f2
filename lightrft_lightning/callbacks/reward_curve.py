"""`RewardCurve`: the reward over the iterations as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightrft_lightning._errors import import_extra
from lightrft_lightning.callbacks._output import (
    is_full_sanity_check,
    metric,
    output_dir,
    rlhf_module,
    train_reward,
)
from lightrft_lightning.models.export import check_writable

MEAN_OVER = 10
"""Iterations of the running mean; it is drawn once there are five times as many."""


class RewardCurve(Callback):
    """Draws training and validation reward into a PNG file. Needs the extra ``demo`` (matplotlib).

    The points are part of checkpoints, so the curve of a resumed run is whole. With a `fast_dev_run` nothing is
    written.

    Args:
        filename: name of the picture; the ending decides the format.
        every_n: iterations from one drawing to the next; the last one is drawn in any case.
        dirpath: where to; default: the logger's folder, or the Trainer's `default_root_dir`.

    Attributes:
        train: (iteration, mean reward) of every iteration.
        val: (iteration, mean reward) of every validation; 0 is the one before training.
        path: where the picture is, once it was drawn.
    """

    def __init__(self, filename: str = "reward.png", every_n: int = 10, dirpath: str | None = None) -> None:
        if every_n < 1:
            raise ValueError(f"RewardCurve(every_n={every_n}): must be at least 1")
        self.filename = filename
        self.every_n = every_n
        self.dirpath = dirpath
        self.train: list[tuple[int, float]] = []
        self.val: list[tuple[int, float]] = []
        self.path: Path | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            rlhf_module(self, pl_module)
            # Now, and not after the first iterations.
            kinds = import_extra("matplotlib.backend_bases", "demo").FigureCanvasBase.get_supported_filetypes()
            if (kind := Path(self.filename).suffix.lstrip(".") or "png") not in kinds:
                raise ValueError(f"RewardCurve(filename={self.filename!r}): {kind!r} is none of {', '.join(kinds)}")
            if (folder := self._folder(trainer)) is not None:
                check_writable(folder)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = rlhf_module(self, pl_module)
        reward = train_reward(trainer, module)
        if reward is not None:
            self.train.append((module.iteration, reward))
        if module.iteration % self.every_n == 0:
            self._draw(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reward = metric(trainer, "val/reward")
        counts = trainer.state.fn == "fit" and (not trainer.sanity_checking or is_full_sanity_check(trainer))
        if counts and reward is not None:
            iteration = rlhf_module(self, pl_module).iteration
            # A run that is resumed where a validation was due repeats it.
            self.val = [point for point in self.val if point[0] != iteration] + [(iteration, reward)]

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self._draw(trainer)

    def _folder(self, trainer: pl.Trainer) -> Path | None:
        """Where this process draws to, if it does; all ranks together."""
        directory = Path(self.dirpath) if self.dirpath else output_dir(trainer)
        return directory if trainer.is_global_zero and not trainer.fast_dev_run else None  # type: ignore[attr-defined]

    def _draw(self, trainer: pl.Trainer) -> None:
        if (folder := self._folder(trainer)) is not None and (self.train or self.val):
            self.draw(folder / self.filename)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw what there is so far into the file `path`; a reader never sees half a picture."""
        # `pyplot` would pick a back end for the whole process; a canvas of its own leaves the user's alone.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        with_mean = len(self.train) >= 5 * MEAN_OVER
        if self.train:
            x, y = zip(*self.train, strict=True)
            style = {"alpha": 0.35} if with_mean else {"marker": "."}
            axes.plot(x, y, color="tab:blue", label="training", **style)
        if with_mean:
            # Each mean stands in the middle of its iterations, so that the curve does not lag behind.
            mean_x, mean_y = _running_mean(x), _running_mean(y)
            axes.plot(mean_x, mean_y, color="tab:blue", label=f"training, mean of {MEAN_OVER}")
        if self.val:
            axes.plot(*zip(*self.val, strict=True), color="tab:orange", marker="o", label="validation")
        axes.set(xlabel="iteration", ylabel="mean reward")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}")
        figure.savefig(unfinished, dpi=130, format=self.path.suffix.lstrip(".") or "png")
        unfinished.replace(self.path)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"train": list(self.train), "val": list(self.val)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train = [(iteration, reward) for iteration, reward in state_dict["train"]]
        self.val = [(iteration, reward) for iteration, reward in state_dict["val"]]


def _running_mean(values: Sequence[float]) -> list[float]:
    return [sum(values[i : i + MEAN_OVER]) / MEAN_OVER for i in range(len(values) - MEAN_OVER + 1)]
