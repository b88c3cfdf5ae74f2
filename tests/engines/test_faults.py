"""Real servers that die, hang, fail, lie or refuse: each ends in a result, or in an error within its deadline."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path

import httpx
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightrft_lightning import FakeStrategy, PromptDataModule, RLHFModule, SamplingParams
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.remote import RemoteRollout
from lightrft_lightning.engines.weight_sync import PolicyWeights
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

KEY = "a-key-for-the-tests"
JOBS = Path(__file__).parent / "jobs"
TOKENIZER = char_tokenizer()
PROMPTS = [TOKENIZER(f"{a}+{b}=")["input_ids"] for a in range(6) for b in range(4)]
SAMPLING = SamplingParams(n=8, max_new_tokens=40, seed=5)
SHORT = SamplingParams(n=2, max_new_tokens=4)


def small_model(seed=0):
    return tiny_llama(seed=seed, width=32, layers=2)


class Faulty(RemoteRollout):
    """Its server's loading of weights fails as often as the file `failures` says."""

    failures: Path

    def _command(self):
        python, _, _, *arguments = super()._command()
        return [python, str(JOBS / "faulty_server.py"), str(self.failures), *arguments]


@pytest.fixture(scope="module")
def strategy():
    return FakeStrategy()


@pytest.fixture(scope="module")
def warnings():
    """What the process that starts servers warns of."""
    handler, records = logging.Handler(), []
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("lightrft_lightning.engines._process")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def remote(strategy, warnings, tmp_path_factory):
    """With a server of its own, whose log is on a disk that is full. Of a request's groups it makes two at a time."""
    engine = Faulty(
        engine="transformers", engine_args={"max_batch_size": 16}, deadline=60.0, sleep_level=1, log_file="/dev/full"
    )
    engine.failures = tmp_path_factory.mktemp("control") / "failures"
    engine.failures.write_text("0")
    strategy.setup_inference_engine(engine_type=engine, actor=small_model(), tokenizer=TOKENIZER)
    yield engine
    engine.close()


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@contextmanager
def within(seconds):
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


# ------------------------------------------------------------------------------- a server of its own


def test_a_full_disk_for_the_log_costs_one_warning(remote, warnings):
    remote.generate(PROMPTS, SHORT)
    (warning,) = warnings
    assert "/dev/full" in warning and "No space left" in warning
    assert remote._server.last_lines()


def test_a_server_killed_in_mid_generation_is_replaced(strategy, remote, monkeypatch):
    model = small_model(seed=1)
    remote.update_weights(PolicyWeights(strategy, model), 1)
    undisturbed, server, ask = remote.generate(PROMPTS, SAMPLING), remote._server.pid, remote._client.lines
    hold = remote.failures.with_name("hold")
    hold.touch()

    def killed_after_the_first_group(*arguments):
        lines = ask(*arguments)
        first = next(lines)
        os.kill(server, signal.SIGKILL)
        hold.unlink()
        yield first
        yield from lines

    monkeypatch.setattr(remote._client, "lines", killed_after_the_first_group)
    disturbed = remote.generate(PROMPTS, SAMPLING)
    for got, expected in zip(chain.from_iterable(disturbed), chain.from_iterable(undisturbed), strict=True):
        assert got.token_ids == expected.token_ids
        # The second request is for the missing groups alone, and a smaller batch rounds differently.
        assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert gone(server) and not gone(remote._server.pid)
    assert remote.version == 1


def test_a_failure_in_mid_update_begins_the_update_again(strategy, remote, monkeypatch):
    model, server = small_model(seed=2), remote._server.pid
    monkeypatch.setattr(remote, "bucket_bytes", 1)
    before = remote.generate(PROMPTS, SHORT)
    remote.failures.write_text("1")
    remote.update_weights(PolicyWeights(strategy, model), 2)
    assert remote.version == 2 and remote._server.pid == server
    assert remote.generate(PROMPTS, SHORT) != before


def test_failures_that_stay_end_in_an_error_with_the_servers_last_lines(strategy, remote, monkeypatch):
    monkeypatch.setattr(remote, "retries", 1)
    remote.failures.write_text("1000")
    with pytest.raises(EngineError, match=r"POST /weights/bucket: status 500: RuntimeError: out of memory") as caught:
        remote.update_weights(PolicyWeights(strategy, small_model(seed=3)), 3)
    assert caught.value.args[0].splitlines()[-1].strip() == "RuntimeError: out of memory, says the test"
    assert remote.version == 2
    remote.failures.write_text("0")
    remote.update_weights(PolicyWeights(strategy, small_model(seed=3)), 3)
    assert remote.generate(PROMPTS, SHORT)


def test_a_server_killed_asleep_is_replaced_and_gets_the_current_weights(remote):
    before, server, version = remote.generate(PROMPTS, SHORT), remote._server.pid, remote.version
    remote.sleep()
    os.kill(server, signal.SIGKILL)
    remote.wake_up()
    assert remote.generate(PROMPTS, SHORT) == before and remote.version == version
    assert gone(server) and not gone(remote._server.pid)


def test_two_trainers_on_one_port(remote):
    port = int(remote._client.url.rpartition(":")[2])
    second = RemoteRollout(engine="transformers", port=port, deadline=60.0)
    with pytest.raises(EngineError, match=rf"exit code 1\n.*\n.*cannot listen on 127\.0\.0\.1, port {port}: .* in use"):
        second.connect(small_model(), TOKENIZER)
    assert second._server is None
    assert remote.generate(PROMPTS, SHORT)


def test_a_wrong_key(remote):
    second = RemoteRollout(remote._client.url, key="another", deadline=30.0)
    with pytest.raises(EngineError, match=r"GET /info: status 401: wrong or missing key.*LIGHTRFT_KEY"), within(3):
        second.connect(small_model(), TOKENIZER)
    assert remote.generate(PROMPTS, SHORT)


def test_close_ends_the_server_and_clears_its_folder(remote):
    server, folder = remote._server.pid, remote._exchange
    assert folder.is_dir()
    with within(10):
        remote.close()
    assert gone(server) and not folder.exists()


def test_a_killed_trainer_leaves_no_server_and_ctrl_c_leaves_it_alone():
    trainer = subprocess.Popen(
        [sys.executable, str(JOBS / "killed_trainer.py")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        server, folder = trainer.stdout.readline().split()
        os.killpg(trainer.pid, signal.SIGINT)
        assert "still answers" in trainer.stdout.readline()
        assert not gone(server)
    finally:
        os.killpg(trainer.pid, signal.SIGKILL)
        trainer.wait()
    wait_until(lambda: gone(server))
    assert not Path(folder).exists()


# ------------------------------------------------------------------------------- a server of somebody else


def refused(url, message, seconds, *, retries=3, deadline=1.0, call="GET /info"):
    engine = RemoteRollout(url, key=KEY, deadline=deadline, retries=retries)
    with pytest.raises(EngineError, match=message) as caught, within(seconds), closing(engine):
        engine.connect(small_model(), TOKENIZER)
        engine.generate(PROMPTS[:2], SHORT)
    assert url in str(caught.value) and call in str(caught.value) and "RemoteRollout" in str(caught.value)


def test_a_server_that_accepts_and_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        refused(f"http://127.0.0.1:{listener.getsockname()[1]}", "no complete answer by the deadline", 2)


def test_a_server_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    refused(f"http://127.0.0.1:{port}", "ConnectError", 2)


INFO = {"dtype": "float32", "max_request_bytes": 1 << 20, "exchange": {"folder": "/nowhere", "nonce": "n"}}
GROUPS = [{"prompt": i, "completions": [[[5], [-0.5], "length"]] * 2} for i in range(2)]
DONE = {"done": 2}


@contextmanager
def liar(answers, pause=0.0):
    """A server with these answers to POST /generate, one a connection, sent byte by byte if there is a `pause`."""
    left = list(answers)
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection):
        with connection, connection.makefile("rb") as request:
            path = request.readline().split()[1].decode()
            headers = dict(line.lower().split(b":", 1) for line in iter(request.readline, b"\r\n"))
            request.read(int(headers.get(b"content-length", 0)))
            body = left.pop(0) if path == "/generate" else {"/info": INFO, "/session": {"session": "s"}}.get(path, {})
            text = body if isinstance(body, bytes) else lines(body)
            text = text if text.startswith(b"HTTP") else b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + text
            size = 1 if pause and path == "/generate" else len(text)
            for start in range(0, len(text), size):
                connection.sendall(text[start : start + size])
                time.sleep(pause)
            if path == "/session":
                connection.recv(1)

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=suppressed, args=(answer, connection), daemon=True).start()

    def suppressed(function, connection):
        try:
            function(connection)
        except OSError:
            return  # the client went away

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def lines(*items):
    return b"".join(item if isinstance(item, bytes) else json.dumps(item).encode() + b"\n" for item in items)


def group(*completion):
    return {"prompt": 0, "completions": [list(completion)] * 2}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>hello</html>", "malformed answer, no JSON: '<html>hello</html>'"),
        (b"[1]\n", r"malformed answer, no JSON object: \[1\]"),
        (lines(DONE), "2 of 2 prompts are missing"),
        (lines(GROUPS[0], DONE), "1 of 2 prompts are missing"),
        (lines(GROUPS[0], GROUPS[0], DONE), "prompt 0 was not asked for, or came twice"),
        (lines({"prompt": 2, "completions": GROUPS[0]["completions"]}), "prompt 2 was not asked for"),
        (lines({"prompt": 0, "completions": GROUPS[0]["completions"][:1]}), "1 completions of prompt 0, asked for 2"),
        (lines({"prompt": "0", "completions": []}), "is no group of completions"),
        (lines(group([5, 6], [-0.5], "eos")), r"2 tokens with log-probabilities \[-0.5\]"),
        (lines(group([5], [float("nan")], "eos")), r"\[nan\] are not all finite"),
        (lines(group([5], [None], "eos")), r"\[None\] are not all finite"),
        (lines(group([5] * 5, [-0.5] * 5, "eos")), "5 tokens, asked for 1 to 4"),
        (lines(group([], [], "eos")), "0 tokens"),
        (lines(group(["5"], [-0.5], "eos")), "is no completion"),
        (lines(group([5], [-0.5], "abort")), "'abort'"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnope", "status 404: 'nope'"),
    ],
)
def test_a_malformed_answer_is_told_and_not_asked_for_again(answer, message):
    with liar([answer]) as url:  # a second request would find no answer
        refused(url, message, 3, deadline=5.0, call="POST /generate")


def test_an_answer_that_drips_ends_at_the_deadline():
    with liar([lines(GROUPS[0], GROUPS[1], DONE)], pause=0.1) as url:
        refused(url, "POST /generate: no complete answer by the deadline", 2.5, call="POST /generate")


def test_what_may_pass_is_tried_again_a_few_times():
    broken = [lines(GROUPS[1]), b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"]
    with liar([*broken, lines({**GROUPS[0]}, {"done": 1})]) as url:
        engine = RemoteRollout(url, key=KEY, deadline=10.0, retries=2)
        with closing(engine):
            engine.connect(small_model(), TOKENIZER)
            # The group that came with the first answer is kept, only the other one is asked for again.
            assert [i for i, _ in engine.stream(PROMPTS[:2], SHORT)] == [1, 0]
    with liar([broken[1]] * 3) as url:
        refused(url, "status 503", 5, retries=2, deadline=10.0, call="POST /generate")


# ------------------------------------------------------------------------------- a run that is stopped by it


class Interrupt(pl.Callback):
    """Calls a function once, when a step begins."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_train_batch_start(self, trainer, module, *args):
        if trainer.global_step == self.step:
            self.function()


def train(folder, server, callbacks=(), **fit):
    rollout = RemoteRollout(server.url(60), key=KEY, deadline=30.0, retries=1)
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=-1)
    trainer = pl.Trainer(
        strategy="lightrft_fake", accelerator="cpu", max_steps=4, max_epochs=-1, logger=False,
        callbacks=[rollout, checkpoints, *callbacks], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    reward = lambda completion: completion.count("7")  # noqa: E731
    module = RLHFModule(small_model(), reward, char_tokenizer(), SamplingParams(n=4, max_new_tokens=4), lr=1e-2, seed=1)
    data = [{"prompt": f"{a}+{a}="} for a in range(8)]
    trainer.fit(module, PromptDataModule(data, batch_size=4, tokenizer=char_tokenizer()), **fit)
    return module.actor.state_dict()


def test_a_run_whose_server_died_resumes_to_the_same_bits(start_server, tmp_path):
    server, doomed = start_server(), start_server()
    headers = {"Authorization": f"Bearer {KEY}"}
    left_behind = httpx.get(f"{doomed.url(60)}/info", headers=headers, timeout=60).json()["exchange"]["folder"]
    undisturbed = train(tmp_path / "a", server)
    kill = Interrupt(2, lambda: os.kill(doomed.pid, signal.SIGKILL))
    with pytest.raises(EngineError, match=r"RemoteRollout.*http://127\.0\.0\.1"):
        train(tmp_path / "b", doomed, [kill])
    shutil.rmtree(left_behind)
    resumed = train(tmp_path / "b", server, ckpt_path=str(tmp_path / "b" / "last.ckpt"))
    assert not torch.equal(undisturbed["lm_head.weight"], small_model().lm_head.weight)
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())
