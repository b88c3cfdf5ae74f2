"""HTTP calls that end by their deadline, and the session of a trainer with ``lightrft serve``."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from lightrft_lightning._errors import import_extra
from lightrft_lightning.engines._wire import SESSION_HEADER, shortened
from lightrft_lightning.engines.base import EngineError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")


MOST_BYTES = 256 << 20
"""Of an answer, where nothing smaller is said: what comes without end must not fill the memory until the deadline."""


class Unreachable(EngineError):
    """The server cannot be reached, or broke off."""


class Hanging(Unreachable):
    """The server did not answer within the deadline."""


class Unsure(Unreachable):
    """A call broke off, and it matters whether the server had done it."""


class ServerFault(EngineError):
    """The server answered that something went wrong on its side."""


class Refusal(EngineError):
    """The server answered that it does not do what it was asked for."""


class Client:
    """Talks to one server, from a thread of its own: there a call can be given up at any point.

    Args:
        url: of the server.
        key: that it asks for.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        httpx = import_extra("httpx", "server")
        self._transport_error: type[Exception] = httpx.TransportError
        self._http: Any = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}", "Accept-Encoding": "identity"},
            timeout=None,  # a call as a whole has one
            limits=httpx.Limits(max_keepalive_connections=0),  # no call may meet a connection that is just closing
            trust_env=url.startswith("https"),  # a proxy in the environment is not for engines nearby
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="rollout client")
        self._thread.start()

    def close(self) -> None:
        """End everything under way. Idempotent."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    # ---------------------------------------------------------------- calls

    def call(self, method: str, path: str, body: dict[str, Any] | bytes | None, deadline: float) -> dict[str, Any]:
        """The JSON object that the server answers.

        Args:
            method: of HTTP.
            path: of the route.
            body: JSON, or the bytes of a safetensors file.
            deadline: seconds.

        Raises:
            Unreachable: no connection, it broke off, or the server is not ready (502, 503).
            Hanging: no answer within the deadline.
            ServerFault: status 5xx.
            EngineError: the server refuses the call (4xx), or its answer is malformed.
        """
        return self._wait(self._within(deadline, f"{method} {path}", self._call(method, path, body)))

    def lines(
        self, path: str, body: dict[str, Any], deadline: float, most: int, count: int
    ) -> Generator[dict[str, Any], None, None]:
        """The JSON objects of an answer with one in each line, as they arrive; raises what `call` raises.

        Args:
            path: of the route.
            body: JSON.
            deadline: seconds.
            most: bytes of a line.
            count: of lines; more bytes than these can have are an error.
        """

        async def forward(put: Callable[[dict[str, Any]], None]) -> None:
            async for line in self._lines(path, body, most, most * count):
                put(line)

        return self._items(f"POST {path}", forward, deadline)

    def _items(
        self, what: str, produce: Callable[[Callable[[T], None]], Coroutine[Any, Any, None]], deadline: float
    ) -> Generator[T, None, None]:
        """What `produce` puts out, as it comes."""
        arrived: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        under_way = self._start(self._within(deadline, what, produce(arrived.put)))
        under_way.add_done_callback(lambda _: arrived.put(None))
        try:
            while (item := arrived.get()) is not None:
                yield item
            under_way.result()
        finally:
            under_way.cancel()  # closes the connection, so that the server stops generating

    # ---------------------------------------------------------------- in the thread

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._start(work)
        try:
            return future.result()
        finally:
            future.cancel()  # after Ctrl-C

    async def _within(self, deadline: float, what: str, work: Coroutine[Any, Any, T]) -> T:
        begin = time.monotonic()
        try:
            return await asyncio.wait_for(work, deadline)
        except (TimeoutError, asyncio.TimeoutError) as err:  # one and the same from Python 3.11
            waited = time.monotonic() - begin
            raise Hanging(f"{self.url}: {what}: no complete answer by the deadline, after {waited:.3g} s") from err
        except self._transport_error as err:
            cause = str(err) or "the connection broke off"
            raise Unreachable(f"{self.url}: {what}: {type(err).__name__}: {cause}") from err

    def _headers(self, body: dict[str, Any] | bytes | None) -> dict[str, str]:
        return {"Content-Type": "application/octet-stream" if isinstance(body, bytes) else "application/json"}

    async def _call(self, method: str, path: str, body: dict[str, Any] | bytes | None) -> dict[str, Any]:
        return self._parse(f"{method} {path}", await self._text(method, path, body))

    async def _text(self, method: str, path: str, body: dict[str, Any] | bytes | None) -> str:
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        async with self._http.stream(method, path, content=content, headers=self._headers(body)) as response:
            received = b"".join([chunk async for chunk in self._chunks(response, f"{method} {path}", MOST_BYTES)])
        self._check(response.status_code, received, f"{method} {path}")
        return received.decode(errors="replace")

    async def _lines(
        self, path: str, body: dict[str, Any], most: int = MOST_BYTES, total: float = float("inf")
    ) -> AsyncIterator[dict[str, Any]]:
        what, content, line, size = f"POST {path}", json.dumps(body).encode(), [b""], 0
        async with self._http.stream("POST", path, content=content, headers=self._headers(body)) as response:
            if response.status_code != 200:
                received = b"".join([chunk async for chunk in self._chunks(response, what, MOST_BYTES)])
                self._check(response.status_code, received, what)
            async for chunk in self._chunks(response, what, total):
                *ends, rest = chunk.split(b"\n")
                for end in ends:
                    yield self._parse(what, b"".join([*line, end]).decode(errors="replace"))
                    line, size = [], 0
                line.append(rest)
                size += len(rest)
                if size > most:
                    raise EngineError(f"{self.url}: {what}: malformed answer, a line of more than {most} bytes")
            if size:
                yield self._parse(what, b"".join(line).decode(errors="replace"))

    async def _chunks(self, response: httpx.Response, what: str, most: float) -> AsyncIterator[bytes]:
        """A body as it comes; what is compressed is not unpacked, as nobody knows how much comes out."""
        encoding, seen = response.headers.get("content-encoding", "identity"), 0
        if encoding.strip().lower() != "identity":
            raise EngineError(f"{self.url}: {what}: the answer has the encoding {encoding!r}, which was not asked for")
        async for chunk in response.aiter_raw():
            seen += len(chunk)
            if seen > most:
                raise EngineError(f"{self.url}: {what}: malformed answer, more than {most} bytes")
            yield chunk

    def _parse(self, what: str, text: str) -> dict[str, Any]:
        value = self._parse_any(what, text)
        if not isinstance(value, dict):
            raise EngineError(f"{self.url}: {what}: malformed answer, no JSON object: {shortened(value)}")
        return value

    def _parse_any(self, what: str, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as err:
            raise EngineError(f"{self.url}: {what}: malformed answer, no JSON: {shortened(text)}") from err

    def _check(self, status: int, received: bytes, what: str) -> None:
        if status == 200:
            return
        message = f"{self.url}: {what}: status {status}: {_reason(received)}"
        if status in (502, 503):
            raise Unreachable(message)
        if status >= 500:
            raise ServerFault(message)
        if status == 401:
            message += ". Set key=, or the variable LIGHTRFT_KEY, to the key that the server has"
        raise Refusal(message)


class SessionClient(Client):
    """With the session that makes its holder the trainer of a ``lightrft serve``."""

    def __init__(self, url: str, key: str) -> None:
        super().__init__(url, key)
        self.session: str | None = None
        """The session's token while it is open."""
        self._holding: asyncio.Task[None] | None = None

    def open_session(self, deadline: float) -> str | None:
        """Become the server's trainer, until `close`; returns the server's name of the weights that it has.

        Raises:
            EngineError: as `call`; another trainer holds the session.
        """
        opened: Future[dict[str, Any]] = Future()

        async def hold() -> None:
            try:
                async for line in self._lines("/session", {"host": socket.gethostname(), "pid": os.getpid()}):
                    if not opened.done():
                        self.session = str(line.get("session"))
                        opened.set_result(line)
                if not opened.done():
                    opened.set_exception(Unreachable(f"{self.url}: POST /session: the answer is empty"))
            except Exception as err:
                if not opened.done():
                    opened.set_exception(err)
            finally:
                self.session = None

        async def first() -> dict[str, Any]:
            self._holding = task = asyncio.ensure_future(hold())  # the loop alone would not keep it
            try:
                return await asyncio.wrap_future(opened)
            except BaseException:
                task.cancel()
                raise

        weights: str | None = self._wait(self._within(deadline, "POST /session", first())).get("weights")
        return weights

    def _headers(self, body: dict[str, Any] | bytes | None) -> dict[str, str]:
        return {**super()._headers(body), **({SESSION_HEADER: self.session} if self.session else {})}


def _reason(received: bytes) -> str:
    """What the server says in its own words, or the beginning of whatever it sent."""
    try:
        answer = json.loads(received)
        said = answer.get("error") or answer["message"]
        return str(said["message"] if isinstance(said, dict) else said)[:2000]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return shortened(received[:200].decode(errors="replace"))
