"""``lightrft serve`` over real HTTP: the key, what it refuses, sessions, and updates that are all or nothing."""

from __future__ import annotations

import asyncio
import json
import math
import os
import pickle
import re
import signal
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lightrft_lightning import SamplingParams, TransformersRollout, cli
from lightrft_lightning._seeds import derive_seed
from lightrft_lightning.engines import _wire as wire
from lightrft_lightning.engines import server as server_module
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

KEY = "a-key-for-the-tests"
TOKENIZER = char_tokenizer()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("1+2=", "33+4=", "7=")]
MOST = 1 << 20
ROUTES = [
    ("GET", "/health"), ("GET", "/info"), ("POST", "/session"), ("POST", "/generate"), ("POST", "/weights/begin"),
    ("POST", "/weights/bucket"), ("POST", "/weights/end"), ("POST", "/weights/read"), ("POST", "/sleep"),
    ("POST", "/wake_up"), ("GET", "/no-such-route"), ("DELETE", "/generate"),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(start_server):
    return start_server("--max-request-mb", "1")


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(
        base_url=server.url(60), headers={"Authorization": f"Bearer {KEY}"}, timeout=30, trust_env=False
    ) as client:
        yield client


@contextmanager
def trainer(http):
    """The headers of a trainer, for as long as its session is open."""
    with http.stream("POST", "/session", json={"host": "here", "pid": 7}) as response:
        lines = response.iter_lines()  # httpx closes the connection when this is collected
        yield {"X-LightRFT-Session": json.loads(next(lines))["session"]}


@pytest.fixture
def session(http):
    with trainer(http) as headers:
        yield headers


def request(**changes):
    body = {
        "prompts": PROMPTS,
        "streams": [0, 1, 2],
        "sampling": {"n": 2, "max_new_tokens": 5, "seed": 3},
        "deadline": 9,
    }
    return {**body, **changes}


def weights(scale=1.0):
    return {name: value * scale for name, value in tiny_llama(seed=1, width=32, layers=2).state_dict().items()}


def error(response):
    return response.json()["error"]


# ------------------------------------------------------------------------------- key and limits


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("sent", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x"])
def test_every_route_asks_for_the_key(http, method, path, sent):
    headers = {} if sent is None else {"Authorization": sent}
    response = httpx.request(method, f"{http.base_url}{path}", headers=headers, trust_env=False)
    assert response.status_code == 401 and "key" in error(response)


def test_the_key_is_asked_for_before_the_body_is_read(http):
    with socket.create_connection((http.base_url.host, http.base_url.port), timeout=5) as connection:
        connection.sendall(b"POST /weights/bucket HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_a_large_request_is_refused_with_and_without_its_length(http, session):
    exact = http.post("/weights/bucket", content=b"x" * (MOST + 1), headers=session)
    chunked = http.post("/weights/bucket", content=(b"x" * 65536 for _ in range(17)), headers=session)
    prompts = http.post("/generate", content=(b" " * 65536 for _ in range(17)))
    for response in (exact, chunked, prompts):
        assert response.status_code == 413 and "--max-request-mb" in error(response)
    folder = Path(http.get("/info").json()["exchange"]["folder"])
    assert [file.name for file in folder.iterdir()] == ["nonce"]


# ------------------------------------------------------------------------------- generation


def test_generates_as_in_process_and_ends_with_the_count(http):
    rollout = TransformersRollout()
    rollout.connect(tiny_llama(seed=0, width=32, layers=2), TOKENIZER)
    expected = rollout.generate(PROMPTS, SamplingParams(n=2, max_new_tokens=5, seed=3), [4, 9, 2])
    *groups, last = http.post("/generate", json=request(streams=[4, 9, 2])).text.splitlines()
    assert json.loads(last) == {"done": 3}
    found = {line["prompt"]: line["completions"] for line in map(json.loads, groups)}
    for i, group in enumerate(expected):
        for (ids, logprobs, reason), c in zip(found[i], group, strict=True):
            assert (tuple(ids), reason) == (c.token_ids, c.finish_reason)
            assert logprobs == pytest.approx(c.logprobs, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "quoted"),
    [
        (b"{", "{"),
        (b"[1]", "[1]"),
        (b'{"prompts": NaN}', "NaN"),
        (b"[" * 100_000, "[[["),
        (b"\xff\xfe", "xff"),
        ({}, "'prompts'"),
        ({"prompts": "1+2"}, "'1+2'"),
        ({"prompts": [[1], []], "streams": [0, 1]}, "prompts[1]=[]"),
        ({"prompts": [[1, 99]], "streams": [0]}, "[1, 99]: must be token ids from 0 to 15"),
        ({"prompts": [[1, True]], "streams": [0]}, "True"),
        ({"prompts": [[-1]], "streams": [0]}, "-1"),
        ({"streams": [0]}, "3 prompts but 1 streams"),
        ({"streams": [0, 1, 0.5]}, "0.5"),
        ({"deadline": 0}, "deadline=0"),
        ({"deadline": "1"}, "'1'"),
        ({"deadline": 10**400}, "deadline=1000"),
        (json.dumps(request()).replace('"deadline": 9', '"deadline": 1e999').encode(), "deadline=inf"),
        ({"dead_line": 1}, "Did you mean 'deadline'?"),
        ({"streams": [0, 1, 10**30]}, "streams=[0, 1, 1000"),
        ({"weights": 5}, "weights=5"),
        ({"sampling": []}, "sampling=[]"),
        ({"sampling": {"temprature": 1}}, "Did you mean 'temperature'?"),
        ({"sampling": {"n": 0}}, "n=0"),
        ({"sampling": {"n": 10**9}}, "n=1000000000"),
        ({"sampling": {"n": 1.5}}, "n=1.5"),
        ({"sampling": {"top_p": 0}}, "top_p=0"),
        ({"sampling": {"temperature": 1e-300}}, "temperature=1e-300"),
        ({"sampling": {"seed": 10**30}}, "seed=1000"),
        ({"sampling": {"top_k": 10**400}}, "top_k=1000"),
        (json.dumps(request(sampling={"stop": ["\ud800"]})).encode(), "ud800"),
        ({"sampling": {"temperature": -1}}, "temperature=-1"),
        ({"sampling": {"stop": ["a", ""]}}, "['a', '']"),
        ({"sampling": {"max_new_tokens": 10**6}}, "max_new_tokens=1000000"),
    ],
)
def test_bad_requests_are_refused_and_quoted(http, body, quoted):
    if isinstance(body, dict):
        response = http.post("/generate", json=request(**body) if body else {})
    else:
        response = http.post("/generate", content=body)
    assert response.status_code == 400, response.text
    assert quoted in error(response) and "Traceback" not in response.text and len(response.text) < 1000


def test_bad_fields_of_the_other_routes_are_refused_and_named(http, session):
    bad = {
        "/session": [{"host": "", "pid": 1}, {"host": "a\nb", "pid": 1}, {"host": "a", "pid": 10**400}, {"host": "a"}],
        "/weights/end": [{}, {"version": -1}, {"version": 10**400}, {"version": 1.5}, {"version": 1, "more": 2}],
        "/weights/read": [{}, {"wanted": []}, {"wanted": {"a": [0, 0]}}, {"wanted": {"a": [10**30, 1]}},
                          {"wanted": {}, "names": [1]}, {"wanted": {}, "extra": 1}],
        "/sleep": [{}, {"level": 0}, {"level": True}, {"level": 1.0}, {"level": 10**400}],
        "/weights/bucket": [{}, {"file": "a" * 1000}, {"file": "a", "b": 1}],
    }  # fmt: skip
    for path, bodies in bad.items():
        for body in [*bodies, [], "x"]:
            response = http.post(path, json=body, headers=session)
            assert response.status_code == 400, (path, body, response.text)
            assert "\n" not in error(response) and len(error(response)) < 500


NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 1 << 63, 1e-320])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["prompts", "streams", "sampling", "deadline", "weights", "other"]
SAMPLING = ["n", "max_new_tokens", "temperature", "top_p", "top_k", "stop", "seed", "other"]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([(f,) for f in FIELDS] + [("sampling", f) for f in SAMPLING]), JSON)
def test_whatever_a_field_holds_it_is_usable_or_refused_in_one_line(where, value):
    body = request()
    (body["sampling"] if len(where) == 2 else body)[where[-1]] = value
    try:
        wanted = wire.parse_request(wire.parse_object(json.dumps(body).encode()), 16)
    except ValueError as err:
        assert "\n" not in str(err) and len(str(err)) < 500
        return
    sampling = wanted.sampling
    assert 0 < wanted.deadline <= 1e6 and 1 <= sampling.n <= 1 << 16 and math.isfinite(sampling.temperature)
    assert len(wanted.prompts) == len(wanted.streams) and all(0 <= i < 16 for prompt in wanted.prompts for i in prompt)
    numpy.random.default_rng(derive_seed(sampling.seed, *wanted.streams))


# ------------------------------------------------------------------------------- calls that are to end


LONG = {"n": 400, "max_new_tokens": 60, "stop": ["never"]}
"""Seconds of work for the tiny model."""


def test_a_call_ends_at_its_deadline_and_when_its_client_hangs_up(http):
    start = time.monotonic()
    late = http.post("/generate", json=request(sampling=LONG, deadline=0.1))
    assert late.status_code == 504 or "504" in late.text.splitlines()[-1]
    assert "prompts are finished after deadline=0.1 s" in late.text
    for path in ("/generate", "/generate"):  # the second one waits for the first
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{http.base_url}{path}",
                json=request(sampling={**LONG, "n": 20_000}, deadline=600),
                headers=http.headers,
                timeout=0.2,
                trust_env=False,
            )
    assert http.post("/generate", json=request()).status_code == 200
    assert time.monotonic() - start < 20


def test_a_call_is_answered_at_its_deadline_while_the_engine_is_inside_of_a_layer():
    arrived, stop = asyncio.Queue(), threading.Event()
    late = server_module.HTTPException(504)

    async def call():
        await arrived.put("group")
        return [await server_module._before(time.monotonic() + wait, arrived, late, stop) for wait in (9, 0.01)]

    assert asyncio.run(call()) == ["group", late] and stop.is_set()


def test_sigterm_in_a_call_ends_the_server_in_order(start_server):
    server = start_server()
    host, port = server.url(60).removeprefix("http://").split(":")
    body = json.dumps(request(sampling={**LONG, "n": 20_000}, deadline=600)).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=1) as connection:
        connection.sendall(head.encode() + body)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        os.kill(server.pid, signal.SIGTERM)
        assert server._process.wait(30) == 128 + signal.SIGTERM, server.last_lines()


# ------------------------------------------------------------------------------- sessions and updates


def test_one_trainer_at_a_time_and_free_when_its_connection_closes(http, session):
    second = http.post("/session", json={"host": "there", "pid": 9})
    assert second.status_code == 409 and re.search(r"process 7 on here, since \d{4}-", error(second))
    for path, body in (("/weights/begin", {}), ("/weights/end", {"version": 1}), ("/sleep", {"level": 1})):
        for headers in ({}, {"X-LightRFT-Session": "00"}, {"X-LightRFT-Session": "é".encode()}):
            refused = http.post(path, json=body, headers=headers)
            assert refused.status_code == 409 and "session" in error(refused)
    # The other tests could not have a session if this one did not end with its connection.


def test_an_update_is_all_or_nothing(http, session):
    def generate(**body):
        return http.post("/generate", json=request(**body))

    def bucket(content):
        return http.post("/weights/bucket", content=content, headers=session)

    before = generate().text
    assert bucket(save(weights())).status_code == 409  # not begun
    assert http.post("/weights/begin", headers=session).status_code == 200
    assert generate().status_code == 409 and "under way" in error(generate())
    assert bucket(save({"model.norm.weigt": torch.ones(32)})).status_code == 400
    assert "Did you mean 'model.norm.weight'?" in error(generate())  # the reason why the weights are unusable
    assert bucket(save(weights())).status_code == 409  # the rest of an update that failed
    assert http.post("/weights/end", json={"version": 1}, headers=session).status_code == 409
    assert http.post("/weights/begin", headers=session).status_code == 200
    assert bucket(save({"model.norm.weight": torch.ones(32)})).status_code == 200
    partial = http.post("/weights/end", json={"version": 1}, headers=session)
    assert partial.status_code == 400 and "the update lacks 'model.embed_tokens.weight', 'model" in error(partial)
    assert generate().status_code == 409 and "the update lacks" in error(generate())
    for dtype in (torch.bool, torch.complex64, torch.int64):
        assert http.post("/weights/begin", headers=session).status_code == 200
        wrong = bucket(save({"model.norm.weight": torch.ones(32).to(dtype)}))
        assert wrong.status_code == 400 and "model.norm.weight has the dtype" in error(wrong)
    assert http.post("/weights/begin", headers=session).status_code == 200
    wrong_shape = bucket(save({"model.norm.weight": torch.ones(31)}))
    assert wrong_shape.status_code == 400 and "[32]" in error(wrong_shape) and "[31]" in error(wrong_shape)
    assert http.post("/weights/begin", headers=session).status_code == 200
    assert bucket(save(weights())).status_code == 200
    done = http.post("/weights/end", json={"version": 1}, headers=session)
    assert generate().status_code == 200 and generate().text != before
    assert generate(weights=done.json()["weights"]).status_code == 200
    assert generate(weights="others").status_code == 409


def test_a_trainer_that_leaves_in_mid_update_leaves_nothing_usable_or_locked(http):
    with trainer(http) as token:
        assert http.post("/weights/begin", headers=token).status_code == 200
    end = time.monotonic() + 10
    while "under way" in (told := error(http.post("/generate", json=request()))) and time.monotonic() < end:
        time.sleep(0.05)  # the server has to notice that the connection is gone
    assert "left in the middle" in told
    with trainer(http) as token:
        assert http.post("/weights/begin", headers=token).status_code == 200
        assert http.post("/weights/bucket", content=save(weights()), headers=token).status_code == 200
        assert http.post("/weights/end", json={"version": 0}, headers=token).status_code == 200
    assert http.post("/generate", json=request()).status_code == 200


def test_reads_files_of_the_exchange_folder_only(http, session, tmp_path):
    folder = Path(http.get("/info").json()["exchange"]["folder"])
    assert folder.stat().st_mode & 0o777 == 0o700
    save_file(weights(2.0), tmp_path / "outside.safetensors")
    save_file(weights(2.0), folder / "inside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "folder.safetensors").mkdir()
    outside = str(tmp_path / "outside.safetensors")
    names = [
        outside,
        f"../{folder.name}/inside.safetensors",
        "link.safetensors",
        "folder.safetensors",
        "nonce",
        "",
        ".",
    ]
    http.post("/weights/begin", headers=session)
    for name in [*names, "absent.safetensors", "inside.safetensors\n", "x\0.safetensors", 5]:
        refused = http.post("/weights/bucket", json={"file": name}, headers=session)
        assert refused.status_code == 400 and "file=" in error(refused), name
    assert Path(outside).exists()
    assert http.post("/weights/bucket", json={"file": "inside.safetensors"}, headers=session).status_code == 200
    assert not (folder / "inside.safetensors").exists()
    (folder / "link.safetensors").unlink()
    (folder / "folder.safetensors").rmdir()
    assert http.post("/weights/end", json={"version": 1}, headers=session).status_code == 200


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_is_unpickled(http, session, tmp_path):
    http.post("/weights/begin", headers=session)
    torch.save(weights(), tmp_path / "torch.pt")
    contents = [pickle.dumps(Exploit(str(tmp_path / "owned"))), (tmp_path / "torch.pt").read_bytes(), b""]
    for content in contents:
        refused = http.post("/weights/bucket", content=content, headers=session)
        assert refused.status_code == 400 and "safetensors" in error(refused)
        http.post("/weights/begin", headers=session)
    assert not (tmp_path / "owned").exists()
    assert http.post("/weights/bucket", content=save(weights()), headers=session).status_code == 200
    assert http.post("/weights/end", json={"version": 1}, headers=session).status_code == 200


def test_reads_back_what_it_holds(http, session):
    wanted = {"model.norm.weight": [0, 1], "lm_head.weight": [1, 4], "elsewhere": [0, 1]}
    body = {"wanted": wanted, "names": ["model.norm.weight", "lm_head.weight"]}
    held = http.post("/weights/read", json=body).json()["held"]
    assert held["parts"]["lm_head.weight"][0]["columns"] == [0, 32] and held["unreadable"] == ["elsewhere"]
    assert "model.embed_tokens.weight" in held["unnamed"] and "lm_head.weight" not in held["unnamed"]
    for bad in (
        {"wanted": {"a": [0, 0]}},
        {"wanted": {"a": 1}},
        {"wanted": [], "names": None},
        {"wanted": {}, "names": [1]},
    ):
        assert http.post("/weights/read", json=bad).status_code == 400


def test_sleeps_only_as_deep_as_it_was_started_for(http, session):
    refused = http.post("/sleep", json={"level": 1}, headers=session)
    assert refused.status_code == 409 and "--sleep-level" in error(refused)
    assert http.post("/sleep", json={"level": 3}, headers=session).status_code == 400
    assert http.post("/wake_up", headers=session).status_code == 200


# ------------------------------------------------------------------------------- the command


def test_listens_on_loopback_and_shows_no_key(server, http):
    assert server.url(1).startswith("http://127.0.0.1:")
    assert KEY.encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
    assert http.get("/info").json()["dtype"] == "float32"


def serve(*arguments):
    return cli.main(["serve", "--engine", "transformers", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine-args", '{"max_batch_size": 0}'), "max_batch_size=0"),
        (("--engine-args", '{"max_bach_size": 8}'), "Did you mean 'max_batch_size'?"),
        (("--engine-args", '{"dtype": "float23"}'), "'float23'"),
        (("--engine-args", "{dtype}"), "'{dtype}'"),
        (("--engine", "vllm", "--engine-args", '{"max_model_length": 8}'), "max_model_length"),
        (("--engine", "vllm", "--engine-args", '{"tensor_parallel_size": "2"}'), "size']='2': must be a whole number"),
        (("--port", 1 << 16), "--port 65536"),
        (("--max-request-mb", 0), "--max-request-mb 0"),
        (("--key-file", os.devnull), "the file /dev/null holds no key"),
        (("--model", "/no/such/folder"), "/no/such/folder"),
    ],
)
def test_wrong_arguments_are_one_line_before_the_model_is_loaded(model_folder, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(server_module, "EngineThread", lambda: pytest.fail("the model would be loaded"))
    assert serve("--model", model_folder, *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightrft: error: ") and message in line


def test_a_port_in_use_is_one_line_before_the_model_is_loaded(model_folder, http, capsys, monkeypatch):
    monkeypatch.setattr(server_module, "EngineThread", lambda: pytest.fail("the model would be loaded"))
    assert serve("--model", model_folder, "--port", http.base_url.port) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"port {http.base_url.port}" in line and "in use" in line


def test_a_key_is_made_and_an_open_network_is_warned_of(model_folder, capsys, caplog, monkeypatch):
    monkeypatch.delenv("LIGHTRFT_KEY", raising=False)
    monkeypatch.setattr(server_module, "EngineThread", lambda: pytest.exit("far enough"))
    monkeypatch.setattr(server_module.signal, "signal", lambda *_: None)
    for _ in range(2):
        with pytest.raises(pytest.exit.Exception):
            serve("--model", model_folder, "--port", 0, "--host", "0.0.0.0")
    keys = re.findall(r"the key is (\S{40,})", capsys.readouterr().out)
    assert len(set(keys)) == 2
    assert "not encrypted" in caplog.text
