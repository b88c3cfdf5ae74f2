"""A process beside a rank that is alone on its machine: it ends the rank when this has been stopped for too long.

A rank that is stopped (``kill -STOP``) cannot say so, and to other machines it looks like one that computes: its kernel
answers. Here its state can be seen. The end of its connections tells the other ranks.

Run as a script, ``lone.py PID SECONDS NAME``, it ends with the process of that number.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

LOOK = 1.0
"""Seconds between two looks."""


def end_when_stopped(seconds: float, name: str) -> None:
    """Have this process killed once it has been stopped for `seconds`.

    Args:
        seconds: how long it may be stopped.
        name: of this process, for messages.
    """
    # In a session of its own: what stops a terminal's processes shall not stop it as well.
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(seconds), name]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


def main() -> None:
    """Look at the process until it ends, or has to be ended."""
    pid, seconds, name = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    process, parent = os.pidfd_open(pid), os.getppid()
    if parent != pid:  # it had ended before
        return
    stopped_since, last = None, time.monotonic()
    while not select.select([process], [], [], LOOK)[0]:
        now = time.monotonic()
        stood_still, last = now - last > 5 * LOOK, now  # with the whole machine, it may be
        if not _is_stopped(pid) or stood_still:
            stopped_since = None
        elif stopped_since is None:
            stopped_since = now
        elif now - stopped_since >= seconds:
            with contextlib.suppress(OSError):
                print(f"[{name}] has been stopped for {seconds:.0f} s: killed", file=sys.stderr, flush=True)
            signal.pidfd_send_signal(process, signal.SIGKILL)
            return


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


if __name__ == "__main__":
    main()
