from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time

import pytest

from lightrft_lightning.strategies.peers import (
    Peer,
    _accept,
    _addresses,
    _listener,
    _reach,
    keep_alive,
    process_here,
    this_machine,
)

TOKEN = "0123456789abcdef" * 2


def in_background(function, *args):
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def listener(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with _listener() as listener:
        yield listener


def test_a_stranger_is_turned_away_and_a_rank_let_in(listener):
    port, deadline = listener.getsockname()[1], time.monotonic() + 10
    stranger = socket.create_connection(("127.0.0.1", port))
    stranger.sendall(b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n" + b"x" * 40)
    reached = []
    # Nobody listens at the first address, as where MASTER_ADDR is not rank 0's machine.
    in_background(lambda: reached.append(_reach(["127.0.0.2", "127.0.0.1"], port, TOKEN, 7, deadline)))
    connection, rank = _accept(listener, TOKEN, deadline, [7])
    assert rank == 7
    stranger.settimeout(5)
    with contextlib.suppress(ConnectionResetError):
        assert stranger.recv(1) == b""
    while not reached:
        time.sleep(0.01)
    here, there = Peer(7, connection), Peer(0, reached[0])
    there.send(failed="boom")
    there.send(left=True)
    there.socket.close()
    messages = []
    while here.open:
        messages += here.receive()
    assert messages == [{"failed": "boom"}, {"left": True}]
    here.send(too="late")  # no error: whoever reads finds out
    here.send(too="late")


def test_another_program_at_the_address_is_not_taken_for_rank_0():
    with socket.create_server(("127.0.0.1", 0)) as other:
        in_background(lambda: other.accept()[0].sendall(b"SSH-2.0-OpenSSH_9.6 and further text"))
        with pytest.raises(ConnectionError, match=r"rank 3 cannot reach rank 0 on port \d+: 127\.0\.0\.1: not rank 0"):
            _reach(["127.0.0.1"], other.getsockname()[1], TOKEN, 3, time.monotonic() + 5)


def test_ranks_that_do_not_call_are_named(listener):
    with pytest.raises(ConnectionError, match=r"rank 0 has not heard from rank\(s\) \[1, 3\] within the deadline"):
        _accept(listener, TOKEN, time.monotonic() + 0.2, [1, 3])


def test_on_one_machine_nobody_outside_can_connect(listener, monkeypatch):
    assert _addresses() == ["127.0.0.1"] and listener.getsockname()[0] == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    assert _addresses()[0] == "192.0.2.1" and socket.gethostname() in _addresses()


def test_slow_strangers_hold_up_nobody(listener):
    port, deadline = listener.getsockname()[1], time.monotonic() + 30
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    strangers[0].sendall(b"x")
    in_background(lambda: _reach(["127.0.0.1"], port, TOKEN, 1, deadline))
    began = time.monotonic()
    assert _accept(listener, TOKEN, deadline, [1])[1] == 1
    assert time.monotonic() - began < 9


def test_kernels_ask_for_a_machine_that_is_gone_and_a_stopped_process_is_seen(listener):
    with socket.create_connection(listener.getsockname()[:2]) as connection:
        keep_alive(connection, 60)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert process_here(child.pid, this_machine()) in "RSD"
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        assert process_here(child.pid, this_machine()) == "T"
        assert process_here(child.pid, "another machine") == ""
    finally:
        child.kill()
        child.wait()
