"""Tensors as ranges of their elements: what lets one checkpoint fit every way of sharding.

In a checkpoint each tensor is one row of elements. One process holds it whole, FSDP2 one range of it per rank, ZeRO
ranges that begin and end anywhere. torch's distributed checkpoint (DCP) finds for each range what covers it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class FlatTensor:
    """The ranges of a tensor that this process holds.

    Implements the protocol by which DCP saves and loads objects of its own kind
    (``torch/distributed/_checkpointable.py``).

    Args:
        shape: of the whole tensor.
        dtype: of its elements.
        pieces: ``(offset, values)``: 1-D views into memory, `offset` counts elements of the whole tensor in row-major
            order. They do not overlap. A piece that several ranks hold has the same offset and length on all of them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[int, Tensor], ...]

    @classmethod
    def of(cls, tensor: Tensor) -> FlatTensor:
        """Views of a tensor or of this rank's part of a DTensor.

        Raises:
            ValueError: a DTensor whose values have not been summed over the ranks yet.
        """
        value = tensor.detach()
        shape = tuple(value.shape)
        if not isinstance(value, DTensor):
            return cls(shape, value.dtype, tuple(_runs(value, shape, (0,) * value.ndim)))
        if any(p.is_partial() for p in value.placements):
            raise ValueError(f"a DTensor with placements {value.placements} is not complete: redistribute it first")
        _, start = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
        return cls(shape, value.dtype, tuple(_runs(value.to_local(), shape, tuple(start))))

    @property
    def info(self) -> TensorInfo:
        """Its shape and dtype."""
        return TensorInfo(self.shape, self.dtype)

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    def split(self, most: int) -> FlatTensor:
        """The same in pieces of at most `most` elements: what is read for one range then stays small."""
        parts = (
            (offset + start, values[start : start + most])
            for offset, values in self.pieces
            for start in range(0, len(values), most)
        )
        return FlatTensor(self.shape, self.dtype, tuple(parts))

    def snapshot(self) -> FlatTensor:
        """A copy in CPU memory, which later steps do not change."""
        pieces = tuple((offset, values.to("cpu", copy=True)) for offset, values in self.pieces)
        return FlatTensor(self.shape, self.dtype, pieces)

    def copy_from(self, whole: Tensor) -> None:
        """Take this process's ranges out of the whole tensor."""
        row = whole.detach().reshape(-1)
        for offset, values in self.pieces:
            values.copy_(row[offset : offset + len(values)])

    @cached_property
    def _by_offset(self) -> dict[int, Tensor]:
        return dict(self.pieces)

    def _chunk(self, offset: int, values: Tensor) -> ChunkStorageMetadata:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return ChunkStorageMetadata(torch.Size([offset]), values.size())

    # ---------------------------------------------------------------- what DCP calls

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(name, [offset]),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=self._chunk(offset, values),
                    properties=TensorProperties.create_from_tensor(values),
                    size=torch.Size([self.numel]),
                ),
            )
            for offset, values in self.pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk(offset, values) for offset, values in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._by_offset[index.offset[0]]


def _runs(local: Tensor, shape: tuple[int, ...], start: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """The parts of `local`, a box that begins at `start` in a tensor of `shape`, whose elements follow one another."""
    if not local.numel():
        return
    depth = 0  # leading dimensions to go through one by one
    while depth < local.ndim - 1 and not (
        local.shape[depth + 1 :] == shape[depth + 1 :] and local[(0,) * depth].is_contiguous()
    ):
        depth += 1
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    first = sum(s * stride for s, stride in zip(start, strides, strict=True))
    for index in itertools.product(*(range(n) for n in local.shape[:depth])):
        run = local[index]
        offset = first + sum(i * stride for i, stride in zip(index, strides, strict=False))
        yield offset, run if run.ndim == 1 else run.view(-1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the same number of elements hold the same bytes; NaN is NaN here."""
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
