"""Passes of a model on tensors that have shapes and no values: what is alive is counted operation by operation.

The code that runs is the model's own and this package's, so there is no formula for activations that a new kind of
layer could prove wrong. (`torch's fake tensors <https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html>`_)
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightrft_lightning._errors import import_extra
from lightrft_lightning.experience.packing import PackedBatch
from lightrft_lightning.models.layers import checkpoint_activations
from lightrft_lightning.models.lora import layers
from lightrft_lightning.planning.settings import PRECISIONS, Planned
from lightrft_lightning.strategies.sharding import blocks


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most that were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:  # a view has the storage of another tensor
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Sizes:
    """Of one model: numbers of parameters."""

    all: int
    trained: int
    root: int
    """Outside of the blocks that repeat: embeddings, head, last norm."""
    block: int
    """Of one block."""
    largest: int
    """Of one trained parameter."""
    adapted: int
    """Of the layers around which there are adapters, without these."""
    largest_adapted: int
    """Of one such layer."""


@dataclass(frozen=True)
class Passes:
    """Bytes that passes need beyond the weights, by what happens to the gradients."""

    scoring: int
    """Without gradients."""
    freed: int
    """Each gradient leaves as soon as it is there."""
    root_kept: int
    """Those of the blocks do."""
    first: int
    """They stay; none was there before."""


@contextmanager
def _without_values() -> Iterator[tuple[Any, _Alive]]:
    fake = import_extra("torch._subclasses.fake_tensor", "hf").FakeTensorMode
    with fake() as mode, _Alive() as alive:
        yield mode, alive


def sizes_of(model: nn.Module) -> Sizes:
    inside = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    count = sum(p.numel() for p in model.parameters())
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    adapted = [layer.base_layer.weight.numel() for layer in layers(model).values()]
    return Sizes(
        count, sum(trained), count - sum(inside), max(inside, default=0), max(trained, default=0),
        sum(adapted), max(adapted, default=0),
    )  # fmt: skip


def passes_of(planned: Planned, model: Any, batch: PackedBatch, score: Callable[[Any, PackedBatch], Tensor]) -> Passes:
    """Run passes of `batch` through `model`, which is on the meta device."""
    with _without_values() as (mode, alive):
        _allocate(model)
        if planned.gradient_checkpointing:
            checkpoint_activations(model)
        fake = _fake_batch(mode, batch)
        dtype = PRECISIONS[planned.precision]
        autocast = torch.autocast("cpu", dtype, enabled=dtype not in (torch.float32, model.dtype))

        def run() -> Tensor:
            with autocast:
                return score(model, fake)

        return _peaks(model, alive, run)


def _peaks(model: nn.Module, alive: _Alive, score: Callable[[], Tensor]) -> Passes:
    weights = alive.now
    root = {id(p) for p in model.parameters()} - {id(p) for block in blocks(model) for p in block.parameters()}

    def peak_of(run: Callable[[], Any]) -> int:
        alive.peak = alive.now
        run()
        return alive.peak - weights

    def back(keep: Callable[[Tensor], bool]) -> int:
        leaving = [p for p in model.parameters() if p.requires_grad and not keep(p)]
        hooks = [p.register_post_accumulate_grad_hook(_drop) for p in leaving]
        peak = peak_of(lambda: (-score().sum()).backward())
        for hook in hooks:
            hook.remove()
        for p in model.parameters():
            p.grad = None
        return peak

    with torch.no_grad():
        scoring = peak_of(score)
    return Passes(scoring, back(lambda p: False), back(lambda p: id(p) in root), back(lambda p: True))


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _allocate(model: nn.Module) -> None:
    """Parameters and buffers that take memory, as far as the mode that is on counts any."""
    made: dict[Tensor, Tensor] = {}  # tied parameters are one
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if old not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = made[old]  # type: ignore[assignment]


def _fake_batch(mode: Any, batch: PackedBatch) -> PackedBatch:
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return PackedBatch(**{n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in values.items()})
