"""`StrategyBase`: LightRFT's strategy interface on top of Lightning's `Strategy`.

What a back end has of its own stays in its class. The methods here are written for one process and are right for
every back end whose parameters are plain tensors.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.strategies import _StrategyRegistry
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightrft_lightning._errors import unknown_name
from lightrft_lightning.checkpoints.flat import FlatTensor
from lightrft_lightning.config import StrategyConfig
from lightrft_lightning.models.export import save_pretrained
from lightrft_lightning.models.layers import in_training_mode
from lightrft_lightning.models.precision import LOW, train_in_float32
from lightrft_lightning.strategies import forks  # noqa: F401  # acts when this process is forked
from lightrft_lightning.strategies._adam_8bit import adamw_8bit
from lightrft_lightning.strategies.checkpoint import Checkpoints
from lightrft_lightning.strategies.ending import end_within
from lightrft_lightning.strategies.inference import InferenceEngines
from lightrft_lightning.strategies.lightrft_calls import LightRFTCalls
from lightrft_lightning.strategies.limits import check_callbacks, check_made_late, check_watched
from lightrft_lightning.strategies.preemption import end_when_preempted
from lightrft_lightning.strategies.streams import keep_printing

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)

GIB = 2**30


@dataclass
class _Trained:
    """What the strategy knows about one model: how it is trained, or which parameters it froze."""

    optimizer: Optimizer | None = None
    scheduler: Any = None
    frozen: tuple[nn.Parameter, ...] = ()
    prepared: bool = False
    """Whether `create_optimizer` has to put it into the hands of the back end."""
    scaler: torch.amp.GradScaler | None = None
    """Loss scale, in float16 only."""
    engine: Any = None
    """DeepSpeed's engine."""


class StrategyBase(InferenceEngines, Checkpoints, LightRFTCalls, Strategy):
    """LightRFT's strategy interface; by itself a complete back end for one process.

    The same object serves a hand-written loop and ``Trainer(strategy=...)``. Subclass it and call
    `register_strategy` to add a back end.

    Args:
        config: all settings at once.
        args: the same from an `argparse.Namespace`, object or mapping (see `StrategyConfig.from_args`).
        **kwargs: single fields of `StrategyConfig` (they win over `config`), and the keywords of the Lightning
            strategy that the class builds on.

    Raises:
        TypeError: an unknown keyword (the message names the nearest one), or both `config` and `args`.
        ValueError: a field that is out of range.

    Example:
        >>> strategy = FakeStrategy(micro_train_batch_size=4, train_batch_size=8)
        >>> strategy.setup_distributed()
        >>> model, optimizer = strategy.prepare((model, strategy.create_optimizer(model, lr=1e-3)))
        >>> for batch in loader:
        ...     strategy.backward(model(batch).mean(), model, optimizer)
        ...     strategy.optimizer_step(optimizer, model, scheduler=None)
    """

    strategy_name = "lightrft_base"

    positional: ClassVar[tuple[str, ...]] = ("seed", "max_norm", "micro_train_batch_size", "train_batch_size", "args")
    """What positional arguments are, as in LightRFT's constructors."""

    def __init__(self, *positional: Any, config: StrategyConfig | None = None, args: Any = None, **kwargs: Any) -> None:
        given = self._named(positional, {"args": args, **kwargs} if args is not None else kwargs)
        args = given.pop("args", args)
        kwargs = given
        if config is not None and args is not None:
            raise TypeError("give `config` or `args`, not both")
        base = config if config is not None else StrategyConfig.from_args({} if args is None else args)
        fields, parent = self._split_keywords(kwargs)
        self.config = self._checked_config(base.replace(**fields) if fields else base)
        self.config.tell_unread()
        self.args = args if args is not None else self.config.args  # type: ignore[attr-defined]
        super().__init__(**parent)
        self.grad_norms: dict[str, float] = {}
        """Gradient norm before clipping of the latest step, by the `name` given to `optimizer_step`."""
        self.skipped_steps: dict[str, int] = {}
        """Steps left out because the gradient was not finite, by name."""
        self._parallel_devices: list[torch.device] | None = None
        self.optimizer_steps = 0
        """Optimizer steps made, over all optimizers."""
        self._models: WeakKeyDictionary[nn.Module, _Trained] = WeakKeyDictionary()
        self._pending: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._step_to_make: Callable[[], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a Trainer that is sent to another process; models and optimizers do not go with it."""
        kinds = (WeakKeyDictionary, WeakIdKeyDictionary)
        weak = {name: type(value) for name, value in vars(self).items() if isinstance(value, kinds)}
        return {name: value for name, value in vars(self).items() if name not in weak} | {"_weak": weak}

    def __setstate__(self, state: dict[str, Any]) -> None:
        weak = state.pop("_weak")
        vars(self).update(state, **{name: kind() for name, kind in weak.items()})

    def _named(self, positional: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(positional) > len(self.positional):
            raise TypeError(f"{type(self).__name__}: at most {len(self.positional)} positional arguments")
        names = self.positional[: len(positional)]
        if twice := [name for name in names if name in kwargs]:
            raise TypeError(f"{type(self).__name__}: {twice[0]} is given twice")
        return dict(zip(names, positional, strict=True)) | kwargs

    def _split_keywords(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        fields = {f for f in StrategyConfig.__dataclass_fields__}
        lightning = set(inspect.signature(super().__init__).parameters) - {"args", "kwargs"}
        for name in kwargs:
            if name not in fields | lightning:
                raise TypeError(unknown_name(f"{type(self).__name__} keyword", name, fields | lightning))
        return (
            {k: v for k, v in kwargs.items() if k in fields},
            {k: v for k, v in kwargs.items() if k not in fields},
        )

    def _checked_config(self, config: StrategyConfig) -> StrategyConfig:
        """Hook for a back end to refuse or complete settings."""
        return config

    # ---------------------------------------------------------------- one process, unless a subclass says otherwise

    is_global_zero = SingleDeviceStrategy.is_global_zero
    reduce = SingleDeviceStrategy.reduce
    all_gather = SingleDeviceStrategy.all_gather
    barrier = SingleDeviceStrategy.barrier
    broadcast = SingleDeviceStrategy.broadcast
    model_to_device = SingleDeviceStrategy.model_to_device
    world_size = 1
    global_rank = 0
    local_rank = 0

    @property
    @override
    def root_device(self) -> torch.device:
        return self._parallel_devices[0] if self._parallel_devices else torch.device("cpu")

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The Trainer's devices; more than one is refused."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise MisconfigurationException(
                f"{self.strategy_name} runs in one process, got devices={len(devices)}: set devices=1, "
                "or take strategy='lightrft_fsdp' or 'lightrft_deepspeed'"
            )
        self._parallel_devices = devices

    @property
    def num_nodes(self) -> int:
        """Always 1."""
        return 1

    @num_nodes.setter
    def num_nodes(self, value: int) -> None:
        if value != 1:
            raise MisconfigurationException(f"{self.strategy_name} runs in one process, got num_nodes={value}")

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        strategy_registry.register(cls.strategy_name, cls, description=cls.__doc__ or "", override=True)

    # ---------------------------------------------------------------- start

    def setup_distributed(self, timeout: timedelta | None = None, num_gpu_per_node: int | None = None) -> None:
        """Seed everything and check the batch sizes; start or join the process group where the back end has one.

        Args:
            timeout: how long a collective may take before it is an error; nothing to wait for in one process.
            num_gpu_per_node: of LightRFT's callers; the launcher says which device is whose.

        Raises:
            ValueError: `train_batch_size` does not divide by `micro_train_batch_size` × world size.
        """
        from lightning.pytorch import seed_everything

        self._check_batch_sizes()
        end_within()
        seed_everything(self.config.seed, verbose=False)

    @override
    def setup_environment(self) -> None:
        self._check_batch_sizes()
        self._outlive_its_surroundings()
        assert self.lightning_module is not None
        check_callbacks(self.lightning_module, (), self.strategy_name)
        super().setup_environment()

    def _outlive_its_surroundings(self) -> None:
        """A scheduler that takes the machine back, an output that nobody reads."""
        keep_printing()
        end_within()
        assert self.lightning_module is not None
        end_when_preempted(self.lightning_module.trainer)

    def _check_batch_sizes(self) -> None:
        c = self.config
        if self._has_batch_sizes and c.train_batch_size % (c.micro_train_batch_size * self.world_size):
            raise ValueError(
                f"train_batch_size={c.train_batch_size} is not a multiple of micro_train_batch_size="
                f"{c.micro_train_batch_size} × world size={self.world_size}: change one of them so that it divides"
            )

    @property
    def _has_batch_sizes(self) -> bool:
        return self.config.is_set("train_batch_size", "micro_train_batch_size")

    @property
    def accumulation_steps(self) -> int:
        """Backward passes of one optimizer step; 1 if the strategy was built without batch sizes."""
        self._check_batch_sizes()  # a loop may have left out setup_distributed
        c = self.config
        return c.train_batch_size // (c.micro_train_batch_size * self.world_size) if self._has_batch_sizes else 1

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        assert self.lightning_module is not None
        check_watched(self.lightning_module, self.strategy_name)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.lightning_module is not None
        check_watched(self.lightning_module, self.strategy_name)
        check_made_late(self.lightning_module)

    # ---------------------------------------------------------------- models and optimizers

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        parameters = (p for o in self.optimizers for group in o.param_groups for p in group["params"])
        if (low := next((p.dtype for p in parameters if p.dtype in LOW), None)) is not None:
            log.warning("weights in %s are trained, where small steps are rounded away: keep them in float32", low)

    def create_optimizer(
        self,
        model: nn.Module,
        *,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        weight_decay: float | None = None,
        **kwargs: Any,
    ) -> Optimizer:
        """Fused AdamW over the trainable parameters, of 8 bits with ``adam_8bit``; no weight decay on biases and norms.

        Weights in 16 bits become float32 in place, see `models.precision`.

        Args:
            model: the model to train. If `prepare` froze it, it is trainable again, with this optimizer.
            lr: learning rate; default `config.actor_learning_rate`.
            betas: default `config.adam_betas`.
            weight_decay: default `config.l2`.
            **kwargs: further keywords of `torch.optim.AdamW`, or of `bitsandbytes.optim.AdamW8bit`.

        Raises:
            ValueError: the model has no trainable parameter.
        """
        known = self._models.setdefault(model, _Trained())
        _thaw(model, known)
        train_in_float32(model)
        decay = self.config.l2 if weight_decay is None else weight_decay
        groups = [
            {"params": params, "weight_decay": d}
            for params, d in zip(_decay_groups(model), (decay, 0.0), strict=True)
            if params
        ]
        if not groups:
            raise ValueError(f"{type(model).__name__} has no parameter with requires_grad=True: nothing to optimize")
        lr = self.config.actor_learning_rate if lr is None else lr
        kwargs |= {"lr": lr, "betas": betas or self.config.adam_betas}
        if self.config.adam_8bit:
            optimizer = adamw_8bit(groups, **kwargs)
        else:
            optimizer = torch.optim.AdamW(groups, **{"fused": True, **kwargs})
        known.optimizer = self._own_kind_of(optimizer)
        if known.prepared:
            self._wrap(model, known)
        return known.optimizer

    def _own_kind_of(self, optimizer: Optimizer) -> Optimizer:
        """Hook: what this back end has in place of an optimizer that `create_optimizer` has made."""
        return optimizer

    def prepare(self, *models_or_pairs: Any, is_rlhf: bool = False) -> Any:
        """Put models on the device, ready to train or to infer.

        Args:
            *models_or_pairs: models, ``(model, optimizer)`` pairs or ``(model, optimizer, scheduler)`` triples, lists
                of models; None passes through (a reference that is not used), and so do triples of it. A model without
                an optimizer, neither in its tuple nor made by `create_optimizer`, is frozen and set to eval mode.
            is_rlhf: accepted for LightRFT's callers. The roles follow from the optimizers, so it changes nothing here.

        Returns:
            The same objects, wrapped where the back end wraps, in the same order and shape; a single argument comes
            back by itself.
        """
        prepared = tuple(self._prepare_one(item) for item in models_or_pairs)
        return prepared[0] if len(prepared) == 1 else prepared

    def _prepare_later(self, model: nn.Module) -> None:
        """Let `create_optimizer` prepare the model."""
        self._models.setdefault(model, _Trained()).prepared = True

    def _prepare_one(self, item: Any) -> Any:
        if item is None:
            return None
        if isinstance(item, tuple | list) and item and item[0] is None:  # no critic
            return item
        if _are_models(item):
            return [self._prepare_one(one) for one in item]
        model, *rest = item if isinstance(item, tuple | list) else (item,)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"prepare() takes models, (model, optimizer) or (model, optimizer, scheduler), got {item!r}"
            )
        optimizer, scheduler = (*rest, None, None)[:2]
        if optimizer is not None and model not in self._models:
            _check_holds(optimizer, model)
        known = self._models.setdefault(model, _Trained())
        known.optimizer = known.optimizer if optimizer is None else optimizer
        known.scheduler = known.scheduler if scheduler is None else scheduler
        if known.optimizer is not None:
            train_in_float32(model)
        model = self._wrap(model, known)
        known.prepared = True
        if known.optimizer is None:
            known.frozen += tuple(p for p in model.parameters() if p.requires_grad)
            model.requires_grad_(False).eval()
        else:
            _thaw(model, known)
            _state_to(known.optimizer, self.root_device)
            in_training_mode(model)
        return (model, *rest) if isinstance(item, tuple | list) else model

    def _wrap(self, model: nn.Module, known: _Trained) -> nn.Module:
        """Hook: how this back end takes a model over. Here: its device, mixed precision around its forward pass."""
        model = model.to(self.root_device)
        dtype = self.compute_dtype
        if dtype != torch.float32 and not hasattr(model, "_lightrft_autocast"):
            model._lightrft_autocast = _Autocast(model, self.root_device.type, dtype)  # type: ignore[assignment]
        return model

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of forward and backward passes; inside a `Trainer`, ``Trainer(precision=...)`` decides."""
        if self.lightning_module is None:
            return self.config.compute_dtype(self.root_device)
        mixed = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
        return mixed.get(str(self.precision_plugin.precision), torch.float32)

    def compile_problem(self) -> str | None:
        """Why the layers of a model cannot be compiled with `torch.compile` here; None if they can."""
        return None

    def quantization_problem(self) -> str | None:
        """Why a model with quantized weights cannot be trained here; None if it can."""
        return None

    def init_model_context(self, meta_init: bool = False) -> contextlib.AbstractContextManager[Any]:
        """Where to build a large model.

        Args:
            meta_init: build without memory where the back end shards afterwards. One device holds the whole model in
                any case, so here it is built on it directly, with real weights.
        """
        return torch.device(self.root_device)

    # ---------------------------------------------------------------- one step

    @override
    def backward(  # type: ignore[override]
        self, loss: Tensor, model: Any, optimizer: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Back-propagate `loss`, divided so that gradients are the mean over accumulation steps and ranks.

        Two call forms, told apart by the second argument: LightRFT's ``backward(loss, model, optimizer)`` and
        Lightning's ``backward(loss, optimizer, ...)``.

        Args:
            loss: scalar, the mean over the micro-batch.
            model: the model that the loss comes from.
            optimizer: its optimizer.
            *args: of Lightning's form.
            **kwargs: of Lightning's form; in LightRFT's, ``accumulation_steps``: backward passes of this optimizer
                step, in place of the strategy's own number; ``further``: more pairs of a model and its optimizer
                that the loss depends on.

        Raises:
            ValueError: the model is frozen; or `further` in float16, where every model has a loss scale of its own.
        """
        if not isinstance(model, nn.Module):
            rest = () if optimizer is None else (optimizer,)
            return super().backward(loss, model, *rest, *args, **kwargs)
        self._check_trained(model)
        return self._backward(loss, model, optimizer, *args, **kwargs)

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: Any, scheduler: Any = None, name: str = "model", **kwargs: Any
    ) -> Any:
        """Step at the accumulation boundary: clip by the global norm, skip what is not finite, advance the scheduler.

        Two call forms, told apart by the second argument: LightRFT's ``optimizer_step(optimizer, model, scheduler)``
        and Lightning's ``optimizer_step(optimizer, closure, model)``.

        Args:
            optimizer: the optimizer.
            model: its model.
            scheduler: its learning-rate scheduler or None; advanced once per step that is made.
            name: key of `grad_norms` and `skipped_steps`.
            **kwargs: ``accumulation_steps``: as in `backward`. ``flush=True``: step now, with the mean over the passes
                so far: for the end of the data, so that a partial accumulation does not leak into what comes next.

        Returns:
            The gradient norm before clipping, or None if this call did not reach the boundary.
        """
        if isinstance(model, nn.Module):
            self._check_trained(model)
            return self._optimizer_step(optimizer, model, scheduler, name, **kwargs)
        if self._step_to_make is not None:  # called from `_make_step`
            step, self._step_to_make = self._step_to_make, None
            assert self.lightning_module is not None
            self.precision_plugin._after_closure(self.lightning_module, optimizer)  # hooks before an optimizer step
            return step()
        positional = () if scheduler is None else (scheduler,)
        return super().optimizer_step(optimizer, model, *positional, **kwargs)

    def _check_trained(self, model: nn.Module) -> None:
        if model in self._models and self._models[model].frozen:
            raise ValueError(
                f"{type(model).__name__} is frozen, because prepare(model) came without its optimizer: call "
                "prepare((model, optimizer)), or make the optimizer with create_optimizer(model)"
            )

    def _backward(
        self,
        loss: Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        accumulation_steps: int | None = None,
        further: Sequence[tuple[nn.Module, Optimizer]] = (),
    ) -> None:
        loss = loss / (accumulation_steps or self.accumulation_steps)
        if self.compute_dtype == torch.float16:
            check_one_scale(further)
            known = self._models.setdefault(model, _Trained())
            known.scaler = known.scaler or torch.amp.GradScaler(self.root_device.type)
            loss = known.scaler.scale(loss)
        loss.backward()

    def _optimizer_step(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        scheduler: Any,
        name: str,
        accumulation_steps: int | None = None,
        flush: bool = False,
    ) -> float | None:
        raw = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper counts steps for the Trainer
        steps = accumulation_steps or self.accumulation_steps
        done = self._pending.get(raw, 0) + 1
        self._pending[raw] = done
        if done < steps and not flush:
            return None
        self._pending[raw] = 0
        if done < steps:
            self._finish_partial_accumulation(model)
        parameters = [p for group in raw.param_groups for p in group["params"] if p.grad is not None]
        if done < steps:
            torch._foreach_mul_([p.grad for p in parameters], steps / done)
        scaler = self._models[model].scaler if model in self._models else None
        if scaler is not None:
            scaler.unscale_(raw)
        norm = float(self._clip(parameters))
        if self._count_step(norm, name):
            self._make_step(optimizer, raw.step if scaler is None else lambda: scaler.step(raw))
            if scheduler is not None:
                scheduler.step()
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad()
        return norm

    def _finish_partial_accumulation(self, model: nn.Module) -> None:
        """Hook: make the gradients complete before a step that comes earlier than the last pass had announced."""

    def _count_step(self, norm: float, name: str) -> bool:
        """Note the gradient norm; True if it is finite, so that the step may be made."""
        self.grad_norms[name] = norm
        if math.isfinite(norm):
            self.optimizer_steps += 1
            return True
        self.skipped_steps[name] = self.skipped_steps.get(name, 0) + 1
        log.warning("%s: gradient norm is %s, step skipped (%d so far)", name, norm, self.skipped_steps[name])
        return False

    def _make_step(self, optimizer: Any, step: Callable[[], Any]) -> None:
        """Call `step`; through Lightning's wrapper of the optimizer, if it is one, so that the Trainer counts it."""
        if not isinstance(optimizer, LightningOptimizer):
            step()
            return
        self._step_to_make = step
        optimizer.step()

    def _clip(self, parameters: Sequence[Tensor]) -> Tensor:
        """Clip by one global norm over all parameter groups; returns the norm before."""
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.config.max_norm, norm)
        return norm

    def moving_average(
        self,
        model: nn.Module,
        ema: nn.Module | None = None,
        beta: float = 0.992,
        device: Any = None,
        model_ema: nn.Module | None = None,
    ) -> None:
        """Update `ema` in place: ``ema = beta · ema + (1 − beta) · model``; buffers are copied.

        Args:
            model: the model in training.
            ema: its average.
            beta: share that stays.
            device: of LightRFT's callers; the average is computed where it is.
            model_ema: LightRFT's name of `ema`.

        Raises:
            ValueError: `ema` has weights of 16 bits, where so small a change is rounded away.
        """
        average = ema if model_ema is None else model_ema
        if average is None:
            raise TypeError("moving_average() needs a model and its average")
        self._average(model, average, beta)

    def _average(self, model: nn.Module, ema: nn.Module, beta: float) -> None:
        low = next((p.dtype for p in ema.parameters() if p.dtype in LOW), None)
        if low is not None:
            raise ValueError(
                f"moving_average(model, ema): ema is in {low}, where its changes are rounded away: ema.float()"
            )
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(parameter.to(average.device, average.dtype), 1 - beta)
            for copy, buffer in zip(ema.buffers(), model.buffers(), strict=True):
                copy.copy_(buffer)

    # ---------------------------------------------------------------- whole parameters

    @contextlib.contextmanager
    def gathered_parameters(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` has its parameters whole and its forward passes need no other rank.

        Each rank may then run as many passes as it likes, as in generation. All ranks must enter and leave together,
        and every rank needs the memory for the whole model. No gradient is computed inside.
        """
        yield

    @contextlib.contextmanager
    def replaced_weights(self, model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, some parameters of `model` have other values. All ranks together; no optimizer steps inside.

        Args:
            model: as it was prepared.
            values: whole tensors by the names of the parameters.
        """
        parts = self._weights_in_use(model, values)
        before = {name: [piece.clone() for _, piece in part.pieces] for name, part in parts.items()}
        with torch.no_grad():
            for name, part in parts.items():
                part.copy_from(values[name])
        try:
            yield
        finally:
            self._weights_in_use(model, {})  # nothing that was gathered inside stays
            with torch.no_grad():
                for name, part in parts.items():
                    for (_, piece), value in zip(part.pieces, before[name], strict=True):
                        piece.copy_(value)

    def _weights_in_use(self, model: nn.Module, names: Collection[str]) -> dict[str, FlatTensor]:
        """What this rank holds of these parameters for forward passes, as views; nothing of `model` stays gathered."""
        return {name: FlatTensor.of(p) for name, p in model.named_parameters() if name in names}

    # ---------------------------------------------------------------- export

    def save_model(
        self, model: nn.Module, tokenizer: Any, output_dir: str | os.PathLike[str], merge_lora: bool = True
    ) -> None:
        """Write a Hugging Face safetensors folder that `from_pretrained` and vLLM open.

        Args:
            model: a Hugging Face model, or a wrapper that holds one as ``.model``.
            tokenizer: saved beside it; None to leave it out.
            output_dir: the folder; an existing one is replaced file by file.
            merge_lora: fold LoRA adapters into the weights; False saves the adapter alone.
        """
        save_pretrained(model, tokenizer, Path(output_dir), merge_lora=merge_lora)

    # ---------------------------------------------------------------- data, logs, collectives

    def setup_dataloader(
        self,
        dataset: Dataset[Any] | None = None,
        batch_size: int | None = None,
        pin_memory: bool = False,
        shuffle: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = True,
        sampler: Any = None,
        consumed_samples: int = 0,
        **kwargs: Any,
    ) -> DataLoader[Any]:
        """A data loader that gives each rank its share, reshuffles every epoch and can start in the middle.

        Args:
            dataset: map-style data set.
            batch_size: samples of one batch on one rank.
            pin_memory: page-locked batches.
            shuffle: a new order every epoch, fixed by `config.seed`.
            collate_fn: how samples become a batch.
            drop_last: leave out the last, incomplete batch.
            sampler: which samples, in place of all that is said above about ranks, epochs and starting in the middle.
            consumed_samples: samples, over all ranks, already seen in this epoch.
            **kwargs: further keywords of `torch.utils.data.DataLoader`; ``replay_buffer`` is another name of `dataset`.
        """
        from lightrft_lightning.data import make_dataloader

        dataset = kwargs.pop("replay_buffer", dataset)
        if dataset is None or batch_size is None:
            raise TypeError("setup_dataloader() needs a data set and a batch_size")
        if sampler is not None:
            if consumed_samples:
                raise ValueError(f"setup_dataloader(consumed_samples={consumed_samples}): the sampler has to know this")
            kwargs |= {"collate_fn": collate_fn, "pin_memory": pin_memory, "drop_last": drop_last}
            return DataLoader(dataset, batch_size, sampler=sampler, **kwargs)
        return make_dataloader(
            dataset, batch_size, num_replicas=self.world_size, rank=self.global_rank, shuffle=shuffle,
            seed=self.config.seed, drop_last=drop_last, consumed_samples=consumed_samples, collate_fn=collate_fn,
            pin_memory=pin_memory, **kwargs,
        )  # fmt: skip

    def print(self, *msg: Any) -> None:
        """Print on rank 0."""
        if self.is_rank_0():
            print(*msg, flush=True)

    def is_rank_0(self) -> bool:
        """Whether this is the first process of all."""
        return self.get_rank() == 0

    def get_rank(self) -> int:
        """This process's number among all."""
        return self.global_rank

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank, in their order; any object that can be pickled."""
        return [value]

    def exchange_objects(self, parcels: Sequence[Any]) -> list[Any]:
        """Send ``parcels[r]`` to rank r; returns what each rank has sent here, in their order.

        Args:
            parcels: one for each rank, any objects that can be pickled.
        """
        return list(parcels)

    def all_reduce(self, data: Any, op: str = "mean") -> Any:
        """Combine tensors or numbers over all ranks, in nested dicts and lists too; the identity in one process.

        Args:
            data: tensor, number, or dicts and lists of them.
            op: ``mean``, ``sum`` or ``max``.
        """
        if op not in ("mean", "sum", "max"):
            raise ValueError(unknown_name("reduction", op, ("mean", "sum", "max")))
        return data

    def report_memory(self, prefix: str = "") -> dict[str, float]:
        """Print (on rank 0) and return the memory in use, in GiB: of the process, and of its accelerator if any."""
        report = {"process": _resident_bytes() / GIB}
        if self.root_device.type == "cuda":
            report["device_allocated"] = torch.cuda.memory_allocated(self.root_device) / GIB
            report["device_reserved"] = torch.cuda.memory_reserved(self.root_device) / GIB
        self.print(f"{prefix} memory:", ", ".join(f"{k} {v:.2f} GiB" for k, v in report.items()))
        return report

    # ---------------------------------------------------------------- memory

    def maybe_offload_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Move the optimizer's state to CPU memory; nothing to do where it is there already."""
        self._move_moments(optimizer, torch.device("cpu"))
        return optimizer

    def maybe_load_optimizer(self, optimizer: Optimizer, device: Any = None) -> Optimizer:
        """Move the optimizer's state back to the device, which is always the strategy's."""
        self._move_moments(optimizer, self.root_device)
        return optimizer

    def offload_model(self, model: Any, empty_cache: bool = True) -> None:
        """Move a model, or a list of them, to CPU memory; nothing to do where it is there already.

        Args:
            model: one or several.
            empty_cache: give the device's memory back to it at once.
        """
        for one in model if isinstance(model, list | tuple) else (model,):
            self._offload(one)
        if empty_cache and self.root_device.type == "cuda":
            torch.cuda.empty_cache()

    def reload_model(self, model: Any) -> None:
        """Move a model, or a list of them, back to the device."""
        for one in model if isinstance(model, list | tuple) else (model,):
            self._reload(one)

    def _move_moments(self, optimizer: Optimizer, device: torch.device) -> None:
        _state_to(optimizer, device)

    def _offload(self, model: nn.Module) -> None:
        model.to("cpu")

    def _reload(self, model: nn.Module) -> None:
        model.to(self.root_device)


class _Autocast:
    """Mixed precision around a model's forward pass.

    As hooks: these follow `copy.deepcopy` (a reference, an EMA) and do not hide the model's own `forward`, as a wrapped
    method would.
    """

    def __init__(self, model: nn.Module, device_type: str, dtype: torch.dtype) -> None:
        self._device_type, self._dtype = device_type, dtype
        self._active: list[torch.autocast] = []
        model.register_forward_pre_hook(self._enter, prepend=True)
        model.register_forward_hook(self._exit, always_call=True)

    def _enter(self, *args: Any) -> None:
        self._active.append(torch.autocast(self._device_type, dtype=self._dtype))
        self._active[-1].__enter__()

    def _exit(self, *args: Any) -> None:
        self._active.pop().__exit__(None, None, None)


def check_one_scale(further: Sequence[Any]) -> None:
    """Raise ValueError if a float16 loss goes through several models, each of which has a loss scale of its own."""
    if further:
        raise ValueError("a loss through several models cannot be scaled for float16: use bfloat16 or float32")


def pairs_in(items: Iterable[Any]) -> Iterator[tuple[nn.Module, Any]]:
    """The models in arguments of `prepare`, each with the optimizer next to it or None."""
    for item in items:
        for one in item if _are_models(item) else (item,):
            model, optimizer, *_ = (*one, None, None) if isinstance(one, tuple | list) else (one, None)
            if isinstance(model, nn.Module):  # `prepare` refuses what is none
                yield model, optimizer


def _are_models(item: Any) -> bool:
    return isinstance(item, list) and all(isinstance(one, nn.Module) for one in item)


def _check_holds(optimizer: Any, model: nn.Module) -> None:
    """Raise ValueError if the optimizer steps nothing of the model: another copy's parameters would get no gradient."""
    held = [p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]]
    inside = {id(p) for p in model.parameters()}
    if held and not any(id(p) in inside for p in held):
        raise ValueError(
            f"the optimizer holds a parameter of shape {tuple(held[0].shape)} that is not in the model: "
            "pass each optimizer with the model that it was created for"
        )


def _thaw(model: nn.Module, known: _Trained) -> None:
    """Make trainable again what `prepare` froze, and nothing else."""
    for parameter in known.frozen:
        parameter.requires_grad_(True)
    if known.frozen:
        model.train()
    known.frozen = ()


def _decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with and without weight decay: vectors are biases and norm weights."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trainable if p.ndim >= 2], [p for p in trainable if p.ndim < 2]


def _state_to(optimizer: Optimizer, device: torch.device) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and (key != "step" or value.device.type != "cpu"):
                state[key] = value.to(device)


def _resident_bytes() -> int:
    """Memory of this process; 0 where the operating system has no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")
