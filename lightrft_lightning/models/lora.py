"""LoRA: put around a model by settings, and merged into its base weights, or taken out, for engines and files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightrft_lightning._errors import import_extra, unknown_name
from lightrft_lightning.models.quantized import QUANTIZATIONS

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
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            return import_extra("peft", "hf").get_peft_model(model, _lora_config(settings))
        except (TypeError, ValueError) as err:
            raise ValueError(f"lora={dict(settings)!r}: {err}") from err


def _lora_config(settings: Mapping[str, Any]) -> Any:
    try:
        return import_extra("peft", "hf").LoraConfig(**{"task_type": "CAUSAL_LM", **LORA, **settings})
    except (TypeError, ValueError) as err:
        raise ValueError(f"lora={dict(settings)!r}: {err}") from err


def has_adapters(model: Any) -> bool:
    """Whether this is a PEFT model."""
    return hasattr(model, "peft_config")


def active_adapter(model: Any) -> str:
    """The one adapter that the model computes with.

    Raises:
        ValueError: there is none, or several, or one that is not plain LoRA of linear layers.
    """
    adapters = list(model.active_adapters) if has_adapters(model) else []
    if len(adapters) != 1:
        raise ValueError(f"the active adapters are {adapters}: an engine can be sent exactly one")
    for name, layer in layers(model).items():
        if adapters[0] in getattr(layer, "lora_magnitude_vector", {}) or adapters[0] in layer.lora_embedding_A:
            raise ValueError(f"{name}: only plain LoRA of linear layers can be merged, or sent, to an engine")
    return str(adapters[0])


def layers(model: Any) -> dict[str, Any]:
    """The layers that have LoRA matrices."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def merged(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Base weights plus the active adapter's ``scaling * B @ A``, under the names that they have without PEFT."""
    adapter, wrapped = active_adapter(model), layers(model)
    weights: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for name, tensor in tensors:
        where, part = _split(name, wrapped)
        if not where:
            if ".original_module." not in name:
                yield name.replace(f".modules_to_save.{adapter}.", "."), tensor
        elif part == "base_layer.weight" and adapter in wrapped[where].lora_A:
            weights[where] = tensor.clone()
        elif part.startswith("base_layer."):
            yield f"{where}.{part.removeprefix('base_layer.')}", tensor
        elif part == f"lora_A.{adapter}.weight":
            inputs[where] = tensor.clone()
        elif part == f"lora_B.{adapter}.weight":
            layer, weight = wrapped[where], weights.pop(where)
            delta = (tensor.float() @ inputs.pop(where).float()) * layer.scaling[adapter]
            yield f"{where}.weight", (weight.float() + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)


def without(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Base weights under the names that they have without PEFT; the adapter is left out."""
    wrapped = layers(model)
    for name, tensor in tensors:
        where, part = _split(name, wrapped)
        if not where:
            yield name, tensor
        elif part.startswith("base_layer."):
            yield f"{where}.{part.removeprefix('base_layer.')}", tensor


def matrices(model: Any) -> dict[str, str]:
    """Names of the active adapter's matrices among the model's parameters, and in PEFT's own files.

    Raises:
        ValueError: the model trains something else than LoRA matrices.
    """
    adapter, names = active_adapter(model), {}
    for name, parameter in model.named_parameters():
        if name.endswith((f".lora_A.{adapter}.weight", f".lora_B.{adapter}.weight")):
            names[name] = name.removesuffix(f".{adapter}.weight") + ".weight"
        elif parameter.requires_grad:
            raise ValueError(f"{name} is trained, but an adapter holds LoRA matrices only: use lora='merged'")
    return names


def _split(name: str, wrapped: Iterable[str]) -> tuple[str, str]:
    """The LoRA layer that a parameter belongs to, if any, and the rest of its name."""
    where = next((layer for layer in wrapped if name.startswith(f"{layer}.")), "")
    return where, name[len(where) + 1 :]
