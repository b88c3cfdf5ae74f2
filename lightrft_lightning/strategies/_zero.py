"""One model under DeepSpeed ZeRO: its engine, and where the parts of its parameters are."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrft_lightning._errors import import_extra

_GATHER_ELEMENTS = 200_000_000
"""Elements of the parameters that are whole at the same time while a sharded model is read."""


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


class ZeroModel:
    """A model and its DeepSpeed engine. The model stays the caller's object; ZeRO-3 works through hooks on it.

    Args:
        deepspeed: the module, from `start_deepspeed`.
        model: its parameters are replaced by ZeRO's in place.
        optimizer: a torch optimizer over them; None for inference (stage 3).
        config: DeepSpeed's JSON.
    """

    def __init__(self, deepspeed: Any, model: nn.Module, optimizer: Optimizer | None, config: dict[str, Any]) -> None:
        self._deepspeed = deepspeed
        self.model = model
        self.optimizer = optimizer
        self.stage: int = config["zero_optimization"]["stage"]
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.groups: list[list[str]] = []
        """Names of the parameters of each of the optimizer's groups, which DeepSpeed empties."""
        if optimizer is not None:
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
            self.groups = [[names[p] for p in g["params"] if p.requires_grad] for g in optimizer.param_groups]
        exact = {} if optimizer is None else _exact_values(model, config)
        with _any_float16(deepspeed):
            self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self.zero: Any = self.engine.optimizer
        """DeepSpeed's optimizer; of a model without one, what gathers and frees its parameters."""
        if exact:
            self._restore(exact)

    def _restore(self, exact: Mapping[str, Tensor]) -> None:
        """DeepSpeed makes the fp32 master weights from weights that it has rounded already."""
        for name, piece in self.masters():
            if name in exact:
                piece.values.copy_(exact[name].flatten()[piece.offset : piece.offset + piece.values.numel()])

    # ---------------------------------------------------------------- one step

    def start_backward(self, scale: float) -> None:
        """What ``engine(...)`` would do at a forward pass and at the begin of the backward pass."""
        self.zero.clear_backward_seen_flag()  # counts the passes of an accumulation
        self.zero.custom_loss_scaler, self.zero.external_loss_scale = True, scale
        self.zero.enter_backward()

    def backward(self, loss: Tensor, scale: float = 1.0) -> None:
        """Add the gradients of `loss` × `scale` to those there are."""
        self.start_backward(scale)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, divisor: float, max_norm: float) -> float:
        """Reduce what is left, divide by `divisor`, clip by the global norm, and step if all gradients are finite.

        Args:
            divisor: loss scale, and passes that were made over passes that were announced.
            max_norm: 0 or less: do not clip.

        Returns:
            The norm after the division and before clipping; not finite if there was no step.
        """
        zero = self.zero
        zero.clip_grad = max(max_norm, 0.0)
        if hasattr(zero, "fp32_groups_gradients_flat"):  # the optimizer of stage 1 in bfloat16 knows no scale
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

    # ---------------------------------------------------------------- parameters

    def masters(self, key: str | None = None) -> Iterator[tuple[str, Piece]]:
        """The part of the fp32 weights of trained parameters that this rank keeps.

        Args:
            key: of the optimizer's state (``exp_avg``, ...), in place of the weights.
        """
        if self.optimizer is None:
            return
        if key is not None and self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            piece = self._sharded_piece(parameter, key) if self.stage == 3 else self._flat_piece(parameter, key)
            if piece is not None:
                yield name, piece

    def _flat_piece(self, parameter: Any, key: str | None) -> Piece | None:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # all of it is another rank's
            return None
        return Piece(mapping.lp_fragment_address.start, mapping.get_hp_fragment(key).detach())

    def _sharded_piece(self, parameter: Any, key: str | None) -> Piece | None:
        rank = dist.get_rank(parameter.ds_process_group)
        offset = rank * parameter.ds_tensor.ds_numel
        numel = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - offset)  # the last ranks' parts are padded
        if numel <= 0:
            return None
        group, start, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        flat = self.zero.fp32_partitioned_groups_flat[group]
        flat = flat if key is None else self.optimizer.state[flat][key]  # type: ignore[union-attr]
        return Piece(offset, flat.detach().narrow(0, start, numel))

    def refresh(self) -> None:
        """Make the weights that the model computes with equal to the fp32 ones."""

    def sharded(self) -> Iterator[tuple[str, Any]]:
        """Parameters that are cut into parts (stage 3), by name."""
        return ((n, p) for n, p in self.model.named_parameters() if hasattr(p, "ds_id"))

    @contextlib.contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside, sharded `parameters` have all their elements; outside of the model's own passes only."""
        free = [p for p in parameters if hasattr(p, "ds_id") and p.ds_status.name == "NOT_AVAILABLE"]
        with self._deepspeed.zero.GatheredParameters(free):
            yield

    @contextlib.contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Inside, the model's forward passes neither gather nor free parameters."""
        offload = getattr(self.zero, "parameter_offload", self.zero)
        for parameter in self.model.parameters():
            parameter.ds_active_sub_modules.clear()
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(self.model)


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


def _exact_values(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """fp32 weights that DeepSpeed is about to round, in CPU memory."""
    if not (config["bf16"]["enabled"] or config["fp16"]["enabled"]):
        return {}
    return {
        name: p.detach().to("cpu", copy=True)
        for name, p in model.named_parameters()
        if p.requires_grad and p.dtype == torch.float32 and not hasattr(p, "ds_id")
    }


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
