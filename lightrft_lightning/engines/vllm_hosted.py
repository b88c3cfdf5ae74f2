"""vLLM behind ``lightrft serve``, with workers of its own if it shares a model among several."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightrft_lightning.engines.vllm import VLLMRollout
from lightrft_lightning.engines.weight_sync import listed

log = logging.getLogger(__name__)

WORKERS = "tensor_parallel_size"
"""The engine argument for them: an argument of `VLLMRollout` itself is about ranks of the training."""


class VLLMCopy(VLLMRollout):
    """The engine with an update that must bring every parameter, for a server.

    Args:
        engine_args: as of `VLLMRollout`, and `tensor_parallel_size`, the number of its worker processes.
        settings: see `EngineWithCopy`.

    Raises:
        ValueError: an argument is out of range, or is none of vLLM's.
    """

    def __init__(self, engine_args: Mapping[str, Any], **settings: Any) -> None:
        super().__init__({name: value for name, value in engine_args.items() if name != WORKERS}, **settings)
        self._workers = engine_args.get(WORKERS, 1)
        if type(self._workers) is not int or self._workers < 1:
            raise ValueError(f"engine_args[{WORKERS!r}]={self._workers!r}: must be a whole number, at least 1")

    @override
    def start(self, folder: str, **defaults: Any) -> None:
        super().start(folder, **defaults, **{WORKERS: self._workers})
        self._call("lightrft_started")
        self._engine.engine_core.engine_core.model_executor.register_failure_callback(_end)

    def load_file(self, path: Path) -> None:
        """Put the tensors of a safetensors file in place."""
        self._call("lightrft_load", str(path))  # tensors cannot be handed to processes

    @override
    def _end_update(self, version: int) -> None:
        lacking = {name for of_worker in self._call("lightrft_end_update") for name in of_worker}
        self._forget_prefixes()
        if lacking:
            raise ValueError(f"the update lacks {listed(sorted(lacking))}: send every parameter of the model")


def _end() -> None:
    """A worker has died, and nothing can be computed any more: end the server, so that another one is started."""
    log.error("a worker process of vLLM has died: the server ends, start it again")
    os.kill(os.getpid(), signal.SIGTERM)
