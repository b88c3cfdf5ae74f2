from __future__ import annotations

import asyncio
import threading
import time

from lightrft_lightning.rewards._calls import Outcome, run_in_threads, run_on_event_loop


def test_results_in_order_with_few_threads():
    used = set()

    def call(i):
        used.add(threading.get_ident())
        time.sleep(0.01 * (3 - i % 3))
        return i

    outcomes = run_in_threads([lambda i=i: call(i) for i in range(12)], workers=3, deadline=5)
    assert outcomes == [Outcome(i) for i in range(12)]
    assert 1 <= len(used) <= 3


def test_a_stuck_thread_is_replaced():
    release = threading.Event()
    calls = [lambda: release.wait(60), lambda: 1, lambda: release.wait(60), lambda: 2]
    outcomes = run_in_threads(calls, workers=1, deadline=0.2)
    release.set()
    assert [o.failure for o in outcomes] == ["timed_out", None, "timed_out", None]
    assert "deadline of 0.2 s" in outcomes[0].reason


def test_a_call_that_returns_late_counts_as_late_however_soon_it_is_seen():
    def late():
        time.sleep(0.3)
        return 1

    for _ in range(3):
        assert run_in_threads([late], workers=1, deadline=0.25)[0].failure == "timed_out"


def test_calls_that_all_hang_cost_one_deadline():
    begin = time.monotonic()
    outcomes = run_in_threads([lambda: time.sleep(5)] * 3, workers=3, deadline=1)
    assert [o.failure for o in outcomes] == ["timed_out"] * 3 and time.monotonic() - begin < 1.9


def test_one_thread_cannot_end_the_others():
    import _thread

    outcomes = run_in_threads([_thread.exit, lambda: 1], workers=1, deadline=5)
    assert [o.failure for o in outcomes] == ["failed", None]


def test_nothing_to_do():
    assert run_in_threads([], workers=4, deadline=1) == []
    assert run_on_event_loop([], deadline=1) == []


def test_blocked_event_loop_is_reported_as_unknown():
    release = threading.Event()

    async def quick():
        return 1

    async def blocks():
        release.wait(60)

    outcomes = run_on_event_loop([quick, blocks], deadline=0.1)
    release.set()
    assert outcomes[1] is None


def test_cancelled_calls_do_not_hold_up_the_rest():
    async def forever():
        await asyncio.Event().wait()

    async def quick():
        return 1

    start = time.monotonic()
    outcomes = run_on_event_loop([forever, quick, forever], deadline=0.2)
    assert [o.failure for o in outcomes] == ["timed_out", None, "timed_out"]
    assert time.monotonic() - start < 2
