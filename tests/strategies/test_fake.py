"""`FakeStrategy` inside a `Trainer`: Lightning's call form, LightRFT's call form, devices and precision."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightrft_lightning import FakeStrategy, StrategyBase


class Automatic(pl.LightningModule):
    """Lightning's automatic optimization, with a scheduler and dropout (so that the random state matters)."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(24, 4, generator=generator)
        return DataLoader(TensorDataset(x, 10 * x.sum(1, keepdim=True)), batch_size=3)


class ActorCritic(Automatic):
    """Two optimizers through the strategy's own methods."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.critic = nn.Linear(4, 1)
        self.norms = []

    def training_step(self, batch, batch_idx):
        strategy, optimizers = self.trainer.strategy, self.optimizers()
        for name, model, optimizer in zip(("actor", "critic"), (self.net, self.critic), optimizers, strict=True):
            loss = (model(batch[0]) - batch[1]).square().mean()
            strategy.backward(loss, model, optimizer)
            strategy.optimizer_step(optimizer, model, None, name=name)
        self.norms.append(dict(strategy.grad_norms))

    def configure_optimizers(self):
        strategy = self.trainer.strategy
        return [strategy.create_optimizer(self.net, lr=0.05), strategy.create_optimizer(self.critic, lr=0.05)]


def trainer(tmp_path, **kwargs):
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 2, **kwargs}
    return pl.Trainer(
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, deterministic=True, **settings
    )


def fit(tmp_path, model, **kwargs):
    run = trainer(tmp_path, **kwargs)
    torch.manual_seed(11)
    run.fit(model)
    return run


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# -------------------------------------------------------------------- Lightning's call form


def test_automatic_optimization_equals_lightnings_default_strategy_bit_for_bit(tmp_path):
    settings = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 3}
    ours, theirs = Automatic(), Automatic()
    run = fit(tmp_path, ours, strategy="lightrft_fake", **settings)
    reference = fit(tmp_path, theirs, **settings)
    assert isinstance(run.strategy, FakeStrategy)
    assert len(ours.losses) == 16 and ours.losses == theirs.losses
    assert same(ours, theirs) and not same(ours, Automatic())
    assert run.global_step == reference.global_step == 6


def test_the_trainers_settings_decide_over_the_strategys(tmp_path):
    """`max_norm` and the batch sizes are for LightRFT's call form; Lightning's own loop has its own flags."""
    ours, theirs = Automatic(), Automatic()
    fit(tmp_path, ours, strategy=FakeStrategy(max_norm=1e-4, train_batch_size=8, micro_train_batch_size=2))
    fit(tmp_path, theirs)
    assert same(ours, theirs)


def test_bf16_is_the_trainers_precision_flag(tmp_path):
    def dtype(**kwargs):
        seen = []
        model = Automatic()
        model.net[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        fit(tmp_path, model, max_steps=1, **kwargs)
        return seen[0]

    assert dtype(strategy=FakeStrategy(bf16=True)) == torch.float32
    assert dtype(strategy="lightrft_fake", precision="bf16-mixed") == torch.bfloat16


def test_batches_that_do_not_divide_stop_the_fit_before_it_starts(tmp_path):
    model = Automatic()
    with pytest.raises(ValueError, match=r"train_batch_size=10 .*micro_train_batch_size=4 × world size=1"):
        fit(tmp_path, model, strategy=FakeStrategy(train_batch_size=10, micro_train_batch_size=4))
    assert model.losses == []


# -------------------------------------------------------------------- LightRFT's call form


def test_manual_optimization_with_two_optimizers_counts_global_steps(tmp_path):
    model = ActorCritic()
    run = fit(tmp_path, model, strategy=FakeStrategy(max_norm=0.5))
    assert run.strategy.optimizer_steps == run.global_step == 2 * 16
    assert len(model.norms) == 16 and set(model.norms[0]) == {"actor", "critic"}
    untrained = ActorCritic()
    assert not same(model.net, untrained.net) and not same(model.critic, untrained.critic)


def test_manual_optimization_accumulates_and_equals_the_hand_written_loop(tmp_path):
    settings = {"train_batch_size": 12, "micro_train_batch_size": 3, "max_norm": 0.5}
    model, by_hand = ActorCritic(), ActorCritic()
    run = fit(tmp_path, model, strategy=FakeStrategy(**settings))
    assert run.global_step == 2 * 4

    strategy = FakeStrategy(**settings)
    pairs = [(m, strategy.create_optimizer(m, lr=0.05)) for m in (by_hand.net, by_hand.critic)]
    pairs = strategy.prepare(*pairs)
    torch.manual_seed(11)
    for _ in range(2):
        for x, y in by_hand.train_dataloader():
            for network, optimizer in pairs:
                strategy.backward((network(x) - y).square().mean(), network, optimizer)
                strategy.optimizer_step(optimizer, network, None)
    assert strategy.optimizer_steps == 8
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_manual_optimization_schedulers_and_non_finite_steps(tmp_path):
    class Scheduled(ActorCritic):
        def configure_optimizers(self):
            optimizer = self.trainer.strategy.create_optimizer(self.net, lr=1.0)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

        def training_step(self, batch, batch_idx):
            loss = (self.net(batch[0]) - batch[1]).square().mean() * (float("nan") if batch_idx == 1 else 1)
            self.trainer.strategy.backward(loss, self, self.optimizers())
            self.trainer.strategy.optimizer_step(self.optimizers(), self, self.lr_schedulers())

    model = Scheduled()
    run = fit(tmp_path, model, strategy="lightrft_fake", max_epochs=1, limit_train_batches=4)
    assert run.global_step == run.strategy.optimizer_steps == 3
    assert run.strategy.skipped_steps == {"model": 1}
    assert run.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == 0.5**3
    assert all(p.isfinite().all() for p in model.parameters())


def test_save_and_load_ckpt_work_with_lightnings_optimizers(tmp_path):
    class Saving(ActorCritic):
        def on_train_end(self):
            optimizer = self.optimizers()[0]
            path = self.trainer.strategy.save_ckpt(self.net, tmp_path / "ckpt", optimizer=optimizer)
            moments = {k: v["exp_avg"].clone() for k, v in enumerate(optimizer.state.values())}
            for values in optimizer.state.values():
                values["exp_avg"].zero_()
            loaded, _ = self.trainer.strategy.load_ckpt(self.net, tmp_path / "ckpt", optimizer=optimizer)
            assert loaded == path
            self.restored = [torch.equal(v["exp_avg"], moments[k]) for k, v in enumerate(optimizer.state.values())]

    model = Saving()
    fit(tmp_path, model, strategy="lightrft_fake", max_epochs=1)
    assert model.restored == [True] * 4


# -------------------------------------------------------------------- checkpoints of the Trainer


def test_resume_of_a_trainer_equals_the_uninterrupted_run(tmp_path):
    straight, first, second = Automatic(), Automatic(), Automatic()
    settings = {"strategy": "lightrft_fake", "gradient_clip_val": 0.5}
    for model in (straight, first, second):
        model.net[1].p = 0.0  # Lightning keeps no random state, RLHFModule does
    fit(tmp_path, straight, max_epochs=4, **settings)
    callback = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    fit(tmp_path, first, max_epochs=2, enable_checkpointing=True, callbacks=[callback], **settings)
    run = trainer(tmp_path, max_epochs=4, **settings)
    run.fit(second, ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert straight.losses == first.losses + second.losses and same(straight, second)


def test_one_strategy_object_serves_a_trainer_and_a_loop(tmp_path):
    strategy, model = FakeStrategy(max_norm=0.5), Automatic()
    fit(tmp_path, model, strategy=strategy, max_epochs=1)
    assert not same(model, Automatic())
    net = nn.Linear(1, 1)
    optimizer = strategy.create_optimizer(net)
    strategy.backward(net(torch.ones(1, 1)).sum(), *strategy.prepare((net, optimizer)))
    assert strategy.optimizer_step(optimizer, net, None) > 0


# -------------------------------------------------------------------- devices


@pytest.mark.parametrize(("flag", "value"), [("devices", 2), ("num_nodes", 2)])
def test_more_than_one_process_is_refused_with_the_way_out(tmp_path, flag, value):
    for strategy in ("lightrft_fake", FakeStrategy()):
        with pytest.raises(MisconfigurationException, match=f"runs in one process, got {flag}={value}"):
            trainer(tmp_path, strategy=strategy, **{flag: value})


@pytest.mark.parametrize("cls", [FakeStrategy, StrategyBase])
def test_the_trainers_device_is_taken_unless_one_was_given(cls):
    strategy = cls()
    assert strategy.root_device == torch.device("cpu")
    strategy.parallel_devices = [torch.device("meta")]  # what the Trainer sets, e.g. cuda:0
    assert strategy.root_device == torch.device("meta")


def test_a_given_device_wins():
    strategy = FakeStrategy(device="cpu")
    strategy.parallel_devices = [torch.device("meta")]
    assert strategy.root_device == torch.device("cpu")


def test_settings_of_sharded_back_ends_change_nothing():
    """So that it replaces any of them in a test of the user's."""
    for settings in ({"fsdp": True, "fsdp_cpu_offload": True}, {"zero_stage": 3, "adam_offload": True}, {"zpg": 4}):
        strategy = FakeStrategy(**settings)
        model = nn.Linear(1, 1)
        optimizer = strategy.create_optimizer(model, lr=0.1)
        strategy.backward(model(torch.ones(1, 1)).sum(), *strategy.prepare((model, optimizer)))
        assert strategy.optimizer_step(optimizer, model, None) > 0


class Late(Automatic):
    """Makes one more part in `configure_model`, or all of them."""

    def __init__(self, nothing=False):
        super().__init__()
        self.more = None
        if nothing:
            del self.net

    def configure_model(self):
        self.net, self.more = nn.Linear(4, 1), nn.Linear(1, 1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(2, 4))


@pytest.mark.parametrize("nothing", [False, True])
@pytest.mark.parametrize("kind", [StochasticWeightAveraging, ModelPruning, BackboneFinetuning])
def test_callbacks_that_look_for_weights_before_they_are_made_are_refused(kind, nothing):
    callback = {StochasticWeightAveraging: (0.1,), ModelPruning: ("l1_unstructured",)}.get(kind, ())
    trainer = pl.Trainer(
        strategy="lightrft_fake", accelerator="cpu", callbacks=[kind(*callback)], logger=False, max_epochs=1
    )
    module = Late(nothing)
    module.backbone = nn.Identity()
    with pytest.raises(MisconfigurationException, match="looks for weights before Late has made"):
        trainer.fit(module)
    assert trainer.global_step == 0


def test_wandb_that_watches_before_there_is_something_to_see_is_refused():
    module, trainer = Late(nothing=True), pl.Trainer(strategy="lightrft_fake", accelerator="cpu", max_epochs=1)
    module._wandb_hook_names = []  # what `wandb.watch` leaves on a module without parameters
    with pytest.raises(MisconfigurationException, match=r"before configure_model had made net\.weight"):
        trainer.fit(module)
