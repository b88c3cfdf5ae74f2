"""What the engines behind HTTP share: rank 0 talks to a server, and goes on after a fault."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from lightrft_lightning.engines._client import Hanging, ServerFault, Unreachable, Unsure
from lightrft_lightning.engines._process import ServerProcess
from lightrft_lightning.engines._wire import KEY_VARIABLE
from lightrft_lightning.engines.base import EngineError, Generation
from lightrft_lightning.engines.masking import Mask
from lightrft_lightning.engines.weight_sync import EngineWithCopy, memory_reported
from lightrft_lightning.experience.trajectory import Completion, SamplingParams
from lightrft_lightning.models.export import save_without_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

T = TypeVar("T")
Request = tuple[Sequence[int], int, Sequence[Any]]  # token ids, stream, images

START = 300.0
"""Seconds that a server of its own has to start, at least: the deadline of calls may be far shorter."""
BACKOFF = 0.5
"""Seconds before the first repetition; twice as many before each further one."""


class ServedRollout(EngineWithCopy):
    """Base class of the engines behind HTTP.

    With several ranks, rank 0 talks to the server; prompts are gathered there and completions handed back. So
    `generate`, `update_weights`, `sleep` and `wake_up` are for all ranks together.

    What happens after a fault: a connection that is refused or breaks off, and an error on the server's side, are tried
    again after a pause, at most `retries` times. A server of its own that has died or hangs, or fails twice, is started
    again, gets the current weights, and the call is repeated with a new deadline. An update that failed starts from the
    beginning. Everything else is an `EngineError` that names the server, the call and the cause.

    Args:
        url: of a running server; None: rank 0 starts one, which ends with the training process.
        key: the server's; default: the environment variable ``LIGHTRFT_KEY``, or a new one for a server of its own.
        engine: its name, for messages.
        engine_args: the engine's arguments, for a server of its own; likewise
        port: to listen on; 0: a free one, and
        log_file: gets the server's output.
        retries: how often a call is repeated.
        settings: see `EngineWithCopy`.

    Raises:
        ValueError: an argument is out of range, or does not go with the others.
    """

    generates_elsewhere = True

    def __init__(
        self,
        url: str | None,
        key: str | None,
        engine: str,
        engine_args: Mapping[str, Any] | None,
        port: int,
        log_file: str | Path | None,
        retries: int,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.url, self.engine, self.port, self.retries = url, engine, port, retries
        self.engine_args = dict(engine_args or {})
        self.log_file = None if log_file is None else Path(log_file)
        self._check_arguments()
        key = (key or os.environ.get(KEY_VARIABLE, "")).strip()
        if url is not None and not key:
            raise ValueError(f"{self._name}(url={url!r}): set key=, or {KEY_VARIABLE}, to the key of the server")
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{self._name}: key=, or {KEY_VARIABLE}, must be one line of ASCII characters")
        self._key = key or secrets.token_urlsafe(32)
        self._mask = Mask(self._key)
        self._client: Any = None
        self._server: ServerProcess | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._connected = self._asleep = False
        self._server_sleeps = False  # on rank 0; one that was started again is awake
        self._sent: str | None = None  # the name, at the server, of the weights that it got last
        self._held: str | None = None  # the name of those that it had when it was reached
        self._source: Iterable[tuple[str, Tensor]] | None = None

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_arguments(self) -> None:
        if self.url is not None and "@" in self.url.partition("//")[2].partition("/")[0]:
            raise ValueError(
                f"{self._name}(url=...): has a user's name or password in it; the server asks for key= only"
            )
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{self._name}(url={self.url!r}): must be like http://127.0.0.1:8421")
        own = {"engine_args": self.engine_args, "port": self.port, "log_file": self.log_file}
        if self.url is not None and (given := {name: value for name, value in own.items() if value}):
            raise ValueError(f"{self._name}(url={self.url!r}): {given} are for a server that it starts; leave them out")
        if self.retries < 0:
            raise ValueError(f"{self._name}(retries={self.retries}): must be at least 0")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"{self._name}(port={self.port}): must be 0 (a free one) to {(1 << 16) - 1}")
        if self.log_file is not None and not self.log_file.parent.is_dir():
            raise ValueError(
                f"{self._name}(log_file={str(self.log_file)!r}): there is no folder {self.log_file.parent}"
            )

    # ---------------------------------------------------------------- the server's protocol, all on rank 0

    @abstractmethod
    def _reach(self) -> str | None:
        """Start the server if need be, and connect; returns the engine's data type, if it has one.

        It sets `_server` and `_client` as soon as there is one, `_held` and `_server_sleeps`.
        """

    def _reconnect(self, deadline: float) -> None:
        """Make a server that still runs ready for another call."""

    @abstractmethod
    def _ask(
        self, wanted: Mapping[int, Request], sampling: SamplingParams, end: float
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The groups of these requests by their number, as they are finished."""

    @abstractmethod
    def _send_to_sleep(self, level: int) -> None: ...

    @abstractmethod
    def _wake(self) -> None: ...

    # ---------------------------------------------------------------- life

    @override
    def connect(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if not self._connected:
            self.tokenizer = tokenizer
            self.know_tokens(model, tokenizer)
            self._connect(partial(self._save, model, tokenizer))

    def _save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.url is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lightrft_served_")
            save_without_weights(model, tokenizer, self._folder.name)

    def _connect(self, prepare: Callable[[], None]) -> None:
        def contact() -> tuple[str | None, bool]:
            prepare()
            return self._first_contact(), self.knows_files

        try:
            dtype, self.knows_files = self._on_rank_0(contact)
        except BaseException:
            self.close()
            raise
        self.dtype, self._connected = None if dtype is None else getattr(torch, dtype), True

    def _first_contact(self) -> str | None:
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

    @override
    def close(self) -> None:
        self._hang_up()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self._connected = self._asleep = self._server_sleeps = False
        self._source = None

    def _hang_up(self) -> None:
        """End the connection, and the server if it is this one's."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._server is not None:
            self._server.stop()
            self._server = None

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
        told = f"{self._name}({self.engine!r}): "
        if str(err).startswith(told):  # by an inner call
            return err
        lines = self._server.last_lines() if self._server is not None else []
        printed = "".join(f"\n    {line}" for line in lines)
        printed = f"\nThe last lines of the server's output:{printed}" if printed else ""
        message = self._mask(f"{told}{err}{printed}")
        return type(err)(message).with_traceback(err.__traceback__)

    def _of_rank_0(self) -> Any:
        if self._client is None:
            raise RuntimeError(f"{self._name} has no server yet: call connect(model, tokenizer) first")
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
        anew = self._server is None or failures > 1 or isinstance(err, Hanging | Unsure)
        if own and (anew or not (self._server is not None and self._server.alive(pause))):
            self._hang_up()
            self._reach()
            return time.monotonic() + self.deadline
        # Nobody can say of another's server that hangs whether it will answer the next time.
        if isinstance(err, Hanging) or time.monotonic() + pause > end:
            raise err
        time.sleep(pause)
        self._reconnect(end - time.monotonic())
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
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        streams: Sequence[int] | None = None,
        images: Sequence[Sequence[Any]] | None = None,
    ) -> list[list[Completion]]:
        """As in `RolloutEngine`; all ranks together.

        Raises:
            EngineError: see the class.
        """
        groups = dict(self.stream(prompts, sampling, streams, images))
        return [groups[i] for i in range(len(prompts))]

    @override
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        streams: Sequence[int] | None = None,
        images: Sequence[Sequence[Any]] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """As `generate`; with a single rank, group by group as they arrive."""
        self._check_awake()
        mine, first, left = self._requests(prompts, streams, images)
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

    def _requests(
        self, prompts: Sequence[Sequence[int]], streams: Sequence[int] | None, images: Sequence[Sequence[Any]] | None
    ) -> tuple[list[Request], int, dict[int, Request]]:
        """Those of this rank, the number of its first one among those of all ranks, and these by their number."""
        numbers = range(len(prompts)) if streams is None else streams
        mine: list[Request] = list(zip(prompts, numbers, images or [()] * len(prompts), strict=True))
        of_ranks: list[list[Request]] = self._gather(mine)
        everyones = [request for requests in of_ranks for request in requests]
        for i, (prompt, *_) in enumerate(everyones):
            if len(prompt) == 0 or min(prompt) < 0:
                wrong = f"holds token {min(prompt)}" if len(prompt) else "is empty"
                raise ValueError(f"prompt {i} {wrong}: it needs at least one token, and ids from 0 on")
        if not self.takes_images and any(shown for *_, shown in everyones):
            raise ValueError(f"images: {self._name} generates from text only, with this model")
        self.check_ids([prompt for prompt, *_ in everyones], any(shown for *_, shown in everyones))
        first = sum(map(len, of_ranks[: self._ranks()[0]]))
        return mine, first, dict(enumerate(everyones))

    @override
    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        streams: Sequence[int] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> Generation:
        self._check_awake()
        self._restore_weights()
        return _Begun(self, prompts, sampling, streams, on_group)

    def _arriving(
        self, wanted: Mapping[int, Request], sampling: SamplingParams, end: float
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The groups of these requests; several ranks get them when all are finished."""
        if self._ranks()[1] > 1:
            yield from self._on_rank_0(lambda: list(self._ask(wanted, sampling, end)))
            return
        try:
            yield from self._ask(wanted, sampling, end)
        except EngineError as err:
            raise self._with_last_lines(err) from err

    # ---------------------------------------------------------------- weights

    @override
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As in `EngineWithCopy`; all ranks together. It can begin again only what can be iterated again.

        Raises:
            EngineError: see the class.
            WeightMismatchError: the engine does not hold what was sent.
        """
        self._check_awake()
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
                f"{self._name}: the server has lost its weights, and they came from an iterator, which cannot be "
                "repeated: give update_weights a PolicyWeights or a list"
            )
        with torch.inference_mode(False), torch.no_grad():
            self.update_weights(self._source, self.version)

    # ---------------------------------------------------------------- memory

    @override
    def sleep(self, level: int = 1) -> None:
        def send() -> None:
            self._send_to_sleep(level)
            self._server_sleeps = True

        if self._connected and not self._asleep:
            with memory_reported(f"{self._name}.sleep({level})"):
                self._repeat(partial(self._on_rank_0, send))
            self._asleep = True

    @override
    def wake_up(self) -> None:
        def send() -> None:
            if self._server_sleeps:
                self._wake()
                self._server_sleeps = False

        if self._connected and self._asleep:
            with memory_reported(f"{self._name}.wake_up()"):
                self._repeat(partial(self._on_rank_0, send))
            self._asleep = False

    def _check_awake(self) -> None:
        if self._asleep:
            raise EngineError(f"{self._name}: the engine is asleep: call wake_up() first")


class _Begun(Generation):
    """What rank 0 asks a server for in the background; no rank hears of it before the end.

    The thread repeats nothing: a server that has lost the weights would get those that are changing at that moment.
    What is missing in the end is asked for again then.
    """

    def __init__(
        self,
        engine: ServedRollout,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        streams: Sequence[int] | None,
        on_group: Callable[[int, list[Completion]], None] | None,
    ) -> None:
        self._engine, self._sampling, self._told = engine, sampling, on_group
        self._mine, self._first, wanted = engine._requests(prompts, streams, None)
        rank, ranks = engine._ranks()
        self._alone = ranks == 1
        asked = engine._ask(wanted, sampling, time.monotonic() + engine.deadline) if rank == 0 else ()
        super().__init__(asked, on_group if self._alone else None)

    @override
    def finish(self) -> dict[int, list[Completion]]:
        self.wait()
        error = self.error
        if isinstance(error, EngineError):
            error = self._engine._with_last_lines(error)
        done, error = self._engine._gather((self.done, error))[0]
        if error is not None and not isinstance(error, Unreachable | ServerFault):
            raise error
        mine = {i: done[self._first + i] for i in range(len(self._mine)) if self._first + i in done}
        missing = [i for i in range(len(self._mine)) if i not in mine]
        if not self._alone:
            self._tell(mine)
        if error is not None:
            log.warning("%s; asking again for what is missing", error)
            requests = [self._mine[i] for i in missing]
            prompts, numbers = [r[0] for r in requests], [r[1] for r in requests]
            rest = {missing[k]: found for k, found in self._engine.stream(prompts, self._sampling, numbers)}
            self._tell(rest)
            mine |= rest
        return mine

    def _tell(self, groups: Mapping[int, list[Completion]]) -> None:
        if self._told is not None:
            for i, completions in groups.items():
                self._told(i, completions)
