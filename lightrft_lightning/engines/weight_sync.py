"""Weights on their way from the trainer to an engine that has a copy of its own, and the proof that they arrived.

An update that is lost in part does not fail: the engine goes on to sample from a policy that never existed. So an
engine is asked, after every update, what it now computes with, and this is compared with what was sent.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightrft_lightning.callbacks.rollout import RolloutCallback
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.models import lora
from lightrft_lightning.models.file_names import as_in_files
from lightrft_lightning.models.quantized import dequantized

if TYPE_CHECKING:
    from lightrft_lightning.strategies.base import StrategyBase

log = logging.getLogger(__name__)

Verify = Literal["sample", "all", "off"]
Bucket = list[tuple[str, Tensor]]

SAMPLED_COLUMNS = 8
"""Columns of each matrix that `verify="sample"` compares; others in every update, until all have had their turn."""


class WeightMismatchError(EngineError):
    """After an update the engine does not hold the weights that were sent."""


class PolicyWeights:
    """The weights of a policy as an engine's loader expects them; iterating gathers them, on all ranks together.

    Whole tensors, named as in Transformers' model. A tied tensor comes under all of its names (an engine that
    keeps a repacked copy for the output head would otherwise keep the old one). Adapters are merged into the weights,
    and the merged weights are proved to compute what the layers with their adapters compute (`models.merging`).

    Args:
        strategy: holds the weights.
        model: a Hugging Face model, or a wrapper with one as its `model`.
        adapter: False leaves LoRA matrices out instead of merging them.

    Raises:
        MergeError: while iterating: adapters that cannot be merged, or merged weights that compute something else.
    """

    def __init__(self, strategy: StrategyBase, model: nn.Module, adapter: bool = True) -> None:
        self.strategy, self._with_adapter = strategy, adapter
        inner: Any = model if hasattr(model, "config") else getattr(model, "model", model)
        self.model = inner

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        tensors = dequantized(self.model, self.strategy.named_full_tensors(self.model))
        return lora.merged(self.model, tensors) if self._with_adapter else lora.without(self.model, tensors)

    def as_in_files(self) -> Iterator[tuple[str, Tensor]]:
        """The same with the names and shapes that they have in files, see `models.file_names`."""
        return as_in_files(self.model, self)

    def adapter(self) -> dict[str, Tensor]:
        """The adapter's matrices alone, on all ranks together, under the names of PEFT's own files."""
        chosen = lora.matrices(self.model)
        return {chosen[n]: t.clone() for n, t in self.strategy.named_full_tensors(self.model, set(chosen))}


def in_buckets(tensors: Iterable[tuple[str, Tensor]], size: int, dtype: torch.dtype | None) -> Iterator[Bucket]:
    """Copies of the tensors in `dtype`, in lists of at most `size` bytes; a larger tensor has a list of its own.

    Each list is emptied when the next one is asked for, so that only one of them takes memory.

    Args:
        tensors: each may be overwritten once the next one is asked for.
        size: bytes.
        dtype: of floating-point tensors; None leaves them as they are.
    """
    bucket: Bucket = []
    used = 0
    for name, tensor in tensors:
        target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        needed = tensor.numel() * target.itemsize
        if bucket and used + needed > size:
            yield bucket
            bucket.clear()  # before the next one is made
            bucket, used = [], 0
        bucket.append((name, tensor.detach().to(target, copy=True).contiguous()))
        used += needed
    if bucket:
        yield bucket


def folder_in_memory(prefix: str, room: int) -> Path:
    """A new private folder, in memory if there are `room` bytes free."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= room
    return Path(tempfile.mkdtemp(prefix=prefix, dir=memory if usable else None))


@contextmanager
def memory_reported(call: str) -> Iterator[None]:
    """Logs the free memory of this process's GPU before and after."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.mem_get_info()[0]
    yield
    after = torch.cuda.mem_get_info()[0]
    log.info("%s: %.2f GiB of the GPU were free before, %.2f after", call, before / 2**30, after / 2**30)


# -------------------------------------------------------------------- verification


@dataclass(frozen=True)
class Part:
    """What one process of an engine holds of the wanted columns of a tensor.

    Attributes:
        rows: first and last+1 row of the whole tensor that it holds.
        columns: the same for columns; the wanted ones of them are in the digest.
        digest: of the values, see `digest`.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    digest: str


@dataclass
class Held:
    """What an engine says that it computes with.

    Attributes:
        parts: for each tensor that could be read back, its parts.
        unreadable: wanted names whose values the engine cannot show, e.g. because it has quantised them.
        unnamed: parameters of the engine that no wanted name stands for.
    """

    parts: dict[str, list[Part]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)


def merged(of_processes: Sequence[Held]) -> Held:
    """What the processes of one engine hold together."""
    everything = Held()
    for held in of_processes:
        for name, parts in held.parts.items():
            everything.parts.setdefault(name, []).extend(parts)
        everything.unreadable += [n for n in held.unreadable if n not in everything.unreadable]
        everything.unnamed += [n for n in held.unnamed if n not in everything.unnamed]
    return everything


def as_matrix(tensor: Tensor) -> Tensor:
    """As [rows, columns]: the first dimension, and all others; a vector is a single column."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 1 else tensor.reshape(-1, 1)


def digest(values: Tensor) -> str:
    """Fingerprint of shape, type and every bit of a tensor, except that -0 counts as 0."""
    plain = (values.detach() + 0).cpu().contiguous()
    shape = f"{plain.dtype}{tuple(plain.shape)}".encode()
    return hashlib.blake2b(shape + plain.view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def columns_to_compare(width: int, version: int) -> tuple[int, int]:
    """First column and step of ``range(first, width, step)``, the columns that are compared at this version.

    They are spread over the width, so that they meet every part of a tensor that is split among processes.
    """
    step = max(1, width // SAMPLED_COLUMNS)
    return version % step, step


class Expected:
    """What an engine should hold: some columns of each tensor, copied while the tensors go past.

    Args:
        version: of the update; it decides which columns.
        everything: all columns.
    """

    def __init__(self, version: int, everything: bool = False) -> None:
        self.version, self.everything = version, everything
        self.wanted: dict[str, tuple[int, int]] = {}
        self._values: dict[str, Tensor] = {}
        self._widths: dict[str, int] = {}

    def add(self, bucket: Bucket) -> None:
        """Note the values of these tensors."""
        for name, tensor in bucket:
            matrix = as_matrix(tensor)
            width = matrix.shape[1]
            first, step = (0, 1) if self.everything else columns_to_compare(width, self.version)
            values = matrix[:, first::step]
            self.wanted[name], self._widths[name] = (first, step), width
            self._values[name] = values if self.everything else values.cpu().clone()

    def mismatches(self, parts: Mapping[str, Sequence[Part]]) -> list[str]:
        """Names of the tensors that the engine holds with other values, or not whole."""
        return [name for name, found in parts.items() if not self._agree(name, found)]

    def _agree(self, name: str, parts: Sequence[Part]) -> bool:
        values, (first, step) = self._values[name], self.wanted[name]
        pieces = {(part.rows, part.columns) for part in parts}  # several processes may hold the same piece
        area = sum((rows[1] - rows[0]) * (columns[1] - columns[0]) for rows, columns in pieces)
        if area != values.shape[0] * self._widths[name]:
            return False
        columns = range(first, self._widths[name], step)
        for part in parts:
            here = [i for i, column in enumerate(columns) if part.columns[0] <= column < part.columns[1]]
            if digest(values[part.rows[0] : part.rows[1], here]) != part.digest:
                return False
        return True


class EngineWithCopy(RolloutCallback):
    """Base class of the engines with weights of their own: sends them in buckets and verifies every update.

    Args:
        verify: ``sample`` compares some columns of every tensor after each update, ``all`` every value (and gathers the
            weights once more for it), ``off`` nothing.
        bucket_mb: the most MiB of tensors on their way at once; a larger tensor goes alone.
        sleep_level: 1 or 2: between rollouts the engine gives its GPU memory back (2: the weights as well, instead of
            moving them to the CPU); 0: it stays awake.
        deadline: seconds that one call may take.
        drift_warning: see `RolloutCallback`.
        drift_limit: see `RolloutCallback`.

    Raises:
        ValueError: an argument is out of range.
    """

    has_copy = True
    dtype: torch.dtype | None = None
    """What the engine computes in; None sends the trainer's type."""
    knows_files = True
    """Whether its loader takes a policy's tensors as they are in files, and not as in Transformers' memory."""

    def __init__(
        self,
        *,
        verify: Verify = "sample",
        bucket_mb: int = 256,
        sleep_level: int = 0,
        deadline: float = 1800.0,
        drift_warning: float | None = 0.1,
        drift_limit: float | None = None,
    ) -> None:
        super().__init__()
        checks = {
            "verify": (verify in get_args(Verify), f"one of {', '.join(map(repr, get_args(Verify)))}"),
            "bucket_mb": (bucket_mb >= 1, "at least 1"),
            "sleep_level": (sleep_level in (0, 1, 2), "0 (stays awake), 1 or 2"),
            "deadline": (deadline > 0, "above 0"),
            "drift_warning": (drift_warning is None or drift_warning >= 0, "0 or more, or None"),
            "drift_limit": (drift_limit is None or drift_limit >= 0, "0 or more, or None"),
        }
        given = locals()
        for name, (ok, allowed) in checks.items():
            if not ok:
                raise ValueError(f"{type(self).__name__}({name}={given[name]!r}): must be {allowed}")
        self.verify, self.bucket_bytes, self.sleep_level = verify, bucket_mb << 20, sleep_level
        self.deadline, self.drift_warning, self.drift_limit = deadline, drift_warning, drift_limit
        self._told = False
        self.check_call: Callable[[], None] | None = None
        """Called again and again while the engine generates, if it can; raises what is to end the call."""

    @override
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As in `RolloutEngine`; the engine is asked afterwards what it holds.

        Raises:
            WeightMismatchError: it does not hold what was sent; the message names the tensors.
        """
        if self.verify == "all" and iter(named_tensors) is named_tensors:
            raise ValueError("verify='all' goes through the weights twice: give PolicyWeights or a list, no iterator")
        expected = Expected(version)
        self._begin_update()
        for bucket in self._buckets(named_tensors):
            if self.verify == "sample":
                expected.add(bucket)
            self._load(bucket)
        self._end_update(version)
        self.version = version
        if self.verify == "sample":
            self._compare(expected, list(expected.wanted))
        elif self.verify == "all":
            self._compare_all(named_tensors, version)

    def _buckets(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Bucket]:
        if self.knows_files and isinstance(named_tensors, PolicyWeights):
            named_tensors = named_tensors.as_in_files()
        return in_buckets(self._checked(named_tensors), self.bucket_bytes, self.dtype)

    def _checked(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """The tensors as they come, for engines that must not get all."""
        return named_tensors

    def _compare_all(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        names: list[str] = []
        for bucket in self._buckets(named_tensors):
            expected = Expected(version, everything=True)
            expected.add(bucket)
            names += expected.wanted
            self._compare(expected)
        self._compare(Expected(version), names)

    def _compare(self, expected: Expected, names: Sequence[str] | None = None) -> None:
        """Ask for the expected tensors; with `names`, all that were sent, also for parameters without any."""
        held = self._read_back(expected.wanted, names)
        if held is None:
            return
        what = f"{type(self).__name__}: after the update to version {expected.version}"
        if wrong := expected.mismatches(held.parts):
            raise WeightMismatchError(f"{what} the engine does not hold the trainer's {listed(wrong)}")
        if held.unnamed:
            raise WeightMismatchError(f"{what} the engine has {listed(held.unnamed)}, which no weight was sent for")
        if expected.wanted and not held.parts:
            raise WeightMismatchError(
                f"{what} the engine cannot show any weight, e.g. {listed(held.unreadable)}: "
                "set verify='off' to go on without verification"
            )
        if held.unreadable and not self._told:
            self._told = True
            log.warning(
                "%s: no verification of %s: they cannot be read back", type(self).__name__, listed(held.unreadable)
            )

    @abstractmethod
    def _begin_update(self) -> None:
        """Make the engine ready for `_load`."""

    @abstractmethod
    def _load(self, bucket: Bucket) -> None:
        """Put these tensors in place; the caller gives up its own references afterwards."""

    @abstractmethod
    def _end_update(self, version: int) -> None:
        """Make the engine generate with what was loaded, and forget what it had computed with the old weights."""

    @abstractmethod
    def _read_back(self, wanted: Mapping[str, tuple[int, int]], names: Sequence[str] | None) -> Held | None:
        """What the engine computes with; None on a rank that has no engine to ask.

        Args:
            wanted: for each name, first column and step, see `columns_to_compare`.
            names: everything that was sent; None: do not look for parameters without a name.
        """


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
