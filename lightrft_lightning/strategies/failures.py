"""When one rank fails, all end, and each says which one failed and why.

A collective waits for all ranks, so one that raises, hangs or is killed leaves the others waiting. `watch_ranks` gives
each process a thread with a connection to rank 0, apart from the collectives. It carries the news of an exception at
once; a process that dies is noticed by its closed connection; one that stands still, by the deadline.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from lightrft_lightning.strategies import lone, peers
from lightrft_lightning.strategies.ending import end_within, has_failed, leave, say, this_process
from lightrft_lightning.strategies.peers import HEARTBEAT_TIMEOUT, Peer, Status, connect_peers, readable
from lightrft_lightning.strategies.stacks import Stack, is_handled, where_it_is

START_TIMEOUT = timedelta(minutes=5)
"""How long ranks wait for one another to start, at least: a deadline for collectives may be far shorter."""

GRACE = 10.0
"""Seconds that a rank has to end by itself after another one has failed."""

COLLECTIVE_GRACE = 3.0
"""The same, while it is in a collective: this ends at once if a rank's process has gone, or not at all."""

NEWS = 4.0
"""Seconds that a failing rank stays for the others to take note of the cause: launchers kill soon after the first."""

_COMMUNICATION = re.compile(r"gloo|nccl|c10d|TCPStore", re.IGNORECASE)
children: list[subprocess.Popen[Any]] = []
"""Ranks that Lightning has started from this process; after a failure they do not outlive it."""

_REPORTED = "lightrft_reported"
"""An attribute of the exception that a rank ends with."""

_watch: RankWatch | None = None


class RankFailedError(RuntimeError):
    """This rank ended because another one failed first.

    Args:
        rank: the rank that failed.
        cause: what happened to it, e.g. ``ValueError: boom``.
        message: the whole story in one line.
    """

    def __init__(self, rank: int, cause: str, message: str) -> None:
        super().__init__(rank, cause, message)
        self.rank = rank
        self.cause = cause
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return RankFailedError, self.args


@dataclass(frozen=True)
class Verdict:
    """Who failed first, and how."""

    rank: int
    cause: str
    message: str
    raised: bool
    """It ends with an exception of its own; otherwise it died or stands still."""


def watch_ranks(
    timeout: timedelta,
    heartbeat: float = HEARTBEAT_TIMEOUT,
    place: tuple[int, int] | None = None,
    store: dist.Store | None = None,
) -> RankWatch | None:
    """Watch the ranks of a job; all of them call this together. At most one watch is active.

    It stays until the process ends, as the process group does.

    Args:
        timeout: how long a rank may wait in a collective, or give no sign of life, before the job is ended.
        heartbeat: seconds after which a machine that does not answer, or a process that is stopped, counts as gone.
        place: this rank and their number; default: those of the default process group.
        store: where they find one another; default: the default process group.

    Returns:
        The watch; None where there is no other rank.

    Raises:
        ConnectionError: a rank cannot connect to rank 0.
    """
    global _watch
    if place is None and dist.is_initialized():
        place = dist.get_rank(), dist.get_world_size()
    rank, world_size = place or (0, 1)
    end_within(timeout, f"rank {rank}: {this_process()}")
    if world_size == 1:
        return None
    if _watch is not None and not _watch.serves(rank, world_size):
        _watch.stop()  # another process group, or a failure on all ranks that the program has caught
        _watch = None
    if _watch is None:
        _watch = RankWatch(rank, world_size, timeout, heartbeat, store)
    _watch.wait_for(timeout, heartbeat)
    return _watch


def report(exception: BaseException) -> RankFailedError | None:
    """Tell the other ranks that this one ends with `exception`.

    Returns:
        The error to end with instead, if `exception` only follows from the failure of another rank; else None.
    """
    return None if _watch is None else _watch.report(exception)


def end_children_that_nobody_tells() -> None:
    """Before there is a watch, ranks that this process has started would wait for it."""
    if _watch is None:
        _kill_children()


def _kill_children() -> None:
    for child in children:
        child.kill()
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)  # not to leave it as a zombie


def end_at_once(cause: str, code: int) -> NoReturn:
    """End this process and, if there is a watch, all ranks, which learn the cause."""
    say(f"this process {cause}")
    if _watch is not None:
        _watch.announce(cause)
    _kill_children()
    leave(code)


class RankWatch:
    """One thread a rank; rank 0's has a connection to each other one and decides who failed first.

    Args:
        rank: this process.
        world_size: number of processes, more than one.
        timeout: see `watch_ranks`.
        heartbeat: see `watch_ranks`.
        store: see `watch_ranks`.
    """

    def __init__(
        self, rank: int, world_size: int, timeout: timedelta, heartbeat: float, store: dist.Store | None = None
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.timeout, self.heartbeat = timeout.total_seconds(), heartbeat
        self.verdict: Verdict | None = None
        self._peers = connect_peers(rank, world_size, time.monotonic() + START_TIMEOUT.total_seconds(), store)
        self._changed = threading.Condition()  # guards what follows and the peers, against the main thread
        self._status = Status(this_process(), pid=os.getpid(), machine=peers.this_machine())
        self._stack = Stack()
        self._suspicion: tuple[float, int, str] | None = None
        self._stopped = self._silenced = False
        self._reported_at: float | None = None
        self._own_failure = self._alone_told = False
        self._act_at: float | None = None
        self._ending: float | None = None  # since when
        self._informed = False
        self._wake, self._waker = socket.socketpair()
        self._previous_hook, sys.excepthook = sys.excepthook, self._excepthook
        atexit.register(self._at_exit)
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(target=self._run, name="lightrft-rank-watch", daemon=True)
        self._thread.start()

    def serves(self, rank: int, world_size: int) -> bool:
        """Whether it watches these ranks, and nothing has happened to them."""
        return (self.rank, self.world_size, self._stopped, self.verdict) == (rank, world_size, False, None)

    def wait_for(self, timeout: timedelta, heartbeat: float) -> None:
        """From here on, wait as long as this; see `watch_ranks`."""
        self.timeout, self.heartbeat = timeout.total_seconds(), heartbeat
        with self._changed:
            for peer in self._peers.values():
                peer.keep_alive(heartbeat)

    def stop(self) -> None:
        """Take leave of the others: from here on, this process is on its own."""
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            for peer in self._peers.values():
                peer.send(left=True)
                with contextlib.suppress(OSError):
                    peer.socket.shutdown(socket.SHUT_WR)
        self._waker.send(b".")
        self._thread.join(GRACE)  # it could be held up by a rank that does not read what it is sent
        atexit.unregister(self._at_exit)
        if sys.excepthook == self._excepthook:
            sys.excepthook = self._previous_hook

    def _at_exit(self) -> None:
        if self.verdict is None and self._reported_at is None:
            self.stop()
            return
        self._silenced = True
        if self._changed.acquire(timeout=GRACE):  # the thread is not inside torch then, and does not go there again
            self._changed.release()
        deadline = time.monotonic() + GRACE  # the thread goes on, in case that the interpreter does not end
        for child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _forget(self) -> None:
        """In a forked child (a worker of a data loader): the connections are the parent's."""
        self._stopped = True
        self._changed = threading.Condition()
        for peer in self._peers.values():
            peer.socket.close()

    # ---------------------------------------------------------------- the main thread's side

    def report(self, exception: BaseException) -> RankFailedError | None:
        """See the function `report`."""
        communication = _is_communication(exception)
        with self._changed:
            if self._stopped or self._reported_at is not None:
                return None
            self._reported_at = time.monotonic()
            has_failed()
            with contextlib.suppress(AttributeError, TypeError):
                setattr(exception, _REPORTED, True)
            self._own_failure = not communication and not isinstance(exception, RankFailedError)
            self._ending = None
            _raise_in_main_thread(None)
            self._stack.came_from(exception)
            self._beat()
            if self.verdict is None:
                self._accuse(exception, communication)
            self._waker.send(b".")
            self._changed.wait_for(lambda: self.verdict is not None, timeout=NEWS)
            verdict = self.verdict
            if verdict is not None and (verdict.rank == self.rank or self.rank == 0):
                self._changed.wait_for(lambda: self._informed, timeout=NEWS)
        return self._error(verdict) if communication and verdict and verdict.rank != self.rank else None

    def announce(self, cause: str) -> None:
        """Tell the other ranks why this one ends, from any thread."""
        with self._changed:
            if self.rank == 0:
                self._on_failure(0, cause, communication=False)
            else:
                self._peers[0].send(failed=cause, communication=False)

    def _accuse(self, exception: BaseException, communication: bool) -> None:
        cause = ": ".join(filter(None, (type(exception).__name__, str(exception))))[:2000]
        if self.rank == 0:
            self._on_failure(0, cause, communication)
        elif self._peers[0].open and not self._peers[0].left:
            self._peers[0].send(failed=cause, communication=communication)
        elif communication:
            self._conclude(0, "had ended already", f" when rank {self.rank} needed it: {cause}")

    def _error(self, verdict: Verdict) -> RankFailedError:
        return RankFailedError(verdict.rank, verdict.cause, f"rank {self.rank} ended because {verdict.message}")

    def _excepthook(self, kind: type[BaseException], value: BaseException, trace: Any) -> None:
        error = self.report(value)
        self._previous_hook(kind, value, trace)
        if error is not None:
            say(f"{type(error).__name__}: {error}")

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        beat_at = 0.0
        while not self._stopped:
            interval = min(1.0, self.timeout / 5)
            if time.monotonic() >= beat_at:
                beat_at = time.monotonic() + interval
                self._beat()
            sockets = {p.socket: p for p in self._peers.values() if p.open}
            ready_ones = readable([self._wake, *sockets], interval)
            now = time.monotonic()
            with self._changed:
                if self._stopped:
                    return
                for ready in ready_ones:
                    if ready is self._wake:
                        self._wake.recv(1 << 10)
                    else:
                        self._hear(sockets[ready])
                if self.rank == 0:
                    self._tell_lone_ranks()
                if self.verdict is None:
                    self._judge(now, interval)
                if self.verdict is not None:
                    self._execute(now)
                self._changed.notify_all()
            if self._is_overdue(now):
                self._end_process()

    def _beat(self) -> None:
        now = time.monotonic()
        with self._changed:
            # An interpreter that ends while a thread is inside torch, as sampling is, aborts with "terminate called
            # without an active exception".
            if self._silenced:
                return
            seen = self._stack.sample()
            self._status = replace(self._status, **seen._asdict())
            for peer in self._peers.values():
                if peer.open and now - peer.heard < 60:  # nobody empties the buffers of a stopped process
                    peer.send(status=asdict(self._status))

    def _tell_lone_ranks(self) -> None:
        """Nobody else on its machine would see that such a rank is stopped."""
        statuses = self._statuses()
        if self._alone_told or any(not s.pid for s in statuses.values()):
            return
        self._alone_told = True
        count = Counter(s.machine for s in statuses.values())
        for peer in self._peers.values():
            if count[peer.status.machine] == 1:
                peer.send(alone=True)
        if count[self._status.machine] == 1:
            lone.end_when_stopped(self.heartbeat, f"rank 0: {self._status.name}")

    def _hear(self, peer: Peer) -> None:
        silent = time.monotonic() - peer.heard
        for message in peer.receive():
            if "status" in message:
                peer.status = Status(**message["status"])
            elif "failed" in message:
                self._on_failure(peer.rank, message["failed"], message["communication"])
            elif "verdict" in message:
                self._accept(Verdict(**message["verdict"]))
            peer.acknowledged |= "acknowledged" in message
            peer.left |= "left" in message
            self._informed |= "informed" in message
            if "look" in message:
                self._look(peer, **message["look"])
            elif "stopped" in message and self.verdict is None:
                self._conclude_stopped(message["stopped"])
            elif "alone" in message:
                lone.end_when_stopped(self.heartbeat, f"rank {self.rank}: {self._status.name}")
        if peer.unreachable and self.verdict is None:
            detail = f": its machine or the network to it is gone; last seen in {peer.status.where}"
            self._conclude(peer.rank, f"has not answered for {self.heartbeat:.0f} s", detail)
        elif not peer.open and not peer.left and self.verdict is None:
            how = "killed by a signal (SIGKILL: out of memory?), crashed, or gone by os._exit"
            if silent >= self.heartbeat:
                how = f"stopped for too long, or {how}, after it had given no sign of life for {silent:.0f} s"
            detail = f": {how}; last seen in {peer.status.where}"
            self._conclude(peer.rank, "died without an error of its own", detail)

    # ---------------------------------------------------------------- who failed first

    def _on_failure(self, rank: int, cause: str, communication: bool) -> None:
        """A rank ends with an exception. If it is one of communication, the culprit is probably another rank."""
        if self.verdict is not None:
            return
        if communication:
            self._suspicion = self._suspicion or (time.monotonic() + 1.0, rank, cause)
        else:
            self._conclude(rank, cause, raised=True)

    def _judge(self, now: float, interval: float) -> None:
        silent = {p.rank: now - p.heard for p in self._peers.values() if p.open}
        longest = max(silent, key=lambda r: silent[r], default=0)
        waiting = {r: s.still for r, s in self._statuses().items() if s.waiting}
        patient = max(waiting, key=lambda r: waiting[r], default=0)
        self._look_for_stopped(silent)
        self._look_for_the_end()
        if self.verdict is not None:
            return
        if silent and silent[longest] > self.timeout:
            self._conclude_silent(longest, silent[longest])
        elif (self.rank == 0 or self._peers[0].left) and waiting and waiting[patient] > self.timeout:
            self._conclude_absent(patient, waiting[patient])
        elif self._suspicion is not None and now > self._suspicion[0]:
            _, reporter, cause = self._suspicion
            if silent and silent[longest] > 3 * interval:
                self._conclude_silent(longest, silent[longest])
            elif any(p.left for p in self._peers.values()) or re.search("timed? ?out", cause, re.IGNORECASE):
                self._conclude_absent(reporter, self.timeout)
            else:
                self._conclude(reporter, cause, raised=True)

    def _look_for_stopped(self, silent: Mapping[int, float]) -> None:
        """A silent rank may compute; whoever is on its machine can see whether its process is stopped."""
        for rank, seconds in silent.items():
            if seconds < min(self.heartbeat, self.timeout):
                continue
            pid, machine = self._peers[rank].status.pid, self._peers[rank].status.machine
            if peers.process_here(pid, machine) == "T":
                self._conclude_stopped(rank)
            elif machine != peers.this_machine():
                for peer in self._peers.values():
                    if peer.open and peer.rank != rank and peer.status.machine == machine:
                        peer.send(look={"rank": rank, "pid": pid, "machine": machine})

    def _look_for_the_end(self) -> None:
        """Nobody waits for a rank that hangs as it tears down; nor does it end while others do the same."""
        statuses = self._statuses()
        late = {r: s.ending for r, s in statuses.items() if s.ending > self.timeout}
        if all(p.left for p in self._peers.values()):
            # It is alone, and inside of a run: whatever it does there should move.
            still = self._status.still if self._status.running and not self._status.ending else 0.0
            late = late or ({self.rank: still} if still > self.timeout else {})
        elif self.rank != 0 or len(late) < len(statuses):
            return
        if late and self.verdict is None:
            rank = max(late, key=lambda r: late[r])
            self._conclude(rank, f"has not ended for {late[rank]:.0f} s", f": it is in {statuses[rank].where}")

    def _look(self, peer: Peer, rank: int, pid: int, machine: str) -> None:
        if peers.process_here(pid, machine) == "T":
            peer.send(stopped=rank)

    def _conclude_stopped(self, rank: int) -> None:
        if self.verdict is None:
            silent = time.monotonic() - self._peers[rank].heard
            detail = f": stopped, by SIGSTOP it seems; last seen in {self._peers[rank].status.where}"
            self._conclude(rank, f"has given no sign of life for {silent:.0f} s", detail)

    def _conclude_silent(self, rank: int, seconds: float) -> None:
        where = self._peers[rank].status.where
        detail = f": stopped, or its machine is gone; last seen in {where}"
        self._conclude(rank, f"has given no sign of life for {seconds:.0f} s", detail)

    def _conclude_absent(self, waiting: int, seconds: float) -> None:
        """`waiting` has waited for too long: for a rank that has ended, or else for the one longest elsewhere."""
        statuses = self._statuses()
        here = statuses.pop(waiting).where
        left = [p.rank for p in self._peers.values() if p.left]
        if left:
            self._conclude(left[0], "had ended already", f" when rank {waiting} needed it in {here}")
            return
        # If all wait, it is not for the same thing.
        elsewhere = {r: s for r, s in statuses.items() if not s.waiting} or statuses
        rank = max(elsewhere, key=lambda r: elsewhere[r].still)
        status = elsewhere[rank]
        detail = f": it has been in {status.where} for {status.still:.0f} s while rank {waiting} waited in {here}"
        self._conclude(rank, f"did not come to a collective for {seconds:.0f} s", detail)

    def _statuses(self) -> dict[int, Status]:
        return {self.rank: self._status, **{p.rank: p.status for p in self._peers.values() if p.open and not p.left}}

    def _conclude(self, rank: int, cause: str, detail: str = "", raised: bool = False) -> None:
        name = self._status.name if rank == self.rank else self._peers[rank].status.name
        verb = "failed: " if raised else ""
        verdict = Verdict(rank, cause, f"rank {rank} ({name}) {verb}{cause}{detail}", raised)
        if self.rank == 0:
            for peer in self._peers.values():
                peer.send(verdict=asdict(verdict))
        self._accept(verdict)

    # ---------------------------------------------------------------- the end

    def _accept(self, verdict: Verdict) -> None:
        if self.verdict is None:
            self.verdict = verdict
            # Often all ranks raise the same error, e.g. refuse a setting: then each one's own is the better.
            self._act_at = time.monotonic() + (1.0 if verdict.raised else 0.0)

    def _execute(self, now: float) -> None:
        """Make this process end, once, and see to it that all ranks know why."""
        assert self.verdict is not None
        if self._act_at is not None and (self._reported_at is not None or now >= self._act_at):
            self._act_at = None
            if not self._own_failure:
                # At once and not only in a traceback: a launcher may kill this process any moment.
                say(f"[rank {self.rank}] ending: {self.verdict.message}")
            if self._reported_at is None:
                self._ending = now
                _raise_in_main_thread(self._error(self.verdict))
            for peer in self._peers.values():
                peer.send(acknowledged=True)
        if self.rank == 0 and not self._informed and all(p.acknowledged or not p.open for p in self._peers.values()):
            self._informed = True
            for peer in self._peers.values():
                peer.send(informed=True)

    def _is_overdue(self, now: float) -> bool:
        """Whether this process should have ended by itself."""
        if self._ending is not None:
            return now - self._ending > self._patience()
        # What cleans up after an error may save; it may also hang.
        return self._reported_at is not None and now - self._reported_at > self.timeout and is_handled(_REPORTED)

    def _patience(self) -> float:
        assert self.verdict is not None
        if self.verdict.rank == self.rank:
            return 1.0  # as long as a rank is stuck, so are the others that wait for it
        return COLLECTIVE_GRACE if self._status.waiting else GRACE

    def _end_process(self) -> None:
        say(f"[rank {self.rank}] the main thread does not end, it is in {where_it_is()}: leaving at once")
        _kill_children()
        leave(1)


def _raise_in_main_thread(error: RankFailedError | None) -> None:
    """Raise `error` at the main thread's next Python instruction; None takes back one that is still on its way."""
    kind: Any = None
    if error is not None:
        arguments = error.args

        def __init__(self: RankFailedError) -> None:  # the interpreter takes a class, and makes the instance itself
            RankFailedError.__init__(self, *arguments)

        members = {"__init__": __init__, "__module__": __name__}
        kind = ctypes.py_object(type("RankFailedError", (RankFailedError,), members))
    main_thread = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main_thread, kind)


def _is_communication(exception: BaseException) -> bool:
    """Whether it says something about another rank rather than about this one."""
    return isinstance(exception, RuntimeError) and (
        isinstance(exception, dist.DistError) or _COMMUNICATION.search(str(exception)) is not None
    )
