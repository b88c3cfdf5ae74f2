"""One model under DeepSpeed ZeRO: its engine, and where the parts of its parameters are."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple
from unittest import mock
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrft_lightning._errors import import_extra
from lightrft_lightning.strategies.elementwise import check_elementwise
from lightrft_lightning.strategies.rounding import refuse_rounded
from lightrft_lightning.strategies.written import Written

log = logging.getLogger(__name__)

_GATHER_ELEMENTS = 200_000_000
"""Elements of the parameters that are whole at the same time while a sharded model is read."""


_MODULE_ATTRIBUTES = {
    "pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining", "ds_id",
    "ds_recompute_parameters", "_external_params", "_original_parameters",
}  # fmt: skip
"""What ZeRO-3 leaves on modules; it belongs to the engine that has put it there."""


def start_deepspeed(device: torch.device, local_rank: int, timeout: timedelta | None) -> Any:
    """Import DeepSpeed for this device and let it use torch's process group, which must exist.

    Raises:
        ImportError: it is not installed; the message names the extra.
        RuntimeError: the process uses DeepSpeed on another kind of device already.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed reads its place on the machine from these, also in forward passes of stage 3.
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    deepspeed = import_extra("deepspeed", "deepspeed")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    for call in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # of DeepSpeed's; nobody else can change them
        warnings.filterwarnings("ignore", message=f"`torch.distributed.{call}` is deprecated", category=FutureWarning)
    kind = deepspeed.get_accelerator().device_name()
    if kind != device.type:
        raise RuntimeError(
            f"DeepSpeed was started for {kind!r} in this process, the strategy runs on {device.type!r}: "
            f"set DS_ACCELERATOR={device.type} before the program starts"
        )
    if kind == "cpu":
        # A kernel for inference only; DeepSpeed would compile it at every first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    limit = {} if timeout is None else {"timeout": timeout}
    backend = "nccl" if kind == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, **limit)
    return deepspeed


class Piece(NamedTuple):
    """A range of a parameter's elements, in row-major order, that this rank keeps."""

    offset: int
    """Index of the first element."""
    values: Tensor
    """1-D view; writing to it changes the model's state."""


_ENGINES: WeakKeyDictionary[nn.Module, ZeroModel] = WeakKeyDictionary()
"""All of this process. A second strategy takes a model over, e.g. that of a second `Trainer`."""


class Place(NamedTuple):
    """Where this rank's range of a parameter is in a flat tensor."""

    offset: int
    """Index of its first element in the parameter."""
    start: int
    """And in the flat tensor."""
    numel: int


class ZeroModel:
    """A model and its DeepSpeed engine. The model stays the caller's object; ZeRO-3 works through hooks on it.

    Args:
        deepspeed: the module, from `start_deepspeed`.
        model: its parameters are replaced by ZeRO's in place.
        optimizer: a torch optimizer over them; None for inference (stage 3).
        config: DeepSpeed's JSON.
        before: of parameters that are sharded already: their fp32 values, and what they had before ZeRO.
    """

    def __init__(
        self,
        deepspeed: Any,
        model: nn.Module,
        optimizer: Optimizer | None,
        config: dict[str, Any],
        before: tuple[dict[str, Piece], dict[Tensor, set[str]]] | None = None,
    ) -> None:
        self._deepspeed = deepspeed
        self.model = model
        exact, attributes = before or _make_free(model, config)
        self._attributes = attributes or {p: set(vars(p)) for p in model.parameters()}
        """What each parameter had before ZeRO added to it."""
        self.optimizer = optimizer
        self.stage: int = config["zero_optimization"]["stage"]
        self.groups: list[list[nn.Parameter]] = []
        """The parameters of each of the optimizer's groups, which DeepSpeed takes out of it."""
        if optimizer is not None:
            _check_optimizer(model, optimizer)
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
            self.groups = [[p for p in g["params"] if p.requires_grad] for g in optimizer.param_groups]
        self._has_gradients = False
        self._with_gradients: set[nn.Parameter] = set()
        self._told: set[str] = set()
        self.low_precision = is_low(config)
        self.exact: dict[str, Piece] | None = {}
        """Of a model without an optimizer the fp32 parts, in CPU memory until its first pass; None: there were some."""
        if optimizer is None and self.low_precision:
            self.exact = exact or _exact_parts(model)
            self._at_first_pass = model.register_forward_pre_hook(self._forget_exact)
        if optimizer is not None and not exact:
            exact = _exact_values(model, config)
        forget_other_groups(deepspeed, config)
        with _any_float16(deepspeed), _quiet(deepspeed), _same_everywhere(deepspeed):
            self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self.zero: Any = self.engine.optimizer
        """DeepSpeed's optimizer; of a model without one, what gathers and frees its parameters."""
        self.gather_small()
        self.written = Written(self)
        for name, piece in self.masters() if exact else ():
            # DeepSpeed makes the master weights from weights that it has rounded already.
            if name in exact:
                start = piece.offset - exact[name].offset
                piece.values.copy_(exact[name].values[start : start + piece.values.numel()])
        if optimizer is not None:
            for parameter in (p for group in self.groups for p in group):
                parameter.register_post_accumulate_grad_hook(self._with_gradients.add)
            optimizer.zero_grad = self.discard_gradients  # type: ignore[method-assign]
        _ENGINES[model] = self

    def _forget_exact(self, *_: Any) -> None:
        self._at_first_pass.remove()
        self.exact = None if self.exact else {}

    # ---------------------------------------------------------------- one step

    def backward(self, loss: Tensor, scale: float = 1.0, retain_graph: bool = False) -> None:
        """Add the gradients of `loss` × `scale` (of float16) to those there are."""
        self._start_backward(scale)
        self.engine.backward(loss, retain_graph=retain_graph, scale_wrt_gas=False)

    def _start_backward(self, scale: float) -> None:
        """What ``engine(...)`` would do at a forward pass and at the begin of the backward pass."""
        self._has_gradients, zero = True, self.zero
        _leave_backward(zero)
        zero.clear_backward_seen_flag()  # counts the passes of an accumulation
        zero.custom_loss_scaler, zero.external_loss_scale = True, scale
        self.engine._manual_backward_expected = True  # the loss is scaled, though not by this engine
        zero.backward_prologue()
        zero.enter_backward()

    @property
    def _without_hooks(self) -> bool:
        """DeepSpeed's optimizer of stage 1 in bfloat16: it collects gradients after the backward pass, unscaled."""
        return hasattr(self.zero, "fp32_groups_gradients_flat")

    def discard_gradients(self, set_to_none: bool = True) -> None:
        """What ``optimizer.zero_grad()`` means: forget the backward passes since the last step."""
        self._has_gradients, zero = False, self.zero
        zero.zero_grad(set_to_none=True)
        if self._without_hooks:
            zero.clear_hp_grads()
        elif self.stage == 3:
            zero.grad_partitions_flat_buffer.zero_()
        else:
            zero.micro_step_id = -1  # of the step that begins; the first pass makes it 0
            for gradients in (zero.averaged_gradients, zero.all_grad_tensors):
                gradients.update(dict.fromkeys(gradients))

    def step(self, divisor: float, max_norm: float) -> float:
        """Reduce what is left, divide by `divisor`, clip by the global norm, and step if all gradients are finite.

        Args:
            divisor: loss scale, and passes that were made over passes that were announced.
            max_norm: 0 or less: do not clip.

        Returns:
            The norm after the division and before clipping; not finite if there was no step.

        Raises:
            RuntimeError: no backward pass was made through this strategy.
        """
        zero = self.zero
        if not self._has_gradients and self.stage > 1:
            raise RuntimeError(
                "optimizer.step() without a backward pass through DeepSpeed since the last step: call "
                "self.manual_backward(loss) in place of loss.backward(), or strategy.backward(loss, model, optimizer)"
            )
        self._has_gradients = False
        self._tell_of_missing_gradients()
        self.written.adopt()
        zero.clip_grad = max(max_norm, 0.0)
        if self._without_hooks:
            for gradients in zero.fp32_groups_gradients_flat:
                gradients.div_(divisor)
        else:
            zero.external_loss_scale = divisor
        self.engine.step()
        zero.external_loss_scale = 1.0
        if self.stage == 3:
            # A parameter without a gradient in the next step must not get this one's again.
            zero.grad_partitions_flat_buffer.zero_()
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else float("inf")

    def _tell_of_missing_gradients(self) -> None:
        missing = [p for group in self.groups for p in group if p not in self._with_gradients]
        self._with_gradients.clear()
        if missing:
            self._tell(
                f"{self.name_of(missing[0])} got no gradient: DeepSpeed steps it with one of 0, so that moments and "
                "weight decay go on, where other back ends leave it as it is"
            )

    def _tell(self, warning: str) -> None:
        if warning not in self._told:
            self._told.add(warning)
            log.warning(warning)

    # ---------------------------------------------------------------- parameters

    def gather_small(self) -> None:
        """Make small parameters of stage 3 whole, as they are after each step, so that they can be written into."""
        small = getattr(self.zero, "parameter_offload", self.zero).persistent_parameters if self.stage == 3 else ()
        if free := [p for p in small if p.ds_status.name == "NOT_AVAILABLE"]:
            free[0].all_gather(free)

    def name_of(self, parameter: nn.Parameter) -> str:
        return next(name for name, p in self.model.named_parameters() if p is parameter)

    def places(self) -> Iterator[tuple[nn.Parameter, Tensor, Place | None]]:
        """Trained parameters, the flat fp32 tensors that the optimizer steps, and where one is in the other.

        None: all of the parameter is with other ranks.
        """
        if self.optimizer is None:
            return
        zero = self.zero
        if self.stage == 3:
            for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
                for parameter in group:
                    piece = self.shard(parameter)
                    start = zero.grad_position[zero.get_param_id(parameter)][1]
                    place = None if piece is None else Place(piece.offset, start, len(piece.values))
                    yield parameter, flat, place
            return
        flats = zero.fp32_groups_flat_partition if self._without_hooks else zero.single_partition_of_fp32_groups
        groups = zero.bf16_groups if self._without_hooks else zero.bit16_groups
        for flat, group in zip(flats, groups, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                place = None
                if mapping is not None:
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    place = Place(low.start, high.start, high.numel)
                yield parameter, flat, place

    def masters(self) -> Iterator[tuple[str, Piece]]:
        """The part of the fp32 weights of trained parameters that this rank keeps, by name."""
        self.written.adopt()
        names = {id(p): name for name, p in self.model.named_parameters()}
        for parameter, flat, place in self.places():
            if place is not None:
                values = flat.detach().narrow(0, place.start, place.numel)
                yield names[id(parameter)], Piece(place.offset, values)

    def shard(self, parameter: Any) -> Piece | None:
        """The part of a sharded parameter that this rank keeps, in the dtype that the model computes with."""
        size = parameter.ds_tensor.ds_numel
        offset = dist.get_rank(parameter.ds_process_group) * size
        numel = min(size, parameter.ds_numel - offset)  # the last parts are padded
        return Piece(offset, parameter.ds_tensor.detach().view(-1)[:numel]) if numel > 0 else None

    def sharded(self) -> Iterator[tuple[str, Any]]:
        """Parameters that are cut into parts (stage 3), by name."""
        return ((n, p) for n, p in self.model.named_parameters() if hasattr(p, "ds_id"))

    @contextlib.contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside, sharded `parameters` have all their elements; outside of the model's own passes only."""
        free = [p for p in parameters if getattr(getattr(p, "ds_status", None), "name", "") == "NOT_AVAILABLE"]
        with self._deepspeed.zero.GatheredParameters(free):
            yield

    @contextlib.contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Inside, forward passes neither gather nor free parameters, nor compare their order with other ranks."""
        offload = getattr(self.zero, "parameter_offload", self.zero)
        for _, parameter in self.sharded():
            parameter.ds_active_sub_modules.clear()
        offload._remove_module_hooks()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()

    # ---------------------------------------------------------------- memory

    def offload(self) -> None:
        """Move weights and gradients to CPU memory; nothing of the model can run until `reload`."""
        for _, parameter in self.sharded():
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition()
        if self.optimizer is None:
            self._move_shards(torch.device("cpu"))
        elif not self._without_hooks:
            states = (
                ["lp_params", "lp_grads", "contiguous_grad_buffer"] if self.stage == 3 else ["lp_params", "hp_params"]
            )
            self.engine.offload_states(include=states, pin_memory=False)
            self._move_flat(torch.device("cpu"))

    def reload(self, device: torch.device) -> None:
        """Undo `offload`."""
        if self.optimizer is None:
            self._move_shards(device)
        elif not self._without_hooks:
            self.engine.reload_states()
            self._move_flat(device)

    def _move_shards(self, device: torch.device) -> None:
        for _, parameter in self.sharded():
            parameter.ds_tensor.data = parameter.ds_tensor.data.to(device)

    def _move_flat(self, device: torch.device) -> None:
        """The fp32 weights of stage 3 where they are a copy: DeepSpeed moves them for its own optimizer only."""
        if self.stage == 3 and self.low_precision and not self.zero.offload_optimizer:
            for flat in self.zero.fp32_partitioned_groups_flat:
                flat.data = flat.data.to(device)

    # ---------------------------------------------------------------- end

    def close(self) -> dict[str, Piece]:
        """Remove the engine; parameters that are sharded stay so.

        Returns:
            The fp32 weights, if the parameters are not.
        """
        exact = {n: Piece(p.offset, p.values.clone()) for n, p in self.masters()} if self.low_precision else {}
        for _, parameter in self.sharded():
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition()
        self.written.handle.remove()
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()
        self.engine.destroy()
        # Once: it does so again as garbage, and would take from the parameters what an engine after it has put there.
        self.engine.destroy = lambda: None
        if self.optimizer is not None:
            vars(self.optimizer).pop("zero_grad", None)
        for module in self.model.modules():
            for name in _MODULE_ATTRIBUTES & vars(module).keys():
                delattr(module, name)
        del _ENGINES[self.model]
        return exact

    def release(self) -> None:
        """Remove the engine; the parameters are whole and plain again, and exact where they were trained.

        Raises:
            RuntimeError: they were sharded before they came here.
        """
        if any("ds_id" in names for names in self._attributes.values()):
            raise RuntimeError(
                f"{type(self.model).__name__} was built inside deepspeed.zero.Init, so it can only be used at stage 3 "
                "in the same precision: save a checkpoint and load it into a new model"
            )
        values = {}
        for name, parameter in self.model.named_parameters():
            with self.whole([parameter]):
                values[name] = parameter.detach().clone()
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad and self.optimizer is not None}
        exact = self.close()
        for name, parameter in self.model.named_parameters():
            value = values.pop(name)
            if self.low_precision and name in trained:
                value = _joined(exact.get(name), value)
            for attribute in vars(parameter).keys() - self._attributes[parameter]:
                delattr(parameter, attribute)
            parameter.data = value
        for module in self.model.modules():
            module._parameters = dict(module._parameters)


def forget_other_groups(deepspeed: Any, config: Mapping[str, Any]) -> None:
    """DeepSpeed keeps the groups of ranks of the first ``zpg`` in a process for all engines that follow."""
    groups = deepspeed.utils.groups
    group = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP
    if group is not None and dist.get_world_size(group) != config["zero_optimization"].get("zero_hpz_partition_size"):
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def _check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS computes the loss several times in one step, which DeepSpeed cannot: take AdamW or SGD")
    inside = {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in inside:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the model: "
                    "pass each optimizer with the model that it was created for"
                )
    if isinstance(optimizer, torch.optim.Adagrad):
        raise ValueError("Adagrad makes its state before DeepSpeed takes the weights apart: take AdamW or SGD")
    if optimizer.state:
        raise ValueError("prepare() got an optimizer that has made steps already: prepare before the first step")
    check_elementwise(optimizer)


def backward_through(
    models: Sequence[ZeroModel], loss: Tensor, go: Callable[[Tensor], Any] = Tensor.backward, scale: float = 1.0
) -> None:
    """Add the gradients of `loss` × `scale`, which may depend on any of `models`, to those there are.

    Args:
        models: with their engines.
        loss: a scalar.
        go: makes the backward pass.
        scale: of float16.
    """
    for model in models:
        model._start_backward(scale)
    go(loss * scale)
    for model in models:
        if model._without_hooks:
            model.engine._backward_epilogue()
        _leave_backward(model.zero)


def _leave_backward(zero: Any) -> None:
    while zero._backward_active_depth:  # an exception, or a loss without gradients for this model, leaves it entered
        zero.exit_backward()


def buckets(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Parameters in order, some at a time."""
    bucket: dict[str, nn.Parameter] = {}
    elements = 0
    for name, parameter in parameters.items():
        size = getattr(parameter, "ds_numel", parameter.numel())
        if bucket and elements + size > _GATHER_ELEMENTS:
            yield bucket
            bucket, elements = {}, 0
        bucket[name] = parameter
        elements += size
    if bucket:
        yield bucket


def is_low(config: Mapping[str, Any]) -> bool:
    """Whether this JSON means 16-bit weights beside the fp32 ones."""
    return bool(config["bf16"]["enabled"] or config["fp16"]["enabled"])


def _exact_values(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Piece]:
    """fp32 weights that DeepSpeed is about to round, in CPU memory."""
    if not is_low(config):
        return {}
    return {
        name: Piece(0, p.detach().to("cpu", copy=True).flatten())
        for name, p in model.named_parameters()
        if p.requires_grad and p.dtype == torch.float32 and not hasattr(p, "ds_id")
    }


def _exact_parts(model: nn.Module) -> dict[str, Piece]:
    """Of fp32 weights that DeepSpeed is about to round and to share out, those that this rank will have."""
    found, ranks = {}, dist.get_world_size()
    for name, p in model.named_parameters():
        if p.dtype == torch.float32 and not hasattr(p, "ds_id"):
            size = -(-p.numel() // ranks)
            values = p.detach().view(-1)[dist.get_rank() * size :][:size]
            found[name] = Piece(dist.get_rank() * size, values.to("cpu", copy=True))
    return found


def _make_free(model: nn.Module, config: Mapping[str, Any]) -> tuple[dict[str, Piece], dict[Tensor, set[str]]]:
    """Close the engines that have `model` or parts of it.

    Returns:
        Of what stays sharded: the fp32 weights, which the next engine would round, and `_attributes`.
    """
    inside = set(model.modules())
    for engine in list(_ENGINES.values()):
        if engine.model in inside or any(m is model for m in engine.model.modules()):
            sharded = engine.stage == config["zero_optimization"]["stage"] == 3
            if engine.model is model and sharded and engine.low_precision == is_low(config):
                if engine.exact is None:
                    refuse_rounded(model)
                return engine.close() or engine.exact or {}, engine._attributes
            engine.release()
    return {}, {}


def _joined(piece: Piece | None, like: Tensor) -> Tensor:
    """A whole fp32 tensor from the ranks' pieces."""
    whole = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    if piece is not None:
        whole.view(-1)[piece.offset : piece.offset + piece.values.numel()] = piece.values
    dist.all_reduce(whole)
    return whole


@contextlib.contextmanager
def _any_float16(deepspeed: Any) -> Iterator[None]:
    """DeepSpeed takes float16 on CPUs with fast kernels for it only; torch computes in it on all, if slowly."""
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() != "cpu":
        yield
        return
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported


def _same_everywhere(deepspeed: Any) -> contextlib.AbstractContextManager[Any]:
    """DeepSpeed sends what rank 0 has, which `take_those_of_rank_0` has done, and fails at scalars."""
    return mock.patch.object(deepspeed.runtime.engine.DeepSpeedEngine, "_broadcast_model", lambda engine: None)


@contextlib.contextmanager
def _quiet(deepspeed: Any) -> Iterator[None]:
    """Without tables of memory, and the warning about every optimizer that is not DeepSpeed's own."""
    logger, level = deepspeed.utils.logger, deepspeed.utils.logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
