"""What a back end that shards cannot do with a module of its user's, told by name instead of from deep inside."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from torch import nn
from torch.distributed.fsdp import FSDPModule

GRADIENT_HOOKS = ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad", "configure_gradient_clipping")
"""Of a module or a callback, in which gradients are whole and in place in other back ends."""


def check_callbacks(module: pl.LightningModule, refused: tuple[type[pl.Callback], ...], strategy: str) -> None:
    """Refuse callbacks that find no weights when they look, or not whole ones.

    Args:
        module: attached to its trainer, before `configure_model`.
        refused: kinds that need whole weights.
        strategy: its name.
    """
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, refused):
            raise MisconfigurationException(
                f"{name} takes whole weights, which {strategy} has in parts: leave it out, or take lightrft_fake"
            )
        early = isinstance(callback, StochasticWeightAveraging | ModelPruning)
        if early and not any(True for _ in module.parameters()):
            raise MisconfigurationException(
                f"{name} looks for weights before {type(module).__name__} has made them in configure_model, and would "
                "find none: leave it out (EMAWeightAveraging looks later)"
            )


def check_sparse(module: nn.Module, strategy: str) -> None:
    """Refuse embeddings with sparse gradients, which are cut into parts nowhere."""
    for name, part in module.named_modules():
        sparse = isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse
        if sparse and part.weight.requires_grad:  # type: ignore[union-attr]
            raise MisconfigurationException(
                f"{name}: {strategy} cannot reduce sparse gradients: leave sparse=True of the {type(part).__name__} out"
            )


@contextlib.contextmanager
def no_second_derivatives(strategy: str) -> Iterator[None]:
    """Inside, a graph of gradients is refused: its backward pass would find weights that were freed after the first."""
    grad = torch.autograd.grad

    def first_only(*args: Any, **named: Any) -> Any:
        if named.get("create_graph") or any(args[4:5]):
            raise MisconfigurationException(
                f"torch.autograd.grad(create_graph=True): {strategy} frees the weights that the gradient of a gradient "
                "needs: take lightrft_fake, or DeepSpeed's stage 1 or 2"
            )
        return grad(*args, **named)

    with mock.patch.object(torch.autograd, "grad", first_only):
        yield


@contextlib.contextmanager
def explained(strategy: str) -> Iterator[None]:
    """Inside, an error about a weight that is in parts says which method has used it."""
    try:
        yield
    except RuntimeError as err:
        if "mixed torch.Tensor and DTensor" not in str(err):
            raise
        user = _last_user(err.__traceback__)
        raise MisconfigurationException(
            f"{user} uses weights that {strategy} gathers for the forward pass of their module only: call the module "
            "itself, whose forward() may call anything in it"
        ) from err


def _last_user(traceback: types.TracebackType | None) -> str:
    found = "training_step"
    while traceback is not None:
        frame, traceback = traceback.tb_frame, traceback.tb_next
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            cls = next(c for c in type(owner).__mro__ if not issubclass(c, FSDPModule))
            if not cls.__module__.startswith("torch."):
                found = f"{cls.__name__}.{frame.f_code.co_name}()"
    return found


def gradient_hook(of: Iterable[Any]) -> str | None:
    """The first hook of these objects that looks at gradients, as far as the names in its code tell."""
    for owner in of:
        for name in GRADIENT_HOOKS:
            hook = getattr(type(owner), name, None)
            own = getattr(hook, "__module__", "").partition(".")[0] not in ("lightning", "lightrft_lightning")
            if own and any(map(_means_gradients, _names(hook))):  # type: ignore[arg-type]
                return f"{type(owner).__name__}.{name}"
    return None


def _means_gradients(name: str) -> bool:
    return name == "grad" or name.endswith(("grad_norm", "grad_norm_", "grad_value_"))


def _names(hook: Callable[..., Any]) -> Iterator[str]:
    codes = [code] if isinstance(code := getattr(hook, "__code__", None), types.CodeType) else []
    while codes:
        code = codes.pop()
        yield from code.co_names
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
