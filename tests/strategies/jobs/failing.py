"""Ranks that fail in all ways, in a loop of nothing but torch.distributed; see test_failures_distributed.py.

Importing torch takes longer than any of the cases, so one process imports it and then forks the ranks of all cases.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.trainer import call

from lightrft_lightning.strategies import failures

TIMEOUT = 8.0
STEP = 20
"""When it happens."""
FOLDER = Path(sys.argv[1])

# ---------------------------------------------------------------- what can happen, on the culprit


def raises():
    raise ValueError("boom")


def hangs():
    time.sleep(600)


def spins():
    while True:  # busy for ever
        sum(range(1000))


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def is_stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def leaves():
    sys.exit(0)


def waits_for_something_else():
    dist.recv(torch.zeros(1), src=1 - dist.get_rank())


def forks_and_is_killed():
    """A worker of a data loader inherits the connections, and outlives the rank for a while."""
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    is_killed()


# ---------------------------------------------------------------- what the others may be doing


def in_a_collective(culprit, how):
    if dist.get_rank() == culprit:
        print(f"failing {time.monotonic()}", flush=True)
        how()
    dist.all_reduce(torch.ones(1))


def computing(culprit, how):
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() != culprit:
        spins()
    in_a_collective(culprit, how)


def cleaning_up(culprit, how):
    try:
        in_a_collective(culprit, how)
    finally:
        print("cleaned up", flush=True)


def tearing_down(culprit, how):
    """As a callback does that hangs when its run is over; culprit None: on all ranks."""

    class Trainer:
        state = property(lambda self: how())

    print(f"failing {time.monotonic()}", flush=True)
    if culprit in (None, dist.get_rank()):
        call._call_teardown_hook(Trainer())


def cleaning_up_for_ever(culprit, how):
    try:
        in_a_collective(culprit, raises)
    except BaseException as error:
        failures.report(error)
        if dist.get_rank() == culprit:
            how()
        raise


def catching(culprit, how):
    """All ranks refuse something in the same way, the program goes on; then one of them fails."""
    try:
        raise KeyError("the same on all ranks")
    except KeyError as error:
        assert failures.report(error) is None
    assert failures.watch_ranks(timedelta(seconds=TIMEOUT)).verdict is None
    for _ in range(STEP):
        dist.all_reduce(torch.ones(1))
    in_a_collective(culprit, how)


def all_together(culprit, how):
    print(f"failing {time.monotonic()}", flush=True)
    time.sleep(0 if dist.get_rank() == culprit else 0.3)
    raise ValueError(f"boom on rank {dist.get_rank()}")


def slowly(culprit, how):
    """Nothing is wrong. One rank takes its time, within the deadline; over several steps, longer than that."""
    for _ in range(3):
        if dist.get_rank() == culprit:
            time.sleep(0.45 * TIMEOUT)
        dist.all_reduce(torch.ones(1))
    print(f"failing {time.monotonic()}", flush=True)


@dataclass
class Case:
    how: str
    culprit: int | None
    others: str = "in_a_collective"
    world_size: int = 2


CASES = {
    "raise 1": Case("raises", 1, world_size=3),
    "raise 0": Case("raises", 0, world_size=3),
    "raise 1, others compute": Case("raises", 1, "computing"),
    "raise 0, others compute": Case("raises", 0, "computing"),
    "raise 1, others clean up": Case("raises", 1, "cleaning_up"),
    "raise 1, after an error caught": Case("raises", 1, "catching"),
    "raise all": Case("raises", 1, "all_together"),
    "hang 1": Case("hangs", 1, world_size=3),
    "hang 0": Case("hangs", 0),
    "spin 1": Case("spins", 1),
    "elsewhere 1": Case("waits_for_something_else", 1),
    "hang 1, at its end": Case("hangs", 1, "tearing_down", world_size=3),
    "hang 0, at its end": Case("spins", 0, "tearing_down"),
    "hang all, at their end": Case("hangs", None, "tearing_down"),
    "hang 1, after an error": Case("hangs", 1, "cleaning_up_for_ever"),
    "kill 1": Case("is_killed", 1, world_size=3),
    "kill 0": Case("is_killed", 0, world_size=3),
    "kill 1, others compute": Case("is_killed", 1, "computing"),
    "kill 1, workers left": Case("forks_and_is_killed", 1, "computing"),
    "stop 1": Case("is_stopped", 1),
    "stop 0": Case("is_stopped", 0),
    "leave 1": Case("leaves", 1),
    "leave 0": Case("leaves", 0),
    "slow 0": Case("none", 0, "slowly"),
    "slow 1": Case("none", 1, "slowly"),
}


def train(case: Case, store: Path, rank: int) -> None:
    # By a file: a port that was free when it was looked for may be taken by one of the other cases.
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=case.world_size)
    # What the ranks wait in has torch's deadline of 30 minutes, as a group of a device mesh has.
    group = dist.new_group()
    dist.all_reduce(torch.ones(1), group=group)
    failures.watch_ranks(timedelta(seconds=TIMEOUT))
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor: all_reduce(tensor, group=group)
    for _ in range(STEP):
        dist.all_reduce(torch.ones(1))
    globals()[case.others](case.culprit, globals().get(case.how))


def rank_of(case: Case, name: str, rank: int) -> int:
    """Fork; the child runs the case as the interpreter would run a script."""
    pid = os.fork()
    if pid:
        return pid
    for number, kind in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(FOLDER / f"{name}.{rank}.{kind}", os.O_WRONLY | os.O_CREAT), number)
    run(train, case, FOLDER / f"{name}.store", rank)
    return 0


def run(function, *args) -> None:
    """A script's end: the hook for exceptions, `atexit`, the exit code. Threads of the parent are not there."""
    import atexit

    code = 0
    try:
        function(*args)
    except SystemExit as exit:
        code = exit.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    atexit._run_exitfuncs()
    os._exit(code)


def main() -> None:
    torch.set_num_threads(1)
    running = {}  # process id -> (case, rank)
    for name, case in CASES.items():
        for rank in range(case.world_size):
            running[rank_of(case, name, rank)] = name, rank
    ended = {}
    deadline = time.monotonic() + 10 * TIMEOUT
    while running and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            ended[running.pop(pid)] = os.waitstatus_to_exitcode(status), time.monotonic()
        for stopped, (name, rank) in running.items():  # the stopped ones end with the others
            others = [key for key in running.values() if key[0] == name and key[1] != rank]
            if CASES[name].how == "is_stopped" and rank == CASES[name].culprit and not others:
                os.kill(stopped, signal.SIGKILL)
        time.sleep(0.02)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    report = []
    for name, case in CASES.items():
        for rank in range(case.world_size):
            code, at = ended.get((name, rank), (None, float("nan")))
            output = {kind: (FOLDER / f"{name}.{rank}.{kind}").read_text() for kind in ("stdout", "stderr")}
            report.append({"case": name, **asdict(case), "rank": rank, "code": code, "at": at, **output})
    print(json.dumps(report))


if __name__ == "__main__":
    main()
