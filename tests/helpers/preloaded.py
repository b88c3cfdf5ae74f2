"""Runs scripts in processes that have the heavy packages already: half of a short job's time is importing them."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

_PACKAGES = [
    "torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo",
    "lightning.pytorch", "transformers", "transformers.models.llama.modeling_llama", "transformers.optimization",
    "transformers.models.auto.modeling_auto", "transformers.modeling_utils", "deepspeed", "deepspeed.runtime.engine",
    "peft", "pytest",
    "lightrft_lightning", "lightrft_lightning.cli", "lightrft_lightning.strategies.deepspeed",
    "lightrft_lightning.strategies.fsdp", "lightrft_lightning.engines.transformers",
]  # fmt: skip
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(_PACKAGES)


def start(
    script: Path, arguments: Sequence[str], env: Mapping[str, str], stdout: TextIO, stderr: TextIO
) -> BaseProcess:
    """Start ``python script arguments...``, in a session of its own, as a fork of a process with the packages."""
    files = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (stdout, stderr)]
    process = _server.Process(target=_run, args=(str(script), list(arguments), dict(env), files, os.getcwd()))
    process.start()
    return process


def _run(script: str, arguments: list[str], env: dict[str, str], files: list[str], folder: str) -> None:
    # Nothing of the packages is garbage, and each of the many full collections of DeepSpeed would walk through them.
    gc.freeze()
    os.setsid()
    for target, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), target)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    multiprocessing.set_start_method(None, force=True)  # what a script finds in an interpreter of its own
    sys.argv = [script, *arguments]
    sys.path[:0] = [str(Path(script).parent), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())  # which `multiprocessing` leaves out, too
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # which a process of `multiprocessing` leaves out
