from __future__ import annotations

import asyncio
import logging
import math
import subprocess
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.rewards import RewardReport, Rewards

TEN_MB = "x" * 10_000_000


def trajectory(text="text", prompt="prompt", tokens=2, finish_reason="eos", **fields):
    completion = Completion((7,) * tokens, (-1.0,) * tokens, finish_reason)
    return Trajectory(Prompt((1, 2), prompt, fields), completion, group=0, text=text)


def batch(n):
    return [trajectory(text=str(i), prompt=f"prompt {i}", answer=i) for i in range(n)]


def score(function, trajectories, **settings):
    report = Rewards(function, **settings).score(trajectories)
    return [t.reward for t in trajectories], report


# ------------------------------------------------------------------------------------------------------ the four shapes


def single(completion, answer):
    return int(completion) * 100 + answer


def batched(completions, answer):
    return [single(c, a) for c, a in zip(completions, answer, strict=True)]


async def async_single(completion, answer):
    await asyncio.sleep(0.01 * (answer % 3))  # they end in another order than they start in
    return single(completion, answer)


async def async_batched(completions, answer):
    await asyncio.sleep(0)
    return batched(completions, answer)


class CallableObject:
    async def __call__(self, completion, answer):
        return await async_single(completion, answer)


SHAPES = [single, batched, async_single, async_batched, CallableObject()]


@pytest.mark.parametrize("function", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 1000])
def test_every_shape_keeps_the_order(function, n):
    start = time.monotonic()
    rewards, report = score(function, batch(n))
    assert rewards == [i * 101 for i in range(n)]
    assert report == RewardReport(samples=n)
    assert time.monotonic() - start < 10


def test_order_with_unequal_durations():
    def uneven(completion, answer):
        time.sleep(0.002 * (answer % 5))
        return answer

    assert score(uneven, batch(40))[0] == list(range(40))


def test_empty_batch():
    assert Rewards(single).score([]) == RewardReport(0)


@pytest.mark.parametrize("function", SHAPES)
def test_inside_a_running_event_loop(function):
    async def notebook_cell():
        return score(function, batch(3))[0]

    assert asyncio.run(notebook_cell()) == [0, 101, 202]


def test_async_samples_run_concurrently():
    async def slow(completion):
        await asyncio.sleep(0.3)
        return 1

    start = time.monotonic()
    assert score(slow, batch(50))[0] == [1.0] * 50
    assert time.monotonic() - start < 3


# ---------------------------------------------------------------------------------------------------------- arguments


def test_a_function_gets_what_it_names():
    seen = []

    def function(prompt, completion, token_ids, finish_reason, answer, level=3):
        seen.append((prompt, completion, token_ids, finish_reason, answer, level))
        return 0

    score(function, [trajectory("c", "p", 2, "length", answer=[1], other=2)])
    assert seen == [("p", "c", (7, 7), "length", [1], 3)]


def test_keyword_arguments_get_everything():
    def function(completion, **columns):
        assert columns == {"prompt": "p", "token_ids": (7, 7), "finish_reason": "eos", "answer": 1, "other": 2}
        return 1

    assert score(function, [trajectory("c", "p", answer=1, other=2)])[0] == [1.0]


def test_batch_arguments_are_lists():
    def function(prompts, completions, finish_reason, answer):
        assert (prompts, completions, finish_reason, answer) == (["p", "q"], ["c", "d"], ["eos", "stop"], [1, 2])
        return [1, 2]

    samples = [trajectory("c", "p", answer=1), trajectory("d", "q", finish_reason="stop", answer=2)]
    assert score(function, samples)[0] == [1, 2]


def test_missing_column_is_an_error_before_any_work():
    calls = []

    def first(completion):
        calls.append(completion)
        return 0

    def second(completion, anwser):
        return 0

    with pytest.raises(ValueError, match=r"'second' needs 'anwser'.*Did you mean 'answer'"):
        Rewards([first, second]).score(batch(2))
    assert not calls


def test_column_missing_in_one_row_costs_that_row(caplog):
    samples = [trajectory(answer=1), trajectory("no answer here"), trajectory(answer=3)]
    for function in (lambda completion, answer: answer, lambda completions, answer: answer):
        rewards, report = score(function, samples)
        assert rewards == [1, None, 3]
        assert report.failed == 1
    assert "no column 'answer'" in caplog.text


def test_later_batches_without_the_column_do_not_end_the_run():
    rewards = Rewards(lambda completion, answer: answer)
    rewards.score([trajectory(answer=1)])
    assert rewards.score([trajectory()]).failed == 1


# ------------------------------------------------------------------------------------------------- weights and results


def test_weighted_sum_and_parts():
    def length(completion):
        return len(completion)

    (sample,) = samples = [trajectory("abc", answer="abc")]
    Rewards([length, "exact_match"], weights=[0.5, 2]).score(samples)
    assert sample.reward == 0.5 * 3 + 2 * 1
    assert sample.reward_parts == {"length": 3.0, "exact_match": 1.0}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0), (-0.0, 0.0), (3, 3.0), (np.float32(0.5), 0.5), (np.bool_(True), 1.0), (torch.tensor(0.25), 0.25),
        (torch.tensor([2.0]), 2.0), (Decimal("1.5"), 1.5), (Fraction(1, 4), 0.25), (10**300, 1e300),
    ],
)  # fmt: skip
def test_numbers(value, expected):
    def function(completion):
        return value

    rewards, report = score(function, [trajectory()])
    assert rewards == [expected] and report.failed == 0


class Hostile:
    def __float__(self):
        raise SystemExit(3)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("1", "failed"), (b"1", "failed"), ([1.0], "failed"), ([[1], [2]], "failed"), ({}, "failed"),
        (1j, "failed"), (torch.zeros(2), "failed"), (Hostile(), "failed"), (TEN_MB, "failed"),
        (math.nan, "non_finite"), (math.inf, "non_finite"), (np.float32("-inf"), "non_finite"), (10**400, "non_finite"),
        (Decimal("nan"), "non_finite"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", ["single", "batch", "async"])
def test_values_that_are_no_reward_cost_their_own_sample(value, kind, shape, caplog):
    def function(completion):
        return value if completion == "1" else 5

    async def async_function(completion):
        return function(completion)

    def batch_function(completions):
        return [function(c) for c in completions]

    functions = {"single": function, "batch": batch_function, "async": async_function}
    rewards, report = score(functions[shape], batch(3))
    assert rewards == [5, None, 5]
    assert report.failed == 1 and report.non_finite == (kind == "non_finite")
    assert len(caplog.records) == 1 and "'prompt 1'" in caplog.text
    assert len(caplog.text) < 1000


def test_overflowing_sum():
    rewards, report = score([lambda completion: 1e308, lambda completion: 1e308], [trajectory()])
    assert rewards == [None] and report == RewardReport(1, failed=1, non_finite=1)


def test_a_failed_part_leaves_the_others_visible():
    def broken(completion):
        raise ValueError("no")

    def fine(completion):
        return 1

    (sample,) = samples = [trajectory()]
    Rewards([broken, fine]).score(samples)
    assert sample.reward is None and sample.reward_parts == {"fine": 1.0}


def test_fixed_value_for_failures():
    def picky(completion):
        return 1 / int(completion)

    rewards, report = score(picky, batch(3), on_error=-1)
    assert rewards == [-1, 1, 0.5] and report.failed == 1


@pytest.mark.parametrize("shape", ["single", "batch", "async", "async batch"])
def test_a_function_that_returns_none_does_not_apply(shape, caplog):
    def odd(completion):
        return int(completion) if int(completion) % 2 else None

    def odds(completions):
        return [odd(c) for c in completions]

    async def async_odd(completion):
        return odd(completion)

    async def async_odds(completions):
        return odds(completions)

    function = {"single": odd, "batch": odds, "async": async_odd, "async batch": async_odds}[shape]
    samples = batch(4)
    report = Rewards([function, lambda completion: 10], weights=[2, 1]).score(samples)
    assert [t.reward for t in samples] == [10, 12, 10, 16] and report == RewardReport(4)
    assert [len(t.reward_parts) for t in samples] == [1, 2, 1, 2]
    assert report.values[function.__name__] == 2 and report.rewarded == 4
    alone = batch(4)
    report = Rewards(function, on_error=-1).score(alone)
    assert [t.reward for t in alone] == [None, 1, None, 3], "on_error is for failures"
    assert [t.applicable for t in alone] == [False, True] * 2 and report == RewardReport(4, inapplicable=2)
    assert not caplog.records


def test_a_failure_beside_none_is_a_failure():
    report = Rewards([lambda completion: None, lambda completion: 1 / 0]).score(batch(2))
    assert report == RewardReport(2, failed=2)


def test_an_awaitable_of_a_plain_function_is_awaited():
    assert score(lambda completion, answer: async_single(completion, answer), batch(3))[0] == [0, 101, 202]
    assert score(lambda completions, answer: async_batched(completions, answer), batch(3))[0] == [0, 101, 202]


def test_scoring_again_replaces_the_old_result():
    (sample,) = samples = [trajectory(answer=4)]
    Rewards(lambda completion, answer: answer).score(samples)
    Rewards(lambda completion: math.nan).score(samples)
    assert sample.reward is None and sample.reward_parts == {}


# ----------------------------------------------------------------------------------------------------------- failures


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("twice broken")


@pytest.mark.parametrize(
    "error",
    [ValueError("boom"), SystemExit(1), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(),
     StopIteration(1), TimeoutError(), RecursionError(),
     MemoryError(), Unprintable(), ValueError("lone \ud800"), ValueError(TEN_MB)],
)  # fmt: skip
@pytest.mark.parametrize("shape", ["single", "batch", "async", "async batch"])
def test_any_exception_costs_its_own_sample(error, shape, caplog):
    def function(completion):
        if completion == "1":
            raise error
        return 5

    async def async_function(completion):
        await asyncio.sleep(0)
        return function(completion)

    def batch_function(completions):
        return [function(c) for c in completions]

    async def async_batch(completions):
        return [function(c) for c in completions]

    shapes = {"single": function, "batch": batch_function, "async": async_function, "async batch": async_batch}
    rewards, report = score(shapes[shape], batch(4))
    assert rewards == [5, None, 5, 5]
    assert report == RewardReport(4, failed=1)
    caplog.text.encode()
    assert sum("'prompt 1'" in r.getMessage() for r in caplog.records) == 1
    assert len(caplog.text) < 3000


def test_log_says_prompt_reason_and_place(caplog):
    def broken(completion):
        raise KeyError("answer missing")

    with caplog.at_level(logging.WARNING):
        score(broken, [trajectory(prompt="What is 1 + 1?" + "x" * 500)])
    assert "'What is 1 + 1?xxx" in caplog.text and "broken: KeyError" in caplog.text
    assert "answer missing" in caplog.text and "test_base.py:" in caplog.text
    assert len(caplog.records[0].getMessage()) < 600


def test_each_reason_is_logged_once(caplog):
    def picky(completion, answer):
        if answer < 12:
            raise KeyError("a") if answer % 3 else TypeError("b")
        return 1

    report = Rewards(picky).score(batch(15))
    first, second = [r.getMessage() for r in caplog.records]
    assert "8 of 15 samples: picky: KeyError: 'a'" in first and first.endswith("(first prompt: 'prompt 1')")
    assert "4 of 15 samples: picky: TypeError: b" in second and second.endswith("(first prompt: 'prompt 0')")
    assert (report + report).lines()[0].startswith("16 of 30 samples: picky")
    caplog.clear()
    Rewards(lambda completion: {}[completion]).score(batch(100))
    assert len(caplog.records) == 11 and "90 more samples: 90 further reasons" in caplog.text


def test_what_was_written_for_something_else_is_told_the_remedy():
    def reason(function):
        (text,) = Rewards(function).score(batch(1)).reasons
        return text

    import signal

    for conversational in (
        lambda completion: len(completion[0]["content"]),
        lambda completions: [c[-1].get("content") for c in completions],
        lambda prompt, completion: prompt[0].content,
    ):
        assert "Prompts and completions are text here" in reason(conversational)
    alarm = reason(lambda completion: signal.signal(signal.SIGALRM, signal.SIG_DFL))
    assert "with `processes: 1` this one is called in the main thread of a process" in alarm
    assert "asyncio.run" in reason(lambda completion: asyncio.get_event_loop().run_until_complete(None))
    assert "one with `completions` gets lists" in reason(lambda completion: [1.0])
    assert "returned a float in place of a list of numbers" in reason(lambda completions: 1.0)


def test_a_function_for_trl_gets_what_there_is_and_hears_what_there_is_not():
    def trl(prompts, completions, completion_ids, answer, trainer_state=None, log_extra=None, **kwargs):
        assert completion_ids == [[7, 7]] and kwargs["other"] == [5] and trainer_state is log_extra is None
        return [1.0]

    assert score(trl, [trajectory("c", answer=1, other=5)])[0] == [1.0]
    rewards = Rewards(lambda completions, log_metric, **kwargs: [1.0])
    with pytest.raises(ValueError, match=r"needs 'log_metric', which TRL's trainer passes .*`log_metric=None`"):
        rewards.check_data([trajectory().prompt])
    with pytest.raises(ValueError, match=r"'log_metric', which TRL's trainer passes"):
        rewards.score([trajectory()])


@pytest.mark.parametrize("shape", ["single", "batch"])
def test_what_a_function_does_to_its_columns_stays_with_it(shape):
    row = {"answer": [3, 1, 2], "meta": {"tests": ["a"]}}
    prompt = Prompt((1,), "p", row)
    samples = [Trajectory(prompt, Completion((1,), (0.0,), "eos"), group=0, text=str(i)) for i in range(4)]

    def function(completion, answer, meta):
        answer.sort()
        meta["tests"].append("b")
        return answer.pop(0) + len(meta.pop("tests"))

    def functions(completions, answer, meta):
        return [function(*args) for args in zip(completions, answer, meta, strict=True)]

    assert score([{"single": function, "batch": functions}[shape]] * 2, samples)[0] == [6, 6, 6, 6]
    assert row == {"answer": [3, 1, 2], "meta": {"tests": ["a"]}}


def test_a_fork_that_comes_back_answers_nothing(tmp_path):
    import os

    def forks(completion):
        if completion in "37":
            os.fork()
        (tmp_path / f"{completion}-{os.getpid()}").touch()
        return int(completion)

    async def forks_async(completion):
        return forks(completion)

    for function in (forks, forks_async):
        assert score(function, batch(10), workers=1) == ([float(i) for i in range(10)], RewardReport(10))
    time.sleep(0.1)
    assert len(list(tmp_path.iterdir())) <= 10 + 4, "no copy goes on with other samples"


@pytest.mark.parametrize("result", [[1, 2], [1, 2, 3, 4], 7, None, "123", {0: 1, 1: 1, 2: 1}, {1, 2, 3}])
def test_batch_results_that_do_not_fit_are_asked_for_one_by_one(result, caplog):
    def function(completions):
        return result if len(completions) > 1 else [int(completions[0])]

    assert score(function, batch(3))[0] == [0, 1, 2]
    assert "Calling it one sample at a time" in caplog.text


def test_an_exception_in_place_of_a_value_is_the_failure_of_its_sample(caplog):
    calls = []

    def function(completions):
        calls.append(completions)
        return [1.0, ValueError("no grade"), 3.0]

    rewards, report = score(function, batch(3))
    assert rewards == [1, None, 3] and report == RewardReport(3, failed=1) and len(calls) == 1
    assert "ValueError: no grade" in caplog.text


def test_endless_batch_result():
    def function(completions):
        while True:
            yield 1.0

    rewards, report = score(function, batch(3))
    assert rewards == [None] * 3 and report.failed == 3


def test_hostile_texts_pass_through():
    texts = [TEN_MB, "lone \ud800", "", "\0", "{", "%s"]
    samples = [trajectory(text, prompt=text, answer=[[[text]]]) for text in texts]
    rewards, _ = score(lambda completion, answer: len(completion) if answer[0][0][0] is completion else -1, samples)
    assert rewards == [len(t) for t in texts]


def test_hostile_prompts_can_be_logged(caplog):
    for prompt in (TEN_MB, "lone \ud800", "%s %d"):
        score(lambda completion: "no number", [trajectory(prompt=prompt)])
    caplog.text.encode()
    assert len(caplog.records) == 3 and len(caplog.text) < 3000


# ------------------------------------------------------------------------------------------------------------ deadlines


@pytest.fixture
def release():
    """Ends what a test left hanging."""
    event = threading.Event()
    yield event
    event.set()


def test_hanging_samples_cost_themselves(release):
    def function(completion):
        if int(completion) % 4 == 0:
            release.wait(60)
        return 1

    start = time.monotonic()
    rewards, report = score(function, batch(12), deadline=0.3, workers=2)
    assert rewards == [None, 1, 1, 1] * 3
    assert report == RewardReport(12, failed=3, timed_out=3)
    assert time.monotonic() - start < 3


def test_hanging_batch_function(release, caplog):
    def function(completions):
        if "2" in completions:
            release.wait(60)
        return [1] * len(completions)

    rewards, report = score(function, batch(5), deadline=0.3)
    assert rewards == [1, 1, None, 1, 1] and report.timed_out == 1


def test_hanging_async_function():
    async def function(completion):
        if completion == "2":
            await asyncio.sleep(60)
        return 1

    start = time.monotonic()
    rewards, report = score(function, batch(5), deadline=0.3)
    assert rewards == [1, 1, None, 1, 1] and report.timed_out == 1
    assert time.monotonic() - start < 3


def test_async_function_that_ignores_its_cancellation(release):
    async def function(completion):
        while completion == "2" and not release.is_set():
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                continue
        return 1

    start = time.monotonic()
    assert score(function, batch(5), deadline=0.3)[0] == [1, 1, None, 1, 1]
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("shape", ["single", "batch"])
def test_blocking_async_function(release, shape):
    async def function(completion):
        if completion == "2":
            release.wait(60)
        return 1

    async def batch_function(completions):
        return [await function(c) for c in completions]

    start = time.monotonic()
    rewards, report = score({"single": function, "batch": batch_function}[shape], batch(5), deadline=0.3)
    assert rewards == [1, 1, None, 1, 1] and report.timed_out == 1
    assert time.monotonic() - start < 8


def test_the_deadline_does_not_count_the_queue():
    def function(completion):
        time.sleep(0.1)
        return 1

    rewards, report = score(function, batch(12), deadline=0.5, workers=1)
    assert rewards == [1] * 12 and report.failed == 0


def test_the_deadline_of_a_busy_event_loop_counts_from_the_own_start():
    async def function(completion):
        time.sleep(0.1)
        return 1

    rewards, _ = score(function, batch(12), deadline=0.5)
    assert rewards == [1] * 12


def test_threads_do_not_pile_up():
    rewards = Rewards(single, workers=4)
    rewards.score(batch(20))
    time.sleep(0.1)
    before = threading.active_count()
    for _ in range(5):
        rewards.score(batch(20))
    time.sleep(0.1)
    assert threading.active_count() <= before


def test_a_process_with_stuck_rewards_can_exit():
    script = """
import asyncio, time
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.rewards import Rewards
def sync(completion): time.sleep(600)
async def blocking(completion): time.sleep(600)
async def waiting(completion): await asyncio.sleep(600)
samples = [Trajectory(Prompt((1,), "p"), Completion((1,), (0.0,), "eos"), group=0) for _ in range(2)]
for f in (sync, blocking, waiting):
    print(Rewards(f, deadline=0.2).score(samples).timed_out)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["2", "2", "2"]


def test_ctrl_c_passes_through(release):
    """A real one, sent while a reward hangs; nothing that waits may start afterwards."""
    script = """
import os, signal, threading, time
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.rewards import Rewards
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
started = []
def f(completion):
    started.append(1)
    if len(started) == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    time.sleep(2)
    return 1.0
samples = [Trajectory(Prompt((1,), "p"), Completion((1,), (0.0,), "eos"), group=0) for _ in range(50)]
try:
    Rewards(f, workers=2).score(samples)
except KeyboardInterrupt:
    time.sleep(3)
    print("interrupted", len(started))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "interrupted 2", run.stderr


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_error": "drp"}, "unknown on_error 'drp'. Did you mean 'drop'"),
        ({"on_error": math.nan}, "on_error must be a finite number"),
        ({"deadline": 0}, "deadline > 0"),
        ({"deadline": math.nan}, "deadline > 0"),
        ({"workers": 0}, "workers >= 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Rewards(single, **settings)


def test_endless_deadline():
    assert score(single, batch(2), deadline=math.inf)[0] == [0, 101]
    assert score(async_single, batch(2), deadline=math.inf)[0] == [0, 101]


# ------------------------------------------------------------------------------------------------------ in background


@pytest.mark.parametrize("function", SHAPES)
def test_background_gives_the_same_rewards(function):
    samples = batch(12)
    with Rewards(function).in_background() as scoring:
        for start in range(0, 12, 3):
            scoring.add(samples[start : start + 3])
        report = scoring.finish()
    assert [t.reward for t in samples] == [i * 101 for i in range(12)] and report == RewardReport(samples=12)


def test_background_starts_at_once_and_sums_its_reports():
    begun = threading.Event()

    def fails_once(completion):
        begun.set()
        return {"0": 1.0, "1": math.nan}[completion]

    samples = batch(3)
    with Rewards(fails_once).in_background() as scoring:
        scoring.add(samples[:1])
        assert begun.wait(10)
        scoring.add(samples[1:])
        report = scoring.finish()
    assert report == RewardReport(samples=3, failed=2, non_finite=1)


def test_background_shows_batch_functions_the_whole_batch():
    sizes = []

    def whole(completions):
        sizes.append(len(completions))
        return [0.0] * len(completions)

    samples = batch(6)
    with Rewards([whole, lambda completion: 1.0]).in_background() as scoring:
        scoring.add(samples[:2])
        time.sleep(0.1)
        scoring.add(samples[2:])
        scoring.finish()
    assert sizes == [6] and all(t.reward == 1.0 for t in samples)


def test_background_raises_what_scoring_raises():
    with (
        pytest.raises(ValueError, match="needs 'nothing', which is no option"),
        Rewards(lambda completion, nothing: 0.0).in_background() as scoring,
    ):
        scoring.add(batch(2))
        scoring.finish()


def test_background_with_nothing_to_score():
    with Rewards(single).in_background() as scoring:
        assert scoring.finish() == RewardReport(0)
