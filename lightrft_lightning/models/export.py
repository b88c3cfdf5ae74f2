"""Trained models as Hugging Face folders that `from_pretrained` and vLLM open."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightrft_lightning._errors import import_extra
from lightrft_lightning.models.quantized import dequantized, is_quantized, plain_config


def hugging_face_part(model: nn.Module) -> Any:
    """The Hugging Face or PEFT model that `model` is, or holds as its attribute ``model``.

    Raises:
        TypeError: it is none and holds none.
    """
    inner: Any = model if hasattr(model, "save_pretrained") else getattr(model, "model", None)
    if not hasattr(inner, "save_pretrained"):
        raise TypeError(
            f"save_model() writes Hugging Face models, {type(model).__name__} is none and holds none as `.model`. "
            "Use save_ckpt() for other modules"
        )
    return inner


def save_pretrained(model: nn.Module, tokenizer: Any, output_dir: Path, *, merge_lora: bool = True) -> None:
    """Write the Hugging Face part of `model`, whose parameters must be whole, and the tokenizer."""
    inner = hugging_face_part(model)
    if merge_lora and hasattr(inner, "merge_and_unload"):
        # A copy, as training goes on with the adapters; of full precision, as four bits would round them away.
        inner = _unquantized(inner) if is_quantized(inner) else copy.deepcopy(inner)
        inner = inner.merge_and_unload()
    inner.save_pretrained(output_dir, safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(output_dir)


def _unquantized(inner: Any) -> Any:
    return whole_copy(inner, {name: t.detach() for name, t in dequantized(inner, inner.named_parameters())})


def save_without_weights(model: Any, tokenizer: Any, folder: str) -> None:
    """What an engine needs to build a model but for its weights: configuration, tokenizer, the tokens that end."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = plain_config(inner.config)
    config.architectures = config.architectures or [_unsharded_class(inner).__name__]  # unset until a model is saved
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if getattr(inner, "generation_config", None) is not None:
        inner.generation_config.save_pretrained(folder)


def on_meta(inner: Any) -> Any:
    """A model like `inner` without PEFT and without memory for its parameters.

    Raises:
        ValueError: the class cannot be built from the config that the model has.
    """
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    try:
        with torch.device("meta"):
            made: Any = _unsharded_class(base)(plain_config(base.config))
    except Exception as err:
        raise ValueError(f"no {type(base).__name__} can be built from the model's config: {err}") from err
    made.generation_config = getattr(base, "generation_config", None)
    return made


def whole_copy(inner: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    """A plain model in CPU memory like the sharded one `inner`.

    Args:
        inner: a Hugging Face or PEFT model, whatever state its own parameters are in.
        weights: its whole parameters by name; the copy takes them over.
    """
    made = on_meta(inner)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if base is not inner:
        made = _with_adapters(made, inner)
    buffers = {n: b.detach().cpu() for n, b in inner.named_buffers() if n in made.state_dict()}
    made.load_state_dict({**buffers, **weights}, strict=False, assign=True)
    (made.get_base_model() if base is not inner else made).tie_weights()
    if left := [name for name, value in made.state_dict().items() if value.is_meta]:
        raise ValueError(f"no value for {len(left)} tensors of {type(made).__name__}, e.g. {left[0]!r}")
    return made


def _with_adapters(base: Any, inner: Any) -> Any:
    peft = import_extra("peft", "hf")
    names = list(inner.peft_config)
    with torch.device("meta"):
        made = peft.get_peft_model(base, inner.peft_config[names[0]], adapter_name=names[0])
        for name in names[1:]:
            made.add_adapter(name, inner.peft_config[name])
    made.set_adapter(inner.active_adapter)
    return made


def _unsharded_class(model: nn.Module) -> type[nn.Module]:
    """The class that `fully_shard` replaced by a subclass."""
    from torch.distributed.fsdp import FSDPModule

    return next(c for c in type(model).__mro__ if issubclass(c, nn.Module) and not issubclass(c, FSDPModule))
