from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import preloaded
import pytest
import torch
import torch.distributed as dist
import torch.distributed.run

from lightrft_lightning.strategies import launch
from lightrft_lightning.strategies.launch import start_process_group

JOB = Path(__file__).parent / "jobs" / "launched.py"
LAUNCHER_VARIABLES = re.compile(r"(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|SLURM_.*|TORCHELASTIC_.*)$")
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if not LAUNCHER_VARIABLES.match(k)}, "OMP_NUM_THREADS": "1"}
RAISED = r"rank {} \(.*\) failed: ValueError: boom"
HUNG = r"rank {} \(.*\) did not come to a collective for \d+ s: it has been in launched.py:\d+ \(step\) for \d+ s"
KILLED = r"rank {} \(.*\) died without an error of its own"
STOPPED = r"rank {} \(.*\) has given no sign of life for \d+ s"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun(*options, job):
    return [sys.executable, "-m", "torch.distributed.run", *options, str(JOB), *job.split()]


def process(command, env, files):
    """A script and torchrun's agent as forks of a process that has their packages; what these start is none."""
    scripts = {str(JOB): JOB, "-m": Path(torch.distributed.run.__file__)}
    _, first, *rest = command
    if first in scripts:
        return preloaded.start(scripts[first], rest[first == "-m" :], env, *files)
    return subprocess.Popen(command, env=env, stdout=files[0], stderr=files[1], start_new_session=True)


def start(*commands, variables=()):
    """Run the commands together; their exit codes, what they printed, and their errors, all in one."""
    with contextlib.ExitStack() as opened:
        files = [[opened.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in commands]
        processes = [
            process(command, {**ENVIRONMENT, **extra}, output)
            for command, extra, output in itertools.zip_longest(commands, variables, files, fillvalue={})
        ]
        deadline = time.monotonic() + 90
        try:
            codes = [ended(p, deadline) for p in processes]
        finally:
            for p in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(p.pid, signal.SIGKILL)
        for file in itertools.chain(*files):
            file.seek(0)
        return codes, *("".join(file.read() for file in kind) for kind in zip(*files, strict=True))


def ended(process, deadline):
    """The exit code of a `process` that ends by the deadline."""
    left = max(0.1, deadline - time.monotonic())
    if isinstance(process, subprocess.Popen):
        return process.wait(left)
    process.join(left)
    assert process.exitcode is not None, "it has not ended"
    return process.exitcode


def check_trained_together(output, local_ranks=(0, 1)):
    places = sorted(re.findall(r"rank (\d) of 2, local rank (\d), cpu, pid \d+, loss ([\d.]+)", output))
    assert [(int(rank), int(local)) for rank, local, _ in places] == list(enumerate(local_ranks)), output
    assert len({loss for *_, loss in places}) == 1
    assert "done" not in output


def no_process_is_left(output):
    pids = [int(pid) for pid in re.findall(r"pid (\d+), loss", output)]
    assert len(pids) == 2
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(("how", "culprit", "said"), [("raise", 1, RAISED), ("kill", 1, KILLED), ("stop", 1, STOPPED)])
def test_trainer_of_two_devices_started_as_a_plain_script(how, culprit, said):
    codes, output, errors = start([sys.executable, str(JOB), *f"trainer 2 1 {how} {culprit}".split()])
    check_trained_together(output)
    assert codes[0] not in (0, None)
    assert re.search(rf"\[rank {1 - culprit}\] ending: {said.format(culprit)}", errors), errors
    assert no_process_is_left(output)


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ("trainer 2 1 kill 1", KILLED.format(1)),
        ("loop 2 1 raise 0", RAISED.format(0)),
        ("loop 2 1 hang 1", HUNG.format(1)),
    ],
)  # fmt: skip
def test_torchrun(job, said):
    # Its agent kills all ranks as soon as one has failed, so the news must be out by then.
    port = str(free_port())
    codes, output, errors = start(torchrun("--nproc-per-node", "2", "--master-port", port, job=job))
    check_trained_together(output)
    assert codes == [1] and re.search(rf"\[rank \d\] ending: {said}", errors), errors
    assert no_process_is_left(output)


@pytest.mark.parametrize(
    ("job", "said"), [("trainer 1 2 raise 1", RAISED.format(1)), ("loop 1 2 kill 0", KILLED.format(0))]
)
def test_two_agents_as_two_nodes(job, said):
    port = free_port()
    meeting = {
        "trainer": ("--master-addr", "127.0.0.1", "--master-port", str(port)),
        "loop": ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "7"),
    }[job.split()[0]]
    nodes = [
        torchrun("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(k), *meeting, job=job) for k in (0, 1)
    ]
    codes, output, errors = start(*nodes)
    check_trained_together(output, local_ranks=(0, 0))
    assert codes == [1, 1] and re.search(rf"(ended because|ending:) {said}", errors), errors


@pytest.mark.parametrize("job", ["trainer 2 1 raise 1", "loop 2 1 raise 0"])
def test_slurm(job):
    common = {
        "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": str(40000 + free_port() % 10000), "SLURM_NODELIST": "localhost",
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
    }  # fmt: skip
    tasks = [{**common, "SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)} for k in (0, 1)]
    codes, output, errors = start(*[[sys.executable, str(JOB), *job.split()]] * 2, variables=tasks)
    check_trained_together(output)
    assert codes == [1, 1] and re.search(rf"(ended because|ending:) {RAISED.format(job[-1])}", errors), errors


def test_a_notebook_with_one_process():
    # Lightning takes a session with `sys.ps1` for an interactive one, where it starts no processes.
    code = f"import runpy, sys; sys.ps1 = '>>> '; sys.argv = ['', 'trainer', '1', '1', 'hang', '9']; " \
           f"sys.path.insert(0, {str(JOB.parent)!r}); " \
           f"names = runpy.run_path({str(JOB)!r}); names['loop']()"  # fmt: skip
    codes, output, errors = start([sys.executable, "-c", code])
    assert codes == [0], errors
    assert len(re.findall(r"rank 0 of 1, local rank 0, cpu", output)) == 2


def test_a_trainer_of_another_size_than_the_job_is_refused_on_every_rank():
    for job, devices, nodes in (("trainer 1 1 raise 9", 1, 1), ("trainer 2 2 raise 9", 2, 2)):
        common = {
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        }  # fmt: skip
        ranks = [{**common, "RANK": str(k), "LOCAL_RANK": str(k)} for k in (0, 1)]  # as torchrun tells them
        codes, output, errors = start(*[[sys.executable, str(JOB), *job.split()]] * 2, variables=ranks)
        assert codes == [1, 1] and "loss" not in output
        refusal = rf"devices={devices}.*num_nodes={nodes}.*does not match the world size \(2\)"
        assert len(re.findall(refusal, errors)) >= 2, errors


# -------------------------------------------------------------------- what the environment says

WORLD = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """Sets the launcher's variables; None leaves one out."""
    for name in filter(LAUNCHER_VARIABLES.match, list(os.environ)):
        monkeypatch.delenv(name)

    def change(**variables):
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": "0", "RANK": "0"}, r"WORLD_SIZE=0: a job has at least one process"),
        ({"RANK": "2"}, r"RANK=2 with WORLD_SIZE=2: ranks go from 0 to 1"),
        ({"RANK": "-1"}, r"RANK=-1 with WORLD_SIZE=2: ranks go from 0 to 1"),
        ({"LOCAL_RANK": "2"}, r"LOCAL_RANK=2 with WORLD_SIZE=2: count from 0 on each machine"),
        ({"RANK": "one"}, r"RANK='one' is not a whole number"),
        ({"WORLD_SIZE": ""}, r"WORLD_SIZE='' is not a whole number"),
        ({"RANK": None}, r"WORLD_SIZE=2 is set but RANK is not: start the processes with torchrun or srun"),
        ({"WORLD_SIZE": None}, r"RANK=1 is set but WORLD_SIZE is not"),
        ({"MASTER_ADDR": None}, r"WORLD_SIZE=2 but MASTER_ADDR is not set: the ranks cannot find rank 0"),
        ({"MASTER_PORT": None}, r"WORLD_SIZE=2 but MASTER_PORT is not set"),
        ({"MASTER_PORT": "70000"}, r"MASTER_PORT=70000 is no port number"),
    ],
)
def test_variables_that_cannot_be_right_are_refused_with_their_value(environment, change, message):
    environment(**{**WORLD, **change})
    with pytest.raises(ValueError, match=message):
        start_process_group(accelerator="cpu")
    assert not dist.is_initialized()


def test_slurm_variables_that_cannot_be_right_are_refused(environment):
    environment(SLURM_PROCID="2", SLURM_NTASKS="2", SLURM_LOCALID="0", SLURM_JOB_NAME="train")
    with pytest.raises(ValueError, match=r"SLURM_PROCID=2 with SLURM_NTASKS=2: ranks go from 0 to 1"):
        start_process_group(accelerator="cpu")


def test_slurm_names_the_first_node_and_a_port_that_follows_from_the_job(environment):
    environment(SLURM_PROCID="3", SLURM_NTASKS="4", SLURM_LOCALID="1", SLURM_JOB_NAME="train", SLURM_JOB_ID="1234567")
    environment(SLURM_JOB_NODELIST="gpu[07-08,11]", MASTER_ADDR=None, MASTER_PORT=None)
    assert launch._announced(os.environ) == (3, 1, 4)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu07", "19567")


def test_torchrun_inside_a_slurm_job_goes_first(environment):
    environment(**WORLD, SLURM_PROCID="0", SLURM_NTASKS="1", SLURM_LOCALID="0")
    assert launch._announced(os.environ) == (1, 1, 2)


@pytest.mark.parametrize("variables", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "interactive"}])
def test_without_a_launcher_it_is_one_process_that_needs_no_port(environment, variables):
    environment(**variables)
    try:
        assert start_process_group(accelerator="cpu") == (0, 0, 1, torch.device("cpu"))
        assert "MASTER_PORT" not in os.environ
        dist.barrier()
        assert start_process_group(accelerator="cpu").world_size == 1  # joins what is there
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("gpus", "local_rank", "message"),
    [
        (0, 0, r"this machine has no GPU"),
        (2, 2, r"LOCAL_RANK=2, but this machine has 2 GPU\(s\): start at most 2 process"),
        (8, -1, r"LOCAL_RANK is not set, and this machine has 8 GPUs"),
    ],
)
def test_more_processes_than_gpus_are_refused(monkeypatch, gpus, local_rank, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=message):
        launch._device("cuda", local_rank, 16)


def test_a_deadline_that_is_none_and_an_unknown_accelerator_are_refused(environment):
    with pytest.raises(ValueError, match=r"timeout=0:00:00 must be positive"):
        start_process_group(timedelta(0))
    with pytest.raises(ValueError, match=r"accelerator='tpu': choose 'cpu' or 'cuda'"):
        start_process_group(accelerator="tpu")
