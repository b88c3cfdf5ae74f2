"""Who writes in a folder of checkpoints: names that say so, and what other processes may do with them.

A process on the same machine is alive if its number and start time are those of a running one. Of another machine's
nothing can be asked over a shared file system, so what it left counts as abandoned once it is a day old. Locks are
`flock` on folders; where a file system has none, work goes on without.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

TEMPORARY = ".lightrft-tmp"
ABANDONED = 24 * 3600.0
"""Age in seconds from which on what another machine has left is nobody's."""
_PATIENCE = 60.0
"""Seconds to wait for another process that is renaming in the same folder."""
_OWNER = r"(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{4}"
_NAME = re.compile(rf"\.(?P<what>.+)\.{_OWNER}{re.escape(TEMPORARY)}", re.DOTALL)
_in_use: set[Path] = set()


def temporary_name(what: str) -> str:
    """A name for something unfinished of this process that becomes `what`."""
    pid = os.getpid()
    return f".{what}.{_machine():08x}-{pid}-{_start_of(pid) or 0}-{secrets.token_hex(2)}{TEMPORARY}"


@contextlib.contextmanager
def in_use(path: Path) -> Iterator[None]:
    """`path`, which has a `temporary_name`, is not removed inside."""
    _in_use.add(path)
    try:
        yield
    finally:
        _in_use.discard(path)


def keep(path: Path, wanted: bool = True) -> None:
    """Begin or end what `in_use` is inside."""
    (_in_use.add if wanted else _in_use.discard)(path)


def others(folder: Path, what: str) -> list[str]:
    """The processes, other than this one, that are alive and have something called `what` there."""
    found = []
    for path in folder.glob(f".{what}.*{TEMPORARY}"):
        match = _NAME.fullmatch(path.name)
        if match is not None and match["what"] == what and int(match["pid"]) != os.getpid() and _is_alive(match, path):
            here = int(match["machine"], 16) == _machine()
            found.append(f"process {match['pid']} on {'this' if here else 'another'} machine")
    return found


def abandoned(folder: Path) -> list[Path]:
    """What processes that are gone have left unfinished; nothing but what has a `temporary_name`."""
    found = []
    for path in folder.glob(f".*{TEMPORARY}"):
        match = _NAME.fullmatch(path.name)
        if match is not None and not _is_alive(match, path):
            found.append(path)
    return found


def _is_alive(match: re.Match[str], path: Path) -> bool:
    if int(match["machine"], 16) != _machine():
        with contextlib.suppress(FileNotFoundError):
            return time.time() - path.stat().st_mtime < ABANDONED
        return False
    pid = int(match["pid"])
    if pid == os.getpid():
        return path in _in_use
    if sys.platform == "linux":
        return _start_of(pid) == int(match["start"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@cache
def _machine() -> int:
    """This machine, or this container."""
    try:
        names = os.readlink("/proc/self/ns/pid")
    except OSError:
        names = ""
    return zlib.crc32(f"{socket.gethostname()} {names}".encode())


def _start_of(pid: int) -> int | None:
    """When a process of this machine was started, in ticks of the kernel; None: there is none, or nobody knows."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


# -------------------------------------------------------------------- locks


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other process is inside for the same folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _wait_for(handle, folder)
        yield
    finally:
        os.close(handle)


def _wait_for(handle: int, folder: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                told = "another process has been renaming checkpoints in %s for %g s: not waiting for it any longer"
                log.warning(told, folder, _PATIENCE)
                return
            time.sleep(0.01)
        except OSError:  # a file system without locks
            return


def share(handle: int) -> None:
    """Keep the opened folder from `remove_when_free` until `handle` is closed."""
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_SH)


def remove_when_free(path: Path) -> None:
    """Remove a file or folder, if it is there and nobody reads it; somebody's next save removes what stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # it is being read
            return
        except OSError as err:  # a file system without locks
            log.debug("no lock on %s: %s", path, err)
        shutil.rmtree(path, onerror=_unless_gone)
    finally:
        os.close(handle)


def _unless_gone(function: Callable[..., Any], path: str, error: Any) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


# -------------------------------------------------------------------- renaming


def exchange(one: Path, other: Path) -> bool:
    """Let two existing paths change names at once; False where system or file system cannot.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    function = _renameat2()
    if function is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if function(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(other))


@cache
def _renameat2() -> Any:
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function
