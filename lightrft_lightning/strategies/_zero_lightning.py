"""A `LightningModule` under DeepSpeed: which submodule each engine takes, and what Lightning calls of engines."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

if TYPE_CHECKING:
    from lightrft_lightning.strategies.deepspeed import DeepspeedStrategy


def owners(module: nn.Module, optimizers: Sequence[Optimizer]) -> list[nn.Module]:
    """For each optimizer the smallest submodule that holds all of its parameters; `module` itself if no other does.

    Raises:
        MisconfigurationException: parameters that are in no optimizer or in two, or optimizers that cannot be told
            apart by submodules.
    """
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    taken: dict[Tensor, int] = {}
    for k, optimizer in enumerate(optimizers):
        for parameter in _parameters(optimizer):
            if parameter not in names:
                raise MisconfigurationException(
                    f"optimizer {k} holds a parameter of shape {tuple(parameter.shape)} that is not in "
                    f"{type(module).__name__}"
                )
            if parameter in taken:
                raise MisconfigurationException(
                    f"{names[parameter]} is in two optimizers ({taken[parameter]} and {k}): leave it to one"
                )
            taken[parameter] = k
    loose = [name for p, name in names.items() if p.requires_grad and p not in taken]
    if optimizers and loose:
        raise MisconfigurationException(
            f"trainable parameters that are in no optimizer: {', '.join(loose[:5])}{' ...' if len(loose) > 5 else ''}. "
            "Pass them to one in configure_optimizers, or freeze them with requires_grad_(False)"
        )
    found = [_smallest(module, set(_parameters(optimizer))) for optimizer in optimizers]
    for k, owner in enumerate(found):
        for other, inside in enumerate(found):
            if k != other and any(m is inside for m in owner.modules()):
                raise MisconfigurationException(
                    f"optimizers {k} and {other} share the submodule {type(owner).__name__}: DeepSpeed needs one "
                    "submodule for each optimizer that holds its parameters and no other's"
                )
    return found


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _smallest(module: nn.Module, wanted: set[Tensor]) -> nn.Module:
    """Of several with the same parameters the outermost, since that is the one that is called."""
    best, size = module, sum(1 for _ in module.parameters())
    for candidate in module.modules():
        inside = set(candidate.parameters())
        if isinstance(candidate, nn.ModuleList | nn.ModuleDict) or not wanted <= inside:
            continue
        if len(inside) < size or best is module:
            best, size = candidate, len(inside)
    return best


def frozen_parts(module: nn.Module, engines: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The largest submodules that have parameters and contain none of `engines`."""
    if any(module is engine for engine in engines):
        return
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or any(m is e for m in child.modules() for e in engines):
            yield from frozen_parts(child, engines)
        elif any(True for _ in child.parameters()):
            yield child


def let_summaries_count(module: nn.Module) -> None:
    """Give parameters that stay whole what Lightning's summary asks each of when some are in parts (stage 3)."""
    for parameter in module.parameters():
        if not hasattr(parameter, "ds_numel"):
            parameter.ds_numel = parameter.numel()  # type: ignore[attr-defined]
            parameter.partition_numel = functools.partial(int, parameter.numel())  # type: ignore[attr-defined]


class ZeroPrecision(Precision):
    """What Lightning asks its precision plugin for, passed on to the strategy's engines.

    Args:
        precision: one of `distributed.PRECISIONS`.
        strategy: the strategy.
    """

    def __init__(self, precision: str, strategy: DeepspeedStrategy) -> None:
        self.precision = precision  # type: ignore[assignment]
        self._strategy = strategy

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:  # type: ignore[override]
        """An evaluation without a fit has fp32 weights, which stay exact for a fit that follows."""
        strategy = self._strategy
        dtype = strategy.compute_dtype
        low = dtype != torch.float32 and not strategy.training_engines
        with super().forward_context(), torch.autocast(strategy.root_device.type, dtype=dtype, enabled=low):
            yield

    @override
    def backward(self, tensor: Tensor, model: Any, optimizer: Steppable | None, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        if is_overridden("backward", model):
            self._strategy.lightning_backward(tensor, optimizer, go=lambda loss: model.backward(loss, *args, **kwargs))
            return
        retain_graph = kwargs.pop("retain_graph", False)
        if args or kwargs:
            raise TypeError(f"manual_backward: DeepSpeed takes the loss and retain_graph=, got {[*args, *kwargs]}")
        if retain_graph and self._strategy.config.zero_stage == 3:
            raise MisconfigurationException(
                "manual_backward(retain_graph=True): ZeRO-3 frees the weights that a second pass needs: add the losses "
                "up and go back once, or take stage 2"
            )
        self._strategy.lightning_backward(tensor, optimizer, bool(retain_graph))

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        result = closure()
        self._after_closure(model, optimizer)
        if model.automatic_optimization and result is None:  # training_step asked to skip the batch
            return None
        self._strategy.lightning_step(optimizer)
        return result

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        if clip_val > 0 and gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            raise MisconfigurationException(
                f"gradient_clip_algorithm='value' with gradient_clip_val={clip_val}: DeepSpeed clips by the norm only"
            )
        self._strategy.clip_next_step(optimizer, clip_val)
