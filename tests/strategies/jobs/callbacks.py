"""Every callback and logger of Lightning, under the strategies of this package and under Lightning's own.

Compared are the weights and what the callback or logger is for: what was logged, written, printed, found. What came of
each goes into ``<first argument>/<rank>.json``, as in uses.py: "equal", "refused: ..." or what is wrong.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import re
import traceback
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks, loggers, profilers
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim.lr_scheduler import StepLR
from uses import RANK, STRATEGIES, Plain, begun, loader, made, one_process, place, weights

LISTS = (callbacks.__all__, loggers.__all__)
TRIED: dict[str, type[Tried]] = {}


class Tried(Plain):
    """A module, and how one callback or logger is tried on it."""

    val = True
    alone = False  # against one process, where it is not for several
    package = None  # that has to be installed
    refused_by_the_measure = False
    folder: Path

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def train_dataloader(self):
        return loader(rows=24)

    def given(self, folder):
        """Settings of the Trainer."""
        return {}

    def go(self, trainer):
        trainer.fit(self)

    def another(self, trainer, **more):
        """Trainer with the same settings."""
        return made(trainer.strategy_name, {"default_root_dir": self.folder, **self.given(self.folder)}, **more)

    def seen(self, trainer):
        """What it is for, beside the weights."""
        return {}


def tried(name, package=None):
    def keep(cls):
        cls.package, TRIED[name] = package, cls
        return cls

    return keep


def callback(trainer, kind):
    return next(c for c in trainer.callbacks if isinstance(c, kind))


def rows(folder):
    """What is in the files of a CSVLogger, without times."""
    found = [list(csv.DictReader(path.open())) for path in sorted(Path(folder).rglob("metrics.csv"))]
    return [{k: number(v) for k, v in row.items() if v and "stats" not in k.lower()} for file in found for row in file]


def number(text):
    return float(text) if text.replace(".", "").replace("e-", "").isdigit() else text


# -------------------------------------------------------------------- profilers


class Profiled(Tried):
    def given(self, folder):
        return {"profiler": self.profiler(folder), "max_epochs": 1}

    def profiler(self, folder):
        return profilers.PassThroughProfiler()


TRIED["PassThroughProfiler"] = Profiled


@tried("SimpleProfiler")
class Simply(Profiled):
    kind = profilers.SimpleProfiler

    def profiler(self, folder):
        return self.kind(folder, "x")

    def seen(self, trainer):
        names = {
            name.rpartition("]")[2].partition(".")[2] for name in getattr(trainer.profiler, "recorded_durations", ())
        }
        ours = {name for name in names if not name.startswith(("setup", "configure_"))}
        written = sorted(path.name for path in self.folder.iterdir()) if RANK == 0 else []
        return {
            "names": sorted(ours),
            "written": [re.sub(r"\[Strategy\]\w+|\d{6,}", "", name) for name in written if name.startswith("fit-x-0")],
        }


@tried("AdvancedProfiler")
class Advanced(Simply):  # early, as late in a long process it does not end, under DDP either
    kind = profilers.AdvancedProfiler


@tried("PyTorchProfiler")
class Torch(Simply):
    kind = profilers.PyTorchProfiler


# -------------------------------------------------------------------- callbacks


class Named(callbacks.Callback):
    """Which hooks are called, in which order."""

    def __init__(self):
        self.names, self.steps = [], 0

    def on_train_batch_end(self, *args):
        self.steps += 1
        self.names.append("on_train_batch_end")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps += state["steps"]


def _noting(name):
    return lambda self, *args, **kwargs: self.names.append(name)


for hook, _ in inspect.getmembers(callbacks.Callback, inspect.isfunction):
    if hook in ("setup", "teardown") or (hook.startswith("on_") and hook != "on_train_batch_end"):
        setattr(Named, hook, _noting(hook))


@tried("Callback")
class Hooks(Tried):
    """All stages, and a run that is resumed."""

    test_step = Plain.validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def given(self, folder):
        return {"callbacks": [Named()], "num_sanity_val_steps": 1}

    def go(self, trainer):
        first = self.another(trainer, max_epochs=1, enable_checkpointing=True)
        first.fit(type(self)())
        first.save_checkpoint(f"{self.folder}/x.ckpt")
        self.first = first
        trainer.fit(self, ckpt_path=f"{self.folder}/x.ckpt")
        trainer.test(self, loader(), verbose=False)
        trainer.predict(self, loader())

    def seen(self, trainer):
        both = [callback(t, Named) for t in (self.first, trainer)]
        hooks = [
            " ".join(c.names).replace("on_fit_start on_load_checkpoint", "on_load_checkpoint on_fit_start")
            for c in both
        ]
        return {"hooks": hooks, "steps": [c.steps for c in both]}


@tried("LambdaCallback")
class Lambda(Tried):
    def given(self, folder):
        self.called = []
        note = {"on_train_batch_end": lambda t, m, out, *_: self.called.append(float(out["loss"]))}
        return {"callbacks": [callbacks.LambdaCallback(**note)]}

    def seen(self, trainer):
        return {"called": self.called}


class Writer(callbacks.BasePredictionWriter):
    def __init__(self, folder):
        super().__init__("batch_and_epoch")
        self.folder = Path(folder)

    def write_on_batch_end(self, trainer, module, prediction, indices, batch, batch_idx, dataloader_idx):
        torch.save((prediction, indices), self.folder / f"{RANK}.{batch_idx}.pt")

    def write_on_epoch_end(self, trainer, module, predictions, indices):
        torch.save((torch.cat(predictions), indices), self.folder / f"{RANK}.all.pt")


@tried("BasePredictionWriter")
class Predicting(Tried):
    predict_step = Hooks.predict_step

    def given(self, folder):
        return {"callbacks": [Writer(folder)], "max_epochs": 1}

    def go(self, trainer):
        trainer.predict(self, loader(), return_predictions=False)
        trainer.fit(self)
        trainer.predict(self, loader(), return_predictions=False)

    def seen(self, trainer):
        found = {path.name: torch.load(path) for path in sorted(self.folder.glob(f"{RANK}.*.pt"))}
        return {name: [prediction.tolist(), indices] for name, (prediction, indices) in found.items()}


@tried("EarlyStopping")
class Early(Tried):
    def given(self, folder):
        stop = callbacks.EarlyStopping("val", min_delta=0.5, patience=1)
        return {"callbacks": [stop], "max_epochs": 8}

    def seen(self, trainer):
        stop = callback(trainer, callbacks.EarlyStopping)
        return {"stopped": [trainer.global_step, stop.stopped_epoch, stop.wait_count, float(stop.best_score)]}


@tried("Timer")
class Timed(Tried):
    def given(self, folder):
        return {"callbacks": [callbacks.Timer(duration={"hours": 1})], "enable_checkpointing": True}

    def go(self, trainer):
        timer = callback(trainer, callbacks.Timer)
        trainer.callbacks.append(
            callbacks.LambdaCallback(
                on_train_batch_start=lambda t, *_: setattr(timer, "_offset", 3601 * (t.global_step == 4))
            )
        )
        trainer.fit(self)
        trainer.save_checkpoint(f"{self.folder}/x.ckpt")
        self.again = self.another(trainer)
        self.again.fit(type(self)(), ckpt_path=f"{self.folder}/x.ckpt")

    def seen(self, trainer):
        timer = callback(trainer, callbacks.Timer)
        return {"stopped": [trainer.global_step, self.again.global_step, timer.time_remaining() < 0]}


class Checkpointed(Tried):
    def seen(self, trainer):
        saved = trainer.checkpoint_callback
        files = sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*.ckpt"))
        paths = [saved.best_model_path, saved.last_model_path, saved.kth_best_model_path, *saved.best_k_models]
        scores = [saved.best_model_score, saved.current_score, *saved.best_k_models.values()]
        names = [os.path.relpath(path, self.folder) if path else "" for path in paths]
        return {
            "files": files,
            "paths": names,
            "scores": [score if score is None else float(score) for score in scores],
        }


@tried("ModelCheckpoint")
class Best(Checkpointed):
    def given(self, folder):
        name = {"dirpath": folder, "filename": "{epoch}-{step}-{val:.3f}"}
        best = callbacks.ModelCheckpoint(**name, monitor="val", save_top_k=2, save_last=True)
        return {"callbacks": [best], "max_epochs": 3}

    def go(self, trainer):
        trainer.validate(self, verbose=False)
        trainer.fit(self)
        trainer.validate(self, ckpt_path="best", verbose=False)  # the weights that are compared

    def seen(self, trainer):
        return {**super().seen(trainer), "val": float(trainer.callback_metrics["val"])}


@tried("ModelCheckpoint(every_n_train_steps, save_weights_only=True)")
class WeightsOnly(Checkpointed):
    def given(self, folder):
        every = callbacks.ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, save_weights_only=True)
        return {"callbacks": [every]}


class Saved(callbacks.Checkpoint):
    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(f"{module.folder}/{trainer.current_epoch}.ckpt")


@tried("Checkpoint")
class OwnCheckpoint(Tried):
    def given(self, folder):
        return {"callbacks": [Saved()], "enable_checkpointing": True}

    def seen(self, trainer):
        return {"files": sorted(path.name for path in self.folder.glob("*.ckpt"))}


class Unfailing(Tried):
    def seen(self, trainer):
        return {"file": True, "steps": trainer.global_step}


@tried("OnExceptionCheckpoint")
class Excepted(Unfailing):
    """Fails at a step, and goes on from the file."""

    undisturbed = Unfailing  # Lightning itself begins the epoch's data anew
    fails = True

    def given(self, folder):
        return {"callbacks": [callbacks.OnExceptionCheckpoint(folder, "x")], "enable_checkpointing": True}

    def training_step(self, batch, batch_idx):
        if self.fails and self.trainer.global_step == 4:
            raise KeyError("a fault")
        return super().training_step(batch, batch_idx)

    def go(self, trainer):
        with contextlib.suppress(KeyError):
            first = self.another(trainer)
            first.fit(type(self)())
        self.fails = False
        self.existed = Path(self.folder, "x.ckpt").exists()
        trainer.fit(self, ckpt_path=f"{self.folder}/x.ckpt")

    def seen(self, trainer):
        return {"file": self.existed, "steps": trainer.global_step}


class Logged(Tried):
    """Into a CSV file."""

    def given(self, folder):
        return {"logger": loggers.CSVLogger(folder, name=""), "log_every_n_steps": 1}

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [StepLR(optimizer, 1, 0.5)]

    def seen(self, trainer):
        return {"rows": rows(self.folder) if RANK == 0 else []}


@tried("DeviceStatsMonitor")
class Device(Logged):
    def given(self, folder):
        return {**super().given(folder), "callbacks": [callbacks.DeviceStatsMonitor(cpu_stats=True)]}

    def seen(self, trainer):
        return {"rows": [sorted(row) for row in rows(self.folder)] if RANK == 0 else []}


@tried("LearningRateMonitor")
class Rates(Logged):
    def given(self, folder):
        monitor = callbacks.LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
        return {**super().given(folder), "callbacks": [monitor]}

    def seen(self, trainer):
        found = callback(trainer, callbacks.LearningRateMonitor)
        return {
            **super().seen(trainer),
            "lrs": found.lrs,
            "sums": [found.last_momentum_values, found.last_weight_decay_values],
        }


@tried("ThroughputMonitor")
class Throughput(Logged):
    flops_per_batch = 100

    def given(self, folder):
        monitor = callbacks.ThroughputMonitor(lambda b: len(b[0]), lambda b: b[0].numel(), window_size=2)
        return {**super().given(folder), "callbacks": [monitor]}

    def seen(self, trainer):
        def counted(key):
            return key.startswith("train/") and key.endswith(("batches", "samples", "lengths"))

        exact = [{k: v if counted(k) or "/" not in k else 0 for k, v in row.items()} for row in rows(self.folder)]
        return {"rows": exact if RANK == 0 else []}


@tried("SpikeDetection")
class Spike(Tried):
    def given(self, folder):
        return {
            "callbacks": [callbacks.SpikeDetection(warmup=2, rtol=2.0, exclude_batches_path=folder)],
            "max_epochs": 1,
        }

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (100 if batch_idx == 2 and place()[0] == RANK + 1 else 1)

    def go(self, trainer):
        self.raised = ""
        try:
            trainer.fit(self)
        except RuntimeError as err:
            self.raised = str(err)

    def seen(self, trainer):
        found = callback(trainer, callbacks.SpikeDetection)
        path = Path(self.folder, "skip_batches.json")
        skipped = json.loads(path.read_text()) if RANK == 0 and path.exists() else []
        return {"raised": self.raised, "bad": found.bad_batches, "skipped": skipped, "last": float(found.last_val)}


class Printed(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines += [line.rstrip() for line in record.getMessage().splitlines()]


@tried("ModelSummary")
class Summary(Tried):
    """With a part that is frozen."""

    kind = callbacks.ModelSummary

    def __init__(self):
        super().__init__()
        self.fixed, self.scale = nn.Linear(3, 3), nn.Parameter(torch.zeros(7))
        for part in (self.fixed, self.scale, self.body):
            part.requires_grad_(False)
        self.example_input_array = torch.zeros(2, 6)

    def given(self, folder):
        return {"callbacks": [self.kind(max_depth=2)], "enable_model_summary": True, "max_epochs": 1}

    def go(self, trainer):
        printed, log = Printed(), logging.getLogger("lightning.pytorch.callbacks.model_summary")
        level, out = log.level, io.StringIO()
        log.addHandler(printed)
        log.setLevel(logging.INFO)
        with contextlib.redirect_stdout(out):
            trainer.fit(self)
        log.removeHandler(printed)
        log.setLevel(level)
        self.printed = printed.lines + out.getvalue().splitlines()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.head.parameters(), lr=0.05)

    def seen(self, trainer):
        return {"printed": list(whole_table(self.printed))}


def whole_table(lines):
    """The words of a summary, without what each device has of it."""
    parts = None
    for line in lines:
        if not line.strip(" ─━-┏┳┓┡╇┩└┴┘"):
            continue
        cells = [cell.strip().removeprefix("FSDP") for cell in re.split("[|│┃]", line)]
        parts = cells.index("Params per Device") if "Params per Device" in cells else parts
        if parts is not None and len(cells) > parts:
            del cells[parts]
        yield " ".join(" ".join(cells).split())


@tried("RichModelSummary")
class RichSummary(Summary):
    kind = callbacks.RichModelSummary


class Bar(callbacks.ProgressBar):
    def __init__(self):
        super().__init__()
        self.shown = []

    def disable(self): ...

    def enable(self): ...

    def on_train_batch_end(self, trainer, module, *args):
        self.shown.append(
            [self.total_train_batches, {k: float(v) for k, v in self.get_metrics(trainer, module).items()}]
        )


@tried("ProgressBar")
class Progress(Tried):
    def given(self, folder):
        return {"callbacks": [Bar()], "enable_progress_bar": True, "max_epochs": 1}

    def seen(self, trainer):
        return {"shown": callback(trainer, Bar).shown}


class Tqdm(callbacks.TQDMProgressBar):
    last = None

    def on_train_epoch_end(self, trainer, module):
        super().on_train_epoch_end(trainer, module)
        bar = self.train_progress_bar
        self.last = [bar.n, bar.total, bar.postfix, bar.disable]


@tried("TQDMProgressBar")
class TqdmProgress(Progress):
    def given(self, folder):
        return {**super().given(folder), "callbacks": [Tqdm()]}

    def go(self, trainer):
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            trainer.fit(self)

    def seen(self, trainer):
        return {"last": callback(trainer, Tqdm).last}


class Rich(callbacks.RichProgressBar):
    last = None

    def on_train_epoch_end(self, trainer, module):
        super().on_train_epoch_end(trainer, module)
        if not self.is_disabled:
            task = self.progress.tasks[0]
            self.last = [task.completed, task.total, dict(self._metric_component._metrics)]


@tried("RichProgressBar")
class RichProgress(TqdmProgress):
    def given(self, folder):
        return {**super().given(folder), "callbacks": [Rich(console_kwargs={"file": io.StringIO()})]}

    def seen(self, trainer):
        return {"last": callback(trainer, Rich).last}


@tried("GradientAccumulationScheduler")
class Rescheduled(Tried):
    def given(self, folder):
        return {"callbacks": [callbacks.GradientAccumulationScheduler({0: 1, 1: 2})]}

    def seen(self, trainer):
        return {"steps": trainer.global_step}


class Thaw(callbacks.BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.body)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.body, optimizer, lr=0.01)


@tried("BaseFinetuning")
class Thawed(Tried):
    alone = True  # DDP does not reduce the gradients of what was frozen when it began

    def given(self, folder):
        return {"callbacks": [Thaw()]}

    def configure_optimizers(self):
        return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=0.05)

    def seen(self, trainer):
        groups = trainer.optimizers[0].param_groups
        return {"groups": [[group["lr"], len(group["params"])] for group in groups]}


@tried("BackboneFinetuning")
class Backbone(Thawed):
    def __init__(self):
        super().__init__()
        self.backbone = self.body
        del self.body

    def forward(self, x):
        return self.head(self.backbone(x).tanh())

    def given(self, folder):
        return {"callbacks": [callbacks.BackboneFinetuning(1, lambda epoch: 1.5, verbose=False)], "max_epochs": 3}


@tried("StochasticWeightAveraging")
class Stochastic(Tried):
    def given(self, folder):
        return {"callbacks": [callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1)], "max_epochs": 3}


@tried("WeightAveraging")
class Averaged(Checkpointed):
    kind = callbacks.WeightAveraging

    def given(self, folder):
        saved = callbacks.ModelCheckpoint(folder, monitor="val")
        return {"callbacks": [self.kind(), saved]}

    def seen(self, trainer):
        return {**super().seen(trainer), "val": float(trainer.callback_metrics["val"])}


@tried("EMAWeightAveraging")
class Exponential(Averaged):
    def kind(self):
        return callbacks.EMAWeightAveraging(decay=0.9)


@tried("ModelPruning")
class Pruned(Tried):
    def given(self, folder):
        return {"callbacks": [callbacks.ModelPruning("l1_unstructured", amount=0.5)]}


class Found(Tried):
    """With a rate and a size that can be looked for."""

    lr = 0.05
    batch_size = 4

    def train_dataloader(self):
        dataset = torch.utils.data.TensorDataset(
            *next(iter(torch.utils.data.DataLoader(loader(rows=112).dataset, 112)))
        )
        ranks, rank = place()
        sampler = torch.utils.data.DistributedSampler(dataset, ranks, rank, shuffle=False)
        return torch.utils.data.DataLoader(dataset, self.batch_size, sampler=sampler)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def given(self, folder):
        return {"default_root_dir": folder, "max_epochs": 1, "enable_checkpointing": True}

    def seen(self, trainer):
        left = sorted(path.name for path in self.folder.rglob(".*_*.ckpt"))
        return {"lr": self.lr, "size": self.batch_size, "left": left, "steps": trainer.global_step}


@tried("LearningRateFinder")
class RateFound(Found):
    def given(self, folder):
        return {**super().given(folder), "callbacks": [callbacks.LearningRateFinder(1e-4, 0.5, num_training_steps=13)]}

    def seen(self, trainer):
        found = callback(trainer, callbacks.LearningRateFinder).optimal_lr
        return {**super().seen(trainer), "results": found.results, "suggestion": found.suggestion()}


@tried("Tuner.lr_find")
class RateTuned(Found):
    def go(self, trainer):
        self.found = Tuner(trainer).lr_find(self, min_lr=1e-4, max_lr=0.5, num_training=13)
        trainer.fit(self)
        gc.collect()  # the engines of the search, of which nothing may hang on
        trainer.save_checkpoint(f"{self.folder}/x.ckpt")
        trainer.validate(self, ckpt_path=f"{self.folder}/x.ckpt", verbose=False)

    def seen(self, trainer):
        return {**super().seen(trainer), "results": self.found.results, "suggestion": self.found.suggestion()}


@tried("BatchSizeFinder")
class SizeFound(Found):
    refused_by_the_measure = place()[0] > 1

    def given(self, folder):
        finder = callbacks.BatchSizeFinder(max_trials=3, steps_per_trial=1)
        return {**super().given(folder), "callbacks": [finder]}

    def seen(self, trainer):
        return {**super().seen(trainer), "found": callback(trainer, callbacks.BatchSizeFinder).optimal_batch_size}


@tried("Tuner.scale_batch_size")
class SizeTuned(Found):
    refused_by_the_measure = place()[0] > 1

    def go(self, trainer):
        self.found = Tuner(trainer).scale_batch_size(self, mode="binsearch", max_trials=3, steps_per_trial=1)
        trainer.fit(self)

    def seen(self, trainer):
        return {**super().seen(trainer), "found": self.found}


# -------------------------------------------------------------------- loggers


@tried("CSVLogger")
class Csv(Logged):
    """Its hyperparameters too."""

    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()

    def seen(self, trainer):
        text = Path(self.folder, "version_0", "hparams.yaml").read_text() if RANK == 0 else ""
        return {**super().seen(trainer), "hparams": text}


class Own(loggers.Logger):
    name, version = "own", 0

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step=None):
        self.lines.append([dict(metrics), step])

    def log_hyperparams(self, params, *args):
        self.lines.append(dict(params))

    def log_graph(self, model, input_array=None):
        self.lines.append("graph")

    def save(self):
        self.lines.append("save")

    def finalize(self, status):
        self.lines.append(status)

    def after_save_checkpoint(self, saved):
        self.lines.append(os.path.basename(saved.last_model_path or saved.best_model_path))


@tried("Logger")
class OwnLogger(Csv):
    def given(self, folder):
        saved = callbacks.ModelCheckpoint(folder, monitor="val")
        return {"logger": [Own(), *[super().given(folder)["logger"]]], "log_every_n_steps": 1, "callbacks": [saved]}

    def seen(self, trainer):
        return {**super().seen(trainer), "lines": trainer.loggers[0].lines}


@tried("TensorBoardLogger", "tensorboard")
class Board(Csv):
    graph = False

    def __init__(self, width=8):
        super().__init__(width)
        self.example_input_array = torch.zeros(2, 6)

    def given(self, folder):
        return {"logger": loggers.TensorBoardLogger(folder, name="", log_graph=self.graph), "log_every_n_steps": 1}

    def seen(self, trainer):
        if RANK:
            return {}
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(trainer.logger.log_dir).Reload()
        scalars = {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        nodes = len(events.Graph().node) if events.Tags()["graph"] else 0
        return {"scalars": scalars, "graph": nodes > 10, "files": sorted(os.listdir(trainer.logger.log_dir))[1:]}


@tried("TensorBoardLogger(log_graph=True)", "tensorboard")
class Graph(Board):
    graph = True


@tried("WandbLogger", "wandb")
class Wandb(Csv):
    def given(self, folder):
        return {"logger": loggers.WandbLogger("x", folder, offline=True), "log_every_n_steps": 1}

    def seen(self, trainer):
        if RANK:
            return {}
        run = trainer.logger.experiment
        found = {name: value for name, value in dict(run.summary).items() if not name.startswith("_")}
        run.finish()
        return {"last": found, "config": dict(run.config)}


@tried("MLFlowLogger", "mlflow")
class Flow(Csv):
    def given(self, folder):
        return {"logger": loggers.MLFlowLogger("x", tracking_uri=f"file:{folder}"), "log_every_n_steps": 1}

    def seen(self, trainer):
        if RANK:
            return {}
        client, run = trainer.logger.experiment, trainer.logger.run_id
        history = {k: client.get_metric_history(run, k) for k in ("loss", "val")}
        values = {k: [[m.step, m.value] for m in found] for k, found in history.items()}
        return {**values, "run": [client.get_run(run).info.status, client.get_run(run).data.params]}


# -------------------------------------------------------------------- how they are run


def run_of(cls, strategy, folder):
    """The Trainer, the weights, and what there is to see."""
    torch.manual_seed(7 + RANK)
    module = cls()
    module.folder = Path(folder, strategy.rpartition(".")[2])
    module.folder.mkdir(parents=True, exist_ok=True)
    trainer = made(strategy, {"default_root_dir": module.folder, **module.given(module.folder)})
    outcome = {}
    try:
        module.go(trainer)
        trainer.strategy.barrier()  # files that rank 0 writes
        outcome = {
            "weights": {n: v.double().tolist() for n, v in weights(trainer, module).items()},
            **module.seen(trainer),
        }
    except Exception as err:
        outcome = {"error": err, "step": trainer.global_step}
        if not isinstance(err, MisconfigurationException):
            traceback.print_exception(err)
    return outcome


def difference(found, expected, at=""):
    """Where two nests of values differ, and how; None where they do not."""
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        pairs = [(k, found[k], expected[k]) for k in expected]
    elif isinstance(expected, list | tuple) and isinstance(found, list | tuple) and len(found) == len(expected):
        pairs = [(k, a, b) for k, (a, b) in enumerate(zip(found, expected, strict=True))]
    elif isinstance(expected, float) and isinstance(found, float):
        return None if math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-5) else f"{at}: {found}, not {expected}"
    else:
        return None if found == expected else f"{at}: {found}, not {expected}"
    return next((text for k, a, b in pairs if (text := difference(a, b, f"{at}.{k}"))), None)


def verdict(found, expected):
    if "error" in found:
        err = found["error"]
        as_measure = str(err) == str(expected.get("error"))
        told = (isinstance(err, MisconfigurationException) or as_measure) and not found["step"]
        text = " ".join(str(err).split())
        return f"refused: {text}" if told else f"WRONG: {type(err).__name__} at step {found['step']}: {text}"
    return f"WRONG: {wrong}" if (wrong := difference(found, expected)) else "equal"


def run(strategies, measure, folder):
    """Of each what came of it, by strategy."""
    results = {}
    for number, (name, cls) in enumerate(TRIED.items()):
        gc.freeze()  # what is over is not looked through again
        if cls.package and not importlib.util.find_spec(cls.package):
            results[name] = dict.fromkeys(strategies, f"skipped: {cls.package} is not installed")
            continue
        place = Path(folder, str(number))
        if cls.alone and measure == "ddp":
            with one_process():
                expected = run_of(cls, "lightrft_fake", place / f"alone{RANK}")
        else:
            expected = run_of(getattr(cls, "undisturbed", cls), measure, place)
        if "error" in expected and not cls.refused_by_the_measure:
            results[name] = dict.fromkeys(strategies, f"{measure}: {verdict(expected, {})}")
            continue
        results[name] = {strategy: verdict(run_of(cls, strategy, place), expected) for strategy in strategies}
    return results


if __name__ == "__main__":
    os.environ["COLUMNS"] = "200"
    folder, TRIED = begun(TRIED)
    ours, measure = (STRATEGIES, "ddp") if place()[0] > 1 else (("lightrft_fake",), "auto")
    Path(folder, f"{RANK}.json").write_text(json.dumps(run(ours, measure, folder), indent=1))
