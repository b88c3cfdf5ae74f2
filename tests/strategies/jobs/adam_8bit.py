"""AdamW with moments of eight bits on every back end, and its checkpoints; see checks.py."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import checks
import torch
from torch.distributed.tensor import DTensor
from toys import loss_of

from lightrft_lightning import FakeStrategy, get_strategy
from lightrft_lightning.models.tiny import tiny_llama

FOLDER = Path(sys.argv[1])
SHARDED = ("lightrft_fsdp", *(f"lightrft_deepspeed_stage_{stage}" for stage in (1, 2, 3)))
BATCHES = torch.randint(3, 16, (8, 4, 9), generator=torch.Generator().manual_seed(0))


def made_by(name, **settings):
    """`FakeStrategy` has the whole batch, on every rank by itself."""
    s = FakeStrategy(**settings) if name == "lightrft_fake" else get_strategy(name, **settings)
    if name != "lightrft_fake":
        s.setup_distributed(timedelta(seconds=30))
    model = tiny_llama(seed=0, width=128, layers=2)
    optimizer = s.create_optimizer(model, lr=1e-3, weight_decay=0.01)
    return s, *s.prepare((model, optimizer))


def steps(made, which):
    s, model, optimizer = made
    for k in which:
        s.backward(loss_of(model, BATCHES[k][s.get_rank() :: s.world_size]), model, optimizer)
        s.optimizer_step(optimizer, model, None)
    return torch.cat([value.flatten() for _, value in s.named_full_tensors(model)]).clone()


def moments(optimizer):
    """Bytes of what is kept of the steps on this rank; the tables of 256 numbers are the same for all parameters."""
    raw = getattr(optimizer, "optimizer", optimizer)
    tensors = [v for state in raw.state.values() for k, v in state.items() if torch.is_tensor(v) and "qmap" not in k]
    local = [v.to_local() if isinstance(v, DTensor) else v for v in tensors]
    return sum(v.numel() * v.element_size() for v in local)


def save(made, tag):
    s, model, _ = made
    if s.world_size > 1 or os.environ["RANK"] == "0":
        s.save_ckpt(model, FOLDER, tag, max_num=99)
    torch.distributed.barrier()


def distance(one, other, start):
    return float((one - other).norm() / (other - start).norm())


def check_its_steps_are_almost_those_of_full_precision():
    start = steps(made_by("lightrft_fake"), [])
    full = made_by("lightrft_fake")
    expected = steps(full, range(6))
    for name in ("lightrft_fake", *SHARDED):
        made = made_by(name, adam_8bit=True)
        assert 0 < distance(steps(made, range(6)), expected, start) < 0.05, name
        share = 1 if name == "lightrft_fake" else 0.5
        assert moments(made[2]) < 0.3 * share * moments(full[2]), (name, moments(made[2]), moments(full[2]))


def check_its_checkpoints_resume_on_every_back_end_and_in_full_precision():
    start = steps(made_by("lightrft_fake"), [])
    for source in ("lightrft_fake", *SHARDED):
        made = made_by(source, adam_8bit=True)
        steps(made, range(4))
        save(made, source)
        expected = steps(made, range(4, 8))
        for target in dict.fromkeys((source, "lightrft_fake", "lightrft_fsdp", "lightrft_deepspeed_stage_2")):
            for settings in ({"adam_8bit": True}, {}):
                other = made_by(target, **settings)
                steps(other, range(2))  # must leave no trace
                other[0].load_ckpt(other[1], FOLDER, source)
                allowed = 1e-4 if target == source and settings else 0.05
                found = distance(steps(other, range(4, 8)), expected, start)
                assert found < allowed, (source, target, settings, found)


def check_it_takes_moments_of_full_precision_over():
    start = steps(made_by("lightrft_fake"), [])
    made = made_by("lightrft_fake")
    steps(made, range(4))
    save(made, "full")
    expected = steps(made, range(4, 8))
    for target in ("lightrft_fake", "lightrft_fsdp", "lightrft_deepspeed_stage_3"):
        other = made_by(target, adam_8bit=True)
        other[0].load_ckpt(other[1], FOLDER, "full")
        assert distance(steps(other, range(4, 8)), expected, start) < 0.05, target


if __name__ == "__main__":
    checks.run(dict(globals()))
