"""Work that goes on beside training, one thing after another; what fails is told at the next opportunity."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

log = logging.getLogger(__name__)


class Background:
    """Threads of which one works at a time. The end of the process waits for them.

    A thread has nothing to wait for but its turn. So a signal may come at any moment, also while one is being started:
    it does its work, or `finish` does it.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._pending: list[Future[Any]] = []

    def submit(self, work: Callable[[], Any]) -> None:
        """Run `work` after what was submitted before, unless that has failed."""
        before = self._pending[-1] if self._pending else None
        future: Future[Any] = Future()
        future.add_done_callback(_tell)

        def run() -> None:
            try:
                if before is None or before.exception() is None:
                    work()
                future.set_result(None)
            except BaseException as err:
                future.set_exception(err)

        self._pending.append(future)
        self._waiting.append(run)
        threading.Thread(target=self._work, name="checkpoints").start()

    def _work(self) -> None:
        with self._turn:
            while self._waiting:
                self._waiting.popleft()()

    @property
    def busy(self) -> bool:
        """Whether anything is under way or has not been told about."""
        return bool(self._pending)

    def finish(self) -> None:
        """Wait for all of it, and raise the first error."""
        self._work()
        pending, self._pending = self._pending, []
        errors = [future.exception() for future in pending]
        if (first := next((error for error in errors if error is not None), None)) is not None:
            raise first


def _tell(future: Future[Any]) -> None:
    if (error := future.exception()) is not None:
        log.error("writing a checkpoint in the background failed: %s", error)
