"""A server that answers with whatever bytes a test wants, as no HTTP library would."""

from __future__ import annotations

import contextlib
import socket
import threading

HEADER = b"HTTP/1.1 200 OK\r\n"


class BytesServer:
    """Each connection gets what `answer(path)` yields, until the client hangs up.

    Attributes:
        url: of the server.
        sent: bytes so far.
    """

    def __init__(self, answer):
        self.answer, self.sent = answer, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self._listener.accept(), daemon=True).start()

    def _serve(self, connection, _):
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as request:
            path = request.readline().split()[1].decode()
            headers = dict(line.lower().split(b":", 1) for line in iter(request.readline, b"\r\n"))
            request.read(int(headers.get(b"content-length", 0)))
            for piece in self.answer(path):
                connection.sendall(piece)
                self.sent += len(piece)

    def close(self):
        self._listener.close()
