"""What scripts written for LightRFT, and its own tests of the fake strategy, call and find."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler

from lightrft_lightning import (
    CheckpointError,
    DeepspeedStrategy,
    FakeStrategy,
    FSDPV2Strategy,
    StrategyConfig,
    TransformersRollout,
    get_fake_strategy,
    get_strategy,
    is_engine,
)
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama


@pytest.fixture
def strategy():
    return FakeStrategy(42, 1.5, 2, 8)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))


class Actor(nn.Module):
    is_actor = True

    def __init__(self, model):
        super().__init__()
        self.model = model


def test_settings_are_attributes(strategy):
    assert (strategy.seed, strategy.max_norm, strategy.micro_train_batch_size) == (42, 1.5, 2)
    assert strategy.train_batch_size == 8 and strategy.accumulated_gradient == 4 and strategy.world_size == 1
    assert strategy.stage == 2 and strategy.engine_type == "vllm" and strategy.args is not None
    with pytest.raises(AttributeError, match="'FakeStrategy' object has no attribute 'sed'"):
        strategy.sed  # noqa: B018


@pytest.mark.parametrize(
    ("cls", "values", "expected"),
    [
        (FakeStrategy, (1, 0.5, 2, 4, argparse.Namespace(l2=0.1)), {"seed": 1, "max_norm": 0.5, "l2": 0.1}),
        (FSDPV2Strategy, (1, 0.5, 2, 4, False), {"train_batch_size": 4, "bf16": False, "fsdp": True}),
        (DeepspeedStrategy, (1, 0.5, 2, 4, 3, True), {"zero_stage": 3, "bf16": True}),
    ],
)
def test_constructors_take_positions(cls, values, expected):
    config = cls(*values).config
    assert {name: getattr(config, name) for name in expected} == expected
    with pytest.raises(TypeError, match=rf"{cls.__name__}: seed is given twice"):
        cls(1, seed=1)
    with pytest.raises(TypeError, match="positional arguments"):
        cls(*range(9))


def test_the_fake_one_of_a_namespace():
    args = argparse.Namespace(seed=123, max_norm=2.0, micro_train_batch_size=4, train_batch_size=16, mine="x")
    strategy = get_fake_strategy(args)
    assert (strategy.seed, strategy.max_norm, strategy.accumulated_gradient) == (123, 2.0, 4)
    assert strategy.config.extra_args == {"mine": "x"}


def test_a_summary_is_printed(capsys):
    StrategyConfig(max_norm=0.5).print_config_summary()
    assert "max_norm = 0.5 (default 1.0)" in capsys.readouterr().out


def test_small_calls(strategy):
    strategy.setup_distributed(num_gpu_per_node=8)
    strategy.set_seed(7)
    first = torch.rand(1)
    strategy.set_seed(7)
    assert torch.equal(torch.rand(1), first)
    strategy.sync_and_clear_cache()
    model = net()
    assert strategy.unwrap_model(Actor(model)) is model and strategy.unwrap_model(model) is model
    assert strategy.unwrap_model(nn.DataParallel(model)) is model
    optimizer = strategy.create_optimizer(model)
    assert strategy.maybe_offload_optimizer(optimizer) is optimizer
    assert strategy.maybe_load_optimizer(optimizer, "cpu") is optimizer
    strategy.offload_model([model, model], empty_cache=True)
    strategy.reload_model((model,))


def test_models_and_optimizers_at_once(strategy):
    rewards = [net(), net()]
    (actor, optimizer, schedule), critic, frozen, reference = strategy.prepare_models_and_optimizers(
        net(), None, rewards, net(), None, max_steps=100
    )
    assert critic == (None, None, None) and frozen == rewards
    assert not any(p.requires_grad for model in (*frozen, reference) for p in model.parameters())
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        for _ in range(strategy.accumulated_gradient):
            strategy.backward(actor(torch.ones(1, 4)).sum(), actor, optimizer)
            strategy.optimizer_step(optimizer, actor, schedule)
    assert rates[0] == 0 and max(rates) == rates[3] == 1e-5 and rates[-1] == pytest.approx(1e-6, rel=1e-2)
    *_, alone, none = strategy.prepare_models_and_optimizers(net(), net(), net(), None, None, 10)
    assert not alone.training and none is None


def test_one_model_at_a_time(strategy, caplog):
    model = strategy.prepare_model(net(), is_training=True)
    assert all(p.requires_grad for p in model.parameters())
    optimizer = strategy.create_optimizer(model)
    strategy.backward(model(torch.ones(1, 4)).sum(), model, optimizer)
    assert not any(p.requires_grad for p in strategy.prepare_model(net(), shard_size=8).parameters())
    assert "prepare_model(shard_size=8): set zpg= of the strategy" in caplog.text
    assert strategy.prepare_model(None) is None and strategy.prepare_model("a server") == "a server"
    trained, optimizer, scheduler = strategy.prepare_reward_model(net(), None, 10)
    assert trained.training and scheduler.optimizer is optimizer


def test_weights_are_read_from_a_file_or_a_folder(strategy, tmp_path):
    saved = net()
    torch.save({f"old.{name}": value for name, value in saved.state_dict().items()}, tmp_path / "x.pt")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(CheckpointError, match=r"it has no 0\.weight"):
        strategy.load_model(model, tmp_path / "x.pt", strict=True)
    strategy.load_model(
        Actor(model), tmp_path / "x.pt", strict=True,
        key_replace_fn=lambda state: {name.removeprefix("old."): value for name, value in state.items()},
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), model.parameters(), strict=True))
    strategy.save_ckpt(net(), tmp_path / "saved", tag="a")
    strategy.load_model(model, tmp_path / "saved" / "a")
    torch.save(print, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match=r"code\.pt"):
        strategy.load_model(model, tmp_path / "code.pt")


def test_data_loaders(strategy):
    assert len(strategy.setup_dataloader(replay_buffer=range(8), batch_size=2)) == 4
    order = strategy.setup_dataloader(range(5), 2, False, True, None, True, SequentialSampler(range(5)))
    assert [batch.tolist() for batch in order] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match=r"consumed_samples=2\): the sampler has to know this"):
        strategy.setup_dataloader(range(5), 2, sampler=SequentialSampler(range(5)), consumed_samples=2)
    with pytest.raises(TypeError, match="needs a data set and a batch_size"):
        strategy.setup_dataloader(batch_size=2)


def test_an_average_by_its_other_name(strategy):
    model, average = net(), net()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    before = average[0].weight.clone()
    strategy.moving_average(model, model_ema=average, beta=0.9, device="cpu")
    torch.testing.assert_close(average[0].weight, before + 0.1)


class Sees(TransformersRollout):
    takes_images = True

    def generate(self, prompts, sampling, streams=None, images=None):
        self.images = images
        return super().generate(prompts, sampling, streams)


def test_generation(strategy):
    engine, tokenizer = Sees(), char_tokenizer()
    strategy.setup_inference_engine(args=None, engine_type=engine, actor=tiny_llama(width=32), tokenizer=tokenizer)
    sampling, prompts = {"n": 2, "max_new_tokens": 3, "seed": 1}, ["1+1=", "2+2=", "3+3="]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    expected = strategy.gather_and_generate(sampling, all_prompt_token_ids=ids)
    assert strategy.engine_generate_local(sampling, ids) == expected and engine.images is None
    nested = [["a"], [], ["b", "c"]]
    shown = [{"prompt": p, "multi_modal_data": {"image": i}} for p, i in zip(prompts, nested, strict=True)]
    assert strategy.engine_generate_local(sampling, multi_modal_inputs=shown) == expected and engine.images == nested
    for images in (["a", "b", "c"], nested, [["a"], None, ["b", "c"]]):
        strategy.gather_and_generate(sampling, ids, all_images=images, images_num=[1, 0, 2], all_videos=None)
        assert engine.images == nested
    strategy.gather_and_generate(sampling, ids, all_images=[None] * 3, all_videos=[None] * 3)
    assert engine.images is None
    with pytest.raises(ValueError, match="images_num says 4 images, all_images has 3"):
        strategy.gather_and_generate(sampling, ids, all_images=["a", "b", "c"], images_num=[1, 1, 2])
    with pytest.raises(ValueError, match="all_videos: engines take text and images"):
        strategy.gather_and_generate(sampling, ids, all_videos=["v", None, None])
    with pytest.raises(ValueError, match="'video': only images are taken"):
        strategy.engine_generate_local(
            sampling, multi_modal_inputs=[{"prompt": "1", "multi_modal_data": {"video": []}}]
        )


def test_flags_of_its_run_scripts(caplog):
    """All of them fill in a stage next to --fsdp, most of them --adam_offload."""
    args = argparse.Namespace(fsdp=True, zero_stage=3, adam_offload=True, advantage_estimator="reinforce++")
    strategy = get_strategy(args)
    assert isinstance(strategy, FSDPV2Strategy) and strategy.config.adam_offload
    assert "zero_stage=3 has no meaning with fsdp=True: FSDP2 has no stages" in caplog.text
    assert strategy.config.advantage_estimator == "reinforce_plus_plus" and strategy.args is args
    with pytest.raises(ValueError, match="zero_stage=3: FSDP2 has no ZeRO stages"):
        StrategyConfig(fsdp=True, zero_stage=3)  # nobody but the user has said so


def test_objects_of_sglangs_own_sleep_and_wake_too():
    class Own:
        def __init__(self):
            self.asked = []

        def release_memory_occupation(self):
            self.asked.append("sleep")

        def resume_memory_occupation(self):
            self.asked.append("wake")

    engine = Own()
    FakeStrategy().engines_sleep([engine])
    FakeStrategy().engines_wake_up(engine)
    assert engine.asked == ["sleep", "wake"]
    assert is_engine(engine) and is_engine(TransformersRollout()) and not is_engine(torch.nn.Linear(1, 1))
