"""Which CPUs an engine in a process of its own computes on, so that it and the trainer do not fight for them."""

from __future__ import annotations

import os
import re

import torch


def parse_cpus(text: str) -> set[int]:
    """``0-3,6`` → the numbers of these CPUs.

    Raises:
        ValueError: it is no such list, or this machine lets nobody choose or lacks one of them.
    """
    cpus: set[int] = set()
    for part in text.split(","):
        if not re.fullmatch(r"\d+(-\d+)?", part):
            raise ValueError(f"cpus={text!r}: must be numbers and ranges, like '0-3,6'")
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError(f"cpus={text!r}: this operating system does not let a program choose; leave it out")
    last_one = (os.cpu_count() or 1) - 1
    if not cpus or max(cpus) > last_one:
        raise ValueError(f"cpus={text!r}: this machine has 0-{last_one}")
    return cpus


def take_cpus(cpus: set[int]) -> None:
    """This process and those that it starts compute on `cpus`, with a thread on each.

    Raises:
        ValueError: a container or the like keeps the process from them.
    """
    try:
        for thread in os.listdir("/proc/self/task"):  # libraries may have started some
            os.sched_setaffinity(int(thread), cpus)
    except OSError as err:
        raise ValueError(f"cpus={sorted(cpus)}: this process may not use them ({err})") from err
    os.environ["OMP_NUM_THREADS"] = str(len(cpus))  # for processes that it starts
    torch.set_num_threads(len(cpus))


def halves() -> tuple[int, str] | None:
    """Of the CPUs that this process may use: the number that it keeps, and the others, for `parse_cpus`.

    None where there is one only, or nobody can choose.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    kept = len(cpus) // 2
    return (kept, ",".join(map(str, cpus[kept:]))) if kept else None
