"""Connections between each rank and rank 0, apart from the collectives: see failures.py, which uses them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

log = logging.getLogger(__name__)


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
    _buffer: bytes = b""

    def send(self, **message: Any) -> None:
        """Send it if the peer is there; the reading side finds out if it is not."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as err:
            log.debug("rank %d cannot be reached: %s", self.rank, err)

    def receive(self) -> Iterator[dict[str, Any]]:
        """The messages that have arrived; `open` ends with the connection."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        self.open = bool(data)
        self.heard = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        yield from map(json.loads, lines)


def connect_peers(rank: int, world_size: int, deadline: float) -> dict[int, Peer]:
    """Rank 0's connections to all others, or another rank's to rank 0; the ranks find one another by a broadcast.

    Args:
        rank: this process.
        world_size: number of processes.
        deadline: on the monotonic clock.

    Raises:
        ConnectionError: a rank could not be reached, or was not heard from before the deadline.
    """
    listener = _listener() if rank == 0 else None
    box: list[Any] = [None]
    if listener is not None:
        box = [(_addresses(), listener.getsockname()[1], secrets.token_hex(16))]
    dist.broadcast_object_list(box, src=0)
    hosts, port, token = box[0]
    if listener is None:
        return {0: Peer(0, _reach(hosts, port, token, rank, deadline))}
    peers: dict[int, Peer] = {}
    with listener:
        while missing := sorted(set(range(1, world_size)) - set(peers)):
            connection, number = _accept(listener, token, deadline, missing)
            peers[number] = Peer(number, connection)
    return peers


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
    for host in hosts:
        try:
            connection = socket.create_connection((host, port), timeout=10)
            connection.settimeout(max(1.0, deadline - time.monotonic()))
            connection.sendall(f"{token}{rank:08d}".encode())
            if _read(connection, 32) == token[::-1].encode():
                return _kept(connection)
            connection.close()
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
            greeting = _read(connection, 40)
            if secrets.compare_digest(greeting[:32], token.encode()):
                connection.sendall(token[::-1].encode())
                return _kept(connection), int(greeting[32:])
        except OSError as err:
            log.debug("a stranger called: %s", err)
        connection.close()


def _read(connection: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer if the connection ends."""
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


def _kept(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return connection
