"""Where LightRFT 0.1.1 breaks its own promises in its strategy module, one test a line.

Its algorithms' lines are tested beside the algorithms, the rollout's beside the engines.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import nn

from lightrft_lightning import DeepspeedStrategy, FakeStrategy, FSDPV2Strategy, StrategyBase, StrategyConfig

INTERFACE = (
    "setup_distributed", "create_optimizer", "prepare", "backward", "optimizer_step", "save_ckpt", "load_ckpt",
    "save_model", "print", "is_rank_0", "get_rank", "all_reduce", "all_gather", "report_memory", "setup_dataloader",
    "init_model_context", "maybe_offload_optimizer", "maybe_load_optimizer", "offload_model", "reload_model",
    "moving_average", "setup_inference_engine", "engines_sleep", "engines_wake_up", "maybe_sleep_inference_engine",
    "wakeup_inference_engine", "gather_and_generate", "update_engine_weights",
)  # fmt: skip

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6.0)[:, None]


def model_and_optimizer(strategy, seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(2, 1)
    return strategy.prepare((model, torch.optim.SGD(model.parameters(), lr=1.0)))


def move(strategy, model, optimizer, passes=1, scale=1.0):
    """How far one optimizer step of `passes` equal passes moves the weights."""
    before = copy.deepcopy(model)
    for _ in range(passes):
        strategy.backward(scale * (model(X) - Y).square().mean(), model, optimizer)
        strategy.optimizer_step(optimizer, model, None)
    return nn.utils.get_total_norm([a - b for a, b in zip(model.parameters(), before.parameters(), strict=True)]).item()


# -------------------------------------------------------------------- environment


def test_import_needs_torch_and_lightning_only_and_no_gpu():
    code = """
import sys
import lightning.pytorch
before = set(sys.modules)
import lightrft_lightning
heavy = {"transformers", "deepspeed", "vllm", "sglang", "datasets", "peft", "gguf", "easydict", "accelerate"}
print(sorted(heavy & (set(sys.modules) - before)))
import torch
print(torch.cuda.is_initialized(), torch.distributed.is_initialized())
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.splitlines() == ["[]", "False False"], done.stderr


def test_the_device_is_the_trainers_not_the_rank_modulo_eight():
    strategy = FakeStrategy(args=argparse.Namespace(local_rank=11))
    strategy.parallel_devices = [torch.device("cuda", 3)]
    assert strategy.root_device == torch.device("cuda", 3)


def test_fake_strategy_needs_no_process_group():
    with mock.patch("torch.distributed.init_process_group") as start:
        FakeStrategy().setup_distributed()
    assert not start.called


# -------------------------------------------------------------------- back ends


def test_a_second_optimizer_does_not_switch_off_clipping_of_the_first():
    strategy = FakeStrategy(max_norm=1.0)
    actor, actor_optimizer = model_and_optimizer(strategy, 0)
    critic, critic_optimizer = model_and_optimizer(strategy, 1)
    strategy.create_optimizer(actor)
    strategy.create_optimizer(critic)
    assert move(strategy, actor, actor_optimizer, scale=1000) == pytest.approx(1, rel=1e-3)
    assert move(strategy, critic, critic_optimizer, scale=1000) == pytest.approx(1, rel=1e-3)
    assert strategy.grad_norms["model"] > 1000


def test_gradients_are_averaged_over_accumulation_steps_not_summed():
    one, four = FakeStrategy(max_norm=0), FakeStrategy(max_norm=0, train_batch_size=4, micro_train_batch_size=1)
    assert move(four, *model_and_optimizer(four), passes=4) == pytest.approx(move(one, *model_and_optimizer(one)))


def test_clipping_is_global_not_per_parameter_group():
    strategy = FakeStrategy(max_norm=1.0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=1.0)
    strategy.prepare((model, optimizer))
    assert move(strategy, model, optimizer, scale=1000) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("max_norm", [0, -1])
def test_max_norm_zero_means_no_clipping_not_no_gradient(max_norm):
    strategy = FakeStrategy(max_norm=max_norm)
    assert move(strategy, *model_and_optimizer(strategy)) == pytest.approx(strategy.grad_norms["model"], rel=1e-4)


@pytest.mark.parametrize("cls", [FakeStrategy, FSDPV2Strategy, DeepspeedStrategy])
def test_every_method_exists_on_every_back_end(cls):
    assert [name for name in INTERFACE if not callable(getattr(cls, name, None))] == []


@pytest.mark.parametrize("name", INTERFACE)
def test_signatures_are_the_same(name):
    assert inspect.signature(getattr(FakeStrategy, name)) == inspect.signature(getattr(StrategyBase, name))


def test_load_ckpt_takes_the_tag_third_and_honours_tag_and_strict(tmp_path):
    names = list(inspect.signature(StrategyBase.load_ckpt).parameters)
    assert names[1:8] == [
        "model", "load_dir", "tag", "load_module_strict", "load_optimizer_states", "load_lr_scheduler_states",
        "load_module_only",
    ]  # fmt: skip
    strategy, model = FakeStrategy(), nn.Linear(1, 1)
    for n in (1, 2):
        nn.init.constant_(model.weight, n)
        strategy.save_ckpt(model, tmp_path, f"t{n}")
    strategy.load_ckpt(model, tmp_path, "t1")
    assert model.weight.item() == 1
    with pytest.raises(RuntimeError, match="of another model"):
        strategy.load_ckpt(nn.Linear(1, 1, bias=False), tmp_path, "t1", True)
    strategy.load_ckpt(nn.Linear(1, 1, bias=False), tmp_path, "t1", False)


def test_save_ckpt_removes_only_its_own_and_only_after_the_new_one_is_safe(tmp_path):
    (tmp_path / "my_results").mkdir()
    strategy, model = FakeStrategy(), nn.Linear(1, 1)
    strategy.save_ckpt(model, tmp_path, "t1", max_num=1)
    with pytest.raises(ValueError, match="client_state"):
        strategy.save_ckpt(model, tmp_path, "t2", max_num=1, client_state={"bad": object()})
    assert (tmp_path / "t1").is_dir()
    strategy.save_ckpt(model, tmp_path, "t2", max_num=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "my_results", "t2"]


def test_max_mem_is_in_gb_as_documented(tmp_path):
    strategy, model = FakeStrategy(), nn.Linear(1, 1)
    for tag in ("t1", "t2"):
        strategy.save_ckpt(model, tmp_path, tag, max_mem=1e-3)  # 1 MB, and two checkpoints take about 50 kB
    assert (tmp_path / "t1").is_dir()
    assert "GB" in (StrategyBase.save_ckpt.__doc__ or "")


def test_resume_restores_optimizer_scheduler_and_the_position_in_the_data(tmp_path):
    def start(seed=0):
        strategy = FakeStrategy()
        torch.manual_seed(seed)
        model = nn.Linear(2, 1)
        optimizer = strategy.create_optimizer(model, lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        strategy.prepare((model, optimizer, scheduler))
        return strategy, model, optimizer, scheduler

    def train(strategy, model, optimizer, scheduler, loader):
        seen = []
        for index in loader:
            strategy.backward((model(X[index]) - Y[index]).square().mean(), model, optimizer)
            strategy.optimizer_step(optimizer, model, scheduler)
            seen += index.tolist()
        return seen

    straight, resumed = start(), start(seed=1)
    loader = straight[0].setup_dataloader(range(6), 2)
    first = train(*straight, loader)
    straight[0].save_ckpt(straight[1], tmp_path, client_state={"consumed_samples": 6})
    second = train(*straight, loader)
    _, client = resumed[0].load_ckpt(resumed[1], tmp_path)
    assert train(*resumed, resumed[0].setup_dataloader(range(6), 2, **client)) == second != first
    assert torch.equal(resumed[1].weight, straight[1].weight)
    assert resumed[3].get_last_lr() == straight[3].get_last_lr() == pytest.approx([0.1 * 0.9**6] * 2)


def test_documented_methods_exist_and_a_dict_is_read():
    strategy = FakeStrategy(args={"max_norm": 0.5, "mine": 1})
    strategy.engines_sleep([])
    strategy.engines_wake_up([])
    assert (strategy.config.max_norm, strategy.config.get_extra_arg("mine")) == (0.5, 1)
    assert StrategyConfig.from_args({"seed": 1}).seed == 1
    assert FakeStrategy(args=argparse.Namespace(seed=1)).args.seed == 1


def test_use_mp_opt_is_refused_where_it_is_set_and_adam_offload_alone_trains():
    with pytest.raises(ValueError, match="use_mp_opt=True: no back end of this package has it"):
        FakeStrategy(use_mp_opt=True, adam_offload=True)
    strategy = FakeStrategy(adam_offload=True)
    assert move(strategy, *model_and_optimizer(strategy)) > 0


# -------------------------------------------------------------------- the loop


def test_a_nan_loss_is_not_back_propagated_into_the_weights():
    strategy = FakeStrategy()
    model, optimizer = model_and_optimizer(strategy)
    assert move(strategy, model, optimizer, scale=float("nan")) == 0
    assert strategy.skipped_steps == {"model": 1}
    assert move(strategy, model, optimizer) > 0 and model.weight.isfinite().all()


def test_a_partial_accumulation_does_not_leak_into_the_next_rollout():
    strategy = FakeStrategy(max_norm=0, train_batch_size=4, micro_train_batch_size=1)
    model, optimizer = model_and_optimizer(strategy)
    strategy.backward((model(X) - Y).square().mean(), model, optimizer)
    strategy.optimizer_step(optimizer, model, None, flush=True)
    reference = FakeStrategy(max_norm=0)
    twin, twin_optimizer = model_and_optimizer(reference)
    move(reference, twin, twin_optimizer)
    assert torch.allclose(model.weight, twin.weight)
    assert move(strategy, model, optimizer, passes=4) == pytest.approx(move(reference, twin, twin_optimizer), rel=1e-5)
