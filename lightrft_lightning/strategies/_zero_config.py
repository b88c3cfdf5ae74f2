"""DeepSpeed's JSON: written from `StrategyConfig`, merged with the user's own keys, contradictions refused.

Source: https://www.deepspeed.ai/docs/config-json/
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightrft_lightning.config import StrategyConfig

Json = dict[str, Any]

AUTO = "auto"
"""In a user's JSON: as the strategy has it, which is also what happens without the key."""

LIGHTNING_KEYWORDS = {
    "offload_parameters": ("zero_optimization.offload_param", lambda on: {"device": "cpu"} if on else {}),
    "sub_group_size": ("zero_optimization.sub_group_size", None),
    "contiguous_gradients": ("zero_optimization.contiguous_gradients", None),
    "allgather_partitions": ("zero_optimization.allgather_partitions", None),
    "reduce_scatter": ("zero_optimization.reduce_scatter", None),
    "allgather_bucket_size": ("zero_optimization.allgather_bucket_size", None),
    "reduce_bucket_size": ("zero_optimization.reduce_bucket_size", None),
}
"""Keywords of Lightning's DeepSpeed strategy that stand for one key of the JSON."""

_BUCKET = 200_000_000
"""Elements that are reduced or gathered at once, at most; a small model needs less memory for its buffers."""


def read_overrides(given: Mapping[str, Any] | str | os.PathLike[str] | None) -> Json:
    """The user's keys, from a mapping or a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return copy.deepcopy(dict(given))
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(f"deepspeed_config={str(given)!r}: no such file")
    try:
        loaded = json.loads(path.read_text())
    except ValueError as err:
        raise ValueError(f"deepspeed_config={str(given)!r} is no JSON: {err}") from err
    if not isinstance(loaded, dict):
        raise ValueError(f"deepspeed_config={str(given)!r}: must hold a JSON object, holds a {type(loaded).__name__}")
    return loaded


def check_settings(config: StrategyConfig, overrides: Json) -> None:
    """Refuse what contradicts itself, as far as it shows before a model and a process group exist.

    Raises:
        ValueError: names both values.
    """
    if config.zpg > 1 and config.zero_stage != 3:
        raise ValueError(f"zpg={config.zpg} with zero_stage={config.zero_stage}: only stage 3 shards the parameters")
    if config.overlap_comm and config.zero_stage == 1:
        raise ValueError(
            "overlap_comm=True with zero_stage=1: stage 1 reduces gradients in the step, after all backward passes, so "
            "there is nothing to overlap. Use zero_stage=2 or leave overlap_comm out"
        )
    if config.grad_accum_dtype == "fp16" and config.bf16 and config.is_set("bf16"):
        raise ValueError("grad_accum_dtype='fp16' with bf16=True: use 'bf16' or 'fp32'")
    for key, field, fixed in _fixed(config):
        value = lookup(overrides, key)
        if value not in (None, AUTO, fixed):
            raise ValueError(
                f"deepspeed_config[{key!r}]={value!r} contradicts the strategy's {field}: set that field, the JSON "
                "follows from it"
            )
    if config.is_set("overlap_comm") and lookup(overrides, "zero_optimization.overlap_comm") not in (
        None, AUTO, config.overlap_comm,
    ):  # fmt: skip
        raise ValueError(
            f"deepspeed_config['zero_optimization.overlap_comm']={not config.overlap_comm} contradicts "
            f"overlap_comm={config.overlap_comm}: set one of them only"
        )
    for kind in ("bf16", "fp16"):
        if lookup(overrides, key := f"{kind}.{kind}_master_weights_and_grads"):
            raise ValueError(
                f"deepspeed_config[{key!r}]=True: trained weights of 16 bits, in which the steps of the usual learning "
                "rates are rounded away. Leave it out; adam_8bit=True or adam_offload=True take less memory too"
            )
    _check_elsewhere(overrides)
    _check_offload(config, overrides)


def _fixed(config: StrategyConfig) -> Iterator[tuple[str, str, Any]]:
    """Keys whose value follows from a field: key, what decides, value."""
    c = config
    yield "zero_optimization.stage", f"zero_stage={c.zero_stage}", c.zero_stage
    yield "zero_optimization.zero_hpz_partition_size", f"zpg={c.zpg}", c.zpg
    yield "gradient_clipping", f"max_norm={c.max_norm}", max(c.max_norm, 0.0)
    yield "train_batch_size", f"train_batch_size={c.train_batch_size}", c.train_batch_size
    yield (
        "train_micro_batch_size_per_gpu",
        f"micro_train_batch_size={c.micro_train_batch_size}",
        c.micro_train_batch_size,
    )
    if c.grad_accum_dtype is not None:
        yield "data_types.grad_accum_dtype", f"grad_accum_dtype={c.grad_accum_dtype!r}", c.grad_accum_dtype


def _check_elsewhere(overrides: Json) -> None:
    """Keys whose matter is settled outside the JSON."""
    elsewhere = {
        "optimizer": "strategy.create_optimizer(model, lr=...), or an optimizer of your own",
        "scheduler": "a torch scheduler, as in prepare((model, optimizer, scheduler))",
        "gradient_accumulation_steps": "train_batch_size and micro_train_batch_size, or the Trainer's "
        "accumulate_grad_batches",
        "managed_gradient_accumulation": "nothing: the strategy decides when to step",
        "bf16.enabled": "the field bf16, or Trainer(precision='bf16-mixed')",
        "fp16.enabled": "the field fp16, or Trainer(precision='16-mixed')",
        "torch_autocast.enabled": "the fields bf16 and fp16, or the Trainer's precision",
        "fp16.loss_scale": "nothing: the loss scale is dynamic and kept in checkpoints",
    }
    if lookup(overrides, "bf16.enabled") is True and lookup(overrides, "fp16.enabled") is True:
        raise ValueError("deepspeed_config has bf16.enabled=True and fp16.enabled=True: one at most")
    for key, instead in elsewhere.items():
        value = lookup(overrides, key)
        if value not in (None, AUTO):
            raise ValueError(f"deepspeed_config[{key!r}]={value!r} is not taken from the JSON; use {instead}")


def _check_offload(config: StrategyConfig, overrides: Json) -> None:
    key = "zero_optimization.offload_optimizer.device"
    device = lookup(overrides, key)
    if device not in (None, AUTO, "none") and not config.adam_offload:
        raise ValueError(f"deepspeed_config[{key!r}]={device!r} with adam_offload=False: set adam_offload=True")
    if device == "none" and config.adam_offload:
        raise ValueError(f"deepspeed_config[{key!r}]='none' contradicts adam_offload=True: set one of them only")
    key = "zero_optimization.offload_param.device"
    device = lookup(overrides, key)
    if device not in (None, AUTO, "none") and config.zero_stage != 3:
        raise ValueError(
            f"deepspeed_config[{key!r}]={device!r} with zero_stage={config.zero_stage}: only stage 3 can keep "
            "parameters elsewhere"
        )


def zero_config(
    config: StrategyConfig, overrides: Json, model: nn.Module, *, dtype: torch.dtype, device: torch.device, ranks: int
) -> Json:
    """The JSON for one model.

    Args:
        config: the strategy's settings, checked by `check_settings`.
        overrides: the user's keys; they win.
        model: decides about the size of buffers.
        dtype: what the model computes in.
        device: where.
        ranks: the world size.
    """
    low = dtype != torch.float32
    if not low and config.grad_accum_dtype not in (None, "fp32"):
        raise ValueError(f"grad_accum_dtype={config.grad_accum_dtype!r} while computing in fp32: set bf16 or fp16 too")
    # In low precision a sum over many backward passes would lose what a single one adds.
    accumulate = config.grad_accum_dtype or "fp32"
    bucket = max(1, min(_BUCKET, sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())))
    zero: Json = {
        "stage": config.zero_stage,
        "overlap_comm": config.overlap_comm,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": 2 * bucket,
    }
    if config.zero_stage < 3:
        # Each rank gets the sum of its own part only; DeepSpeed's default sends half as much again.
        zero["use_multi_rank_bucket_allreduce"] = False
    if config.zpg > 1:
        zero["zero_hpz_partition_size"] = config.zpg
    if config.adam_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    ours: Json = {
        "train_micro_batch_size_per_gpu": config.micro_train_batch_size,
        "train_batch_size": config.micro_train_batch_size * ranks,
        "gradient_accumulation_steps": 1,
        # Every step() is the boundary: how many passes came before may differ from step to step.
        "managed_gradient_accumulation": False,
        "gradient_clipping": max(config.max_norm, 0.0),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # The strategy keeps the scale itself (see `ZeroEngine`), so DeepSpeed's own stays at 1.
        "fp16": {"enabled": dtype == torch.float16, "loss_scale": 1.0},
        "steps_per_print": sys.maxsize,
    }
    if low:
        ours["data_types"] = {"grad_accum_dtype": accumulate}
        ours["communication_data_type"] = accumulate
    user = {k: v for k, v in overrides.items() if k not in ("train_batch_size", "train_micro_batch_size_per_gpu")}
    return _merged(ours, user)


def lookup(tree: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None if there is none."""
    value: Any = tree
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def put(tree: Json, key: str, value: Any) -> None:
    """Set the value at a dotted key."""
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _merged(ours: Json, user: Mapping[str, Any]) -> Json:
    merged = dict(ours)
    for key, value in user.items():
        if isinstance(value, Mapping):
            merged[key] = _merged(merged[key] if isinstance(merged.get(key), dict) else {}, value)
        elif value != AUTO:
            merged[key] = value
    return merged
