"""FSDP2 in a hand-written loop; see checks.py."""

from __future__ import annotations

import copy
import math
import sys
from datetime import timedelta
from pathlib import Path
from unittest import mock

import checks
import peft
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from toys import IDS, llama, loss_of, makes_its_optimizer_after_prepare, same, trained

from lightrft_lightning import FakeStrategy, FSDPV2Strategy
from lightrft_lightning.engines.weight_sync import PolicyWeights
from lightrft_lightning.models import streaming
from lightrft_lightning.models.loading import load_model
from lightrft_lightning.models.lora import check_policy
from lightrft_lightning.models.tiny import char_tokenizer

FOLDER = Path(sys.argv[1])
DEADLINE = timedelta(seconds=30)


def strategy(**settings):
    made = FSDPV2Strategy(**settings)
    made.setup_distributed(DEADLINE)
    return made


def check_every_parameter_is_sharded_block_by_block():
    s = strategy()
    actor, _ = trained(s)
    frozen = s.prepare(llama(1))
    for model in (actor, frozen):
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert sum(p.to_local().numel() for p in model.parameters()) < 0.51 * sum(p.numel() for p in model.parameters())
        assert isinstance(model, FSDPModule) and all(isinstance(b, FSDPModule) for b in model.model.layers)
    assert all(p.requires_grad for p in actor.parameters()) and not any(p.requires_grad for p in frozen.parameters())
    assert actor.training and not frozen.training
    with torch.no_grad():
        same(frozen(IDS).logits, llama(1)(IDS).logits)
    assert all(isinstance(p, DTensor) for p in frozen.parameters())  # freed again after the forward pass


def check_steps_equal_those_of_one_process():
    s, one = (
        strategy(train_batch_size=8, micro_train_batch_size=2, max_norm=0.3),
        FakeStrategy(train_batch_size=8, micro_train_batch_size=4, max_norm=0.3),
    )
    (model, optimizer), (plain, single) = trained(s), trained(one)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for _ in range(2):
            ids = torch.randint(3, 16, (4, 10), generator=generator)
            s.backward(loss_of(model, ids[s.get_rank() :: 2]), model, optimizer)
            one.backward(loss_of(plain, ids), plain, single)
            norm, expected = s.optimizer_step(optimizer, model, None), one.optimizer_step(single, plain, None)
            assert (norm is None) == (expected is None)
        assert norm == pytest.approx(expected, rel=1e-5) and expected > 0.3
    for (name, whole), (_, p) in zip(s.named_full_tensors(model), plain.named_parameters(), strict=True):
        torch.testing.assert_close(whole, p.detach(), rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def check_tied_embeddings_stay_tied():
    s, one = strategy(), FakeStrategy()
    config = copy.deepcopy(llama().config)
    config.tie_word_embeddings = True
    norms = []
    for strat in (s, one):
        torch.manual_seed(0)
        model, optimizer = trained(strat, type(llama())(config))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        for _ in range(2):
            strat.backward(loss_of(model), model, optimizer)
            norms.append(strat.optimizer_step(optimizer, model, None))
        if strat is s:
            assert isinstance(model.lm_head.weight, DTensor)
            s.save_model(model, char_tokenizer(), FOLDER / "tied")
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-5)
    with torch.no_grad():
        same(load_model(FOLDER / "tied")(IDS).logits, model(IDS).logits, 1e-4)


def check_gradients_travel_at_the_boundary_only():
    s = strategy()
    model, optimizer = trained(s)
    counts = []
    for _ in range(3):
        with CommDebugMode() as traffic:
            s.backward(loss_of(model), model, optimizer, accumulation_steps=3)
        counts.append(sum(n for op, n in traffic.get_comm_counts().items() if "reduce_scatter" in str(op)))
        s.optimizer_step(optimizer, model, None, accumulation_steps=3)
    assert counts[:2] == [0, 0] and counts[2] == 3, counts  # two blocks and the rest


def check_partial_accumulation_is_flushed_as_its_mean():
    s, one = strategy(max_norm=0), FakeStrategy(max_norm=0)
    (model, optimizer), (plain, single) = trained(s), trained(one)
    for strat, m, o in ((s, model, optimizer), (one, plain, single)):
        for k in range(2):  # of four
            strat.backward(loss_of(m, IDS + k), m, o, accumulation_steps=4)
            norm = strat.optimizer_step(o, m, None, accumulation_steps=4, flush=k == 1)
        strat.latest = norm
    assert s.latest == pytest.approx(one.latest, rel=1e-5) and s.latest > 0
    # Nothing is left over for the next step.
    for strat, m, o in ((s, model, optimizer), (one, plain, single)):
        strat.backward(loss_of(m), m, o)
        strat.latest = strat.optimizer_step(o, m, None)
    assert s.latest == pytest.approx(one.latest, rel=1e-5)


def check_no_clipping_at_max_norm_zero():
    s = strategy(max_norm=0)
    model, optimizer = s.prepare((m := llama(), torch.optim.SGD(m.parameters(), lr=1.0)))
    before = {n: t.clone() for n, t in s.named_full_tensors(model)}
    s.backward(100 * loss_of(model), model, optimizer)
    norm = s.optimizer_step(optimizer, model, None)
    moved = sum(float((t - before[n]).norm()) ** 2 for n, t in s.named_full_tensors(model)) ** 0.5
    assert moved == pytest.approx(norm, rel=1e-3) and norm > 10


def check_a_bad_gradient_on_one_rank_skips_the_step_on_all():
    s = strategy()
    model, optimizer = trained(s)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    before = {n: t.clone() for n, t in s.named_full_tensors(model)}
    s.backward(loss_of(model) * (float("nan") if s.get_rank() == 1 else 1), model, optimizer)
    s.optimizer_step(optimizer, model, scheduler, "actor")
    assert s.skipped_steps == {"actor": 1} and scheduler.last_epoch == 0
    assert all(torch.equal(t, before[n]) for n, t in s.named_full_tensors(model))
    s.backward(loss_of(model), model, optimizer)
    s.optimizer_step(optimizer, model, scheduler, "actor")
    assert s.skipped_steps == {"actor": 1} and scheduler.last_epoch == 1
    assert not any(torch.equal(t, before[n]) for n, t in s.named_full_tensors(model))


def check_bf16_computes_low_and_keeps_full_weights():
    s = strategy(bf16=True)
    model, optimizer = trained(s)
    seen = []
    mlp = model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda m, args: seen.append((args[0].dtype, m.up_proj.weight.dtype)))
    loss = loss_of(model)
    s.backward(loss, model, optimizer)
    s.optimizer_step(optimizer, model, None)
    assert seen[0] == (torch.bfloat16, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {v.dtype for state in optimizer.state.values() for v in state.values()} == {torch.float32}
    assert 0 < abs(float(loss) - float(loss_of(llama()))) < 0.05


def check_fp16_scales_the_loss():
    s, one = strategy(fp16=True, max_norm=0), FakeStrategy(max_norm=0)
    (model, optimizer), (plain, single) = trained(s), trained(one)
    norms = []
    for strat, m, o in ((s, model, optimizer), (one, plain, single)):
        strat.backward(loss_of(m) * 1e-4, m, o)  # gradients that float16 cannot hold without a scale
        norms.append(strat.optimizer_step(o, m, None))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    scaler = s._models[model].scaler
    scale = scaler.get_scale()
    s.backward(loss_of(model) * (float("inf") if s.get_rank() == 0 else 1), model, optimizer)
    s.optimizer_step(optimizer, model, None)
    assert s.skipped_steps == {"model": 1} and scaler.get_scale() == scale / 2


def check_ranks_may_run_unequal_numbers_of_passes_when_gathered():
    s = strategy()
    model, optimizer = trained(s)
    for gathers in (s, strategy()):  # also one that has not sharded it, as in a second Trainer
        with torch.no_grad(), gathers.gathered_parameters(model):
            for _ in range(1 + 3 * s.get_rank()):
                logits = model(IDS).logits
        same(logits, llama()(IDS).logits)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    s.backward(loss_of(model), model, optimizer)
    assert s.optimizer_step(optimizer, model, None) > 0
    # Parameters are freed after each block again.
    loss_of(model)
    assert all(isinstance(p, DTensor) for p in model.model.layers.parameters())


def check_models_and_optimizers_move_to_the_cpu_and_back():
    s = strategy()
    model, optimizer = trained(s)
    s.backward(loss_of(model), model, optimizer)
    s.optimizer_step(optimizer, model, None)
    expected = loss_of(model).detach()
    s.maybe_offload_optimizer(optimizer)
    s.offload_model(model)
    s.reload_model(model)
    s.maybe_load_optimizer(optimizer)
    same(loss_of(model).detach(), expected)
    s.backward(loss_of(model), model, optimizer)
    assert s.optimizer_step(optimizer, model, None) > 0


def check_cpu_offload_trains_the_same():
    norms = []
    for s in (strategy(), strategy(fsdp_cpu_offload=True)):
        model, optimizer = trained(s)
        for _ in range(2):
            s.backward(loss_of(model), model, optimizer)
            norms.append(s.optimizer_step(optimizer, model, None))
    assert norms[:2] == norms[2:]


def check_moving_average():
    s = strategy()
    model, ema = s.prepare(llama(0), llama(1))
    s.moving_average(model, ema, beta=0.75)
    whole = dict(s.named_full_tensors(ema))
    for (name, a), (_, b) in zip(llama(0).named_parameters(), llama(1).named_parameters(), strict=True):
        same(whole[name], (0.25 * a + 0.75 * b).detach())


def check_collectives_walk_through_containers():
    s = strategy()
    rank = s.get_rank()
    data = {"a": [torch.tensor([1.0 + rank, 2.0]), rank], "b": {"c": 2.5 * rank}, "text": "x"}
    total = s.all_reduce(data, op="sum")
    assert total["a"][0].tolist() == [3.0, 4.0] and total["a"][1] == 1 and total["b"] == {"c": 2.5}
    assert total["text"] == "x" and isinstance(total["a"][1], int)
    assert s.all_reduce(rank) == 0.5 and s.all_reduce(2**53 + 1, op="max") == 2**53 + 1
    assert data["a"][0].tolist() == [1.0 + rank, 2.0]  # the caller's tensors are his
    assert s.all_gather({"x": torch.tensor([rank])})["x"].tolist() == [0, 1]
    assert s.gather_objects((rank, "r")) == [(0, "r"), (1, "r")]
    assert s.exchange_objects([(rank, to) for to in range(2)]) == [(0, rank), (1, rank)]
    assert s.exchange_objects([rank * "long", None]) == (["", "long"] if rank == 0 else [None, None])
    with pytest.raises(ValueError, match=r"reduction"):
        s.all_reduce(1, op="product")


def check_export_and_lora():
    s = strategy()
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain = peft.get_peft_model(llama(), settings)
    model, optimizer = trained(s, copy.deepcopy(plain))
    s.backward(loss_of(model), model, optimizer)
    s.optimizer_step(optimizer, model, None)
    s.save_model(model, char_tokenizer(), FOLDER / "merged")
    s.save_model(model, None, FOLDER / "adapter", merge_lora=False)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        adapter = peft.PeftModel.from_pretrained(llama(), FOLDER / "adapter")
        same(load_model(FOLDER / "merged")(IDS).logits, expected, 1e-5)
        same(adapter(input_ids=IDS).logits, expected)
        assert (plain(input_ids=IDS).logits - expected).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match=r"rank 0 could not write /proc/nowhere"):
        s.save_model(model, None, "/proc/nowhere")


def check_what_is_sent_and_exported_of_shards_is_what_was_trained():
    s = strategy()
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, trainable_token_indices=[3])
    model, optimizer = trained(s, peft.get_peft_model(llama(), settings))
    check_policy(model, "Engine", has_copy=True)
    for _ in range(2):
        s.backward(loss_of(model), model, optimizer)
        s.optimizer_step(optimizer, model, None)
    copied = llama()
    copied.load_state_dict({name: tensor.clone() for name, tensor in PolicyWeights(s, model)})
    s.save_model(model, None, FOLDER / "dora")
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        same(copied.eval()(IDS).logits, expected, 1e-5)
        same(load_model(FOLDER / "dora").eval()(IDS).logits, expected, 1e-5)
        assert (llama()(IDS).logits - expected).abs().max() > 1e-3


def check_weights_are_streamed_into_a_model_built_without_memory():
    s = strategy()
    if s.is_rank_0():
        llama(5).save_pretrained(FOLDER / "base")
    s.barrier()
    with s.init_model_context(meta_init=True):
        model, bare = load_model(FOLDER / "base"), nn.Linear(2, 2)
    assert all(p.is_meta for p in model.parameters()) and not model.model.rotary_emb.inv_freq.is_meta
    read = []

    class Slice:
        def __init__(self, stored):
            self.stored, self.get_shape = stored, stored.get_shape

        def __getitem__(self, part):
            read.append(self.stored[part].numel() / math.prod(self.get_shape()))
            return self.stored[part]

    fill = streaming._fill
    with mock.patch.object(streaming, "_fill", lambda p, stored, where: fill(p, Slice(stored), where)):
        model = s.prepare(model)
    assert len(read) == 21 and max(read) == 0.5  # no rank ever holds a whole tensor
    with torch.no_grad():
        same(model(IDS).logits, llama(5)(IDS).logits)
    with pytest.raises(ValueError, match=r"^Linear was built without weights .*name_or_path=''"):
        s.prepare(bare)


class Net(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(8, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.trunk(x)))


def pair():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    return Net(trunk), Net(trunk)


def check_models_with_a_common_trunk():
    """Either may run alone, or both before one backward pass; with optimizers that this package has not made."""
    results = []
    for s in (strategy(max_norm=0.0), FakeStrategy(max_norm=0.0)):
        actor, critic = pair()
        optimizer, other = torch.optim.SGD(actor.parameters(), 0.1), torch.optim.SGD(critic.head.parameters(), 0.1)
        s.prepare((actor, optimizer), (critic, other))
        for i in range(4):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
            x = x[s.get_rank() :: 2] if s.world_size == 2 else x
            model, its = (critic, other) if i == 1 else (actor, optimizer)
            further = ((critic, other),) if i == 3 else ()
            s.backward(sum(m(x).square().mean() for m, _ in ((model, its), *further)), model, its, further=further)
            for of, step in ((model, its), *further):
                s.optimizer_step(step, of, None)
            optimizer.zero_grad()
        results.append([p.clone() for model in (actor, critic) for _, p in s.named_full_tensors(model)])
    for left, right in zip(*results, strict=True):
        same(left, right.detach())


def check_a_common_trunk_in_two_calls_is_refused():
    s, (actor, critic) = strategy(), pair()
    s.prepare((actor, s.create_optimizer(actor)))
    with pytest.raises(ValueError, match=r"^Net shares parameters with a model that was prepared before: give prepare"):
        s.prepare((critic, s.create_optimizer(critic)))


class Blocks(nn.Module):
    """With one weight in all blocks, one block in all places, or a block's weight in the head."""

    def __init__(self, kind):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(8, 8)
        if kind == "weight":
            for layer in self.layers[1:]:
                layer[0].weight = self.layers[0][0].weight
        elif kind == "block":
            self.layers = nn.ModuleList([self.layers[0]] * 3)
        else:
            self.head.weight = self.layers[0][0].weight

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def check_ties_inside_a_model():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for kind in ("weight", "block", "head"):
        results = []
        for s in (strategy(max_norm=0.0), FakeStrategy(max_norm=0.0)):
            torch.manual_seed(0)
            model, optimizer = trained(s, Blocks(kind))
            for _ in range(3):
                s.backward(model(x).square().mean(), model, optimizer)
                s.optimizer_step(optimizer, model, None)
            results.append([p.clone() for _, p in s.named_full_tensors(model)])
        for left, right in zip(*results, strict=True):
            same(left, right.detach(), 1e-5)


def check_an_optimizer_made_after_prepare():
    makes_its_optimizer_after_prepare(strategy())


def check_refusals():
    with pytest.raises(ValueError, match=r"zpg=3 does not divide the world size 2"):
        strategy(zpg=3)
    with pytest.raises(ValueError, match=r"train_batch_size=6 is not a multiple of .*=2 × world size=2"):
        strategy(train_batch_size=6, micro_train_batch_size=2)
    s = strategy()
    model = llama()
    with pytest.raises(ValueError, match=r"not in the model: pass each optimizer with the model"):
        s.prepare((model, s.create_optimizer(llama())))
    stepped = torch.optim.AdamW((other := llama()).parameters())
    loss_of(other).backward()
    stepped.step()
    with pytest.raises(ValueError, match=r"prepare before the first step"):
        s.prepare((other, stepped))


if __name__ == "__main__":
    checks.run(dict(globals()))
