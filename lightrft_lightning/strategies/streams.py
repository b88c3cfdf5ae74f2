"""Standard output and error that end or fill up do not end a run."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any

_GUARDED = "lightrft_guarded"


def keep_printing() -> None:
    """From here on, nobody gets an error for printing to a pipe that is closed or to a disk that is full.

    Whoever prints: callbacks, loggers, warnings, the user's own functions, the interpreter at its end.
    """
    _fill_what_is_closed()
    for stream, other in ((sys.stdout, sys.stderr), (sys.stderr, sys.stdout)):
        if isinstance(stream, io.TextIOWrapper) and not hasattr(stream, _GUARDED):
            setattr(stream, _GUARDED, True)
            # On the stream itself, as handlers of loggers hold it. The interpreter looks there too when it ends.
            for name in ("write", "writelines", "flush"):
                setattr(stream, name, _guarded(getattr(stream, name), stream, other))


def _fill_what_is_closed() -> None:
    """Otherwise a file that is opened next, say of a checkpoint, is what libraries in C print to."""
    for number in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _guarded(method: Callable[..., Any], stream: io.TextIOWrapper, other: Any) -> Callable[..., Any]:
    def guarded(*args: Any) -> Any:
        try:
            return method(*args)
        except OSError as err:
            _give_up(err, stream, other)
            return len(args[0]) if args and isinstance(args[0], str) else None

    return guarded


def _give_up(err: OSError, stream: io.TextIOWrapper, other: Any) -> None:
    if err.errno != errno.ENOSPC:  # there may be room again
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
    if getattr(stream, _GUARDED) is True:
        setattr(stream, _GUARDED, "told")
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(f"{stream.name} cannot be written to ({err}): the run goes on without it", file=other, flush=True)
