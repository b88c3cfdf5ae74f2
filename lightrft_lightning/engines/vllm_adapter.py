"""A LoRA policy whose adapter vLLM gets as one, in place of merged weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from lightrft_lightning._errors import import_extra
from lightrft_lightning.engines.weight_sync import digest
from lightrft_lightning.models.lora import active_adapter, layers, matrices
from lightrft_lightning.models.merging import PREFIX

OURS = {"enable_lora", "max_loras", "max_lora_rank", "lora_dtype", "lora_target_modules", "fully_sharded_loras"}
"""Engine arguments that follow from the policy's adapter."""


def engine_arguments(model: Any) -> dict[str, Any]:
    """Engine arguments for the adapter of `model`.

    Raises:
        ValueError: vLLM cannot take it as an adapter.
    """
    if any(".experts." in f"{name}." for name, _ in model.named_modules()):
        raise ValueError("lora='adapter' with a mixture of experts: use lora='merged'")
    matrices(model)  # refuses what an adapter cannot hold
    ranks = get_args(import_extra("vllm.config.lora", "vllm").MaxLoRARanks)
    rank = max(layer.r[active_adapter(model)] for layer in _adapted(model).values())
    if rank > max(ranks):
        raise ValueError(f"LoRA of rank {rank}: vLLM takes adapters up to rank {max(ranks)}, use lora='merged'")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(r for r in ranks if r >= max(rank, 8))}


def _adapted(model: Any) -> dict[str, Any]:
    """Layers that the active adapter is around; others may have one that is not active."""
    name = active_adapter(model)
    return {path: layer for path, layer in layers(model).items() if name in layer.r}


def save(model: Any, tensors: Mapping[str, Tensor], folder: str) -> None:
    """Write an adapter as PEFT would."""
    config = copy.copy(model.peft_config[active_adapter(model)])
    config.init_lora_weights = True  # whatever it began with: base and matrices are sent as they are now
    config.save_pretrained(folder)
    import_extra("safetensors.torch", "hf").save_file(dict(tensors), os.path.join(folder, "adapter_model.safetensors"))


def expected(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, str], dict[str, int]]:
    """What `WeightSyncWorker.lightrft_read_adapter` should answer, and each layer's rank, which it asks for."""
    name = active_adapter(model)
    digests, ranks = {}, {}
    for path, layer in _adapted(model).items():
        a, b = (tensors[f"{path}.lora_{x}.weight"].to(dtype) for x in "AB")
        short = path.removeprefix(PREFIX)
        ranks[short] = a.shape[0]
        digests[f"{short}.lora_A"], digests[f"{short}.lora_B"] = digest(a), digest(b * layer.scaling[name])
    return digests, ranks
