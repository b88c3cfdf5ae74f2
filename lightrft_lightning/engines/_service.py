"""Inside ``lightrft serve``: the thread that owns the engine, what its weights are worth, and the folder for them."""

from __future__ import annotations

import contextlib
import queue
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request

from lightrft_lightning.engines import _wire as wire
from lightrft_lightning.engines._hosted import HostedEngine, load_bucket
from lightrft_lightning.engines.weight_sync import folder_in_memory

T = TypeVar("T")

FILE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\.safetensors")


class EngineThread(threading.Thread):
    """Everything that touches the engine happens here, one call after the other."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="engine")  # an engine that hangs does not keep the process
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self.start()

    def submit(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
        """Call `function` when the calls before it are done."""
        future: Future[T] = Future()
        self._calls.put((future, lambda: function(*args, **kwargs)))
        return future

    def run(self) -> None:
        while True:
            future, call = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as err:
                future.set_exception(err)


class _GivenUp(Exception):
    """Nobody waits for what is being generated."""


class Hosted:
    """An engine with the state of its weights; all methods run in the engine's thread.

    Attributes:
        weights: name of what the engine holds, a new one after each update; None: what it was started with.
    """

    def __init__(self, engine: HostedEngine) -> None:
        self.engine = engine
        self.weights: str | None = None
        self._unusable = ""
        self._updating = self._asleep = False
        self.closing = threading.Event()
        """Set to have the call that goes on end, and those that wait."""

    def generate(self, wanted: wire.Request, send: Callable[[Any], None], stop: threading.Event, end: float) -> None:
        """Hand each finished group to `send`, then how many they were; or the error.

        Args:
            wanted: what.
            send: takes them.
            stop: set when nobody waits for them any more.
            end: until when they are of use, by the monotonic clock.
        """
        done = 0

        def check() -> None:
            if stop.is_set() or self.closing.is_set():
                raise _GivenUp
            if time.monotonic() > end:
                told = f"{done} of {len(wanted.prompts)} prompts are finished after deadline={wanted.deadline:g} s"
                raise HTTPException(504, told)

        try:
            check()
            self._check_awake()
            if self._unusable:
                raise HTTPException(409, f"nothing can be generated: {self._unusable}")
            if wanted.weights not in (None, self.weights):
                raise HTTPException(409, f"the engine does not hold the weights {wanted.weights!r} any more")
            self.engine.deadline, self.engine.check_call = end - time.monotonic(), check
            groups: Any = self.engine.stream(wanted.prompts, wanted.sampling, wanted.streams)
            with contextlib.closing(groups):  # vLLM aborts what is not finished
                for i, completions in groups:
                    check()
                    send(wire.group_to_json(i, completions))
                    done += 1
            send({"done": len(wanted.prompts)})
        except _GivenUp:
            send(HTTPException(503, "the server is shutting down"))  # otherwise nobody reads it
        except Exception as err:
            send(err)
        finally:
            self.engine.check_call = None

    def begin(self) -> None:
        """Start an update, also in the place of one that was not finished."""
        self._check_awake()
        self._updating, self.weights, self._unusable = False, None, "an update could not be begun"
        self.engine._begin_update()
        self._updating, self._unusable = True, "an update is under way"

    def load(self, path: Path) -> None:
        """Load a bucket, and delete its file."""
        try:
            with self._in_update():
                load_bucket(self.engine, path)
        finally:
            path.unlink()

    def end(self, version: int) -> str:
        """Finish the update; returns the new `weights`."""
        with self._in_update():
            self.engine._end_update(version)
            self.engine.version = version
        self._updating, self._unusable, self.weights = False, "", secrets.token_hex(8)
        return self.weights

    @contextlib.contextmanager
    def _in_update(self) -> Iterator[None]:
        if not self._updating:
            raise HTTPException(409, f"no update is under way: begin one{self._unusable and f' ({self._unusable})'}")
        try:
            yield
        except Exception as err:
            self._updating = False
            self._unusable = f"the last update failed ({str(err)[:200]}), send all weights again"
            raise

    def abandon(self) -> None:
        """The trainer has gone: an unfinished update never ends."""
        if self._updating:
            self._updating, self._unusable = False, "the trainer left in the middle of an update, send all weights"

    def read(self, wanted: dict[str, tuple[int, int]], names: list[str] | None) -> dict[str, Any] | None:
        """See `EngineWithCopy._read_back`."""
        self._check_awake()
        held = self.engine._read_back(wanted, names)
        return None if held is None else wire.held_to_json(held)

    def sleep(self, level: int) -> None:
        if level > self.engine.sleep_level:
            allowed = self.engine.sleep_level
            raise HTTPException(
                409, f"level={level}: the server was started with --sleep-level {allowed}; restart it with {level}"
            )
        if not self._asleep:
            self.engine.sleep(level)
            self._asleep = True

    def wake_up(self) -> None:
        if self._asleep:
            self.engine.wake_up()
            self._asleep = False

    def _check_awake(self) -> None:
        if self._asleep:
            raise HTTPException(409, "the engine is asleep: POST /wake_up first")


class Exchange:
    """A private folder, in memory if possible, through which weights of the same machine come without HTTP.

    Who can read the file `nonce` in it is on the same machine, and the same user.
    """

    def __init__(self, room: int) -> None:
        self.folder = folder_in_memory("lightrft_", room)
        self.nonce = secrets.token_hex(16)
        (self.folder / "nonce").write_text(self.nonce)

    def find(self, name: str) -> Path:
        """The file that a client has put here.

        Raises:
            ValueError: there is no such plain file.
        """
        path = self.folder / name
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"file={wire.shortened(name)}: must be a plain name like bucket-1.safetensors")
        try:
            regular = stat.S_ISREG(path.lstat().st_mode)
        except FileNotFoundError:
            regular = False
        if not regular:
            raise ValueError(f"file={name!r}: there is no such plain file in {self.folder}")
        return path

    async def receive(self, request: Request) -> Path:
        """A request's body as a file, without holding it in memory twice."""
        path = self.folder / f"received-{secrets.token_hex(8)}.safetensors"
        try:
            with path.open("xb") as file:
                async for chunk in request.stream():
                    file.write(chunk)
        except BaseException:
            path.unlink()
            raise
        return path

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
