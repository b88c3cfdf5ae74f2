"""A server process that a trainer starts for itself, and that does not outlive it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from lightrft_lightning.engines._client import Unreachable
from lightrft_lightning.engines._wire import ANNOUNCEMENT, KEY_VARIABLE
from lightrft_lightning.engines.masking import Mask, open_private

log = logging.getLogger(__name__)

KEPT_LINES = 200
SHOWN_LINES = 10
LONGEST_LINE = 1 << 16
GRACE = 5.0
"""Seconds that the server has to end by itself."""
AT_ONCE = 1.0
"""Seconds after which it is told that it has to, and those that its processes have after it."""
OF_THE_LAUNCHER = ("RANK", "WORLD_SIZE", "GROUP_", "ROLE_", "LOCAL_", "NODE_RANK", "MASTER_", "TORCHELASTIC_")
"""Variables by which an engine would take itself for one of the training processes."""


class ServerProcess:
    """Runs a command that prints `ANNOUNCEMENT`; its output is read for as long as it lives.

    Args:
        command: program and arguments; it must end when its standard input is closed.
        key: goes to it as an environment variable, which other users cannot see.
        log_file: gets its output appended, without the key; others cannot read it. A file that cannot be written costs
            a warning.
    """

    def __init__(self, command: Sequence[str], key: str, log_file: Path | None) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._mask = Mask(key)
        self._announced = threading.Event()
        self._url = ""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_LAUNCHER)}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**inherited, KEY_VARIABLE: key, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is for the trainer, which then ends the server
        )
        self._reader = threading.Thread(target=self._drain, args=(log_file,), daemon=True, name="server's output")
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def url(self, deadline: float) -> str:
        """Where the server listens, once it does.

        Raises:
            Unreachable: it ended before, or says nothing for `deadline` seconds.
        """
        end = time.monotonic() + deadline
        while not self._announced.wait(0.05):
            if not self.alive():
                raise Unreachable(f"the server ended at its start with exit code {self.exit_code()}")
            if time.monotonic() > end:
                raise Unreachable(f"the server did not start within deadline={deadline:.3g} s")
        return self._url

    def alive(self, patience: float = 0.0) -> bool:
        """Whether it runs, also after so many seconds.

        One that has ended is waited for by `stop` only: until then its number, which is also that of the group of the
        processes that it has started, is not given to others.
        """
        if self._process.returncode is not None:
            return False
        end = time.monotonic() + patience
        while os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() >= end:
                return True
            time.sleep(0.02)
        return False

    def exit_code(self) -> int:
        """That of a server that has ended; below 0: the signal that ended it."""
        about = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        assert about is not None
        return about.si_status if about.si_code == os.CLD_EXITED else -about.si_status

    def last_lines(self) -> list[str]:
        """The end of its output; the very end if it has just died."""
        if not self.alive(0.2):
            self._reader.join(1.0)
        return list(self._lines)[-SHOWN_LINES:]

    def stop(self) -> None:
        """End it and the processes that it has started. Idempotent.

        It is told first, and alone: a server whose own processes end before it takes that for a fault. They have a
        moment after it, to clean up, also if it had to be killed.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._process.returncode is not None:  # its number may be another process's by now
            return
        if self.alive(AT_ONCE):
            self._process.send_signal(signal.SIGTERM)
            if self.alive(GRACE):
                self._process.kill()
        self._reader.join(AT_ONCE)  # until the last of them has closed the pipe
        self._kill_others()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _kill_others(self) -> None:
        """Kill what it has started, but Python's resource trackers: these then remove what was shared, and end."""
        end = time.monotonic() + AT_ONCE
        while (left := _running(self._process.pid)) and time.monotonic() < end:
            for pid, command in left.items():
                if b"resource_tracker" not in command:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _drain(self, log_file: Path | None) -> None:
        """A full pipe would stop the server, so nothing may stop this."""
        output = self._process.stdout
        assert output is not None
        with contextlib.ExitStack() as stack:
            file, begun = _opened(log_file, stack), ""
            for piece in self._mask.pieces(iter(lambda: output.readline(1 << 16), b"")):
                data = piece.encode(errors="surrogateescape")
                if file is not None and not _written(file, data):
                    file = None
                *lines, begun = (begun + data.decode(errors="replace"))[-LONGEST_LINE:].split("\n")
                for text in map(str.rstrip, lines):
                    self._note(text)
            if begun:
                self._note(begun)

    def _note(self, text: str) -> None:
        self._lines.append(text)
        if text.startswith(ANNOUNCEMENT):
            self._url = text.removeprefix(ANNOUNCEMENT)
            self._announced.set()


def _running(group: int) -> dict[int, bytes]:
    """Numbers and commands of the processes of a group that run; none where there is no /proc."""
    found = {}
    for about in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, its_group = about.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found[int(about.parent.name)] = about.with_name("cmdline").read_bytes()
    return found


def _opened(path: Path | None, stack: contextlib.ExitStack) -> BinaryIO | None:
    if path is None:
        return None
    try:
        return stack.enter_context(open(path, "ab", buffering=0, opener=open_private))
    except OSError as err:
        log.warning("log_file=%s cannot be opened (%s): the server's output is not kept", path, err.strerror)
        return None


def _written(file: BinaryIO, line: bytes) -> bool:
    try:
        file.write(line)
    except OSError as err:
        log.warning(
            "log_file=%s cannot be written (%s): no more of the server's output is kept", file.name, err.strerror
        )
        return False
    return True
