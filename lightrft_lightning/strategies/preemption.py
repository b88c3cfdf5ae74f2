"""A scheduler's signal ends a `Trainer`'s run after the iteration at hand, on all ranks, with a checkpoint.

SIGTERM, SIGHUP of a terminal that was closed, and under SLURM with ``auto_requeue`` also its requeue signal, may reach
one rank or all of them. Each rank takes note; at the end of a batch, where all ranks pass, they agree. Lightning then
ends its loops by a `SIGTERMException`, before which they save. Its own way would save in the middle of an iteration,
and on its own rank. Before the run has begun, SIGTERM and SIGHUP end the process as an exception does: engines and
ranks that it has started end with it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose, _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightrft_lightning.checkpoints.owners import remove_when_free
from lightrft_lightning.checkpoints.save_order import model_checkpoints
from lightrft_lightning.strategies import failures
from lightrft_lightning.strategies.ending import end_with

EXIT_CODE = 128 + signal.SIGTERM
"""Of a run that ended so."""

ONE_ORDER = 1.0
"""Seconds in which signals count as one: some schedulers reach a process themselves and through its launcher."""

SETUP_GRACE = 20.0
"""Seconds for a process that is being set up to come to its end."""

_installed: weakref.WeakSet[Signals] = weakref.WeakSet()


def end_when_preempted(trainer: pl.Trainer) -> None:
    """Let `trainer` end so. For strategies, before anything else is set up; a second call changes nothing."""
    if not isinstance(trainer._signal_connector, Signals):
        trainer._signal_connector = Signals(trainer)
        trainer.callbacks.append(Preemption(trainer._signal_connector))  # type: ignore[attr-defined]
    trainer._signal_connector.listen()


class Signals(_SignalConnector):
    """In place of Lightning's: takes note of signals.

    A thread hears of them, as the interpreter calls its handlers in the main thread only, which may be in a collective
    for minutes.

    Args:
        trainer: whose.

    Attributes:
        order: the signal that this rank has received.
        received_sigterm: all ranks have agreed to end.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer)
        self.order: int | None = None
        self._ordered_at = 0.0
        self._ours: set[signal.Signals] = set()
        self._running = self._left = False
        self._leaving: threading.Timer | None = None
        self._previous_fd = -1
        self._thread: threading.Thread | None = None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    @property
    def requeue_signal(self) -> int | None:
        """Under SLURM, the one after which the job is to be queued again."""
        environment = self.trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return None
        return environment.requeue_signal

    def listen(self) -> None:
        """Hear signals from now on: what is being set up may take minutes, and a job to queue again would be lost."""
        if self._thread is not None:
            return
        self._original_handlers = self._get_current_signal_handlers()
        if threading.current_thread() is not threading.main_thread():
            return  # a fit in a thread: signals go to the main thread, which is not ours
        self._running = self._left = False
        self._leaving = None
        requeue = self.requeue_signal
        # Not those that a user or `nohup` has handlers for.
        self._ours = {s for s in (signal.SIGTERM, signal.SIGHUP) if not self._has_already_handler(s)}
        for signum in self._ours:
            self._register_signal(signum, self._leave)
        if requeue is not None and not self._has_already_handler(requeue):
            self._register_signal(requeue, self._on_signal)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="lightrft-signals", daemon=True)
        self._thread.start()
        _installed.add(self)

    @override
    def register_signal_handlers(self) -> None:
        """Lightning's, once everything is set up."""
        self.received_sigterm = False
        self._running = True
        if self._thread is not None:
            handler = signal.getsignal(signal.SIGTERM)
            others = callable(handler) and handler != self._leave
            ours = _HandlersCompose([self._on_signal, handler]) if others else self._on_signal
            self._register_signal(signal.SIGTERM, ours)
            if signal.SIGHUP in self._ours:
                self._register_signal(signal.SIGHUP, self._on_signal)

    @override
    def teardown(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
        if self._thread is not None:
            self._thread = None
            _installed.discard(self)
            signal.set_wakeup_fd(self._previous_fd)
            self._writer.send(b"\0")
        super().teardown()

    def forget(self) -> None:
        """In a forked child: its signals are its own."""
        signal.set_wakeup_fd(-1)
        self._thread = None
        super().teardown()

    def _on_signal(self, signum: int, frame: Any) -> None:
        """The thread hears of it, unless another library has taken the file descriptor over."""
        current = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        if current != self._writer.fileno():
            signal.set_wakeup_fd(current, warn_on_full_buffer=False)
            self._take(signum)

    def _leave(self, signum: int, frame: Any) -> None:
        """Nothing is lost: no batch is done. Only once, as what ends because of it takes its time."""
        self._on_signal(signum, frame)
        if not self._left:
            self._left = True
            raise SystemExit(EXIT_CODE)

    def _listen(self) -> None:
        while True:
            for signum in self._reader.recv(64):
                if not signum:
                    return
                if self._previous_fd != -1:
                    os.write(self._previous_fd, bytes([signum]))
                if signum in (signal.SIGTERM, self.requeue_signal) or signum in self._ours:
                    self._take(signum)

    def _take(self, signum: int) -> None:
        now = time.monotonic()
        if self._thread is None:  # the run has ended meanwhile
            return
        if self._leaving is None and not self._running and signum in self._ours:
            self._ordered_at = now
            told = f"was told by {_name(signum)} to end, and had not after {SETUP_GRACE:g} s"
            self._leaving = threading.Timer(SETUP_GRACE, failures.end_at_once, (told, EXIT_CODE))
            self._leaving.daemon = True
            self._leaving.start()
            failures.say(f"{_name(signum)} before the first batch: the run ends")
        elif self.order is None and self._leaving is None:
            self.order, self._ordered_at = signum, now
            if self.trainer.global_rank == 0:
                failures.say(f"{_name(signum)}: the run ends after this iteration; a second signal ends it at once")
        elif now - self._ordered_at > ONE_ORDER:
            failures.end_at_once(f"was told by a second signal, {_name(signum)}, to end at once", EXIT_CODE)

    def agree(self) -> bool:
        """Whether any rank has received a signal. All ranks together."""
        if not self.received_sigterm:
            order = int(self.trainer.strategy.all_reduce(self.order or 0, op="max"))  # type: ignore[attr-defined]
            if order and self.order is None and self.trainer.global_rank == 0:
                failures.say(f"{_name(order)} on another rank: the run ends after this iteration")
            self.order = order or None
            self.received_sigterm = order > 0
        return self.received_sigterm


class Preemption(Callback):
    """Where ranks agree, and where they save.

    Args:
        signals: of the Trainer.
    """

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._moved = self._same_batches = False

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._moved = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._signals.agree():
            raise SIGTERMException

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._moved = True
        self._agree(trainer)

    def _agree(self, trainer: pl.Trainer) -> bool:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        # Gradients that wait for the next batch are in no checkpoint.
        if fitting and (trainer.fit_loop.epoch_loop._should_accumulate() or any(trainer.strategy._pending.values())):  # type: ignore[attr-defined]
            return False
        return self._signals.agree()

    def _start_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A data set of which each rank has another number of batches gives them no place to agree before its end.
        counts = trainer.strategy.gather_objects(_evaluation_batches(trainer))  # type: ignore[attr-defined]
        self._same_batches = all(count == counts[0] and float("inf") not in count for count in counts)
        self._signals.received_sigterm &= self._same_batches
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()  # type: ignore[attr-defined]

    on_validation_start = on_test_start = on_predict_start = _start_evaluation

    def _evaluated_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._same_batches and self._agree(trainer):
            raise SIGTERMException

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _evaluated_batch  # type: ignore[assignment]

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._moved = True
            self._agree(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SIGTERMException) or not self._signals.received_sigterm:
            return
        exception.code = EXIT_CODE
        end_with(EXIT_CODE)
        name, fitting = _name(self._signals.order), trainer.state.fn == TrainerFn.FITTING
        if fitting and self._moved and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer, name)
        elif trainer.global_rank == 0:
            failures.say(f"{name}: nothing to save has happened since the start")
        if fitting and self._signals.order == self._signals.requeue_signal and trainer.global_rank == 0:
            requeue()

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        loop = trainer.fit_loop.epoch_loop
        if trainer.validating:
            # The evaluation that was broken off is made again from its beginning, as Lightning does with this state.
            progress = loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
        path = self._save_where_it_is_found(trainer)
        self._finish(trainer)
        if trainer.global_rank == 0:
            failures.say(f"{name}: saved {path}")

    def _finish(self, trainer: pl.Trainer) -> None:
        strategy: Any = trainer.strategy
        strategy._join_ranks().together(strategy.finish_checkpoints)

    def _save_where_it_is_found(self, trainer: pl.Trainer) -> str:
        """Where the next run looks: for ``ckpt_path="last"``, and by itself under SLURM."""
        callbacks = model_checkpoints(trainer)
        callback = max(callbacks, key=_keeps_the_last, default=None)
        last = os.path.join(trainer.default_root_dir, "last.ckpt")
        if callback is not None:
            metrics = callback._monitor_candidates(trainer)
            if self._signals.requeue_signal is None and _keeps_the_last(callback):
                callback._save_last_checkpoint(trainer, metrics)
                return callback.last_model_path
            last = callback.format_checkpoint_name(metrics, callback.CHECKPOINT_NAME_LAST)
            callback.last_model_path = last  # so that the next run replaces it
        path = last
        if self._signals.requeue_signal is not None:
            path = trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
        path = trainer.strategy.broadcast(path)
        trainer.save_checkpoint(path)
        if path != last and callback is not None:
            self._finish(trainer)
            if trainer.global_rank == 0:
                _link(Path(last), Path(path))
        return path


def requeue() -> None:
    """Have SLURM queue this job again, as Lightning does."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        problem = done.returncode and (done.stderr.strip() or f"exit code {done.returncode}")
    except (OSError, subprocess.TimeoutExpired) as err:
        problem = str(err)
    failures.say(f"job {job} was not queued again: {problem}" if problem else f"job {job} is queued again")


def _link(link: Path, target: Path) -> None:
    """Let `link` be a name of `target`; what was there goes once `target` is complete."""
    link.parent.mkdir(parents=True, exist_ok=True)
    remove_when_free(link)
    link.symlink_to(os.path.relpath(target, link.parent))


def _keeps_the_last(callback: ModelCheckpoint) -> bool:
    return callback.save_last is True and not callback.save_weights_only


def _evaluation_batches(trainer: pl.Trainer) -> list[float]:
    """Of each data set of the stage at hand."""
    if trainer.sanity_checking:
        return list(trainer.num_sanity_val_batches)
    if trainer.predicting:
        return list(trainer.num_predict_batches)
    return list(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)


def _name(signum: int | None) -> str:
    return signal.Signals(signum).name if signum else "signal"


def _in_child() -> None:
    for signals in list(_installed):
        signals.forget()
    _installed.clear()


os.register_at_fork(after_in_child=_in_child)
