"""What of a model, its optimizer and this process goes into a checkpoint, under names that no back end changes.

The functions on models and optimizers are right for plain tensors and DTensors. `load_*` write in place.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrft_lightning.checkpoints.flat import FlatTensor, TensorInfo
from lightrft_lightning.checkpoints.folder import CheckpointError
from lightrft_lightning.models.export import active_adapters

_IMPLEMENTATION = {
    "foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay", "bias_correction",
    "adamw_mode", "initial_lr", "alpha", "t_alpha", "t_beta3",
}  # fmt: skip
"""Settings of an optimizer group that say how it is computed, that a scheduler has added, or that
AdamW does not read (bitsandbytes)."""

# -------------------------------------------------------------------- models


def model_tensors(model: nn.Module) -> dict[str, FlatTensor]:
    """Parameters and persistent buffers as views, tied ones once, under the names of ``model.state_dict()``."""
    own, _ = _split_state_dict(model)
    first = {id(tensor): name for name, tensor in reversed(own.items())}
    return {name: FlatTensor.of(tensor) for name, tensor in own.items() if first[id(tensor)] == name}


def aliases(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters, and the name that they are stored under."""
    own, _ = _split_state_dict(model)
    first = {id(tensor): name for name, tensor in reversed(own.items())}
    return {name: first[id(tensor)] for name, tensor in own.items() if first[id(tensor)] != name}


def other_state(model: nn.Module) -> dict[str, Any]:
    """What `model.state_dict()` holds beside its parameters and buffers, e.g. by ``get_extra_state``."""
    return _split_state_dict(model)[1]


def _split_state_dict(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = model.state_dict(keep_vars=True)  # under FSDP2 this also frees what a forward pass has gathered
    objects = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    own = {name: value for name, value in state.items() if id(value) in objects}
    rest = {name: value.detach() if isinstance(value, Tensor) else value for name, value in state.items()}
    return own, {name: value for name, value in rest.items() if name not in own}


LIBRARIES = {
    "torch", "torchmetrics", "lightning", "transformers", "peft", "bitsandbytes", "deepspeed", "lightrft_lightning",
}  # fmt: skip
"""Whose modules load what was saved of them, name by name."""


def loads_by_itself(model: nn.Module) -> str | None:
    """The module, if there is one, that a user has given a way of loading of its own: a method, or a hook."""
    for name, module in model.named_modules():
        cls, hooks = type(module), (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks)
        own: list[Any] = [cls.load_state_dict, cls._load_from_state_dict]
        own += [getattr(hook, "hook", hook) for of_kind in hooks for hook in of_kind.values()]
        if any(str(function.__module__).partition(".")[0] not in LIBRARIES for function in own):
            return f"{cls.__name__} {name}".rstrip()
    return None


def match(
    here: Mapping[str, TensorInfo],
    tied: Mapping[str, str],
    other: Iterable[str],
    there: Mapping[str, TensorInfo | None],
    where: Any,
    strict: bool,
) -> dict[str, str]:
    """Which saved tensor each tensor of a model is to be read from.

    Args:
        here: the model's tensors.
        tied: further names of some of them.
        other: names of the rest of its state.
        there: what was saved; None for what is no tensor.
        where: of what the errors speak.
        strict: everything must be there, and nothing else.

    Raises:
        CheckpointError: with the first difference, if it is of another model.
    """
    names = {name: [name] for name in here}
    for alias, name in tied.items():
        names[name].append(alias)
    sources = {}
    for name, candidates in names.items():
        source = next((c for c in candidates if there.get(c) is not None), None)
        if source is None:
            if strict:
                raise CheckpointError(f"{where} is of another model: it has no {name}")
            continue
        sources[name] = source
        saved = there[source]
        if saved is not None and saved.shape != here[name].shape:
            raise CheckpointError(
                f"{where} is of another model: {name} has shape {saved.shape} there and {here[name].shape} here"
            )
    if strict:
        _check_names([*here, *tied], [*other], there, where)
    return sources


def _check_names(tensors: list[str], other: list[str], there: Mapping[str, Any], where: Any) -> None:
    for name in other:
        if name not in there:
            raise CheckpointError(f"{where} is of another model: it has no {name}")
    known = {*tensors, *other}
    for name in there:
        if name not in known:
            raise CheckpointError(f"{where} is of another model: {name} does not exist here")


# -------------------------------------------------------------------- optimizers


def parameter_names(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    """The name in `model` of each parameter that `optimizer` steps.

    Raises:
        ValueError: one is not in the model.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in "
                    f"{type(model).__name__}: pass the model that it was created for"
                )
    return {p: names[p] for group in optimizer.param_groups for p in group["params"]}


def optimizer_tensors(
    model: nn.Module, optimizer: Optimizer, saved: Mapping[str, TensorInfo] | None = None
) -> dict[str, FlatTensor]:
    """The optimizer's state as views, under ``<parameter name>.<key>``.

    Args:
        model: the model.
        optimizer: its optimizer.
        saved: what is about to be loaded: the state is laid out for exactly this first.
    """
    names = parameter_names(model, optimizer)
    if saved is not None:
        _lay_out(optimizer, names, saved)
    return {
        f"{names[parameter]}.{key}": FlatTensor.of(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def _lay_out(optimizer: Optimizer, names: Mapping[Tensor, str], saved: Mapping[str, TensorInfo]) -> None:
    wanted = _by_parameter(saved)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            before = optimizer.state.pop(parameter, {})
            for key, info in wanted.get(names[parameter], {}).items():
                there = before.get(key)
                fits = isinstance(there, Tensor) and tuple(there.shape) == info.shape
                value = there if fits else _zeros(parameter, info, group)
                optimizer.state[parameter][key] = value


def _zeros(parameter: Tensor, info: TensorInfo, group: Mapping[str, Any]) -> Tensor:
    if info.shape == tuple(parameter.shape):
        return torch.zeros_like(parameter.detach())  # sharded like the parameter
    on_device = group.get("fused") or group.get("capturable") or len(info.shape) > 0
    return torch.zeros(info.shape, dtype=info.dtype, device=parameter.device if on_device else "cpu")


def _by_parameter(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``{"layer.weight.exp_avg": x}`` as ``{"layer.weight": {"exp_avg": x}}``."""
    nested: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        name, _, key = path.rpartition(".")
        nested.setdefault(name, {})[key] = value
    return nested


def optimizer_scalars(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The part of the optimizer's state that is no tensor, under the same kind of names."""
    names = parameter_names(model, optimizer)
    return {
        f"{names[parameter]}.{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if not isinstance(value, Tensor)
    }


def set_optimizer_scalars(model: nn.Module, optimizer: Optimizer, scalars: Mapping[str, Any]) -> None:
    """Undo `optimizer_scalars`; tensors must be in place."""
    nested = _by_parameter(scalars)
    for parameter, name in parameter_names(model, optimizer).items():
        if name in nested:
            optimizer.state[parameter].update(nested[name])


def optimizer_settings(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameter groups, with the names of their parameters."""
    names = parameter_names(model, optimizer)
    return [
        {**{k: v for k, v in group.items() if k != "params"}, "params": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]


def set_optimizer_settings(model: nn.Module, optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Undo `optimizer_settings`. How the optimizer computes (fused, ...) stays as it is here."""
    of_parameter = {name: group for group in groups for name in group["params"]}
    names = parameter_names(model, optimizer)
    for group in optimizer.param_groups:
        saved = of_parameter[names[group["params"][0]]]
        kept = {"params", *_IMPLEMENTATION} - {"initial_lr"}
        group.update({key: value for key, value in saved.items() if key not in kept})


def check_same_optimizer(current: list[dict[str, Any]], saved: list[dict[str, Any]], where: Any) -> None:
    """Compare groups of `optimizer_settings`.

    Raises:
        CheckpointError: another kind of optimizer, or one that does not hold the same parameters.
    """
    of_parameter = {name: group for group in saved for name in group["params"]}
    for group in current:
        for name in group["params"]:
            if name not in of_parameter:
                raise CheckpointError(
                    f"{where}: its optimizer does not hold the parameter {name!r}: pass load_optimizer_states=False"
                )
        _check_same_kind(group, of_parameter[group["params"][0]], where)


def _check_same_kind(group: Mapping[str, Any], saved: Mapping[str, Any], where: Any) -> None:
    """Each kind has settings that the other lacks; a newer torch only adds some."""
    ignored = {"params", *_IMPLEMENTATION}
    here, there = set(group) - set(saved) - ignored, set(saved) - set(group) - ignored
    if here and there:
        raise CheckpointError(
            f"{where} is of another kind of optimizer: with {min(there)!r}, without {min(here)!r}. "
            "Pass load_optimizer_states=False"
        )


# -------------------------------------------------------------------- this process


def rng_state() -> dict[str, Any]:
    """State of every random generator, as plain values that `torch.load(weights_only=True)` reads."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()  # of this rank's device; to ask the others would start them up
    import numpy

    kind, keys, *rest = numpy.random.get_state()
    state["numpy"] = (str(kind), [int(k) for k in keys], *rest)  # type: ignore[union-attr]
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Undo `rng_state`; nothing for an empty state."""
    import numpy

    if not state:
        return
    random.setstate(_tuples(state["python"]))
    torch.set_rng_state(state["torch"])
    numpy.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


# -------------------------------------------------------------------- what the manifest says about a model


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Class of the model, and the configurations of the Hugging Face models in it by their names."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer in found)
        if not inside and (described := _hugging_face(module)):
            found[name] = described
    return {"model": _class_name(model), "hugging_face": found}


def _hugging_face(module: nn.Module) -> dict[str, Any] | None:
    adapters = getattr(module, "peft_config", None)
    base: Any = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
    config = getattr(base, "config", None)
    if not (hasattr(base, "save_pretrained") and hasattr(config, "to_json_string")):
        return None
    described: dict[str, Any] = {"class": _class_name(base)}
    described["config"] = json.loads(config.to_json_string(use_diff=False))  # type: ignore[union-attr]
    if started_from := getattr(config, "name_or_path", None):
        described["started_from"] = str(Path(started_from).absolute() if Path(started_from).is_dir() else started_from)
    if (generation := getattr(base, "generation_config", None)) is not None and base.can_generate():
        described["generation_config"] = json.loads(generation.to_json_string())
    if adapters is not None:
        plain = {name: adapter.to_dict() for name, adapter in adapters.items()}
        described["adapters"] = json.loads(json.dumps(plain, default=_plain))
        if len(adapters) > 1:
            described["active_adapters"] = active_adapters(module)
    return described


def _class_name(module: nn.Module) -> str:
    """Of the class that `fully_shard` has put a subclass in place of, if it has."""
    from torch.distributed.fsdp import FSDPModule

    return next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule)).__name__


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 over vocabulary, special tokens and chat template: equal for tokenizers that encode a chat alike."""
    parts = [
        sorted(tokenizer.get_vocab().items()),
        sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items()),
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
