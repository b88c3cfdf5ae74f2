"""Which modules FSDP2 gathers and frees together, and what held their parameters before."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

# ---------------------------------------------------------------- what is to be sharded


def blocks(model: nn.Module, among: Sequence[nn.Module] = ()) -> Iterator[nn.Module]:
    """The repeated blocks of a model, outermost first: members of a `ModuleList` of one class, e.g. decoder layers.

    A block that shares a parameter with what is outside of it is none: what is shared must be gathered at one place.

    Args:
        model: the model.
        among: all models that may share parameters with it, if there are others.
    """
    yield from _apart(dict.fromkeys(_repeated(model)), among or (model,))


def _apart(modules: Iterable[nn.Module], among: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Those of the modules that share no parameter with what is outside of them in `among`."""
    holders: dict[nn.Parameter, set[nn.Module]] = {}
    for module, _, parameter in _slots(among):
        holders.setdefault(parameter, set()).add(module)
    for module in modules:
        inside = set(module.modules())
        if all(holders[parameter] <= inside for parameter in module.parameters()):
            yield module


def _repeated(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        members = list(child) if isinstance(child, nn.ModuleList) else []
        if len(members) > 1 and len({type(m) for m in members}) == 1:
            yield from (m for m in members if any(True for _ in m.parameters()))
        else:
            yield from _repeated(child)


def trainable_parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The submodules with a forward pass of their own that hold parameters, by name; containers are looked into."""
    for name, child in module.named_children():
        if isinstance(child, nn.ParameterList | nn.ParameterDict):
            continue  # without a forward pass
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from trainable_parts(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield f"{prefix}{name}", child


def families(models: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """The models, those together that share parameters, directly or through others."""
    found: list[tuple[set[nn.Parameter], list[nn.Module]]] = []
    for model in dict.fromkeys(models):
        related = [family for family in found if not family[0].isdisjoint(model.parameters())]
        found = [family for family in found if all(family is not other for other in related)]
        parameters = set(model.parameters()).union(*(family[0] for family in related))
        found.append((parameters, [*(member for family in related for member in family[1]), model]))
    return [members for _, members in found]


def _slots(models: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Each place where a parameter is held: the module, the name there, the parameter."""
    for module in dict.fromkeys(module for model in models for module in model.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


# ---------------------------------------------------------------- sharding


def take_those_of_rank_0(models: Sequence[nn.Module], gather: Callable[[Any], list[Any]], device: torch.device) -> None:
    """Make weights and buffers the same on all ranks, as a model that each makes at random is another one on each.

    Args:
        models: what is in parts already, or has no memory yet, is left out.
        gather: collects an object from every rank.
        device: that the ranks can send from.

    Raises:
        ValueError: the ranks have models of other shapes.
    """
    tensors: dict[str, torch.Tensor] = {}
    for number, model in enumerate(models):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not (tensor.is_meta or isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")):
                tensors[f"{number}.{name}"] = tensor
    of_ranks = gather([(name, tuple(t.shape), str(t.dtype), _sums(t)) for name, t in tensors.items()])
    for rank, found in enumerate(of_ranks):
        if [entry[:3] for entry in found] != [entry[:3] for entry in of_ranks[0]]:
            raise ValueError(f"rank {rank} has made a {type(models[0]).__name__} of other shapes than rank 0")
    for entries in zip(*of_ranks, strict=True):
        if len({entry[3] for entry in entries}) > 1:
            tensor = tensors[entries[0][0]]
            sent = tensor.detach().to(device, copy=True).contiguous()
            dist.broadcast(sent, 0)
            tensor.data.copy_(sent)


def _sums(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of all bytes, and of some: what tells random numbers from other ones, and from the same in another order."""
    plain = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return tuple(int(plain[k::n].sum(dtype=torch.int64)) for k, n in ((0, 1), (0, 3), (0, 7)))


def shard_family(family: Sequence[nn.Module], reshard: bool, reshard_root: bool, **settings: Any) -> nn.Module | None:
    """Apply `fully_shard` to models that share parameters, or to one that shares none.

    Args:
        family: each of them is called by itself.
        reshard: free the weights of a block after its forward pass.
        reshard_root: and those of everything else.
        **settings: of `fully_shard`.

    Returns:
        The root of those that FSDP2 would take for roots of their own, for `start`; None if there is one.
    """
    tops = [model for model in family if not any(model in set(o.modules()) for o in family if o is not model)]
    inner_first = sorted(family, key=lambda model: sum(1 for _ in model.modules()))
    parts = [part for model in inner_first for part in (*_repeated(model), *([] if model in tops else [model]))]
    for part in list(_apart(dict.fromkeys(parts), family)):
        fully_shard(part, reshard_after_forward=reshard, **settings)
    if len(tops) == 1:
        fully_shard(tops[0], reshard_after_forward=reshard_root, **settings)
        return tops[0] if len(family) > 1 else None
    return _one_unit(tops, reshard_after_forward=reshard_root, **settings)


def _one_unit(models: list[nn.Module], **settings: Any) -> Any:
    """Shard models as one unit, of which any may run, in any order; returns its root, which never runs.

    FSDP2 by itself expects that all of them run in each pass, and loses the gradients if one does not.
    """
    root = nn.Module()
    root.parts = nn.ModuleList(models)
    fully_shard(models, **settings)
    state = cast(FSDPModule, models[0])._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    for model in models:
        model.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
        model.register_forward_hook(state._post_forward)
    return fully_shard(root, mesh=settings["mesh"])


def start(root: nn.Module) -> None:
    """Let FSDP2 know which module is the root, where that is not the one that runs first."""
    cast(FSDPModule, root)._get_fsdp_state()._lazy_init()


class Replaced:
    """The parameters of models before they are sharded, in whose place `fully_shard` puts others."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._slots = list(_slots(models))

    def repoint(self) -> None:
        """Let every optimizer that has made no step yet hold the sharded ones, wherever and by whom it was made."""
        new = {
            old: parameter for module, name, old in self._slots if (parameter := module._parameters[name]) is not old
        }
        for optimizer in [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]:
            if not optimizer.__dict__.get("state"):
                _exchange(optimizer, new)


def _exchange(optimizer: Optimizer, new: Mapping[Any, Any]) -> None:
    for group in optimizer.__dict__.get("param_groups", ()):
        if any(parameter in new for parameter in group["params"]):
            group["params"][:] = [new.get(parameter, parameter) for parameter in group["params"]]


# ---------------------------------------------------------------- what is sharded


def check_holds_sharded(optimizer: Optimizer) -> None:
    """Raise ValueError if the optimizer would step something else than sharded parameters."""
    held = (parameter for group in optimizer.param_groups for parameter in group["params"])
    loose = next((parameter for parameter in held if not isinstance(parameter, DTensor)), None)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS makes one row of all weights, which FSDP2 has in parts: take AdamW or SGD")
    if loose is not None and optimizer.state:
        raise ValueError(
            f"{type(optimizer).__name__} was made before the weights were sharded and has a state already: make it in "
            "configure_optimizers, or give it to prepare() before its first step"
        )
    if loose is not None:
        raise ValueError(
            f"the optimizer holds a parameter of shape {tuple(loose.shape)} that is not in the model: "
            "pass each optimizer with the model that it was created for"
        )


def reshard(model: nn.Module) -> None:
    """Free what a forward pass has left gathered: until then the parameters are other objects than the sharded ones."""
    for unit in units(model):
        unit.reshard()


KEPT_WHOLE: WeakSet[Any] = WeakSet()
"""Modules that are whole for a while, for forward passes that each rank makes by itself. Of this process, not of a
strategy: a model outlives the one that has sharded it."""


WITH_OWN_PARAMETERS: WeakSet[Any] = WeakSet()
"""LightningModules whose own parameters are gathered for each of their steps."""


def free_if_evaluated(model: nn.Module, args: Any, output: Any) -> None:
    """A forward hook: without a backward pass, nothing else frees the root and makes its parameters the optimizer's.

    There is none through an output without gradients, that of a frozen part for instance.
    """
    if model in KEPT_WHOLE:
        return
    if not torch.is_grad_enabled() or not any(getattr(leaf, "requires_grad", True) for leaf in tree_leaves(output)):
        reshard(model)


def meet_thawed(model: nn.Module) -> None:
    """Let FSDP2 know the dtypes of gradients of what was frozen at the first pass, when it has looked for them."""
    for unit in units(model):
        for group in unit._get_fsdp_state()._fsdp_param_groups:
            was_frozen = getattr(group, "_orig_dtype", False) is None
            if was_frozen and any(p.sharded_param.requires_grad for p in group.fsdp_params):
                group._init_mp_dtypes()


def units(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules that are gathered and freed by themselves."""
    return (m for m in model.modules() if isinstance(m, FSDPModule))


def roots(model: nn.Module) -> Iterator[FSDPModule]:
    """The outermost sharded modules."""
    if isinstance(model, FSDPModule):
        yield cast(FSDPModule, model)
        return
    for child in model.children():
        yield from roots(child)
