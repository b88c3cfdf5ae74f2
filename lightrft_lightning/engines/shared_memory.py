"""The shared memory in which vLLM's workers on a CPU add up their parts of a layer, under tensor parallelism.

vLLM names it after the ranks of the group. Two jobs on a machine would add up each other's numbers, and what one that
was killed has left behind would be in the next one's way ("errno: 17").
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

FOLDER = Path("/dev/shm")


def take_name_away() -> None:
    """What the workers of a server share goes with the last of them, however that ends; in one that has started."""
    if run := os.environ.get("VLLM_DIST_IDENT"):  # vLLM's, of all workers of an engine on a CPU
        for file in FOLDER.glob(f"{run}-*cpushm*"):
            file.unlink(missing_ok=True)  # each worker does it


@contextlib.contextmanager
def of_this_run() -> Iterator[None]:
    """An engine that starts inside has memory that no other process finds. All ranks together.

    Once all workers have it, it has no name any more: it goes with the last of them, however that ends.
    """
    from vllm.distributed.device_communicators import cpu_communicator

    memory: Any = cpu_communicator._CPUSHMDistributed
    box = [f"lightrft-{secrets.token_hex(8)}"]
    dist.broadcast_object_list(box, src=0)
    (run,) = box
    make_group_name = memory.make_group_name

    def named(communicator: Any) -> str:
        return f"{run}{make_group_name(communicator).replace('/', '')}"  # vLLM's instance is called "//"

    memory.make_group_name = staticmethod(named)
    try:
        yield
        dist.barrier()
    finally:
        memory.make_group_name = staticmethod(make_group_name)
        for file in FOLDER.glob(f"{run}*"):
            file.unlink(missing_ok=True)  # each rank of the machine does it
