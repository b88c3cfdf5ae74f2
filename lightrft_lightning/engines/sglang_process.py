"""SGLang as a process of the trainer's own: the arguments that it gets, and what it would leave behind."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from lightrft_lightning.engines import _sglang_server
from lightrft_lightning.engines._process import ServerProcess
from lightrft_lightning.engines.masking import open_private

OURS = (
    *("model_path", "host", "port", "api_key", "admin_api_key", "tp_size", "tensor_parallel_size", "load_format"),
    *("weight_version", "skip_tokenizer_init", "enable_memory_saver", "enable_weights_cpu_backup", "config"),
    *("pp_size", "pipeline_parallel_size", "nnodes", "node_rank"),  # 1: later stages do not say what they hold
)
"""Engine arguments that follow from the model, the ranks, the weight sync or the sleep level."""
DEFAULTS = {
    "mem_fraction_static": 0.3,  # of the GPU's memory: the trainer needs the rest
    "enable_deterministic_inference": True,  # without it, SGLang ignores the seeds of requests
    "random_seed": 0,
    "sleep_on_idle": True,  # otherwise each replica takes a core from the trainer while it waits for requests
    "trust_remote_code": False,
}


class SGLangProcess(ServerProcess):
    """Runs SGLang's server. What it puts into shared memory goes with it, also if it is killed.

    Args:
        arguments: of the server; they are in a file, because everybody can see those of a command.
        folder: with the model; gets that file, and what SGLang leaves in a folder for temporary files.
        key: see `ServerProcess`; likewise
        log_file: gets the output.
    """

    def __init__(self, arguments: Mapping[str, Any], folder: str, key: str, log_file: Path | None) -> None:
        path = Path(folder, "sglang.json")
        with open(open_private(path, os.O_WRONLY | os.O_TRUNC), "w") as file:
            json.dump(arguments, file, indent=1, default=_as_argument)
        self._in_memory: set[str] = set()
        super().__init__([sys.executable, _sglang_server.__file__, str(path)], key, log_file)

    def note_files(self) -> bool:
        """Remember what it has in shared memory: nobody can tell once it is killed; returns whether there is any."""
        self._in_memory.update(_sglang_server.files_in_memory(self.pid))
        return bool(self._in_memory)

    @override
    def stop(self) -> None:
        if self._process.returncode is None:  # otherwise the number may be another process's by now
            self.note_files()
        super().stop()
        for file in self._in_memory:
            Path(file).unlink(missing_ok=True)


def _as_argument(value: Any) -> str:
    """What JSON cannot hold."""
    if isinstance(value, Path | torch.dtype):
        return str(value).removeprefix("torch.")
    raise ValueError(f"engine_args: {value!r} is no argument of a command: give text, a number, a list or a mapping")


def free_port() -> int:
    """One on which nobody listens at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
