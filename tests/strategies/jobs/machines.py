"""Ranks on two machines, which are namespaces of this one; see test_machines.py.

Run as root of a user namespace, in network and process namespaces of its own. Each case is a job of two ranks with a
cable of its own. Importing takes longest, so each machine imports once and forks its ranks.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lightrft_lightning import FSDPV2Strategy

HEARTBEAT = 5
FOLDER, MACHINE = Path(sys.argv[1]), int(sys.argv[2])
CASES = ("network gone", "stop 1", "stop 0", "long call")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def plug_in(case: int) -> str:
    """Use this machine's end of a case's cable; returns its name."""
    name = f"cable{case}{MACHINE}"
    ip("addr", "add", f"10.7.{case}.{MACHINE + 1}/24", "dev", name)
    ip("link", "set", name, "up")
    return name


def train(case: int) -> None:
    cable = f"cable{case}{MACHINE}"
    os.environ.update(
        RANK=str(MACHINE), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR=f"10.7.{case}.1", MASTER_PORT=str(29511 + case),
        GLOO_SOCKET_IFNAME=cable,
    )  # fmt: skip
    FSDPV2Strategy(heartbeat_timeout=HEARTBEAT).setup_distributed(timedelta(minutes=5))
    for _ in range(20):
        dist.all_reduce(torch.ones(1))
    time.sleep(1)  # until lone ranks are looked after
    name = CASES[case]
    print(f"failing {time.monotonic()}", flush=True)
    if name == f"stop {MACHINE}":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "network gone" and MACHINE == 0:
        ip("link", "set", cable, "down")
    elif name == "long call" and MACHINE == 1:
        ctypes.PyDLL(None).sleep(HEARTBEAT + 4)  # with the interpreter lock
    dist.all_reduce(torch.ones(1))
    print("done", flush=True)


def start(case: int) -> int:
    if pid := os.fork():
        return pid
    for number, kind in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(FOLDER / f"{case}.{MACHINE}.{kind}", os.O_WRONLY | os.O_CREAT), number)
    code = 0
    try:
        train(case)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    os._exit(code)


def run_all() -> dict[int, tuple[int, float]]:
    running, ended = {start(case): case for case in range(len(CASES))}, {}
    while running:
        pid, status = os.wait()
        if pid in running:
            ended[running.pop(pid)] = os.waitstatus_to_exitcode(status), time.monotonic()
    return ended


def main() -> None:
    torch.set_num_threads(1)
    if MACHINE == 0:
        unshare = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
        other = subprocess.Popen(
            [*unshare, sys.executable, __file__, str(FOLDER), "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert other.stdin and other.stdout and other.stdout.readline()
        for case in range(len(CASES)):
            ip("link", "add", f"cable{case}0", "type", "veth", "peer", "name", f"cable{case}1")
            ip("link", "set", f"cable{case}1", "netns", str(other.pid))
    else:
        print("ready", flush=True)
        sys.stdin.readline()
    ip("link", "set", "lo", "up")
    for case in range(len(CASES)):
        plug_in(case)
    if MACHINE == 0:
        other.stdin.write(b"go\n")
        other.stdin.flush()
    ended = run_all()
    if MACHINE == 1:
        print(json.dumps(ended))
        return
    machines = [ended, json.loads(other.stdout.readline())]
    report = []
    for case, name in enumerate(CASES):
        for rank in range(2):
            code, at = machines[rank].get(case) or machines[rank][str(case)]
            text = {kind: (FOLDER / f"{case}.{rank}.{kind}").read_text() for kind in ("stdout", "stderr")}
            report.append({"case": name, "rank": rank, "code": code, "at": at, **text})
    print(json.dumps(report))


if __name__ == "__main__":
    main()
