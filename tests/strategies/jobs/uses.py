"""A LightningModule that knows nothing of this package, in many uses, under its strategies and under Lightning's own.

On two ranks the measure is DDP, in one process Lightning's own strategy for one device. What came of each use goes into
``<first argument>/<rank>.json``: "equal", "refused: ..." or what is wrong.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    ModelCheckpoint,
)
from torch import nn
from torch.autograd import grad
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightrft_lightning

KINDS = {
    "ddp": pl.strategies.DDPStrategy,
    "lightrft_deepspeed_stage_3": partial(lightrft_lightning.DeepspeedStrategy, zero_stage=3),
}
STRATEGIES = ("lightrft_fsdp", *(f"lightrft_deepspeed_stage_{stage}" for stage in (1, 2, 3)))
RANK = int(os.environ.get("RANK", 0))
USES: dict[str, type] = {}


def use(name, **settings):
    """Registers a module, and the settings of its Trainer."""

    def keep(cls):
        cls.settings, USES[name] = settings, cls
        return cls

    return keep


def place():
    """Number of processes, and which one this is."""
    return int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


@contextlib.contextmanager
def one_process():
    """No launcher, as far as can be seen inside."""
    ranks = {
        k: os.environ.pop(k) for k in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID") if k in os.environ
    }
    try:
        yield
    finally:
        os.environ.update(ranks)


def loader(width=6, rows=32, shift=0.0):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) + shift
    dataset = TensorDataset(x, x.sum(1, keepdim=True))
    ranks, rank = place()
    return DataLoader(dataset, 8 // ranks, sampler=DistributedSampler(dataset, ranks, rank, shuffle=False))


@use("automatic optimization")
class Plain(pl.LightningModule):
    settings: dict = {}
    val = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.body(x).tanh())

    def loss(self, batch):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader() if self.val else []


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        optimizer.zero_grad()


USES["manual optimization"] = Manual


@use("accumulate_grad_batches that does not divide the epoch", accumulate_grad_batches=3)
class Accumulated(Plain): ...


@use("gradient_clip_val", gradient_clip_val=0.1)
class Clipped(Plain): ...


@use('gradient_clip_algorithm="value"', gradient_clip_val=0.01, gradient_clip_algorithm="value")
class ClippedByValue(Plain): ...


@use("clip_gradients in manual optimization")
class ManuallyClipped(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()


@use("configure_gradient_clipping", gradient_clip_val=0.1)
class ClippedBySelf(Plain):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if self.current_epoch:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


@use("accumulation in manual optimization")
class ManuallyAccumulated(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


@use("two optimizers in turn, toggle_optimizer")
class Two(Manual):
    options = {"ddp": {"find_unused_parameters": True}}

    def training_step(self, batch, batch_idx):
        for optimizer, sign in zip(self.optimizers(), (1, -0.1), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(sign * self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.body.parameters(), lr=0.05), torch.optim.SGD(self.head.parameters(), lr=0.01)


@use("two losses over one graph, retain_graph=True")
class Retained(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        out = self(batch[0])
        self.manual_backward(nn.functional.mse_loss(out, batch[1]), retain_graph=True)
        self.manual_backward(out.square().mean())
        optimizer.step()


@use("a gradient of gradients, create_graph=True")
class Penalty(Plain):
    def loss(self, batch):
        x = batch[0].clone().requires_grad_(True)
        y = self(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return nn.functional.mse_loss(y, batch[1]) + slope.square().mean()


@use("a schedule by epochs")
class ByEpoch(Plain):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [StepLR(optimizer, 1, 0.5)]


@use("a schedule by steps")
class ByStep(Plain):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 2}}


@use("ReduceLROnPlateau")
class Plateau(Plain):
    val = True

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val"}}


@use("lr_scheduler_step")
class OwnSchedule(ByEpoch):
    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()
        scheduler.step()


@use("schedules in manual optimization")
class ManuallyScheduled(Manual):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [StepLR(optimizer, 2, 0.5)]


@use("groups of parameters with rates of their own")
class Groups(Plain):
    def configure_optimizers(self):
        groups = [{"params": self.body.parameters(), "lr": 0.01}, {"params": self.head.parameters()}]
        return torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1)


@use("SGD with momentum")
class Momentum(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True)


@use("Adagrad")
class Adagrad(Plain):
    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters(), lr=0.05)


@use("LBFGS")
class Newton(Plain):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


@use("a frozen part")
class Frozen(Plain):
    def __init__(self):
        super().__init__()
        self.body.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=0.05)


class Thaw(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.body)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.body, optimizer, lr=0.01)


@use("a part that thaws after an epoch, BaseFinetuning", callbacks=lambda: [Thaw()])
class Thawed(Frozen):
    alone = True  # DDP does not reduce the gradients of what was frozen when it began

    def __init__(self):
        super().__init__()
        self.body.requires_grad_(True)


@use("a part that thaws, in bf16-mixed", callbacks=lambda: [Thaw()], precision="bf16-mixed")
class ThawedLow(Thawed):
    tolerance = 0.02


@use("optimizer_step with a warm-up")
class WarmedUp(Plain):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + self.trainer.global_step)


@use("gradients changed in on_after_backward and on_before_optimizer_step")
class Changed(Plain):
    def on_after_backward(self):
        for p in self.head.parameters():
            p.grad.mul_(0.5)

    def on_before_optimizer_step(self, optimizer):
        for p in self.body.parameters():
            p.grad.add_(0.01)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@use("parameters changed in place after each batch")
class Clamped(Plain):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.2, 0.2)


@use("parameters changed in place, and a run that is resumed")
class ClampedAndResumed(Clamped):
    undisturbed = Clamped

    def go(self, trainer):
        folder = trainer.strategy.broadcast(tempfile.mkdtemp())
        saved = ModelCheckpoint(folder, every_n_train_steps=3, filename="a")
        first = made(trainer.strategy_name, {}, callbacks=[saved])
        first.fit_loop.epoch_loop.max_steps = 3
        first.fit(type(self)())
        trainer.fit(self, ckpt_path=f"{folder}/a.ckpt")


class Nothing(Plain):
    def training_step(self, batch, batch_idx):
        return self.loss(batch) * (batch_idx != 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@use("a training step that returns None")
class Skipping(Nothing):
    undisturbed = Nothing  # DDP cannot

    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else self.loss(batch)


@use("a training step that returns a dictionary")
class Dictionary(Plain):
    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(batch), "more": 1}


@use("tied weights")
class Tied(Plain):
    def __init__(self):
        super().__init__()
        self.again = nn.Linear(6, 8)
        self.again.weight = self.body[0].weight

    def forward(self, x):
        return self.head(self.body(x).tanh()) + self.again(x).mean(1, keepdim=True)


@use("evaluation in between", val_check_interval=0.5)
class Evaluated(Plain):
    val = True


@use("evaluated alone, tested, predicted, fitted twice")
class Several(Plain):
    val = True
    test_step = Plain.validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def go(self, trainer):
        trainer.validate(self, verbose=False)
        trainer.fit(self)
        trainer.test(self, loader(), verbose=False)
        trainer.predict(self, loader())
        trainer.fit_loop.max_epochs = 4
        trainer.fit(self)


@use("a run that is resumed in the middle of an epoch")
class Resumed(ByStep):
    undisturbed = ByStep

    def go(self, trainer):
        folder = trainer.strategy.broadcast(tempfile.mkdtemp())
        first = made(
            trainer.strategy_name, {}, callbacks=[ModelCheckpoint(folder, every_n_train_steps=3, filename="a")]
        )
        first.fit_loop.epoch_loop.max_steps = 3
        first.fit(type(self)())
        trainer.fit(self, ckpt_path=f"{folder}/a.ckpt")


@use('precision="bf16-mixed"', precision="bf16-mixed")
class Bfloat16(Plain):
    tolerance = 0.02


@use('precision="bf16-true"', precision="bf16-true")
class TrueBfloat16(Plain):
    tolerance = 0.02


@use('precision="64-true"', precision="64-true")
class Double(Plain): ...


@use("BatchNorm and other buffers")
class Buffers(Plain):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.head(self.norm(self.body(x)))


@use("dropout")
class Dropout(Plain):
    def forward(self, x):
        return self.head(nn.functional.dropout(self.body(x), 0.3, self.training))


@use("an embedding with sparse gradients")
class Sparse(Plain):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(16, 6, sparse=True)

    def forward(self, x):
        return super().forward(self.words((x[:, 0] * 4).long().clamp(0, 15)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@use("a part that gets no gradient in some steps")
class Unused(Plain):
    options = {"ddp": {"find_unused_parameters": True}}

    def __init__(self):
        super().__init__()
        self.steps = 0
        self.other = nn.Linear(6, 1)

    def training_step(self, batch, batch_idx):
        self.steps += 1
        out = self(batch[0]) + (self.other(batch[0]) if self.steps % 2 else 0)
        return nn.functional.mse_loss(out, batch[1])


@use("parts that are called otherwise than by forward")
class Methods(Plain):
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

        def encode(self, x):
            return self.two(self.one(x).tanh())

    def __init__(self):
        super().__init__()
        self.body = self.Body()
        self.scale = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.head(nn.functional.linear(self.body.encode(x), self.scale.weight).tanh())


@use("layers made in configure_model")
class Late(Plain):
    def __init__(self):
        super().__init__()
        del self.head
        self.head = None

    def configure_model(self):
        if self.head is None:
            torch.manual_seed(1)
            self.head = nn.Linear(4, 1)


@use("activations computed again, torch.utils.checkpoint")
class Recomputed(Plain):
    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False).tanh())


@use("several data loaders")
class Loaders(Plain):
    def train_dataloader(self):
        return {"a": loader(), "b": loader(shift=0.5)}

    def training_step(self, batch, batch_idx):
        return self.loss(batch["a"]) + 0.1 * self.loss(batch["b"])


@use("ranks that start from different weights")
class Unseeded(Plain):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.1 * RANK)


@use("anomalies detected, batches limited", detect_anomaly=True, limit_train_batches=3)
class Limited(Plain): ...


@use("max_steps in the middle of an epoch", max_steps=3)
class Stopped(Plain): ...


@use("an optimizer made in __init__")
class Early(Plain):
    def __init__(self):
        super().__init__()
        self.made = torch.optim.AdamW(self.parameters(), lr=0.05)

    def configure_optimizers(self):
        return self.made


class ChangedInParts(Clamped):
    options = {
        "lightrft_deepspeed_stage_3": {
            "deepspeed_config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        }
    }


USES["large parameters changed in place after each batch"] = ChangedInParts


@use("large parameters changed in place, inside of GatheredParameters")
class ChangedGathered(ChangedInParts):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.parameters()), modifier_rank=0):
            super().on_train_batch_end(outputs, batch, batch_idx)


@use("parameters changed through .data after each batch")
class ClampedData(Plain):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for p in self.parameters():
            p.data.clamp_(-0.2, 0.2)


@use("parameters changed in training_step, and set before the first")
class ClampedBefore(Plain):
    def on_train_start(self):
        with torch.no_grad():
            self.head.weight.fill_(0.05)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.2, 0.2)
        return self.loss(batch)


@use("a frozen copy that follows")
class Followed(Plain):
    def __init__(self):
        super().__init__()
        self.target = copy.deepcopy(self.body).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return self.loss(batch) + (self.body(batch[0]) - self.target(batch[0]) / 2).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for late, p in zip(self.target.parameters(), self.body.parameters(), strict=True):
                late.lerp_(p, 0.5)

    def on_train_epoch_end(self):
        self.target.load_state_dict(self.body.state_dict())


@use("ranks that make their own random buffers and frozen parts")
class UnseededBuffers(Plain):
    class Projection(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.register_buffer("by", torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)))

        def forward(self, x):
            return x @ self.by

    def __init__(self):
        super().__init__()
        self.project, self.frozen = self.Projection(1 + RANK), nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("more", torch.full((6,), float(RANK)))
        self.frozen.bias.data.add_(RANK)

    def forward(self, x):
        return super().forward(self.frozen(self.project(x)) + self.more)


def halve(module):
    for p in module.parameters():
        if p.grad is not None:
            p.grad.mul_(0.5)


@use("gradients changed in a function that a hook calls")
class ChangedElsewhere(Plain):
    def on_after_backward(self):
        halve(self.head)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@use("gradients changed in a manual training_step")
class ManuallyChanged(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for p in self.parameters():
            p.grad.clamp_(-0.1, 0.1)
        optimizer.step()


@use("the gradient of an input, in a manual training_step")
class Attacked(Manual):
    def training_step(self, batch, batch_idx):
        optimizer, x = self.optimizers(), batch[0].clone().requires_grad_(True)
        self.manual_backward(self.loss((x, batch[1])))
        optimizer.zero_grad()
        self.manual_backward(self.loss(((x + 0.1 * x.grad.sign()).detach(), batch[1])))
        optimizer.step()


@use("create_graph=True of an imported grad")
class ImportedPenalty(Plain):
    def loss(self, batch):
        x = batch[0].clone().requires_grad_(True)
        y = self(x)
        (slope,) = grad(y.sum(), x, create_graph=True)
        return nn.functional.mse_loss(y, batch[1]) + slope.square().mean()


@use("a backward() of its own")
class OwnBackward(Plain):
    def backward(self, loss):
        (loss / 2).backward()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@use("loss.backward() in place of manual_backward(loss)")
class DirectBackward(Manual):
    alone = True  # DDP reduces nothing then

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


@use("hooks of parameters, register_hook")
class Hooked(Plain):
    def __init__(self):
        super().__init__()
        self.head.weight.register_hook(lambda gradient: gradient / 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@use("hooks of parameters, in on_train_start")
class HookedLater(Hooked):
    __init__ = Plain.__init__

    def on_train_start(self):
        self.head.weight.register_hook(lambda gradient: gradient / 2)


@use("a penalty on parameters in the loss")
class Decay(Plain):
    def training_step(self, batch, batch_idx):
        return self.loss(batch) + 0.01 * sum(p.square().sum() for p in self.parameters())


class Loose(Plain):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 4))
        self.rows = nn.ParameterList([nn.Parameter(torch.ones(6)) for _ in range(2)])

    def forward(self, x):
        return self.head(self.body(x * self.rows[0] + self.rows[1]).tanh() * self.scale.sum(0))


@use("parameters of the module itself, ParameterList; evaluated and resumed", limit_val_batches=1)
class LooseResumed(Loose):
    undisturbed, val, go = Loose, True, Resumed.go


@use("parameters of the module itself and nothing else, manual optimization")
class LooseManual(Manual):
    def __init__(self):
        super().__init__()
        del self.body, self.head
        self.weight = nn.Parameter(torch.ones(6, 1))

    def forward(self, x):
        return x @ self.weight


@use("LSTM, weight_norm, spectral_norm")
class Layers(Plain):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 6, batch_first=True)
        nn.utils.parametrizations.weight_norm(self.body[0])
        nn.utils.parametrizations.spectral_norm(self.body[2])

    def forward(self, x):
        return super().forward(self.rnn(x[:, None])[0][:, 0])


@use("TransformerEncoder with evaluation", limit_val_batches=1)
class Encoder(Plain):
    val = True

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), 1)

    def forward(self, x):
        return super().forward(self.encoder(x[:, None])[:, 0])


@use("an embedding with max_norm")
class Normed(Sparse):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(16, 6, max_norm=1.0)


@use("torch.compile of a part")
class Compiled(Plain):
    def __init__(self):
        super().__init__()
        self.body = torch.compile(self.body, backend="eager")


@use("Adafactor")
class Factored(Plain):
    def configure_optimizers(self):
        return torch.optim.Adafactor(self.parameters(), lr=0.01)


@use("Rprop")
class Signs(Plain):
    def configure_optimizers(self):
        return torch.optim.Rprop(self.parameters(), lr=0.01)


@use("an optimizer of the user's own")
class OwnOptimizer(Plain):
    class Lion(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            loss = torch.enable_grad()(closure)() if closure is not None else None
            for group in self.param_groups:
                for p in group["params"]:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    p.sub_(mean.lerp(p.grad, 0.1).sign(), alpha=group["lr"])
                    mean.lerp_(p.grad, 0.01)
            return loss

    def configure_optimizers(self):
        return self.Lion(self.parameters(), lr=0.01)


@use("the norm of all parameters, and a forward pass, in a hook")
class Watched(Plain):
    def on_fit_start(self):
        self.read = []

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.read += [float(sum(p.square().sum() for p in self.parameters()).sqrt()), float(self(batch[0][:1] * 0))]


@use("p.norm().item() in a hook")
class Numbers(Watched):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.read.append(sum(p.norm().item() for p in self.parameters()))


@use("Lightning's grad_norm in on_before_optimizer_step")
class GradNorm(Watched):
    def on_before_optimizer_step(self, optimizer):
        from lightning.pytorch.utilities import grad_norm

        self.read.append(float(grad_norm(self, norm_type=2)["grad_2.0_norm_total"]))


@use("AveragedModel")
class Average(Frozen):
    def __init__(self):
        super().__init__()
        self.body.requires_grad_(True)
        self.average = AveragedModel(self.body, multi_avg_fn=get_ema_multi_avg_fn(0.5)).requires_grad_(False)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.average.update_parameters(self.body)


@use("layers made and initialised in setup")
class MadeInSetup(Plain):
    def setup(self, stage):
        torch.manual_seed(3)
        self.head = nn.Linear(4, 1)
        for p in self.body.parameters():
            nn.init.normal_(p, std=0.3)


@use("a loss over all ranks, all_gather(sync_grads=True)")
class Contrast(Plain):
    def loss(self, batch):
        out = self(batch[0])
        return nn.functional.mse_loss(out - self.all_gather(out, sync_grads=True).mean(), batch[1])


@use("a parameter that is a scalar")
class Scalar(Plain):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return super().forward(x) * self.scale


@use("a part in float64")
class DoublePart(Plain):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6).double()

    def forward(self, x):
        return super().forward(self.first(x.double()).float())


# -------------------------------------------------------------------- how they are run


def made(strategy, settings, **more):
    """A quiet Trainer."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    values = {**settings, **more}
    if callable(values.get("callbacks")):
        values["callbacks"] = values["callbacks"]()
    values.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in values.get("callbacks", ())))
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=place()[0], **{"max_epochs": 2, **quiet, **values},
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.strategy_name = strategy
    return trainer


def weights(trainer, module):
    """Whole, by name; buffers too, of which each rank has its own, and DDP those of rank 0."""
    read = {"read": torch.tensor(module.read)} if hasattr(module, "read") else {}
    if not hasattr(trainer.strategy, "named_full_tensors"):
        return read | {name: value.detach().clone() for name, value in module.state_dict().items()}
    found = read | {name: value.detach().clone() for name, value in trainer.strategy.named_full_tensors(module)}
    return found | {name: value.clone() for name, value in module.named_buffers() if RANK == 0}


def trained(cls, strategy):
    """The weights that come out."""
    torch.manual_seed(7 + RANK)
    options = getattr(cls, "options", {}).get(strategy, {})
    module = cls()
    trainer = made(KINDS[strategy](**options) if options else strategy, cls.settings)
    trainer.strategy_name = strategy
    module.go(trainer) if hasattr(module, "go") else trainer.fit(module)
    return weights(trainer, module)


class Told(logging.Handler):
    """What this package has warned of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.words = ""

    def emit(self, record):
        self.words += record.getMessage()


def outcome(cls, strategy, expected):
    """In a word, or two."""
    told = Told()
    logging.getLogger("lightrft_lightning").addHandler(told)
    try:
        found = trained(cls, strategy)
    except Exception as err:
        where = traceback.walk_tb(err.__traceback__)
        package = [frame.f_globals["__name__"].partition(".")[0] for frame, _ in where][-1]
        told_by_us = package in ("lightrft_lightning", "lightning")  # and not from deep inside
        # All lines: what another rank has ended with is quoted in a later one.
        return f"{'refused' if told_by_us else type(err).__name__}: {' '.join(str(err).split())}"
    finally:
        logging.getLogger("lightrft_lightning").removeHandler(told)
    off = {name: float((value.double() - expected[name].double()).abs().max()) for name, value in found.items()}
    wrong = [name for name, value in off.items() if not value <= getattr(cls, "tolerance", 1e-5)]  # NaN is
    if not wrong:
        return "equal"
    return f"differs: {told.words}" if "got no gradient" in told.words else f"WRONG: {wrong[0]} by {off[wrong[0]]:.1e}"


def measured(cls, measure):
    if not getattr(cls, "alone", False):
        return trained(cls, measure)
    with one_process():
        return trained(cls, "lightrft_fake")  # which is equal to Lightning's own for one device, see the table


def run(strategies, measure):
    """Of every use what came of it, by strategy."""
    results = {}
    for name, cls in USES.items():
        gc.freeze()  # what is over is not looked through again
        try:
            expected = measured(getattr(cls, "undisturbed", cls), measure)
        except Exception as err:
            results[name] = {measure: f"{type(err).__name__}: {err}"}
            continue
        results[name] = {strategy: outcome(cls, strategy, expected) for strategy in strategies}
    return results


def begun(table):
    """Where the results go, and what of a table is wanted, from the arguments of a job that begins."""
    os.environ["TORCHELASTIC_RUN_ID"] = "test"  # how Lightning recognises torchrun
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, *wanted = sys.argv[1:]
    return folder, {name: cls for name, cls in table.items() if not wanted or any(w in name for w in wanted)}


if __name__ == "__main__":
    folder, USES = begun(USES)
    Path(folder, f"{RANK}.json").write_text(json.dumps(run(STRATEGIES, "ddp"), indent=1))
