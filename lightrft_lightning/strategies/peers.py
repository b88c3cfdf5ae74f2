"""Connections between each rank and rank 0, apart from the collectives: see failures.py, which uses them."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import select
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist

log = logging.getLogger(__name__)

HEARTBEAT_TIMEOUT = 60.0
"""Seconds without an answer after which a rank's machine or network counts as gone, or its stopped process as lost.

The default of `StrategyConfig.heartbeat_timeout`."""

_KEY = "lightrft/watch"

MOST_STRANGERS = 256
"""That may be on the line at the same time."""


@dataclass
class Status:
    """What a rank says about its main thread."""

    name: str = "?"
    """Host and process id."""
    where: str = "its start"
    waiting: bool = False
    """In a collective."""
    still: float = 0.0
    """Seconds since it last moved."""
    ending: float = 0.0
    """Seconds since a `Trainer` began to tear down; 0: it does not."""
    running: bool = False
    """Inside of a `Trainer`'s run."""
    pid: int = 0
    machine: str = ""


@dataclass
class Peer:
    """The connection to another rank; messages are JSON, one a line."""

    rank: int
    socket: socket.socket
    status: Status = field(default_factory=Status)
    heard: float = field(default_factory=time.monotonic)
    """When it last said something."""
    acknowledged: bool = False
    """It knows who failed."""
    left: bool = False
    """It has ended without an error."""
    open: bool = True
    unreachable: bool = False
    """The connection ended because no answer came any more, not from its process but from its machine."""
    _buffer: bytes = b""

    def send(self, **message: Any) -> None:
        """Send it if the peer is there; the reading side finds out if it is not."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as err:
            log.debug("rank %d cannot be reached: %s", self.rank, err)

    def keep_alive(self, seconds: float) -> None:
        """See the function `keep_alive`."""
        with contextlib.suppress(OSError):  # closed: the reading side finds out
            keep_alive(self.socket, seconds)

    def receive(self) -> Iterator[dict[str, Any]]:
        """The messages that have arrived; `open` ends with the connection."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError as err:
            data = b""
            self.unreachable = err.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)
        self.open = bool(data)
        self.heard = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        yield from map(json.loads, lines)


def readable(sockets: Sequence[socket.socket], seconds: float) -> list[socket.socket]:
    """Those of `sockets` that have something to be read within `seconds`."""
    poll, by_number = select.poll(), {s.fileno(): s for s in sockets}  # select.select ends at 1,024 open files
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(max(0.0, seconds) * 1000)]


def connect_peers(rank: int, world_size: int, deadline: float, store: dist.Store | None = None) -> dict[int, Peer]:
    """Rank 0's connections to all others, or another rank's to rank 0.

    Args:
        rank: this process.
        world_size: number of processes.
        deadline: on the monotonic clock.
        store: where rank 0 says how it can be reached; default: by a broadcast in the default process group.

    Raises:
        ConnectionError: a rank could not be reached, or was not heard from before the deadline.
    """
    listener = _listener() if rank == 0 else None
    address: Any = None
    if listener is not None:
        address = [_addresses(), listener.getsockname()[1], secrets.token_hex(16)]
    hosts, port, token = _shared(address, deadline, store)
    if listener is None:
        return {0: Peer(0, _reach(hosts, port, token, rank, deadline))}
    peers: dict[int, Peer] = {}
    with listener, contextlib.closing(Lobby(listener, token)) as lobby:
        while missing := sorted(set(range(1, world_size)) - set(peers)):
            connection, number = lobby.next(deadline, missing)
            peers[number] = Peer(number, connection)
    return peers


def _shared(address: Any, deadline: float, store: dist.Store | None) -> Any:
    """What rank 0 gives for `address`, on all ranks."""
    if store is None:
        box = [address]
        dist.broadcast_object_list(box, src=0)
        return box[0]
    if address is not None:
        store.set(_KEY, json.dumps(address))
    store.wait([_KEY], timedelta(seconds=max(0.1, deadline - time.monotonic())))
    return json.loads(store.get(_KEY))


def _addresses() -> list[str]:
    """Under which the other ranks may reach this one, the most likely first."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if master in ("localhost", "::1") or master.startswith("127."):
        return ["127.0.0.1"]
    found = [master]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))  # sends nothing: asks which interface leads there
        found.append(probe.getsockname()[0])
    return list(dict.fromkeys([*found, socket.gethostname()]))


def _listener() -> socket.socket:
    if _addresses() == ["127.0.0.1"]:
        return socket.create_server(("127.0.0.1", 0), backlog=128)
    if not socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), backlog=1024)
    return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)


def _reach(hosts: list[str], port: int, token: str, rank: int, deadline: float) -> socket.socket:
    """Connect to rank 0. Another program may answer at one of the addresses, so it has to show that it is the one."""
    problems = []
    for number, host in enumerate(hosts):
        now = time.monotonic()
        until = now + (deadline - now) / (len(hosts) - number)  # some time for each of those that are left
        try:
            connection = socket.create_connection((host, port), timeout=10)
            connection.sendall(f"{token}{rank:08d}".encode())
            if _read(connection, 32, until) == token[::-1].encode():
                return _kept(connection)
            connection.close()
            problems.append(f"{host}: not rank 0")
        except OSError as err:
            problems.append(f"{host}: {err}")
    raise ConnectionError(f"rank {rank} cannot reach rank 0 on port {port}: {'; '.join(problems)}")


class Lobby:
    """Where those wait who have called and not yet said who they are; a slow stranger holds up nobody.

    Args:
        listener: where they call.
        token: what the ranks know.
    """

    def __init__(self, listener: socket.socket, token: str) -> None:
        self._listener, self._token = listener, token.encode()
        self._said: dict[socket.socket, bytes] = {}
        listener.setblocking(False)

    def next(self, deadline: float, missing: Sequence[int]) -> tuple[socket.socket, int]:
        """The connection of one of the ranks `missing`; whoever does not know the token is turned away."""
        while (left := deadline - time.monotonic()) > 0:
            for ready in readable([self._listener, *self._said], left):
                if ready is self._listener:
                    self._open()
                elif (rank := self._hear(ready)) in missing:
                    return _kept(ready), rank
        raise ConnectionError(f"rank 0 has not heard from rank(s) {list(missing)} within the deadline")

    def close(self) -> None:
        """Turn away who is left."""
        for connection in self._said:
            connection.close()

    def _open(self) -> None:
        with contextlib.suppress(OSError):  # gone already
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._said[connection] = b""
            if len(self._said) > MOST_STRANGERS:
                oldest = next(iter(self._said))
                del self._said[oldest]
                oldest.close()

    def _hear(self, connection: socket.socket) -> int:
        """The rank that has called, once it has said so; -1: not yet, or a stranger."""
        said = self._said.pop(connection)
        try:
            said += (more := connection.recv(40 - len(said)))
            if more and len(said) < 40:
                self._said[connection] = said
                return -1
            if secrets.compare_digest(said[:32], self._token) and said[32:].isdigit():
                connection.sendall(self._token[::-1])
                return int(said[32:])
        except OSError as err:
            log.debug("a stranger called: %s", err)
        connection.close()
        return -1


def _accept(listener: socket.socket, token: str, deadline: float, missing: list[int]) -> tuple[socket.socket, int]:
    """The connection of one rank."""
    with contextlib.closing(Lobby(listener, token)) as lobby:
        return lobby.next(deadline, missing)


def _read(connection: socket.socket, size: int, deadline: float) -> bytes:
    """`size` bytes, or fewer if the connection ends."""
    data = b""
    while len(data) < size:
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        if not (more := connection.recv(size - len(data))):
            break
        data += more
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    return data


def _kept(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    keep_alive(connection, HEARTBEAT_TIMEOUT)
    return connection


def keep_alive(connection: socket.socket, seconds: float) -> None:
    """Let the kernels of the two machines ask each other, however busy the processes are.

    Once nothing has come back for `seconds`, reading from the connection raises `TimeoutError`.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    pause = max(1, int(seconds / 4))
    for name, value in (
        ("TCP_KEEPIDLE", pause), ("TCP_KEEPINTVL", pause), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", int(seconds * 1000))
    ):  # fmt: skip
        if hasattr(socket, name):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def process_here(pid: int, machine: str) -> str:
    """The state of a process of this machine, one letter as in ``/proc``; "" where nothing can be said."""
    if machine != this_machine():
        return ""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@cache
def this_machine() -> str:
    """What tells machines, and containers that see other processes, apart; "" where there is no ``/proc``."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
