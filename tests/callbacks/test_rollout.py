from __future__ import annotations

import dataclasses
import threading
from types import SimpleNamespace

import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightrft_lightning import PromptDataModule, RLHFModule, SamplingParams, TransformersRollout
from lightrft_lightning.callbacks import SupervisedWarmup
from lightrft_lightning.callbacks.rollout import DriftError

PROMPTS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]


class Recorded(TransformersRollout):
    """Notes what happens to it; `offset` is added to the log-probabilities that it reports."""

    def __init__(self, offset=0.0, sleep_level=0):
        super().__init__()
        self.offset, self.sleep_level, self.calls = offset, sleep_level, []

    def update_weights(self, named_tensors, version):
        assert not torch.is_inference_mode_enabled()
        dict(named_tensors)
        self.calls.append(f"weights {version}")
        super().update_weights(named_tensors, version)

    def generate(self, prompts, sampling, streams=None):
        self.calls.append("train" if sampling.temperature else "val")
        groups = super().generate(prompts, sampling, streams)
        shift = lambda c: dataclasses.replace(c, logprobs=tuple(p + self.offset for p in c.logprobs))  # noqa: E731
        return [[shift(c) for c in group] for group in groups]

    def sleep(self, level=1):
        self.calls.append(f"sleep {level}")

    def wake_up(self):
        self.calls.append("wake")

    def close(self):
        self.calls.append("close")
        super().close()


@pytest.fixture
def run(tiny_model, tiny_tokenizer, tmp_path):
    def run(engine, *callbacks, rewards=len, method="fit", iterations=2, ckpt_path=None, proven=True, **settings):
        defaults = {
            "limit_train_batches": iterations,
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
        }
        trainer = pl.Trainer(
            strategy="lightrft_fake", accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=[engine, *callbacks],
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **{**defaults, **settings},
        )  # fmt: skip
        module = RLHFModule(
            tiny_model,
            lambda completion: rewards(completion),
            tiny_tokenizer,
            SamplingParams(n=4, max_new_tokens=4),
            seed=0,
            check_numerics=proven,
        )
        data = PromptDataModule(PROMPTS, PROMPTS[:4], batch_size=4, val_batch_size=4, seed=0)
        getattr(trainer, method)(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer, module

    return run


def test_weights_come_before_the_first_rollout_and_after_every_iteration(run):
    engine = Recorded()
    trainer, _ = run(engine, limit_val_batches=1, num_sanity_val_steps=1)
    calls = [call for call in engine.calls if call != "wake"]
    assert calls == ["weights 0", "val", "train", "weights 1", "train", "weights 2", "val", "close"]
    assert float(trainer.callback_metrics["time/sync"]) > 0


def test_evaluation_alone(run):
    engine = Recorded()
    run(engine, method="validate", limit_val_batches=1)
    assert [call for call in engine.calls if call != "wake"] == ["weights 0", "val", "close"]


@pytest.mark.parametrize("sanity", [0, 1])
def test_weights_are_sent_again_after_a_warm_up(run, sanity):
    engine = Recorded()
    warmup = SupervisedWarmup(steps=2, batch_size=4)
    run(engine, warmup, iterations=1, num_sanity_val_steps=sanity, limit_val_batches=1)
    calls = [call for call in engine.calls if call != "wake"]
    assert calls[: 2 + sanity] == ["weights 0", "val", "train"][: 1 + sanity] + ["train"]


def test_a_resumed_run_goes_on_with_the_version(run, tmp_path):
    run(Recorded(), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}"), iterations=3)
    engine = Recorded()
    run(engine, iterations=3, ckpt_path=tmp_path / "step=2.ckpt")
    assert [call for call in engine.calls if call != "wake"] == ["weights 2", "train", "weights 3", "close"]


def test_sleeps_between_rollouts_and_updates(run):
    engine = Recorded(sleep_level=1)
    run(engine, iterations=1)
    assert engine.calls == [
        "wake", "weights 0", "sleep 1", "wake", "train", "sleep 1", "wake", "weights 1", "sleep 1", "close",
    ]  # fmt: skip


def test_weights_that_are_not_kept_come_before_every_rollout(run):
    engine = Recorded(sleep_level=2)
    trainer, _ = run(engine, limit_val_batches=1)
    assert [call for call in engine.calls if call != "wake"] == [
        "weights 0", "train", "sleep 2", "weights 1", "train", "sleep 2", "weights 2", "val", "sleep 2", "close",
    ]  # fmt: skip
    assert float(trainer.callback_metrics["time/sync"]) > 0 and engine.version == 2


def test_drift_warns_and_stops(run, caplog):
    engine = Recorded()
    engine.drift_warning = engine.drift_limit = 1e-4
    run(engine)
    assert not [r for r in caplog.records if "nats" in r.getMessage()]
    engine = Recorded(offset=0.2)
    run(engine, proven=False)
    told = [r.getMessage() for r in caplog.records if "nats" in r.getMessage()]
    assert len(told) == 2 and "differ by 0.2 nats on average, more than drift_warning=0.1" in told[0]
    engine = Recorded(offset=0.2)
    engine.drift_limit = 0.15
    with pytest.raises(DriftError, match=r"Recorded: .* differ by 0\.2 nats on average, more than drift_limit=0\.15"):
        run(engine, proven=False)
    assert engine.calls[-1] == "close"
    with pytest.raises(DriftError, match=r"do not match, or older weights drew them \(staleness=2\)"):
        engine._check_drift(
            SimpleNamespace(callback_metrics={"train/mismatch_mean": 0.2}), SimpleNamespace(staleness=2)
        )
    for offset in (0.2, float("nan")):
        engine = Recorded(offset=offset)
        engine.drift_warning = None
        caplog.clear()
        run(engine, proven=False)
        assert not [r for r in caplog.records if "nats" in r.getMessage()]


def test_a_drift_that_is_no_number_stops(run):
    engine = Recorded(offset=float("nan"))
    engine.drift_limit = 10.0
    with pytest.raises(DriftError, match="differ by nan nats"):
        run(engine, proven=False)


def test_rewards_start_while_others_generate(run):
    scored = threading.Event()

    class OneByOne(TransformersRollout):
        def stream(self, prompts, sampling, streams=None):
            groups = list(enumerate(self.generate(prompts, sampling, streams)))
            yield groups[-1]  # in another order than the prompts
            assert scored.wait(20)
            yield from groups[:-1]

    def reward(completion):
        scored.set()
        return len(completion)

    _, module = run(OneByOne(), rewards=reward, iterations=1)
    assert [t.group for t in module.last_trajectories] == [g for g in range(4) for _ in range(4)]
    assert all(t.reward == len(t.text) for t in module.last_trajectories)


def test_an_error_in_the_rollout_gives_up_what_is_not_scored(run):
    calls = []

    class Broken(TransformersRollout):
        def stream(self, prompts, sampling, streams=None):
            yield 0, self.generate(prompts, sampling, streams)[0]
            raise RuntimeError("the engine is gone")

    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="the engine is gone"):
        run(Broken(), rewards=lambda completion: calls.append(1) or 1.0)
    ours = [t for t in set(threading.enumerate()) - before if t.name.startswith(("lightrft", "reward"))]
    assert len(ours) <= 1, ours
    assert len(calls) <= 4


def test_adapters_with_which_the_engine_would_sample_from_another_policy_are_refused(fit, tiny_model, tiny_tokenizer):
    model = peft.get_peft_model(tiny_model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.merge_adapter()
    module = RLHFModule(model, lambda completion: 1.0, tiny_tokenizer, SamplingParams(n=2, max_new_tokens=4))
    with pytest.raises(ValueError, match=r"its adapter is merged, so nothing is trained: call unmerge_adapter\(\)"):
        fit(module=module)
    assert module.iteration == 0
