"""The reward `remote`, against real servers on this machine."""

from __future__ import annotations

import gzip
import itertools
import math
import pickle
import time

import pytest
from bytes_server import HEADER, BytesServer

from lightrft_lightning.rewards import RemoteReward, RewardReport, Rewards
from lightrft_lightning.rewards._http import ServerError, Servers

FAST = {"backoff": 0.01, "timeout": 0.5}


def right(body):
    return {"rewards": [float(q.removeprefix(p)) for q, p in zip(body["query"], body["prompts"], strict=True)]}


@pytest.fixture
def score(samples):
    def run(url, n=5, **options):
        batch = samples([str(i) for i in range(n)])
        report = Rewards({"name": "remote", "url": url, **FAST, **options}).score(batch)
        return [t.reward for t in batch], report

    return run


def test_the_protocol(serve, score, monkeypatch):
    server = serve(lambda body: {**right(body), "scores": [], "extra_logs": {"a": [1]}})
    monkeypatch.setenv("RM_KEY", "secret")
    rewards, report = score(f"{server.url}/get_reward", 5, batch_size=2, key_env="RM_KEY")
    assert rewards == [0, 1, 2, 3, 4] and report == RewardReport(5)
    (path, headers, body), *_ = sorted(server.requests, key=lambda request: request[2]["labels"])
    assert path == "/get_reward" and headers["Authorization"] == "Bearer secret"
    assert body == {"query": ["prompt 00", "prompt 11"], "prompts": ["prompt 0", "prompt 1"], "labels": [0, 1]}
    assert len(server.requests) == 3


def test_labels_are_a_column_of_choice(serve, samples):
    server = serve(right)
    reward = {"name": "remote", "url": server.url, "label_column": "gold"}
    Rewards(reward).score(samples(["1"], gold="x"))
    assert server.requests[0][2]["labels"] == ["x"]
    with pytest.raises(ValueError, match="needs 'gold', which is no option"):
        Rewards(reward).score(samples(["1"]))


def test_failures_that_pass_are_tried_again(serve, score):
    answers = iter([500, 429, 503])
    server = serve(lambda body: next(answers, None) or right(body))
    assert score(server.url)[0] == [0, 1, 2, 3, 4]
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (400, "status 400"), (b"{not json", "no JSON"), ([1, 2], "no list 'rewards'"), ({"reward": [1]}, "no list"),
        ({"rewards": 3}, "no list"), ({"rewards": [1.0]}, "1 rewards for 5"), ({"rewards": [1.0] * 6}, "6 rewards for"),
        (b'{"rewards": [' + b"1" * 3000 + b"]}", "larger than max_bytes=1000"),
    ],
)  # fmt: skip
def test_an_answer_that_is_wrong_fails_its_samples_at_once(serve, score, answer, reason, caplog):
    server = serve(lambda body: answer)
    rewards, report = score(server.url, max_bytes=1000)
    assert rewards == [None] * 5 and report == RewardReport(5, failed=5)
    assert len(server.requests) == 1 and reason in caplog.text


def test_single_rewards_that_are_no_numbers(serve, score):
    server = serve(lambda body: {"rewards": [1, math.nan, "2", None, -math.inf]})
    rewards, report = score(server.url)
    assert rewards == [1, None, None, None, None]
    assert report == RewardReport(5, failed=3, non_finite=2, inapplicable=1)


def test_a_wrong_answer_costs_its_own_request_only(serve, score):
    server = serve(lambda body: right(body) if 2 not in body["labels"] else {"rewards": [1]})
    assert score(server.url, 6, batch_size=2)[0] == [0, 1, None, None, 4, 5]


def test_a_server_that_hangs(serve, score, caplog):
    server = serve(lambda body: server.release.wait(30))
    start = time.monotonic()
    rewards, _ = score(server.url, timeout=0.2, retries=1)
    assert rewards == [None] * 5 and time.monotonic() - start < 3
    assert "no complete answer within 0.2 s" in caplog.text and len(server.requests) == 2


def test_a_server_that_drips(samples):
    """Each byte comes in time, the whole answer never does."""
    import socket
    import threading

    listener = socket.create_server(("127.0.0.1", 0))

    def drip():
        connection, _ = listener.accept()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        try:
            while True:
                connection.sendall(b"1")
                time.sleep(0.1)
        except OSError:
            connection.close()

    threading.Thread(target=drip, daemon=True).start()
    servers = Servers(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.4, retries=0)
    with pytest.raises(ServerError, match=r"no complete answer within 0\.4 s"):
        servers.post({})
    listener.close()


def test_one_of_two_servers_is_dead(serve, score):
    dead, alive = serve(right), serve(right)
    dead.stop()
    rewards, _ = score([dead.url, alive.url], 40, batch_size=2)
    assert rewards == list(range(40))


def test_requests_are_balanced(serve, score):
    def slowly(body):
        time.sleep(0.05)
        return right(body)

    servers = [serve(slowly), serve(slowly)]
    assert score([s.url for s in servers], 24, batch_size=1)[0] == list(range(24))
    assert min(len(s.requests) for s in servers) >= 8


def test_the_breaker_opens_and_lets_one_request_try(serve):
    down = True
    server = serve(lambda body: 500 if down else {"ok": 1})
    servers = Servers(server.url, retries=0, breaker_failures=3, breaker_pause=0.3)
    for _ in range(3):
        with pytest.raises(ServerError, match="status 500"):
            servers.post({})
    with pytest.raises(ServerError, match=r"out of order, not asked again for up to 0.3 s: .*status 500"):
        servers.post({})
    assert len(server.requests) == 3
    time.sleep(0.35)
    with pytest.raises(ServerError, match="status 500"):  # the trial fails
        servers.post({})
    with pytest.raises(ServerError, match="out of order"):
        servers.post({})
    assert len(server.requests) == 4
    down = False
    time.sleep(0.35)
    assert servers.post({}) == {"ok": 1} and servers.post({}) == {"ok": 1}


def test_a_broken_server_gets_nothing_while_another_works(serve):
    broken, fine = serve(lambda body: 500), serve(lambda body: {})
    servers = Servers([broken.url, fine.url], backoff=0.0, breaker_failures=2, breaker_pause=60)
    for _ in range(20):
        servers.post({})
    assert len(broken.requests) == 2 and len(fine.requests) == 20


def test_a_refusal_does_not_open_the_breaker(serve):
    server = serve(lambda body: 400)
    servers = Servers(server.url, breaker_failures=1, breaker_pause=60)
    for _ in range(3):
        with pytest.raises(ServerError, match="status 400"):
            servers.post({})
    assert len(server.requests) == 3


def test_scoring_begins_while_others_are_still_generated(serve, samples):
    server = serve(right)
    batch = samples(["0", "1"])
    with Rewards({"name": "remote", "url": server.url}).in_background() as scoring:
        scoring.add(batch[:1])
        end = time.monotonic() + 10
        while not server.requests and time.monotonic() < end:
            time.sleep(0.01)
        assert len(server.requests) == 1
        scoring.add(batch[1:])
        scoring.finish()
    assert [t.reward for t in batch] == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "reward 'remote' needs the option 'url'"),
        ({"url": "localhost:1"}, "url='localhost:1': must begin with http"),
        ({"url": []}, r"url=\[\]: must begin"),
        ({"url": ["http://x", "https://me:secret@y/z"]}, r"url=\.\.\.: has a user's name or password in it"),
        ({"url": "http://x", "retrys": 1}, "unknown option of reward 'remote' 'retrys'. Did you mean 'retries'"),
        ({"url": "http://x", "retries": -1}, "retries=-1: must be 0 or more"),
        ({"url": "http://x", "batch_size": 0}, "batch_size=0, concurrency=8 must be"),
        ({"url": "http://x", "key_env": "NO_SUCH_KEY"}, "'NO_SUCH_KEY': the environment variable is not set"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Rewards({"name": "remote", **options})


def test_a_remote_reward_can_be_pickled(serve):
    reward = pickle.loads(pickle.dumps(RemoteReward(serve(right).url)))
    assert reward(["p"], ["3"]) == [3.0]


# ---------------------------------------------------------------- answers that no server of good will gives


def drip(start, piece, pause=0.02):
    def answer(path):
        yield HEADER + start
        while True:
            yield piece
            time.sleep(pause)

    return answer


def packed(*layers):
    content = gzip.compress(b"0" * (1 << 20))
    for _ in layers[1:]:
        content = gzip.compress(content)
    header = f"Content-Encoding: {', '.join(layers)}\r\nContent-Length: {len(content)}\r\n\r\n"
    return lambda path: [HEADER + header.encode() + content]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (drip(b"", b"X: y\r\n"), r"no complete answer within 0\.3 s"),
        (drip(b"\r\n", b" "), r"no complete answer within 0\.3 s"),
        (lambda path: itertools.repeat(b"HTTP/1.1 103 Early Hints\r\n\r\n"), r"no complete answer within 0\.3 s"),
        (drip(b"\r\n", b" " * 65536, pause=0), "larger than max_bytes=1000000"),
        (packed("gzip"), "the encoding 'gzip', which was not asked for"),
        (packed("gzip", "gzip"), "the encoding 'gzip, gzip', which was not asked for"),
        (packed("br"), "the encoding 'br'"),
        (lambda path: [HEADER + b"Content-Length: 200000\r\n\r\n" + b"[" * 200_000], "the answer is no JSON"),
        (lambda path: [b"HTTP/1.1 302 Found\r\nLocation: file:///etc/hostname\r\nContent-Length: 0\r\n\r\n"], "302"),
    ],
    ids=["header", "body", "1xx", "endless", "gzip", "gzip twice", "br", "deep", "redirect"],
)
def test_an_answer_without_end_or_of_unknown_size_ends_at_the_limits(answer, reason):
    server = BytesServer(answer)
    timeout = 0.3 if "no complete answer" in reason else 20.0
    servers = Servers(server.url, timeout=timeout, retries=0, max_bytes=1_000_000)
    start = time.monotonic()
    with pytest.raises(ServerError, match=reason):
        servers.post({})
    assert time.monotonic() - start < timeout + 5 and server.sent < 50_000_000
    server.close()
