"""What a Trainer saves and resumes from, in one process: the same folders as `save_ckpt`, and Lightning's own files."""

from __future__ import annotations

import copy
import json
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader

from lightrft_lightning import CheckpointError, FakeStrategy
from lightrft_lightning.checkpoints import _dcp, folder, store
from lightrft_lightning.checkpoints.trainer_state import load_module
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama


class Module(pl.LightningModule):
    def __init__(self, seed=0, width=9, make=torch.optim.AdamW, note=None):
        super().__init__()
        self.save_hyperparameters(ignore=["make"])
        torch.manual_seed(seed)
        self.net, self.make = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)), make

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch).square().mean())

    def train_dataloader(self):
        return DataLoader(torch.randn(24, 5, generator=torch.Generator().manual_seed(1)), batch_size=6)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        optimizer = self.make(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def make_trainer(where, epochs=1, callbacks=(), strategy="lightrft_fake", **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_epochs=epochs, default_root_dir=where,
        callbacks=[ModelCheckpoint(where, filename="{epoch}", save_last=True), *callbacks],
        num_sanity_val_steps=0, **quiet, **settings,
    )  # fmt: skip


def fit(where, module, epochs, ckpt_path=None, weights_only=None, **settings):
    trainer = make_trainer(where, epochs, **settings)
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=weights_only)
    return {n: v.clone() for n, v in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[n]) for n, v in a.items())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The weights after four epochs."""
    return fit(tmp_path_factory.mktemp("straight"), Module(), 4)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A checkpoint after two of them."""
    where = tmp_path_factory.mktemp("half")
    fit(where, Module(), 2)
    return where / "last.ckpt"


# -------------------------------------------------------------------- resume


def test_resume_reads_no_weights_as_a_whole(straight, half, tmp_path, monkeypatch):
    read = []
    original = store.Stored.read
    monkeypatch.setattr(store.Stored, "read", lambda self, name: read.append(name) or original(self, name))
    assert same(fit(tmp_path, Module(1), 4, half), straight)
    assert not [name for name in read if name.startswith(("model.", "optimizer."))], read


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.RMSprop])
def test_other_optimizers_resume_too(tmp_path, make):
    """SGD has no state at all (pitfall 6 of sharded strategies)."""
    expected = fit(tmp_path / "a", Module(make=make), 4)
    fit(tmp_path / "b", Module(make=make), 2)
    assert same(fit(tmp_path / "c", Module(1, make=make), 4, tmp_path / "b" / "last.ckpt"), expected)


@pytest.mark.parametrize("before", [False, True])
def test_moments_of_eight_bits_resume(tmp_path, before):
    """From moments of full precision likewise."""

    def fit_8bit(name, seed, epochs, ckpt_path=None, adam_8bit=True):
        module = Module(seed, width=1000, make=lambda *_, lr: module.trainer.strategy.create_optimizer(module, lr=lr))
        return fit(tmp_path / name, module, epochs, ckpt_path, strategy=FakeStrategy(adam_8bit=adam_8bit))

    start = Module(0, width=1000).state_dict()
    expected = fit_8bit("a", 0, 4, adam_8bit=before)
    fit_8bit("b", 0, 2, adam_8bit=before)
    resumed = fit_8bit("c", 1, 4, tmp_path / "b" / "last.ckpt")
    for name, value in expected.items():
        allowed = 1e-5 if before else 0.05
        assert (resumed[name] - value).norm() < allowed * (value - start[name]).norm(), name


def test_lightnings_own_file_resumes(straight, tmp_path):
    fit(tmp_path / "auto", Module(), 2, strategy="auto")
    assert (tmp_path / "auto" / "last.ckpt").is_file()
    assert same(fit(tmp_path / "ours", Module(1), 4, tmp_path / "auto" / "last.ckpt"), straight)


def test_a_file_of_lightnings_is_replaced_by_a_folder(half, tmp_path):
    (tmp_path / "last.ckpt").write_text("of an earlier run")
    trainer = make_trainer(tmp_path)
    trainer.fit(Module())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert folder.is_checkpoint(tmp_path / "last.ckpt")
    assert not list(tmp_path.glob(".*"))


def test_weights_only(straight, half, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit(Module())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match=r"weights\.ckpt holds weights only .*load_from_checkpoint"):
        fit(tmp_path / "x", Module(1), 2, tmp_path / "weights.ckpt")
    other = Module(1)
    make_trainer(tmp_path).validate(other, ckpt_path=tmp_path / "weights.ckpt", verbose=False)
    assert same(other.state_dict(), trainer.lightning_module.state_dict())


class Note:
    """No plain value."""

    def __eq__(self, other):
        return isinstance(other, Note)


def test_objects_need_the_users_trust(straight, tmp_path):
    fit(tmp_path, Module(note=Note()), 2)
    with pytest.raises(CheckpointError, match="if you trust it, pass weights_only=False"):
        fit(tmp_path / "x", Module(1), 4, tmp_path / "last.ckpt")
    assert same(fit(tmp_path / "y", Module(1), 4, tmp_path / "last.ckpt", weights_only=False), straight)


def test_what_cannot_be_pickled_is_an_error_and_leaves_the_older_one(tmp_path):
    class Bad(pl.Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            if trainer.current_epoch:
                checkpoint["bad"] = lambda: 0

    with pytest.raises(ValueError, match="cannot be pickled"):
        fit(tmp_path, Module(), 2, callbacks=[Bad()])
    assert folder.is_checkpoint(tmp_path / "last.ckpt") and not list(tmp_path.glob(".*"))


# -------------------------------------------------------------------- hooks and callbacks


def test_hooks_may_change_what_is_saved_and_loaded(straight, tmp_path):
    class Renames(Module):
        def on_save_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {f"old.{name}": value for name, value in state.items()}
            checkpoint["mine"] = {"deep": [torch.arange(3), {"x": torch.tensor(2.0)}], "text": "x", "tuple": (1, 2)}

        def on_load_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            for name in list(state):
                state[name.removeprefix("old.")] = state.pop(name)
            self.mine = checkpoint["mine"]

    fit(tmp_path, Renames(), 2)
    module = Renames(1)
    assert same(fit(tmp_path / "rest", module, 4, tmp_path / "last.ckpt"), straight)
    (first, second), text = module.mine["deep"], module.mine["text"]
    assert torch.equal(first, torch.arange(3)) and second["x"] == 2 and text == "x" and module.mine["tuple"] == (1, 2)


def test_any_module_is_loaded_from_a_folder(tmp_path):
    saved = fit(tmp_path, Module(), 1)
    assert same(Module.load_from_checkpoint(tmp_path / "last.ckpt").state_dict(), saved)
    module = Module.load_from_checkpoint(str(tmp_path / "last.ckpt"), map_location="cpu", width=9, seed=1)
    assert same(module.state_dict(), saved) and module.hparams.seed == 1
    next((tmp_path / "last.ckpt").glob("*.distcp")).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"\.distcp"):
        Module.load_from_checkpoint(tmp_path / "last.ckpt")


class Renames(Module):
    """Reads what it was called before: by a hook, or by a method of its own."""

    def __init__(self, by="hook"):
        super().__init__(1)
        self.new, self.by = self.net, by
        del self.net
        if by == "hook":
            self._register_load_state_dict_pre_hook(lambda state, *_: state.update(self.renamed(state)))

    def renamed(self, state):
        return {name.replace("net", "new"): state.pop(name) for name in list(state)}

    def load_state_dict(self, state, *args, **more):
        return super().load_state_dict(self.renamed(state) if self.by == "method" else state, *args, **more)

    def validation_step(self, batch, batch_idx):
        self.log("val", self.new(batch).square().mean())


@pytest.mark.parametrize("by", ["hook", "method"])
def test_a_module_may_load_by_itself(tmp_path, by):
    saved, module = fit(tmp_path, Module(), 1), Renames(by)
    make_trainer(tmp_path).validate(module, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert same({name.replace("new", "net"): v for name, v in module.state_dict().items()}, saved)


def test_a_trainer_can_be_sent_to_another_process(tmp_path):
    trainer = pickle.loads(pickle.dumps(make_trainer(tmp_path)))
    trainer.fit(Module())
    assert trainer.global_step == 4


def test_what_cannot_be_written_is_refused_before_training(tmp_path):
    class Counts(pl.Callback):
        def on_train_batch_end(self, *args):
            pytest.fail("it trains")

    trainer = make_trainer(tmp_path, callbacks=[ModelCheckpoint("memory://x", monitor="val"), Counts()])
    with pytest.raises(ValueError, match=r"ModelCheckpoint would write to 'memory://x'.*only local folders"):
        trainer.fit(Module())
    with pytest.raises(TypeError, match="AsyncCheckpointIO"):
        make_trainer(tmp_path, callbacks=[Counts()], plugins=[AsyncCheckpointIO()]).fit(Module())


def test_lightnings_tuner(tmp_path):
    tuners = [Tuner(make_trainer(tmp_path, strategy=strategy)) for strategy in ("auto", "lightrft_fake")]
    losses, expected = (tuner.lr_find(Tuned(), num_training=10).results["loss"] for tuner in tuners)
    assert losses == pytest.approx(expected)
    sizes = [tuner.scale_batch_size(Tuned(), max_trials=2, steps_per_trial=1) for tuner in tuners]
    assert sizes[0] == sizes[1] > 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


class Tuned(Module):
    def __init__(self):
        super().__init__()
        self.lr, self.batch_size = 1e-3, 2

    def train_dataloader(self):
        return DataLoader(torch.randn(24, 5, generator=torch.Generator().manual_seed(1)), self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


@pytest.mark.parametrize("strategy", ["auto", "lightrft_fake"])
def test_on_fit_start_sees_what_was_saved(tmp_path, strategy):
    class Looks(Module):
        def on_fit_start(self):
            self.seen = {n: v.clone() for n, v in self.state_dict().items()}

    class Counts(pl.Callback):
        count = 0

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

        def on_train_batch_end(self, *args):
            self.count += 1

        def on_fit_start(self, *args):
            self.seen = self.count

    saved = fit(tmp_path, Looks(), 1, strategy=strategy, callbacks=[Counts()])
    module, counts = Looks(1), Counts()
    fit(tmp_path / "rest", module, 2, tmp_path / "last.ckpt", strategy=strategy, callbacks=[counts])
    assert same(module.seen, saved) and counts.seen == 4


def test_weight_averaging(tmp_path):
    def average(where, module, epochs, ckpt_path=None):
        # Lightning's own callback: it swaps the state dict for that of the average.
        return fit(where, module, epochs, ckpt_path, callbacks=[WeightAveraging()])

    expected = average(tmp_path / "a", Module(), 4)
    average(tmp_path / "b", Module(), 2)
    assert same(average(tmp_path / "c", Module(1), 4, tmp_path / "b" / "last.ckpt"), expected)
    names = folder.manifest_of(tmp_path / "b" / "last.ckpt")["tensors"]
    assert {"model.net.0.weight", "current_model_state.net.0.weight"} <= set(names)


def test_random_state_is_offered_to_the_module(half):
    checkpoint = FakeStrategy().load_checkpoint(half)
    assert checkpoint["lightrft_rng"].keys() >= {"torch", "python", "numpy"}


def test_state_reads_like_a_dictionary(half):
    state = FakeStrategy().load_checkpoint(half)["state_dict"]
    module = Module(1)
    module.load_state_dict(state)
    assert same(dict(state), module.state_dict()) and len(state) == 4 and "x" not in state
    again = copy.deepcopy(state)
    del again["net.0.bias"]
    again["net.0.weight"] = torch.zeros(9, 5)
    assert len(again) == 3 and "net.0.bias" in state and not again["net.0.weight"].any()
    assert state["net.0.weight"].any()


# -------------------------------------------------------------------- files on disk


@pytest.mark.parametrize("settings", [{}, {"async_checkpoints": True}])
def test_only_the_newest_remains(straight, tmp_path, settings):
    trainer = make_trainer(tmp_path, 4, strategy=FakeStrategy(**settings))
    trainer.fit(Module())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=3.ckpt", "last.ckpt"]
    read = FakeStrategy().load_checkpoint(tmp_path / "epoch=3.ckpt")
    assert same(dict(read["state_dict"]), straight) and read["epoch"] == 3


def test_a_failure_in_the_background_ends_the_run_and_keeps_the_older_checkpoint(tmp_path, monkeypatch, caplog):
    original = _dcp.save

    def fails_the_second_time(tensors, path, group):
        original(tensors, path, group)
        if list(tmp_path.glob("epoch*.ckpt")):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(_dcp, "save", fails_the_second_time)
    trainer = make_trainer(tmp_path, 2, strategy=FakeStrategy(async_checkpoints=True))
    with pytest.raises(CheckpointError, match=r"could not be written: OSError .*No space left"):
        trainer.fit(Module())
    assert "No space left" in caplog.text  # said at once
    assert folder.is_checkpoint(tmp_path / "epoch=0.ckpt")
    assert [p.name for p in tmp_path.iterdir() if p.is_dir() and not p.is_symlink()] == ["epoch=0.ckpt"]


def test_the_two_forms_do_not_take_each_other_for_their_own(half, tmp_path):
    strategy, module = FakeStrategy(), Module(1)
    strategy.save_ckpt(module, tmp_path)
    with pytest.raises(CheckpointError, match=r"was written by save_ckpt\(\): read it with load_ckpt"):
        fit(tmp_path / "x", Module(), 1, tmp_path / "step_0")
    with pytest.raises(CheckpointError, match=r"was written by a Trainer: resume it with fit\(ckpt_path=\.\.\.\)"):
        strategy.load_ckpt(module, half)
    strategy.load_ckpt(module, half, load_module_only=True)
    assert same(module.state_dict(), dict(strategy.load_checkpoint(half)["state_dict"]))


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'nowhere\.ckpt'"):
        fit(tmp_path, Module(), 1, tmp_path / "nowhere.ckpt")


def test_what_would_have_no_effect_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit(Module())
    with pytest.raises(TypeError, match="storage_options="):
        trainer.save_checkpoint(tmp_path / "x.ckpt", storage_options={"a": 1})
    with pytest.raises(ValueError, match=r"s3://bucket/x\.ckpt.*only local folders"):
        trainer.save_checkpoint("s3://bucket/x.ckpt")
    with pytest.raises(TypeError, match=r"AsyncCheckpointIO.*async_checkpoints=True"):
        make_trainer(tmp_path / "io", plugins=[AsyncCheckpointIO()]).fit(Module())


def test_load_module(half):
    module = load_module(Module, half, note="changed")
    assert same(module.state_dict(), dict(FakeStrategy().load_checkpoint(half)["state_dict"]))
    assert module.hparams["note"] == "changed" and module.hparams["width"] == 9
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_module(Module, half, width=8)


# -------------------------------------------------------------------- names, ties, the manifest


class Tied(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize("target", [True, False])
def test_tied_weights_are_stored_once_and_fit_everywhere(tmp_path, source, target):
    saved, loaded = Tied(source), Tied(target)
    path = FakeStrategy().save_ckpt(saved, tmp_path)
    assert len(json.loads((tmp_path / "step_0" / "manifest.json").read_text())["tensors"]) == (1 if source else 2)
    FakeStrategy().load_ckpt(loaded, tmp_path)
    assert path and torch.equal(loaded.embed.weight, saved.embed.weight)
    if source or not target:
        assert torch.equal(loaded.head.weight, saved.head.weight)


def test_tied_weights_under_a_trainer(tmp_path):
    class TiedModule(Module):
        def __init__(self, seed=0):
            super().__init__(seed)
            self.twin = nn.Linear(5, 9)
            self.twin.weight = self.net[0].weight

    straight = fit(tmp_path / "a", TiedModule(), 4)
    fit(tmp_path / "b", TiedModule(), 2)
    assert "model.twin.weight" not in folder.manifest_of(tmp_path / "b" / "last.ckpt")["tensors"]
    module = TiedModule(1)
    assert same(fit(tmp_path / "c", module, 4, tmp_path / "b" / "last.ckpt"), straight)
    assert "twin.weight" in FakeStrategy().load_checkpoint(tmp_path / "b" / "last.ckpt")["state_dict"]


def test_the_manifest_says_what_it_is(tmp_path):
    class Actor(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.actor, self.tokenizer = tiny_llama(seed=0, width=32, layers=1), char_tokenizer()

        def forward(self, ids):
            return self.actor(ids).logits

    trainer = make_trainer(tmp_path)
    trainer.strategy.connect(Actor())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    manifest = json.loads((tmp_path / "x.ckpt" / "manifest.json").read_text())
    assert manifest["format"] == "lightrft_lightning/2" and manifest["strategy"] == "lightrft_fake"
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["world_size"] == 1
    assert manifest["model"] == "Actor" and list(manifest["hugging_face"]) == ["actor"]
    described = manifest["hugging_face"]["actor"]
    assert described["class"] == "LlamaForCausalLM" and described["config"]["hidden_size"] == 32
    assert len(manifest["tokenizer"]) == 64
    assert manifest["tensors"]["model.actor.model.norm.weight"] == {"shape": [32], "dtype": "float32"}


def test_an_older_format_is_named(tmp_path):
    FakeStrategy().save_ckpt(nn.Linear(1, 1), tmp_path)
    file = tmp_path / "step_0" / "manifest.json"
    file.write_text(file.read_text().replace("lightrft_lightning/2", "lightrft_lightning/1"))
    with pytest.raises(CheckpointError, match="has the format 'lightrft_lightning/1', this release"):
        FakeStrategy().load_ckpt(nn.Linear(1, 1), tmp_path)


def test_loss_scale(tmp_path):
    def run(strategy, model):
        optimizer = strategy.create_optimizer(model)
        strategy.prepare((model, optimizer))
        strategy.backward(model(torch.ones(1, 2)).sum() * float("inf"), model, optimizer)
        strategy.optimizer_step(optimizer, model, None)
        return strategy._models[model].scaler

    first = FakeStrategy(fp16=True)
    model = nn.Linear(2, 2)
    scaler = run(first, model)
    assert scaler.get_scale() == 2**15  # halved once
    first.save_ckpt(model, tmp_path)
    second, other = FakeStrategy(fp16=True), nn.Linear(2, 2)
    second.prepare((other, second.create_optimizer(other)))
    second.load_ckpt(other, tmp_path)
    assert second._models[other].scaler.get_scale() == 2**15


def test_a_checkpoint_that_lists_other_folders_as_its_predecessors_removes_none_of_them(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").touch()
    FakeStrategy().remove_checkpoint(tmp_path / "runs" / ".." / "data")
    assert (tmp_path / "data" / "precious").exists()
    (tmp_path / "runs").mkdir()
    FakeStrategy().remove_checkpoint(tmp_path / "runs" / ".." / "data")
    assert (tmp_path / "data" / "precious").exists() and "but is none: it stays" in caplog.text
