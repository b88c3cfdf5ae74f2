"""What the main thread is doing, as another thread sees it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_COLLECTIVES = re.compile(r"[/\\](torch[/\\]distributed[/\\](?!checkpoint)|deepspeed[/\\])")
_NOT_THE_USERS = (
    *(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")),
    os.path.dirname(os.path.dirname(torch.__file__)),  # an environment may build on another one
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    "<frozen",
)
_TRAINER = os.path.join("pytorch", "trainer", "")
_RUN, _TEARDOWN = "_call_and_handle_interrupt", ("_call_teardown_hook", "_teardown")
"""Lightning's functions around a whole run, with what follows on an error, and around its end."""


class Sample(NamedTuple):
    """The main thread at one moment; times in seconds."""

    where: str
    """Its place in the program."""
    waiting: bool
    """In a collective."""
    still: float
    """Since it has been at this place."""
    ending: float
    """Since a `Trainer` has begun to tear down; 0: it does not."""
    running: bool
    """Inside of a `Trainer`'s run."""


class Stack:
    """Where the main thread is, and since when it has not moved."""

    def __init__(self) -> None:
        self._last: Any = None
        self._since = 0.0
        self._ending_since: float | None = None
        self._raised_in = ""

    def came_from(self, exception: BaseException) -> None:
        """The main thread has left its place with `exception`, which is what matters from now on."""
        self._raised_in = place([frame for frame, _ in traceback.walk_tb(exception.__traceback__)][::-1])

    def sample(self) -> Sample:
        """What it is doing now."""
        now, frames = time.monotonic(), _main_frames()
        # The next step may come to the same place, with frames in the same memory: collectives tell it apart.
        position = _collectives_begun(), [(id(frame), frame.f_lasti) for frame in frames]
        if position != self._last:
            self._last, self._since = position, now
        trainers = {frame.f_code.co_name for frame in frames if _TRAINER in frame.f_code.co_filename}
        self._ending_since = (self._ending_since or now) if trainers.intersection(_TEARDOWN) else None
        waiting = any(_COLLECTIVES.search(frame.f_code.co_filename) for frame in frames[:4])
        ending = 0.0 if self._ending_since is None else now - self._ending_since
        return Sample(self._raised_in or place(frames), waiting, now - self._since, ending, _RUN in trainers)


def is_handled(mark: str) -> bool:
    """Whether the main thread is in an `except` or `finally` block for an exception that has the attribute `mark`."""
    error: Any = sys._current_exceptions().get(threading.main_thread().ident or 0)
    error, seen = error[1] if isinstance(error, tuple) else error, set[int]()  # a tuple until Python 3.11
    while isinstance(error, BaseException) and id(error) not in seen:
        if hasattr(error, mark):
            return True
        seen.add(id(error))
        error = error.__context__
    return False


def where_it_is() -> str:
    """The place of the main thread in the program."""
    return place(_main_frames())


def _main_frames() -> list[FrameType]:
    return list(frames_of(sys._current_frames().get(threading.main_thread().ident or 0)))


def _collectives_begun() -> int:
    """By this process, in all its groups."""
    total = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):  # a back end that does not count
            total += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return total


def frames_of(frame: FrameType | None) -> Iterator[FrameType]:
    """From the innermost outwards."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def place(frames: list[FrameType]) -> str:
    """The innermost line of the user's own code, and the function in which it has ended up."""
    users = [f for f in frames if not f.f_code.co_filename.startswith(_NOT_THE_USERS)] or frames
    if not users:
        return "the end of its program"
    line = f"{os.path.basename(users[0].f_code.co_filename)}:{users[0].f_lineno} ({users[0].f_code.co_name})"
    return line if users[0] is frames[0] else f"{line} > {frames[0].f_code.co_name}"
