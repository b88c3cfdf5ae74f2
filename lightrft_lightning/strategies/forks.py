"""Signals in forks of a training process.

Lightning's handler of SIGTERM makes a note and goes on. A fork inherits it, so what a reward function or a data loader
forks could not be ended: `multiprocessing.Pool` waits for its workers for ever, and where Lightning has started other
ranks, such a worker would pass its signal on to them.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from typing import Any

_OURS = ("lightning.", "pytorch_lightning.", "lightrft_lightning.")
_masks = threading.local()


def reset_signals() -> None:
    """Give each signal that the trainer handles back to whom it belonged before, or to the system."""
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if _is_ours(handler):
            with suppress(OSError, ValueError):
                signal.signal(number, _before(handler))


def _before(handler: Any) -> Any:
    """Lightning composes its own handlers with the one that it found."""
    found = [h for h in getattr(handler, "signal_handlers", ()) if callable(h) and not _is_ours(h)]
    return found[0] if found else signal.SIG_DFL


def _is_ours(handler: Any) -> bool:
    if isinstance(handler, signal.Handlers) or not callable(handler):
        return False
    module = getattr(handler, "__module__", None) or type(handler).__module__
    return f"{module}.".startswith(_OURS)


def _hold_back() -> None:
    """A signal that comes before the handlers are reset waits, or it would be taken for one of the trainer's."""
    ours = {number for number in signal.valid_signals() if _is_ours(signal.getsignal(number))}
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, ours)


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _begin() -> None:
    reset_signals()
    _let_through()


os.register_at_fork(before=_hold_back, after_in_parent=_let_through, after_in_child=_begin)
