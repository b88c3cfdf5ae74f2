"""Which process this is, of how many, and how they find one another.

In a hand-written loop `start_process_group` reads what the launcher left in the environment. Inside a `Trainer`
Lightning does that; `WatchedLauncher` then sees to it that an error names the rank that failed first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException, _TunerExitException
from typing_extensions import override

from lightrft_lightning.strategies import failures
from lightrft_lightning.strategies.ending import DEFAULT_TIMEOUT
from lightrft_lightning.strategies.failures import watch_ranks
from lightrft_lightning.strategies.joining import join
from lightrft_lightning.strategies.peers import HEARTBEAT_TIMEOUT


class Place(NamedTuple):
    """One process among all of a job."""

    rank: int
    local_rank: int
    """Number among the processes of its machine."""
    world_size: int
    device: torch.device


def start_process_group(
    timeout: timedelta | None = None, accelerator: str | None = None, heartbeat: float = HEARTBEAT_TIMEOUT
) -> Place:
    """Join the job that the launcher describes, or start a process group of one process if nothing does.

    Read are the variables of torchrun (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``),
    then those of ``srun``. A process group that exists already is joined as it is.

    Args:
        timeout: how long a collective may take before it is an error; default 30 minutes.
        accelerator: ``"cpu"`` or ``"cuda"``; default: CUDA where there is a GPU.
        heartbeat: seconds after which a machine that does not answer, or a process that is stopped, counts as gone.

    Returns:
        This process's place; its device is ``cuda:<local rank>`` or the CPU.

    Raises:
        ValueError: variables that are missing, no numbers, or contradict each other; more processes than GPUs.
    """
    timeout = DEFAULT_TIMEOUT if timeout is None else timeout
    if timeout <= timedelta(0):
        raise ValueError(f"timeout={timeout} must be positive")
    accelerator = accelerator or ("cuda" if torch.cuda.is_available() else "cpu")
    if accelerator not in ("cpu", "cuda"):
        raise ValueError(f"accelerator={accelerator!r}: choose 'cpu' or 'cuda'")
    rank, local_rank, world_size = _joined() if dist.is_initialized() else _announced(os.environ)
    device = _device(accelerator, local_rank, world_size)
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        # In one process nobody else has to find us: no port, which a notebook could not choose.
        store = dist.HashStore() if world_size == 1 else meet(rank, world_size, heartbeat)
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=failures.START_TIMEOUT, store=store)
        set_deadline(timeout, store, heartbeat)
    return Place(rank, max(local_rank, 0), world_size, device)


def meet(rank: int, world_size: int, heartbeat: float) -> dist.Store:
    """Meet the other ranks, and watch them from then on: what follows waits for all of them.

    Returns:
        A store that all ranks share, for `init_process_group`.
    """
    store = join(rank, world_size, failures.START_TIMEOUT)
    watch_ranks(failures.START_TIMEOUT, heartbeat, (rank, world_size), store)
    return store


def set_deadline(timeout: timedelta, store: dist.Store | None = None, heartbeat: float = HEARTBEAT_TIMEOUT) -> None:
    """Give up a collective of the default process group after `timeout`; all ranks have joined it.

    Args:
        timeout: how long it may take.
        store: of the group; further groups meet there, for which ranks may be less in step than for a collective.
        heartbeat: see `start_process_group`.
    """
    watch_ranks(timeout, heartbeat)
    dist.distributed_c10d._set_pg_timeout(timeout)
    if store is not None:
        store.set_timeout(max(timeout, failures.START_TIMEOUT))


def _joined() -> tuple[int, int, int]:
    local = "LOCAL_RANK" if "LOCAL_RANK" in os.environ else "SLURM_LOCALID"
    return dist.get_rank(), _number(os.environ, local, -1), dist.get_world_size()


def _announced(env: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, local rank (-1: unknown) and world size according to the launcher."""
    rank_name, local_name, world_name = "RANK", "LOCAL_RANK", "WORLD_SIZE"
    if rank_name not in env and world_name not in env:
        if not _started_by_srun(env):
            return 0, 0, 1
        rank_name, local_name, world_name = "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"
        _set_slurm_master(env)
    missing = [name for name in (rank_name, world_name) if name not in env]
    if missing:
        found = rank_name if missing == [world_name] else world_name
        raise ValueError(
            f"{found}={env[found]} is set but {missing[0]} is not: start the processes with torchrun or srun, or set "
            f"RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each; unset {found} for a single process"
        )
    rank, local_rank, world_size = (_number(env, name, -1) for name in (rank_name, local_name, world_name))
    if world_size < 1:
        raise ValueError(f"{world_name}={world_size}: a job has at least one process")
    if not 0 <= rank < world_size:
        raise ValueError(f"{rank_name}={rank} with {world_name}={world_size}: ranks go from 0 to {world_size - 1}")
    if local_name in env and not 0 <= local_rank < world_size:
        raise ValueError(f"{local_name}={local_rank} with {world_name}={world_size}: count from 0 on each machine")
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ValueError(f"{world_name}={world_size} but {name} is not set: the ranks cannot find rank 0")
        if not 0 < _number(os.environ, "MASTER_PORT", 0) < 2**16:
            raise ValueError(f"MASTER_PORT={os.environ['MASTER_PORT']} is no port number")
    return rank, local_rank, world_size


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(env.get(name, default))
    except ValueError:
        raise ValueError(f"{name}={env[name]!r} is not a whole number") from None


def _started_by_srun(env: Mapping[str, str]) -> bool:
    """A shell inside an allocation has SLURM's variables too, so its usual job names do not count."""
    return "SLURM_PROCID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def _set_slurm_master(env: Mapping[str, str]) -> None:
    """The first node of the job; a port that all its processes derive from the job's number, as Lightning does."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    address = SLURMEnvironment.resolve_root_node_address(nodes) if nodes else "127.0.0.1"
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(15000 + _number(env, "SLURM_JOB_ID", 0) % 10000))


def _device(accelerator: str, local_rank: int, world_size: int) -> torch.device:
    if accelerator == "cpu":
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise ValueError("accelerator='cuda', but this machine has no GPU that torch can use: take 'cpu'")
    if local_rank < 0 and gpus > 1 and world_size > 1:
        raise ValueError(f"LOCAL_RANK is not set, and this machine has {gpus} GPUs: start with torchrun, or set it")
    if local_rank >= gpus:
        raise ValueError(
            f"LOCAL_RANK={local_rank}, but this machine has {gpus} GPU(s): start at most {gpus} process(es) on it "
            f"(torchrun --nproc-per-node {gpus})"
        )
    device = torch.device("cuda", max(local_rank, 0))
    torch.cuda.set_device(device)
    return device


class WatchedLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher; an error that follows from the failure of another rank becomes one that says so.

    Around the trainer's whole run: callbacks, loggers and the user get the `RankFailedError`, and Lightning cleans up
    as it always does.
    """

    @override
    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return super().launch(function, *args, **kwargs)
        except _TunerExitException:  # the end of Lightning's search for a batch size or learning rate
            raise
        except SIGTERMException:  # all ranks have agreed on it
            self.procs.clear()  # Lightning's observer would kill this process once the first of them has ended
            raise
        except BaseException as exception:
            error = failures.report(exception)
            failures.end_children_that_nobody_tells()
            if error is None:
                raise
            raise error from exception

    @override
    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        failures.children.extend(self.procs)
