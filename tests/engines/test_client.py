"""What the trainer's side of HTTP engines does with answers that are too long, packed or no JSON."""

from __future__ import annotations

import gzip
import itertools
import json

import pytest
from bytes_server import HEADER, BytesServer

from lightrft_lightning import SamplingParams
from lightrft_lightning.engines import _client
from lightrft_lightning.engines import _wire as wire
from lightrft_lightning.engines._client import Client, Hanging
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.experience.trajectory import Completion


@pytest.fixture
def connect():
    """`connect(answer)`: a client of a server that answers so."""
    opened = []

    def start(answer):
        server = BytesServer(answer)
        opened.extend([server, Client(server.url, "key")])
        return opened[-1]

    yield start
    for one in opened[::-1]:
        one.close()


def whole(body, *headers):
    return lambda path: [b"".join([HEADER, *headers, f"Content-Length: {len(body)}\r\n\r\n".encode(), body])]


def endless(piece):
    return lambda path: itertools.chain([HEADER + b"Connection: close\r\n\r\n"], itertools.repeat(piece))


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (endless(b" " * 65536), EngineError, "malformed answer, more than 1000000 bytes"),
        (endless(b""), Hanging, "no complete answer by the deadline"),
        (whole(gzip.compress(b"{}"), b"Content-Encoding: gzip\r\n"), EngineError, "the encoding 'gzip', which was not"),
        (whole(b"[" * 200_000), EngineError, "malformed answer, no JSON"),
        (lambda path: [b"HTTP/1.1 500 No\r\n\r\n", *[b"x" * 65536] * 40], EngineError, "more than 1000000 bytes"),
        (whole(b"\xff\xfe{"), EngineError, "malformed answer, no JSON"),
    ],
    ids=["endless", "silent", "packed", "deep", "error", "no text"],
)
def test_an_answer_stays_within_its_limits(connect, monkeypatch, answer, error, message):
    monkeypatch.setattr(_client, "MOST_BYTES", 1_000_000)
    with pytest.raises(error, match=message):
        connect(answer).call("GET", "/info", None, 0.5)


@pytest.mark.parametrize(
    ("answer", "count", "message"),
    [
        (endless(b" " * 1500), 10**6, "a line of more than 1000 bytes"),
        (endless(b"{}\n"), 5, "malformed answer, more than 5000 bytes"),
        (whole(b"{}\n" * 9, b"Content-Encoding: deflate\r\n"), 5, "the encoding 'deflate'"),
    ],
)
def test_lines_stay_within_their_limits(connect, answer, count, message):
    with pytest.raises(EngineError, match=message):
        list(connect(answer).lines("/generate", {}, 5.0, 1000, count))


def test_lines_are_put_together_from_pieces(connect):
    pieces = [HEADER + b"Connection: close\r\n\r\n", b'{"a"', b": 1", b'}\n{"b": 2}\n', b'{"c": 3}']
    assert list(connect(lambda path: pieces).lines("/", {}, 5.0, 1000, 5)) == [{"a": 1}, {"b": 2}, {"c": 3}]


def test_the_longest_group_fits_into_its_line():
    sampling = SamplingParams(n=3, max_new_tokens=500)
    completion = Completion((262_143,) * 500, (-1.2345678901234567e-101,) * 500, "length")
    assert len(json.dumps(wire.group_to_json(10**6, [completion] * 3))) < wire.most_bytes(sampling)
