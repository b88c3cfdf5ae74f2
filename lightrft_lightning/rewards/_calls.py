"""Run calls that may raise, hang or never give control back, without being harmed by any of them.

Threads are daemons and belong to one `run_*` call: a stuck one is abandoned, it neither blocks the next iteration nor
keeps the process from ending (the threads of a `ThreadPoolExecutor` would: Python joins them at exit). What no thread
can be protected from is a call that holds the interpreter lock, e.g. a regular expression with catastrophic
backtracking: such work belongs into a process (`_pool`). Only the standard library is imported here, so that such a
process starts fast.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import queue
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

Failure = Literal["failed", "timed_out", "non_finite"]
GRACE = 1.0
"""Seconds that an event loop may be silent beyond the deadline before it counts as blocked."""


@dataclass(frozen=True)
class Outcome:
    """What became of one call.

    Attributes:
        value: what it returned; None if it failed, or if it was to find a reward and does not apply to this sample.
        failure: the kind of failure; None if there was none.
        reason: the failure in words.
    """

    value: Any = None
    failure: Failure | None = None
    reason: str = ""


def run_in_threads(calls: Sequence[Callable[[], Any]], workers: int, deadline: float) -> list[Outcome]:
    """Call each of `calls` in one of `workers` threads.

    Args:
        calls: functions without arguments.
        workers: how many run at a time.
        deadline: seconds that one call may take, from its own start. Then it is given up and its thread replaced.

    Returns:
        One outcome a call, in order.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    finished: queue.SimpleQueue[tuple[int, Outcome]] = queue.SimpleQueue()
    running: dict[int, float] = {}
    outcomes: dict[int, Outcome] = {}
    for index in range(len(calls)):
        waiting.put(index)

    def work() -> None:
        while True:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            running[index] = start = time.monotonic()
            outcome = guarded(calls[index])
            late = time.monotonic() - start > deadline
            finished.put((index, timed_out(deadline) if late else outcome))

    try:
        for _ in range(min(workers, len(calls))):
            _start_daemon(work)
        while len(outcomes) < len(calls):
            now = time.monotonic()
            for index in [i for i, start in list(running.items()) if now - start > deadline and finished.empty()]:
                del running[index]
                outcomes[index] = timed_out(deadline)
                _start_daemon(work)
            if len(outcomes) == len(calls):
                break
            until_next = min(running.copy().values(), default=now) + deadline - now
            try:
                index, outcome = finished.get(timeout=max(until_next, 0.001))
            except queue.Empty:
                continue
            if running.pop(index, None) is not None:  # else it was given up already
                outcomes[index] = outcome
    finally:
        _drain(waiting)  # after Ctrl-C nothing new may start
    return [outcomes[index] for index in range(len(calls))]


def run_on_event_loop(calls: Sequence[Callable[[], Awaitable[Any]]], deadline: float) -> list[Outcome | None]:
    """Await all `calls` concurrently on an event loop of its own, so it also works where a loop is running already.

    Args:
        calls: functions without arguments that return awaitables.
        deadline: seconds that each may take; then it is cancelled.

    Returns:
        One outcome a call, in order. None: unknown, because some call blocked the loop in place of awaiting.
    """
    outcomes: list[Outcome | None] = [None] * len(calls)
    done = threading.Event()
    progress = time.monotonic()

    async def one(index: int) -> None:
        nonlocal progress
        progress = time.monotonic()
        task = asyncio.ensure_future(_guarded_await(calls[index]))
        # Not `wait_for`: it would wait for a call that ignores its cancellation.
        await asyncio.wait([task], timeout=deadline)
        outcomes[index] = task.result() if task.done() else timed_out(deadline)
        task.cancel()
        progress = time.monotonic()

    async def everything() -> None:
        await asyncio.gather(*map(one, range(len(calls))))
        done.set()  # before the loop closes, which waits for calls that ignore their cancellation

    _start_daemon(lambda: asyncio.run(everything()))
    while not done.wait(timeout=0.05 if deadline < GRACE else GRACE / 4):
        if time.monotonic() - progress > deadline + GRACE:
            break
    return list(outcomes)


def guarded(call: Callable[[], Any]) -> Outcome:
    """Call it; whatever it raises is the outcome's failure. Who comes back must be the process that has called."""
    process = os.getpid()
    try:
        return Outcome(call())
    except BaseException as err:  # also SystemExit: it would end this thread, and its sample would wait for ever
        return Outcome(failure="failed", reason=_describe(err))
    finally:
        _end_copy(process)


async def _guarded_await(call: Callable[[], Awaitable[Any]]) -> Outcome:
    process = os.getpid()
    try:
        return Outcome(await call())
    except BaseException as err:  # asyncio lets SystemExit and KeyboardInterrupt end the whole loop
        return Outcome(failure="failed", reason=_describe(err))
    finally:
        _end_copy(process)


def _end_copy(process: int) -> None:
    """A call that has forked may come back twice; the copy must neither answer nor go on with what comes next."""
    if os.getpid() != process:
        os._exit(0)


def checked_values(result: Any, size: int) -> list[Outcome]:
    """What a function returned for `size` samples, one outcome each.

    Runs where the function ran: `__float__` and `__iter__` are its code as well.

    Raises:
        TypeError: it returned something that has no order.
        ValueError: it returned more or fewer values than samples.
    """
    if isinstance(result, (str, bytes, Mapping, Set)) or not hasattr(type(result), "__iter__"):
        raise TypeError(f"returned a {type(result).__name__} in place of a list of numbers")
    values = list(islice(result, size + 1))
    if len(values) != size:
        raise ValueError(f"returned {len(values) if len(values) < size else 'too many'} values for {size} samples")
    return [checked_value(value) for value in values]


def checked_value(value: Any) -> Outcome:
    """A finite number; None: the reward does not apply; or the failure of its sample, which an exception explains."""
    if value is None:
        return Outcome()
    if isinstance(value, BaseException):
        return Outcome(failure="failed", reason=_describe(value))
    hint = f". {_ONE_NUMBER}" if isinstance(value, (list, tuple)) else ""
    refused = Outcome(failure="failed", reason=f"returned a {type(value).__name__}, which is no number{hint}")
    if isinstance(value, (str, bytes, bytearray)):  # float("1") would work
        return refused
    try:
        number = float(value)
    except OverflowError:
        return Outcome(failure="non_finite", reason="returned a number too large for a float")
    except BaseException:  # whatever `__float__` raises
        return refused
    if not math.isfinite(number):
        return Outcome(failure="non_finite", reason=f"returned {number}")
    return Outcome(number)


def _describe(err: BaseException) -> str:
    """Type, message and place of an exception; its `__str__` is somebody else's code as well."""
    frames = traceback.extract_tb(err.__traceback__, limit=-1)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    try:
        message = repr(str(err)[:200])[1:-1]  # lone surrogates would break the log file
    except BaseException:
        message = "(its message cannot be read)"
    remedy = _remedy(err, message)
    return f"{type(err).__name__}: {message}{place}{f'. {remedy}' if remedy else ''}"


_ONE_NUMBER = "A function with `completion` returns one number; one with `completions` gets lists and returns a list"
_TEXT = "Prompts and completions are text here, no messages: write `completion` in place of completion[0]['content']"
_THREAD = "Reward functions run in threads: with `processes: 1` this one is called in the main thread of a process"
_LOOP = "Take asyncio.run(...), or make the function `async def`"
_OF_A_MESSAGE = ("content", "role", "get", "keys", "values", "items")


def _remedy(err: BaseException, message: str) -> str:
    """What a function that was written for something else needs; empty: nothing that is known."""
    if isinstance(err, TypeError) and "string indices must be integers" in message:
        return _TEXT
    if isinstance(err, AttributeError) and isinstance(err.obj, str) and err.name in _OF_A_MESSAGE:
        return _TEXT
    if "signal only works in main thread" in message or "threaded environment" in message:
        return _THREAD
    return _LOOP if "no current event loop" in message else ""


def finished(result: Any) -> Any:
    """What a function has returned, and if that is awaitable what comes of it."""
    return asyncio.run(_wait_for(result)) if inspect.isawaitable(result) else result


async def _wait_for(result: Awaitable[Any]) -> Any:
    return await result


def timed_out(deadline: float) -> Outcome:
    """The outcome of a call that was given up."""
    return Outcome(failure="timed_out", reason=f"took longer than its deadline of {deadline:g} s")


def _start_daemon(target: Callable[[], None]) -> None:
    threading.Thread(target=target, name="lightrft-reward", daemon=True).start()


def _drain(waiting: queue.SimpleQueue[int]) -> None:
    try:
        while True:
            waiting.get_nowait()
    except queue.Empty:
        return
