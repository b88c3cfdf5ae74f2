"""Folders of checkpoints that several processes write, read and leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import nn

from lightrft_lightning import FakeStrategy
from lightrft_lightning.checkpoints import folder, owners, store

WRITER = """
import sys
import torch
from lightrft_lightning import FakeStrategy
torch.set_num_threads(1)
strategy, model, n = FakeStrategy(), torch.nn.Linear(64, 64), 0
while True:
    n += 1
    torch.nn.init.constant_(model.weight, n)
    strategy.save_ckpt(model, sys.argv[1], tag=sys.argv[2], max_num=9, client_state={"n": n})
    print(n, flush=True)
"""


@pytest.fixture
def writer(tmp_path):
    """Another process that saves one tag again and again."""
    command = [sys.executable, "-c", WRITER, str(tmp_path), "last"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_one_reads_and_one_writes_beside_a_process_that_saves(writer, tmp_path):
    """What is read is one checkpoint, whole; its name is never gone; nobody removes what another is writing."""
    strategy, model, seen = FakeStrategy(), nn.Linear(64, 64), []
    own = nn.Linear(8, 8)
    for turn in range(25):
        _, client = strategy.load_ckpt(model, tmp_path, "last")
        assert (model.weight == client["n"]).all()
        seen.append(client["n"])
        assert all((tmp_path / "last").exists() for _ in range(500))
        strategy.save_ckpt(own, tmp_path, tag=f"own{turn % 2}", max_num=9)
        held = store.open_checkpoint(tmp_path / "last", store.Ranks())  # as validation beside a run: read much later
        expected = held.shared()["client_state"]["n"]
        while expected == folder.manifest_of(tmp_path / "last")["number"] or not writer.stdout.readline():
            pass
        assert (held.read("model.weight") == expected).all()
    assert writer.poll() is None and len(set(seen)) > 5
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    del held
    strategy.save_ckpt(own, tmp_path, tag="end", max_num=9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["end", "last", "latest", "own0", "own1"]


def test_only_what_is_abandoned_and_ours_is_removed(tmp_path):
    users = [tmp_path / ".x.lightrft-tmp", tmp_path / ".y.lightrft-old", tmp_path / ".z.12345678.lightrft-tmp"]
    here, elsewhere = f"{owners._machine():08x}", "00000001"
    alive, dead = f"{os.getppid()}-{owners._start_of(os.getppid())}", "4194304-1"
    kept = [f".a.{here}-{alive}-00aa.lightrft-tmp", f".a.{elsewhere}-{dead}-00aa.lightrft-tmp"]
    gone = [f".a.{here}-{dead}-00aa.lightrft-tmp", f".a.{here}-{os.getppid()}-1-00aa.lightrft-tmp",
            f".b.{elsewhere}-{dead}-00aa.lightrft-tmp"]  # fmt: skip
    for path in [*users, *(tmp_path / name for name in kept + gone)]:
        path.mkdir()
        (path / "file").touch()
    day = time.time() - owners.ABANDONED - 60
    os.utime(tmp_path / gone[-1], (day, day))
    FakeStrategy().save_ckpt(nn.Linear(2, 2), tmp_path, tag="t", save_latest=False)
    assert {p.name for p in tmp_path.iterdir()} == {"t", *kept, *(p.name for p in users)}


def test_rotation_keeps_the_newest_though_the_clock_goes_back(tmp_path, monkeypatch):
    clock = iter(range(10**18, 0, -(10**12)))
    monkeypatch.setattr(store.time, "time_ns", lambda: next(clock))
    for n in range(5):
        FakeStrategy().save_ckpt(nn.Linear(2, 2), tmp_path, tag=f"t{n}", max_num=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "t3", "t4"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_at_any_step_of_a_replacement_leaves_a_checkpoint_of_that_name(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(owners, "_renameat2", lambda: None)
    strategy, model = FakeStrategy(), nn.Linear(2, 2)
    rename, calls = Path.rename, []

    def killed(self, target):
        calls.extend([target] if self.parent == tmp_path else [])
        if len(calls) == stop:
            raise KeyboardInterrupt
        return rename(self, target)

    for stop in (1, 2):
        strategy.save_ckpt(model, tmp_path, tag="t")
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            patch.setattr(owners, "remove_when_free", lambda path: None)
            try:
                strategy.save_ckpt(model, tmp_path, tag="t")
            except KeyboardInterrupt:
                assert not can_exchange
        again = folder.put_back(tmp_path)
        assert again == ([tmp_path / "t"] if (not can_exchange and stop == 2) else [])
        FakeStrategy().load_ckpt(nn.Linear(2, 2), tmp_path, "t")


def test_what_is_just_being_written_is_not_taken_for_the_checkpoint_of_another_program(tmp_path):
    unfinished = tmp_path / owners.temporary_name("step_1")
    unfinished.mkdir()
    (unfinished / ".metadata").touch()
    for module_only in (False, True):
        with pytest.raises(FileNotFoundError, match=r"no file 'latest' in .*checkpoints there: \(none\)"):
            FakeStrategy().load_ckpt(nn.Linear(2, 2), tmp_path, load_module_only=module_only)
