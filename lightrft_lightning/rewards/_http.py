"""HTTP calls to servers that all do the same: balanced, repeated where that may help, and not sent to dead ones."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import os
import random
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightrft_lightning._errors import import_extra, unknown_name
from lightrft_lightning._find import check_named


class ServerError(RuntimeError):
    """No usable answer; the message names the server and what was wrong."""


class _Passing(ServerError):
    """A failure that may be gone at the next attempt."""


@dataclass
class _Server:
    url: str
    order: int
    outstanding: int = 0
    failures: int = 0
    """Consecutive ones."""
    retry_at: float = 0.0
    on_trial: bool = False
    problem: str = ""


class Servers:
    """One or several servers behind one `post`.

    A request goes to the server with the fewest requests under way. A server that fails `breaker_failures` times in a
    row gets no request for `breaker_pause` seconds, then a single one that decides (a circuit breaker, one a server;
    https://martinfowler.com/bliki/CircuitBreaker.html). Connection errors, silence and the statuses 429 and 5xx are
    tried again, elsewhere if possible, after a pause that doubles each time, with jitter. Any other answer stands.

    Args:
        url: ``http://...`` or ``https://...``, or several.
        path: added to each.
        key_env: name of the environment variable with the key that is sent as ``Authorization: Bearer``. Not the key
            itself, because settings are saved with checkpoints.
        timeout: seconds for one whole answer.
        connect_timeout: seconds for a connection.
        retries: attempts after the first one.
        backoff: seconds before the first of them.
        breaker_failures: see above.
        breaker_pause: see above.
        max_bytes: size of the largest answer that is read.

    Raises:
        ValueError: a URL or a number that cannot be, or a variable that is not set.
        ImportError: httpx is missing.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        path: str = "",
        key_env: str | None = None,
        timeout: float = 20.0,
        connect_timeout: float = 5.0,
        retries: int = 3,
        backoff: float = 0.5,
        breaker_failures: int = 5,
        breaker_pause: float = 30.0,
        max_bytes: int = 16 << 20,
    ) -> None:
        self._settings = {name: value for name, value in locals().items() if name != "self"}
        urls: list[Any] = [url] if isinstance(url, str) else list(url)
        for one in urls or [url]:
            if not isinstance(one, str) or not one.startswith(("http://", "https://")):
                raise ValueError(f"url={one!r}: must begin with http:// or https://")
            if "@" in one.partition("//")[2].partition("/")[0]:
                raise ValueError(
                    "url=...: has a user's name or password in it, which would be saved with checkpoints: give the "
                    "server a key, and key_env= the name of a variable that holds it"
                )
        checks = {
            "timeout": (timeout > 0, "above 0"),
            "connect_timeout": (connect_timeout > 0, "above 0"),
            "retries": (retries >= 0, "0 or more"),
            "backoff": (backoff >= 0, "0 or more"),
            "breaker_failures": (breaker_failures >= 1, "at least 1"),
            "breaker_pause": (breaker_pause >= 0, "0 or more"),
            "max_bytes": (max_bytes >= 1, "at least 1"),
        }
        for name, (ok, allowed) in checks.items():
            if not ok:
                raise ValueError(f"{name}={self._settings[name]!r}: must be {allowed}")
        if key_env is not None:
            check_named("key_env", key_env, "rewards=...")
        if key_env is not None and not os.environ.get(key_env):
            raise ValueError(f"key_env={key_env!r}: the environment variable is not set")
        self.timeout, self.retries, self.backoff, self.max_bytes = timeout, retries, backoff, max_bytes
        self.breaker_failures, self.breaker_pause = breaker_failures, breaker_pause
        self._servers = [_Server(one.rstrip("/") + path, i) for i, one in enumerate(urls)]
        self._turn = itertools.count()
        self._lock = threading.Lock()
        self._jitter = random.SystemRandom()  # the global generator belongs to the training
        self._httpx: Any = import_extra("httpx", "remote")
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[key_env]}"
        self._client_settings = {
            "headers": headers,
            "timeout": self._httpx.Timeout(None, connect=connect_timeout),  # an attempt as a whole has one
            "limits": self._httpx.Limits(max_connections=None, max_keepalive_connections=20),
            "trust_env": any(
                one.startswith("https") for one in urls
            ),  # a proxy of the environment is not for neighbours
        }
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def of(cls, reward: str, url: str | Sequence[str], path: str, options: Mapping[str, Any]) -> Servers:
        """With the remaining options of a reward.

        Raises:
            ValueError: one of them does not exist; and as `Servers`.
        """
        known = set(inspect.signature(cls).parameters) - {"url", "path"}
        for option in options:
            if option not in known:
                raise ValueError(unknown_name(f"option of reward {reward!r}", option, known))
        return cls(url, path=path, **options)

    def __reduce__(self) -> Any:
        return _rebuilt, (self._settings,)

    def post(self, body: Mapping[str, Any]) -> Any:
        """The JSON that a server answers to `body`.

        Raises:
            ServerError: no server can be asked, all attempts failed, or the answer is no JSON, too large or a refusal.
            TypeError: `body` cannot be written as JSON.
        """
        content = json.dumps(body).encode()
        before: _Server | None = None
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1) * self._jitter.uniform(0.5, 1.5))
            try:
                with self._chosen(before) as before:
                    return self._ask(before.url, content)
            except _Passing as err:
                last = err
        raise ServerError(f"{last} (attempt {self.retries + 1})") from last

    @contextmanager
    def _chosen(self, avoid: _Server | None) -> Iterator[_Server]:
        """A server for one request; what comes of it is remembered."""
        with self._lock:
            now = time.monotonic()
            able = [s for s in self._servers if not self._is_broken(s) or (s.retry_at <= now and not s.on_trial)]
            if not able:
                problems = "; ".join(s.problem for s in self._servers)
                raise ServerError(f"out of order, not asked again for up to {self.breaker_pause:g} s: {problems}")
            turn = next(self._turn)
            server = min(able, key=lambda s: (s is avoid, s.outstanding, (s.order - turn) % len(self._servers)))
            server.outstanding += 1
            server.on_trial = self._is_broken(server)
        problem = ""
        try:
            yield server
        except _Passing as err:
            problem = str(err)
            raise
        finally:
            with self._lock:
                server.outstanding -= 1
                server.on_trial = False
                server.problem, server.failures = problem, server.failures + 1 if problem else 0
                server.retry_at = time.monotonic() + self.breaker_pause

    def _is_broken(self, server: _Server) -> bool:
        return server.failures >= self.breaker_failures

    def _ask(self, url: str, content: bytes) -> Any:
        under_way = asyncio.run_coroutine_threadsafe(self._within_timeout(url, content), self._running_loop())
        try:
            status, received = under_way.result()
        except self._httpx.TransportError as err:
            raise _Passing(f"{url}: {type(err).__name__}: {err}") from err
        finally:
            under_way.cancel()
        if status != 200:
            kind = _Passing if status == 429 or status >= 500 else ServerError
            raise kind(f"{url}: status {status}: {_shortened(received)}")
        try:
            return json.loads(received)
        except (ValueError, RecursionError) as err:
            raise ServerError(f"{url}: the answer is no JSON: {_shortened(received)}") from err

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """In a thread of its own: there an answer can be given up at any point, also one whose header has no end."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._client = self._httpx.AsyncClient(**self._client_settings)
                threading.Thread(target=self._loop.run_forever, daemon=True, name="reward servers").start()
                weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
            return self._loop

    async def _within_timeout(self, url: str, content: bytes) -> tuple[int, bytearray]:
        try:
            return await asyncio.wait_for(self._receive(url, content), self.timeout)
        except (TimeoutError, asyncio.TimeoutError) as err:  # one and the same from Python 3.11
            raise _Passing(f"{url}: no complete answer within {self.timeout:g} s") from err

    async def _receive(self, url: str, content: bytes) -> tuple[int, bytearray]:
        received = bytearray()
        async with self._client.stream("POST", url, content=content) as response:
            encoding = response.headers.get("content-encoding", "identity")
            if encoding.strip().lower() != "identity":  # nobody knows how much would come out
                raise ServerError(f"{url}: the answer has the encoding {encoding!r}, which was not asked for")
            async for chunk in response.aiter_raw():
                received += chunk
                if len(received) > self.max_bytes:
                    raise ServerError(f"{url}: the answer is larger than max_bytes={self.max_bytes}")
        return response.status_code, received


def _rebuilt(settings: Mapping[str, Any]) -> Servers:
    return Servers(**settings)


def _shortened(received: bytes | bytearray) -> str:
    return repr(bytes(received[:200]).decode(errors="replace"))
