"""What the strategy module promises, call by call, on every back end, on one rank and on several; see checks.py."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

import checks
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import TensorDataset

from lightrft_lightning import DeepspeedStrategy, FakeStrategy, FSDPV2Strategy, StrategyConfig, get_strategy
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

FOLDER = Path(sys.argv[1])
RANKS, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
NAMES = ["lightrft_fsdp", "lightrft_deepspeed_stage_2", "lightrft_deepspeed_stage_3"]
NAMES += ["lightrft_fake"] if RANKS == 1 else []
BATCHES = {"micro_train_batch_size": 2, "train_batch_size": 4 * RANKS, "bf16": False}


def strategies(**fields):
    for name in NAMES:
        strategy = get_strategy(name, **{**BATCHES, **fields})
        strategy.setup_distributed(timeout=timedelta(seconds=60))
        yield strategy


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_of(model, seed=0):
    return model(torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * seed + RANK))).square().mean()


def whole(strategy, model):
    return {name: tensor.clone() for name, tensor in strategy.named_full_tensors(model)}


def steps(strategy, model, optimizer, scheduler, number=2):
    for seed in range(2 * number):  # two passes a step
        strategy.backward(loss_of(model, seed), model, optimizer)
        strategy.optimizer_step(optimizer, model, scheduler, name="actor")


def check_factory_and_constructors():
    for given, kind in (
        (StrategyConfig(fsdp=True), FSDPV2Strategy),
        (argparse.Namespace(zero_stage=3), DeepspeedStrategy),
        ({"fake": True}, FakeStrategy),
    ):
        assert type(get_strategy(given)) is kind
    assert FSDPV2Strategy(config=StrategyConfig(max_norm=0.5)).config.max_norm == 0.5
    assert DeepspeedStrategy(args=argparse.Namespace(more=3, zero_stage=1)).config.get_extra_arg("more") == 3
    for bad, message in (({"zero_stage": 4}, "zero_stage=4"), ({"engine_type": "vlm"}, "vllm")):
        with pytest.raises(ValueError, match=message):
            get_strategy(bad)
    with pytest.raises(TypeError, match="max_norm"):
        FSDPV2Strategy(max_nrom=1.0)


def check_models_come_back_in_their_places_and_train():
    expected = None
    for strategy in strategies(max_norm=0.3):
        actor, critic, reward_model, reference = net(0), net(1), net(2), net(3)
        optimizer = strategy.create_optimizer(actor, lr=0.1, betas=(0.9, 0.95), weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        pair = critic, strategy.create_optimizer(critic, lr=0.1)
        prepared = strategy.prepare((actor, optimizer, scheduler), pair, reward_model, reference, is_rlhf=True)
        (actor, optimizer, scheduler), (critic, _), reward_model, reference = prepared
        assert not any(p.requires_grad for m in (reward_model, reference) for p in m.parameters())
        steps(strategy, actor, optimizer, scheduler)
        assert strategy.optimizer_steps == 2 and scheduler.last_epoch == 2 and strategy.grad_norms["actor"] > 0
        found = whole(strategy, actor)
        expected = expected or found
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def check_checkpoints_and_averages():
    for strategy in strategies():
        model, folder = net(), FOLDER / f"{strategy.strategy_name}-{strategy.config.zero_stage}-{RANKS}"
        optimizer = strategy.create_optimizer(model, lr=0.1)
        ema = net()
        (model, optimizer), ema = strategy.prepare((model, optimizer), ema)
        steps(strategy, model, optimizer, None, 1)
        strategy.moving_average(model, ema, beta=0.5)
        for tag in ("a", "b", "c"):
            client = {"consumed_samples": 3, "tag": tag}
            path = strategy.save_ckpt(model, folder, tag=tag, max_num=2, max_mem=1, client_state=client)
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["b", "c"]
        before = whole(strategy, model)
        steps(strategy, model, optimizer, None, 1)
        after = whole(strategy, model)
        found, client = strategy.load_ckpt(
            model, folder, load_module_strict=True, load_optimizer_states=True, load_lr_scheduler_states=False
        )
        assert found == path and client["tag"] == "c" and strategy.optimizer_steps == 1
        for name, value in whole(strategy, model).items():
            assert torch.equal(value, before[name]) and not torch.equal(value, after[name])
        averaged = whole(strategy, ema)
        start = dict(net().named_parameters())
        for name, value in averaged.items():
            torch.testing.assert_close(value, (start[name] + before[name]) / 2)


def check_collectives_and_data():
    for strategy in strategies():
        strategy.print("from one rank")
        assert strategy.is_rank_0() == (strategy.get_rank() == 0 == RANK)
        values = {"a": torch.tensor([float(RANK)]), "b": [RANK]}
        assert float(strategy.all_reduce(values, "sum")["a"]) == sum(range(RANKS))
        assert strategy.all_gather(values)["a"].tolist() == [float(rank) for rank in range(RANKS)]
        assert "process" in strategy.report_memory("here")
        data = TensorDataset(torch.arange(8 * RANKS))
        seen = [x for (batch,) in strategy.setup_dataloader(data, 2, shuffle=False) for x in batch.tolist()]
        rest = strategy.setup_dataloader(data, 2, shuffle=False, consumed_samples=4 * RANKS)
        assert [x for (batch,) in rest for x in batch.tolist()] == seen[4:] and len(seen) == 8


def check_memory_is_given_away_and_taken_back():
    for strategy in strategies():
        with strategy.init_model_context(meta_init=False):
            model = net()
        model, optimizer = strategy.prepare((model, strategy.create_optimizer(model, lr=0.1)))
        steps(strategy, model, optimizer, None, 1)
        before = whole(strategy, model)
        assert strategy.maybe_offload_optimizer(optimizer) is optimizer
        strategy.offload_model(model)
        strategy.reload_model(model)
        assert strategy.maybe_load_optimizer(optimizer) is optimizer
        assert all(torch.equal(value, before[name]) for name, value in whole(strategy, model).items())
        steps(strategy, model, optimizer, None, 1)
        assert strategy.optimizer_steps == 2


def check_engine_and_export():
    tokenizer = char_tokenizer()
    for strategy in strategies():
        actor = tiny_llama(seed=0, width=32, layers=1)
        actor, _ = strategy.prepare((actor, strategy.create_optimizer(actor, lr=0.1)))
        engine = strategy.setup_inference_engine(
            strategy.config, engine_type="transformers", actor=actor, tokenizer=tokenizer
        )
        strategy.update_engine_weights(actor)
        prompts = [[3, 4, 5]] * (1 + RANK)  # ranks with unequal numbers
        sampling = {"n": 2, "max_new_tokens": 4, "seed": 1}
        groups = strategy.gather_and_generate(sampling, all_prompt_token_ids=prompts, sleep_engine=True)
        assert len(groups) == 1 + RANK and all(len(group) == 2 for group in groups)
        assert all(len(c.logprobs) == len(c.token_ids) for group in groups for c in group)
        assert len(strategy.gather_and_generate(sampling, all_prompts=["1+1="])) == 1
        strategy.engines_sleep([engine])
        strategy.engines_wake_up([engine])
        strategy.maybe_sleep_inference_engine()
        strategy.wakeup_inference_engine()
        folder = FOLDER / f"model-{strategy.strategy_name}-{strategy.config.zero_stage}-{RANKS}"
        strategy.save_model(actor, tokenizer, folder)
        strategy.barrier()
        saved = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(value, saved[name]) for name, value in whole(strategy, actor).items())


if __name__ == "__main__":
    checks.run(globals())
