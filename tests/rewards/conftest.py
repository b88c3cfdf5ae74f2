from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory


class Server(ThreadingHTTPServer):
    """A real HTTP server in a thread; `answer(body)` gives the JSON, the bytes or the status that it sends."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, answer):
        self.answer, self.requests, self.release = answer, [], threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self):
        self.release.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        answer = self.server.answer(body)
        status = answer if isinstance(answer, int) else 200
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """`serve(answer)` starts a `Server`."""
    started = []

    def start(answer):
        started.append(Server(answer))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def samples():
    """`samples(texts, **fields)`: trajectories with these completions; their prompts are numbered."""

    def make(texts, **fields):
        completion = Completion((7,), (-1.0,), "eos")
        return [
            Trajectory(Prompt((1,), f"prompt {i}", {"answer": i, **fields}), completion, group=0, text=text)
            for i, text in enumerate(texts)
        ]

    return make
