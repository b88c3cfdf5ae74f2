"""What a run would run on, measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lightrft_lightning.planning.settings import PRECISIONS, Planned


@dataclass(frozen=True)
class Machine:
    """What a rank runs on; None: unknown.

    Attributes:
        memory: bytes.
        flops: of matrix products, a second, in the precision of the run.
        bandwidth: bytes that it reads from its memory, a second.
    """

    memory: float | None = None
    flops: float | None = None
    bandwidth: float | None = None


UNKNOWN = Machine()


def this_machine(planned: Planned) -> Machine:
    """What is here, measured in about a second; nothing is known of GPUs if there are none."""
    gpu = planned.accelerator == "gpu"
    if gpu and not torch.cuda.is_available():
        return Machine()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = PRECISIONS[planned.precision]
    memory = (
        torch.cuda.get_device_properties(device).total_memory
        if gpu
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / planned.gpus
    )
    side, copied = (8192, 1 << 30) if gpu else (2048, 1 << 28)
    square = torch.randn(side, side, device=device, dtype=dtype)
    block = torch.zeros(copied, dtype=torch.uint8, device=device)
    product, copy_ = (_seconds(call, device) for call in (lambda: square @ square, block.clone))
    share = 1 if gpu else planned.gpus  # processes of one CPU share it
    # A copy writes as much as it reads.
    return Machine(float(memory), 2 * side**3 / product / share, 2 * copied / copy_ / share)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest of three, after a first."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


_EMPTY_RUN = """
import {libraries}
import lightning.pytorch as pl, torch
from lightrft_lightning import RLHFModule, SamplingParams, TransformersRollout
from lightrft_lightning.data import make_dataloader
from lightrft_lightning.experience.trajectory import Prompt
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama
torch.set_num_threads(1)
reward, sampling = lambda completion: random.random(), SamplingParams(n=4, max_new_tokens=2)
module = RLHFModule(tiny_llama(0, layers=2, width=8), reward, char_tokenizer(), sampling, seed=0)
trainer = pl.Trainer(
    strategy={name!r}, accelerator="cpu", devices=1, max_epochs=1, logger=False, callbacks=[TransformersRollout()],
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, make_dataloader([Prompt((3, 4), "") for _ in range(4)], 2))
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


def process_bytes(planned: Planned) -> float:
    """Bytes that a process of this strategy has resident after a run of a model without size: libraries and code."""
    libraries = ["random"]
    libraries += ["peft"] * (planned.lora_rank > 0) + ["accelerate"] * (planned.quantization is not None)
    libraries += ["bitsandbytes"] * (planned.adam_8bit or planned.quantization is not None)
    return _resident_after(_EMPTY_RUN.format(name=planned.strategy, libraries=", ".join(libraries)), planned.strategy)


@cache
def _resident_after(code: str, strategy: str) -> float:
    """Measured once: a plan and its alternatives mostly have the same libraries."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"a process of strategy={strategy!r} does not start:\n{done.stderr[-2000:]}")
    return 1024.0 * int(done.stdout.split()[-1])
