"""Messages between the trainer and a process that calls a reward function: whole and for one request, or an error.

A reward function may write to a descriptor that is not its own, or fork in the middle of a call, so that two processes
answer. Each message therefore repeats what its request was called. Only the standard library is imported here, as the
process imports this file by itself.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
import zlib

_HEAD = struct.Struct("!16sQI")
"""The request's mark, the length of what follows, its checksum."""


class BrokenChannelError(RuntimeError):
    """What came is no message, or one of another request."""


class Channel:
    """One end of a connected pair of sockets.

    Args:
        end: the socket; this object owns it.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def fileno(self) -> int:
        """The descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the descriptor; whoever holds the other end notices."""
        self._socket.close()

    @staticmethod
    def new_mark() -> bytes:
        """What a new request is called; no other one is, whatever process asks."""
        return secrets.token_bytes(16)

    def send(self, mark: bytes, content: bytes, end: float | None = None) -> None:
        """Write one message until `end`, a time of `time.monotonic`; None: without a limit.

        Raises:
            TimeoutError: the other side does not read.
            OSError: it has gone.
        """
        self._wait_until(end)
        self._socket.sendall(_HEAD.pack(mark, len(content), zlib.crc32(content)))
        self._wait_until(end)
        self._socket.sendall(content)

    def receive(self, end: float | None = None, mark: bytes | None = None, most: int = 1 << 40) -> tuple[bytes, bytes]:
        """The next message's mark and content.

        Args:
            end: as for `send`.
            mark: the request that the message must be the answer to; None: any.
            most: bytes of the longest content.

        Raises:
            TimeoutError: it has not come as a whole.
            EOFError: the other side has gone.
            BrokenChannelError: it is something else.
        """
        head = self._read(_HEAD.size, end)
        theirs, length, checksum = _HEAD.unpack(head)
        if (mark is not None and theirs != mark) or length > most:
            raise BrokenChannelError(f"what it sent is no answer to the request: {head!r}")
        content = self._read(length, end)
        if zlib.crc32(content) != checksum:
            raise BrokenChannelError(f"its answer is damaged: {content[:60]!r}")
        return theirs, content

    def is_quiet(self) -> bool:
        """Whether there is nothing to read; a second answer to a request is, and so is the end of the other side."""
        self._socket.settimeout(0)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except OSError as err:  # any other: the other side has gone
            return isinstance(err, BlockingIOError)
        return False

    def _read(self, size: int, end: float | None) -> bytes:
        content = bytearray()
        while len(content) < size:
            self._wait_until(end)
            piece = self._socket.recv(min(size - len(content), 1 << 20))
            if not piece:
                raise EOFError("the other side has gone")
            content += piece
        return bytes(content)

    def _wait_until(self, end: float | None) -> None:
        """Let the next operation on the socket take as long as this."""
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
