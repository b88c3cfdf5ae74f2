"""Rewards in processes: what would end or block the trainer costs one sample."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightrft_lightning.rewards import InProcesses, Rewards

FUNCTIONS = """
import asyncio, ctypes, multiprocessing, os, re, subprocess, sys, time

def single(completion, answer):
    print("what a function prints is no answer")
    if completion == "loop":
        while True:
            pass
    if completion == "regex":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if completion == "crash":
        ctypes.string_at(0)
    if completion == "exit":
        os._exit(7)
    if completion == "raise":
        raise SystemExit(1)
    if completion == "nan":
        return float("nan")
    return int(completion) * 100 + answer

def batched(completions, answer):
    return [single(c, a) for c, a in zip(completions, answer)]

async def waiting(completion, answer):
    await asyncio.sleep(0.01)
    return single(completion, answer)

def scaled(completion, factor):
    return factor * len(completion)

def pid(completion):
    return os.getpid()

def unsafe(completion, answer):
    if completion == "fork" and os.fork() == 0:
        time.sleep(0.2)                 # it answers later, for the request after this one
    if completion == "write":
        for fd in range(3, 1024):
            try: os.write(fd, b"some log line")
            except OSError: pass
    if completion == "small":
        for fd in range(3, 64):
            try: os.write(fd, b"some log line")
            except OSError: pass
    if completion == "close":
        os.closerange(3, 4096)
    if completion == "children":
        starts = "import subprocess; subprocess.Popen(['sleep', '4711'], start_new_session=True)"
        subprocess.run([sys.executable, "-c", starts])
        subprocess.Popen(["sleep", "4711"])
        if os.fork() == 0:
            time.sleep(4711)
        os._exit(3) if answer % 2 else time.sleep(4711)
    if completion == "alarm":
        import signal
        signal.setitimer(signal.ITIMER_REAL, 0.2)
    if completion == "sleep":
        time.sleep(0.5)
    return float(answer)

def length(text):
    return len(text)

def pools(completions):
    with multiprocessing.Pool(2) as pool:
        return pool.map(length, completions)

def spawns(completions):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(length, completions)

def serves(completions):
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.map(length, completions)

class Stateful:
    def __init__(self, offset):
        self.offset = offset
    def __call__(self, completion):
        return self.offset + len(completion)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own_rewards.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def score(samples):
    def run(rewards, texts):
        batch = samples(texts)
        report = rewards.score(batch)
        return [t.reward for t in batch], report

    return run


@pytest.mark.parametrize("name", ["single", "batched", "waiting"])
def test_hanging_and_crashing_calls_cost_their_own_sample(file, score, name, caplog):
    rewards = Rewards({"name": f"{file}:{name}", "processes": 2}, deadline=2)
    texts = ["0", "loop", "2", "crash", "4", "regex", "6", "exit", "raise", "9", "nan"]
    values, report = score(rewards, texts)
    assert values == [0, None, 202, None, 404, None, 606, None, None, 909, None]
    assert (report.failed, report.timed_out, report.non_finite) == (6, 2, 1)
    assert "its process ended (signal SIGSEGV)" in caplog.text and "(exit code 7)" in caplog.text
    assert score(rewards, ["5", "6"])[0] == [500, 601]


def test_no_sample_gets_the_reward_of_another(file, score, caplog):
    rewards = Rewards({"name": f"{file}:unsafe", "processes": 1}, deadline=30)
    texts = ["fork", "sleep", "2", "write", "4", "small", "close", "7", "alarm", "sleep", "10"]
    start = time.monotonic()
    values, report = score(rewards, texts)
    assert values == [0, 1, 2, None, 4, 5, None, 7, 8, 9, 10] and report.failed == 2
    assert time.monotonic() - start < 25, "none of it is a matter of the deadline"
    assert "what it sent is no answer to the request: b'some log line" in caplog.text


def test_what_a_process_has_started_ends_with_it(file, score):
    rewards = Rewards({"name": f"{file}:unsafe", "processes": 2}, deadline=2)
    assert score(rewards, ["children", "children"])[1].timed_out == 1
    assert _of_command("sleep 4711") == [] and _children(os.getpid(), "keeper.py") == []


@pytest.mark.parametrize(("name", "processes"), [("pools", 1), ("spawns", 1), ("serves", 1), ("spawns", None)])
def test_a_pool_inside_a_process_or_a_thread(file, score, name, processes):
    rewards = Rewards({"name": f"{file}:{name}", **({"processes": 1} if processes else {})}, deadline=60)
    assert score(rewards, ["a", "bb", "ccc"])[0] == [1, 2, 3]


def test_a_file_that_cannot_be_run_there_says_why_once(tmp_path, score, caplog):
    path = tmp_path / "elsewhere.py"
    broken = f"import os\nif os.getpid() != {os.getpid()}: raise ImportError('no such GPU')\n"
    path.write_text(broken + "def f(completion): return 1")
    assert score(Rewards({"name": f"{path}:f", "processes": 1}), ["a"] * 50)[1].failed == 50
    assert "50 of 50 samples: f: ImportError: no such GPU" in caplog.text and len(caplog.records) == 1


def test_processes_are_kept_and_end_with_the_rewards(file, score):
    rewards = Rewards({"name": f"{file}:pid", "processes": 2})
    seen = {pid for _ in range(5) for pid in score(rewards, ["a", "b", "c", "d"])[0]}
    assert len(seen) <= 2 and all(Path(f"/proc/{int(pid)}").exists() for pid in seen)
    del rewards
    assert not any(Path(f"/proc/{int(pid)}").exists() for pid in seen)


def test_options_large_texts_and_objects(file, score, monkeypatch):
    large = ["x" * 10_000_000, "", "y"]
    rewards = Rewards({"name": f"{file}:scaled", "processes": 1, "factor": 2, "weight": 0.5})
    assert score(rewards, large)[0] == [10_000_000, 0, 1] and rewards.names == ["scaled"]
    monkeypatch.syspath_prepend(str(file.parent))
    import own_rewards

    assert score(Rewards(InProcesses(own_rewards.Stateful(3), processes=1)), ["ab"])[0] == [5]
    assert score(Rewards(InProcesses({"name": own_rewards.scaled, "factor": 7})), ["ab"])[0] == [14]


def test_data_that_cannot_be_sent_costs_its_sample(file, samples):
    batch = samples(["1", "2"])
    batch[0].prompt.fields["answer"] = (i for i in ())
    Rewards({"name": f"{file}:single", "processes": 1}).score(batch)
    assert [t.reward for t in batch] == [None, 201]


def test_functions_that_only_exist_here_are_refused():
    def local(completion):
        return 1.0

    for function in (local, lambda completion: 1.0):
        with pytest.raises(ValueError, match=r"cannot be sent to another process: .*'path/to/file.py:function'"):
            Rewards({"name": function, "processes": 2})
    for processes in (0, "two"):
        with pytest.raises(ValueError, match=r"processes=.* must be a whole number"):
            Rewards({"name": "exact_match", "processes": processes})


def test_functions_of_the_script_are_refused():
    script = "from lightrft_lightning.rewards import Rewards\ndef f(completion): return 1\n"
    script += "try: Rewards({'name': f, 'processes': 1})\nexcept ValueError as err: print(err)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "'f' is defined in the script that is run" in run.stdout, run.stderr


def test_workers_end_when_the_trainer_is_killed(file):
    """And all that they have started, also where a fork of the trainer lives on."""
    script = f"""
import os, signal, threading, time
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.rewards import Rewards
samples = [Trajectory(Prompt((1,), "p", {{"answer": 0}}), Completion((1,), (0.0,), "eos"), 0)] * 2
for sample in samples: sample.text = "children"
rewards = Rewards({{"name": "{file}:unsafe", "processes": 2}}, deadline=1000)
threading.Thread(target=rewards.score, args=(samples,), daemon=True).start()
end = time.monotonic() + 60
while time.monotonic() < end and len(os.popen("pgrep -f '^sleep 4711'").read().split()) < 4:
    time.sleep(0.1)
if os.fork() == 0:
    time.sleep(10)
    os._exit(0)
for task in os.listdir("/proc/self/task"):
    print(open(f"/proc/self/task/{{task}}/children").read(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert len(run.stdout.split()) >= 3, run.stderr
    end = time.monotonic() + 9
    while time.monotonic() < end and _of_command("sleep 4711"):
        time.sleep(0.05)
    assert not _of_command("sleep 4711")


def _of_command(command):
    """Processes that run, by how their command line begins."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "cmdline").read_bytes().replace(b"\0", b" ").decode().startswith(command):
                found.append(int(path.name))
    return found


def _children(parent, script):
    found = subprocess.run(["pgrep", "-P", str(parent), "-f", script], capture_output=True, text=True)
    return found.stdout.split()
