"""`RemoteRollout` with real servers: generation, weights, verification, ranks; with vLLM in test_vllm_hosted.py."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from lightrft_lightning import FakeStrategy, SamplingParams, TransformersRollout
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.remote import RemoteRollout
from lightrft_lightning.engines.weight_sync import PolicyWeights, WeightMismatchError
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()
PROMPTS = [TOKENIZER(f"{a}+{b}=")["input_ids"] for a in (1, 22) for b in (3, 456)]
SAMPLING = SamplingParams(n=3, max_new_tokens=8, seed=5)
JOB = Path(__file__).parent / "jobs" / "remote_ranks.py"


def model_with(seed=0, tie=False, width=32):
    model = tiny_llama(seed=seed, width=width, layers=2)
    if tie:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def agree(found, expected):
    """The same tokens, and log-probabilities up to the rounding of another process."""
    pairs = [(a, b) for f, e in zip(found, expected, strict=True) for a, b in zip(f, e, strict=True)]
    return all(a.token_ids == b.token_ids and a.finish_reason == b.finish_reason for a, b in pairs) and all(
        a.logprobs == pytest.approx(b.logprobs, abs=1e-5) for a, b in pairs
    )


def in_process(model, *arguments):
    rollout = TransformersRollout()
    rollout.connect(model, TOKENIZER)
    return rollout.generate(*arguments)


class Lossy(RemoteRollout):
    """Loses a tensor on the way, or spoils it."""

    lost = spoilt = ""

    def _send(self, tensors):
        zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name == self.spoilt}
        super()._send({name: tensor for name, tensor in {**tensors, **zeros}.items() if name != self.lost})


@pytest.fixture(scope="module")
def strategy():
    return FakeStrategy()


CPU = min(os.sched_getaffinity(0)) if sys.platform == "linux" else None


@pytest.fixture(scope="module")
def remote(strategy):
    engine = Lossy(engine="transformers", deadline=60.0, sleep_level=1, cpus=None if CPU is None else str(CPU))
    strategy.setup_inference_engine(engine_type=engine, actor=model_with(), tokenizer=TOKENIZER)
    yield engine
    engine.close()
    engine.close()


@pytest.fixture(params=["folder", "http"])
def way(request, remote, monkeypatch):
    """How the weights travel."""
    if request.param == "http":
        monkeypatch.setattr(remote, "_exchange", None)
    else:
        assert remote._exchange is not None
    return request.param


def test_starts_a_server_with_the_trainers_weights(remote):
    found = remote.generate(PROMPTS, SAMPLING, [4, 0, 9, 2])
    assert agree(found, in_process(model_with(), PROMPTS, SAMPLING, [4, 0, 9, 2]))
    assert remote.generate([], SAMPLING) == []
    greedy = SamplingParams(n=2, max_new_tokens=8, temperature=0.0, stop=("3",))
    assert agree(remote.generate(PROMPTS, greedy), in_process(model_with(), PROMPTS, greedy))


@pytest.mark.parametrize("verify", ["sample", "all"])
@pytest.mark.parametrize("bucket_bytes", [1, 20_000, 1 << 20])
def test_updates_arrive_and_are_verified(strategy, remote, way, monkeypatch, verify, bucket_bytes):
    monkeypatch.setattr(remote, "verify", verify)
    monkeypatch.setattr(remote, "bucket_bytes", bucket_bytes)
    model = model_with(seed=bucket_bytes, tie=bucket_bytes == 1)
    remote.update_weights(PolicyWeights(strategy, model), 7)
    assert remote.version == 7
    assert agree(remote.generate(PROMPTS, SAMPLING), in_process(model, PROMPTS, SAMPLING))


@pytest.mark.parametrize("verify", ["sample", "all"])
def test_a_lost_tensor_is_caught_by_name(strategy, remote, way, monkeypatch, verify):
    monkeypatch.setattr(remote, "verify", verify)
    remote.update_weights(PolicyWeights(strategy, model_with(seed=2)), 7)
    model = model_with(seed=3)
    name = "model.layers.1.mlp.up_proj.weight"
    monkeypatch.setattr(remote, "spoilt", name)
    with pytest.raises(WeightMismatchError, match=rf"not hold the trainer's '{re.escape(name)}'$"):
        remote.update_weights(PolicyWeights(strategy, model), 8)
    monkeypatch.setattr(remote, "spoilt", "")
    monkeypatch.setattr(remote, "lost", name)
    with pytest.raises(EngineError, match=rf"status 400: the update lacks '{re.escape(name)}': send every parameter"):
        remote.update_weights(PolicyWeights(strategy, model), 8)
    unnamed = [item for item in PolicyWeights(strategy, model) if item[0] != "lm_head.weight"]
    monkeypatch.setattr(remote, "lost", "")
    with pytest.raises(EngineError, match=r"status 400: the update lacks 'lm_head\.weight'"):
        remote.update_weights(unnamed, 8)
    remote.update_weights(PolicyWeights(strategy, model), 8)
    assert agree(remote.generate(PROMPTS, SAMPLING), in_process(model, PROMPTS, SAMPLING))


def test_weights_for_another_model_are_refused_without_trying_again(strategy, remote):
    with pytest.raises(
        EngineError, match=r"status 400: \S+ has the shape \[16, 32\] in the server.s model, got \[16, 64\]"
    ):
        remote.update_weights(PolicyWeights(strategy, model_with(width=64)), 9)
    with pytest.raises(
        EngineError, match=r"POST /generate: status 409: nothing can be generated: the last update failed"
    ):
        remote.generate(PROMPTS, SAMPLING)
    remote.update_weights(iter(list(PolicyWeights(strategy, model_with()))), 9)
    assert agree(remote.generate(PROMPTS, SAMPLING), in_process(model_with(), PROMPTS, SAMPLING))


def test_a_tensor_above_the_servers_limit_is_named_before_it_is_sent(strategy, remote, monkeypatch):
    monkeypatch.setattr(remote, "_exchange", None)
    monkeypatch.setattr(remote, "_limit", 1000)
    monkeypatch.setattr(remote, "bucket_bytes", 1)
    with pytest.raises(EngineError, match=r"'model\.embed_tokens\.weight': \d+ bytes.*1000.*--max-request-mb"):
        remote.update_weights(PolicyWeights(strategy, model_with()), 9)
    monkeypatch.undo()
    remote.update_weights(PolicyWeights(strategy, model_with()), 9)


def test_prompts_that_the_engine_refuses_are_quoted(remote):
    with pytest.raises(EngineError, match=r"Lossy\('transformers'\): http.*status 400: prompt 0 has 1000 tokens"):
        remote.generate([[5] * 1000], SAMPLING)
    with pytest.raises(ValueError, match="prompt 0 holds token 99, the model has embeddings for 16"):
        remote.generate([[99]], SAMPLING)
    with pytest.raises(ValueError, match="images: Lossy generates from text only, with this model"):
        remote.generate([[5], [6]], SAMPLING, images=[[], ["an image"]])


def test_two_trainers_on_one_server(remote):
    second = RemoteRollout(remote._client.url, key=remote._key, deadline=30.0)
    with pytest.raises(EngineError, match=rf"another trainer is using this server: process {os.getpid()} on "):
        second.connect(model_with(), TOKENIZER)
    remote.generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "vlm"}, "Did you mean 'vllm'"),
        ({"url": "127.0.0.1:8421", "key": "k"}, "'127.0.0.1:8421'"),
        ({"url": "http://127.0.0.1:1"}, "LIGHTRFT_KEY"),
        ({"url": "http://127.0.0.1:1", "key": "a\nb"}, "LIGHTRFT_KEY"),
        ({"url": "http://127.0.0.1:1", "key": "k", "engine_args": {"dtype": "float32"}}, "float32"),
        ({"port": 70000}, "port=70000"),
        ({"retries": -1}, "retries=-1"),
        ({"cpus": "0-"}, "cpus='0-': must be numbers and ranges, like '0-3,6'"),
        ({"cpus": "0,99999"}, "cpus='0,99999': this machine has 0-"),
        ({"url": "http://127.0.0.1:1", "key": "k", "cpus": "0"}, "`lightrft serve --cpus 0`"),
        ({"deadline": 0}, "deadline=0"),
        ({"log_file": "/no/such/folder/file"}, "/no/such/folder"),
    ],
)
def test_wrong_arguments_are_quoted(monkeypatch, arguments, message):
    monkeypatch.delenv("LIGHTRFT_KEY", raising=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        RemoteRollout(**arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="no choice of CPUs")
def test_its_server_computes_on_the_cpus_that_it_is_given(remote):
    assert os.sched_getaffinity(remote._server.pid) == {CPU}
    threads = {int(task.name) for task in Path(f"/proc/{remote._server.pid}/task").iterdir()}
    assert all(os.sched_getaffinity(thread) == {CPU} for thread in threads)


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_fifty_cycles_leave_nothing_behind(strategy, remote):
    def held():
        about = Path(f"/proc/{remote._server.pid}")
        (memory,) = re.findall(r"VmRSS:\s+(\d+)", (about / "status").read_text())
        return int(memory) / 1024, len(list((about / "fd").iterdir())), len(list(remote._exchange.iterdir()))

    seen, model = [], model_with(width=32)
    for version in range(1, 51):
        remote.update_weights(PolicyWeights(strategy, model), version)
        remote.generate(PROMPTS[:1], SAMPLING)
        remote.sleep()
        remote.wake_up()
        seen.append(held())
    memory, files, sent = zip(*seen[9:], strict=True)
    assert memory[-1] < memory[0] + 2 and max(files) <= files[0] + 1 and set(sent) == {1}, seen


# ------------------------------------------------------------------------------- several ranks

CHECKS = re.findall(r"^def (check_\w+)", JOB.read_text(), re.M)


@pytest.fixture(scope="module")
def of_ranks(run_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(JOB, folder, timeout=200, env={"PYTHONPATH": str(JOB.parents[2] / "strategies" / "jobs")})
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(of_ranks, check):
    for rank in of_ranks:
        assert rank[check] == "ok", rank[check]
