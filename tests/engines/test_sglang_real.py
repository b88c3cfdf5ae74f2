"""`SGLangRollout` and the real SGLang, on a CPU (see real_sglang): what it computes, and that weights arrive."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer, current_thread

import httpx
import lightning.pytorch as pl
import psutil
import pytest
import safetensors.torch
import torch
from agreement import PROMPTS, TOKENIZER, check_agreement
from lightning.pytorch.callbacks import ModelCheckpoint
from training import Record, StopAt, assert_same, weights_of

from lightrft_lightning import FakeStrategy, PromptDataModule, RLHFModule, SamplingParams, SGLangRollout
from lightrft_lightning.cli import main
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.weight_sync import PolicyWeights, WeightMismatchError
from lightrft_lightning.models.loading import load_model, load_tokenizer
from lightrft_lightning.models.tiny import tiny_llama

SAMPLING = SamplingParams(n=3, max_new_tokens=8, temperature=0.7, seed=5)
GREEDY = SamplingParams(n=2, max_new_tokens=8, temperature=0.0)
STRATEGY = FakeStrategy()


def model_with(seed=0):
    return tiny_llama(seed=seed, width=32, layers=2)


def tokens(groups):
    """Without log-probabilities, which vary with the batch."""
    return [[completion.token_ids for completion in group] for group in groups]


@pytest.fixture
def engine(sglang):
    """With the weights of the model of seed 0."""
    sglang.update_weights(PolicyWeights(STRATEGY, model_with()), 0)
    return sglang


# -------------------------------------------------------------------- generation


@pytest.mark.parametrize("sampling", [SAMPLING, GREEDY, SamplingParams(n=2, max_new_tokens=6, top_k=3)])
def test_logprobs_are_the_trainers(engine, sampling):
    groups = engine.generate(PROMPTS, sampling)
    check_agreement(model_with(), groups, sampling)
    if sampling.temperature:
        assert len({completion.token_ids for completion in groups[1]}) == sampling.n
    else:
        greedy = trainers_greedy(model_with(), PROMPTS[2], 8)
        assert [list(completion.token_ids) for completion in groups[2]] == [greedy, greedy]


@torch.no_grad()
def trainers_greedy(model, prompt, limit):
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and ids[-1] != TOKENIZER.eos_token_id:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_draws_depend_on_seed_stream_and_number_only(engine):
    everything = tokens(engine.generate(PROMPTS, SAMPLING, [4, 0, 9, 2]))
    assert tokens(engine.generate(PROMPTS[2:], SAMPLING, [9, 2])) == everything[2:]
    assert tokens(engine.generate(PROMPTS[2:], SAMPLING, [8, 2])) != everything[2:]
    assert len({completion for group in everything for completion in group}) > 6


def test_stop_strings_and_limits(engine):
    sampling = SamplingParams(n=8, max_new_tokens=12, stop=("3", "7"))
    completions = [completion for group in engine.generate(PROMPTS, sampling) for completion in group]
    for completion in completions:
        text = TOKENIZER.decode(completion.token_ids)
        assert completion.finish_reason == (
            "stop" if text[-1] in "37" else "eos" if completion.token_ids[-1] == TOKENIZER.eos_token_id else "length"
        )
    assert {"stop", "length"} <= {completion.finish_reason for completion in completions}


def test_too_long_a_prompt_is_refused_in_sglangs_words(engine):
    with pytest.raises(EngineError, match=r"status 400: .*64 tokens"):
        engine.generate([PROMPTS[0] * 20], SAMPLING)


LONG = SamplingParams(n=24, max_new_tokens=50)


def leave(engine, how):
    """Give up a rollout in the middle."""
    if how == "closed":
        stream = engine.stream(PROMPTS, LONG)
        next(stream)
        stream.close()
    elif how == "deadline":
        with pytest.raises(EngineError, match=r"POST /generate: no complete answer by the deadline, after 0\.\d"):
            engine.generate(PROMPTS, LONG)
    else:
        Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, LONG)


@pytest.mark.parametrize("how", ["closed", "deadline", "Ctrl-C"])
def test_a_rollout_that_is_given_up_leaves_the_server_as_it_was(engine, monkeypatch, how):
    """SGLang looks only every few seconds whether anybody still waits; the next update and rollout do not need that."""
    pid, before = engine._server.pid, tokens(engine.generate(PROMPTS, SAMPLING))
    with monkeypatch.context() as patch:
        if how == "deadline":
            patch.setattr(engine, "deadline", 0.1)
            patch.setattr(engine, "retries", 0)
        leave(engine, how)
    assert tokens(engine.generate(PROMPTS, SAMPLING)) == before
    leave(engine, "closed")
    engine.update_weights(PolicyWeights(STRATEGY, model_with(1)), 1)
    check_agreement(model_with(1), engine.generate(PROMPTS, SAMPLING), SAMPLING)
    assert engine._server.pid == pid


# -------------------------------------------------------------------- weights


@pytest.mark.parametrize("verify", ["sample", "all", "off"])
def test_updates_arrive(engine, monkeypatch, verify):
    monkeypatch.setattr(engine, "verify", verify)
    for bucket_bytes in (20_000, 1 << 20):
        monkeypatch.setattr(engine, "bucket_bytes", bucket_bytes)
        model = model_with(seed=bucket_bytes)
        engine.update_weights(PolicyWeights(STRATEGY, model), bucket_bytes)
        check_agreement(model, engine.generate(PROMPTS, SAMPLING), SAMPLING)
        assert engine.version == bucket_bytes
    engine._before = None


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_tensor_that_is_lost_is_caught(engine, monkeypatch, lost):
    save = safetensors.torch.save_file
    engine._before = None
    with monkeypatch.context() as patch:
        patch.setattr(
            safetensors.torch, "save_file", lambda ts, *a: save({n: t for n, t in ts.items() if n != lost}, *a)
        )
        with pytest.raises(WeightMismatchError):
            engine.update_weights(PolicyWeights(STRATEGY, model_with(seed=1)), 8)
    check_agreement(model_with(1), engine.generate(PROMPTS, SAMPLING), SAMPLING)


def test_a_tensor_that_does_not_change_is_caught_in_every_update(engine, monkeypatch):
    lost, save = "model.layers.0.self_attn.o_proj.weight", safetensors.torch.save_file
    with monkeypatch.context() as patch:
        patch.setattr(
            safetensors.torch, "save_file", lambda ts, *a: save({n: t for n, t in ts.items() if n != lost}, *a)
        )
        with pytest.raises(WeightMismatchError, match=lost):
            engine.update_weights(PolicyWeights(STRATEGY, model_with(seed=1)), 8)


def test_weights_that_stay_as_they_are_are_no_mismatch(engine):
    model = model_with()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.add_(1.0)
    for version in (1, 2):
        engine.update_weights(PolicyWeights(STRATEGY, model), version)
    check_agreement(model, engine.generate(PROMPTS, SAMPLING), SAMPLING)


# -------------------------------------------------------------------- life


@pytest.mark.parametrize("level", [1, 2])
def test_sleeps_and_wakes_with_its_weights(engine, level):
    before = tokens(engine.generate(PROMPTS, SAMPLING))
    STRATEGY.engines_sleep([engine], level)
    STRATEGY.engines_sleep([engine], level)
    STRATEGY.engines_wake_up([engine])
    assert tokens(engine.generate(PROMPTS, SAMPLING)) == before
    check_agreement(model_with(), engine.generate(PROMPTS, SAMPLING), SAMPLING)


def used(process):
    return process.memory_info().rss / (1 << 20), process.num_fds()


def test_cycles_leave_no_memory_no_files_and_no_processes(engine):
    """On either side; 200 of them were run once."""
    before = None
    for number in range(9):
        engine.generate(PROMPTS, SAMPLING)
        engine.sleep(1)
        engine.wake_up()
        engine.update_weights(PolicyWeights(STRATEGY, model_with(number)), number)
        if number in (3, 8):
            trainer = psutil.Process()
            everything = {process.pid: used(process) for process in (trainer, *trainer.children(recursive=True))}
            before = before or everything
    assert everything.keys() == before.keys()
    for pid, (memory, files) in everything.items():
        # In five cycles; a connection that is about to end may be counted.
        assert memory < before[pid][0] + 4 and files < before[pid][1] + 5, (memory, files, before[pid])


def test_groups_stream(engine):
    found = dict(engine.stream(PROMPTS, SAMPLING))
    assert tokens([found[i] for i in range(4)]) == tokens(engine.generate(PROMPTS, SAMPLING))
    assert engine.generate([], SAMPLING) == []


def test_a_server_that_runs_already(engine, tmp_path):
    url, key = engine._client.url, engine._key
    with pytest.raises(EngineError, match=r"status 401: Unauthorized. Set key=, or the variable LIGHTRFT_KEY"):
        STRATEGY.setup_inference_engine(
            engine_type=SGLangRollout(url=url, key="wrong"), actor=model_with(), tokenizer=TOKENIZER
        )
    stranger = SGLangRollout(url=url, key=key, exchange=tmp_path, deadline=60.0)
    strategy = FakeStrategy()
    strategy.setup_inference_engine(engine_type=stranger, actor=model_with(1), tokenizer=TOKENIZER)
    check_agreement(model_with(1), stranger.generate(PROMPTS, SAMPLING), SAMPLING)
    assert not list(tmp_path.iterdir())
    with pytest.raises(EngineError, match="does another trainer use this server"):
        engine.generate(PROMPTS, SAMPLING)
    stranger.close()
    assert httpx.get(f"{url}/ready", timeout=30).status_code == 200
    engine._held = engine._before = None
    check_agreement(model_with(), engine.generate(PROMPTS, SAMPLING), SAMPLING)


# -------------------------------------------------------------------- the whole

JOB = Path(__file__).parent / "jobs" / "sglang_ranks.py"
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def of_ranks(sglang, run_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    env = {"PYTHONPATH": str(JOB.parents[2] / "strategies" / "jobs"), "LIGHTRFT_KEY": sglang._key}
    run_ranks(JOB, folder, sglang._client.url, timeout=200, env=env)
    sglang._held = sglang._before = None  # it has had another trainer
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", re.findall(r"^def (check_\w+)", JOB.read_text(), re.M))
def test_on_two_ranks(of_ranks, check):
    for rank in of_ranks:
        assert rank[check] == "ok", rank[check]


def fit(engine, folder, settings, *callbacks, batches=4, own=False, resume=None, **more):
    """Trains under a `Trainer`, with a server that runs already, which another trainer has used then, or its `own`."""
    elsewhere = {"url": engine._client.url, "key": engine._key, "deadline": 60.0, "verify": "all"}
    callback = engine if own else SGLangRollout(**elsewhere, **more)
    trainer = pl.Trainer(
        strategy="lightrft_fake", accelerator="cpu", devices=1, max_epochs=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback, *callbacks],
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        default_root_dir=folder, limit_train_batches=batches,
    )  # fmt: skip
    module = RLHFModule(
        rewards=lambda completion: len(set(completion)),
        tokenizer=TOKENIZER,
        **{"sampling": SAMPLING, "seed": 0, "lr": 1e-3, **settings},
    )
    prompts = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]
    trainer.fit(module, datamodule=PromptDataModule(prompts, batch_size=4, seed=0), ckpt_path=resume)
    engine._held = engine._before = None
    return trainer, module, callback


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 4}}], ids=str)
def test_trains(engine, tmp_path, model_folder, settings):
    trainer, _, callback = fit(engine, tmp_path, {"model": model_folder, **settings}, batches=3, drift_limit=1e-3)
    assert callback.version == 3 and float(trainer.callback_metrics["train/mismatch_max"]) < 1e-3


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(engine, tmp_path, model_folder, staleness):
    check_resumed(engine, tmp_path, {"model": model_folder, "staleness": staleness, "correction": "none"})


def check_resumed(engine, tmp_path, settings):
    staleness, whole, first, rest = settings["staleness"], Record(), Record(), Record()
    _, expected, undisturbed = fit(engine, tmp_path, settings, whole)
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(engine, tmp_path, settings, first, StopAt(2), saved)
    _, resumed, callback = fit(engine, tmp_path, settings, rest, resume=tmp_path / "step=2.ckpt")
    assert resumed.iteration == 4 - staleness and callback.version == undisturbed.version
    assert first.tokens + rest.tokens == whole.tokens and len(rest.tokens) == 2 - staleness
    assert {m.get("train/staleness", 0.0) for m in rest.metrics} == {float(staleness)}
    assert_same(weights_of(resumed), weights_of(expected))
    return expected, whole


def test_the_example_trains(with_sglang, tmp_path, monkeypatch):
    """Two layers of SmolLM2, for two short iterations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightrft"])
    model = load_model("smollm2-135m-instruct")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    model.save_pretrained("two-layers")
    load_tokenizer("smollm2-135m-instruct").save_pretrained("two-layers")
    Path("rewards.py").write_text("def length(completion):\n    return len(completion)\n")
    few = "--trainer.limit_train_batches 2 --trainer.limit_val_batches 0 --data.batch_size 2 --model.sampling.n 2"
    few += " --model.model two-layers --model.rewards rewards.py:length --model.sampling.max_new_tokens 8"
    few += " --trainer.callbacks.save_last false"
    assert main(["fit", "--config", str(EXAMPLES / "smollm2_sglang.yaml"), *few.split()]) == 0
    with open("runs/smollm2_sglang/csv/version_0/metrics.csv") as file:
        _, row = csv.DictReader(file)
    assert float(row["train/policy_version"]) == 1 and float(row["train/mismatch_max"]) < 1e-3


# -------------------------------------------------------------------- the stand-in of other tests

FAKE = Path(__file__).parent / "fake_sglang"
DRAWN = {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
NUCLEUS = {**DRAWN, "temperature": 1.0, "top_k": 3, "top_p": 0.05, "sampling_seed": 7}  # as narrow as greedy
ANSWERS = [
    ("GET", "/ready", None),
    ("GET", "/server_info", None),
    ("GET", "/model_info", None),
    ("POST", "/update_weight_version", {"new_version": "v", "abort_all_requests": False}),
    ("POST", "/generate", {"input_ids": PROMPTS[0], "sampling_params": {**DRAWN, "max_new_tokens": 0}}),
    ("POST", "/generate", {"input_ids": PROMPTS, "sampling_params": [DRAWN] * 4, "return_logprob": True}),
    (
        "POST", "/generate",
        {"input_ids": PROMPTS, "sampling_params": [NUCLEUS] * 4, "return_logprob": True, "return_sampling_mask": True},
    ),
    ("POST", "/generate", {"input_ids": PROMPTS, "sampling_params": [{**DRAWN, "stop": ["3", "+"]}] * 4}),
    ("POST", "/generate", {"input_ids": [3] * 50, "sampling_params": {**DRAWN, "max_new_tokens": 20}}),
    (
        "POST", "/generate",
        {"input_ids": [3], "sampling_params": {**NUCLEUS, "top_k": 5000}, "return_sampling_mask": True},
    ),
    ("POST", "/generate", {"input_ids": [3], "sampling_params": {**DRAWN, "top_k": -1}, "return_sampling_mask": True}),
    ("POST", "/weights_checker", {"action": "checksum", "selector": "target"}),
    ("POST", "/weights_checker", {"action": "checksums", "selector": "target"}),
    ("POST", "/update_weights_from_disk", {"model_path": "full", "load_format": "safetensors", "flush_cache": False}),
    ("POST", "/update_weights_from_disk", {"model_path": "empty", "load_format": "safetensors", "flush_cache": False}),
    ("POST", "/flush_cache?timeout=60.0", None),
    ("POST", "/release_memory_occupation", {}),
    ("POST", "/resume_memory_occupation", {}),
    ("POST", "/weights_checker", {"action": "reset_tensors", "selector": "target"}),
    ("GET", "/elsewhere", None),
]  # fmt: skip
VARIES = {
    *("id", "per_gpu_checksum", "per_engine_checksum", "cached_tokens", "port", "random_seed", "api_key"),
    *("model_path", "checksums", "weight_version"),  # another folder, another hash, a name drawn at random
}


@pytest.fixture(scope="module")
def stand_in():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAKE))
        patch.setenv("PYTHONPATH", str(FAKE))
        engine = SGLangRollout({"context_length": 64}, sleep_level=1, deadline=60.0)
        FakeStrategy().setup_inference_engine(engine_type=engine, actor=model_with(), tokenizer=TOKENIZER)
    yield engine  # with the real one in place again
    engine.close()


def differences(found, real, at, values=True):
    """Where the stand-in does not say what SGLang says; it may say less."""
    if type(found) is not type(real):
        if not (found is None and isinstance(real, int)):  # a setting that SGLang works out itself
            yield f"{at}: {found!r} is not {real!r}"
    elif isinstance(found, dict):
        for name, value in found.items():
            if name in real:
                yield from differences(value, real[name], f"{at} {name}", values and name not in VARIES)
            else:
                yield f"{at} {name}: SGLang does not say this"
    elif isinstance(found, list):
        if len(found) != len(real):
            yield f"{at}: {found!r} is not {real!r}"
        for k, (one, other) in enumerate(zip(found, real, strict=False)):
            yield from differences(one, other, f"{at} {k}", values)
    elif values and found != pytest.approx(real, abs=1e-4):
        yield f"{at}: {found!r} is not {real!r}"


def answer(engine, method, path, body):
    """What a server says to this, and its status."""
    headers = {"Authorization": f"Bearer {engine._key}"}
    found = httpx.request(method, f"{engine._client.url}{path}", json=body, timeout=60, headers=headers)
    is_json = found.headers.get("content-type") == "application/json"
    return found.status_code, found.json() if is_json else found.text


def test_the_stand_in_answers_as_sglang_does(engine, stand_in, tmp_path):
    model_with(3).save_pretrained(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    wrong = []
    for method, path, body in ANSWERS:
        if body and "model_path" in body:
            body = {**body, "model_path": str(tmp_path / body["model_path"])}
        (status, found), (expected, real) = (answer(of, method, path, body) for of in (stand_in, engine))
        at = f"{path} {str(body)[:100]}"
        wrong += [f"{at}: {status} is not {expected}"] if status != expected else differences(found, real, at)
    engine._held = engine._before = None
    assert not wrong, "\n".join(wrong)


def test_keys_are_asked_for_as_the_stand_in_does(engine, stand_in):
    for of in (stand_in, engine):
        for headers in ({}, {"Authorization": "Bearer x"}):
            refused = httpx.get(f"{of._client.url}/server_info", headers=headers, timeout=60)
            assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})


# -------------------------------------------------------------------- what would end the server


@pytest.mark.parametrize("part", ["q", "k", "v", "gate", "up"])
def test_a_lost_part_of_a_fused_tensor_is_caught_in_every_update(engine, monkeypatch, part):
    lost = f"model.layers.1.{'self_attn' if part in 'qkv' else 'mlp'}.{part}_proj.weight"
    save = safetensors.torch.save_file
    told = rf"version 8 .* in its 'model\.layers\.1\.\w+\.{'qkv' if part in 'qkv' else 'gate_up'}_proj\.weight'$"
    engine.update_weights(PolicyWeights(STRATEGY, model_with(2)), 7)
    with monkeypatch.context() as patch:
        patch.setattr(
            safetensors.torch, "save_file", lambda ts, *a: save({n: t for n, t in ts.items() if n != lost}, *a)
        )
        with pytest.raises(WeightMismatchError, match=told):
            engine.update_weights(PolicyWeights(STRATEGY, model_with(1)), 8)


@torch.no_grad()
def test_a_zero_that_changes_its_sign_is_no_mismatch(engine):
    model = model_with()
    for zero in (0.0, -0.0):
        model.lm_head.weight[3] = zero
        engine.update_weights(PolicyWeights(STRATEGY, model), 1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([3, 16], "prompt 1 holds token 16"), ([3, -1], "prompt 1 holds token -1"), ([], "prompt 1 is empty")],
)
def test_prompts_that_would_end_it_are_refused(engine, prompt, message):
    pid = engine._server.pid
    for images in (None, [[], []]):
        with pytest.raises(ValueError, match=message):
            engine.generate([[3], prompt], SAMPLING, images=images)
        with pytest.raises(ValueError, match=message):
            engine.begin([[3], prompt], SAMPLING).finish()
    check_agreement(model_with(), engine.generate(PROMPTS, SAMPLING), SAMPLING)
    assert engine._server.pid == pid


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ts: ts | {"lm_head.weight": ts["lm_head.weight"][:5]}, r"'lm_head.weight' has the shape \[5, 32\], in"),
        (lambda ts: ts | {"lm_haed.weight": ts["lm_head.weight"]}, "tensor 'lm_haed.weight'"),
        (lambda ts: ts | {"lm_head.weight": ts["lm_head.weight"].long()}, "'lm_head.weight' is of torch.int64"),
        (
            lambda ts: {n: t for n, t in ts.items() if n != "model.norm.weight"},
            "model are missing: 'model.norm.weight'",
        ),
    ],
    ids=["shape", "name", "dtype", "missing"],
)
def test_weights_that_would_end_it_are_refused(engine, change, message):
    pid, tensors = engine._server.pid, dict(model_with(1).state_dict())
    with pytest.raises(ValueError, match=message):
        engine.update_weights(list(change(tensors).items()), 5)
    engine.update_weights(list(tensors.items()), 5)
    check_agreement(model_with(1), engine.generate(PROMPTS, SAMPLING), SAMPLING)
    assert engine._server.pid == pid


def ask(engine, limit, number=1):
    """As another client; returns how many tokens each of its requests got."""
    body = {"input_ids": [[3]] * number, "sampling_params": {"max_new_tokens": limit, "ignore_eos": True}}
    return [found["meta_info"]["completion_tokens"] for found in answer(engine, "POST", "/generate", body)[1]]


def wait_for_the_begin(engine, asked):
    """Until SGLang does not empty its cache, as it has something to do."""
    while answer(engine, "POST", "/flush_cache?timeout=0.01", None)[0] == 200 and not asked.done():
        pass


def test_sleep_waits_for_others_and_others_wait_for_the_end_of_it(engine):
    pid = engine._server.pid
    with ThreadPoolExecutor() as pool:
        before = pool.submit(ask, engine, 50)
        wait_for_the_begin(engine, before)
        engine.sleep(1)
        assert before.result() == [50]
        meanwhile = pool.submit(ask, engine, 2)
        with pytest.raises(EngineError, match=r"asleep: call wake_up\(\) first"):
            engine.generate(PROMPTS, SAMPLING)
        engine.wake_up()
        assert meanwhile.result() == [2]
    assert engine._server.pid == pid
    check_agreement(model_with(), engine.generate(PROMPTS, SAMPLING), SAMPLING)


def test_sleep_is_refused_while_others_are_not_done(engine, monkeypatch):
    """An engine that is not alone stays awake, and is as it was."""
    before, pid = tokens(engine.generate(PROMPTS, SAMPLING)), engine._server.pid
    monkeypatch.setattr("lightrft_lightning.engines.sglang.FLUSH", 0.05)
    with ThreadPoolExecutor() as pool:
        others = pool.submit(ask, engine, 60, 256)
        wait_for_the_begin(engine, others)
        with pytest.raises(EngineError, match="Other clients use this server: set sleep_level=0, or have one alone"):
            engine.sleep(1)
        assert others.result() == [60] * 256
    assert tokens(engine.generate(PROMPTS, SAMPLING)) == before and engine._server.pid == pid
    engine.sleep(1)
    engine.wake_up()
    assert tokens(engine.generate(PROMPTS, SAMPLING)) == before


# -------------------------------------------------------------------- the end of the server


def test_a_server_that_dies_asleep_is_replaced_by_two_replicas(engine, monkeypatch, tmp_path):
    """The draws are the same, whichever replica makes them, and both are verified. No key of its own can be read."""
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    before, old = tokens(engine.generate(PROMPTS, SAMPLING)), engine._server.pid
    engine.engine_args |= {"dp_size": 2, "served-model-name": "-model"}
    engine._key, engine.log_file = "-odd 'key\"", tmp_path / "log"
    engine.log_file.write_text("before\n")
    engine.sleep(1)
    left = {Path(file) for file in engine._server._in_memory}
    assert left and all(file.exists() for file in left)
    engine._server._process.kill()
    engine.wake_up()
    assert tokens(engine.generate(PROMPTS, SAMPLING)) == before
    assert engine._server.pid != old and engine._info["dp_size"] == 2
    assert not any(file.exists() for file in left)
    assert {at[0] for at in engine._checksums()} == {0, 1}
    for version in (4, 5):
        engine.update_weights(PolicyWeights(STRATEGY, model_with(version)), version)
        check_agreement(model_with(version), engine.generate(PROMPTS, SAMPLING), SAMPLING)
    group, files = psutil.Process(engine._server.pid).children(recursive=True), set(Path("/dev/shm").iterdir())
    start = time.monotonic()
    engine._hang_up()
    assert time.monotonic() - start < 2.5 and len(group) > 3
    assert not [process for process in group if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    gone = files - set(Path("/dev/shm").iterdir())
    assert any(file.name.startswith("sglang_loads_") for file in gone), gone
    log = engine.log_file.read_text()
    assert log.startswith("before\n") and "'api_key': '***'" in log and "-odd" not in log
    assert engine.log_file.stat().st_mode & 0o777 == 0o600
    engine._key, engine.log_file = "k", None


@pytest.fixture(scope="module")
def split(sglang):
    """A replica of two processes; it computes each request alone and whole, so that log-probabilities do not vary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
        sglang.close()
        sglang.tensor_parallel_size = 2
        sglang.engine_args |= {"dp_size": 1, "max_running_requests": 1, "disable_radix_cache": True}
        sglang.connect(model_with(), TOKENIZER)
        yield sglang


@pytest.mark.parametrize("verify", ["all", "off", "sample"])
def test_updates_arrive_in_both_processes_of_a_replica(split, monkeypatch, verify):
    monkeypatch.setattr(split, "verify", verify)
    for seed in (1, 2):
        split.update_weights(PolicyWeights(STRATEGY, model_with(seed)), seed)
        check_agreement(model_with(seed), split.generate(PROMPTS, SAMPLING), SAMPLING)
    assert {at[1] for at in split._checksums()} == {0, 1}


def test_weights_stay_in_their_folder_until_both_processes_have_read_them(split, monkeypatch):
    """SGLang answers when the first one has; without the folder the other one ends the server, once in 40 times."""
    happened, post, remove = [], split._post, shutil.rmtree
    monkeypatch.setattr(split, "_post", lambda path, body: happened.append(path) or post(path, body))
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **more: happened.append("removed") or remove(*args, **more))
    monkeypatch.setattr(split, "bucket_bytes", 1)
    monkeypatch.setattr(split, "verify", "off")
    split.update_weights(PolicyWeights(STRATEGY, model_with(3)), 3)
    of_buckets = happened[1:-1]
    assert len(of_buckets) > 30
    assert of_buckets == ["/update_weights_from_disk", "/weights_checker", "removed"] * (len(of_buckets) // 3)
    check_agreement(model_with(3), split.generate(PROMPTS, SAMPLING), SAMPLING)


@pytest.mark.parametrize("dim", [0, 1])
def test_what_one_process_of_a_replica_has_lost_is_caught(split, monkeypatch, dim):
    """Its rows of `q_proj`, its columns of `o_proj`."""
    lost = f"model.layers.1.self_attn.{'qo'[dim]}_proj.weight"
    old, save = model_with(2).state_dict()[lost].chunk(2, dim), safetensors.torch.save_file
    for process in range(2):
        split.update_weights(PolicyWeights(STRATEGY, model_with(2)), 7)

        def without(tensors, *arguments, process=process):
            if lost in tensors:
                tensors = {**tensors, lost: tensors[lost].clone()}
                tensors[lost].chunk(2, dim)[process].copy_(old[process])
            save(tensors, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(safetensors.torch, "save_file", without)
            with pytest.raises(WeightMismatchError, match=lost.replace("q_proj", "qkv_proj")):
                split.update_weights(PolicyWeights(STRATEGY, model_with(1)), 8)


ONE_STEP_OFF = {"staleness": 1, "sampling": SamplingParams(n=2, max_new_tokens=4, seed=5)}


def test_one_step_off_is_the_same_again_and_when_resumed(split, tmp_path, model_folder):
    settings, again = {"model": model_folder, **ONE_STEP_OFF}, Record()
    expected, whole = check_resumed(split, tmp_path, settings)
    _, module, _ = fit(split, tmp_path, settings, again)
    assert again.tokens == whole.tokens
    assert_same(weights_of(module), weights_of(expected))


def test_a_server_that_is_killed_while_the_model_trains_is_replaced(split, tmp_path, model_folder, monkeypatch, caplog):
    """The last one: it is ended with the training."""
    ask, asked, pid, record = split._ask, [], split._server.pid, Record()

    def killed_before_the_third_rollout(*arguments):
        asked.append(current_thread().name)
        if len(asked) == 3:
            os.kill(pid, signal.SIGKILL)
        yield from ask(*arguments)

    monkeypatch.setattr(split, "_ask", killed_before_the_third_rollout)
    monkeypatch.setattr(split, "sleep_level", 0)
    _, module, _ = fit(split, tmp_path, {"model": model_folder, **ONE_STEP_OFF}, record, own=True)
    assert "asking again for what is missing" in caplog.text and "MainThread" in asked[3:]
    assert module.iteration == 3 and [len(tokens) for tokens in record.tokens] == [0, 8, 8, 8]
    assert split._server is None and split._client is None
