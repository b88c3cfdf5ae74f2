"""LoRA: put around a model by settings, and merged into its base weights, or taken out, for engines and files."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightrft_lightning._errors import import_extra, unknown_name
from lightrft_lightning.models.export import on_meta
from lightrft_lightning.models.merging import PREFIX, check_mergeable, comes_apart, has_adapters, plain_tensors, units
from lightrft_lightning.models.quantized import QUANTIZATIONS

_FROM_DATA = ("eva", "corda", "lora_ga")
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
"""What `add_lora` takes where nothing else is said; the output head is none of these modules."""


def check_adapters(model: Any, lora: Mapping[str, Any] | None, quantization: str | None) -> None:
    """Refuse what cannot be done to `model`, a source of `load_model` or a model object, before it is loaded.

    Raises:
        ValueError: settings that are unknown, or do not go together or with the model.
    """
    if quantization is not None:
        if quantization not in QUANTIZATIONS:
            raise ValueError(unknown_name("quantization", quantization, QUANTIZATIONS))
        if isinstance(model, nn.Module):
            raise ValueError(f"quantization={quantization!r} with a model object: pass the folder that it came from")
        if lora is None:
            raise ValueError(f"quantization={quantization!r}: these weights cannot be trained; add lora={{}}")
    if lora is None:
        return
    if has_adapters(model):
        raise ValueError(f"lora={dict(lora)!r}: the model has adapters already, leave lora out")
    known = [field.name for field in dataclasses.fields(import_extra("peft", "hf").LoraConfig)]
    for name in lora:
        if name.startswith("megatron_"):  # peft imports whatever module it names
            raise ValueError(f"lora={dict(lora)!r}: {name!r} is for Megatron's layers, leave it out")
        if name not in known:
            raise ValueError(f"lora={dict(lora)!r}: {unknown_name('setting of peft.LoraConfig', name, known)}")
    _lora_config(lora)


def add_lora(model: Any, settings: Mapping[str, Any], seed: int) -> Any:
    """`model` with LoRA matrices around its linear layers; nothing else is trained.

    Args:
        model: a Hugging Face causal language model.
        settings: of `peft.LoraConfig`; what is not there is taken from `LORA`.
        seed: of the matrices, which must be the same on all ranks.

    Raises:
        ValueError: PEFT refuses the settings.
    """
    devices = {p.device for p in model.parameters() if p.is_cuda}
    config = _lora_config(settings)
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            adapted = import_extra("peft", "hf").get_peft_model(model, config)
        except Exception as err:
            raise _refused(settings, err) from err
    _check_found(adapted, settings)
    return adapted


def _lora_config(settings: Mapping[str, Any]) -> Any:
    cls = import_extra("peft", "hf").LoraConfig
    try:
        config = cls(**copy.deepcopy({"task_type": "CAUSAL_LM", **LORA, **settings}))  # PEFT adds to dictionaries
    except Exception as err:
        raise _refused(settings, err) from err
    if config.lora_alpha == 0:
        raise ValueError(f"lora={dict(settings)!r}: scaled by 0, nothing would be trained: set lora_alpha above 0")
    if config.init_lora_weights in _FROM_DATA:
        raise ValueError(
            f"lora={dict(settings)!r}: init_lora_weights={config.init_lora_weights!r} starts from passes over data, "
            "which are not made here, and PEFT would start as always: make them with PEFT, and pass that model object"
        )
    return config


def _check_found(adapted: Any, settings: Mapping[str, Any]) -> None:
    """Refuse names in the settings that PEFT has found nothing for, and says nothing about."""
    names = [name.removeprefix(PREFIX) for name in layers(adapted)]
    modules = [name.removeprefix(PREFIX) for name, _ in adapted.named_modules()]
    tensors = [name.removeprefix(PREFIX).replace(".base_layer", "") for name, _ in adapted.named_parameters()]
    for setting, there in (
        ("rank_pattern", names + tensors),
        ("alpha_pattern", names + tensors),
        ("modules_to_save", modules),
        ("target_parameters", tensors),
    ):
        for key in settings.get(setting) or ():
            if not any(re.fullmatch(rf"(.*\.)?({key})", name) for name in there):
                raise ValueError(f"lora={dict(settings)!r}: nothing in the model has the name {key!r} of {setting}")


def _refused(settings: Mapping[str, Any], err: Exception) -> ValueError:
    """For whatever PEFT, or a package that it needs for these settings, raises."""
    usual = isinstance(err, TypeError | ValueError | ImportError)
    told = str(err) if usual else f"PEFT cannot apply it, {type(err).__name__}: {err}"
    return ValueError(f"lora={dict(settings)!r}: {told}")


def check_policy(model: Any, engine: str, has_copy: bool) -> None:
    """Refuse adapters with which an engine would sample from another policy than the one that is trained.

    Args:
        model: a policy, with adapters or without.
        engine: name of the engine, for the message.
        has_copy: whether it has weights of its own, into which the adapters are merged.

    Raises:
        ValueError: the message names the layer and what to do.
    """
    if not has_adapters(model):
        return
    for unit in units(model):
        if getattr(unit.module, "merged", False):
            raise ValueError(f"{unit.path}: its adapter is merged, so nothing is trained: call unmerge_adapter() first")
        if getattr(unit.module, "disable_adapters", False):
            raise ValueError(f"{unit.path}: its adapter is switched off: call enable_adapter_layers() first")
        scales = getattr(unit.module, "scaling", {})
        if isinstance(scales, Mapping) and any(scale == 0 for scale in scales.values()):
            raise ValueError(f"{unit.path}: its adapter is scaled by 0, so nothing is trained: set lora_alpha above 0")
    try:
        plain = on_meta(model)
        if has_copy:
            check_mergeable(model, plain)
        tied = comes_apart(model, plain)
    except ValueError as err:
        other = ", or generate with TransformersRollout, which uses the model itself" if has_copy else ""
        raise ValueError(
            f"{engine} cannot hold a policy with these adapters, {described(model)}: {str(err).rstrip('.')}. "
            f"Change them{other}"
        ) from err
    if tied is not None:
        raise ValueError(
            f"the adapters, {described(model)}, take {tied[0]} and {tied[1]} apart, which are one tensor in a model of "
            "this config: leave them out of target_modules and modules_to_save, or modules_to_save=['lm_head'] with "
            "ensure_weight_tying=True, or start from a model saved with tie_word_embeddings=False"
        )


def described(model: Any) -> str:
    """The settings of the adapters, without those that are PEFT's defaults."""
    return "; ".join(f"{config.peft_type.value} {_changed(config)}" for config in model.peft_config.values())


def _changed(config: Any) -> dict[str, Any]:
    usual = dataclasses.asdict(type(config)())
    unsaid = {"task_type", "peft_type", "peft_version", "base_model_name_or_path", "inference_mode", "runtime_config"}
    named = {name: getattr(config, name) for name in usual if name not in unsaid}
    if isinstance(modules := named.get("target_modules"), set | list):
        named["target_modules"] = sorted({name.rpartition(".")[2] for name in modules})
    return {name: value for name, value in named.items() if value != usual[name]}


def active_adapter(model: Any) -> str:
    """The one adapter that the model computes with.

    Raises:
        ValueError: there is none, or several.
    """
    adapters = list(model.active_adapters) if has_adapters(model) else []
    if len(adapters) != 1:
        raise ValueError(f"the active adapters are {adapters}: an engine can be sent exactly one")
    return str(adapters[0])


def layers(model: Any) -> dict[str, Any]:
    """The layers that have LoRA matrices."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def merged(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """As `plain_tensors`: the adapters in the weights, under the names that these have without PEFT."""
    return plain_tensors(model, tensors)


def without(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Base weights under the names that they have without PEFT; the adapter is left out."""
    return plain_tensors(model, tensors, merge=False)


def matrices(model: Any) -> dict[str, str]:
    """Names of the active adapter's matrices among the model's parameters, and in PEFT's own files.

    Raises:
        ValueError: the model computes, or trains, something else than base weights and LoRA matrices of one scale.
    """
    adapter, names = active_adapter(model), {}
    for name, layer in layers(model).items():
        config = model.peft_config[adapter]
        scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        plain = (
            type(layer).__name__.startswith("Linear") and not layer.lora_variant and not any(layer.lora_bias.values())
        )
        if not plain or layer.scaling.get(adapter, scale) != scale:
            raise ValueError(
                f"{name}, {described(model)}: only plain LoRA of linear layers with one rank and lora_alpha can be "
                "sent as an adapter: use lora='merged'"
            )
    for name, parameter in model.named_parameters():
        if name.endswith((f".lora_A.{adapter}.weight", f".lora_B.{adapter}.weight")):
            names[name] = name.removesuffix(f".{adapter}.weight") + ".weight"
        elif parameter.requires_grad:
            raise ValueError(f"{name} is trained, but an adapter holds LoRA matrices only: use lora='merged'")
    return names
