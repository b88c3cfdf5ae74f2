"""When one rank fails, all end, and each says which one failed and why.

A collective waits for all ranks, so one that raises, hangs or is killed leaves the others waiting. `watch_ranks` gives
each process a thread with a connection to rank 0, apart from the collectives. It carries the news of an exception at
once; a process that dies is noticed by its closed connection; one that stands still, by the deadline.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import logging
import os
import re
import secrets
import select
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

log = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds that a rank has to end by itself after another one has failed."""

EXIT_GRACE = 60.0
"""Seconds that the interpreter has to end once the error is out."""

NEWS = 3.0
"""Seconds that a failing rank stays for the others to take note of the cause: launchers kill soon after the first."""

_COMMUNICATION = re.compile(r"gloo|nccl|c10d|TCPStore", re.IGNORECASE)
_LIBRARIES = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_COLLECTIVES = re.compile(r"[/\\](torch[/\\]distributed[/\\](?!checkpoint)|deepspeed[/\\])")

children: list[subprocess.Popen[Any]] = []
"""Ranks that Lightning has started from this process; they do not outlive it."""

_watch: RankWatch | None = None


class RankFailedError(RuntimeError):
    """This rank ended because another one failed first.

    Args:
        rank: the rank that failed.
        cause: what happened to it, e.g. ``ValueError: boom``.
        message: the whole story in one line.
    """

    def __init__(self, rank: int, cause: str, message: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.cause = cause


@dataclass(frozen=True)
class Verdict:
    """Who failed first, and how."""

    rank: int
    cause: str
    message: str
    stuck: bool = False
    """Whether that rank's own main thread cannot be expected to end it."""


@dataclass
class _Status:
    """What a rank says about its main thread."""

    name: str = "?"
    """Host and process id."""
    where: str = "start"
    waiting: bool = False
    """Inside torch.distributed or DeepSpeed."""
    still: float = 0.0
    """Seconds since it last moved."""


@dataclass
class _Peer:
    """The connection to another rank; messages are JSON, one a line."""

    rank: int
    socket: socket.socket
    status: _Status = field(default_factory=_Status)
    heard: float = field(default_factory=time.monotonic)
    acknowledged: bool = False
    left: bool = False
    open: bool = True
    _buffer: bytes = b""

    def send(self, **message: Any) -> None:
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:  # it is gone: the reading side finds out, and says so
            log.debug("rank %d cannot be reached", self.rank)

    def receive(self) -> Iterator[dict[str, Any]]:
        """The messages that have arrived; clears `open` at the end of the connection."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        self.open = bool(data)
        self.heard = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            yield json.loads(line)


def watch_ranks(timeout: timedelta) -> RankWatch | None:
    """Start to watch the ranks of the default process group; all of them call this together. At most one runs.

    It stays until the process ends: so does the process group.

    Args:
        timeout: how long a rank may wait in a collective, or give no sign of life, before the job is ended.

    Returns:
        The watch; None where there is no other rank.
    """
    global _watch
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    place = (dist.get_rank(), dist.get_world_size())
    if _watch is not None and (_watch.rank, _watch.world_size) != place:
        _watch.stop()
        _watch = None
    if _watch is None:
        _watch = RankWatch(*place, timeout)
    _watch.timeout = timeout.total_seconds()
    return _watch


def report(exception: BaseException) -> RankFailedError | None:
    """Tell the other ranks that this one ends with `exception`.

    Returns:
        The error to end with instead, if another rank had failed first; None if `exception` is the first failure, or
        nobody watches.
    """
    return None if _watch is None else _watch.report(exception)


class RankWatch:
    """One thread a rank; rank 0's has a connection to each other one and decides who failed first.

    Args:
        rank: this process.
        world_size: number of processes, more than one.
        timeout: see `watch_ranks`.
    """

    def __init__(self, rank: int, world_size: int, timeout: timedelta) -> None:
        self.rank, self.world_size = rank, world_size
        self.timeout = timeout.total_seconds()
        self.verdict: Verdict | None = None
        self._changed = threading.Condition()  # guards all that follows, against the main thread
        self._peers: dict[int, _Peer] = {}
        self._suspicion: tuple[float, int, str] | None = None
        self._reported = self._informed = self._stopped = False
        self._exit_at: float | None = None
        self._stack = _Stack()
        self._name = f"{socket.gethostname()}, pid {os.getpid()}"
        self._connect()
        self._wake, self._waker = socket.socketpair()
        self._previous_hook = sys.excepthook
        sys.excepthook = self._excepthook
        atexit.register(self.stop)
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(target=self._run, name="lightrft-rank-watch", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- connections

    def _connect(self) -> None:
        deadline = time.monotonic() + min(self.timeout, 300.0)
        listener = _listener() if self.rank == 0 else None
        box: list[Any] = [None]
        if listener is not None:
            box = [(_addresses(), listener.getsockname()[1], secrets.token_hex(16))]
        dist.broadcast_object_list(box, src=0)
        hosts, port, token = box[0]
        if listener is None:
            self._peers[0] = _Peer(0, _reach(hosts, port, token, self.rank, deadline))
            return
        with listener:
            while len(self._peers) < self.world_size - 1:
                missing = sorted(set(range(1, self.world_size)) - set(self._peers))
                connection, rank = _accept(listener, token, deadline, missing)
                self._peers[rank] = _Peer(rank, connection)

    def stop(self) -> None:
        """Take leave of the others: this process ends without an error."""
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            for peer in self._peers.values():
                peer.send(left=True)
                with contextlib.suppress(OSError):
                    peer.socket.shutdown(socket.SHUT_WR)
        self._wake_up()
        atexit.unregister(self.stop)
        if sys.excepthook == self._excepthook:
            sys.excepthook = self._previous_hook

    def _forget(self) -> None:
        """In a forked child (a data loader's worker): the connections are the parent's."""
        self._stopped = True
        for peer in self._peers.values():
            peer.socket.close()

    def _wake_up(self) -> None:
        self._waker.send(b".")

    # ---------------------------------------------------------------- the main thread's side

    def report(self, exception: BaseException) -> RankFailedError | None:
        """See the function `report`."""
        with self._changed:
            if self._stopped or self._reported:
                return None
            self._reported = True
            _raise_in_main_thread(None)
            if self.verdict is None:
                self._accuse(exception)
            self._changed.wait_for(lambda: self.verdict is not None, timeout=NEWS)
            verdict = self.verdict
            if verdict is not None and (verdict.rank == self.rank or self.rank == 0):
                self._changed.wait_for(lambda: self._informed, timeout=NEWS)
        if verdict is None or verdict.rank == self.rank or isinstance(exception, RankFailedError):
            return None
        return self._error(verdict)

    def _accuse(self, exception: BaseException) -> None:
        text = str(exception)
        cause = f"{type(exception).__name__}: {text}" if text else type(exception).__name__
        message = {"cause": cause[:2000], "communication": _is_communication(exception)}
        if self.rank == 0:
            self._on_failure(0, **message)
            self._wake_up()
        else:
            self._peers[0].send(failed=message)

    def _error(self, verdict: Verdict) -> RankFailedError:
        text = f"rank {self.rank} ended because {verdict.message}"
        return RankFailedError(verdict.rank, verdict.cause, text)

    def _excepthook(self, kind: type[BaseException], value: BaseException, traceback: Any) -> None:
        error = self.report(value)
        self._previous_hook(kind, value, traceback)
        if error is not None:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        with self._changed:
            self._exit_at = time.monotonic() + EXIT_GRACE

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        beat_at = 0.0
        while not self._stopped:
            interval = min(1.0, self.timeout / 5)
            sockets: dict[Any, _Peer] = {p.socket: p for p in self._peers.values() if p.open}
            readable, _, _ = select.select([self._wake, *sockets], [], [], interval)
            with self._changed:
                for ready in readable:
                    if ready is self._wake:
                        self._wake.recv(1 << 10)
                    else:
                        self._hear(sockets[ready])
                if time.monotonic() >= beat_at:
                    self._beat()
                    beat_at = time.monotonic() + interval
                self._judge(interval)
                self._changed.notify_all()
            if self._exit_at is not None and time.monotonic() > self._exit_at:
                self._end_process()

    def _beat(self) -> None:
        self._status = _Status(self._name, *self._stack.sample())
        for peer in self._peers.values():
            if peer.open:
                peer.send(status=asdict(self._status))

    def _hear(self, peer: _Peer) -> None:
        for message in peer.receive():
            if "status" in message:
                peer.status = _Status(**message["status"])
            elif "failed" in message:
                self._on_failure(peer.rank, **message["failed"])
            elif "verdict" in message:
                peer.send(acknowledged=True)
                self._accept_verdict(Verdict(**message["verdict"]))
            elif "acknowledged" in message:
                peer.acknowledged = True
            elif "informed" in message:
                self._informed = True
            elif "left" in message:
                peer.left = True
        if not peer.open and not peer.left and self.verdict is None:
            self._conclude(
                peer.rank, "died without an error of its own",
                f": killed (SIGKILL, out of memory), crashed or gone by os._exit; last seen in {peer.status.where}",
            )  # fmt: skip

    # ---------------------------------------------------------------- rank 0 decides

    def _on_failure(self, rank: int, cause: str, communication: bool) -> None:
        """A rank ends with an exception. If it is one of communication, the culprit is probably another rank."""
        if self.verdict is not None:
            return
        if communication:
            self._suspicion = self._suspicion or (time.monotonic() + 1.0, rank, cause)
        else:
            self._conclude(rank, cause, verb="failed: ")

    def _judge(self, interval: float) -> None:
        """Look for ranks that stand still, and see a verdict through."""
        if self.verdict is not None:
            peers = self._peers.values()
            if self.rank == 0 and not self._informed and all(p.acknowledged or not p.open for p in peers):
                self._informed = True
                for peer in peers:
                    peer.send(informed=True)
            return
        now = time.monotonic()
        silent = {p.rank: now - p.heard for p in self._peers.values() if p.open}
        for rank, seconds in silent.items():
            if seconds > self.timeout:
                self._conclude_silent(rank, seconds)
                return
        if self.rank == 0:
            self._look_for_waiting()
        if self.verdict is None and self._suspicion is not None and now > self._suspicion[0]:
            self._settle_suspicion({r: s for r, s in silent.items() if s > 3 * interval})

    def _conclude_silent(self, rank: int, seconds: float) -> None:
        self._conclude(
            rank, f"has given no sign of life for {seconds:.0f} s",
            f": stopped, or its machine is gone; last seen in {self._peers[rank].status.where}", stuck=True,
        )  # fmt: skip

    def _look_for_waiting(self) -> None:
        statuses = self._statuses()
        waiting = {r: s for r, s in statuses.items() if s.waiting and s.still > self.timeout}
        if waiting:
            first = max(waiting, key=lambda r: waiting[r].still)
            self._conclude_absent(first, waiting[first].still)

    def _settle_suspicion(self, silent: dict[int, float]) -> None:
        assert self._suspicion is not None
        _, reporter, cause = self._suspicion
        left = [p.rank for p in self._peers.values() if p.left]
        if silent:
            self._conclude_silent(*max(silent.items(), key=lambda item: item[1]))
        elif left:
            self._conclude(left[0], "had ended already", f" when rank {reporter} needed it: {cause}")
        elif re.search(r"time[sd]?[ -]?out", cause, re.IGNORECASE):
            self._conclude_absent(reporter, self.timeout)
        else:
            self._conclude(reporter, cause, verb="failed: ")

    def _conclude_absent(self, waiting: int, seconds: float) -> None:
        """`waiting` has waited for too long: blame who is elsewhere, longest first."""
        others = {r: s for r, s in self._statuses().items() if r != waiting and not s.waiting}
        if not others:  # all wait, but not for the same thing
            others = {r: s for r, s in self._statuses().items() if r != waiting}
        rank = max(others, key=lambda r: others[r].still)
        status = others[rank]
        self._conclude(
            rank, f"did not join a collective for {seconds:.0f} s",
            f": it has been in {status.where} for {status.still:.0f} s, while rank {waiting} waited in "
            f"{self._statuses()[waiting].where}", stuck=True,
        )  # fmt: skip

    def _statuses(self) -> dict[int, _Status]:
        return {self.rank: self._status, **{p.rank: p.status for p in self._peers.values() if p.open}}

    def _conclude(self, rank: int, cause: str, detail: str = "", verb: str = "", stuck: bool = False) -> None:
        name = self._name if rank == self.rank else self._peers[rank].status.name
        verdict = Verdict(rank, cause, f"rank {rank} ({name}) {verb}{cause}{detail}", stuck)
        if self.rank == 0:
            for peer in self._peers.values():
                peer.send(verdict=asdict(verdict))
        self._accept_verdict(verdict)

    # ---------------------------------------------------------------- the end

    def _accept_verdict(self, verdict: Verdict) -> None:
        """Say it at once, since a launcher may kill this process any moment; then make the main thread end it."""
        if self.verdict is not None:
            return
        self.verdict = verdict
        if verdict.rank == self.rank and not verdict.stuck:
            return
        print(f"[rank {self.rank}] ending: {verdict.message}", file=sys.stderr, flush=True)
        if not self._reported:
            # Who is stuck keeps the others in their collective until it has gone.
            self._exit_at = time.monotonic() + (1.0 if verdict.rank == self.rank else GRACE)
            _raise_in_main_thread(lambda: self._error(verdict))

    def _end_process(self) -> None:
        print(f"[rank {self.rank}] the main thread does not end: leaving at once", file=sys.stderr, flush=True)
        for child in children:
            child.kill()
        os._exit(1)


# -------------------------------------------------------------------- the main thread


class _Stack:
    """Where the main thread is, and since when it has not moved."""

    def __init__(self) -> None:
        self._last: tuple[tuple[int, int], ...] = ()
        self._since = 0.0

    def sample(self) -> tuple[str, bool, float]:
        """Its place in the program, whether that is in a collective, and seconds since it got there."""
        frames = list(_frames(sys._current_frames().get(threading.main_thread().ident or 0)))
        position = tuple((id(frame), frame.f_lasti) for frame in frames)
        if position != self._last:
            self._last, self._since = position, time.monotonic()
        waiting = any(_COLLECTIVES.search(frame.f_code.co_filename) for frame in frames[:4])
        return _place(frames), waiting, time.monotonic() - self._since


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """From the innermost outwards."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(frames: list[FrameType]) -> str:
    """The innermost line of the user's own code, and the function called from there."""
    if not frames:
        return "the end of the program"
    for frame in frames:
        path = frame.f_code.co_filename
        if not path.startswith((*_LIBRARIES, _OWN, "<frozen")):
            inner = frames[0].f_code.co_name
            text = f"{os.path.basename(path)}:{frame.f_lineno} ({frame.f_code.co_name})"
            return text if frame is frames[0] else f"{text} -> {inner}"
    return f"{os.path.basename(frames[0].f_code.co_filename)}:{frames[0].f_lineno} ({frames[0].f_code.co_name})"


def _raise_in_main_thread(make: Callable[[], RankFailedError] | None) -> None:
    """Raise an error at the main thread's next Python instruction; None takes back one that is still on its way."""
    kind: Any = None
    if make is not None:
        error = make()

        # The interpreter makes the instance by itself, without arguments.
        def __init__(self: RankFailedError) -> None:
            RankFailedError.__init__(self, error.rank, error.cause, str(error))

        kind = ctypes.py_object(type("RankFailedError", (RankFailedError,), {"__init__": __init__, "__module__": __name__}))
    ident = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, kind)


def _is_communication(exception: BaseException) -> bool:
    """Whether it says something about another rank rather than about this one."""
    return isinstance(exception, RuntimeError) and (
        isinstance(exception, dist.DistError) or _COMMUNICATION.search(str(exception)) is not None
    )


# -------------------------------------------------------------------- sockets


def _addresses() -> list[str]:
    """Under which the other ranks may reach this one; the most likely first."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if _is_loopback(master):
        return ["127.0.0.1"]
    found = [master, socket.gethostname()]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))  # sends nothing: asks which interface leads there
        found.insert(1, probe.getsockname()[0])
    return list(dict.fromkeys(found))


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _listener() -> socket.socket:
    host = "127.0.0.1" if _addresses() == ["127.0.0.1"] else ""
    if host or not socket.has_dualstack_ipv6():
        return socket.create_server((host, 0), backlog=1024)
    return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)


def _reach(hosts: list[str], port: int, token: str, rank: int, deadline: float) -> socket.socket:
    """Connect to rank 0; another program may answer at one of the addresses, so it has to know the token."""
    problems = []
    for host in hosts:
        try:
            connection = socket.create_connection((host, port), timeout=10)
            connection.settimeout(max(1.0, deadline - time.monotonic()))
            connection.sendall(f"{token} {rank:08d}".encode())
            if connection.recv(32, socket.MSG_WAITALL).decode() == token[::-1]:
                connection.settimeout(None)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                return connection
            problems.append(f"{host}: not rank 0")
        except OSError as err:
            problems.append(f"{host}: {err}")
    raise ConnectionError(f"rank {rank} cannot reach rank 0 on port {port}: {'; '.join(problems)}")


def _accept(listener: socket.socket, token: str, deadline: float, missing: list[int]) -> tuple[socket.socket, int]:
    """The connection of one more rank; whoever does not know the token is turned away."""
    while True:
        listener.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            raise ConnectionError(f"rank 0 has not heard from rank(s) {missing} within the deadline") from None
        connection.settimeout(10)
        try:
            greeting = connection.recv(41, socket.MSG_WAITALL).decode(errors="replace")
            if secrets.compare_digest(greeting[:32].encode(), token.encode()):
                connection.sendall(token[::-1].encode())
                connection.settimeout(None)
                return connection, int(greeting[33:])
        except OSError as err:
            log.debug("a stranger called: %s", err)
        connection.close()
