"""Checkpoints of DeepSpeed ZeRO, saved and resumed in other stages and in one process; see checks.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import checks
import pytest
import torch
from deepspeed_loop import STAGES, strategy, whole
from deepspeed_trainer import Pair, Plain, Scheduled, data, trainer
from torch import nn
from toys import llama, loss_of, trained

from lightrft_lightning import FakeStrategy
from lightrft_lightning.checkpoints.folder import CheckpointError

FOLDER = Path(sys.argv[1])
IDS = torch.arange(3, 13)[None]
BATCHES = torch.randint(3, 16, (8, 4, 9), generator=torch.Generator().manual_seed(0))


def state_of(stage, **settings):
    s = FakeStrategy(max_norm=0.3) if stage == 0 else strategy(stage, max_norm=0.3, **settings)
    model, optimizer = trained(s, llama(), lr=1e-3)
    return s, model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + 0.1 * n))


def steps(made, which):
    """Losses over global batches; `FakeStrategy` sees the whole batch, the others their share."""
    s, model, optimizer, scheduler = made
    losses = []
    for k in which:
        ids = BATCHES[k][s.get_rank() :: s.world_size]
        loss = loss_of(model, ids)
        s.backward(loss, model, optimizer)
        s.optimizer_step(optimizer, model, scheduler)
        losses.append(float(s.all_reduce(loss.detach())))
    return losses


def save(made, tag):
    """Every rank has its own `FakeStrategy`, but one of them writes."""
    s, model, optimizer, scheduler = made
    if s.world_size > 1 or os.environ["RANK"] == "0":
        s.save_ckpt(model, FOLDER, tag, optimizer=optimizer, scheduler=scheduler, client_state={"tag": tag}, max_num=99)
    torch.distributed.barrier()


def load(made, tag):
    s, model, optimizer, scheduler = made
    _, client = s.load_ckpt(model, FOLDER, tag, optimizer=optimizer, scheduler=scheduler)
    assert client == {"tag": tag}
    torch.distributed.barrier()


def check_another_stage_or_one_process_goes_on():
    """All pairs are in test_any_to_any_distributed.py; here the target has made steps before."""
    strategy(1)  # a process group
    reference = state_of(0)
    expected = steps(reference, range(8))[4:]
    weights = whole(reference[0], reference[1])
    for source, target in ((0, 3), (3, 2), (2, 1), (1, 3), (3, 0)):
        made = state_of(source)
        steps(made, range(4))
        save(made, f"from{source}")
        other = state_of(target)
        steps(other, range(2))  # must leave no trace
        load(other, f"from{source}")
        assert other[3].last_epoch == 4 and other[0].optimizer_steps == 4
        assert steps(other, range(4, 8)) == pytest.approx(expected, rel=1e-5), (source, target)
        for name, value in whole(other[0], other[1]).items():
            assert float((value - weights[name]).norm() / weights[name].norm()) < 1e-5, (source, target, name)


def check_the_same_stage_goes_on_bit_for_bit():
    for stage in STAGES:
        for low in ({}, {"bf16": True}, {"fp16": True}):
            made = state_of(stage, **low)
            steps(made, range(4))
            tag = f"exact{stage}{''.join(low)}"
            save(made, tag)
            scale = made[0]._scaler_state(made[1])
            expected = steps(made, range(4, 8))
            again = state_of(stage, **low)
            load(again, tag)
            assert again[0]._scaler_state(again[1]) == scale and bool(scale) == ("fp16" in low)
            # What the model computes with follows the masters, on every rank.
            values = whole(again[0], again[1])
            for name, piece in again[0]._zero[again[1]].masters():
                part = values[name].flatten()[piece.offset : piece.offset + len(piece.values)]
                assert torch.equal(part, piece.values.to(part.dtype))
            sums = again[0].gather_objects({n: float(v.double().sum()) for n, v in values.items()})
            assert sums[0] == sums[1]
            assert steps(again, range(4, 8)) == expected, (stage, low)
            left, right = whole(made[0], made[1]), whole(again[0], again[1])
            assert all(torch.equal(left[n], right[n]) for n in left)


def check_frozen_and_tied_parameters_and_buffers():
    for stage in STAGES:
        made = strategy(stage), Tied()
        s, model = made
        model, optimizer = s.prepare((model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])))
        s.backward(model(torch.ones(2, 4)).pow(2).mean(), model, optimizer)
        s.optimizer_step(optimizer, model, None)
        model.count.fill_(7)
        s.save_ckpt(model, FOLDER / "tied", f"tied{stage}")
        values = whole(s, model)
        other = Tied(seed=1)
        other, _ = s.prepare((other, torch.optim.AdamW([p for p in other.parameters() if p.requires_grad])))
        s.load_ckpt(other, FOLDER / "tied", f"tied{stage}")
        assert all(torch.equal(values[n], v) for n, v in whole(s, other).items())
        assert int(other.count) == 7
        with torch.no_grad():
            assert torch.equal(model(torch.ones(1, 4)), other(torch.ones(1, 4)))
        frozen = s.prepare(Tied(seed=2).requires_grad_(False))
        s.load_ckpt(frozen, FOLDER / "tied", f"tied{stage}", load_module_only=True)
        with torch.no_grad():
            assert torch.equal(model(torch.ones(1, 4)), frozen(torch.ones(1, 4)))


class Tied(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second, self.fixed = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.fixed.requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        return self.fixed(self.second(self.first(x)))


def check_another_model_is_refused_and_nothing_changed():
    for stage in STAGES:
        s = strategy(stage)
        model, _ = s.prepare((m := nn.Linear(4, 3), torch.optim.SGD(m.parameters(), lr=0.1)))
        s.save_ckpt(model, FOLDER / "linear", f"small{stage}")
        other, _ = s.prepare((m := nn.Linear(5, 3), torch.optim.SGD(m.parameters(), lr=0.1)))
        before = whole(s, other)
        with pytest.raises(CheckpointError, match=r"weight has shape \(3, 4\) there and \(3, 5\) here"):
            s.load_ckpt(other, FOLDER / "linear", f"small{stage}")
        assert all(torch.equal(before[n], v) for n, v in whole(s, other).items())
        s.load_ckpt(model, FOLDER / "linear", f"small{stage}")  # stateless optimizer


def check_trainer_resumes():
    for stage in STAGES:
        for make in (Plain, Scheduled, Pair):
            path = FOLDER / f"trainer{stage}{make.__name__}"
            t, module = trainer(stage, max_epochs=1), make()
            t.fit(module, data())
            t.save_checkpoint(path)
            expected, whole_run = trainer(stage, max_epochs=2), make()
            expected.fit(whole_run, data())
            resumed, again = trainer(stage, max_epochs=2), make()
            resumed.fit(again, data(), ckpt_path=path)
            assert resumed.global_step == expected.global_step
            left, right = whole(expected.strategy, whole_run), whole(resumed.strategy, again)
            assert all(torch.equal(left[n], right[n]) for n in left), (stage, make)
            (metrics,) = trainer(stage).validate(make(), data(), ckpt_path=path, verbose=False)
            (direct,) = trainer(stage).validate(module, data(), verbose=False)
            assert metrics == direct


if __name__ == "__main__":
    checks.run(dict(globals()))
