"""`RLHFModule` inside a real Trainer, on a from-scratch model of a few thousand parameters."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import logging
import math
import warnings
from itertools import groupby
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from training import PROMPTS, Record, StopAt, assert_same, even_digits, make_data, make_module, make_trainer, weights_of
from transformers import BloomConfig, BloomForCausalLM

from lightrft_lightning import (
    CheckpointError,
    FakeStrategy,
    Rewards,
    RLHFModule,
    SamplingParams,
    StrategyConfig,
    TransformersRollout,
    algorithms,
)
from lightrft_lightning.algorithms import PRESETS
from lightrft_lightning.experience import packing
from lightrft_lightning.metrics import pass_at_k
from lightrft_lightning.models import proof
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama


def test_one_epoch_trains_and_logs(tmp_path):
    module, record = make_module(), Record()
    before = None
    trainer = make_trainer(tmp_path, callbacks=[record], logger=CSVLogger(tmp_path))
    module.configure_model()
    before = weights_of(module)
    trainer.fit(module, make_data())
    assert any(not torch.equal(before[n], p) for n, p in weights_of(module).items())
    assert trainer.global_step == 4
    first = record.metrics[0]
    for name in (
        "train/reward", "train/reward_std", "train/length", "train/finished", "train/loss", "train/grad_norm",
        "train/clip_fraction", "train/mismatch_max", "train/groups_with_signal", "time/rollout", "time/update",
        "time/tokens_per_second", "train/policy_version",
    ):  # fmt: skip
        assert name in first, name
        assert math.isfinite(first[name]), name
    # The engine and the trainer compute the same distribution.
    assert all(m["train/mismatch_max"] < 1e-4 for m in record.metrics)
    assert [m["train/policy_version"] for m in record.metrics] == [0, 1, 2, 3]
    assert "val/reward" in trainer.callback_metrics


def test_reward_rises(tmp_path):
    module, record = make_module(lr=3e-3, sampling=SamplingParams(n=8, max_new_tokens=6)), Record()
    trainer = make_trainer(tmp_path, callbacks=[record], max_epochs=8, limit_val_batches=0)
    trainer.fit(module, make_data(batch_size=8))
    rewards = [m["train/reward"] for m in record.metrics]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1.0


def fit(path, module, max_epochs, ckpt_path=None, stop=None):
    record = Record()
    checkpoint = ModelCheckpoint(path, save_last=True, save_top_k=0, every_n_train_steps=1)
    trainer = make_trainer(path, callbacks=[record, checkpoint, StopAt(stop)], max_epochs=max_epochs)
    trainer.fit(module, make_data(), ckpt_path=ckpt_path)
    return record, trainer


def sometimes(completion: str, prompt: str) -> float:
    """Equal within most groups."""
    return float("2" in completion) if prompt[0] == "3" else 1.0


@pytest.mark.parametrize(
    ("stop", "algorithm"),
    [(3, {}), (4, {}), (6, {}), (3, {"dynamic_sampling": True, "rewards": sometimes})],
    ids=["mid-epoch", "epoch-end", "second-epoch", "resampling"],
)
def test_resume_is_bit_for_bit(tmp_path, stop, algorithm):
    """Weights, moments, schedule, random state (dropout), data order and engine version all come back."""
    settings = algorithm | {
        "dropout": 0.2,
        "lr_schedule": "cosine",
        "warmup_ratio": 0.2,
        "steps_per_epoch": 2,
        "kl_coef": 0.01,
    }
    straight = make_module(**settings)
    whole, trainer = fit(tmp_path / "a", straight, 2)
    torch.manual_seed(99)
    first, _ = fit(tmp_path / "b", make_module(**settings), 2, stop=stop)
    resumed = make_module(**settings)
    torch.manual_seed(7)
    rest, resumed_trainer = fit(tmp_path / "b", resumed, 2, ckpt_path="last")
    assert len(first.tokens) == stop
    assert first.tokens + rest.tokens == whole.tokens
    assert_same(weights_of(straight), weights_of(resumed))
    for a, b in zip(whole.metrics, first.metrics + rest.metrics, strict=True):
        same = {k: v for k, v in a.items() if not k.startswith(("time/", "val/"))}
        assert same == {k: b[k] for k in same}
    state, other = (t.optimizers[0].state_dict()["state"] for t in (trainer, resumed_trainer))
    assert all(torch.equal(state[i][k], other[i][k]) for i in state for k in state[i])
    assert trainer.global_step == resumed_trainer.global_step
    assert trainer.callbacks[0].version == resumed_trainer.callbacks[0].version == 8


@pytest.mark.parametrize("algorithm", [None, *PRESETS])
def test_update_does_not_depend_on_the_token_budget_or_the_layout(tmp_path, algorithm):
    results = []
    for settings in ({}, {"token_budget": 12}, {"share_prompts": False}, {"token_budget": 40}):
        module = make_module(
            algorithm=algorithm, high_entropy_share=0.5, kl_coef=0.1, steps_per_epoch=2, epochs_per_rollout=2,
            correction="sequence_truncated", **settings,
        )  # fmt: skip
        make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module, make_data())
        results.append(weights_of(module))
    start = weights_of(make_module())
    moved = torch.cat([(results[0][name] - value).flatten() for name, value in start.items()]).norm()
    for other in results[1:]:
        # Single weights may differ by more: Adam turns a gradient of nearly 0 into a step of full size.
        difference = torch.cat([(other[name] - value).flatten() for name, value in results[0].items()]).norm()
        assert difference < 1e-3 * moved


def test_several_steps_and_epochs_per_rollout(tmp_path):
    module, record = make_module(steps_per_epoch=2, epochs_per_rollout=3), Record()
    trainer = make_trainer(tmp_path, callbacks=[record], limit_train_batches=2, limit_val_batches=0)
    trainer.fit(module, make_data())
    assert trainer.global_step == 2 * 2 * 3
    assert module.iteration == 2
    assert record.metrics[0]["train/ratio_max"] > 1.0  # later steps of a rollout are off-policy


def test_reference_exists_only_with_a_kl_term(tmp_path):
    off, on = make_module(), make_module(kl_coef=0.5)
    off.configure_model()
    on.configure_model()
    assert off.reference is None
    assert not any(p.requires_grad for p in on.reference.parameters())
    start = copy.deepcopy(on.reference.state_dict())
    record = Record()
    trainer = make_trainer(tmp_path, callbacks=[record], limit_val_batches=0)
    trainer.fit(on, make_data())
    assert record.metrics[0]["train/kl"] == pytest.approx(0, abs=1e-6)
    assert record.metrics[-1]["train/kl"] > 0
    assert all(torch.equal(start[k], v) for k, v in on.reference.state_dict().items())
    assert not any(k.startswith("reference.") for k in on.state_dict())


def test_strong_kl_keeps_the_policy_near_the_start(tmp_path):
    moved = []
    for kl_coef in (0.001, 20.0):
        module, record = make_module(kl_coef=kl_coef, lr=3e-3), Record()
        make_trainer(tmp_path, callbacks=[record], max_epochs=3, limit_val_batches=0).fit(module, make_data())
        moved.append(record.metrics[-1]["train/kl"])
    assert moved[1] < moved[0] / 4


def test_only_tokens_of_high_entropy_are_learnt_from(tmp_path):
    """The same update as from the loss of the selected tokens, computed here."""
    start, module, record = tiny_llama(seed=0, width=32, layers=2), make_module(high_entropy_share=0.25), Record()
    make_trainer(tmp_path, callbacks=[record], limit_train_batches=1, limit_val_batches=0).fit(module, make_data())
    samples, total = [], 0
    for t in module.last_trajectories:
        ids = torch.tensor([[*t.prompt.token_ids, *t.completion.token_ids]])
        logits = start(ids).logits[0, len(t.prompt.token_ids) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1).detach()
        chosen = logprobs.gather(1, ids[0, len(t.prompt.token_ids) :, None])[:, 0]
        samples.append((entropy, chosen * torch.tensor(t.advantages)))
        total += len(t.mask)
    ranked = torch.cat([entropy for entropy, _ in samples]).sort(descending=True).values
    threshold = ranked[round(0.25 * total) - 1]
    loss = -torch.cat([value[entropy >= threshold - 1e-6] for entropy, value in samples]).sum() / total
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in start.parameters()]).norm().item()
    assert record.metrics[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert record.metrics[0]["train/weight_zero"] == pytest.approx(0.75, abs=0.05)


def test_kl_in_the_reward_is_taken_off_every_token(tmp_path):
    module = make_module(
        advantage_estimator="reinforce", advantage_options={"gamma": 0.9}, kl_coef=0.3, kl_in="reward", lr=3e-3
    )
    make_trainer(tmp_path, limit_train_batches=3, limit_val_batches=0).fit(module, make_data())
    differences = []
    for t in module.last_trajectories:
        kl = algorithms.kl_penalty("k3", t.old_logprobs, t.reference_logprobs).double()
        rewards = -0.3 * kl
        rewards[-1] += t.reward
        for k, advantage in enumerate(t.advantages):
            expected = sum(0.9 ** (j - k) * float(rewards[j]) for j in range(k, len(rewards)))
            assert advantage == pytest.approx(expected, abs=1e-6)
        differences.append(float(kl.abs().max()))
    assert max(differences) > 1e-4


def test_the_kl_coefficient_follows_its_target_and_is_resumed(tmp_path):
    settings = {"kl_coef": 0.1, "kl_target": 0.05, "kl_horizon": 100, "lr": 3e-3}
    record = Record()
    save = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    make_trainer(tmp_path, callbacks=[record, save], limit_val_batches=0).fit(make_module(**settings), make_data())
    coefs = [m["train/kl_coef"] for m in record.metrics]
    assert coefs[:2] == pytest.approx([0.1, 0.1 * (1 - 0.2 * 16 / 100)])  # 16 samples, a KL of nearly 0
    for before, after, metrics in zip(coefs, coefs[1:], record.metrics, strict=False):
        error = min(max(metrics["train/kl"] / 0.05 - 1, -0.2), 0.2)
        assert after == pytest.approx(before * (1 + error * 16 / 100), rel=1e-6)
    resumed = Record()
    make_trainer(tmp_path, callbacks=[resumed], limit_val_batches=0).fit(
        make_module(**settings), make_data(), ckpt_path=tmp_path / "step=2.ckpt"
    )
    assert [m["train/kl_coef"] for m in resumed.metrics] == coefs[2:]


def test_rewards_are_shaped_step_by_step(tmp_path):
    """Penalty, running moments and clip, in this order; resumed with the moments."""
    settings = {
        "advantage_estimator": "rloo", "overlong_buffer": 4, "overlong_factor": 2.0, "reward_norm": "full",
        "reward_clip": 1.0,
    }  # fmt: skip

    class Keep(Record):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            self.trajectories = list(pl_module.last_trajectories)

    record = Keep()
    save = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    module = make_module(**settings)
    trainer = make_trainer(tmp_path, callbacks=[record, save], limit_val_batches=1, val_check_interval=1)
    trainer.fit(module, make_data())
    seen, before = module.reward_moments, []
    assert seen.count == 4 * 16  # nothing of the validations
    for t in record.trajectories:
        assert t.reward_parts["overlong"] == -2.0 * max(0, len(t.completion.token_ids) - 2) / 4
        raw = (t.reward + t.reward_parts["overlong"] - seen.mean) / seen.std
        before.append(min(max(raw, -1.0), 1.0))
    for k in range(0, 16, 4):
        mean = sum(before[k : k + 4]) / 4
        for t, value in zip(record.trajectories[k : k + 4], before[k : k + 4], strict=True):
            assert t.advantages == pytest.approx((4 / 3 * (value - mean),) * len(t.mask), abs=1e-9)
    assert record.metrics[-1]["train/reward_running_std"] == pytest.approx(seen.std)
    resumed = make_module(**settings)
    make_trainer(tmp_path, limit_val_batches=0).fit(resumed, make_data(), ckpt_path=tmp_path / "step=2.ckpt")
    assert resumed.reward_moments.state_dict() == seen.state_dict()


def test_advantages_of_the_global_batch_are_normalised(tmp_path):
    module = make_module(advantage_estimator="rloo", advantage_norm=True)
    make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module, make_data())
    values = torch.tensor([a for t in module.last_trajectories for a in t.advantages])
    assert values.mean().item() == pytest.approx(0, abs=1e-6)
    assert values.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_groups_without_a_difference_are_replaced(tmp_path):
    module, record = make_module(rewards=sometimes, dynamic_sampling=True, lr=3e-3), Record()
    make_trainer(tmp_path, callbacks=[record], limit_train_batches=1, limit_val_batches=0).fit(
        module, make_data(batch_size=2)
    )
    groups = {}
    for t in module.last_trajectories:
        groups.setdefault(t.group, []).append(t)
    learnt = {g for g, members in groups.items() if any(any(t.advantages) for t in members)}
    metrics = record.metrics[0]
    assert len(learnt) == 2 == metrics["train/groups_with_signal"]
    assert metrics["train/resampled_groups"] == len(groups) - 2 > 0
    assert {members[0].prompt.text[0] for g, members in groups.items() if g in learnt} == {"3"}
    prompts = [members[0].prompt.token_ids for members in groups.values()]
    assert len(set(prompts)) == len(prompts)
    assert metrics["train/reward"] == pytest.approx(
        sum(t.reward for t in module.last_trajectories) / len(module.last_trajectories)
    )


def test_the_engine_sleeps_once_an_iteration_however_often_it_samples(tmp_path):
    class Sleepy(TransformersRollout):
        sleep_level, calls = 2, ""

        def sleep(self, level=1):
            self.calls += "s"

        def wake_up(self):
            self.calls += "w"

        def generate(self, *arguments):
            self.calls += "g"
            return super().generate(*arguments)

    engine, module = Sleepy(), make_module(rewards=sometimes, dynamic_sampling=True)
    trainer = make_trainer(tmp_path, limit_train_batches=2, limit_val_batches=0)
    trainer.callbacks = [engine if isinstance(c, TransformersRollout) else c for c in trainer.callbacks]
    trainer.fit(module, make_data(batch_size=2))
    iterations = engine.calls.replace("w", "").split("s")
    assert len(iterations) == 3 and all(len(calls) > 1 for calls in iterations[:2]), engine.calls


@pytest.mark.parametrize("dynamic_sampling", [False, True])
def test_what_is_offloaded_is_away_during_rollouts_only(tmp_path, monkeypatch, dynamic_sampling):
    calls = []

    def record(method, then):
        def recorded(self, what):
            calls.append(("off " if "offload" in method else "on ") + type(what).__name__)
            then(self, what)

        monkeypatch.setattr(FakeStrategy, method, recorded)

    for method in ("maybe_offload_optimizer", "maybe_load_optimizer", "offload_model", "reload_model"):
        record(method, getattr(FakeStrategy, method))

    class Engine(TransformersRollout):
        has_copy = True

        def generate(self, *arguments):
            calls.append("generate")
            return super().generate(*arguments)

    settings = {"kl_coef": 0.1, "rewards": sometimes, "dynamic_sampling": dynamic_sampling}
    weights = {}
    for offload in ("none", "optimizer", "all"):
        calls.clear()
        module = make_module(offload=offload, **settings)
        trainer = make_trainer(tmp_path, engine=Engine(), limit_train_batches=2, limit_val_batches=1)
        trainer.fit(module, make_data(batch_size=2))
        weights[offload] = weights_of(module)
        moved = {"none": [], "optimizer": ["AdamW"], "all": ["AdamW", "LlamaForCausalLM", "LlamaForCausalLM"]}[offload]
        away, back = [f"off {name}" for name in moved], [f"on {name}" for name in [*moved[1:], *moved[:1]]]
        rollouts = [list(group) for is_rollout, group in groupby(calls, "generate".__eq__) if is_rollout]
        if moved:
            # The sanity check of validation, two iterations, one validation.
            assert len(rollouts) == 4 and any(len(group) > 1 for group in rollouts) == dynamic_sampling
            between = [list(group) for is_rollout, group in groupby(calls, "generate".__eq__) if not is_rollout]
            assert between == [away, *[back + away] * 3, back]
    assert_same(weights["none"], weights["optimizer"])
    assert_same(weights["none"], weights["all"])


def test_the_policy_that_generates_is_not_offloaded(tmp_path):
    with pytest.raises(ValueError, match="offload='all' with TransformersRollout, which generates with the model in"):
        make_trainer(tmp_path).fit(make_module(offload="all"), make_data())


def test_a_batch_that_cannot_be_filled(tmp_path, caplog):
    def always(completion: str) -> float:
        return 1.0

    def one_prompt(completion: str, prompt: str) -> float:
        return even_digits(completion) if prompt == "3+3=" else 1.0

    def fit(rewards, **settings):
        module, record = make_module(rewards=rewards, dynamic_sampling=True, **settings), Record()
        trainer = make_trainer(tmp_path, callbacks=[record], limit_train_batches=1, limit_val_batches=0)
        trainer.fit(module, make_data(batch_size=4))
        return record.metrics[0]

    with pytest.raises(RuntimeError, match="after 16 prompts only 0 of 4 groups have unequal rewards"):
        fit(always, short_batch="error")
    with caplog.at_level(logging.WARNING):
        assert fit(one_prompt)["train/groups_with_signal"] == 1
    assert "after 16 prompts only 1 of 4 groups have unequal rewards, the batch is short" in caplog.text
    assert fit(always, sampling_attempts=1)["train/resampled_groups"] == 4


def test_the_first_token_may_be_hotter(tmp_path):
    """More variety there and nowhere else; the trainer computes the distribution that it was drawn from."""
    cold, hot = [], []
    for temperature, firsts in ((None, cold), (30.0, hot)):
        module, record = make_module(first_token_temperature=temperature, sampling=SamplingParams(32, 5, 0.2)), Record()
        trainer = make_trainer(tmp_path, callbacks=[record], limit_train_batches=2, limit_val_batches=0)
        trainer.fit(module, make_data())
        assert all(m["train/mismatch_max"] < 1e-4 for m in record.metrics)
        firsts += [len({ids[0] for ids in record.tokens[0][k : k + 32]}) for k in range(0, 128, 32)]
        assert {len(ids) for ids in record.tokens[0]} <= set(range(1, 6))
        assert all(t.completion.finish_reason != "length" or len(t.mask) == 5 for t in module.last_trajectories)
        if temperature:  # the distribution at this temperature is nearly uniform over 16 tokens
            logprobs = [t.completion.logprobs for t in module.last_trajectories]
            assert all(abs(p[0] + math.log(16)) < 0.2 for p in logprobs)
            assert any(abs(p[1] + math.log(16)) > 1.0 for p in logprobs if len(p) > 1)
    assert min(hot) > max(cold)


def test_a_correction_weighs_what_the_engine_drew_from_another_policy(tmp_path):
    """An engine whose log-probabilities are all 1 nat too low: every token counts e times, at most twice."""

    class Lower(TransformersRollout):
        def generate(self, *arguments):
            groups = super().generate(*arguments)
            lower = lambda c: dataclasses.replace(c, logprobs=tuple(p - 1 for p in c.logprobs))  # noqa: E731
            return [[lower(c) for c in group] for group in groups]

    means = {}
    for correction in ("none", "token_truncated", "token_masked"):
        module, record = make_module(correction=correction, check_numerics=False), Record()
        trainer = make_trainer(tmp_path, callbacks=[record], limit_train_batches=1, limit_val_batches=0)
        trainer.callbacks = [Lower() if isinstance(c, TransformersRollout) else c for c in trainer.callbacks]
        trainer.fit(module, make_data())
        means[correction] = record.metrics[0]
    assert means["token_truncated"]["train/weight_mean"] == pytest.approx(2.0)
    assert means["token_masked"]["train/weight_zero"] == 1.0 and means["token_masked"]["train/grad_norm"] == 0
    plain, doubled = (means[c]["train/grad_norm"] for c in ("none", "token_truncated"))
    assert doubled == pytest.approx(2 * plain, rel=1e-4)


# ---------------------------------------------------------------- what a batch may hold


@pytest.mark.parametrize(
    "reward",
    [lambda completion: float("nan"), lambda completion: 0.7, lambda completion: 1 / 0],
    ids=["nan", "all-equal", "raises"],
)
def test_a_batch_without_signal_is_survived_and_logged(tmp_path, reward, caplog):
    calls = []

    def but_once(completion):  # or the run would stop
        calls.append(completion)
        return 0.7 if len(calls) == 1 else reward(completion)

    module, record = make_module(rewards=but_once), Record()
    module.configure_model()
    before = weights_of(module)
    trainer = make_trainer(tmp_path, callbacks=[record], limit_train_batches=2, limit_val_batches=0)
    with caplog.at_level(logging.WARNING):
        trainer.fit(module, make_data())
    assert_same(before, weights_of(module))
    assert len(record.metrics) == 2
    assert record.metrics[0]["train/groups_with_signal"] == 0
    assert "no update" in caplog.text


def test_one_failing_reward_costs_one_sample(tmp_path):
    calls = []

    def reward(completion):
        calls.append(completion)
        if len(calls) == 3:
            raise RuntimeError("boom")
        return even_digits(completion)

    module, record = make_module(rewards=reward), Record()
    make_trainer(tmp_path, callbacks=[record], limit_train_batches=1, limit_val_batches=0).fit(module, make_data())
    assert record.metrics[0]["train/failed_rewards"] == 1
    assert sum(t.reward is None for t in module.last_trajectories) == 1
    assert record.metrics[0]["train/grad_norm"] > 0


def test_completions_of_only_an_end_token_are_survived(tmp_path):
    model = tiny_llama(seed=0, width=32, layers=2)
    tokenizer = char_tokenizer("0123456789+= ")
    hook = model.lm_head.register_forward_hook(  # makes the end token nearly certain
        lambda module, args, output: output + 50.0 * torch.nn.functional.one_hot(
            torch.tensor(tokenizer.eos_token_id), output.shape[-1]
        )
    )  # fmt: skip
    module, record = make_module(model=model, tokenizer=tokenizer), Record()
    make_trainer(tmp_path, callbacks=[record], limit_train_batches=1, limit_val_batches=0).fit(module, make_data())
    hook.remove()
    assert record.metrics[0]["train/length"] == 1
    assert all(t.text == "" for t in module.last_trajectories)


# ---------------------------------------------------------------- Lightning's own features


def test_checkpoints_by_steps_come_without_wrong_advice(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make_trainer(tmp_path, callbacks=[checkpoints], max_epochs=1).fit(make_module(), make_data())
    assert Path(checkpoints.best_model_path).is_dir()
    assert not [w for w in seen if "manual optimization" in str(w.message)]


def test_lightning_callbacks_work(tmp_path):
    callbacks = [
        ModelCheckpoint(tmp_path / "ckpt", monitor="val/reward", mode="max", save_top_k=1),
        EarlyStopping("val/reward", mode="max", patience=0, min_delta=1e6),
        LearningRateMonitor(),
    ]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_epochs=9, logger=CSVLogger(tmp_path))
    trainer.fit(make_module(lr_schedule="linear", warmup_ratio=0.1), make_data())
    assert trainer.current_epoch == 2  # nothing beats a minimal improvement of a million
    manifest = json.loads(Path(callbacks[0].best_model_path, "manifest.json").read_text())
    assert manifest["data"] == [{"epoch": manifest["step"] // 4, "consumed_samples": 0}]
    trainer.logger.save()
    table = (Path(trainer.logger.log_dir) / "metrics.csv").read_text()
    assert "lr-AdamW" in table.splitlines()[0]
    assert "train/reward" in table.splitlines()[0]


def test_weight_averaging(tmp_path):
    averaging = WeightAveraging(avg_fn=lambda average, value, count: 0.9 * average + 0.1 * value)
    module = make_module()
    make_trainer(tmp_path, callbacks=[averaging]).fit(module, make_data())
    plain = make_module()
    make_trainer(tmp_path).fit(plain, make_data())
    differs = [not torch.equal(a, weights_of(plain)[n]) for n, a in weights_of(module).items()]
    assert any(differs)


@pytest.mark.parametrize(
    ("settings", "iterations"),
    [
        ({"limit_train_batches": 2}, 2),
        ({"fast_dev_run": True}, 1),
        ({"max_steps": 3, "max_epochs": -1}, 3),
    ],
    ids=["limit_train_batches", "fast_dev_run", "max_steps"],
)
def test_trainer_limits(tmp_path, settings, iterations):
    module = make_module()
    make_trainer(tmp_path, **settings).fit(module, make_data())
    assert module.iteration == iterations


def test_max_time(tmp_path):
    module = make_module()
    trainer = make_trainer(tmp_path, max_time={"seconds": 2}, max_epochs=10_000, limit_val_batches=0)
    trainer.fit(module, make_data())
    assert 1 <= module.iteration < 1000


def test_validate_test_and_predict_without_fit(tmp_path):
    module, data = make_module(), make_data(predict=["1+1=", "2+3="])
    trainer = make_trainer(tmp_path)
    (metrics,) = trainer.validate(module, data)
    assert metrics["val/length"] <= 6
    assert trainer.validate(module, data) == [metrics]  # greedy, so the same again
    (tested,) = trainer.test(module, make_data(), verbose=False) if hasattr(data, "test_dataloader") else [metrics]
    assert set(tested)
    (predictions,) = trainer.predict(module, data)
    assert [p["prompt"] for p in predictions] == ["1+1=", "2+3="]
    assert all(p["finish_reason"] in ("eos", "length") for p in predictions)


def test_validation_leaves_training_untouched(tmp_path):
    """Also one with several samples a prompt, with an algorithm that keeps moments and samples further prompts."""
    results = []
    for limit in (0, 1.0):
        record = Record()
        trainer = make_trainer(tmp_path, callbacks=[record], limit_val_batches=limit, val_check_interval=1)
        module = make_module(
            dropout=0.2, val_sampling=SamplingParams(n=4, max_new_tokens=6), advantage_estimator="rloo",
            reward_norm="scale", dynamic_sampling=True, rewards=sometimes,
        )  # fmt: skip
        trainer.fit(module, make_data())
        results.append((record.tokens, module.reward_moments.state_dict(), torch.get_rng_state().tolist()))
        versions = [m["train/policy_version"] for m in record.metrics]
        results[-1] += (versions, {name: value.tolist() for name, value in weights_of(module).items()})
    assert results[0] == results[1]


def test_pass_at_k_and_mean_over_all_held_out_prompts(tmp_path):
    """A last batch that is smaller weighs less; what is logged is that of all samples together."""

    class Keep(pl.Callback):
        rewards = ()

        def on_validation_batch_end(self, trainer, pl_module, *args):
            groups = {}
            for t in pl_module.last_trajectories:
                groups.setdefault(t.group, []).append(t.reward)
            self.rewards = (*self.rewards, *groups.values())

    keep = Keep()
    module = make_module(val_sampling=SamplingParams(n=6, max_new_tokens=6), pass_threshold=2.0)
    (metrics,) = make_trainer(tmp_path, callbacks=[keep]).validate(module, make_data(val=PROMPTS[:5], val_batch_size=2))
    assert [len(group) for group in keep.rewards] == [6] * 5
    passed = [sum(r >= 2.0 for r in group) for group in keep.rewards]
    for k in (1, 2, 4, 6):
        assert metrics[f"val/pass@{k}"] == pytest.approx(sum(pass_at_k(6, c, k) for c in passed) / 5)
    assert metrics["val/mean@6"] == metrics["val/reward"] == pytest.approx(sum(map(sum, keep.rewards)) / 30)
    assert 0 < metrics["val/pass@1"] < metrics["val/pass@6"]


def test_named_validation_sets_are_logged_apart_and_together(tmp_path):
    def evaluate(**sets):
        module = make_module(val_sampling=SamplingParams(n=4, max_new_tokens=6), pass_threshold=2.0)
        data = make_data(val_batch_size=2, **sets)
        return make_trainer(tmp_path).validate(module, data, verbose=False)[0], data

    both, data = evaluate(val={"first": PROMPTS[:5], "rest": PROMPTS[5:8]})
    assert data.val_names == ("first", "rest") and [len(p) for p in data.val_prompts.values()] == [5, 3]
    alone, _ = evaluate(val=PROMPTS[:5])
    for name, value in alone.items():
        assert both[name.replace("val/", "val/first/")] == value
    for name in ("reward", "pass@1", "pass@2", "pass@4", "mean@4", "length"):
        assert both[f"val/{name}"] == pytest.approx((5 * both[f"val/first/{name}"] + 3 * both[f"val/rest/{name}"]) / 8)


@pytest.mark.parametrize("threshold", [float("nan"), float("inf")])
def test_the_threshold_is_checked_before_work_starts(threshold):
    with pytest.raises(ValueError, match=rf"RLHFModule\(pass_threshold={threshold}\): must be a finite number"):
        make_module(pass_threshold=threshold)


def test_a_failed_reward_does_not_pass(tmp_path):
    calls = []

    def every_other(completion):
        calls.append(completion)
        return 1.0 if len(calls) % 2 else float("nan")

    rewards = Rewards(every_other, workers=1)
    module = make_module(rewards=rewards, val_sampling=SamplingParams(n=2, max_new_tokens=6))
    (metrics,) = make_trainer(tmp_path).validate(module, make_data(), verbose=False)
    found = [metrics[f"val/{name}"] for name in ("pass@1", "pass@2", "mean@2")]
    assert found == [0.5, 1.0, 1.0]


def test_load_from_checkpoint(tmp_path):
    module = make_module()
    fit(tmp_path, module, 1)
    loaded = RLHFModule.load_from_checkpoint(
        tmp_path / "last.ckpt",
        model=tiny_llama(seed=5, width=32, layers=2),
        rewards=even_digits,
        tokenizer=char_tokenizer("0123456789+= "),
    )
    assert_same(weights_of(module), weights_of(loaded))
    assert loaded.sampling == module.sampling
    settings = inspect.signature(RLHFModule).parameters.keys() - {"tokenizer"}
    assert settings == module.hparams.keys(), "every setting is in the checkpoint"


# ---------------------------------------------------------------- errors before work starts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage_estimator": "group_nrm"}, "'group_nrm'.*Did you mean 'group_norm'"),
        ({"policy_loss": "pppo"}, "'pppo'.*Did you mean 'ppo'"),
        ({"policy_loss_options": {"clip_hi": 0.3}}, "'clip_hi'.*Did you mean 'clip_high'"),
        ({"aggregation": "token_men"}, "'token_men'.*'token_mean'"),
        ({"kl_estimator": "k4"}, "'k4'"),
        ({"lr_schedule": "cosin"}, "'cosin'.*'cosine'"),
        ({"kl_coef": -1.0}, "kl_coef=-1.0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"sampling": SamplingParams(n=1)}, "sampling.n=1 must be at least 2"),
        ({"sampling": SamplingParams(n=2, temperature=0.0)}, "temperature=0"),
        ({"sampling": SamplingParams(n=2, top_p=0.9)}, "top_p=0.9"),
        ({"rewards": None}, "needs `rewards`"),
        ({"algorithm": "dpo"}, "unknown algorithm 'dpo'"),
        ({"advantage_options": {"gama": 0.9}}, "option of the advantage estimator 'group_norm' 'gama'"),
        ({"advantage_estimator": "gae"}, "'gae' needs a critic"),
        ({"correction": "token"}, "unknown correction 'token'"),
        ({"correction": "token_truncated", "correction_options": {"cap": -1.0}}, r"token_truncated\(cap=-1.0\)"),
        ({"correction_options": {"cap": 1.0}}, "without a correction"),
        ({"kl_in": "rewards"}, "unknown kl_in 'rewards'. Did you mean 'reward'"),
        ({"kl_in": "reward", "kl_coef": 0.1}, "it compares whole completions; use one of reinforce"),
        ({"high_entropy_share": 0.0}, "high_entropy_share=0.0.*above 0 and at most 1"),
        ({"overlong_buffer": 7}, "overlong_buffer=7: must be between 1 and the length limit, 6"),
        ({"reward_norm": "scal"}, "unknown reward_norm 'scal'. Did you mean 'scale'"),
        ({"advantage_norm": True}, "advantage_estimator='group_norm' and advantage_norm=True would normalise more"),
        ({"algorithm": "reinforce", "reward_norm": "full", "advantage_norm": True}, "would normalise more than once"),
        (
            {"algorithm": "dr_grpo", "advantage_norm": True},
            "advantage_norm=True: it is group_norm without the division",
        ),
        ({"algorithm": "dr_grpo", "reward_norm": "scale"}, "reward_norm='scale': it is group_norm without"),
        ({"algorithm": "reinforce", "dynamic_sampling": True}, "which does not compare the completions of a prompt"),
        ({"short_batch": "warn"}, "unknown short_batch 'warn'"),
        ({"offload": "model"}, "unknown offload 'model'"),
        ({"offload": "all", "staleness": 1}, "offload='all' with staleness=1"),
        ({"sampling_attempts": 0}, "sampling_attempts=0.*at least 1"),
        ({"first_token_temperature": 0.0}, "first_token_temperature=0.0.*above 0"),
        (
            {"first_token_temperature": 9.0, "sampling": {"n": 2, "stop": "x"}},
            "a stop string that begins with the first",
        ),
        ({"kl_target": 0.1}, "kl_target=0.1 needs a kl_coef above 0"),
        ({"kl_target": 0.0, "kl_coef": 0.1}, "kl_target=0.0.*above 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_module(**settings)


def test_needs_a_lightrft_strategy_and_an_engine(tmp_path):
    with pytest.raises(TypeError, match="lightrft_fake"):
        make_trainer(tmp_path, strategy="auto").fit(make_module(), make_data())
    trainer = pl.Trainer(strategy="lightrft_fake", accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"exactly one rollout engine.*found 0"):
        trainer.fit(make_module(), make_data())


def test_rows_that_cannot_fit_are_refused_before_the_first_rollout(tmp_path):
    with pytest.raises(ValueError, match="make 10 tokens, token_budget is 9"):
        make_trainer(tmp_path).fit(make_module(token_budget=9), make_data())


def test_checkpoint_of_another_model(tmp_path):
    fit(tmp_path, make_module(), 1)
    other = make_module(model=tiny_llama(seed=0, width=64, layers=2))
    with pytest.raises(
        CheckpointError, match=r"another model: actor\..* has shape \(16, 32\) there and \(16, 64\) here"
    ):
        make_trainer(tmp_path).fit(other, make_data(), ckpt_path=tmp_path / "last.ckpt")


def test_truncated_checkpoint(tmp_path):
    fit(tmp_path, make_module(), 1)
    path = tmp_path / "last.ckpt"
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"is damaged: {shard.name} is not the file that was written"):
        make_trainer(tmp_path).fit(make_module(), make_data(), ckpt_path=path)


# ---------------------------------------------------------------- LightRFT's configuration


def test_from_config_wires_the_fields():
    config = StrategyConfig(
        n_samples_per_prompt=5, reward_clip=2.0, advantage_clip=3.0, kl_estimator="k1", use_kl_loss=True,
        actor_learning_rate=2e-4, l2=0.1, lr_warmup_ratio=0.2, seed=9,
    )  # fmt: skip
    module = RLHFModule.from_config(config, "anything", even_digits, kl_coef=0.1, tokenizer=object())
    assert module.sampling.n == 5
    assert (module.reward_clip, module.advantage_clip, module.kl_estimator) == (2.0, 3.0, "k1")
    assert (module.lr, module.weight_decay, module.warmup_ratio, module.seed) == (2e-4, 0.1, 0.2, 9)
    config = StrategyConfig(
        advantage_estimator="rloo", overlong_buffer=True, overlong_buffer_len=16, overlong_buffer_penalty_factor=0.5,
        reward_running_norm=True,
    )  # fmt: skip
    module = RLHFModule.from_config(config, "anything", even_digits, tokenizer=object())
    assert (module.overlong_buffer, module.overlong_factor, module.reward_norm) == (16, 0.5, "scale")
    config = StrategyConfig(advantage_estimator="rloo", advantages_norm=True)
    assert RLHFModule.from_config(config, "anything", even_digits, tokenizer=object()).advantage_norm


def test_failed_rewards_may_get_a_fixed_value(tmp_path):
    first = []

    def one(completion):
        first.append(completion)
        return 1 / (len(first) == 1)

    module = make_module(rewards=one, reward_on_error=-2.0)
    make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module, make_data())
    assert sorted(t.reward for t in module.last_trajectories) == [-2.0] * 15 + [1.0]


@pytest.mark.parametrize("field", [{"plot_every": 5}, {"use_tensorboard": "x"}])
def test_from_config_refuses_what_it_cannot_do(field):
    with pytest.raises(ValueError, match=f"{next(iter(field))}=.*nothing here reads it"):
        RLHFModule.from_config(StrategyConfig(**field), "anything", even_digits)


def test_from_config_takes_rewards_from_a_server():
    config = StrategyConfig(remote_rm_url="http://localhost:1/a, http://localhost:2/b", advantage_estimator="rloo")
    assert RLHFModule.from_config(config, "anything", tokenizer=object()).rewards.names == ["remote"]
    with pytest.raises(ValueError, match=r"remote_rm_url='http.* and rewards=.*give one of them"):
        RLHFModule.from_config(config, "anything", "exact_match", tokenizer=object())


def test_recomputed_and_compiled_layers_train_as_the_others(tmp_path):
    def trained(**settings):
        module = make_module(algorithm="ppo", kl_coef=0.1, **settings)
        make_trainer(tmp_path, limit_train_batches=2).fit(module, make_data())
        return module

    plain, recomputed = trained(), trained(gradient_checkpointing=True)
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        compiled = trained(compile=True)
    assert all(layer.gradient_checkpointing for m in (recomputed.actor, recomputed.critic) for layer in m.model.layers)
    assert all(layer._compiled_call_impl for m in (compiled.actor, compiled.critic) for layer in m.model.layers)
    for module in (recomputed, compiled):
        got, expected = module.state_dict(), plain.state_dict()
        assert got.keys() == expected.keys()
        for name in got:
            torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=0)


def test_flex_attention_trains_as_a_dense_mask(tmp_path, flex_on_cpu):
    def trained(**settings):
        module = make_module(algorithm="ppo", kl_coef=0.1, **settings)
        make_trainer(tmp_path, limit_train_batches=2, limit_val_batches=0).fit(module, make_data())
        return module

    plain, flex = trained(), trained(attn_implementation="flex_attention", gradient_checkpointing=True)
    for model in (flex.actor, flex.reference, flex.critic):
        assert model.config._attn_implementation == "flex_attention"
    for name, expected in weights_of(plain).items():
        torch.testing.assert_close(weights_of(flex)[name], expected, atol=1e-5, rtol=0)


def test_flex_attention_that_is_wrong_is_left_or_refused(tmp_path, flex_on_cpu, monkeypatch, caplog):
    right = packing._block_mask
    monkeypatch.setattr(packing, "_block_mask", lambda piece, branch, *more: right(piece, branch.clamp(max=0), *more))
    monkeypatch.setattr(proof, "prefers_flex", lambda model, device: True)
    module = make_module()
    make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module, make_data())
    assert module.actor.config._attn_implementation == "sdpa"
    assert "takes 'sdpa', not 'flex_attention': its log-probabilities are off by" in caplog.text
    with pytest.raises(
        RuntimeError, match=r"'flex_attention': .* off by .* are 0\.001 .* set attn_implementation='sdpa'"
    ):
        make_trainer(tmp_path).fit(make_module(attn_implementation="flex_attention"), make_data())


def test_what_cannot_share_prompts_is_refused_before_the_first_rollout(tmp_path):
    with pytest.raises(RuntimeError, match="'flex_attention': FlexAttention does not support backward on CPU"):
        make_trainer(tmp_path).fit(make_module(attn_implementation="flex_attention"), make_data())
    bloom = BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"takes no position ids.*share_prompts=False"):
        make_trainer(tmp_path).fit(make_module(model=bloom), make_data())
    make_trainer(tmp_path, limit_train_batches=1).fit(make_module(model=bloom, share_prompts=False), make_data())
