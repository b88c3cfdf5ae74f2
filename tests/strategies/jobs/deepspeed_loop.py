"""DeepSpeed ZeRO in a hand-written loop, stages 1, 2 and 3; see checks.py."""

from __future__ import annotations

import copy
import sys
from datetime import timedelta
from pathlib import Path

import checks
import pytest
import torch
from torch import nn
from toys import IDS, llama, loss_of, makes_its_optimizer_after_prepare, same, trained

from lightrft_lightning import DeepspeedStrategy, FakeStrategy
from lightrft_lightning.experience.packing import pack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.loading import load_model
from lightrft_lightning.models.logprobs import completion_logprobs
from lightrft_lightning.models.tiny import char_tokenizer

FOLDER = Path(sys.argv[1])
DEADLINE = timedelta(seconds=60)
STAGES = (1, 2, 3)


def strategy(stage, shard_all=True, **settings):
    # Toy parameters are so small that stage 3 would keep all of them on every rank.
    if stage == 3 and shard_all:
        settings.setdefault("deepspeed_config", {"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    made = DeepspeedStrategy(zero_stage=stage, **settings)
    made.setup_distributed(DEADLINE)
    return made


class Critic(nn.Module):
    """A backbone with a value head."""

    def __init__(self):
        super().__init__()
        self.backbone = llama(1).model
        self.head = nn.Linear(32, 1)
        nn.init.constant_(self.head.weight, 0.1)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids):
        return self.head(self.backbone(ids).last_hidden_state).squeeze(-1)


def value_loss(critic, ids):
    return ((critic(ids) - ids / 16) ** 2).mean()


def whole(s, model):
    return {name: tensor.clone() for name, tensor in s.named_full_tensors(model)}


def check_actor_and_critic_as_in_one_process():
    """Two passes of unequal length a step, clipping, two learning rates, schedulers, a reference."""
    one = FakeStrategy(train_batch_size=8, micro_train_batch_size=4, max_norm=0.3)
    expected = run(one, steps=8)
    for stage in STAGES:
        s = strategy(stage, train_batch_size=8, micro_train_batch_size=2, max_norm=0.3)
        result = run(s, steps=8)
        for key in ("losses", "norms"):
            for a, b in zip(result[key], expected[key], strict=True):
                assert a == pytest.approx(b, rel=1e-5), (stage, key)
        assert min(result["norms"]) > 0.3 and result["rates"] == expected["rates"]
        assert s.optimizer_steps == 16 and set(s.grad_norms) == {"actor", "critic"}
        for name, value in expected["weights"].items():
            a, b = result["weights"][name], value
            assert float((a - b).norm() / b.norm()) < 1e-5, (stage, name)


def run(s, steps):
    models = {"actor": llama(), "critic": Critic()}
    rates = {"actor": 1e-3, "critic": 3e-4}
    optimizers = {k: s.create_optimizer(m, lr=rates[k], weight_decay=0.01) for k, m in models.items()}
    schedulers = {k: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + 0.1 * n)) for k, o in optimizers.items()}
    reference = copy.deepcopy(models["actor"])
    *triples, prepared = s.prepare(*((models[k], optimizers[k], schedulers[k]) for k in models), reference)
    assert prepared is reference and not reference.training
    assert all(m is models[k] and o is optimizers[k] for k, (m, o, _) in zip(models, triples, strict=True))
    generator = torch.Generator().manual_seed(0)
    result = {"losses": [], "norms": [], "rates": []}
    for step in range(steps):
        for part in range(2):
            ids = torch.randint(3, 16, (4, 6 + (step + 5 * part) % 7), generator=generator)
            mine = ids[s.get_rank() :: s.world_size]
            with torch.no_grad():
                gap = loss_of(reference, mine)
            losses = {"actor": loss_of(models["actor"], mine) - 0.1 * gap, "critic": value_loss(models["critic"], mine)}
            for k, loss in losses.items():
                s.backward(loss, models[k], optimizers[k])
                result["losses"].append(float(s.all_reduce(loss.detach())))
                norm = s.optimizer_step(optimizers[k], models[k], schedulers[k], k)
                assert (norm is None) == (part == 0)
                if norm is not None:
                    result["norms"].append(norm)
                    result["rates"].append(optimizers[k].param_groups[0]["lr"])
    result["weights"] = {f"{k}.{n}": t for k, m in models.items() for n, t in whole(s, m).items()}
    return result


def check_parameters_are_sharded_at_stage_3_only():
    for stage in STAGES:
        s = strategy(stage)
        (actor, _), frozen = trained(s), s.prepare(llama(1))
        for model in (actor, frozen):
            sharded = [hasattr(p, "ds_id") and p.numel() == 0 for p in model.parameters()]
            assert all(sharded) if stage == 3 else not any(sharded)
        with torch.no_grad():
            same(frozen(IDS).logits, llama(1)(IDS).logits)
        assert all(p.requires_grad for p in actor.parameters()) and not any(
            p.requires_grad for p in frozen.parameters()
        )


def check_partial_accumulation_is_flushed_as_its_mean():
    one = FakeStrategy(max_norm=0.1)
    expected = flushes(one)
    for stage in STAGES:
        assert flushes(strategy(stage, max_norm=0.1)) == pytest.approx(expected, rel=1e-5), stage


def flushes(s):
    """Norms of: two of four passes, one of one, three of three; and the weights' sum afterwards."""
    model, optimizer = s.prepare((m := llama(), torch.optim.SGD(m.parameters(), lr=0.1)))
    norms = []
    for steps, passes in ((4, 2), (1, 1), (3, 3)):
        for k in range(passes):
            s.backward(loss_of(model, IDS + k), model, optimizer, accumulation_steps=steps)
            flush = k == passes - 1 and passes < steps
            norms.append(s.optimizer_step(optimizer, model, None, accumulation_steps=steps, flush=flush))
    return [n for n in norms if n is not None] + [float(sum(t.abs().sum() for t in whole(s, model).values()))]


def check_no_clipping_at_max_norm_zero():
    for stage in STAGES:
        s = strategy(stage, max_norm=0)
        model, optimizer = s.prepare((m := llama(), torch.optim.SGD(m.parameters(), lr=1.0)))
        before = whole(s, model)
        s.backward(100 * loss_of(model), model, optimizer)
        norm = s.optimizer_step(optimizer, model, None)
        moved = sum(float((t - before[n]).norm()) ** 2 for n, t in whole(s, model).items()) ** 0.5
        assert moved == pytest.approx(norm, rel=1e-3) and norm > 10


def check_a_bad_gradient_on_one_rank_skips_the_step_on_all():
    for stage in STAGES:
        for low in ({}, {"bf16": True}, {"fp16": True}):
            s = strategy(stage, **low)
            model, optimizer = trained(s)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
            before = whole(s, model)
            s.backward(loss_of(model) * (float("nan") if s.get_rank() == 1 else 1), model, optimizer)
            s.optimizer_step(optimizer, model, scheduler, "actor")
            assert s.skipped_steps == {"actor": 1} and scheduler.last_epoch == 0 and s.optimizer_steps == 0
            assert all(torch.equal(t, before[n]) for n, t in whole(s, model).items())
            s.backward(loss_of(model), model, optimizer)
            s.optimizer_step(optimizer, model, scheduler, "actor")
            assert s.skipped_steps == {"actor": 1} and scheduler.last_epoch == 1 and s.optimizer_steps == 1
            assert any(not torch.equal(t, before[n]) for n, t in whole(s, model).items())


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, both):
        return self.b(self.a(x)) if both else self.a(x)


def check_a_parameter_without_gradient_does_not_get_an_older_one():
    for stage in STAGES:
        s = strategy(stage, max_norm=0)
        model, optimizer = s.prepare((m := Branches(), torch.optim.SGD(m.parameters(), lr=0.1)))
        for both in (True, False):
            before = whole(s, model)
            s.backward(model(torch.ones(2, 4), both).pow(2).mean(), model, optimizer)
            s.optimizer_step(optimizer, model, None)
        after = whole(s, model)
        assert torch.equal(after["b.weight"], before["b.weight"]) and not torch.equal(
            after["a.weight"], before["a.weight"]
        )


def are_exact(s, model, plain):
    """Though the model's own weights are rounded."""
    for name, piece in s._zero[model].masters():
        full = dict(plain.named_parameters())[name].detach().flatten()
        assert torch.equal(piece.values, full[piece.offset : piece.offset + piece.values.numel()]), name


def check_low_precision_computes_low_and_keeps_full_weights():
    for stage in STAGES:
        for low, dtype in (({"bf16": True}, torch.bfloat16), ({"fp16": True}, torch.float16)):
            s, one = strategy(stage, **low), FakeStrategy()
            (model, optimizer), (plain, single) = trained(s), trained(one)
            frozen = s.prepare(llama(1))
            frozen(input_ids=IDS)  # until then it could be trained yet, from exact weights
            assert {p.dtype for m in (model, frozen) for p in m.parameters()} == {dtype}
            assert model.model.rotary_emb.inv_freq.dtype == torch.float32
            are_exact(s, model, plain)
            for strat, m, o in ((s, model, optimizer), (one, plain, single)):
                strat.norms = []
                for k in range(4):
                    strat.backward(loss_of(m, IDS + k) * 1e-3, m, o, accumulation_steps=2)
                    strat.norms.append(strat.optimizer_step(o, m, None, accumulation_steps=2))
            assert [n for n in s.norms if n] == pytest.approx([n for n in one.norms if n], rel=0.05), (stage, low)
            assert isinstance(model(input_ids=IDS).logits, torch.Tensor)
            with torch.no_grad():
                assert 0 < abs(float(loss_of(model)) - float(loss_of(plain))) < 0.1


def check_float16_has_a_dynamic_scale():
    for stage in STAGES:
        s = strategy(stage, fp16=True, max_norm=0)
        model, optimizer = trained(s)
        s.backward(loss_of(model) * 1e-4, model, optimizer)  # gradients that float16 cannot hold without a scale
        norm = s.optimizer_step(optimizer, model, None)
        scaler = s._models[model].scaler
        assert norm == pytest.approx(1e-4 * reference_norm(), rel=0.05), stage
        scale = scaler.get_scale()
        s.backward(loss_of(model) * (float("inf") if s.get_rank() == 0 else 1), model, optimizer)
        s.optimizer_step(optimizer, model, None)
        assert s.skipped_steps == {"model": 1} and scaler.get_scale() == scale / 2


def reference_norm():
    one = FakeStrategy(max_norm=0)
    model, optimizer = trained(one)
    one.backward(loss_of(model), model, optimizer)
    return one.optimizer_step(optimizer, model, None)


def check_gradient_checkpointing_and_the_chunked_head():
    """Both run parts of the model again in the backward pass."""
    for reentrant in (False, True):
        expected = recomputed(FakeStrategy(max_norm=0.3), reentrant)
        for stage in STAGES:
            assert recomputed(strategy(stage, max_norm=0.3), reentrant) == pytest.approx(expected, rel=1e-5), stage


def recomputed(s, reentrant):
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model, optimizer = trained(s, model, lr=1e-3)
    samples = [
        Trajectory(Prompt((3, 4, 5), ""), Completion((6 + k, 7, 8 + k, 9), (-1.0,) * 4, "stop"), group=0)
        for k in range(3)
    ]
    batch = pack(samples, token_budget=64)[0]
    norms = []
    for _ in range(3):
        s.backward(
            -completion_logprobs(model, batch, chunk_size=5).logprobs.mean(), model, optimizer, accumulation_steps=2
        )
        norms.append(s.optimizer_step(optimizer, model, None, accumulation_steps=2, flush=True))
    return norms


def check_ranks_may_have_unequal_numbers_of_chunks():
    """At stage 3 every chunk of the head gathers its weights, all ranks together."""
    for stage in STAGES:
        norms = {}
        for chunk_size in (1000, 3):
            s = strategy(stage)
            model, optimizer = trained(s)
            samples = [
                Trajectory(Prompt((3, 4, 5), ""), Completion((6 + k, 7, 8 + k, 9), (-1.0,) * 4, "stop"), group=0)
                for k in range(1 + 4 * s.get_rank())
            ]
            batch = pack(samples, token_budget=64)[0]
            norms[chunk_size] = []
            for _ in range(2):
                with torch.no_grad():
                    completion_logprobs(model, batch, chunk_size=chunk_size)
                s.backward(-completion_logprobs(model, batch, chunk_size=chunk_size).logprobs.mean(), model, optimizer)
                norms[chunk_size].append(s.optimizer_step(optimizer, model, None))
        assert norms[3] == pytest.approx(norms[1000], rel=1e-5), stage


def check_ranks_may_run_unequal_numbers_of_passes_when_gathered():
    for stage in STAGES:
        s = strategy(stage)
        (model, optimizer), frozen = trained(s), s.prepare(llama(2))
        for _ in range(2):
            with torch.no_grad():
                expected = model(IDS).logits
                for m, e in ((model, expected), (frozen, llama(2)(IDS).logits)):
                    with s.gathered_parameters(m):
                        for _ in range(1 + 3 * s.get_rank()):
                            logits = m(IDS).logits
                    same(logits, e)
            s.backward(loss_of(model), model, optimizer)
            assert s.optimizer_step(optimizer, model, None) > 0
        if stage == 3:
            assert all(p.numel() == 0 for m in (model, frozen) for p in m.parameters())


class Net(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(8, 1)


def check_a_trunk_of_two_models_is_refused():
    trunk = nn.Linear(8, 8)
    told = r"^Net and Net share trunk.weight, of which DeepSpeed can train one model"
    for together in (True, False):
        s, actor, critic = strategy(2), Net(trunk), Net(trunk)
        pairs = [(actor, s.create_optimizer(actor)), (critic, s.create_optimizer(critic))]
        with pytest.raises(ValueError, match=told):
            for part in [pairs] if together else [pairs[:1], pairs[1:]]:
                s.prepare(*part)


def check_an_optimizer_made_after_prepare():
    for stage in STAGES:
        makes_its_optimizer_after_prepare(strategy(stage))
        s = strategy(stage, bf16=True)
        model = s.prepare(llama())
        s.create_optimizer(model)
        are_exact(s, model, llama())
        frozen = s.prepare(llama(1))
        frozen(input_ids=IDS)
        with pytest.raises(ValueError, match="were rounded to 16 bits at its first forward pass"):
            s.create_optimizer(frozen)


def check_export():
    for stage in STAGES:
        s = strategy(stage)
        model, optimizer = trained(s)
        s.backward(loss_of(model), model, optimizer)
        s.optimizer_step(optimizer, model, None)
        s.save_model(model, char_tokenizer(), FOLDER / f"exported{stage}")
        with torch.no_grad():
            same(load_model(FOLDER / f"exported{stage}")(IDS).logits, model(IDS).logits)


if __name__ == "__main__":
    checks.run(dict(globals()))
