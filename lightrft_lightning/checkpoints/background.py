"""Work that goes on beside training, one thing after another; what fails is told at the next opportunity."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

log = logging.getLogger(__name__)


class Background:
    """One thread. The end of the process waits for it."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._pending: list[Future[Any]] = []

    def submit(self, work: Callable[[], Any]) -> None:
        """Run `work` after what was submitted before, unless that has failed."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        before = self._pending[-1] if self._pending else None

        def run() -> None:
            if before is None or before.exception() is None:
                work()

        future = self._executor.submit(run)
        future.add_done_callback(_tell)
        self._pending.append(future)

    @property
    def busy(self) -> bool:
        """Whether anything is under way or has not been told about."""
        return bool(self._pending)

    def finish(self) -> None:
        """Wait for all of it, and raise the first error."""
        pending, self._pending = self._pending, []
        errors = [future.exception() for future in pending]
        if (first := next((error for error in errors if error is not None), None)) is not None:
            raise first


def _tell(future: Future[Any]) -> None:
    if (error := future.exception()) is not None:
        log.error("writing a checkpoint in the background failed: %s", error)
