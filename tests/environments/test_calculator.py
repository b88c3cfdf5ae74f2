"""The calculator evaluates arithmetic, and nothing else."""

from __future__ import annotations

import contextlib
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrft_lightning import Prompt
from lightrft_lightning.environments import Calculator, Observation
from lightrft_lightning.environments.base import Turn
from lightrft_lightning.environments.calculator import evaluate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2+3", 5), (" 2 * (3 + 4) ", 14), ("-7//2", -4), ("7%4", 3), ("1/4", 0.25), ("8/2", 4), ("--3", 3),
        ("1.5*2", 3), ("99999999999*99999999999", 99999999999**2),
    ],
)  # fmt: skip
def test_arithmetic(expression, value):
    assert evaluate(expression) == value and type(evaluate(expression)) is type(value)


@pytest.mark.parametrize(
    "expression",
    [
        "", " ", "2+", "1/0", "2**9999999", "1,2", "a", "__import__('os').system('true')", "().__class__", "9" * 201,
        "(" * 150 + ")" * 150, "1e999", "1 if 1 else 2", "2 3", "007", "5(3)", "1\x00", "٣+٤", "1==1", "[1]", "1j",
        "1." + "*9" * 98 + "%0", "True", "'a'*9", "lambda:0", "1<<999",
    ],
)  # fmt: skip
def test_everything_else_is_refused(expression):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError):
            evaluate(expression)


@given(st.text(alphabet="0123456789.+-*/%() \n", max_size=30))
def test_whatever_is_written_there_is_a_number_or_an_error(text):
    with contextlib.suppress(ValueError):
        assert isinstance(evaluate(text), (int, float))


def turn(text, finish_reason="stop"):
    return Turn(text, (1,), finish_reason, 1, False)


def test_calls_are_answered_and_the_answer_ends_it():
    calculator = Calculator()
    calculator.reset(Prompt((1,), "", {"answer": 12}), 0)
    assert calculator.step(turn("so <calc>1</calc> <calc>3*4</calc>")) == Observation("=12\n")
    assert calculator.step(turn("<calc>3*</calc>")) == Observation("=?\n", error=True)
    assert calculator.step(turn("It is 12.", "eos")) == Observation(reward=1.0, done=True)
    assert calculator.step(turn("It is 13.", "eos")) == Observation(reward=0.0, done=True)
    assert calculator.step(turn("12</calc> <calc>")).done


def test_marks_and_texts_are_options():
    calculator = Calculator(opening="[", closing="]", reply="{value};", error="?", answer="")
    calculator.reset(Prompt((1,), ""), 0)
    assert calculator.step(turn("[2+2]")) == Observation("4;")
    assert calculator.step(turn("4", "eos")) == Observation(done=True)
    with pytest.raises(KeyError):
        Calculator(reply="{result}")
