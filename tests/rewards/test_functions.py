from __future__ import annotations

import time
from decimal import Decimal

import pytest

from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.rewards import Rewards
from lightrft_lightning.rewards import functions as f
from lightrft_lightning.tasks import make_task

MB = 1_000_000


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("3 + 4 = 7", "7", True),
        ("The answer is 7.", 7, True),
        ("7 or 8", 7, False),
        ("12-7=5", 5, True),
        ("so 12-7", 7, True),
        ("x=-8", "-8", True),
        ("(3)-2", 2, True),
        ("\u22127", "-7", True),
        ("$1,234.50", 1234.5, True),
        ("1234.5", "1,234.50", True),
        ("3,4", 4, True),
        ("about .5", 0.5, True),
        ("82.0", "82", True),
        ("82", " 82\n", True),
        ("-0", "-0.0", True),
        ("0", -0.0, True),
        ("9" * 400, 10**400 - 1, True),
        ("no number", 1, False),
        ("", 0, False),
        ("lone \ud800 5", 5, True),
        ("\u0665", 5, False),  # digits of other scripts are not what was asked for
    ],
)
def test_last_number(text, answer, right):
    assert f.last_number(text, answer, "eos") == float(right)


@pytest.mark.parametrize("text", ["1" * 10 * MB, "1 " * MB, "1," * MB, "-" * 10 * MB, "." * 10 * MB, "1,111" * MB])
def test_last_number_in_long_texts_is_quick(text):
    start = time.monotonic()
    assert f.last_number(text, -5, "eos") == 0
    assert time.monotonic() - start < 5


def test_unfinished():
    assert f.last_number("7", 7, "length") == 1
    assert f.last_number("7", 7, "length", unfinished=-0.5) == -0.5
    assert f.last_number("7", 7, "stop", unfinished=-0.5) == 1


@pytest.mark.parametrize("answer", ["seven", "", None, "nan", float("inf"), [7]])
def test_answers_that_are_no_number(answer):
    with pytest.raises(ValueError, match="is no number"):
        f.last_number("7", answer, "eos")


def test_exact_match():
    assert f.exact_match(" 82\n", 82) == 1
    assert f.exact_match("82.0", "82") == 0
    assert f.exact_match("\ud800", "\ud800") == 1


def test_overlong():
    def penalty(n, **kwargs):
        return f.overlong("", (1,) * n, limit=10, buffer=4, **kwargs)

    assert [penalty(n) for n in (0, 6, 7, 8, 10, 12)] == [0, 0, -0.25, -0.5, -1, -1]
    assert penalty(8, factor=2) == -1
    with pytest.raises(ValueError, match="buffer=0"):
        f.overlong("", (), limit=10, buffer=0)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("37+45=82", 82, True),
        ("37+45=83", 82, False),
        (r"The answer is \boxed{\frac{2}{4}}.", "1/2", True),
        ("so 0.5", r"\frac{1}{2}", True),
        ("$1+x$", "x+1", True),
        ("", 82, False),
        ("lone \ud800 82", 82, True),
        ("82 " * MB, 82, True),
    ],
)
def test_math_verify(text, answer, right):
    assert f.math_verify(text, answer, timeout=20) == float(right)


def test_math_verify_survives_what_sympy_does_not():
    """This holds the interpreter lock for ever: in a thread of ours it would freeze the whole run."""
    samples = [
        Trajectory(Prompt((1,), "p", {"answer": 5}), Completion((1,), (0.0,), "eos"), group=0, text=text)
        for text in ("$5$", "$9^{9^{9^9}}$", r"\boxed{5}")
    ]
    report = Rewards({"name": "math_verify", "timeout": 1.0}).score(samples)
    assert [t.reward for t in samples] == [1, 0, 1]
    assert report.failed == 0


def test_math_verify_whose_process_was_killed_costs_one_sample():
    assert f.math_verify("5", 5) == 1
    while not f._idle_math_processes.empty():
        process = f._idle_math_processes.get()
        process.kill()
        process.wait()
    f._idle_math_processes.put(process)
    with pytest.raises(RuntimeError, match="ended with code -9"):
        f.math_verify("5", 5)
    assert f.math_verify("5", 5) == 1


@pytest.mark.parametrize("name", ["chain_sum", "arc_agi", "countdown"])
def test_reasoning_gym(name):
    for row in make_task({"task": f"reasoning_gym.{name}", "size": 2, "seed": 3}):
        assert f.reasoning_gym(f"It is <answer>1</answer>, no: <answer> {row['answer']}\n</answer>.", row["entry"]) == 1
        assert f.reasoning_gym(f" {row['answer']} ", row["entry"]) == 1
        assert f.reasoning_gym("<answer>x</answer>", row["entry"]) < 0.5


def test_reasoning_gym_verifies_with_the_options_of_the_task():
    """With one decimal place the tolerance is 0.1, by default it is smaller."""
    places = {"min_num_decimal_places": 1, "max_num_decimal_places": 1}
    (row,) = make_task({"task": "reasoning_gym.decimal_arithmetic", "size": 1, **places})
    nearly = str(Decimal(row["answer"]) + Decimal("0.05"))
    assert f.reasoning_gym(nearly, row["entry"]) == 1
    assert f.reasoning_gym(nearly, {**row["entry"], "config": {}}) == 0


@pytest.mark.parametrize("text", ["", "<answer>" * MB, "</answer>" * MB, "</answer><answer>", "\ud800", "x" * 10 * MB])
def test_reasoning_gym_of_hostile_texts(text):
    (row,) = make_task({"task": "reasoning_gym.chain_sum", "size": 1})
    start = time.monotonic()
    assert f.reasoning_gym(text, row["entry"]) < 0.1
    assert time.monotonic() - start < 5
