"""Base weights in four bits, under LoRA (QLoRA, arXiv 2305.14314), through bitsandbytes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightrft_lightning._errors import import_extra

QUANTIZATIONS = ("nf4",)
"""What `load_model` takes as ``quantization``."""


def quantization_config(quantization: str, device: torch.device) -> Any:
    """What `from_pretrained` takes for weights in four bits and their scales in eight, computed with on `device`."""
    import_extra("bitsandbytes", "bitsandbytes")
    import_extra("accelerate", "bitsandbytes")
    return import_extra("transformers", "hf").BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
    )


def mend(model: nn.Module) -> None:
    """Make a model trainable on a CPU with AVX-512, and let `load_state_dict` read what `state_dict` writes."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # part of a file in memory, all of which would stay there
    for _, layer in _quantized_layers(model):
        # At the first pass in eval mode bitsandbytes would pack weights anew, in a layout through which no gradient
        # flows and which is never undone for training.
        layer.support_avx512bf16_for_cpu = False
    model.register_load_state_dict_pre_hook(_load_scales)


def _load_scales(model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Bitsandbytes writes them beside the weights and does not read them."""
    for name, layer in _quantized_layers(model):
        start = f"{prefix}{name}.weight."
        saved = {key.removeprefix(start): state_dict.pop(key) for key in [*state_dict] if key.startswith(start)}
        if saved:
            layer.weight.quant_state = layer.quant_state = scales(saved, layer.weight.device)


SCALES = ".quant_state.bitsandbytes__"
"""In names of a ``state_dict``: what is before it is the name of weights in four bits."""


def scales(saved: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Any:
    """The ``QuantState`` from what a ``state_dict`` has under the name of the weights."""
    return import_extra("bitsandbytes.functional", "bitsandbytes").QuantState.from_dict(dict(saved), device)


def in_numbers(weights: Tensor, state: Any) -> Tensor:
    """Weights in four bits as numbers, in the dtype that they had before."""
    functional = import_extra("bitsandbytes.functional", "bitsandbytes")
    numbers: Tensor = functional.dequantize_4bit(weights.detach(), state)
    return numbers.to(state.dtype)


def is_quantized(model: nn.Module) -> bool:
    """Whether some of its weights are in four bits."""
    return any(True for _ in _quantized_layers(model))


def _quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        # Not `module.weight`, which PEFT's wrappers compute.
        if getattr(module._parameters.get("weight"), "quant_state", None) is not None:
            yield name, module


def dequantized(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters of `model` by name, those in four bits as numbers again, in the dtype that they had."""
    states = {f"{name}.weight": module.weight.quant_state for name, module in _quantized_layers(model)}
    for name, tensor in tensors:
        if name in states:
            tensor = in_numbers(tensor, states[name])
        yield name, tensor


def plain_config(config: Any) -> Any:
    """A copy of a model's config that says nothing of quantized weights."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
