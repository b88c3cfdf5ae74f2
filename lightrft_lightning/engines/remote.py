"""An engine in another process or on another machine, behind ``lightrft serve``."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightrft_lightning._errors import import_extra, unknown_name
from lightrft_lightning.engines import _wire as wire
from lightrft_lightning.engines._client import ServerFault, SessionClient, Unreachable
from lightrft_lightning.engines._cpus import halves, parse_cpus
from lightrft_lightning.engines._process import ServerProcess
from lightrft_lightning.engines._served import START, Request, ServedRollout
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.weight_sync import Bucket, Held
from lightrft_lightning.experience.trajectory import Completion, SamplingParams


class RemoteRollout(ServedRollout):
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
        engine: ``vllm`` or ``transformers``, for a server of its own; likewise
        engine_args: the engine's arguments; the data type is the trainer's unless it is given here,
        port: to listen on; 0: a free one, and
        log_file: gets the server's output.
        cpus: those that a server of its own computes on, like ``0-3,6``. None: all; with ``staleness=1`` and without a
            GPU half of them, and the trainer computes with as many threads as there are others: on the same CPUs the
            two would wait for each other.
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
        engine: str = "vllm",
        engine_args: Mapping[str, Any] | None = None,
        port: int = 0,
        log_file: str | Path | None = None,
        retries: int = 3,
        cpus: str | None = None,
        **settings: Any,
    ) -> None:
        if cpus is not None:
            parse_cpus(cpus)
            if url is not None:
                raise ValueError(
                    f"cpus={cpus!r} with url={url!r}: start that server with `lightrft serve --cpus {cpus}`"
                )
        self.cpus, self._threads = cpus, 0
        if engine not in wire.HOSTED:
            raise ValueError(unknown_name("engine", engine, wire.HOSTED))
        super().__init__(url, key, engine, engine_args, port, log_file, retries, **settings)
        self._exchange: Path | None = None
        self._limit = 0

    # ---------------------------------------------------------------- life

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        beside = getattr(pl_module, "staleness", 0) and trainer.state.fn == TrainerFn.FITTING
        if beside and trainer.world_size == 1 and pl_module.device.type == "cpu" and self.url is None:
            parts = halves()
            if self.cpus is None and not self._connected and parts is not None:
                self._threads, (kept, self.cpus) = torch.get_num_threads(), parts
                torch.set_num_threads(min(self._threads, kept))
        super().on_fit_start(trainer, pl_module)

    @override
    def close(self) -> None:
        super().close()
        if self._threads:
            torch.set_num_threads(self._threads)
            self.cpus, self._threads = None, 0

    @override
    def _reach(self) -> str | None:
        url, patience = self.url, self.deadline if self.url is not None else max(START, self.deadline)
        end = time.monotonic() + patience
        if url is None:
            self._server = ServerProcess(self._command(), self._key, self.log_file)
            url = self._server.url(patience)
        self._client = SessionClient(url, self._key)
        about = self._client.call("GET", "/info", None, end - time.monotonic())
        try:
            dtype, limit, exchange = about["dtype"], int(about["max_request_bytes"]), about["exchange"]
            folder, nonce = Path(exchange["folder"]), str(exchange["nonce"])
            if dtype is not None and not isinstance(getattr(torch, dtype), torch.dtype):
                raise ValueError(dtype)
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise EngineError(f"{url}: GET /info: malformed answer {wire.shortened(about)}") from err
        self.knows_files = about.get("engine") != "transformers"
        self._limit, self._exchange = limit, folder if _reads(folder / "nonce", nonce) else None
        self._open_session(end - time.monotonic())
        return None if dtype is None else str(dtype)

    def _open_session(self, deadline: float) -> None:
        client = self._of_rank_0()
        self._held = client.open_session(deadline)
        client.call("POST", "/wake_up", {}, deadline)  # a trainer before may have left it asleep
        self._server_sleeps = False

    @override
    def _reconnect(self, deadline: float) -> None:
        if self._of_rank_0().session is None:
            self._open_session(deadline)

    def _command(self) -> list[str]:
        assert self._folder is not None
        dtype = str(getattr(self.strategy, "compute_dtype", torch.float32)).removeprefix("torch.")
        engine_args = json.dumps({"dtype": dtype, **self.engine_args})
        return [
            *(sys.executable, "-m", "lightrft_lightning.cli", "serve", "--model", self._folder.name),
            *("--engine", self.engine, "--engine-args", engine_args, "--port", str(self.port)),
            *("--sleep-level", str(self.sleep_level), "--empty-weights", "--exit-with-parent"),
            *(() if self.cpus is None else ("--cpus", self.cpus)),
        ]

    @override
    def _hang_up(self) -> None:
        own = self._server is not None
        super()._hang_up()
        if own and self._exchange is not None:  # a server that was killed could not do this
            shutil.rmtree(self._exchange, ignore_errors=True)

    # ---------------------------------------------------------------- generation

    @override
    def _ask(
        self, wanted: Mapping[int, Request], sampling: SamplingParams, end: float
    ) -> Iterator[tuple[int, list[Completion]]]:
        client, deadline = self._of_rank_0(), min(end - time.monotonic(), wire.LONGEST)
        where = f"{client.url}: POST /generate"
        numbers = list(wanted)
        prompts = [list(map(int, wanted[i][0])) for i in numbers]
        request = wire.Request(prompts, sampling, [wanted[i][1] for i in numbers], self._sent, deadline)
        missing = set(range(len(numbers)))
        most = wire.most_bytes(sampling)
        with contextlib.closing(
            client.lines("/generate", request.to_json(), deadline, most, len(numbers) + 1)
        ) as lines:
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
    def _send_to_sleep(self, level: int) -> None:
        self._post("/sleep", {"level": level})

    @override
    def _wake(self) -> None:
        self._post("/wake_up", {})


def _reads(path: Path, content: str) -> bool:
    try:
        return path.read_text() == content
    except OSError:  # another machine, or another user
        return False
