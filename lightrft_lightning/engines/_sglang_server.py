"""SGLang's server, which ends with the trainer that started it: ``python _sglang_server.py --config sglang.yaml``.

A script, so that this package is not imported into SGLang's process.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

GRACE = 5.0
"""Seconds that SGLang has to end by itself."""


def _end_with_parent() -> None:
    """Standard input is a pipe that only the trainer holds open."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)  # the trainer made a group of SGLang's processes


if __name__ == "__main__":
    sys.path.pop(0)  # the script's folder, where another sglang.py is
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
