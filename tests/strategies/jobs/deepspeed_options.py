"""Settings of DeepSpeed ZeRO that change where things are; see checks.py."""

from __future__ import annotations

import sys
from pathlib import Path

import checks
import peft
import pytest
import torch
from deepspeed_loop import STAGES, Critic, flushes, run, strategy, whole
from torch import nn
from toys import IDS, llama, loss_of, same, trained

from lightrft_lightning import FakeStrategy
from lightrft_lightning.models.loading import load_model
from lightrft_lightning.models.tiny import char_tokenizer

FOLDER = Path(sys.argv[1])
SHARD_ALL = {"stage3_param_persistence_threshold": 0}


def check_options_give_the_same_result():
    expected = run(FakeStrategy(train_batch_size=8, micro_train_batch_size=4, max_norm=0.3), steps=3)
    options = [
        *({"zero_stage": n, "adam_offload": True} for n in STAGES),
        {"zero_stage": 2, "overlap_comm": True},
        {"zero_stage": 3, "overlap_comm": True},
        {"zero_stage": 3, "zpg": 2},
        {"zero_stage": 3, "shard_all": False},
        {"zero_stage": 3, "deepspeed_config": {"zero_optimization": {**SHARD_ALL, "sub_group_size": 2000}}},
        {"zero_stage": 2, "deepspeed_config": {"zero_optimization": {"reduce_bucket_size": 500}}},
        {"zero_stage": 2, "deepspeed_config": {"zero_optimization": {"contiguous_gradients": False}}},
    ]
    for option in options:
        s = strategy(option.pop("zero_stage"), train_batch_size=8, micro_train_batch_size=2, max_norm=0.3, **option)
        result = run(s, steps=3)
        for key in ("losses", "norms"):
            assert result[key] == pytest.approx(expected[key], rel=1e-5), (option, key)
        for name, value in expected["weights"].items():
            assert float((result["weights"][name] - value).norm() / value.norm()) < 1e-5, (option, name)


def check_offloaded_optimizers_flush_and_skip():
    expected = flushes(FakeStrategy(max_norm=0.1))
    for stage in STAGES:
        assert flushes(strategy(stage, max_norm=0.1, adam_offload=True)) == pytest.approx(expected, rel=1e-5), stage
        s = strategy(stage, adam_offload=True)
        model, optimizer = trained(s)
        before = whole(s, model)
        s.backward(loss_of(model) * (float("nan") if s.get_rank() == 1 else 1), model, optimizer)
        s.optimizer_step(optimizer, model, None)
        assert s.skipped_steps == {"model": 1}
        assert all(torch.equal(before[n], v) for n, v in whole(s, model).items())
        s.backward(loss_of(model), model, optimizer)
        assert s.optimizer_step(optimizer, model, None) > 0 and s.optimizer_steps == 1


def check_gradients_accumulate_in_the_dtype_asked_for():
    for stage in STAGES:
        norms = {}
        for dtype in ("bf16", "fp32"):
            s = strategy(stage, bf16=True, grad_accum_dtype=dtype, max_norm=0)
            model, optimizer = trained(s)
            for k in range(8):
                s.backward(loss_of(model, IDS + k % 2), model, optimizer, accumulation_steps=8)
                norms[dtype] = s.optimizer_step(optimizer, model, None, accumulation_steps=8)
        assert 0 < abs(norms["bf16"] - norms["fp32"]) < 0.05 * norms["fp32"]
    with pytest.raises(ValueError, match=r"grad_accum_dtype='bf16' while computing in fp32"):
        trained(strategy(2, grad_accum_dtype="bf16"))


def check_moving_average():
    for stage in (*STAGES, "zpg"):  # the latter gathers from a second copy
        for low in ({}, {"bf16": True}):
            s = strategy(3, zpg=2, **low) if stage == "zpg" else strategy(stage, **low)
            (model, _), ema = trained(s, llama(0)), s.prepare(llama(1))
            with torch.no_grad():
                ema(IDS)
            for _ in range(200):  # bfloat16 would not move by so little at a time
                s.moving_average(model, ema, beta=0.999)
            values = whole(s, ema)
            for (name, a), (_, b) in zip(llama(0).named_parameters(), llama(1).named_parameters(), strict=True):
                expected = (b + (1 - 0.999**200) * (a - b)).detach()
                same(values[name].float(), expected, 0.01 if low else 1e-5)
            s.save_ckpt(ema, FOLDER / "ema", f"{stage}{''.join(low)}")
            other = s.prepare(llama(2))
            with torch.no_grad():
                other(IDS)
            s.load_ckpt(other, FOLDER / "ema", f"{stage}{''.join(low)}", load_module_only=True)
            same(whole(s, other), values)
            with torch.no_grad():
                same(other(IDS).logits, ema(IDS).logits)


def check_weights_go_to_the_cpu_and_come_back():
    """On a CPU there is nowhere to go, so `offload_model` does nothing; what it does elsewhere is called directly."""
    for stage in STAGES:
        for low in ({}, {"bf16": True}):
            results = []
            for moves in (False, True):
                s = strategy(stage, **low)
                (model, optimizer), frozen = trained(s), s.prepare(llama(1))
                for _ in range(3):
                    s.backward(loss_of(model), model, optimizer)
                    s.optimizer_step(optimizer, model, None)
                    if moves:
                        s.maybe_offload_optimizer(optimizer)
                        s.offload_model(model)
                        for zero in list(s._zero.values()):
                            zero.offload()
                            zero.reload(s.root_device)
                        s.reload_model(model)
                        s.maybe_load_optimizer(optimizer)
                with torch.no_grad():
                    results.append((whole(s, model), frozen(IDS).logits))
            same(*results, 0)


def check_models_larger_than_one_device_are_read_part_by_part():
    s = strategy(3)
    if s.is_rank_0():
        llama(5).save_pretrained(FOLDER / "base")
    s.barrier()
    plain = llama(5)
    for low in ({}, {"bf16": True}):
        s = strategy(3, **low)
        with s.init_model_context(meta_init=True):
            frozen, actor, bare = load_model(FOLDER / "base"), load_model(FOLDER / "base"), nn.Linear(2, 2)
        assert all(p.is_meta for p in frozen.parameters()) and not frozen.model.rotary_emb.inv_freq.is_meta
        frozen, (actor, optimizer) = s.prepare(frozen), trained(s, actor)
        assert all(p.numel() == 0 for m in (actor, frozen) for p in m.parameters())
        with torch.no_grad():
            same(frozen(IDS).logits, plain(IDS).logits.to(frozen.dtype), 0.05 if low else 1e-6)
        for name, piece in s._zero[actor].masters():
            row = dict(plain.named_parameters())[name].detach().flatten()
            assert torch.equal(piece.values, row[piece.offset : piece.offset + len(piece.values)])
        s.backward(loss_of(actor), actor, optimizer)
        assert s.optimizer_step(optimizer, actor, None) == pytest.approx(
            norm_of_one_process(), rel=0.05 if low else 1e-5
        )
        with pytest.raises(
            ValueError, match=r"^Linear was built without weights .*no local folder is known to read 'weight'"
        ):
            s.prepare(bare)
    with strategy(2).init_model_context(meta_init=True):
        assert not nn.Linear(2, 2).weight.is_meta


def norm_of_one_process():
    one = FakeStrategy()
    model, optimizer = trained(one, llama(5))
    one.backward(loss_of(model), model, optimizer)
    return one.optimizer_step(optimizer, model, None)


def check_lora():
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    norms = []
    for s in (FakeStrategy(), *(strategy(stage) for stage in STAGES)):
        torch.manual_seed(1)
        model, optimizer = trained(s, peft.get_peft_model(llama(), settings))
        for _ in range(2):
            s.backward(loss_of(model), model, optimizer)
            norms.append(s.optimizer_step(optimizer, model, None))
        if s.world_size > 1:
            stage = s.config.zero_stage
            s.save_model(model, char_tokenizer(), FOLDER / f"merged{stage}")
            s.save_ckpt(model, FOLDER / "lora", f"lora{stage}")
            with torch.no_grad():
                same(load_model(FOLDER / f"merged{stage}")(IDS).logits, model(input_ids=IDS).logits, 1e-5)
    assert norms == pytest.approx(norms[:2] * 4, rel=1e-5)


def check_optimizers_of_another_model_and_used_ones_are_refused():
    for stage in (1, 3):
        s = strategy(stage)
        with pytest.raises(ValueError, match=r"holds a parameter of shape \(.*\) that is not in the model"):
            s.prepare((llama(), torch.optim.SGD(Critic().parameters(), lr=0.1)))
        model = llama()
        used = torch.optim.AdamW(model.parameters())
        loss_of(model).backward()
        used.step()
        with pytest.raises(ValueError, match=r"an optimizer that has made steps already"):
            s.prepare((model, used))
        with pytest.raises(ValueError, match=r"AdamW was not passed to prepare\(\)"):
            s.backward(loss_of(model), model, used)


if __name__ == "__main__":
    checks.run(dict(globals()))
