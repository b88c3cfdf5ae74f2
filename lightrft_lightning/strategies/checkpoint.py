"""The part of the strategy interface that saves and resumes, in a loop of one's own and under Lightning's `Trainer`.

Both write the same kind of folder (see `folder`), in which tensors have names that do not depend on the back end:
``model.<name>`` and ``optimizer.<parameter name>.<key>``.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer

from lightrft_lightning.checkpoints import folder, loops, state, stopping, store, trainer_state
from lightrft_lightning.checkpoints.background import Background
from lightrft_lightning.checkpoints.flat import FlatTensor, TensorInfo
from lightrft_lightning.checkpoints.folder import CheckpointError, Place
from lightrft_lightning.checkpoints.foreign import ForeignState, Source, open_foreign
from lightrft_lightning.checkpoints.state import rng_state, set_rng_state
from lightrft_lightning.checkpoints.store import Content, Ranks, Stored, StoredState
from lightrft_lightning.config import StrategyConfig
from lightrft_lightning.strategies._adam_8bit import full_moments

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.plugins import CheckpointIO

log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)
ONLY_LOCAL = "only local folders, on a file system that all ranks share"


class Checkpoints:
    """Save and resume; a base class of `StrategyBase`.

    A back end whose tensors are neither plain nor DTensors overrides the methods that begin with an underscore.
    """

    config: StrategyConfig
    world_size: int
    global_rank: int
    optimizer_steps: int
    skipped_steps: dict[str, int]
    strategy_name: str
    checkpoint_io: CheckpointIO
    lightning_module: pl.LightningModule | None
    optimizers: list[Optimizer]
    _models: WeakKeyDictionary[nn.Module, Any]
    _pending: WeakKeyDictionary[Optimizer, int]
    _timeout: timedelta | None

    _joined: tuple[Any, Ranks] | None = None
    _background: Background | None = None

    # ---------------------------------------------------------------- a loop of one's own

    def save_ckpt(
        self,
        model: nn.Module,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        max_num: int = 3,
        max_mem: float = 1000,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
        wait: bool = True,
    ) -> str:
        """Write a checkpoint: complete, or not there at all. All ranks call this together.

        Args:
            model: the model.
            save_dir: folder of checkpoints, on a file system that all ranks share.
            tag: name of this one; default ``step_<optimizer steps made>``.
            max_num: afterwards the oldest checkpoints of this package are removed until so many remain.
            max_mem: and until the folder is under so many GB. The new one is never removed, nor is any file or
                folder that this package did not write.
            client_state: the caller's own state: plain containers, numbers, strings and tensors. That of rank 0 is
                saved. As in LightRFT, ``consumed_samples`` is the place in the data.
            save_latest: let ``latest`` name this checkpoint.
            optimizer: default: the one known from `create_optimizer` or `prepare`.
            scheduler: likewise.
            wait: False copies the state to CPU memory and returns; a thread writes it. An error is raised by the next
                save, load or `finish_checkpoints`.

        Returns:
            The checkpoint's path.

        Raises:
            ValueError: a tag that is no file name, or a client state that could not be read back.
            CheckpointError: it could not be written, on whichever rank; what was there before is untouched.
        """
        if tag is not None and tag.startswith("."):  # rotation and lists leave such names alone
            raise ValueError(f"tag={tag!r}: must be a plain folder name")
        place = Place(Path(save_dir), tag or f"step_{self.optimizer_steps}", save_latest, max_num, max_mem * 1e9)
        optimizer, scheduler = self._known(model, optimizer, scheduler)
        self._warn_of_pending(optimizer)
        ranks = self._join_ranks()
        ranks.together(self.finish_checkpoints)
        client = dict(client_state or {})
        content = ranks.together(lambda: self._loop_content(model, optimizer, scheduler, client))
        self._write(content, place, wait)
        return str(place.path)

    def load_ckpt(
        self,
        model: nn.Module,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
    ) -> tuple[str, dict[str, Any]]:
        """Read a checkpoint in place, whatever strategy wrote it at whatever world size. All ranks call this together.

        With ``load_module_only=True`` also the weights in folders of DeepSpeed, of LightRFT and of Hugging Face.

        The random state is restored rank by rank; at another world size, rank r takes that of rank r modulo the saved
        number.

        Args:
            model: the model to load into.
            load_dir: folder of checkpoints.
            tag: which one; default: what ``latest`` names.
            load_module_strict: every tensor of the model must be there and no other.
            load_optimizer_states: restore the optimizer, with the learning rates and other settings that it was saved
                with: set others afterwards. (A `Trainer` lets those win that are given now.)
            load_lr_scheduler_states: restore the scheduler, whose rates are those that it was saved with too.
            load_module_only: the weights and nothing else: no optimizer, scheduler, step count or random state.
            optimizer: default: the one known from `create_optimizer` or `prepare`.
            scheduler: likewise.

        Returns:
            The checkpoint's path and the `client_state` that was saved.

        Raises:
            FileNotFoundError: no such checkpoint; the message lists those there are.
            CheckpointError: it is incomplete, damaged or of another model; nothing was changed, on any rank.
        """
        ranks = self._join_ranks()
        ranks.together(self.finish_checkpoints)
        foreign = ranks.together(lambda: _find_foreign(Path(load_dir), tag, load_module_only))
        if foreign is not None:
            return self._load_foreign(model, foreign, load_module_strict), {}
        path = ranks.together(lambda: folder.find(Path(load_dir), tag))
        stored = store.open_checkpoint(path, ranks)
        shared = ranks.together(lambda: store.readable(path, stored.shared))
        own = ranks.together(lambda: store.readable(path, lambda: stored.own(self.global_rank)))
        optimizer, scheduler = self._known(model, optimizer, scheduler)
        optimizer = optimizer if load_optimizer_states and not load_module_only else None
        scheduler = scheduler if load_lr_scheduler_states and not load_module_only else None
        weights, moments = _loop_states(stored, shared)

        def check() -> dict[str, str]:
            if "trainer" in shared and not load_module_only:
                raise CheckpointError(f"{path} was written by a Trainer: resume it with fit(ckpt_path=...)")
            sources = self._match(model, weights, path, load_module_strict)
            if optimizer is not None:
                self._check_optimizer(model, optimizer, shared, path)
            if scheduler is not None and "scheduler" not in shared:
                raise CheckpointError(f"{path} holds no scheduler: pass load_lr_scheduler_states=False")
            return sources

        def restore() -> None:
            self._load_model(model, weights, sources)
            if optimizer is not None:
                self._load_optimizer(model, optimizer, moments, shared["optimizer"]["groups"])
            if scheduler is not None:
                scheduler.load_state_dict(shared["scheduler"])
            if not load_module_only:
                self._set_scaler_state(model, shared["scaler"])
                self.optimizer_steps = shared["step"]
                set_rng_state(own.get("rng", {}))

        sources = ranks.together(check)
        ranks.together(lambda: store.readable(path, restore))
        return str(path), shared.get("client_state", {})

    def _load_foreign(self, model: nn.Module, source: Source, strict: bool) -> str:
        ranks, weights = self._join_ranks(), ForeignState(source)
        sources = ranks.together(lambda: self._match(model, weights, source.path, strict))
        ranks.together(lambda: store.readable(source.path, lambda: self._load_model(model, weights, sources)))
        source.close()
        return str(source.path)

    def finish_checkpoints(self) -> None:
        """Wait for the checkpoints that are written in the background.

        Raises:
            CheckpointError: one could not be written.
        """
        if self._background is not None:
            self._background.finish()

    def _known(self, model: nn.Module, optimizer: Any, scheduler: Any) -> tuple[Optimizer | None, Any]:
        known = self._models.get(model)
        if known is not None:
            optimizer, scheduler = optimizer or known.optimizer, scheduler or known.scheduler
        return getattr(optimizer, "optimizer", optimizer), scheduler  # Lightning wraps optimizers

    def _warn_of_pending(self, optimizer: Optimizer | None) -> None:
        if optimizer is not None and self._pending.get(optimizer, 0):
            log.warning("checkpoint in the middle of an accumulation: the pending gradients are not part of it")

    def _loop_content(self, model: nn.Module, optimizer: Optimizer | None, scheduler: Any, client: Any) -> Content:
        other = state.other_state(model)
        tensors = {name: FlatTensor.of(value) for name, value in other.items() if isinstance(value, torch.Tensor)}
        tensors = {f"model.{name}": value for name, value in (self._model_tensors(model) | tensors).items()}
        shared: dict[str, Any] = {
            "client_state": client,
            "step": self.optimizer_steps,
            "scaler": self._scaler_state(model),
            "model": {name: value for name, value in other.items() if not isinstance(value, torch.Tensor)},
        }
        if scheduler is not None:
            shared["scheduler"] = scheduler.state_dict()
        if optimizer is not None:
            with full_moments(optimizer):
                moments = self._optimizer_tensors(model, optimizer)
                scalars = self._optimizer_scalars(model, optimizer)
            tensors |= {f"optimizer.{name}": value for name, value in moments.items()}
            shared["optimizer"] = {"scalars": scalars, "groups": self._optimizer_settings(model, optimizer)}
        header = {**self._header(model, self.optimizer_steps), "data": client.get("consumed_samples")}
        return Content(tensors, shared, {"rng": rng_state()}, header)

    # ---------------------------------------------------------------- Lightning's form

    whole_parameters = False
    """Whether this process holds every parameter as a whole, and nothing else holds a copy."""
    restore_checkpoint_after_setup = True
    """Weights are read into the sharded model."""
    lightning_restore_optimizer = True

    def connect(self, model: pl.LightningModule) -> None:
        """Lightning's hook before everything else."""
        super().connect(model)  # type: ignore[misc]
        if model._trainer is not None:
            loops.install(model.trainer)
        if model._trainer is not None and model.trainer.state.fn == TrainerFn.FITTING:
            self._check_where_to(model.trainer)

    def _check_where_to(self, trainer: pl.Trainer) -> None:
        """Refuse before training what `save_checkpoint` would refuse after it."""
        self._check_plugin()
        for callback in trainer.checkpoint_callbacks:
            place = getattr(callback, "dirpath", None) or (trainer.default_root_dir if not trainer.loggers else "")
            if "://" in str(place):
                raise ValueError(f"{type(callback).__name__} would write to {str(place)!r}: {ONLY_LOCAL}")

    def _check_plugin(self) -> None:
        if type(self.checkpoint_io) is not TorchCheckpointIO:
            raise TypeError(
                f"plugin {type(self.checkpoint_io).__name__}: {self.strategy_name} writes checkpoints itself, in the "
                "background with async_checkpoints=True; leave the plugin out"
            )

    def post_training_step(self) -> None:
        """Lightning's hook between a training step and the callbacks."""
        module = self.lightning_module
        if module is not None and module._trainer is not None and not module.automatic_optimization:
            loop = module.trainer.fit_loop.epoch_loop
            if isinstance(loop, loops.EpochLoop):
                loop.note_progress()

    def on_validation_end(self) -> None:
        """Lightning's hook behind those of callbacks and module."""
        super().on_validation_end()  # type: ignore[misc]
        module = self.lightning_module
        if module is not None and isinstance(loop := module.trainer.fit_loop.epoch_loop, loops.EpochLoop):
            loop.save()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What goes into ``checkpoint["state_dict"]``: tensors, or `FlatTensor` where no rank has them whole."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What goes into ``checkpoint["optimizer_states"]``: by the names of parameters, not by their positions."""
        module = self.lightning_module
        assert module is not None
        raw = getattr(optimizer, "optimizer", optimizer)
        with full_moments(raw):
            values = {**self._optimizer_tensors(module, raw), **self._optimizer_scalars(module, raw)}
        return {"state": values, "param_groups": self._optimizer_settings(module, raw)}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write what a Trainer saves as a folder called `filepath`; every tensor in it is stored once, sharded."""
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r}: {self.strategy_name} writes to a local folder")
        self._check_plugin()
        module = self.lightning_module
        assert module is not None
        ranks = self._join_ranks()
        ranks.together(self.finish_checkpoints)
        training = {
            "optimizer_steps": self.optimizer_steps,
            "skipped_steps": dict(self.skipped_steps),
            "scaler": self._scaler_state(module),
        }
        with_ours = {**checkpoint, "lightrft_strategy": training}

        def content() -> Content:
            tied = state.aliases(module)
            rest, tensors = trainer_state.take_apart(with_ours, tied)
            header = {**self._header(module, checkpoint.get("global_step", 0)), "tied": tied}
            header["data"] = trainer_state.data_position(checkpoint)
            loop = None if module._trainer is None else module.trainer.fit_loop
            own = loop.own_state() if isinstance(loop, loops.FitLoop) else {"rng": rng_state()}
            return Content(tensors, {"trainer": rest}, own, header, safe_only=False)

        path = _local(filepath)
        self._write(ranks.together(content), Place(path.parent, path.name), wait=not self.config.async_checkpoints)

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read what `save_checkpoint` or Lightning's own strategies for one device wrote.

        ``checkpoint["state_dict"]`` and other large parts are `StoredState`: read when somebody looks at them.

        Args:
            checkpoint_path: the folder, or one of Lightning's files.
            weights_only: False runs whatever code the file asks for: only for files that you trust. None: what was
                given to `Trainer.fit`.

        Raises:
            CheckpointError: it is incomplete, damaged, or not what is needed.
        """
        ranks = self._join_ranks()
        ranks.together(self.finish_checkpoints)
        if weights_only is None:
            weights_only = trainer_state.asked_weights_only()
        torch.cuda.empty_cache()
        checkpoint = trainer_state.read(_local(checkpoint_path), ranks, weights_only, self.checkpoint_io)
        module = self.lightning_module
        fitting = module is not None and module.trainer.state.fn == TrainerFn.FITTING
        if fitting and "optimizer_states" not in checkpoint:
            raise CheckpointError(
                f"{checkpoint_path} holds weights only (save_weights_only=True): training cannot go on from it. Start "
                "a new run with these weights by load_from_checkpoint"
            )
        if module is not None and fitting and isinstance(module.trainer.fit_loop, loops.FitLoop):
            module.trainer.fit_loop.own = checkpoint.get("lightrft_own", {})
            module.trainer.fit_loop.patience = stopping.given_patience(module.trainer)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read the weights in place, each rank its part."""
        module = self.lightning_module
        assert module is not None
        weights = trainer_state.as_stored(checkpoint["state_dict"])
        ranks = self._join_ranks()
        if (by := state.loads_by_itself(module)) is not None:
            if not self.whole_parameters:
                raise CheckpointError(f"{by}: its own way of loading is for whole weights, here they are sharded")
            store.readable("the checkpoint", lambda: module.load_state_dict(dict(weights), strict=strict))
            return
        sources = ranks.together(lambda: self._match(module, weights, "the checkpoint", strict))
        ranks.together(lambda: store.readable("the checkpoint", lambda: self._load_model(module, weights, sources)))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read the state of all optimizers in place, each rank its part."""
        module = self.lightning_module
        assert module is not None
        saved = checkpoint["optimizer_states"]
        ranks = self._join_ranks()

        def check() -> list[dict[str, Any]]:
            if len(saved) != len(self.optimizers):
                raise CheckpointError(
                    f"the checkpoint holds {len(saved)} optimizers, configure_optimizers made {len(self.optimizers)}"
                )
            pairs = zip(self.optimizers, saved, strict=True)
            by_name = [trainer_state.by_name(one, self._optimizer_settings(module, o)) for o, one in pairs]
            for optimizer, one in zip(self.optimizers, by_name, strict=True):
                settings = self._optimizer_settings(module, optimizer)
                state.check_same_optimizer(settings, one["param_groups"], "the checkpoint")
            return by_name

        def restore() -> None:
            for optimizer, one in zip(self.optimizers, by_name, strict=True):
                self._load_optimizer(module, optimizer, one["state"], one["param_groups"])

        by_name = ranks.together(check)
        ranks.together(lambda: store.readable("the checkpoint", restore))
        training = checkpoint.get("lightrft_strategy")
        if training is not None:
            self.optimizer_steps = training["optimizer_steps"]
            self.skipped_steps.update(training.get("skipped_steps", {}))
            self._set_scaler_state(module, training["scaler"])

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, once the one that is being written is complete; what is none stays, with a warning."""
        if self.global_rank != 0:
            return
        path = _local(filepath)
        if self._background is not None and self._background.busy:
            self._background.submit(lambda: _remove(path))
        else:
            _remove(path)

    def teardown(self) -> None:
        """Lightning's hook at the end of a run."""
        try:
            self.finish_checkpoints()
        finally:
            super().teardown()  # type: ignore[misc]

    # ---------------------------------------------------------------- both forms

    def _join_ranks(self) -> Ranks:
        if self.world_size == 1:
            return Ranks()
        if self._joined is None or self._joined[0] is not dist.group.WORLD:
            timeout = getattr(self, "_timeout", None) or TIMEOUT
            self._joined = (dist.group.WORLD, store.join(self.global_rank, self.world_size, timeout))
        return self._joined[1]

    def _write(self, content: Content, place: Place, wait: bool) -> None:
        ranks = self._join_ranks()
        if wait:
            store.prepare(content, place, ranks)(ranks)
            return
        copies = {name: tensor.snapshot() for name, tensor in content.tensors.items()}
        write = store.prepare(dataclasses.replace(content, tensors=copies), place, ranks)
        self._background = self._background or Background()
        self._background.submit(lambda: write(ranks))

    def _header(self, model: nn.Module, step: int) -> dict[str, Any]:
        header = {"strategy": self.strategy_name, "world_size": self.world_size, "step": step}
        tokenizer = vars(model).get("_tokenizer") or vars(model).get("tokenizer")  # a property might load one
        if hasattr(tokenizer, "get_vocab"):
            header["tokenizer"] = state.tokenizer_hash(tokenizer)
        return {**header, **state.describe_model(model), "tied": state.aliases(model)}

    def _match(self, model: nn.Module, weights: StoredState, where: Any, strict: bool) -> dict[str, str]:
        """Which key of `weights` each tensor of the model is to be read from."""
        here = {name: tensor.info for name, tensor in self._model_tensors(model).items()}
        there = weights.tensors() | {key: None for key in weights.plain()}
        return state.match(here, state.aliases(model), state.other_state(model), there, where, strict)

    def _load_model(self, model: nn.Module, weights: StoredState, sources: Mapping[str, str]) -> None:
        targets = self._model_tensors(model)
        by_source: dict[str, str] = {name: sources[name] for name in targets if name in sources}
        weights.read_into({source: targets[name] for name, source in by_source.items()})
        other = {name: weights[name] for name in state.other_state(model) if name in weights}
        if other:
            model.load_state_dict(other, strict=False)
        self._model_loaded(model)

    def _check_optimizer(self, model: nn.Module, optimizer: Optimizer, shared: Mapping[str, Any], path: Path) -> None:
        if "optimizer" not in shared:
            raise CheckpointError(f"{path} holds no optimizer: pass load_optimizer_states=False")
        state.check_same_optimizer(self._optimizer_settings(model, optimizer), shared["optimizer"]["groups"], path)

    def _load_optimizer(
        self, model: nn.Module, optimizer: Optimizer, moments: StoredState, groups: list[dict[str, Any]]
    ) -> None:
        infos = moments.tensors()
        with full_moments(optimizer, change=True):
            targets = self._optimizer_tensors(model, optimizer, infos)
            moments.read_into({name: target for name, target in targets.items() if name in infos})
            self._set_optimizer_scalars(model, optimizer, moments.plain())
        self._set_optimizer_settings(model, optimizer, groups)
        self._optimizer_loaded(model, optimizer)

    # ---------------------------------------------------------------- what a back end overrides

    def _model_tensors(self, model: nn.Module) -> dict[str, FlatTensor]:
        """The model's tensors as views; loading writes into them. Names of ``model.state_dict()``, tied ones once."""
        return state.model_tensors(model)

    def _model_loaded(self, model: nn.Module) -> None:
        """Called after such a load."""

    def _optimizer_tensors(
        self, model: nn.Module, optimizer: Optimizer, saved: Mapping[str, TensorInfo] | None = None
    ) -> dict[str, FlatTensor]:
        """The optimizer's state as views, under ``<parameter name>.<key>``; laid out for `saved` first, if given."""
        return state.optimizer_tensors(model, optimizer, saved)

    def _optimizer_scalars(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """The part of the optimizer's state that is no tensor, under the same kind of names."""
        return state.optimizer_scalars(model, optimizer)

    def _set_optimizer_scalars(self, model: nn.Module, optimizer: Optimizer, scalars: Mapping[str, Any]) -> None:
        """Undo `_optimizer_scalars`; tensors are in place."""
        state.set_optimizer_scalars(model, optimizer, scalars)

    def _optimizer_settings(self, model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
        """Parameter groups without tensors: learning rate, ..., and the names of their parameters."""
        return state.optimizer_settings(model, optimizer)

    def _set_optimizer_settings(self, model: nn.Module, optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
        """Undo `_optimizer_settings`."""
        state.set_optimizer_settings(model, optimizer, groups)

    def _optimizer_loaded(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Called after the optimizer's state was read in place."""

    def _scaler_state(self, model: nn.Module) -> dict[str, Any]:
        """Loss scales of float16 training, by the name of the trained submodule ("" for `model` itself)."""
        known = {name: self._models.get(module) for name, module in model.named_modules()}
        return {name: k.scaler.state_dict() for name, k in known.items() if k is not None and k.scaler is not None}

    def _set_scaler_state(self, model: nn.Module, scalers: Mapping[str, Any]) -> None:
        """Undo `_scaler_state`."""
        for name, saved in scalers.items():
            known = self._models.get(model.get_submodule(name))
            if known is not None:
                known.scaler = known.scaler or torch.amp.GradScaler(self.root_device.type)  # type: ignore[attr-defined]
                known.scaler.load_state_dict(saved)


def _find_foreign(load_dir: Path, tag: str | None, load_module_only: bool) -> Source | None:
    """What another program wrote there, if nothing of this package is there."""
    try:
        folder.find(load_dir, tag)
        return None
    except FileNotFoundError:
        source = open_foreign(load_dir, tag)
        if source is None:
            raise
    if not load_module_only:
        raise CheckpointError(
            f"{source.path} was not written by this package: its weights can be read with load_module_only=True"
        )
    return source


def _loop_states(stored: Stored, shared: Mapping[str, Any]) -> tuple[StoredState, StoredState]:
    """Weights and optimizer state of a checkpoint, under the names that they have in the model."""
    weights = trainer_state.tensors_under("model.", stored, shared.get("model", {}))
    return weights, trainer_state.tensors_under("optimizer.", stored, shared.get("optimizer", {}).get("scalars", {}))


def _remove(path: Path) -> None:
    """The name may come from a checkpoint that somebody else has written: ModelCheckpoint keeps its list there."""
    if path.exists() and not folder.is_checkpoint(path) and not (path.is_file() and path.suffix == ".ckpt"):
        log.warning("%s is to be removed as an old checkpoint, but is none: it stays", path)
    else:
        folder.remove_checkpoint(path)


def _local(path: str | os.PathLike[str]) -> Path:
    if "://" in str(path):
        raise ValueError(f"checkpoint {str(path)!r}: {ONLY_LOCAL}")
    return Path(path)
