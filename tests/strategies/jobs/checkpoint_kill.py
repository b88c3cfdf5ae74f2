"""Two ranks train and save after every step; one or both are killed in the middle of a save; what is there is read.

``checkpoint_kill.py FOLDER ROUNDS``: one process that has imported everything forks the ranks of each round. Prints
one line of JSON a round.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightrft_lightning import CheckpointError, FakeStrategy
from lightrft_lightning.checkpoints import folder
from lightrft_lightning.strategies.distributed import DistributedStrategy

torch.set_num_threads(1)
WHERE, ROUNDS = Path(sys.argv[1]), int(sys.argv[2])
WIDTH = 256


class Sharded(DistributedStrategy):
    """The model is sharded by its user."""


class Run:
    def __init__(self, strategy, seed=0):
        torch.manual_seed(seed)
        self.strategy, self.model = strategy, nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
        if isinstance(strategy, Sharded):
            fully_shard(self.model, mesh=init_device_mesh("cpu", (2,)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def step(self, n):
        # The same on both ranks, so that the mean over them is exact and one process computes the same.
        x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(n))
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def load(self, tag=None):
        return self.strategy.load_ckpt(self.model, WHERE, tag, optimizer=self.optimizer)[1]["n"]

    def save(self, n):
        tag = "same" if n % 3 == 0 else f"t{n}"
        self.strategy.save_ckpt(
            self.model, WHERE, tag, optimizer=self.optimizer, max_num=2, client_state={"n": n, "tag": tag}
        )

    def state(self):
        return [*self.model.parameters(), *(v for s in self.optimizer.state.values() for v in s.values())]


def rank(number, store, pipe):
    """Resume, then train and save until killed; a byte on the pipe at the beginning and end of each save."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    strategy = Sharded()
    strategy._timeout = timedelta(seconds=20)
    run = Run(strategy, seed=1)
    n = run.load()
    while True:
        n += 1
        run.step(n)
        os.write(pipe, b"s")
        run.save(n)
        os.write(pipe, b"d")


def fork(number, store, pipe):
    child = os.fork()
    if child == 0:
        try:
            rank(number, store, pipe)
        except (CheckpointError, RuntimeError):  # the other one is gone
            os._exit(3)
        finally:
            os._exit(4)
    return child


def wait_for(pipe, count):
    seen = b""
    while seen.count(b"s") < count:
        ready, _, _ = select.select([pipe], [], [], 60)
        assert ready, "no rank came so far"
        seen += os.read(pipe, 100)
    return seen


def end(children):
    """Those that are left notice that the other one is gone; returns how they ended."""
    codes, deadline = [], time.monotonic() + 15
    for child in children:
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        codes.append(os.waitstatus_to_exitcode(done[1]))
    return codes


def main():
    generator = random.Random(0)
    reference, states = Run(FakeStrategy()), {}
    reference.save(0)
    saved, duration, steps = 0, 0.0, 0
    for number in range(ROUNDS):
        reading, writing = os.pipe()
        store = WHERE.parent / f"store{number}"
        children = [fork(k, store, writing if k == 0 else os.open(os.devnull, os.O_WRONLY)) for k in range(2)]
        if not duration:  # of a save when all is warm
            wait_for(reading, 2)
            start = time.monotonic()
            wait_for(reading, 4)
            duration = (time.monotonic() - start) / 4
        seen = wait_for(reading, 2)
        time.sleep(generator.uniform(0, duration))
        victims = ([0], [1], [0, 1])[number % 3]
        for victim in victims:
            os.kill(children[victim], signal.SIGKILL)
        os.set_blocking(reading, False)
        with suppress(BlockingIOError):
            seen += os.read(reading, 1000)
        codes = end(children)
        run = Run(FakeStrategy(), seed=2)
        n = run.load()
        while steps < n:
            steps += 1
            reference.step(steps)
            states[steps] = [v.detach().clone() for v in reference.state()]
        latest = (WHERE / "latest").read_text()
        assert n >= saved, (n, saved)
        assert all(torch.equal(a, b) for a, b in zip(run.state(), states[n], strict=True)), n
        complete = [p.name for p in WHERE.iterdir() if p.is_dir() and not p.name.startswith(".")]
        for tag in complete:  # whatever has a name can be read
            assert folder.is_checkpoint(WHERE / tag), tag
            assert run.load(tag) <= n + 1, tag
        saved = n
        inside = seen.endswith(b"s")
        line = {"victims": victims, "inside": inside, "n": n, "latest": latest, "there": complete, "codes": codes}
        print(json.dumps(line), flush=True)
    last = Run(FakeStrategy(), seed=3)
    last.save(last.load() + 1)
    left = sorted(p.name for p in WHERE.iterdir() if p.name.startswith("."))
    print(json.dumps({"left": left, "duration": duration}), flush=True)


if __name__ == "__main__":
    main()
