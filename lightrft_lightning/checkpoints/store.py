"""Checkpoints written and read by all ranks together: complete or not there, the same error everywhere.

Tensors go through torch's distributed checkpoint (DCP) as rows of elements (see `flat`), so that what one strategy
writes at one world size every other reads at any. Whatever fails on one rank is an error on every rank.
"""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightrft_lightning.checkpoints import files, folder, owners
from lightrft_lightning.checkpoints.flat import FlatTensor, TensorInfo
from lightrft_lightning.checkpoints.folder import CheckpointError, Place
from lightrft_lightning.checkpoints.held import Held

T = TypeVar("T")

_ATTEMPTS = 10
"""To read a checkpoint that is replaced meanwhile."""
_SAME_KIND: tuple[type[Exception], ...] = (CheckpointError, FileNotFoundError, ValueError)


@dataclass(frozen=True)
class Ranks:
    """The processes that write or read a checkpoint together."""

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    """A gloo group; None: one process, which needs none."""

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank.

        Raises:
            CheckpointError: another rank did not come within the group's timeout.
        """
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as err:
            raise CheckpointError(_did_not_come(self.rank, err)) from err
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on this rank; if it fails on any rank, raise the same error on all of them."""
        result: Any = None
        problem: BaseException | None = None
        try:
            result = action()
        except Exception as err:
            if self.group is None:
                raise
            problem = err
        problems = self.gather(None if problem is None else _portable(problem))
        failed = {rank: found for rank, found in enumerate(problems) if found is not None}
        if failed:
            raise _joint_error(failed, self.world_size) from problem
        return result


def join(rank: int, world_size: int, timeout: timedelta) -> Ranks:
    """The ranks of the default process group, with a group of their own; all ranks call this together.

    Of their own so that a checkpoint can be written while the main thread trains.

    Args:
        rank: this process.
        world_size: number of processes.
        timeout: how long to wait for another rank before that is an error.
    """
    if world_size == 1:
        return Ranks()
    try:
        return Ranks(rank, world_size, dist.new_group(backend="gloo", timeout=timeout))
    except RuntimeError as err:
        raise CheckpointError(_did_not_come(rank, err)) from err


def _did_not_come(rank: int, err: BaseException) -> str:
    return (
        f"rank {rank} waited in vain for the other ranks of a checkpoint: all of them have to call it together. "
        f"{folder.reason(err)}"
    )


def _portable(err: BaseException) -> tuple[str, str]:
    kind = next((k for k in _SAME_KIND if isinstance(err, k)), None)
    return (kind.__name__, str(err)) if kind else ("CheckpointError", folder.reason(err))


def _joint_error(failed: dict[int, tuple[str, str]], world_size: int) -> Exception:
    (kind, text), *_ = failed.values()
    if len(failed) < world_size or len(set(failed.values())) > 1:
        text = "; ".join(f"rank {rank}: {message}" for rank, (_, message) in failed.items())
    return next(k for k in _SAME_KIND if k.__name__ == kind)(text)


# -------------------------------------------------------------------- writing


@dataclass
class Content:
    """What a checkpoint consists of, as one rank sees it."""

    tensors: dict[str, FlatTensor]
    """The same names on all ranks."""
    shared: dict[str, Any]
    """The same on all ranks; what rank 0 has is written."""
    own: dict[str, Any] = field(default_factory=dict)
    """This rank's alone."""
    header: dict[str, Any] = field(default_factory=dict)
    """For the manifest."""
    safe_only: bool = True
    """Refuse in `shared` what can only be read by running code."""


def prepare(content: Content, place: Place, ranks: Ranks) -> Callable[[Ranks], Path]:
    """Check and serialise everything but the tensors.

    Returns:
        What writes the checkpoint; it may run later, in another thread, on all ranks.

    Raises:
        ValueError: a tag that is no file name, or state that could not be read back.
    """
    payloads = ranks.together(lambda: _payloads(content, place, ranks.rank))
    return lambda ranks: _write(content, payloads, place, ranks)


def _payloads(content: Content, place: Place, rank: int) -> dict[str, bytes]:
    own = {f"rank_{rank}.pt": _serialise(content.own, safe_only=True)}
    if rank:
        return own
    place.check()
    return {"state.pt": _serialise(content.shared, content.safe_only), **own}


def _serialise(value: dict[str, Any], safe_only: bool) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        if safe_only:
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as err:  # what pickle raises depends on the object
        what = "client_state (or the scheduler's state)" if safe_only else "the checkpoint (say, hyper_parameters)"
        problem = "be read back safely" if safe_only else "be pickled"
        raise ValueError(
            f"{what} holds an object that cannot {problem}; use plain containers, numbers, strings and tensors. "
            f"{str(err).splitlines()[0]}"
        ) from err
    return buffer.getvalue()


def _write(content: Content, payloads: dict[str, bytes], place: Place, ranks: Ranks) -> Path:
    """Into a temporary folder, flushed, renamed: a reader never sees half of it."""
    from lightrft_lightning.checkpoints import _dcp

    temporary = place.folder / ranks.gather(place.temporary().name)[0]
    owners.keep(temporary)
    try:
        ranks.together(lambda: temporary.mkdir(parents=True) if ranks.rank == 0 else None)
        ranks.together(lambda: _check_visible(temporary))
        _dcp.save(content.tensors, temporary, ranks.group)
        described = ranks.gather(ranks.together(lambda: _write_own(payloads, temporary, ranks.rank)))
        listed = {name: entry for part in described for name, entry in part.items()}
        ranks.together(lambda: _finish(content, listed, temporary, place) if ranks.rank == 0 else None)
    except BaseException as err:
        if ranks.rank == 0:
            owners.remove_when_free(temporary)
        if isinstance(err, OSError | CheckpointError | RuntimeError):
            raise CheckpointError(f"{place.path} could not be written: {_said(err)}") from err
        raise
    finally:
        owners.keep(temporary, False)
    return place.path


def _said(err: BaseException) -> str:
    return str(err) if isinstance(err, CheckpointError) else folder.reason(err)


def _check_visible(path: Path) -> None:
    deadline = time.monotonic() + 5  # network file systems show a new folder late
    while not path.is_dir():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"does not see {path}, which rank 0 has made: save_dir must be on a file system that all ranks share"
            )
        time.sleep(0.05)


def _write_own(payloads: Mapping[str, bytes], path: Path, rank: int) -> dict[str, dict[str, int]]:
    """This rank's other files; returns size and checksum of all that it has written."""
    for name, payload in payloads.items():
        (path / name).write_bytes(payload)
        folder.flush(path / name)
    mine = [*path.glob(f"__{rank}_*.distcp"), *(path / name for name in payloads)]
    return folder.describe(mine + ([path / ".metadata"] if rank == 0 else []))


def _finish(content: Content, listed: dict[str, Any], temporary: Path, place: Place) -> None:
    from lightrft_lightning import __version__

    manifest = {
        "format": folder.FORMAT,
        "versions": {"lightrft_lightning": __version__, "torch": torch.__version__},
        **content.header,
        "number": place.number(),
        "saved_at": time.time_ns(),
        "tensors": {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in content.tensors.items()
        },
        "files": listed,
    }
    folder.write_manifest(temporary, manifest)
    folder.flush(temporary / folder.MANIFEST)
    folder.flush(temporary)
    place.complete(temporary)


# -------------------------------------------------------------------- reading


class Stored:
    """A checkpoint on disk whose files have been verified. Nothing of it is in memory but the list of its tensors."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], held: Held | None = None) -> None:
        from lightrft_lightning.checkpoints import _dcp

        self.path = path
        self._held = held
        self._where = where = path if held is None else held.path
        self.manifest = manifest
        self.tensors = {
            name: TensorInfo(tuple(entry["shape"]), _dtype(entry["dtype"]))
            for name, entry in manifest["tensors"].items()
        }
        self._metadata = _dcp.read_metadata(where)

    def shared(self, weights_only: bool = True) -> dict[str, Any]:
        """What was the same on all ranks.

        Args:
            weights_only: False runs whatever code the file asks for.
        """
        return files.load(files.plain_file(self._where, "state.pt"), weights_only=weights_only)

    def own(self, rank: int) -> dict[str, Any]:
        """What was rank `rank`'s alone; at a larger world size than the saved one, ranks share."""
        return files.load(files.plain_file(self._where, f"rank_{rank % self.manifest['world_size']}.pt"))

    def read_into(self, targets: Mapping[str, FlatTensor]) -> None:
        """Read into each target the ranges that it holds, from the tensor of the key's name."""
        from lightrft_lightning.checkpoints import _dcp

        _dcp.read_into(targets, self._where, self._metadata)

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        info = self.tensors[name]
        whole = torch.empty(info.shape, dtype=info.dtype)
        self.read_into({name: FlatTensor.of(whole)})
        return whole


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{folder.MANIFEST} names the dtype {name!r}")
    return dtype


class StoredState(MutableMapping[str, Any]):
    """A state dict whose tensors are on the disk until somebody looks at them.

    Args:
        stored: where they are.
        names: the stored tensor of each key.
        values: what is in memory already.
    """

    def __init__(
        self, stored: Stored | None = None, names: Mapping[str, str] = {}, values: Mapping[str, Any] = {}
    ) -> None:
        self._stored = stored
        self._names = dict(names)
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        if key in self._names:
            assert self._stored is not None
            return self._stored.read(self._names[key])
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._names.pop(key, None)
        self._values[key] = value

    def __delitem__(self, key: str) -> None:
        del (self._names if key in self._names else self._values)[key]

    def __iter__(self) -> Iterator[str]:
        yield from [*self._names, *self._values]

    def __len__(self) -> int:
        return len(self._names) + len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._names or key in self._values

    def tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype of each tensor; none is read for this."""
        stored = {} if self._stored is None else self._stored.tensors
        here = {k: TensorInfo(tuple(v.shape), v.dtype) for k, v in self._values.items() if isinstance(v, Tensor)}
        return {**{key: stored[name] for key, name in self._names.items()}, **here}

    def read(self) -> dict[str, Any]:
        """All of it; keys of one stored tensor get the same object."""
        read: dict[str, Tensor] = {}
        for name in self._names.values():
            if name not in read:
                assert self._stored is not None
                read[name] = self._stored.read(name)
        return {**{key: read[name] for key, name in self._names.items()}, **self._values}

    def plain(self) -> dict[str, Any]:
        """What is no tensor."""
        return {key: value for key, value in self._values.items() if not isinstance(value, Tensor)}

    def read_into(self, targets: Mapping[str, FlatTensor]) -> None:
        """Fill each target with its ranges of the tensor of its key."""
        waiting = {key: target for key, target in targets.items() if key in self._names}
        while waiting:
            batch = {self._names[key]: key for key in waiting}  # several keys of one stored tensor: one a round
            assert self._stored is not None
            self._stored.read_into({name: waiting.pop(key) for name, key in batch.items()})
        for key, target in targets.items():
            if key in self._values:
                value = self._values[key]
                target.copy_from(value.full_tensor() if isinstance(value, DTensor) else value)


def open_checkpoint(path: Path, ranks: Ranks) -> Stored:
    """Verify the files of a checkpoint, each rank its share of them.

    It may be replaced meanwhile: what is read is one checkpoint, whole, the same on all ranks.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    for _ in range(_ATTEMPTS):
        held = ranks.together(lambda: Held(path))
        try:
            return _open_held(path, held, ranks)
        except CheckpointError:
            if not any(ranks.gather(held.is_replaced())):
                raise
    raise CheckpointError(f"{path} was replaced {_ATTEMPTS} times while it was read: wait for the run that writes it")


def _open_held(path: Path, held: Held, ranks: Ranks) -> Stored:
    manifest = ranks.together(lambda: folder.manifest_of(path, held.path))
    if len(set(ranks.gather(manifest["saved_at"]))) > 1:
        raise CheckpointError(f"{path} is not the same on all ranks")
    entries = sorted(manifest["files"].items(), key=lambda entry: -entry[1]["bytes"])
    ranks.together(lambda: folder.check_files(path, dict(entries[ranks.rank :: ranks.world_size]), held.path))
    return ranks.together(lambda: readable(path, lambda: Stored(path, manifest, held)))


def readable(path: Any, read: Callable[[], T]) -> T:
    """Call `read`; what torch raises on a damaged file, which may be anything, becomes an error that names it."""
    try:
        return read()
    except (CheckpointError, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except files.NotPlainError as err:
        raise CheckpointError(str(err)) from err
    except Exception as err:
        raise CheckpointError(f"{path} is incomplete, damaged or not safe to read: {folder.reason(err)}") from err
