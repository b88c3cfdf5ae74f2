"""Two ranks that meet again and again on one port, in step or not; then one that others wait for in vain, one that
counts them otherwise, and one that dies when they have met.

Arguments: how often they meet.
"""

from __future__ import annotations

import os
import random
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from lightrft_lightning.strategies import failures
from lightrft_lightning.strategies.launch import start_process_group

rank, times, random = int(os.environ["RANK"]), int(sys.argv[1]), random.Random(int(os.environ["RANK"]))
failures.START_TIMEOUT = timedelta(seconds=60)
for meeting in range(times):
    time.sleep(random.choice((0, 0, 0.002, 0.02)))
    start_process_group(accelerator="cpu")
    number = torch.tensor(float(meeting))
    dist.all_reduce(number)
    assert number == 2 * meeting
    if meeting % 3 == 1:
        try:
            raise ValueError("refused on both")
        except ValueError:
            dist.barrier()
    dist.destroy_process_group()
print("met", flush=True)
failures._watch.stop()
failures.START_TIMEOUT = timedelta(seconds=1)
if rank == 0:
    time.sleep(8)  # rank 1 waits for it in vain, on a busy machine for longer than its second; then it for rank 1
try:
    start_process_group(accelerator="cpu")
except ConnectionError as error:
    print(error)
failures.START_TIMEOUT = timedelta(seconds=100)
os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # not where one was awaited in vain
os.environ["WORLD_SIZE"] = str(2 + rank)
try:
    start_process_group(accelerator="cpu")
except ConnectionError as error:
    print(error, flush=True)
os.environ["WORLD_SIZE"] = "2"
if rank == 1:
    dist.init_process_group = lambda *args, **kwargs: os._exit(7)
start_process_group(accelerator="cpu")
