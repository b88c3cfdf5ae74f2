"""A deadline for the end of a process, so that one that does not end keeps no job, and no machine, for ever.

When a program is over the interpreter waits for its threads, then calls what is registered with `atexit`, then
destroys what is left. Each of these may hang: a loader's thread, a logger that uploads, a library that waits for ranks
that have gone.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  # it waits for its workers, after what is registered later
import contextlib
import faulthandler
import os
import socket
import sys
import threading
from datetime import timedelta
from typing import NoReturn

from lightrft_lightning.strategies.stacks import frames_of, place, where_it_is

DEFAULT_TIMEOUT = timedelta(minutes=30)

EXIT_GRACE = 60.0
"""Seconds that the interpreter has to end after an error; after a success, those until it is told that it does not."""

_FLUSH = 2.0
"""Seconds for what has been printed to go out."""


class _End:
    """What is known about the end of this process."""

    seconds = DEFAULT_TIMEOUT.total_seconds()
    name = ""
    code = 1
    failed = False
    owner = 0
    """The process that has asked for the deadline; its forks end as they like."""


def end_within(timeout: timedelta | None = None, name: str = "") -> None:
    """From when the interpreter begins to end it has `timeout`, after an error only `EXIT_GRACE`; then it is ended.

    Args:
        timeout: counts as `EXIT_GRACE` if it is shorter; default: as before, at first 30 minutes.
        name: of this process, for messages.
    """
    if timeout is not None:
        _End.seconds = min(timeout.total_seconds(), 1e6)  # the platform's clocks have limits
    _End.name = name or _End.name or this_process()
    _End.failed = False
    if _End.owner != os.getpid():
        _End.owner = os.getpid()
        threading._register_atexit(_begin)  # type: ignore[attr-defined]  # `atexit` comes after waiting for threads


def this_process() -> str:
    """Its machine and number, for messages."""
    return f"{socket.gethostname()}, pid {os.getpid()}"


def end_with(code: int) -> None:
    """Let this be the exit code if the process has to be ended; 1 by default."""
    _End.code = code


def has_failed() -> None:
    """From here on the process has to end within `EXIT_GRACE`, unless `end_within` is called again."""
    _End.failed = True


def leave(code: int) -> NoReturn:
    """End this process at once; what it has printed goes out first."""
    out = threading.Thread(target=_flush, daemon=True)
    with contextlib.suppress(RuntimeError):  # too late for a thread
        out.start()
        out.join(_FLUSH)
    os._exit(code)


def say(line: str) -> None:
    """Print to standard error, if somebody is there to read it."""
    # Not sys.stderr: while torch's own hook prints a traceback, that is a buffer, lost if the process is killed.
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.__stderr__, flush=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _begin() -> None:
    if _End.owner != os.getpid():
        return
    _End.owner = 0  # once
    failed = _End.failed or hasattr(sys, "last_value")  # which the interpreter sets when it prints an error
    limit = EXIT_GRACE if failed else max(EXIT_GRACE, _End.seconds)  # large libraries take their time, too
    threading.Thread(target=_wait, args=(limit, failed), name="lightrft-end", daemon=True).start()
    # Destructors run when threads do not any more. This is a thread in C, which shows where the process hangs.
    faulthandler.dump_traceback_later(limit + _FLUSH + 1, exit=True, file=2)


def _wait(limit: float, failed: bool) -> None:
    first = min(EXIT_GRACE, limit)
    over = threading.Event()
    over.wait(first)
    if limit > first:
        say(f"[{_End.name}] has not ended for {first:.0f} s: {_held_up_by()}; in {limit - first:.0f} s it is ended")
        over.wait(limit - first)
    after = "after its error" if failed else "after its end"
    say(f"[{_End.name}] has not ended for {limit:.0f} s {after}: {_held_up_by()}; leaving at once")
    leave(_End.code)


def _held_up_by() -> str:
    frames = sys._current_frames()
    threads = [t for t in threading.enumerate() if t.is_alive() and not t.daemon and t is not threading.main_thread()]
    where = where_it_is()
    if not threads:
        return f"it is in {where}"
    held = ", ".join(f"{t.name!r} in {place(list(frames_of(frames.get(t.ident or 0))))}" for t in threads[:3])
    return f"it waits for the thread {held}"
