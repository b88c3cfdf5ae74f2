"""The dictionary that a Lightning `Trainer` saves and resumes from, taken apart into tensors and the rest, and back.

Tensors anywhere in it, those of callbacks too, go into the checkpoint's store; what remains holds their names. On the
way back the large parts are mappings that read a tensor when somebody looks at it.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.core import saving
from lightning.pytorch.core.saving import _load_from_checkpoint, _load_state, load_hparams_from_yaml
from torch import Tensor
from torch.utils._pytree import MappingKey, keystr, tree_map, tree_map_with_path

from lightrft_lightning._find import settings_of_a_checkpoint
from lightrft_lightning.checkpoints import folder, store
from lightrft_lightning.checkpoints.files import check_archive
from lightrft_lightning.checkpoints.flat import FlatTensor
from lightrft_lightning.checkpoints.folder import CheckpointError
from lightrft_lightning.checkpoints.store import Ranks, Stored, StoredState

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO

M = TypeVar("M", bound=pl.LightningModule)

_MARK = "__lightrft_tensor__"


def take_apart(checkpoint: Mapping[str, Any], tied: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, FlatTensor]]:
    """Split a Trainer's checkpoint.

    Args:
        checkpoint: as Lightning and its hooks have made it.
        tied: further names of tied parameters; in state dicts they are stored once.

    Returns:
        The same without tensors, and the tensors by the names that stand in their places.
    """
    tensors: dict[str, FlatTensor] = {}

    def take(path: tuple[Any, ...], value: Any) -> Any:
        if not isinstance(value, Tensor | FlatTensor):
            return value
        name = _name(path, tied, tensors)
        if name not in tensors:
            tensors[name] = value if isinstance(value, FlatTensor) else FlatTensor.of(value)
        return {_MARK: name}

    return tree_map_with_path(take, dict(checkpoint)), tensors


def _name(path: tuple[Any, ...], tied: Mapping[str, str], taken: Mapping[str, Any]) -> str:
    keys: list[Any] = [getattr(entry, "key", getattr(entry, "idx", None)) for entry in path]
    if len(path) == 2 and isinstance(path[1], MappingKey):
        prefix = "model" if keys[0] == "state_dict" else keys[0]
        return f"{prefix}.{tied.get(keys[1], keys[1])}"
    if len(path) == 4 and keys[0] == "optimizer_states" and keys[2] == "state":
        name = f"optimizer.{keys[3]}"
        return name if name not in taken else f"optimizer_{keys[1]}.{keys[3]}"  # two optimizers of one parameter
    return keystr(path)


def put_together(rest: Mapping[str, Any], stored: Stored) -> dict[str, Any]:
    """Undo `take_apart`: state dicts become `StoredState`, tensors elsewhere are read."""
    checkpoint: dict[str, Any] = {}
    for key, value in rest.items():
        if key == "optimizer_states":
            checkpoint[key] = [{**one, "state": _lazy(one["state"], stored)} for one in value]
        elif key == "state_dict" or (isinstance(value, dict) and value and all(map(_is_mark, value.values()))):
            checkpoint[key] = _lazy(value, stored)
        else:
            checkpoint[key] = tree_map(
                lambda leaf: stored.read(leaf[_MARK]) if _is_mark(leaf) else leaf, value, is_leaf=_is_mark
            )
    return checkpoint


def _is_mark(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {_MARK}


def _lazy(state: Mapping[str, Any], stored: Stored) -> StoredState:
    names = {key: value[_MARK] for key, value in state.items() if _is_mark(value)}
    return StoredState(stored, names, {key: value for key, value in state.items() if key not in names})


def tensors_under(prefix: str, stored: Stored, plain: Mapping[str, Any]) -> StoredState:
    """The stored tensors whose names begin with `prefix`, without it, and `plain`."""
    names = {name.removeprefix(prefix): name for name in stored.tensors if name.startswith(prefix)}
    if prefix == "model.":
        names |= {alias: f"model.{name}" for alias, name in stored.manifest["tied"].items()}
    return StoredState(stored, names, plain)


def as_stored(state: Mapping[str, Any]) -> StoredState:
    """`state`, where a hook has replaced it by a plain dict or it comes from one of Lightning's files."""
    return state if isinstance(state, StoredState) else StoredState(values=state)


def by_name(saved: Mapping[str, Any], settings: list[dict[str, Any]]) -> dict[str, Any]:
    """An optimizer's state with names of parameters, where one of Lightning's files has their positions.

    Args:
        saved: as in ``checkpoint["optimizer_states"]``.
        settings: the groups of the optimizer that it is for.
    """
    state, groups = saved["state"], saved["param_groups"]
    if isinstance(state, StoredState):
        return {"state": state, "param_groups": groups}
    here = [name for group in settings for name in group["params"]]
    there = [parameter for group in groups for parameter in group["params"]]
    names = {p: p if isinstance(p, str) else name for p, name in zip(there, here, strict=False)}
    values = {f"{names[p]}.{key}": value for p, of_p in state.items() if p in names for key, value in of_p.items()}
    named = [{**group, "params": [names[p] for p in group["params"] if p in names]} for group in groups]
    return {"state": StoredState(values=values), "param_groups": named}


def data_position(checkpoint: Mapping[str, Any]) -> list[Any]:
    """For the manifest: epoch and consumed samples of each training data loader that can say so."""
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    loaders: list[Any] = fit_loop.get("state_dict", {}).get("combined_loader", [])
    return [state if isinstance(state, dict) and _is_plain(state) else None for state in loaders]


def _is_plain(state: Mapping[str, Any]) -> bool:
    return all(isinstance(value, int | float | str) for value in state.values())


# -------------------------------------------------------------------- reading


def read(path: Path, ranks: Ranks, weights_only: bool | None, files: CheckpointIO) -> dict[str, Any]:
    """A Trainer's checkpoint: a folder of this package, or one of Lightning's files.

    Args:
        path: where it is.
        ranks: who reads it, together.
        weights_only: False runs whatever code it asks for.
        files: reads Lightning's files.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is incomplete, damaged, or was written by `save_ckpt`.
    """
    if ranks.together(path.is_file):
        return ranks.together(lambda: store.readable(path, lambda: _read_file(path, weights_only, files)))
    found = ranks.together(lambda: folder.find(path.parent, path.name))
    stored = store.open_checkpoint(found, ranks)
    return ranks.together(lambda: read_folder(stored, ranks, weights_only))


def _read_file(path: Path, weights_only: bool | None, files: CheckpointIO) -> dict[str, Any]:
    if weights_only is not False:
        check_archive(path)
    checkpoint: dict[str, Any] = files.load_checkpoint(path, weights_only=weights_only)
    return checkpoint


def read_folder(stored: Stored, ranks: Ranks, weights_only: bool | None) -> dict[str, Any]:
    """As `read`, of a folder that is open."""
    path = stored.path
    try:
        shared = store.readable(path, lambda: stored.shared(weights_only is not False))
    except CheckpointError as err:
        if weights_only is not False and "Weights only" in str(err):
            raise CheckpointError(
                f"{path} holds objects that are no plain values: if you trust it, pass weights_only=False. {err}"
            ) from err
        raise
    if "trainer" not in shared:
        raise CheckpointError(f"{path} was written by save_ckpt(): read it with load_ckpt()")
    checkpoint = store.readable(path, lambda: put_together(shared["trainer"], stored))
    own = stored.own(ranks.rank)
    same_ranks = stored.manifest["world_size"] == ranks.world_size
    checkpoint["lightrft_rng"] = own["rng"]
    checkpoint["lightrft_own"] = own if same_ranks else {"rng": own["rng"]}
    return checkpoint


def asked_weights_only() -> bool | None:
    """What was given to ``Trainer.fit(weights_only=...)``.

    Lightning does not hand it on where checkpoints are restored after the strategy's setup.
    """
    weights_only: bool | None = _argument(pl.Trainer._run, "weights_only")
    return weights_only


def asked_path() -> Any:
    """What was given to ``Trainer.fit(ckpt_path=...)``; Lightning keeps only what it has found."""
    return _argument(pl.Trainer.fit, "ckpt_path")


def _argument(method: Any, name: str) -> Any:
    """An argument of the call of `method` that is under way; None if there is none."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not method.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get(name)


def load_module(
    cls: type[M],
    path: Any,
    map_location: Any = None,
    hparams_file: Any = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **settings: Any,
) -> M:
    """``cls.load_from_checkpoint``, in one process; of the names in the checkpoint only registered ones are built.

    Args:
        cls: the module's class.
        path: the folder that this package's strategies write, or one of Lightning's files.
        map_location: a device for the module; of a file whatever Lightning takes.
        hparams_file: of a file, where the settings stand in place of the checkpoint.
        strict: every tensor must be there and no other; default: as the module says.
        weights_only: False runs whatever code it asks for.
        **settings: arguments of `cls` in place of the saved ones.

    Raises:
        ValueError: a name in the checkpoint that is not registered, or `hparams_file` for a folder.
        CheckpointError: it is incomplete, damaged or holds code.
    """
    trusted = weights_only is False
    if not trusted:
        settings["_instantiator"] = None  # a checkpoint may ask Lightning to build any class by its path
    named = [settings, {} if hparams_file is None else load_hparams_from_yaml(hparams_file)]
    with settings_of_a_checkpoint(named, trusted=trusted):
        if not Path(path).is_dir():
            if not trusted and Path(path).exists():
                check_archive(Path(path))
            more = {"map_location": map_location, "hparams_file": hparams_file, "strict": strict, **settings}
            return _load_from_checkpoint(cls, path, weights_only=not trusted, **more)  # type: ignore[return-value]
        if hparams_file is not None:
            raise ValueError(f"hparams_file={str(hparams_file)!r}: {path} is a folder with settings of its own")
        return _load_folder(cls, Path(path), map_location, strict, weights_only, settings)


def _load_folder(
    cls: type[M], path: Path, map_location: Any, strict: bool | None, weights_only: bool | None, settings: Any
) -> M:
    checkpoint = read(path, Ranks(), weights_only, TorchCheckpointIO())
    checkpoint.setdefault(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}).update(settings)
    module = _load_state(cls, checkpoint, strict=strict, **settings)
    assert isinstance(module, cls)
    return module if map_location is None else module.to(map_location)


def _with_folders(load: Any) -> Any:
    """Lightning's function for files, which reads the folders of this package too."""

    @functools.wraps(load)
    def either(path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        if not isinstance(path, str | os.PathLike) or not folder.is_checkpoint(Path(path)):
            return load(path, map_location, weights_only)
        checkpoint = read(Path(path), Ranks(), weights_only, TorchCheckpointIO())
        place = map_location if isinstance(map_location, str | int | torch.device) else "cpu"
        weights = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {n: v.to(place) if isinstance(v, Tensor) else v for n, v in weights}
        return checkpoint

    return either


if hasattr(saving, "pl_load"):  # so that load_from_checkpoint of any module opens a folder
    saving.pl_load = _with_folders(saving.pl_load)
