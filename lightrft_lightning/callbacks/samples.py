"""`SampleTable`: what the policy writes, every n iterations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightrft_lightning.callbacks._output import console, rlhf_module
from lightrft_lightning.experience.trajectory import Trajectory

OTHER_COLUMNS = 30
"""Width of everything but the two text columns."""

TEXT_LINES = 3
"""Lines that a text may take."""


class SampleTable(Callback):
    """Prints a few training samples: prompt, completion, reward and why the completion ended. Needs the extra ``cli``.

    Texts are shortened; line breaks and other control characters are shown as escapes, and nothing that the model
    writes is taken for formatting.

    Args:
        every_n: iterations from one table to the next; the first comes after the first iteration.
        rows: samples in a table, spread evenly over the rollout.
    """

    def __init__(self, every_n: int = 10, rows: int = 4) -> None:
        for name, value in (("every_n", every_n), ("rows", rows)):
            if value < 1:
                raise ValueError(f"SampleTable({name}={value}): must be at least 1")
        self.every_n = every_n
        self.rows = rows

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = rlhf_module(self, pl_module)
        due = module.iteration == 1 or module.iteration % self.every_n == 0
        if due and trainer.is_global_zero:
            self.show(module.last_trajectories, f"samples of iteration {module.iteration}")

    def show(self, trajectories: Sequence[Trajectory], title: str = "") -> None:
        """Print some of `trajectories` now."""
        from rich.box import ROUNDED
        from rich.table import Table
        from rich.text import Text

        out = console()
        table = Table(title=title or None, title_justify="left", box=ROUNDED, width=min(out.width, 140))
        table.add_column("prompt", ratio=1)
        table.add_column("completion", ratio=1)
        table.add_column("reward", justify="right")
        table.add_column("finish")
        limit = max(20, (min(out.width, 140) - OTHER_COLUMNS) // 2 * TEXT_LINES)
        for t in _spread(trajectories, self.rows):
            table.add_row(
                # The question is at the end of a prompt, behind the chat template's system message.
                Text(shortened(printable(t.prompt.text), limit, keep_end=0.9)),
                Text(shortened(printable(t.text), limit, keep_end=0.4)),
                f"{t.reward:.2f}" if t.reward is not None else "failed" if t.applicable else "none",
                t.completion.finish_reason,
            )
        out.print(table)


def _spread(trajectories: Sequence[Trajectory], rows: int) -> list[Trajectory]:
    count = min(rows, len(trajectories))
    return [trajectories[i * len(trajectories) // count] for i in range(count)]


def printable(text: str) -> str:
    r"""`text` with everything that a terminal would obey or hide written as an escape.

    >>> printable("a\n\x1b[31mb")
    'a\\n\\x1b[31mb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, limit: int, keep_end: float) -> str:
    """`text` in at most `limit` characters; of what is left, the share `keep_end` is its end.

    >>> shortened("0123456789", 7, keep_end=0.5)
    '012…789'
    """
    if len(text) <= limit:
        return text
    end = int((limit - 1) * keep_end)
    return f"{text[: limit - 1 - end]}…{text[len(text) - end :]}"
