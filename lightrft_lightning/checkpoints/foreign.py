"""Weights in the formats that others write, one whole tensor at a time: DeepSpeed's folders, DCP, Hugging Face.

Nothing in these files is run: unknown classes in a pickle become empty objects, so DeepSpeed need not be installed.
Layout of DeepSpeed's files: ``deepspeed/utils/zero_to_fp32.py``.
"""

from __future__ import annotations

import math
import pickle
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightrft_lightning._errors import import_extra
from lightrft_lightning.checkpoints import files, folder, store
from lightrft_lightning.checkpoints.flat import FlatTensor, TensorInfo
from lightrft_lightning.checkpoints.folder import CheckpointError
from lightrft_lightning.checkpoints.store import Stored, StoredState
from lightrft_lightning.models.streaming import safetensors_files


class Source:
    """Weights on disk.

    Attributes:
        path: the folder.
        infos: shape and dtype by name.
        tied: further names of tensors that are in `infos`.
        trained: names of those that an optimizer has a state for, if that is known.
    """

    path: Path
    infos: dict[str, TensorInfo]
    tied: Mapping[str, str] = types.MappingProxyType({})
    trained: frozenset[str] = frozenset()

    def read(self, name: str) -> Tensor:
        """One whole tensor, in CPU memory."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what reading has mapped into memory."""


class OwnFolder(Source):
    """A checkpoint of this package: the tensors whose names begin with `module`, without it."""

    def __init__(self, stored: Stored, module: str = "") -> None:
        self.path, self.stored = stored.path, stored
        self._prefix = f"model.{module}." if module else "model."
        names = [name for name in stored.tensors if name.startswith(self._prefix)]
        self.infos = {name.removeprefix(self._prefix): stored.tensors[name] for name in names}
        stepped = f"optimizer.{self._prefix.removeprefix('model.')}"
        moments = {name.removeprefix(stepped).rpartition(".")[0] for name in stored.tensors if name.startswith(stepped)}
        self.trained = frozenset(moments & self.infos.keys())
        inside = f"{module}." if module else ""
        self.tied = {
            alias.removeprefix(inside): name.removeprefix(inside)
            for alias, name in stored.manifest["tied"].items()
            if alias.startswith(inside) and name.startswith(inside)
        }

    def read(self, name: str) -> Tensor:
        return self.stored.read(self._prefix + name)


class HuggingFaceFolder(Source):
    """A folder of safetensors files."""

    def __init__(self, path: Path) -> None:
        self.path, self._files, self._open = path, safetensors_files(path), {}  # type: ignore[var-annotated]
        for name in {"model.safetensors.index.json", *(file.name for file in self._files.values())}:
            files.plain_file(path, name)
        self.infos = {}
        for name in self._files:
            part = self._file(name).get_slice(name)
            self.infos[name] = TensorInfo(tuple(part.get_shape()), _SAFETENSORS_DTYPES[part.get_dtype()])

    def _file(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._open:
            safe_open = import_extra("safetensors", "hf").safe_open
            self._open[path] = store.readable(path, lambda: safe_open(path, framework="pt"))
        return self._open[path]

    def read(self, name: str) -> Tensor:
        return self._file(name).get_tensor(name)

    def close(self) -> None:
        self._open.clear()


_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class DcpFolder(Source):
    """Torch's distributed checkpoint of a model's state dict, as upstream LightRFT's FSDP strategy writes it."""

    def __init__(self, path: Path) -> None:
        from lightrft_lightning.checkpoints import _dcp

        self.path = path
        self._metadata = store.readable(path, lambda: _dcp.read_metadata(path))
        self.infos = _dcp.tensor_infos(self._metadata)

    def read(self, name: str) -> Tensor:
        from lightrft_lightning.checkpoints import _dcp

        return store.readable(self.path, lambda: _dcp.read_whole(name, self.infos[name], self.path, self._metadata))


class DeepSpeedFolder(Source):
    """What ``engine.save_checkpoint`` writes at any ZeRO stage: the fp32 master weights, or the weights themselves."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if list(path.glob("*mp_rank_01_*")):
            raise CheckpointError(f"{path} was written with tensor parallelism, which is not supported here")
        self._models = [_load(file) for file in _by_rank(path.glob("*_model_states.pt"))]
        self._optimizers = [_load(file)["optimizer_state_dict"] for file in _by_rank(path.glob("*_optim_states.pt"))]
        first = self._models[0]
        if self._optimizers and "zero_stage" not in self._optimizers[0]:
            self._optimizers = []  # without ZeRO: the weights are whole
        # Its number is in the file as an object of a class of DeepSpeed's.
        self._stage = 0 if not self._optimizers else 3 if "fp32_flat_groups" in self._optimizers[0] else 2
        self._check_complete()
        self._where: dict[str, tuple[int, int]] = {}
        whole = {n: t for n, t in first["module"].items() if isinstance(t, Tensor)}
        if self._stage:
            self._locate(first["param_shapes"])
            whole = {n: whole[n] for n in first["buffer_names"] if n in whole}
            if self._stage < 3:
                whole |= first.get("frozen_param_fragments") or {}
        self._whole = whole
        frozen = (first.get("frozen_param_shapes") or {}) if self._stage == 3 else {}
        self._frozen = {name: tuple(shape) for name, shape in frozen.items()}
        self.tied = dict(first.get("shared_params") or {})
        self.infos = {
            **{name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in whole.items()},
            **{name: TensorInfo(shape, first_dtype(first, name)) for name, shape in self._frozen.items()},
            **{name: TensorInfo(self._shapes[name], torch.float32) for name in self._where},
        }

    _shapes: dict[str, tuple[int, ...]]

    def _check_complete(self) -> None:
        for state in self._optimizers:
            count = state["partition_count"]
            count = max(count) if isinstance(count, list) else count
            if count != len(self._optimizers):
                raise CheckpointError(
                    f"{self.path} is incomplete: files of {len(self._optimizers)} ranks, written by {count}"
                )

    def _locate(self, groups: list[Mapping[str, Any]]) -> None:
        """Where in the flat groups each parameter begins."""
        self._shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        paddings = self._optimizers[0].get("param_alignment_paddings")
        offset = 0
        for number, group in enumerate(groups):
            if self._stage < 3:
                offset = 0
            for position, (name, shape) in enumerate(group.items()):
                self._where[name] = (number, offset)
                numel = math.prod(shape)
                offset += numel if self._stage < 3 else math.ceil(numel / len(self._optimizers))
                if self._stage < 3 and paddings is not None:
                    offset += paddings[number][position]

    def read(self, name: str) -> Tensor:
        if name in self._whole:
            return self._whole[name].clone()
        if name in self._frozen:
            shape = self._frozen[name]
            row = torch.cat([model["frozen_param_fragments"][name].view(-1) for model in self._models])
            return row[: math.prod(shape)].view(shape)
        shape, (group, offset) = self._shapes[name], self._where[name]
        numel = math.prod(shape)
        if self._stage < 3:
            parts = [state["single_partition_of_fp32_groups"][group] for state in self._optimizers]
            return _cut(parts, offset, numel, self.path).view(shape)
        share = math.ceil(numel / len(self._optimizers))
        rows = [_cut(state["fp32_flat_groups"], offset, share, self.path) for state in self._optimizers]
        return torch.cat(rows)[:numel].view(shape)

    def close(self) -> None:
        self._models, self._optimizers, self._whole = [], [], {}


def first_dtype(model: Mapping[str, Any], name: str) -> torch.dtype:
    """The dtype of a frozen parameter of a ZeRO-3 checkpoint."""
    return model["frozen_param_fragments"][name].dtype


def _cut(parts: list[Tensor], start: int, length: int, path: Path) -> Tensor:
    """`length` elements from `start` of `parts`, laid end to end."""
    found = []
    wanted = length
    for part in parts:
        piece = part[start : start + wanted] if start < len(part) else part[:0]
        found.append(piece)
        wanted -= len(piece)
        start = max(0, start - len(part))
    if wanted:
        raise CheckpointError(f"{path} is damaged: its partitions are too short")
    return torch.cat(found).float()


def _by_rank(files: Any) -> list[Path]:
    def rank(file: Path) -> int:
        found = re.search(r"zero_pp_rank_(\d+)", file.name)
        return int(found.group(1)) if found else 0

    return sorted(files, key=rank)


def _load(file: Path) -> dict[str, Any]:
    """A file of ``torch.save``, mapped into memory; its classes are left out."""
    own = store.readable(file, lambda: files.plain_file(file.parent, file.name))
    return store.readable(file, lambda: files.load(own, mmap=True, weights_only=False, pickle_module=_PICKLE))


class _Left:
    """In place of an object of a class that is not needed."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Left:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """As an unpickler fills a list."""

    def extend(self, values: Any) -> None:
        """Likewise."""


class _DataUnpickler(pickle.Unpickler):
    """Tensors, containers and numbers; anything else becomes `_Left`, and no code of the file is run."""

    _ALLOWED = {
        "collections": {"OrderedDict", "defaultdict"},
        "builtins": {"set", "frozenset", "dict", "list", "tuple", "int", "float", "bool", "complex", "bytearray"},
        "torch": {"Size", "Tensor", "device"},
        "torch._tensor": {"_rebuild_from_type_v2"},
        "torch._utils": {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"},
        "torch.storage": {"UntypedStorage", "TypedStorage"},
    }

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        storage = name.endswith("Storage") and isinstance(found, type)
        if name in self._ALLOWED.get(module, ()) or isinstance(found, torch.dtype) or storage:
            return super().find_class(module, name)
        return _Left


_PICKLE = types.SimpleNamespace(
    Unpickler=_DataUnpickler, load=lambda file, **how: _DataUnpickler(file, **how).load(), __name__="data only"
)


class ForeignState(StoredState):
    """A `Source` for `load_ckpt`."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._key = {**{name: name for name in source.infos}, **source.tied}

    def tensors(self) -> dict[str, TensorInfo]:
        return {key: self._source.infos[name] for key, name in self._key.items()}

    def read_into(self, targets: Mapping[str, FlatTensor]) -> None:
        for key, target in targets.items():
            target.copy_from(self._source.read(self._key[key]))


# -------------------------------------------------------------------- what is it?


def open_foreign(path: Path, tag: str | None = None) -> Source | None:
    """What others have written at `path`; None if it is nothing known.

    Args:
        path: a checkpoint, or a folder of checkpoints.
        tag: which one of these; default: what ``latest`` names, or the only one.

    Raises:
        CheckpointError: it is damaged.
    """
    for candidate in _candidates(path, tag):
        if list(candidate.glob("*_model_states.pt")):
            return DeepSpeedFolder(candidate)
        if (candidate / ".metadata").is_file() and not folder.is_checkpoint(candidate):
            return DcpFolder(candidate)
        if safetensors_files(candidate):
            return HuggingFaceFolder(candidate)
    return None


def _candidates(path: Path, tag: str | None) -> list[Path]:
    if tag is not None:
        return [path / tag]
    latest = path / "latest"
    if latest.is_file():
        return [path, folder.named_by(latest)]
    # Hidden is what somebody is just writing.
    inside = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")] if path.is_dir() else []
    return [path, *(inside if len(inside) == 1 else ())]
