"""Hybrid sharding (``zpg``) in four processes: two groups of two, each with the whole model; see checks.py."""

from __future__ import annotations

from datetime import timedelta

import checks
import pytest
import torch
from torch import nn

from lightrft_lightning import FakeStrategy, FSDPV2Strategy
from lightrft_lightning.models.tiny import tiny_llama


def check_replicas_of_shards_train_as_one_process():
    hybrid = FSDPV2Strategy(zpg=2, train_batch_size=16, micro_train_batch_size=2, max_norm=0.3)
    hybrid.setup_distributed(timedelta(seconds=30))
    alone = FakeStrategy(train_batch_size=16, micro_train_batch_size=8, max_norm=0.3)
    pairs = []
    for strategy in (hybrid, alone):
        model = tiny_llama(seed=0, width=32, layers=2)
        pairs.append(strategy.prepare((model, strategy.create_optimizer(model, lr=1e-3))))
    sharded = pairs[0][0]
    assert sum(p.to_local().numel() for p in sharded.parameters()) * 2 == sum(p.numel() for p in sharded.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        ids = torch.randint(3, 16, (8, 10), generator=generator)
        for strategy, (model, optimizer) in zip((hybrid, alone), pairs, strict=True):
            mine = ids[strategy.get_rank() :: strategy.world_size]
            logits = model(input_ids=mine).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), mine[:, 1:].flatten())
            strategy.backward(loss, model, optimizer)
            strategy.optimizer_step(optimizer, model, None)
    assert hybrid.grad_norms["model"] == pytest.approx(alone.grad_norms["model"], rel=1e-5)
    for (_, whole), p in zip(hybrid.named_full_tensors(sharded), pairs[1][0].parameters(), strict=True):
        torch.testing.assert_close(whole, p.detach(), rtol=1e-5, atol=1e-6)
    assert hybrid.distributed_sampler_kwargs == {"num_replicas": 4, "rank": hybrid.get_rank()}


if __name__ == "__main__":
    checks.run(dict(globals()))
