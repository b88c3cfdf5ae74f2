"""A look at the folders of a Trainer's checkpoints at the start of a fit, before hours have gone into it."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightrft_lightning.checkpoints import folder, owners, trainer_state
from lightrft_lightning.checkpoints.folder import CheckpointError
from lightrft_lightning.checkpoints.save_order import model_checkpoints
from lightrft_lightning.checkpoints.store import Ranks

log = logging.getLogger(__name__)

_RUN = "run"
_SHOWN_WITHIN = 5.0
"""Seconds; network file systems show a new file late."""


@contextlib.contextmanager
def claimed(trainer: pl.Trainer, ranks: Ranks) -> Iterator[None]:
    """Show other runs, inside, that this one writes there.

    Args:
        trainer: whose `ModelCheckpoint` callbacks name the folders.
        ranks: all of its ranks.

    Raises:
        CheckpointError: a folder cannot be written, or not all ranks see what rank 0 writes there.
    """
    callbacks = [c for c in model_checkpoints(trainer) if c.dirpath]
    saving = [c for c in callbacks if c.save_top_k != 0 or c.save_last]
    paths = {str(c.dirpath) for c in saving if not trainer.fast_dev_run}  # type: ignore[attr-defined]
    if trainer.ckpt_path is None and trainer_state.asked_path() == "last" and ranks.rank == 0:
        _tell_fresh_start([Path(str(c.dirpath)) for c in callbacks])
    with contextlib.ExitStack() as stack:
        for path in sorted(path for path in paths if "://" not in path):
            stack.enter_context(_claimed(Path(path), ranks, trainer.ckpt_path is not None))
        yield


def _tell_fresh_start(paths: list[Path]) -> None:
    """A job that is started again and again asks for the last checkpoint the first time, too."""
    places = ", ".join(map(str, paths)) or "sight, as the Trainer has no ModelCheckpoint"
    others = sorted(found.name for path in paths for found in path.glob("*.ckpt"))
    besides = f" (but {', '.join(others)}: pass the path of one to go on from it)" if others else ""
    told = f'ckpt_path="last": there is no last.ckpt in {places}{besides}. The run starts from the beginning'
    # A logger makes a folder for each run, where no run finds what the one before has saved.
    older = [found for path in paths for found in path.parent.parent.glob(f"version_*/{path.name}/*.ckpt")]
    if older:
        newest = max(older, key=lambda found: found.stat().st_mtime)
        told += f", as this folder is new. An earlier run has left {newest}: give ModelCheckpoint a dirpath of its own"
    (log.warning if older or others else rank_zero_info)(told)


@contextlib.contextmanager
def _claimed(path: Path, ranks: Ranks, resuming: bool) -> Iterator[None]:
    marker = path / ranks.gather(owners.temporary_name(_RUN))[0]
    with owners.in_use(marker):
        ranks.together(lambda: _begin(path, marker, resuming) if ranks.rank == 0 else None)
        try:
            look(marker, ranks)
            yield
        finally:
            if ranks.rank == 0:
                marker.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # there is something in it
                    path.rmdir()


def _begin(path: Path, marker: Path, resuming: bool) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as err:
        raise CheckpointError(
            f"ModelCheckpoint(dirpath={str(path)!r}) cannot be written: {folder.reason(err)}"
        ) from err
    again = [found.name for found in folder.put_back(path)]
    if again and not resuming:
        raise CheckpointError(
            f"{', '.join(again)} in {path} had been moved aside by a save that was killed, and could not be found at "
            "this start. It is in place again: start once more"
        )
    if others := owners.others(path, _RUN):
        log.warning(
            "another run is writing checkpoints to the same folder %s (%s): files of the same name get -v1, and "
            'ckpt_path="last" may find those of the other. Give each run a dirpath of its own',
            path, ", ".join(others),
        )  # fmt: skip


def look(marker: Path, ranks: Ranks) -> None:
    """Let all ranks look for a file that rank 0 has made.

    Raises:
        CheckpointError: some do not see it; the message names ranks, hosts and folder.
    """
    deadline = time.monotonic() + _SHOWN_WITHIN
    while not (seen := marker.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    answers = ranks.gather((socket.gethostname(), seen))
    blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(answers) if not sees]
    if blind:
        raise CheckpointError(
            f"checkpoints go to {marker.parent}, and {', '.join(blind)} does not see what rank 0 on {answers[0][0]} "
            "writes there: ModelCheckpoint(dirpath=...) must be on a file system that all ranks share"
        )
