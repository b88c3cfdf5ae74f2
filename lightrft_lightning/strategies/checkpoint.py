"""Checkpoints on disk: torch DCP for tensors, a manifest that tells what they are, complete or not there at all.

Layout of one checkpoint::

    <tag>/manifest.json     format, versions, strategy, world size, step, size and CRC-32 of every other file
    <tag>/extra.pt          scheduler, optimizer hyper-parameters, random state, the caller's own state
    <tag>/.metadata, *.distcp   model and optimizer tensors (torch.distributed.checkpoint)
    latest                  the newest complete tag

Optimizer state is stored under parameter names, not positions, so that it does not depend on the back end.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import random
import shutil
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

MANIFEST = "manifest.json"
FORMAT = "lightrft_lightning/1"
_TEMPORARY = ".lightrft-tmp"
_ASIDE = ".lightrft-old"


class CheckpointError(RuntimeError):
    """A checkpoint that is incomplete, damaged or of another model, or that could not be written."""


@dataclass
class TrainingState:
    """What goes into a checkpoint; `load` fills the last two fields."""

    model: nn.Module
    optimizer: Optimizer | None = None
    scheduler: Any = None
    client_state: dict[str, Any] = field(default_factory=dict)
    step: int = 0


# -------------------------------------------------------------------- writing


def save(
    state: TrainingState, save_dir: Path, tag: str, *, strategy: str, world_size: int, save_latest: bool = True
) -> Path:
    """Write `state` as ``save_dir/tag`` and return that path.

    Everything goes into a temporary folder, is flushed to the disk and renamed, so a reader never sees half of it.

    Raises:
        ValueError: a tag that is no file name, or a client state that could not be read back.
        CheckpointError: it could not be written; what was there before is untouched.
    """
    if not tag.strip() or tag != Path(tag).name or tag != tag.strip() or tag.startswith(".") or tag == "latest":
        raise ValueError(f"tag={tag!r}: must be a plain folder name")
    tensors, extra = _split(state)
    payload = _serialise(extra)
    save_dir.mkdir(parents=True, exist_ok=True)
    temporary, final = save_dir / f".{tag}{_TEMPORARY}", save_dir / tag
    _put_back(save_dir)
    if final.exists() and not is_checkpoint(final):
        raise ValueError(f"{final} exists and is not a checkpoint of this package: choose another tag or folder")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(tensors, checkpoint_id=temporary, no_dist=True)
        (temporary / "extra.pt").write_bytes(payload)
        _write_manifest(temporary, strategy=strategy, world_size=world_size, step=state.step, model=state.model)
        _flush(temporary)
    except (OSError, dcp.CheckpointException) as err:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{final} could not be written: {_reason(err)}") from err
    _replace(temporary, final)
    if save_latest:
        pointer = save_dir / f".latest{_TEMPORARY}"
        pointer.write_text(tag)
        _flush_file(pointer)
        pointer.replace(save_dir / "latest")
    _flush_file(save_dir)
    return final


def _split(state: TrainingState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as a flat dict of tensors, and all the rest."""
    weights = state.model.state_dict()
    tensors = {f"model.{name}": value for name, value in weights.items() if isinstance(value, Tensor)}
    extra: dict[str, Any] = {"client_state": state.client_state, "rng": rng_state(), "step": state.step}
    extra["model"] = {name: value for name, value in weights.items() if not isinstance(value, Tensor)}
    if state.scheduler is not None:
        extra["scheduler"] = state.scheduler.state_dict()
    if state.optimizer is not None:
        names = _parameter_names(state.model, state.optimizer)
        scalars: dict[str, Any] = {}
        for parameter, values in state.optimizer.state.items():
            for key, value in values.items():
                target = tensors if isinstance(value, Tensor) else scalars
                target[f"optimizer.{names[parameter]}.{key}"] = value
        extra["optimizer"] = {"scalars": scalars, "groups": _group_settings(state.optimizer, names)}
    return tensors, extra


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in "
                    f"{type(model).__name__}: pass the model that it was created for"
                )
    return names


def _group_settings(optimizer: Optimizer, names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
    return [
        {**{k: v for k, v in group.items() if k != "params"}, "params": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]


def _serialise(extra: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(extra, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as err:  # what pickle raises depends on the object
        raise ValueError(
            "client_state (or the scheduler's state) holds an object that cannot be read back safely; "
            f"use plain containers, numbers, strings and tensors. {str(err).splitlines()[0]}"
        ) from err
    return buffer.getvalue()


def _write_manifest(folder: Path, *, strategy: str, world_size: int, step: int, model: nn.Module) -> None:
    from lightrft_lightning import __version__

    files = {p.name: {"bytes": p.stat().st_size, "crc32": _crc32(p)} for p in sorted(folder.iterdir())}
    manifest = {
        "format": FORMAT,
        "versions": {"lightrft_lightning": __version__, "torch": torch.__version__},
        "strategy": strategy,
        "world_size": world_size,
        "step": step,
        "model": type(model).__name__,
        "saved_at": time.time_ns(),
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        _flush_file(path)
    _flush_file(folder)


def _flush_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(temporary: Path, final: Path) -> None:
    """Rename; an older checkpoint of the same tag is moved aside first and removed last."""
    if not final.exists():
        temporary.rename(final)
        return
    old = _aside(final)
    shutil.rmtree(old, ignore_errors=True)
    final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old)


def _aside(final: Path) -> Path:
    """Where `_replace` keeps the older checkpoint until the new one is in place."""
    return final.with_name(f".{final.name}{_ASIDE}")


def _put_back(save_dir: Path) -> None:
    """Undo the first half of `_replace` where a process was killed in the middle."""
    for old in save_dir.glob(f".*{_ASIDE}"):
        final = save_dir / old.name[1 : -len(_ASIDE)]
        if not final.exists():
            old.rename(final)


def rotate(save_dir: Path, *, keep: Path, max_num: int, max_bytes: float) -> None:
    """Remove this package's oldest checkpoints in `save_dir` until both limits hold; `keep` always stays."""
    for leftover in [*save_dir.glob(f".*{_TEMPORARY}"), *save_dir.glob(f".*{_ASIDE}")]:
        leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
    # A link to a checkpoint (say, "best") is the user's.
    ours = [p for p in save_dir.iterdir() if is_checkpoint(p) and not p.is_symlink()]
    removable = sorted((p for p in ours if p != keep), key=lambda p: _manifest(p).get("saved_at", 0))
    while removable and (len(removable) + 1 > max_num or _folder_bytes(save_dir) > max_bytes):
        victim = removable.pop(0)
        hidden = victim.with_name(f".{victim.name}{_TEMPORARY}")
        victim.rename(hidden)
        shutil.rmtree(hidden)


def _folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder that this package wrote."""
    return (path / MANIFEST).is_file() and str(_manifest(path).get("format", "")).startswith("lightrft_lightning/")


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


# -------------------------------------------------------------------- reading


def find(load_dir: Path, tag: str | None) -> Path:
    """The checkpoint called `tag`, by default the one that ``latest`` names.

    Raises:
        FileNotFoundError: there is none; the message lists those there are.
        CheckpointError: there is one whose manifest is missing or damaged.
    """
    if tag is None and is_checkpoint(load_dir):
        return load_dir
    latest = load_dir / "latest"
    name = tag or (latest.read_text().strip() if latest.is_file() else None)
    path = load_dir / (name or "")
    for candidate in (path, _aside(path)) if name else ():
        if is_checkpoint(candidate):
            return candidate
    if (path / "extra.pt").is_file() or (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is incomplete or damaged: no readable {MANIFEST} of this package")
    there = sorted(p.name for p in load_dir.iterdir() if is_checkpoint(p)) if load_dir.is_dir() else []
    wanted = f"checkpoint {name!r}" if name else "file 'latest'"
    raise FileNotFoundError(f"no {wanted} in {load_dir}; checkpoints there: {', '.join(there) or '(none)'}")


def load(state: TrainingState, path: Path, *, strict: bool = True, restore_rng: bool = True) -> None:
    """Read the checkpoint at `path` into `state`'s model, optimizer and scheduler, where these are given.

    Raises:
        CheckpointError: a file is missing or damaged, or the checkpoint is of another model. Nothing is changed then.
    """
    _verify_files(path)
    with readable(path):
        extra = torch.load(path / "extra.pt", map_location="cpu", weights_only=True)
        saved = _load_tensors(path)
    weights = {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")} | extra["model"]
    check_same_model(state.model.state_dict(), weights, path, strict)
    optimizer_state = None
    if state.optimizer is not None:
        optimizer_state = _optimizer_state(state.model, state.optimizer, saved, extra, path)
    if state.scheduler is not None and "scheduler" not in extra:
        raise CheckpointError(f"{path} holds no scheduler: pass load_lr_scheduler_states=False")
    state.model.load_state_dict(weights, strict=strict)
    if state.optimizer is not None and optimizer_state is not None:
        state.optimizer.load_state_dict(optimizer_state)
    if state.scheduler is not None:
        state.scheduler.load_state_dict(extra["scheduler"])
    if restore_rng:
        set_rng_state(extra["rng"])
    state.client_state, state.step = extra["client_state"], extra["step"]


def _verify_files(path: Path) -> None:
    files = _manifest(path).get("files")
    if not isinstance(files, dict) or not all({"bytes", "crc32"} <= set(entry) for entry in files.values()):
        raise CheckpointError(f"{path} is damaged: {MANIFEST} does not list its files")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is incomplete: {name} is missing")
        if file.stat().st_size != expected["bytes"] or _crc32(file) != expected["crc32"]:
            raise CheckpointError(f"{path} is damaged: {name} is not the file that was written")


def _load_tensors(path: Path) -> dict[str, Tensor]:
    with (path / ".metadata").open("rb") as file:
        _MetadataUnpickler(file).load()
    reader = dcp.FileSystemReader(path)
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(m.size, dtype=m.properties.dtype)
        for name, m in metadata.items()
        if isinstance(m, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


class _MetadataUnpickler(pickle.Unpickler):
    """Accepts what DCP's metadata file consists of and nothing else: DCP itself would run any code in it."""

    _ALLOWED = {
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath", "WindowsPath"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if not plain and name not in self._ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f".metadata refers to {module}.{name}, which no checkpoint of tensors does")
        return super().find_class(module, name)


def _optimizer_state(
    model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Tensor], extra: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """The optimizer's `state_dict`, its parameters found by name."""
    if "optimizer" not in extra:
        raise CheckpointError(f"{path} holds no optimizer: pass load_optimizer_states=False")
    names = _parameter_names(model, optimizer)
    settings = {n: {**g, "params": None} for g in extra["optimizer"]["groups"] for n in g["params"]}
    values: dict[str, dict[str, Any]] = {}
    for key, value in [*saved.items(), *extra["optimizer"]["scalars"].items()]:
        if key.startswith("optimizer."):
            name, _, field_name = key.removeprefix("optimizer.").rpartition(".")
            values.setdefault(name, {})[field_name] = value
    groups, state, position = [], {}, 0
    for group in optimizer.param_groups:
        members = [names[p] for p in group["params"]]
        if missing := [n for n in members if n not in settings]:
            raise CheckpointError(
                f"{path}: its optimizer does not hold the parameter {missing[0]!r}: pass load_optimizer_states=False"
            )
        _check_same_kind(group, settings[members[0]], path)
        indices = range(position, position + len(members))
        groups.append({**settings[members[0]], "params": list(indices)})
        state.update({i: values[n] for i, n in zip(indices, members, strict=True) if n in values})
        position += len(members)
    return {"state": state, "param_groups": groups}


def _check_same_kind(group: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> None:
    """Refuse another kind of optimizer: each has settings that the other lacks (a newer torch only adds some)."""
    ignored = {"params", "initial_lr"}  # the second one comes from a scheduler
    here, there = set(group) - set(saved) - ignored, set(saved) - set(group) - ignored
    if here and there:
        raise CheckpointError(
            f"{path} is of another kind of optimizer: with {min(there)!r}, without {min(here)!r}. "
            "Pass load_optimizer_states=False"
        )


def check_same_model(current: Mapping[str, Tensor], saved: Mapping[str, Tensor], where: Any, strict: bool) -> None:
    """Raise `CheckpointError` with the first difference if `saved` is not of the model that `current` is of."""
    for name, value in saved.items():
        here = current.get(name)
        if isinstance(here, Tensor) and isinstance(value, Tensor) and here.shape != value.shape:
            raise CheckpointError(
                f"{where} is of another model: {name} has shape {tuple(value.shape)} there and {tuple(here.shape)} here"
            )
    if not strict:
        return
    for name in current:
        if name not in saved:
            raise CheckpointError(f"{where} is of another model: it has no {name}")
    for name in saved:
        if name not in current:
            raise CheckpointError(f"{where} is of another model: {name} does not exist here")


@contextlib.contextmanager
def readable(path: Any) -> Iterator[None]:
    """Turn what torch raises on a damaged file, which may be anything, into a `CheckpointError` that names it."""
    try:
        yield
    except (CheckpointError, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (Exception, dcp.CheckpointException) as err:
        raise CheckpointError(f"{path} is incomplete, damaged or not safe to read: {_reason(err)}") from err


def _reason(err: BaseException) -> str:
    """One line; DCP wraps what went wrong in an exception that is no `Exception` and says little."""
    if isinstance(err, dcp.CheckpointException) and err.failures:
        err = next(iter(err.failures.values()))[0]
    return " ".join([type(err).__name__, *str(err).splitlines()[:1]])


# -------------------------------------------------------------------- random state, export


def rng_state() -> dict[str, Any]:
    """State of every random generator, as plain values that `torch.load(weights_only=True)` reads."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    import numpy

    kind, keys, *rest = numpy.random.get_state()
    state["numpy"] = (str(kind), [int(k) for k in keys], *rest)  # type: ignore[union-attr]
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Undo `rng_state`. CUDA states are left out where the number of devices is another one."""
    import numpy

    random.setstate(_tuples(state["python"]))
    torch.set_rng_state(state["torch"])
    numpy.random.set_state(state["numpy"])
    if len(state.get("cuda", ())) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def save_pretrained(model: nn.Module, tokenizer: Any, output_dir: Path, *, merge_lora: bool = True) -> None:
    """Write the Hugging Face model inside `model` (itself, or its attribute ``model``) and the tokenizer."""
    inner: Any = model if hasattr(model, "save_pretrained") else getattr(model, "model", None)
    if not hasattr(inner, "save_pretrained"):
        raise TypeError(
            f"save_model() writes Hugging Face models, {type(model).__name__} is none and holds none as `.model`. "
            "Use save_ckpt() for other modules"
        )
    if merge_lora and hasattr(inner, "merge_and_unload"):
        inner = copy.deepcopy(inner).merge_and_unload()  # a copy: training goes on with the adapters
    inner.save_pretrained(output_dir, safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(output_dir)
