"""The real vLLM behind ``lightrft serve``: one server for all tests of this file, until those at its end kill it."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from training import Record, assert_same, make_data, make_module, make_trainer, weights_of

from lightrft_lightning import FakeStrategy, RemoteRollout, SamplingParams
from lightrft_lightning.engines import remote as remote_module
from lightrft_lightning.engines._process import ServerProcess
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.weight_sync import PolicyWeights, WeightMismatchError
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

KEY = "a-key-for-the-tests"
TOKENIZER = char_tokenizer()
PROMPTS = [TOKENIZER(f"{a}+{b}=")["input_ids"] for a in (1, 22) for b in (3, 456)]
SAMPLING = SamplingParams(n=3, max_new_tokens=8, seed=5)
ENGINE_ARGS = {
    "enforce_eager": True,
    "max_model_len": 64,
    "kv_cache_memory_bytes": 1 << 24,
    "max_num_seqs": 16,
    "dtype": "float32",
}
JOBS = Path(__file__).parent / "jobs"
STRATEGY = FakeStrategy()


def model_with(seed=0):
    model = tiny_llama(seed=seed, layers=2)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model_with().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    command = [sys.executable, "-m", "lightrft_lightning.cli", "serve", "--model", str(folder), "--engine", "vllm"]
    command += ["--engine-args", json.dumps(ENGINE_ARGS), "--port", "0", "--empty-weights", "--exit-with-parent"]
    process = ServerProcess([*command, "--sleep-level", "1"], KEY, None)
    process.url(300)
    yield process
    process.stop()


class Lossy(RemoteRollout):
    """Loses a tensor on the way, or spoils it."""

    lost = spoilt = ""

    def _send(self, tensors):
        zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name == self.spoilt}
        super()._send({name: tensor for name, tensor in {**tensors, **zeros}.items() if name != self.lost})


def connect(engine, model):
    return STRATEGY.setup_inference_engine(engine_type=engine, actor=model, tokenizer=TOKENIZER)


@pytest.fixture
def engine(server):
    engine = connect(Lossy(server.url(1), key=KEY, deadline=60.0, sleep_level=1), model_with())
    yield engine
    engine.close()


def agrees(engine, model, sampling=SAMPLING):
    """Whether what is drawn has the log-probabilities of the model's own forward pass."""
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, sampling), strict=True):
        for done in group:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *done.token_ids]])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(done.token_ids)), list(done.token_ids)].tolist()
            if done.logprobs != pytest.approx(expected, abs=1e-4):
                return False
    return True


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.1)
    return model


def tokens(groups):
    return [[completion.token_ids for completion in group] for group in groups]


def test_what_comes_back_is_the_trainers_and_fixed_by_its_seeds(engine):
    assert agrees(engine, model_with())
    assert agrees(engine, model_with(), SamplingParams(max_new_tokens=8, temperature=0.0))
    drawn = tokens(engine.generate(PROMPTS, SAMPLING))
    assert tokens(engine.generate(PROMPTS[2:], SAMPLING, [2, 3])) == drawn[2:] != drawn[:2]


@pytest.mark.parametrize("part", ["self_attn.k_proj", "mlp.up_proj"])
def test_a_wrong_part_of_a_fused_tensor_is_named(engine, part):
    engine.spoilt = f"model.layers.1.{part}.weight"
    with pytest.raises(WeightMismatchError, match=rf"not hold the trainer's '{re.escape(engine.spoilt)}'$"):
        engine.update_weights(PolicyWeights(STRATEGY, changed(model_with())), 1)


@pytest.mark.parametrize("lost", ["model.layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj", "lm_head"])
def test_an_incomplete_update_is_refused_by_the_server_and_the_next_one_arrives(engine, lost):
    model, engine.lost, engine.verify = changed(model_with()), f"{lost}.weight", "off"
    with pytest.raises(EngineError, match=rf"/weights/end: status 400: the update lacks '{re.escape(engine.lost)}'"):
        engine.update_weights(PolicyWeights(STRATEGY, model), 1)
    with pytest.raises(EngineError, match="status 409: nothing can be generated: the last update failed"):
        engine.generate(PROMPTS, SAMPLING)
    engine.lost = ""
    engine._begin_update()
    engine._load([("model.layers.0.self_attn.q_proj.weight", torch.ones(128, 128))])  # and breaks off here
    engine.update_weights(PolicyWeights(STRATEGY, model), 1)
    assert agrees(engine, model)


def test_lora_arrives_merged(engine):
    model = get_peft_model(model_with(), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=3))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    engine.update_weights(PolicyWeights(STRATEGY, model), 1)
    assert agrees(engine, model)
    with model.disable_adapter():
        assert not agrees(engine, model)


def test_a_call_ends_at_its_deadline_and_the_next_one_is_answered(engine):
    engine.retries, engine.deadline = 0, 0.3
    with pytest.raises(EngineError, match=r"POST /generate: .* deadline"):
        engine.generate(PROMPTS * 40, SamplingParams(n=64, max_new_tokens=50))
    engine.deadline = 60.0
    assert agrees(engine, model_with())


def test_twenty_cycles_leave_nothing_behind(server, engine):
    def held():
        about = Path(f"/proc/{server.pid}")
        (memory,) = re.findall(r"VmRSS:\s+(\d+)", (about / "status").read_text())
        return int(memory) / 1024, len(list((about / "fd").iterdir())), len(list(engine._exchange.iterdir()))

    model, seen = model_with(), []
    for version in range(1, 21):
        engine.update_weights(PolicyWeights(STRATEGY, changed(model)), version)
        assert len(engine.generate(PROMPTS, SAMPLING)) == len(PROMPTS)
        engine.sleep()
        with pytest.raises(EngineError, match=r"asleep: call wake_up\(\) first"):
            engine.generate(PROMPTS, SAMPLING)
        engine.wake_up()
        seen.append(held())
    memory, files, sent = zip(*seen[4:], strict=True)
    assert memory[-1] < memory[0] + 10, "MiB; the weights are two of them"
    assert max(files) <= files[0] + 1 and set(sent) == {1}


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_resumed_run_gives_the_same_bits(server, tmp_path, staleness):
    def fit(folder, **start):
        engine = RemoteRollout(server.url(1), key=KEY, deadline=60.0, drift_limit=None if staleness else 1e-4)
        callbacks = [record := Record(), ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)]
        trainer = make_trainer(folder, engine=engine, callbacks=callbacks, limit_val_batches=0)
        module = make_module(model=model_with(), staleness=staleness)
        trainer.fit(module, make_data(), **start)
        return weights_of(module), record

    whole, record = fit(tmp_path / "whole")
    (middle,) = (tmp_path / "whole").glob("*step=2.ckpt")
    resumed, rest = fit(tmp_path / "resumed", ckpt_path=middle)
    assert_same(whole, resumed)
    assert rest.tokens == record.tokens[-len(rest.tokens) :] and 0 < len(rest.tokens) < len(record.tokens)
    assert [m.get("train/staleness", 0) for m in record.metrics] == [0] + [staleness] * 3


# ------------------------------------------------------------------------------- several ranks


CHECKS = re.findall(r"^def (check_\w+)", (JOBS / "hosted_ranks.py").read_text(), re.M)


@pytest.fixture(scope="module")
def of_ranks(server, run_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    env = {"PYTHONPATH": str(JOBS.parents[1] / "strategies" / "jobs"), "LIGHTRFT_KEY": KEY}
    run_ranks(JOBS / "hosted_ranks.py", folder, server.url(1), timeout=200, env=env)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(of_ranks, check):
    for rank in of_ranks:
        assert rank[check] == "ok", rank[check]


# ------------------------------------------------------------------------------- killed, and hanging


def test_a_server_of_its_own_that_is_killed_is_replaced_and_one_that_hangs_ends(server, monkeypatch):
    # Its first server is that of the other tests: a start takes ten seconds of a core.
    monkeypatch.setattr(remote_module, "ServerProcess", lambda *arguments: server)
    engine = RemoteRollout(engine="vllm", engine_args=ENGINE_ARGS, key=KEY, deadline=60.0)
    model, long = model_with(), SamplingParams(n=8, max_new_tokens=40, seed=2)
    connect(engine, model)
    monkeypatch.undo()
    try:
        undisturbed = tokens(engine.generate(PROMPTS * 4, long))
        groups = engine.stream(PROMPTS * 4, long)
        found = dict([next(groups)])
        os.kill(server.pid, signal.SIGKILL)
        found.update(groups)
        assert tokens(found[i] for i in range(len(found))) == undisturbed
        assert engine._server is not server and agrees(engine, model)
        replaced, engine.retries, engine.deadline = engine._server, 0, 1.0
        engine._begin_update()
        os.kill(replaced.pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match="POST /weights/begin: no complete answer by the deadline"):
            engine.update_weights(PolicyWeights(STRATEGY, changed(model)), 1)
    finally:
        engine.close()
    assert not Path(f"/proc/{replaced.pid}").exists()
