"""A Trainer's checkpoint as the single file that Lightning's own strategies write and read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightrft_lightning.checkpoints import files, folder, owners
from lightrft_lightning.checkpoints.flat import same_bits
from lightrft_lightning.checkpoints.folder import CheckpointError
from lightrft_lightning.checkpoints.store import Ranks, Stored, StoredState
from lightrft_lightning.checkpoints.trainer_state import read_folder


def write(stored: Stored, target: Path) -> None:
    """Write the file, read it again and compare; one that differs does not stay. Both are in memory as a whole.

    Random states are left out, of which each rank has one.

    Args:
        stored: a checkpoint that a Trainer with a strategy of this package has written.
        target: the file.

    Raises:
        CheckpointError: the checkpoint is damaged, was written by `save_ckpt`, or the file is not what it should be.
    """
    checkpoint = read_folder(stored, Ranks(), weights_only=True)
    whole = {key: value for key, value in checkpoint.items() if key not in ("lightrft_rng", "lightrft_own")}
    whole |= {key: value.read() for key, value in whole.items() if isinstance(value, StoredState)}
    if "optimizer_states" in whole:
        whole["optimizer_states"] = [_by_position(one, stored.path) for one in checkpoint["optimizer_states"]]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(owners.temporary_name(target.name))
    try:
        with owners.in_use(temporary):
            torch.save(whole, temporary)
            again = files.load(temporary, mmap=True)
            if not _same(whole, again):
                raise CheckpointError(f"{target} does not read back as it was written")
            del again
            folder.flush(temporary)
            temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
    folder.flush(target.parent)


def _by_position(saved: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """An optimizer's state as torch has it: parameters are counted through the groups."""
    names = [name for group in saved["param_groups"] for name in group["params"]]
    position = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for full, value in saved["state"].read().items():
        name, _, key = full.rpartition(".")
        if name not in position:
            raise CheckpointError(f"{where}: {full} belongs to no parameter of the optimizer's groups")
        state.setdefault(position[name], {})[key] = value
    groups = [{**group, "params": [position[name] for name in group["params"]]} for group in saved["param_groups"]]
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def _same(a: Any, b: Any) -> bool:
    (leaves, spec), (others, other_spec) = tree_flatten(a), tree_flatten(b)
    return spec == other_spec and all(_equal(x, y) for x, y in zip(leaves, others, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and same_bits(a, b)
    return type(a) is type(b) and (not isinstance(a, bool | int | str) or a == b)
