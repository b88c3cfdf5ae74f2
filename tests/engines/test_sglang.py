"""What `SGLangRollout` refuses, and faults that are injected by a stand-in (see fake_sglang) for the real SGLang."""

from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from agreement import PROMPTS, TOKENIZER, check_agreement
from PIL import Image

from lightrft_lightning import FakeStrategy, SamplingParams, SGLangRollout
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.weight_sync import PolicyWeights, WeightMismatchError
from lightrft_lightning.models.tiny import tiny_llama

FAKE = Path(__file__).parent / "fake_sglang"
SAMPLING = SamplingParams(n=3, max_new_tokens=8, temperature=0.7, seed=5)
UP = "model.layers.1.mlp.up_proj.weight"


def model_with(seed=0, tie=False):
    model = tiny_llama(seed=seed, width=32, layers=2)
    if tie:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


@pytest.fixture(scope="module", autouse=True)
def installed():
    """The stand-in in place of the package, here and in processes that are started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAKE))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def strategy():
    return FakeStrategy()


@pytest.fixture(scope="module")
def shared(strategy):
    engine = SGLangRollout({"context_length": 64}, deadline=60.0)
    strategy.setup_inference_engine(engine_type=engine, actor=model_with(), tokenizer=TOKENIZER)
    yield engine
    engine.close()
    engine.close()


@pytest.fixture
def engine(strategy, shared):
    """With the weights of the model of seed 0."""
    shared.update_weights(PolicyWeights(strategy, model_with()), 0)
    yield shared
    for path in ("/generate", "/update_weights_from_disk", "/flush_cache"):
        misbehave(shared, path, None, 0)


def misbehave(engine, path, kind, times=1):
    httpx.post(f"{engine._client.url}/fault", json={"path": path, "kind": kind, "times": times}, timeout=10)


# -------------------------------------------------------------------- generation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.9}, "top_p=0.9: SGLang tells log-probabilities under top-p only if top_k is set"),
        ({"top_k": 5000}, "top_k=5000: SGLang tells log-probabilities under top-k up to 4096; raise it with"),
    ],
)
def test_what_sglang_cannot_tell_is_refused(engine, settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        engine.generate(PROMPTS, SamplingParams(**settings))


def test_every_end_of_the_model_ends_a_completion(engine, monkeypatch):
    assert engine.end_ids == {TOKENIZER.eos_token_id}
    ends = {TOKENIZER.eos_token_id, *TOKENIZER("37")["input_ids"]}
    monkeypatch.setattr(engine, "end_ids", frozenset(ends))
    groups = engine.generate(PROMPTS, SamplingParams(n=8, max_new_tokens=12))
    for completion in (c for group in groups for c in group):
        assert not ends & {*completion.token_ids[:-1]}
        assert completion.finish_reason == ("eos" if completion.token_ids[-1] in ends else "length")


def test_ids_without_an_embedding_are_refused(engine):
    with pytest.raises(ValueError, match=r"prompt 1 holds token 999, the model has embeddings for \d+"):
        engine.generate([[3], [999]], SamplingParams())


def test_all_images_of_a_prompt_are_sent(engine, monkeypatch):
    """The stand-in's model takes none, so what is sent is looked at."""
    monkeypatch.setattr(engine, "takes_images", True)
    sent = []
    ask = engine._client.groups
    monkeypatch.setattr(engine._client, "groups", lambda bodies, deadline: sent.append(bodies) or ask(bodies, deadline))
    pictures = [Image.new("RGB", (2, 3), colour) for colour in ("red", "green")]
    engine.generate(PROMPTS[:2], SAMPLING, images=[pictures, []])
    first, rest = sent[0][0]
    shown = [Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))) for data in first["image_data"]]
    assert [picture.getpixel((0, 0)) for picture in shown] == [(255, 0, 0), (0, 128, 0)]
    assert rest["image_data"] == [first["image_data"]] * 3 and "image_data" not in sent[0][1][0]


# -------------------------------------------------------------------- weights


@pytest.mark.parametrize("verify", ["sample", "all"])
def test_half_a_fused_tensor_that_is_lost_is_caught(strategy, engine, monkeypatch, verify):
    """In the first update, or in every one."""
    monkeypatch.setattr(engine, "verify", verify)
    engine._before = None
    misbehave(engine, "/update_weights_from_disk", f"lose {UP}")
    model = model_with(seed=1)
    fused = r"version 8 the engine does not hold the trainer's weights in its 'model\.layers\.1\.mlp\.gate_up_proj"
    with pytest.raises(WeightMismatchError, match=fused):
        engine.update_weights(PolicyWeights(strategy, model), 8)
    misbehave(engine, "/update_weights_from_disk", None, 0)
    check_agreement(model, engine.generate(PROMPTS, SAMPLING), SAMPLING)  # sends them again


def test_a_tensor_that_does_not_change_is_caught_in_every_update(strategy, engine):
    lost = "model.layers.0.self_attn.o_proj.weight"
    misbehave(engine, "/update_weights_from_disk", f"lose {lost}")
    with pytest.raises(WeightMismatchError, match=lost):
        engine.update_weights(PolicyWeights(strategy, model_with(seed=1)), 8)


def test_a_tied_head(strategy):
    model = model_with(tie=True)
    engine = SGLangRollout(deadline=60.0)
    strategy.setup_inference_engine(engine_type=engine, actor=model, tokenizer=TOKENIZER)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    strategy.update_engine_weights(model)
    check_agreement(model, engine.generate(PROMPTS, SAMPLING), SAMPLING)
    engine.close()


def test_bf16_is_sent_as_bf16(strategy):
    engine = SGLangRollout({"dtype": "bfloat16"}, deadline=60.0)
    model = model_with()
    strategy.setup_inference_engine(engine_type=engine, actor=model, tokenizer=TOKENIZER)
    assert engine.dtype == torch.bfloat16
    with torch.no_grad():
        model.lm_head.weight.add_(1e-6)  # nothing of this is left in bfloat16
    strategy.update_engine_weights(model)
    engine.close()


# -------------------------------------------------------------------- life, memory, faults


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("/generate", "too few", r"asked for 3 completions, SGLang returned 2\n"),
        ("/generate", "malformed", "POST /generate: malformed answer, no JSON: '<html>'"),
        ("/generate", "nan", "POST /generate: malformed answer"),
        ("/generate", "short logprobs", r"malformed answer.*token ids and \d log-probabilities"),
        ("/generate", "nan stop", "SGLang ended a completion with 'NaN happened'"),
        ("/generate", "abort", "SGLang ended a completion with 'abort': out of memory"),
        ("/update_weights_from_disk", "refuse", "status 400: Failed to update weights: no room"),
        ("/flush_cache", "busy", "POST /flush_cache.*status 400: 'Timed out waiting for idle state"),
    ],
)
def test_wrong_answers_are_errors_that_say_what_was_wrong(strategy, engine, path, kind, message):
    misbehave(engine, path, kind, 99)
    with pytest.raises(EngineError, match=message):
        if path == "/generate":
            engine.generate(PROMPTS, SAMPLING)
        else:
            engine.update_weights(PolicyWeights(strategy, model_with(1)), 3)
    misbehave(engine, path, None, 0)
    check_agreement(model_with(int(path != "/generate")), engine.generate(PROMPTS, SAMPLING), SAMPLING)


@pytest.mark.parametrize("kind", ["500", "503", "die", "hang"])
def test_faults_that_pass_are_tried_again(engine, monkeypatch, kind):
    before, pid = engine.generate(PROMPTS, SAMPLING), engine._server.pid
    monkeypatch.setattr(engine, "deadline", 3.0)
    misbehave(engine, "/generate", kind)
    assert engine.generate(PROMPTS, SAMPLING) == before
    assert (engine._server.pid == pid) == (kind in ("500", "503"))


def test_a_server_that_dies_in_an_update_gets_all_weights(strategy, engine):
    misbehave(engine, "/update_weights_from_disk", "die")
    engine.update_weights(PolicyWeights(strategy, model_with(4)), 3)
    check_agreement(model_with(4), engine.generate(PROMPTS, SAMPLING), SAMPLING)


@pytest.mark.parametrize(
    ("call", "path"), [("sleep", "/release_memory_occupation"), ("wake_up", "/continue_generation")]
)
def test_a_lost_answer_of_sleep_or_wake_up_begins_the_server_anew(engine, call, path):
    """It may have been done, and SGLang ends if it is done twice."""
    before, pid = engine.generate(PROMPTS, SAMPLING), engine._server.pid
    if call == "wake_up":
        engine.sleep(2)
    misbehave(engine, path, "lost")
    getattr(engine, call)()
    assert engine._server.pid != pid and engine._asleep == (call == "sleep")
    engine.wake_up()
    assert engine.generate(PROMPTS, SAMPLING) == before


@pytest.mark.parametrize(
    ("call", "path"),
    [
        *(("sleep", path) for path in ("/pause_generation", "/release_memory_occupation", "/update_weight_version")),
        *(
            ("wake_up", path)
            for path in ("/resume_memory_occupation", "/continue_generation", "/update_weight_version")
        ),
    ],
)
def test_a_lost_answer_of_anothers_server_is_an_error(strategy, engine, call, path):
    url, headers = engine._client.url, {"Authorization": f"Bearer {engine._key}"}
    other = SGLangRollout(url=url, key=engine._key, deadline=60.0)
    strategy.setup_inference_engine(engine_type=other, actor=model_with(), tokenizer=TOKENIZER)
    if call == "wake_up":
        other.sleep(2)
    misbehave(engine, path, "lost")
    with pytest.raises(EngineError, match=f"POST {path}: .*Nobody knows whether the server sleeps now: start it again"):
        getattr(other, call)()
    other.close()
    if call == "sleep" and path != "/pause_generation":
        httpx.post(f"{url}/resume_memory_occupation", json={}, headers=headers, timeout=10).raise_for_status()
    engine._held = engine._before = None


def test_a_server_of_anothers_that_hangs_is_an_error_at_the_deadline(strategy, engine):
    """Once, not after as many deadlines as there are repetitions."""
    other = SGLangRollout(url=engine._client.url, key=engine._key, deadline=60.0, retries=3)
    strategy.setup_inference_engine(engine_type=other, actor=model_with(), tokenizer=TOKENIZER)
    other.deadline = 1.0
    for path, call in (
        ("/generate", lambda: other.generate(PROMPTS, SAMPLING)),
        ("/update_weights_from_disk", lambda: other.update_weights(PolicyWeights(strategy, model_with(1)), 1)),
        ("/update_weight_version", lambda: other.update_weights(PolicyWeights(strategy, model_with(1)), 1)),
    ):
        misbehave(engine, path, "hang", 99)
        begin = time.monotonic()
        with pytest.raises(EngineError, match=f"POST {path}: no complete answer by the deadline, after 1") as caught:
            call()
        assert str(caught.value).count("SGLangRollout('sglang')") == 1
        assert time.monotonic() - begin < 2.5
        misbehave(engine, path, None, 0)
    httpx.post(
        f"{engine._client.url}/update_weight_version",
        json={"new_version": "late"},
        timeout=10,
        headers={"Authorization": f"Bearer {engine._key}"},
    ).raise_for_status()  # what it was told comes about, when nobody waits any more
    other.deadline = 60.0
    check_agreement(model_with(1), other.generate(PROMPTS, SAMPLING), SAMPLING)
    other.close()
    engine._held = engine._before = None


def test_a_wrong_option_is_refused_by_sglang_before_anything_is_loaded(strategy):
    engine = SGLangRollout({"contxt_length": 64}, deadline=60.0)
    with pytest.raises(
        EngineError, match=r"ended at its start(.|\n)*no argument 'contxt_length', did you mean 'context_length'"
    ):
        strategy.setup_inference_engine(engine_type=engine, actor=model_with(), tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine_args": {"tp_size": 2}}, r"engine_args\['tp_size'\]=2: SGLangRollout sets this itself"),
        ({"engine_args": {"pp_size": 2}}, r"engine_args\['pp_size'\]=2: SGLangRollout sets this itself"),
        ({"engine_args": {"api-key": "x"}}, r"engine_args\['api-key'\]='x': SGLangRollout sets this itself"),
        ({"tensor_parallel_size": 0}, r"tensor_parallel_size=0\): must be at least 1"),
        ({"exchange": "/nowhere"}, "exchange='/nowhere'.*no such folder"),
        ({"url": "http://a"}, "set key=, or LIGHTRFT_KEY"),
        ({"url": "a:1", "key": "k"}, "url='a:1'.*must be like http"),
        ({"url": "http://a", "key": "k", "engine_args": {"a": 1}}, "are for a server that it starts"),
        ({"verify": "most"}, "verify='most'"),
    ],
)
def test_bad_arguments_are_quoted(arguments, message):
    with pytest.raises(ValueError, match=message):
        SGLangRollout(**arguments)


@pytest.mark.parametrize(
    ("settings", "info", "message"),
    [
        ({}, {"dtype": "float32", "pp_size": 2}, "http://a: pp_size=2: .* with --tp-size or --dp-size alone"),
        ({}, {"dtype": "auto"}, "http://a: its data type is 'auto': start SGLang with --dtype and one of float32"),
        (
            {"sleep_level": 1},
            {"dtype": "float32"},
            "sleep_level=1, .* --enable-memory-saver --enable-weights-cpu-backup",
        ),
        ({"sleep_level": 2}, {"dtype": "float32", "enable_weights_cpu_backup": True}, "--enable-memory-saver$"),
    ],
)
def test_how_a_server_has_to_be_started_is_said(settings, info, message):
    with pytest.raises(EngineError, match=message):
        SGLangRollout(url="http://a", key="k", **settings)._check_server("http://a", info)


def test_a_server_without_seeds_costs_a_warning(caplog):
    SGLangRollout(url="http://a", key="k")._check_server("http://a", {"dtype": "float32"})
    assert "without --enable-deterministic-inference, so seeds have no effect" in caplog.text


def test_without_sglang_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(FAKE)])
    monkeypatch.delitem(sys.modules, "sglang", raising=False)
    with pytest.raises(ImportError, match=r"lightrft-lightning\[sglang\]"):
        SGLangRollout()


def test_a_server_that_does_not_start_in_time(strategy, monkeypatch):
    monkeypatch.setattr("lightrft_lightning.engines.sglang.START", 0.5)
    engine = SGLangRollout(deadline=0.5)
    with pytest.raises(EngineError, match=r"SGLangRollout\('sglang'\): the server did not start in time"):
        strategy.setup_inference_engine(engine_type=engine, actor=model_with(), tokenizer=TOKENIZER)
    assert engine._server is None and engine._folder is None


def test_a_server_that_is_not_there(strategy):
    from lightrft_lightning.engines.sglang_process import free_port

    engine = SGLangRollout(url=f"http://127.0.0.1:{free_port()}", key="k", deadline=5.0, retries=1)
    begin = time.monotonic()
    with pytest.raises(EngineError, match="GET /ready: ConnectError"):
        strategy.setup_inference_engine(engine_type=engine, actor=model_with(), tokenizer=TOKENIZER)
    assert time.monotonic() - begin < 5


def test_a_killed_trainer_leaves_no_server(tmp_path):
    script = """
import sys, time
from lightrft_lightning import FakeStrategy, SGLangRollout
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama
engine, actor = SGLangRollout(deadline=60.0), tiny_llama(width=32, layers=2)
FakeStrategy().setup_inference_engine(engine_type=engine, actor=actor, tokenizer=char_tokenizer())
print(engine._server.pid, flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    server = int(trainer.stdout.readline())
    os.kill(server, 0)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    end = time.monotonic() + 20
    while Path(f"/proc/{server}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{server}").exists()
