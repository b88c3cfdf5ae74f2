"""What a back end that shards cannot do with a module of its user's, told by name instead of from deep inside."""

from __future__ import annotations

import contextlib
import dis
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from traceback import walk_tb
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary, WeakSet

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import grad_norm as lightning_grad_norm
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

GRADIENT_HOOKS = ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad", "configure_gradient_clipping")
"""Of a module or a callback, in which gradients are whole and in place in other back ends."""


NOT_WITH_DEEPSPEED: Mapping[type[pl.Callback], str] = {
    BaseFinetuning: "gives the optimizer parameters in the middle of a run, of which DeepSpeed takes none: freeze them "
    "in __init__ for all of it, or take FSDP2 or lightrft_fake",
    GradientAccumulationScheduler: "changes accumulate_grad_batches between epochs, which Lightning allows under no "
    "strategy of DeepSpeed's: set Trainer(accumulate_grad_batches=...), or take FSDP2 or lightrft_fake",
}
"""Callbacks that Lightning refuses when they have begun, and why."""


def check_callbacks(
    module: pl.LightningModule,
    refused: tuple[type[pl.Callback], ...],
    strategy: str,
    reasons: Mapping[type[pl.Callback], str] = types.MappingProxyType({}),
) -> None:
    """Refuse callbacks that find no weights when they look, or not whole ones.

    Args:
        module: attached to its trainer, before `configure_model`.
        refused: kinds that need whole weights.
        strategy: its name.
        reasons: further kinds, and what is to be said of them.
    """
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, refused):
            raise MisconfigurationException(
                f"{name} takes whole weights, which {strategy} has in parts: leave it out, or take lightrft_fake"
            )
        for kind, reason in reasons.items():
            if isinstance(callback, kind):
                raise MisconfigurationException(f"{name} {reason}")
        if isinstance(callback, StochasticWeightAveraging | ModelPruning | BaseFinetuning):
            if not any(True for _ in module.parameters()):
                raise MisconfigurationException(_looks_early(name, module, "them"))
            _EARLY[module] = (name, WeakSet(module.modules()))


_EARLY: WeakKeyDictionary[nn.Module, tuple[str, WeakSet[nn.Module]]] = WeakKeyDictionary()
"""Of modules with a callback that looks early, its name and the submodules that it can have seen."""


def check_made_late(module: pl.LightningModule) -> None:
    """Refuse what was to be seen before `configure_model` had made it: by a callback, or by ``wandb.watch``."""
    callback, seen = _EARLY.pop(module, ("", WeakSet(module.modules())))
    for name, part in module.named_modules():
        if part not in seen and any(True for _ in part.parameters(recurse=False)):
            raise MisconfigurationException(_looks_early(callback, module, name))
    for part in module.modules():
        watched: list[str] = part.__dict__.get("_wandb_hook_names", [])
        for name, parameter in part.named_parameters() if "_wandb_hook_names" in part.__dict__ else ():
            gradients = not watched or any(hook.startswith("gradients/") for hook in watched)
            if gradients and parameter.requires_grad and not any(hook.endswith(name) for hook in watched):
                raise MisconfigurationException(
                    f"WandbLogger.watch was called before configure_model had made {name}, whose gradients it would "
                    "never see: call it in on_fit_start"
                )


def _looks_early(name: str, module: nn.Module, what: str) -> str:
    return (
        f"{name} looks for weights before {type(module).__name__} has made {what} in configure_model, and would "
        "not find them: make them in __init__, or leave it out (EMAWeightAveraging looks later)"
    )


def check_watched(module: nn.Module, strategy: str) -> None:
    """Refuse ``wandb.watch(log="parameters")``, by which rank 0 looks at weights alone, of those that are in parts."""
    if not any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters()):
        return
    for part in module.modules():
        if any(hook.startswith("parameters/") for hook in part.__dict__.get("_wandb_hook_names", ())):
            raise MisconfigurationException(
                f'WandbLogger.watch(log="parameters") looks at whole weights, which {strategy} has in parts: leave it '
                "out, or take DeepSpeed's stage 1 or 2 or lightrft_fake"
            )


def check_embeddings(module: nn.Module, strategy: str) -> None:
    """Refuse embeddings with sparse gradients, which are cut into parts nowhere, and those that write into weights."""
    for name, part in module.named_modules():
        if not isinstance(part, nn.Embedding | nn.EmbeddingBag):
            continue
        if part.sparse and part.weight.requires_grad:
            raise MisconfigurationException(
                f"{name}: {strategy} cannot reduce sparse gradients: leave sparse=True of the {type(part).__name__} out"
            )
        if part.max_norm is not None:
            raise MisconfigurationException(
                f"{name}: each rank would scale other rows of its weights down in its forward passes: leave "
                f"max_norm={part.max_norm} of the {type(part).__name__} out, or take lightrft_fake"
            )


def check_hooks_of_parameters(module: nn.Module, strategy: str) -> None:
    """Refuse hooks of parameters that are, or will be, in parts: the backward pass is that of their whole twins."""
    for name, parameter in module.named_parameters():
        twin_is_stepped = not isinstance(parameter, DTensor) and parameter._post_accumulate_grad_hooks
        if parameter._backward_hooks or twin_is_stepped:
            raise MisconfigurationException(
                f"{name} has a hook (register_hook), which {strategy} would not call: change the gradient in "
                "on_after_backward, or take lightrft_fake or DeepSpeed"
            )


def check_scalars(module: nn.Module, strategy: str) -> None:
    """Refuse parameters without a dimension to cut."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0:
            raise MisconfigurationException(
                f"{name} is a scalar, which {strategy} cannot cut into parts: make it a torch.ones(1), "
                "or take DeepSpeed's stage 1 or 2, or lightrft_fake"
            )


def check_dtypes(module: nn.Module) -> None:
    """Refuse parameters that DeepSpeed would cast, as it computes a whole model in one dtype."""
    for name, parameter in module.named_parameters():
        if parameter.dtype == torch.float64 or parameter.is_complex():
            raise MisconfigurationException(
                f"{name} is in {str(parameter.dtype).removeprefix('torch.')}, and DeepSpeed casts a whole model to one "
                "dtype: make it float32, or take lightrft_fsdp or lightrft_fake"
            )


def check_compiled(module: nn.Module, problem: str | None) -> None:
    """Refuse submodules that `torch.compile` has wrapped where the back end has a problem with it."""
    for name, part in module.named_modules() if problem is not None else ():
        if "_orig_mod" in part._modules:
            raise MisconfigurationException(f"torch.compile of {name}: {problem}")


@contextlib.contextmanager
def no_second_derivatives(strategy: str) -> Iterator[None]:
    """Inside, a graph of gradients is refused: its backward pass would find weights that were freed after the first."""
    # What grad() and backward() both call, by whatever name they were imported.
    run = torch.autograd._engine_run_backward

    def first_only(outputs: Any, *args: Any, **named: Any) -> Any:
        if any(args[2:3]):
            raise MisconfigurationException(
                f"create_graph=True: {strategy} frees the weights that the gradient of a gradient "
                "needs: take lightrft_fake, or DeepSpeed's stage 1 or 2"
            )
        return run(outputs, *args, **named)

    with mock.patch.object(torch.autograd, "_engine_run_backward", first_only):
        yield


@contextlib.contextmanager
def explained(strategy: str) -> Iterator[None]:
    """Inside, an error about a weight that is in parts, or empty as those of ZeRO-3, says who has used it."""
    try:
        yield
    except RuntimeError as err:
        if not any(words in str(err) for words in ("mixed torch.Tensor and DTensor", "got [0] but expected shape")):
            raise
        user = _last_user(err.__traceback__)
        raise MisconfigurationException(
            f"{user} uses weights that {strategy} gathers for the forward pass of their module only: use them in its "
            "forward(), which may call anything in it"
        ) from err


@contextlib.contextmanager
def step_explained(optimizer: Any, strategy: str) -> Iterator[None]:
    """Inside, an error about what cannot be computed with parts of weights names the optimizer, if it is its own."""
    try:
        yield
    except (RuntimeError, NotImplementedError, MisconfigurationException) as err:
        in_closure = any(f.f_code.co_name == "_wrap_closure" for f, _ in walk_tb(err.__traceback__))
        if in_closure or not any(words in str(err) for words in ("placement", "sharding strategy", "made a number")):
            raise
        raise MisconfigurationException(
            f"{type(getattr(optimizer, 'optimizer', optimizer)).__name__} computes what {strategy} cannot with weights "
            f"in parts (DTensor): take AdamW or SGD, or lightrft_fake: {err}"
        ) from err


def _last_user(traceback: types.TracebackType | None) -> str:
    found = "training_step"
    while traceback is not None:
        frame, traceback = traceback.tb_frame, traceback.tb_next
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            cls = next(c for c in type(owner).__mro__ if not issubclass(c, FSDPModule))
            if not cls.__module__.startswith(("torch.", "deepspeed.")):
                found = f"{cls.__name__}.{frame.f_code.co_name}()"
    return found


def check_grad_norm(module: pl.LightningModule, strategy: str) -> None:
    """Refuse hooks that call Lightning's `grad_norm`, which cannot read gradients in parts."""
    for hook, names in _gradient_hooks(module):
        if "lightning.grad_norm" in names:
            raise MisconfigurationException(
                f"{hook} calls lightning's grad_norm, which does not take gradients in parts as {strategy} has them: "
                "torch.nn.utils.get_total_norm([p.grad ...]).full_tensor() does"
            )


def refuse_local_numbers() -> None:
    """Let `.item()` and `float()` of a sum over parts be an error: torch gives each rank the number of its own part."""
    item = torch.ops.aten._local_scalar_dense.default
    handlers = getattr(DTensor._op_dispatcher, "_custom_op_handlers", None)  # of this process
    if handlers is None or item in handlers:
        return

    def number(call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        tensor = args[0]
        if tensor.device_mesh.size() > 1 and any(placement.is_partial() for placement in tensor.placements):
            raise MisconfigurationException(
                "a sum or norm over weights or gradients in parts was made a number, which would be that of this "
                "rank's part: call .full_tensor() before, on every rank"
            )
        return call(tensor.to_local())

    handlers[item] = number


def gradient_hook(module: pl.LightningModule) -> str | None:
    """The first method of a module or its callbacks that looks at gradients of parameters, as far as names tell.

    The functions and methods that it calls are read as well.
    """
    for hook, names in _gradient_hooks(module):
        if any(map(_means_gradients, names)):
            return hook
    step = None if module.automatic_optimization else type(module).training_step
    names = set(_names(step, (type(module),), set()))
    of_parameters = "grad" in names and not names.isdisjoint(("parameters", "named_parameters", "param_groups"))
    if of_parameters or any(map(_means_gradients, names - {"grad"})):
        return f"{type(module).__name__}.training_step"
    return None


def _gradient_hooks(module: pl.LightningModule) -> Iterator[tuple[str, set[str]]]:
    """Of a module and its callbacks the `GRADIENT_HOOKS`, and the names in their code."""
    for owner in (module, *module.trainer.callbacks):  # type: ignore[attr-defined]
        for name in GRADIENT_HOOKS:
            hook = getattr(type(owner), name, None)
            yield f"{type(owner).__name__}.{name}", set(_names(hook, (type(owner), type(module)), set()))


def _means_gradients(name: str) -> bool:
    return name == "grad" or name.endswith(("grad_norm", "grad_norm_", "grad_value_"))


def _names(function: Any, owners: tuple[type, ...], seen: set[Any]) -> Iterator[str]:
    """The names that a user's function, and those functions and methods of his that it calls, ask for.

    Not `grad` where it is the function of `torch.autograd`.
    """
    function = inspect.unwrap(function) if callable(function) else None
    code = getattr(function, "__code__", None)
    if not isinstance(code, types.CodeType) or code in seen or _foreign(function.__module__):
        return
    seen.add(code)
    codes = [code]
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        before: Any = None  # a module of the user's, or the name
        for step in dis.get_instructions(code):
            if step.opname == "IMPORT_NAME":
                before = sys.modules.get(step.argval)
            if not step.opname.startswith(("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "IMPORT_FROM")):
                continue
            name, is_global = step.argval, step.opname == "LOAD_GLOBAL"
            holders = (before,) if isinstance(before, types.ModuleType) else owners
            known = function.__globals__ if is_global else {}
            found = known.get(name) or next((v for o in holders if (v := getattr(o, name, None)) is not None), None)
            if found is lightning_grad_norm:
                yield "lightning.grad_norm"
            if name != "grad" or not (is_global or before == "autograd" or step.opname == "IMPORT_FROM"):
                yield name
            yield from _names(found, owners, seen)
            if step.opname != "IMPORT_FROM":  # several may follow one another
                before = found if isinstance(found, types.ModuleType) and not _foreign(found.__name__) else name


def _foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _FOREIGN


_FOREIGN = ("torch", "lightning", "lightrft_lightning", "deepspeed", "transformers", "peft")
"""Packages whose functions are not read."""
