"""Models larger than one device under ZeRO-3: built without memory, read and cut up one parameter at a time."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrft_lightning._errors import import_extra
from lightrft_lightning.models.streaming import _aliases, _fill, safetensors_files
from lightrft_lightning.strategies._zero import Piece, forget_other_groups, is_low

log = logging.getLogger(__name__)


class Streamed(NamedTuple):
    """What `stream_in` leaves for the engine."""

    exact: dict[str, Piece]
    """fp32 values of this rank's parts, if the parameters themselves are of 16 bits."""
    attributes: dict[Tensor, set[str]]
    """What each parameter had before ZeRO added to it."""


def has_meta(model: nn.Module) -> bool:
    """Whether `model` was built without memory."""
    return any(p.is_meta for p in model.parameters())


def stream_in(deepspeed: Any, model: nn.Module, config: Mapping[str, Any], device: torch.device) -> Streamed:
    """Give a model built without memory its weights, sharded; no rank holds more than one of them whole.

    The parameters stay the same objects.

    Raises:
        ValueError: a part of it comes from no local folder, or the folder lacks a parameter.
    """
    forget_other_groups(deepspeed, config)
    exact: dict[str, Piece] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    attributes: dict[Tensor, set[str]] = {p: set(vars(p)) for p in model.parameters()}
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((low[key] for key in low if config[key]["enabled"]), None)
    for parameter, full in _weights(model, device):
        if dtype is not None:
            exact[names[id(parameter)]] = Piece(0, full.detach().float().cpu().flatten())
            full.data = full.data.to(dtype)
        torch.utils.swap_tensors(parameter, full)
        holder = nn.Module()
        holder.register_parameter("parameter", parameter)
        deepspeed.zero.Init(module=holder, config_dict_or_path=dict(config))
        if dtype is not None:
            exact[names[id(parameter)]] = _own_part(parameter, exact[names[id(parameter)]])
    return Streamed(exact if is_low(config) else {}, attributes)


def _weights(model: nn.Module, device: torch.device) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    safe_open = import_extra("safetensors", "hf").safe_open
    for part, folder in _sources(model):
        files = safetensors_files(folder)
        for parameter, names in _aliases(part).items():
            if not parameter.is_meta:
                continue
            assert isinstance(parameter, nn.Parameter)
            name = next((n for n in names if n in files), None)
            if name is None:
                raise ValueError(f"{folder} holds no weights for the parameter {names[0]!r}")
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            full = nn.Parameter(empty, parameter.requires_grad)
            with safe_open(files[name], framework="pt") as file:
                _fill(full, file.get_slice(name), f"{files[name]}: {name}")
            yield parameter, full
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left:
        raise ValueError(
            f"{type(model).__name__} was built without weights (meta_init=True), and no local folder is known to read "
            f"{left[0]!r} from: build it with load_model(<folder>), or outside of init_model_context(meta_init=True)"
        )


def _sources(model: nn.Module) -> Iterator[tuple[nn.Module, Path]]:
    """The largest submodules whose config says which folder they come from."""
    source = getattr(model, "name_or_path", "")
    if isinstance(source, str) and source and Path(source).is_dir():
        yield model, Path(source)
        return
    for child in model.children():
        yield from _sources(child)


def _own_part(parameter: Any, whole: Piece) -> Piece:
    offset = parameter.ds_zero_partition_rank * parameter.ds_tensor.ds_numel
    return Piece(offset, whole.values[offset : offset + parameter.ds_tensor.ds_numel].clone())


def cpu_adam(deepspeed: Any, optimizer: Optimizer) -> Optimizer:
    """DeepSpeed's CPU Adam with the groups of an AdamW; that itself where it cannot be compiled."""
    try:
        made: Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
            [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in optimizer.param_groups],
            lr=optimizer.defaults["lr"], betas=optimizer.defaults["betas"], eps=optimizer.defaults["eps"],
            adamw_mode=True,
        )  # fmt: skip
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as err:
        log.warning("DeepSpeed's CPU Adam cannot be compiled here, torch's AdamW steps on the CPU instead: %s", err)
        return optimizer
    return made
