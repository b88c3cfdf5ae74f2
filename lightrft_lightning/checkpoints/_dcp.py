"""What is written and read through torch's distributed checkpoint (DCP).

Imported by the first save or load: importing DCP takes longer than importing the rest of this package.
"""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.futures import Future

from lightrft_lightning.checkpoints.files import plain_file
from lightrft_lightning.checkpoints.flat import FlatTensor, TensorInfo
from lightrft_lightning.checkpoints.folder import CheckpointError, reason

MOST_ELEMENTS = 1 << 24
"""Elements of one stored piece: whoever needs a part of it reads it whole."""

FILE_BYTES = 1 << 28
"""Most bytes of tensors in one file, unless a single piece is larger."""


def save(tensors: Mapping[str, FlatTensor], path: Path, group: dist.ProcessGroup | None) -> None:
    """Write the pieces that this process holds into the folder `path`, together with the other ranks of `group`.

    Raises:
        CheckpointError: it failed on a rank. Alone in the world, an error is raised as it is.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                {name: tensor.split(MOST_ELEMENTS) for name, tensor in tensors.items()},
                storage_writer=_Writer(path),
                planner=_SavePlanner(),
                process_group=group,
                no_dist=group is None,
            )
    except dcp.CheckpointException as err:  # no `Exception`, and it says little
        if group is None:
            raise next(iter(err.failures.values()))[0] from err
        failures = (f"rank {rank}: {reason(failure[0])}" for rank, failure in err.failures.items())
        raise CheckpointError("; ".join(failures) or reason(err)) from err


def read_into(targets: Mapping[str, FlatTensor], path: Path, metadata: Metadata) -> None:
    """Read into each target the ranges that it holds, from the tensor of the key's name."""
    _read(path, metadata, _LoadPlanner(), {n: t for n, t in targets.items() if t.pieces})


def read_whole(name: str, info: TensorInfo, path: Path, metadata: Metadata) -> Tensor:
    """A tensor that DCP itself has laid out, of one process or of many."""
    whole = torch.empty(info.shape, dtype=info.dtype)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _read(path, metadata, planner, {name: whole})
    return whole


def _read(path: Path, metadata: Metadata, planner: dcp.DefaultLoadPlanner, targets: dict[str, Any]) -> None:
    for name in targets:  # of anything else DCP would run the code
        if not isinstance(metadata.state_dict_metadata.get(name), TensorStorageMetadata):
            raise CheckpointError(f"{path} is damaged: .metadata does not describe {name!r} as a tensor")
    reader = dcp.FileSystemReader(path)
    reader.set_up_storage_reader(metadata, True)
    planner.set_up_planner(targets, metadata, True)
    reader.read_data(planner.create_local_plan(), planner).wait()


def tensor_infos(metadata: Metadata) -> dict[str, TensorInfo]:
    """Shape and dtype of each tensor of a DCP folder."""
    return {
        name: TensorInfo(tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


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


def read_metadata(path: Path) -> Metadata:
    """The list of tensors of a DCP folder, read without running what it might hold.

    Raises:
        ValueError: it names files that are not in the folder.
    """
    with plain_file(path, ".metadata").open("rb") as file:
        metadata: Metadata = _MetadataUnpickler(file).load()
    for name in {entry.relative_path for entry in metadata.storage_data.values()}:
        plain_file(path, name)
    return metadata


class _Writer(dcp.FileSystemWriter):
    """Several files a rank: DCP keeps copies of all tensors of a file in memory until it is complete."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[Any]]:
        buckets = _buckets(plan.items)
        if len(buckets) == 1:
            return super().write_data(plan, planner)
        results = []
        for number, items in enumerate(buckets):
            prefix = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            results += super().write_data(dataclasses.replace(plan, items=items, storage_data=prefix), planner).wait()
        done: Future[list[Any]] = Future()
        done.set_result(results)
        return done


def _buckets(items: list[WriteItem]) -> list[list[WriteItem]]:
    """The items in their order, so many a file that it stays below `FILE_BYTES`."""
    buckets: list[list[WriteItem]] = [[]]
    size = 0
    for item in items:
        assert item.tensor_data is not None
        data = item.tensor_data
        more = data.chunk.sizes.numel() * data.properties.dtype.itemsize
        if buckets[-1] and size + more > FILE_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(item)
        size += more
    return buckets


class _SavePlanner(dcp.DefaultSavePlanner):
    """DCP's planner for `FlatTensor`. What several ranks hold is written by the first of them."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.lookup_object(write_item.index)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """DCP's planner for `FlatTensor`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)
