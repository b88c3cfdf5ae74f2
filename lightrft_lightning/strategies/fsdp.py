"""`FSDPV2Strategy`: parameters, gradients and optimizer state sharded by FSDP2 (`fully_shard`).

Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightrft_lightning.checkpoints.flat import FlatTensor, TensorInfo
from lightrft_lightning.config import StrategyConfig
from lightrft_lightning.models.streaming import fill_from_folder, parameters_on_meta
from lightrft_lightning.strategies.base import _Trained, pairs_in
from lightrft_lightning.strategies.distributed import DistributedStrategy
from lightrft_lightning.strategies.graphs import draw_graphs
from lightrft_lightning.strategies.launch import DEFAULT_TIMEOUT
from lightrft_lightning.strategies.limits import (
    check_callbacks,
    check_embeddings,
    check_grad_norm,
    check_hooks_of_parameters,
    check_scalars,
    explained,
    no_second_derivatives,
    refuse_local_numbers,
    step_explained,
)
from lightrft_lightning.strategies.sharding import (
    KEPT_WHOLE,
    WITH_OWN_PARAMETERS,
    Replaced,
    check_holds_sharded,
    families,
    free_if_evaluated,
    meet_thawed,
    reshard,
    roots,
    shard_family,
    start,
    take_those_of_rank_0,
    trainable_parts,
    units,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl


class FSDPV2Strategy(DistributedStrategy, ModelParallelStrategy):
    """FSDP2: `fully_shard` for any model, block by block, without sharding code in it.

    Each module that repeats in a list (the decoder layers of a Hugging Face model) is one unit that is gathered and
    freed by itself; the rest (embeddings, head, norm) is another. Frozen models are sharded as well. Inside a
    `Trainer` every submodule of the `LightningModule` that has parameters is treated so, unless `configure_model` has
    sharded it.

    Settings of `StrategyConfig` that matter here: ``zpg`` (ranks of a sharding group; the groups are replicas of one
    another), ``bf16`` and ``fp16`` (fp32 weights, low-precision compute, fp32 reduction), ``fsdp_cpu_offload``.

    Args:
        timeout: how long a collective may take before it is an error.
        process_group_backend: default: NCCL for GPUs, gloo for CPUs.
        reshard_after_forward: free the gathered parameters of trained models after the forward pass and gather them
            again for the backward pass. False trades memory for a third of the communication.
        **kwargs: see `StrategyBase`.

    Raises:
        ValueError: a configuration that contradicts FSDP2, e.g. ``zero_stage=3``.
    """

    strategy_name = "lightrft_fsdp"
    positional = ("seed", "max_norm", "micro_train_batch_size", "train_batch_size", "bf16", "args")

    def __init__(
        self,
        *positional: Any,
        timeout: timedelta | None = None,
        process_group_backend: str | None = None,
        reshard_after_forward: bool = True,
        **kwargs: Any,
    ) -> None:
        kwargs = self._named(positional, kwargs)
        if kwargs.get("config") is None and kwargs.get("args") is None:
            kwargs.setdefault("fsdp", True)
        super().__init__(process_group_backend=process_group_backend, **kwargs)
        self._timeout = timeout or DEFAULT_TIMEOUT
        self.reshard_after_forward = reshard_after_forward

    @override
    def _checked_config(self, config: StrategyConfig) -> StrategyConfig:
        if config.adam_offload and config.fsdp_cpu_offload:
            config = config.replace(adam_offload=False)  # the optimizer's state is where the parameters are
        if config.grad_accum_dtype not in (None, "fp32"):
            raise ValueError(f"grad_accum_dtype={config.grad_accum_dtype!r}: FSDP2 accumulates and reduces in fp32")
        if config.fsdp:
            return config
        if config.is_set("fsdp"):
            raise ValueError("FSDPV2Strategy(fsdp=False): leave it out, or use DeepspeedStrategy")
        return config.replace(fsdp=True)

    # ---------------------------------------------------------------- start

    @override
    def setup_distributed(self, timeout: timedelta | None = None, num_gpu_per_node: int | None = None) -> None:
        super().setup_distributed(timeout)
        self._make_mesh()

    @override
    def setup_environment(self) -> None:
        self._checked_precision()
        self._refuse_whole_copies()
        assert self.lightning_module is not None
        check_callbacks(self.lightning_module, (StochasticWeightAveraging, ModelPruning), self.strategy_name)
        # Not ModelParallelStrategy's: its default mesh shards nothing on one machine.
        self._join_trainers_process_group()
        self._make_mesh()
        self.lightning_module._device_mesh = self._device_mesh  # for a `configure_model` that shards by itself

    @override
    def _checked_precision(self) -> str:
        precision = super()._checked_precision()
        if isinstance(self.precision_plugin, MixedPrecision):
            # FSDP2 casts by itself; autocast on top of it would cast every weight a second time.
            plugin = _PolicyPrecision(precision, self.precision_plugin.device, self.precision_plugin.scaler)  # type: ignore[arg-type]
            self.precision_plugin = plugin
        return precision

    def _make_mesh(self) -> None:
        refuse_local_numbers()
        world, group = self.world_size, self.config.zpg
        if world % group:
            raise ValueError(
                f"zpg={group} does not divide the world size {world}: sharding groups must have the same size"
            )
        kind = self.root_device.type
        if group in (1, world):
            mesh = init_device_mesh(kind, (world, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
            self._sharding_mesh = mesh["data_parallel"]
        else:
            mesh = init_device_mesh(kind, (world // group, group), mesh_dim_names=("replicate", "shard"))
            mesh._flatten("data_parallel")
            self._sharding_mesh = mesh
        self._device_mesh = mesh

    @override
    def init_model_context(self, meta_init: bool = False) -> contextlib.AbstractContextManager[Any]:
        """Where to build a model.

        Args:
            meta_init: build without memory for the parameters; `prepare` (or the Trainer) shards the model and then
                reads each rank's part from the safetensors files of the folder that the model's config came from.
        """
        return parameters_on_meta() if meta_init else contextlib.nullcontext()

    @override
    def quantization_problem(self) -> str | None:
        return "FSDP2 shards the weights, which cannot be done in four bits; take strategy='lightrft_deepspeed_stage_2'"

    # ---------------------------------------------------------------- a Trainer's module

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self.lightning_module
        assert module is not None
        check_embeddings(module, self.strategy_name)
        check_hooks_of_parameters(module, self.strategy_name)
        check_scalars(module, self.strategy_name)
        check_grad_norm(module, self.strategy_name)
        draw_graphs(trainer, module, sharded=any(isinstance(m, FSDPModule) for m in module.modules()))
        for family in families(part for _, part in trainable_parts(module)):
            self._shard(family, trained=any(p.requires_grad for part in family for p in part.parameters()))
        if self.world_size > 1:  # what is in none of these: own parameters and buffers, parts without parameters
            take_those_of_rank_0([module], self.gather_objects, self.root_device)
        self._shard_own_parameters(module)
        reshard(module)
        self._rest_to_device(module)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                check_holds_sharded(optimizer)
        self.setup_precision_plugin()

    @override
    def on_train_start(self) -> None:  # after the hooks of module and callbacks
        super().on_train_start()
        assert self.lightning_module is not None
        check_hooks_of_parameters(self.lightning_module, self.strategy_name)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        meet_thawed(self.lightning_module)
        with explained(self.strategy_name), no_second_derivatives(self.strategy_name):
            return super().training_step(*args, **kwargs)

    @override
    def _call_step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a step of the module, as its forward pass where it has parameters of its own to gather."""
        module = self.lightning_module
        with explained(self.strategy_name):
            if module in WITH_OWN_PARAMETERS:
                return self._forward_redirection(module, module, name, *args, **kwargs)  # type: ignore[arg-type]
            return super()._call_step(name, *args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        with step_explained(optimizer, self.strategy_name):
            return super().optimizer_step(optimizer, *args, **kwargs)

    # ---------------------------------------------------------------- sharding

    @override
    def prepare(self, *models_or_pairs: Any, is_rlhf: bool = False) -> Any:
        pairs = list(pairs_in(models_or_pairs))
        trained = {model for model, optimizer in pairs if optimizer is not None}
        trained |= {model for model, _ in pairs if model in self._models and self._models[model].optimizer is not None}
        for family in families(model for model, _ in pairs):
            if len(family) > 1:  # those that share nothing follow one by one
                self._shard(family, not trained.isdisjoint(family))
        return super().prepare(*models_or_pairs, is_rlhf=is_rlhf)

    @override
    def _wrap(self, model: nn.Module, known: _Trained) -> nn.Module:
        optimizer = known.optimizer
        if optimizer is not None and optimizer.state and not isinstance(model, FSDPModule):
            raise ValueError("prepare() got an optimizer that has made steps already: prepare before the first step")
        self._shard([model], trained=optimizer is not None)
        if optimizer is not None:
            check_holds_sharded(optimizer)
            meet_thawed(model)
        return model

    def _shard(self, family: Sequence[nn.Module], trained: bool) -> None:
        """Shard models that share parameters, in place; what the user has sharded stays as it is."""
        if any(isinstance(m, FSDPModule) for model in family for m in model.modules()):
            return
        if any(isinstance(p, DTensor) for model in family for p in model.parameters()):
            raise ValueError(
                f"{type(family[0]).__name__} shares parameters with a model that was prepared before: give prepare() "
                "all models that share parameters in one call"
            )
        folders = {m: self._source_of(m) for m in family if any(p.is_meta for p in m.parameters())}
        if self.world_size > 1:
            take_those_of_rank_0(family, self.gather_objects, self.root_device)
        settings: dict[str, Any] = {
            "mesh": self._sharding_mesh,
            "mp_policy": self._mixed_precision(),
            "offload_policy": self._offload_policy(),
        }
        replaced, again = Replaced(family), self.reshard_after_forward or not trained
        # The root of a trained model is needed first in the backward pass, so freeing it would gather it twice.
        root = shard_family(family, again, not trained, **settings)
        for model in family:
            if hasattr(model, "generate"):
                register_fsdp_forward_method(model, "generate")
            if model in folders:
                self._materialize(model, folders[model])
            self._rest_to_device(model)
            model.register_forward_hook(free_if_evaluated)
        replaced.repoint()
        if root is not None:
            start(root)

    def _shard_own_parameters(self, module: pl.LightningModule) -> None:
        """Shard parameters that are in no submodule with a forward pass; those of `module`, or of a `ParameterList`."""
        if isinstance(module, FSDPModule) or all(isinstance(p, DTensor) for p in module.parameters()):
            return
        replaced = Replaced([module])
        fully_shard(
            module, mesh=self._sharding_mesh, reshard_after_forward=False, offload_policy=self._offload_policy()
        )
        module.register_forward_hook(free_if_evaluated)
        WITH_OWN_PARAMETERS.add(module)
        replaced.repoint()

    def _rest_to_device(self, model: nn.Module) -> None:
        """Everything but offloaded parameters."""
        if not self.config.fsdp_cpu_offload:
            model.to(self.root_device)
            return
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.root_device)
            if isinstance(module, _DeviceDtypeModuleMixin):
                module._device = self.root_device

    def _source_of(self, model: nn.Module) -> Path:
        source = getattr(model, "name_or_path", "")
        if not source or not Path(source).is_dir():
            raise ValueError(
                f"{type(model).__name__} was built without weights (meta_init=True) and its config names no local "
                f"folder to read them from (name_or_path={source!r}): build it with load_model(<folder>)"
            )
        return Path(source)

    def _materialize(self, model: nn.Module, folder: Path) -> None:
        """Allocate this rank's part of a model on the meta device and read it."""
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.to_empty(device="cpu" if self.config.fsdp_cpu_offload else self.root_device)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        fill_from_folder(model, folder)

    def _mixed_precision(self) -> MixedPrecisionPolicy:
        dtype = self.compute_dtype
        if dtype == torch.float32:
            return MixedPrecisionPolicy()
        # Outputs stay as they are: what is computed from them decides about its own precision.
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=None)

    def _offload_policy(self) -> OffloadPolicy:
        if not self.config.fsdp_cpu_offload:
            return OffloadPolicy()
        return CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")

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
        steps = accumulation_steps or self.accumulation_steps
        for part, its_optimizer in ((model, optimizer), *further):
            raw = getattr(its_optimizer, "optimizer", its_optimizer)
            for unit in units(part):  # gradients travel once, at the last pass
                unit.set_requires_gradient_sync(self._pending.get(raw, 0) + 1 >= steps, recurse=False)
        super()._backward(loss, model, optimizer, accumulation_steps, further)

    @override
    def _finish_partial_accumulation(self, model: nn.Module) -> None:
        for unit in units(model):
            unit.set_requires_gradient_sync(True, recurse=False)
        # What FSDP2 does at the end of a backward pass; there is no public name for it.
        for unit in roots(model):
            unit._get_fsdp_state()._root_post_backward_final_callback()

    @override
    def _make_step(self, optimizer: Any, step: Callable[[], Any]) -> None:
        """With ``adam_offload`` the optimizer's state is on the device for its own step only."""
        raw = getattr(optimizer, "optimizer", optimizer)
        if self.config.adam_offload:
            self._move_moments(raw, self.root_device)
        with step_explained(optimizer, self.strategy_name):
            super()._make_step(optimizer, step)
        if self.config.adam_offload:
            self._move_moments(raw, torch.device("cpu"))

    @override
    def _clip(self, parameters: Sequence[Tensor]) -> Tensor:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.config.max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.config.max_norm, norm)
        return norm

    # ---------------------------------------------------------------- whole parameters

    @contextlib.contextmanager
    @override
    def gathered_parameters(self, model: nn.Module) -> Iterator[None]:
        inside = list(units(model))
        freed = [any(g._reshard_after_forward for g in u._get_fsdp_state()._fsdp_param_groups) for u in inside]
        for unit in inside:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        KEPT_WHOLE.update(inside)
        try:
            yield
        finally:
            KEPT_WHOLE.difference_update(inside)
            for unit, flag in zip(inside, freed, strict=True):
                unit.reshard()
                unit.set_reshard_after_forward(flag, recurse=False)

    @override
    def named_full_tensors(self, model: nn.Module, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        reshard(model)
        for name, parameter in super().named_full_tensors(model, names):
            yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

    @override
    def _weights_in_use(self, model: nn.Module, names: Collection[str]) -> dict[str, FlatTensor]:
        reshard(model)
        return super()._weights_in_use(model, names)

    @override
    def _average(self, model: nn.Module, ema: nn.Module, beta: float) -> None:
        reshard(model)
        reshard(ema)
        super()._average(model, ema, beta)

    # ---------------------------------------------------------------- checkpoints

    @override
    def _optimizer_tensors(
        self, model: nn.Module, optimizer: Optimizer, saved: Mapping[str, TensorInfo] | None = None
    ) -> dict[str, FlatTensor]:
        reshard(model)
        return super()._optimizer_tensors(model, optimizer, saved)

    @override
    def _optimizer_settings(self, model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
        reshard(model)
        return super()._optimizer_settings(model, optimizer)


class _PolicyPrecision(MixedPrecision):
    """Mixed precision that FSDP2 carries out; what is left is the loss scale of automatic optimization."""

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:  # type: ignore[override]
        with Precision.forward_context(self):
            yield

    def convert_input(self, data: Any) -> Any:
        return data
