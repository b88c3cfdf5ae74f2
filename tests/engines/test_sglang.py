"""`SGLangRollout` with a real server process that has SGLang's routes and a real model, see fake_sglang."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import lightning.pytorch as pl
import pytest
import torch
from PIL import Image

from lightrft_lightning import FakeStrategy, PromptDataModule, RLHFModule, SamplingParams, SGLangRollout
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.weight_sync import PolicyWeights, WeightMismatchError
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

FAKE = Path(__file__).parent / "fake_sglang"
TOKENIZER = char_tokenizer()
PROMPTS = [TOKENIZER(f"{a}+{b}=")["input_ids"] for a in (1, 22) for b in (3, 456)]
SAMPLING = SamplingParams(n=3, max_new_tokens=8, temperature=0.7, seed=5)
UP = "model.layers.1.mlp.up_proj.weight"


def model_with(seed=0, tie=False):
    model = tiny_llama(seed=seed, width=32, layers=2)
    if tie:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def trainers_logprobs(model, prompt, completion, temperature, top_k=0):
    """Of the tokens under the distribution that they were drawn from, by a forward pass."""
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / (temperature or 1.0)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()


@torch.no_grad()
def check_agreement(model, groups, sampling):
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == sampling.n
        for completion in group:
            expected = trainers_logprobs(model, prompt, completion, sampling.temperature, sampling.top_k)
            assert completion.logprobs == pytest.approx(expected, abs=1e-5)


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


@pytest.mark.parametrize("sampling", [SAMPLING, SamplingParams(n=2, max_new_tokens=8, temperature=0.0)])
def test_logprobs_are_the_trainers(engine, sampling):
    groups = engine.generate(PROMPTS, sampling)
    check_agreement(model_with(), groups, sampling)
    if sampling.temperature:
        assert len({completion.token_ids for completion in groups[1]}) == 3
    else:
        greedy = trainers_greedy(model_with(), PROMPTS[2], 8)
        assert [list(completion.token_ids) for completion in groups[2]] == [greedy, greedy]


def trainers_greedy(model, prompt, limit):
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and ids[-1] != TOKENIZER.eos_token_id:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_under_top_k_the_support_is_renormalised(engine):
    sampling = SamplingParams(n=2, max_new_tokens=6, top_k=3)
    check_agreement(model_with(), engine.generate(PROMPTS, sampling), sampling)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.9}, "top_p=0.9: SGLang tells log-probabilities under top-p only if top_k is set"),
        ({"top_k": 1000}, "top_k=1000: SGLang tells log-probabilities under top-k up to 256; raise it with"),
    ],
)
def test_what_sglang_cannot_tell_is_refused(engine, settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        engine.generate(PROMPTS, SamplingParams(**settings))


def test_draws_depend_on_seed_stream_and_number_only(engine):
    everything = engine.generate(PROMPTS, SAMPLING, [4, 0, 9, 2])
    assert engine.generate(PROMPTS[2:], SAMPLING, [9, 2]) == everything[2:]
    assert engine.generate(PROMPTS[2:], SAMPLING, [8, 2]) != everything[2:]
    assert engine.generate([], SAMPLING) == []


def test_stop_strings_and_limits(engine):
    sampling = SamplingParams(n=8, max_new_tokens=12, stop=("3", "7"))
    completions = [completion for group in engine.generate(PROMPTS, sampling) for completion in group]
    for completion in completions:
        text = TOKENIZER.decode(completion.token_ids)
        assert completion.finish_reason == (
            "stop" if text[-1] in "37" else "eos" if completion.token_ids[-1] == TOKENIZER.eos_token_id else "length"
        )
    assert {"stop", "length"} <= {completion.finish_reason for completion in completions}


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


def test_groups_stream(engine):
    found = dict(engine.stream(PROMPTS, SAMPLING))
    assert [found[i] for i in range(4)] == engine.generate(PROMPTS, SAMPLING)


def test_all_images_of_a_prompt_are_sent(engine, monkeypatch):
    """The stand-in's model takes none, so what is sent is looked at."""
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


@pytest.mark.parametrize("verify", ["sample", "all", "off"])
@pytest.mark.parametrize("bucket_bytes", [1, 20_000, 1 << 20])
def test_updates_arrive(strategy, engine, monkeypatch, verify, bucket_bytes):
    monkeypatch.setattr(engine, "verify", verify)
    monkeypatch.setattr(engine, "bucket_bytes", bucket_bytes)
    model = model_with(seed=bucket_bytes)
    engine.update_weights(PolicyWeights(strategy, model), 7)
    check_agreement(model, engine.generate(PROMPTS, SAMPLING), SAMPLING)
    assert engine.version == 7
    monkeypatch.undo()
    engine._before = None


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


def test_weights_that_stay_as_they_are_are_no_mismatch(strategy, engine):
    model = model_with()
    engine.update_weights(PolicyWeights(strategy, model), 1)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.add_(1.0)
    engine.update_weights(PolicyWeights(strategy, model), 2)
    check_agreement(model, engine.generate(PROMPTS, SAMPLING), SAMPLING)


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


@pytest.mark.parametrize("level", [1, 2])
def test_sleeps_and_wakes_with_its_weights(strategy, level):
    engine = SGLangRollout(deadline=60.0, sleep_level=level)
    strategy.setup_inference_engine(engine_type=engine, actor=model_with(), tokenizer=TOKENIZER)
    strategy.engines_sleep([engine], level)
    strategy.engines_sleep([engine], level)
    strategy.engines_wake_up([engine])
    check_agreement(model_with(), engine.generate(PROMPTS, SAMPLING), SAMPLING)
    engine.close()


def test_trains(tmp_path):
    """All of it as a callback: `drift_limit` would stop the run."""
    model, engine = model_with(), SGLangRollout(deadline=60.0, drift_limit=1e-3, verify="all")
    trainer = pl.Trainer(
        strategy="lightrft_fake", accelerator="cpu", devices=1, limit_train_batches=3, max_epochs=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[engine],
        default_root_dir=tmp_path,
    )  # fmt: skip
    module = RLHFModule(model, lambda completion: len(set(completion)), TOKENIZER, SAMPLING, seed=0, lr=1e-3)
    prompts = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]
    trainer.fit(module, datamodule=PromptDataModule(prompts, batch_size=4, seed=0))
    assert engine.version == 3 and float(trainer.callback_metrics["train/mismatch_max"]) < 1e-3
    assert engine._server is None


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("/generate", "too few", r"asked for 3 completions, SGLang returned 2\n"),
        ("/generate", "malformed", "POST /generate: malformed answer, no JSON: '<html>'"),
        ("/generate", "nan", "POST /generate: malformed answer"),
        ("/generate", "short logprobs", r"malformed answer.*token ids and \d log-probabilities"),
        ("/generate", "abort", "SGLang ended a completion with 'abort': out of memory"),
        ("/update_weights_from_disk", "refuse", "status 400: Failed to update weights: no room"),
        ("/flush_cache", "busy", "POST /flush_cache.*status 400: 'Flush cache failed"),
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


def test_too_long_a_prompt_is_refused_in_sglangs_words(engine):
    with pytest.raises(EngineError, match=r"status 400: Requested token count exceeds.* 64 tokens"):
        engine.generate([PROMPTS[0] * 20], SAMPLING)


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


def test_a_wrong_option_is_refused_by_sglang_before_anything_is_loaded(strategy):
    engine = SGLangRollout({"contxt_length": 64}, deadline=60.0)
    with pytest.raises(EngineError, match=r"ended at its start(.|\n)*unrecognized arguments: --contxt-length 64"):
        strategy.setup_inference_engine(engine_type=engine, actor=model_with(), tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine_args": {"tp_size": 2}}, r"engine_args\['tp_size'\]=2: SGLangRollout sets this itself"),
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


def test_without_sglang_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(FAKE)])
    monkeypatch.delitem(sys.modules, "sglang", raising=False)
    with pytest.raises(ImportError, match=r"lightrft-lightning\[sglang\]"):
        SGLangRollout()


# -------------------------------------------------------------------- several ranks

JOB = Path(__file__).parent / "jobs" / "sglang_ranks.py"


@pytest.fixture(scope="module")
def of_ranks(run_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(FAKE), str(JOB.parents[2] / "strategies" / "jobs")]
    run_ranks(JOB, folder, timeout=200, env={"PYTHONPATH": os.pathsep.join(paths)})
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", re.findall(r"^def (check_\w+)", JOB.read_text(), re.M))
def test_on_two_ranks(of_ranks, check):
    for rank in of_ranks:
        assert rank[check] == "ok", rank[check]


# -------------------------------------------------------------------- a server that runs already


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """The URL of a server that somebody has started, with the key ``k``."""
    folder = tmp_path_factory.mktemp("running")
    model_with(9).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    settings = {"model-path": str(folder), "port": 0, "api-key": "k", "dtype": "float32"}
    started = []

    def start(**more):
        from lightrft_lightning.engines.sglang import _free_port

        file = folder / f"{len(started)}.yaml"
        port = _free_port()
        file.write_text(json.dumps({**settings, "port": port, **more}))
        started.append(subprocess.Popen([sys.executable, "-m", "sglang.launch_server", "--config", str(file)]))
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                httpx.get(f"{url}/ready")
                return url
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError("the server does not start")

    yield start
    for process in started:
        process.kill()


def test_a_server_that_runs_already(strategy, running, caplog, tmp_path):
    url = running()
    with pytest.raises(EngineError, match=r"status 401: Unauthorized. Set key=, or the variable LIGHTRFT_KEY"):
        strategy.setup_inference_engine(
            engine_type=SGLangRollout(url=url, key="wrong"), actor=model_with(), tokenizer=TOKENIZER
        )
    with pytest.raises(
        EngineError, match="for sleep_level=1, start SGLang with --enable-memory-saver --enable-weights"
    ):
        strategy.setup_inference_engine(
            engine_type=SGLangRollout(url=url, key="k", sleep_level=1), actor=model_with(), tokenizer=TOKENIZER
        )
    engine = SGLangRollout(url=url, key="k", exchange=tmp_path, deadline=30.0)
    strategy.setup_inference_engine(engine_type=engine, actor=model_with(), tokenizer=TOKENIZER)
    assert "without --enable-deterministic-inference, so seeds have no effect" in caplog.text
    check_agreement(model_with(), engine.generate(PROMPTS, SAMPLING), SAMPLING)
    assert not list(tmp_path.iterdir())

    other = SGLangRollout(url=url, key="k", deadline=30.0)
    strategy.setup_inference_engine(engine_type=other, actor=model_with(1), tokenizer=TOKENIZER)
    with pytest.raises(EngineError, match="does another trainer use this server"):
        engine.generate(PROMPTS, SAMPLING)
    other.close()
    engine.close()
    assert httpx.get(f"{url}/ready").status_code == 200


def test_the_data_type_must_be_known(strategy, running):
    with pytest.raises(EngineError, match="its data type is 'auto': start SGLang with --dtype and one of float32"):
        strategy.setup_inference_engine(
            engine_type=SGLangRollout(url=running(dtype="auto"), key="k"), actor=model_with(), tokenizer=TOKENIZER
        )


def test_a_server_that_is_not_there(strategy):
    from lightrft_lightning.engines.sglang import _free_port

    engine = SGLangRollout(url=f"http://127.0.0.1:{_free_port()}", key="k", deadline=5.0, retries=1)
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
