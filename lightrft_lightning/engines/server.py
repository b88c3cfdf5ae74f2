"""``lightrft serve``: one engine behind HTTP and a key, for trainers in other processes or on other machines.

Every route asks for the key, before it reads a request's body. Nothing that arrives is unpickled: it is JSON, or a
safetensors file. One trainer at a time may change the weights: it holds a session, which is an open connection, so that
a trainer which is killed leaves nothing locked. An update is all or nothing: between its beginning and its end, and
after a failure, nothing is generated.

Needs the extra ``server``; imported by the command only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import hmac
import importlib
import json
import logging
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import lightrft_lightning
from lightrft_lightning.engines import _wire as wire
from lightrft_lightning.engines._cpus import parse_cpus, take_cpus
from lightrft_lightning.engines._hosted import create_hosted, vocab_size
from lightrft_lightning.engines._service import EngineThread, Exchange, Hosted

log = logging.getLogger(__name__)
T = TypeVar("T")

KEEP_ALIVE = 3.0
"""Seconds between the lines that tell whether a session's trainer is still there."""
MOMENT = 1.0
"""Seconds that a new session waits for the one before, whose connection may just be closing; and a call for the
engine to notice its deadline."""
LOST_AFTER = 20_000
"""Milliseconds after which a machine that acknowledges nothing counts as gone."""
CLOSE = 5.0
"""Seconds that the engine has to close."""


# -------------------------------------------------------------------- in front of everything


class Guard:
    """Lets requests with the key pass, and no more than `most` bytes of each."""

    def __init__(self, app: ASGIApp, key: str, most: int) -> None:
        self.app, self.most = app, most
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if not hmac.compare_digest(headers.get("authorization", "").encode(), self._expected):
            refusal = _error(401, "wrong or missing key: send the header 'Authorization: Bearer <key>'")
            refusal.headers["WWW-Authenticate"] = "Bearer"
            return await refusal(scope, receive, send)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.most:
            return await _error(413, self._too_large(length))(scope, receive, send)
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise HTTPException(413, self._too_large(f"at least {seen}"))
            return message

        await self.app(scope, limited, send)

    def _too_large(self, length: str) -> str:
        return f"the request has {length} bytes, more than {self.most}: start the server with a larger --max-request-mb"


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)


async def _http_error(request: Request, err: Exception) -> Response:
    assert isinstance(err, HTTPException)
    return _error(err.status_code, err.detail)


async def _bad_request(request: Request, err: Exception) -> Response:
    return _error(400, str(err))


async def _server_error(request: Request, err: Exception) -> Response:
    return _error(500, f"{type(err).__name__}: {err}")  # Starlette logs the traceback


async def _gone(request: Request, err: Exception) -> Response:
    return _error(499, "the client closed the connection")  # nobody reads it


class Lines(Response):
    """An answer of one JSON object a line, sent as they come; it ends at once when the client is gone.

    Args:
        lines: what to send.
        finish: called at the end in any case.
    """

    def __init__(self, lines: AsyncIterator[dict[str, Any]], finish: Callable[[], None]) -> None:
        self._lines, self._finish = lines, finish
        self.status_code, self.background = 200, None
        self.init_headers({"content-type": "application/x-ndjson"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = {asyncio.ensure_future(self._send(send)), asyncio.ensure_future(disconnected(receive))}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            self._finish()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for line in self._lines:
            body = json.dumps(line).encode() + b"\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def disconnected(receive: Receive) -> None:
    """Return when the client has hung up; after its request was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


# -------------------------------------------------------------------- routes


async def _before(end: float, arrived: asyncio.Queue[Any], late: Exception, stop: threading.Event) -> Any:
    """What arrives next; from `end` on, `late`, and `stop` is set."""
    coming = asyncio.ensure_future(arrived.get())
    try:
        done, _ = await asyncio.wait({coming}, timeout=max(0.0, end - time.monotonic()))
        if done:
            return coming.result()
        stop.set()
        return late
    finally:
        coming.cancel()


@dataclass(frozen=True)
class Session:
    """The trainer that may change the engine."""

    token: str
    host: str
    pid: int
    since: str


class Service:
    """What the routes do.

    Args:
        hosted: with the engine, started.
        thread: where it lives.
        exchange: see `Exchange`.
        about: what ``GET /info`` tells.
        vocab_size: number of token ids of the engine's model.
    """

    def __init__(
        self, hosted: Hosted, thread: EngineThread, exchange: Exchange, about: dict[str, Any], vocab_size: int
    ) -> None:
        self.hosted, self.thread, self.exchange, self.about = hosted, thread, exchange, about
        self.vocab_size = vocab_size
        self.session: Session | None = None

    def app(self, key: str, most: int) -> ASGIApp:
        """The application, guarded."""
        routes = [
            Route("/health", self.health, methods=["GET"]),
            Route("/info", self.info, methods=["GET"]),
            Route("/session", self.open_session, methods=["POST"]),
            Route("/generate", self.generate, methods=["POST"]),
            Route("/weights/begin", self.begin, methods=["POST"]),
            Route("/weights/bucket", self.bucket, methods=["POST"]),
            Route("/weights/end", self.end, methods=["POST"]),
            Route("/weights/read", self.read, methods=["POST"]),
            Route("/sleep", self.sleep, methods=["POST"]),
            Route("/wake_up", self.wake_up, methods=["POST"]),
        ]
        handlers: Any = {
            HTTPException: _http_error,
            ValueError: _bad_request,
            ClientDisconnect: _gone,
            Exception: _server_error,
        }
        return Guard(Starlette(routes=routes, exception_handlers=handlers), key, most)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"ok": True})

    async def info(self, request: Request) -> Response:
        folder = {"folder": str(self.exchange.folder), "nonce": self.exchange.nonce}
        return JSONResponse({**self.about, "weights": self.hosted.weights, "exchange": folder})

    async def open_session(self, request: Request) -> Response:
        """Held for as long as the client keeps reading."""
        body = wire.parse_object(await request.body())
        wire.only(body, "host", "pid")
        host = wire.get(body, "host", str, lambda v: 0 < len(v) <= 256 and v.isprintable(), "a host's name")
        pid = wire.get(body, "pid", int, lambda v: 0 < v < wire.WHOLE, "a process's number")
        end = time.monotonic() + MOMENT
        while self.session is not None and time.monotonic() < end:
            await asyncio.sleep(0.05)
        if (held := self.session) is not None:
            who = f"process {held.pid} on {held.host}, since {held.since}"
            raise HTTPException(409, f"another trainer is using this server: {who}. Stop it, or start another server")
        mine = self.session = Session(secrets.token_hex(16), host, pid, time.strftime("%F %T"))

        async def lines() -> AsyncIterator[dict[str, Any]]:
            yield {"session": mine.token, "weights": self.hosted.weights}
            while True:
                await asyncio.sleep(KEEP_ALIVE)
                yield {}

        def finish() -> None:
            self.session = None
            self.thread.submit(self.hosted.abandon)

        return Lines(lines(), finish)

    def _check_session(self, request: Request) -> None:
        given = request.headers.get(wire.SESSION_HEADER, "").encode()
        if self.session is None or not hmac.compare_digest(given, self.session.token.encode()):
            raise HTTPException(409, f"this needs the session of the trainer ({wire.SESSION_HEADER}): POST /session")

    async def generate(self, request: Request) -> Response:
        """A line for each finished group as it comes, then how many they were."""
        wanted = wire.parse_request(wire.parse_object(await request.body()), self.vocab_size)
        loop, arrived, stop = asyncio.get_running_loop(), asyncio.Queue[Any](), threading.Event()
        end = time.monotonic() + wanted.deadline

        def send(item: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is shutting down
                loop.call_soon_threadsafe(arrived.put_nowait, item)

        def in_time() -> asyncio.Future[Any]:
            """What arrives next, or an error once the deadline has passed: the engine notices between two layers."""
            told = f"the engine has not stopped computing at deadline={wanted.deadline:g} s"
            return asyncio.ensure_future(_before(end + MOMENT, arrived, HTTPException(504, told), stop))

        self.thread.submit(self.hosted.generate, wanted, send, stop, end)
        first = await self._unless_gone(request, in_time(), stop)
        if isinstance(first, Exception):
            raise first

        async def lines() -> AsyncIterator[dict[str, Any]]:
            item = first
            while not isinstance(item, Exception):
                yield item
                if "done" in item:
                    return
                item = await in_time()
            log.error("the engine failed", exc_info=item)
            yield {"error": f"{type(item).__name__}: {item}"}

        return Lines(lines(), stop.set)

    async def _unless_gone(self, request: Request, first: asyncio.Future[Any], stop: threading.Event) -> Any:
        """What arrives first; `stop` is set if the client hangs up before."""
        gone = asyncio.ensure_future(disconnected(request.receive))
        try:
            await asyncio.wait({first, gone}, return_when=asyncio.FIRST_COMPLETED)
            if first.done():
                return first.result()
            raise ClientDisconnect
        finally:
            if not first.done():
                stop.set()
            first.cancel()
            gone.cancel()

    async def begin(self, request: Request) -> Response:
        self._check_session(request)
        await self._run(self.hosted.begin)
        return JSONResponse({})

    async def bucket(self, request: Request) -> Response:
        """A safetensors file: in the body, or by its name in the exchange folder."""
        self._check_session(request)
        if request.headers.get("content-type") == "application/json":
            body = wire.parse_object(await request.body())
            wire.only(body, "file")
            path = self.exchange.find(wire.get(body, "file", str, lambda v: True, "a file's name"))
        else:
            path = await self.exchange.receive(request)
        await self._run(self.hosted.load, path)
        return JSONResponse({})

    async def end(self, request: Request) -> Response:
        self._check_session(request)
        body = wire.parse_object(await request.body())
        wire.only(body, "version")
        version = wire.get(body, "version", int, lambda v: 0 <= v < wire.WHOLE, "a whole number, at least 0")
        return JSONResponse({"weights": await self._run(self.hosted.end, version)})

    async def read(self, request: Request) -> Response:
        wanted, names = wire.parse_wanted(wire.parse_object(await request.body()))
        return JSONResponse({"held": await self._run(self.hosted.read, wanted, names)})

    async def sleep(self, request: Request) -> Response:
        self._check_session(request)
        body = wire.parse_object(await request.body())
        wire.only(body, "level")
        await self._run(self.hosted.sleep, wire.get(body, "level", int, lambda v: v in (1, 2), "1 or 2"))
        return JSONResponse({})

    async def wake_up(self, request: Request) -> Response:
        self._check_session(request)
        await self._run(self.hosted.wake_up)
        return JSONResponse({})

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.wrap_future(self.thread.submit(function, *args))


# -------------------------------------------------------------------- the command


def main(args: Sequence[str]) -> None:
    """``lightrft serve ...``.

    Args:
        args: what follows ``serve``.
    """
    given = _parser().parse_args(args)
    _check(given)
    if given.cpus is not None:
        take_cpus(parse_cpus(given.cpus))
    key = _key(given.key_file)
    engine_args = _engine_args(given.engine_args)
    engine = create_hosted(given.engine, engine_args, given.sleep_level)
    listener = _listen(given.host, given.port)
    # SIGTERM, too, must reach the lines that put things in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if given.exit_with_parent:
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    most = given.max_request_mb << 20
    thread, exchange, hosted = EngineThread(), Exchange(room=2 * most), Hosted(engine)
    try:
        gc.freeze()  # what is imported is no garbage, which vLLM looks for five times at its start
        load_format = {"load_format": "dummy"} if given.empty_weights else {}
        thread.submit(engine.start, given.model, **load_format).result()
        about = {
            "engine": given.engine,
            "engine_version": importlib.import_module(given.engine).__version__,
            "lightrft_lightning": lightrft_lightning.__version__,
            "dtype": None if engine.dtype is None else str(engine.dtype).removeprefix("torch."),
            "sleep_level": given.sleep_level,
            "max_request_bytes": most,
        }
        service = Service(hosted, thread, exchange, about, vocab_size(given.model))
        config = uvicorn.Config(
            service.app(key, most),
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            timeout_graceful_shutdown=1,
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        exchange.close()
        hosted.closing.set()
        try:
            thread.submit(engine.close).result(CLOSE)
        except FutureTimeout:
            # Its thread is in the middle of a computation: torch aborts where Python ends beside it.
            log.warning("the engine has not ended within %g s", CLOSE)
            _leave(sys.exc_info()[1])


def _leave(err: BaseException | None) -> None:
    """End the process with the status that it would have had, without waiting for threads."""
    while err is not None and not isinstance(err, SystemExit | KeyboardInterrupt):
        err = err.__context__
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(err.code if isinstance(err, SystemExit) and isinstance(err.code, int) else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightrft serve", description="An engine for RemoteRollout, behind HTTP.")
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder")
    add("--engine", choices=wire.HOSTED, default="vllm")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8421, help="0: a free one")
    add("--engine-args", default="{}", help="arguments of the engine, as a JSON object")
    add("--sleep-level", type=int, choices=(0, 1, 2), default=0, help="deepest sleep that the trainer may ask for")
    add("--max-request-mb", type=int, default=1024, help="a larger request is refused (MiB)")
    add("--key-file", help=f"file with the key; default: the variable {wire.KEY_VARIABLE}, else a new key is printed")
    add("--cpus", help="CPUs to compute on, like 0-3,6; default: all that the process may use")
    add("--empty-weights", action="store_true", help="read no weights: the trainer sends its own")
    add("--exit-with-parent", action="store_true", help="end when standard input is closed")
    return parser


def _check(given: argparse.Namespace) -> None:
    if not Path(given.model, "config.json").is_file():
        raise ValueError(f"--model {given.model}: no Hugging Face folder, there is no config.json in it")
    if not 0 <= given.port < 1 << 16:
        raise ValueError(f"--port {given.port}: must be 0 (a free one) to {(1 << 16) - 1}")
    if given.max_request_mb < 1:
        raise ValueError(f"--max-request-mb {given.max_request_mb}: must be at least 1")


def _key(file: str | None) -> str:
    if file is not None:
        key, source = Path(file).read_text().strip(), f"the file {file}"
    elif wire.KEY_VARIABLE in os.environ:
        key, source = os.environ[wire.KEY_VARIABLE].strip(), f"the variable {wire.KEY_VARIABLE}"
    else:
        key = secrets.token_urlsafe(32)
        print(f"lightrft serve: the key is {key}", flush=True)
        return key
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(f"{source} holds no key: it must be one line of ASCII characters")
    return key


def _engine_args(text: str) -> dict[str, Any]:
    try:
        return wire.parse_object(text.encode())
    except ValueError as err:
        raise ValueError(f"--engine-args {text!r}: must be a JSON object ({err})") from err


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded, which may take minutes."""
    if not _is_loopback(host):
        log.warning("traffic on %s is not encrypted: in a network that others use, go through a tunnel", host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # a trainer's machine that lost its power closes no connection
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_AFTER)
        listener.bind((host, port))
        listener.listen(128)  # at once: two servers could bind a port that nobody listens on
    except OSError as err:
        listener.close()
        raise RuntimeError(f"cannot listen on {host}, port {port}: {err.strerror}. Choose another --port") from err
    address, bound = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    print(f"{wire.ANNOUNCEMENT}http://{shown}:{bound}", flush=True)
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _end_with_parent(parent: int) -> None:
    """Standard input is a pipe that only the parent holds open; a fork of the parent may have it as well."""
    while os.getppid() == parent:
        if select.select([sys.stdin], [], [], 1.0)[0] and not os.read(sys.stdin.fileno(), 4096):
            break
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * CLOSE)
    os._exit(1)
