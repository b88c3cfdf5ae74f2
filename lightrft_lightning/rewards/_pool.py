"""Reward functions in processes: an endless loop or a crash costs one process and one sample, not the trainer."""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from lightrft_lightning._find import FILE_MODULES
from lightrft_lightning.rewards._calls import Outcome, guarded, run_in_threads, timed_out

START_LIMIT = 120.0
"""Seconds that a process may take to start; what the function imports counts."""


class ProcessPool:
    """Calls one function in up to `processes` processes, started when they are needed and kept.

    The processes are new interpreters, not forks, because a trainer has threads. They end with this process, whatever
    they are doing.

    Args:
        name: of the reward, for messages.
        function: called with keywords.
        processes: how many calls at a time.

    Raises:
        ValueError: `processes` is less than 1, or `function` cannot be sent to another process.
    """

    def __init__(self, name: str, function: Callable[..., Any], processes: int) -> None:
        if not isinstance(processes, int) or processes < 1:
            raise ValueError(f"reward {name!r}: processes={processes!r} must be a whole number, at least 1")
        self._arguments = (name, function, processes)
        self.processes = processes
        self._greeting = _greeting(name, function)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        weakref.finalize(self, _kill_all, self._idle)

    def __reduce__(self) -> Any:
        return ProcessPool, self._arguments

    def run(self, calls: Sequence[tuple[Mapping[str, Any], int | None]], deadline: float) -> list[Outcome]:
        """Call the function once for each of `calls`: its keywords and, if they are lists, the number of samples.

        A process that crashes or takes longer than `deadline` seconds is killed and replaced.

        Returns:
            One outcome a call, in order; the value is a list with an outcome for each sample.
        """
        jobs = [partial(self._call, call, deadline) for call in calls]
        outcomes = run_in_threads(jobs, self.processes, deadline + START_LIMIT)
        return [outcome if outcome.failure else outcome.value for outcome in outcomes]

    def _call(self, call: tuple[Mapping[str, Any], int | None], deadline: float) -> Outcome:
        request = guarded(lambda: pickle.dumps(call))
        if request.failure:
            return Outcome(failure="failed", reason=f"its data cannot be sent to a process: {request.reason}")
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker(self._greeting)
        try:
            answer = worker.ask(request.value, deadline)
        except BaseException:
            worker.kill()
            raise
        if isinstance(answer, Outcome):
            worker.kill()
            return answer
        self._idle.put(worker)
        outcomes = [Outcome(*one) for one in json.loads(answer)]
        return outcomes[0] if len(outcomes) == 1 and outcomes[0].failure else Outcome(outcomes)


class _Worker:
    def __init__(self, greeting: bytes) -> None:
        self._connection, theirs = Pipe()
        self._process = _start(theirs)
        self._ready = False
        self._greeting = greeting

    def ask(self, request: bytes, deadline: float) -> bytes | Outcome:
        """The answer, or why there is none; then the process is of no use any more."""
        try:
            if not self._ready:
                self._connection.send_bytes(self._greeting)
                if not self._connection.poll(START_LIMIT):
                    return Outcome(failure="failed", reason=f"its process did not start within {START_LIMIT:g} s")
                self._connection.recv_bytes()
                self._ready = True
            self._connection.send_bytes(request)
            if not self._connection.poll(deadline):
                return timed_out(deadline)
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            code = self._process.wait(timeout=10)
            end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return Outcome(
                failure="failed", reason=f"its process ended {'' if self._ready else 'at its start '}({end})"
            )

    def kill(self) -> None:
        """End the process and what it has started."""
        self._connection.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _start(theirs: Connection) -> subprocess.Popen[bytes]:
    script = str(Path(__file__).with_name("_pool_process.py"))
    with theirs:
        return subprocess.Popen(
            [sys.executable, script, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the trainer
        )


def _kill_all(idle: queue.SimpleQueue[_Worker]) -> None:
    try:
        while True:
            idle.get_nowait().kill()
    except queue.Empty:
        return


def _greeting(name: str, function: Callable[..., Any]) -> bytes:
    """All that a process needs to find the function."""
    fix = "Define it at the top level of a file of its own and give the reward as 'path/to/file.py:function'"
    try:
        pickled = pickle.dumps(function)
    except Exception as err:  # PicklingError, TypeError, AttributeError, or the object's own
        raise ValueError(f"the reward {name!r} cannot be sent to another process: {err}. {fix}") from err
    if b"__main__" in pickled:  # another process would have to run the whole script to find it
        raise ValueError(f"the reward {name!r} is defined in the script that is run, so no other process has it. {fix}")
    files = {
        module: str(getattr(sys.modules[module], "__file__", ""))
        for module in list(sys.modules)
        if module.startswith(FILE_MODULES) and module.encode() in pickled
    }
    return pickle.dumps((sys.path, files, pickled))
