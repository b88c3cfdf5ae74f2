"""Models larger than one device: built without memory, sharded, then filled from safetensors shard by shard."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightrft_lightning._errors import import_extra
from lightrft_lightning.checkpoints.files import plain_name

_register_parameter = nn.Module.register_parameter
_active = False


@contextlib.contextmanager
def parameters_on_meta(enabled: bool = True) -> Iterator[None]:
    """Modules built inside have their parameters on the meta device; buffers are real.

    Buffers because the tables of rotary embeddings are in no checkpoint.

    Args:
        enabled: False suspends an outer context.
    """
    global _active
    before, _active = _active, enabled
    nn.Module.register_parameter = _register_on_meta if enabled else _register_parameter  # type: ignore
    try:
        yield
    finally:
        _active = before
        nn.Module.register_parameter = _register_on_meta if before else _register_parameter  # type: ignore


def building_on_meta() -> bool:
    """Whether `parameters_on_meta` is in effect."""
    return _active


def _register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    if parameter is not None and not parameter.is_meta:
        parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    _register_parameter(module, name, parameter)


def safetensors_files(folder: Path) -> dict[str, Path]:
    """Which file of a Hugging Face folder holds which tensor; empty if it has no safetensors files."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        named = json.loads(index.read_text())["weight_map"]
        return {name: plain_name(folder, file) for name, file in named.items()}
    if not single.is_file():
        return {}
    with import_extra("safetensors", "hf").safe_open(single, framework="pt") as file:
        return {name: single for name in file.keys()}  # noqa: SIM118


def can_stream(model: nn.Module, folder: Path) -> bool:
    """Whether the files hold every parameter under the name that it has in `model` (no conversion is needed)."""
    files = safetensors_files(folder)
    return bool(files) and all(any(alias in files for alias in names) for names in _aliases(model).values())


def check_shapes(model: nn.Module, folder: Path) -> None:
    """Refuse weights of other shapes than the model's, before it takes memory.

    Raises:
        ValueError: the message names the first one.
    """
    safe_open = import_extra("safetensors", "hf").safe_open
    files = safetensors_files(folder)
    with contextlib.ExitStack() as opened:
        content = {file: opened.enter_context(safe_open(file, framework="pt")) for file in set(files.values())}
        for parameter, names in _aliases(model).items():
            for name in (n for n in names if n in files):
                shape = tuple(content[files[name]].get_slice(name).get_shape())
                if shape != tuple(parameter.shape):
                    raise ValueError(
                        f"{files[name]}: {name} has shape {shape}, by config.json it is {tuple(parameter.shape)}"
                    )


def fill_from_folder(model: nn.Module, folder: Path) -> None:
    """Read into each parameter the part of it that this process holds, straight from the files.

    Args:
        model: its parameters are tensors or sharded `DTensor`s, allocated.
        folder: a Hugging Face folder with safetensors files.

    Raises:
        ValueError: the files lack a parameter, or hold it with another shape.
    """
    safe_open = import_extra("safetensors", "hf").safe_open
    files = safetensors_files(folder)
    wanted: dict[Path, list[tuple[str, Tensor]]] = {}
    for parameter, names in _aliases(model).items():
        name = next((n for n in names if n in files), None)
        if name is None:
            raise ValueError(f"{folder} holds no weights for the parameter {names[0]!r}")
        wanted.setdefault(files[name], []).append((name, parameter))
    for path, tensors in wanted.items():
        with safe_open(path, framework="pt") as file:
            for name, parameter in tensors:
                _fill(parameter, file.get_slice(name), f"{path}: {name}")


def _aliases(model: nn.Module) -> dict[Tensor, list[str]]:
    """All names of each parameter; tied ones have several."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


@torch.no_grad()
def _fill(parameter: Tensor, stored: Any, where: str) -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if tuple(stored.get_shape()) != tuple(parameter.shape):
        raise ValueError(
            f"{where} has shape {tuple(stored.get_shape())}, the model's parameter {tuple(parameter.shape)}"
        )
    if not isinstance(parameter, DTensor):
        parameter.copy_(stored[:])
        return
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    here = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    if all(shape):
        parameter.to_local().copy_(stored[here])
