"""A rank that ends, or raises, while its watch asks torch what it is doing; see test_failures_distributed.py."""

from __future__ import annotations

import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from lightrft_lightning.strategies.failures import watch_ranks

dist.init_process_group("gloo")
watch, begun = watch_ranks(timedelta(minutes=1)), threading.Event()
sample = watch._stack.sample


def for_a_second():
    begun.set()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        status = sample()
    return status


watch._stack.sample = for_a_second
begun.wait()
if sys.argv[1] == "raise":
    raise ValueError("boom")
