"""Adapters folded into the weights of their layers by PEFT itself, and the proof that this computes the same.

Each module that PEFT has put around another one is copied with whole tensors in it and unloaded as PEFT does it. No
formula of any kind of adapter is repeated here. Before and after, the copy is computed on a few random inputs; a
difference is an error, so weights that are not those of the trained model leave by no way.
"""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightrft_lightning._errors import import_extra
from lightrft_lightning.models.quantized import is_quantized

PREFIX = "base_model.model."
"""Of all names inside a PEFT model."""


class MergeError(ValueError):
    """Adapters that are no part of any weight, or merged weights that compute something else."""


class Unit:
    """A module that PEFT has put around one of the model's: a layer with adapters, or a trained copy of a module.

    Args:
        path: its name in the model.
        module: itself.
        names: of all parameters of the model, by their identity; a shared one has the first of its names.

    Attributes:
        inputs: names of its parameters inside of it, and in the model.
        outputs: names of the parameters of the module without PEFT, and which of the inputs they come from.
    """

    def __init__(self, path: str, module: Any, names: Mapping[int, str]) -> None:
        self.path, self.module = path, module
        own = dict(module.named_parameters(remove_duplicate=False))
        self.inputs = {name: names[id(p)] for name, p in own.items()}
        local = {id(p): name for name, p in own.items()}
        inner = _unloaded(module, merge=False)
        self.outputs = {name: local[id(p)] for name, p in inner.named_parameters()}
        self.base = {name: local[id(p)] for name, p in _original(module).named_parameters() if id(p) in local}

    def plain(self, name: str) -> str:
        """The name of an output in the model without PEFT."""
        return f"{self.path}.{name}".removeprefix(PREFIX)

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs, computed in float32 and rounded once.

        Args:
            tensors: the inputs by their names in the unit, whole.

        Raises:
            MergeError: PEFT cannot merge the layer, or the result computes something else.
        """
        with torch.no_grad(), _exact_float32(next(iter(tensors.values())).device.type):
            try:
                layer = self._filled(tensors)
                computed = _probe(layer)
                before, without = computed(layer), computed(_original(layer))
                result = _unloaded(layer, merge=not getattr(layer, "disable_adapters", False))
            except Exception as err:
                message = (str(err) or type(err).__name__).splitlines()[0]
                raise MergeError(f"{self.path.removeprefix(PREFIX)}: PEFT cannot merge its adapter: {message}") from err
            self._compare(before, without, computed(result))
            return {
                name: p.detach().to(tensors[self.outputs[name]].dtype)
                for name, p in result.named_parameters()
                if name in self.outputs
            }

    def _filled(self, tensors: Mapping[str, Tensor]) -> Any:
        """A copy of the module with these tensors, without the hooks that a strategy has hung on it."""
        memo: dict[int, Any] = {}
        for path, module in self.module.named_modules():
            start = f"{path}." if path else ""
            memo[id(module._parameters)] = {
                name: None if p is None else nn.Parameter(_float(tensors[start + name]), requires_grad=False)
                for name, p in module._parameters.items()
            }
            memo |= {id(v): OrderedDict() for name, v in vars(module).items() if name.endswith("_hooks")}
            for name in ("_tied_adapter", "kwargs"):  # other layers, whose matrices this one has as its own
                if name in vars(module):
                    memo[id(vars(module)[name])] = type(vars(module)[name])()
        _keep_shared(self.module, memo)
        layer = copy.deepcopy(self.module, memo).eval().to(next(iter(tensors.values())).device)  # with its buffers
        return _plain_base(layer) if is_quantized(self.module) else layer

    def _compare(
        self, before: Mapping[str, Tensor], without: Mapping[str, Tensor], after: Mapping[str, Tensor]
    ) -> None:
        for name, wanted in before.items():
            base = without.get(name, wanted)
            error, change = (after[name] - wanted).norm(), (wanted - base).norm()
            # Relative to what the adapter does, which is little at first; but not below the rounding of the sums.
            if not error <= 1e-3 * change + 1e-5 * base.norm():
                raise MergeError(
                    f"{self.path.removeprefix(PREFIX)}: its merged weights compute something else than the layer with "
                    f"its adapter; they differ by {error / change.clamp(min=1e-30):.2g} of what the adapter changes"
                )


def _float(tensor: Tensor) -> Tensor:
    # A copy, as PEFT adds in place.
    return tensor.detach().to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.detach().clone()


def _keep_shared(module: nn.Module, memo: dict[int, Any]) -> None:
    """One parameter in two places of the module stays one in its copy."""
    first: dict[int, nn.Parameter] = {}
    for inner in module.modules():
        filled = memo[id(inner._parameters)]
        for name, p in inner._parameters.items():
            if p is not None:
                filled[name] = first.setdefault(id(p), filled[name])


def _plain_base(layer: Any) -> Any:
    """A LoRA layer around weights in four bits, as the one that it would be around numbers."""
    lora = import_extra("peft.tuners.lora", "hf")
    if type(layer).__name__ != "Linear4bit" or not isinstance(layer, lora.LoraLayer):
        raise MergeError(f"a {type(layer).__name__} of PEFT around quantized weights: only LoRA can be merged there")
    old = layer.base_layer
    with torch.device("meta"):
        base = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    base._parameters = dict(old._parameters)
    layer.base_layer, layer.__class__ = base, lora.Linear
    return layer


def _unloaded(layer: Any, merge: bool) -> nn.Module:
    """What PEFT's `merge_and_unload`, or `unload`, leaves of a module."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        result = layer.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=None)
    else:
        if merge:
            layer.merge()
        result = layer.get_base_layer()
    left = [type(m).__name__ for m in result.modules() if isinstance(m, _wrappers())]
    if left:
        raise MergeError(f"a {left[0]} is left inside a {type(layer).__name__}")
    return result  # type: ignore[no-any-return]


def _original(layer: Any) -> Any:
    """The module that PEFT found."""
    wrappers = _wrappers()
    while isinstance(layer, wrappers):
        layer = layer.original_module if hasattr(layer, "original_module") else layer.get_base_layer()
    return layer


def _wrappers() -> Any:
    return (
        import_extra("peft.tuners.tuners_utils", "hf").BaseTunerLayer,
        import_extra("peft.utils.other", "hf").AuxiliaryTrainingWrapper,
    )


def has_adapters(model: Any) -> bool:
    """Whether PEFT has put adapters into it."""
    return hasattr(model, "peft_config")


def units(model: Any) -> list[Unit]:
    """The outermost modules that PEFT has put into a model; none if it has not."""
    if not has_adapters(model):
        return []
    names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    found: list[Unit] = []
    outer = None
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _wrappers()) and not (outer is not None and path.startswith(outer)):
            found.append(Unit(path, module, names))
            outer = f"{path}."
    return found


# -------------------------------------------------------------------- tensors on their way


def plain_tensors(
    model: Any, tensors: Iterable[tuple[str, Tensor]], merge: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """The parameters of `model` as they are without PEFT, under all names of each.

    Args:
        model: with adapters or without.
        tensors: its parameters by name, whole, in the order of `named_parameters`; each may be overwritten afterwards.
        merge: fold the adapters in; False leaves them out.

    Raises:
        MergeError: as `Unit.merged`.
    """
    found = units(model)
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    aliases = {of[0]: of for of in names.values()}
    inside = tuple(f"{unit.path}." for unit in found)
    waiting = {unit.path: set(unit.inputs.values()) for unit in found}
    users: dict[str, list[Unit]] = {}
    for unit in found:
        for canonical in waiting[unit.path]:
            users.setdefault(canonical, []).append(unit)
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors:
        for alias in aliases.get(name, [name]):
            if not alias.startswith(inside):
                yield alias.removeprefix(PREFIX), tensor
        if name in users:
            kept[name] = tensor.detach().clone()
        for unit in users.get(name, ()):
            waiting[unit.path].discard(name)
            if not waiting[unit.path]:
                whole = {local: kept[canonical] for local, canonical in unit.inputs.items()}
                results = unit.merged(whole) if merge else {n: whole[local] for n, local in unit.base.items()}
                yield from ((unit.plain(n), t) for n, t in results.items())
                for canonical in set(unit.inputs.values()):
                    users[canonical] = [u for u in users[canonical] if waiting[u.path]]
                    if not users[canonical]:
                        kept.pop(canonical, None)


# -------------------------------------------------------------------- what a layer computes


@contextlib.contextmanager
def _exact_float32(device: str) -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _probe(layer: Any) -> Callable[[Any], dict[str, Tensor]]:
    """What a few random inputs are turned into by `layer`, and by what is in its place when it is merged."""
    base, device = _original(layer), next(layer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    conv1d = import_extra("transformers.pytorch_utils", "hf").Conv1D
    if isinstance(base, nn.Embedding):
        chosen = torch.randperm(base.num_embeddings, generator=generator)[:64].tolist()
        trained = [i for m in layer.modules() for of in getattr(m, "token_indices", {}).values() for i in of]
        x = torch.tensor([*chosen, *trained])
    elif isinstance(base, nn.Linear | conv1d):
        width = base.weight.shape[0] if isinstance(base, conv1d) else base.in_features
        x = torch.randn(4, int(width), generator=generator)
    elif isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        size = [d * (k - 1) + 1 for d, k in zip(base.dilation, base.kernel_size, strict=True)]
        x = torch.randn(2, base.in_channels, *size, generator=generator)
    elif isinstance(layer, import_extra("peft.utils.other", "hf").ModulesToSaveWrapper):
        return lambda module: {}  # the trained copy itself takes the module's place
    elif hasattr(layer, "parameter_name"):
        return lambda module: _seen_inside(module, base)
    else:
        raise MergeError(f"whether a merged {type(base).__name__} computes the same cannot be checked")
    return lambda module: {"": module(x.to(device))}


def _seen_inside(layer: Any, base: Any) -> dict[str, Tensor]:
    """Products of the parameters as the forward pass of `base` finds them, inside of `layer`."""

    def forward(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        generator, found = torch.Generator().manual_seed(0), {}
        for name in names:
            value = getattr(base, name)
            found[name] = value @ torch.randn(value.shape[-1], 4, generator=generator).to(value.device)
        return found

    # Sorted: merging takes parameters out and puts them back in another order.
    names = sorted(name for name, p in base.named_parameters(recurse=False) if p.dim() > 1)
    base.forward = forward
    try:
        return dict(layer(None))
    finally:
        del base.forward


# -------------------------------------------------------------------- before training


def check_mergeable(model: Any, plain: nn.Module) -> None:
    """Merge a layer of each kind with random values, and look for names that a model without PEFT has not.

    Args:
        model: with adapters, in whatever state a strategy has its parameters.
        plain: the same without, e.g. on the meta device.

    Raises:
        MergeError: an engine, or an exported folder, could not compute what this model computes.
    """
    found = units(model)
    kinds: set[Any] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, p in _outside(model, found):
        shapes[name.removeprefix(PREFIX)] = whole_shape(p)
    for unit in found:
        own = dict(unit.module.named_parameters(remove_duplicate=False))
        kind = (type(unit.module), tuple((name, whole_shape(p)) for name, p in own.items()))
        if kind not in kinds:
            kinds.add(kind)
            unit.merged(_random_values(unit))
        shapes |= {unit.plain(name): whole_shape(own[local]) for name, local in unit.outputs.items()}
    wanted = {name: tuple(p.shape) for name, p in plain.named_parameters(remove_duplicate=False)}
    extra = [name for name in shapes if name not in wanted]
    trained = {name.removeprefix(PREFIX) for name, p in model.named_parameters() if p.requires_grad}
    for name in sorted(extra, key=lambda name: name not in trained):
        raise MergeError(f"{name} is part of an adapter and of no layer's weights, so it cannot be merged into any")
    for name in sorted(wanted.keys() - shapes.keys()):
        raise MergeError(f"{name} is a weight of {type(plain).__name__}, but the model with adapters has none")
    for name, shape in wanted.items():
        if shape != shapes[name]:
            raise MergeError(f"{name} has shape {shapes[name]}, in a {type(plain).__name__} of this config {shape}")


def comes_apart(model: Any, plain: nn.Module) -> tuple[str, str] | None:
    """Two names of one tensor of `plain` that are different tensors once the adapters are merged."""
    of_name = {unit.plain(name): (unit, name) for unit in units(model) for name in unit.outputs}
    first: dict[int, str] = {}
    for name, p in plain.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(p), name)
        if other == name or not (name in of_name or other in of_name):
            continue
        values = []
        for tied in (other, name):
            if tied not in of_name:  # as it was, and so changed by no adapter
                return other, name
            unit, local = of_name[tied]
            values.append(unit.merged(_random_values(unit))[local])
        if not torch.equal(*values):
            return other, name
    return None


def _outside(model: nn.Module, found: Iterable[Unit]) -> Iterator[tuple[str, nn.Parameter]]:
    inside = tuple(f"{unit.path}." for unit in found)
    for name, p in model.named_parameters(remove_duplicate=False):
        if not name.startswith(inside):
            yield name, p


def whole_shape(p: Any) -> tuple[int, ...]:
    """Of the whole parameter: a shard of ZeRO-3 is flat, four bits are packed."""
    quantized = getattr(p, "quant_state", None)
    return tuple(quantized.shape if quantized is not None else getattr(p, "ds_shape", p.shape))


def _random_values(unit: Unit) -> dict[str, Tensor]:
    """Values for all inputs; a parameter that units share has the same in each."""
    values = {}
    for name, p in unit.module.named_parameters(remove_duplicate=False):
        device = torch.device("cpu") if p.is_meta else p.device
        generator = torch.Generator(device).manual_seed(zlib.crc32(unit.inputs[name].encode()))
        values[name] = torch.empty(whole_shape(p), device=device).uniform_(-0.3, 0.3, generator=generator)
    return values
