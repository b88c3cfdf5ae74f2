"""`ProgressLine`: one line an iteration, for a terminal and for a log file."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightrft_lightning.callbacks._output import console, metric, rlhf_module, train_reward

if TYPE_CHECKING:
    from lightrft_lightning.module import RLHFModule


class ProgressLine(Callback):
    """Prints one line after every iteration and every validation; what does not fit a terminal is left out.

    It takes the place of Lightning's progress bar: use it with ``Trainer(enable_progress_bar=False)``. Needs the extra
    ``cli``. The number behind the reward is its change since the line before of the same kind.

    Args:
        every_n: iterations from one line to the next.

    Example:
        >>> Trainer(enable_progress_bar=False, callbacks=[TransformersRollout(), ProgressLine()])
    """

    def __init__(self, every_n: int = 1) -> None:
        if every_n < 1:
            raise ValueError(f"ProgressLine(every_n={every_n}): must be at least 1")
        self.every_n = every_n
        self._fit_start = self._iteration_start = self._validation_start = 0.0
        self._previous: dict[str, float] = {}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rlhf_module(self, pl_module)
        self._fit_start = time.perf_counter()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._iteration_start = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        seconds, self._iteration_start = now - self._iteration_start, now
        module = rlhf_module(self, pl_module)
        planned = planned_iterations(trainer, module)
        if not trainer.is_global_zero or (module.iteration % self.every_n and module.iteration != planned):
            return
        reward, change = self._with_change("train", train_reward(trainer, module))
        parts = [f"{name} {_number(metric(trainer, f'time/{name}'), 0, 1)} s" for name in ("rollout", "update")]
        self._print(
            f"{module.iteration:>{len(str(planned or 1000))}}" + (f"/{planned}" if planned else ""),
            reward,
            change,
            f"length {_number(metric(trainer, 'train/length'), 5, 1)}",
            f"{seconds:5.1f} s",
            f"elapsed {_clock(now - self._fit_start)}",
            f"{_number(metric(trainer, 'time/tokens_per_second'), 5, 0)} tok/s",
            f"({', '.join(parts)})",
        )

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_start = time.perf_counter()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = time.perf_counter()
        seconds = now - self._validation_start
        self._iteration_start += seconds  # an iteration's time is its own
        if trainer.state.fn != "fit" or not trainer.is_global_zero:
            return  # outside of `fit` Lightning prints a table of its own
        planned = str(planned_iterations(trainer, rlhf_module(self, pl_module)) or "")
        reward, change = self._with_change("val", metric(trainer, "val/reward"))
        self._print(
            "val".rjust(2 * len(planned) + 1 if planned else 4),
            reward,
            change,
            f"length {_number(metric(trainer, 'val/length'), 5, 1)}",
            f"{seconds:5.1f} s",
            f"elapsed {_clock(now - self._fit_start)}",
            "(before training)" if trainer.sanity_checking else "",
        )

    def _with_change(self, kind: str, reward: float | None) -> tuple[str, str]:
        """The reward, and how it changed since the last line of this kind; each with a fixed width."""
        if reward is None:
            return "   n/a", " " * 8
        before = self._previous.get(kind)
        self._previous[kind] = reward
        return f"{reward:6.3f}", " " * 8 if before is None else f"({reward - before:+.3f})"

    def _print(self, label: str, reward: str, change: str, *columns: str) -> None:
        from rich.text import Text

        out = console()
        line = Text(f"{label}  ", style="dim" if label.strip() == "val" else "")
        line.append(f"reward {reward}", style="bold").append(" ")
        line.append(change, style="green" if "+" in change else "red")
        for column in filter(None, columns):
            if out.is_terminal and line.cell_len + 2 + len(column) > out.width:
                break
            line.append(f"  {column}")
        out.print(line, soft_wrap=True)


def planned_iterations(trainer: pl.Trainer, module: RLHFModule) -> int | None:
    """Iterations after which the Trainer stops by its own settings; None if only time or the user ends the run."""
    limits: list[float] = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        limits.append(trainer.max_epochs * trainer.num_training_batches - module.staleness)
    if trainer.max_steps > 0:
        # Not from the start: an iteration without any signal in its rewards makes no step.
        steps_left = max(0, trainer.max_steps - trainer.global_step)
        limits.append(module.iteration + math.ceil(steps_left / (module.epochs_per_rollout * module.steps_per_epoch)))
    finite = [limit for limit in limits if math.isfinite(limit)]
    return int(min(finite)) if finite else None


def _number(value: float | None, width: int, digits: int) -> str:
    return "n/a".rjust(width) if value is None else f"{value:{width}.{digits}f}"


def _clock(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any.

    >>> _clock(75), _clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
