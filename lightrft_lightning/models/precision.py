"""The precision of trained weights: float32. In 16 bits the steps of the usual learning rates are rounded away."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightrft_lightning._errors import import_extra

LOW = (torch.bfloat16, torch.float16)
"""A weight in bfloat16 changes by 0.4 % or not at all; AdamW's step is about the learning rate."""


def train_in_float32(model: nn.Module) -> None:
    """Turn trained weights of 16 bits into float32 in place, before there is an optimizer, and say so.

    Frozen weights turn with them, except under adapters, which compute with both.

    Raises:
        ValueError: they are sharded already.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.dtype in LOW and not _is_deepspeeds(p)]
    if not trained:
        return
    dtype, name = str(trained[0].dtype).removeprefix("torch."), type(model).__name__
    if any(isinstance(p, DTensor) for p in trained):
        raise ValueError(
            f"the weights of {name} are in {dtype}, where small steps are rounded away, and sharded already: load it "
            "with dtype=torch.float32"
        )
    adapters = {id(p) for p in _adapter_parameters(model)}
    alone = all(id(p) in adapters for p in trained)
    for tensor in trained if alone else [*model.parameters(), *model.buffers()]:
        if tensor.dtype in LOW:
            tensor.data = tensor.data.float()
    what = "adapters" if alone else "weights"
    rank_zero_info(
        f"{name} came in {dtype}, where the steps of training are rounded away: its {what} are float32 now. To compute "
        "in 16 bits with them: Trainer(precision='bf16-mixed')"
    )


def _is_deepspeeds(parameter: Tensor) -> bool:
    """Whether an engine of DeepSpeed has it, which keeps float32 weights beside those of 16 bits."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _adapter_parameters(model: Any) -> list[Tensor]:
    """Those of PEFT's layers, which give them their input in their own dtype."""
    if not any(hasattr(module, "peft_config") for module in model.modules()):
        return []
    kind = import_extra("peft.tuners.tuners_utils", "hf").BaseTunerLayer
    layers = [module for module in model.modules() if isinstance(module, kind)]
    parts = [getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names]
    return [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()] + [
        part for part in parts if isinstance(part, Tensor)
    ]
