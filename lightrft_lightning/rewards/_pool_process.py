"""What a worker process of `_pool` does: call a reward function with the keywords that come over a socket.

`keeper` runs it. It imports nothing of this package but two neighbours, so it starts without torch; what the function
imports is its own affair.
"""

import fcntl
import importlib.util
import json
import os
import pickle
import signal
import socket
import sys
from typing import Any

from _calls import Outcome, checked_value, checked_values, finished, guarded
from channel import Channel

HIGH = 800
"""The channel's descriptor is none of the small numbers that a function may take for its own."""


def main(descriptor: int) -> None:
    """Answer requests ``(keywords, size)`` until the trainer closes the channel; `size` is None for a single sample."""
    os.dup2(2, 1)  # what a function prints
    channel = Channel(socket.socket(fileno=_moved(descriptor)))
    os.register_at_fork(after_in_child=channel.close)  # a child that lives on is no one to answer
    try:
        mark, greeting = channel.receive()
        loaded = guarded(lambda: _function(*pickle.loads(greeting)))
        channel.send(mark, loaded.reason.encode())
        while loaded.failure is None:
            mark, request = channel.receive()
            answer = guarded(lambda request=request: _answer(loaded.value, request))
            signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that the function has forgotten is not for the next one
            outcomes = [answer] if answer.failure else answer.value
            channel.send(mark, json.dumps([[o.value, o.failure, o.reason] for o in outcomes]).encode())
    except (EOFError, OSError):
        os._exit(0)  # the trainer has gone, or a function has closed what is not its own


def _moved(descriptor: int) -> int:
    try:
        moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, HIGH)
    except OSError:  # beyond the limit of open files
        return descriptor
    os.close(descriptor)
    return moved


def _function(path: list[str], files: dict[str, str], pickled: bytes) -> Any:
    """The function, found as it was in the trainer."""
    sys.path[:] = path
    for name in ("_calls", "channel", "_pool_process"):  # the function may import others of these names
        del sys.modules[name]
    vars(sys.modules["__main__"]).pop("__file__")  # or processes that `multiprocessing` spawns would run it again
    for name, file in files.items():
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return pickle.loads(pickled)


def _answer(function: Any, request: bytes) -> list[Outcome]:
    keywords, size = pickle.loads(request)
    result = finished(function(**keywords))
    return [checked_value(result)] if size is None else checked_values(result, size)
