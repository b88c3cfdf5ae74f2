"""Checkpoints that are written beside training, and signals."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightrft_lightning.checkpoints.background import Background

INTERRUPTED = """
import os, signal, threading, time
from lightrft_lightning.checkpoints.background import Background
run = threading.Thread._bootstrap_inner
def interrupted(self):
    os.kill(os.getpid(), signal.SIGINT)  # the main thread is in Thread.start()
    time.sleep(0.1)
    run(self)
threading.Thread._bootstrap_inner = interrupted
done, background = [], Background()
try:
    background.submit(lambda: done.append(1))
except KeyboardInterrupt:
    print("interrupted")
background.finish()
print(done, flush=True)
"""


def test_ctrl_c_while_a_thread_starts_loses_nothing_and_the_process_ends():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "interrupted\n[1]\n"), done.stderr


def test_work_is_done_in_order_and_after_a_failure_not_at_all(caplog):
    background, done = Background(), []

    def fails():
        raise OSError("full")

    for work in (lambda: done.append(1), lambda: done.append(2), fails, lambda: done.append(3)):
        background.submit(work)
    assert background.busy
    with pytest.raises(OSError, match="full"):
        background.finish()
    assert done == [1, 2] and not background.busy
    background.finish()
