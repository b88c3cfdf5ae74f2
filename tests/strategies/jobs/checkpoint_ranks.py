"""Checkpoints of two ranks: FSDP2's DTensors, and ranges that begin and end anywhere; see checks.py."""

from __future__ import annotations

import copy
import random
import resource
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import checks
import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.data import DataLoader

from lightrft_lightning import CheckpointError, FakeStrategy, FSDPV2Strategy
from lightrft_lightning.checkpoints import folder, state, store
from lightrft_lightning.checkpoints.flat import FlatTensor
from lightrft_lightning.strategies.distributed import DistributedStrategy

FOLDER = Path(sys.argv[1])
if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    RANK, MESH = dist.get_rank(), init_device_mesh("cpu", (2,))


class Plain(DistributedStrategy):
    """Two ranks; the models are sharded by their user."""


class Ranges(Plain):
    """Like ZeRO-1: every rank has the parameters, but answers for a part of the row of all of them only."""

    def _mine(self, tensors, share=0.37):
        total = sum(t.numel for t in tensors.values())
        begin, end = ((0, int(share * total)), (int(share * total), total))[RANK]
        position, mine = 0, {}
        for name, tensor in tensors.items():
            first, last = max(begin - position, 0), min(end - position, tensor.numel)
            pieces = [(o + first, v[first:last]) for o, v in tensor.pieces if first < last]
            mine[name] = FlatTensor(tensor.shape, tensor.dtype, tuple(pieces))
            position += tensor.numel
        return mine

    def _complete(self, tensors):
        """Give the other rank what this one has read, and take what it has."""
        for name, mine in self._mine(tensors).items():
            for part in store.Ranks(RANK, 2, dist.group.WORLD).gather(mine):
                for offset, values in part.pieces:
                    tensors[name].pieces[0][1][offset : offset + len(values)] = values

    def _model_tensors(self, model):
        return self._mine(super()._model_tensors(model))

    def _model_loaded(self, model):
        self._complete(state.model_tensors(model))

    def _optimizer_tensors(self, model, optimizer, saved=None):
        return self._mine(super()._optimizer_tensors(model, optimizer, saved), 0.81)

    def _optimizer_loaded(self, model, optimizer):
        tensors = state.optimizer_tensors(model, optimizer)
        for name, mine in self._mine(tensors, 0.81).items():
            for part in store.Ranks(RANK, 2, dist.group.WORLD).gather(mine):
                for offset, values in part.pieces:
                    tensors[name].pieces[0][1][offset : offset + len(values)] = values


class Net(nn.Module):
    """Odd sizes, a buffer, a number, tied weights, and one matrix that is not contiguous."""

    def __init__(self, width=5):
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.scale = nn.Parameter(torch.randn(width, 3).t())
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        self.seen += 1
        return self.head(hidden * self.scale.mean(0))


KINDS = ("fake", "fsdp", "ranges")


class Run:
    def __init__(self, kind, seed=0, width=5, make=torch.optim.AdamW):
        torch.manual_seed(seed)
        self.model = Net(width)
        self.strategy = {"fake": FakeStrategy, "fsdp": Plain, "ranges": Ranges}[kind]()
        if kind != "fake":
            self.model.scale = nn.Parameter(self.model.scale.detach().contiguous())
        if kind == "fsdp":
            for layer in self.model.layers:
                fully_shard(layer, mesh=MESH)
            fully_shard(self.model, mesh=MESH)
        self.optimizer = make(self.model.parameters(), lr=0.1 / (seed + 1))
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)
        self.known = {"optimizer": self.optimizer, "scheduler": self.scheduler}

    def train(self, steps):
        for step in range(steps):
            ids = (torch.arange(4) + step) % 6  # the same on all ranks, so that the mean over them is exact
            nn.functional.cross_entropy(self.model(ids), ids + 1).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        return self

    def save(self, where, **settings):
        return self.strategy.save_ckpt(self.model, where, **self.known, **settings)

    def load(self, where, **settings):
        return self.strategy.load_ckpt(self.model, where, **self.known, **settings)

    def state(self):
        """All of it, whole, on every rank."""
        tensors = dict(self.model.state_dict())
        names = {p: n for n, p in self.model.named_parameters()}
        for parameter, values in self.optimizer.state.items():
            tensors |= {f"{names[parameter]}.{key}": value for key, value in values.items()}
        whole = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in tensors.items()}
        numbers = {"lr": self.optimizer.param_groups[0]["lr"], "epoch": self.scheduler.last_epoch}
        return copy.deepcopy({n: v.contiguous() for n, v in whole.items()}), numbers


def same(a, b):
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][n]) for n, v in a[0].items())


def alone(function):
    """On rank 0; the other one waits."""
    if RANK == 0:
        function()
    dist.barrier()


@contextmanager
def raises(kind, *words, same=True):
    """The same error on both ranks."""
    with pytest.raises(kind) as error:
        yield
    text = str(error.value)
    assert all(word in text for word in words), text
    texts = [None, None]
    dist.all_gather_object(texts, text)
    assert texts[0] == texts[1] or not same, texts


def files(where):
    dist.barrier()
    return sorted(str(p.relative_to(where)) for p in where.rglob("*"))


def check_all_ordered_pairs():
    expected = Run("fake").train(3).state()
    for kind in KINDS:
        if kind != "fake":
            run = Run(kind).train(3)
            assert same(run.state(), expected), kind
            run.save(FOLDER / kind, client_state={"from": kind})
        else:
            alone(lambda: Run("fake").train(3).save(FOLDER / "fake", client_state={"from": "fake"}))
    for source in KINDS:
        for target in KINDS:
            for before in (0, 1):  # a fresh optimizer, and one that has made a step
                run = Run(target, seed=1).train(before)
                _, client = run.load(FOLDER / source)
                assert client == {"from": source}
                assert same(run.state(), expected), (source, target, before)
    further = Run("fake").train(5).state()
    run = Run("fsdp", seed=2)
    run.load(FOLDER / "ranges")
    resumed = run.train(5)  # steps 0 to 4 of the data again: only the state is continued
    other = Run("ranges", seed=3)
    other.load(FOLDER / "fsdp")
    assert same(other.train(5).state(), resumed.state())
    assert not same(resumed.state(), further)


def check_each_rank_writes_its_ranges_and_nothing_is_written_twice():
    run = Run("fsdp").train(1)
    stored = store.Stored(*_opened(run.save(FOLDER / "written")))
    for name, entry in stored._metadata.state_dict_metadata.items():
        assert sum(chunk.sizes[0] for chunk in entry.chunks) == entry.size[0], name
    elements = {"__0_0.distcp": 0, "__1_0.distcp": 0}
    for index, where in stored._metadata.storage_data.items():
        chunks = {c.offsets[0]: c.sizes[0] for c in stored._metadata.state_dict_metadata[index.fqn].chunks}
        elements[where.relative_path] += chunks[index.offset[0]]
    whole = sum(v.numel() for v in run.state()[0].values() if v.numel() > 1) - 35  # tied weights: once
    replicated = 5 * 1 + 1 + 6  # numbers
    assert sum(elements.values()) - whole < replicated + 10
    assert 0.3 < elements["__1_0.distcp"] / sum(elements.values()) <= 0.5, elements
    assert "model.head.weight" not in stored.tensors and stored.manifest["tied"] == {"head.weight": "embed.weight"}


def _opened(path):
    return Path(path), folder.manifest_of(Path(path))


def check_dtensors_of_every_layout():
    class Holder(nn.Module):
        def __init__(self, fill, *placements):
            super().__init__()
            whole = torch.arange(42.0).reshape(6, 7) if fill else torch.zeros(6, 7)
            self.weight = nn.Parameter(distribute_tensor(whole, MESH, placements) if placements else whole)

    layouts = ((), (Shard(0),), (Shard(1),), (Replicate(),))
    for number, layout in enumerate(layouts):
        Plain().save_ckpt(Holder(True, *layout), FOLDER / "layouts", tag=f"t{number}", max_num=9)
    for number in range(len(layouts)):
        for layout in layouts:
            holder = Holder(False, *layout)
            Plain().load_ckpt(holder, FOLDER / "layouts", tag=f"t{number}")
            whole = holder.weight.full_tensor() if layout else holder.weight
            assert torch.equal(whole.detach(), torch.arange(42.0).reshape(6, 7)), (number, layout)


def check_random_state_rank_by_rank():
    torch.manual_seed(RANK), random.seed(RANK)
    run = Run("fsdp")
    torch.manual_seed(10 + RANK)
    run.save(FOLDER / "rng")
    expected = torch.randn(3), random.random()
    torch.manual_seed(99), random.seed(99)
    run.load(FOLDER / "rng")
    assert torch.equal(torch.randn(3), expected[0]) and random.random() == expected[1]
    assert len({float(x) for x in _gathered(expected[0][0])}) == 2
    fake = Run("fake")
    fake.load(FOLDER / "rng")  # one process: that of rank 0
    assert torch.equal(torch.randn(3), _gathered(expected[0])[0])
    alone(lambda: (torch.manual_seed(7), fake.save(FOLDER / "rng_of_one")))
    run.load(FOLDER / "rng_of_one")  # two processes: both that of the only one
    assert torch.equal(torch.randn(3), torch.randn(3, generator=torch.Generator().manual_seed(7)))


def _gathered(value):
    values = [None, None]
    dist.all_gather_object(values, value)
    return values


@contextmanager
def full_disk(on):
    """As far as rank `on` can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if on == RANK:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_a_failure_on_one_rank_is_an_error_on_all():
    where, run = FOLDER / "failing", Run("fsdp").train(1)
    run.save(where, tag="good")
    before = files(where)
    for rank in (0, 1):
        with full_disk(rank), raises(CheckpointError, f"rank {rank}", "could not be written", "Error"):
            run.save(where, tag="bad", max_num=1)
        assert files(where) == before and (where / "latest").read_text() == "good"
    with raises(ValueError, "rank 0", "client_state"):  # only that of rank 0 is written
        run.save(where, tag="bad", max_num=1, client_state={"x": object()} if RANK == 0 else {})
    other = Run("fsdp", seed=1)
    with raises(ValueError, "rank 1", "that is not in FSDPNet"):
        optimizer = other.optimizer if RANK == 1 else run.optimizer
        run.strategy.save_ckpt(run.model, where, "bad", optimizer=optimizer)
    with raises(ValueError, "must be a plain folder name"):
        run.save(where, tag="a/b")
    assert files(where) == before
    other.load(where)
    assert same(other.state(), run.state())


def check_a_folder_that_ranks_do_not_share():
    run = Run("fsdp")
    words = ("rank 1", "does not see", "save_dir must be on a file system that all ranks share")
    with raises(CheckpointError, *words, same=False):
        run.save(FOLDER / f"of_rank_{RANK}", tag="x")
    assert files(FOLDER / "of_rank_0") == [] and not (FOLDER / "of_rank_1").exists()
    good = FOLDER / "shared_at_first"
    run.save(good)
    with raises(FileNotFoundError, "rank 1"):
        run.load(good if RANK == 0 else FOLDER / "nothing")


def check_damage_is_an_error_on_all_and_changes_nothing():
    good = FOLDER / "damaged"
    Run("fsdp").train(2).save(good, tag="x")
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "state.pt", "rank_0.pt", "rank_1.pt", "manifest.json"):
        for damage in ("flip", "cut", "gone"):
            bad = FOLDER / f"damaged_{name}_{damage}"
            alone(lambda: _damaged(good, bad, name, damage))  # noqa: B023
            run = Run("ranges", seed=1).train(1)
            before = run.state()
            with raises(CheckpointError, str(bad)):
                run.load(bad, tag="x")
            assert same(run.state(), before)


def _damaged(good, bad, name, damage):
    shutil.copytree(good, bad)
    file = bad / "x" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    {"flip": lambda: file.write_bytes(content), "cut": lambda: file.write_bytes(content[:-9]), "gone": file.unlink}[
        damage
    ]()


def check_another_model_is_an_error_on_all_and_changes_nothing():
    Run("fsdp").train(1).save(FOLDER / "of_another")
    for width in ({0: 6, 1: 6}, {0: 5, 1: 6}):  # on both ranks; by a mistake on one only
        run = Run("ranges", seed=1, width=width[RANK])
        before = run.state()
        with raises(CheckpointError, "of another model: scale has shape (3, 5) there and (3, 6) here"):
            run.load(FOLDER / "of_another")
        assert same(run.state(), before)
    run = Run("fsdp", seed=1, make=torch.optim.SGD)
    before = run.state()
    with raises(CheckpointError, "of another kind of optimizer"):
        run.load(FOLDER / "of_another")
    assert same(run.state(), before)


def check_written_in_the_background():
    where, run = FOLDER / "background", Run("fsdp").train(2)
    expected = run.state()
    run.save(where, tag="a", wait=False)
    run.train(3)  # with collectives of its own, and the weights change under the writer's feet
    run.save(where, tag="b", wait=False)
    later = run.state()
    run.strategy.finish_checkpoints()
    other = Run("fsdp", seed=1)
    for tag, wanted in (("a", expected), ("b", later)):
        other.load(where, tag=tag)
        assert same(other.state(), wanted), tag
    with full_disk(1):
        run.save(where, tag="c", wait=False)
        with raises(CheckpointError, "rank 1", "c could not be written"):
            run.strategy.finish_checkpoints()
    run.strategy.finish_checkpoints()  # told once
    assert (where / "latest").read_text() == "b"


# -------------------------------------------------------------------- Lightning's form


class Module(pl.LightningModule):
    def __init__(self, seed=0, make=torch.optim.AdamW):
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.make = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)), make

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def train_dataloader(self):
        return DataLoader(torch.randn(48, 5, generator=torch.Generator().manual_seed(1)), batch_size=6)

    def configure_optimizers(self):
        optimizer = self.make(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Memory(pl.Callback):
    """State with tensors, one of them sharded."""

    tensors = None

    def on_train_epoch_end(self, trainer, module):
        self.tensors = {"count": torch.tensor(trainer.current_epoch), "list": [module.net[0].weight.detach().clone()]}

    def state_dict(self):
        return {"tensors": self.tensors, "note": "x"}

    def load_state_dict(self, state_dict):
        self.loaded = state_dict


def fit(where, module, epochs, ckpt_path=None, callbacks=(), strategy=None, **settings):
    keep = ModelCheckpoint(where, save_last=True, save_top_k=-1, filename="{epoch}")
    trainer = pl.Trainer(
        strategy=strategy or FSDPV2Strategy(), accelerator="cpu", devices=2, max_epochs=epochs, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=where, callbacks=[keep, *callbacks],
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path, **settings)
    return whole(module), trainer


def whole(module):
    return {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in module.state_dict().items()}


def check_trainer_resumes_and_no_rank_reads_the_whole_model():
    straight, _ = fit(FOLDER / "straight", Module(), 4)
    memory = Memory()
    fit(FOLDER / "half", Module(), 2, callbacks=[memory])
    assert files(FOLDER / "half") and (FOLDER / "half" / "last.ckpt" / "__1_0.distcp").is_file()
    read = []
    original = store.Stored.read
    store.Stored.read = lambda self, name: read.append(name) or original(self, name)
    try:
        again = Memory()
        resumed, trainer = fit(FOLDER / "rest", Module(1), 4, FOLDER / "half" / "last.ckpt", callbacks=[again])
    finally:
        store.Stored.read = original
    assert all(torch.equal(v, straight[n]) for n, v in resumed.items())
    assert trainer.global_step == 16
    assert read and all("callbacks" in name for name in read), read
    assert again.loaded["note"] == "x" and int(again.loaded["tensors"]["count"]) == 1
    assert torch.equal(again.loaded["tensors"]["list"][0], memory.tensors["list"][0].full_tensor())


def check_trainer_resumes_without_optimizer_state():
    straight, _ = fit(FOLDER / "sgd", Module(make=torch.optim.SGD), 3)
    fit(FOLDER / "sgd2", Module(make=torch.optim.SGD), 2)
    resumed, _ = fit(FOLDER / "sgd3", Module(1, make=torch.optim.SGD), 3, FOLDER / "sgd2" / "last.ckpt")
    assert all(torch.equal(v, straight[n]) for n, v in resumed.items())


def check_trainer_writes_in_the_background():
    straight, _ = fit(FOLDER / "async0", Module(), 3)
    fit(FOLDER / "async1", Module(), 2, strategy=FSDPV2Strategy(async_checkpoints=True))
    resumed, _ = fit(FOLDER / "async2", Module(1), 3, FOLDER / "async1" / "last.ckpt")
    assert all(torch.equal(v, straight[n]) for n, v in resumed.items())


def check_trainers_checkpoint_elsewhere():
    """Read by one process, from the folder and by a hook's hands; and one of Lightning's files read by two."""
    expected, _ = fit(FOLDER / "there", Module(), 2)
    checkpoint = FakeStrategy().load_checkpoint(FOLDER / "there" / "last.ckpt")
    assert torch.equal(checkpoint["state_dict"]["net.0.weight"], expected["net.0.weight"])
    straight, _ = fit(FOLDER / "there4", Module(), 4)
    file = FOLDER / "lightning.ckpt"
    if RANK == 0:
        states = checkpoint["optimizer_states"][0]
        names = [n for g in states["param_groups"] for n in g["params"]]
        state_of = {
            i: {k: states["state"][f"{n}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")} for i, n in enumerate(names)
        }
        groups = [{**g, "params": list(range(len(names)))} for g in states["param_groups"]]
        plain = {**checkpoint, "state_dict": dict(checkpoint["state_dict"])}
        torch.save({**plain, "optimizer_states": [{"state": state_of, "param_groups": groups}]}, file)
    dist.barrier()
    resumed, _ = fit(FOLDER / "from_file", Module(1), 4, file, weights_only=False)
    assert all(torch.equal(v, straight[n]) for n, v in resumed.items())


def check_last_of_all_a_rank_that_saves_alone_gets_an_error():
    strategy = Plain()
    strategy._timeout = timedelta(seconds=3)
    if RANK == 0:
        start = time.monotonic()
        with pytest.raises(CheckpointError, match="all of them have to call it together"):
            strategy.save_ckpt(nn.Linear(2, 2), FOLDER / "alone")
        assert time.monotonic() - start < 30
    else:
        time.sleep(5)


if __name__ == "__main__":
    checks.run(dict(globals()))
    with suppress(Exception):
        dist.destroy_process_group()
