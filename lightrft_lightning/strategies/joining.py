"""How the ranks of a job meet: all within one deadline, or an error on each of them that names who is missing.

torch's own meeting has the deadline of the collectives and names nobody. A rank may also take the store of a group that
rank 0 is just closing for that of the next one, and wait there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from lightrft_lightning.strategies.ending import this_process

POLL = 0.05
"""Seconds between two looks at who has called."""


class JoinError(ConnectionError):
    """Not all ranks have come."""


def join(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Meet the other ranks at ``MASTER_ADDR`` and ``MASTER_PORT``.

    Each rank calls with a number that it has just drawn, rank 0 answers it: so neither takes what is left of an earlier
    meeting for this one.

    Args:
        rank: this process.
        world_size: number of processes.
        timeout: for all of it.

    Returns:
        A store that all ranks share, for `init_process_group`.

    Raises:
        JoinError: a rank has not come; the message names it.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        return _host(world_size, deadline)
    problem: Exception | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            return _call(rank, world_size, left, deadline)
        except JoinError:
            raise
        except RuntimeError as err:  # the store was closed: perhaps that of an earlier group
            problem = err
            time.sleep(POLL)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    raise JoinError(
        f"rank {rank} has not met rank 0 at {place} within {timeout.total_seconds():.0f} s: it has not started, or has "
        f"ended; its output says why, unless the address is wrong{_address_problem()}. {_first_line(problem)}"
    ) from problem


def _address_problem() -> str:
    """What can be said against the address of rank 0."""
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
    except OSError as err:
        return f" (MASTER_ADDR={os.environ['MASTER_ADDR']!r} does not resolve here: {err.strerror})"
    return ""


def _host(world_size: int, deadline: float) -> dist.Store:
    try:
        store = _store(True, world_size, deadline - time.monotonic())
    except RuntimeError as err:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        fix = "take another port" if "EADDRINUSE" in str(err) else "the address must be one of rank 0's machine"
        raise JoinError(
            f"rank 0 cannot open MASTER_PORT={port} at MASTER_ADDR={address} for the others, "
            f"{fix}{_address_problem()}: "
            f"{_first_line(err)}"
        ) from err
    token, meeting = secrets.token_hex(8), time.monotonic()
    missing = dict.fromkeys(range(1, world_size), "")
    while missing:
        for rank in list(missing):
            if store.check([f"call/{rank}"]):
                number, theirs = store.get(f"call/{rank}").decode().split()
                if int(theirs) != world_size:
                    problem = f"rank {rank} was started with WORLD_SIZE={theirs}, rank 0 with {world_size}"
                    _break_up(store, token, world_size, problem)
                store.set(f"answer/{rank}/{number}", token)
                if store.check([f"here/{rank}/{number}/{token}"]):
                    del missing[rank]
        if missing and time.monotonic() > deadline:
            waited = time.monotonic() - meeting
            problem = f"rank(s) {', '.join(map(str, missing))} of {world_size} have not joined within {waited:.0f} s"
            _break_up(store, token, world_size, f"{problem}: see what each of them has printed")
        time.sleep(POLL if missing else 0)
    for rank in range(1, world_size):
        with contextlib.suppress(RuntimeError):  # not every kind of store can
            store.delete_key(f"call/{rank}")
    store.set(f"go/{token}", "")
    return _of_this_meeting(store, token)


def _break_up(store: Any, token: str, world_size: int, problem: str) -> NoReturn:
    for rank in range(1, world_size):
        if store.check([f"call/{rank}"]):  # who has called waits for an answer before it waits for the others
            store.set(f"answer/{rank}/{store.get(f'call/{rank}').decode().split()[0]}", token)
    store.set(f"go/{token}", problem)
    time.sleep(1)  # for the others to read it
    raise JoinError(problem)


def _call(rank: int, world_size: int, left: float, deadline: float) -> dist.Store:
    store = _store(False, world_size, left)
    number = secrets.token_hex(8)
    store.set(f"call/{rank}", f"{number} {world_size}")
    token = _wait(store, f"answer/{rank}/{number}", deadline)
    store.set(f"here/{rank}/{number}/{token}", this_process())
    if problem := _wait(store, f"go/{token}", deadline + 5):
        raise JoinError(f"rank {rank} has found rank 0, but {problem}")
    return _of_this_meeting(store, token)


def _wait(store: Any, key: str, deadline: float) -> str:
    """Its value; a store that has closed raises at once."""
    store.wait([key], timedelta(seconds=max(0.1, deadline - time.monotonic())))
    return store.get(key).decode()


def _store(is_host: bool, world_size: int, seconds: float) -> Any:
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has one already
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_host and not agents,
        timeout=timedelta(seconds=max(1.0, seconds)),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _of_this_meeting(store: Any, token: str) -> dist.Store:
    return dist.PrefixStore(token, store)


def _first_line(err: BaseException | None) -> str:
    return str(err).partition("\n")[0]
