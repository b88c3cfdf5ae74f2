"""`DeepspeedStrategy`: optimizer state, gradients and parameters sharded by DeepSpeed ZeRO-1, 2 and 3.

Source: https://arxiv.org/abs/1910.02054, https://deepspeed.readthedocs.io/en/latest/zero3.html
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightrft_lightning.config import StrategyConfig
from lightrft_lightning.models.streaming import parameters_on_meta
from lightrft_lightning.strategies._zero import ZeroModel, backward_through, buckets, start_deepspeed
from lightrft_lightning.strategies._zero_config import (
    LIGHTNING_KEYWORDS,
    check_settings,
    put,
    read_overrides,
    zero_config,
)
from lightrft_lightning.strategies._zero_init import Streamed, cpu_adam, has_meta, stream_in
from lightrft_lightning.strategies._zero_lightning import ZeroPrecision, frozen_parts, let_summaries_count, owners
from lightrft_lightning.strategies._zero_state import ZeroCheckpoints
from lightrft_lightning.strategies.base import _Trained, check_one_scale, pairs_in
from lightrft_lightning.strategies.graphs import draw_graphs
from lightrft_lightning.strategies.launch import DEFAULT_TIMEOUT
from lightrft_lightning.strategies.limits import (
    NOT_WITH_DEEPSPEED,
    check_callbacks,
    check_compiled,
    check_dtypes,
    check_embeddings,
    check_scalars,
    explained,
    gradient_hook,
    no_second_derivatives,
)
from lightrft_lightning.strategies.rounding import Rounding
from lightrft_lightning.strategies.sharding import take_those_of_rank_0

if TYPE_CHECKING:
    import lightning.pytorch as pl


class _LightningDeepSpeed(DeepSpeedStrategy):
    """Lightning's strategy without its constructor, which needs DeepSpeed and fills in its own JSON."""

    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: Any = None,
        cluster_environment: Any = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
    ) -> None:
        DDPStrategy.__init__(
            self,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
        )

    @override
    def teardown(self) -> None:
        # The model stays where its engines are.
        assert self.accelerator is not None and self.cluster_environment is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


class DeepspeedStrategy(ZeroCheckpoints, _LightningDeepSpeed):  # type: ignore[misc]
    """DeepSpeed ZeRO: stage 1 shards optimizer state, 2 gradients as well, 3 parameters as well.

    Each trained model gets a DeepSpeed engine of its own, each with its own optimizer. The models stay the caller's
    objects. Models without an optimizer are sharded at stage 3, and whole on every rank below.

    Settings of `StrategyConfig` that matter here: ``zero_stage``, ``adam_offload``, ``zpg``, ``overlap_comm``,
    ``grad_accum_dtype``, ``bf16`` and ``fp16`` (fp32 master weights).

    Args:
        deepspeed_config: keys of DeepSpeed's JSON, or a file of them; they win over what the strategy writes, but must
            not contradict its fields.
        timeout: how long a collective may take before it is an error.
        **kwargs: see `StrategyBase`; of Lightning's ``DeepSpeedStrategy`` those that stand for one of these settings.

    Raises:
        ValueError: settings that contradict each other or DeepSpeed, e.g. ``fsdp=True``.
    """

    strategy_name = "lightrft_deepspeed"
    positional = ("seed", "max_norm", "micro_train_batch_size", "train_batch_size", "zero_stage", "bf16", "args")

    def __init__(
        self,
        *positional: Any,
        deepspeed_config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        timeout: timedelta | None = None,
        **kwargs: Any,
    ) -> None:
        self._overrides = read_overrides(deepspeed_config)
        for keyword in LIGHTNING_KEYWORDS.keys() & kwargs.keys():
            key, value_of = LIGHTNING_KEYWORDS[keyword]
            value = kwargs.pop(keyword)
            put(self._overrides, key, value if value_of is None else value_of(value))
        for theirs, ours in (("stage", "zero_stage"), ("offload_optimizer", "adam_offload")):
            if theirs in kwargs:
                kwargs.setdefault(ours, kwargs.pop(theirs))
        super().__init__(*positional, **kwargs)
        self._timeout = timeout or DEFAULT_TIMEOUT
        self._zero, self._averages = WeakKeyDictionary(), WeakIdKeyDictionary()
        self._streamed: WeakKeyDictionary[nn.Module, Streamed] = WeakKeyDictionary()
        self._rounding: WeakKeyDictionary[nn.Module, Rounding] = WeakKeyDictionary()
        self._names: WeakKeyDictionary[Optimizer, str] = WeakKeyDictionary()
        self._max_norms: WeakKeyDictionary[Optimizer, float] = WeakKeyDictionary()

    @override
    def _checked_config(self, config: StrategyConfig) -> StrategyConfig:
        if config.fsdp:
            raise ValueError("DeepspeedStrategy(fsdp=True): leave fsdp out, or use FSDPV2Strategy")
        check_settings(config, self._overrides)
        return config

    @override
    def compile_problem(self) -> str | None:
        if self.config.zero_stage < 3:
            return None
        return "ZeRO-3 gathers the weights of every single module in hooks, which cannot be compiled; take FSDP2"

    @override
    def quantization_problem(self) -> str | None:
        if self.config.zero_stage < 3:
            return None
        return "ZeRO-3 shards the weights, which cannot be done in four bits; take ZeRO-2"

    @property
    def zero_stage_3(self) -> bool:
        """Whether parameters are sharded; Lightning's model summary asks."""
        return self.config.zero_stage == 3

    # ---------------------------------------------------------------- a Trainer's module

    @override
    def setup_environment(self) -> None:
        self.precision_plugin = ZeroPrecision(self._checked_precision(), self)
        if self.config.zero_stage == 3:
            self._refuse_whole_copies()
        assert self.lightning_module is not None
        check_callbacks(self.lightning_module, (ModelPruning,), self.strategy_name, NOT_WITH_DEEPSPEED)
        self._join_trainers_process_group()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self.lightning_module
        assert module is not None
        self.training_engines = trainer.state.fn == TrainerFn.FITTING
        check_embeddings(module, self.strategy_name)
        check_compiled(module, self.compile_problem())
        check_dtypes(module)
        if self.config.zero_stage == 3:
            check_scalars(module, "ZeRO-3")
        self._check_gradient_hooks(module)
        draw_graphs(trainer, module, sharded=bool(self._zero))
        if self.world_size > 1:
            take_those_of_rank_0([module], self.gather_objects, self.root_device)
        for part in frozen_parts(module, ()) if has_meta(module) else ():
            self._streamed[part] = stream_in(self._deepspeed, part, self._json(part), self.root_device)
        if self.training_engines:
            self.setup_optimizers(trainer)
            self._start_engines(module)
        elif self.config.zero_stage == 3:
            for part in frozen_parts(module, list(self._zero)):  # of a fit before
                self._wrap(part, self._models.setdefault(part, _Trained()))
        module.to(self.root_device)
        if self.config.zero_stage == 3:
            let_summaries_count(module)
        self.setup_precision_plugin()
        for wrapper in self._lightning_optimizers:
            wrapper.zero_grad = wrapper.optimizer.zero_grad  # type: ignore[attr-defined]
        self.barrier()

    def _check_gradient_hooks(self, module: pl.LightningModule) -> None:
        stage = self.config.zero_stage
        if not self.training_engines or (stage == 1 and self.world_size == 1):
            return
        if hook := gradient_hook(module):
            does = "averages over the ranks later" if stage == 1 else "takes apart, so that parameters have none"
            raise MisconfigurationException(
                f"{hook} looks at gradients, which ZeRO-{stage} {does}: leave it out, or take lightrft_fsdp or "
                "lightrft_fake"
            )

    setup_optimizers = Strategy.setup_optimizers  # not Lightning's for DeepSpeed, which takes one from the JSON

    @contextlib.contextmanager
    @override
    def model_sharded_context(self) -> Iterator[None]:
        yield  # a module asks for `init_model_context` where it builds a large model

    training_engines = False
    """Whether the Trainer is fitting; an evaluation alone leaves the weights in fp32."""

    def _start_engines(self, module: pl.LightningModule) -> None:
        parts = owners(module, self.optimizers)
        names = {m: name for name, m in module.named_modules()}
        for part, optimizer in zip(parts, self.optimizers, strict=True):
            known = self._models.setdefault(part, _Trained())
            known.optimizer = optimizer
            self._wrap(part, known)
            self._names[optimizer] = names[part] or "model"
        for part in frozen_parts(module, parts):
            self._wrap(part, self._models.setdefault(part, _Trained()))

    def lightning_backward(
        self, loss: Tensor, optimizer: Any, retain_graph: bool = False, go: Callable[[Tensor], Any] | None = None
    ) -> None:
        """Lightning's call form: through the engine of `optimizer`, or through all if None.

        Args:
            loss: a scalar.
            optimizer: whose engine.
            retain_graph: as in `Tensor.backward`.
            go: a module's own backward pass.
        """
        engines = [z for z in self._zero.values() if z.optimizer is not None]
        if optimizer is None and len(engines) > 1 and self.compute_dtype == torch.float16:
            raise MisconfigurationException(
                "manual_backward(loss) with several optimizers in precision='16-mixed' does not tell whose loss "
                "scale to take: call self.trainer.strategy.backward(loss, model, optimizer)"
            )
        chosen = engines if optimizer is None else [self._zero_of(optimizer)]
        scale = self._loss_scale(chosen[0])
        if go is None and len(chosen) == 1:
            chosen[0].backward(loss, scale, retain_graph)
        else:
            backward_through(chosen, loss, go or partial(Tensor.backward, retain_graph=retain_graph), scale)

    def clip_next_step(self, optimizer: Any, max_norm: float) -> None:
        """Lightning's call form: clip the gradients of the next step of `optimizer`."""
        self._max_norms[getattr(optimizer, "optimizer", optimizer)] = max_norm

    def lightning_step(self, optimizer: Optimizer) -> None:
        """Lightning's call form: step the engine of `optimizer`."""
        self._step(self._zero_of(optimizer), optimizer, self._names[optimizer], 1.0, self._max_norms.pop(optimizer, 0))

    @override
    def _call_step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a step of the module, through its own forward pass where that is what an engine has hooks on."""
        module = self.lightning_module
        assert module is not None
        if module not in self._zero:
            return super()._call_step(name, *args, **kwargs)
        return self._forward_redirection(module, module, name, *args, **kwargs)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as inside:
            inside.enter_context(self.precision_plugin.train_step_context())
            if self.config.zero_stage == 3:
                inside.enter_context(no_second_derivatives("ZeRO-3"))
                inside.enter_context(explained("ZeRO-3"))
            return self._call_step("training_step", *args, **kwargs)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        with explained("ZeRO-3") if self.config.zero_stage == 3 else contextlib.nullcontext():
            return super().backward(*args, **kwargs)

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        return False  # Lightning counts the batches; each step of an engine is one of its optimizer steps

    # ---------------------------------------------------------------- models and optimizers

    @property
    def _deepspeed(self) -> Any:
        return start_deepspeed(self.root_device, self.local_rank, self._timeout)

    @override
    def prepare(self, *models_or_pairs: Any, is_rlhf: bool = False) -> Any:
        _check_apart([*(model for model, _ in pairs_in(models_or_pairs)), *self._zero])
        return super().prepare(*models_or_pairs, is_rlhf=is_rlhf)

    @override
    def _wrap(self, model: nn.Module, known: _Trained) -> nn.Module:
        zero = self._zero.get(model)
        if zero is not None and zero.optimizer is known.optimizer:
            return model
        if self.world_size > 1 and not self._is_inside(model):  # of what is, `setup` has seen to it
            take_those_of_rank_0([model], self.gather_objects, self.root_device)
        dtype = self._weights_dtype
        if known.optimizer is None and self.config.zero_stage < 3:
            model.to(self.root_device)
            if dtype != torch.float32:
                self._rounding[model] = Rounding(model, dtype, at_once=self.lightning_module is not None)
        else:
            if (rounding := self._rounding.pop(model, None)) is not None:
                rounding.check_exact()
            config = self._json(model)
            before = self._stream_in(model, config)
            self._zero[model] = zero = ZeroModel(self._deepspeed, model, known.optimizer, config, before)
            known.engine = zero.engine
        if dtype != torch.float32:
            _cast_inputs(model, dtype)
        return model

    def _is_inside(self, model: nn.Module) -> bool:
        """Whether it is a part of the Trainer's module, and not one beside it, such as a reward model."""
        return self.lightning_module is not None and any(part is model for part in self.lightning_module.modules())

    @property
    def _weights_dtype(self) -> torch.dtype:
        evaluating = self.lightning_module is not None and not self.training_engines
        return torch.float32 if evaluating else self.compute_dtype

    def _json(self, model: nn.Module) -> dict[str, Any]:
        return zero_config(
            self.config, self._overrides, model,
            dtype=self._weights_dtype, device=self.root_device, ranks=self.world_size,
        )  # fmt: skip

    @override
    def init_model_context(self, meta_init: bool = False) -> contextlib.AbstractContextManager[Any]:
        """Where to build a model.

        Args:
            meta_init: at stage 3, build without memory for the parameters; `create_optimizer`, `prepare` or the Trainer
                reads them from the safetensors files of the folder that the model's config came from, one at a time,
                and each rank keeps its part. At other stages every rank holds the whole model anyway.
        """
        return parameters_on_meta() if meta_init and self.config.zero_stage == 3 else contextlib.nullcontext()

    def _stream_in(self, model: nn.Module, config: dict[str, Any]) -> Streamed | None:
        if has_meta(model):
            self._streamed[model] = stream_in(self._deepspeed, model, config, self.root_device)
        return self._streamed.pop(model, None)

    @override
    def create_optimizer(
        self,
        model: nn.Module,
        *,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        weight_decay: float | None = None,
        **kwargs: Any,
    ) -> Optimizer:
        """As in `StrategyBase`. With ``adam_offload`` DeepSpeed's CPU Adam where there is a GPU and a C++ compiler."""
        if has_meta(model):
            self._streamed[model] = stream_in(self._deepspeed, model, self._json(model), self.root_device)
        return super().create_optimizer(model, lr=lr, betas=betas, weight_decay=weight_decay, **kwargs)

    @override
    def _own_kind_of(self, optimizer: Optimizer) -> Optimizer:
        offloaded = self.config.adam_offload and self.root_device.type != "cpu"
        return cpu_adam(self._deepspeed, optimizer) if offloaded else optimizer

    # ---------------------------------------------------------------- one step

    @override
    def _backward(
        self,
        loss: Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        accumulation_steps: int | None = None,
        further: Sequence[tuple[nn.Module, Optimizer]] = (),
    ) -> None:
        loss = loss / (accumulation_steps or self.accumulation_steps)
        zero = self._zero_of(optimizer)
        if not further:
            zero.backward(loss, self._loss_scale(zero))
            return
        if self.compute_dtype == torch.float16:
            check_one_scale(further)
        backward_through([zero, *(self._zero_of(other) for _, other in further)], loss)

    def _loss_scale(self, zero: ZeroModel) -> float:
        if self.compute_dtype != torch.float16:
            return 1.0
        known = self._models.setdefault(zero.model, _Trained())
        known.scaler = known.scaler or torch.amp.GradScaler(self.root_device.type)
        return known.scaler.get_scale()

    @override
    def _optimizer_step(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        scheduler: Any,
        name: str,
        accumulation_steps: int | None = None,
        flush: bool = False,
    ) -> float | None:
        zero = self._zero_of(optimizer)
        raw = getattr(optimizer, "optimizer", optimizer)
        steps = accumulation_steps or self.accumulation_steps
        done = self._pending.get(raw, 0) + 1
        self._pending[raw] = done
        if done < steps and not flush:
            return None
        self._pending[raw] = 0
        norm = self._step(zero, optimizer, name, done / steps, self.config.max_norm)
        if scheduler is not None and math.isfinite(norm):
            scheduler.step()
        return norm

    def _step(self, zero: ZeroModel, optimizer: Any, name: str, divisor: float, max_norm: float) -> float:
        """One step of the engine, through Lightning's wrapper of the optimizer if it is one."""
        norm = math.nan

        def step() -> None:
            nonlocal norm
            norm = zero.step(divisor * self._loss_scale(zero), max_norm)

        with _counted_if(optimizer, lambda: math.isfinite(norm)):
            self._make_step(optimizer, step)
        known = self._models.get(zero.model)
        if known is not None and known.scaler is not None:
            _update_scale(known.scaler, norm)
        self._count_step(norm, name)
        return norm

    # ---------------------------------------------------------------- whole parameters

    @contextlib.contextmanager
    @override
    def gathered_parameters(self, model: nn.Module) -> Iterator[None]:
        inside = [z for m in model.modules() if (z := self._zero.get(m)) is not None and z.stage == 3]
        with contextlib.ExitStack() as stack:
            for zero in inside:
                stack.enter_context(zero.without_hooks())
                stack.enter_context(zero.whole(list(zero.model.parameters())))
            yield

    @contextlib.contextmanager
    @override
    def replaced_weights(self, model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
        engines = self._engines_in(model)
        for zero in engines:
            zero.written.adopt()
            zero.written.paused = True
        try:
            with super().replaced_weights(model, values):
                yield
        finally:
            for zero in engines:
                zero.written.forget()
                zero.written.paused = False

    @override
    def named_full_tensors(self, model: nn.Module, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        gathered = self._deepspeed.zero.GatheredParameters if self.config.zero_stage == 3 else None
        for zero in self._engines_in(model):
            zero.written.adopt()
        chosen = {name: p for name, p in model.named_parameters() if names is None or name in names}
        for bucket in buckets(chosen):
            free = [p for p in bucket.values() if hasattr(p, "ds_id")]
            with gathered(free) if gathered is not None and free else contextlib.nullcontext():
                for name, parameter in bucket.items():
                    yield name, parameter.detach()

    @override
    def _average(self, model: nn.Module, ema: nn.Module, beta: float) -> None:
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                there, here = self._part(average), self._part(parameter)
                if there.numel() != here.numel():
                    raise ValueError("moving_average(model, ema): prepare both models with this strategy")
                if average.dtype != torch.float32:  # a small change would be lost in 16 bits
                    there = self._averages.setdefault(average, there.float())
                there.lerp_(here.to(there.dtype), 1 - beta)
            for copy, buffer in zip(ema.buffers(), model.buffers(), strict=True):
                copy.copy_(buffer)
        self._model_loaded(ema)

    # ---------------------------------------------------------------- memory; on a CPU it is all the same memory

    @override
    def _move_moments(self, optimizer: Optimizer, device: torch.device) -> None:
        zero = self._zero_of(optimizer)
        if not self.config.adam_offload:
            for _, flat, _ in zero.places():
                for value in zero.optimizer.state.get(flat, {}).values():  # type: ignore[union-attr]
                    if isinstance(value, Tensor) and value.shape == flat.shape:
                        value.data = value.data.to(device)

    @override
    def _offload(self, model: nn.Module) -> None:
        if self.root_device.type != "cpu":
            for zero in self._engines_in(model):
                zero.offload()
            if not self._engines_in(model):
                model.to("cpu")

    @override
    def _reload(self, model: nn.Module) -> None:
        if self.root_device.type != "cpu":
            for zero in self._engines_in(model):
                zero.reload(self.root_device)
            if not self._engines_in(model):
                model.to(self.root_device)


@contextlib.contextmanager
def _counted_if(optimizer: Any, made: Callable[[], bool]) -> Iterator[None]:
    """Let Lightning's wrapper count the step inside only if there was one."""
    if not isinstance(optimizer, LightningOptimizer):
        yield
        return
    count, optimizer._on_after_step = optimizer._on_after_step, do_nothing_closure
    try:
        yield
    finally:
        optimizer._on_after_step = count
    if made():
        count()


def _check_apart(models: Iterable[nn.Module]) -> None:
    """Raise ValueError if two models share a trainable parameter: two engines would reduce its gradient."""
    holders: dict[nn.Parameter, nn.Module] = {}
    for model in dict.fromkeys(models):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and holders.setdefault(parameter, model) is not model:
                raise ValueError(
                    f"{type(holders[parameter]).__name__} and {type(model).__name__} share {name}, of which DeepSpeed "
                    "can train one model only: put them into one module with one optimizer, or take FSDPV2Strategy"
                )


def _update_scale(scaler: torch.amp.GradScaler, norm: float) -> None:
    """Let `scaler` see whether the gradients were finite: DeepSpeed has the gradients, it has the policy."""
    scaler.scale(torch.zeros((), device=scaler._device))  # allocates its state at first use
    witness = nn.Parameter(torch.zeros((), device=scaler._device))
    witness.grad = torch.full_like(witness, norm)
    seen = torch.optim.SGD([witness])
    scaler.unscale_(seen)
    scaler.update()


def _cast_inputs(model: nn.Module, dtype: torch.dtype) -> None:
    """Give `model` its floating-point inputs in the dtype of its weights."""
    if hasattr(model, "_lightrft_cast"):
        return

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(cast, (args, kwargs))

    model._lightrft_cast = model.register_forward_pre_hook(hook, with_kwargs=True)  # type: ignore[assignment]
