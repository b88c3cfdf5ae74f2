"""The interface in a loop of the user's own, on `FakeStrategy`, without a process group."""

from __future__ import annotations

import copy
import logging
import os
import random

import numpy
import pytest
import torch
from torch import nn

from lightrft_lightning import Completion, FakeStrategy, RolloutEngine, SamplingParams


def network(seed=0, width=8, out=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, out))


def data(rows=8, seed=1, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator) * scale, torch.randn(rows, 1, generator=generator)


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def difference(model, other):
    return max((a - b).abs().max().item() for a, b in zip(model.parameters(), other.parameters(), strict=True))


def gradient_norm(model):
    return nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


def step(strategy, model, optimizer, x, y, **kwargs):
    strategy.backward(loss_of(model, x, y), model, optimizer)
    return strategy.optimizer_step(optimizer, model, kwargs.pop("scheduler", None), **kwargs)


# -------------------------------------------------------------------- start


def test_no_process_group_anywhere(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    strategy = FakeStrategy()
    strategy.setup_distributed()
    assert not torch.distributed.is_initialized()
    assert (strategy.world_size, strategy.get_rank(), strategy.is_rank_0()) == (1, 0, True)


def test_setup_distributed_seeds_everything(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # Lightning leaves the seed in the environment

    def draws(seed):
        FakeStrategy(seed=seed).setup_distributed()
        return random.random(), float(numpy.random.rand()), torch.rand(1).item()

    assert draws(3) == draws(3)
    assert all(a != b for a, b in zip(draws(3), draws(4), strict=True))


def test_batch_that_does_not_divide_names_the_three_numbers():
    strategy = FakeStrategy(train_batch_size=10, micro_train_batch_size=4)
    with pytest.raises(ValueError) as error:
        strategy.setup_distributed()
    for word in ("train_batch_size=10", "micro_train_batch_size=4", "world size=1"):
        assert word in str(error.value)


def test_a_loop_that_skips_setup_distributed_gets_the_same_error():
    strategy = FakeStrategy(train_batch_size=2, micro_train_batch_size=4)
    model = network()
    optimizer = strategy.create_optimizer(model)
    with pytest.raises(ValueError, match="train_batch_size=2 is not a multiple"):
        strategy.backward(loss_of(model, *data()), model, optimizer)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 1),
        ({"max_norm": 0.5}, 1),
        ({"train_batch_size": 8, "micro_train_batch_size": 2}, 4),
        ({"micro_train_batch_size": 4}, 32),  # of the default 128
        ({"train_batch_size": 6}, 6),
    ],
)
def test_accumulation_follows_from_the_batch_sizes(settings, steps):
    assert FakeStrategy(**settings).accumulation_steps == steps


# -------------------------------------------------------------------- create_optimizer, prepare


def test_no_weight_decay_on_biases_and_norms():
    model = network()
    optimizer = FakeStrategy().create_optimizer(model, lr=0.1, betas=(0.8, 0.9), weight_decay=0.2)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.2, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "3.weight": 0.2, "3.bias": 0.0,
    }  # fmt: skip
    assert {(g["lr"], g["betas"]) for g in optimizer.param_groups} == {(0.1, (0.8, 0.9))}
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]


def test_optimizer_defaults_come_from_the_configuration():
    strategy = FakeStrategy(actor_learning_rate=1e-3, adam_betas=(0.5, 0.6), l2=0.1)
    groups = strategy.create_optimizer(network()).param_groups
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in groups] == [
        (1e-3, (0.5, 0.6), 0.1),
        (1e-3, (0.5, 0.6), 0.0),
    ]


def test_nothing_to_optimize_is_an_error():
    with pytest.raises(ValueError, match="Linear has no parameter with requires_grad=True"):
        FakeStrategy().create_optimizer(nn.Linear(1, 1).requires_grad_(False))


def test_prepare_keeps_order_and_shape():
    strategy = FakeStrategy()
    actor, critic, reward_model, reference = models = [network(i) for i in range(4)]
    optimizers = [strategy.create_optimizer(m) for m in (actor, critic)]
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizers[1])
    assert strategy.prepare(*models, is_rlhf=True) == (actor, critic, reward_model, reference)
    pair, triple = (actor, optimizers[0]), (critic, optimizers[1], scheduler)
    assert strategy.prepare(pair, triple, reward_model, None, is_rlhf=True) == (pair, triple, reward_model, None)
    assert strategy.prepare(pair) == pair
    assert strategy.prepare(reference) is reference
    assert strategy.prepare() == ()
    with pytest.raises(TypeError, match="got 'actor'"):
        strategy.prepare("actor")


def test_prepare_refuses_an_optimizer_of_another_model():
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=r"the optimizer holds a parameter of shape \(.*\) that is not in the model"):
        FakeStrategy().prepare((nn.Linear(2, 2), other))


def test_prepare_freezes_what_has_no_optimizer():
    strategy = FakeStrategy()
    actor, critic, reference = (network(i).eval() for i in range(3))
    strategy.create_optimizer(actor)
    strategy.prepare(actor, (critic, torch.optim.SGD(critic.parameters(), lr=0.1)), reference)
    for model, trains in ((actor, True), (critic, True), (reference, False)):
        assert model.training is trains
        assert all(p.requires_grad is trains for p in model.parameters())


@pytest.mark.parametrize("thaw", ["create_optimizer", "prepare a pair"])
def test_a_model_frozen_by_prepare_thaws_exactly_what_was_frozen(thaw):
    strategy = FakeStrategy()
    model = network()
    model[0].requires_grad_(False)  # the user's own choice, e.g. an embedding
    strategy.prepare(model)
    assert not any(p.requires_grad for p in model.parameters())
    strategy.prepare(model)  # a second time changes nothing
    if thaw == "create_optimizer":
        optimizer = strategy.create_optimizer(model)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        strategy.prepare((model, optimizer))
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
    assert model.training
    before = state(model)
    step(strategy, model, optimizer, *data())
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])] == [
        "1.weight", "1.bias", "3.weight", "3.bias",
    ]  # fmt: skip


def test_init_model_context_builds_on_the_device():
    with FakeStrategy(device="meta").init_model_context():
        assert nn.Linear(1, 1).weight.is_meta
    with FakeStrategy().init_model_context(meta_init=True):
        assert nn.Linear(1, 1).weight.device.type == "cpu"


def test_bf16_is_off_on_a_cpu_unless_asked_for():
    x = torch.randn(2, 4)
    assert FakeStrategy().prepare(network())(x).dtype == torch.float32
    assert FakeStrategy(bf16=False).prepare(network())(x).dtype == torch.float32
    model = FakeStrategy(bf16=True).prepare(network())
    assert model(x).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_bf16_trains_and_leaves_fp32_weights_and_gradients():
    strategy = FakeStrategy(bf16=True)
    model = network()
    optimizer = strategy.create_optimizer(model, lr=0.01)
    strategy.prepare(model)
    x, y = data()
    before = loss_of(model, x, y).item()
    for _ in range(20):
        step(strategy, model, optimizer, x, y)
    assert loss_of(model, x, y).item() < before / 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_copy_of_a_bf16_model_runs_its_own_weights():
    strategy = FakeStrategy(bf16=True)
    model = strategy.prepare(network())
    x, _ = data()
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin[3].weight)
    nn.init.zeros_(twin[3].bias)
    assert twin(x).abs().max() == 0 and twin(x).dtype == torch.bfloat16
    assert model(x).abs().max() > 0


def test_autocast_ends_when_the_forward_pass_raises():
    model = FakeStrategy(bf16=True).prepare(network())
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))
    assert not torch.is_autocast_enabled("cpu")
    assert model(torch.randn(2, 4)).dtype == torch.bfloat16


# -------------------------------------------------------------------- backward, optimizer_step


def test_accumulated_steps_equal_plain_adamw_on_the_full_batch():
    strategy = FakeStrategy(train_batch_size=8, micro_train_batch_size=2, max_norm=1.0)
    model, plain = network(), network()
    optimizer = strategy.create_optimizer(model, lr=1e-2, weight_decay=0.1)
    model, optimizer = strategy.prepare((model, optimizer))
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for seed in range(5):
        x, y = data(8, seed, scale=10)
        for i in range(4):
            norm = step(strategy, model, optimizer, x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2])
            assert (norm is None) == (i < 3)
        reference.zero_grad()
        loss_of(plain, x, y).backward()
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item()
        assert norm == pytest.approx(expected, rel=1e-5)
        assert norm == strategy.grad_norms["model"]
        reference.step()
        assert difference(model, plain) < 1e-6
    assert strategy.optimizer_steps == 5


def test_gradients_are_the_mean_over_accumulation_steps():
    """Upstream's FSDP path sums them: four steps gave four times the gradient."""
    strategy = FakeStrategy(train_batch_size=4, micro_train_batch_size=1)
    model = network()
    optimizer = strategy.create_optimizer(model)
    x, y = data()
    loss_of(model, x, y).backward()
    expected = gradient_norm(model)
    model.zero_grad()
    for _ in range(4):
        strategy.backward(loss_of(model, x, y), model, optimizer)
    assert gradient_norm(model) == pytest.approx(expected, rel=1e-5)


def test_clipping_is_global_over_parameter_groups():
    strategy = FakeStrategy(max_norm=0.5)
    model = network()
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=1.0)
    strategy.prepare((model, optimizer))
    before = copy.deepcopy(model)
    x, y = data(scale=100)
    norm = step(strategy, model, optimizer, x, 1000 * y)
    moved = nn.utils.get_total_norm([a - b for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert norm > 100
    assert moved.item() == pytest.approx(0.5, rel=1e-3)


def test_actor_and_critic_are_clipped_each_by_their_own_norm():
    """Upstream's FSDP path forgets the actor's parameters when the critic's optimizer is made."""
    strategy = FakeStrategy(max_norm=1.0)
    actor, critic = network(0), network(1)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (actor, critic)]
    strategy.prepare((actor, optimizers[0]), (critic, optimizers[1]))
    strategy.create_optimizer(actor)
    strategy.create_optimizer(critic)
    before = [copy.deepcopy(m) for m in (actor, critic)]
    x, y = data()
    strategy.backward(1000 * loss_of(actor, x, y), actor, optimizers[0])
    strategy.backward(0.001 * loss_of(critic, x, y), critic, optimizers[1])
    expected = gradient_norm(critic)
    strategy.optimizer_step(optimizers[0], actor, None, name="actor")
    strategy.optimizer_step(optimizers[1], critic, None, name="critic")
    moved = [
        nn.utils.get_total_norm([a - b for a, b in zip(m.parameters(), old.parameters(), strict=True)]).item()
        for m, old in zip((actor, critic), before, strict=True)
    ]
    assert strategy.grad_norms["actor"] > 100
    assert strategy.grad_norms["critic"] == pytest.approx(expected, rel=1e-5)
    assert moved[0] == pytest.approx(1.0, rel=1e-3)
    assert moved[1] == pytest.approx(expected, rel=1e-3)  # below the limit, so untouched


@pytest.mark.parametrize("max_norm", [0, -1.0])
def test_max_norm_of_zero_or_less_means_no_clipping(max_norm):
    """Upstream documents 0 as "no clipping" and zeroes the gradients."""
    strategy = FakeStrategy(max_norm=max_norm)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    strategy.prepare((model, optimizer))
    before = copy.deepcopy(model)
    norm = step(strategy, model, optimizer, *data(scale=10))
    moved = nn.utils.get_total_norm([a - b for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert norm > 1.5
    assert moved.item() == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(bad, caplog):
    """Upstream prints "Skipping update" and steps all the same."""
    strategy = FakeStrategy(train_batch_size=2, micro_train_batch_size=1)
    model = network()
    optimizer = strategy.create_optimizer(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    strategy.prepare((model, optimizer, scheduler))
    x, y = data()
    before = state(model)
    strategy.backward(loss_of(model, x, y) * bad, model, optimizer)
    strategy.optimizer_step(optimizer, model, scheduler, name="actor")
    with caplog.at_level(logging.WARNING):
        norm = step(strategy, model, optimizer, x, y, scheduler=scheduler, name="actor")
    assert not numpy.isfinite(norm)
    assert "actor: gradient norm is" in caplog.text and "step skipped (1 so far)" in caplog.text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (strategy.skipped_steps, strategy.optimizer_steps) == ({"actor": 1}, 0)
    assert scheduler.get_last_lr() == [0.1, 0.1] and not optimizer.state
    for _ in range(2):  # and nothing of it is left in the next step
        norm = step(strategy, model, optimizer, x, y, scheduler=scheduler, name="actor")
    assert numpy.isfinite(norm) and all(v.isfinite().all() for v in model.state_dict().values())
    assert (strategy.skipped_steps, strategy.optimizer_steps) == ({"actor": 1}, 1)
    assert scheduler.get_last_lr() == [0.05, 0.05]


def test_scheduler_advances_once_per_step():
    strategy = FakeStrategy(train_batch_size=4, micro_train_batch_size=1)
    model = network()
    optimizer = strategy.create_optimizer(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    rates = []
    for _ in range(8):
        step(strategy, model, optimizer, *data(), scheduler=scheduler)
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]


def test_flush_takes_the_mean_of_what_there_is_and_leaves_nothing_behind():
    """Upstream leaks a partial accumulation into the next rollout."""
    strategy = FakeStrategy(train_batch_size=4, micro_train_batch_size=1, max_norm=0)
    model, plain = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy.prepare((model, optimizer))
    (x1, y1), (x2, y2) = data(seed=1), data(seed=2)
    assert step(strategy, model, optimizer, x1, y1) is None
    assert step(strategy, model, optimizer, x2, y2, flush=True) is not None
    ((loss_of(plain, x1, y1) + loss_of(plain, x2, y2)) / 2).backward()
    with torch.no_grad():
        for p in plain.parameters():
            p -= 0.1 * p.grad
    assert difference(model, plain) < 1e-6
    assert all(p.grad is None for p in model.parameters())
    assert [step(strategy, model, optimizer, x1, y1) is None for _ in range(4)] == [True, True, True, False]


def test_two_backward_passes_for_one_step_add_up():
    """Actor loss plus a pre-training loss, as LightRFT's PPO trainer does it."""
    strategy = FakeStrategy(train_batch_size=2, micro_train_batch_size=1)
    model, plain = network(), network()
    optimizer = strategy.create_optimizer(model, lr=0.01)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0)
    batches = [data(seed=s) for s in range(4)]
    for actor_batch, pretrain_batch in (batches[:2], batches[2:]):
        strategy.backward(loss_of(model, *actor_batch), model, optimizer)
        strategy.backward(0.5 * loss_of(model, *pretrain_batch), model, optimizer)
        strategy.optimizer_step(optimizer, model, None)
    (sum(w * loss_of(plain, *b) for w, b in zip((1, 0.5, 1, 0.5), batches, strict=True)) / 2).backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    reference.step()
    assert strategy.optimizer_steps == 1
    assert difference(model, plain) < 1e-6


def test_accumulation_can_be_given_with_the_call():
    strategy = FakeStrategy()
    model, plain = network(), network()
    optimizer = strategy.create_optimizer(model, lr=0.01)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0)
    x, y = data(6)
    for i in range(3):
        strategy.backward(loss_of(model, x[2 * i :][:2], y[2 * i :][:2]), model, optimizer, accumulation_steps=3)
        strategy.optimizer_step(optimizer, model, None, accumulation_steps=3)
    loss_of(plain, x, y).backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    reference.step()
    assert strategy.optimizer_steps == 1 and difference(model, plain) < 1e-6


# -------------------------------------------------------------------- the rest of a training loop


def test_moving_average():
    strategy = FakeStrategy()
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = copy.deepcopy(model)
    model(torch.randn(4, 2))
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    expected = {n: 0.9 * a + 0.1 * m for (n, a), m in zip(ema.named_parameters(), model.parameters(), strict=True)}
    strategy.moving_average(model, ema, beta=0.9)
    for name, value in ema.named_parameters():
        assert torch.allclose(value, expected[name], atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(ema.buffers(), model.buffers(), strict=True))
    assert all(p.requires_grad and p.grad_fn is None for p in ema.parameters())


def test_offload_and_reload_leave_everything_where_it_was():
    strategy = FakeStrategy()
    model = network()
    optimizer = strategy.create_optimizer(model)
    strategy.prepare((model, optimizer))
    step(strategy, model, optimizer, *data())
    before, moments = state(model), copy.deepcopy(optimizer.state_dict())
    for _ in range(2):  # twice: idempotent
        strategy.offload_model(model)
        strategy.maybe_offload_optimizer(optimizer)
    for _ in range(2):
        strategy.reload_model(model)
        strategy.maybe_load_optimizer(optimizer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for i, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments["state"][i][key]) for key, value in values.items())
    step(strategy, model, optimizer, *data())
    assert strategy.optimizer_steps == 2


def test_optimizer_state_moves_between_devices_and_its_step_count_stays():
    """The meta device stands for an accelerator: what is on it is seen, what is not too."""
    strategy = FakeStrategy(device="meta")
    optimizer = FakeStrategy().create_optimizer(model := network())
    step(FakeStrategy(), model, optimizer, *data())
    places = lambda: {(key, v.device.type) for s in optimizer.state.values() for key, v in s.items()}  # noqa: E731
    strategy.maybe_offload_optimizer(optimizer)
    assert places() == {("step", "cpu"), ("exp_avg", "cpu"), ("exp_avg_sq", "cpu")}
    strategy.maybe_load_optimizer(optimizer)
    assert places() == {("step", "cpu"), ("exp_avg", "meta"), ("exp_avg_sq", "meta")}


def test_report_memory(capsys):
    report = FakeStrategy().report_memory("after the rollout")
    assert 0.05 < report["process"] < 100  # GiB: torch alone is more than 50 MiB
    assert capsys.readouterr().out == f"after the rollout memory: process {report['process']:.2f} GiB\n"


def test_print(capsys):
    FakeStrategy().print("loss", 0.5)
    assert capsys.readouterr().out == "loss 0.5\n"


@pytest.mark.parametrize("op", ["mean", "sum", "max"])
def test_collectives_are_the_identity_on_nested_containers(op):
    nested = {"loss": torch.tensor(2.0), "parts": {"kl": 0.5, "lengths": [torch.arange(3), 4]}}
    strategy = FakeStrategy()
    for result in (strategy.all_reduce(nested, op=op), strategy.all_gather(nested)):
        assert result["loss"] == 2 and result["parts"]["kl"] == 0.5
        assert result["parts"]["lengths"][0].tolist() == [0, 1, 2] and result["parts"]["lengths"][1] == 4
    assert strategy.all_reduce(3, op) == 3 and strategy.exchange_objects([3]) == [3]
    assert strategy.broadcast({"a": 1}) == {"a": 1}
    strategy.barrier()


def test_unknown_reduction():
    with pytest.raises(ValueError, match="unknown reduction 'avg'"):
        FakeStrategy().all_reduce(1.0, op="avg")


def test_setup_dataloader_reshuffles_and_continues_in_the_middle():
    """Upstream's `set_epoch` never fires, and a resumed run starts at sample 0."""
    strategy = FakeStrategy(seed=7)
    order = lambda loader: [i for batch in loader for i in batch.tolist()]  # noqa: E731
    loader = strategy.setup_dataloader(range(20), 4)
    first, second = order(loader), order(loader)
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    resumed = strategy.setup_dataloader(range(20), 4, consumed_samples=12)
    assert order(resumed) == first[12:]
    assert order(resumed) == second
    assert order(strategy.setup_dataloader(range(20), 4, consumed_samples=32)) == second[12:]
    assert order(FakeStrategy(seed=8).setup_dataloader(range(20), 4)) != first


def test_setup_dataloader_passes_its_arguments_on():
    loader = FakeStrategy().setup_dataloader(range(10), 4, shuffle=False, drop_last=False, collate_fn=tuple)
    assert list(loader) == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert len(FakeStrategy().setup_dataloader(range(10), 4)) == 2


# -------------------------------------------------------------------- engines


class Echo(RolloutEngine):
    """Returns the prompt; remembers what it was told."""

    def __init__(self):
        self.awake, self.calls, self.weights = True, [], {}

    def generate(self, prompts, sampling, streams=None):
        assert self.awake
        return [
            [Completion(tuple(p), (0.0,) * len(p), "eos") for _ in range(sampling.n)] for p in prompts
        ]  # fmt: skip

    def update_weights(self, named_tensors, version):
        self.weights, self.version = dict(named_tensors), version

    def sleep(self, level=1):
        self.calls += [f"sleep {level}"] * self.awake
        self.awake = False

    def wake_up(self):
        self.calls += ["wake up"] * (not self.awake)
        self.awake = True


class Other(Echo):
    """Another type of engine."""


def test_engines_sleep_and_wake_up_on_mixed_lists_and_idempotent():
    strategy = FakeStrategy()
    engines = [Echo(), Other()]
    for _ in range(2):
        strategy.engines_sleep(engines)
    assert [e.calls for e in engines] == [["sleep 1"], ["sleep 1"]]
    for _ in range(2):
        strategy.engines_wake_up(engines)
    assert [e.calls for e in engines] == [["sleep 1", "wake up"]] * 2
    strategy.engines_sleep(engines[0], level=2)
    assert engines[0].calls[-1] == "sleep 2" and engines[1].awake
    strategy.engines_sleep([])


def test_engine_sleeps_between_generations_only_if_asked_to():
    for enabled in (False, True):
        strategy = FakeStrategy(enable_engine_sleep=enabled)
        strategy.inference_engine = engine = Echo()
        strategy.maybe_sleep_inference_engine()
        assert engine.awake is not enabled
        strategy.wakeup_inference_engine()
        assert engine.awake
        result = strategy.gather_and_generate({"n": 2}, all_prompt_token_ids=[[1, 2], [3]])
        assert [[c.token_ids for c in group] for group in result] == [[(1, 2)] * 2, [(3,)] * 2]
        assert engine.awake is not enabled
        strategy.gather_and_generate(SamplingParams(), all_prompt_token_ids=[[1]], sleep_engine=False)
        assert engine.awake


def test_update_engine_weights_sends_the_actor_and_advances_the_version():
    strategy = FakeStrategy()
    strategy.inference_engine = engine = Echo()
    actor = network()
    for version in (1, 2):
        strategy.update_engine_weights(actor)
        assert engine.version == version
    assert all(engine.weights[name].data_ptr() == p.data_ptr() for name, p in actor.named_parameters())


def test_without_an_engine():
    strategy = FakeStrategy()
    strategy.maybe_sleep_inference_engine()
    strategy.wakeup_inference_engine()
    for call in (
        lambda: strategy.gather_and_generate({}, all_prompt_token_ids=[[1]]),
        lambda: strategy.update_engine_weights(network()),
    ):
        with pytest.raises(RuntimeError, match=r"no inference engine: call setup_inference_engine"):
            call()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (
            {"all_prompt_token_ids": [[1]], "all_images": ["cat.png"]},
            ["all_images", "Echo generates from text only, with this model"],
        ),
        ({"all_prompt_token_ids": [[1]], "all_prompts": ["a"]}, ["exactly one"]),
        ({}, ["exactly one"]),
    ],
)
def test_wrong_requests(kwargs, words):
    strategy = FakeStrategy()
    strategy.inference_engine = Echo()
    with pytest.raises(ValueError) as error:
        strategy.gather_and_generate({}, **kwargs)
    assert all(word in str(error.value) for word in words)


def test_text_prompts_need_a_tokenizer():
    strategy = FakeStrategy()
    strategy.inference_engine = Echo()
    with pytest.raises(RuntimeError, match="Echo has no tokenizer"):
        strategy.gather_and_generate({}, all_prompts=["a"])


@pytest.fixture(scope="module")
def tiny():
    from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

    return tiny_llama(layers=1, width=16, heads=2), char_tokenizer()


def test_transformers_engine_generates_with_the_actor(tiny):
    actor, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    strategy = FakeStrategy(engine_type="transformers")
    engine = strategy.setup_inference_engine(actor=actor, tokenizer=tokenizer)
    assert strategy.inference_engine is engine
    ids = [tokenizer("1+1=")["input_ids"], tokenizer("10+2=")["input_ids"]]
    sampling = {"n": 3, "max_new_tokens": 5, "seed": 1}
    result = strategy.gather_and_generate(sampling, all_prompt_token_ids=ids)
    assert [len(group) for group in result] == [3, 3]
    completion = result[1][0]
    with torch.no_grad():
        full = torch.tensor([[*ids[1], *completion.token_ids]])
        logprobs = actor(full).logits[0].log_softmax(-1)
    scored = [logprobs[len(ids[1]) - 1 + i, t].item() for i, t in enumerate(completion.token_ids)]
    assert scored == pytest.approx(completion.logprobs, abs=1e-5)
    with torch.no_grad():
        actor.lm_head.weight.neg_()
    strategy.update_engine_weights(actor)
    assert engine.version == 1
    assert strategy.gather_and_generate(sampling, all_prompt_token_ids=ids) != result


def test_transformers_engine_takes_a_wrapper_and_the_arguments_of_a_config(tiny):
    class Actor(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    strategy = FakeStrategy()
    strategy.setup_inference_engine({"engine_type": "transformers"}, actor=Actor(tiny[0]), tokenizer=tiny[1])
    assert len(strategy.gather_and_generate({"max_new_tokens": 2}, all_prompt_token_ids=[[4, 5]])) == 1


def test_transformers_engine_takes_prompts_as_text(tiny):
    strategy = FakeStrategy(engine_type="transformers")
    strategy.setup_inference_engine(actor=tiny[0], tokenizer=tiny[1])
    sampling, texts = SamplingParams(max_new_tokens=4, seed=1), ["1+1=", "10+2="]
    ids = [tiny[1](text)["input_ids"] for text in texts]
    assert strategy.gather_and_generate(sampling, all_prompts=texts) == strategy.gather_and_generate(sampling, ids)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({}, ValueError, "engine_type='vllm' generates with the actor's weights: pass actor="),  # the default
        ({"engine_type": "vlm"}, ValueError, "unknown engine_type 'vlm'. Did you mean 'vllm'?"),
        ({"engine_type": "transformers"}, ValueError, "pass actor="),
        ({"config": "transformers"}, TypeError, "from_args('transformers')"),
        (
            {"config": {"engine_tp_size": 2}, "engine_type": "transformers", "actor": nn.Linear(1, 1)},
            ValueError,
            "engine_tp_size=2",
        ),
    ],
)
def test_engines_that_cannot_be_built(kwargs, error, words):
    strategy = FakeStrategy()
    with pytest.raises(error) as raised:
        strategy.setup_inference_engine(**kwargs)
    assert words in str(raised.value)
    assert strategy.inference_engine is None
