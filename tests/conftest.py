from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

import pytest
import torch
from hypothesis import settings
from preloaded import start as preloaded_script

from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

# Toy models gain nothing from more, and lose much on a busy machine.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where it is set, each of the hundreds of interpreters would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
settings.register_profile("lightrft", deadline=None)  # a busy machine is no failure
settings.load_profile("lightrft")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes first, so that no process has one of them left when the others are done."""
    items.sort(key=lambda item: not item.path.stem.endswith(("_distributed", "test_learning")))


@pytest.fixture(autouse=True, scope="module")
def what_is_imported_is_no_garbage():
    """Otherwise each full collection of a test walks through all of it, up to a second long."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or extension modules say at the end that they leak


@dataclass
class RankResult:
    """What one process of a job left behind."""

    returncode: int
    stdout: str
    stderr: str


def free_port() -> int:
    """Below those that the kernel deals out, which any connection of another test could be given in the meantime."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
            return listener.getsockname()[1]


def fresh_script(script: Path, arguments: list[str], env: dict[str, str], stdout: TextIO, stderr: TextIO):
    command = [sys.executable, str(script), *arguments]
    return subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr, start_new_session=True)


def _exit_code(process, job: list, deadline: float) -> int:
    """That of one process of a `job`, all of whose processes are killed at `deadline`."""
    wait = process.join if isinstance(process, BaseProcess) else process.wait
    with contextlib.suppress(subprocess.TimeoutExpired):
        wait(max(0.1, deadline - time.monotonic()))
    if _code(process) is None:
        for other in job:
            if _code(other) is None:
                os.killpg(other.pid, signal.SIGKILL)
        wait()
    return _code(process)


def _code(process) -> int | None:
    return process.exitcode if isinstance(process, BaseProcess) else process.poll()


def _run_ranks(
    script: Path,
    *args: object,
    world_size: int = 2,
    timeout: float = 120,
    env: dict[str, str] | None = None,
    check: bool = True,
    preloaded: bool = True,
) -> list[RankResult]:
    """Run ``python script args...`` once a rank, with the variables that torchrun sets; kill all at `timeout`.

    Of one process alone these are left out. Without `preloaded` each is an interpreter of its own, for scripts about
    how these start and end.
    """
    common = {name: value for name, value in os.environ.items() if not name.endswith(("RANK", "WORLD_SIZE"))}
    common |= {"OMP_NUM_THREADS": "1", **(env or {})}
    size, port = str(world_size), str(free_port())
    launched = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables = [{**common, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    if world_size == 1:
        variables = [common]
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as files:
        # Files, since a rank that fills a pipe while another is waited for would hold up both.
        outputs = [
            [files.enter_context(tempfile.TemporaryFile("w+")) for _ in ("stdout", "stderr")] for _ in range(world_size)
        ]
        start = preloaded_script if preloaded else fresh_script
        processes = [
            start(script, [*map(str, args)], of_rank, *files) for of_rank, files in zip(variables, outputs, strict=True)
        ]
        codes = [_exit_code(process, processes, deadline) for process in processes]
        for file in itertools.chain(*outputs):
            file.seek(0)
        results = [
            RankResult(code, stdout.read(), stderr.read())
            for code, (stdout, stderr) in zip(codes, outputs, strict=True)
        ]
    if check and any(r.returncode for r in results):
        tails = "\n".join(f"--- rank {k}: exit {r.returncode}\n{r.stderr[-3000:]}" for k, r in enumerate(results))
        pytest.fail(f"{script.name} {args}\n{tails}")
    return results


@pytest.fixture(scope="session")
def run_ranks():
    """`_run_ranks`: a script as a job of several processes."""
    return _run_ranks


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One id a character; shared by all tests, which must not change it."""
    return char_tokenizer()


@pytest.fixture
def tiny_model():
    """A random two-layer Llama for `tiny_tokenizer`; a fresh one for each test, so that it may be trained."""
    return tiny_llama(seed=0, width=32, layers=2)


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """`flex_attention` with gradients on the CPU, uncompiled: torch has the arithmetic but refuses to run it there."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    with torch.compiler.set_stance("force_eager"):
        yield
