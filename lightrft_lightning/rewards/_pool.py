"""Reward functions in processes: an endless loop or a crash costs one process and one sample, not the trainer."""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lightrft_lightning._find import FILE_MODULES
from lightrft_lightning.rewards._calls import Outcome, guarded, run_in_threads, timed_out
from lightrft_lightning.rewards.channel import BrokenChannelError, Channel

START_LIMIT = 120.0
"""Seconds that a process may take to start; what the function imports counts."""
END_LIMIT = 10.0
"""Seconds that a process, with all that it has started, may take to end."""


class ProcessPool:
    """Calls one function in up to `processes` processes, started when they are needed and kept.

    The processes are new interpreters, not forks, because a trainer has threads. They end with this process, whatever
    they are doing, and with them all that they have started: see `keeper`.

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
        self._unable: Outcome | None = None
        """Why the processes do not start, while that is of use."""
        weakref.finalize(self, _kill_all, self._idle)

    def __reduce__(self) -> Any:
        return ProcessPool, self._arguments

    def run(self, calls: Sequence[tuple[Mapping[str, Any], int | None]], deadline: float) -> list[Outcome]:
        """Call the function once for each of `calls`: its keywords and, if they are lists, the number of samples.

        A process that crashes or takes longer than `deadline` seconds is ended, with all that it has started, and
        replaced.

        Returns:
            One outcome a call, in order; the value is a list with an outcome for each sample.
        """
        self._unable = None
        jobs = [partial(self._call, call, deadline) for call in calls]
        outcomes = run_in_threads(jobs, self.processes, deadline + START_LIMIT + END_LIMIT)
        return [outcome if outcome.failure else outcome.value for outcome in outcomes]

    def _call(self, call: tuple[Mapping[str, Any], int | None], deadline: float) -> Outcome:
        request = guarded(lambda: pickle.dumps(call))
        if request.failure:
            return Outcome(failure="failed", reason=f"its data cannot be sent to a process: {request.reason}")
        if self._unable is not None:
            return self._unable
        worker = self._worker()
        try:
            problem = worker.start()
            if problem is not None:
                self._unable = problem  # the others need not wait for the same
                return problem
            answer = worker.ask(request.value, deadline, call[1])
        except BaseException:
            worker.kill()
            raise
        if isinstance(answer, Outcome):
            worker.kill()
            return answer
        self._idle.put(worker)
        return answer[0] if len(answer) == 1 and answer[0].failure else Outcome(answer)

    def _worker(self) -> _Worker:
        try:
            while True:
                worker = self._idle.get_nowait()
                if worker.is_usable():
                    return worker
                worker.kill()
        except queue.Empty:
            return _Worker(self._greeting)


class _Worker:
    """A process with its keeper, and this end of the channel to it."""

    alive: ClassVar[weakref.WeakSet[_Worker]] = weakref.WeakSet()

    def __init__(self, greeting: bytes) -> None:
        ours, theirs = socket.socketpair()
        self._lifeline, kept = socket.socketpair()
        self._channel = Channel(ours)
        self._owner = os.getpid()
        self._ready = False
        self._greeting = greeting
        self.alive.add(self)
        with theirs, kept:
            self._process = _start(theirs.fileno(), kept.fileno())

    def start(self) -> Outcome | None:
        """Wait until the function is there, at the first call; returns why it is not."""
        if self._ready:
            return None
        end = time.monotonic() + START_LIMIT
        try:
            mark = Channel.new_mark()
            self._channel.send(mark, self._greeting, end)
            reason = self._channel.receive(end, mark)[1].decode()
        except TimeoutError:
            reason = f"its process did not start within {START_LIMIT:g} s"
        except (EOFError, OSError):
            reason = f"its process ended at its start ({self._end()})"
        except BrokenChannelError as err:
            reason = str(err)
        self._ready = not reason
        if self._ready:
            return None
        self.kill()
        return Outcome(failure="failed", reason=reason)

    def ask(self, request: bytes, deadline: float, size: int | None) -> list[Outcome] | Outcome:
        """An outcome for each sample, or why there is none; then the process is of no use any more."""
        end, mark = time.monotonic() + deadline, Channel.new_mark()
        try:
            self._channel.send(mark, request, end)
            return _outcomes(self._channel.receive(end, mark)[1], size)
        except TimeoutError:
            return timed_out(deadline)
        except (EOFError, OSError):
            return Outcome(failure="failed", reason=f"its process ended ({self._end()})")
        except BrokenChannelError as err:
            return Outcome(failure="failed", reason=str(err))

    def is_usable(self) -> bool:
        """Whether it has sent nothing since its last answer."""
        return self._channel.is_quiet()

    def kill(self) -> None:
        """End the process and what it has started. In a fork of the trainer it is somebody else's."""
        self.alive.discard(self)
        self.let_go()
        if self._owner != os.getpid():
            return
        try:
            self._process.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def let_go(self) -> None:
        """Close this process's ends of the connections."""
        self._channel.close()
        self._lifeline.close()

    def _end(self) -> str:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "or has closed the descriptor that it answers with"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _let_go() -> None:
    for worker in list(_Worker.alive):
        worker.let_go()


os.register_at_fork(after_in_child=_let_go)  # a copy of the lifeline would keep workers alive after the trainer


def _outcomes(answer: bytes, size: int | None) -> list[Outcome]:
    """What a worker says.

    Raises:
        BrokenChannelError: it does not say that.
    """
    outcomes = [Outcome(*one) for one in json.loads(answer)]
    if len(outcomes) != (size or 1) and not (len(outcomes) == 1 and outcomes[0].failure):
        raise BrokenChannelError(f"it answered for {len(outcomes)} samples, {size or 1} were asked for")
    return outcomes


def _start(answers: int, lifeline: int) -> subprocess.Popen[bytes]:
    script = str(Path(__file__).with_name("keeper.py"))
    return subprocess.Popen(
        [sys.executable, script, str(answers), str(lifeline), str(os.getpid())],
        pass_fds=[answers, lifeline],
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
