from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

torch.set_num_threads(1)  # toy models gain nothing from more, and lose much on a busy machine
settings.register_profile("lightrft", deadline=None)  # a busy machine is no failure
settings.load_profile("lightrft")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes first, so that no process has one of them left when the others are done."""
    items.sort(key=lambda item: not item.path.stem.endswith(("_distributed", "test_learning")))


@dataclass
class RankResult:
    """What one process of a job left behind."""

    returncode: int
    stdout: str
    stderr: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run_ranks(
    script: Path,
    *args: object,
    world_size: int = 2,
    timeout: float = 120,
    env: dict[str, str] | None = None,
    check: bool = True,
) -> list[RankResult]:
    """Run ``python script args...`` once a rank, with the variables that torchrun sets; kill all at `timeout`."""
    common = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        **(env or {}),
    }
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as files:
        # Files, since a rank that fills a pipe while another is waited for would hold up both.
        outputs = [
            [files.enter_context(tempfile.TemporaryFile("w+")) for _ in ("stdout", "stderr")] for _ in range(world_size)
        ]
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), *map(str, args)],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            for rank, (stdout, stderr) in enumerate(outputs)
        ]
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                for other in processes:
                    if other.poll() is None:
                        os.killpg(other.pid, signal.SIGKILL)
                process.wait()
        for file in itertools.chain(*outputs):
            file.seek(0)
        results = [
            RankResult(process.returncode, stdout.read(), stderr.read())
            for process, (stdout, stderr) in zip(processes, outputs, strict=True)
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
