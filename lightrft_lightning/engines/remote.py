"""An engine in another process or on another machine, behind ``lightrft serve``."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightrft_lightning._errors import import_extra, unknown_name
from lightrft_lightning.config import EngineType
from lightrft_lightning.engines import _wire as wire
from lightrft_lightning.engines._client import Client, Hanging, ServerFault, Unreachable
from lightrft_lightning.engines._process import ServerProcess
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.weight_sync import Bucket, EngineWithCopy, Held
from lightrft_lightning.experience.trajectory import Completion, SamplingParams
from lightrft_lightning.models.export import save_without_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
_Request = tuple[Sequence[int], int]  # token ids, stream

START = 300.0
"""Seconds that a server of its own has to start, at least: the deadline of calls may be far shorter."""
BACKOFF = 0.5
"""Seconds before the first repetition; twice as many before each further one."""


class RemoteRollout(EngineWithCopy):
    """Generates with an engine behind ``lightrft serve``: one that runs already, or one that it starts itself.

    With several ranks, rank 0 talks to the server; prompts are gathered there and completions handed back. So
    `generate`, `update_weights`, `sleep` and `wake_up` are for all ranks together. Where trainer and server see the
    same folder in memory, weights go through it, else through HTTP.

    What happens after a fault: a connection that is refused or breaks off, and an error on the server's side, are tried
    again after a pause, at most `retries` times. A server of its own that has died or hangs, or fails twice, is started
    again, gets the current weights, and the call is repeated with a new deadline. An update that failed starts from the
    beginning. Everything else is an `EngineError` that names the server, the call and the cause.

    Example:
        >>> trainer = Trainer(callbacks=[RemoteRollout("http://127.0.0.1:8421", key="...")])  # doctest: +SKIP

    Args:
        url: of a running server; None: rank 0 starts one, which ends with the training process.
        key: the server's; default: the environment variable ``LIGHTRFT_KEY``, or a new one for a server of its own.
        engine: ``vllm``, ``transformers`` or ``sglang``, for a server of its own; likewise
        engine_args: the engine's arguments; the data type is the trainer's unless it is given here,
        port: to listen on; 0: a free one, and
        log_file: gets the server's output.
        retries: how often a call is repeated.
        settings: see `EngineWithCopy`. `deadline` is for each HTTP call as a whole; a server of its own has at least
            five minutes to start. For a `sleep_level` above 0, a server that runs already must have been started with
            ``--sleep-level``.

    Raises:
        ValueError: an argument is out of range, or does not go with the others.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        engine: EngineType = "vllm",
        engine_args: Mapping[str, Any] | None = None,
        port: int = 0,
        log_file: str | Path | None = None,
        retries: int = 3,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.url, self.engine, self.port, self.retries = url, engine, port, retries
        self.engine_args = dict(engine_args or {})
        self.log_file = None if log_file is None else Path(log_file)
        self._check_arguments()
        key = (key or os.environ.get(wire.KEY_VARIABLE, "")).strip()
        if url is not None and not (key and key.isascii() and key.isprintable()):
            raise ValueError(f"RemoteRollout(url={url!r}): set key=, or {wire.KEY_VARIABLE}, to the key of the server")
        self._key = key or secrets.token_urlsafe(32)
        self._client: Client | None = None
        self._server: ServerProcess | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._exchange: Path | None = None
        self._limit = 0
        self._connected = self._asleep = False
        self._sent: str | None = None  # the server's name of the weights that it got last
        self._held: str | None = None  # the server's name of the weights that it had when the session was opened
        self._source: Iterable[tuple[str, Tensor]] | None = None

    def _check_arguments(self) -> None:
        if self.engine not in get_args(EngineType):
            raise ValueError(unknown_name("engine", self.engine, get_args(EngineType)))
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"RemoteRollout(url={self.url!r}): must be like http://127.0.0.1:8421")
        own = {"engine_args": self.engine_args, "port": self.port, "log_file": self.log_file}
        if self.url is not None and (given := {name: value for name, value in own.items() if value}):
            raise ValueError(
                f"RemoteRollout(url={self.url!r}): {given} are for a server that it starts; leave them out"
            )
        if self.retries < 0:
            raise ValueError(f"RemoteRollout(retries={self.retries}): must be at least 0")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"RemoteRollout(port={self.port}): must be 0 (a free one) to {(1 << 16) - 1}")
        if self.log_file is not None and not self.log_file.parent.is_dir():
            raise ValueError(
                f"RemoteRollout(log_file={str(self.log_file)!r}): there is no folder {self.log_file.parent}"
            )

    # ---------------------------------------------------------------- life

    @override
    def connect(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if self._connected:
            return
        self.tokenizer = tokenizer
        try:
            dtype = self._on_rank_0(partial(self._first_contact, model, tokenizer))
        except BaseException:
            self.close()
            raise
        self.dtype, self._connected = None if dtype is None else getattr(torch, dtype), True

    def _first_contact(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
        if self.url is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lightrft_remote_")
            save_without_weights(model, tokenizer, self._folder.name)
        end = time.monotonic() + self.deadline
        for failures in itertools.count():
            try:
                return self._reach()
            except Unreachable as err:
                pause = BACKOFF * 2**failures
                # A server of its own that does not start would not do so the next time.
                late = isinstance(err, Hanging) or time.monotonic() + pause > end
                if self.url is None or late or failures >= self.retries:
                    raise
                self._hang_up()
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _reach(self) -> str | None:
        """Start the server if need be, and become its trainer; returns the engine's data type, if it has one."""
        url, patience = self.url, self.deadline if self.url is not None else max(START, self.deadline)
        end = time.monotonic() + patience
        if url is None:
            self._server = ServerProcess(self._command(), self._key, self.log_file)
            url = self._server.url(patience)
        self._client = Client(url, self._key)
        about = self._client.call("GET", "/info", None, end - time.monotonic())
        try:
            dtype, limit, exchange = about["dtype"], int(about["max_request_bytes"]), about["exchange"]
            folder, nonce = Path(exchange["folder"]), str(exchange["nonce"])
            if dtype is not None and not isinstance(getattr(torch, dtype), torch.dtype):
                raise ValueError(dtype)
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise EngineError(f"{url}: GET /info: malformed answer {wire.shortened(about)}") from err
        self._limit, self._exchange = limit, folder if _reads(folder / "nonce", nonce) else None
        self._open_session(end - time.monotonic())
        return None if dtype is None else str(dtype)

    def _open_session(self, deadline: float) -> None:
        client = self._of_rank_0()
        self._held = client.open_session(deadline)
        client.call("POST", "/wake_up", {}, deadline)  # a trainer before may have left it asleep
        self._asleep = False

    def _command(self) -> list[str]:
        assert self._folder is not None
        dtype = str(getattr(self.strategy, "compute_dtype", torch.float32)).removeprefix("torch.")
        engine_args = json.dumps({"dtype": dtype, **self.engine_args})
        return [
            *(sys.executable, "-m", "lightrft_lightning.cli", "serve", "--model", self._folder.name),
            *("--engine", self.engine, "--engine-args", engine_args, "--port", str(self.port)),
            *("--sleep-level", str(self.sleep_level), "--empty-weights", "--exit-with-parent"),
        ]

    @override
    def close(self) -> None:
        self._hang_up()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self._connected = False
        self._source = None

    def _hang_up(self) -> None:
        """End the session, and the server if it is this one's."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._server is not None:
            self._server.stop()
            self._server = None
            if self._exchange is not None:  # if it was killed, it could not do this
                shutil.rmtree(self._exchange, ignore_errors=True)

    # ---------------------------------------------------------------- ranks

    def _ranks(self) -> tuple[int, int]:
        """Number of this rank, and of all."""
        return (0, 1) if self.strategy is None else (self.strategy.global_rank, self.strategy.world_size)

    def _gather(self, value: Any) -> list[Any]:
        return [value] if self.strategy is None else self.strategy.gather_objects(value)

    def _on_rank_0(self, call: Callable[[], T]) -> T:
        """What `call` gives on rank 0, on all ranks; its error is everyone's, so that nobody waits for ever."""
        outcome: tuple[Any, Exception | None] = (None, None)
        if self._ranks()[0] == 0:
            try:
                outcome = (call(), None)
            except EngineError as err:
                outcome = (None, self._with_last_lines(err))
            except Exception as err:
                outcome = (None, err if self._ranks()[1] == 1 else RuntimeError(f"rank 0: {type(err).__name__}: {err}"))
        value, error = self._gather(outcome)[0]
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def _with_last_lines(self, err: EngineError) -> EngineError:
        lines = self._server.last_lines() if self._server is not None else []
        told = "".join(f"\n    {line}" for line in lines)
        told = f"\nThe last lines of the server's output:{told}" if told else ""
        return type(err)(f"RemoteRollout({self.engine!r}): {err}{told}").with_traceback(err.__traceback__)

    def _of_rank_0(self) -> Client:
        if self._client is None:
            raise RuntimeError("RemoteRollout has no server yet: call connect(model, tokenizer) first")
        return self._client

    # ---------------------------------------------------------------- faults

    def _recover(self, err: EngineError, failures: int, end: float) -> float:
        """On rank 0, get a server again that can be asked once more; returns until when it has to answer.

        Args:
            err: what went wrong.
            failures: how often it did.
            end: until when the call had to be answered.

        Raises:
            EngineError: the deadline has passed, or there is still no server.
        """
        own, pause = self._server is not None or self.url is None, BACKOFF * 2 ** (failures - 1)
        if own and (self._server is None or failures > 1 or isinstance(err, Hanging) or not self._server.alive(pause)):
            self._hang_up()
            self._reach()
            return time.monotonic() + self.deadline
        if time.monotonic() + pause > end:
            raise err
        time.sleep(pause)
        if self._of_rank_0().session is None:
            self._open_session(end - time.monotonic())
        return end

    def _repeat(self, call: Callable[[], T]) -> T:
        """`call`, which all ranks make together, again if it fails in a way that may pass."""
        error: EngineError | None = None
        for failures in itertools.count():
            try:
                if error is not None:
                    self._on_rank_0(partial(self._recover, error, failures, time.monotonic() + self.deadline))
                return call()
            except (Unreachable, ServerFault) as err:
                error = err
                if failures >= self.retries:
                    raise
        raise AssertionError("unreachable")

    def _weights_are_lost(self) -> bool:
        return self._sent is not None and self._held != self._sent

    # ---------------------------------------------------------------- generation

    @override
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, streams: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """As in `RolloutEngine`; all ranks together.

        Raises:
            EngineError: see the class.
        """
        groups = dict(self.stream(prompts, sampling, streams))
        return [groups[i] for i in range(len(prompts))]

    @override
    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, streams: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """As `generate`; with a single rank, group by group as they arrive."""
        mine: list[_Request] = list(zip(prompts, range(len(prompts)) if streams is None else streams, strict=True))
        of_ranks: list[list[_Request]] = self._gather(mine)
        first = sum(map(len, of_ranks[: self._ranks()[0]]))
        left = dict(enumerate(request for requests in of_ranks for request in requests))
        failures, error, end = 0, None, time.monotonic() + self.deadline
        while left:
            try:
                if error is not None:
                    end = self._on_rank_0(partial(self._recover, error, failures, end))
                self._restore_weights()
                for i, completions in self._arriving(dict(left), sampling, end):
                    del left[i]
                    if first <= i < first + len(mine):
                        yield i - first, completions
            except (Unreachable, ServerFault) as err:
                failures, error = failures + 1, err
                if failures > self.retries:
                    raise

    def _arriving(
        self, wanted: Mapping[int, _Request], sampling: SamplingParams, end: float
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The groups of these requests; several ranks get them when all are finished."""
        if self._ranks()[1] > 1:
            yield from self._on_rank_0(lambda: list(self._ask(wanted, sampling, end)))
            return
        try:
            yield from self._ask(wanted, sampling, end)
        except EngineError as err:
            raise self._with_last_lines(err) from err

    def _ask(
        self, wanted: Mapping[int, _Request], sampling: SamplingParams, end: float
    ) -> Iterator[tuple[int, list[Completion]]]:
        client, deadline = self._of_rank_0(), end - time.monotonic()
        where = f"{client.url}: POST /generate"
        numbers = list(wanted)
        prompts = [list(map(int, wanted[i][0])) for i in numbers]
        request = wire.Request(prompts, sampling, [wanted[i][1] for i in numbers], self._sent, deadline)
        missing = set(range(len(numbers)))
        with contextlib.closing(client.lines("/generate", request.to_json(), deadline)) as lines:
            for line in lines:
                if "error" in line:
                    raise ServerFault(f"{where}: {line['error']}")
                if "done" in line:
                    break
                try:
                    at, completions = wire.group_from_json(line, sampling)
                except EngineError as err:
                    raise EngineError(f"{where}: {err}") from err
                if at not in missing:
                    raise EngineError(f"{where}: malformed answer: prompt {at} was not asked for, or came twice")
                missing.remove(at)
                yield numbers[at], completions
            else:
                raise Unreachable(
                    f"{where}: the answer broke off, {len(missing)} of {len(numbers)} prompts are missing"
                )
        if missing:
            raise EngineError(f"{where}: malformed answer: {len(missing)} of {len(numbers)} prompts are missing")

    # ---------------------------------------------------------------- weights

    @override
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As in `EngineWithCopy`; all ranks together. It can begin again only what can be iterated again.

        Raises:
            EngineError: see the class.
            WeightMismatchError: the engine does not hold what was sent.
        """
        self._source = None if iter(named_tensors) is named_tensors else named_tensors
        update = partial(super().update_weights, named_tensors, version)
        if self._source is None:
            update()
        else:
            self._repeat(update)

    def _restore_weights(self) -> None:
        """Send the current weights to a server that has lost them."""
        if not self._on_rank_0(self._weights_are_lost):
            return
        if self._source is None:
            raise EngineError(
                "RemoteRollout: the server has lost its weights, and they came from an iterator, which cannot be "
                "repeated: give update_weights a PolicyWeights or a list"
            )
        with torch.inference_mode(False), torch.no_grad():
            self.update_weights(self._source, self.version)

    @override
    def _begin_update(self) -> None:
        self._on_rank_0(partial(self._post, "/weights/begin", {}))

    @override
    def _load(self, bucket: Bucket) -> None:
        self._on_rank_0(partial(self._send, dict(bucket)))

    def _send(self, tensors: dict[str, Tensor]) -> None:
        safetensors = import_extra("safetensors.torch", "hf")
        if self._exchange is not None:
            file = self._exchange / f"sent-{secrets.token_hex(8)}.safetensors"
            try:
                safetensors.save_file(tensors, file)
                self._post("/weights/bucket", {"file": file.name})
            finally:
                file.unlink(missing_ok=True)  # the server has done so, unless it failed
            return
        data = safetensors.save(tensors)
        if len(data) > self._limit:
            raise EngineError(
                f"{self._of_rank_0().url}: {', '.join(map(repr, tensors))}: {len(data)} bytes are more than the server "
                f"takes in one request, {self._limit}: lower bucket_mb, or start it with a larger --max-request-mb"
            )
        self._post("/weights/bucket", data)

    @override
    def _end_update(self, version: int) -> None:
        answer = self._on_rank_0(partial(self._post, "/weights/end", {"version": version}))
        self._sent = self._held = answer.get("weights")

    @override
    def _read_back(self, wanted: Mapping[str, tuple[int, int]], names: Sequence[str] | None) -> Held | None:
        answer = self._on_rank_0(partial(self._post, "/weights/read", {"wanted": wanted, "names": names}))
        held = answer.get("held")
        return None if held is None else wire.held_from_json(held)

    def _post(self, path: str, body: dict[str, Any] | bytes) -> dict[str, Any]:
        client = self._of_rank_0()
        if client.session is None:
            raise Unreachable(f"{client.url}: POST {path}: the connection to the server is lost")
        return client.call("POST", path, body, self.deadline)

    # ---------------------------------------------------------------- memory

    @override
    def sleep(self, level: int = 1) -> None:
        if self._connected and not self._asleep:
            self._repeat(partial(self._on_rank_0, partial(self._post, "/sleep", {"level": level})))
            self._asleep = True

    @override
    def wake_up(self) -> None:
        if self._connected and self._asleep:
            self._repeat(partial(self._on_rank_0, partial(self._post, "/wake_up", {})))
            self._asleep = False


def _reads(path: Path, content: str) -> bool:
    try:
        return path.read_text() == content
    except OSError:  # another machine, or another user
        return False
