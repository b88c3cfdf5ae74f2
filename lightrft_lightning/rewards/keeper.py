"""The process between the trainer and one worker of `_pool`: when either ends, it ends the worker and all its children.

Run as a script, ``keeper.py ANSWERS LIFELINE TRAINER``: the descriptor of the worker's channel, one that is closed at
the other end when the worker shall end, and the trainer's process id. It exits as the worker does.

On Linux the children that outlive their parents become its own, so it finds all of them, also those that have left
their process group (``PR_SET_CHILD_SUBREAPER``, https://man7.org/linux/man-pages/man2/prctl.2.html). Elsewhere it ends
the worker's process group.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LOOK = 0.5
"""Seconds between two looks for the trainer; its end closes the lifeline unless a fork of it has a copy."""
PATIENCE = 5.0
"""Seconds that are spent on ending what is left."""


def main() -> None:
    """Start the worker, wait for its end or the trainer's, and leave nothing behind."""
    answers, lifeline, trainer = map(int, sys.argv[1:4])
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        os.close(lifeline)
        os.setsid()  # a function that signals its process group means its own processes
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == keeper:
            import _pool_process

            _pool_process.main(answers)
        sys.exit()
    os.close(answers)
    status = _wait(worker, lifeline, trainer)
    ended = _end_all(worker)
    _exit_like(ended if status is None else status)


def _wait(worker: int, lifeline: int, trainer: int) -> int | None:
    """The worker's status; None: it lives, but shall not."""
    news, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        while (ended := _reap()) is not None:
            if ended[0] == worker:
                return ended[1]
        ready, _, _ = select.select([lifeline, news], [], [], LOOK)
        if lifeline in ready or os.getppid() != trainer:
            return None
        if news in ready:
            os.read(news, 4096)


def _end_all(worker: int) -> int:
    """Kill whatever has come from the worker; returns the worker's status."""
    status, end = 0, time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker, signal.SIGKILL)
        for pid in _descendants():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while (ended := _reap(or_raise=True)) is not None:
                status = ended[1] if ended[0] == worker else status
        except ChildProcessError:
            break
        time.sleep(0.002)
    return status


def _reap(or_raise: bool = False) -> tuple[int, int] | None:
    """Process and status of a child that has ended; None: no other one has."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        if or_raise:
            raise
        return None
    return (pid, status) if pid else None


def _descendants() -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(entry.name)] = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _exit_like(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(max(code, 0))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
