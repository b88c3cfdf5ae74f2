"""A short FSDP2 training however it was started; one rank may fail in the middle. See test_launch_distributed.py.

Arguments: ``trainer`` or ``loop``; processes a node; nodes; what happens in the third step; on which rank.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import lightning_alone  # noqa: F401  # isort: skip  # first
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightrft_lightning import FSDPV2Strategy

setting, devices, nodes, how, culprit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
torch.set_num_threads(1)


def step(strategy, number):
    if number == 2 and strategy.global_rank == culprit:
        if how == "raise":
            raise ValueError("boom")
        if how == "hang":
            time.sleep(600)
        if how in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


def say(strategy, loss):
    place = f"rank {strategy.global_rank} of {strategy.world_size}, local rank {strategy.local_rank}"
    # In one piece: the processes of a launcher write into the same file.
    os.write(
        1, f"{place}, {strategy.root_device}, pid {os.getpid()}, loss {float(strategy.all_reduce(loss))}\n".encode()
    )


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        step(self.trainer.strategy, batch_idx)
        loss = self.net(batch[0]).square().mean()
        if batch_idx == 1:
            say(self.trainer.strategy, loss.detach())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def trainer():
    strategy = "lightrft_fsdp" if how in ("raise", "kill") else FSDPV2Strategy(timeout=timedelta(seconds=6))
    pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=devices, num_nodes=nodes, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Module(), DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=2))  # fmt: skip


def loop():
    strategy = FSDPV2Strategy(timeout=timedelta(seconds=6), bf16=False)
    strategy.setup_distributed()
    model = nn.Linear(4, 1)
    model, optimizer = strategy.prepare((model, strategy.create_optimizer(model)))
    for number in range(4):
        step(strategy, number)
        loss = model(torch.randn(2, 4)).square().mean()
        if number == 1:
            say(strategy, loss.detach())
        strategy.backward(loss, model, optimizer)
        strategy.optimizer_step(optimizer, model, None)


{"trainer": trainer, "loop": loop}[setting]()
os.write(1, b"done\n")
