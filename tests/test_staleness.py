"""One step off: the next batch is sampled while the model trains on the one before."""

from __future__ import annotations

import copy
import os
import re
import threading
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training import Record, StopAt, assert_same, make_data, make_module, make_trainer, weights_of

from lightrft_lightning import RemoteRollout, TransformersRollout
from lightrft_lightning.engines.base import EngineError


class Beside(TransformersRollout):
    """Generates with a copy of the weights, as an engine in another process does; notes the version of each call."""

    generates_elsewhere = True

    def __init__(self, during=lambda: None):
        super().__init__()
        self.during, self.versions, self.closed = during, [], False

    def connect(self, model, tokenizer):
        super().connect(copy.deepcopy(model).eval(), tokenizer)

    def update_weights(self, named_tensors, version):
        self._model.load_state_dict(dict(named_tensors))
        self.version = version

    def stream(self, prompts, sampling, streams=None):
        self.versions.append(self.version)
        self.during()
        yield from super().stream(prompts, sampling, streams)
        assert self.version == self.versions[-1], "the weights changed under a rollout"

    def close(self):
        self.closed = True
        super().close()


def fit(path, engine, *callbacks, ckpt_path=None, trainer=None, **settings):
    record = Record()
    trainer = make_trainer(path, engine=engine, callbacks=[record, *callbacks], limit_val_batches=0, **(trainer or {}))
    module = make_module(staleness=1, **settings)
    trainer.fit(module, datamodule=make_data(), ckpt_path=ckpt_path)
    return module, record


def test_each_batch_is_trained_on_one_update_after_it_was_sampled(tmp_path):
    engine = Beside()
    module, record = fit(tmp_path, engine, trainer={"max_epochs": 2})
    assert engine.versions == list(range(8))
    assert module.iteration == 7, "the last batch is sampled only"
    assert [m.get("train/staleness") for m in record.metrics] == [None] + [1.0] * 7
    assert [len(tokens) for tokens in record.tokens] == [0] + [16] * 7
    weights = [m["train/weight_mean"] for m in record.metrics[2:]]
    assert all(w != 1.0 for w in weights), "older samples are weighed by the ratio to the policy that drew them"


def test_the_first_batch_is_the_one_that_a_run_without_it_trains_on_first(tmp_path):
    _, record = fit(tmp_path, Beside())
    plain = Record()
    trainer = make_trainer(tmp_path, callbacks=[plain], limit_val_batches=0)
    trainer.fit(make_module(), datamodule=make_data())
    assert record.tokens[1] == plain.tokens[0]
    assert record.tokens[2] != plain.tokens[1], "sampled with the weights from before the first update"


def test_the_engine_generates_while_the_model_trains(tmp_path, monkeypatch):
    training, generating = threading.Event(), threading.Event()
    calls = []

    def during():
        generating.set()
        if len(calls) > 0:  # not the first, during which nothing can be trained on
            assert training.wait(30), "the update did not begin while the engine was generating"
        calls.append(training.is_set())

    module = make_module(staleness=1)
    update = module.update

    def noted(trajectories):
        assert generating.wait(30)
        training.set()
        return update(trajectories)

    monkeypatch.setattr(module, "update", noted)
    trainer = make_trainer(tmp_path, engine=Beside(during), limit_train_batches=2, limit_val_batches=0)
    trainer.fit(module, datamodule=make_data())
    assert calls == [False, True]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, seen = fit(tmp_path / "whole", Beside(), trainer={"max_epochs": 2})
    saved = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(tmp_path / "first", Beside(), StopAt(3), saved, trainer={"max_epochs": 2})
    resumed, rest = fit(
        tmp_path / "second", Beside(), ckpt_path=tmp_path / "saved" / "step=3.ckpt", trainer={"max_epochs": 2}
    )
    assert rest.tokens == seen.tokens[4:]
    assert [m["train/reward"] for m in rest.metrics] == [m["train/reward"] for m in seen.metrics[4:]]
    assert_same(weights_of(resumed), weights_of(whole))


def test_what_was_sampled_ahead_goes_to_the_ranks_of_another_number(tmp_path):
    from lightrft_lightning._sampling import sampled_from_state, sampled_state

    module, _ = fit(tmp_path, Beside())
    sampled = module._sampled_ahead
    state = sampled_state(sampled, lambda value: [value])
    halves = [sampled_from_state(state, rank, 2).trajectories for rank in range(2)]
    assert [{t.group % 2 for t in half} for half in halves] == [{0}, {1}]
    together = sorted((t for half in halves for t in half), key=lambda t: t.group)
    for was, now in zip(sorted(sampled.trajectories, key=lambda t: t.group), together, strict=True):
        assert (was.prompt, was.completion, was.text) == (now.prompt, now.completion, now.text)
        assert (was.reward, was.reward_parts, was.policy_version) == (now.reward, now.reward_parts, now.policy_version)


def test_an_error_of_the_engine_stops_the_run(tmp_path):
    def during():
        raise EngineError("out of breath")

    engine = Beside(during)
    with pytest.raises(EngineError, match="out of breath"):
        fit(tmp_path, engine)
    assert engine.closed


def test_an_error_of_the_update_leaves_no_thread_behind(tmp_path, monkeypatch):
    module = make_module(staleness=1)
    monkeypatch.setattr(module, "update", lambda trajectories: 1 / 0)
    engine = Beside()
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, engine=engine, limit_val_batches=0).fit(module, datamodule=make_data())
    assert engine.closed
    end = time.monotonic() + 10
    while any(t.name.startswith("lightrft-") for t in threading.enumerate()):
        assert time.monotonic() < end, "a thread still waits"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"staleness": 2}, "RLHFModule(staleness=2): must be 0, or 1 to sample one batch ahead"),
        ({"staleness": 1, "dynamic_sampling": True}, "dynamic_sampling=True with staleness=1: "),
        ({"staleness": 1, "first_token_temperature": 2.0}, "first_token_temperature=2.0 with staleness=1: "),
        ({"staleness": 1, "environment": "calculator"}, "staleness=1 with an environment: "),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_module(**settings)


def test_an_engine_in_this_process_or_one_that_sleeps_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"staleness=1 with TransformersRollout, which generates in the training proc"):
        fit(tmp_path, TransformersRollout())
    with pytest.raises(ValueError, match=r"staleness=1 with RemoteRollout\(sleep_level=1\): it never sleeps"):
        fit(tmp_path, RemoteRollout(engine="transformers", sleep_level=1))


# ------------------------------------------------------------------------------- a server in another process


def test_with_a_server_the_result_is_the_same(tmp_path):
    expected, seen = fit(tmp_path / "beside", Beside())
    module, record = fit(tmp_path / "server", RemoteRollout(engine="transformers", verify="all", deadline=60.0))
    assert record.tokens == seen.tokens
    for name, value in weights_of(module).items():
        assert torch.allclose(value, weights_of(expected)[name], atol=1e-5), name


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="no two CPUs to choose from"
)
def test_its_server_and_the_trainer_share_the_cpus(tmp_path):
    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            self.trainer, self.server = torch.get_num_threads(), os.sched_getaffinity(engine._server.pid)

    engine, look = RemoteRollout(engine="transformers", deadline=60.0), Look()
    before, cpus = torch.get_num_threads(), sorted(os.sched_getaffinity(0))
    torch.set_num_threads(len(cpus))
    try:
        fit(tmp_path, engine, look, trainer={"limit_train_batches": 1})
        assert torch.get_num_threads() == len(cpus)  # again
    finally:
        torch.set_num_threads(before)
    assert look.trainer == len(cpus) // 2 and look.server == set(cpus[len(cpus) // 2 :])


def test_what_a_server_that_died_owes_is_asked_for_again(tmp_path, monkeypatch, caplog):
    expected, seen = fit(tmp_path / "beside", Beside())
    engine = RemoteRollout(engine="transformers", deadline=60.0)
    ask, asked = engine._ask, []

    def dies_before_the_third_rollout(*arguments):
        asked.append(threading.current_thread().name)
        if len(asked) == 3:
            engine._server._process.kill()
            engine._server._process.wait(10)
        yield from ask(*arguments)

    monkeypatch.setattr(engine, "_ask", dies_before_the_third_rollout)
    start = time.monotonic()
    module, record = fit(tmp_path / "server", engine)
    assert time.monotonic() - start < 60
    assert set(asked[:3]) == {"lightrft-rollout"} and "MainThread" in asked[3:], "the thread repeats nothing"
    assert "asking again for what is missing" in caplog.text
    assert record.tokens[:3] == seen.tokens[:3] and module.iteration == expected.iteration
    assert all(len(tokens) == 16 for tokens in record.tokens[1:])
