"""Runs that are stopped at random places and resumed, against the same runs without stops."""

from __future__ import annotations

import logging
import random
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from training import make_data, make_module

from lightrft_lightning import PromptDataModule, RewardModule, SFTModule, TransformersRollout
from lightrft_lightning.data import make_dataloader
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

HOOKS = (
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_validation_start",
    "on_validation_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end",
)  # fmt: skip
SAMPLES = 16


class Killed(BaseException):
    """In place of SIGKILL: nothing is saved on the way out."""


class Toy(pl.LightningModule):
    """A user's own module: dropout, a metric over the epoch, orders that its data loader does not remember."""

    def __init__(self, loader="plain"):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loader = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.3), nn.Linear(3, 1)), loader
        self.data = [float(i) for i in range(SAMPLES)]

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch.float()[:, None]) - 1).square().mean() * 1e-2
        self.log("loss", loss.detach(), on_step=True, on_epoch=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch.float()[:, None]).square().mean())

    def train_dataloader(self):
        if self.loader == "resumable":
            return make_dataloader(self.data, 4, seed=1)
        return DataLoader(self.data, batch_size=4, shuffle=self.loader == "shuffled")

    def val_dataloader(self):
        return DataLoader(self.data[:8], batch_size=4)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9), "interval": "epoch"}]


class Watch(pl.Callback):
    """Notes what is trained on, counts hooks, and stops the run at the `at`-th call of a hook."""

    def __init__(self, seen, stop=None):
        self.seen, self.stop, self.counts, self.calls = seen, stop, dict.fromkeys(HOOKS, 0), 0

    def state_dict(self):
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state):
        self.counts = dict(state["counts"])

    def hook(self, name, trainer, module):
        if trainer.sanity_checking:
            return
        if name not in ("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_end"):
            self.counts[name] += name != "on_validation_batch_end"
        if self.stop is None or name != self.stop[0]:
            return
        self.calls += 1
        if self.calls == self.stop[1]:
            if self.stop[2] == "stopped" and name == "on_train_batch_end":
                trainer.should_stop = True
            else:
                raise Killed

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        batch = [p.token_ids for p in batch] if not isinstance(batch, torch.Tensor) else batch.tolist()
        metrics = {k: float(v) for k, v in trainer.logged_metrics.items() if not k.startswith("time/")}
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        self.seen.append((number, (trainer.current_epoch, batch_idx, batch, metrics, trainer.global_step)))
        self.hook("on_train_batch_end", trainer, module)


for _name in set(HOOKS) - {"on_train_batch_end"}:
    setattr(Watch, _name, lambda self, trainer, module, *args, _name=_name: self.hook(_name, trainer, module))


@dataclass
class Case:
    """One run with its settings, drawn from `seed`."""

    seed: int
    kind: str
    trainer: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    stops: list[tuple[str, int, str]] = field(default_factory=list)

    @classmethod
    def draw(cls, seed, kind):
        rng = random.Random(seed)
        case = cls(seed, kind)
        limit = rng.choice([None, None, 2, 3])
        case.trainer = {"max_epochs": rng.choice([1, 2, 2]), "num_sanity_val_steps": rng.choice([0, 2])}
        if limit:
            case.trainer["limit_train_batches"] = limit
        if rng.random() < 0.3:
            case.trainer |= {"max_steps": rng.randint(1, 9), "max_epochs": -1}
        validation = rng.choice(["none", "epoch", "interval", "half", "second", "batches"])
        case.trainer |= {
            "none": {"limit_val_batches": 0}, "epoch": {}, "interval": {"val_check_interval": 2},
            "half": {"val_check_interval": 0.5}, "second": {"check_val_every_n_epoch": 2},
            "batches": {"check_val_every_n_epoch": None, "val_check_interval": 3},
        }[validation]  # fmt: skip
        case.checkpoint = rng.choice(
            [{"every_n_train_steps": 1}, {"every_n_train_steps": 1}, {"every_n_train_steps": 2},
             {"every_n_train_steps": 3}, {}, {"save_on_train_epoch_end": True}]
        ) | {"save_top_k": rng.choice([1, -1]), "save_last": True}  # fmt: skip
        if kind == "plain" and validation in ("epoch", "interval", "half") and rng.random() < 0.4:
            case.checkpoint |= {"monitor": "val", "save_top_k": rng.choice([1, 2])}
        ways = ["killed"] if rng.random() < 0.8 else ["killed", "stopped"]
        case.stops = [
            (rng.choice(HOOKS), rng.choice([1, 1, 2, 3, 5]), rng.choice(ways)) for _ in range(rng.randint(1, 3))
        ]
        return case

    def fit(self, root: Path, seen: list[Any], stop: Any = None) -> dict[str, Any] | None:
        """Train on from the last checkpoint; None if the run was stopped, otherwise what became of it."""
        checkpoint = ModelCheckpoint(root / "ckpt", filename="{epoch}-{step}", **self.checkpoint)
        watch = Watch(seen, stop)
        module, data, callbacks = self.parts()
        there = list((root / "ckpt").glob("last*.ckpt"))
        torch.manual_seed(len(seen) + 6 if there else 5)  # what is not restored shows
        trainer = pl.Trainer(
            strategy="lightrft_fake", accelerator="cpu", logger=False, enable_progress_bar=False, log_every_n_steps=1,
            enable_model_summary=False, callbacks=[*callbacks, watch, checkpoint], default_root_dir=root,
            **self.trainer,
        )  # fmt: skip
        try:
            trainer.fit(module, datamodule=data, ckpt_path="last")
        except Killed:
            return None
        if stop is not None and trainer.should_stop:
            return None
        loop = trainer.fit_loop
        return {
            "weights": {n: p.detach().clone() for n, p in module.named_parameters()},
            "epoch": trainer.current_epoch, "step": trainer.global_step, "iteration": getattr(module, "iteration", 0),
            "batches": loop.epoch_loop.batch_progress.total.completed, "logged": loop.epoch_loop._batches_that_stepped,
            "counts": watch.counts, "best": Path(checkpoint.best_model_path).name,
            "files": sorted(p.name for p in (root / "ckpt").glob("*")),
        }  # fmt: skip

    def parts(self):
        if self.kind == "rlhf":
            dynamic = self.seed % 3 == 0
            return make_module(dropout=0.1, dynamic_sampling=dynamic), make_data(), [TransformersRollout()]
        if self.kind in ("sft", "reward"):
            rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "chosen": str(a + b), "rejected": "7 "}
                    for a in range(4) for b in range(4)]  # fmt: skip
            tokenizer, model = char_tokenizer("0123456789+= "), tiny_llama(seed=0, width=16, layers=1)
            model.config.attention_dropout = 0.1
            make = {"sft": SFTModule, "reward": RewardModule}[self.kind]
            module = make(model, tokenizer=tokenizer, lr=1e-3)
            return module, PromptDataModule(train=rows, val=rows[:4], batch_size=4, seed=1), []
        return Toy(self.kind), None, []


def difference(case: Case, root: Path) -> str:
    """What a run with stops has done otherwise; nothing, if all is the same."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        events: list[Any] = []
        expected = case.fit(root / "whole", events)
        wanted, seen, result = dict(events), [], None
        for stop in (*case.stops, None):
            result = case.fit(root / "parts", seen, stop)
    finally:
        logging.disable(logging.NOTSET)
    assert expected is not None
    if result is None:
        return "it does not end"
    told = [f"iteration {n}: {got}, not {wanted.get(n)}" for n, got in seen if got != wanted.get(n)]
    if any(way == "stopped" for *_, way in case.stops):  # the end of an epoch that was stopped came twice
        for one in (expected, result):
            one["counts"] = {k: v for k, v in one["counts"].items() if k == "on_train_batch_end"}
            del one["files"]
    for name, value in expected.items():
        same = (
            all(torch.equal(value[n], result[name][n]) for n in value) if name == "weights" else value == result[name]
        )
        told += [] if same else [f"{name}: {result[name]}, not {value}" if name != "weights" else "other weights"]
    return "\n".join(told[:4])
