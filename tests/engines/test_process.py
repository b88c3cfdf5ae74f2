"""How a server that a trainer has started ends, with all that it has started itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightrft_lightning.engines import _process

HANGS = f"""
import os, signal, time
from multiprocessing.shared_memory import SharedMemory

memory = SharedMemory(create=True, size=16)
child = os.fork()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if child:
    print({_process.ANNOUNCEMENT!r} + memory.name, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no /dev/shm")
def test_what_a_hanging_server_and_its_processes_shared_goes_with_them(monkeypatch):
    monkeypatch.setattr(_process, "GRACE", 0.1)
    server = _process.ServerProcess([sys.executable, "-c", HANGS], "key", None)
    memory = Path("/dev/shm", server.url(30))
    assert memory.exists() and len(_process._running(server.pid)) == 3, "and Python's own, which removes it"
    server.stop()
    assert not memory.exists() and not _process._running(server.pid)
