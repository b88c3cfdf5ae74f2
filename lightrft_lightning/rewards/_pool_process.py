"""A worker process of `_pool`: calls a reward function with the keywords that come over a socket.

Run as a script. It imports nothing of this package but its neighbour `_calls`, so it starts without torch; what the
function imports is its own affair.
"""

import asyncio
import fcntl
import importlib.util
import inspect
import json
import os
import pickle
import sys
from multiprocessing.connection import Connection
from typing import Any

from _calls import Outcome, checked_value, checked_values, guarded


def main() -> None:
    """Answer requests ``(keywords, size)`` until the parent closes the socket; `size` is None for a single sample."""
    connection = Connection(int(sys.argv[1]))
    os.dup2(2, 1)  # what a function prints
    path, files, function = pickle.loads(connection.recv_bytes())
    sys.path[:] = path
    for name, file in files.items():
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    function = pickle.loads(function)
    connection.send_bytes(b"ready")
    while True:
        request = connection.recv_bytes()
        _die_with_parent(connection, True)
        answer = guarded(lambda request=request: _answer(function, request))
        _die_with_parent(connection, False)
        outcomes = [answer] if answer.failure else answer.value
        connection.send_bytes(json.dumps([[o.value, o.failure, o.reason] for o in outcomes]).encode())


def _answer(function: Any, request: bytes) -> list[Outcome]:
    keywords, size = pickle.loads(request)
    result = function(**keywords)
    if inspect.isawaitable(result):
        result = asyncio.run(_wait_for(result))
    return [checked_value(result)] if size is None else checked_values(result, size)


async def _wait_for(result: Any) -> Any:
    return await result


def _die_with_parent(connection: Connection, on: bool) -> None:
    """Let the kernel end this process when the parent's end of the socket closes, whatever runs here by then.

    The default action of SIGIO does that, also while a call holds the interpreter lock.
    """
    descriptor = connection.fileno()
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC if on else flags & ~os.O_ASYNC)
    if on and connection.poll(0):  # closed before
        sys.exit()


if __name__ == "__main__":
    try:
        main()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit()
