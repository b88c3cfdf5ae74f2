"""Names, their registration with Lightning, and which strategy a configuration asks for."""

from __future__ import annotations

import argparse
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

from lightrft_lightning import (
    DeepspeedStrategy,
    FakeStrategy,
    FSDPV2Strategy,
    StrategyBase,
    StrategyConfig,
    available_strategies,
    get_fake_strategy,
    get_strategy,
    register_strategy,
)
from lightrft_lightning.strategies.factory import register_builtin_strategies

DEEPSPEED, FSDP = DeepspeedStrategy, FSDPV2Strategy
NAMES = {
    "lightrft_fake": (FakeStrategy, {}),
    "lightrft_fsdp": (FSDP, {"fsdp": True}),
    "lightrft_fsdp_offload": (FSDP, {"fsdp": True, "fsdp_cpu_offload": True}),
    "lightrft_deepspeed": (DEEPSPEED, {"zero_stage": 2}),
    "lightrft_deepspeed_offload": (DEEPSPEED, {"zero_stage": 2, "adam_offload": True}),
    **{f"lightrft_deepspeed_stage_{n}": (DEEPSPEED, {"zero_stage": n}) for n in (1, 2, 3)},
    **{
        f"lightrft_deepspeed_stage_{n}_offload": (DEEPSPEED, {"zero_stage": n, "adam_offload": True}) for n in (1, 2, 3)
    },
}


class Regression(pl.LightningModule):
    """Fits a line, so that training can be seen."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.layer(x) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        x = torch.linspace(-1, 1, 32)[:, None]
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, 3 * x + 1), batch_size=8)


def trainer(tmp_path, **kwargs):
    return pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_epochs=20, **kwargs,
    )  # fmt: skip


# -------------------------------------------------------------------- the table of names


def test_every_name_is_registered_and_no_other():
    assert {name for name in available_strategies() if name.startswith("lightrft_")} == set(NAMES)
    assert set(NAMES) <= set(StrategyRegistry)


@pytest.mark.parametrize("name", NAMES)
def test_factory_and_lightning_build_the_same(name):
    cls, fields = NAMES[name]
    for strategy in (get_strategy(name), get_strategy({"strategy": name}), StrategyRegistry.get(name)):
        assert type(strategy) is cls
        assert {field: getattr(strategy.config, field) for field in fields} == fields


@pytest.mark.parametrize("name", NAMES)
def test_trainer_takes_every_name(name, tmp_path):
    assert type(trainer(tmp_path, strategy=name).strategy) is NAMES[name][0]


def test_registration_is_idempotent():
    before = dict(StrategyRegistry)
    register_builtin_strategies()
    register_builtin_strategies()
    assert list(StrategyRegistry) == list(before)
    assert isinstance(get_strategy("lightrft_fake"), FakeStrategy)


def test_names_are_lowered_as_lightning_does():
    assert isinstance(get_strategy("LightRFT_Fake"), FakeStrategy)


# -------------------------------------------------------------------- configuration → strategy


@pytest.mark.parametrize("make", [lambda **kw: StrategyConfig(**kw), lambda **kw: argparse.Namespace(**kw), dict])
def test_dispatch_from_every_kind_of_arguments(make):
    assert type(get_strategy(make(fsdp=True))) is FSDP
    for stage in (1, 2, 3):
        strategy = get_strategy(make(zero_stage=stage))
        assert type(strategy) is DEEPSPEED and strategy.config.zero_stage == stage
    assert type(get_strategy(make())) is DEEPSPEED


def test_defaults_and_keywords():
    assert type(get_strategy()) is DEEPSPEED
    assert type(get_strategy(fsdp=True)) is FSDP
    strategy = get_strategy(argparse.Namespace(max_norm=2.0, mine="x"), fsdp=True, max_norm=0.5)
    assert strategy.config.max_norm == 0.5 and strategy.config.get_extra_arg("mine") == "x"
    assert get_strategy("lightrft_fake", max_norm=0.5).config.max_norm == 0.5


def test_fake():
    args = argparse.Namespace(fake=True, fsdp=True, max_norm=0.5, mine="x")
    for strategy in (get_strategy(args), get_fake_strategy(args)):
        assert type(strategy) is FakeStrategy
        assert strategy.config.max_norm == 0.5
        assert strategy.config.get_extra_arg("mine") == "x"
        assert strategy.args is args
    assert type(get_strategy({"fake": False})) is DEEPSPEED
    assert get_fake_strategy().config == StrategyConfig()
    assert get_fake_strategy(StrategyConfig(seed=3), max_norm=0.5).config == StrategyConfig(seed=3, max_norm=0.5)


def test_switching_the_back_end_is_one_flag():
    flags = {"train_batch_size": 8, "micro_train_batch_size": 2, "max_norm": 0.5}
    for name, (cls, _) in NAMES.items():
        strategy = get_strategy(argparse.Namespace(strategy=name, zero_stage=2, fsdp=False, **flags))
        assert type(strategy) is cls
        assert {field: getattr(strategy.config, field) for field in flags} == flags


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: get_strategy(fsdp=True, zero_stage=3), ["fsdp=True", "zero_stage=3"]),
        (lambda: get_strategy({"strategy": "lightrft_fsdp", "zero_stage": 3}), ["fsdp=True", "zero_stage=3"]),
        (lambda: get_strategy({"strategy": "lightrft_deepspeed", "fsdp": True}), ["DeepspeedStrategy(fsdp=True)"]),
        (lambda: get_strategy("lightrft_fsdp", fsdp=False), ["'lightrft_fsdp' means fsdp=True, got fsdp=False"]),
        (
            lambda: get_strategy("lightrft_deepspeed_stage_1", zero_stage=2),
            ["'lightrft_deepspeed_stage_1' means zero_stage=1, got zero_stage=2"],
        ),
        (
            lambda: get_strategy(argparse.Namespace(strategy="lightrft_deepspeed_stage_1", zero_stage=3)),
            ["'lightrft_deepspeed_stage_1' means zero_stage=1, got zero_stage=3"],
        ),
        (lambda: FSDPV2Strategy(fsdp=False), ["FSDPV2Strategy(fsdp=False)"]),
        (lambda: get_strategy(zero_stage=4), ["zero_stage=4", "1, 2 or 3"]),
        (lambda: get_strategy(engine_type="vlm"), ["engine_type", "'vlm'", "'vllm'"]),
        (lambda: get_strategy("lightrft_fke"), ["'lightrft_fke'", "Did you mean 'lightrft_fake'?"]),
        (lambda: get_strategy({"strategy": "lightrft_fspd"}), ["'lightrft_fspd'", "Did you mean 'lightrft_fsdp'?"]),
    ],
)
def test_wrong_combinations_and_names(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_stage_beside_the_plain_deepspeed_name_counts():
    assert get_strategy({"strategy": "lightrft_deepspeed", "zero_stage": 3}).config.zero_stage == 3
    assert get_strategy("lightrft_deepspeed", zero_stage=3).config.zero_stage == 3


# -------------------------------------------------------------------- constructors


@pytest.mark.parametrize("cls", [StrategyBase, FakeStrategy, FSDPV2Strategy, DeepspeedStrategy])
def test_constructors_take_fields_a_config_or_args(cls):
    assert cls(max_norm=0.5, micro_train_batch_size=4, train_batch_size=8).config.max_norm == 0.5
    config = StrategyConfig(max_norm=0.5)
    assert cls(config=config).config.max_norm == 0.5
    assert cls(config=config, max_norm=0.25, seed=1).config.max_norm == 0.25
    args = argparse.Namespace(max_norm=0.5)
    assert cls(args=args).config.max_norm == 0.5 and cls(args=args).args is args
    assert cls().config.max_norm == 1.0
    with pytest.raises(TypeError, match="not both"):
        cls(config=config, args=args)
    with pytest.raises(TypeError, match=f"unknown {cls.__name__} keyword 'max_nrom'.*'max_norm'"):
        cls(max_nrom=0.5)


def test_keywords_of_lightnings_own_class():
    from lightning.pytorch.plugins import TorchCheckpointIO

    io = TorchCheckpointIO()
    strategy = FakeStrategy(device="meta", checkpoint_io=io, max_norm=0.5)
    assert (strategy.root_device, strategy.checkpoint_io) == (torch.device("meta"), io)


# -------------------------------------------------------------------- a user's own


class Counting(StrategyBase):
    """Counts steps."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps = 0

    def optimizer_step(self, *args, **kwargs):
        self.steps += 1
        return super().optimizer_step(*args, **kwargs)


class Other(Counting):
    """Another one."""


def test_own_strategy_is_found_by_the_factory_and_really_trains_in_a_trainer(tmp_path):
    register_strategy("my_strategy", Counting, max_norm=0.5)
    assert type(get_strategy("my_strategy")) is Counting
    assert get_strategy({"strategy": "my_strategy"}).config.max_norm == 0.5
    run = trainer(tmp_path, strategy="my_strategy")
    assert type(run.strategy) is Counting and run.strategy.config.max_norm == 0.5
    model = Regression()
    run.fit(model)
    assert run.strategy.steps == run.global_step == 80
    assert model.layer.weight.item() == pytest.approx(3, abs=0.1)
    assert model.layer.bias.item() == pytest.approx(1, abs=0.1)


def test_own_strategy_in_a_hand_written_loop():
    strategy = Counting()
    model = torch.nn.Linear(1, 1)
    optimizer = strategy.create_optimizer(model, lr=0.1)
    strategy.prepare((model, optimizer))
    strategy.backward(model(torch.ones(1, 1)).sum(), model, optimizer)
    strategy.optimizer_step(optimizer, model, None)
    assert strategy.steps == strategy.optimizer_steps == 1


def test_more_than_one_process_is_refused_by_a_strategy_of_one(tmp_path):
    register_strategy("my_strategy", Counting, max_norm=0.5)
    for name in ("my_strategy", "lightrft_fake"):
        with pytest.raises(Exception, match=r"one process, got devices=2: set devices=1"):
            trainer(tmp_path, strategy=name, devices=2)
        with pytest.raises(Exception, match=r"one process, got num_nodes=2"):
            trainer(tmp_path, strategy=name, num_nodes=2)


def test_name_collisions():
    register_strategy("test_collision", Counting)
    register_strategy("test_collision", Counting)  # the same again is harmless
    for taken in ("test_collision", "lightrft_fake", "ddp", "single_device"):
        with pytest.raises(ValueError, match=f"{taken!r} is taken; pass override=True"):
            register_strategy(taken, Other)
    with pytest.raises(ValueError, match="taken"):
        register_strategy("test_collision", Counting, max_norm=0.5)
    register_strategy("test_collision", Other, override=True)
    assert type(get_strategy("test_collision")) is type(StrategyRegistry.get("test_collision")) is Other


@pytest.mark.parametrize("name", ["MyStrategy", ""])
def test_names_that_lightning_could_not_find_are_refused(name):
    with pytest.raises(ValueError, match=f"strategy name {name!r}: must be lower case"):
        register_strategy(name, Counting)


@pytest.mark.parametrize("cls", [torch.nn.Linear, "FakeStrategy", pl.strategies.SingleDeviceStrategy])
def test_only_strategies_of_this_interface_are_registered(cls):
    with pytest.raises(TypeError, match="must be a subclass of StrategyBase"):
        register_strategy("test_not_a_strategy", cls)


def test_without_deepspeed_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ImportError, match=r"'deepspeed', which is not installed.*lightrft-lightning\[deepspeed\]"):
        get_strategy("lightrft_deepspeed").prepare((model, torch.optim.AdamW(model.parameters())))
