"""Lightning's training loops, which go on exactly where a checkpoint was written.

Lightning restores the counters of its loops as they were when a hook saved them, some of them one ahead of the others,
and guesses from that what was under way. It guesses wrongly at the end of an epoch and for a run that was resumed
before: batches come again, validation is left out, epochs are not counted. Here the counters are put in order when they
are loaded, and what the hook had interrupted is done first.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops import _FitLoop, _TrainingEpochLoop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightrft_lightning.checkpoints import claim, data_size, epoch_sums, stopping
from lightrft_lightning.checkpoints.save_order import model_checkpoints, saving_last
from lightrft_lightning.checkpoints.state import rng_state, set_rng_state

BATCH_END, AFTER_VALIDATION = "batch end", "after validation"
_KEY = "lightrft"
_METRICS = ("callback_metrics", "logged_metrics", "progress_bar_metrics")
_REMEMBERED = ("dirpath", "_last_global_step_saved", "_last_checkpoint_saved", "_defer_save_until_validation")
"""What `ModelCheckpoint` leaves out of its state, though it decides by it whether to save."""


def install(trainer: pl.Trainer) -> None:
    """Let `trainer` train with these loops, if it has Lightning's own."""
    loop = trainer.fit_loop
    if type(loop) is _FitLoop and type(loop.epoch_loop) is _TrainingEpochLoop:
        loop.__class__, loop.epoch_loop.__class__ = FitLoop, EpochLoop


class Position(NamedTuple):
    """Where in the loops a checkpoint was written.

    Attributes:
        epoch: epochs that are over.
        in_epoch: whether the next one has begun.
        batches: how many of its batches are done.
        is_last: the last of these was the epoch's last.
        left: what is still to be done after it: `BATCH_END`, `AFTER_VALIDATION` or nothing.
        under_way: a batch had been taken from the data loader and is not done.
    """

    epoch: int
    in_epoch: bool
    batches: int
    is_last: bool
    left: str = ""
    under_way: bool = False

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Position:
        """The position of a fit loop's saved state.

        Args:
            state: ``checkpoint["loops"]["fit_loop"]``, of these loops or of Lightning's.
        """
        epoch, batch = state["epoch_progress"]["current"], state["epoch_loop.batch_progress"]["current"]
        known = state["state_dict"].get(_KEY, {})
        is_last = bool(state["epoch_loop.batch_progress"].get("is_last_batch") or known.get("is_last"))
        done, total = epoch["processed"], batch["completed"]
        if epoch["ready"] == done and total and not is_last and batch["ready"] == total:
            return cls(done - 1, True, total, False)  # the run was ended in the middle of an epoch
        if epoch["started"] <= done:
            return cls(done, False, 0, False)
        if batch["processed"] > total:
            return cls(done, True, batch["processed"], is_last, BATCH_END)
        if batch["ready"] > total:
            return cls(done, True, total, False, "", True)
        return cls(done, True, total, is_last, _left_of_validation(state) if total else "")


def _left_of_validation(state: Mapping[str, Any]) -> str:
    """Between two batches a checkpoint is written by a hook of validation, or by one for exceptions."""
    known = state["state_dict"].get(_KEY)
    if known is not None:
        return known["left"]
    val = state["epoch_loop.val_loop.batch_progress"]
    return AFTER_VALIDATION if val.get("is_last_batch") and val["current"]["completed"] else BATCH_END


def in_order(state: Mapping[str, Any], position: Position) -> dict[str, Any]:
    """`state` with the counters that an uninterrupted run has at `position`, between two batches."""
    ordered = copy.deepcopy(dict(state))
    begun = position.epoch + position.in_epoch
    epochs = ordered["epoch_progress"]
    earlier = epochs["total"]["processed"] - epochs["current"]["processed"]
    for name, before in (("current", 0), ("total", earlier)):
        epochs[name].update(ready=before + begun, started=before + begun)
        epochs[name].update(processed=before + position.epoch, completed=before + position.epoch)
    batches, batch = ordered["epoch_loop.batch_progress"], position.batches
    in_all = batches["total"]["processed" if position.left == BATCH_END else "completed"]
    for name, value in (("current", batch), ("total", in_all)):
        batches[name] = dict.fromkeys(batches[name], value)
    batches["is_last_batch"] = position.is_last
    for key, progress in ordered.items():
        if key.endswith(("optim_progress", "optim_step_progress", "scheduler_progress")):
            _as_completed(progress)
    return ordered


def _as_completed(progress: dict[str, Any]) -> None:
    if "completed" in progress:
        progress.update(dict.fromkeys(progress, progress["completed"]))
        return
    for value in progress.values():
        if isinstance(value, dict):
            _as_completed(value)


class EpochLoop(_TrainingEpochLoop):
    """One epoch, the first one from the middle."""

    # Class attributes in place of an own `__init__`: an object of Lightning's becomes one of this class.
    left = ""
    """What the checkpoint's hook had interrupted."""
    resumed = False
    """Whether the counters are those of a checkpoint, until the epoch has begun."""
    steps_before = -1
    """Optimizer steps of the run before this batch."""
    saving_late = False
    """A checkpoint is being written between the hooks of a batch and what comes after it."""
    waiting: list[Callable[[], None]] = []
    """See `save`."""
    idle: dict[int, int] = {}
    """By `id` of a ModelCheckpoint: batches without an optimizer step since it saved."""
    seeds: dict[str, Any] | None = None
    """The random state from which the order of this epoch was drawn, where a data loader does not know its position."""

    @property
    @override
    def done(self) -> bool:
        return not self.left and super().done

    @override
    def reset(self) -> None:
        if not self.resumed:
            super().reset()
        self.resumed = False

    @override
    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        fit_loop = self.trainer.fit_loop
        assert isinstance(fit_loop, FitLoop)
        first = self.seeds is not None and self.trainer.current_epoch == 0
        if fit_loop.forgetful and not fit_loop.is_resuming:
            before = self.seeds["iter"] if first else rng_state()  # type: ignore[index]
            super().on_run_start(data_fetcher)
            self.seeds = {"iter": before, "batch": rng_state()}
        else:
            super().on_run_start(data_fetcher)

    @override
    def advance(self, data_fetcher: _DataFetcher) -> None:
        if not self.left:
            self.steps_before = self.global_step
            with saving_last(self.trainer, "on_train_batch_end") as self.waiting:
                super().advance(data_fetcher)
            self.saving_late = True
            try:
                self.save()
            finally:
                self.saving_late = False
            if not self.trainer.lightning_module.automatic_optimization:
                self._save_where_due()
            return
        left, self.left = self.left, ""  # `on_advance_end` comes next and does it
        self._skip_next_val = left == AFTER_VALIDATION

    @override
    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        with saving_last(self.trainer, "on_validation_end") as self.waiting:
            super().on_advance_end(data_fetcher)

    def save(self) -> None:
        """What waits for the module's hook to be over."""
        while self.waiting:
            self.waiting.pop(0)()

    def note_progress(self) -> None:
        """Let callbacks save a batch without an optimizer step too, as `ModelCheckpoint` takes it for nothing new."""
        if self.global_step != self.steps_before:
            return
        for callback in model_checkpoints(self.trainer):
            self.idle[id(callback)] = batches = self.idle.get(id(callback), 0) + 1
            if batches >= callback._every_n_train_steps:
                callback._last_global_step_saved = -1

    def _save_where_due(self) -> None:
        """Let callbacks save that count steps where there are none, or time, which Lightning's do not do by themselves.

        They do it only where Lightning optimizes.
        """
        trainer = self.trainer
        for callback in model_checkpoints(trainer):
            steps, seconds = callback._every_n_train_steps, callback._train_time_interval
            due = idle = steps >= 1 and self.idle.get(id(callback), 0) >= steps
            if seconds is not None:
                passed = time.monotonic() - (callback._last_time_checked or 0.0) >= seconds.total_seconds()
                due = trainer.strategy.broadcast(passed)
            if due and not callback._should_skip_saving_checkpoint(trainer):
                self._save_late(callback)
            if callback._last_global_step_saved == self.global_step and (idle or self.global_step != self.steps_before):
                self.idle[id(callback)] = 0

    def _save_late(self, callback: ModelCheckpoint) -> None:
        metrics = callback._monitor_candidates(self.trainer)
        if callback.monitor is not None and callback.monitor not in metrics:
            callback._defer_save_until_validation = True
            return
        self.saving_late = True
        try:
            callback._save_topk_checkpoint(self.trainer, metrics)
            callback._save_last_checkpoint(self.trainer, metrics)
        finally:
            self.saving_late = False
        callback._last_time_checked = time.monotonic()


class FitLoop(_FitLoop):
    """All epochs, from the position of a checkpoint if there is one."""

    epoch_loop: EpochLoop
    position: Position | None = None
    _seeds: dict[str, Any] | None = None
    _extra: Mapping[str, Any] = {}
    own: Mapping[str, Any] = {}
    """What `own_state` was on this rank."""
    patience: Mapping[int, int] = {}
    """See `stopping.given_patience`."""

    def own_state(self) -> dict[str, Any]:
        """What a rank has of its own: its random state, that of its data's order, and what it has logged so far."""
        seeds = self.epoch_loop.seeds if self.forgetful else None
        return {"rng": rng_state(), "seeds": seeds, "sums": epoch_sums.epoch_sums(self.trainer)}

    @property
    def forgetful(self) -> bool:
        """Whether a training data loader cannot say where it is."""
        loader = self._combined_loader
        return loader is not None and not all(isinstance(one, _Stateful) for one in loader.flattened)

    @property
    @override
    def done(self) -> bool:
        # After the last step of all, too, an interrupted hook is followed by the rest of its epoch.
        return not (self.position is not None and self.epoch_loop.left) and super().done

    @property
    @override
    def skip(self) -> bool:
        skipped = super().skip
        if skipped and self.position is not None and self.position.in_epoch:  # the run is over, and so is this epoch
            for progress in (self.epoch_progress.current, self.epoch_progress.total):
                vars(progress).update(processed=progress.ready, completed=progress.ready)
        return skipped

    @override
    def run(self) -> None:
        strategy: Any = self.trainer.strategy
        with claim.claimed(self.trainer, strategy._join_ranks()):
            if self.position is not None:
                stopping.take_up(self.trainer, self.patience, self._saved_metrics("callback_metrics"))
            super().run()

    # ---------------------------------------------------------------- saving

    @override
    def on_save_checkpoint(self) -> dict[str, Any]:
        state = super().on_save_checkpoint()
        here = Position.of(_progress(self))
        trainer, loader = self.trainer, self._combined_loader
        if here.in_epoch and here.batches and not here.under_way and self.epoch_loop._should_accumulate():
            rank_zero_warn(
                f"a checkpoint in the middle of an accumulation (accumulate_grad_batches="
                f"{trainer.accumulate_grad_batches}): gradients that wait for the next batch are not part of it. A run "
                "that goes on from it makes this optimizer step without them"
            )
        if here.under_way and loader is not None:
            state["combined_loader"] = [_before_batch(one) for one in loader.flattened if isinstance(one, _Stateful)]
        hook = trainer.lightning_module._current_fx_name if trainer.lightning_module is not None else None
        validated = hook == "on_validation_end"
        left = (AFTER_VALIDATION if validated else BATCH_END) if trainer.validating else ""
        state[_KEY] = {
            "left": BATCH_END if self.epoch_loop.saving_late else left,
            "is_last": loader is not None and self.epoch_loop._num_ready_batches_reached(),
            "reloaded": self._last_train_dl_reload_epoch,
            "data": data_size.sizes(trainer),
            "metrics": {name: _numbers(getattr(trainer, name)) for name in _METRICS},
            "checkpoints": [{name: getattr(c, name) for name in _REMEMBERED} for c in model_checkpoints(trainer)],
        }
        return state

    # ---------------------------------------------------------------- resuming

    @override
    def load_state_dict(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        self.position = position = Position.of(state_dict)
        super().load_state_dict(in_order(state_dict, position), prefix)
        self.epoch_loop.left = position.left

    @override
    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        super().on_load_checkpoint(state_dict)
        self._extra = state_dict.get(_KEY, {})

    @override
    def setup_data(self) -> None:
        is_first = self._combined_loader is None
        if is_first:
            self._seeds = rng_state()
        super().setup_data()
        if is_first and self.position is not None:
            self._last_train_dl_reload_epoch = self._extra.get("reloaded", self._last_train_dl_reload_epoch)

    @override
    def _load_combined_loader_states(self) -> None:
        states, self._combined_loader_states_to_load = self._combined_loader_states_to_load, []
        position = self.position
        if position is None or not position.in_epoch or position.is_last or self._combined_loader is None:
            return
        self._combined_loader._load_state_dicts(states)
        stateful = [one for one in self._combined_loader.flattened if isinstance(one, _Stateful)]
        if position.under_way and not all(hasattr(one, "state_before_batch") for one in stateful):
            rank_zero_warn(
                "the checkpoint was written in the middle of a batch, and the data loader's state is that after it: "
                "this batch is left out"
            )

    @override
    def reset(self) -> None:
        super().reset()
        epoch_loop = self.epoch_loop
        epoch_loop.idle = {}
        epoch_loop.seeds = {"iter": self._seeds, "batch": None} if self.forgetful else None
        if self.position is None:
            return
        for loop in (self, epoch_loop, epoch_loop.val_loop):
            loop._restarting = False
            loop.reset_restart_stage()
        self._resuming_from_checkpoint = epoch_loop.resumed = self.position.in_epoch
        in_epoch = self.position.in_epoch and not self.position.is_last
        if in_epoch:
            self._count_batches()
        data_size.tell_changes(self._extra.get("data", []), data_size.sizes(self.trainer), in_epoch)
        for name in self._extra.get("metrics", {}):
            getattr(self.trainer._logger_connector, f"_{name}").update(self._saved_metrics(name))

    def _saved_metrics(self, name: str) -> dict[str, torch.Tensor]:
        values, device = self._extra.get("metrics", {}).get(name, {}), self.trainer.strategy.root_device
        return {k: torch.tensor(v, dtype=getattr(torch, kind), device=device) for k, (v, kind) in values.items()}

    def _count_batches(self) -> None:
        """With another batch size or number of ranks, what is done of the epoch is another number of batches."""
        assert self._combined_loader is not None
        loaders = self._combined_loader.flattened
        if len(loaders) == 1 and hasattr(loaders[0], "batches_done"):
            current = self.epoch_loop.batch_progress.current
            current.ready = current.started = current.processed = current.completed = loaders[0].batches_done  # type: ignore[attr-defined]

    @property
    @override
    def restarted_mid_epoch(self) -> bool:
        return self.position is not None and self.position.in_epoch

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        if self.position is None:
            return
        self._remember_checkpoints()
        # Only now: loading data, sanity checks and callbacks may have drawn numbers since the checkpoint was read.
        set_rng_state(self.own.get("rng", {}))

    def _remember_checkpoints(self) -> None:
        trainer = self.trainer
        callbacks, saved = model_checkpoints(trainer), self._extra.get("checkpoints", [])
        path = Path(str(trainer.ckpt_path)).resolve()
        for callback, values in zip(callbacks, saved, strict=False):
            if callback.dirpath != values["dirpath"] or len(callbacks) != len(saved):
                continue
            vars(callback).update(values)
            its = (callback.best_model_path, callback.last_model_path, *callback.best_k_models)
            if path in [Path(one).resolve() for one in its if one]:  # what it was about to note
                callback._last_global_step_saved, callback._last_checkpoint_saved = trainer.global_step, str(path)

    @override
    def advance(self) -> None:
        position = self.position
        if position is not None and position.in_epoch and not position.is_last and self.forgetful:
            self._skip(position.batches)
        if position is not None and position.in_epoch:
            epoch_sums.restore(self.trainer, self.own.get("sums", {}))
        super().advance()

    def _skip(self, batches: int) -> None:
        """Draw what was trained on already, where the data loaders cannot begin in the middle."""
        fetcher, loader = self._data_fetcher, self._combined_loader
        assert fetcher is not None and loader is not None
        if any(isinstance(one, _Stateful) for one in loader.flattened):
            return  # Lightning has said so
        seeds, now = self.own.get("seeds") or {}, rng_state()
        set_rng_state(seeds.get("iter") or {})
        iter(fetcher)
        set_rng_state(seeds.get("batch") or {})
        for _ in range(batches):
            next(fetcher)
        fetcher.fetched -= batches  # the epoch's loop adds them
        self.epoch_loop.seeds = self.own.get("seeds")
        set_rng_state(now if batches else seeds.get("batch") or now)

    @override
    def on_iteration_done(self) -> None:
        super().on_iteration_done()
        self.position, self._extra, self.own = None, {}, {}


def _progress(loop: FitLoop) -> dict[str, Any]:
    """What `Position.of` needs, of a loop that runs."""
    return {
        "epoch_progress": loop.epoch_progress.state_dict(),
        "epoch_loop.batch_progress": loop.epoch_loop.batch_progress.state_dict(),
        "state_dict": {_KEY: {"left": ""}},
    }


def _before_batch(loader: Any) -> dict[str, Any]:
    return loader.state_before_batch() if hasattr(loader, "state_before_batch") else loader.state_dict()


def _numbers(metrics: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    single = {name: value for name, value in metrics.items() if isinstance(value, torch.Tensor) and value.numel() == 1}
    return {name: (value.item(), str(value.dtype).removeprefix("torch.")) for name, value in single.items()}
