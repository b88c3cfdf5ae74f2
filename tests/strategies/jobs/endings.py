"""Processes that hang when they should end, in all ways; see test_ending.py. Forks, as importing takes longest."""

from __future__ import annotations

import atexit
import json
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from lightrft_lightning.strategies import ending

ending.EXIT_GRACE, LIMIT = 0.3, timedelta(seconds=0.6)


def hangs(sleep=time.sleep):
    sleep(60)


class Lasting:
    def __del__(self, hangs=hangs):
        hangs()


def thread():
    threading.Thread(target=hangs, name="loader").start()


def worker_of_a_pool():
    ThreadPoolExecutor(1, "pool").submit(hangs)


def handler():
    atexit.register(hangs)


def destructor():
    globals()["kept"] = Lasting()
    atexit._clear()  # what torch does there may take longer than the limit


def error():
    thread()
    raise ValueError("boom")


def preempted():
    ending.end_with(143)
    thread()


def nothing():
    ending.EXIT_GRACE = 60
    if os.fork() == 0:  # not the process that has asked for the deadline
        time.sleep(1)


WAYS = (thread, worker_of_a_pool, handler, destructor, error, preempted, nothing)


def main() -> None:
    files, running = {way.__name__: tempfile.TemporaryFile("w+") for way in WAYS}, {}  # noqa: SIM115
    for way in WAYS:
        if (pid := os.fork()) == 0:
            for number in (1, 2):
                os.dup2(files[way.__name__].fileno(), number)
            ending.end_within(LIMIT, "rank 3: node7")
            print("printed")
            way()
            return  # the interpreter ends as after any script
        running[pid] = way.__name__
    said = {}
    for pid, name in running.items():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        files[name].seek(0)
        said[name] = code, files[name].read()
    print(json.dumps(said))


if __name__ == "__main__":
    sys.exit(main())
