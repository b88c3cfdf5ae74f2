"""Checkpoints: complete or not there, read in full or refused, and nothing foreign is ever removed."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import lightning.pytorch as pl
import numpy
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightrft_lightning import CheckpointError, FakeStrategy
from lightrft_lightning.checkpoints import _dcp, folder


class Run:
    """A strategy with a model, an optimizer and a scheduler; dropout makes the random state matter."""

    def __init__(self, seed=0, layers=None, **settings):
        torch.manual_seed(seed)
        self.strategy = FakeStrategy(seed=seed, **settings)
        self.model = nn.Sequential(*(layers or [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)]))
        self.optimizer = self.strategy.create_optimizer(self.model, lr=0.05, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)
        self.strategy.prepare((self.model, self.optimizer, self.scheduler))

    def train(self, steps):
        losses = []
        for _ in range(steps):
            x = torch.randn(6, 4)
            loss = self.model(x).sub(x.sum(1, keepdim=True) + random.random() + numpy.random.rand()).square().mean()
            self.strategy.backward(loss, self.model, self.optimizer)
            self.strategy.optimizer_step(self.optimizer, self.model, self.scheduler)
            losses.append(loss.item())
        return losses

    def state(self):
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "rng": (random.getstate(), torch.get_rng_state(), numpy.random.get_state()),
                "steps": self.strategy.optimizer_steps,
            }
        )


def equal(a, b):
    """Bit for bit, through containers."""
    if isinstance(a, torch.Tensor | numpy.ndarray):
        return a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def checkpoints(folder):
    return sorted(p.name for p in Path(folder).iterdir() if p.is_dir())


# -------------------------------------------------------------------- round trip, resume


def test_round_trip_is_bit_for_bit(tmp_path):
    run = Run()
    run.train(3)
    client = {"episode": 3, "nested": {"list": [1, 2.5, "x", None, True]}, "tensor": torch.arange(3), "tuple": (1, 2)}
    path = run.strategy.save_ckpt(run.model, tmp_path, client_state=client)
    saved = run.state()
    assert path == str(tmp_path / "step_3") and (tmp_path / "latest").read_text() == "step_3"

    other = Run(seed=1)
    other.train(1)
    assert not equal(other.state(), saved)
    assert other.strategy.load_ckpt(other.model, tmp_path)[0] == path
    assert equal(other.state(), saved)
    assert {"exp_avg", "exp_avg_sq", "step"} == set(other.optimizer.state_dict()["state"][0])
    _, loaded = other.strategy.load_ckpt(other.model, tmp_path)
    assert equal(loaded, client)


def test_continued_training_equals_the_uninterrupted_run(tmp_path):
    straight, first, second = Run(), Run(), Run(seed=1)
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    expected = straight.train(6)
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    losses = first.train(3)
    first.strategy.save_ckpt(first.model, tmp_path)
    torch.randn(100), random.random(), numpy.random.rand()
    second.strategy.load_ckpt(second.model, tmp_path)
    assert losses + second.train(3) == expected
    assert equal(second.state(), straight.state())


def test_optimizer_and_scheduler_can_be_given_with_the_call(tmp_path):
    """In place of what `prepare` was told, e.g. in a loop that prepares models only."""
    run, other = Run(), Run(seed=1)
    run.train(2)
    plain, strategy = FakeStrategy(), FakeStrategy()
    plain.save_ckpt(run.model, tmp_path, tag="a", optimizer=run.optimizer, scheduler=run.scheduler)
    strategy.load_ckpt(other.model, tmp_path, optimizer=other.optimizer, scheduler=other.scheduler)
    assert equal(other.optimizer.state_dict(), run.optimizer.state_dict())
    assert equal(other.scheduler.state_dict(), run.scheduler.state_dict())


def test_actor_and_critic_have_checkpoints_of_their_own(tmp_path):
    strategy, actor, critic = FakeStrategy(), nn.Linear(2, 2), nn.Linear(3, 1)
    for model in (actor, critic):
        optimizer = strategy.create_optimizer(model, lr=0.1)
        strategy.backward(model(torch.ones(1, model.in_features)).sum(), model, optimizer)
        strategy.optimizer_step(optimizer, model, None)
    for name, model in (("actor", actor), ("critic", critic)):
        strategy.save_ckpt(model, tmp_path / name)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        nn.init.zeros_(model.weight)
        strategy.load_ckpt(model, tmp_path / name)
        assert equal(dict(model.state_dict()), before)
    with pytest.raises(CheckpointError, match="weight has shape"):
        strategy.load_ckpt(actor, tmp_path / "critic")


def test_a_model_without_optimizer_and_state_that_is_no_tensor(tmp_path):
    class Versioned(nn.Linear):
        note = "new"

        def get_extra_state(self):
            return {"note": self.note}

        def set_extra_state(self, state):
            self.note = state["note"]

    strategy, model = FakeStrategy(), Versioned(2, 2)
    model.note = "saved"
    strategy.save_ckpt(strategy.prepare(model), tmp_path)
    model.note = "changed"
    strategy.load_ckpt(model, tmp_path)
    assert model.note == "saved" and not model.weight.requires_grad


def test_large_tensors_are_cut_into_pieces_and_files(tmp_path, monkeypatch):
    """A rank that needs a part of a tensor reads little more than that; one that writes keeps one file in memory."""
    monkeypatch.setattr(_dcp, "MOST_ELEMENTS", 5)
    monkeypatch.setattr(_dcp, "FILE_BYTES", 100)
    run = Run()
    run.train(2)
    path = Path(run.strategy.save_ckpt(run.model, tmp_path))
    assert len(list(path.glob("__0_*_0.distcp"))) > 5
    chunks = [c.sizes[0] for m in _dcp.read_metadata(path).state_dict_metadata.values() for c in m.chunks]
    assert max(chunks) == 5 and sum(chunks) == 3 * (8 * 4 + 8 * 2 + 8 + 8 + 1) + 2 * 8 + 1 + 6
    other = Run(seed=1)
    other.strategy.load_ckpt(other.model, tmp_path)
    assert equal(other.state(), run.state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(tmp_path, dtype):
    strategy, model = FakeStrategy(), nn.Linear(3, 3).to(dtype)
    before = model.weight.clone()
    strategy.save_ckpt(model, tmp_path)
    nn.init.zeros_(model.weight)
    strategy.load_ckpt(model, tmp_path)
    assert equal(model.weight, before)


def test_a_checkpoint_within_an_accumulation_warns(tmp_path, caplog):
    run = Run(train_batch_size=2, micro_train_batch_size=1)
    run.train(1)
    with caplog.at_level(logging.WARNING):
        run.strategy.save_ckpt(run.model, tmp_path)
    assert "in the middle of an accumulation" in caplog.text


# -------------------------------------------------------------------- the arguments of load_ckpt


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoint ``a`` (after 2 steps) and the newer ``b`` (after 4)."""
    run = Run()
    for tag in ("a", "b"):
        run.train(2)
        run.strategy.save_ckpt(run.model, tmp_path, tag=tag, client_state={"tag": tag})
    return tmp_path


def test_tag(saved):
    run = Run(seed=1)
    for tag, expected in ((None, "b"), ("a", "a"), ("b", "b")):
        path, client = run.strategy.load_ckpt(run.model, saved, tag)  # positional, as LightRFT's callers do
        assert (path, client) == (str(saved / expected), {"tag": expected})
        assert run.strategy.optimizer_steps == {"a": 2, "b": 4}[expected]
    assert run.strategy.load_ckpt(run.model, saved / "a")[1] == {"tag": "a"}  # a checkpoint's own path


@pytest.mark.parametrize(
    ("kwargs", "changed"),
    [
        ({}, {"model", "optimizer", "scheduler", "rng", "steps"}),
        ({"load_optimizer_states": False}, {"model", "scheduler", "rng", "steps"}),
        ({"load_lr_scheduler_states": False}, {"model", "optimizer", "rng", "steps"}),
        ({"load_module_only": True}, {"model"}),
    ],
)
def test_what_is_loaded(saved, kwargs, changed):
    run = Run(seed=1)
    before = run.state()
    run.strategy.load_ckpt(run.model, saved, **kwargs)
    after = run.state()
    assert {key for key in before if not equal(before[key], after[key])} == changed


def test_strict(saved):
    layers = lambda: [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1), nn.Linear(1, 1)]  # noqa: E731
    run = Run(seed=1, layers=layers())
    with pytest.raises(CheckpointError, match=r"it has no 4\.weight"):
        run.strategy.load_ckpt(run.model, saved, load_module_strict=True)
    with pytest.raises(CheckpointError, match=r"does not hold the parameter '4\.weight': pass load_optimizer_states"):
        run.strategy.load_ckpt(run.model, saved, load_module_strict=False)
    own = run.model[4].weight.clone()
    run.strategy.load_ckpt(run.model, saved, load_module_strict=False, load_optimizer_states=False)
    reference = Run()
    reference.strategy.load_ckpt(reference.model, saved)
    assert equal(run.model[0].weight, reference.model[0].weight) and equal(run.model[4].weight, own)


def test_parts_that_were_not_saved(tmp_path):
    run = Run()
    FakeStrategy().save_ckpt(run.model, tmp_path)
    before = run.state()
    with pytest.raises(CheckpointError, match="holds no optimizer: pass load_optimizer_states=False"):
        run.strategy.load_ckpt(run.model, tmp_path)
    with pytest.raises(CheckpointError, match="holds no scheduler: pass load_lr_scheduler_states=False"):
        run.strategy.load_ckpt(run.model, tmp_path, load_optimizer_states=False)
    assert equal(run.state(), before)
    run.strategy.load_ckpt(run.model, tmp_path, load_optimizer_states=False, load_lr_scheduler_states=False)


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([nn.Linear(4, 8), nn.BatchNorm1d(8)], "3.weight does not exist here"),
        ([nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Identity(), nn.Linear(8, 1), nn.Linear(1, 1)], "it has no 4.weight"),
        (
            [nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Identity(), nn.Linear(9, 1)],
            "0.weight has shape (8, 4) there",
        ),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_another_model_is_refused_and_nothing_is_changed(saved, layers, words, strict):
    run = Run(seed=1, layers=copy.deepcopy(layers))
    before = run.state()
    if not strict and "shape" not in words:
        words = "4.weight" if "no 4.weight" in words else None
    if words is None:  # a part of the checkpoint's model is enough
        run.strategy.load_ckpt(run.model, saved, load_module_strict=False)
        return
    with pytest.raises(CheckpointError) as error:
        run.strategy.load_ckpt(run.model, saved, load_module_strict=strict)
    assert words in str(error.value) and str(saved / "b") in str(error.value)
    assert equal(run.state(), before)


def test_another_kind_of_optimizer_is_refused(saved):
    run = Run(seed=1)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    before = run.state()
    with pytest.raises(CheckpointError, match="another kind of optimizer: with 'amsgrad', without 'dampening'"):
        run.strategy.load_ckpt(run.model, saved, optimizer=optimizer)
    assert equal(run.state(), before)


def test_an_optimizer_of_another_model_is_refused_before_anything_is_written(tmp_path):
    run = Run()
    with pytest.raises(ValueError, match=r"parameter of shape \(8, 4\) that is not in Linear"):
        run.strategy.save_ckpt(nn.Linear(1, 1), tmp_path / "new", optimizer=run.optimizer)
    assert not (tmp_path / "new").exists()


FILES = ("state.pt", "rank_0.pt", ".metadata", "__0_0.distcp")


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *[("manifest.json", d) for d in (Path.unlink, truncate)],
        *[(f, d) for f in FILES for d in (Path.unlink, truncate, flip_a_bit)],
    ],
)
def test_damaged_files_are_refused_and_nothing_is_changed(saved, file, damage):
    damage(saved / "b" / file)
    run = Run(seed=1)
    before = run.state()
    for tag in (None, "b"):
        with pytest.raises(CheckpointError, match=r"incomplete|damaged") as error:
            run.strategy.load_ckpt(run.model, saved, tag)
        assert str(saved / "b") in str(error.value)
    assert equal(run.state(), before)
    run.strategy.load_ckpt(run.model, saved, "a")
    run.strategy.save_ckpt(run.model, saved, tag="c")  # and rotation copes with what is left


def test_a_flipped_bit_of_the_manifest_is_refused_or_harmless(saved):
    """Harmless is what leaves its content as it is: the case of a letter in an escape, say."""
    manifest = saved / "b" / "manifest.json"
    content = manifest.read_bytes()
    reference, run = Run(), Run(seed=1)
    reference.strategy.load_ckpt(reference.model, saved)
    expected = reference.state()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        manifest.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            run.strategy.load_ckpt(run.model, saved)
            assert equal(run.state(), expected)


def test_nothing_there_lists_what_is(saved, tmp_path_factory):
    run, empty = Run(), tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'c' in .*; checkpoints there: a, b$"):
        run.strategy.load_ckpt(run.model, saved, "c")
    (saved / "latest").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file 'latest' in .*; checkpoints there: a, b$"):
        run.strategy.load_ckpt(run.model, saved)
    for nothing in (empty, empty / "absent"):
        with pytest.raises(FileNotFoundError, match=r"checkpoints there: \(none\)"):
            run.strategy.load_ckpt(run.model, nothing)


@pytest.mark.parametrize("tag", ["../up", "a/b", ".hidden", "..", "latest", " ", "a ", "/tmp/x"])
def test_tags_that_are_no_folder_names(tmp_path, tag):
    run = Run()
    with pytest.raises(ValueError, match="must be a plain folder name"):
        run.strategy.save_ckpt(run.model, tmp_path / "new", tag=tag)
    assert not (tmp_path / "new").exists()


class Attack:
    """Runs code when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_loading_runs_no_code_from_the_file(saved, tmp_path_factory, file, write):
    """With a manifest that fits, as an attacker would write it."""
    marker, target = tmp_path_factory.mktemp("attack") / "ran", saved / "b" / file
    with target.open("wb") as stream:
        write(Attack(marker), stream)
    manifest = folder.manifest_of(saved / "b")
    manifest["files"][file] = {"bytes": target.stat().st_size, "crc32": zlib.crc32(target.read_bytes())}
    folder.write_manifest(saved / "b", manifest)
    run = Run(seed=1)
    before = run.state()
    with pytest.raises(CheckpointError):
        run.strategy.load_ckpt(run.model, saved)
    assert not marker.exists()
    assert equal(run.state(), before)


# -------------------------------------------------------------------- rotation


def foreign_files(folder):
    """What a user may keep beside checkpoints; returns all paths."""
    for name in ("notes", "with_manifest", "step_0", "of_another_tool"):
        (folder / name).mkdir(parents=True)
    (folder / "notes" / "a.txt").write_text("mine")
    (folder / "with_manifest" / "manifest.json").write_text('{"format": "theirs/1"}')
    (folder / "step_0" / "manifest.json").write_text("no json")
    (folder / "of_another_tool" / "manifest.json").write_text('["a list"]')
    (folder / "model.ckpt").write_text("mine")
    (folder / ".hidden").write_text("mine")
    return sorted(p for p in folder.rglob("*"))


def test_rotation_by_number_removes_the_oldest_of_its_own_only(tmp_path):
    foreign = foreign_files(tmp_path)
    run = Run()
    for tag in ("z", "y", "x", "w"):  # order of time, not of names
        run.strategy.save_ckpt(run.model, tmp_path, tag=tag, max_num=2)
    assert set(checkpoints(tmp_path)) - {"notes", "with_manifest", "step_0", "of_another_tool"} == {"x", "w"}
    assert all(p.exists() for p in foreign)
    run.strategy.save_ckpt(run.model, tmp_path, tag="v", max_num=0)  # the new one always stays
    assert set(checkpoints(tmp_path)) - {"notes", "with_manifest", "step_0", "of_another_tool"} == {"v"}
    assert all(p.exists() for p in foreign)
    assert (tmp_path / "latest").read_text() == "v"


def test_three_remain_by_default(tmp_path):
    run = Run()
    for n in range(5):
        run.strategy.save_ckpt(run.model, tmp_path, tag=f"t{n}")
    assert checkpoints(tmp_path) == ["t2", "t3", "t4"]


def test_rotation_by_size_in_gb(tmp_path):
    foreign = foreign_files(tmp_path)
    run = Run()
    size = sum(p.stat().st_size for p in Path(run.strategy.save_ckpt(run.model, tmp_path, tag="t0")).iterdir())
    for n in range(1, 5):
        run.strategy.save_ckpt(run.model, tmp_path, tag=f"t{n}", max_num=100, max_mem=2.5 * size / 1e9)
    assert [c for c in checkpoints(tmp_path) if c.startswith("t")] == ["t3", "t4"]
    run.strategy.save_ckpt(run.model, tmp_path, tag="t5", max_num=100, max_mem=0)  # impossible: the new one stays
    assert [c for c in checkpoints(tmp_path) if c.startswith("t")] == ["t5"]
    assert all(p.exists() for p in foreign)


def test_rotation_leaves_links_alone(tmp_path):
    run = Run()
    run.strategy.save_ckpt(run.model, tmp_path, tag="t0")
    (tmp_path / "best").symlink_to("t0")
    for n in range(1, 4):
        run.strategy.save_ckpt(run.model, tmp_path, tag=f"t{n}", max_num=2)
    assert (tmp_path / "best").is_symlink()
    assert [p.name for p in sorted(tmp_path.iterdir()) if p.is_dir()] == ["t2", "t3"]


def test_save_latest_false_leaves_the_pointer(saved):
    run = Run()
    run.strategy.save_ckpt(run.model, saved, tag="c", save_latest=False)
    assert (saved / "latest").read_text() == "b" and checkpoints(saved) == ["a", "b", "c"]


# -------------------------------------------------------------------- failures in the middle


def test_same_tag_twice_replaces(tmp_path):
    run = Run()
    for n in (1, 2):
        run.train(1)
        path = run.strategy.save_ckpt(run.model, tmp_path, tag="same", client_state={"n": n, "consumed_samples": 8 * n})
        assert folder.manifest_of(Path(path))["data"] == 8 * n
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "same"]
    other = Run(seed=1)
    assert other.strategy.load_ckpt(other.model, tmp_path)[1] == {"n": 2, "consumed_samples": 16}
    assert equal(other.state(), run.state())


def test_a_foreign_folder_of_that_name_is_not_replaced(tmp_path):
    foreign = foreign_files(tmp_path)
    run = Run()
    with pytest.raises(ValueError, match="notes exists and is not a checkpoint of this package"):
        run.strategy.save_ckpt(run.model, tmp_path, tag="notes")
    assert sorted(tmp_path.rglob("*")) == foreign


@pytest.mark.parametrize(
    "bad",
    [threading.Lock(), lambda: 0, Path("x"), {"deep": [object()]}],
    ids=["lock", "lambda", "path", "object inside"],
)
def test_client_state_that_could_not_be_read_back_is_refused_first(saved, bad):
    before = sorted(saved.rglob("*"))
    run = Run()
    with pytest.raises(ValueError, match=r"client_state .* cannot be read back safely; use plain containers"):
        run.strategy.save_ckpt(run.model, saved, client_state={"bad": bad}, max_num=1)
    assert sorted(saved.rglob("*")) == before


@contextlib.contextmanager
def files_no_larger_than(size):
    """As a full disk: the operating system refuses to write more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1000, 8000])
def test_a_full_disk_leaves_the_older_checkpoints(saved, size):
    run = Run(layers=[nn.Linear(4, 4000), nn.Linear(4000, 1)])
    before = sorted(saved.rglob("*"))
    with pytest.raises(CheckpointError, match=r"c could not be written: \w*Error "), files_no_larger_than(size):
        run.strategy.save_ckpt(run.model, saved, tag="c", max_num=1)
    assert sorted(saved.rglob("*")) == before
    other = Run()
    assert other.strategy.load_ckpt(other.model, saved)[1] == {"tag": "b"}
    run.strategy.save_ckpt(run.model, saved, tag="c", max_num=1)  # with room again
    assert checkpoints(saved) == ["c"]


def test_killed_between_the_two_renames_of_one_tag(saved):
    (saved / "b").rename(saved / ".b.lightrft-old")  # what is on the disk then
    run = Run(seed=1)
    assert run.strategy.load_ckpt(run.model, saved)[1] == {"tag": "b"}
    run.strategy.save_ckpt(run.model, saved, tag="c")
    assert checkpoints(saved) == ["a", "b", "c"]
    assert run.strategy.load_ckpt(run.model, saved, "b")[1] == {"tag": "b"}


KILLER = """
import os, random, signal, sys, time  # the generator is an own one: loading a checkpoint sets the global state
import torch
from torch import nn
from lightrft_lightning import FakeStrategy

torch.set_num_threads(1)
folder, rounds = sys.argv[1], int(sys.argv[2])
strategy, model = FakeStrategy(), nn.Linear(64, 64)
optimizer = strategy.create_optimizer(model)

def save(n):
    nn.init.constant_(model.weight, n)
    tag = "same" if n % 2 else f"t{n}"
    strategy.save_ckpt(model, folder, tag=tag, max_num=2, client_state={"n": n}, optimizer=optimizer)

generator = random.Random()
start = time.perf_counter()
save(0)
duration = time.perf_counter() - start
n = 0
for _ in range(rounds):
    child = os.fork()
    if child == 0:
        while True:
            n += 1
            save(n)
    time.sleep(generator.uniform(0, 5 * duration))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    nn.init.zeros_(model.weight)
    path, client = strategy.load_ckpt(model, folder)
    latest = open(os.path.join(folder, "latest")).read()
    assert os.path.basename(path).strip(".").startswith(latest), (path, latest)
    assert (model.weight == client["n"]).all(), (path, client)
    assert client["n"] >= n, (client, n)
    n = client["n"]
    print(n, flush=True)
"""


def test_killed_at_random_points_the_latest_checkpoint_is_always_complete(tmp_path):
    command = [sys.executable, "-c", KILLER, str(tmp_path), "10"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    numbers = [int(line) for line in done.stdout.split()]
    assert len(numbers) == 10 and numbers[-1] >= 3  # saves were made and interrupted
    run = FakeStrategy()
    run.save_ckpt(nn.Linear(64, 64), tmp_path, tag="last", max_num=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "latest"]


# -------------------------------------------------------------------- Lightning's checkpoints


class Module(pl.LightningModule):
    def __init__(self, width=4, extra=False):
        super().__init__()
        self.layer = nn.Linear(width, 1)
        self.extra = nn.Linear(1, 1) if extra else None

    def training_step(self, batch, batch_idx):
        return self.layer(batch.new_ones(2, self.layer.in_features)).sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.zeros(4), batch_size=2)


def trainer(root, **kwargs):
    settings = {"strategy": "lightrft_fake", "logger": False, "max_epochs": 1, **kwargs}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=root, **quiet, **settings)


@pytest.fixture(scope="module", params=["lightrft_fake", "auto"])
def lightning_checkpoint(request, tmp_path_factory):
    """A folder of ours, and a file of Lightning's."""
    root = tmp_path_factory.mktemp("lightning")
    callback = ModelCheckpoint(dirpath=root, filename="c")
    trainer(root, strategy=request.param, callbacks=[callback]).fit(Module())
    return root / "c.ckpt"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_trainer_refuses_a_truncated_file(lightning_checkpoint, tmp_path, share):
    file = tmp_path / "cut.ckpt"
    (shutil.copytree if lightning_checkpoint.is_dir() else shutil.copy)(lightning_checkpoint, file)
    part = next(file.glob("*.distcp")) if file.is_dir() else file
    part.write_bytes(part.read_bytes()[: int(share * part.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt is (incomplete, )?damaged"):
        trainer(tmp_path, enable_checkpointing=False).fit(Module(), ckpt_path=file)


def test_trainer_refuses_a_file_of_something_else(tmp_path):
    for name, content in (("text.ckpt", b"not a checkpoint"), ("random.ckpt", random.Random(0).randbytes(5000))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            trainer(tmp_path, enable_checkpointing=False).fit(Module(), ckpt_path=tmp_path / name)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Module(width=5), "layer.weight has shape (1, 4) there and (1, 5) here"),
        (lambda: Module(extra=True), "it has no extra.weight"),
    ],
)
def test_trainer_refuses_a_checkpoint_of_another_model(lightning_checkpoint, tmp_path, model, words):
    with pytest.raises(CheckpointError) as error:
        trainer(tmp_path, enable_checkpointing=False).fit(model(), ckpt_path=lightning_checkpoint)
    assert "of another model" in str(error.value) and words in str(error.value)


def test_trainer_refuses_a_checkpoint_of_a_larger_model(tmp_path):
    callback = ModelCheckpoint(dirpath=tmp_path, filename="large")
    trainer(tmp_path, callbacks=[callback]).fit(Module(extra=True))
    with pytest.raises(CheckpointError, match=r"extra\.weight does not exist here"):
        trainer(tmp_path, enable_checkpointing=False).fit(Module(), ckpt_path=tmp_path / "large.ckpt")


# -------------------------------------------------------------------- save_model


@pytest.fixture(scope="module")
def llama():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


IDS = torch.arange(10)[None]


def opened(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


class Actor(nn.Module):
    """LightRFT's actors hold the model as `.model`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits


@pytest.mark.parametrize("wrap", [lambda m: m, Actor], ids=["bare", "wrapper"])
@pytest.mark.parametrize("bf16", [False, True])
def test_save_model_opens_with_from_pretrained(llama, tmp_path, wrap, bf16):
    from lightrft_lightning.models.tiny import char_tokenizer

    strategy, model = FakeStrategy(bf16=bf16), wrap(copy.deepcopy(llama))
    model, _ = strategy.prepare((model, strategy.create_optimizer(model)))
    strategy.save_model(model, char_tokenizer(), tmp_path / "out")
    again = opened(tmp_path / "out")
    assert torch.equal(again(IDS).logits, llama.train(False)(IDS).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight  # tied
    assert (tmp_path / "out" / "model.safetensors").is_file() and not list((tmp_path / "out").glob("*.bin"))
    import transformers

    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("1+1")["input_ids"]


def test_save_model_without_tokenizer_twice_and_while_training(llama, tmp_path):
    model = copy.deepcopy(llama)
    FakeStrategy().save_model(model, None, tmp_path)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    FakeStrategy().save_model(model, None, tmp_path)
    assert torch.equal(opened(tmp_path)(IDS).logits, model.eval()(IDS).logits)


def test_save_model_merges_lora_or_saves_the_adapter(llama, tmp_path):
    import peft

    base = copy.deepcopy(llama)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.eval()
    expected = adapted(IDS).logits
    assert not torch.allclose(expected, llama.eval()(IDS).logits, atol=1e-4)
    strategy = FakeStrategy()
    strategy.save_model(Actor(adapted), None, tmp_path / "merged")
    assert torch.allclose(opened(tmp_path / "merged")(IDS).logits, expected, atol=1e-5)
    assert torch.equal(adapted(IDS).logits, expected)  # training goes on with the adapter
    assert any("lora_A" in name for name, _ in adapted.named_parameters())

    strategy.save_model(adapted, None, tmp_path / "adapter", merge_lora=False)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 20_000
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "adapter")
    assert torch.allclose(loaded.eval()(IDS).logits, expected, atol=1e-6)


def test_save_model_refuses_a_plain_module(tmp_path):
    for model in (nn.Linear(1, 1), Actor(nn.Linear(1, 1))):
        with pytest.raises(TypeError, match=f"{type(model).__name__} is none and holds none.*Use save_ckpt"):
            FakeStrategy().save_model(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
